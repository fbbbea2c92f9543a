"""`fastbptt sample`: text from a saved model, one character after the other."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator

import numpy as np

import fastbptt as fb
from fastbptt.cli import saved
from fastbptt.cli.data import Array
from fastbptt.cli.errors import RunError, UsageError


def sample(arguments: argparse.Namespace) -> int:
    """Write the prompt and the characters that the model puts behind it."""
    model, vocabulary = saved.text_model(arguments.model)
    codes = _encode(arguments.prompt, vocabulary)
    rng = np.random.default_rng(arguments.seed)
    # A pipe takes UTF-8 whatever the locale; a terminal shows what it can.
    if isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="replace")
        else:
            sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(arguments.prompt)
    for code in _characters(model, codes, arguments.length, arguments.temperature, rng):
        sys.stdout.write(vocabulary[code])
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def _encode(prompt: str, vocabulary: str) -> Array:
    place = {character: code for code, character in enumerate(vocabulary)}
    for character in prompt:
        if character not in place:
            raise UsageError(
                f"--prompt: got {character!r} (U+{ord(character):04X}), wanted characters of the "
                f"text the model was trained on; it has {len(vocabulary)}"
            )
    # Without a prompt the text begins as a line does.
    prompt = prompt or ("\n" if "\n" in place else vocabulary[0])
    return np.array([[place[character]] for character in prompt], dtype=np.int64)


def _characters(
    model: fb.Model, codes: Array, length: int, temperature: float, rng: np.random.Generator
) -> Iterator[int]:
    state = None
    for _ in range(length):
        output, state = model(codes, state)
        code = _draw(output[-1, 0].astype(np.float64), temperature, rng)
        codes = np.array([[code]], dtype=np.int64)
        yield code


def _draw(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    if not np.isfinite(logits).all():
        raise RunError("the model's output is not finite; it cannot write text")
    if temperature == 0.0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    total = np.cumsum(weights)
    drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
    return min(int(drawn), len(logits) - 1)
