"""What an approximate schedule gets wrong, and the time that it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbptt._arrays import Array, as_size
from fastbptt.losses import Loss
from fastbptt.model import Model
from fastbptt.schedules import Full, Schedule
from fastbptt.segmented import Segmented
from fastbptt.training import value_and_grad


class SegmentationError(NamedTuple):
    """What `segmentation_error` returns.

    Attributes
    ----------
    error : float
        The norm of the difference between the gradient of `Segmented` and that of `Full`, over all
        parameters, as a share of the norm of the gradient of `Full`.
    full_seconds, segmented_seconds : float
        What a call takes: the median.
    speedup : float
        The first of them as a multiple of the second.
    """

    error: float
    full_seconds: float
    segmented_seconds: float
    speedup: float


def segmentation_error(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    *,
    schedule: Segmented,
    state: Any = None,
    ignore_index: int = -100,
    loss_mask: Any = None,
    repeats: int = 3,
) -> SegmentationError:
    """Return how far `Segmented` is from the exact gradient, and how much faster it is.

    The error depends on how fast the model forgets, so it changes as the model learns: take it for
    a trained model too. The tape of `Full` has to fit in the memory.

    Parameters
    ----------
    model, x, target, loss, state, ignore_index, loss_mask
        As for `value_and_grad`.
    schedule : Segmented
        What is compared with `Full()`.
    repeats : int
        Runs of each that are timed, in turn, after one that is not; at least 1.

    Returns
    -------
    SegmentationError
        `error`, `full_seconds`, `segmented_seconds` and `speedup`.

    Raises
    ------
    ValueError, TypeError
        As for `value_and_grad`; `schedule` is no `Segmented`, or `repeats` is no integer of at
        least 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.LSTM(3, 4, seed=0), fb.Linear(4, 2, seed=1))
    >>> x = np.random.default_rng(0).standard_normal((2000, 1, 3), np.float32)
    >>> target = np.zeros((2000, 1), int)
    >>> short, long = (
    ...     fb.segmentation_error(model, x, target, schedule=fb.Segmented(100, overlap))
    ...     for overlap in (2, 20)
    ... )
    >>> short.error > long.error
    True
    """
    if not isinstance(schedule, Segmented):
        raise TypeError(f"schedule: got {type(schedule).__name__}, wanted a Segmented")
    repeats = as_size("repeats", repeats)

    def run(schedule: Schedule | Segmented) -> tuple[dict[str, Array], float]:
        begin = perf_counter()
        result = value_and_grad(
            model, x, target, loss, state, schedule, ignore_index, loss_mask=loss_mask
        )
        return result.grads, perf_counter() - begin

    exact, _ = run(Full())
    near, _ = run(schedule)
    times = [(run(Full())[1], run(schedule)[1]) for _ in range(repeats)]
    full, segmented = (median(seconds) for seconds in zip(*times, strict=True))
    return SegmentationError(_relative(near, exact), full, segmented, full / segmented)


def _relative(near: Mapping[str, Array], exact: Mapping[str, Array]) -> float:
    difference = _norm(near[name].astype(np.float64) - exact[name] for name in exact)
    size = _norm(exact.values())
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def _norm(arrays: Iterable[Array]) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))
