"""Layers of bfloat16: rounded where they say so, and nowhere else."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest

import bounds
import fastbptt as fb
import options
from fastbptt.memory import needs_of
from fastbptt.storage import load_training
from test_options import SMOOTH, draw_any

ml_dtypes = pytest.importorskip("ml_dtypes")
BF16 = np.dtype(ml_dtypes.bfloat16)

CELLS = [
    "rnn_tanh",
    "lstm",
    "coupled",
    "projected",
    "normalised",
    "gru",
    "gru_reset_before",
    "gru_normalised",
]


def make(kind, *sizes, dtype="bfloat16", **settings):
    if kind.startswith("rnn"):
        return fb.RNN(*sizes, nonlinearity=kind[4:], dtype=dtype, **settings)
    if kind.startswith("gru"):
        own = {"reset_after": kind != "gru_reset_before", "layer_norm": kind == "gru_normalised"}
        return fb.GRU(*sizes, **own, dtype=dtype, **settings)
    more = {
        "coupled": {"coupled": True},
        "projected": {"proj_size": sizes[1] // 2},
        "normalised": {"layer_norm": True},
    }
    return fb.LSTM(*sizes, dtype=dtype, **more.get(kind, {}), **settings)


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(BF16)


def narrow(problem):
    """The problem with what a layer of bfloat16 has in bfloat16."""

    def cast(value, dtype):
        return None if value is None else value.astype(dtype)

    return replace(
        problem,
        weights={name: weight.astype(BF16) for name, weight in problem.weights.items()},
        **{name: cast(getattr(problem, name), BF16) for name in ("x", "h")},
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cell", SMOOTH)
def test_with_any_options_results_are_near_those_of_float64(cell, seed, threads):
    problem = narrow(draw_any(np.random.default_rng([seed, 32]), cell, "float32"))
    found = options.run_library(problem)
    wanted = options.run_library(problem.astype("float64"))
    for name, value in wanted.items():
        here = found[name].astype(float)
        assert found[name].dtype == (BF16 if name in ("y", "h") else np.float32), name
        # Each h is off by 2**-8 at most, with a sign by chance, and what it changes is of its size.
        size = max(np.linalg.norm(value), 1e-2)
        assert np.linalg.norm(here - value) <= 2.0**-4 * size, name


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_each_step_is_the_float64_step_rounded(kind, rng):
    """From the h before as it was given, so that no rounding hides behind another."""
    T, B, size, H = 9, 4, 5, 21
    layer = make(kind, size, H, seed=3)
    exact = make(kind, size, H, seed=3, dtype="float64")
    exact.load_state_dict({name: w.astype(float) for name, w in layer.weights.items()})
    x = numbers(rng, T, B, size)
    state = None
    for t in range(T):
        before = None if state is None else copy.deepcopy(state)
        y, state = layer(x[t : t + 1], state)
        wide = before
        if before is not None:
            wide = (
                tuple(part.astype(float) for part in before)
                if kind == "lstm"
                else before.astype(float)
            )
        wanted, last = exact(x[t : t + 1].astype(float), wide)
        off = np.abs(y.astype(float) - wanted)
        assert (off <= np.abs(wanted) * (2.0**-8 + 1e-5) + 1e-7).all()
        h = state[0] if kind == "lstm" else state
        np.testing.assert_array_equal(h[0], y[0])
        if kind == "lstm":
            assert state[1].dtype == np.float32
            np.testing.assert_allclose(state[1], last[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tape", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gradient_is_that_of_the_formulas_at_the_rounded_states(cell, tape, rng):
    T, B, size, H = 7, 3, 4, 9
    # Products of one part would round the gate gradients too.
    layer = make(cell, size, H, bias=False, tape=tape, precision="highest", seed=2)
    x, grad_y = numbers(rng, T, B, size), rng.standard_normal((T, B, H)).astype(np.float32)
    y, _, recorded = layer.forward(x)
    found = layer.backward(recorded, grad_y)
    weights = [layer.weights[name].astype(float) for name in ("weight_ih_l0", "weight_hh_l0")]
    formulas = getattr(bounds, cell)
    for name, wanted in formulas(x.astype(float), *weights, grad_y, y.astype(float)).items():
        got = found.x if name == "x" else found.weights[name]
        assert got.dtype == np.float32
        in_float32 = 1e-5 * np.abs(wanted.value).max()
        allowed = in_float32 + (wanted.error if tape == "bfloat16" else 0.0)
        assert (np.abs(got - wanted.value) <= allowed).all(), name


def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite(rng):
    """A relu of two numbers' sum is any float32: y is what ml_dtypes makes of it."""
    layer = make("rnn_relu", 2, 1, bias=False)
    layer.weights["weight_ih_l0"][...] = 1.0
    layer.weights["weight_hh_l0"][...] = 0.0
    n = 4000
    large = np.exp2(rng.uniform(-120, 127, n)).astype(BF16)
    small = (large.astype(float) * rng.choice([2.0**-8, 2.0**-9, 1.7 * 2.0**-9, 0.0], n)).astype(
        BF16
    )
    top = np.array([np.finfo(np.float32).max, np.inf, np.nan, 1e-40], np.float32).astype(BF16)
    largest = float(ml_dtypes.finfo(BF16).max)
    pairs = np.concatenate(
        [
            np.stack([large, small], 1),
            np.stack([top, np.zeros(4, BF16)], 1),
            np.array([[largest, 1.5 * 2.0**119], [largest, 2.0**118]]).astype(BF16),
        ]
    )
    with np.errstate(over="ignore"):
        wanted = pairs.astype(np.float32).sum(1).astype(BF16).astype(np.float32)
    y, _ = layer(pairs[None])
    np.testing.assert_array_equal(y[0, :, 0].astype(np.float32), wanted)
    assert np.isnan(wanted).sum() == 1
    assert np.isinf(wanted).sum() == 3


