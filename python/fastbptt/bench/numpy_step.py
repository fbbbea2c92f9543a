"""The training step in plain NumPy, as a careful user would write it.

What does not depend on the step before is one product over all steps: the input's share of the
gates, dL/dx and the weights' gradients. Inside the loop, one product a step.
"""

from __future__ import annotations

import numpy as np

from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_data, make_layer


class NumpyStep:
    """Backpropagation through time, written out.

    NumPy's threads are those of its BLAS, and of the environment it was imported in.
    """

    def __init__(self, problem: Problem, dtype: str, threads: int) -> None:
        self.step = {"rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "lstm": lstm, "gru": gru}[
            problem.cell
        ]
        self.weights = list(make_layer(problem, dtype).weights.values())
        self.x, self.grad_y = make_data(problem, dtype)

    def run(self) -> list[Array]:
        """See `TrainingStep`."""
        return self.step(self.x, self.grad_y, *self.weights)


def rnn_tanh(
    x: Array, grad_y: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array
) -> list[Array]:
    """`h = tanh(W_ih x + b_ih + W_hh h' + b_hh)`."""
    T, B, H = grad_y.shape
    sums = _input_product(x, w_ih, b_ih + b_hh)
    h = np.zeros((T + 1, B, H), x.dtype)
    for t in range(T):
        np.tanh(sums[t] + h[t] @ w_hh.T, out=h[t + 1])

    grad_sums = sums
    grad_h = np.zeros((B, H), x.dtype)
    for t in reversed(range(T)):
        grad_sums[t] = (grad_h + grad_y[t]) * (1 - h[t + 1] ** 2)
        grad_h = grad_sums[t] @ w_hh
    return [h[1:], *_gradients(x, h, w_ih, grad_sums, grad_sums)]


def rnn_relu(
    x: Array, grad_y: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array
) -> list[Array]:
    """`h = max(0, W_ih x + b_ih + W_hh h' + b_hh)`."""
    T, B, H = grad_y.shape
    sums = _input_product(x, w_ih, b_ih + b_hh)
    h = np.zeros((T + 1, B, H), x.dtype)
    for t in range(T):
        np.maximum(sums[t] + h[t] @ w_hh.T, 0, out=h[t + 1])

    grad_sums = sums
    grad_h = np.zeros((B, H), x.dtype)
    for t in reversed(range(T)):
        grad_sums[t] = (grad_h + grad_y[t]) * (h[t + 1] > 0)
        grad_h = grad_sums[t] @ w_hh
    return [h[1:], *_gradients(x, h, w_ih, grad_sums, grad_sums)]


def lstm(
    x: Array, grad_y: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array
) -> list[Array]:
    """`c = f*c' + i*g`, `h = o*tanh(c)`; i, f, g, o side by side in `gates`."""
    T, B, H = grad_y.shape
    i, f, g, o = (slice(k * H, (k + 1) * H) for k in range(4))
    gates = _input_product(x, w_ih, b_ih + b_hh)
    h = np.zeros((T + 1, B, H), x.dtype)
    c = np.zeros((T + 1, B, H), x.dtype)
    tanh_c = np.empty((T, B, H), x.dtype)
    for t in range(T):
        a = gates[t]
        a += h[t] @ w_hh.T
        _sigmoid(a[:, : 2 * H])
        np.tanh(a[:, g], out=a[:, g])
        _sigmoid(a[:, o])
        np.multiply(a[:, f], c[t], out=c[t + 1])
        c[t + 1] += a[:, i] * a[:, g]
        np.tanh(c[t + 1], out=tanh_c[t])
        np.multiply(a[:, o], tanh_c[t], out=h[t + 1])

    grad_gates = np.empty_like(gates)
    grad_h = np.zeros((B, H), x.dtype)
    grad_c = np.zeros((B, H), x.dtype)
    for t in reversed(range(T)):
        a, da = gates[t], grad_gates[t]
        grad_h += grad_y[t]
        grad_c += grad_h * a[:, o] * (1 - tanh_c[t] ** 2)
        da[:, i] = grad_c * a[:, g] * a[:, i] * (1 - a[:, i])
        da[:, f] = grad_c * c[t] * a[:, f] * (1 - a[:, f])
        da[:, g] = grad_c * a[:, i] * (1 - a[:, g] ** 2)
        da[:, o] = grad_h * tanh_c[t] * a[:, o] * (1 - a[:, o])
        grad_c *= a[:, f]
        grad_h = da @ w_hh
    return [h[1:], *_gradients(x, h, w_ih, grad_gates, grad_gates)]


def gru(x: Array, grad_y: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> list[Array]:
    """`h = (1-z)*n + z*h'`, `n = tanh(a_n + r*u_n)`; r, z, n side by side in `gates`."""
    T, B, H = grad_y.shape
    r, z, n = (slice(k * H, (k + 1) * H) for k in range(3))
    gates = _input_product(x, w_ih, b_ih)
    h = np.zeros((T + 1, B, H), x.dtype)
    u_n = np.empty((T, B, H), x.dtype)
    for t in range(T):
        a = gates[t]
        u = h[t] @ w_hh.T
        u += b_hh
        a[:, : 2 * H] += u[:, : 2 * H]
        _sigmoid(a[:, : 2 * H])
        u_n[t] = u[:, n]
        a[:, n] += a[:, r] * u_n[t]
        np.tanh(a[:, n], out=a[:, n])
        np.subtract(h[t], a[:, n], out=h[t + 1])
        h[t + 1] *= a[:, z]
        h[t + 1] += a[:, n]

    # With respect to the input's share and to the state's share: they differ in n, by r.
    grad_a = np.empty_like(gates)
    grad_u = np.empty_like(gates)
    grad_h = np.zeros((B, H), x.dtype)
    for t in reversed(range(T)):
        a, da, du = gates[t], grad_a[t], grad_u[t]
        grad_h += grad_y[t]
        da[:, n] = grad_h * (1 - a[:, z]) * (1 - a[:, n] ** 2)
        da[:, z] = grad_h * (h[t] - a[:, n]) * a[:, z] * (1 - a[:, z])
        da[:, r] = da[:, n] * u_n[t] * a[:, r] * (1 - a[:, r])
        du[:, : 2 * H] = da[:, : 2 * H]
        np.multiply(da[:, n], a[:, r], out=du[:, n])
        grad_h *= a[:, z]
        grad_h += du @ w_hh
    return [h[1:], *_gradients(x, h, w_ih, grad_a, grad_u)]


def _sigmoid(a: Array) -> None:
    """In place; through tanh, which overflows nowhere."""
    a *= 0.5
    np.tanh(a, out=a)
    a *= 0.5
    a += 0.5


def _input_product(x: Array, w_ih: Array, bias: Array) -> Array:
    T, B, _ = x.shape
    product: Array = _rows(x) @ w_ih.T
    product += bias
    return product.reshape(T, B, -1)


def _gradients(x: Array, h: Array, w_ih: Array, grad_a: Array, grad_u: Array) -> list[Array]:
    """Gradients of x, weight_ih, weight_hh, bias_ih, bias_hh."""
    da, du = _rows(grad_a), _rows(grad_u)
    grad_b_ih = da.sum(axis=0)
    return [
        (da @ w_ih).reshape(x.shape),
        da.T @ _rows(x),
        du.T @ _rows(h[:-1]),
        grad_b_ih,
        grad_b_ih if grad_u is grad_a else du.sum(axis=0),
    ]


def _rows(a: Array) -> Array:
    """`[T, B, .]` as `[T*B, .]`."""
    return a.reshape(-1, a.shape[-1])
