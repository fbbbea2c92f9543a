"""`fastbptt train`: from the options to the summary."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.cli import files
from fastbptt.cli.errors import RunError
from fastbptt.cli.interrupt import Interrupt
from fastbptt.cli.loop import Loop
from fastbptt.cli.run import Run, all_finite, model_path, resume, start


def train(arguments: argparse.Namespace) -> int:
    """Train until the limits are reached or Ctrl-C; return the exit status."""
    began = time.monotonic()
    run = start(arguments) if arguments.resume is None else resume(arguments)
    path = model_path(arguments)
    if run.limits.threads is not None:
        fb.set_num_threads(run.limits.threads)
    print(f"{run.data.title()}\n{_network(run)}", flush=True)
    with Interrupt() as stop:
        loop = Loop(run, path, began, stop)
        loop.train()
        figures = _finish(loop)
    _report(loop, figures, arguments.json)
    return stop.exit_status


def _finish(loop: Loop) -> dict[str, float]:
    """Measure the held-out part and save; after Ctrl-C in the other order."""
    run, stop = loop.run, loop.stop
    figures = None
    if not run.is_finite():
        raise _failed("a weight", loop)
    if stop.signal is None:
        try:
            with stop.breakable():
                figures = _held_out(run)
        except KeyboardInterrupt:
            figures = None
    interrupted = figures is None
    if figures is None:
        loop.save()
        figures = _held_out(run)
    if not all_finite(figures.values()):
        raise _failed("the loss of the held-out part", loop)
    if not interrupted:
        loop.save()
    return figures


def _failed(what: str, loop: Loop) -> RunError:
    return RunError(
        f"{what} is infinite or NaN after step {loop.run.steps}; {loop.left()}; "
        "a smaller --lr or --clip may help"
    )


def _held_out(run: Run) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        return run.data.held_out(run.model)


def _report(loop: Loop, figures: dict[str, float], json_path: str | None) -> None:
    run, data = loop.run, loop.run.data
    rate = loop.trained / loop.seconds if loop.seconds else 0.0
    passes = run.steps * run.settings.k1 * run.settings.batch / data.targets
    lines = [
        *data.summary(figures),
        f"trained: {run.steps:,} updates, {passes:.1f} passes over the training part; here "
        f"{loop.trained:,} {data.unit}s in {loop.seconds:.1f} s, {rate:,.0f} {data.unit}s a second",
        f"saved:   {loop.path}",
    ]
    if loop.stop.signal is not None:
        lines.append(f"interrupted; to go on: fastbptt train --resume {loop.path}")
    print("\n".join(lines))
    if json_path is not None:
        files.write_json(
            json_path,
            {
                **figures,
                f"{data.unit}s_per_second": rate,
                "steps": run.steps,
                "seconds": loop.seconds,
                "interrupted": loop.stop.signal is not None,
                "kind": data.kind,
                "source": data.source,
                "model": loop.path,
                "parameters": _size(run.model),
                "settings": {
                    **run.settings.as_dict(),
                    "steps": run.limits.steps,
                    "seconds": run.limits.seconds,
                    "threads": fb.get_num_threads(),
                },
                "version": fb.__version__,
            },
        )


def _network(run: Run) -> str:
    settings, threads = run.settings, fb.get_num_threads()
    layers = "1 layer" if settings.layers == 1 else f"{settings.layers} layers"
    return (
        f"{settings.cell.upper()}, {layers} of {settings.hidden}, {_size(run.model):,} weights, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


def _size(model: fb.Model) -> int:
    return sum(array.size for array in model.parameters().values())
