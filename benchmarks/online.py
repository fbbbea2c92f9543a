"""Quality against compute of the rules that learn online, on four streams.

`python benchmarks/online.py --markdown docs/online.md --plot docs/online.png` puts the table where
the file has the two lines

    <!-- rules -->
    <!-- end of rules -->

Every rule gets the same model, the same data, the same optimiser and one pass. What counts is the
loss of each prediction before anything was learned from its target, over the last fifth of the
stream. One thread, float32.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.bench.machine import machine
from report import put_between

FIRST, LAST = "<!-- rules -->\n", "<!-- end of rules -->"
B, HIDDEN, LR, MAX_NORM = 4, 24, 0.005, 1.0
SYMBOLS = 4
IGNORED = -100
TICKS = [10, 30, 100, 300, 1000]

Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A stream: `make(rng, T)` gives x `[T, B, I]` and its targets; `chance` is the loss of one
    who knows only how often each target comes."""

    name: str
    loss: str
    outputs: int
    make: Callable[[np.random.Generator, int], Data]
    chance: float
    unit: str


@dataclass(frozen=True)
class Result:
    task: Task
    rule: str
    losses: list[float]  # one a seed
    seconds: float  # a step, the median over the seeds


def copy_memory(rng: np.random.Generator, T: int) -> Data:
    """Three symbols, five blanks, then a cue three times, and at each the next symbol is wanted."""
    length, gap = 3, 5
    episode = 2 * length + gap
    count = -(-T // episode) + 1
    x = np.zeros((count * episode, B, SYMBOLS + 2), np.float32)
    target = np.full((count * episode, B), IGNORED)
    symbols = rng.integers(0, SYMBOLS, (count, length, B))
    for number in range(count):
        begin = number * episode
        shown = slice(begin, begin + length)
        asked = slice(begin + length + gap, begin + episode)
        x[shown, :, :SYMBOLS] = np.eye(SYMBOLS)[symbols[number]]
        x[begin + length : begin + length + gap, :, SYMBOLS] = 1
        x[asked, :, SYMBOLS + 1] = 1
        target[asked] = symbols[number]
    return shifted(x, target, episode, T)


def adding(rng: np.random.Generator, T: int) -> Data:
    """Ten numbers, two of them marked; at the end of the ten their sum is wanted."""
    episode = 10
    count = -(-T // episode) + 1
    x = np.zeros((count * episode, B, 3), np.float32)
    target = np.full((count * episode, B, 1), np.nan, np.float32)
    x[:, :, 0] = rng.random(x.shape[:2])
    x[episode - 1 :: episode, :, 2] = 1
    for number in range(count):
        for b in range(B):
            first = number * episode + rng.integers(0, episode // 2)
            second = number * episode + rng.integers(episode // 2, episode)
            x[[first, second], b, 1] = 1
            target[(number + 1) * episode - 1, b] = x[first, b, 0] + x[second, b, 0]
    return shifted(x, target, episode, T)


def delayed_recall(rng: np.random.Generator, T: int) -> Data:
    """A symbol each step; the one of five steps ago is wanted."""
    delay = 5
    symbols = rng.integers(0, SYMBOLS, (T + delay, B))
    return np.eye(SYMBOLS, dtype=np.float32)[symbols[delay:]], symbols[:T]


def mackey_glass(rng: np.random.Generator, T: int) -> Data:
    """A chaotic series (Mackey & Glass 1977) whose delay goes from 17 to 30; ten steps ahead."""
    ahead, parts, warm = 10, 10, 500
    steps = (T + ahead + warm) * parts
    delay = (np.linspace(17, 30, steps) * parts).astype(int)
    series = np.empty((steps, B))
    past = int(delay.max())
    series[:past] = 1.2 + 0.1 * rng.standard_normal((1, B))
    for k in range(past, steps):
        before, late = series[k - 1], series[k - delay[k]]
        series[k] = before + (0.2 * late / (1 + late**10) - 0.1 * before) / parts
    values = series[warm * parts :: parts].astype(np.float32)[:, :, None]
    values = (values - 0.9) / 0.24
    return values[:T], values[ahead : T + ahead]


def shifted(x: np.ndarray, target: np.ndarray, episode: int, T: int) -> Data:
    """Let each stream be at another place of its episode."""
    starts = np.arange(B) * episode // B
    return (
        np.stack([x[start : start + T, b] for b, start in enumerate(starts)], 1),
        np.stack([target[start : start + T, b] for b, start in enumerate(starts)], 1),
    )


TASKS = [
    Task("copy memory", "cross_entropy", SYMBOLS, copy_memory, np.log(SYMBOLS), "nats"),
    Task("adding", "mse", 1, adding, 1 / 6, "squared error"),
    Task("delayed recall", "cross_entropy", SYMBOLS, delayed_recall, np.log(SYMBOLS), "nats"),
    Task("drifting Mackey-Glass", "mse", 1, mackey_glass, 1.0, "squared error"),
]


def rules(seed: int) -> list[Any]:
    return [
        fb.Truncated(1, 1),
        fb.Truncated(1, 4),
        fb.Truncated(1, 16),
        fb.Truncated(16, 16),
        fb.EProp(),
        fb.SnAp1(),
        fb.UORO(seed=seed),
        fb.RTRL(),
    ]


def name_of(rule: Any) -> str:
    if isinstance(rule, fb.Truncated):
        return f"Truncated({rule.k1}, {rule.k2})"
    return type(rule).__name__


def run(task: Task, rule: Any, seed: int, T: int) -> tuple[float, float]:
    """Return the loss of the last fifth, and the seconds of a step."""
    x, target = task.make(np.random.default_rng(seed), T)
    layer = fb.LSTM(x.shape[2], HIDDEN, forget_bias=1.0, seed=seed)
    model = fb.Model(layer, fb.Linear(HIDDEN, task.outputs, seed=seed + 1))
    optimizer = fb.Adam(model.parameters(), lr=LR)
    stream = fb.Stream(model, task.loss, rule, optimizer, max_norm=MAX_NORM)
    counts = np.isfinite(target[..., 0]) if task.loss == "mse" else target != IGNORED
    first = T - T // 5
    start = time.process_time()  # the machine may have other work
    for part in (slice(0, first), slice(first, T)):
        pushed = stream.push(x[part], target[part], target_mask=counts[part])
    seconds = (time.process_time() - start) / T
    return pushed.loss, seconds


def measure(seeds: int, T: int) -> list[Result]:
    results = []
    for task in TASKS:
        for number in range(len(rules(0))):
            runs = [run(task, rules(seed)[number], seed, T) for seed in range(seeds)]
            losses, seconds = zip(*runs, strict=True)
            name = name_of(rules(0)[number])
            results.append(Result(task, name, list(losses), median(seconds)))
            last = results[-1]
            print(
                f"{task.name:22} {last.rule:18} {median(losses):8.4f}  "
                f"{min(losses):.4f} - {max(losses):.4f}  {last.seconds * 1e6:8.1f} us",
                flush=True,
            )
    return results


def table(results: list[Result]) -> list[str]:
    names = list(dict.fromkeys(result.rule for result in results))
    lines = [
        "| rule | " + " | ".join(f"{task.name}, {task.unit}" for task in TASKS) + " | a step |",
        "| --- |" + " ---: |" * (len(TASKS) + 1),
        "| nothing learned | " + " | ".join(f"{task.chance:.3f}" for task in TASKS) + " | |",
    ]
    for name in names:
        of_rule = [result for result in results if result.rule == name]
        cells = [
            f"{median(r.losses):.3f} ({min(r.losses):.3f} to {max(r.losses):.3f})" for r in of_rule
        ]
        microseconds = median(r.seconds for r in of_rule) * 1e6
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {microseconds:.0f} us |")
    return lines


def plot(path: Path, results: list[Result]) -> None:
    """Draw the loss against the time of a step, a panel a task."""
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=(11, 7), layout="constrained"
    )
    for axes, task in zip(figure.subplots(2, 2).flat, TASKS, strict=True):
        for number, result in enumerate(r for r in results if r.task is task):
            middle = median(result.losses)
            spread = [[middle - min(result.losses)], [max(result.losses) - middle]]
            axes.errorbar(
                [result.seconds * 1e6],
                [middle],
                yerr=spread,
                fmt="o^sDvPX*"[number],
                color=f"C{number}",
                capsize=3,
                label=result.rule,
            )
        axes.axhline(task.chance, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="a step, microseconds", ylabel=task.unit, title=task.name)
        axes.set_xticks([], minor=True)
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.set_xlim(TICKS[0], TICKS[-1])
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=8_000, metavar="T")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    fb.set_num_threads(1)
    results = measure(options.seeds, options.steps)
    minutes = sum(r.seconds for r in results) * options.steps * options.seeds / 60
    here = machine()
    block = "\n".join(
        [
            "`python benchmarks/online.py --markdown docs/online.md --plot docs/online.png`",
            "",
            f"{here['cpu']}; {here['isa']}, float32, 1 thread; LSTM of {HIDDEN} units, {B} "
            f"streams, {options.steps} steps, Adam with lr = {LR}, norm clipped to {MAX_NORM:g}; "
            f"{options.seeds} seeds: median (smallest to largest). {minutes:.0f} minutes "
            "of processor time in all, and a step is that of all streams, with Adam.",
            "",
            *table(results),
            "",
            "",
        ]
    )
    print(block)
    if options.plot is not None:
        plot(options.plot, results)
    if options.markdown is not None:
        put_between(options.markdown, FIRST, LAST, block)


if __name__ == "__main__":
    main()
