"""The rules of a stream: their gradients with frozen weights, beside those of value_and_grad."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer

TOLERANCE = 1e-10


def make_task(cell, rng, *, T=11, B=2, H=5, N=3, embedding=False, bias=True, dtype="float64"):
    I = 4  # noqa: E741
    options = {"dtype": dtype}
    parts = [make_layer(cell, I, H, bias=bias, seed=1, **options), fb.Linear(H, N, **options)]
    if embedding:
        parts.insert(0, fb.Embedding(6, I, **options))
    model = fb.Model(*parts)
    for parameter in model.parameters().values():
        parameter[...] = rng.uniform(-0.7, 0.7, parameter.shape)
    x = rng.integers(0, 6, (T, B)) if embedding else rng.standard_normal((T, B, I)).astype(dtype)
    return model, x, rng.integers(0, N, (T, B))


def pushed_gradient(model, rule, x, target, loss="cross_entropy", **options):
    """The gradient of the mean loss, all weights frozen, pushed in steps and blocks."""
    stream = fb.Stream(model, loss, rule, **options)
    t = 0
    for n in [1, 3] * len(x):
        if t >= len(x):
            break
        if n == 1:
            stream.push(x[t], target[t])
        else:
            stream.push(x[t : t + n], target[t : t + n])
        t += n
    stream.flush()
    count = stream.count
    return {name: grad / count for name, grad in stream.grads.items()}


def assert_same(actual, expected, tolerance=TOLERANCE):
    assert actual.keys() == expected.keys()
    scale = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        assert np.abs(actual[name] - grad).max() <= tolerance * scale, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_rtrl_is_full_backpropagation(cell, embedding, bias, rng):
    model, x, target = make_task(cell, rng, embedding=embedding, bias=bias)
    expected = fb.value_and_grad(model, x, target).grads
    assert_same(pushed_gradient(model, fb.RTRL(), x, target), expected)


@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 1), (4, 3, 7), (6, 1, 33), (5, 2, 16)])
@pytest.mark.parametrize("cell", CELLS)
def test_rtrl_of_odd_sizes(cell, T, B, H, rng):
    model, x, target = make_task(cell, rng, T=T, B=B, H=H)
    expected = fb.value_and_grad(model, x, target).grads
    assert_same(pushed_gradient(model, fb.RTRL(), x, target), expected)


def test_rtrl_on_several_threads_gives_the_same_bits(rng, one_thread):
    model, x, target = make_task("lstm", rng, H=40)
    alone = pushed_gradient(model, fb.RTRL(), x, target)
    fb.set_num_threads(3)
    together = pushed_gradient(model, fb.RTRL(), x, target)
    for name, grad in alone.items():
        assert (grad == together[name]).all()


def test_rtrl_in_float32(rng):
    model, x, target = make_task("gru", rng, dtype="float32")
    expected = fb.value_and_grad(model, x, target).grads
    assert_same(pushed_gradient(model, fb.RTRL(), x, target), expected, 1e-5)


def test_rtrl_against_finite_differences(rng):
    model, x, target = make_task("gru_reset_before", rng)
    grads = pushed_gradient(model, fb.RTRL(), x, target)
    parameters = model.parameters()
    direction = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
    step = 1e-5

    def loss_at(distance):
        for name, p in parameters.items():
            p += distance * direction[name]
        return fb.evaluate(model, x, target)[0]

    slope = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    expected = sum((grads[name] * direction[name]).sum() for name in parameters)
    assert slope == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("k", [(1, 1), (1, 4), (3, 3), (2, 7), (4, 30)])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_truncated_is_that_of_value_and_grad(cell, embedding, k, rng):
    model, x, target = make_task(cell, rng, embedding=embedding)
    expected = fb.value_and_grad(model, x, target, schedule=fb.Truncated(*k)).grads
    assert_same(pushed_gradient(model, fb.Truncated(*k), x, target), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_through_a_stack(cell, rng):
    layer = make_layer(cell, 4, 5, 3, dtype="float64", seed=1)
    model = fb.Model(layer)
    x, target = rng.standard_normal((11, 9, 4)), rng.standard_normal((11, 9, 5))
    expected = fb.value_and_grad(model, x, target, "mse", schedule=fb.Truncated(2, 5)).grads
    assert_same(pushed_gradient(model, fb.Truncated(2, 5), x, target, "mse"), expected)


@pytest.mark.parametrize("rule", [fb.RTRL(), fb.Truncated(2, 20)])
def test_targets_that_do_not_count(rule, rng):
    model, x, target = make_task("lstm", rng)
    target[[0, 2, 2, 7], [0, 0, 1, 1]] = -100
    expected = fb.value_and_grad(model, x, target, schedule=fb.Full()).grads
    assert_same(pushed_gradient(model, rule, x, target), expected)
    stream = fb.Stream(model, "cross_entropy", rule)
    for t, classes in enumerate(target):
        if t == 2:
            stream.push(x[t])
        else:
            stream.push(x[t], np.maximum(classes, 0), target_mask=classes >= 0)
    stream.flush()
    assert_same({n: g / stream.count for n, g in stream.grads.items()}, expected)


def diagonal(layer):
    """Let no unit reach another one."""
    H = layer.hidden_size
    for block in np.split(layer._weights["weight_hh_l0"], layer._gates):
        block *= np.eye(H)


@pytest.mark.parametrize("cell", CELLS)
def test_snap1_is_rtrl_where_the_jacobian_is_diagonal(cell, rng):
    model, x, target = make_task(cell, rng)
    dense = [pushed_gradient(model, rule, x, target) for rule in (fb.RTRL(), fb.SnAp1())]
    assert not np.allclose(dense[0]["0.weight_hh_l0"], dense[1]["0.weight_hh_l0"])
    diagonal(model.recurrent)
    exact = pushed_gradient(model, fb.RTRL(), x, target)
    assert_same(pushed_gradient(model, fb.SnAp1(), x, target), exact)


def test_eprop_is_rtrl_without_recurrent_weights(rng):
    model, x, target = make_task("lstm", rng)
    model.recurrent.weights["weight_hh_l0"][...] = 0
    exact = pushed_gradient(model, fb.RTRL(), x, target)
    assert_same(pushed_gradient(model, fb.EProp(), x, target), exact)


def test_eprop_follows_the_cell_state_alone(rng):
    """The traces, written out: dc/dz = f dc'/dz + direct, times the input of the gate."""
    model, x, target = make_task("lstm", rng, B=1)
    layer, H = model.recurrent, model.recurrent.hidden_size
    w_ih, w_hh, b_ih, b_hh = layer.weights.values()
    h, c = np.zeros(H), np.zeros(H)
    trace, expected = np.zeros((4, H, H)), np.zeros((4 * H, H))
    for t in range(len(x)):
        z = w_ih @ x[t, 0] + b_ih + w_hh @ h + b_hh
        i, f, g, o = np.split(z, 4)
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        g = np.tanh(g)
        direct = np.stack([g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), 0 * o])
        trace = f[None, :, None] * trace + direct[:, :, None] * h
        c = f * c + i * g
        before, h = h, o * np.tanh(c)
        logits = model.readout(h[None])[0]
        error = np.exp(logits - logits.max())
        error /= error.sum()
        error[target[t, 0]] -= 1
        signal = error @ model.readout.weights["weight"]
        eligibility = (o * (1 - np.tanh(c) ** 2))[None, :, None] * trace
        eligibility[3] += (np.tanh(c) * o * (1 - o))[:, None] * before
        expected += (signal[None, :, None] * eligibility).reshape(4 * H, H) / len(x)
    got = pushed_gradient(model, fb.EProp(), x, target)["0.weight_hh_l0"]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [fb.SnAp1(), fb.EProp(), fb.UORO(seed=3)])
