"""A training run between two updates: how it begins, is saved and is resumed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt import storage
from fastbptt.cli import files, saved
from fastbptt.cli.data import Data, stream_starts
from fastbptt.cli.errors import RunError, UsageError
from fastbptt.cli.options import DEFAULT_MODEL
from fastbptt.cli.settings import DEFAULT_SECONDS, Settings
from fastbptt.cli.sources import given_source, open_again, open_source

_OPTIMIZERS = {"adam": fb.Adam, "sgd": fb.SGD, "rmsprop": fb.RMSprop}


@dataclass(frozen=True)
class Limits:
    """Where a run ends and how wide it runs; unlike the settings, a resumed run may change them."""

    steps: int | None
    seconds: float | None
    threads: int | None


@dataclass
class Run:
    """A run between two updates: all that the next update depends on."""

    data: Data
    settings: Settings
    limits: Limits
    model: fb.Model
    optimizer: Any
    steps: int = 0
    state: Any = None

    def save(self, path: str) -> None:
        """Write the run so that `resume` finds it as it is; the last file stays until then."""
        arrays = self.state if isinstance(self.state, tuple) else (self.state,)
        extra: dict[str, Any] = {
            "kind": self.data.kind,
            "settings": self.settings.as_dict(),
            "limits": asdict(self.limits),
            "source": self.data.source,
            "fingerprint": self.data.fingerprint(),
            "steps": self.steps,
            **self.data.description(),
        }
        if self.state is not None:
            extra |= {f"state_{n}": array for n, array in enumerate(arrays)}
        try:
            storage.save(path, self.model, self.optimizer, extra)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RunError(f"--save: cannot write {path!r}: {reason}") from error

    def is_finite(self) -> bool:
        """Whether each weight is a finite number."""
        return all_finite(self.model.parameters().values())


def start(arguments: argparse.Namespace) -> Run:
    """Return a new run."""
    data = open_source(given_source(arguments) or {"file": None})
    settings = Settings.choose(data.kind, data.targets, arguments)
    _check_options(arguments, data, settings)
    limits = Limits(arguments.steps, arguments.seconds, arguments.threads)
    if limits.steps is None and limits.seconds is None:
        steps = settings.default_steps(data.kind, data.targets)
        limits = Limits(steps, DEFAULT_SECONDS, arguments.threads)
    try:
        model = data.build(settings)
        optimizer = _OPTIMIZERS[settings.optimizer](model.parameters(), lr=settings.lr)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except MemoryError as error:
        raise UsageError(f"--hidden {settings.hidden}: not enough memory") from error
    return Run(data, settings, limits, model, optimizer)


def resume(arguments: argparse.Namespace) -> Run:
    """Return a saved run as it was when it was saved."""
    path = arguments.resume
    model, optimizer, extra = saved.load(path, "--resume")
    try:
        source, fingerprint = dict(extra["source"]), extra["fingerprint"]
        steps = int(extra["steps"])
        kept = Limits(**extra["limits"])
        settings = extra["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--resume: {path!r} holds a model but no training; wanted a file that "
            "`fastbptt train` has saved"
        ) from error
    if optimizer is None:
        raise UsageError(f"--resume: {path!r} has no optimiser state to go on with")
    settings = Settings.resume(settings, arguments, path)
    given = given_source(arguments)
    data = open_again(source, given, fingerprint, path, "--resume")
    _check_options(arguments, data, settings)
    threads = kept.threads if arguments.threads is None else arguments.threads
    limits = Limits(arguments.steps, arguments.seconds, threads)
    if limits.steps is None and limits.seconds is None:
        limits = Limits(kept.steps, kept.seconds, threads)
    if limits.steps is not None and limits.steps <= steps:
        got = "all" if arguments.steps is None else arguments.steps
        raise UsageError(
            f"--steps: got {got}, but {path!r} has made {steps} updates already; wanted more than "
            "that in total, or --seconds"
        )
    return Run(data, settings, limits, model, optimizer, steps, _state(extra))


def _state(extra: dict[str, Any]) -> Any:
    """Return what `Run.save` split: nothing, one array, or the two of an LSTM."""
    arrays = tuple(extra[name] for name in ("state_0", "state_1") if name in extra)
    return arrays if len(arrays) > 1 else next(iter(arrays), None)


def _check_options(arguments: argparse.Namespace, data: Data, settings: Settings) -> None:
    """Refuse what cannot work before anything is built or written."""
    if data.kind == "series" and settings.embedding is not None:
        raise UsageError(f"--embedding: got {settings.embedding}, but a series has no characters")
    stream_starts(data.targets, settings, data.unit)
    inputs, outputs = data.sizes
    settings.check_memory(inputs, outputs)
    path = model_path(arguments)
    source = [name for name in (data.source.get("file"), data.source.get("series")) if name]
    files.check_writable(path, "--save")
    if any(files.same_file(path, name) for name in source):
        raise UsageError(f"--save: {path!r} is the data; wanted another name")
    if os.path.exists(path) and not saved.is_replaceable(path):
        raise UsageError(
            f"--save: {path!r} is there and is no model of this program; wanted another name"
        )
    if arguments.json is not None:
        files.check_writable(arguments.json, "--json")
        files.check_apart(arguments.json, "--json", (path, *source))


def model_path(arguments: argparse.Namespace) -> str:
    """Return the file that the run is saved in."""
    given = (name for name in (arguments.save, arguments.resume) if name is not None)
    return str(next(given, DEFAULT_MODEL))


def all_finite(values: Iterable[Any]) -> bool:
    """Whether no value, of arrays or numbers, is infinite or NaN."""
    return all(bool(np.isfinite(value).all()) for value in values)
