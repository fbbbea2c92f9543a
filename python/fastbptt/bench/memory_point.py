"""Memory and time of a training step, each point measured in a process of its own."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fastbptt import _core
from fastbptt.bench.anonymous_memory import PeakGrowth
from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import TOLERANCES, WrongResultError
from fastbptt.bench.memory_step import Outcome, Way, make_step
from fastbptt.bench.problems import Problem


@dataclass(frozen=True)
class Measured:
    """What one way took on one problem.

    Parameters
    ----------
    seconds : float
        Of a training step.
    peak_bytes : int
        Growth of the process's anonymous memory, at most.
    allocated_bytes : int or None
        What this library held at most: the peak of its core's blocks and that of Python's, NumPy's
        arrays included, added up. None for torch.
    outcome : Outcome
    """

    seconds: float
    peak_bytes: int
    allocated_bytes: int | None
    outcome: Outcome


def measure(
    way: Way, problem: Problem, dtype: str, threads: int, folder: Path, seconds: float = 0.0
) -> Measured:
    """Return what a step takes, in a new process in which it is the first but for one of two steps.

    The time is that of the first step, or the median of those that fit into `seconds` after it.

    Raises
    ------
    ProcessError
        Of kind "BudgetError" or "MemoryError" if there is too little memory.
    """
    with FreshProcess(thread_environment(threads)) as process:
        return process.call(_measure, way, problem, dtype, threads, folder, seconds)


def _measure(
    way: Way, problem: Problem, dtype: str, threads: int, folder: Path, seconds: float
) -> Measured:
    step = make_step(way, problem, dtype, threads, folder)
    # What a library loads and allocates once is not the step's.
    step.run(min(2, problem.T))
    allocated = None
    before, _ = _core.allocated_bytes(True)
    if way.schedule is not None:
        tracemalloc.start()
    with PeakGrowth() as growth:
        began = time.perf_counter()
        outcome = step.run(problem.T)
        times = [time.perf_counter() - began]
    if way.schedule is not None:
        allocated = _core.allocated_bytes(False)[1] - before + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    end = time.perf_counter() + seconds
    while time.perf_counter() + times[-1] < end:
        began = time.perf_counter()
        step.run(problem.T)
        times.append(time.perf_counter() - began)
    return Measured(median(times[1:] or times), growth.bytes, allocated, outcome)


def check_same(way: Way, got: Outcome, wanted: Outcome, dtype: str) -> None:
    """Raise `WrongResultError` unless the loss is the wanted one, and the gradient if it should."""
    names = ("loss", "norm") if way.exact else ("loss",)
    for name in names:
        a, b = getattr(got, name), getattr(wanted, name)
        if not abs(a - b) <= TOLERANCES[dtype] * abs(b):
            raise WrongResultError(f"{way.name}: {name} is {a:.9g}, wanted {b:.9g}")
