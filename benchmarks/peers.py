"""Tables of this library beside torch and oneDNN, for docs/performance.md.

`python benchmarks/peers.py --suite small,medium --onednn PATH --markdown docs/performance.md` runs
the libraries in turn and puts each suite's table where the file has the two lines

    <!-- peers: small float32 1 -->
    <!-- end -->

with suite, dtype and threads, and at the end the instruction set if FASTBPTT_ISA forces one.

PATH is a program that times oneDNN's own RNN primitives: forward in training mode, then backward
with all gradients, layout changes of the weights included. For arguments like `lstm:100,1,32,32`
(also `lbr_gru:` and `rnn:`, with tanh) it prints CSV, under the heading
`cell,T,B,I,H,train_ms,forward_ms`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median

from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import installed, version
from fastbptt.bench.machine import machine
from fastbptt.bench.problems import GATES, Problem, read_problems, suites
from fastbptt.bench.timing import Times, time_problem
from fastbptt.cli.options import real, some_of, whole

ONEDNN_CELLS = {"lstm": "lstm", "gru": "lbr_gru", "rnn": "rnn"}
ONE_THREAD = "1 thread"
STANDARD = {"threads": 1, "rounds": 5, "seconds": 3.0}


@dataclass
class Result:
    """One problem: seconds of this library and of each peer, and the large matrix product's rate.

    With several threads, this library on one thread is a peer too.
    """

    problem: Problem
    times: Times = field(default_factory=Times)
    onednn: list[float] = field(default_factory=list)
    one_thread: Times = field(default_factory=Times)

    def seconds(self) -> dict[str, float]:
        found = {name: self.times.seconds(name) for name in self.times.steps}
        if self.onednn:
            found["oneDNN"] = median(self.onednn)
        if self.one_thread.steps:
            found[ONE_THREAD] = self.one_thread.seconds("fastbptt")
        return found

    def gflops(self, seconds: float) -> float:
        return self.problem.operations / seconds / 1e9

    def ratios(self) -> dict[str, float]:
        """Each peer's time over this library's, and the least of them but that of one thread."""
        seconds = self.seconds()
        ours = seconds.pop("fastbptt")
        ratios = {peer: theirs / ours for peer, theirs in seconds.items()}
        peers = [ratio for peer, ratio in ratios.items() if peer != ONE_THREAD]
        return ratios | ({"fastest": min(peers)} if len(peers) > 1 else {})


class OneDnn:
    """The program that times oneDNN."""

    def __init__(self, path: str, threads: int) -> None:
        self.path = path
        self.environment = os.environ | thread_environment(threads)

    def seconds(self, problem: Problem) -> float:
        cell = ONEDNN_CELLS[problem.kind]
        lines = self._run(f"{cell}:{problem.sizes}").splitlines()
        rows = [row for row in csv.DictReader(lines) if row["cell"] == cell and row["train_ms"]]
        if len(rows) != 1:
            raise SystemExit(f"{self.path}: no time for {cell} {problem.sizes}: {lines}")
        return float(rows[0]["train_ms"]) / 1e3

    def version(self) -> str:
        found = re.search(r"oneDNN v([\w.]+)", self._run("rnn:1,1,8,8", ONEDNN_VERBOSE="1"))
        return found[1] if found else "of unknown version"

    def _run(self, argument: str, **variables: str) -> str:
        return subprocess.run(
            [self.path, argument],
            env=self.environment | variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout


def measure(
    problems: Iterable[Problem], onednn: OneDnn | None, options: argparse.Namespace
) -> list[Result]:
    libraries = ("fastbptt", "torch") if installed("torch") else ("fastbptt",)
    dtype, threads, turn = options.dtype, options.threads, options.seconds / options.rounds
    results = []
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(FreshProcess(thread_environment(threads)))
        alone = stack.enter_context(FreshProcess(thread_environment(1))) if threads > 1 else None
        for problem in problems:
            result = Result(problem)
            for _ in range(options.rounds):
                result.times.add(
                    process.call(time_problem, problem, libraries, dtype, threads, turn, 1)
                )
                if onednn is not None:
                    result.onednn.append(onednn.seconds(problem))
                if alone is not None:
                    result.one_thread.add(
                        alone.call(time_problem, problem, ("fastbptt",), dtype, 1, turn, 1)
                    )
            shown = ", ".join(f"{name} {value:.2f}" for name, value in result.ratios().items())
            rate = result.gflops(result.seconds()["fastbptt"])
            print(f"{problem}: {rate:.1f} GFLOP/s; x {shown}", file=sys.stderr)
            results.append(result)
    return results


def table(results: list[Result]) -> list[str]:
    """Rates and ratios of each problem, then the geometric means of each cell and of all."""
    libraries, ratios = list(results[0].seconds()), list(results[0].ratios())
    heading = ["cell", "T,B,I,H", *libraries, *(f"x {peer}" for peer in ratios), "of matrix"]
    rows = []
    for result in results:
        seconds = result.seconds()
        share = result.gflops(seconds["fastbptt"]) / result.times.matrix_rate()[0]
        rows.append(
            [result.problem.cell, result.problem.sizes]
            + [f"{result.gflops(seconds[library]):.1f}" for library in libraries]
            + [f"{result.ratios()[peer]:.2f}" for peer in ratios]
            + [f"{share:.0%}"]
        )
    cells = [cell for cell in GATES if any(r.problem.cell == cell for r in results)]
    for cell in [*cells, "all"] if len(cells) > 1 else cells:
        some = [result for result in results if cell in ("all", result.problem.cell)]
        means = {peer: geometric_mean(r.ratios()[peer] for r in some) for peer in ratios}
        rows.append(
            [f"**{cell}**", "geometric mean"]
            + [""] * len(libraries)
            + [f"**{mean:.2f}**" for mean in means.values()]
            + [""]
        )
    rules = ["---", "---"] + ["---:"] * (len(heading) - 2)
    return [f"| {' | '.join(row)} |" for row in (heading, rules, *rows)]


def caption(suite: str, onednn: OneDnn | None, options: argparse.Namespace) -> list[str]:
    """The command, the machine and the versions."""
    here, dtype, threads = machine(), options.dtype, options.threads
    command = f"python benchmarks/peers.py --suite {suite}"
    for name in ("ONEDNN_MAX_CPU_ISA", "FASTBPTT_ISA"):
        if name in os.environ:
            command = f"{name}={os.environ[name]} {command}"
    if options.cell != tuple(ONEDNN_CELLS):
        command += f" --cell {','.join(options.cell)}"
    command += f" --dtype {dtype}" if dtype != "float32" else ""
    for name, standard in STANDARD.items():
        if (value := getattr(options, name)) != standard:
            command += f" --{name} {value:g}"
    command += " --onednn PATH" if onednn is not None else ""
    versions = [f"{name} {version(name)}" for name in ("fastbptt", "torch") if installed(name)]
    if onednn is not None:
        versions.append(f"oneDNN {onednn.version()}")
    caches = ", ".join(f"{level} {size}" for level, size in here["caches"].items())
    return [
        f"`{command} --markdown docs/performance.md`",
        "",
        f"{here['cpu']}, {here['cpus']} CPUs, {caches}; {here['system']}, Python {here['python']}; "
        f"{', '.join(versions)}; {here['isa']}, {dtype}, {threads} "
        f"thread{'s' if threads > 1 else ''}; rounds: {options.rounds}.",
    ]


def first_line(suite: str, options: argparse.Namespace) -> str:
    """What stands before a suite's table in the file."""
    name = f"{suite} {options.dtype} {options.threads} {os.environ.get('FASTBPTT_ISA', '')}"
    return f"<!-- peers: {name.strip()} -->\n"


