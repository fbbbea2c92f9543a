"""`fastbptt bench --memory`: what the schedules hold, against the length of the sequence."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbptt.bench.fresh_process import ProcessError
from fastbptt.bench.libraries import WrongResultError
from fastbptt.bench.memory_point import Measured, check_same, measure
from fastbptt.bench.memory_report import HEADING, MemoryPoint
from fastbptt.bench.memory_step import WAYS, Outcome, Way, write_data
from fastbptt.bench.problems import Problem, decades_of
from fastbptt.cli.errors import RunError
from fastbptt.memory import as_text, available

DEFAULT_PROBLEM = (1_000_000, 1, 64, 64)
# A step that would take longer is left out.
_LONGEST = 20.0
# Of --seconds, for each point: a fresh process costs more than most steps in it.
_SHARE = 0.1
# Of the memory there is, what a step may be expected to take.
_FILLED = 0.8


def measure_all(
    problems: Sequence[Problem], others: tuple[Way, ...], dtype: str, threads: int, seconds: float
) -> list[MemoryPoint]:
    """Measure and print every way on every problem, from short lengths to its own."""
    print(HEADING, flush=True)
    points = []
    for problem in problems:
        with tempfile.TemporaryDirectory(prefix="fastbptt-") as name:
            folder = Path(name)
            try:
                write_data(folder, problem, dtype)
            except OSError as error:
                raise RunError(f"{problem.sizes}: cannot write its input: {error}") from error
            for point in _measure(problem, (*WAYS, *others), dtype, threads, seconds, folder):
                print(point.line(), flush=True)
                points.append(point)
    return points


def _measure(
    problem: Problem,
    ways: tuple[Way, ...],
    dtype: str,
    threads: int,
    seconds: float,
    folder: Path,
) -> Iterator[MemoryPoint]:
    shorter: dict[Way, tuple[int, Measured]] = {}
    for at_length in decades_of(problem):
        wanted: Outcome | None = None
        for way in ways:
            why_not = _too_much(at_length.T, *shorter[way]) if way in shorter else ""
            if why_not:
                yield MemoryPoint(at_length, way, None, why_not)
                continue
            where = f"{at_length.cell} {at_length.sizes}, {way.name}"
            try:
                measured = measure(way, at_length, dtype, threads, folder, _SHARE * seconds)
                wanted = measured.outcome if wanted is None else wanted
                check_same(way, measured.outcome, wanted, dtype)
            except ProcessError as error:
                if error.kind not in ("BudgetError", "MemoryError"):
                    raise RunError(f"{where}: {error}") from error
                yield MemoryPoint(at_length, way, None, str(error).partition(": ")[2])
                continue
            except WrongResultError as error:
                raise RunError(f"{where}: {error}") from error
            shorter[way] = at_length.T, measured
            yield MemoryPoint(at_length, way, measured)


def _too_much(T: int, shorter_T: int, shorter: Measured) -> str:
    """Say why a length is left out, from what a shorter one took; empty if it is not."""
    longer = T / shorter_T
    if (seconds := shorter.seconds * longer) > _LONGEST:
        return f"left out: about {seconds:.0f} s"
    there = available()
    if there is not None and (peak := shorter.peak_bytes * longer) > _FILLED * there:
        return f"left out: about {as_text(peak)}"
    return ""
