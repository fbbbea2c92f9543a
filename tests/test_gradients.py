"""Outputs, states and all gradients are those of the formulas.

Against the slow float64 reference on many sizes, and against central finite differences, which
share nothing with either implementation.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from conftest import require
from reference import (
    KERNELS,
    Problem,
    assert_close,
    draw,
    layer_for,
    rounding,
    run_library,
    run_reference,
)

# Sizes T, B, I, H and the number of layers. First those that a kernel may forget, then a draw from
# products of 1 and of sizes that are no multiple of any vector or tile.
EDGES = [
    (0, 1, 1, 1, 1),
    (0, 3, 2, 5, 2),
    (1, 1, 1, 1, 1),
    (1, 1, 3, 3, 2),
    (2, 1, 1, 33, 1),
    (2, 33, 1, 1, 1),
    (1, 2, 33, 1, 1),
    (33, 1, 3, 7, 1),
    (3, 7, 31, 33, 1),
    (5, 16, 16, 32, 2),
    (4, 5, 17, 130, 1),
    (300, 3, 5, 7, 2),
    (3, 8, 5, 257, 1),  # two tiles of rows beside weights of a megabyte, with AVX-512
    (3, 6, 5, 257, 1),  # and with AVX2
]
ODD = [1, 3, 5, 7, 13, 17, 31, 33]
DRAWN = random.Random(0).sample(list(product([2, 3, 7, 13], ODD, ODD, ODD, [1, 2, 3])), 12)


@pytest.fixture
def reference_run():
    return require("fastbptt._reference").run


@pytest.mark.parametrize("sizes", EDGES + DRAWN, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", KERNELS)
def test_equals_reference(cell, dtype, sizes, rng, reference_run):
    problem = draw(rng, cell, *sizes, dtype=dtype)
    tolerance = 1e-12 if dtype == "float64" else rounding(problem)
    actual = run_library(problem)
    assert all(value.dtype == dtype for value in actual.values())
    assert_close(actual, run_reference(reference_run, problem), tolerance)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", KERNELS)
def test_without_bias(cell, dtype, num_layers, rng, reference_run):
    problem = draw(rng, cell, 7, 5, 3, 17, num_layers, bias=False, dtype=dtype)
    tolerance = 1e-12 if dtype == "float64" else rounding(problem)
    assert_close(run_library(problem), run_reference(reference_run, problem), tolerance)


@pytest.mark.parametrize("cell", KERNELS)
def test_long_chain(cell, rng, reference_run):
    problem = draw(rng, cell, 1000, 2, 3, 5, dtype="float32")
    assert_close(run_library(problem), run_reference(reference_run, problem), rounding(problem))


@pytest.mark.parametrize("cell", KERNELS)
def test_absent_state_and_gradients_are_zeros(cell, rng):
    problem = draw(rng, cell, 5, 3, 7, 13, 2)
    zeros = {
        name: np.zeros_like(getattr(problem, name))
        for name in ("h", "c", "grad_h", "grad_c")
        if getattr(problem, name) is not None
    }
    layer = layer_for(problem)

    y, state, tape = layer.forward(problem.x)
    grads = layer.backward(tape, problem.grad_y)
    expected = run_library(replace(problem, **zeros), layer)
    np.testing.assert_array_equal(y, expected["y"])
    np.testing.assert_array_equal(grads.x, expected["grad_x"])
    np.testing.assert_array_equal(grads.weights["weight_hh_l1"], expected["grad_weight_hh_l1"])
    h = state[0] if problem.c is not None else state
    np.testing.assert_array_equal(h, expected["h"])

    _, _, tape = layer.forward(problem.x, problem.state())
    grads = layer.backward(tape, grad_state=problem.grad_state())
    expected = run_library(replace(problem, grad_y=np.zeros_like(problem.grad_y)), layer)
    np.testing.assert_array_equal(grads.x, expected["grad_x"])
    np.testing.assert_array_equal(grads.weights["weight_ih_l0"], expected["grad_weight_ih_l0"])


def loss(problem: Problem) -> float:
    """The scalar whose gradients `grad_y`, `grad_h` and `grad_c` are."""
    layer = layer_for(problem)
    y, state = layer(problem.x, problem.state())
    total = float(np.vdot(problem.grad_y, y))
    if problem.c is None:
        return total + float(np.vdot(problem.grad_h, state))
    return total + float(np.vdot(problem.grad_h, state[0]) + np.vdot(problem.grad_c, state[1]))


def moved(problem: Problem, direction: dict[str, np.ndarray], step: float) -> Problem:
    arrays = {
        name: getattr(problem, name) + step * d for name, d in direction.items() if "_" not in name
    }
    weights = {
        name: w + step * direction[name] if name in direction else w
        for name, w in problem.weights.items()
    }
    return replace(problem, weights=weights, **arrays)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (5, 3, 7, 13, 1), (13, 2, 3, 17, 2)], ids=str)
@pytest.mark.parametrize("cell", KERNELS)
def test_equals_finite_differences(cell, sizes, rng):
    problem = draw(rng, cell, *sizes, relu_margin=1e-3)
    results = run_library(problem)
    names = [name for name in ("x", "h", "c") if getattr(problem, name) is not None]
    names += list(problem.weights)

    # One direction through everything, then one through each array alone.
    for moving in [names, names, *([name] for name in names)]:
        gradients = {name: results[f"grad_{name}"] for name in moving}
        direction = {name: rng.standard_normal(g.shape) for name, g in gradients.items()}
        expected = sum(float(np.vdot(gradients[name], direction[name])) for name in moving)
        length = np.sqrt(sum(float(np.vdot(d, d)) for d in direction.values()))

        def difference(step, direction=direction):
            ahead, behind = moved(problem, direction, step), moved(problem, direction, -step)
            return (loss(ahead) - loss(behind)) / (2.0 * step)

        # Richardson's step takes away the error of second order.
        step = 2e-4 / length
        measured = (4.0 * difference(step) - difference(2.0 * step)) / 3.0
        assert measured == pytest.approx(expected, rel=1e-6, abs=1e-12), moving
