"""`fastbptt flow`: how far the gradient of a model reaches, in words and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

import fastbptt as fb
from fastbptt.cli import files, saved
from fastbptt.cli.data import Array, Data, Loss
from fastbptt.cli.errors import RunError, UsageError
from fastbptt.cli.run import all_finite
from fastbptt.cli.sources import given_source, open_again

_COMPARED = {"RNN": fb.RNN, "LSTM": fb.LSTM, "GRU": fb.GRU}
_INPUTS = 8


class _Task(NamedTuple):
    """What a flow is taken of: some rows of some steps."""

    what: str
    x: Array
    target: Any
    loss: Loss


def flow(arguments: argparse.Namespace) -> int:
    """Say what becomes of the gradient, and draw it."""
    _check_files(arguments)
    rng = np.random.default_rng(arguments.seed)
    if arguments.model is None:
        if given_source(arguments) is not None or arguments.random:
            raise UsageError("MODEL: wanted a saved model beside FILE, --series or --random")
        models = _new_models(arguments)
        task = _random_task(models["RNN"], arguments, rng)
        title = f"new networks of {arguments.hidden} units, {task.what}"
    else:
        if arguments.hidden is not None:
            raise UsageError(f"--hidden: got {arguments.hidden} beside MODEL; wanted one of them")
        model, task = _saved(arguments, rng)
        models = {"": model}
        title = f"{arguments.model}: {model.recurrent!r}, {task.what}"
    print(title)
    at = None if arguments.targets == "all" else -1
    flows = {}
    for name, model in models.items():
        try:
            found = fb.gradient_flow(model, task.x, task.target, task.loss, at=at)
        except (ValueError, TypeError) as error:
            raise UsageError(f"MODEL: {arguments.model!r}: {error}") from error
        if not all_finite([found.loss]):
            raise RunError(f"{arguments.model}: the loss is {found.loss}; there is no gradient")
        flows[name] = found
        print("\n".join(_words(name, found)), flush=True)
    if arguments.json is not None:
        files.write_json(arguments.json, _summary(task, flows))
    # matplotlib is wanted only now.
    from fastbptt.flow_plot import compare

    def write(path: str) -> None:
        compare(flows, title).savefig(path, format="png", dpi=120)

    files.write_whole(arguments.plot, "--plot", write)
    print(f"picture: {arguments.plot}")
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    files.check_picture(arguments.plot, "--plot", arguments.json)
    if arguments.json is not None:
        files.check_writable(arguments.json, "--json")
    _check_apart(arguments, (arguments.model, arguments.file, arguments.series))


def _check_apart(arguments: argparse.Namespace, used: Iterable[str | None]) -> None:
    names = list(used)
    files.check_apart(arguments.plot, "--plot", names)
    if arguments.json is not None:
        files.check_apart(arguments.json, "--json", names)


def _new_models(arguments: argparse.Namespace) -> dict[str, fb.Model]:
    hidden = 64 if arguments.hidden is None else arguments.hidden
    arguments.hidden = hidden
    seed = arguments.seed
    return {
        name: fb.Model(kind(_INPUTS, hidden, seed=seed), fb.Linear(hidden, 1, seed=seed + 1))
        for name, kind in _COMPARED.items()
    }


def _saved(arguments: argparse.Namespace, rng: np.random.Generator) -> tuple[fb.Model, _Task]:
    path, given = arguments.model, given_source(arguments)
    model, _, extra = saved.load(path, "MODEL")
    source = extra.get("source")
    if arguments.random or (source is None and given is None):
        if given is not None:
            raise UsageError("--random: got FILE or --series beside it; wanted one of them")
        return model, _random_task(model, arguments, rng)
    if not isinstance(source, dict):
        raise UsageError(f"MODEL: {path!r} does not say what it was trained on; wanted --random")
    data = open_again(source, given, extra.get("fingerprint"), path, "MODEL")
    _check_apart(arguments, (data.source.get("file"), data.source.get("series")))
    return model, _data_task(data, arguments)


def _data_task(data: Data, arguments: argparse.Namespace) -> _Task:
    """Return stretches of the training part, evenly apart."""
    steps, rows = arguments.steps, arguments.rows
    if data.targets < steps:
        raise UsageError(
            f"--steps: got {steps}, wanted at most the {data.targets} {data.unit}s to train on"
        )
    starts = np.linspace(0, data.targets - steps, rows).astype(np.int64)
    index = starts[None, :] + np.arange(steps)[:, None]
    return _Task(f"{rows} x {steps} {data.unit}s", *data.window(index, 0))


def _random_task(model: fb.Model, arguments: argparse.Namespace, rng: np.random.Generator) -> _Task:
    """Return noise, of the shape that the model takes and gives."""
    steps, rows = arguments.steps, arguments.rows
    readout = model.readout
    width = model.recurrent.output_size if readout is None else readout.out_features
    what = f"{rows} x {steps} steps of noise"
    shape = (rows, steps) if model.batch_first else (steps, rows)
    if model.embedding is not None:
        x = rng.integers(0, model.embedding.num_embeddings, shape)
        return _Task(what, x, rng.integers(0, width, shape), "cross_entropy")
    x = rng.standard_normal((*shape, model.recurrent.input_size)).astype(model.dtype)
    return _Task(what, x, rng.standard_normal((*shape, width)).astype(model.dtype), "mse")


def _words(name: str, found: fb.GradientFlow) -> list[str]:
    verdicts = [] if found.all_targets else [found.vanishing()]
    verdicts.append(found.exploding())
    begin = f"{name}, " if name else ""
    lines = [line for verdict in verdicts for line in str(verdict).splitlines()]
    return [f"{begin}loss {found.loss:.4g}", *(f"  {begin}{line}" for line in lines)]


def _summary(task: _Task, flows: dict[str, fb.GradientFlow]) -> dict[str, Any]:
    def numbers(norms: Array) -> list[float | None]:
        return [float(norm) if np.isfinite(norm) else None for norm in norms]

    return {
        "version": fb.__version__,
        "data": task.what,
        "flows": [
            {
                "name": name,
                "loss": found.loss,
                "all_targets": found.all_targets,
                "distance": found.distance.tolist(),
                "h": [numbers(layer) for layer in found.h],
                "c": None if found.c is None else [numbers(layer) for layer in found.c],
                "weights": {key: numbers(norms) for key, norms in found.weights.items()},
            }
            for name, found in flows.items()
        ],
    }
