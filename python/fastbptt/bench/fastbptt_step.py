"""The training step of this library."""

from __future__ import annotations

import fastbptt as fb
from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_data, make_layer


class FastbpttStep:
    """`forward` and `backward` of a layer."""

    def __init__(
        self, problem: Problem, dtype: str, threads: int, precision: str | None = None
    ) -> None:
        fb.set_num_threads(threads)
        self.layer = make_layer(problem, dtype, precision)
        self.x, self.grad_y = make_data(problem, dtype)

    def run(self) -> list[Array]:
        """See `TrainingStep`."""
        y, _, tape = self.layer.forward(self.x)
        grads = self.layer.backward(tape, self.grad_y)
        return [y, grads.x, *grads.weights.values()]
