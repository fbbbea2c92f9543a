"""The gradients of the gates of a layer, at many steps at once.

Where dL/dh and dL/dc are known at every step, nothing couples the steps any more: what is left is
the inner derivative of each cell, element by element. With `a = W_ih x + b_ih` and
`u = W_hh h' + b_hh` (h' and c' are those of the step before), a step adds to the gradients of the
parameters the products `dL/da^T x`, `dL/du^T h'` and the sums of dL/da and dL/du over the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastbptt import _core
from fastbptt._arrays import Array

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")


@dataclass(frozen=True)
class Steps:
    """Steps of one layer: what went in, and what came out.

    Attributes
    ----------
    x, h_before, h : ndarray
        `[n, B, I]` and `[n, B, H]`; `h_before` is what each step began with.
    c_before, c : ndarray or None
        The same of the cell state, `[n, B, H]`.
    """

    x: Array
    h_before: Array
    h: Array
    c_before: Array | None = None
    c: Array | None = None


@dataclass(frozen=True)
class Weights:
    """The parameters of one layer, the biases None if it has none."""

    ih: Array
    hh: Array
    bias_ih: Array | None
    bias_hh: Array | None


class Errors(NamedTuple):
    """What one step hands to the parameters, each `[n, B, .]`.

    Attributes
    ----------
    cell : ndarray or None
        dL/dc, by way of h too.
    ih, hh : ndarray
        dL/da and dL/du, `[n, B, G*H]`.
    inputs : tuple of (slice, ndarray)
        For rows of `W_hh`: what they are multiplied by.
    """

    cell: Array | None
    ih: Array
    hh: Array
    inputs: tuple[tuple[slice, Array], ...]


def gate_gradients(
    cell: str, weights: Weights, steps: Steps, grad_h: Array, grad_c: Array | None
) -> Errors:
    """Return the gradients of the gates.

    Parameters
    ----------
    cell : {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"}
    weights : Weights
    steps : Steps
    grad_h : ndarray
        dL/dh of each step, all ways counted, `[n, B, H]`.
    grad_c : ndarray or None
        For an LSTM what the next step gives to dL/dc, `[n, B, H]`.
    """
    if cell == "lstm":
        assert grad_c is not None
        return _lstm(weights, steps, grad_h, grad_c)
    if cell == "gru":
        return _gru(weights, steps, grad_h)
    if cell == "gru_reset_before":
        return _gru_reset_before(weights, steps, grad_h)
    grad = grad_h * (1 - steps.h**2) if cell == "rnn_tanh" else np.where(steps.h > 0, grad_h, 0)
    return Errors(None, grad, grad, ((slice(None), steps.h_before),))


def _lstm(weights: Weights, steps: Steps, grad_h: Array, grad_c: Array) -> Errors:
    assert steps.c is not None
    assert steps.c_before is not None
    sums = _from_x(weights, steps) + _from_h(weights, steps)
    i, f, g, o = np.split(sums, 4, axis=2)
    i, f, g, o = _logistic(i), _logistic(f), np.tanh(g), _logistic(o)
    squashed = np.tanh(steps.c)
    grad_c = grad_c + grad_h * o * (1 - squashed**2)
    grad = [
        grad_c * g * i * (1 - i),
        grad_c * steps.c_before * f * (1 - f),
        grad_c * i * (1 - g**2),
        grad_h * squashed * o * (1 - o),
    ]
    both = np.concatenate(grad, axis=2)
    return Errors(grad_c, both, both, ((slice(None), steps.h_before),))


def _gru(weights: Weights, steps: Steps, grad_h: Array) -> Errors:
    H = grad_h.shape[2]
    a, u = _from_x(weights, steps), _from_h(weights, steps)
    r, z = np.split(_logistic(a[..., : 2 * H] + u[..., : 2 * H]), 2, axis=2)
    u_n = u[..., 2 * H :]
    n = np.tanh(a[..., 2 * H :] + r * u_n)
    grad_n = grad_h * (1 - z) * (1 - n**2)
    grad_z = grad_h * (steps.h_before - n) * z * (1 - z)
    grad_r = grad_n * u_n * r * (1 - r)
    return Errors(
        None,
        np.concatenate([grad_r, grad_z, grad_n], axis=2),
        np.concatenate([grad_r, grad_z, grad_n * r], axis=2),
        ((slice(None), steps.h_before),),
    )


def _gru_reset_before(weights: Weights, steps: Steps, grad_h: Array) -> Errors:
    H = grad_h.shape[2]
    gates, new = slice(0, 2 * H), slice(2 * H, 3 * H)
    a, u = _from_x(weights, steps), _from_h(weights, steps, gates)
    r, z = np.split(_logistic(a[..., gates] + u), 2, axis=2)
    kept = r * steps.h_before
    n = np.tanh(a[..., new] + _map(kept, weights.hh, weights.bias_hh, new))
    grad_n = grad_h * (1 - z) * (1 - n**2)
    grad_z = grad_h * (steps.h_before - n) * z * (1 - z)
    grad_r = (grad_n @ weights.hh[new]) * steps.h_before * r * (1 - r)
    grad = np.concatenate([grad_r, grad_z, grad_n], axis=2)
    return Errors(None, grad, grad, ((gates, steps.h_before), (new, kept)))


def _from_x(weights: Weights, steps: Steps) -> Array:
    return _map(steps.x, weights.ih, weights.bias_ih)


def _from_h(weights: Weights, steps: Steps, rows: slice = slice(None)) -> Array:
    return _map(steps.h_before, weights.hh, weights.bias_hh, rows)


def _map(x: Array, weight: Array, bias: Array | None, rows: slice = slice(None)) -> Array:
    return _core.linear(x, weight[rows], None if bias is None else bias[rows])


def _logistic(array: Array) -> Array:
    # By the tanh: an exponential could overflow.
    half = array.dtype.type(0.5)
    return np.asarray(half + half * np.tanh(half * array))