def test_the_first_step_is_exact(rule, rng):
    """Nothing was left out yet; for UORO the mean over signs is, which the next test looks at."""
    model, x, target = make_task("lstm", rng, T=1, embedding=True)
    expected = fb.value_and_grad(model, x, target).grads
    got = pushed_gradient(model, rule, x, target)
    if isinstance(rule, fb.UORO):
        expected = {name: expected[name] for name in ("2.weight", "2.bias")}
        got = {name: got[name] for name in expected}
    assert_same(got, expected)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_the_mean_of_uoro_is_rtrl(cell, embedding, rng):
    """The mean over many seeds is within its standard error, in random directions."""
    model, x, target = make_task(cell, rng, T=5, B=1, H=3, embedding=embedding)
    exact = pushed_gradient(model, fb.RTRL(), x, target)
    names = list(exact)
    flat = np.concatenate([exact[name].ravel() for name in names])
    samples = np.array(
        [
            np.concatenate([grads[name].ravel() for name in names])
            for grads in (
                pushed_gradient(model, fb.UORO(seed=seed), x, target) for seed in range(1500)
            )
        ]
    )
    directions = rng.standard_normal((20, flat.size))
    projected = samples @ directions.T
    error = projected.mean(0) - flat @ directions.T
    standard = projected.std(0, ddof=1) / np.sqrt(len(samples))
    # The squares of 20 such ratios, which depend on each other, have a mean of 1.
    assert np.sqrt(np.mean((error / standard) ** 2)) < 2.0
    assert np.all(standard < 0.5 * np.abs(flat @ directions.T).max())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["rtrl", "truncated"])
