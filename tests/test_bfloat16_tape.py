"""A tape in bfloat16: no result changes, the gradient is off by what its roundings explain."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import bounds
import fastbptt as fb
import options
from fastbptt.memory import needs_of
from test_options import draw_any

KINDS = ["lstm", "coupled", "projected", "gru", "gru_reset_before"]
VALUES = {"lstm": 5, "coupled": 4, "projected": 5, "gru": 4, "gru_reset_before": 3}


def make(kind, *sizes, **settings):
    if kind.startswith("gru"):
        return fb.GRU(*sizes, reset_after=kind == "gru", **settings)
    more = {"coupled": {"coupled": True}, "projected": {"proj_size": sizes[1] // 2}}
    return fb.LSTM(*sizes, **more.get(kind, {}), **settings)


def pair(kind, *sizes, **settings):
    """The same layer with either tape."""
    settings = {"seed": 1, **settings}
    return make(kind, *sizes, **settings), make(kind, *sizes, tape="bfloat16", **settings)


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
@pytest.mark.parametrize("seed", range(10))
def test_with_any_options_the_results_are_the_same_and_the_gradient_is_near(cell, seed, threads):
    rng = np.random.default_rng([seed, 16])
    problem = draw_any(rng, cell, "float32", layer_norm=False)
    plain = options.run_library(problem)
    found = options.run_library(problem, options.layer_for(problem, tape="bfloat16"))
    changed = 0
    for name, wanted in plain.items():
        if name.startswith("grad_"):
            # Each error is of 2**-8 at most, with a sign by chance.
            size = max(np.linalg.norm(wanted), 1e-3)
            assert np.linalg.norm(found[name] - wanted) <= 2.0**-5 * size, name
            changed += bool((found[name] != wanted).any())
        else:
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    lengths = problem.lengths
    nothing_runs = lengths is not None and not lengths.any()
    assert changed or nothing_runs or (problem.mask is not None and not problem.mask.any())


@pytest.mark.parametrize(("gain", "T"), [(0.5, 12), (2.0, 7), (8.0, 3)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_each_element_of_the_gradient_is_within_its_bound(cell, gain, T, rng):
    """With a gain of 8 many gates are so near to 1 that plain rounding would lose what is left."""
    B, size, H = 3, 4, 9
    layer = make(cell, size, H, bias=False, tape="bfloat16", seed=2)
    for weight in layer.weights.values():
        weight *= gain
    x, grad_y = (rng.standard_normal((T, B, n)).astype(np.float32) for n in (size, H))
    _, _, tape = layer.forward(x)
    found = layer.backward(tape, grad_y)
    weights = [layer.weights[name].astype(float) for name in ("weight_ih_l0", "weight_hh_l0")]
    bounded = getattr(bounds, cell)(x.astype(float), *weights, grad_y.astype(float))
    for name, wanted in bounded.items():
        got = found.x if name == "x" else found.weights[name]
        off = np.abs(got - wanted.value)
        in_float32 = 1e-5 * np.abs(wanted.value).max()
        assert (off <= wanted.error + in_float32).all(), name
        # And the bound says something.
        assert np.median(wanted.error / np.abs(wanted.value)) < 0.5


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_that_remember_for_long_keep_how_long(kind, rng):
    """Of a forget gate of 0.999 bfloat16 makes 1, and of 0.998 0.996: neither is in the tape."""
    layer, narrow = pair(kind, 3, 20, chrono=1000.0)
    x = rng.standard_normal((1000, 2, 3)).astype(np.float32)
    last = np.zeros((1000, 2, 20), np.float32)
    last[-1] = rng.standard_normal((2, 20))
    grads = [each.backward(each.forward(x)[2], last) for each in (layer, narrow)]
    assert relative(grads[1].x[:10], grads[0].x[:10]) < 0.02
    assert relative(grads[1].x, grads[0].x) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_tape_takes_half_and_the_planner_knows(kind):
    T, B, H, layers = 13, 4, 10, 2
    layer, narrow = pair(kind, 3, H, layers)
    x = np.ones((T, B, 3), np.float32)
    tapes = [each.forward(x)[2].nbytes for each in (layer, narrow)]
    assert tapes[0] - tapes[1] == layers * T * B * VALUES[kind] * H * 2
    assert make(kind, 3, H).forward(x)[2].nbytes == 2 * narrow_bytes(kind, H, x)
    steps = [needs_of(fb.Model(each), T, B).step for each in (layer, narrow)]
    assert steps[0] - steps[1] == layers * B * VALUES[kind] * H * 2


def narrow_bytes(kind, H, x):
    return make(kind, 3, H, tape="bfloat16").forward(x)[2].nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_options", [False, True])
def test_where_time_is_cut_changes_no_bit(kind, with_options, rng):
    T, B = 23, 5
    more = {"zoneout": 0.2, "recurrent_dropout": 0.3} if kind != "projected" else {}
    layer = pair(kind, 4, 19, 2, **(more if with_options else {}))[1]
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, seed=1))
    x, target = (rng.standard_normal((T, B, n)).astype(np.float32) for n in (4, 2))
    inside = {"seed": 7, "lengths": np.array([23, 7, 0, 23, 11])}
    if with_options and kind != "projected":
        inside |= {"resets": rng.random((T, B)) < 0.15, "mask": rng.random((T, B)) < 0.8}
    full = fb.value_and_grad(model, x, target, "mse", **inside)
    schedules = [fb.Checkpointed(slots=1), fb.Checkpointed(slots=3), fb.Truncated(T)]
    for schedule in schedules:
        cut = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **inside)
        assert cut.loss == pytest.approx(full.loss, rel=1e-13)
        for name, grad in full.grads.items():
            np.testing.assert_array_equal(cut.grads[name], grad, err_msg=f"{schedule} {name}")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_given_state_is_seen_as_the_tape_would_have_it(kind, rng):
    """Two calls are as one, also where the second begins with a c that bfloat16 has not."""
    layer = pair(kind, 3, 7)[1]
    x = rng.standard_normal((9, 5, 3)).astype(np.float32)
    y, _, whole = layer.forward(x)
    first, state, tape_1 = layer.forward(x[:4])
    second, _, tape_2 = layer.forward(x[4:], state)
    np.testing.assert_array_equal(y, np.concatenate([first, second]))
    grads = layer.backward(whole, np.ones_like(y))
    late = layer.backward(tape_2, np.ones_like(second))
    early = layer.backward(tape_1, np.ones_like(first), late.state)
    np.testing.assert_array_equal(grads.x, np.concatenate([early.x, late.x]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-41])
def test_what_is_not_finite_stays_where_it_is(kind, value, rng):
    x = rng.standard_normal((6, 3, 4)).astype(np.float32)
    x[2, 1, 0] = value
    grads = []
    for layer in pair(kind, 4, 17):
        y, _, tape = layer.forward(x)
        grads.append(layer.backward(tape, np.ones_like(y)))
    for wanted, found in (
        (grads[0].x, grads[1].x),
        *((grads[0].weights[name], grads[1].weights[name]) for name in grads[0].weights),
    ):
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "B"), [(0, 2), (1, 1), (2, 1)])
def test_short_sequences(kind, T, B, rng):
    x = rng.standard_normal((T, B, 3)).astype(np.float32)
    results = []
    for layer in pair(kind, 3, 5):
        y, _, tape = layer.forward(x)
        results.append((y, layer.backward(tape, np.ones_like(y)).x))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=0.05, atol=1e-3)


def test_the_option_is_kept(tmp_path):
    for layer in (fb.LSTM(2, 3, tape="bfloat16"), fb.GRU(2, 3, tape="bfloat16")):
        assert "tape='bfloat16'" in repr(layer)
        assert pickle.loads(pickle.dumps(layer)).tape == "bfloat16"
        fb.save(tmp_path / "model", fb.Model(layer))
        assert fb.load(tmp_path / "model").recurrent.tape == "bfloat16"
    assert fb.LSTM(2, 3).tape == "float32"
    assert fb.GRU(2, 3, dtype="float64").tape == "float64"
    assert fb.RNN(2, 3).tape is None


@pytest.mark.parametrize(
    ("dtype", "tape"),
    [("float64", "bfloat16"), ("float64", "float32"), ("float32", "float64"), ("float32", "half")],
)
@pytest.mark.parametrize("kind", [fb.LSTM, fb.GRU])
def test_another_tape_is_refused(kind, dtype, tape):
    with pytest.raises(ValueError, match=f"tape: got '{tape}' for a layer of {dtype}, wanted"):
        kind(2, 3, dtype=dtype, tape=tape)


def test_a_stream_has_none():
    with pytest.raises(ValueError, match="a stream has no tape"):
        fb.Stream(fb.Model(fb.GRU(2, 3, tape="bfloat16")), loss="mse", rule=fb.Truncated(1, 2))
    fb.Stream(fb.Model(fb.GRU(2, 3)), loss="mse", rule=fb.Truncated(1, 2))
