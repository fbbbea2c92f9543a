"""value_and_grad and evaluate: losses by their definition, gradients by finite differences."""

from __future__ import annotations

import gc
import tracemalloc
from functools import partial

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer

T, B, I, E, H, N = 11, 3, 4, 3, 6, 5  # noqa: E741
IGNORE = -100


class Task:
    """A model with or without embedding and readout, and data for it; all time-major inside."""

    def __init__(self, rng, cell, embedding, readout, *, batch_first=False, dtype="float64", T=T):
        self.rng = rng
        self.batch_first = batch_first
        options = {"dtype": dtype, "seed": 1}
        parts = [fb.Embedding(7, E, **options)] if embedding else []
        parts.append(
            make_layer(cell, E if embedding else I, H, 2, batch_first=batch_first, **options)
        )
        parts += [fb.Linear(H, N, **options)] if readout else []
        self.model = fb.Model(*parts)
        self.outputs = N if readout else H
        if embedding:
            x = rng.integers(0, 7, (T, B))
        else:
            x = rng.standard_normal((T, B, I)).astype(dtype)
        self.x = self.given(x)
        self.classes = self.given(rng.integers(0, self.outputs, (T, B)))
        self.values = self.given(rng.standard_normal((T, B, self.outputs)).astype(dtype))

    def given(self, array):
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_first else array

    def target(self, loss):
        return self.classes if loss == "cross_entropy" else self.values


def defined(loss, output, target, ignore_index=IGNORE):
    """The loss as the documentation words it."""
    if loss == "mse":
        return float(np.mean((output - target) ** 2))
    terms = []
    for place in np.ndindex(target.shape):
        if target[place] != ignore_index:
            logits = output[place] - output[place].max()
            terms.append(np.log(np.exp(logits).sum()) - logits[target[place]])
    return float(np.mean(terms))


def assert_slopes(task, grads, loss, directions=3, epsilon=1e-6):
    """`grads` has the slope of `loss(output)` along random directions of all parameters."""
    parameters = task.model.parameters()
    assert list(grads) == list(parameters)
    size = np.sqrt(sum(float(np.square(grad).sum()) for grad in grads.values()))
    for _ in range(directions):
        direction = {name: task.rng.standard_normal(p.shape) for name, p in parameters.items()}
        values = []
        for sign in (1.0, -2.0, 1.0):
            for name, parameter in parameters.items():
                parameter += sign * epsilon * direction[name]
            values.append(loss(task.model(task.x)[0]))
        slope = (values[0] - values[1]) / (2 * epsilon)
        got = sum(float((grads[name] * d).sum()) for name, d in direction.items())
        assert abs(got - slope) <= 1e-6 * max(abs(slope), size)


def states(state):
    return state if isinstance(state, tuple) else (state,)


parts = pytest.mark.parametrize("embedding", [False, True], ids=["vectors", "embedding"])
ends = pytest.mark.parametrize("readout", [False, True], ids=["no_readout", "readout"])
orders = pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
losses = pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
schedules = pytest.mark.parametrize("schedule", [fb.Full(), fb.Truncated(3), fb.Truncated(2, 5)])


