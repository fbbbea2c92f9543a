"""Memory and time against the length of the sequence: as lines of a table, JSON and a plot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from fastbptt.bench.memory_point import Measured
from fastbptt.bench.memory_step import TORCH, Way
from fastbptt.bench.problems import Problem

HEADING = "cell      T,B,I,H              schedule            seconds    peak MB  allocated MB"


@dataclass(frozen=True)
class MemoryPoint:
    """One problem and way: what was measured, or why it was not."""

    problem: Problem
    way: Way
    measured: Measured | None
    why_not: str = ""

    def line(self) -> str:
        """Return a line of the table."""
        start = f"{self.problem.cell:8}  {self.problem.sizes:19}  {self.way.name:17}"
        if self.measured is None:
            return f"{start}  {self.why_not}"
        allocated = self.measured.allocated_bytes
        return f"{start}  {self.measured.seconds:8.4f}  {self.measured.peak_bytes / 1e6:9.2f}  " + (
            "           -" if allocated is None else f"{allocated / 1e6:12.2f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        about: dict[str, Any] = {
            "cell": self.problem.cell,
            **{size: getattr(self.problem, size) for size in "TBIH"},
            "schedule": self.way.name,
        }
        if self.measured is None:
            return about | {"why_not": self.why_not}
        return about | {
            "seconds": self.measured.seconds,
            "peak_bytes": self.measured.peak_bytes,
            "allocated_bytes": self.measured.allocated_bytes,
            "loss": self.measured.outcome.loss,
            "gradient_norm": self.measured.outcome.norm,
        }


def plot(path: str, points: list[MemoryPoint], title: str) -> None:
    """Write a PNG: a column a cell, a colour a schedule, memory above time."""
    cells = list(dict.fromkeys(point.problem.cell for point in points))
    ways = list(dict.fromkeys(point.way for point in points))
    # Not through pyplot, which looks for a screen.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=(max(7, 4 * len(cells)), 7), layout="constrained"
    )
    rows = figure.subplots(2, len(cells), sharex=True, sharey="row", squeeze=False)
    for column, cell in enumerate(cells):
        memory, time = rows[0][column], rows[1][column]
        for number, way in enumerate(ways):
            found = [
                (point.problem.T, point.measured)
                for point in points
                if point.problem.cell == cell and point.way == way and point.measured is not None
            ]
            T = [T for T, _ in found]
            style = {
                "color": "black" if way == TORCH else f"C{number}",
                "linestyle": "--" if way == TORCH else "-",
                "marker": ".",
                "label": way.name,
            }
            # A growth of nothing has no place on this axis; a page is the least there is to see.
            peaks = [max(measured.peak_bytes, 4096) / 1e6 for _, measured in found]
            memory.plot(T, peaks, **style)
            time.plot(T, [measured.seconds for _, measured in found], **style)
        memory.set(title=cell)
        time.set(xlabel="T, steps")
        for axes in (memory, time):
            axes.set(xscale="log", yscale="log")
            axes.grid(visible=True, alpha=0.3)
    rows[0][0].set(ylabel="growth of the process, MB")
    rows[1][0].set(ylabel="a training step, seconds")
    rows[0][0].legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, format="png", dpi=75)
