"""x and targets, read some steps at a time, with time first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbptt._arrays import Array, from_any


def is_lazy(value: Any) -> bool:
    """Whether this is something to read in parts: it has a shape and a dtype, but is no array."""
    if isinstance(value, np.ndarray) or not all(
        hasattr(value, name) for name in ("shape", "dtype", "__getitem__")
    ):
        return False
    try:
        np.dtype(value.dtype)
    except TypeError:  # a tensor, whose dtype is its library's own
        return False
    return True


class Source:
    """An array, a memory map, or anything with shape, dtype and slices over time.

    Of the last, only slices are ever asked for, and each is checked when it comes.

    Parameters
    ----------
    name : str
        What it is to the user.
    value : array_like or object with shape, dtype and slices
    batch_first : bool
        Whether time is its second axis.
    """

    def __init__(self, name: str, value: Any, batch_first: bool) -> None:
        self._name = name
        self._batch_first = batch_first
        self.lazy = is_lazy(value)
        self._value = value if self.lazy else from_any(name, value)
        self.shape = tuple(int(n) for n in self._value.shape)
        self.dtype = np.dtype(self._value.dtype)

    def overlaps(self, array: Array) -> bool:
        """Whether the values lie, or may lie, where those of `array` do."""
        return not self.lazy and np.may_share_memory(self._value, array)

    @property
    def leading(self) -> tuple[int, int]:
        """T and B."""
        first, second = self.shape[:2]
        return (second, first) if self._batch_first else (first, second)

    def take(self, begin: int, end: int) -> Array:
        """Return the steps `[begin, end)`, time first; a view where that can be."""
        part = self._value[:, begin:end] if self._batch_first else self._value[begin:end]
        if self.lazy:
            part = from_any(self._name, part)
            if part.dtype != self.dtype:
                raise TypeError(
                    f"{self._name}: got dtype {part.dtype} for the steps {begin} to {end}, wanted "
                    f"{self.dtype}, which it has as a whole"
                )
            axis = 1 if self._batch_first else 0
            wanted = (*self.shape[:axis], end - begin, *self.shape[axis + 1 :])
            if part.shape != wanted:
                raise ValueError(
                    f"{self._name}: got shape {part.shape} for the steps {begin} to {end}, "
                    f"wanted {wanted}"
                )
            # The next part may come in the same memory, while this one is still wanted.
            part = part.copy()
        return part.swapaxes(0, 1) if self._batch_first else part


def beside(take: Callable[[int, int], Array], stretches: Sequence[slice]) -> Array:
    """Return stretches of time as one batch, the rows of the first one first.

    Parameters
    ----------
    take : callable
        Returns the steps `[begin, end)`, `[n, B, ...]`.
    stretches : sequence of slice
        Not empty, and all of n steps.

    Returns
    -------
    ndarray
        `[n, len(stretches) * B, ...]`
    """
    first = take(stretches[0].start, stretches[0].stop)
    if len(stretches) == 1:
        return first
    n, B, *rest = first.shape
    rows = np.empty((n, len(stretches), B, *rest), first.dtype)
    rows[:, 0] = first
    for place, stretch in enumerate(stretches[1:], 1):
        rows[:, place] = take(stretch.start, stretch.stop)
    return rows.reshape(n, len(stretches) * B, *rest)
