"""Who speaks? Utterances of different lengths, nine speakers (JapaneseVowels).

    pip install 'fastbptt[examples]'
    python examples/speech.py            # --quick: one seed and few passes, seconds

An utterance is 7 to 29 steps of 12 cepstrum coefficients; 270 of them are learned from and 370 held
out, as the authors of the data split them. The data are files of the `aeon` package, so nothing is
downloaded. The published figures are those of the paper that the data come from: its classifier,
and the hidden Markov model with five states that it is compared with.

M. Kudo, J. Toyama and M. Shimbo, "Multidimensional curve classification using passing-through
regions", Pattern Recognition Letters 20(11-13), 1999.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

import fastbptt as fb

SPEAKERS, HIDDEN, BATCH = 9, 100, 30


def read(part: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The utterances, `[T, 12]` each, and who spoke them."""
    aeon = importlib.util.find_spec("aeon")
    if aeon is None:
        sys.exit("aeon is not installed; wanted: pip install 'fastbptt[examples]'")
    name = f"datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    text = (Path(aeon.submodule_search_locations[0]) / name).read_text(encoding="utf-8")
    # A line is an utterance: twelve channels and the speaker, with colons between them.
    rows = [line.split(":") for line in text.split("@data\n")[1].split()]
    utterances = [np.array([c.split(",") for c in row[:-1]], np.float32).T for row in rows]
    return utterances, np.array([int(row[-1]) - 1 for row in rows])


def padded(utterances: list[np.ndarray], mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return them side by side, `[T, B, 12]`, with zeros behind the short ones."""
    x = np.zeros((max(map(len, utterances)), len(utterances), 12), np.float32)
    for row, utterance in enumerate(utterances):
        x[: len(utterance), row] = (utterance - mean) / deviation
    return x


def train(
    x: np.ndarray, target: np.ndarray, lengths: np.ndarray, passes: int, seed: int
) -> fb.Model:
    rng = np.random.default_rng(seed)
    model = fb.Model(
        fb.GRU(12, HIDDEN, seed=int(rng.integers(2**32))),
        fb.Linear(HIDDEN, SPEAKERS, seed=int(rng.integers(2**32))),
    )
    optimizer = fb.Adam(model.parameters(), lr=0.01)
    for done in range(passes):
        optimizer.lr = 0.01 * (1 - done / passes)
        order = rng.permutation(x.shape[1])
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            # With so few utterances, noise on the input is what keeps them from being learned by
            # heart. Its size, like all else here, was chosen on a third of the 270.
            noise = rng.standard_normal((len(x), len(rows), 12), dtype=np.float32)
            noisy = x[:, rows] + 0.8 * noise
            result = fb.value_and_grad(model, noisy, target[:, rows], lengths=lengths[rows])
            fb.clip_grad_norm(result.grads, 1.0)
            optimizer.step(result.grads)
    return model


def main() -> None:
    seeds, passes = (1, 25) if "--quick" in sys.argv[1:] else (5, 100)
    known, speaker = read("TRAIN")
    held_out, wanted = read("TEST")
    frames = np.concatenate(known)
    scale = frames.mean(0), frames.std(0)
    x, x_held_out = padded(known, *scale), padded(held_out, *scale)

    # The network answers at the last step of each utterance; no other step has a target.
    lengths = np.array([len(utterance) for utterance in known])
    target = np.full(x.shape[:2], -100)
    target[lengths - 1, np.arange(len(lengths))] = speaker
    last = np.array([len(utterance) - 1 for utterance in held_out])
    accuracies = []
    for seed in range(seeds):
        output, _ = train(x, target, lengths, passes, seed)(x_held_out)
        answer = output[last, np.arange(len(last))].argmax(-1)
        accuracies.append(float((answer == wanted).mean()))

    means = [np.array([u.mean(0) for u in part]) for part in (known, held_out)]
    linear = LogisticRegression(max_iter=2000).fit((means[0] - scale[0]) / scale[1], speaker)
    of_means = linear.score((means[1] - scale[0]) / scale[1], wanted)
    spread = f"median of {seeds} seeds, {min(accuracies):.3f} to {max(accuracies):.3f}"
    print(f"{len(known)} utterances to learn from, {len(held_out)} held out, {SPEAKERS} speakers")
    for name, accuracy, more in (
        ("always the most frequent speaker", np.bincount(wanted).max() / len(wanted), ""),
        ("logistic regression on the mean over time", of_means, ""),
        ("passing-through regions (Kudo et al. 1999)", 0.941, ""),
        ("hidden Markov model (Kudo et al. 1999)", 0.962, ""),
        (f"GRU(12, {HIDDEN})", np.median(accuracies), spread),
    ):
        print(f"  {name:44}{accuracy:.3f}  {more}".rstrip())


if __name__ == "__main__":
    main()
