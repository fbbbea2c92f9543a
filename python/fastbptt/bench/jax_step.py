"""The training step in JAX: `lax.scan` over the steps, its vector-Jacobian product, one jit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_data, make_layer


class JaxStep:
    """Compiled when it is made, so that `run` only runs.

    JAX has no call that sets its threads; they are those of the environment it was imported in.
    """

    def __init__(self, problem: Problem, dtype: str, threads: int) -> None:
        jax: Any = importlib.import_module("jax")
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        layer = _layer(jax, problem)

        def step(weights: list[Any], x: Any, grad_y: Any) -> list[Any]:
            y, reverse = jax.vjp(layer, weights, x)
            grad_weights, grad_x = reverse(grad_y)
            return [y, grad_x, *grad_weights]

        weights = list(make_layer(problem, dtype).weights.values())
        self.inputs = jax.device_put((weights, *make_data(problem, dtype)))
        self.step = jax.jit(step).lower(*self.inputs).compile()

    def run(self) -> list[Array]:
        """See `TrainingStep`."""
        return [np.asarray(result) for result in self.step(*self.inputs)]


def _layer(jax: Any, problem: Problem) -> Callable[[list[Any], Any], Any]:
    jnp, sigmoid, H = jax.numpy, jax.nn.sigmoid, problem.H
    activation = jax.nn.relu if problem.nonlinearity == "relu" else jnp.tanh

    def rnn(h: Any, a: Any, u: Any) -> tuple[Any, Any]:
        h = activation(a + u)
        return h, h

    def lstm(state: Any, a: Any, u: Any) -> tuple[Any, Any]:
        i, f, g, o = jnp.split(a + u, 4, axis=1)
        c = sigmoid(f) * state[1] + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(h: Any, a: Any, u: Any) -> tuple[Any, Any]:
        r = sigmoid(a[:, :H] + u[:, :H])
        z = sigmoid(a[:, H : 2 * H] + u[:, H : 2 * H])
        n = jnp.tanh(a[:, 2 * H :] + r * u[:, 2 * H :])
        h = (1 - z) * n + z * h
        return h, h

    cell = {"rnn": rnn, "lstm": lstm, "gru": gru}[problem.kind]

    def layer(weights: list[Any], x: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh = weights

        def one(state: Any, a: Any) -> tuple[Any, Any]:
            h = state[0] if problem.kind == "lstm" else state
            return cell(state, a, h @ w_hh.T + b_hh)

        zeros = jnp.zeros((problem.B, H), x.dtype)
        first = (zeros, zeros) if problem.kind == "lstm" else zeros
        # The input's product for all steps at once, before the loop.
        return jax.lax.scan(one, first, x @ w_ih.T + b_ih)[1]

    return layer
