"""What the options inside a step promise beyond their formulas.

Where time is cut, on how many threads and how often a step is computed changes nothing; rows that
begin anew and steps that are missing are as if they had been taken apart by hand.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import fastbptt as fb
import options
from reference import assert_close
from test_options import draw_any

_reference = pytest.importorskip(
    "fastbptt._reference", reason="the reference is built with -DFASTBPTT_TESTS=ON"
)

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
KINDS = [*CELLS, "lstm+proj_size", "lstm+layer_norm", "lstm+both", "gru+layer_norm"]
T, B, SIZE, H, P = 23, 5, 4, 19, 7


def make(kind, seed=0, **more):
    """A layer with every option that its kind has."""
    kind, _, other = kind.partition("+")
    every = {"recurrent_dropout": 0.3, "zoneout": 0.2, "seed": seed}
    every |= {"layer_norm": True} if other in ("layer_norm", "both") else {}
    every |= {"proj_size": P} if other in ("proj_size", "both") else {}
    if kind.startswith("rnn"):
        return fb.RNN(SIZE, H, 2, nonlinearity=kind[4:], **every | more)
    if kind == "lstm":
        layer = fb.LSTM(SIZE, H, 2, **every | {"zoneout": (0.2, 0.4), "peephole": True} | more)
    else:
        layer = fb.GRU(SIZE, H, 2, reset_after=kind == "gru", **every | more)
    for name, gain in layer.weights.items():
        if name.startswith("weight_ln_hh"):
            gain *= 0.1  # at 1 a small difference would grow from step to step
    return layer


@pytest.fixture
def data(rng):
    x = rng.standard_normal((T, B, SIZE)).astype(np.float32)
    target = rng.standard_normal((T, B, 2)).astype(np.float32)
    resets, mask = rng.random((T, B)) < 0.15, rng.random((T, B)) < 0.8
    return x, target, {"resets": resets, "mask": mask, "seed": 7}


def assert_same(one, other):
    assert one.loss == pytest.approx(other.loss, rel=1e-13)  # the parts add up in another order
    for name, grad in one.grads.items():
        np.testing.assert_array_equal(grad, other.grads[name], err_msg=name)


def parts_of(state):
    return state if isinstance(state, tuple) else (state,)


def assert_same_states(state, other):
    for one, two in zip(parts_of(state), parts_of(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_draws_the_same(kind, learned, data):
    x, target, inside = data
    layer = make(kind, learn_initial_state=learned)
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, seed=1))
    full = fb.value_and_grad(model, x, target, "mse", **inside)
    for slots in (1, 3):
        schedule = fb.Checkpointed(slots=slots)
        cut = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **inside)
        assert_same(cut, full)
    window = fb.value_and_grad(model, x, target, "mse", schedule=fb.Truncated(T), **inside)
    assert_same(window, full)
    other = fb.value_and_grad(model, x, target, "mse", **{**inside, "seed": 8})
    assert other.loss != full.loss


@pytest.mark.parametrize("kind", KINDS)
def test_windows_draw_what_the_whole_draws(kind, data):
    x, target, inside = data
    layer = make(kind)
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, seed=1))
    schedule = fb.Truncated(5, 9)
    whole = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **inside)
    windows = list(fb.each_window(model, x, target, "mse", schedule=schedule, **inside))
    steps = [min(5, T - t) for t in range(0, T, 5)]
    loss = sum(w.loss * n for w, n in zip(windows, steps, strict=True)) / T
    assert loss == pytest.approx(whole.loss, rel=1e-5)
    assert_same_states(windows[-1].state, whole.state)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_draw_the_same(kind, data):
    x, _, _ = data
    layer = make(kind)
    results = []
    before = fb.get_num_threads()
    for threads in (1, 3):
        fb.set_num_threads(threads)
        y, _, tape = layer.forward(np.tile(x, (20, 1, 1)), seed=3)
        results.append((y, layer.backward(tape, y).x))
    fb.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_that_say_nothing_change_no_bit(kind, data):
    x, _, _ = data
    layer = make(kind, recurrent_dropout=0.0, zoneout=0.0)
    plain = layer.forward(x)
    marked = layer.forward(x, resets=np.zeros((T, B), bool), mask=np.ones((T, B), bool))
    np.testing.assert_array_equal(plain[0], marked[0])
    grads, with_marks = (layer.backward(run[2], run[0]) for run in (plain, marked))
    np.testing.assert_array_equal(grads.x, with_marks.x)
    for name, grad in grads.weights.items():
        np.testing.assert_array_equal(grad, with_marks.weights[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_are_as_if_each_ran_alone(kind, data, rng):
    x, _, _ = data
    layer = make(kind, recurrent_dropout=0.0, zoneout=0.0)
    resets = np.zeros((T, B), bool)
    resets[[8, 15]] = True
    y, _, tape = layer.forward(x, resets=resets)
    weight = rng.standard_normal(y.shape).astype(np.float32)
    grads = layer.backward(tape, weight)
    total = dict.fromkeys(grads.weights, 0.0)
    for part in (slice(0, 8), slice(8, 15), slice(15, T)):
        own, _, tape = layer.forward(x[part])
        np.testing.assert_allclose(own, y[part], rtol=1e-5, atol=1e-6)
        alone = layer.backward(tape, weight[part])
        np.testing.assert_allclose(alone.x, grads.x[part], rtol=1e-4, atol=1e-5)
        total = {name: total[name] + grad for name, grad in alone.weights.items()}
    for name, grad in total.items():
        np.testing.assert_allclose(grads.weights[name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_steps_are_as_if_they_were_not_there(kind, data):
    x, _, _ = data
    layer = make(kind, recurrent_dropout=0.0, zoneout=0.0)
    there = np.ones(T, bool)
    there[[0, 3, 4, 11, T - 1]] = False
    mask = np.repeat(there[:, None], B, axis=1)
    holes = np.where(mask[..., None], x, np.float32(np.nan))
    y, state, tape = layer.forward(holes, mask=mask)
    short, short_state, _ = layer.forward(x[there])
    np.testing.assert_allclose(y[there], short, rtol=1e-5, atol=1e-6)
    for one, other in zip(parts_of(state), parts_of(short_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[4], y[2])
    grads = layer.backward(tape, np.ones_like(y))
    assert not grads.x[~there].any()
    assert all(np.isfinite(grad).all() for grad in grads.weights.values())


@pytest.mark.parametrize("kind", CELLS)
def test_without_training_zoneout_is_its_expectation(kind, rng):
    cell = "lstm" if kind == "lstm" else kind
    zoneout = (0.25, 0.5) if kind == "lstm" else 0.25
    layer = make(kind, zoneout=zoneout, dtype="float64", recurrent_dropout=0.9)
    x = rng.standard_normal((T, B, SIZE))
    y, _ = layer(x)
    below = x
    for number in range(2):
        w = [
            layer.weights[f"{n}_l{number}"]
            for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        h = np.zeros((B, H))
        c = h if kind == "lstm" else None
        keep = {"keep_h": np.full((T, B, H), 0.25)}
        if kind == "lstm":
            keep |= {"keep_c": np.full((T, B, H), 0.5)}
            keep |= {"peephole": layer.weights[f"weight_peephole_l{number}"]}
        below = _reference.run(cell, below, h, c, *w, None, None, None, **keep)["y"]
    np.testing.assert_allclose(y, below, rtol=1e-11, atol=1e-12)
    model = fb.Model(layer)
    target = np.zeros((T, B, H))
    assert fb.evaluate(model, x, target, "mse")[0] == pytest.approx((y**2).mean(), rel=1e-10)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_batch_first_and_strides(cell):
    rng = np.random.default_rng(3)
    problem = draw_any(rng, cell, ragged=True, resets=True, mask=True, cells=True, directions=1)
    problem = options.replace(problem, zoneout=(0.3, 0.3 if cell == "lstm" else 0.0))
    expected = options.run_reference(_reference.run, problem)
    layer = options.layer_for(problem, batch_first=True)
    resets = np.repeat(problem.resets, 2, axis=1)[:, ::2].T
    y, _, tape, *_ = layer.forward(
        problem.x.swapaxes(0, 1),
        problem.state(),
        lengths=problem.lengths,
        resets=resets,
        mask=problem.mask.T.copy(),
        return_cells=cell == "lstm",
        seed=problem.seed,
    )
    assert_close({"y": y.swapaxes(0, 1)}, {"y": expected["y"]}, 1e-11)
    grad_cells = None if cell == "gru" else problem.grad_cells.swapaxes(0, 1)
    grads = layer.backward(
        tape, problem.grad_y.swapaxes(0, 1), problem.grad_state(), grad_cells=grad_cells
    )
    assert_close({"x": grads.x.swapaxes(0, 1)}, {"x": expected["grad_x"]}, 1e-11)


@pytest.mark.parametrize("coupled", [False, True])
def test_gradients_equal_finite_differences(coupled, rng):
    layer = fb.LSTM(
        3, 5, dtype="float64", peephole=True, coupled=coupled, zoneout=0.3,
        recurrent_dropout=0.3, learn_initial_state=True, seed=0,
    )  # fmt: skip
    x, resets = rng.standard_normal((9, 2, 3)), rng.random((9, 2)) < 0.3
    weight, of_cells = rng.standard_normal((2, 9, 2, 5))

    def loss():
        y, _, _, cells = layer.forward(x, resets=resets, return_cells=True, seed=5)
        return float((y * weight).sum() + (cells * of_cells).sum())

    _, _, tape, _ = layer.forward(x, resets=resets, return_cells=True, seed=5)
    grads = layer.backward(tape, weight, grad_cells=of_cells)
    for name, grad in grads.weights.items():
        parameter, step = layer.weights[name], 1e-5
        direction = rng.standard_normal(parameter.shape)
        start = parameter.copy()
        sides = []
        for sign in (1, -1):
            parameter[...] = start + sign * step * direction
            sides.append(loss())
        parameter[...] = start
        expected = float((grad * direction).sum())
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_see_their_own_marks(kind, data):
    x, target, inside = data
    layer = make(kind, recurrent_dropout=0.0, zoneout=0.0)
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, seed=1))
    marks = {"resets": inside["resets"], "mask": inside["mask"]}
    full = fb.value_and_grad(model, x, target, "mse", **marks)
    schedule = fb.Segmented(6, overlap=T)
    exact = fb.value_and_grad(model, x, target, "mse", schedule=schedule, **marks)
    assert exact.loss == pytest.approx(full.loss, rel=1e-5)
    for name, grad in full.grads.items():
        np.testing.assert_allclose(exact.grads[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive(kind, tmp_path):
    layer = make(kind)
    model = fb.Model(layer)
    fb.save(tmp_path / "model.safetensors", model)
    loaded = fb.load(tmp_path / "model.safetensors")
    for again in (pickle.loads(pickle.dumps(layer)), loaded.recurrent):
        assert repr(again) == repr(layer)
        assert again.config() == layer.config()
        assert set(again.weights) == set(layer.weights)
        x = np.ones((4, 2, SIZE), np.float32)
        np.testing.assert_array_equal(again.forward(x, seed=1)[0], layer.forward(x, seed=1)[0])


def test_a_coupled_forget_gate_gets_its_bias():
    layer = fb.LSTM(3, 4, coupled=True, forget_bias=1.0)
    assert layer.weights["bias_ih_l0"][:4].tolist() == [1.0] * 4
    assert layer.weights["weight_ih_l0"].shape == (12, 3)
    assert repr(layer) == "LSTM(3, 4, coupled=True)"


def test_wrong_arguments():
    x = np.zeros((4, 2, 3), np.float32)
    layer = fb.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"resets: got shape \(2, 4\), wanted \(4, 2\)"):
        layer(x, resets=np.zeros((2, 4), bool))
    with pytest.raises(TypeError, match=r"mask: got .*int64, wanted bools"):
        layer(x, mask=np.zeros((4, 2), int))
    with pytest.raises(ValueError, match="return_cells: got True for GRU"):
        fb.GRU(3, 4)(x, return_cells=True)
    with pytest.raises(TypeError, match="return_cells: got 1"):
        layer(x, return_cells=1)
    with pytest.raises(ValueError, match=r"recurrent_dropout: got 1\.5, wanted from 0 to 1"):
        fb.RNN(3, 4, recurrent_dropout=1.5)
    with pytest.raises(ValueError, match=r"zoneout: got .*, wanted a number"):
        fb.GRU(3, 4, zoneout=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"zoneout\[1\]: got 2"):
        fb.LSTM(3, 4, zoneout=(0.1, 2))
    with pytest.raises(TypeError, match="peephole: got 1"):
        fb.LSTM(3, 4, peephole=1)
    y, _, tape = layer.forward(x)
    with pytest.raises(ValueError, match="grad_cells: got shape"):
        layer.backward(tape, y, grad_cells=np.zeros((4, 2, 3), np.float32))
    gru = fb.GRU(3, 4)
    _, _, tape = gru.forward(x)
    with pytest.raises(ValueError, match="grad_cells: got an array for a layer without cells"):
        gru.backward(tape, grad_cells=np.zeros((4, 2, 4), np.float32))
    model = fb.Model(fb.LSTM(3, 4, peephole=True))
    with pytest.raises(ValueError, match="wanted a layer without peephole"):
        fb.gradient_flow(model, x, np.zeros((4, 2, 4), np.float32), "mse")
    with pytest.raises(ValueError, match="a stream has no peephole"):
        fb.Stream(model, "mse", fb.Truncated(1))


def test_the_tape_does_not_follow_flags_that_change(rng):
    layer = fb.LSTM(3, 4, seed=0)
    x = rng.standard_normal((6, 2, 3), "f")
    mask, resets = np.ones((6, 2), bool), np.zeros((6, 2), bool)
    mask[3, 1], resets[2, 0] = False, True
    found = []
    for change in (False, True):
        y, _, tape = layer.forward(x, mask=mask, resets=resets)
        if change:
            mask[:], resets[:] = True, False
        found.append(layer.backward(tape, np.ones_like(y)).x)
    np.testing.assert_array_equal(*found)
