"""Files a command is about to read or to replace."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastbptt._files import replacing
from fastbptt.cli.errors import RunError, UsageError


def read_bytes(path: str, option: str) -> bytes:
    """Return the content of `path`; a `UsageError` that names `option` if there is none."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: cannot read {path!r}: {_reason(error)}") from error
    if not content:
        raise UsageError(f"{option}: {path!r} is empty; wanted text")
    return content


def decode(content: bytes, path: str, option: str) -> str:
    """Return `content` as UTF-8 text, without a byte order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = content[error.start]
        raise UsageError(
            f"{option}: {path!r} is not UTF-8 text: got byte 0x{found:02x} at offset {error.start}"
        ) from error
    offset = content.find(b"\0")
    if offset >= 0:
        raise UsageError(
            f"{option}: {path!r} is binary: got a zero byte at offset {offset}; wanted UTF-8 text"
        )
    return text


def check_writable(path: str, option: str) -> None:
    """Find out before the work, rather than after it, that its result could not be written."""
    target = Path(path)
    try:
        is_folder = target.is_dir()
        folder_is_there = target.parent.is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: cannot write {path!r}: {_reason(error)}") from error
    if is_folder or path.endswith(("/", os.sep)):
        raise UsageError(f"{option}: {path!r} is a folder; wanted the name of a file")
    if not folder_is_there:
        raise UsageError(f"{option}: no folder {str(target.parent)!r} to write {path!r} in")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: the folder {str(target.parent)!r} cannot be written to")


def check_picture(path: str, option: str, json: str | None) -> None:
    """Refuse a picture that could not be drawn, or would be written where `--json` writes."""
    check_writable(path, option)
    if not path.lower().endswith(".png"):
        raise UsageError(f"{option}: got {path!r}, wanted a name that ends with .png")
    if json is not None and same_file(json, path):
        raise UsageError(f"{option}: got {path!r}, where --json writes too")
    # It is not imported before it is used.
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"{option}: matplotlib is not installed; wanted: pip install 'fastbptt[plot]'"
        )


def check_apart(path: str, option: str, used: Iterable[str | None]) -> None:
    """Refuse to write where something is that the command reads or writes."""
    if any(name is not None and same_file(path, name) for name in used):
        raise UsageError(f"{option}: {path!r} is in use; wanted another name")


def same_file(a: str, b: str) -> bool:
    """Whether the two names lead to one file, also before it exists."""
    return os.path.realpath(a) == os.path.realpath(b)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write `content` as JSON, as `write_whole` does."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")

    write_whole(path, "--json", write)


def write_whole(path: str, option: str, write: Callable[[str], None]) -> None:
    """Let `write` write under another name, so that no reader sees half of it, and rename it.

    What is no regular file, such as a pipe or `/dev/stdout`, is written to as it is.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            write(path)
            return
        with replacing(path) as temporary:
            write(temporary)
    except OSError as error:
        raise RunError(f"{option}: cannot write {path!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file could not be used, without the path that the message has already."""
    return (getattr(error, "strerror", None) or str(error)).lower()
