"""What a training run is made of, apart from its data: the settings a saved run carries along."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastbptt.cli.errors import UsageError

CELLS = ("lstm", "gru", "rnn")
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
LEARNING_RATES = {"adam": 5e-3, "rmsprop": 3e-3, "sgd": 4.0}
DEFAULT_STEPS = 2000
DEFAULT_SECONDS = 90.0

DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {
        "cell": "lstm",
        "hidden": 192,
        "embedding": 64,
        "layers": 1,
        "batch": 16,
        "k1": 64,
        "optimizer": "adam",
        "lr_decay": 1000,
        "clip": 1.0,
        "seed": 0,
    },
    "series": {
        "cell": "lstm",
        "hidden": 32,
        "embedding": None,
        "layers": 1,
        "batch": 8,
        "k1": 32,
        "optimizer": "adam",
        "lr_decay": 1000,
        "clip": 1.0,
        "seed": 0,
    },
}


@dataclass(frozen=True)
class Settings:
    """What decides each bit of a run, together with its data and the number of threads."""

    cell: str
    hidden: int
    embedding: int | None
    layers: int
    batch: int
    k1: int
    k2: int
    optimizer: str
    lr: float
    lr_decay: int
    clip: float
    seed: int

    @classmethod
    def choose(cls, kind: str, targets: int, given: argparse.Namespace) -> Settings:
        """Return the settings of a new run: what was given, and the defaults of `kind`."""
        values = dict(DEFAULTS[kind])
        values |= {name: value for name, value in _given(given).items() if value is not None}
        values.setdefault("lr", LEARNING_RATES[values["optimizer"]])
        values.setdefault("k2", values["k1"])
        if values["k2"] < values["k1"]:
            raise UsageError(f"--k2: got {values['k2']}, wanted at least k1 = {values['k1']}")
        if given.batch is None:
            # Short data is cut into fewer streams, so that each is as long as a window.
            values["batch"] = max(1, min(values["batch"], targets // values["k2"]))
        return cls(**values)

    @classmethod
    def resume(cls, saved: Any, given: argparse.Namespace, path: str) -> Settings:
        """Return the settings of a saved run; nothing that was given may differ from them."""
        try:
            settings = cls(**saved)
        except TypeError as error:
            raise UsageError(f"--resume: the settings in {path!r} are not complete") from error
        for name, value in _given(given).items():
            kept = getattr(settings, name)
            if value is not None and value != kept:
                option = option_of(name)
                raise UsageError(
                    f"{option}: got {value}, but {path!r} was trained with {option} {kept}; "
                    "leave the option out, or start anew without --resume"
                )
        return settings

    def default_steps(self, kind: str, targets: int) -> int:
        """Return how many updates a new run makes where nothing else is said.

        A series is short, and learnt by heart after some forty passes.
        """
        if kind == "text":
            return DEFAULT_STEPS
        passes = 40 * targets // (self.k1 * self.batch)
        return max(100, min(passes, DEFAULT_STEPS))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after `step` updates: `lr / (1 + step / decay)`.

        It knows nothing of where the run will end, so that a run that is resumed to go further is
        the same as one that was longer from the start; and it never comes to a standstill.
        """
        return self.lr / (1.0 + step / self.lr_decay) if self.lr_decay else self.lr

    def check_memory(self, inputs: int, outputs: int) -> None:
        """Refuse a network that this machine cannot hold, before the system ends the process."""
        rows = GATES[self.cell] * self.hidden
        width = self.embedding or inputs
        recurrent = rows * (width + self.hidden + 2)
        recurrent += (self.layers - 1) * rows * (2 * self.hidden + 2)
        parameters = inputs * (self.embedding or 0) + recurrent + outputs * (self.hidden + 1)
        steps = self.k2 * self.batch * self.layers * (rows + 2 * self.hidden)
        # Weights, gradients, two moments of Adam, and the float64 draw of the initialiser.
        needed = 4 * (6 * parameters + steps)
        there = _physical_memory()
        if there is not None and needed > there:
            raise UsageError(
                f"--hidden {self.hidden} --layers {self.layers} --batch {self.batch} "
                f"--k2 {self.k2}: this network wants about {needed / 1e9:.0f} GB of memory, "
                f"the machine has {there / 1e9:.0f} GB"
            )


def option_of(name: str) -> str:
    """Return the option that sets the attribute `name`."""
    return "--" + name.replace("_", "-")


def _given(given: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in fields(Settings)}


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
