"""How the API pages read a docstring (mkdocs.yml names this file as an extension of griffe, which reads the source).

  - `{settings}` becomes the settings of that function, as `help()` shows them.
  - "Returns: words" and "Raises: words" become paragraphs that begin with a bold word.
  - The comments of a NamedTuple's fields become their docstrings.

Not here: which names have a page (reference/api.md), the settings' own table (hooks.py).
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from griffe import Docstring, Extension

if TYPE_CHECKING:
    from griffe import Class, Function

PARAGRAPH = re.compile(r"^(Returns|Raises|Cost|Shapes|Non-finite logits)(?=[^:\n]*: \S)", re.MULTILINE)
FIELD = re.compile(r"^    (\w+): [^#\n]*?# (.*)$", re.MULTILINE)


class Docstrings(Extension):
    def on_function(self, *, func: Function, **_: object) -> None:
        _rewrite(func)

    def on_class(self, *, cls: Class, **_: object) -> None:
        _rewrite(cls)
        if any(str(base) == "NamedTuple" for base in cls.bases):
            for name, comment in FIELD.findall(cls.source):
                attribute = cls.members.get(name)
                if attribute is not None and attribute.docstring is None:
                    attribute.docstring = Docstring(comment[0].upper() + comment[1:] + ".", parent=attribute)


def _rewrite(item: Function | Class) -> None:
    if item.docstring is None:
        return
    text = item.docstring.value
    if "{settings}" in text:
        from opd_ops import settings

        options = settings.TokenLossOptions if item.name.endswith("token_losses") else settings.LossOptions
        lines = [f"{name}: {settings.HELP[name]}" for name in settings.NAMES[options]]
        text = text.replace("    {settings}", textwrap.indent("\n".join(lines), "    "))
    item.docstring.value = PARAGRAPH.sub(r"\n**\1**", text)