@pytest.mark.parametrize("kind", CELLS)
def test_where_time_is_cut_changes_no_bit(kind, rng):
    T, B = 23, 5
    more = {"zoneout": 0.2, "recurrent_dropout": 0.3} if kind != "projected" else {}
    layer = make(kind, 4, 19, 2, dropout=0.3, learn_initial_state=True, seed=1, **more)
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, dtype="bfloat16", seed=1))
    x, target = numbers(rng, T, B, 4), rng.standard_normal((T, B, 2)).astype(np.float32)
    inside = {"seed": 7, "lengths": np.array([23, 7, 0, 23, 11])}
    if kind != "projected":
        inside |= {"resets": rng.random((T, B)) < 0.15, "mask": rng.random((T, B)) < 0.8}
    full = fb.value_and_grad(model, x, target, "mse", **inside)
    for schedule in (fb.Checkpointed(slots=1), fb.Checkpointed(slots=3), fb.Truncated(T)):
        cut = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **inside)
        assert cut.loss == pytest.approx(full.loss, rel=1e-13)
        for name, grad in full.grads.items():
            assert grad.dtype == np.float32
            np.testing.assert_array_equal(cut.grads[name], grad, err_msg=f"{schedule} {name}")
    for schedule in (fb.Truncated(5, 9), fb.Segmented(6, 2)):
        if isinstance(schedule, fb.Segmented):
            inside.pop("lengths")
        cut = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **inside)
        assert all(np.isfinite(grad).all() for grad in cut.grads.values())


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize(("T", "B"), [(0, 2), (1, 1), (2, 1), (70, 9)])
def test_any_shape_strided_and_read_only(kind, T, B, rng):
    layer = make(kind, 3, 5, 2, bidirectional=True, batch_first=True, seed=4)
    wide = numbers(rng, B, 2 * T, 6)
    x = wide[:, ::2, ::2]
    x.flags.writeable = False
    y, state, tape = layer.forward(x)
    same, _, other = layer.forward(np.ascontiguousarray(x))
    np.testing.assert_array_equal(y, same)
    np.testing.assert_array_equal(layer(x)[0], y)
    grad_y = rng.standard_normal(y.shape).astype(np.float32)
    grads, again = layer.backward(tape, grad_y), layer.backward(other, grad_y)
    np.testing.assert_array_equal(grads.x, again.x)
    assert y.dtype == BF16
    assert grads.x.shape == x.shape
    assert (state[0] if isinstance(state, tuple) else state).dtype == BF16


