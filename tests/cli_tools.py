"""Texts, tables and calls that the tests of the command line share."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fastbptt.cli import main

ENGLISH = [
    "The error at a step is the error of its own target. ",
    "What comes back from the next step is added to it! ",
    "Does the gradient fade on its way back? ",
    "A gate keeps it.\n",
]
# The opening of Natsume Sōseki's "I Am a Cat" (1905).
JAPANESE = [
    "吾輩は猫である。",
    "名前はまだ無い。",
    "どこで生れたかとんと見当がつかぬ。",
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。\n",
]
SMALL = ["--hidden", "24", "--embedding", "12", "--batch", "4", "--k1", "10", "--threads", "1"]


def write_text(path: Path, sentences: list[str], count: int = 80) -> str:
    """Write sentences in a random but fixed order; return the path as text."""
    order = np.random.default_rng(1).integers(0, len(sentences), count)
    path.write_text("".join(sentences[i] for i in order), encoding="utf-8")
    return str(path)


def write_table(path: Path, columns: dict[str, Any], delimiter: str = ",") -> str:
    """Write a table with a heading; return the path as text."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))
    return str(path)


def run(*arguments: object) -> int:
    """Call the command line in this process."""
    return main([str(argument) for argument in arguments])


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimiser and carried state of two saved runs have the same bits."""
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(
            left[name].view(np.uint8), right[name].view(np.uint8), err_msg=name
        )
