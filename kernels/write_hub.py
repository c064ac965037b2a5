"""`opd_kernels` as a repository for Hugging Face's `kernels` library: `make hub`, or `python kernels/write_hub.py FOLDER`.

  FOLDER/build.toml, FOLDER/README.md      what the library's builder reads, and the card (kernels/hub/)
  FOLDER/torch-ext/opd_kernels/            the source that its builder takes
  FOLDER/build/torch-cuda/                 the source as `get_local_kernel` and `get_kernel` load it, with metadata.json
  Source of the layout: huggingface.co/docs/kernels, "Kernel requirements" and "Write kernels", torch-noarch, edition 5

The library imports the package under its id, not under its name. So the package's own imports must be relative, and the id
holds a digest of the source: two versions may live in one process. Its __init__.py imports every module, because a loaded
kernel is used by attributes.
Not here: the upload, which needs an account; the kernels (opd_kernels/).
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
PACKAGE = "opd_kernels"


def sources() -> dict[str, str]:
    """The text of each file of the package, by name; __init__.py imports all other modules.

    Raises: ValueError: a module imports the package by its name.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted((HERE / PACKAGE).glob("*.py"))}
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(module.split(".")[0] == PACKAGE for module in imported):
                raise ValueError(f"{PACKAGE}/{name}:{node.lineno}: got an import of {PACKAGE}, expected a relative one")
    docstring = ast.get_docstring(ast.parse(texts["__init__.py"]), clean=False)
    first, _, last = docstring.rpartition(
        "Importing this package does not import triton; importing one of its modules does.\n\n"
    )
    modules = "".join(f"from . import {name.removesuffix('.py')}\n" for name in texts if name != "__init__.py")
    texts["__init__.py"] = f'"""{first}{last}"""\n\n{modules}'
    return texts


def metadata(general: dict, backend: str, texts: dict[str, str]) -> dict:
    """What metadata.json holds: the facts of build.toml, and an id that no other source has."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    facts = {name: general[name] for name in ("name", "version", "license")}
    return {"id": f"_{PACKAGE}_{backend}_{digest}", **facts, "python-depends": [], "backend": {"type": backend}}


def write(folder: Path) -> None:
    """Write the repository into `folder`; what an earlier call wrote there is replaced."""
    texts = sources()
    general = tomllib.loads((HERE / "hub" / "build.toml").read_text(encoding="utf-8"))["general"]
    variants = {folder / "build" / f"torch-{backend}": backend for backend in general["backends"]}
    for parent in ("build", "torch-ext"):
        shutil.rmtree(folder / parent, ignore_errors=True)
    for place in (folder / "torch-ext" / PACKAGE, *variants):
        place.mkdir(parents=True)
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
    for place, backend in variants.items():
        (place / "metadata.json").write_text(json.dumps(metadata(general, backend, texts), indent=2) + "\n")
    shutil.copy(HERE / "hub" / "build.toml", folder / "build.toml")
    shutil.copy(HERE / "hub" / "CARD.md", folder / "README.md")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    write(Path(sys.argv[1]))
