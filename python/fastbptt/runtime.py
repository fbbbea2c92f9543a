"""The machine: which instruction set runs, and how many threads."""

from __future__ import annotations

from typing import Any

from fastbptt import _core
from fastbptt._arrays import as_size


def cpu_info() -> dict[str, Any]:
    """Return what the kernels run on.

    Returns
    -------
    dict
        `isa`, the instruction set that runs; `available`, those that this CPU can run, and `built`,
        those that are in this build, both lists with the best first; `vector_bytes`, the width of
        a vector register. The environment variable `FASTBPTT_ISA` forces one of `available`.

    Examples
    --------
    >>> import fastbptt as fb
    >>> info = fb.cpu_info()
    >>> info["isa"] in info["available"]
    True
    """
    return _core.cpu_info()


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use.

    Parameters
    ----------
    n : int
        From 1 to 1024. At the start it is that of the environment variable `FASTBPTT_NUM_THREADS`,
        or else the number of CPUs that the process may use.

    Raises
    ------
    ValueError
        Out of range.
    TypeError
        No integer.

    Examples
    --------
    >>> import fastbptt as fb
    >>> before = fb.get_num_threads()
    >>> fb.set_num_threads(1)
    >>> fb.get_num_threads()
    1
    >>> fb.set_num_threads(before)
    """
    _core.set_num_threads(min(as_size("n", n), 2**31 - 1))


def get_num_threads() -> int:
    """Return how many threads a call may use.

    Examples
    --------
    >>> import fastbptt as fb
    >>> fb.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()
