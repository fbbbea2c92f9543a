"""What must hold for every problem; hypothesis looks for one where it does not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbptt as fb
from reference import (
    KERNELS,
    assert_close,
    draw,
    layer_for,
    named_state,
    rounding,
    run_library,
)

sizes = st.tuples(
    st.integers(0, 9),  # T
    st.integers(1, 9),  # B
    st.sampled_from([1, 2, 3, 5, 8, 17]),  # I
    st.sampled_from([1, 2, 3, 7, 16, 17, 33]),  # H
    st.integers(1, 3),  # layers
)


@st.composite
def problems(draw_from, min_T=0, min_B=1):
    T, B, I, H, num_layers = draw_from(sizes)  # noqa: E741
    return draw(
        np.random.default_rng(draw_from(st.integers(0, 2**32 - 1))),
        draw_from(st.sampled_from(KERNELS)),
        max(T, min_T),
        max(B, min_B),
        I,
        H,
        num_layers,
        bias=draw_from(st.booleans()),
        dtype=draw_from(st.sampled_from(["float32", "float64"])),
    )


def tolerance(problem):
    return 4.0 * rounding(problem)


@given(problems(), st.data())
def test_splitting_and_carrying_the_state_equals_running_whole(problem, data):
    cut = data.draw(st.integers(0, len(problem.x)))
    layer = layer_for(problem)
    whole = run_library(problem, layer)

    y_1, middle, tape_1 = layer.forward(problem.x[:cut], problem.state())
    y_2, last, tape_2 = layer.forward(problem.x[cut:], middle)
    late = layer.backward(tape_2, problem.grad_y[cut:], problem.grad_state())
    early = layer.backward(tape_1, problem.grad_y[:cut], late.state)

    parts = {
        "y": np.concatenate([y_1, y_2]),
        **named_state("", last),
        "grad_x": np.concatenate([early.x, late.x]),
        **named_state("grad_", early.state),
        **{f"grad_{name}": early.weights[name] + late.weights[name] for name in problem.weights},
    }
    assert_close(parts, whole, tolerance(problem))


@given(problems())
def test_advance_equals_record(problem):
    layer = layer_for(problem)
    y, state = layer(problem.x, problem.state())
    recorded, last, tape = layer.forward(problem.x, problem.state(), training=True)
    assert tape is not None
    assert_close(
        {"y": y, **named_state("", state)},
        {"y": recorded, **named_state("", last)},
        tolerance(problem),
    )


def of_rows(problem, rows):
    """The problem with the given rows of its batch."""
    arrays = {
        name: getattr(problem, name)[:, rows]
        for name in ("x", "h", "c", "grad_y", "grad_h", "grad_c")
        if getattr(problem, name) is not None
    }
    return replace(problem, **arrays)


def is_per_row(name):
    return name in ("y", "h", "c", "grad_x", "grad_h", "grad_c")


@given(problems(min_B=2), st.data())
def test_permuting_the_batch_permutes_the_results(problem, data):
    order = np.array(data.draw(st.permutations(range(problem.x.shape[1]))))
    expected = {
        name: value[:, order] if is_per_row(name) else value
        for name, value in run_library(problem).items()
    }
    assert_close(run_library(of_rows(problem, order)), expected, tolerance(problem))


@given(problems(min_B=2), st.data())
def test_gradients_add_over_the_batch(problem, data):
    B = problem.x.shape[1]
    cut = data.draw(st.integers(1, B - 1))
    first = run_library(of_rows(problem, slice(None, cut)))
    second = run_library(of_rows(problem, slice(cut, None)))
    together = {
        name: np.concatenate([first[name], second[name]], axis=1)
        if is_per_row(name)
        else first[name] + second[name]
        for name in first
    }
    assert_close(together, run_library(problem), tolerance(problem))


@given(problems(min_T=1))
def test_gradients_are_linear_in_the_error(problem):
    doubled = replace(
        problem,
        **{
            name: 2 * getattr(problem, name)
            for name in ("grad_y", "grad_h", "grad_c")
            if getattr(problem, name) is not None
        },
    )
    expected = {
        name: 2 * value if name.startswith("grad_") else value
        for name, value in run_library(problem).items()
    }
    assert_close(run_library(doubled), expected, tolerance(problem))


def elsewhere(array, offset):
    """A copy whose first byte lies `offset` bytes behind the start of a cache line."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@given(problems(), st.data())
def test_the_same_numbers_give_the_same_bits(problem, data):
    """Wherever they lie in memory: a run that is resumed must go on as if it had not stopped."""
    moved = {}
    for name in ("x", "h", "c", "grad_y", "grad_h", "grad_c"):
        if getattr(problem, name) is not None:
            offset = data.draw(st.sampled_from([0, 8, 16, 32, 48]), label=name)
            moved[name] = elsewhere(getattr(problem, name), offset)
    first, second = run_library(problem), run_library(replace(problem, **moved))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize("cell", KERNELS)
