"""Random problems for a stack of recurrent layers, and their results: by the library, and by the
slow float64 reference `fastbptt._reference`.

Results are flat dicts of arrays, time-major, with the names of the public API: "y", "h", "c" (the
state after the last step), "grad_x", "grad_h", "grad_c" (of the state before the first), and
"grad_weight_ih_l0" and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import fastbptt as fb

Array = NDArray[Any]
Results = dict[str, Array]

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
CELLS = list(GATES)
# And with those options that have kernels of their own.
KERNELS = [*CELLS, "lstm+projection", "lstm+layer_norm", "gru+layer_norm"]

# In the order of the reference's arguments.
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# The library's names of other parameters, and the reference's.
MORE_KINDS = {
    "weight_hr": "w_hr",
    "weight_ln_ih": "gain_ih",
    "weight_ln_hh": "gain_hh",
    "weight_ln_c": "gain_c",
    "bias_ln_c": "shift_c",
}


class Run(Protocol):
    """`fastbptt._reference.run`: one layer, float64 contiguous arrays, None for zeros."""

    def __call__(
        self,
        cell: str,
        x: Array,
        h0: Array,
        c0: Array | None,
        w_ih: Array,
        w_hh: Array,
        b_ih: Array | None,
        b_hh: Array | None,
        grad_y: Array | None,
        grad_h: Array | None,
        grad_c: Array | None,
        **more: Any,
    ) -> dict[str, Array | None]: ...


def projection_of(cell: str, hidden_size: int) -> int:
    """Return P; a single unit leaves nothing to project to."""
    return hidden_size // 2 if cell.endswith("+projection") else 0


def is_normalised(cell: str, hidden_size: int) -> bool:
    """Return whether there are enough units; two normalised values depend on their order alone."""
    return cell.endswith("+layer_norm") and hidden_size > 4


def options_of(cell: str, hidden_size: int) -> dict[str, Any]:
    proj_size = projection_of(cell, hidden_size)
    layer_norm = {"layer_norm": True} if is_normalised(cell, hidden_size) else {}
    return layer_norm | ({"proj_size": proj_size} if proj_size else {})


def make_layer(cell: str, input_size: int, hidden_size: int, num_layers: int = 1, **options):
    options |= options_of(cell, hidden_size)
    cell = cell.partition("+")[0]
    if cell.startswith("rnn"):
        return fb.RNN(input_size, hidden_size, num_layers, nonlinearity=cell[4:], **options)
    if cell == "lstm":
        return fb.LSTM(input_size, hidden_size, num_layers, **options)
    return fb.GRU(input_size, hidden_size, num_layers, reset_after=cell == "gru", **options)


@dataclass(frozen=True)
class Problem:
    """A stack, its input, and the error of its results; all arrays of one dtype.

    x `[T, B, I]`, h and c `[L, B, H]` (c None but for the LSTM), weights by name, and the gradients
    grad_y `[T, B, H]`, grad_h and grad_c `[L, B, H]`; with a projection h and y have P for H.
    """

    cell: str
    num_layers: int
    x: Array
    h: Array
    c: Array | None
    weights: dict[str, Array]
    grad_y: Array
    grad_h: Array
    grad_c: Array | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.x.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, B, I, H."""
        return (
            *self.x.shape,
            len(self.weights["weight_hh_l0"]) // GATES[self.cell.partition("+")[0]],
        )

    @property
    def bias(self) -> bool:
        return "bias_ih_l0" in self.weights

    def state(self) -> Array | tuple[Array, Array]:
        return self.h if self.c is None else (self.h, self.c)

    def grad_state(self) -> Array | tuple[Array, Array]:
        return self.grad_h if self.grad_c is None else (self.grad_h, self.grad_c)

    def layer_weights(self, layer: int) -> list[Array | None]:
        names = (f"{kind}_l{layer}" for kind in KINDS)
        return [self.weights.get(name) for name in names]

    def astype(self, dtype: str) -> Problem:
        def cast(value: Array | None) -> Array | None:
            return None if value is None else value.astype(dtype)

        return replace(
            self,
            weights={name: w.astype(dtype) for name, w in self.weights.items()},
            **{name: cast(getattr(self, name)) for name in ARRAYS},
        )


ARRAYS = ("x", "h", "c", "grad_y", "grad_h", "grad_c")


def draw(
    rng: np.random.Generator,
    cell: str,
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    num_layers: int = 1,
    *,
    bias: bool = True,
    dtype: str = "float64",
    relu_margin: float = 1e-5,
) -> Problem:
    """A random problem: inputs N(0, 1), weights as PyTorch draws them.

    At the kink of the relu a rounding error decides whether an error passes, and no tolerance is
    right; so no sum that goes into a relu is nearer to zero than `relu_margin`.
    """
    G, P = GATES[cell.partition("+")[0]], projection_of(cell, H)
    R, has_c = P or H, cell.startswith("lstm")
    if is_normalised(cell, H):
        I = max(I, 3)  # noqa: E741  # the size of one input alone does not get through
    bound = 1.0 / np.sqrt(H)
    while True:

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(dtype)

        weights: dict[str, Array] = {}
        for layer in range(num_layers):
            shapes = {"weight_ih": (G * H, R if layer else I), "weight_hh": (G * H, R)}
            if bias:
                shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)}
            if P:
                shapes |= {"weight_hr": (P, H)}
            if is_normalised(cell, H):
                shapes |= {"weight_ln_ih": (G * H,), "weight_ln_hh": (G * H,)}
                shapes |= {"weight_ln_c": (H,)} if has_c else {}
                shapes |= {"bias_ln_c": (H,)} if has_c and bias else {}
            for kind, shape in shapes.items():
                drawn = rng.uniform(-bound, bound, shape) + kind.startswith("weight_ln")
                weights[f"{kind}_l{layer}"] = drawn.astype(dtype)
        states = [normal(num_layers, B, R) for _ in range(2)]
        states += [normal(num_layers, B, H) for _ in range(2 if has_c else 0)]
        problem = Problem(
            cell=cell,
            num_layers=num_layers,
            x=normal(T, B, I),
            h=states[0],
            grad_h=states[1],
            c=states[2] if has_c else None,
            grad_c=states[3] if has_c else None,
            weights=weights,
            grad_y=normal(T, B, R),
        )
        if cell != "rnn_relu" or _distance_from_kink(problem) >= relu_margin:
            return problem


