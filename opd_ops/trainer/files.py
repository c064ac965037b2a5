"""Checks of text and paths that come from users, with errors that name the place; files that are written whole or not at all.

Not here: what the files hold (prompts.py, config.py, checkpoints.py, runlog.py).
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

SHOWN = 60  # characters of a path in an error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as "\\n".

    Raises: ValueError: it is not UTF-8, or begins with a byte order mark; names the file and the line.
    """
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{path}:1: begins with a byte order mark, expected UTF-8 without one; save the file without it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len((data[: error.start] + b"x").splitlines())
        raise ValueError(f"{path}:{line}: got byte 0x{data[error.start]:02x}, expected UTF-8; save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the file so that a reader, also after a crash, sees either the whole content or the previous one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_text(text: str, where: str) -> None:
    """Check that UTF-8 can encode the text; an error begins with `where`.

    Escapes in JSON and YAML, and arguments that are not UTF-8, can make lone surrogates; a tokenizer or a file fails on them
    later.

    Raises: ValueError: a lone surrogate; names the character.
    """
    place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if place is not None:
        raise ValueError(f"{where}: got the lone surrogate U+{ord(text[place]):04X} as character {place + 1}, expected text")


def check_path(text: str, where: str) -> None:
    """Check that the system accepts the path, which need not exist; an error begins with `where`.

    Raises: ValueError: the system does not accept it; says why.
    """
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{where}: got {shown!r}, expected a path that the system accepts ({reason})") from None
