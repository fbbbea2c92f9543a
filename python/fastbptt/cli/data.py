"""What the training loop asks of its data, be it a text or a series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb
from fastbptt.cli.errors import UsageError
from fastbptt.cli.settings import Settings

Array: TypeAlias = NDArray[Any]
Loss: TypeAlias = str | Callable[[Array, Array, slice], tuple[float, Array]]


class Data(Protocol):
    """Targets in the order of time, of which a held-out tail is never trained on."""

    source: dict[str, Any]

    @property
    def kind(self) -> str:
        """`"text"` or `"series"`."""

    @property
    def unit(self) -> str:
        """What a target is called."""

    @property
    def targets(self) -> int:
        """How many targets the training part has."""

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers a step takes in (characters there are, before an embedding) and gives out."""

    def fingerprint(self) -> str:
        """Return what tells this data from any other."""

    def title(self) -> str:
        """Return one line that says what is trained on."""

    def build(self, settings: Settings) -> fb.Model:
        """Return a new model of the right sizes."""

    def window(self, index: Array, ignored: int) -> tuple[Array, Array, Loss]:
        """Return input, target and loss of `index` `[T, B]`, without the first steps' loss."""

    def progress(self, loss: float) -> str:
        """Return a training loss in the words of this data."""

    def held_out(self, model: fb.Model) -> dict[str, float]:
        """Return the figures of the held-out tail, the model's own first."""

    def summary(self, figures: dict[str, float]) -> list[str]:
        """Return the figures as lines to read."""

    def description(self) -> dict[str, Any]:
        """Return what a user of the saved model needs to know of the data."""


def part_seeds(seed: int, parts: int) -> list[int]:
    """Return one seed a part of the model, so that no two parts draw the same numbers."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(parts)]


def recurrent(settings: Settings, input_size: int, seed: int) -> fb.RNN | fb.LSTM | fb.GRU:
    """Return the recurrent part that `settings` asks for."""
    if settings.cell == "lstm":
        # An open forget gate lets the first gradients through (Jozefowicz et al. 2015).
        return fb.LSTM(input_size, settings.hidden, settings.layers, forget_bias=1.0, seed=seed)
    if settings.cell == "gru":
        return fb.GRU(input_size, settings.hidden, settings.layers, seed=seed)
    return fb.RNN(input_size, settings.hidden, settings.layers, seed=seed)


def stream_starts(targets: int, settings: Settings, unit: str) -> Array:
    """Return where each of the streams begins; they lie one behind the other in the data."""
    length = targets // settings.batch
    if length < settings.k2:
        raise UsageError(
            f"--batch {settings.batch} --k1 {settings.k1} --k2 {settings.k2}: the training part "
            f"gives {length} {unit}s to a stream, wanted at least {settings.k2}; with {targets} in "
            f"all, --batch times --k2 may be that at most"
        )
    return np.arange(settings.batch, dtype=np.int64) * length
