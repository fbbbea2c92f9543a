"""Whether training ends at the same loss in less precision: the runs behind docs/precision.md.

    python benchmarks/precision_training.py              # all runs, some minutes, then the report
    python benchmarks/precision_training.py --tasks adding --seeds 1

The text is that of `fastbptt train`, with its network and settings; the other task is to add two
marked numbers of a sequence. Each seed starts every variant from the same weights (in bfloat16 from
their rounding) and shows it the same data. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb
from fastbptt.cli.data import stream_starts
from fastbptt.cli.settings import DEFAULTS, LEARNING_RATES, Settings
from fastbptt.cli.text import read_text
from report import put_between
from vanishing import Adding

Array = NDArray[Any]
DOCUMENT, PICTURE = Path("docs/precision.md"), "precision.png"
FIRST, LAST = "<!-- precision_training -->\n", "<!-- end -->"
SPAN = 25  # updates that a point of a curve is the mean of
UPDATES = {"text": 1000, "adding": 1500}
UNITS = {"text": "held out, bits per character", "adding": "test error"}

VARIANTS: dict[str, dict[str, Any]] = {
    "highest": {},
    "high": {"precision": "high"},
    "medium": {"precision": "medium"},
    "highest, bfloat16 tape": {"tape": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
}


@dataclass
class Outcome:
    """Of one run: the loss of each span of updates, the figure at its end, seconds."""

    curve: list[float]
    figure: float
    seconds: float


def variant_of(model: fb.Model, name: str) -> fb.Model:
    """Return the model in a variant, over its own weights."""
    settings = VARIANTS[name]
    parts = []
    for part in model.config()["parts"]:
        own = part | {"dtype": settings.get("dtype", "float32")}
        if part["type"] in ("LSTM", "GRU"):
            own |= {key: value for key, value in settings.items() if key != "dtype"}
        parts.append(own)
    other = fb.Model.from_config({"parts": parts})
    values = model.parameters()
    other.load_state_dict({n: values[n].astype(p.dtype) for n, p in other.parameters().items()})
    return other


def train(
    model: fb.Model,
    updates: int,
    rate: Callable[[int], float],
    step: Callable[[int], fb.ValueAndGrad],
) -> list[float]:
    """Return the losses of all updates; each gradient is clipped at 1."""
    adam = fb.Adam(model.parameters())
    losses = []
    for update in range(updates):
        result = step(update)
        losses.append(result.loss)
        fb.clip_grad_norm(result.grads, 1.0)
        adam.lr = rate(update)
        adam.step(result.grads)
    return losses


def run_text(name: str, seed: int, updates: int) -> tuple[list[float], float]:
    """Train on the default text as `fastbptt train` does."""
    data = read_text(None)
    values = DEFAULTS["text"] | {"seed": seed}
    settings = Settings(**values, lr=LEARNING_RATES["adam"], k2=values["k1"])
    model = variant_of(data.build(settings), name)
    starts = stream_starts(data.targets, settings, data.unit)
    state: list[Any] = [None]

    def step(update: int) -> fb.ValueAndGrad:
        steps = np.arange(update * settings.k1, (update + 1) * settings.k1)
        x, target, loss = data.window((starts[None, :] + steps[:, None]) % data.targets, 0)
        result = fb.value_and_grad(model, x, target, loss=loss, state=state[0])
        state[0] = result.state
        return result

    losses = train(model, updates, settings.learning_rate, step)
    return [loss / math.log(2) for loss in losses], data.held_out(model)["heldout_bpc"]


def run_adding(name: str, seed: int, updates: int) -> tuple[list[float], float]:
    """Train a GRU to add two numbers of 100."""
    task = Adding(100)
    seeds = np.random.SeedSequence(seed).generate_state(2)
    layer = fb.GRU(2, 32, chrono=100.0, seed=int(seeds[0]))
    model = variant_of(fb.Model(layer, fb.Linear(32, 1, seed=int(seeds[1]))), name)

    def drawn(rng: np.random.Generator, rows: int) -> tuple[Array, Array]:
        x, target = task.draw(rng, rows)
        return x.astype(model.dtype), target

    rng = np.random.default_rng([1, seed])
    losses = train(model, updates, lambda _: 1e-2, lambda _: task.step(model, *drawn(rng, 32)))
    return losses, task.test(model, *drawn(np.random.default_rng(2), 1000))["loss"]


TASKS = {"text": run_text, "adding": run_adding}


def run(task: str, name: str, seed: int) -> Outcome:
    """Train one variant."""
    began = time.process_time()
    losses, figure = TASKS[task](name, seed, UPDATES[task])
    spans = [losses[i : i + SPAN] for i in range(0, len(losses), SPAN)]
    curve = [float(np.mean(span)) for span in spans]
    return Outcome(curve, figure, time.process_time() - began)


def table(outcomes: dict[tuple[str, str], list[Outcome]], tasks: list[str]) -> str:
    """Return a row a task and variant: each seed's figure, their mean and spread."""
    lines = ["| task | variant | by seed | mean | spread of seeds |", "|---|---|---|---:|---:|"]
    for task in tasks:
        for name in VARIANTS:
            figures = [outcome.figure for outcome in outcomes[task, name]]
            by_seed = ", ".join(
                f"{figure:.3g}" if figure < 0.1 else f"{figure:.3f}" for figure in figures
            )
            mean, spread = np.mean(figures), np.ptp(figures)
            lines.append(
                f"| {task}, {UNITS[task]} | {name} | {by_seed} | {mean:.3g} | {spread:.2g} |"
            )
    return "\n".join(lines)


def draw(outcomes: dict[tuple[str, str], list[Outcome]], tasks: list[str], path: Path) -> None:
    """Draw the loss over the updates: a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, name in enumerate(VARIANTS):
            for seed, outcome in enumerate(outcomes[task, name]):
                x = SPAN * (np.arange(len(outcome.curve)) + 1)
                label = name if seed == 0 else None
                axis.plot(x, outcome.curve, color=f"C{number}", linewidth=1, label=label)
        axis.set_title("text" if task == "text" else "adding, T = 100")
        axis.set_xlabel("updates")
        axis.set_ylabel("bits per character" if task == "text" else "squared error")
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--document", type=Path, default=None, help=f"such as {DOCUMENT}")
    chosen = parser.parse_args()
    fb.set_num_threads(1)
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for task in chosen.tasks:
        for name in VARIANTS:
            found = outcomes.setdefault((task, name), [])
            for seed in range(chosen.seeds):
                found.append(run(task, name, seed))
                last = found[-1]
                figures = f"{last.figure:.4g}, {last.seconds:.0f} s"
                print(f"{task}, {name}, seed {seed}: {figures}", flush=True)
    text = table(outcomes, chosen.tasks)
    print(text)
    if chosen.document is not None:
        put_between(chosen.document, FIRST, LAST, f"\n{text}\n\n")
        draw(outcomes, chosen.tasks, chosen.document.parent / PICTURE)


if __name__ == "__main__":
    main()
