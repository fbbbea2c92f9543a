"""Times of several libraries on one problem, taken in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median

from fastbptt.bench.libraries import check_same, exact, make_step
from fastbptt.bench.matrix_product import OPERATIONS, matrix_products
from fastbptt.bench.problems import Problem

ROUNDS = 5
# A run shorter than this is slowed by the cold caches that the library before it left.
_SHORT = 0.02
# OpenMP's threads go on turning for some milliseconds after their work, in the way of the next.
_SETTLED = 0.02

Runs = dict[str, list[float]]


@dataclass
class Times:
    """Seconds of each timed run: of each library's training step, of each BLAS's product."""

    steps: Runs = field(default_factory=dict)
    products: Runs = field(default_factory=dict)

    def add(self, other: Times) -> None:
        """Put the runs of another round behind these."""
        for mine, theirs in ((self.steps, other.steps), (self.products, other.products)):
            for name, runs in theirs.items():
                mine.setdefault(name, []).extend(runs)

    def seconds(self, library: str) -> float:
        """Return the median of a library's runs."""
        return median(self.steps[library])

    def matrix_rate(self) -> tuple[float, str]:
        """Return the GFLOP/s of the large matrix product, and the library that reached them."""
        rates = {name: OPERATIONS / median(runs) / 1e9 for name, runs in self.products.items()}
        best = max(rates, key=lambda name: rates[name])
        return rates[best], best


def time_problem(
    problem: Problem,
    libraries: tuple[str, ...],
    dtype: str,
    threads: int,
    seconds: float,
    rounds: int = ROUNDS,
) -> Times:
    """Time each library's training step, and the large matrix product, for about `seconds` in all.

    In every round each has its turn, so that the drift of a shared machine falls on all alike.

    Raises
    ------
    WrongResultError
        The libraries do not agree.
    """
    steps, products = _prepare(problem, libraries, dtype, threads)
    turn = seconds / (rounds * (len(steps) + len(products)))
    times = Times({name: [] for name in steps}, {name: [] for name in products})
    contest = [(times.steps[name], run) for name, run in steps.items()]
    contest += [(times.products[name], run) for name, run in products.items()]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            # There and back: nobody always comes after the same one.
            for runs, run in contest if number % 2 == 0 else reversed(contest):
                if threads > 1:
                    time.sleep(_SETTLED)
                runs += _turn(run, turn)
    finally:
        if collecting:
            gc.enable()
    return times


# The last problem's: a caller that times it in several rounds finds it as it was.
@lru_cache(maxsize=1)
def _prepare(
    problem: Problem, libraries: tuple[str, ...], dtype: str, threads: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    wanted = exact(problem, threads)
    steps: dict[str, Callable[[], object]] = {}
    for library in libraries:
        step = make_step(library, problem, dtype, threads)
        check_same(library, problem, step.run(), wanted, dtype)
        steps[library] = step.run
    products = matrix_products(dtype, threads)
    for product in products.values():
        product()
    return steps, products


def _turn(run: Callable[[], object], seconds: float) -> list[float]:
    """Return the times of at least one run, and of as many as fit into `seconds`."""
    runs: list[float] = []
    clock = time.perf_counter
    end = clock() + seconds
    while True:
        began = clock()
        run()
        ended = clock()
        runs.append(ended - began)
        if ended >= end and (len(runs) > 1 or runs[0] >= _SHORT):
            break
    return runs[1:] if runs[0] < _SHORT else runs
