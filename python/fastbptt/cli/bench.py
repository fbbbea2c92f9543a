"""`fastbptt bench`: this library beside others, on the machine it runs on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import fastbptt as fb
from fastbptt.bench.fresh_process import FreshProcess, ProcessError, thread_environment
from fastbptt.bench.libraries import LIBRARIES, PRECISIONS, installed, version
from fastbptt.bench.machine import machine
from fastbptt.bench.matrix_product import SIZE
from fastbptt.bench.memory_report import plot as plot_memory
from fastbptt.bench.memory_step import TORCH
from fastbptt.bench.peak_memory import peak_memory
from fastbptt.bench.plot import plot
from fastbptt.bench.problems import Problem, lengths_of, read_problems
from fastbptt.bench.report import Point, heading, lines
from fastbptt.bench.timing import time_problem
from fastbptt.cli import files
from fastbptt.cli.bench_memory import DEFAULT_PROBLEM, measure_all
from fastbptt.cli.errors import RunError, UsageError

DEFAULT_SUITES = ("small",)


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print a table and write the files that were asked for."""
    _check_files(arguments)
    if arguments.memory:
        return _bench_memory(arguments)
    problems = _problems(arguments)
    libraries: tuple[str, ...] = ("fastbptt", *arguments.beside)
    if arguments.precision:
        if arguments.dtype != "float32":
            raise UsageError(f"--precision: got --dtype {arguments.dtype}, wanted float32")
        libraries += tuple(n for n in PRECISIONS if n.partition(":")[0] in libraries)
    print(_title(libraries, arguments))
    print(heading(), flush=True)
    points, lengths = [], []
    with FreshProcess(thread_environment(arguments.threads)) as process:
        for problem in problems:
            points.append(_time(process, problem, libraries, arguments))
            _print(lines(points[-1]))
        if arguments.plot is not None:
            print(heading(memory=True))
            for problem in _lengths(problems):
                point = _time(process, problem, libraries, arguments)
                point.peak_bytes = _peaks(problem, libraries, arguments)
                lengths.append(point)
                _print(lines(point))
    rate, by = max(point.times.matrix_rate() for point in points + lengths)
    print(f"matrix: {SIZE} x {SIZE} times {SIZE} x {SIZE}, by {by}, at best {rate:.1f} GFLOP/s")
    if arguments.json is not None:
        files.write_json(arguments.json, _summary(points, lengths, libraries, arguments))
    if arguments.plot is not None:
        title = f"B,I,H = {problems[0].sizes.partition(',')[2]}; {_title(libraries, arguments)}"
        files.write_whole(arguments.plot, "--plot", lambda path: plot(path, lengths, title))
    return 0


def _bench_memory(arguments: argparse.Namespace) -> int:
    if arguments.suite is not None:
        raise UsageError("--suite: not with --memory; wanted --problem")
    if arguments.precision:
        raise UsageError("--precision: not with --memory")
    if arguments.problem is None:
        arguments.problem = [DEFAULT_PROBLEM]
    problems = _problems(arguments)
    others = (TORCH,) if "torch" in arguments.beside else ()
    libraries = ("fastbptt", *(way.name for way in others))
    title = _title(libraries, arguments)
    print(title)
    points = measure_all(problems, others, arguments.dtype, arguments.threads, arguments.seconds)
    if arguments.json is not None:
        summary = _about(libraries, arguments) | {"points": [point.as_dict() for point in points]}
        files.write_json(arguments.json, summary)
    if arguments.plot is not None:
        first = problems[0].sizes.partition(",")[2]
        drawn = [point for point in points if point.problem.sizes.partition(",")[2] == first]
        title = f"B,I,H = {first}; {title}"
        files.write_whole(arguments.plot, "--plot", lambda path: plot_memory(path, drawn, title))
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse, before the work, what could not be written after it."""
    if arguments.json is not None:
        files.check_writable(arguments.json, "--json")
    if arguments.plot is not None:
        files.check_picture(arguments.plot, "--plot", arguments.json)


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Every chosen cell on every chosen problem."""
    if arguments.problem is None:
        suites = arguments.suite or DEFAULT_SUITES
        chosen = [problem for problem in read_problems() if problem.suite in suites]
    else:
        cells = {"rnn": "rnn_tanh"}
        chosen = [
            Problem("", cells.get(cell, cell), *problem)
            for problem in dict.fromkeys(arguments.problem)
            for cell in arguments.cell
        ]
    return [problem for problem in chosen if problem.kind in arguments.cell]


def _lengths(problems: list[Problem]) -> list[Problem]:
    """Return the sizes of the first problem, at several T, for every cell that has them."""
    same = [problem for problem in problems if problem.sizes == problems[0].sizes]
    return [problem for one in same for problem in lengths_of(one)]


def _time(
    process: FreshProcess,
    problem: Problem,
    libraries: tuple[str, ...],
    arguments: argparse.Namespace,
) -> Point:
    dtype, threads, seconds = arguments.dtype, arguments.threads, arguments.seconds
    try:
        times = process.call(time_problem, problem, libraries, dtype, threads, seconds)
    except ProcessError as error:
        raise _failed(problem, error) from error
    return Point(problem, times)


def _peaks(
    problem: Problem, libraries: tuple[str, ...], arguments: argparse.Namespace
) -> dict[str, int]:
    try:
        return {
            library: peak_memory(library, problem, arguments.dtype, arguments.threads)
            for library in libraries
        }
    except ProcessError as error:
        raise _failed(problem, error) from error


def _failed(problem: Problem, error: ProcessError) -> UsageError | RunError:
    where = f"{problem.cell} {problem.sizes}"
    if error.kind == "MemoryError":
        return UsageError(f"{where}: does not fit into memory: {error}")
    return RunError(f"{where}: {error}")


def _print(table: Sequence[str]) -> None:
    print("\n".join(table), flush=True)


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    others = ("numpy", "torch") if installed("torch") else ("numpy",)
    return {name: version(name) for name in LIBRARIES if name in (*libraries, *others)}


def _title(libraries: Sequence[str], arguments: argparse.Namespace) -> str:
    here, threads = machine(), arguments.threads
    versions = ", ".join(f"{name} {text}" for name, text in _versions(libraries).items())
    return (
        f"{here['cpu']}, {here['cpus']} CPUs, {here['isa']}; {arguments.dtype}, "
        f"{threads} thread{'s' if threads > 1 else ''}; {versions}"
    )


def _about(libraries: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "version": fb.__version__,
        "versions": _versions(libraries),
        "machine": machine(),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
    }


def _summary(
    points: list[Point],
    lengths: list[Point],
    libraries: tuple[str, ...],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    return _about(libraries, arguments) | {
        "points": [point.as_dict() for point in points],
        "lengths": [point.as_dict() for point in lengths],
    }
