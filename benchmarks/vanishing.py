"""Which networks learn over long distances: the runs behind docs/vanishing.md.

    python benchmarks/vanishing.py                  # all runs (an hour and a half), then the report
    python benchmarks/vanishing.py --run NAME       # one run; its result is written to the folder
    python benchmarks/vanishing.py --list           # names of the runs that are not there yet
    python benchmarks/vanishing.py --report         # tables and pictures of the runs that are there
    python benchmarks/vanishing.py --quick          # all of it at a size that says nothing

Each run leaves a JSON file and its model in the folder `--folder`, and is not made again; so the
whole can be stopped at any time. Everything runs on one thread, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb

Array = NDArray[Any]

FOLDER = Path("build/vanishing")
DOCUMENT = Path("docs/vanishing.md")
# A run has learnt its task where the mean over so many updates is under so much of the loss of
# the best network without memory; it goes on to a tenth of that.
AVERAGED = 100
LEARNT = 0.06
SYMBOLS = 10  # of the copy task
TEST_ROWS = 1000
CURVE_STEP = 25


class Adding:
    """Add the two numbers of a sequence that are marked (Hochreiter & Schmidhuber 1997).

    x is `[T, B, 2]`: numbers even over [0, 1), and a mark at two different steps. The target is the
    sum, at the last step alone. Without memory the best answer is 1, which costs 1/6.
    """

    inputs, outputs = 2, 1
    without_memory = 1.0 / 6.0

    def __init__(self, T: int) -> None:
        self.T = T

    def draw(self, rng: np.random.Generator, B: int) -> tuple[Array, Array]:
        x = np.zeros((self.T, B, 2), np.float32)
        x[..., 0] = rng.random((self.T, B), dtype=np.float32)
        rows, first = np.arange(B), rng.integers(0, self.T, B)
        second = (first + rng.integers(1, self.T, B)) % self.T
        x[first, rows, 1] = x[second, rows, 1] = 1.0
        return x, (x[first, rows, 0] + x[second, rows, 0])[:, None]

    def loss(self, target: Array) -> Any:
        """The squared error of the last step, as a loss of the library."""

        def at_end(output: Array, _: Any, steps: slice) -> tuple[float, Array]:
            grad = np.zeros_like(output)
            if steps.stop < self.T:
                return 0.0, grad
            error = output[-1] - target
            grad[-1] = error * (2.0 / error.size)
            return float(np.square(error, dtype=np.float64).mean()), grad

        return at_end

    def step(self, model: fb.Model, x: Array, target: Array) -> fb.ValueAndGrad:
        return fb.value_and_grad(model, x, None, self.loss(target))

    def test(self, model: fb.Model, x: Array, target: Array) -> dict[str, float]:
        return {"loss": fb.evaluate(model, x, None, self.loss(target))[0]}

    def flow(self, model: fb.Model, x: Array, target: Array) -> fb.GradientFlow:
        return fb.gradient_flow(model, x, None, self.loss(target))


class Copying:
    """Repeat ten symbols after T steps (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    x is `[T + 20, B, 10]`, one-hot: ten symbols of eight, blanks, a sign to begin, blanks. The
    target is blank but for the last ten steps. The loss is the mean over all steps; without memory
    the best costs `10 log 8 / (T + 20)`.
    """

    inputs = outputs = 10

    def __init__(self, T: int) -> None:
        self.T = T
        self.without_memory = SYMBOLS * float(np.log(8.0)) / (T + 2 * SYMBOLS)

    def draw(self, rng: np.random.Generator, B: int) -> tuple[Array, Array]:
        steps = self.T + 2 * SYMBOLS
        symbols = rng.integers(1, 9, (SYMBOLS, B))
        x, target = np.zeros((2, steps, B), np.int64)
        x[:SYMBOLS] = symbols
        x[steps - SYMBOLS - 1] = 9
        target[-SYMBOLS:] = symbols
        return np.eye(10, dtype=np.float32)[x], target

    def step(self, model: fb.Model, x: Array, target: Array) -> fb.ValueAndGrad:
        return fb.value_and_grad(model, x, target)

    def test(self, model: fb.Model, x: Array, target: Array) -> dict[str, float]:
        output, _ = model(x)
        right = output[-SYMBOLS:].argmax(axis=2) == target[-SYMBOLS:]
        return {"loss": fb.evaluate(model, x, target)[0], "recalled": float(right.mean())}

    def flow(self, model: fb.Model, x: Array, target: Array) -> fb.GradientFlow:
        return fb.gradient_flow(model, x, target)


TASKS = {"adding": Adding, "copy": Copying}
CELLS = {"RNN": fb.RNN, "LSTM": fb.LSTM, "GRU": fb.GRU}
# LSTM and GRU did better than with 0.002 in a few trials; the RNN learnt nothing with either.
RATES = {"RNN": 1e-3, "LSTM": 5e-3, "GRU": 5e-3}


@dataclass(frozen=True)
class Config:
    """One run: what is learnt, by what, from where, and for how long.

    clip is the largest norm of the gradient, 0 for none. `decay`: after the task is learnt the run
    goes on to the last update, with a rate that falls to a hundredth.
    """

    task: str
    T: int
    cell: str
    init: str = "default"
    seed: int = 0
    clip: float = 1.0
    hidden: int = 64
    batch: int = 32
    updates: int = 3000
    decay: bool = False

    @property
    def name(self) -> str:
        clip = "" if self.clip == 1.0 else f"-clip{self.clip:g}"
        long = "-long" if self.decay else ""
        return f"{self.task}-{self.T}-{self.cell}-{self.init}{clip}{long}-{self.seed}"

    @property
    def rate(self) -> float:
        return RATES[self.cell]

    def model(self) -> fb.Model:
        """The model before its first update."""
        task = TASKS[self.task](self.T)
        options: dict[str, Any] = {
            "default": {},
            "orthogonal": {"init": "orthogonal"},
            "forget": {"forget_bias": 1.0},
            "chrono": {"chrono": float(self.T)},
        }[self.init]
        seeds = np.random.SeedSequence(self.seed).generate_state(2)
        layer = CELLS[self.cell](task.inputs, self.hidden, seed=int(seeds[0]), **options)
        return fb.Model(layer, fb.Linear(self.hidden, task.outputs, seed=int(seeds[1])))


def configs(seeds: int) -> list[Config]:
    """All runs, the first seed of each before the second of any."""
    runs: list[Config] = []
    for seed in range(seeds):
        new: list[Config] = []
        for T in (200, 400, 600):
            new += [Config("adding", T, cell, seed=seed) for cell in CELLS]
        inits = {
            "RNN": ("orthogonal",),
            "LSTM": ("orthogonal", "forget", "chrono"),
            "GRU": ("orthogonal", "chrono"),
        }
        for cell, names in inits.items():
            new += [Config("adding", 400, cell, name, seed) for name in names]
        new += [Config("adding", 600, cell, "chrono", seed) for cell in ("LSTM", "GRU")]
        clipped = (("RNN", "orthogonal"), ("LSTM", "chrono"), ("GRU", "default"))
        new += [Config("adding", 400, cell, init, seed, clip=0.0) for cell, init in clipped]
        new += [Config("copy", 50, cell, seed=seed) for cell in CELLS]
        new += [Config("copy", 50, cell, "chrono", seed) for cell in ("LSTM", "GRU")]
        new.append(Config("copy", 50, "RNN", "orthogonal", seed))
        if seed == 0:
            long = {"updates": 20000, "decay": True}
            new += [Config("adding", 600, cell, "chrono", **long) for cell in ("GRU", "LSTM")]
        runs += new
    return runs


def quick_configs() -> list[Config]:
    """A few runs of each kind, as small as they can be."""
    small = {"hidden": 16, "batch": 16, "updates": 300}
    adding = [Config("adding", 12, cell, **small) for cell in CELLS]
    others = [
        replace(adding[0], init="orthogonal"),
        replace(adding[2], init="chrono"),
        replace(adding[2], clip=0.0),
        replace(adding[2], init="chrono", decay=True),
    ]
    return [*adding, *others, *(Config("copy", 8, cell, **small) for cell in CELLS)]


def train(config: Config, folder: Path) -> dict[str, Any]:
    """Train, and write result and model into the folder."""
    fb.set_num_threads(1)
    task, model = TASKS[config.task](config.T), config.model()
    rng = np.random.default_rng([1, config.seed])
    optimizer = fb.Adam(model.parameters(), lr=config.rate)
    goal = LEARNT * task.without_memory
    losses: list[float] = []
    learnt: int | None = None
    largest = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for update in range(config.updates):
        result = task.step(model, *task.draw(rng, config.batch))
        norm = float(np.sqrt(sum(np.vdot(g, g) for g in result.grads.values())))
        largest = max(largest, norm)
        losses.append(result.loss)
        if not np.isfinite(norm):
            break
        if config.clip:
            fb.clip_grad_norm(result.grads, config.clip)
        if config.decay and learnt is not None:
            done = (update - learnt) / max(1, config.updates - learnt)
            optimizer.lr = config.rate * 0.01**done
        optimizer.step(result.grads)
        mean = float(np.mean(losses[-AVERAGED:]))
        if len(losses) >= AVERAGED and learnt is None and mean < goal:
            learnt = update + 1
        if learnt is not None and mean < goal / 10 and not config.decay:
            break
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    test_rng = np.random.default_rng(2)
    figures = task.test(model, *task.draw(test_rng, TEST_ROWS))
    spans = [losses[i : i + CURVE_STEP] for i in range(0, len(losses), CURVE_STEP)]
    outcome = {
        "config": asdict(config),
        "without_memory": task.without_memory,
        "learnt": learnt,
        "updates": len(losses),
        "test": figures,
        "largest_gradient": largest,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "curve": [float(np.mean(span)) for span in spans],
    }
    folder.mkdir(parents=True, exist_ok=True)
    fb.save(folder / f"{config.name}.safetensors", model)
    temporary = folder / f"{config.name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(outcome), encoding="utf-8")
    temporary.replace(folder / f"{config.name}.json")
    return outcome


def missing(runs: list[Config], folder: Path) -> Iterator[Config]:
    return (run for run in runs if not (folder / f"{run.name}.json").exists())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--run", metavar="NAME")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--document", type=Path, default=None)
    arguments = parser.parse_args(argv)
    runs = quick_configs() if arguments.quick else configs(arguments.seeds)
    if arguments.list:
        print("\n".join(run.name for run in missing(runs, arguments.folder)))
        return
    if not arguments.report:
        chosen = [run for run in runs if arguments.run in (None, run.name)]
        if not chosen:
            parser.error(f"--run: got {arguments.run!r}, wanted a name that --list gives")
        for run in missing(chosen, arguments.folder):
            outcome = train(run, arguments.folder)
            print(
                f"{run.name}: learnt after {outcome['learnt']} of {outcome['updates']} updates, "
                f"test {outcome['test']}, {outcome['cpu_seconds']:.0f} s",
                flush=True,
            )
    if arguments.run is None:
        from vanishing_report import report

        document = arguments.document or (None if arguments.quick else DOCUMENT)
        report(runs, arguments.folder, document)


if __name__ == "__main__":
    main()
