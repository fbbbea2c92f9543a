"""Errors and times of the precisions, of this library and of torch, as in docs/precision.md.

`python benchmarks/precision.py` runs a training step of each problem at every precision, compares
it with float64, times them in turn, and prints both as tables.
"""

from __future__ import annotations

import argparse

import numpy as np

from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import PRECISIONS, ROUGH, exact, installed, make_step, version
from fastbptt.bench.machine import machine
from fastbptt.bench.problems import Problem
from fastbptt.bench.timing import time_problem
from fastbptt.bench.training_step import widened
from fastbptt.cli.options import real, sizes

CELLS = ("rnn_tanh", "lstm", "gru")
SIZES = [(128, 32, 64, 128), (256, 64, 128, 256), (50, 64, 512, 512), (25, 64, 1024, 1024)]
LONG = (1000, 16, 64, 256)
PLAIN = ("fastbptt", "torch")


def errors(problem: Problem, libraries: tuple[str, ...]) -> dict[str, tuple[float, float, float]]:
    """Return, relative to float64 in norm, the error of y, of dL/dx and the largest of dL/dW.

    A library that cannot run the problem here is left out.
    """
    wanted = exact(problem, 1)
    found = {}
    for library in libraries:
        try:
            got = widened(make_step(library, problem, "float32", 1).run())
        except RuntimeError:  # of torch's LSTM, under autocast on a CPU without AVX-512
            continue
        each = [
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(got, wanted, strict=True)
        ]
        found[library] = each[0], each[1], max(each[2:4])
    return found


def tables(problems: list[Problem], libraries: tuple[str, ...], seconds: float) -> list[str]:
    """One row a problem: the errors of each precision, then the times."""
    heading = ["cell", "T,B,I,H", *libraries]
    rules = ["---", "---", *(["---:"] * len(libraries))]
    wrong, times = [heading, rules], [heading, rules]
    with FreshProcess(thread_environment(1)) as process:
        for problem in problems:
            found = process.call(errors, problem, libraries)
            wrong.append(
                [problem.cell, problem.sizes]
                + [
                    " / ".join(f"{value:.0e}" for value in found.get(name, ())) or "fails"
                    for name in libraries
                ]
            )
            right = tuple(name for name, each in found.items() if max(each) <= ROUGH)
            measured = process.call(time_problem, problem, right, "float32", 1, seconds)
            base = measured.seconds("fastbptt")
            times.append(
                [problem.cell, problem.sizes]
                + [
                    f"{measured.seconds(name) * 1e3:.1f} ({base / measured.seconds(name):.2f})"
                    if name in right
                    else "wrong"
                    if name in found
                    else "fails"
                    for name in libraries
                ]
            )
            print(f"{problem}: {times[-1][2:]}", flush=True)
    return [
        "Errors of y / dL/dx / dL/dW, relative to float64 in norm:",
        "",
        *(f"| {' | '.join(row)} |" for row in wrong),
        "",
        "Milliseconds of a training step, and in brackets how many times as fast as `fastbptt`:",
        "",
        *(f"| {' | '.join(row)} |" for row in times),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", type=sizes, action="append", metavar="T,B,I,H")
    parser.add_argument("--seconds", type=real(0.0, above=True), default=8.0, help="for a problem")
    options = parser.parse_args()
    libraries = tuple(name for name in (*PLAIN, *PRECISIONS) if installed(name.partition(":")[0]))
    chosen = options.problem or [*SIZES, LONG]
    problems = [Problem("", cell, *problem) for problem in chosen for cell in CELLS]
    here = machine()
    caption = (
        f"{here['cpu']}; {here['isa']}, 1 thread; fastbptt {version('fastbptt')}"
        + (f", torch {version('torch')}" if installed("torch") else "")
        + "."
    )
    print("\n".join(["", caption, "", *tables(problems, libraries, options.seconds)]))


if __name__ == "__main__":
    main()
