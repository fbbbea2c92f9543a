"""Time and peak memory of a training step, over the table's problems and over sequence length.

`pytest benchmarks` runs the suites small, medium, large and length; `--suite deepbench` the long
ones; `-k "medium and lstm"` fewer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fastbptt.bench import libraries
from fastbptt.bench.libraries import check_same, make_step
from fastbptt.bench.peak_memory import peak_memory
from report import Row

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from fastbptt.bench.problems import Problem

# One problem's at a time: the libraries take turns at it.
exact = lru_cache(maxsize=1)(libraries.exact)


def test_training_step(
    benchmark: BenchmarkFixture, problem: Problem, library: str, threads: int, rows: list[Row]
) -> None:
    step = make_step(library, problem, "float32", threads)
    check_same(library, problem, step.run(), exact(problem, threads), "float32")
    benchmark(step.run)
    peak = peak_memory(library, problem, "float32", threads)
    benchmark.extra_info |= {
        "library": library,
        "threads": threads,
        "operations": problem.operations,
        "peak_bytes": peak,
    }
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        gflops = problem.operations / seconds / 1e9
        benchmark.extra_info["gflops"] = gflops
        rows.append(Row(str(problem), library, seconds, gflops, peak))
