"""What bfloat16 saves, and what it costs the gradient: of a tape, and of a whole layer.

`python benchmarks/bfloat16.py` runs the training step of a float32 layer and of the other one in
turn, and prints a row of Markdown for each problem: bytes, the time of the step over the float32
layer's, and how far results are from those of a float64 layer with the same numbers, in norm. It
stops if a tape in bfloat16 changes y in any bit.

    python benchmarks/bfloat16.py --what tape --cells lstm --sizes 1000,16,64,256
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import fastbptt as fb

Array = NDArray[Any]
CELLS = ("rnn", "lstm", "gru", "gru_reset_before")
SIZES = ("100,32,32,64", "256,64,128,256", "1000,16,64,256", "4000,32,32,64")
# The layer beside the float32 one; what has no tape has no row of the first.
OTHERS = {"tape": {"tape": "bfloat16"}, "layer": {"dtype": "bfloat16"}}
_SHORT = 0.05  # s: a turn runs again and again until it has taken this long


@dataclass
class Step:
    """Of a training step: y, the bytes of x, y and tape and of the tape alone, gradients."""

    y: Array
    nbytes: int
    tape: int
    x: Array
    weights: Array


def make(cell: str, sizes: tuple[int, int], **settings: Any) -> Any:
    """Return a layer."""
    kind = {"rnn": fb.RNN, "lstm": fb.LSTM}.get(cell, fb.GRU)
    before = {"reset_after": False} if cell == "gru_reset_before" else {}
    return kind(*sizes, seed=0, **settings, **before)


def run(layer: Any, x: Array, grad_y: Array) -> Step:
    """Run a training step."""
    y, _, tape = layer.forward(x)
    size = tape.nbytes
    grads = layer.backward(tape, grad_y)
    every = np.concatenate([grad.ravel() for grad in grads.weights.values()])
    return Step(y, x.nbytes + y.nbytes + size, size, grads.x, every)


def row(what: str, cell: str, text: str, rounds: int, settings: dict[str, Any]) -> str:
    """Return the row of a problem."""
    T, B, *sizes = map(int, text.split(","))
    layers = [make(cell, sizes, **settings, **other) for other in ({}, OTHERS[what])]
    layers.append(make(cell, sizes, **settings, dtype="float64"))
    rng = np.random.default_rng(0)
    x, grad_y = (rng.standard_normal((T, B, n)).astype(np.float32) for n in sizes)
    weights = {name: weight.astype(np.float32) for name, weight in layers[1].weights.items()}
    if what == "layer":
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for layer in layers:
        layer.load_state_dict({n: w.astype(layer.dtype) for n, w in weights.items()})
    given = [(x.astype(layer.dtype), grad_y.astype(layer.compute_dtype)) for layer in layers]
    exact = run(layers[2], *given[2])
    steps = [run(layers[which], *given[which]) for which in (0, 1)]
    if what == "tape" and not np.array_equal(steps[0].y, steps[1].y):
        raise SystemExit(f"{cell} {text}: y is not the same")
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            count, began = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - began < _SHORT:
                run(layers[which], *given[which])
                count += 1
            seconds[which].append((time.perf_counter() - began) / count)

    def error(which: int, name: str) -> str:
        found, right = getattr(steps[which], name).astype(float), getattr(exact, name)
        return f"{np.linalg.norm(found - right) / np.linalg.norm(right):.1e}"

    sizes_of = "tape" if what == "tape" else "nbytes"
    name = cell + "".join(f", {key} {value:g}" for key, value in settings.items())
    columns = [name, text, *(f"{getattr(step, sizes_of) / 1e6:.1f}" for step in steps)]
    columns.append(f"{median(seconds[1]) / median(seconds[0]):.2f}")
    columns += [error(which, part) for part in _parts(what) for which in (0, 1)]
    return f"| {' | '.join(columns)} |"


def _parts(what: str) -> tuple[str, ...]:
    return ("weights", "x") if what == "tape" else ("y", "weights", "x")


def head(what: str) -> str:
    """Return the first lines of the table."""
    names = {"y": "y", "weights": "dL/dW", "x": "dL/dx"}
    errors = [f"error of {names[part]} | in bfloat16" for part in _parts(what)]
    size = "tape, MB" if what == "tape" else "x, y and tape, MB"
    columns = ["layer", "T,B,I,H", size, "in bfloat16", "time of the step", *errors]
    return f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (3 + 2 * len(errors))}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=list(OTHERS), choices=list(OTHERS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="T,B,I,H")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    fb.set_num_threads(chosen.threads)
    for what in chosen.what:
        cells = [cell for cell in chosen.cells if what == "layer" or cell != "rnn"]
        print(head(what))
        for cell in cells:
            for text in chosen.sizes:
                print(row(what, cell, text, chosen.rounds, {}), flush=True)
        # Gates that remember for as long as the sequence is.
        for cell in cells:
            if cell != "rnn":
                chrono = {"chrono": 1000.0}
                print(row(what, cell, "1000,16,16,64", chosen.rounds, chrono), flush=True)
        print()


if __name__ == "__main__":
    main()
