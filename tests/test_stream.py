"""Streams: updates, what bad pushes get, and going on from a save."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer

RULES = [
    fb.Truncated(1, 1),
    fb.Truncated(3, 7),
    fb.RTRL(),
    fb.SnAp1(every=2),
    fb.EProp(),
    fb.UORO(seed=5),
]


def make_stream(rule=None, *, optimizer=fb.Adam, embedding=False, loss="cross_entropy", **options):
    parts = [fb.LSTM(3, 5, seed=1), fb.Linear(5, 4, seed=2)]
    if embedding:
        parts.insert(0, fb.Embedding(6, 3, seed=3))
    model = fb.Model(*parts)
    made = None if optimizer is None else optimizer(model.parameters(), lr=0.01)
    return fb.Stream(model, loss, fb.RTRL() if rule is None else rule, made, **options)


def data(rng, T=20, B=2, embedding=False):
    x = rng.integers(0, 6, (T, B)) if embedding else rng.standard_normal((T, B, 3))
    return x if embedding else x.astype(np.float32), rng.integers(0, 4, (T, B))


def flat(state):
    """All arrays and numbers of a state_dict, by path."""
    if isinstance(state, dict):
        return {f"{k}/{n}": v for k, part in state.items() for n, v in flat(part).items()}
    return {"": state}


def assert_identical(first, second):
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == second[name].dtype
            assert value.tobytes() == second[name].tobytes(), name
        else:
            assert value == second[name], name


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_learns(rule, rng):
    """The class is the sign pattern of the input one step ago."""
    noisy = isinstance(rule, fb.UORO)
    model = fb.Model(fb.LSTM(2, 24, seed=1), fb.Linear(24, 4, seed=2))
    optimizer = fb.Adam(model.parameters(), lr=0.003 if noisy else 0.01)
    stream = fb.Stream(model, "cross_entropy", rule, optimizer, max_norm=1.0)
    x = rng.choice([-1.0, 1.0], (1500, 4, 2)).astype(np.float32)
    classes = ((x > 0) @ [2, 1]).astype(np.int64)
    losses = [stream.push(x[t], classes[t - 1]).loss for t in range(1, len(x))]
    last = np.mean(losses[-100:])  # from log(4) = 1.39
    if rule == fb.Truncated(1, 1):  # cannot know what to keep
        assert last > 0.3
    else:
        assert last < (1.15 if noisy else 0.1)


def test_an_update_is_a_step_with_the_mean_gradient(rng):
    """Truncated in a stream is value_and_grad window by window."""
    stream = make_stream(fb.Truncated(5))
    model = fb.Model.from_config(stream.model.config())
    model.load_state_dict(stream.model.parameters())
    optimizer = fb.Adam(model.parameters(), lr=0.01)
    x, target = data(rng)
    target[3] = -100
    pushed = stream.push(x, target)
    for window in fb.each_window(model, x, target, schedule=fb.Truncated(5)):
        optimizer.step(window.grads)
    assert stream.updates == 4
    assert stream.steps == 20
    assert pushed.prediction.shape == (20, 2, 4)
    for name, parameter in model.parameters().items():
        np.testing.assert_allclose(parameter, stream.model.parameters()[name], rtol=1e-4, atol=1e-6)


def test_without_targets_nothing_changes(rng):
    stream = make_stream(fb.Truncated(2, 3))
    before = {name: p.copy() for name, p in stream.model.parameters().items()}
    x, _ = data(rng)
    assert stream.push(x).loss == 0.0
    assert stream.updates == 0
    assert_identical(before, stream.model.parameters())


def test_predictions_are_the_models(rng):
    stream = make_stream(optimizer=None)
    x, target = data(rng)
    expected, _ = stream.model(x)
    for t in range(20):
        asked = stream.predict(x[t])
        pushed = stream.push(x[t], target[t])
        assert (asked == pushed.prediction).all()
        np.testing.assert_allclose(asked, expected[t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first(cell, rng):
    streams = []
    for batch_first in (False, True):
        model = fb.Model(make_layer(cell, 3, 5, batch_first=batch_first, seed=1))
        streams.append(fb.Stream(model, "mse", fb.RTRL()))
    x, target = rng.standard_normal((6, 2, 3)), rng.standard_normal((6, 2, 5))
    x, target = x.astype(np.float32), target.astype(np.float32)
    mask = rng.random((6, 2)) < 0.7
    first = streams[0].push(x, target, x_mask=mask, target_mask=mask)
    second = streams[1].push(
        x.swapaxes(0, 1), target.swapaxes(0, 1), x_mask=mask.T, target_mask=mask.T
    )
    assert (first.prediction == second.prediction.swapaxes(0, 1)).all()
    assert first.loss == second.loss
    assert_identical(streams[0].grads, streams[1].grads)


def test_a_callable_loss(rng):
    x, target = data(rng)
    seen = []

    def loss(output, classes, steps):
        seen.append(steps)
        p = np.exp(output - output.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        picked = np.take_along_axis(p, classes[..., None], -1)
        np.put_along_axis(p, classes[..., None], picked - 1, -1)
        return -np.log(picked).sum(), p

    for rule in (fb.RTRL(), fb.Truncated(2, 4)):
        custom = make_stream(rule, optimizer=None, loss=loss)
        named = make_stream(rule, optimizer=None)
        custom.push(x[0], target[0])
        custom.push(x[1:], target[1:])
        named.push(x, target)
        assert seen[-1] == slice(19, 20)
        for name, grad in named.grads.items():
            np.testing.assert_allclose(custom.grads[name], grad, rtol=1e-4, atol=1e-5)

    def fails(output, classes, steps):
        raise RuntimeError("mine")

    stream = make_stream(loss=fails)
    stream.push(x[0])
    before = stream.state_dict()
    with pytest.raises(RuntimeError, match="mine"):
        stream.push(x[1], target[1])
    assert_identical(before, stream.state_dict())


def test_clipping(rng):
    stream = make_stream(optimizer=fb.SGD, max_norm=1e-3)
    x, target = data(rng)
    stream.push(x, target)
    norm = np.sqrt(sum((grad.astype(float) ** 2).sum() for grad in stream.grads.values()))
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_zero_grad(rng):
    stream = make_stream(fb.SnAp1(), optimizer=None)
    x, target = data(rng)
    stream.push(x[:5], target[:5])
    assert stream.count == 10
    stream.zero_grad()
    assert stream.count == 0
    assert not any(grad.any() for grad in stream.grads.values())
    stream.push(x[5], target[5])
    assert stream.count == 2
    assert any(grad.any() for grad in stream.grads.values())


def bad_pushes():
    x, target = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    nan, inf = x.copy(), x.copy()
    nan[1, 2], inf[0, 1] = np.nan, np.inf
    block = np.zeros((4, 2, 3), np.float32)
    late = block.copy()
    late[3, 0, 0] = np.nan
    return {
        "x: got shape \\(3, 3\\)|x: got shape \\(1, 3, 3\\)": (np.zeros((3, 3), np.float32), None),
        "x: got shape .*, wanted .*3": (np.zeros((2, 4), np.float32), None),
        "x: got shape \\(3,\\), wanted \\[B, 3\\]": (np.zeros(3, np.float32), None),
        "x: got dtype float64": (x.astype(float), None),
        "x: got nan at \\[1, 2\\], wanted finite": (nan, target),
        "x: got -?inf at \\[0, 1\\], wanted finite": (inf, target),
        "x: got nan at \\[3, 0, 0\\]": (late, None),
        "target: got class 4 at \\[1\\]": (x, [0, 4]),
        "target: got class -1 at \\[3, 1\\]": (block, [[0, 0]] * 3 + [[0, -1]]),
        "target: got shape": (x, [0, 1, 2]),
        "target: got float64, wanted class numbers": (x, [0.0, 1.0]),
    }


@pytest.mark.parametrize("message", bad_pushes())
def test_bad_pushes_change_nothing(message, rng):
    stream = make_stream()
    good_x, good_target = data(rng)
    stream.push(good_x, good_target)
    before = stream.state_dict()
    x, target = bad_pushes()[message]
    with pytest.raises((ValueError, TypeError), match=message):
        stream.push(x, target)
    assert_identical(before, stream.state_dict())
    fresh = make_stream()
    if "1, 3, 3" not in message:
        with pytest.raises((ValueError, TypeError), match=message):
            fresh.push(x, target)
        assert fresh.batch_size is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x_mask": [1, 0]}, TypeError, "x_mask: got int64, wanted bools"),
        ({"x_mask": [True]}, ValueError, "x_mask: got shape"),
        ({"target_mask": [[True, False]]}, ValueError, "target_mask: got shape"),
    ],
)
def test_bad_masks(options, error, message, rng):
    stream = make_stream()
    x, target = data(rng)
    with pytest.raises(error, match=message):
        stream.push(x[0], target[0], **options)


def test_what_is_masked_is_not_looked_at(rng):
    stream = make_stream(loss="mse")
    x, _ = data(rng)
    x[0, 1] = np.nan
    target = np.zeros((2, 4), np.float32)
    target[1] = np.inf
    pushed = stream.push(x[0], target, x_mask=[True, False], target_mask=[True, False])
    assert np.isfinite(pushed.loss)
    assert all(np.isfinite(p).all() for p in stream.model.parameters().values())
    words = make_stream(embedding=True)
    words.push([3, 99], [1, 77], x_mask=[True, False], target_mask=[True, False])
    with pytest.raises(ValueError, match=r"x: got class 99 at \[1\], wanted from 0 to 5"):
        words.push([3, 99], [1, 1])


def test_without_a_first_push(rng):
    with pytest.raises(ValueError, match="x: got None in the first push, wanted batch_size"):
        make_stream().push(None)
    stream = make_stream(batch_size=2)
    assert stream.push(None).prediction.shape == (2, 4)
    with pytest.raises(ValueError, match="x: got shape"):
        stream.push(np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match="rows: got some before the first push"):
        make_stream().reset([0])
    for rows, message in (([2], "from 0 to 1"), ([True], "wanted \\(2,\\)"), ([-1], "from 0")):
        with pytest.raises(ValueError, match=f"rows: .*{message}"):
            stream.reset(rows)
    with pytest.raises(TypeError, match="rows: got float64"):
        stream.reset([0.5])
    with pytest.raises(ValueError, match="x: got a block"):
        stream.predict(np.zeros((4, 2, 3), np.float32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "mae"}, ValueError, "loss: got 'mae'"),
        ({"loss": 3}, TypeError, "loss: got int"),
        ({"rule": fb.Full()}, TypeError, "rule: got Full, wanted one of Truncated, RTRL"),
        ({"rule": fb.RTRL}, TypeError, "rule: got RTRL, wanted one of"),
        ({"optimizer": "adam"}, TypeError, "optimizer: got str"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"max_norm": 0}, ValueError, "max_norm: got 0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: got 0.5"),
        ({"model": fb.LSTM(3, 4)}, TypeError, "model: got LSTM, wanted a Model"),
        (
            {"model": fb.Model(fb.GRU(3, 4, num_layers=2)), "rule": fb.SnAp1()},
            ValueError,
            r"rule: SnAp1\(\) runs through one layer, got GRU\(3, 4, num_layers=2\); wanted",
        ),
        (
            {"model": fb.Model(fb.GRU(3, 4)), "rule": fb.EProp()},
            ValueError,
            r"rule: EProp\(\) is for an LSTM, got GRU\(3, 4\); wanted an LSTM, or SnAp1\(\)",
        ),
        (
            {"model": fb.Model(fb.LSTM(3, 4, bidirectional=True))},
            ValueError,
            "model: got LSTM.*, and a stream has no bidirectional; wanted a layer without it",
        ),
        (
            {"model": fb.Model(fb.GRU(3, 4, learn_initial_state=True)), "rule": fb.Truncated(1)},
            ValueError,
            "model: got GRU.*, and a stream has no learn_initial_state",
        ),
        ({"optimizer": fb.SGD({"w": np.zeros(3)})}, ValueError, "optimizer: got one .*'w'"),
    ],
)
def test_bad_streams(options, error, message):
    arguments = {"model": fb.Model(fb.LSTM(3, 4)), "loss": "mse", "rule": fb.RTRL(), **options}
    with pytest.raises(error, match=message):
        fb.Stream(**arguments)


@pytest.mark.parametrize(("kind", "options"), [(fb.RTRL, {}), (fb.SnAp1, {}), (fb.UORO, {})])
def test_bad_rules(kind, options):
    with pytest.raises(ValueError, match="every: got 0"):
        kind(every=0)
    with pytest.raises(TypeError, match=r"every: got 0\.5"):
        kind(every=0.5)
    with pytest.raises(ValueError, match="seed: got -1"):
        fb.UORO(seed=-1)
    with pytest.raises(ValueError, match=r"seed: got .*, wanted less than"):
        fb.UORO(seed=1 << 63)


@pytest.mark.parametrize("way", ["state_dict", "file"])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("optimizer", [fb.Adam, None])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_going_on_from_a_save_is_bit_for_bit(rule, optimizer, embedding, way, rng, tmp_path):
    first = make_stream(rule, optimizer=optimizer, embedding=embedding)
    x, target = data(rng, 40, 3, embedding)
    for t in range(17):
        first.push(x[t], target[t], x_mask=rng.random(3) < 0.8)
    first.reset([1])
    second = make_stream(rule, optimizer=optimizer, embedding=embedding)
    second.push(x[5], target[3])
    if optimizer is not None:
        first.optimizer.lr = 0.02
    if way == "state_dict":
        second.load_state_dict(first.state_dict())
    else:
        first.save(tmp_path / "stream")
        second.load(tmp_path / "stream")
        assert isinstance(fb.load(tmp_path / "stream"), fb.Model)
    assert_identical(first.state_dict(), second.state_dict())
    for t in range(17, 40):
        one, two = first.push(x[t], target[t]), second.push(x[t], target[t])
        assert one.loss == two.loss
        assert (one.prediction == two.prediction).all()
    assert_identical(first.state_dict(), second.state_dict())
    assert_identical(first.grads, second.grads)


def test_a_save_of_another_stream_is_refused(rng, tmp_path):
    x, target = data(rng)
    stream = make_stream()
    stream.push(x, target)
    path = tmp_path / "stream"
    others = {
        "with model": fb.Stream(fb.Model(fb.GRU(3, 5), fb.Linear(5, 4)), "mse", fb.RTRL()),
        "with rule": make_stream(fb.SnAp1()),
        "with optimizer": make_stream(optimizer=fb.SGD),
        "with loss": make_stream(loss="mse"),
        "got 4 streams, wanted 2": make_stream(batch_size=4),
    }
    before = stream.state_dict()
    for message, other in others.items():
        other.save(path)
        with pytest.raises(ValueError, match=f"path: .*{message}"):
            stream.load(path)
        assert_identical(before, stream.state_dict())
    fb.save(path, stream.model)
    with pytest.raises(ValueError, match=r"path: .* has a model and no stream"):
        stream.load(path)
    stream.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"path: .* is no model that can be read"):
        stream.load(path)
    with pytest.raises(FileNotFoundError):
        stream.load(tmp_path / "missing")
    assert_identical(before, stream.state_dict())


def test_bad_states_are_refused(rng):
    x, target = data(rng)
    stream = make_stream()
    stream.push(x, target)
    before = stream.state_dict()
    for part, name in (("stream", "h"), ("grads", "0.weight_hh_l0"), ("parameters", "1.bias")):
        for value in (None, np.zeros(3, np.float32)):
            state = stream.state_dict()
            state[part][name] = value
            with pytest.raises((ValueError, TypeError), match=name):
                stream.load_state_dict(state)
            del state[part][name]
            with pytest.raises(ValueError, match=name):
                stream.load_state_dict(state)
            assert_identical(before, stream.state_dict())
    with pytest.raises(ValueError, match="state: 'grads' missing"):
        stream.load_state_dict({name: before[name] for name in before if name != "grads"})
    with pytest.raises(TypeError, match="state: got list"):
        stream.load_state_dict([])


@pytest.mark.parametrize("rule", [fb.Truncated(2, 3), fb.RTRL()], ids=repr)
def test_counters_that_cannot_be_are_refused(rule, rng):
    """A core that believed them would read and write beyond its memory."""
    x, target = data(rng, embedding=True)
    stream = make_stream(rule, embedding=True)
    stream.push(x[:4], target[:4])
    before = stream.state_dict()

    def refused(change, words):
        state = stream.state_dict()
        change(state)
        with pytest.raises((ValueError, TypeError), match=words):
            make_stream(rule, embedding=True).load_state_dict(state)
        with pytest.raises((ValueError, TypeError), match=words):
            stream.load_state_dict(state)
        assert_identical(before, stream.state_dict())

    for wrong in (-1, 3, 1000, None):
        refused(lambda state, w=wrong: state["config"]["counters"].update(_since=w), "_since")
    for name in ("steps", "_count"):
        refused(lambda state, n=name: state["config"]["counters"].pop(n), name)
    for lr in (-1.0, "a", None):
        refused(lambda state, lr=lr: state["config"]["optimizer"].update(lr=lr), "lr")
    for name in ("grads", "stream"):
        refused(lambda state, n=name: state.update({n: None}), f"{name}.*wanted a mapping")
    if not isinstance(rule, fb.Truncated):
        return
    for place, wrong in ((0, -1), (0, 10**9), (1, -5), (1, 4), (2, -1)):

        def change(state, place=place, wrong=wrong):
            state["stream"]["counters"][place] = wrong

        refused(change, "counters")
    for wrong in (-7, 10**9):
        refused(lambda state, w=wrong: state["stream"]["ring_classes"].fill(w), "ring_classes")


@pytest.mark.parametrize("use", ["push", "predict", "state_dict", "grads"])
def test_a_loss_cannot_use_its_own_stream(use, rng):
    def loss(output, target, steps):
        if use == "grads":
            return stream.grads
        getattr(stream, use)(*([] if use == "state_dict" else [x]))
        return 0.0, output

    stream = make_stream(loss=loss)
    x, target = (array[0] for array in data(rng))
    with pytest.raises(RuntimeError, match="the stream that is calling it"):
        stream.push(x, target)
    stream.push(x)  # it is free again


def test_a_loss_cannot_write_to_the_prediction(rng):
    def loss(output, target, steps):
        output -= 1
        return 0.0, output

    x, target = (array[0] for array in data(rng))
    with pytest.raises(ValueError, match="read-only"):
        make_stream(loss=loss).push(x, target)


KILLED = """
import sys, numpy as np, fastbptt as fb
path, = sys.argv[1:]
model = fb.Model(fb.LSTM(3, 5, seed=1), fb.Linear(5, 4, seed=2))
stream = fb.Stream(model, "cross_entropy", fb.RTRL(), fb.Adam(model.parameters(), lr=0.01))
x = np.random.default_rng(0).standard_normal((100000, 2, 3)).astype(np.float32)
for t in range(100000):
    stream.push(x[t], [t % 4, (t + 1) % 4])
    stream.save(path)
    if t == 20:
        print("ready", flush=True)
