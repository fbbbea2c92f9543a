"""Directions, lengths, dropout between layers and learned initial states, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
import options
from reference import CELLS, assert_close

_reference = pytest.importorskip(
    "fastbptt._reference", reason="the reference is built with -DFASTBPTT_TESTS=ON"
)


def draw_any(rng, cell, dtype="float64", **fixed):
    """A problem with any of the options; no kink of a relu is near where only smooth ones are."""
    chosen = {
        "num_layers": int(rng.integers(1, 4)),
        "directions": int(rng.integers(1, 3)),
        "dropout": float(rng.choice([0.0, 0.3, 0.5])),
        "learned": bool(rng.random() < 0.4),
        "ragged": bool(rng.random() < 0.6),
        "with_state": bool(rng.random() < 0.6),
        "bias": bool(rng.random() < 0.8),
        "dtype": dtype,
    }
    sizes = (
        int(rng.choice([1, 2, 5, 12, 40])),
        int(rng.choice([1, 2, 3, 7, 13])),
        int(rng.integers(1, 9)),
        int(rng.choice([1, 3, 8, 17, 33])),
    )
    return options.draw(rng, cell, sizes, **{**chosen, **fixed})


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = fb.get_num_threads()
    fb.set_num_threads(request.param)
    yield request.param
    fb.set_num_threads(before)


SMOOTH = [cell for cell in CELLS if cell != "rnn_relu"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cell", SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_and_gradients_are_those_of_the_reference(cell, dtype, seed, threads):
    rng = np.random.default_rng([seed, SMOOTH.index(cell)])
    problem = draw_any(rng, cell, dtype)
    expected = options.run_reference(_reference.run, problem)
    assert_close(options.run_library(problem), expected, problem.rounding())


@pytest.mark.parametrize("batch_first", [False, True])
def test_strided_and_read_only_input_with_lengths(batch_first):
    rng = np.random.default_rng(0)
    problem = draw_any(rng, "lstm", directions=2, ragged=True, num_layers=2)
    expected = options.run_library(problem)
    layer = options.layer_for(problem, batch_first=batch_first)
    wide = np.repeat(problem.x, 2, axis=1)[:, ::2]
    x = wide.swapaxes(0, 1) if batch_first else wide
    x.flags.writeable = False
    grad_y = problem.grad_y.swapaxes(0, 1) if batch_first else problem.grad_y
    y, state, tape = layer.forward(x, problem.state(), lengths=problem.lengths, seed=problem.seed)
    grads = layer.backward(tape, grad_y, problem.grad_state())
    as_ours = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
    np.testing.assert_array_equal(as_ours(y), expected["y"])
    np.testing.assert_array_equal(as_ours(grads.x), expected["grad_x"])
    np.testing.assert_array_equal(state[0], expected["h"])