def _distance_from_kink(problem: Problem) -> float:
    problem = problem.astype("float64")
    nearest = np.inf
    below = list(problem.x)
    for layer in range(problem.num_layers):
        w_ih, w_hh, b_ih, b_hh = problem.layer_weights(layer)
        h = problem.h[layer]
        for t, x in enumerate(below):
            s = x @ w_ih.T + h @ w_hh.T
            if b_ih is not None:
                s += b_ih + b_hh
            nearest = min(nearest, np.abs(s).min())
            h = np.maximum(s, 0.0)
            below[t] = h
    return nearest


def load_weights(layer, weights: dict[str, Array]) -> None:
    assert set(layer.weights) == set(weights)
    for name, value in weights.items():
        layer.weights[name][...] = value


def layer_for(problem: Problem, **options):
    """A layer of the library with the problem's sizes, dtype and weights."""
    _, _, input_size, hidden_size = problem.sizes
    layer = make_layer(
        problem.cell,
        input_size,
        hidden_size,
        problem.num_layers,
        bias=problem.bias,
        dtype=problem.dtype.name,
        **options,
    )
    load_weights(layer, problem.weights)
    return layer


def named_state(prefix: str, state: Array | tuple[Array, Array]) -> Results:
    if isinstance(state, tuple):
        return {f"{prefix}h": state[0], f"{prefix}c": state[1]}
    return {f"{prefix}h": state}


def run_library(problem: Problem, layer: Any = None) -> Results:
    """Forward and backward of `layer` (or a new one) in one piece."""
    layer = layer_for(problem) if layer is None else layer
    y, state, tape = layer.forward(problem.x, problem.state())
    grads = layer.backward(tape, problem.grad_y, problem.grad_state())
    return {
        "y": y,
        **named_state("", state),
        "grad_x": grads.x,
        **named_state("grad_", grads.state),
        **{f"grad_{name}": value for name, value in grads.weights.items()},
    }


def run_reference(run: Run, problem: Problem) -> Results:
    """The same by the reference, in float64 from the problem's own (perhaps rounded) numbers."""
    problem = problem.astype("float64")

    def layer_run(layer: int, x: Array, grad_y: Array | None, grad_states: bool) -> Any:
        c, grad_h, grad_c = problem.c, problem.grad_h, problem.grad_c
        return run(
            problem.cell.partition("+")[0],
            np.ascontiguousarray(x),
            problem.h[layer],
            None if c is None else c[layer],
            *problem.layer_weights(layer),
            grad_y,
            grad_h[layer] if grad_states else None,
            grad_c[layer] if grad_states and grad_c is not None else None,
            **{
                short: problem.weights.get(f"{name}_l{layer}") for name, short in MORE_KINDS.items()
            },
        )

    inputs = [problem.x]
    for layer in range(problem.num_layers - 1):
        inputs.append(layer_run(layer, inputs[-1], None, False)["y"])
    grad_y = problem.grad_y
    parts = []
    for layer in reversed(range(problem.num_layers)):
        parts.insert(0, layer_run(layer, inputs[layer], grad_y, True))
        grad_y = parts[0]["grad_x"]

    results: Results = {"y": parts[-1]["y"], "grad_x": grad_y}
    for ours, theirs in {"h": "h", "c": "c", "grad_h": "grad_h0", "grad_c": "grad_c0"}.items():
        if parts[0][theirs] is not None:
            results[ours] = np.stack([part[theirs] for part in parts])
    for layer, part in enumerate(parts):
        shorts = dict(zip(KINDS, ("w_ih", "w_hh", "b_ih", "b_hh"), strict=True))
        for kind, short in (shorts | MORE_KINDS).items():
            if f"{kind}_l{layer}" in problem.weights:
                results[f"grad_{kind}_l{layer}"] = part[f"grad_{short}"]
    return results


def rounding(problem: Problem) -> float:
    """A bound on the relative rounding error of a result, from the size of the problem.

    A sum of n products has an error that grows like sqrt(n) units in the last place where the
    roundings are independent; the longest sums run over I + H in every layer and over T * B in the
    weight gradients, and each step hands its error on to the next. The factor leaves room for
    activations that are some units off and for sums that cancel; a normalised value and its
    gradient are what is left of larger ones, a unit as wide as theirs.
    """
    T, B, I, H = problem.sizes  # noqa: E741
    longest = problem.num_layers * (I + H) + T * B
    factor = 64.0 if is_normalised(problem.cell, H) else 16.0
    return factor * float(np.finfo(problem.dtype).eps) * np.sqrt(longest)


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Every array within `tolerance` of the largest magnitude in the expected one."""
    assert set(actual) == set(expected)
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if want.size:
            error = np.abs(got.astype("float64") - want).max()
            limit = tolerance * np.abs(want).max()
            assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
