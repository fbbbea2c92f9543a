"""Plans alone, and the gradients that they give: Full is exact, Truncated is its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbptt as fb
from fastbptt.schedules import Action
from plans import Simulator
from reference import CELLS, make_layer

HIDDEN, CLASSES, BATCH = 5, 4, 3


def windows(T, k1, k2):
    """The definition: begin of the window, first step whose loss counts, end."""
    return [(max(0, new + k1 - k2), new, min(new + k1, T)) for new in range(0, T, k1)]


def test_full_records_all_and_goes_back():
    assert list(fb.Full().plan(7)) == [Action("record", 0, 7), Action("reverse", 0, 7)]


@pytest.mark.parametrize("schedule", [fb.Full(), fb.Truncated(3), fb.Truncated(3, 5)], ids=str)
def test_no_steps_no_actions(schedule):
    assert list(schedule.plan(0)) == []


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 30))
def test_truncated_reaches_back_as_defined(T, k1, more):
    simulator = Simulator(T).run(fb.Truncated(k1, k1 + more).plan(T))
    for begin, new, end in windows(T, k1, k1 + more):
        for t in range(new, end):
            assert simulator.reach[t] == begin
    assert simulator.most_recorded <= k1 + more
    assert simulator.most_stored <= 1
    assert simulator.t == T


def test_windows_that_do_not_overlap_follow_each_other():
    verbs = [(a.verb, a.t0, a.t1) for a in fb.Truncated(4).plan(10)]
    assert verbs == [
        (verb, t0, t1) for t0, t1 in ((0, 4), (4, 8), (8, 10)) for verb in ("record", "reverse")
    ]


def test_plans_of_long_sequences_are_produced_as_they_are_used():
    plan = fb.Truncated(1, 2).plan(10**15)
    assert [next(plan).verb for _ in range(3)] == ["store", "record", "reverse"]


def test_k2_is_k1_by_default():
    assert fb.Truncated(7) == fb.Truncated(7, 7)
    assert fb.Truncated(np.int64(7)).k2 == 7


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "k1: got 0, wanted at least 1"),
        ((-3, 5), ValueError, "k1: got -3"),
        ((5, 4), ValueError, "k2: got 4, wanted at least k1 = 5"),
        ((2.0,), TypeError, "k1: got 2.0, wanted an integer"),
        ((True,), TypeError, "k1: got True"),
        ((2, "3"), TypeError, "k2: got '3'"),
    ],
)
def test_bad_windows(arguments, error, words):
    with pytest.raises(error, match=words):
        fb.Truncated(*arguments)


def text_model(cell, num_layers=2, **options):
    options |= {"dtype": "float64", "seed": 5}
    return fb.Model(
        fb.Embedding(CLASSES, 3, dtype="float64", seed=6),
        make_layer(cell, 3, HIDDEN, num_layers, **options),
        fb.Linear(HIDDEN, CLASSES, dtype="float64", seed=7),
    )


def text(rng, T):
    codes = rng.integers(0, CLASSES, (T + 1, BATCH))
    return codes[:-1], codes[1:]


def negative_log_likelihood(logits, target):
    """The sum over all targets."""
    logits = logits - logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logs, target[..., None], -1).sum()


def directed(model, rng, loss, epsilon=1e-6):
    """A random direction in all parameters, and the central difference of `loss()` along it."""
    parameters = model.parameters()
    direction = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
    values = []
    for sign in (1.0, -2.0, 1.0):
        for name, parameter in parameters.items():
            parameter += sign * epsilon * direction[name]
        values.append(loss())
    return direction, (values[0] - values[1]) / (2 * epsilon)


def assert_slope(grads, direction, slope):
    got = sum(float((grads[name] * d).sum()) for name, d in direction.items())
    size = np.sqrt(sum(float(np.square(grad).sum()) for grad in grads.values()))
    assert abs(got - slope) <= 1e-6 * max(abs(slope), size)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_full_is_the_slope_of_the_whole_model(cell, num_layers, rng):
    model = text_model(cell, num_layers)
    x, target = text(rng, 12)
    result = fb.value_and_grad(model, x, target, schedule=fb.Full())

    def loss():
        return negative_log_likelihood(model(x)[0], target) / target.size

    assert result.loss == pytest.approx(loss(), rel=1e-12)
    for _ in range(3):
        assert_slope(result.grads, *directed(model, rng, loss))


WINDOWS = [(1, 1), (4, 4), (5, 5), (1, 3), (3, 4), (3, 7), (4, 12), (2, 13), (5, 20), (20, 20)]


@pytest.mark.parametrize("windows_of", WINDOWS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_truncated_is_the_slope_of_cut_graphs(cell, windows_of, rng):
    """Each window's loss is a function of the weights with the state at its begin held fixed."""
    model = text_model(cell)
    T, (k1, k2) = 13, windows_of
    x, target = text(rng, T)
    result = fb.value_and_grad(model, x, target, schedule=fb.Truncated(k1, k2))
    cuts = windows(T, k1, k2)
    fixed = [model(x[:begin])[1] for begin, _, _ in cuts]

    def loss():
        total = 0.0
        for (begin, new, end), state in zip(cuts, fixed, strict=True):
            output, _ = model(x[begin:end], state)
            total += negative_log_likelihood(output[new - begin :], target[new:end])
        return total / target.size

    assert result.loss == pytest.approx(loss(), rel=1e-12)
    assert_slope(result.grads, *directed(model, rng, loss))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
