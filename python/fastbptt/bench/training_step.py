"""What every library's training step starts from, and what it gives back."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb
from fastbptt.bench.problems import Problem

Array = NDArray[Any]


class TrainingStep(Protocol):
    """Forward, then all gradients, over data that are there already."""

    def run(self) -> list[Array]:
        """Return y, then dL/dx, then the weights' gradients; this is what is timed.

        What a library gives in bfloat16 comes as its bits, uint16: to widen it is no part of the
        step. `widened` does that.
        """
        ...


def widened(results: list[Array]) -> list[Array]:
    """Return the results, those in bfloat16 as float32."""
    return [
        (a.astype(np.uint32) << np.uint32(16)).view(np.float32) if a.dtype == np.uint16 else a
        for a in results
    ]


def make_layer(
    problem: Problem, dtype: str, precision: str | None = None
) -> fb.RNN | fb.LSTM | fb.GRU:
    """Return the layer whose weights every library takes."""
    sizes: Any = {"input_size": problem.I, "hidden_size": problem.H, "dtype": dtype, "seed": 0}
    sizes["precision"] = precision
    if problem.kind == "rnn":
        return fb.RNN(**sizes, nonlinearity=problem.nonlinearity)
    return fb.LSTM(**sizes) if problem.kind == "lstm" else fb.GRU(**sizes)


def make_data(problem: Problem, dtype: str) -> tuple[Array, Array]:
    """Return the input `[T, B, I]` and dL/dy `[T, B, H]`, the same numbers in both dtypes."""
    rng = np.random.default_rng(1)

    def normal(width: int) -> Array:
        drawn = rng.standard_normal((problem.T, problem.B, width), dtype=np.float32)
        return drawn.astype(dtype, copy=False)

    return normal(problem.I), normal(problem.H)
