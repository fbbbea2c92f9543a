"""The one table of problem sizes, `problems.csv`, that every benchmark reads."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

TABLE = Path(__file__).with_name("problems.csv")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# What "any" in the table stands for.
COMMON_CELLS = ("rnn_tanh", "lstm", "gru")
# The row whose T is varied to see time and memory grow with the sequence.
LENGTH_ROW = ("medium", 1000, 16, 64, 256)
LENGTHS = (100, 300, 1000, 3000, 10000)
# The shortest of the lengths at which memory is measured; each of the others is ten times one.
SHORTEST = 100


@dataclass(frozen=True)
class Problem:
    """One recurrent layer and its input: T steps, B rows, I inputs, H hidden units."""

    suite: str
    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        return f"{self.suite}-{self.cell}-{self.sizes}"

    @property
    def sizes(self) -> str:
        """`T,B,I,H` as the command line takes them."""
        return f"{self.T},{self.B},{self.I},{self.H}"

    @property
    def kind(self) -> str:
        """The cell without its nonlinearity: `rnn`, `lstm` or `gru`."""
        return self.cell.partition("_")[0]

    @property
    def nonlinearity(self) -> str:
        """`tanh` or `relu` for the RNN, else empty."""
        return self.cell.partition("_")[2]

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of one training step.

        Forward, gradient of the input side and gradient of the weights are one product each, of
        `2 * T*B * G*H * (I+H)` operations.
        """
        return 3 * 2 * self.T * self.B * GATES[self.cell] * self.H * (self.I + self.H)


def read_problems(path: Path = TABLE) -> list[Problem]:
    """Return every problem of the table, a row for "any" cell spread over the common cells."""
    problems = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cells = COMMON_CELLS if row["cell"] == "any" else (row["cell"],)
            sizes = {size: int(row[size]) for size in "TBIH"}
            problems += [Problem(row["suite"], cell, **sizes) for cell in cells]
    return problems


def suites() -> list[str]:
    """Return the names of the table's suites, in its order."""
    return list(dict.fromkeys(problem.suite for problem in read_problems()))


def lengths_of(problem: Problem) -> list[Problem]:
    """Return the same problem at several T: the suite "length"."""
    return [replace(problem, suite="length", T=T) for T in LENGTHS]


def decades_of(problem: Problem) -> list[Problem]:
    """Return the same problem at T = 100, 1000 and so on, and last at its own T."""
    lengths = []
    T = SHORTEST
    while T < problem.T:
        lengths.append(T)
        T *= 10
    return [replace(problem, T=T) for T in [*lengths, problem.T]]


def length_suite() -> list[Problem]:
    """Return the suite "length" of the table: each cell at several T."""
    rows = [p for p in read_problems() if (p.suite, p.T, p.B, p.I, p.H) == LENGTH_ROW]
    return [problem for row in rows for problem in lengths_of(row)]