def test_the_same_numbers_give_the_same_bits_at_the_smallest_sizes(cell, rng):
    """Products of a few numbers have paths of their own, that may go by the address."""
    for B, I, H in product([1, 2, 5], [1, 2, 5, 9], [1, 2, 3, 7, 9]):  # noqa: E741
        problem = draw(rng, cell, 3, B, I, H)
        layer = layer_for(problem)
        first = run_library(problem, layer)
        kept = []  # so that the results of each run lie elsewhere
        for offset in (16, 32, 48):
            kept.append(np.empty(offset // 16 * 24 + 8, np.uint8))
            moved = replace(problem, x=elsewhere(problem.x, offset))
            kept.append(run_library(moved, layer))
            for name, value in first.items():
                np.testing.assert_array_equal(value, kept[-1][name], err_msg=f"{name} {B, I, H}")


@given(problems(), st.integers(1, 4))
def test_the_number_of_threads_changes_rounding_only(problem, threads):
    before = fb.get_num_threads()
    try:
        fb.set_num_threads(1)
        alone = run_library(problem)
        fb.set_num_threads(threads)
        assert_close(run_library(problem), alone, tolerance(problem))
    finally:
        fb.set_num_threads(before)


@pytest.mark.parametrize("H", [4, 19])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", KERNELS)
def test_nan_is_not_lost_and_stays_in_its_row(cell, dtype, H, rng):
    problem = draw(rng, cell, 6, 5, 7, H, dtype=dtype)
    expected = run_library(problem)
    x = problem.x.copy()
    x[2, 3, 1] = np.nan
    actual = run_library(replace(problem, x=x))
    assert np.isnan(actual["y"][2:, 3]).all()
    assert np.isnan(actual["grad_weight_ih_l0"]).any()
    wanted = expected["y"].copy()
    wanted[2:, 3] = np.nan
    np.testing.assert_allclose(actual["y"], wanted, rtol=1e-4, atol=1e-5)
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(
        actual["grad_x"][:, others], expected["grad_x"][:, others], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_large_input_saturates(cell, dtype, size, rng):
    problem = draw(rng, cell, 6, 3, 7, 19, dtype=dtype)
    results = run_library(replace(problem, x=(size * problem.x).astype(dtype)))
    assert all(np.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", KERNELS)
def test_no_steps_pass_the_state_through(cell, batch_first, rng):
    problem = draw(rng, cell, 0, 3, 2, 5, 2)
    layer = layer_for(problem, batch_first=batch_first)
    x = problem.x.swapaxes(0, 1) if batch_first else problem.x
    y, state, tape = layer.forward(x, problem.state())
    grads = layer.backward(tape, y, problem.grad_state())
    R = problem.grad_y.shape[-1]
    assert y.shape == ((3, 0, R) if batch_first else (0, 3, R))
    assert grads.x.shape == x.shape
    for name, value in {
        **named_state("", state),
        **named_state("grad_", grads.state),
    }.items():
        np.testing.assert_array_equal(value, getattr(problem, name))
    assert all(not gradient.any() for gradient in grads.weights.values())


def strided(array):
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def strided_rows(array):
    wide = np.full(
        (2 * array.shape[0], array.shape[1] + 3, array.shape[2] + 1), np.nan, array.dtype
    )
    view = wide[::2, 2:-1, :-1]
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def backwards(array):
    return array[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]


def backwards_in_time(array):
    return array[::-1].copy()[::-1]


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def axes_swapped(array):
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


LAYOUTS = [
    strided,
    strided_rows,
    np.asfortranarray,
    read_only,
    backwards,
    backwards_in_time,
    unaligned,
    axes_swapped,
]


@given(problems(), st.data())
def test_memory_layout_of_the_input_does_not_matter(problem, data):
    relaid = {}
    for name in ("x", "h", "c", "grad_y", "grad_h", "grad_c"):
        if getattr(problem, name) is not None:
            layout = data.draw(st.sampled_from(LAYOUTS), label=name)
            relaid[name] = layout(getattr(problem, name))
            np.testing.assert_array_equal(relaid[name], getattr(problem, name))
    before = {name: value.copy() for name, value in relaid.items()}
    assert_close(run_library(replace(problem, **relaid)), run_library(problem), tolerance(problem))
    for name, value in relaid.items():
        np.testing.assert_array_equal(value, before[name], err_msg="the input was written to")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", KERNELS)
def test_every_layout_of_every_argument(cell, layout, rng):
    problem = draw(rng, cell, 4, 3, 5, 7, 2, dtype="float32")
    relaid = {
        name: layout(getattr(problem, name))
        for name in ("x", "h", "c", "grad_y", "grad_h", "grad_c")
        if getattr(problem, name) is not None
    }
    assert_close(run_library(replace(problem, **relaid)), run_library(problem), tolerance(problem))


def test_a_broadcast_input_is_an_input(rng):
    problem = draw(rng, "lstm", 6, 3, 5, 7)
    step = problem.x[:1]
    same = np.broadcast_to(step, problem.x.shape)
    assert_close(
        run_library(replace(problem, x=same)),
        run_library(replace(problem, x=same.copy())),
        tolerance(problem),
    )


@given(problems())
def test_batch_first_equals_time_major(problem):
    layer = layer_for(problem, batch_first=True)
    y, state, tape = layer.forward(np.ascontiguousarray(problem.x.swapaxes(0, 1)), problem.state())
    grad_y = np.ascontiguousarray(problem.grad_y.swapaxes(0, 1))
    grads = layer.backward(tape, grad_y, problem.grad_state())
    results = {
        "y": y.swapaxes(0, 1),
        **named_state("", state),
        "grad_x": grads.x.swapaxes(0, 1),
        **named_state("grad_", grads.state),
        **{f"grad_{name}": value for name, value in grads.weights.items()},
    }
    assert_close(results, run_library(problem), tolerance(problem))


@given(problems())
def test_what_a_call_is_given_stays_as_it_was(problem):
    layer = layer_for(problem)
    given_arrays = {
        name: getattr(problem, name).copy()
        for name in ("x", "h", "c", "grad_y", "grad_h", "grad_c")
        if getattr(problem, name) is not None
    }
    run_library(problem, layer)
    for name, value in given_arrays.items():
        np.testing.assert_array_equal(getattr(problem, name), value)
    for name, value in problem.weights.items():
        np.testing.assert_array_equal(layer.weights[name], value)
