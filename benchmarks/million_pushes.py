"""Checks over a million pushes of each rule that neither time nor memory of a push grows.

`python benchmarks/million_pushes.py --markdown docs/online.md` puts the table where the file has
the two lines

    <!-- million -->
    <!-- end of million -->

LSTM(8, 8) and a readout of one number, one stream, no optimiser, float32, one thread. Time is that
of the process, so that other work on the machine does not count. Exit status 1 if something grew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.bench.peak_memory import status
from report import put_between

FIRST, LAST = "<!-- million -->\n", "<!-- end of million -->"
PARTS = 50
MOST_BYTES = 1 << 20
MOST_RATIO = 1.25
RULES = [fb.Truncated(1, 16), fb.Truncated(16, 16), fb.EProp(), fb.SnAp1(), fb.UORO(0), fb.RTRL()]


def run(rule: Any, pushes: int) -> tuple[float, float, int]:
    """Return seconds a push in the first fifth and in the last, and the bytes that came between."""
    model = fb.Model(fb.LSTM(8, 8, seed=0), fb.Linear(8, 1, seed=1))
    stream = fb.Stream(model, "mse", rule, batch_size=1)
    x = np.random.default_rng(0).standard_normal((1000, 1, 8)).astype(np.float32)
    target = x[:, :, :1].copy()
    seconds, memory = [], []
    for _ in range(PARTS):
        start = time.process_time()
        for t in range(pushes // PARTS):
            stream.push(x[t % 1000], target[t % 1000])
        seconds.append((time.process_time() - start) / (pushes // PARTS))
        memory.append(status("RssAnon"))
    fifth = PARTS // 5
    return median(seconds[:fifth]), median(seconds[-fifth:]), memory[-1] - memory[fifth]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pushes", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    fb.set_num_threads(1)
    lines = [
        "`python benchmarks/million_pushes.py --markdown docs/online.md`",
        "",
        f"{options.pushes:,} pushes of each rule, LSTM(8, 8) and Linear(8, 1), one stream, one "
        "thread: microseconds a push in the first fifth and in the last, and by how much the "
        "memory of the process grew from the end of the first.",
        "",
        "| rule | first fifth | last fifth | growth |",
        "| --- | ---: | ---: | ---: |",
    ]
    grew = False
    for rule in RULES:
        first, last, growth = run(rule, options.pushes)
        grew |= growth > MOST_BYTES or last > MOST_RATIO * first
        lines.append(
            f"| `{rule!r}` | {first * 1e6:.1f} us | {last * 1e6:.1f} us | {growth / 1e3:.0f} kB |"
        )
        print(lines[-1], flush=True)
    block = "\n".join([*lines, "", ""])
    if options.markdown is not None:
        put_between(options.markdown, FIRST, LAST, block)
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
