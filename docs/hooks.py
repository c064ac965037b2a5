"""What MkDocs does to the pages as it builds the site (mkdocs.yml names this file).

  - The changelog, and the pictures that benchmarks draw, stand outside of docs/: they become files of the site.
  - A link that leaves docs/ works where the pages are read as files. In the site a picture is found at its new place, and a
    link to source becomes the path of that source.
  - `<!-- table of settings -->` and `<!-- table of options -->` become tables of `Settings` and of `OPDConfig`, from the
    package itself.
  - "5 %" and "2 + 4ρ" do not break at their spaces.

Not here: the look (site.css), the pictures that the site draws for itself (draw.py).
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)]*)?\)")
UNBROKEN = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=\+ \d*ρ)|(?<=\d \+) (?=\d*ρ)")  # a line must not end at these spaces
HIDDEN = re.compile(r"^<!-- (hidden\n.*?|full )-->\n", re.DOTALL | re.MULTILINE)  # for tests alone: tests/docs/pages.py
TABLES = {
    "<!-- table of settings -->": ("setting", "opd_ops.settings", "Settings"),
    "<!-- table of options -->": ("option", "opd_ops.trainer.config", "OPDConfig"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name.removeprefix("benchmarks/"), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = posixpath.dirname(f"docs/{page.file.src_uri}")

    def inside(match: re.Match[str]) -> str:
        mark, text, target, _ = match.groups()
        path = posixpath.normpath(posixpath.join(here, target))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: links to {target}, which is no file of the repository")
        if path.endswith(".png"):
            return f"{mark}[{text}]({os.path.relpath(path.replace('benchmarks', 'docs', 1), here)})"
        label = text.strip("`")
        return f"`{path}`" if posixpath.basename(path) == label else f"{text} (`{path}`)"

    text = LINK.sub(inside, HIDDEN.sub("", markdown))
    # Every second part is a block of code.
    text = "```".join(part if i % 2 else UNBROKEN.sub("\u00a0", part) for i, part in enumerate(text.split("```")))
    for mark, (kind, module, name) in TABLES.items():
        if mark in text:
            text = text.replace(mark, _table(kind, getattr(import_module(module), name)))
    return text


def _table(kind: str, dataclass: type) -> str:
    """The names, the defaults and the sentences of a dataclass's fields."""
    rows = [f"| {kind} | default | meaning |", "|---|---|---|"]
    for field in fields(dataclass):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        sentence = field.metadata["help"].replace("|", "\\|")
        name = field.name.replace("_", "_<wbr>")  # a long name may break there, on a phone
        rows.append(f"| <code>{name}</code> | `{default}` | {sentence} |")
    return "\n".join(rows)