@pytest.mark.parametrize("kind", [kind for kind in CELLS if "normalised" not in kind])
def test_memory_is_half(kind):
    T, B, layers = 64, 4, 3
    sizes = 8, 16, layers
    narrow_layer, layer = make(kind, *sizes), make(kind, *sizes, dtype="float32")
    tapes = [
        each.forward(np.zeros((T, B, 8), each.dtype))[2].nbytes for each in (layer, narrow_layer)
    ]
    assert tapes[0] == 2 * tapes[1]
    steps = [needs_of(fb.Model(each), T, B).step for each in (layer, narrow_layer)]
    assert steps[0] == 2 * steps[1]


def test_a_model_trains_and_small_steps_are_not_lost(rng):
    parts = (fb.Embedding(11, 8), fb.GRU(8, 16), fb.Linear(16, 11))
    parts = tuple(
        type(part)._restore(
            part._settings() | {"dtype": "bfloat16"} | ({"tape": None} if place == 1 else {}),
            lambda name, part=part: part.weights[name].astype(BF16),
        )
        for place, part in enumerate(parts)
    )
    model = fb.Model(*parts)
    x = rng.integers(0, 11, (30, 6))
    start = {name: p.astype(np.float32) for name, p in model.parameters().items()}
    sgd = fb.SGD(model.parameters(), lr=2.0**-9)  # a step is below the rounding of most weights
    grads = fb.value_and_grad(model, x, x).grads
    for _ in range(200):
        sgd.step(grads)
    for name, parameter in model.parameters().items():
        assert parameter.dtype == BF16
        wanted = start[name] - 200 * 2.0**-9 * grads[name]
        np.testing.assert_allclose(
            parameter.astype(np.float32), wanted, rtol=2.0**-8, atol=1e-5, err_msg=name
        )
    adam = fb.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        result = fb.value_and_grad(model, x, x)
        losses.append(result.loss)
        adam.step(result.grads)
    assert losses[-1] < 0.2 * losses[0]
    assert model(x)[0].dtype == np.float32


def test_what_is_written_into_a_parameter_counts():
    weight = np.ones(3, BF16)
    sgd = fb.SGD({"weight": weight}, lr=1.0)
    sgd.step({"weight": np.full(3, 1e-3, np.float32)})
    weight[1] = 5.0
    sgd.step({"weight": np.full(3, 1e-3, np.float32)})
    master = sgd.state_dict()["master.weight"]
    np.testing.assert_allclose(master, [0.998, 4.999, 0.998], rtol=1e-6)
    with pytest.raises(TypeError, match="got dtype bfloat16, wanted float32"):
        sgd.step({"weight": weight})


@pytest.mark.parametrize("optimizer", [fb.Adam, fb.SGD, fb.RMSprop])
def test_training_goes_on_from_a_file(optimizer, tmp_path, rng):
    model = fb.Model(fb.LSTM(3, 4, dtype="bfloat16", seed=0))
    x, target = numbers(rng, 6, 2, 3), rng.standard_normal((6, 2, 4)).astype(np.float32)
    first = optimizer(model.parameters(), lr=1e-3)

    def train(model, optimizer):
        for _ in range(5):
            optimizer.step(fb.value_and_grad(model, x, target, "mse").grads)

    train(model, first)
    fb.save(tmp_path / "model", model, first)
    other, second, _ = load_training(tmp_path / "model")
    assert other.dtype == BF16
    train(model, first)
    train(other, second)
    for name, parameter in model.parameters().items():
        np.testing.assert_array_equal(parameter, other.parameters()[name])
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(value, second.state_dict()[name])
    again = pickle.loads(pickle.dumps(model.recurrent))
    np.testing.assert_array_equal(again(x)[0], model(x)[0])


def test_learned_states_and_states_that_are_given(rng):
    layer = fb.LSTM(3, 4, learn_initial_state=True, dtype="bfloat16", seed=0)
    for name in ("h0_l0", "c0_l0"):
        layer.weights[name][...] = rng.standard_normal(4)
    x = numbers(rng, 5, 2, 3)
    y, _, tape = layer.forward(x)
    assert layer.backward(tape, np.ones(y.shape, np.float32)).weights["c0_l0"].dtype == np.float32
    h, c = (np.tile(layer.weights[name], (1, 2, 1)) for name in ("h0_l0", "c0_l0"))
    np.testing.assert_array_equal(layer(x, (h, c.astype(np.float32)))[0], y)
    with pytest.raises(TypeError, match=r"state\[1\]: got dtype bfloat16, wanted float32"):
        layer(x, (h, c))
    with pytest.raises(TypeError, match=r"state\[0\]: got dtype float32, wanted bfloat16"):
        layer(x, (h.astype(np.float32), c.astype(np.float32)))


