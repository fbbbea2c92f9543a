"""Numbers that carry how far off they may be, and the way back of the gated cells in them.

`Bounded` is the running error analysis of Wilkinson: each value has a bound of its absolute error,
and every operation keeps it, whatever the signs of the errors are. So what comes out of the
formulas of a gradient is a bound for every element of it, from nothing but how each number that
goes in was rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNIT = 2.0**-8  # of bfloat16: half of the distance of its numbers, relative to them


class Bounded:
    """A float64 array, and a bound of the absolute error of each element."""

    def __init__(self, value: Array, error: Array | float = 0.0) -> None:
        self.value, self.error = value, np.broadcast_to(error, value.shape)

    @classmethod
    def rounded(cls, value: Array) -> Bounded:
        return cls(value, np.abs(value) * UNIT)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = np.abs(self.value) * other.error + self.error * np.abs(other.value)
        return Bounded(self.value * other.value, error + self.error * other.error)

    def __matmul__(self, exact: Array) -> Bounded:
        return Bounded(self.value @ exact, self.error @ np.abs(exact))

    def outer(self, exact: Array) -> Bounded:
        """Return the sum over the rows of this times those of an exact array."""
        return Bounded(self.value.T @ exact, self.error.T @ np.abs(exact))


def _logistic(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


class _Kept:
    """A gate or a tanh as the tape has it: what it is from 0 and what is left to 1 are rounded."""

    def __init__(self, value: Array) -> None:
        self.itself = Bounded.rounded(value)
        self.rest = Bounded.rounded(1.0 - np.abs(value))
        # 1 - value^2 as (1 - |value|) (1 + |value|)
        self.slope = self.rest * Bounded(1.0 + np.abs(value), np.abs(value) * UNIT)


def lstm(
    x: Array, w_ih: Array, w_hh: Array, grad_y: Array, y: Array | None = None
) -> dict[str, Bounded]:
    """Return the gradients of an LSTM without biases over x `[T, B, I]`, from zeros.

    With y, `[T, B, H]`, that is what each step sees of the one before, whatever the formulas give.
    """
    T, B, _ = x.shape
    H = w_hh.shape[1]
    h = [np.zeros((B, H))]
    c = [np.zeros((B, H))]
    gates = []
    for t in range(T):
        i, f, g, o = np.split(x[t] @ w_ih.T + h[-1] @ w_hh.T, 4, axis=-1)
        i, f, g, o = _logistic(i), _logistic(f), np.tanh(g), _logistic(o)
        gates.append((i, f, g, o))
        c.append(f * c[-1] + i * g)
        h.append(o * np.tanh(c[-1]) if y is None else y[t])
    grad_h, grad_c = Bounded(np.zeros((B, H))), Bounded(np.zeros((B, H)))
    grads = {name: Bounded(np.zeros_like(w)) for name, w in (("w_ih", w_ih), ("w_hh", w_hh))}
    grad_x = []
    for t in reversed(range(T)):
        i, f, g, o = map(_Kept, gates[t])
        before, tanh_c = Bounded.rounded(c[t]), np.tanh(c[t + 1])
        off = np.abs(c[t + 1]) * UNIT  # tanh moves by no more, and its slope by twice that
        t_c = Bounded(tanh_c, off)
        slope_c = Bounded(1.0 - tanh_c**2, 2.0 * off)
        grad_h = grad_h + Bounded(grad_y[t])
        through_o = grad_h * o.itself
        grad_c = grad_c + through_o * slope_c
        sums = [
            grad_c * g.itself * i.itself * i.rest,
            grad_c * before * f.itself * f.rest,
            grad_c * i.itself * g.slope,
            through_o * t_c * o.rest,
        ]
        grad_c = grad_c * f.itself
        grad_h = _put(grads, grad_x, sums, sums, x[t], h[t], w_ih, w_hh)
    return _named(grads, grad_x)


def gru(
    x: Array, w_ih: Array, w_hh: Array, grad_y: Array, y: Array | None = None
) -> dict[str, Bounded]:
    """The same of a GRU that resets after the product."""
    T, B, _ = x.shape
    H = w_hh.shape[1]
    h = [np.zeros((B, H))]
    gates = []
    for t in range(T):
        a_r, a_z, a_n = np.split(x[t] @ w_ih.T, 3, axis=-1)
        u_r, u_z, u_n = np.split(h[-1] @ w_hh.T, 3, axis=-1)
        r, z = _logistic(a_r + u_r), _logistic(a_z + u_z)
        n = np.tanh(a_n + r * u_n)
        gates.append((r, z, n, u_n))
        h.append((1.0 - z) * n + z * h[-1] if y is None else y[t])
    grad_h = Bounded(np.zeros((B, H)))
    grads = {name: Bounded(np.zeros_like(w)) for name, w in (("w_ih", w_ih), ("w_hh", w_hh))}
    grad_x = []
    for t in reversed(range(T)):
        r, z, n = map(_Kept, gates[t][:3])
        u_n = Bounded.rounded(gates[t][3])
        grad_h = grad_h + Bounded(grad_y[t])
        through_z = grad_h * z.itself
        grad_n = grad_h * z.rest * n.slope
        grad_u = grad_n * r.itself
        grad_r = grad_u * u_n * r.rest
        grad_z = through_z * (Bounded(h[t]) - n.itself) * z.rest
        inputs, recurrent = [grad_r, grad_z, grad_n], [grad_r, grad_z, grad_u]
        grad_h = through_z + _put(grads, grad_x, inputs, recurrent, x[t], h[t], w_ih, w_hh)
    return _named(grads, grad_x)


def _put(
    grads: dict[str, Bounded],
    grad_x: list[Bounded],
    inputs: list[Bounded],
    recurrent: list[Bounded],
    x: Array,
    h: Array,
    w_ih: Array,
    w_hh: Array,
) -> Bounded:
    """Take the gradients of the sums of a step to x and the weights; return that of h before it."""
    of_x, of_h = (
        Bounded(np.hstack([s.value for s in sums]), np.hstack([s.error for s in sums]))
        for sums in (inputs, recurrent)
    )
    grad_x.insert(0, of_x @ w_ih)
    grads["w_ih"] = grads["w_ih"] + of_x.outer(x)
    grads["w_hh"] = grads["w_hh"] + of_h.outer(h)
    return of_h @ w_hh


def _named(grads: dict[str, Bounded], grad_x: list[Bounded]) -> dict[str, Bounded]:
    every = Bounded(
        np.stack([part.value for part in grad_x]), np.stack([part.error for part in grad_x])
    )
    return {"weight_ih_l0": grads["w_ih"], "weight_hh_l0": grads["w_hh"], "x": every}
