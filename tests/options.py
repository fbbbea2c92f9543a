"""Stacks with all options, by the slow reference.

Each row is run alone through `fastbptt._reference`, one layer and direction at a time, over its own
steps and no others; a direction that runs backward gets its steps in the opposite order. What is
drawn at random NumPy draws again from the formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from random_numbers import DROPOUT, RECURRENT_DROPOUT, ZONEOUT_C, ZONEOUT_H, keeps
from reference import GATES, MORE_KINDS, Results, Run, load_weights, make_layer, named_state

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """A stack, its input, and the error of its results.

    x `[T, B, I]`, h and c `[L*D, B, H]` or None for the start that the stack has by itself, grad_y
    `[T, B, D*H]`, grad_h and grad_c `[L*D, B, H]`; lengths `[B]` or None; resets and mask `[T, B]`
    or None; zoneout of h and of c; grad_cells `[T, B, D*H]`, or None. With a projection h, grad_h
    and grad_y have P for H.
    """

    cell: str
    num_layers: int
    directions: int
    dropout: float
    seed: int
    x: Array
    lengths: Array | None
    h: Array | None
    c: Array | None
    weights: dict[str, Array]
    grad_y: Array
    grad_h: Array
    grad_c: Array | None
    resets: Array | None = None
    mask: Array | None = None
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    coupled: bool = False
    grad_cells: Array | None = None

    @property
    def peephole(self) -> bool:
        return "weight_peephole_l0" in self.weights

    @property
    def proj_size(self) -> int:
        return len(self.weights.get("weight_hr_l0", ()))

    @property
    def layer_norm(self) -> bool:
        return "weight_ln_ih_l0" in self.weights

    @property
    def learned(self) -> bool:
        return "h0_l0" in self.weights

    def suffixes(self) -> list[str]:
        ends = ("", "_reverse")[: self.directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def state(self) -> Any:
        return self.h if self.c is None or self.h is None else (self.h, self.c)

    def grad_state(self) -> Any:
        return self.grad_h if self.grad_c is None else (self.grad_h, self.grad_c)

    def astype(self, dtype: str) -> Problem:
        def cast(value: Array | None) -> Array | None:
            return None if value is None else value.astype(dtype)

        names = ("x", "h", "c", "grad_y", "grad_h", "grad_c", "grad_cells")
        return replace(
            self,
            weights={name: w.astype(dtype) for name, w in self.weights.items()},
            **{name: cast(getattr(self, name)) for name in names},
        )

    def rounding(self) -> float:
        T, B, size = self.x.shape
        H = self.grad_h.shape[-1]
        longest = self.num_layers * (size + self.directions * H) + T * B
        return (
            (128.0 if self.layer_norm else 32.0)
            * float(np.finfo(self.x.dtype).eps)
            * np.sqrt(longest)
        )


def draw(
    rng: np.random.Generator,
    cell: str,
    sizes: tuple[int, int, int, int],
    *,
    num_layers: int = 1,
    directions: int = 1,
    dropout: float = 0.0,
    learned: bool = False,
    ragged: bool = True,
    with_state: bool = True,
    bias: bool = True,
    dtype: str = "float64",
    resets: bool = False,
    mask: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    peephole: bool = False,
    coupled: bool = False,
    cells: bool = False,
    layer_norm: bool = False,
    proj_size: int = 0,
) -> Problem:
    T, B, size, H = sizes

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    lstm = cell == "lstm"
    layer_norm = layer_norm and cell in ("lstm", "gru")
    P = proj_size if lstm and proj_size < H else 0
    R = P or H
    G = 3 if coupled and lstm else GATES[cell]
    weights: dict[str, Array] = {}
    bound = 1.0 / np.sqrt(H)
    for layer in range(num_layers):
        for end in ("", "_reverse")[:directions]:
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (G * H, directions * R if layer else size),
                "weight_hh": (G * H, R),
            }
            if bias:
                shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)}
            if learned:
                shapes |= {"h0": (R,)} | ({"c0": (H,)} if lstm else {})
            if P:
                shapes["weight_hr"] = (P, H)
            if peephole and lstm:
                shapes["weight_peephole"] = ((G - 1) * H,)
            if layer_norm:
                shapes |= {"weight_ln_ih": (G * H,), "weight_ln_hh": (G * H,)}
            if layer_norm and lstm:
                shapes |= {"weight_ln_c": (H,)} | ({"bias_ln_c": (H,)} if bias else {})
            for kind, shape in shapes.items():
                drawn = rng.uniform(-bound, bound, shape) + kind.startswith("weight_ln")
                weights[f"{kind}_l{layer}{end}"] = drawn.astype(dtype)
    states = [normal(num_layers * directions, B, n) for n in (R, H, R, H)]
    lengths = rng.integers(0, T + 1, B) if ragged else None
    if lengths is not None and rng.random() < 0.5:
        lengths[rng.integers(B)] = T
    x = normal(T, B, size)
    is_there = rng.random((T, B)) < 0.7
    if mask:
        x[~is_there] = np.nan
    return Problem(
        cell=cell,
        num_layers=num_layers,
        directions=directions,
        dropout=dropout,
        seed=int(rng.integers(1 << 63)),
        x=x,
        resets=rng.random((T, B)) < 0.3 if resets else None,
        mask=is_there if mask else None,
        recurrent_dropout=recurrent_dropout,
        zoneout=(zoneout[0], zoneout[1] if lstm else 0.0),
        coupled=coupled and lstm,
        grad_cells=normal(T, B, directions * H) if cells and lstm else None,
        lengths=lengths,
        h=states[0] if with_state else None,
        c=states[1] if with_state and cell == "lstm" else None,
        weights=weights,
        grad_y=normal(T, B, directions * R),
        grad_h=states[2],
        grad_c=states[3] if cell == "lstm" else None,
    )


def layer_for(problem: Problem, **more: Any) -> Any:
    if problem.cell == "lstm":
        more |= {"peephole": problem.peephole, "coupled": problem.coupled}
        more |= {"zoneout": problem.zoneout, "proj_size": problem.proj_size}
    else:
        more |= {"zoneout": problem.zoneout[0]}
    if problem.layer_norm:
        more |= {"layer_norm": True}
    layer = make_layer(
        problem.cell,
        problem.x.shape[2],
        problem.grad_h.shape[2] if problem.grad_c is None else problem.grad_c.shape[2],
        problem.num_layers,
        bias="bias_ih_l0" in problem.weights,
        bidirectional=problem.directions == 2,
        dropout=problem.dropout,
        recurrent_dropout=problem.recurrent_dropout,
        learn_initial_state=problem.learned,
        dtype=problem.x.dtype.name,
        **more,
    )
    load_weights(layer, problem.weights)
    return layer


def run_library(problem: Problem, layer: Any = None) -> Results:
    layer = layer_for(problem) if layer is None else layer
    with_cells = problem.grad_cells is not None
    y, state, tape, *cells = layer.forward(
        problem.x,
        problem.state(),
        lengths=problem.lengths,
        resets=problem.resets,
        mask=problem.mask,
        return_cells=with_cells,
        seed=problem.seed,
    )
    grads = layer.backward(
        tape, problem.grad_y, problem.grad_state(), grad_cells=problem.grad_cells
    )
    return {
        **({"cells": cells[0]} if with_cells else {}),
        "y": y,
        **named_state("", state),
        "grad_x": grads.x,
        **named_state("grad_", grads.state),
        **{f"grad_{name}": value for name, value in grads.weights.items()},
    }


def run_reference(run: Run, problem: Problem) -> Results:
    """The same, row by row in float64 from the problem's own (perhaps rounded) numbers."""
    p = problem.astype("float64")
    T, B, _ = p.x.shape
    R, K, D = p.grad_h.shape[2], len(p.suffixes()), p.directions
    H = R if p.grad_c is None else p.grad_c.shape[2]
    lstm = p.cell == "lstm"
    results: Results = {
        "y": np.zeros((T, B, D * R)),
        "h": np.zeros((K, B, R)),
        "grad_x": np.zeros_like(p.x),
        "grad_h": np.zeros((K, B, R)),
        **{f"grad_{name}": np.zeros_like(value) for name, value in p.weights.items()},
    }
    if lstm:
        results |= {"c": np.zeros((K, B, H)), "grad_c": np.zeros((K, B, H))}

    if p.grad_cells is not None:
        results["cells"] = np.zeros((T, B, D * H))

    def start(name: str, given: Array | None, k: int, b: int) -> Array:
        if given is not None:
            return given[k, b : b + 1]
        learned = p.weights.get(f"{name}{p.suffixes()[k]}")
        zeros = np.zeros((1, R if name == "h0" else H))
        return zeros if learned is None else learned[None]

    for b in range(B):
        n = T if p.lengths is None else int(p.lengths[b])

        def drawn(draw: int, k: int, rate: float, steps: range, n: int = R, b: int = b) -> Array:
            return keeps(p.seed, draw, k, rate, steps, [b], n)

        def inside(k: int, n: int = n, b: int = b) -> dict[str, Any]:
            """What the steps of one layer and direction are besides its cell."""
            order = slice(None, None, -1 if k % D else 1)
            found: dict[str, Any] = {"peephole": p.weights.get(f"weight_peephole{p.suffixes()[k]}")}
            for name, short in MORE_KINDS.items():
                found[short] = p.weights.get(f"{name}{p.suffixes()[k]}")
            if p.resets is not None:
                marks = p.resets[:n, b : b + 1]
                if k % D:
                    marks = np.concatenate([marks[1:], np.zeros((min(n, 1), 1), bool)])
                found["resets"] = np.ascontiguousarray(marks[order])
                for name in ("h", "c") if lstm else ("h",):
                    found[f"restart_{name}"] = p.weights.get(f"{name}0{p.suffixes()[k]}")
            if p.mask is not None:
                found["mask"] = np.ascontiguousarray(p.mask[:n, b : b + 1][order])
            if p.recurrent_dropout > 0.0:
                rate = p.recurrent_dropout
                found["recurrent_mask"] = drawn(RECURRENT_DROPOUT, k, rate, range(1))[0] / (
                    1 - rate
                )
            for name, draw, rate in zip("hc", (ZONEOUT_H, ZONEOUT_C), p.zoneout, strict=True):
                if rate > 0.0:
                    kept = drawn(draw, k, 1 - rate, range(n), R if name == "h" else H).astype(float)
                    found[f"keep_{name}"] = np.ascontiguousarray(kept[order])
            return found

        def run_one(
            k: int, x: Array, grad_y: Array | None, grad_cells: Array | None = None, b: int = b
        ) -> Any:
            names = (f"{kind}{p.suffixes()[k]}" for kind in ("weight_ih", "weight_hh"))
            biases = (f"{kind}{p.suffixes()[k]}" for kind in ("bias_ih", "bias_hh"))
            order = slice(None, None, -1 if k % D else 1)
            part = run(
                "lstm_coupled" if p.coupled else p.cell,
                np.ascontiguousarray(x[order]),
                np.ascontiguousarray(start("h0", p.h, k, b)),
                np.ascontiguousarray(start("c0", p.c, k, b)) if lstm else None,
                *(p.weights[name] for name in names),
                *(p.weights.get(name) for name in biases),
                None if grad_y is None else np.ascontiguousarray(grad_y[order]),
                None if grad_y is None else np.ascontiguousarray(p.grad_h[k, b : b + 1]),
                None
                if grad_y is None or not lstm
                else np.ascontiguousarray(p.grad_c[k, b : b + 1]),
                grad_cells=None if grad_cells is None else np.ascontiguousarray(grad_cells[order]),
                **inside(k),
            )
            turned = ("y", "grad_x", "cells") if lstm else ("y", "grad_x")
            return {**part, **{name: part[name][order] for name in turned}}

        masks = []
        for layer in range(p.num_layers - 1):
            kept = keeps(p.seed, DROPOUT, layer, min(p.dropout, 0.9), range(n), [b], D * R)
            scale = 0.0 if p.dropout == 1.0 else 1.0 / (1.0 - p.dropout)
            masks.append(kept * scale if p.dropout > 0.0 else np.ones((n, 1, D * R)))
        inputs = [p.x[:n, b : b + 1]]
        for layer in range(p.num_layers):
            runs = [run_one(layer * D + d, inputs[-1], None) for d in range(D)]
            y = np.concatenate([part["y"] for part in runs], -1)
            if layer == p.num_layers - 1 and p.grad_cells is not None:
                results["cells"][:n, b] = np.concatenate([part["cells"] for part in runs], -1)[:, 0]
            inputs.append(y * masks[layer] if layer < p.num_layers - 1 else y)
        results["y"][:n, b] = inputs[-1][:, 0]
        grad = p.grad_y[:n, b : b + 1]
        for layer in reversed(range(p.num_layers)):
            if layer < p.num_layers - 1:
                grad = grad * masks[layer]
            below = 0.0
            for d in range(D):
                k = layer * D + d
                grad_cells = None
                if layer == p.num_layers - 1 and p.grad_cells is not None:
                    grad_cells = p.grad_cells[:n, b : b + 1, d * H : (d + 1) * H]
                own_grad = grad[..., d * R : (d + 1) * R]
                part = run_one(k, inputs[layer], own_grad, grad_cells)
                below = below + part["grad_x"]
                for ours, theirs in (("h", "h"), ("c", "c")) if lstm else (("h", "h"),):
                    results[ours][k, b] = part[theirs][0]
                    results[f"grad_{ours}"][k, b] = part[f"grad_{theirs}0"][0]
                    if p.learned and p.h is None:
                        results[f"grad_{ours}0{p.suffixes()[k]}"] += part[f"grad_{theirs}0"][0]
                    if p.learned:
                        results[f"grad_{ours}0{p.suffixes()[k]}"] += part[f"grad_restart_{ours}"]
                for name, short in {
                    "weight_ih": "w_ih",
                    "weight_hh": "w_hh",
                    "bias_ih": "b_ih",
                    "bias_hh": "b_hh",
                    "weight_peephole": "peephole",
                    **MORE_KINDS,
                }.items():
                    if f"{name}{p.suffixes()[k]}" in p.weights:
                        results[f"grad_{name}{p.suffixes()[k]}"] += part[f"grad_{short}"]
            grad = below
        results["grad_x"][:n, b] = grad[:, 0]
    return results