def place(text: str, suite: str, options: argparse.Namespace) -> slice | None:
    """Where a suite's table stands in the file: between its first line and the next end."""
    _, first, behind = text.partition(first_line(suite, options))
    table, last, _ = behind.partition("<!-- end -->")
    if not (first and last):
        return None
    start = len(text) - len(behind)
    return slice(start, start + len(table))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=some_of(suites()), default=("small", "medium"))
    parser.add_argument("--cell", type=some_of(tuple(ONEDNN_CELLS)), default=tuple(ONEDNN_CELLS))
    parser.add_argument("--onednn", metavar="PATH")
    parser.add_argument("--threads", type=whole(1, 1024))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--rounds", type=whole(1))
    parser.add_argument(
        "--seconds", type=real(0.0, above=True), help="for a problem, without oneDNN's"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.set_defaults(**STANDARD)
    options = parser.parse_args()
    if options.onednn is None and not installed("torch") and options.threads == 1:
        parser.error("torch is not installed; wanted --onednn PATH")
    if options.onednn is not None and options.dtype != "float32":
        parser.error(f"--onednn: got --dtype {options.dtype}; its primitives train in float32")
    if options.onednn is not None and shutil.which(options.onednn) is None:
        parser.error(f"--onednn: got {options.onednn!r}, wanted the path of a program")
    if options.markdown is not None:
        if options.cell != tuple(ONEDNN_CELLS):
            parser.error("--markdown: wanted all cells")
        text = options.markdown.read_text(encoding="utf-8")
        for suite in options.suite:
            if place(text, suite, options) is None:
                first = first_line(suite, options).strip()
                parser.error(f"--markdown: {options.markdown} has no {first} ... <!-- end -->")
    return options


def main() -> None:
    options = parse()
    onednn = OneDnn(options.onednn, options.threads) if options.onednn else None
    for suite in options.suite:
        problems = [p for p in read_problems() if p.suite == suite and p.kind in options.cell]
        results = measure(problems, onednn, options)
        block = "\n".join([*caption(suite, onednn, options), "", *table(results), ""])
        if options.markdown is None:
            print(f"\n{block}")
            continue
        text = options.markdown.read_text(encoding="utf-8")
        old = place(text, suite, options)
        assert old is not None
        options.markdown.write_text(text[: old.start] + block + text[old.stop :], encoding="utf-8")


if __name__ == "__main__":
    main()
