"""Images read pixel by pixel: handwritten digits as sequences of 64 steps (scikit-learn's digits).

    pip install 'fastbptt[examples]'
    python examples/digits.py            # --quick: fewer passes, seconds

The network sees one pixel of the 8 x 8 image a step, row by row, and names the digit at the last
step: what it saw sixty steps before must still be there. Logistic regression sees all pixels at
once. A quarter of the 1797 images is held out.
"""

from __future__ import annotations

import sys

import numpy as np

import fastbptt as fb

try:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError:
    sys.exit("scikit-learn is not installed; wanted: pip install 'fastbptt[examples]'")

HIDDEN, BATCH, RATE = 64, 32, 0.01


def sequences(images: np.ndarray) -> np.ndarray:
    """Return images `[B, 64]` as `[64, B, 1]`."""
    return np.ascontiguousarray(images.T[:, :, None], np.float32)


def train(images: np.ndarray, digits: np.ndarray, passes: int, seed: int) -> fb.Model:
    rng = np.random.default_rng(seed)
    model = fb.Model(
        # An open forget gate lets the first gradients through (Jozefowicz et al. 2015).
        fb.LSTM(1, HIDDEN, forget_bias=1.0, seed=int(rng.integers(2**32))),
        fb.Linear(HIDDEN, 10, seed=int(rng.integers(2**32))),
    )
    optimizer = fb.Adam(model.parameters(), lr=RATE)
    batches = len(digits) // BATCH
    for done in range(passes):
        optimizer.lr = RATE * (1 - done / passes)
        for rows in rng.permutation(len(digits))[: batches * BATCH].reshape(batches, BATCH):
            x = sequences(images[rows])
            x += 0.1 * rng.standard_normal(x.shape, dtype=np.float32)
            target = np.full((64, BATCH), -100)  # -100: no answer is asked for at this step
            target[-1] = digits[rows]
            result = fb.value_and_grad(model, x, target)
            fb.clip_grad_norm(result.grads, 1.0)
            optimizer.step(result.grads)
    return model


def main() -> None:
    seeds, passes = (1, 30) if "--quick" in sys.argv[1:] else (3, 80)
    images, digits = load_digits(return_X_y=True)
    images, held_out, digits, wanted = train_test_split(
        images / 16, digits, test_size=0.25, random_state=0, stratify=digits
    )
    linear = LogisticRegression(max_iter=5000, C=10).fit(images, digits).score(held_out, wanted)
    accuracies = []
    for seed in range(seeds):
        output, _ = train(images, digits, passes, seed)(sequences(held_out))
        accuracies.append(float((output[-1].argmax(-1) == wanted).mean()))
    spread = f"median of {seeds} seeds, {min(accuracies):.3f} to {max(accuracies):.3f}"
    print(f"{len(digits)} images to learn from, {len(wanted)} held out")
    print(f"  logistic regression, all pixels at once   {linear:.3f}")
    name = f"LSTM(1, {HIDDEN}), a pixel a step"
    print(f"  {name:42}{np.median(accuracies):.3f}  {spread}")


if __name__ == "__main__":
    main()
