"""What a tape in bfloat16 saves, and what it costs the gradient.

`python benchmarks/bfloat16_tape.py` runs the training step of a layer with either tape in turn, and
prints a row of Markdown for each problem: the bytes of the tape, the time of the step with the
narrow one over the other's, and how far the gradient of all weights, and of x, is from a float64
layer's, in norm. It stops if y differs in any bit.

    python benchmarks/bfloat16_tape.py --cells lstm --sizes 1000,16,64,256
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb

Array = NDArray[Any]
CELLS = ("lstm", "gru", "gru_reset_before")
_SHORT = 0.05  # s: a turn runs again and again until it has taken this long
SIZES = ("100,32,32,64", "256,64,128,256", "1000,16,64,256", "4000,32,32,64")


def make(cell: str, sizes: tuple[int, int], **settings: Any) -> Any:
    """Return a layer."""
    if cell == "lstm":
        return fb.LSTM(*sizes, seed=0, **settings)
    return fb.GRU(*sizes, seed=0, reset_after=cell == "gru", **settings)


def step(layer: Any, x: Array, grad_y: Array) -> tuple[Array, int, list[Array]]:
    """Run a training step: y, the bytes of its tape, the gradients of x and of the weights."""
    y, _, tape = layer.forward(x)
    size = tape.nbytes
    grads = layer.backward(tape, grad_y)
    return y, size, [grads.x, np.concatenate([g.ravel() for g in grads.weights.values()])]


def row(cell: str, text: str, rounds: int, settings: dict[str, Any]) -> str:
    """Return the row of a problem."""
    T, B, *sizes = map(int, text.split(","))
    wide = make(cell, sizes, **settings)
    narrow = make(cell, sizes, tape="bfloat16", **settings)
    exact = make(cell, sizes, dtype="float64", **settings)
    for other in (narrow, exact):
        other.load_state_dict(wide.weights)
    rng = np.random.default_rng(0)
    x, grad_y = (rng.standard_normal((T, B, n)).astype(np.float32) for n in sizes)
    wanted = step(exact, x.astype(float), grad_y.astype(float))[2]
    results = [step(layer, x, grad_y) for layer in (wide, narrow)]
    if not np.array_equal(results[0][0], results[1][0]):
        raise SystemExit(f"{cell} {text}: y is not the same")
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            layer, count, began = (wide, narrow)[which], 0, time.perf_counter()
            while count == 0 or time.perf_counter() - began < _SHORT:
                step(layer, x, grad_y)
                count += 1
            seconds[which].append((time.perf_counter() - began) / count)
    ratio = median(seconds[1]) / median(seconds[0])
    errors = [
        f"{np.linalg.norm(found - right) / np.linalg.norm(right):.1e}"
        for _, _, grads in results
        for found, right in zip(grads, wanted, strict=True)
    ]
    megabytes = [f"{result[1] / 1e6:.1f}" for result in results]
    name = cell + "".join(f", {key} {value:g}" for key, value in settings.items())
    cells = [name, text, *megabytes, f"{ratio:.2f}", errors[1], errors[3], errors[0], errors[2]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="T,B,I,H")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    fb.set_num_threads(chosen.threads)
    print(
        "| layer | T,B,I,H | tape, MB | in bfloat16 | time of the step | error of dL/dW | "
        "in bfloat16 | error of dL/dx | in bfloat16 |\n|---|---|" + "---:|" * 7
    )
    for cell in chosen.cells:
        for text in chosen.sizes:
            print(row(cell, text, chosen.rounds, {}), flush=True)
    # Gates that remember for as long as the sequence is.
    for cell in chosen.cells:
        print(row(cell, "1000,16,16,64", chosen.rounds, {"chrono": 1000.0}), flush=True)


if __name__ == "__main__":
    main()
