"""The next character of a text, with truncated backpropagation (the text every CPython carries).

    python examples/text.py              # --quick: a seventh of the text, seconds

Prints the bits per character of the last tenth of the text, which is held out, beside those of
tables of the frequencies of one, two and three characters, and then some text that the network
writes. `fastbptt train` does the same, and saves and resumes; this is what it is made of.
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import numpy as np

import fastbptt as fb

WINDOW, RATE = 64, 0.005


def table(codes: np.ndarray, split: int, V: int, n: int) -> np.ndarray:
    """Return the probability of each held-out character given the n - 1 before it.

    The table of n characters counts as often as it was seen, and the one of n - 1 five times more,
    so that what was never seen has a probability.
    """
    if n == 0:
        return np.full(len(codes) - split, 1 / V)
    context = np.zeros(len(codes), np.int64)
    for back in range(1, n):
        context[back:] = context[back:] * V + codes[:-back]
    context[: n - 1] = -1
    both = context * V + codes
    _, contexts = np.unique(context, return_inverse=True)
    _, pairs = np.unique(both, return_inverse=True)
    seen = np.bincount(contexts[:split], minlength=contexts.max() + 1)[contexts[split:]]
    of_those = np.bincount(pairs[:split], minlength=pairs.max() + 1)[pairs[split:]]
    return (of_those + 5 * table(codes, split, V, n - 1)) / (seen + 5)


def streams(codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into `count` streams side by side; return characters and next ones, `[T, B]`."""
    length = (len(codes) - 1) // count
    cut = codes[: length * count].reshape(count, length), codes[1 : length * count + 1]
    return cut[0].T, cut[1].reshape(count, length).T


def sample(model: fb.Model, start: np.ndarray, length: int, rng: np.random.Generator) -> list[int]:
    output, state = model(start[:, None])
    written = []
    for _ in range(length):
        # A little colder than it is: the likely is made likelier.
        chances = np.exp((output[-1, 0] - output[-1, 0].max()) / 0.7)
        written.append(int(rng.choice(len(chances), p=chances / chances.sum())))
        output, state = model([[written[-1]]], state)
    return written


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    passes, hidden, rows = (2, 96, 8) if quick else (4, 256, 32)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = text[: len(text) // 7] if quick else text
    characters, codes = np.unique(list(text), return_inverse=True)
    V, split = len(characters), len(codes) - len(codes) // 10
    model = fb.Model(
        fb.Embedding(V, 32, seed=1), fb.GRU(32, hidden, seed=2), fb.Linear(hidden, V, seed=3)
    )
    x, target = streams(codes[:split], rows)
    optimizer = fb.Adam(model.parameters(), lr=RATE)
    windows, done = passes * -(-len(x) // WINDOW), 0
    for number in range(passes):
        for result in fb.each_window(model, x, target, schedule=fb.Truncated(WINDOW)):
            optimizer.lr = RATE * (1 - done / windows)
            done += 1
            fb.clip_grad_norm(result.grads, 1.0)
            optimizer.step(result.grads)
        print(f"pass {number + 1} of {passes}: {result.loss / np.log(2):.3f} bits", file=sys.stderr)

    # One stream over all of the held-out part, warmed up on the text before it.
    _, state = model(codes[split - 1000 : split - 1, None])
    held_out = codes[split - 1 :, None]
    loss, _ = fb.evaluate(model, held_out[:-1], held_out[1:], state=state)
    print(f"{len(codes):,} characters, {V} different, the last {len(codes) - split:,} held out")
    print("                        bits per character")
    print(f"uniform                 {np.log2(V):.3f}")
    for n, name in ((1, "one character"), (2, "two characters"), (3, "three characters")):
        print(f"table, {name:17}{-np.log2(table(codes, split, V, n)).mean():.3f}")
    print(f"GRU(32, {hidden})".ljust(24) + f"{loss / np.log(2):.3f}")
    written = sample(model, codes[split - 200 : split], 400, np.random.default_rng(0))
    print("\n" + "".join(characters[written]))


if __name__ == "__main__":
    main()