def test_other_dtypes_are_refused(rng):
    layer, readout = fb.GRU(3, 4, dtype="bfloat16"), fb.Linear(4, 2, dtype="bfloat16")
    wide = np.ones((5, 2, 3), np.float32)
    with pytest.raises(TypeError, match="x: got dtype float32, wanted bfloat16"):
        layer(wide)
    with pytest.raises(TypeError, match="x: got dtype bfloat16, wanted float32"):
        fb.GRU(3, 4)(wide.astype(BF16))
    with pytest.raises(TypeError, match="x: got dtype float32, wanted bfloat16"):
        readout(np.ones((5, 4), np.float32))
    y, _, tape = layer.forward(wide.astype(BF16))
    with pytest.raises(TypeError, match="grad_y: got dtype bfloat16, wanted float32"):
        layer.backward(tape, y)
    with pytest.raises(ValueError, match="wanted one dtype"):
        fb.Model(layer, fb.Linear(4, 2))
    with pytest.raises(ValueError, match="a stream wants float32 or float64"):
        fb.Stream(fb.Model(layer), loss="mse", rule=fb.Truncated(1, 2))
    assert layer([[[1.0, 2.0, 3.0]]])[0].dtype == BF16


def test_without_ml_dtypes_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"pip install 'fastbptt\[bfloat16\]'"):
        fb.LSTM(2, 3, dtype="bfloat16")


@pytest.mark.parametrize("cell", [fb.LSTM, fb.GRU])
def test_the_tape_of_layer_norm_is_float32(cell):
    layer = cell(2, 3, layer_norm=True, dtype="bfloat16")
    assert layer.tape == "float32"
    assert "tape=" not in repr(layer)
    with pytest.raises(ValueError, match="tape: got 'bfloat16' beside layer_norm=True"):
        cell(2, 3, layer_norm=True, dtype="bfloat16", tape="bfloat16")


@pytest.mark.parametrize("at", [-1, None])
@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"])
def test_gradient_flow_is_near_that_of_float32(kind, at, rng):
    models = []
    for dtype in ("bfloat16", "float32"):
        layer = make(kind, 3, 8, 2, dtype=dtype, seed=0)
        models.append(fb.Model(layer, fb.Linear(8, 2, dtype=dtype, seed=1)))
    narrow_model, wide_model = models
    for name, weight in narrow_model.parameters().items():
        wide_model.parameters()[name][...] = weight.astype(np.float32)
    x, target = numbers(rng, 12, 4, 3), rng.standard_normal((12, 4, 2)).astype(np.float32)
    got = fb.gradient_flow(narrow_model, x, target, "mse", at=at)
    wanted = fb.gradient_flow(wide_model, x.astype(np.float32), target, "mse", at=at)
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=2.0**-6)
    found = {"h": got.h, "c": got.c, **got.weights}
    for name, norms in {"h": wanted.h, "c": wanted.c, **wanted.weights}.items():
        if norms is None:
            assert found[name] is None
            continue
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], norms, rtol=2.0**-4, atol=2.0**-6 * norms.max())


@pytest.mark.parametrize("kind", CELLS)
def test_products_of_one_part(kind, rng):
    """Where there are any, they are the default, and round nothing more but gate gradients."""
    x, grad_y = numbers(rng, 12, 17, 24), None
    found = []
    for settings in ({"precision": "highest"}, {}, {"precision": "medium"}):
        layer = make(kind, 24, 40, seed=3, **settings)
        y, _, tape = layer.forward(x)
        if grad_y is None:
            grad_y = rng.standard_normal(y.shape).astype("f4")
        grads = layer.backward(tape, grad_y)
        found.append([y, grads.x, *grads.weights.values()])
    for plain, parts, same in zip(*found, strict=True):
        np.testing.assert_array_equal(parts, same)
        plain, parts = plain.astype("f8"), parts.astype("f8")
        assert np.linalg.norm(parts - plain) <= 2.0**-7 * np.linalg.norm(plain)
