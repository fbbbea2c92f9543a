"""Tables and pictures of what benchmarks/vanishing.py has trained.

The document has, for each table, the two lines `<!-- NAME -->` and `<!-- end -->`; what is between
them is replaced. The pictures lie beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import fastbptt as fb
from fastbptt.flow_plot import draw_states
from vanishing import CELLS, TASKS, Config

Outcome = dict[str, Any]
Group = list[Outcome]

# Test error at T = 600 in Bai, Kolter & Koltun 2018 (arXiv:1803.01271), Table 1.
PUBLISHED = {"RNN": 0.177, "LSTM": 0.164, "GRU": 5.3e-5}
# Flows are those of the first seed on so many rows.
FLOW_ROWS = 32


def report(runs: list[Config], folder: Path, document: Path | None) -> None:
    """Print the tables, or put them into the document, and draw the pictures."""
    found = [(run, _read(folder, run)) for run in runs]
    done = [(run, outcome) for run, outcome in found if outcome is not None]
    flows = {run: _flows(run, folder) for run in _with_flow(run for run, _ in done)}
    tables = {
        "lengths": _lengths(done),
        "starts": _starts(done),
        "clipping": _clipping(done),
        "copy": _copy(done),
        "long": _long(done),
        "flows": _flow_table(flows),
    }
    pictures = folder if document is None else document.parent
    _draw_flows(flows, pictures / "vanishing-flow.png")
    _draw_curves(done, pictures / "vanishing-curves.png")
    if document is None:
        print("\n\n".join(tables.values()))
        return
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"{document}: {count} places for the table {name}, wanted 1")
    document.write_text(text, encoding="utf-8")


def _read(folder: Path, run: Config) -> Outcome | None:
    path = folder / f"{run.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _groups(
    done: list[tuple[Config, Outcome]], wanted: Callable[[Config], bool]
) -> dict[Config, Group]:
    """Runs that differ in the seed alone, by the first of them."""
    groups: dict[Config, Group] = {}
    for run, outcome in done:
        if wanted(run):
            key = next((k for k in groups if _same(k, run)), run)
            groups.setdefault(key, []).append(outcome)
    return groups


def _same(a: Config, b: Config) -> bool:
    return a.name.rpartition("-")[0] == b.name.rpartition("-")[0]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _learnt(group: Group) -> str:
    """How many of the seeds learnt it, and after how many updates, the middle one of them."""
    updates = sorted(outcome["learnt"] for outcome in group if outcome["learnt"] is not None)
    after = f", after {median(updates):.0f}" if updates else ""
    return f"{len(updates)} of {len(group)}{after}"


def _tests(group: Group, figure: str = "loss") -> str:
    values = sorted(outcome["test"][figure] for outcome in group)
    if len(values) == 1:
        return _short(values[0])
    return f"{_short(median(values))} ({_short(values[0])} to {_short(values[-1])})"


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}".replace("e-0", "e-")


def _plain_adding(run: Config) -> bool:
    return run.task == "adding" and not run.decay


def _lengths(done: list[tuple[Config, Outcome]]) -> str:
    def wanted(run: Config) -> bool:
        return _plain_adding(run) and run.init == "default" and run.clip > 0

    rows = [
        [str(run.T), run.cell, _learnt(group), _tests(group), _seconds(group)]
        for run, group in sorted(_groups(done, wanted).items(), key=lambda item: item[0].T)
    ]
    return _table(["T", "cell", "learnt", "test MSE", "ms an update"], rows)


def _seconds(group: Group) -> str:
    return f"{median(o['cpu_seconds'] / o['updates'] for o in group) * 1e3:.1f}"


def _starts(done: list[tuple[Config, Outcome]]) -> str:
    lengths = {run.T for run, _ in done if _plain_adding(run) and run.init != "default"}

    def wanted(run: Config) -> bool:
        return _plain_adding(run) and run.T in lengths and run.clip > 0

    groups = _groups(done, wanted)
    order = {"default": 0, "orthogonal": 1, "forget": 2, "chrono": 3}
    rows = [
        [str(run.T), run.cell, run.init, _learnt(group), _tests(group)]
        for run, group in sorted(
            groups.items(),
            key=lambda item: (item[0].T, list(CELLS).index(item[0].cell), order[item[0].init]),
        )
    ]
    return _table(["T", "cell", "start", "learnt", "test MSE"], rows)


def _clipping(done: list[tuple[Config, Outcome]]) -> str:
    without = _groups(done, lambda run: _plain_adding(run) and run.clip == 0)
    rows = []
    for run, group in without.items():
        clipped = _groups(
            done,
            lambda other, run=run: (
                _plain_adding(other)
                and other.clip > 0
                and (other.T, other.cell, other.init) == (run.T, run.cell, run.init)
            ),
        )
        for beside in clipped.values():
            rows.append(
                [run.cell, run.init, "1", _learnt(beside), _tests(beside), _largest(beside)]
            )
        rows.append([run.cell, run.init, "none", _learnt(group), _tests(group), _largest(group)])
    return _table(["cell", "start", "clipped at", "learnt", "test MSE", "largest gradient"], rows)


def _largest(group: Group) -> str:
    return f"{max(outcome['largest_gradient'] for outcome in group):.3g}"


def _copy(done: list[tuple[Config, Outcome]]) -> str:
    rows = []
    for run, group in _groups(done, lambda run: run.task == "copy").items():
        share = median(o["test"]["loss"] / o["without_memory"] for o in group)
        recalled = 100 * median(outcome["test"]["recalled"] for outcome in group)
        rows.append(
            [str(run.T), run.cell, run.init, _tests(group), f"{share:.2f}", f"{recalled:.0f}%"]
        )
    return _table(["T", "cell", "start", "test loss", "of that without memory", "recalled"], rows)


def _long(done: list[tuple[Config, Outcome]]) -> str:
    rows = []
    for run, group in _groups(done, lambda run: run.decay).items():
        updates = f"{group[0]['updates']}"
        rows.append([run.cell, run.init, updates, _tests(group), _short(PUBLISHED[run.cell])])
    return _table(["cell", "start", "updates", "test MSE", "published"], rows)


def _with_flow(runs: Iterable[Config]) -> list[Config]:
    """The first seed of each start, at the middle length."""
    adding = [run for run in runs if _plain_adding(run) and run.seed == 0 and run.clip > 0]
    lengths = sorted({run.T for run in adding})
    if not lengths:
        return []
    middle = 400 if 400 in lengths else lengths[0]
    return [run for run in adding if middle == run.T]


def _flows(run: Config, folder: Path) -> tuple[fb.GradientFlow, fb.GradientFlow]:
    """The flow of the model before and after its training, on the same input."""
    task = TASKS[run.task](run.T)
    x, target = task.draw(np.random.default_rng(3), FLOW_ROWS)
    after = fb.load(folder / f"{run.name}.safetensors")
    return task.flow(run.model(), x, target), task.flow(after, x, target)


def _flow_table(flows: dict[Config, tuple[fb.GradientFlow, fb.GradientFlow]]) -> str:
    rows = [
        [run.cell, run.init, *(cell for flow in pair for cell in _reach(flow))]
        for run, pair in flows.items()
    ]
    head = ["cell", "start", "before: halves every", "first / last step"]
    return _table([*head, "after: halves every", "first / last step"], rows)


def _reach(flow: fb.GradientFlow) -> tuple[str, str]:
    half_life, norms = flow.half_life(), flow.h[-1]
    halves = "never" if np.isinf(half_life) else f"{half_life:.1f} steps"
    ratio = norms[0] / norms[-1] if norms[-1] else 0.0
    return halves, "0" if ratio == 0.0 else f"{ratio:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _draw_flows(flows: dict[Config, tuple[fb.GradientFlow, fb.GradientFlow]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which, title in zip(
        panels, (0, 1), ("before training", "after training"), strict=True
    ):
        named = {
            f"{run.cell} {run.init}": fb.GradientFlow(pair[which].loss, pair[which].h, None)
            for run, pair in flows.items()
        }
        draw_states(axes, named)
        axes.set_title(title)
        # Below that the update of a weight does not feel it.
        axes.set_ylim(bottom=1e-20)
    if flows:
        figure.suptitle(f"Adding problem, T = {next(iter(flows)).T}")
    figure.savefig(path, dpi=100)


def _draw_curves(done: list[tuple[Config, Outcome]], path: Path) -> None:
    lengths = sorted({run.T for run, _ in done if _plain_adding(run)})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(lengths)), sharey=True, squeeze=False)[0]
    for axes, T in zip(panels, lengths, strict=False):
        groups = _groups(done, lambda run, T=T: _plain_adding(run) and run.T == T and run.clip > 0)
        names = [f"{run.cell} {run.init}" for run in groups]
        for name, (run, group) in zip(names, groups.items(), strict=True):
            style = {"default": "-", "orthogonal": ":", "forget": "-.", "chrono": "--"}[run.init]
            colour = f"C{list(CELLS).index(run.cell)}"
            for number, outcome in enumerate(group):
                curve = outcome["curve"]
                updates = np.linspace(0, outcome["updates"], len(curve) + 1)[1:]
                label = name if number == 0 else None
                axes.plot(updates, curve, style, color=colour, label=label, linewidth=0.9)
        axes.set(yscale="log", xlabel="updates", title=f"T = {T}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("training loss (mean squared error)")
    figure.savefig(path, dpi=100)
