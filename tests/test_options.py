"""All options of a layer, alone and together, against the reference."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fastbptt as fb
import options
from conftest import require
from reference import CELLS, assert_close, make_layer

_reference = pytest.importorskip(
    "fastbptt._reference", reason="the reference is built with -DFASTBPTT_TESTS=ON"
)


def draw_inside(rng):
    """Options that live inside a step."""
    return {
        "resets": bool(rng.random() < 0.4),
        "mask": bool(rng.random() < 0.4),
        "recurrent_dropout": float(rng.choice([0.0, 0.0, 0.4])),
        "zoneout": (float(rng.choice([0.0, 0.2])), float(rng.choice([0.0, 0.5]))),
        "peephole": bool(rng.random() < 0.4),
        "coupled": bool(rng.random() < 0.4),
        "cells": bool(rng.random() < 0.4),
        "layer_norm": bool(rng.random() < 0.4),
        "proj_size": int(rng.choice([0, 0, 1, 2, 7, 16])),
    }


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
        **(draw_inside(rng) if rng.random() < 0.7 else {}),
    }
    sizes = (
        int(rng.choice([1, 2, 5, 12, 40])),
        int(rng.choice([1, 2, 3, 7, 13])),
        int(rng.integers(1, 9)),
        int(rng.choice([1, 3, 8, 17, 33])),
    )
    # Two normalised values depend on nothing but their order, and the product with one input on its
    # sign, up to a part that rounding hides.
    if min(sizes[2:]) < 3:
        fixed = {**fixed, "layer_norm": False}
    return options.draw(rng, cell, sizes, **{**chosen, **fixed})


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


# Lengths, whatever else


@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_behind_a_length_does_not_matter(cell):
    problem = draw_any(np.random.default_rng(1), cell, ragged=True, directions=2, num_layers=2)
    results = options.run_library(problem)
    T = problem.x.shape[0]
    away = np.arange(T)[:, None] >= problem.lengths
    assert not results["y"][away].any()
    assert not results["grad_x"][away].any()
    problem.x[away] = np.nan
    problem.grad_y[away] = np.nan
    for name, value in options.run_library(problem).items():
        np.testing.assert_array_equal(value, results[name], err_msg=name)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_size", [64, 61])
def test_long_padding_is_zero_in_memory_that_was_not(hidden_size, dtype, batch_first, threads):
    """More than the second cache holds; what lies there before is the results of a step before."""
    dtype = require("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float32
    T, B, I = 90, 100, 63  # noqa: E741
    rng = np.random.default_rng(hidden_size)
    layer = fb.GRU(I, hidden_size, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=0)
    shape = (B, T) if batch_first else (T, B)
    x = rng.standard_normal((*shape, I)).astype(dtype)
    grad_y = rng.standard_normal((*shape, 2 * hidden_size), dtype=np.float32)
    lengths = rng.integers(0, T + 1, B)
    away = np.arange(T) >= lengths[:, None] if batch_first else np.arange(T)[:, None] >= lengths
    assert x.nbytes > 1 << 20
    for given in (None, lengths, lengths, np.zeros(B, int)):
        y, _, tape = layer.forward(x, lengths=given)
        grads = layer.backward(tape, grad_y)
        there = np.ones_like(away) if given is None else ~away & (given.max() > 0)
        assert not y[~there].any()
        assert not grads.x[~there].any()
        assert y[there].any(axis=-1).all()
        assert grads.x[there].any(axis=-1).all()
        del y, tape, grads


def test_long_padding_of_a_sequence_in_pieces():
    """Pieces that begin behind some of the lengths, and behind all."""
    T, B, I, H = 400, 64, 64, 64  # noqa: E741
    rng = np.random.default_rng(0)
    model = fb.Model(fb.RNN(I, H, seed=0), fb.Linear(H, 1, seed=0))
    x = rng.standard_normal((T, B, I), dtype=np.float32)
    target = rng.standard_normal((T, B, 1), dtype=np.float32)
    lengths = rng.integers(0, 250, B)
    dx = [np.full_like(x, np.nan) for _ in range(2)]
    found = [
        fb.value_and_grad(model, x, target, "mse", schedule=schedule, lengths=lengths, grad_x=to)
        for schedule, to in zip((fb.Full(), fb.Checkpointed(slots=2)), dx, strict=True)
    ]
    for name, grad in found[0].grads.items():
        np.testing.assert_array_equal(grad, found[1].grads[name], err_msg=name)
    np.testing.assert_array_equal(*dx)
    assert not dx[0][np.arange(T)[:, None] >= lengths].any()


@pytest.mark.parametrize("cell", SMOOTH)
def test_gradients_are_those_of_finite_differences(cell):
    """Along one random direction through everything that has a gradient."""
    rng = np.random.default_rng(SMOOTH.index(cell))
    problem = options.draw(
        rng, cell, (6, 4, 3, 5), num_layers=2, directions=2, dropout=0.4, learned=True,
        with_state=False,
    )  # fmt: skip
    layer = options.layer_for(problem)
    way = {name: rng.standard_normal(w.shape) for name, w in layer.weights.items()}
    way_x = rng.standard_normal(problem.x.shape)

    def value(step):
        for name, weight in layer.weights.items():
            weight[...] = problem.weights[name] + step * way[name]
        y, state, _ = layer.forward(
            problem.x + step * way_x, lengths=problem.lengths, seed=problem.seed
        )
        parts = zip(
            (y, *(state if cell == "lstm" else [state])),
            (problem.grad_y, problem.grad_h, problem.grad_c),
            strict=False,
        )
        return sum(float((part * grad).sum()) for part, grad in parts)

    there = np.arange(6)[:, None] < problem.lengths
    problem.grad_y[~there] = 0.0
    results = options.run_library(problem)
    slope = float((results["grad_x"] * way_x).sum())
    slope += sum(float((results[f"grad_{name}"] * way[name]).sum()) for name in way)
    step = 1e-5
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-7, abs=1e-7)


LENGTHS = {
    "float": ([1.0, 2.0, 3.0], TypeError, "lengths: got "),
    "too few": ([1, 2], ValueError, r"lengths: got shape \(2,\), wanted \(3,\)"),
    "negative": ([1, -1, 2], ValueError, "lengths: got -1, wanted from 0 to T = 5"),
    "too long": ([1, 6, 2], ValueError, "lengths: got 6, wanted from 0 to T = 5"),
    "text": ("abc", TypeError, "lengths: got "),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_wrong_lengths_are_named(case):
    lengths, error, message = LENGTHS[case]
    model, x = fb.Model(fb.GRU(2, 4)), np.zeros((5, 3, 2), np.float32)
    target = np.zeros((5, 3, 4), np.float32)
    for call in (
        lambda: model(x, lengths=lengths),
        lambda: model.recurrent(x, lengths=lengths),
        lambda: model.recurrent.forward(x, lengths=lengths),
        lambda: fb.value_and_grad(model, x, target, "mse", lengths=lengths),
        lambda: fb.evaluate(model, x, target, "mse", lengths=lengths),
    ):
        with pytest.raises(error, match=message):
            call()


def test_all_rows_of_length_zero():
    layer = fb.LSTM(2, 3, bidirectional=True)
    x, state = np.ones((4, 2, 2), np.float32), [np.ones((2, 2, 3), np.float32) for _ in "hc"]
    y, last, tape = layer.forward(x, tuple(state), lengths=[0, 0])
    grads = layer.backward(tape, np.ones_like(y), tuple(state))
    assert not y.any()
    assert not grads.x.any()
    for given, part, grad in zip(state, last, grads.state, strict=True):
        np.testing.assert_array_equal(part, given)
        np.testing.assert_array_equal(grad, given)
    assert not any(grad.any() for grad in grads.weights.values())


# Training


def mean_square(model):
    """The mean square of rows one by one, as a callable that divides by the whole."""

    def loss(output, target, steps):
        part = target - output
        return float((part**2).sum()) / loss.size, -2 * part / loss.size

    return loss


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "callable"])
def test_the_loss_is_that_of_the_rows_one_by_one(loss, directions, batch_first):
    rng = np.random.default_rng(7)
    T, B, classes = 9, 5, 4
    lengths = np.array([3, 0, 9, 1, 7])
    layer = fb.GRU(
        3, 6, 2, bidirectional=directions == 2, dtype="float64", batch_first=batch_first, seed=0
    )
    model = fb.Model(layer, fb.Linear(6 * directions, classes, dtype="float64", seed=1))
    x = rng.standard_normal((T, B, 3))
    if loss == "cross_entropy":
        target, size = rng.integers(0, classes, (T, B)), lengths.sum()
    else:
        target, size = rng.standard_normal((T, B, classes)), lengths.sum() * classes

    def order(a):
        return a.swapaxes(0, 1) if batch_first else a

    kind = mean_square(model) if loss == "callable" else loss
    if loss == "callable":
        kind.size = size
        target[np.arange(T)[:, None] >= lengths] = 0.0  # as the outputs are there
    whole = fb.value_and_grad(model, order(x), order(target), kind, lengths=lengths)
    assert fb.evaluate(model, order(x), order(target), kind, lengths=lengths)[0] == pytest.approx(
        whole.loss, rel=1e-12
    )
    value, grads = 0.0, dict.fromkeys(whole.grads, 0.0)
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        part = fb.value_and_grad(model, order(x[:n, b : b + 1]), order(target[:n, b : b + 1]), kind)
        share = 1.0 if loss == "callable" else n / lengths.sum()
        value += share * part.loss
        for name, grad in part.grads.items():
            grads[name] += share * grad
        np.testing.assert_allclose(whole.state[:, b], part.state[:, 0], rtol=1e-12)
    assert whole.loss == pytest.approx(value, rel=1e-12)
    for name, grad in grads.items():
        np.testing.assert_allclose(whole.grads[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_cutting_time_changes_no_bit(cell, ragged, threads):
    """With lengths, with dropout, and from a learned state."""
    rng = np.random.default_rng(3)
    T, B = 23, 6
    layer = make_layer(cell, 3, 8, 2, dropout=0.5, learn_initial_state=True, seed=0)
    model = fb.Model(layer, fb.Linear(8, 5, seed=1))
    for weight in layer.weights.values():
        weight += rng.normal(0.0, 0.1, weight.shape).astype(np.float32)
    x = rng.standard_normal((T, B, 3)).astype(np.float32)
    target = rng.integers(0, 5, (T, B))
    lengths = [4, 23, 0, 11, 12, 23] if ragged else None
    whole = fb.value_and_grad(model, x, target, schedule=fb.Full(), lengths=lengths, seed=5)
    for schedule in (fb.Checkpointed(slots=1), fb.Checkpointed(slots=3), fb.Truncated(T)):
        other = fb.value_and_grad(model, x, target, schedule=schedule, lengths=lengths, seed=5)
        assert other.loss == pytest.approx(whole.loss, rel=1e-6)
        for name, grad in whole.grads.items():
            np.testing.assert_array_equal(other.grads[name], grad, err_msg=f"{schedule} {name}")
    np.testing.assert_array_equal(
        np.asarray(other.state), np.asarray(whole.state), err_msg="the last state"
    )


def test_windows_with_lengths_add_up_to_truncated():
    rng = np.random.default_rng(3)
    model = fb.Model(fb.LSTM(3, 8, 2, dropout=0.3, dtype="float64", seed=0))
    x, target = rng.standard_normal((20, 4, 3)), rng.standard_normal((20, 4, 8))
    lengths = np.array([20, 3, 9, 14])
    schedule = fb.Truncated(4, 7)
    whole = fb.value_and_grad(model, x, target, "mse", None, schedule, lengths=lengths, seed=1)
    windows = list(fb.each_window(model, x, target, "mse", None, schedule, lengths=lengths, seed=1))
    shares = [np.clip(lengths - t, 0, 4).sum() / lengths.sum() for t in range(0, 20, 4)]
    for name, grad in whole.grads.items():
        total = sum(w * part.grads[name] for w, part in zip(shares, windows, strict=True))
        np.testing.assert_allclose(total, grad, rtol=1e-9, atol=1e-12, err_msg=name)


def test_schedules_that_cut_time_are_refused_in_both_directions():
    model = fb.Model(fb.RNN(2, 3, bidirectional=True))
    x, target = np.ones((8, 2, 2), np.float32), np.zeros((8, 2, 6), np.float32)
    for schedule in (fb.Checkpointed(slots=2), fb.Truncated(2), fb.Segmented(4)):
        with pytest.raises(ValueError, match=r"schedule: got .*wanted Full\(\)"):
            fb.value_and_grad(model, x, target, "mse", schedule=schedule)
    with pytest.raises(ValueError, match=r"schedule: got Truncated"):
        fb.each_window(model, x, target, "mse", schedule=fb.Truncated(2))
    with pytest.raises(ValueError, match="lengths: got an array with Segmented"):
        fb.value_and_grad(
            fb.Model(fb.RNN(2, 6)), x, target, "mse", schedule=fb.Segmented(4), lengths=[8, 2]
        )


# Dropout


def test_dropout_is_of_training_alone_and_of_its_seed():
    layer = fb.LSTM(3, 5, 3, dropout=0.5, seed=0)
    x = np.random.default_rng(0).standard_normal((7, 4, 3)).astype(np.float32)
    plain = fb.LSTM(3, 5, 3, seed=0)
    np.testing.assert_array_equal(layer(x)[0], plain(x)[0])
    np.testing.assert_array_equal(layer.forward(x, training=False)[0], plain(x)[0])
    first, again, other = (layer.forward(x, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # Without a seed, each call draws anew; a layer of the same seed draws the same.
    twin = fb.LSTM(3, 5, 3, dropout=0.5, seed=0)
    calls = [layer.forward(x)[0] for _ in range(2)]
    assert (calls[0] != calls[1]).any()
    for call in calls:
        np.testing.assert_array_equal(twin.forward(x)[0], call)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "half", True])
def test_a_wrong_probability_is_named(p):
    with pytest.raises((ValueError, TypeError), match="dropout: got"):
        fb.GRU(2, 3, 2, dropout=p)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_a_wrong_seed_is_named(seed):
    layer = fb.GRU(2, 3, 2, dropout=0.5)
    with pytest.raises((ValueError, TypeError), match="seed: got"):
        layer.forward(np.ones((2, 2, 2), np.float32), seed=seed)


# What carries the options


EVERYTHING = {"bidirectional": True, "dropout": 0.25, "learn_initial_state": True}


@pytest.mark.parametrize("cell", CELLS)
def test_copies_carry_the_options(cell, tmp_path):
    layer = make_layer(cell, 3, 4, 2, **EVERYTHING, seed=0)
    model = fb.Model(layer, fb.Linear(8, 2, seed=1))
    x = np.random.default_rng(0).standard_normal((6, 3, 3)).astype(np.float32)
    y, _, _ = layer.forward(x, seed=9, lengths=[6, 2, 4])
    fb.save(tmp_path / "model.safetensors", model)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        fb.load(tmp_path / "model.safetensors").recurrent,
        fb.Model.from_config(model.config()).recurrent,
    ]
    copies[-1].load_state_dict(layer.weights)
    for twin in copies:
        assert twin.config() == layer.config()
        assert repr(twin) == repr(layer)
        np.testing.assert_array_equal(twin.forward(x, seed=9, lengths=[6, 2, 4])[0], y)
    for name, value in EVERYTHING.items():
        assert layer.config()[name] == value
        assert f"{name}={value}" in repr(layer)


def test_a_config_without_the_options_is_read():
    config = fb.GRU(2, 3).config()
    for name in EVERYTHING:
        del config[name]
    del config["type"]
    assert fb.GRU(**config).config() == fb.GRU(2, 3).config()


def test_a_readout_takes_both_directions():
    fb.Model(fb.GRU(2, 3, bidirectional=True), fb.Linear(6, 1))
    with pytest.raises(ValueError, match=r"with in_features 3 behind .* 2 x hidden_size 6"):
        fb.Model(fb.GRU(2, 3, bidirectional=True), fb.Linear(3, 1))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bidirectional_layer_is_that_of_torch(kind, bias):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    options_ = {"bidirectional": True, "bias": bias, "num_layers": 2}
    theirs = getattr(torch.nn, kind)(3, 5, **options_).double()
    ours = getattr(fb, kind)(3, 5, **options_, dtype="float64")
    ours.load_state_dict({name: w.detach().numpy() for name, w in theirs.state_dict().items()})
    x, lengths = torch.randn(8, 4, 3).double(), torch.tensor([3, 8, 1, 6])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, last = theirs(packed)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=8)
    our_y, our_last = ours(x.numpy(), lengths=lengths.numpy())
    np.testing.assert_allclose(our_y, y.detach(), atol=1e-12)
    for part, wanted in zip(
        our_last if kind == "LSTM" else [our_last], last if kind == "LSTM" else [last], strict=True
    ):
        np.testing.assert_allclose(part, wanted.detach(), atol=1e-12)