"""


def test_killed_while_it_saves(tmp_path):
    """Whenever the process ends, the file is that of some step, and going on from it is exact."""
    path = tmp_path / "stream"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    resumed, whole = make_stream(), make_stream()
    resumed.load(path)
    assert resumed.steps > 20
    x = np.random.default_rng(0).standard_normal((100000, 2, 3)).astype(np.float32)
    for t in range(resumed.steps):
        whole.push(x[t], [t % 4, (t + 1) % 4])
    assert_identical(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_memory_does_not_grow(rule, rng):
    stream = make_stream(rule)
    x, target = data(rng, 60)
    stream.push(x, target)
    before = fb._core.allocated_bytes(True)[0]
    tracemalloc.start()
    stream.push(x, target)
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(4):
        stream.push(x, target)
    assert tracemalloc.get_traced_memory()[0] - first < 8_000
    tracemalloc.stop()
    assert fb._core.allocated_bytes(False)[0] == before


def test_the_repr_and_config_say_what_it_is():
    stream = make_stream(fb.UORO(seed=3, every=2), batch_size=2)
    assert "UORO(seed=3, every=2)" in repr(stream)
    assert json.dumps(stream.state_dict()["config"])


@pytest.mark.parametrize("module", ["fastbptt.online", "fastbptt.stream"])
def test_docstring_examples(module):
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 10
    assert outcome.failed == 0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_strided_and_read_only_input(rule, rng):
    x, _ = data(rng)
    target = rng.standard_normal((20, 2, 4)).astype(np.float32)
    plain, strided = make_stream(rule, loss="mse"), make_stream(rule, loss="mse")
    expected = plain.push(x, target)
    wide = np.zeros((20, 4, 6), np.float32)
    wide[:, ::2, ::2] = x
    odd = np.asfortranarray(target)
    odd.flags.writeable = False
    got = strided.push(wide[:, ::2, ::2], odd)
    assert got.loss == expected.loss
    assert_identical(plain.state_dict(), strided.state_dict())


def test_sizes_that_no_memory_holds(rng):
    x, target = data(rng)
    for rule in (fb.Truncated(1, 10**13), fb.Truncated(1, 10**30)):
        stream = make_stream(rule)
        with pytest.raises(MemoryError):
            stream.push(x[0], target[0])
        assert stream.batch_size is None
    for size in (10**15, 10**30):
        with pytest.raises(MemoryError):
            make_stream(batch_size=size)
    with pytest.raises(MemoryError):
        fb.Stream(fb.Model(fb.LSTM(2000, 2000)), "mse", fb.RTRL(), batch_size=100)


def test_calls_of_several_threads_wait_for_each_other(rng):
    stream, alone = make_stream(fb.SnAp1()), make_stream(fb.SnAp1())
    x = np.ones((2, 3), np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: stream.push(x, [1, 2]), range(200)))
    for _ in range(200):
        alone.push(x, [1, 2])
    assert_identical(stream.state_dict(), alone.state_dict())


def test_empty_blocks(rng):
    stream = make_stream(batch_size=2)
    before = stream.state_dict()
    pushed = stream.push(np.zeros((0, 2, 3), np.float32), np.zeros((0, 2), np.int64))
    assert pushed.prediction.shape == (0, 2, 4)
    assert pushed.loss == 0.0
    assert_identical(before, stream.state_dict())


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_gradient_of_a_loss_is_finite(wrong, rng):
    stream = make_stream(loss=lambda output, target, steps: (0.0, np.full_like(output, wrong)))
    x, target = (array[0] for array in data(rng))
    before = stream.state_dict()["parameters"]
    with pytest.raises(ValueError, match=r"grad_output of loss: got -?(nan|inf)"):
        stream.push(x, target)
    assert_identical(before, stream.state_dict()["parameters"])


def test_it_says_how_to_copy_it():
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(make_stream())
