"""A stream that drifts: a network that goes on learning, beside the same network left as it was.

    python examples/drift.py             # --quick: a shorter stream and one seed, seconds

The series is that of Mackey and Glass, chaotic, looked at every six units of time through a little
noise; each value is forecast from those before it as they arrive. Its delay grows from 17 to 25 in
the middle third of the stream, so what was learned before is no longer true after. The network
learns a step at a time with `fb.Stream`: its error reaches back 16 steps, and neither time nor
memory grows with the stream. The frozen one is a copy from the end of the first third, so it has
already learned from the steps of the column `before`. The linear forecast is recursive least
squares on the last 16 values, which forgets 0.5 % of the past at every step.

M. C. Mackey and L. Glass, "Oscillation and chaos in physiological control systems", Science 197,
1977. Error is the root mean square over the deviation of the series in the same third.
"""

from __future__ import annotations

import copy
import sys

import numpy as np

import fastbptt as fb

EVERY, LAGS, FORGET, NOISE = 6, 16, 0.995, 0.02


def mackey_glass(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return n values of dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t), tau drifting."""
    fine = 10  # Euler steps in a unit of time
    warm_up = 1000 * fine
    steps = warm_up + n * EVERY * fine
    middle = (np.arange(steps) - warm_up) / (n * EVERY * fine) * 3 - 1
    delay = np.rint((17 + 8 * np.clip(middle, 0, 1)) * fine).astype(int).tolist()
    x = (1.2 + 0.2 * rng.standard_normal(max(delay))).tolist()
    for tau in delay:
        late = x[-tau]
        x.append(x[-1] + (0.2 * late / (1 + late**10) - 0.1 * x[-1]) / fine)
    return np.array(x[-n * EVERY * fine :: EVERY * fine])


def least_squares(series: np.ndarray) -> np.ndarray:
    """Return the forecasts of series[1:] by recursive least squares on the last values."""
    weights, P = np.zeros(LAGS + 1), 100.0 * np.eye(LAGS + 1)
    padded = np.concatenate([np.zeros(LAGS - 1), series])
    forecast = np.empty(len(series) - 1)
    for t in range(len(forecast)):
        x = np.append(padded[t : t + LAGS], 1.0)
        forecast[t] = weights @ x
        gain = P @ x / (FORGET + x @ P @ x)
        weights += gain * (series[t + 1] - forecast[t])
        P = (P - np.outer(gain, x @ P)) / FORGET
    return forecast


def network(series: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the forecasts of series[1:], of the network that learns and of its frozen copy."""
    model = fb.Model(fb.LSTM(1, 32, forget_bias=1.0, seed=seed), fb.Linear(32, 1, seed=seed + 100))
    optimizer = fb.Adam(model.parameters(), lr=0.003)
    stream = fb.Stream(model, "mse", fb.Truncated(1, 16), optimizer, batch_size=1, max_norm=1.0)
    values = series.astype(np.float32)[:, None, None]
    forecast = np.empty(len(series) - 1)
    third = len(series) // 3
    for t in range(len(forecast)):
        if t == third:
            frozen = copy.deepcopy(model)
        forecast[t] = stream.push(values[t], values[t + 1]).prediction[0, 0]
    return forecast, np.asarray(frozen(values[:-1])[0][:, 0, 0])


def main() -> None:
    n, seeds = (6000, 1) if "--quick" in sys.argv[1:] else (60000, 3)
    rows: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        series = mackey_glass(n, rng)
        series = (series - 0.9) / 0.25 + NOISE * rng.standard_normal(n)
        online, frozen = network(series, seed)
        forecasts = {
            "the value before": series[:-1],
            "least squares, recursive": least_squares(series),
            "LSTM(1, 32), frozen": frozen,
            "LSTM(1, 32), fb.Stream": online,
        }
        # The second half of each third, so that neither the start nor a delay at a change counts.
        for name, forecast in forecasts.items():
            errors = []
            for part in range(3):
                half = slice((2 * part + 1) * n // 6, (part + 1) * n // 3 - 1)
                actual = series[1:][half]
                rms = np.sqrt(np.mean((forecast[half] - actual) ** 2))
                errors.append(float(rms / actual.std()))
            rows.setdefault(name, []).append(errors)
    print(f"{n:,} steps, median of {seeds} seeds; error over deviation, second half of each third")
    print("                             before   drifting      after")
    for name, errors in rows.items():
        print(f"{name:26}" + "".join(f"{value:9.3f}  " for value in np.median(errors, 0)))


if __name__ == "__main__":
    main()
