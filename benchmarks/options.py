"""What the options of a layer cost: a training step with each, over one of the plain layer.

`python benchmarks/options.py` runs the layer with an option and the plain one in turn, forward and
all gradients, in float32, and prints the ratio of the medians for each cell; the time of an option
that does more of the plain layer's work, or less, is divided by how much. Before it is timed, its
float32 results are compared with those of a float64 layer of the same parameters.

    python benchmarks/options.py --options lengths mask --cells lstm --rounds 20
    python benchmarks/options.py --sizes 256,64,128,256

A new option is a line in OPTIONS.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb

Array = NDArray[Any]
CELLS = ("rnn", "lstm", "gru", "gru_reset_before")
SHORTEST, LONGEST = 50, 500
TOLERANCE = 1e-3
_SHORT = 0.02  # s: a turn runs again and again until it has taken this long


@dataclass(frozen=True)
class Option:
    """A layer with an option, what its calls get, and the work beside the plain layer's.

    Parameters
    ----------
    settings, plain : dict
        Of the layer with the option, and of the plain one.
    given : callable
        Returns what `forward` gets beside x, for a generator, T and B.
    work : float
        How many times the plain layer's steps are run.
    steps : int, optional
        The T of its input, if that is not the plain layer's; only its `lengths` count as work.
    cells : tuple of str
        Those that have the option.
    projected : bool
        Whether h has half as many values as c; then the work beside the plain layer's is in the
        sizes of the products.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    given: Callable[[np.random.Generator, int, int], dict[str, Any]] = lambda rng, T, B: {}
    work: float = 1.0
    steps: int | None = None
    cells: tuple[str, ...] = CELLS
    projected: bool = False


def _lengths(rng: np.random.Generator, T: int, B: int) -> dict[str, Any]:
    return {"lengths": rng.integers(SHORTEST, T, B, endpoint=True)}


OPTIONS = {
    "lengths": Option(given=_lengths, steps=LONGEST),
    "bidirectional": Option({"bidirectional": True}, work=2.0),
    "lengths, bidirectional": Option(
        {"bidirectional": True}, given=_lengths, work=2.0, steps=LONGEST
    ),
    "dropout": Option({"num_layers": 2, "dropout": 0.5}, {"num_layers": 2}),
    "learn_initial_state": Option({"learn_initial_state": True}),
    # An episode of 50 steps.
    "resets": Option(given=lambda rng, T, B: {"resets": rng.random((T, B)) < 0.02}),
    "mask": Option(given=lambda rng, T, B: {"mask": rng.random((T, B)) < 0.8}),
    "return_cells": Option(given=lambda rng, T, B: {"return_cells": True}, cells=("lstm",)),
    "peephole": Option({"peephole": True}, cells=("lstm",)),
    "coupled": Option({"coupled": True}, cells=("lstm",)),
    "layer_norm": Option({"layer_norm": True}, cells=("lstm", "gru")),
    "proj_size": Option(projected=True, cells=("lstm",)),
    "recurrent_dropout": Option({"recurrent_dropout": 0.3}),
    "zoneout": Option({"zoneout": 0.1}),
}


def make(cell: str, sizes: tuple[int, int], settings: dict[str, Any], dtype: str) -> Any:
    """Return a layer."""
    kind = {"rnn": fb.RNN, "lstm": fb.LSTM}.get(cell, fb.GRU)
    before = {"reset_after": False} if cell == "gru_reset_before" else {}
    layer = kind(*sizes, **settings, **before, dtype=dtype, seed=0)
    for name, gain in layer.weights.items():
        if name.startswith("weight_ln_hh"):  # at 1 an LSTM is chaotic, and no two dtypes agree
            gain *= 0.1
    return layer


def step_of(layer: Any, x: Array, grad_y: Array, given: dict[str, Any]) -> dict[str, Array]:
    """Run a training step; return its results by name."""
    y, _, tape, *cells = layer.forward(x, seed=1, **given)
    grads = layer.backward(tape, grad_y, grad_cells=grad_y if cells else None)
    return {"y": y, "x": grads.x, **grads.weights}


def check(layer: Any, exact: Any, x: Array, grad_y: Array, given: dict[str, Any]) -> None:
    """Compare the results in float32 with those of float64."""
    exact.load_state_dict(layer.weights)
    found = step_of(layer, x, grad_y, given)
    for name, wanted in step_of(exact, x.astype(float), grad_y.astype(float), given).items():
        error = np.abs(found[name] - wanted).max() / max(np.abs(wanted).max(), 1e-30)
        if error > TOLERANCE:
            raise SystemExit(f"{layer!r}, {name}: off by {error:.2g}, too much to time it")


def time_option(
    option: Option, cell: str, problem: tuple[int, ...], rounds: int
) -> tuple[float, float]:
    """Return seconds of the plain layer's step, and of the option's divided by its work."""
    T, B, *sizes = problem
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    steps = option.steps or T
    given = option.given(rng, steps, B)
    work = option.work
    if "lengths" in given:
        work *= given["lengths"].sum() / (T * B)
    settings = option.settings
    if option.projected:
        I, H = sizes  # noqa: E741
        settings = settings | {"proj_size": H // 2}
        work *= (4 * H * (I + H // 2) + H // 2 * H) / (4 * H * (I + H))
    layer, exact = (make(cell, sizes, settings, dtype) for dtype in ("float32", "float64"))
    x, grad_y = numbers(steps, B, sizes[0]), numbers(steps, B, layer.output_size)
    check(layer, exact, x, grad_y, given)
    plain = make(cell, sizes, option.plain, "float32")
    plain_x, plain_y = numbers(T, B, sizes[0]), numbers(T, B, sizes[1])
    turns: list[tuple[Callable[[], Any], list[float]]] = [
        (lambda: step_of(plain, plain_x, plain_y, {}), []),
        (lambda: step_of(layer, x, grad_y, given), []),
    ]
    for number in range(rounds):
        for run, seconds in turns if number % 2 == 0 else reversed(turns):
            seconds.append(_turn(run))
    theirs, own = (median(seconds) for _, seconds in turns)
    return theirs, own / work


def _turn(run: Callable[[], Any]) -> float:
    run()  # its memory may be another's now
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < _SHORT:
        run()
        count += 1
    return (time.perf_counter() - began) / count


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--sizes", default="256,32,64,128", help="T,B,I,H")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    problem = tuple(map(int, chosen.sizes.split(",")))
    fb.set_num_threads(chosen.threads)
    print(f"T,B,I,H = {chosen.sizes}, lengths from {SHORTEST} to {LONGEST}, float32\n")
    print(f"| option | {' | '.join(chosen.cells)} |\n|---|{'---|' * len(chosen.cells)}")
    for name in chosen.options:
        option, ratios = OPTIONS[name], []
        for cell in chosen.cells:
            if cell in option.cells:
                plain, own = time_option(option, cell, problem, chosen.rounds)
            ratios.append(f"{own / plain:.2f}" if cell in option.cells else "")
        print(f"| {name} | {' | '.join(ratios)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
