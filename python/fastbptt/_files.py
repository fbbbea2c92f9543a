"""Files that take the place of others when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Give the name of a file to write; at the end it takes the place of `path`, or is gone."""
    # Through a link, so that the link stays one.
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        # Made here, so that the file gets the permissions that any new file gets.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        new_mode = os.fstat(handle).st_mode
        os.close(handle)
        yield temporary
        with suppress(FileNotFoundError):
            new_mode = os.stat(target).st_mode
        os.chmod(temporary, stat.S_IMODE(new_mode))
        _flush(temporary)
        os.replace(temporary, target)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    if os.name == "posix":
        _flush(folder)


def _flush(path: str) -> None:
    """Have the system write to the disk what it holds of a file, or of the names in a folder."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
