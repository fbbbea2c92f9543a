"""A training step of one recurrent layer under a linear readout, by a schedule or by torch.

x and targets are memory maps, so that they are no part of the process's own memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import fastbptt as fb
from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_layer
from fastbptt.schedules import Schedule

# Numbers that are drawn at a time.
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Way:
    """A way to train: by a schedule of this library, or by torch's autograd, which has none."""

    name: str
    schedule: Schedule | None

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of the whole sequence."""
        return not isinstance(self.schedule, fb.Truncated)


WAYS = (
    Way("Full", fb.Full()),
    *(Way(f"Checkpointed {size}", fb.Checkpointed(memory=size)) for size in ("64MB", "16MB")),
    Way("Checkpointed 4MB", fb.Checkpointed(memory="4MB")),
    Way("Truncated 100", fb.Truncated(100)),
)
TORCH = Way("torch", None)


class BudgetError(Exception):
    """The memory that a schedule names is too small for the problem."""


class Outcome(NamedTuple):
    """What shows that two ways have done the same: the loss, and the norm of its gradient."""

    loss: float
    norm: float


class MemoryStep(Protocol):
    """Loss and gradient of all parameters."""

    def run(self, T: int) -> Outcome:
        """Train on the first `T` steps."""
        ...


def write_data(folder: Path, problem: Problem, dtype: str) -> None:
    """Write x `[T, B, I]` and the target `[T, B, 1]` of the problem where `make_step` reads."""
    rng = np.random.default_rng(1)
    for name, width in (("x", problem.I), ("target", 1)):
        left = problem.T * problem.B * width
        with open(folder / name, "wb") as file:
            while left > 0:
                drawn = rng.standard_normal(min(left, _DRAWN_AT_ONCE), dtype=np.float32)
                drawn.astype(dtype, copy=False).tofile(file)
                left -= drawn.size


def make_step(way: Way, problem: Problem, dtype: str, threads: int, folder: Path) -> MemoryStep:
    """Return the step of `way` on the data in `folder`."""
    x, target = (
        # torch takes none that cannot be written to.
        np.memmap(folder / name, dtype, "r+").reshape(-1, problem.B, width)
        for name, width in (("x", problem.I), ("target", 1))
    )
    layer = make_layer(problem, dtype)
    model = fb.Model(layer, fb.Linear(problem.H, 1, dtype=dtype, seed=0))
    if way.schedule is None:
        return _TorchStep(model, problem, threads, x, target)
    fb.set_num_threads(threads)
    return _ScheduleStep(model, way.schedule, x, target)


class _ScheduleStep:
    def __init__(self, model: fb.Model, schedule: Schedule, x: Array, target: Array) -> None:
        self.model, self.schedule, self.x, self.target = model, schedule, x, target

    def run(self, T: int) -> Outcome:
        try:
            result = fb.value_and_grad(
                self.model, self.x[:T], self.target[:T], "mse", schedule=self.schedule
            )
        except ValueError as error:
            if str(error).startswith("memory: "):
                raise BudgetError(str(error)) from error
            raise
        return Outcome(result.loss, _norm(result.grads.values()))


class _TorchStep:
    def __init__(
        self, model: fb.Model, problem: Problem, threads: int, x: Array, target: Array
    ) -> None:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(threads)
        options = {"nonlinearity": problem.nonlinearity} if problem.nonlinearity else {}
        dtype = getattr(torch, x.dtype.name)
        kind = getattr(torch.nn, problem.kind.upper())
        self.layer = kind(problem.I, problem.H, dtype=dtype, **options)
        self.readout = torch.nn.Linear(problem.H, 1, dtype=dtype)
        self.parameters = [*self.layer.parameters(), *self.readout.parameters()]
        with torch.no_grad():
            for mine, theirs in zip(self.parameters, model.parameters().values(), strict=True):
                mine.copy_(torch.from_numpy(theirs))
        self.x, self.target = torch.from_numpy(x), torch.from_numpy(target)
        self.grad, self.loss = torch.autograd.grad, torch.nn.functional.mse_loss

    def run(self, T: int) -> Outcome:
        loss = self.loss(self.readout(self.layer(self.x[:T])[0]), self.target[:T])
        return Outcome(loss.item(), _norm(g.numpy() for g in self.grad(loss, self.parameters)))


def _norm(grads: Iterable[Array]) -> float:
    return math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
