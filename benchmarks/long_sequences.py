"""Time and memory of the schedules beside what they are meant to reach.

`python benchmarks/long_sequences.py --markdown docs/long-sequences.md` puts the table where the
file has the two lines

    <!-- figures -->
    <!-- end -->

and `--plot docs/segmented.png` draws what Segmented gets wrong and gains against its overlap.
Everything is in float32 and, but for Segmented, on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import fastbptt as fb
from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import installed, version
from fastbptt.bench.machine import machine
from fastbptt.bench.memory_point import check_same, measure
from fastbptt.bench.memory_step import TORCH, MemoryStep, Way, make_step, write_data
from fastbptt.bench.problems import Problem
from fastbptt.checkpointing import choose
from fastbptt.memory import as_text, needs_of

FIRST, LAST = "<!-- figures -->\n", "<!-- end -->"
FULL = Way("Full", fb.Full())
SHORT = Problem("", "lstm", 1000, 16, 64, 256)
LONG = Problem("", "lstm", 1_000_000, 1, 64, 64)
EXTRAPOLATED_FROM, AROUND = 100_000, 5
SEGMENTED = Problem("", "lstm", 100_000, 1, 64, 64)
SEGMENT, OVERLAPS = 1000, (0, 5, 10, 20, 40, 80, 160, 320)
DECAY = 0.8  # a step, of what the model that Segmented runs has learnt to remember
BESIDE_TORCH = [Problem("", cell, 10_000, 8, 32, 128) for cell in ("lstm", "gru", "rnn_tanh")]


class Figure(NamedTuple):
    """A number that was measured, and where it has to stay: above or below."""

    what: str
    got: float
    target: float
    unit: str
    at_least: bool = False

    def row(self) -> str:
        reached = self.got >= self.target if self.at_least else self.got <= self.target
        wanted = f"{'at least' if self.at_least else 'at most'} {self.target:g}{self.unit}"
        verdict = "reached" if reached else "**falls short**"
        return f"| {self.what} | {self.got:.2f}{self.unit} | {wanted} | {verdict} |"


def little_memory(rounds: int) -> tuple[list[Figure], list[str]]:
    """T = 1000: states and tape beside Full's tape, and the time of each beside Full's."""
    with FreshProcess(thread_environment(1)) as process:
        return process.call(_little_memory, rounds)


def _little_memory(rounds: int) -> tuple[list[Figure], list[str]]:
    T, B = SHORT.T, SHORT.B
    fb.set_num_threads(1)
    model = fb.Model(fb.LSTM(SHORT.I, SHORT.H, seed=0), fb.Linear(SHORT.H, 1, seed=0))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((T, B, SHORT.I), dtype=np.float32)
    target = rng.standard_normal((T, B, 1), dtype=np.float32)
    needs = needs_of(model, T, B, target_bytes=4)
    tape = T * needs.step
    share = tape // 100
    fixed = needs.fixed(choose(T, needs.state, needs.step, share)[1])
    many, one_percent = fb.Checkpointed(slots=50), fb.Checkpointed(memory=fixed + share)
    schedules = [fb.Full(), many, one_percent]
    wanted = fb.value_and_grad(model, x, target, "mse")
    times: list[list[float]] = [[] for _ in schedules]
    for schedule in schedules:
        got = fb.value_and_grad(model, x, target, "mse", schedule=schedule)
        assert all(np.array_equal(got.grads[name], wanted.grads[name]) for name in wanted.grads)
    for number in range(rounds):
        turns = list(zip(schedules, times, strict=True))
        for schedule, runs in turns if number % 2 == 0 else reversed(turns):
            began = time.perf_counter()
            fb.value_and_grad(model, x, target, "mse", schedule=schedule)
            runs.append(time.perf_counter() - began)
    full, with_slots, with_memory = map(median, times)
    slots, segment = many.division(T, needs)
    saved = 1 - (slots * needs.state + segment * needs.step) / tape
    name = f"LSTM {SHORT.sizes}"
    figures = [
        Figure(f"{name}, `slots=50`: of Full's tape saved", 100 * saved, 96, " %", True),
        Figure(f"{name}, `slots=50`: time beside Full's", with_slots / full, 1.30, " x"),
        Figure(f"{name}, 1 % of Full's tape: time beside Full's", with_memory / full, 1.8, " x"),
    ]
    slots, segment = one_percent.division(T, needs)
    notes = [
        f"Full's tape at {SHORT.sizes} is {as_text(tape)}, with y. 1 % of it, "
        f"{as_text(share)}, is what states and tape get: {slots} slots and segments of {segment} "
        f"steps. Packed weights, sums of weight gradients and the like are there besides, whatever "
        f"the schedule: {as_text(fixed)}, which is {fixed / tape:.1%} of that tape. So `memory=` "
        f"has to be {as_text(fixed + share)} there."
    ]
    return figures, notes


def million(rounds: int) -> tuple[list[Figure], list[str]]:
    """T = 1,000,000 in 16 MB, beside ten times T = 100,000 of Full."""
    way = Way("Checkpointed 16MB", fb.Checkpointed(memory="16MB"))
    part = replace(LONG, T=EXTRAPOLATED_FROM)
    with tempfile.TemporaryDirectory(prefix="fastbptt-") as name:
        folder = Path(name)
        write_data(folder, LONG, "float32")
        check_same(
            way,
            measure(way, part, "float32", 1, folder).outcome,
            measure(FULL, part, "float32", 1, folder).outcome,
            "float32",
        )
        peak = measure(way, LONG, "float32", 1, folder).peak_bytes
        with FreshProcess(thread_environment(1)) as process:
            first, full, times = process.call(_million, way, folder, rounds)
    longer = LONG.T / EXTRAPOLATED_FROM
    name = f'LSTM {LONG.sizes}, `memory="16MB"`'
    ratio = median(t / (longer * f) for t, f in zip(times, full, strict=True))
    figures = [
        Figure(f"{name}: growth of RssAnon", peak / 1e6, 32, " MB"),
        Figure(f"{name}: time beside Full's", ratio, 1.35, " x"),
    ]
    notes = [
        f"A million steps took {median(times):.2f} s in 16 MB. Full's time is {longer:g} times "
        f"that at T = {EXTRAPOLATED_FROM:,}, {median(full):.3f} s. Both are those of a step after "
        f"others in the same process, which has its memory from them; Full's first step took "
        f"{first:.3f} s. They run in turn, and the ratio is the median of those of "
        f"{rounds} rounds: {AROUND} steps of Full, a million steps, {AROUND} steps of Full."
    ]
    return figures, notes


def _million(way: Way, folder: Path, rounds: int) -> tuple[float, list[float], list[float]]:
    """Return Full's first time, and of each round the median of Full's and that in `way`."""
    full, long = (make_step(each, LONG, "float32", 1, folder) for each in (FULL, way))

    def seconds(step: MemoryStep, T: int) -> float:
        began = time.perf_counter()
        step.run(T)
        return time.perf_counter() - began

    first = seconds(full, EXTRAPOLATED_FROM)
    long.run(EXTRAPOLATED_FROM)
    medians, times = [], []
    for _ in range(rounds):
        around = [seconds(full, EXTRAPOLATED_FROM) for _ in range(AROUND)]
        times.append(seconds(long, LONG.T))
        around += [seconds(full, EXTRAPOLATED_FROM) for _ in range(AROUND)]
        medians.append(median(around))
    return first, medians, times


def beside_torch() -> tuple[list[Figure], list[str]]:
    """Full's memory beside torch's."""
    figures, sizes = [], []
    for problem in BESIDE_TORCH:
        with tempfile.TemporaryDirectory(prefix="fastbptt-") as name:
            folder = Path(name)
            write_data(folder, problem, "float32")
            ours, theirs = (measure(way, problem, "float32", 1, folder) for way in (FULL, TORCH))
        check_same(TORCH, theirs.outcome, ours.outcome, "float32")
        what = f"{problem.cell} {problem.sizes}, Full: growth beside torch's"
        figures.append(Figure(what, ours.peak_bytes / theirs.peak_bytes, 0.4, " x"))
        sizes.append(
            f"{problem.cell} {as_text(ours.peak_bytes)} beside {as_text(theirs.peak_bytes)}"
        )
    return figures, [f"Growth of the process, this library beside torch: {', '.join(sizes)}."]


class Point(NamedTuple):
    """What Segmented gets wrong with an overlap, and what it gains."""

    overlap: int
    error: float
    full_seconds: float
    segmented_seconds: float
    speedup: float


def segmented(rounds: int) -> tuple[list[Point], list[Figure], list[str]]:
    """T = 100,000 of a trained model on two threads: the error of the gradient and the speed."""
    with FreshProcess(thread_environment(2)) as process:
        points = process.call(_segmented, rounds)
    within = [point for point in points if point.error < 1e-3]
    best = max(within or points, key=lambda point: point.speedup)
    name = f"LSTM {SEGMENTED.sizes}, Segmented({SEGMENT}, {best.overlap}), two threads"
    figures = [
        Figure(f"{name}: speed beside Full's", best.speedup, 2.2, " x", True),
        Figure(f"{name}: error of the gradient", 1e3 * best.error, 1.0, "e-3"),
    ]
    notes = [
        f"The model has learnt to follow a sum of its input that fades by {DECAY} a step. What "
        f"Segmented({SEGMENT}, overlap) makes of its gradient, as a share of the gradient's norm, "
        f"and how much faster than Full it is:",
        "| overlap | error | Full, s | Segmented, s | speed beside Full's |\n"
        "| ---: | ---: | ---: | ---: | ---: |\n"
        + "\n".join(
            f"| {p.overlap} | {p.error:.1e} | {p.full_seconds:.3f} | {p.segmented_seconds:.3f} "
            f"| {p.speedup:.2f} x |"
            for p in points
        ),
    ]
    return points, figures, notes


def _segmented(rounds: int) -> list[Point]:
    fb.set_num_threads(2)
    I, H = SEGMENTED.I, SEGMENTED.H  # noqa: E741
    rng = np.random.default_rng(1)
    mixed = (rng.standard_normal(I) / np.sqrt(I)).astype(np.float32)

    def data(T: int, B: int) -> tuple[Any, Any]:
        x = rng.standard_normal((T, B, I), dtype=np.float32)
        target = x @ mixed
        for t in range(1, T):
            target[t] += DECAY * target[t - 1]
        return x, np.tanh(target)[..., None]

    model = fb.Model(fb.LSTM(I, H, seed=0), fb.Linear(H, 1, seed=0))
    adam = fb.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        adam.step(fb.value_and_grad(model, *data(100, 32), "mse").grads)
    x, target = data(SEGMENTED.T, SEGMENTED.B)
    return [
        Point(
            overlap,
            *fb.segmentation_error(
                model, x, target, "mse", schedule=fb.Segmented(SEGMENT, overlap), repeats=rounds
            ),
        )
        for overlap in OVERLAPS
    ]


def plot(path: Path, points: list[Point]) -> None:
    """Draw the error of the gradient and the speed against the overlap."""
    # Not through pyplot, which looks for a screen.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=(7, 3.2), layout="constrained"
    )
    error, speed = figure.subplots(1, 2, sharex=True)
    overlaps = [point.overlap for point in points]
    error.plot(overlaps, [point.error for point in points], marker=".")
    error.set(yscale="log", ylabel="error of the gradient", xlabel="overlap, steps")
    speed.plot(overlaps, [point.speedup for point in points], marker=".")
    speed.set(ylim=(0, None), ylabel="speed beside Full's", xlabel="overlap, steps")
    for axes in (error, speed):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, format="png", dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    parts = [little_memory(3 * options.rounds), million(options.rounds)]
    parts += [beside_torch()] if installed("torch") else []
    points, figures, notes = segmented(options.rounds)
    parts.append((figures, notes))
    if options.plot is not None:
        plot(options.plot, points)
    here = machine()
    versions = [f"{name} {version(name)}" for name in ("fastbptt", "torch") if installed(name)]
    command = (
        f"python benchmarks/long_sequences.py --rounds {options.rounds} "
        "--markdown docs/long-sequences.md --plot docs/segmented.png"
    )
    rows = [figure.row() for found, _ in parts for figure in found]
    paragraphs = [line for _, lines in parts for note in lines for line in (note, "")]
    block = "\n".join(
        [
            f"`{command}`",
            "",
            f"{here['cpu']}, {here['cpus']} CPUs; {here['system']}, Python {here['python']}; "
            f"{', '.join(versions)}; {here['isa']}, float32, 1 thread "
            "unless said otherwise.",
            "",
            "| figure | measured | wanted | |",
            "| --- | ---: | ---: | --- |",
            *rows,
            "",
            *paragraphs,
        ]
    )
    print(block)
    if options.markdown is not None:
        text = options.markdown.read_text(encoding="utf-8")
        before, first, behind = text.partition(FIRST)
        _, last, after = behind.partition(LAST)
        if not (first and last):
            parser.error(f"--markdown: {options.markdown} has no {FIRST.strip()} ... {LAST}")
        options.markdown.write_text(before + first + block + last + after, encoding="utf-8")


if __name__ == "__main__":
    main()
