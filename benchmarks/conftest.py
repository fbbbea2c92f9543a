"""Chooses the problems, and prints what was measured as one table."""

from __future__ import annotations

import os

import pytest

from fastbptt.bench.libraries import PRECISIONS, installed
from fastbptt.bench.problems import length_suite, read_problems
from report import Row, table

THREADS = int(os.environ.get("FASTBPTT_BENCH_THREADS", "1"))
LIBRARIES = ("fastbptt", "torch") if installed("torch") else ("fastbptt",)
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--suite",
        default="small,medium,large,length",
        help="suites of the table, and 'length', with commas between (default: %(default)s)",
    )
    parser.addoption("--precision", action="store_true", help="the libraries' other precisions too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    problems = read_problems() + length_suite()
    known = {problem.suite for problem in problems}
    wanted = set(metafunc.config.getoption("--suite").split(","))
    if not wanted <= known:
        raise pytest.UsageError(f"--suite: got {sorted(wanted)}, wanted some of {sorted(known)}")
    chosen = [problem for problem in problems if problem.suite in wanted]
    metafunc.parametrize("problem", chosen, ids=str)
    # Inside the problems: the libraries take turns, so that both share the drift of the machine.
    more = PRECISIONS if metafunc.config.getoption("--precision") else ()
    here = [name for name in more if name.partition(":")[0] in LIBRARIES]
    metafunc.parametrize("library", [*LIBRARIES, *here])


@pytest.fixture
def threads() -> int:
    return THREADS


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[Row]:
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section(f"training step, float32, threads: {THREADS}")
        for line in table(rows):
            terminalreporter.line(line)