@pytest.mark.parametrize("windows_of", WINDOWS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_truncated_is_the_sum_of_cut_graphs(cell, windows_of, batch_first, dtype, rng):
    T, (k1, k2) = 13, windows_of
    layer = make_layer(cell, 3, HIDDEN, 2, seed=5, batch_first=batch_first, dtype=dtype)
    x = rng.standard_normal((T, BATCH, 3)).astype(dtype)
    target = rng.standard_normal((T, BATCH, HIDDEN)).astype(dtype)

    def given(array):
        return np.ascontiguousarray(array.swapaxes(0, 1)) if batch_first else array

    expected = {name: np.zeros_like(weight) for name, weight in layer.weights.items()}
    for begin, new, end in windows(T, k1, k2):
        state = layer(given(x[:begin]))[1] if begin else None
        y, _, tape = layer.forward(given(x[begin:end]), state)
        grad_y = 2.0 * (given(y) - target[begin:end]) / np.float32(target.size).astype(dtype)
        grad_y[: new - begin] = 0.0
        for name, grad in layer.backward(tape, given(grad_y)).weights.items():
            expected[name] += grad

    result = fb.value_and_grad(
        fb.Model(layer), given(x), given(target), "mse", schedule=fb.Truncated(k1, k2)
    )
    for name, want in expected.items():
        got = result.grads[f"0.{name}"]
        tolerance = 1e-13 if dtype == "float64" else 1e-5
        assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max()), name
    # Where no state is restored, the forward is that of one run, but for the split into segments.
    whole = layer(given(x))[1]
    for got, want in zip(np.atleast_1d(result.state), np.atleast_1d(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-14 if dtype == "float64" else 1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_one_long_window_is_full(cell, rng):
    model = text_model(cell)
    x, target = text(rng, 20)
    full = fb.value_and_grad(model, x, target, schedule=fb.Full())
    window = fb.value_and_grad(model, x, target, schedule=fb.Truncated(20))
    assert full.loss == window.loss
    for name, grad in full.grads.items():
        np.testing.assert_array_equal(window.grads[name], grad)


class Halves:
    """Recomputes: keeps the first state, and records the second half before the first."""

    def plan(self, T, needs=None):
        half = T // 2
        yield Action("store", 0, 0)
        yield Action("advance", 0, half)
        yield Action("record", half, T)
        yield Action("reverse", half, T)
        yield Action("restore", 0, 0, last=True)
        yield Action("record", 0, half)
        yield Action("reverse", 0, half)


@pytest.mark.parametrize("cell", CELLS)
def test_a_plan_that_recomputes_gives_the_full_gradient(cell, rng):
    model = text_model(cell)
    x, target = text(rng, 21)
    state = model(x[:2])[1]
    full = fb.value_and_grad(model, x, target, state=state)
    halves = fb.value_and_grad(model, x, target, state=state, schedule=Halves())
    assert halves.loss == pytest.approx(full.loss, rel=1e-13)
    for name, grad in full.grads.items():
        np.testing.assert_allclose(halves.grads[name], grad, rtol=1e-11, atol=1e-14)
    for got, want in zip(np.atleast_1d(halves.state), np.atleast_1d(full.state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13)


class Given:
    def __init__(self, *actions):
        self.actions = actions

    def plan(self, T, needs=None):
        return iter(self.actions)


@pytest.mark.parametrize(
    "actions",
    [
        [],
        [Action("record", 0, 4)],
        [Action("advance", 0, 4)],
        [Action("record", 1, 4)],
        [Action("record", 0, 4), Action("reverse", 0, 3)],
        [Action("reverse", 0, 4)],
        [Action("restore", 0, 0)],
        [Action("store", 2, 2)],
        [Action("jump", 0, 4)],
        [Action("record", 0, 4), Action("reverse", 0, 4, loss_from=1)],
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_done_is_refused(actions, rng):
    x, target = text(rng, 4)
    with pytest.raises(ValueError, match="schedule: its plan"):
        fb.value_and_grad(text_model("gru"), x, target, schedule=Given(*actions))


@pytest.mark.parametrize("schedule", [fb.Full, 5, "full"], ids=str)
def test_no_schedule_at_all(schedule, rng):
    with pytest.raises(TypeError, match="schedule: got"):
        fb.value_and_grad(text_model("gru"), *text(rng, 4), schedule=schedule)
