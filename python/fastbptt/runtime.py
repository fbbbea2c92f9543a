"""The machine: which instruction set runs, and how many threads."""

from __future__ import annotations

from typing import Any

from fastbptt import _core
from fastbptt._arrays import as_precision, as_size


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


def set_float32_matmul_precision(precision: str) -> None:
    """Set what the matrix products of float32 layers are made of, as in PyTorch.

    It counts for the calls that begin from now on, of all float32 recurrent layers that were made
    without a `precision` of their own. Gates, states and sums are float32 always; so are readouts.

    Parameters
    ----------
    precision : {"highest", "high", "medium"}
        `"highest"`, at first: float32, or something at least as accurate. `"high"`: each value may
        become the sum of two bfloat16 numbers, which is accurate to about 16 bits; `"medium"`: one,
        8 bits. What is not faster so on this machine, or with so few rows, stays more accurate.

    Raises
    ------
    ValueError
        The name is none of these.
    TypeError
        No text.

    Examples
    --------
    >>> import fastbptt as fb
    >>> fb.set_float32_matmul_precision("medium")
    >>> fb.get_float32_matmul_precision()
    'medium'
    >>> fb.set_float32_matmul_precision("highest")
    """
    _core.set_float32_matmul_precision(as_precision(precision))


def get_float32_matmul_precision() -> str:
    """Return what the matrix products of float32 layers are made of.

    Examples
    --------
    >>> import fastbptt as fb
    >>> fb.get_float32_matmul_precision()
    'highest'
    """
    return _core.get_float32_matmul_precision()
