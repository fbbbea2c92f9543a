"""Segmented: its definition by runs that are cut by hand, Full where the warm-up is long enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbptt as fb
from fastbptt import memory
from fastbptt.segmented import Segment
from reference import CELLS, make_layer

T, B, I, E, H, N = 23, 2, 3, 4, 5, 4  # noqa: E741
IGNORE = -100
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
orders = pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
parts = pytest.mark.parametrize("embedding", [False, True], ids=["vectors", "embedding"])
ends = pytest.mark.parametrize("readout", [False, True], ids=["no_readout", "readout"])
losses = pytest.mark.parametrize("loss", ["cross_entropy", "mse", "callable"])
# A last segment that is shorter, warm-ups longer than a segment, one segment, steps of their own.
schedules = pytest.mark.parametrize(
    "schedule",
    [fb.Segmented(*a) for a in ((5,), (5, 3), (4, 4), (3, 8), (6, 20), (23, 2), (40, 3), (1, 2))],
    ids=str,
)


class Task:
    """A model and data for it; time-major inside."""

    def __init__(
        self, rng, cell, embedding=False, readout=True, *, batch_first=False, dtype="float64", B=B
    ):
        self.batch_first = batch_first
        options = {"dtype": dtype, "seed": 1}
        size = E if embedding else I
        inner = [make_layer(cell, size, H, 2, batch_first=batch_first, **options)]
        table = [fb.Embedding(7, E, **options)] if embedding else []
        self.readout = fb.Linear(H, N, **options) if readout else None
        self.model = fb.Model(*table, *inner, *([self.readout] if readout else []))
        n = N if readout else H
        x = rng.integers(0, 7, (T, B)) if embedding else rng.standard_normal((T, B, I))
        self.x = self.given(x if embedding else x.astype(dtype))
        self.classes = rng.integers(0, n, (T, B))
        self.classes[rng.random((T, B)) < 0.3] = IGNORE
        self.classes = self.given(self.classes)
        self.values = self.given(rng.standard_normal((T, B, n)).astype(dtype))
        state = rng.standard_normal((2, B, H)).astype(dtype)
        self.state = (state, state / 2) if cell == "lstm" else state

    def given(self, array):
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_first else array

    def cut(self, array, begin, end):
        return array[:, begin:end] if self.batch_first else array[begin:end]

    def arguments(self, loss):
        if loss == "callable":
            return self.model, self.x, self.values, self.mean_square
        return self.model, self.x, self.classes if loss == "cross_entropy" else self.values, loss

    def mean_square(self, output, target, steps):
        assert output.shape == target.shape
        np.testing.assert_array_equal(target, self.cut(self.values, steps.start, steps.stop))
        difference = output - target
        scale = 1.0 / self.values.size
        return scale * np.square(difference).sum(), (2.0 * scale * difference).astype(output.dtype)

    def by_hand(self, schedule, loss, state):
        """Each segment as a call of its own, whose warm-up has no loss."""
        total, last = 0.0, None
        grads = {name: np.zeros_like(p) for name, p in self.model.parameters().items()}
        grad_x = None if self.model.embedding else np.zeros_like(self.x)
        for t0 in range(0, T, schedule.length):
            begin, end = max(0, t0 - schedule.overlap), min(t0 + schedule.length, T)

            def own(output, target, steps, t0=t0, begin=begin, end=end):
                value, grad = 0.0, np.zeros_like(output)
                y = self.cut(output, t0 - begin, end - begin)
                into = self.cut(grad, t0 - begin, end - begin)
                if loss == "cross_entropy":
                    classes = self.cut(self.classes, t0, end)
                    counts = classes != IGNORE
                    share = np.exp(y - y.max(-1, keepdims=True))
                    share /= share.sum(-1, keepdims=True)
                    places = (*np.nonzero(counts), classes[counts])
                    count = np.count_nonzero(self.classes != IGNORE)
                    value = -np.log(share[places]).sum() / count
                    share[places] -= 1.0
                    into[...] = np.where(counts[..., None], share / count, 0.0)
                else:
                    value, into[...] = self.mean_square(
                        y, self.cut(self.values, t0, end), slice(t0, end)
                    )
                return value, grad

            x = self.cut(self.x, begin, end)
            found = None if grad_x is None else np.zeros_like(x)
            result = fb.value_and_grad(
                self.model, x, None, own, None if begin else state, fb.Full(), grad_x=found
            )
            total, last = total + result.loss, result.state
            for name, grad in result.grads.items():
                grads[name] += grad
            if grad_x is not None:
                self.cut(grad_x, begin, end)[...] += found
        return total, grads, grad_x, last


def assert_close(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == want.dtype == dtype
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


def states(state):
    return state if isinstance(state, tuple) else (state,)


def assert_by_definition(task, schedule, loss, state, dtype):
    total, grads, grad_x, last = task.by_hand(schedule, loss, state)
    into = None if grad_x is None else np.full_like(task.x, np.nan)
    result = fb.value_and_grad(*task.arguments(loss), state, schedule, grad_x=into)
    assert result.loss == pytest.approx(total, rel=TOLERANCE[dtype])
    assert list(result.grads) == list(grads)
    for name, want in grads.items():
        assert_close(result.grads[name], want, dtype)
    if grad_x is not None:
        assert_close(into, grad_x, dtype)
    for got, want in zip(states(result.state), states(last), strict=True):
        assert_close(got, want, dtype)
        assert got.flags.c_contiguous


@given(st.integers(0, 80), st.integers(1, 30), st.integers(0, 40))
def test_segments_share_out_the_steps(steps, length, overlap):
    segments = list(fb.Segmented(length, overlap).segments(steps))
    assert [t for s in segments for t in range(s.t0, s.t1)] == list(range(steps))
    assert all(s.t1 - s.t0 == length for s in segments[:-1])
    assert all(s.begin == max(0, s.t0 - overlap) for s in segments)


def test_segments_of_a_sequence_are_made_as_they_are_used():
    assert next(fb.Segmented(10).segments(10**15)) == Segment(0, 0, 10)


@dtypes
@schedules
@pytest.mark.parametrize("cell", CELLS)
def test_segments_are_runs_of_their_own(cell, schedule, dtype, rng):
    task = Task(rng, cell, dtype=dtype)
    assert_by_definition(task, schedule, "mse", None, dtype)


@losses
@parts
@ends
@orders
@pytest.mark.parametrize("schedule", [fb.Segmented(5, 3), fb.Segmented(4, 4)], ids=str)
def test_all_parts_of_a_model(schedule, batch_first, readout, embedding, loss, rng):
    task = Task(rng, "lstm", embedding, readout, batch_first=batch_first)
    assert_by_definition(task, schedule, loss, task.state, "float64")


@losses
@parts
@ends
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_pieces_change_nothing(cell, steps, readout, embedding, loss, rng, monkeypatch):
    monkeypatch.setattr(memory, "_MOST_PIECES", 1000)
    monkeypatch.setattr(memory, "RUN_AT_ONCE", steps * 4 * B)
    schedule = fb.Segmented(5, 3)
    assert memory.steps_at_once(5 + 3, len(list(schedule.segments(T))[1:-1]) * B) < 5
    task = Task(rng, cell, embedding, readout)
    assert_by_definition(task, schedule, loss, task.state, "float64")


@schedules
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_given_state_is_that_before_the_first_step(cell, schedule, rng):
    task = Task(rng, cell, B=1)
    assert_by_definition(task, schedule, "mse", task.state, "float64")


@losses
@pytest.mark.parametrize("length", [1, 4, 23, 30])
@pytest.mark.parametrize("cell", CELLS)
def test_exact_where_the_warm_up_reaches_the_start(cell, length, loss, rng):
    task = Task(rng, cell)
    full = fb.value_and_grad(*task.arguments(loss), task.state, fb.Full())
    segmented = fb.value_and_grad(*task.arguments(loss), task.state, fb.Segmented(length, T))
    assert segmented.loss == pytest.approx(full.loss, rel=1e-10)
    for name, want in full.grads.items():
        assert_close(segmented.grads[name], want, "float64")
    for got, want in zip(states(segmented.state), states(full.state), strict=True):
        assert_close(got, want, "float64")


@orders
def test_a_callable_gets_segment_after_segment(batch_first, rng):
    task = Task(rng, "gru", batch_first=batch_first)
    seen = []

    def loss(output, target, steps):
        seen.append((steps.start, steps.stop))
        return task.mean_square(output, target, steps)

    fb.value_and_grad(task.model, task.x, task.values, loss, schedule=fb.Segmented(5, 7))
    assert seen == [(t, min(t + 5, T)) for t in range(0, T, 5)]


class Lazy:
    """Has slices over time, and nothing else of an array; none longer than `longest`."""

    def __init__(self, array, longest):
        self._array, self._longest = array, longest
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, steps):
        assert isinstance(steps, slice)
        assert steps.stop - steps.start <= self._longest
        return self._array[steps]


@parts
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_only_segments_are_read(loss, embedding, rng):
    task = Task(rng, "gru", embedding)
    model, x, target, _ = task.arguments(loss)
    expected = fb.value_and_grad(model, x, target, loss, schedule=fb.Segmented(5, 4))
    # The classes are looked at as a whole, to count those that count.
    target = target if loss == "cross_entropy" else Lazy(target, 5)
    result = fb.value_and_grad(model, Lazy(x, 5), target, loss, schedule=fb.Segmented(5, 4))
    assert result.loss == expected.loss
    for name, grad in expected.grads.items():
        np.testing.assert_array_equal(result.grads[name], grad)


def test_memory_maps(rng, tmp_path):
    task = Task(rng, "lstm")
    expected = np.empty_like(task.x)
    schedule = fb.Segmented(5, 4)
    fb.value_and_grad(*task.arguments("mse"), schedule=schedule, grad_x=expected)
    task.x.tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", task.x.dtype, "r", shape=task.x.shape)
    grad_x = np.memmap(tmp_path / "grad_x", x.dtype, "w+", shape=x.shape)
    fb.value_and_grad(task.model, x, task.values, "mse", schedule=schedule, grad_x=grad_x)
    np.testing.assert_array_equal(grad_x, expected)


def test_without_biases(rng):
    layer = fb.LSTM(I, H, 2, bias=False, dtype="float64", seed=1)
    x, target = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, H))
    full = fb.value_and_grad(fb.Model(layer), x, target, "mse")
    near = fb.value_and_grad(fb.Model(layer), x, target, "mse", schedule=fb.Segmented(4, T))
    assert list(near.grads) == list(full.grads)
    for name, want in full.grads.items():
        assert_close(near.grads[name], want, "float64")


@pytest.mark.parametrize("cell", CELLS)
def test_threads_change_no_more_than_the_order_of_sums(cell, own_folder, rng):
    layer = make_layer(cell, I, 32, 2, dtype="float64", seed=1)
    x, target = rng.standard_normal((1000, 1, I)), rng.standard_normal((1000, 1, 32))
    results = []
    for threads in (1, 2, 3):
        fb.set_num_threads(threads)
        results.append(
            fb.value_and_grad(fb.Model(layer), x, target, "mse", schedule=fb.Segmented(20, 10))
        )
    for result in results[1:]:
        for name, want in results[0].grads.items():
            np.testing.assert_allclose(result.grads[name], want, rtol=1e-10, atol=1e-14)


def test_a_longer_warm_up_is_nearer(rng):
    model = fb.Model(fb.LSTM(I, H, dtype="float64", seed=1), fb.Linear(H, N, dtype="float64"))
    x, target = rng.standard_normal((500, 1, I)), rng.integers(0, N, (500, 1))
    compared = [
        fb.segmentation_error(model, x, target, schedule=fb.Segmented(50, overlap), repeats=1)
        for overlap in (0, 10, 40, 500)
    ]
    errors = [result.error for result in compared]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-12
    for result in compared:
        assert result.speedup == result.full_seconds / result.segmented_seconds


def test_the_error_is_relative_to_the_whole_gradient(rng):
    task = Task(rng, "gru")
    schedule = fb.Segmented(5, 1)
    full = fb.value_and_grad(*task.arguments("mse"), task.state)
    near = fb.value_and_grad(*task.arguments("mse"), task.state, schedule)
    exact, found = (
        np.concatenate([grad.ravel() for grad in result.grads.values()]) for result in (full, near)
    )
    want = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    got = fb.segmentation_error(*task.arguments("mse"), schedule=schedule, state=task.state)
    assert got.error == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "length: got 0, wanted at least 1"),
        ((5, -1), ValueError, "overlap: got -1, wanted at least 0"),
        ((2.0,), TypeError, "length: got 2.0, wanted an integer"),
        ((True,), TypeError, "length: got True"),
        ((2, "3"), TypeError, "overlap: got '3'"),
    ],
)
def test_bad_segments(arguments, error, words):
    with pytest.raises(error, match=words):
        fb.Segmented(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"schedule": fb.Segmented}, TypeError, "schedule: got Segmented, wanted a schedule"),
        ({"state": np.ones((2, B, H + 1))}, ValueError, "state: got shape"),
        ({"state": (np.ones((2, B, H)),) * 2}, TypeError, "state: got a tuple"),
        ({"grad_x": np.empty((T, B, I + 1))}, ValueError, "grad_x: got shape"),
    ],
)
def test_bad_arguments(changes, error, words, rng):
    task = Task(rng, "gru")
    with pytest.raises(error, match=words):
        fb.value_and_grad(*task.arguments("mse"), **{"schedule": fb.Segmented(5), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"schedule": fb.Full()}, TypeError, "schedule: got Full, wanted a Segmented"),
        ({"repeats": 0}, ValueError, "repeats: got 0, wanted at least 1"),
        ({"model": None}, TypeError, "model: got NoneType"),
    ],
)
def test_bad_comparisons(changes, error, words, rng):
    task = Task(rng, "gru")
    arguments = {"model": task.model, "x": task.x, "target": task.classes}
    with pytest.raises(error, match=words):
        fb.segmentation_error(**{**arguments, "schedule": fb.Segmented(5), **changes})
