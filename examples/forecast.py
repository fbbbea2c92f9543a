"""Forecasts of real series, one step ahead, beside those that need no training.

    pip install 'fastbptt[examples]'
    python examples/forecast.py          # --quick: one seed and few passes, seconds

Monthly airline passengers 1949 to 1960 (Box & Jenkins; a file of the `aeon` package) and yearly
sunspots 1700 to 2008 (a file of `statsmodels`), so nothing is downloaded. The end of each series is
held out. Errors are MASE: the mean absolute error over that of the seasonal naive forecast on the
part that is learned from (Hyndman & Koehler 2006). A linear autoregression, fitted by least squares
on a season and one more value, is hard to beat where there is so little to learn from.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np

import fastbptt as fb

HIDDEN, COPIES, NOISE, RATE = 16, 8, 0.3, 0.01


def column(package: str, name: str) -> np.ndarray:
    """The last column of a table that a package ships."""
    found = importlib.util.find_spec(package)
    if found is None:
        sys.exit(f"{package} is not installed; wanted: pip install 'fastbptt[examples]'")
    with (Path(found.submodule_search_locations[0]) / name).open(encoding="utf-8") as file:
        return np.array([float(row[-1]) for row in list(csv.reader(file))[1:]])


def train(x: np.ndarray, target: np.ndarray, passes: int, seed: int) -> fb.Model:
    rng = np.random.default_rng(seed)
    model = fb.Model(
        fb.GRU(x.shape[2], HIDDEN, seed=int(rng.integers(2**32))),
        fb.Linear(HIDDEN, 1, seed=int(rng.integers(2**32))),
    )
    optimizer = fb.Adam(model.parameters(), lr=RATE)
    target = np.repeat(target, COPIES, 1)
    for done in range(passes):
        optimizer.lr = RATE * (1 - done / passes)
        # There is one series: what is put beside it is itself with other noise.
        noise = rng.standard_normal((len(x), COPIES, x.shape[2]), dtype=np.float32)
        result = fb.value_and_grad(model, x + NOISE * noise, target, loss="mse")
        fb.clip_grad_norm(result.grads, 1.0)
        optimizer.step(result.grads)
    return model


def forecasts(z: np.ndarray, season: int, known: int, passes: int, seeds: int) -> dict:
    """Return forecasts of `z[known:]`, each from the values before it."""
    changes = np.diff(z)
    level = (z - z[:known].mean()) / z[:known].std()
    change = changes / changes[: known - 1].std()
    # At each step: the value, the last change, and the change that came next a season ago.
    t = np.arange(season, len(z) - 1)
    x = np.stack([level[t], change[t - 1], change[t - season]], -1)[:, None].astype(np.float32)
    target = change[t].astype(np.float32)[:, None, None]
    learned = known - 1 - season
    networks = []
    for seed in range(seeds):
        output, _ = train(x[:learned], target[:learned], passes, seed)(x)
        networks.append(z[known - 1 : -1] + output[learned:, 0, 0] * changes[: known - 1].std())

    rows = np.array([[1.0, *z[s - season - 1 : s]] for s in range(season + 1, len(z))])
    fitted = known - season - 1
    weights = np.linalg.lstsq(rows[:fitted], z[season + 1 : known], rcond=None)[0]
    return {
        "the value before": [z[known - 1 : -1]],
        "seasonal naive": [z[known - season : len(z) - season]],
        "linear autoregression": [rows[fitted:] @ weights],
        f"GRU({x.shape[2]}, {HIDDEN})": networks,
    }


def main() -> None:
    seeds, passes = (1, 60) if "--quick" in sys.argv[1:] else (5, 200)
    airline = column("aeon", "datasets/data/Airline/Airline.csv")
    sunspots = column("statsmodels", "datasets/sunspots/sunspots.csv")
    series = (
        ("airline passengers", airline, 12, 36, np.log, np.exp),
        ("sunspots", sunspots, 11, 60, np.sqrt, np.square),
    )
    print(f"MASE, median of {seeds} seeds (least to most)")
    for name, values, season, held_out, forward, back in series:
        known = len(values) - held_out
        scale = np.abs(values[season:known] - values[: known - season]).mean()
        print(f"\n{name}: {known} values to learn from, {held_out} held out, season {season}")
        found = forecasts(forward(values), season, known, passes, seeds)
        for method, each in found.items():
            errors = [float(np.abs(back(z) - values[known:]).mean() / scale) for z in each]
            spread = f"  ({min(errors):.3f} to {max(errors):.3f})" if len(errors) > 1 else ""
            print(f"  {method:24}{np.median(errors):.3f}{spread}")


if __name__ == "__main__":
    main()
