"""The pages of the documentation, and the Python code in them.

A comment `<!-- hidden ... -->` holds code that stands for what the reader has: models, prompts, a server. `<!-- full -->`
before a block says that the block imports a host, which takes seconds.
Not here: what is asserted of them (test_code_blocks.py, test_pages.py).
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
HIDDEN = r"^<!-- hidden\n(?P<hidden>.*?)^-->"
SHOWN = r"^(?P<full><!-- full -->\n)?```python\n(?P<shown>.*?)^```"
CODE = re.compile(f"{HIDDEN}|{SHOWN}", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    line: int  # of the page, before the code's first line
    code: str
    is_hidden: bool
    is_full: bool  # imports a host


def blocks(text: str) -> list[Block]:
    """The blocks of a page in order."""
    page_blocks = []
    for match in CODE.finditer(text):
        kind = "shown" if match["hidden"] is None else "hidden"
        line = text.count("\n", 0, match.start(kind))
        page_blocks.append(Block(line, match[kind], kind == "hidden", match["full"] is not None))
    return page_blocks


def run(page: Path, chosen: list[Block]) -> dict[str, object]:
    """The variables after running the blocks, in order, as one program. A traceback names the line of the page."""
    names: dict[str, object] = {"__name__": "documentation"}
    for block in chosen:
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
    return names
