"""What the options of a layer cost: a training step with each, over the plain layer's.

    python benchmarks/options.py
    python benchmarks/options.py --cells lstm gru --options zoneout mask --seconds 20

A step is forward and then all gradients, on one thread, in float32. Plain layer and layers with
options run in turn, so that the drift of a shared machine falls on all alike; the medians are
compared.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import fastbptt as fb

CELLS = ("rnn", "lstm", "gru", "gru_reset_before")
PROBLEMS = ((1000, 16, 64, 256), (256, 64, 128, 256))  # T, B, I, H
MOST = 1.25


class Option(NamedTuple):
    """What the layer is made with, and what a step of it is called with."""

    layer: Mapping[str, Any] = MappingProxyType({})
    marks: tuple[str, ...] = ()
    cells: tuple[str, ...] = CELLS


OPTIONS = {
    "resets": Option(marks=("resets",)),
    "mask": Option(marks=("mask",)),
    "return_cells": Option(marks=("return_cells",), cells=("lstm",)),
    "peephole": Option({"peephole": True}, cells=("lstm",)),
    "coupled": Option({"coupled": True}, cells=("lstm",)),
    "recurrent_dropout": Option({"recurrent_dropout": 0.3}),
    "zoneout": Option({"zoneout": 0.1}),
}


def make_layer(cell: str, size: int, hidden: int, options: Mapping[str, Any]) -> Any:
    """Return a layer of one of `CELLS`."""
    kind = {"rnn": fb.RNN, "lstm": fb.LSTM}.get(cell, fb.GRU)
    if cell == "gru_reset_before":
        options = {"reset_after": False, **options}
    return kind(size, hidden, seed=0, **options)


def make_step(cell: str, problem: tuple[int, int, int, int], option: Option) -> Callable[[], None]:
    """Return the training step of a layer; it is run once, and its results looked at."""
    T, B, size, hidden = problem
    rng = np.random.default_rng(1)
    x = rng.standard_normal((T, B, size), np.float32)
    grad = rng.standard_normal((T, B, hidden), np.float32)
    marks = {
        "resets": rng.random((T, B)) < 0.02,  # an episode of 50 steps
        "mask": rng.random((T, B)) < 0.8,
        "return_cells": True,
    }
    given = {name: marks[name] for name in option.marks}
    layer = make_layer(cell, size, hidden, option.layer)

    def run() -> Any:
        _, _, tape, *cells = layer.forward(x, **given)
        return layer.backward(tape, grad, grad_cells=grad if cells else None)

    assert all(np.isfinite(value).all() for value in run().weights.values())
    return run


def medians(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each step, all run in turn for about `seconds` in all."""
    runs: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end or len(runs["plain"]) < 3:
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            runs[name].append(time.perf_counter() - began)
    gc.enable()
    return {name: median(times) for name, times in runs.items()}


def main() -> None:
    """Print a table, a row an option and cell."""
    parser = argparse.ArgumentParser(description="What the options of a layer cost.")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each cell and problem")
    arguments = parser.parse_args()
    fb.set_num_threads(1)
    print(f"| option, at most {MOST} | cell | T, B, I, H | plain, ms | with it, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for problem in PROBLEMS:
        for cell in arguments.cells:
            chosen = {n: OPTIONS[n] for n in arguments.options if cell in OPTIONS[n].cells}
            steps = {"plain": make_step(cell, problem, Option())}
            steps |= {name: make_step(cell, problem, option) for name, option in chosen.items()}
            times = medians(steps, arguments.seconds)
            for name in chosen:
                ratio = times[name] / times["plain"]
                mark = "" if ratio <= MOST else " **more**"
                size = ", ".join(map(str, problem))
                before, after = times["plain"] * 1e3, times[name] * 1e3
                print(
                    f"| {name} | {cell} | {size} | {before:.1f} | {after:.1f} | {ratio:.2f}{mark} |"
                )


if __name__ == "__main__":
    main()
