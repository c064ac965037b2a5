"""How the API pages read a docstring (mkdocs.yml names this file as an extension of griffe, which reads the source).

  - `{settings}` becomes a link to the table of settings; `help()` shows the settings themselves.
  - "Returns: words" and the like become paragraphs of their own that begin with a bold word.
  - Indented lines after a colon, and examples, become code.
  - The comments of a NamedTuple's fields become its list of attributes.

Not here: which names have a page (reference/api.md), the settings' own table (hooks.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from griffe import Extension

if TYPE_CHECKING:
    from collections.abc import Iterator

    from griffe import Class, Function

SETTINGS = "Settings by name: [all settings](settings.md#all-settings)."
LABEL = re.compile(r"(Args|Returns|Raises|Cost|Shapes|Example|Non-finite logits|More)(?=[^:]*: \S)")
SECTION = re.compile(r"(Args|Attributes|Raises)[^:]*:$")
FIELD = re.compile(r"^    (\w+): [^#\n]*?# (.*)$", re.MULTILINE)


class Docstrings(Extension):
    def on_function(self, *, func: Function, **_: object) -> None:
        _rewrite(func)

    def on_class(self, *, cls: Class, **_: object) -> None:
        fields = FIELD.findall(cls.source) if any(str(base) == "NamedTuple" for base in cls.bases) else []
        if cls.docstring is not None and fields:
            lines = [f"    {name}: {comment}" for name, comment in fields if name in cls.members]
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
        _rewrite(cls)


def _rewrite(item: Function | Class) -> None:
    if item.docstring is None:
        return
    text = item.docstring.value.replace("Args:\n    {settings}\n", f"{SETTINGS}\n\n")
    text = text.replace("{settings}", f"**options: {SETTINGS}")
    item.docstring.value = "\n".join(_rewritten(text.splitlines()))


def _rewritten(lines: list[str]) -> Iterator[str]:
    in_section = in_code = False
    previous = ""
    for line in lines:
        indented = line.startswith("    ")
        in_section = bool(SECTION.match(line)) or (in_section and (indented or not line))
        is_code = not in_section and indented and (in_code or previous.endswith(":") or line.strip().startswith(">>>"))
        if is_code != in_code:
            yield from ("", "```python") if is_code else ("```", "")
        in_code = is_code
        if in_section or is_code:
            yield line if in_section else line[4:]
        elif label := LABEL.match(line):
            yield from ("", f"**{label[0]}**{line[label.end() :]}")
        else:
            yield line.strip()
        previous = line
    if in_code:
        yield "```"
