"""What users pass in, as the arrays and numbers that the rest of the package takes.

The core checks rank, size and dtype of each array it is given; here, what is no array becomes one.
"""

from __future__ import annotations

import math
import operator
import os
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]

_INT64 = np.dtype(np.int64)
_UINT64 = np.dtype(np.uint64)

# A layer whose parameters take more bytes than an array can have is a mistake in its sizes.
_MOST_BYTES = int(np.iinfo(np.intp).max)

_PRECISIONS = ("highest", "high", "medium")

# What an array costs beside its elements, so that very many very small ones are not free.
_ARRAY_BYTES = 512


def as_array(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Return `value` as an array: numbers and nested lists in `dtype`, arrays in their own.

    An array of another dtype is left for the core to refuse: a silent copy would hide it.
    """
    array = from_any(name, value)
    if _has_dtype(value) or array.dtype == dtype:
        return array
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{name}: got {_described(value, array)}, wanted {dtype} or lists of numbers"
        )
    return array.astype(dtype)


def as_index(name: str, value: Any, rows: int) -> NDArray[np.int64]:
    """Return `value` as int64, each element checked to be in `[0, rows)`."""
    array = value if type(value) is np.ndarray else from_any(name, value)
    if array.dtype != _INT64:
        if array.size == 0 and not _has_dtype(value):
            return array.astype(_INT64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: got {_described(value, array)}, wanted integers")
        if array.dtype.kind == "u" and array.size:
            _check_range(name, array, array, rows)
        array = array.astype(_INT64)
    if array.size:
        # As unsigned numbers the negative ones are the largest: one pass sees both ends.
        _check_range(name, array, array.view(_UINT64), rows)
    return array


def _check_range(name: str, index: Array, unsigned: Array, rows: int) -> None:
    if np.maximum.reduce(unsigned, axis=None) >= rows:
        place = np.unravel_index(int(unsigned.argmax()), index.shape)
        where = ", ".join(str(int(axis)) for axis in place)
        raise ValueError(
            f"{name}: got {index[place]} at [{where}], wanted from 0 to {rows - 1} ({rows} rows)"
        )


def from_any(name: str, value: Any) -> Array:
    """Return `value` as an array of whatever dtype NumPy finds in it."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a masked array, wanted a plain one; its mask would be lost")
    try:
        return np.asarray(value)
    except MemoryError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: got lists that are no array: {error}") from error
    except Exception as error:  # whatever the value's own conversion raises, as for another device
        kind = type(value).__name__
        raise TypeError(f"{name}: got {kind}, which NumPy cannot read: {error}") from error


def _has_dtype(value: Any) -> bool:
    return hasattr(value, "dtype")


def _described(value: Any, array: Array) -> str:
    kind = type(value).__name__
    return kind if array.dtype == object and array.ndim == 0 else f"{kind} of {array.dtype}"


_DTYPES = "'float32', 'float64' or 'bfloat16'"


def as_dtype(value: DTypeLike) -> np.dtype[Any]:
    """Return the dtype of a layer: float32, float64 or bfloat16."""
    if isinstance(value, str) and value == "bfloat16":
        return _bfloat16()
    try:
        # NumPy takes None for float64, which nobody means here.
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None:
        raise TypeError(f"dtype: got {value!r}, wanted {_DTYPES}")
    if dtype.newbyteorder("=") not in (np.float32, np.float64) and dtype.name != "bfloat16":
        raise ValueError(f"dtype: got {dtype.name!r}, wanted {_DTYPES}")
    if not dtype.isnative:
        raise ValueError(f"dtype: got {value!r}, wanted {_DTYPES}, in this machine's byte order")
    return dtype


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "dtype: 'bfloat16' needs the package ml_dtypes: pip install 'fastbptt[bfloat16]'"
        ) from error
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of arithmetic and gradients: float32 for bfloat16, else the same."""
    return np.dtype(np.float32) if dtype.name == "bfloat16" else dtype


def as_size(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int of at least `least`; a bool or a float is none."""
    size = _as_int(name, value)
    if size < least:
        raise ValueError(f"{name}: got {size}, wanted at least {least}")
    return size


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, wanted an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wanted an integer") from None


def as_bool(name: str, value: Any) -> bool:
    """Return `value` as a bool; a number is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, wanted True or False")
    return bool(value)


def as_finite(name: str, value: Any) -> float:
    """Return `value` as a finite float."""
    if isinstance(value, (bool, np.bool_, str)):
        raise TypeError(f"{name}: got {value!r}, wanted a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, wanted a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {value!r}, wanted a finite number")
    return number


def as_precision(value: Any) -> str:
    """Return the name of a precision of float32 products."""
    if not isinstance(value, str):
        raise TypeError(f"precision: got {type(value).__name__}, wanted str")
    if value not in _PRECISIONS:
        raise ValueError(f"precision: got {value!r}, wanted 'highest', 'high' or 'medium'")
    return value


def as_probability(name: str, value: Any) -> float:
    """Return `value` as a float from 0 to 1."""
    number = as_finite(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {value!r}, wanted from 0 to 1")
    return number


def as_lengths(value: Any, T: int, B: int) -> NDArray[np.int64]:
    """Return `value` as the lengths `[B]` of rows of at most T steps."""
    array = from_any("lengths", value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths: got {_described(value, array)}, wanted integers")
    if array.shape != (B,):
        raise ValueError(f"lengths: got shape {array.shape}, wanted ({B},), one for each row")
    wrong = (array < 0) | (array > T)
    if wrong.any():
        raise ValueError(f"lengths: got {array[wrong][0]}, wanted from 0 to T = {T}")
    return array.astype(np.int64)


def as_flags(name: str, value: Any, T: int, B: int, batch_first: bool) -> NDArray[np.bool_]:
    """Return `value` as bools `[T, B]`, given as `[B, T]` with `batch_first`."""
    array = from_any(name, value)
    if array.dtype != np.bool_:
        raise TypeError(f"{name}: got {_described(value, array)}, wanted bools")
    wanted = (B, T) if batch_first else (T, B)
    if array.shape != wanted:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted}")
    return array.T if batch_first else array


def as_seed(value: Any) -> int:
    """Return `value` as an int of 64 bits."""
    seed = as_size("seed", value, least=0)
    if seed >= 1 << 64:
        raise ValueError(f"seed: got {seed}, wanted less than 2**64")
    return seed


def as_rng(seed: Any) -> np.random.Generator:
    """Return the generator that `seed` starts; None draws a new seed from the system."""
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise type(error)(f"seed: got {seed!r}: {error}") from None


def check_parameters(what: str, elements: int, arrays: int, dtype: np.dtype[Any]) -> None:
    """Refuse parameters that no array, or not this machine, can hold; `what` names the sizes."""
    size = elements * dtype.itemsize
    if size > _MOST_BYTES:
        raise ValueError(f"{what}: got sizes whose product overflows ({size} bytes of parameters)")
    there = _physical_memory()
    if there is not None and size + arrays * _ARRAY_BYTES > there:
        raise MemoryError(
            f"{what}: got {size / 1e9:.1f} GB of parameters, wanted less than the "
            f"{there / 1e9:.1f} GB of memory that the machine has"
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
