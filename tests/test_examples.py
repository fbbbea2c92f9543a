"""The scripts of examples/ as a reader runs them, at reduced size: each beats its baseline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require

EXAMPLES = Path(__file__).parents[1] / "examples"


def figures(script: str) -> dict[str, list[float]]:
    """Run a script with --quick and return the numbers in three digits of each row of its table."""
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), "--quick"],
        env=os.environ | {"FASTBPTT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows: dict[str, list[float]] = {}
    for line in result.stdout.splitlines():
        name, *numbers = re.split(r"\s+(?=\d+\.\d{3}\b)", line.strip())
        if numbers:
            # A name may come twice, once for each of several series.
            rows.setdefault(name, []).extend(float(number.split()[0]) for number in numbers)
    return rows


def test_text():
    rows = figures("text.py")
    assert rows["GRU(32, 96)"] < rows["table, one character"] < rows["uniform"]
    assert rows["table, three characters"] < rows["table, two characters"]


def test_speech():
    require("sklearn")
    require("aeon")
    rows = figures("speech.py")
    (accuracy, *_) = rows["GRU(12, 100)"]
    assert accuracy > rows["passing-through regions (Kudo et al. 1999)"][0]


def test_digits():
    require("sklearn")
    rows = figures("digits.py")
    assert rows["logistic regression, all pixels at once"][0] > 0.9
    # Thirty of the eighty passes: chance is 0.1.
    assert rows["LSTM(1, 64), a pixel a step"][0] > 0.8


def test_forecast():
    require("aeon")
    require("statsmodels")
    rows = figures("forecast.py")
    for network, naive in zip(rows["GRU(3, 16)"], rows["seasonal naive"], strict=True):
        assert network < 0.75 * naive


def test_drift():
    rows = figures("drift.py")
    online, frozen = rows["LSTM(1, 32), fb.Stream"], rows["LSTM(1, 32), frozen"]
    before, drifting, after = range(3)
    assert frozen[after] > 2 * frozen[before]
    for part in (drifting, after):
        assert online[part] < 0.6 * frozen[part]
        assert online[part] < rows["least squares, recursive"][part]


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_script_is_short_enough_to_read(script):
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 120