def test_resets_and_missing_inputs(cell, kind, rng):
    """The same as a sequence without the missing steps, that begins anew at a reset."""
    model, x, target = make_task(cell, rng, T=12, B=1)
    rule = fb.RTRL() if kind == "rtrl" else fb.Truncated(3, 12)
    stream = fb.Stream(model, "cross_entropy", rule)
    missing, resets = {2, 7, 8}, {5}
    for t in range(len(x)):
        if t in resets:
            stream.reset()
        stream.push(None if t in missing else x[t], None if t in missing else target[t])
    stream.flush()
    kept = [[t for t in stretch if t not in missing] for stretch in (range(5), range(5, 12))]
    parts = [fb.value_and_grad(model, x[t], target[t]).grads for t in kept]
    expected = {n: sum(g[n] * len(t) for g, t in zip(parts, kept, strict=True)) for n in parts[0]}
    assert_same(stream.grads, expected)


@pytest.mark.parametrize("rule", [fb.RTRL(), fb.Truncated(4, 9)])
def test_single_rows_reset_and_without_input(rule, rng):
    """Each of several streams gets what it would get alone."""
    model, x, target = make_task("lstm", rng, T=9, B=4, embedding=True)
    present = rng.random((9, 4)) < 0.7
    resets = rng.random((9, 4)) < 0.2
    together = fb.Stream(model, "cross_entropy", rule, batch_size=4)
    alone = [fb.Stream(model, "cross_entropy", rule, batch_size=1) for _ in range(4)]
    for t in range(9):
        together.reset(resets[t])
        pushed = together.push(x[t], target[t], x_mask=present[t])
        for b, stream in enumerate(alone):
            if resets[t, b]:
                stream.reset()
            one = stream.push(x[t, b : b + 1] if present[t, b] else None, target[t, b : b + 1])
            np.testing.assert_allclose(pushed.prediction[b], one.prediction[0], rtol=1e-12)
    together.flush()
    for stream in alone:
        stream.flush()
    assert together.count == sum(stream.count for stream in alone) == 36
    expected = {n: sum(s.grads[n] for s in alone) for n in together.grads}
    assert_same(together.grads, expected)


def test_a_missing_input_with_a_target(rng):
    """The error of such a step reaches the steps before it: both rules are exact here."""
    model, x, target = make_task("gru", rng, T=8, B=3)
    present = rng.random((8, 3)) < 0.6
    grads = []
    for rule in (fb.RTRL(), fb.Truncated(8, 8)):
        stream = fb.Stream(model, "cross_entropy", rule)
        stream.push(x, target, x_mask=present)
        stream.flush()
        grads.append(stream.grads)
    assert_same(*grads)


@pytest.mark.parametrize("rule", [fb.RTRL(), fb.SnAp1(), fb.Truncated(2, 5), fb.UORO(seed=1)])
def test_a_block_is_its_steps(rule, rng):
    model, x, target = make_task("lstm", rng)
    grads, predictions = [], []
    for pieces in ([(0, 11)], [(t, t + 1) for t in range(11)]):
        stream = fb.Stream(model, "cross_entropy", rule)
        parts = [stream.push(x[begin:end], target[begin:end]) for begin, end in pieces]
        stream.flush()
        grads.append(stream.grads)
        predictions.append(np.concatenate([part.prediction for part in parts]))
    assert (predictions[0] == predictions[1]).all()
    for name in grads[0]:
        assert (grads[0][name] == grads[1][name]).all()