@losses
@parts
@ends
@orders
@pytest.mark.parametrize("cell", CELLS)
def test_loss_and_gradient(cell, batch_first, readout, embedding, loss, rng):
    task = Task(rng, cell, embedding, readout, batch_first=batch_first)
    target = task.target(loss)
    result = fb.value_and_grad(task.model, task.x, target, loss)
    output, state = task.model(task.x)
    assert isinstance(result.loss, float)
    assert result.loss == pytest.approx(defined(loss, output, target), rel=1e-12)
    for got, want in zip(states(result.state), states(state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    for name, parameter in task.model.parameters().items():
        assert result.grads[name].shape == parameter.shape
        assert result.grads[name].dtype == parameter.dtype
    assert_slopes(task, result.grads, lambda output: defined(loss, output, target))


@pytest.mark.parametrize("ignore_index", [IGNORE, 2])
@orders
@schedules
def test_targets_that_do_not_count(schedule, batch_first, ignore_index, rng):
    task = Task(rng, "lstm", True, True, batch_first=batch_first)
    target = task.classes.copy()
    target[rng.random(target.shape) < 0.4] = ignore_index
    result = fb.value_and_grad(
        task.model, task.x, target, schedule=schedule, ignore_index=ignore_index
    )
    expected = partial(defined, "cross_entropy", target=target, ignore_index=ignore_index)
    assert result.loss == pytest.approx(expected(task.model(task.x)[0]), rel=1e-12)
    if schedule == fb.Full():
        assert_slopes(task, result.grads, expected)
    # The same as leaving them out of a sum.
    kept = np.where(target == ignore_index, -1, target)
    by_hand = fb.value_and_grad(
        task.model, task.x, kept, partial(summed_cross_entropy, batch_first), schedule=schedule
    )
    count = np.count_nonzero(kept >= 0)
    assert by_hand.loss / count == pytest.approx(result.loss, rel=1e-12)
    for name, grad in result.grads.items():
        np.testing.assert_allclose(by_hand.grads[name] / count, grad, rtol=1e-9, atol=1e-14)


def summed_cross_entropy(batch_first, output, target, steps):
    """A loss of a user's: the sum over the classes that are not negative."""
    assert output.shape[:2] == target.shape
    assert output.shape[1 if batch_first else 0] == steps.stop - steps.start
    logs = output - output.max(-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(-1, keepdims=True))
    counts = target >= 0
    grad = np.exp(logs)
    places = np.nonzero(counts)
    grad[(*places, target[places])] -= 1.0
    grad[~counts] = 0.0
    return -logs[(*places, target[places])].sum(), grad


@ends
@orders
@schedules
def test_a_callable_is_the_loss_it_computes(schedule, batch_first, readout, rng):
    task = Task(rng, "gru", False, readout, batch_first=batch_first)
    seen = []

    def mean_square(output, target, steps):
        seen.append(steps)
        scale = 1.0 / task.values.size
        return scale * np.square(output - target).sum(), 2.0 * scale * (output - target)

    named = fb.value_and_grad(task.model, task.x, task.values, "mse", schedule=schedule)
    called = fb.value_and_grad(task.model, task.x, task.values, mean_square, schedule=schedule)
    assert called.loss == pytest.approx(named.loss, rel=1e-12)
    for name, grad in named.grads.items():
        np.testing.assert_allclose(called.grads[name], grad, rtol=1e-9, atol=1e-14)
    # Each step once.
    steps = [t for part in seen for t in range(part.start, part.stop)]
    assert sorted(steps) == list(range(T))

    value, _ = fb.evaluate(task.model, task.x, task.values, mean_square)
    assert value == pytest.approx(named.loss, rel=1e-12)


def test_a_callable_gets_its_target_as_it_is(rng):
    task = Task(rng, "lstm", False, True)
    weights = np.linspace(0.0, 1.0, T)  # one a step

    def weighted(output, target, steps):
        np.testing.assert_array_equal(target, weights[steps])
        grad = np.broadcast_to(target[:, None, None], output.shape)
        return float((output * grad).sum()), grad

    def alone(output, target, steps):
        assert target is None
        grad = np.broadcast_to(weights[steps][:, None, None], output.shape)
        return float((output * grad).sum()), grad

    first = fb.value_and_grad(task.model, task.x, weights, weighted, schedule=fb.Truncated(4))
    second = fb.value_and_grad(task.model, task.x, None, alone, schedule=fb.Truncated(4))
    assert first.loss == second.loss
    result = fb.value_and_grad(task.model, task.x, weights, weighted)
    assert_slopes(task, result.grads, lambda y: float((y * weights[:, None, None]).sum()))


@schedules
@pytest.mark.parametrize("cell", CELLS)
def test_float32_follows_float64(cell, schedule, rng):
    wide = Task(rng, cell, True, True)
    narrow = Task(rng, cell, True, True, dtype="float32")
    wide.model.load_state_dict(narrow.model.parameters())
    first = fb.value_and_grad(wide.model, wide.x, wide.classes, schedule=schedule)
    second = fb.value_and_grad(narrow.model, wide.x, wide.classes, schedule=schedule)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    for name, grad in first.grads.items():
        assert second.grads[name].dtype == np.float32
        assert np.abs(second.grads[name] - grad).max() <= 1e-5 * max(1.0, np.abs(grad).max())


@losses
@orders
@pytest.mark.parametrize("cell", CELLS)
def test_the_state_goes_into_the_next_call(cell, batch_first, loss, rng):
    """Two calls are one call whose gradient is cut between them."""
    task = Task(rng, cell, True, True, batch_first=batch_first, T=12)
    target = task.target(loss)
    whole = fb.value_and_grad(task.model, task.x, target, loss, schedule=fb.Truncated(6))
    total, grads, state = 0.0, dict.fromkeys(whole.grads, 0.0), None
    for half in (np.s_[:, :6], np.s_[:, 6:]) if batch_first else (np.s_[:6], np.s_[6:]):
        result = fb.value_and_grad(task.model, task.x[half], target[half], loss, state)
        total += result.loss / 2
        grads = {name: grads[name] + result.grads[name] / 2 for name in grads}
        state = result.state
    assert total == pytest.approx(whole.loss, rel=1e-12)
    for name, grad in whole.grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-9, atol=1e-14)
    for got, want in zip(states(state), states(whole.state), strict=True):
        np.testing.assert_array_equal(got, want)


@losses
@parts
@ends
@orders
@pytest.mark.parametrize("cell", CELLS)
def test_evaluate_is_the_loss(cell, batch_first, readout, embedding, loss, rng):
    # Long enough to be run in several stretches.
    task = Task(rng, cell, embedding, readout, batch_first=batch_first, T=3000)
    target = task.target(loss)
    start = task.model(task.x[:, :2] if batch_first else task.x[:2])[1]
    value, state = fb.evaluate(task.model, task.x, target, loss, start)
    output, last = task.model(task.x, start)
    assert value == pytest.approx(defined(loss, output, target), rel=1e-12)
    for got, want in zip(states(state), states(last), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("kind", ["uint8", "int32", "uint64", "list", "memmap", "strided"])
def test_class_numbers_of_any_kind(kind, rng, tmp_path):
    task = Task(rng, "rnn_tanh", True, True)
    expected = fb.value_and_grad(task.model, task.x, task.classes, schedule=fb.Truncated(4))

    def changed(array):
        if kind == "list":
            return array.tolist()
        if kind == "memmap":
            path = tmp_path / f"{id(array)}"
            array.astype("int16").tofile(path)
            return np.memmap(path, "int16", "r", shape=array.shape)
        if kind == "strided":
            return np.repeat(array, 2, axis=1)[:, ::2]
        return array.astype(kind)

    x, target = changed(task.x), changed(task.classes)
    result = fb.value_and_grad(task.model, x, target, schedule=fb.Truncated(4))
    assert result.loss == expected.loss
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(result.grads[name], grad, rtol=1e-14, atol=1e-16)


def peak(work):
    """What NumPy and Python allocate at the same time."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "run",
    [
        partial(fb.value_and_grad, schedule=fb.Truncated(100)),
        partial(fb.value_and_grad, schedule=fb.Truncated(100, 240)),
        fb.evaluate,
    ],
    ids=["truncated", "overlapping", "evaluate"],
)
def test_memory_does_not_grow_with_the_length(run, rng):
    task = Task(rng, "lstm", True, True, T=30_000)
    x, target = task.x.astype("uint8"), task.classes.astype("uint8")

    def work(T):
        run(task.model, x[:T], target[:T])

    work(1000)
    # An array with a byte for each of the further targets would be twice as large as this.
    assert peak(lambda: work(30_000)) - peak(lambda: work(10_000)) < 20_000 * B / 2


@pytest.mark.parametrize("fault", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@schedules
def test_a_loss_that_raises_leaves_all_as_it_was(schedule, fault, rng):
    task = Task(rng, "lstm", True, True)
    before = {name: p.copy() for name, p in task.model.parameters().items()}
    state = task.model(task.x)[1]
    kept = [part.copy() for part in state]

    def loss(output, target, steps):
        if steps.start > 2 or steps.stop == T:
            raise fault
        return 0.0, np.zeros_like(output)

    with pytest.raises(type(fault)):
        fb.value_and_grad(task.model, task.x, task.classes, loss, state, schedule)
    for name, parameter in task.model.parameters().items():
        np.testing.assert_array_equal(parameter, before[name])
    for part, want in zip(state, kept, strict=True):
        np.testing.assert_array_equal(part, want)
    fb.value_and_grad(task.model, task.x, task.classes, state=state, schedule=schedule)


def test_losses_that_are_not_finite_are_returned(rng):
    task = Task(rng, "lstm", True, True)
    task.model.parameters()["2.bias"][...] = np.nan
    assert np.isnan(fb.value_and_grad(task.model, task.x, task.classes).loss)
    assert np.isnan(fb.evaluate(task.model, task.x, task.classes)[0])


ones = np.ones
bad = dict


@pytest.mark.parametrize("run", [fb.value_and_grad, fb.evaluate])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (bad(model=fb.LSTM(2, 3)), TypeError, "model: got LSTM, wanted a Model"),
        (bad(x=ones((T, B, I + 1))), ValueError, r"x: got shape \(11, 3, 5\), wanted \[T, B, 4\]"),
        (bad(x=ones((T, B))), ValueError, r"x: got shape \(11, 3\)"),
        (bad(x=ones((T, B, I), "f4")), TypeError, "x: got dtype float32, wanted float64"),
        (bad(x=[[1.0], [2.0, 3.0]]), ValueError, "x: got lists"),
        (bad(x=ones((0, B, I)), target=ones((0, B), int)), ValueError, "target: no target counts"),
        (bad(x=ones((T, 0, I)), target=ones((T, 0), int)), ValueError, "target: no target counts"),
        (bad(target=ones((T, B + 1), int)), ValueError, r"target: got shape \(11, 4\), wanted"),
        (bad(target=ones((T - 1, B), int)), ValueError, r"target: got shape \(10, 3\), wanted"),
        (bad(target=ones((T, B))), TypeError, "target: got dtype float64, wanted class numbers"),
        (bad(target=[["a"]]), ValueError, "target: got shape"),
        (bad(target=None), ValueError, "target: got shape"),
        (bad(target=np.full((T, B), N)), ValueError, r"target: got class 5 at \[0, 0\], wanted"),
        (bad(target=-ones((T, B), "i4")), ValueError, "target: got class -1 .* from 0 to 4"),
        (bad(target=np.full((T, B), IGNORE)), ValueError, "no target counts.* ignore_index = -100"),
        (bad(ignore_index=0.0), TypeError, "ignore_index: got 0.0"),
        (bad(loss="mse"), ValueError, r"target: got shape \(11, 3\), wanted \(11, 3, 5\)"),
        (bad(loss="mse", target=ones((T, B, N), "f4")), TypeError, "target: got dtype float32"),
        (bad(loss="mse", target=ones((T, B, N), int)), TypeError, "target: got dtype int64"),
        (bad(loss="hinge"), ValueError, "loss: got 'hinge', wanted 'cross_entropy', 'mse'"),
        (bad(loss=3), TypeError, "loss: got int"),
        (bad(state=ones((2, B, H + 1))), ValueError, "state: got shape"),
        (bad(state=ones((2, B, H), "f4")), TypeError, "state: got dtype float32"),
        (bad(state=(ones((2, B, H)),) * 2), TypeError, "state: got a tuple"),
        (bad(loss=lambda y, target, steps: 1.0), TypeError, "loss: its result was float"),
        (bad(loss=lambda y, target, steps: ("a", y)), TypeError, "loss: its result was tuple"),
        (bad(loss=lambda *_: (0.0, 0.0), target=ones(T + 1)), ValueError, "wanted 11 steps"),
    ],
)
def test_bad_arguments(run, changes, error, words, rng):
    task = Task(rng, "gru", False, True)
    arguments = {"model": task.model, "x": task.x, "target": task.classes, **changes}
    with pytest.raises(error, match=words):
        run(**arguments)


def test_a_class_out_of_range_is_named_with_its_place(rng):
    task = Task(rng, "gru", True, True)
    task.classes[7, 2] = 9
    with pytest.raises(ValueError, match=r"target: got class 9 at \[7, 2\]"):
        fb.value_and_grad(task.model, task.x, task.classes)
    task.x[6, 1] = 7
    with pytest.raises(ValueError, match=r"x: got 7 at \[6, 1\], wanted from 0 to 6"):
        fb.value_and_grad(task.model, task.x, task.classes)
    with pytest.raises(ValueError, match=r"x: got 7 at \[6, 1\]"):
        fb.value_and_grad(task.model, task.x.astype("uint8"), task.classes)


@pytest.mark.parametrize(
    ("grad", "error", "words"),
    [
        (np.zeros((T, B, N + 1)), ValueError, r"grad_output of loss: got shape \(11, 3, 6\)"),
        (np.zeros((T, B, N), "f4"), TypeError, "grad_output of loss: got dtype float32"),
        (None, TypeError, "grad_output of loss: got NoneType"),
    ],
)
def test_bad_gradients_of_a_callable(grad, error, words, rng):
    task = Task(rng, "gru", False, True)
    with pytest.raises(error, match=words):
        fb.value_and_grad(task.model, task.x, task.classes, lambda *_: (0.0, grad))


class OneBuffer:
    """A source that fills one and the same buffer with what it is asked for."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.buffer = np.empty_like(array)

    def __getitem__(self, steps):
        part = self.buffer[: steps.stop - steps.start]
        part[...] = self.array[steps]
        return part


@pytest.mark.parametrize("schedule", [fb.Full(), fb.Truncated(4, 8), fb.Checkpointed(slots=3)])
def test_a_source_may_reuse_its_memory(schedule, rng):
    model = fb.Model(fb.GRU(3, 5, seed=0), fb.Linear(5, 2, seed=0))
    x, target = rng.standard_normal((30, 2, 3), np.float32), rng.standard_normal((30, 2, 2), "f")
    wanted = fb.value_and_grad(model, x, target, "mse", schedule=schedule)
    got = fb.value_and_grad(model, OneBuffer(x), OneBuffer(target), "mse", schedule=schedule)
    assert got.loss == wanted.loss
    for name, grad in wanted.grads.items():
        np.testing.assert_array_equal(got.grads[name], grad, err_msg=name)


def test_a_part_of_a_source_has_the_dtype_of_the_whole(rng):
    class Float64(OneBuffer):
        def __getitem__(self, steps):
            return super().__getitem__(steps).astype(np.float64)

    model = fb.Model(fb.RNN(2, 3), fb.Linear(3, 4))
    x, classes = np.zeros((5, 1, 2), np.float32), Float64(np.zeros((5, 1), np.int64))
    with pytest.raises(TypeError, match="target: got dtype float64 for the steps 0 to 5"):
        fb.value_and_grad(model, x, classes)
    mask = Float64(np.ones((5, 1), np.bool_))
    with pytest.raises(TypeError, match="loss_mask: got dtype float64 for the steps 0 to 5"):
        fb.value_and_grad(model, x, classes.array, loss_mask=mask)


def test_a_callable_cannot_write_to_what_the_way_back_reads(rng):
    def in_place(output, target, steps):
        output -= target
        return float((output**2).sum()), 2 * output

    model = fb.Model(fb.LSTM(2, 3))
    x = rng.standard_normal((5, 1, 2), np.float32)
    with pytest.raises(ValueError, match="read-only"):
        fb.value_and_grad(model, x, np.zeros((5, 1, 3), np.float32), in_place)


@pytest.mark.parametrize("where", ["x", "target", "state"])
def test_grad_x_has_memory_of_its_own(where, rng):
    model = fb.Model(fb.GRU(3, 3))
    x, target = rng.standard_normal((2, 4, 2, 3), np.float32)
    state = rng.standard_normal((1, 2, 3), np.float32)
    shared = {"x": x, "target": target, "state": np.zeros((4, 2, 3), np.float32)}[where]
    if where == "state":
        state = shared[:1]
    before = shared.copy()
    with pytest.raises(ValueError, match=f"grad_x: got memory that {where} lies in"):
        fb.value_and_grad(model, x, target, "mse", state, grad_x=shared)
    np.testing.assert_array_equal(shared, before)


def test_a_class_beyond_all_integers_is_named():
    model = fb.Model(fb.RNN(2, 3))
    classes = np.full((4, 1), 2**64 - 1, np.uint64)
    with pytest.raises(ValueError, match=f"target: got class {2**64 - 1}"):
        fb.value_and_grad(model, np.zeros((4, 1, 2), np.float32), classes, ignore_index=-1)
