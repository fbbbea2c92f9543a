"""Table of `fastbptt.torch` beside `torch.nn`, through autograd, for docs/torch.md.

`python benchmarks/torch_layers.py --markdown docs/torch.md` times a training step of each layer in
turn, and puts the table where the file has the two lines

    <!-- torch_layers: float32 1 -->
    <!-- end -->

with dtype and threads.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import version
from fastbptt.bench.machine import machine
from fastbptt.bench.problems import Problem, read_problems
from fastbptt.cli.options import real, whole

SUITES = ("small", "medium")
# Packed: so many rows, whose lengths are drawn from so many steps.
ROWS, SHORTEST, LONGEST = 32, 50, 500
PACKED = [Problem("packed", cell, LONGEST, ROWS, 64, 128) for cell in ("rnn_tanh", "lstm", "gru")]
TOLERANCE = {"float32": 1e-3, "float64": 1e-8}
STANDARD = {"threads": 1, "rounds": 10, "seconds": 6.0}


@dataclass(frozen=True)
class Result:
    """One problem: seconds of torch's training step and of ours."""

    problem: Problem
    theirs: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def name(self) -> str:
        if self.problem.suite != "packed":
            return self.problem.sizes
        return f"packed {SHORTEST} to {LONGEST},{ROWS},{self.problem.I},{self.problem.H}"


def time_layer(
    problem: Problem, dtype: str, threads: int, rounds: int, seconds: float
) -> tuple[float, float]:
    """Return the median seconds of torch's training step and of ours, taken in turn."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    steps = make_steps(problem, getattr(torch, dtype))
    check_same(*(step() for step in steps), dtype)
    times: list[list[float]] = [[], []]
    gc.disable()
    for number in range(rounds):
        # There and back, so that neither always comes after the other.
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which] += turn(steps[which], seconds / rounds / 2)
    gc.enable()
    theirs, ours = (median(runs) for runs in times)
    return theirs, ours


def make_steps(problem: Problem, dtype: Any) -> list[Callable[[], list[Any]]]:
    """Return the training step with torch's layer, and with the same one accelerated."""
    import torch

    import fastbptt.torch

    options = {"nonlinearity": problem.nonlinearity} if problem.nonlinearity else {}
    theirs = getattr(torch.nn, problem.kind.upper())(problem.I, problem.H, dtype=dtype, **options)
    ours = copy.deepcopy(theirs)
    assert fastbptt.torch.accelerate(ours).swapped
    if problem.suite == "packed":
        lengths = torch.randint(SHORTEST, LONGEST + 1, (ROWS,)).tolist()
        rows = [torch.randn(length, problem.I, dtype=dtype) for length in lengths]
        x = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
        x.data.requires_grad_()
        data = x.data
    else:
        x = data = torch.randn(problem.T, problem.B, problem.I, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(*data.shape[:-1], problem.H, dtype=dtype)

    def step(layer: Any) -> list[Any]:
        y = layer(x)[0]
        y = y if isinstance(y, torch.Tensor) else y.data
        return [y, *torch.autograd.grad(y, [data, *layer.parameters()], grad_y)]

    return [lambda: step(theirs), lambda: step(ours)]


def check_same(wanted: list[Any], got: list[Any], dtype: str) -> None:
    for want, have in zip(wanted, got, strict=True):
        error = ((have - want).norm() / want.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"the results differ by {error:.1e}, more than {TOLERANCE[dtype]:g}")


def turn(step: Callable[[], object], seconds: float) -> list[float]:
    """Return the times of at least two runs; the first finds the caches cold, and is left out."""
    runs: list[float] = []
    clock = time.perf_counter
    end = clock() + seconds
    while len(runs) < 2 or clock() < end:
        began = clock()
        step()
        runs.append(clock() - began)
    return runs[1:]


def measure(options: argparse.Namespace) -> list[Result]:
    problems = [problem for problem in read_problems() if problem.suite in SUITES] + PACKED
    results = []
    with FreshProcess(thread_environment(options.threads)) as process:
        for problem in problems:
            arguments = options.dtype, options.threads, options.rounds, options.seconds
            result = Result(problem, *process.call(time_layer, problem, *arguments))
            print(f"{problem}: x torch {result.ratio:.2f}", file=sys.stderr)
            results.append(result)
    return results


def table(results: list[Result]) -> list[str]:
    """Milliseconds and ratios, then the geometric means of each cell, without the packed ones."""
    rows = [
        [r.problem.cell, r.name, f"{r.theirs * 1e3:.3g}", f"{r.ours * 1e3:.3g}", f"{r.ratio:.2f}"]
        for r in sorted(results, key=lambda r: r.problem.suite == "packed")
    ]
    for cell in dict.fromkeys(result.problem.cell for result in results):
        ratios = [r.ratio for r in results if r.problem.cell == cell and r.problem.suite in SUITES]
        mean = f"**{geometric_mean(ratios):.2f}**"
        rows.append([f"**{cell}**", "geometric mean, not packed", "", "", mean])
    heading = ["cell", "T,B,I,H", "torch.nn, ms", "fastbptt.torch, ms", "x torch"]
    rules = ["---", "---", "---:", "---:", "---:"]
    return [f"| {' | '.join(row)} |" for row in (heading, rules, *rows)]


def caption(options: argparse.Namespace) -> list[str]:
    here, threads = machine(), options.threads
    command = "python benchmarks/torch_layers.py"
    command += f" --dtype {options.dtype}" if options.dtype != "float32" else ""
    for name, standard in STANDARD.items():
        if (value := getattr(options, name)) != standard:
            command += f" --{name} {value:g}"
    caches = ", ".join(f"{level} {size}" for level, size in here["caches"].items())
    return [
        f"`{command} --markdown docs/torch.md`",
        "",
        f"{here['cpu']}, {here['cpus']} CPUs, {caches}; {here['system']}, Python {here['python']}; "
        f"fastbptt {version('fastbptt')}, torch {version('torch')}; {here['isa']}, "
        f"{options.dtype}, {threads} thread{'s' if threads > 1 else ''}.",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--threads", type=whole(1, 1024))
    parser.add_argument("--rounds", type=whole(1))
    parser.add_argument("--seconds", type=real(0.0, above=True), help="for a problem")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.set_defaults(**STANDARD)
    return parser.parse_args()


def main() -> None:
    options = parse()
    first = f"<!-- torch_layers: {options.dtype} {options.threads} -->\n"
    last = "<!-- end -->"
    if options.markdown is not None:
        before, found, behind = options.markdown.read_text(encoding="utf-8").partition(first)
        _, ended, behind = behind.partition(last)
        if not (found and ended):
            raise SystemExit(f"--markdown: {options.markdown} has no {first.strip()} ... {last}")
    results = measure(options)
    block = "\n".join([*caption(options), "", *table(results), ""])
    if options.markdown is None:
        print(f"\n{block}")
    else:
        options.markdown.write_text(f"{before}{first}{block}{last}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
