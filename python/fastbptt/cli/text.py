"""Texts: characters are Unicode code points, and the network forecasts the next one."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

import fastbptt as fb
from fastbptt.cli import files
from fastbptt.cli.data import Array, Loss, part_seeds, recurrent
from fastbptt.cli.errors import UsageError
from fastbptt.cli.settings import Settings

IGNORE = -100

# The held-out part is read as this many streams at most, each warmed up on the text before it.
_HELD_OUT_STREAMS = 32
_WARM_UP = 256


class Text:
    """A text as class numbers, its last tenth held out.

    The vocabulary is that of the whole text. The network, the frequency table and the uniform
    distribution then share one set of characters, and none of them gets a character of the
    held-out part for less than it would cost to name it.
    """

    kind = "text"
    unit = "character"

    def __init__(self, text: str, source: dict[str, Any], name: str) -> None:
        self.source = source
        self._name = name
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        self._fingerprint = hashlib.sha256(points.tobytes()).hexdigest()
        held_out = len(points) // 10
        if held_out < 1 or len(points) - held_out < 2:
            raise UsageError(
                f"{name}: got {len(points)} characters, wanted at least 10, the last tenth of "
                "which is held out"
            )
        distinct, codes = np.unique(points, return_inverse=True)
        self.vocabulary = "".join(map(chr, distinct.tolist()))
        self._codes = codes.reshape(-1).astype(np.int64)
        self._split = len(points) - held_out

    @property
    def targets(self) -> int:
        """How many characters of the training part have one before them."""
        return self._split - 1

    @property
    def sizes(self) -> tuple[int, int]:
        """The characters that go in and those that come out."""
        return len(self.vocabulary), len(self.vocabulary)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the code points."""
        return self._fingerprint

    def title(self) -> str:
        """Return one line that says what is trained on."""
        held_out = len(self._codes) - self._split
        return (
            f"{self._name}: {len(self._codes):,} characters, {len(self.vocabulary):,} different, "
            f"the last {held_out:,} held out"
        )

    def build(self, settings: Settings) -> fb.Model:
        """Return embedding, recurrent layers and a readout to all characters."""
        assert settings.embedding is not None
        seeds = part_seeds(settings.seed, 3)
        return fb.Model(
            fb.Embedding(len(self.vocabulary), settings.embedding, seed=seeds[0]),
            recurrent(settings, settings.embedding, seeds[1]),
            fb.Linear(settings.hidden, len(self.vocabulary), seed=seeds[2]),
        )

    def window(self, index: Array, ignored: int) -> tuple[Array, Array, Loss]:
        """Return the characters at `index` and those behind them; the first steps do not count."""
        target = self._codes[index + 1]
        target[:ignored] = IGNORE
        return self._codes[index], target, "cross_entropy"

    def progress(self, loss: float) -> str:
        """Return the loss in nats and in bits per character."""
        return f"loss {loss:.3f}, {loss / math.log(2):.3f} bits/character"

    def held_out(self, model: fb.Model) -> dict[str, float]:
        """Return bits per character: of the model, of the frequency table, of the uniform guess."""
        x, target = self._held_out_streams()
        loss, _ = fb.evaluate(model, x, target, loss="cross_entropy", ignore_index=IGNORE)
        classes = len(self.vocabulary)
        train, held_out = self._codes[: self._split], self._codes[self._split :]
        counts = np.bincount(train, minlength=classes) + 1.0
        unigram = -np.log2(counts / counts.sum())
        return {
            "heldout_bpc": loss / math.log(2),
            "unigram_bpc": float(unigram[held_out].mean()),
            "uniform_bpc": math.log2(classes),
        }

    def summary(self, figures: dict[str, float]) -> list[str]:
        """Return the three figures, the best known yardstick next to the model's own."""
        own = figures["heldout_bpc"]
        return [
            f"held out:        {own:7.3f} bits per character"
            if own < 1000
            else f"held out:        {own:.3g} bits per character: the training went astray",
            f"  unigram table: {figures['unigram_bpc']:7.3f}",
            f"  uniform:       {figures['uniform_bpc']:7.3f}",
        ]

    def description(self) -> dict[str, Any]:
        """Return the vocabulary: character `n` is class `n`."""
        return {"vocabulary": self.vocabulary}

    def _held_out_streams(self) -> tuple[Array, Array]:
        """Cut the held-out part into streams in which each of its characters counts once."""
        first, end = self._split, len(self._codes)
        streams = max(1, min(_HELD_OUT_STREAMS, (end - first) // _WARM_UP))
        length = -(-(end - first) // streams)
        warm_up = min(_WARM_UP, first - 1)
        starts = first + np.arange(streams) * length
        position = starts[None, :] + np.arange(-warm_up, length)[:, None]
        inside = np.minimum(position, end - 1)
        target = self._codes[inside]
        target[:warm_up] = IGNORE
        target[position >= end] = IGNORE
        return self._codes[inside - 1], target


def read_text(path: str | None) -> Text:
    """Return the text in the file `path`, or that of the Python documentation topics."""
    if path is None:
        return Text(_topics(), {"file": None}, "pydoc_data.topics")
    content = files.decode(files.read_bytes(path, "FILE"), path, "FILE")
    return Text(content, {"file": path}, f"FILE {path!r}")


def _topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "FILE: none was given, and this Python has no pydoc_data.topics; name a UTF-8 text"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))
