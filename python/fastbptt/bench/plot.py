"""Time and peak memory of a training step against the length of the sequence."""

from __future__ import annotations

import importlib
from typing import Any

from fastbptt.bench.report import Point

_STYLES = {"fastbptt": "-", "numpy": ":", "torch": "--", "jax": "-."}


def plot(path: str, points: list[Point], title: str) -> None:
    """Write a PNG: a colour a cell, a line style a library."""
    # Not through pyplot, which looks for a screen.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=(11, 5), layout="constrained"
    )
    time, memory = figure.subplots(1, 2)
    for number, cell in enumerate(dict.fromkeys(point.problem.cell for point in points)):
        of_cell = [point for point in points if point.problem.cell == cell]
        T = [point.problem.T for point in of_cell]
        for library in of_cell[0].times.steps:
            style = {
                "linestyle": _STYLES[library],
                "color": f"C{number}",
                "marker": "o" if library == "fastbptt" else None,
                "label": f"{cell}, {library}",
            }
            time.plot(T, [point.times.seconds(library) * 1e3 for point in of_cell], **style)
            memory.plot(T, [point.peak_bytes[library] / 1e6 for point in of_cell], **style)
    for axes, label in ((time, "time of a training step, ms"), (memory, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="T, steps", ylabel=label)
        axes.grid(visible=True, which="both", alpha=0.3)
    time.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)
