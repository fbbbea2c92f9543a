"""The time of one step of a stream, from Python, beside torch's.

`python benchmarks/stream_latency.py --markdown docs/online.md` puts the table where the file has
the two lines

    <!-- latency -->
    <!-- end of latency -->

One stream through LSTM(32, 32) and a readout of one number, mean squared error, one thread,
float32. torch does the same with `torch.nn` and `torch.optim`: for a window of 16 steps it runs the
window forward and back at every step, from the state before it.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.bench.libraries import installed, version
from fastbptt.bench.machine import machine
from report import put_between

FIRST, LAST = "<!-- latency -->\n", "<!-- end of latency -->"
SIZE = 32
WINDOW = 16
RULES = [
    fb.Truncated(1, 1),
    fb.Truncated(1, WINDOW),
    fb.EProp(),
    fb.SnAp1(),
    fb.UORO(seed=0),
    fb.RTRL(),
]


def microseconds(call: Callable[[], Any], rounds: int, seconds: float = 0.15) -> float:
    """The median over rounds of the mean time of a call."""
    for _ in range(20):
        call()
    start = time.perf_counter()
    call()
    n = max(5, int(seconds / (time.perf_counter() - start + 1e-7) / 2))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(n):
            call()
        times.append((time.perf_counter() - start) / n)
    return median(times) * 1e6


def new_stream(rule: Any, learn: bool) -> fb.Stream:
    model = fb.Model(fb.LSTM(SIZE, SIZE, seed=0), fb.Linear(SIZE, 1, seed=1))
    optimizer = fb.Adam(model.parameters(), lr=1e-4) if learn else None
    return fb.Stream(model, "mse", rule, optimizer, batch_size=1)


def ours(rounds: int) -> dict[str, tuple[float, float]]:
    """By name: a push that adds to the gradients, and one that updates with Adam."""
    x, target = np.ones((1, SIZE), np.float32), np.ones((1, 1), np.float32)
    stream = new_stream(RULES[0], False)
    assert (stream.predict(x) == stream.push(x).prediction).all()
    times = {"predict": (microseconds(lambda: stream.predict(x), rounds), float("nan"))}
    for rule in RULES:
        name = type(rule).__name__
        if isinstance(rule, fb.Truncated):
            name = f"push, Truncated({rule.k1}, {rule.k2})"
        else:
            name = f"push, {name}"
        pair = []
        for learn in (False, True):
            one = new_stream(rule, learn)
            pair.append(microseconds(lambda one=one: one.push(x, target), rounds))
        times[name] = (pair[0], pair[1])
    return times


def theirs(rounds: int) -> dict[str, tuple[float, float]]:
    """The same by torch: for the window, and for the error of the same step alone."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    lstm, readout = torch.nn.LSTM(SIZE, SIZE), torch.nn.Linear(SIZE, 1)
    parameters = [*lstm.parameters(), *readout.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-4)
    x, target = torch.ones(1, 1, SIZE), torch.ones(1, 1, 1)
    zero = torch.zeros(1, 1, SIZE)
    # Each step that the window holds, with the state before it.
    held: deque[tuple[Any, Any]] = deque(maxlen=WINDOW)
    state: Any = (zero, zero)

    def predict() -> Any:
        with torch.inference_mode():
            y, _ = lstm(x, state)
            return readout(y)

    def push(steps: int, learn: bool) -> None:
        nonlocal state
        held.append((x, state))
        window = list(held)[-steps:]
        y, after = lstm(torch.cat([entry[0] for entry in window]), window[0][1])
        loss = torch.nn.functional.mse_loss(readout(y[-1:]), target)
        loss.backward()
        state = tuple(part.detach() for part in after)
        if learn:
            adam.step()
            adam.zero_grad(set_to_none=True)

    times = {"predict": (microseconds(predict, rounds), float("nan"))}
    for steps in (1, WINDOW):
        pair = [
            microseconds(lambda learn=learn, steps=steps: push(steps, learn), rounds)
            for learn in (False, True)
        ]
        times[f"push, Truncated(1, {steps})"] = (pair[0], pair[1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    fb.set_num_threads(1)
    mine = ours(options.rounds)
    others = theirs(options.rounds) if installed("torch") else {}
    here = machine()
    versions = [f"{name} {version(name)}" for name in ("fastbptt", "torch") if installed(name)]

    def cell(value: float | None) -> str:
        return "" if value is None or value != value else f"{value:.1f}"

    lines = [
        "`python benchmarks/stream_latency.py --markdown docs/online.md`",
        "",
        f"{here['cpu']}; {here['isa']}, float32, 1 thread, LSTM({SIZE}, {SIZE}) and "
        f"Linear({SIZE}, 1), one stream; {', '.join(versions)}. Microseconds of a call, the median "
        f"of {options.rounds} rounds.",
        "",
        "| call | gradient alone | with Adam | torch, gradient alone | torch, with Adam |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (alone, learned) in mine.items():
        other = others.get(name, (None, None))
        lines.append(
            f"| {name} | {cell(alone)} | {cell(learned)} | {cell(other[0])} | {cell(other[1])} |"
        )
    block = "\n".join([*lines, "", ""])
    print(block)
    if options.markdown is not None:
        put_between(options.markdown, FIRST, LAST, block)


if __name__ == "__main__":
    main()
