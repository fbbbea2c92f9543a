"""Series: one numeric column of a table, forecast one row ahead."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.cli import files
from fastbptt.cli.data import Array, Loss, part_seeds, recurrent
from fastbptt.cli.errors import UsageError
from fastbptt.cli.settings import Settings

_WARM_UP = 1000
_CHUNK = 4096


class Series:
    """A numeric column, its last tenth held out.

    The network sees the value and its last difference, and forecasts the next difference: it has
    nothing to learn before it is as good as "tomorrow equals today", and a trend that leaves the
    range of the training part does not lead it astray. Values and differences are scaled by the
    mean and deviation that they have in the training part.
    """

    kind = "series"
    unit = "value"

    def __init__(self, values: Array, source: dict[str, Any]) -> None:
        self.source = source
        self._values = values
        held_out = len(values) // 10
        if held_out < 1 or len(values) - held_out < 4:
            raise UsageError(
                f"--series: column {source['column']!r} has {len(values)} values, wanted at least "
                "10, the last tenth of which is held out"
            )
        self._split = len(values) - held_out
        with np.errstate(over="ignore", invalid="ignore"):
            difference = np.diff(values)
            self._level = _scale(values[: self._split])
            self._change = _scale(difference[: self._split - 1])
        if not np.isfinite([*self._level, *self._change, *difference[self._split - 1 :]]).all():
            raise UsageError(
                f"--series: column {source['column']!r} has values up to "
                f"{np.abs(values).max():g}, wanted values whose squares are finite"
            )
        if self._change[1] == 0.0:
            raise UsageError(
                f"--series: column {source['column']!r} changes by {self._change[0]:g} from each "
                "row to the next in the training part; there is nothing to learn"
            )
        # Row i holds the value i + 1, the first that has a difference before it.
        level = (values[1:] - self._level[0]) / self._level[1]
        change = (difference - self._change[0]) / self._change[1]
        self._input = np.stack([level, change], axis=-1).astype(np.float32)
        self._target = change[1:, None].astype(np.float32)

    @property
    def targets(self) -> int:
        """How many values of the training part have two before them."""
        return self._split - 2

    @property
    def sizes(self) -> tuple[int, int]:
        """Value and difference go in, a difference comes out."""
        return 2, 1

    def fingerprint(self) -> str:
        """Return the SHA-256 of the values."""
        return hashlib.sha256(self._values.astype("<f8").tobytes()).hexdigest()

    def title(self) -> str:
        """Return one line that says what is trained on."""
        return (
            f"column {self.source['column']!r} of {self.source['series']!r}: "
            f"{len(self._values):,} values, the last {len(self._values) - self._split:,} held out"
        )

    def build(self, settings: Settings) -> fb.Model:
        """Return recurrent layers and a readout that starts as "tomorrow equals today"."""
        seeds = part_seeds(settings.seed, 2)
        readout = fb.Linear(settings.hidden, 1, seed=seeds[1])
        for weight in readout.weights.values():
            weight[...] = 0.0
        return fb.Model(recurrent(settings, 2, seeds[0]), readout)

    def window(self, index: Array, ignored: int) -> tuple[Array, Array, Loss]:
        """Return the rows at `index` and the differences behind them; the first do not count."""
        loss: Loss = _late_mse(ignored, len(index)) if ignored else "mse"
        return self._input[index], self._target[index], loss

    def progress(self, loss: float) -> str:
        """Return the loss, and the error in the units of the column."""
        return f"loss {loss:.4f}, RMSE {math.sqrt(loss) * self._change[1]:.4g}"

    def held_out(self, model: fb.Model) -> dict[str, float]:
        """Return the root mean square error, of the model and of "tomorrow equals today"."""
        first = self._split - 2
        start = max(0, first - _WARM_UP)
        _, state = model(self._input[start:first, None])
        forecast = np.empty(len(self._target) - first)
        for t in range(first, len(self._target), _CHUNK):
            output, state = model(self._input[t : min(t + _CHUNK, len(self._target)), None], state)
            forecast[t - first : t - first + len(output)] = output[:, 0, 0]
        forecast = forecast * self._change[1] + self._change[0]
        actual = np.diff(self._values)[first + 1 :]
        return {"heldout_rmse": _rms(forecast - actual), "naive_rmse": _rms(actual)}

    def summary(self, figures: dict[str, float]) -> list[str]:
        """Return the two errors."""
        return [
            f"held out:               {figures['heldout_rmse']:.6g} root mean square error",
            f'  "tomorrow = today":   {figures["naive_rmse"]:.6g}',
        ]

    def description(self) -> dict[str, Any]:
        """Return how values become inputs, and outputs forecasts."""
        return {
            "scaling": {
                "level_mean": self._level[0],
                "level_deviation": self._level[1],
                "difference_mean": self._change[0],
                "difference_deviation": self._change[1],
            }
        }


def read_series(path: str, column: str) -> Series:
    """Return a column of the table in `path`, with commas, semicolons or tabs between cells."""
    text = files.decode(files.read_bytes(path, "--series"), path, "--series")
    heading = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=heading.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UsageError(f"--series: {path!r} is not a table: {error}") from error
    names = [name.strip() for name in rows[0]] if rows else []
    if column not in names:
        listed = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        raise UsageError(f"--column: got {column!r}, wanted one of {listed} of {path!r}")
    place = names.index(column)
    values = [
        _number(row, place, f"{path!r}, row {number}, column {column!r}")
        for number, row in enumerate(rows[1:], start=2)
        if row
    ]
    return Series(np.array(values, dtype=np.float64), {"series": path, "column": column})


def _number(row: list[str], place: int, where: str) -> float:
    text = row[place].strip() if place < len(row) else ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--series: {where}: got {text!r}, wanted a finite number")
    return value


def _scale(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _late_mse(ignored: int, steps: int) -> Loss:
    """Return the mean square error of the steps from `ignored` on, out of `steps`."""

    def loss(output: Array, target: Array, time: slice) -> tuple[float, Array]:
        error = output - target
        error[: max(0, ignored - time.start)] = 0.0
        count = (steps - ignored) * output[0].size
        return float(np.square(error, dtype=np.float64).sum()) / count, error * (2.0 / count)

    return loss
