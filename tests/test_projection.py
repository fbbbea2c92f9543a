"""LSTM with `proj_size`: what the tests over all kernels do not look at.

That the results are those of the formulas, on every instruction set, with any threads and schedule,
is in their tests, as "lstm+projection".
"""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest

import fastbptt as fb

T, B, I, H, P = 7, 3, 5, 11, 4  # noqa: E741


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_torch(dtype, layers, bias, batch_first, rng):
    torch = pytest.importorskip("torch")
    warnings.filterwarnings("ignore", "LSTM with projections", UserWarning)
    torch.manual_seed(0)
    options = {"bias": bias, "batch_first": batch_first, "proj_size": P}
    theirs = torch.nn.LSTM(I, H, layers, dtype=getattr(torch, dtype), **options)
    ours = fb.LSTM(I, H, layers, dtype=dtype, **options)
    assert list(ours.weights) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())

    shape = (B, T) if batch_first else (T, B)
    arrays = [
        rng.standard_normal(s).astype(dtype)
        for s in ((*shape, I), (layers, B, P), (layers, B, H), (*shape, P))
    ]
    x, h, c = (torch.from_numpy(a).requires_grad_() for a in arrays[:3])
    y, (last_h, last_c) = theirs(x, (h, c))
    ((y * torch.from_numpy(arrays[3])).sum() + last_h.sum() + 2 * last_c.sum()).backward()

    got_y, state, tape = ours.forward(arrays[0], (arrays[1], arrays[2]))
    ends = np.ones((layers, B, P), dtype), np.full((layers, B, H), 2, dtype)
    grads = ours.backward(tape, arrays[3], ends)
    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == "float32" else 1e-12}
    for got, want in [
        (got_y, y),
        (state[0], last_h),
        (state[1], last_c),
        (grads.x, x.grad),
        (grads.state[0], h.grad),
        (grads.state[1], c.grad),
        *((grads.weights[name], weight.grad) for name, weight in theirs.named_parameters()),
    ]:
        np.testing.assert_allclose(got, want.detach().numpy(), **tolerance)


def test_truncated_is_each_window_from_the_state_before(rng):
    model = fb.Model(fb.LSTM(I, H, 2, proj_size=P, dtype="float64", seed=0))
    x, target = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, P))
    result = fb.value_and_grad(model, x, target, loss="mse", schedule=fb.Truncated(3))
    layer, state, total = model.recurrent, None, {}
    for begin in range(0, T, 3):
        part = slice(begin, begin + 3)
        y, state, tape = layer.forward(x[part], state)
        grads = layer.backward(tape, 2 * (y - target[part]) / target.size)
        for name, grad in grads.weights.items():
            total[name] = total.get(name, 0) + grad
    for name, grad in total.items():
        np.testing.assert_allclose(result.grads[f"0.{name}"], grad, rtol=1e-12, atol=1e-15)


def test_the_settings_survive(tmp_path, rng):
    layer = fb.LSTM(I, H, proj_size=P, seed=0)
    assert repr(layer) == "LSTM(5, 11, proj_size=4)"
    assert layer.config()["proj_size"] == P
    assert layer.output_size == P
    model = fb.Model(layer, fb.Linear(P, 2))
    fb.save(tmp_path / "model", model)
    x = rng.standard_normal((T, B, I)).astype("float32")
    y, _ = layer(x)
    for other in (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        fb.load(tmp_path / "model").recurrent,
    ):
        assert repr(other) == repr(layer)
        np.testing.assert_array_equal(other(x)[0], y)


@pytest.mark.parametrize("orthonormal", ["weight_hh_l0", "weight_hr_l0"])
def test_orthogonal(orthonormal):
    layer = fb.LSTM(I, H, proj_size=P, init="orthogonal", dtype="float64", seed=0)
    weight = layer.weights[orthonormal]
    for part in [weight.T] if orthonormal == "weight_hr_l0" else np.split(weight, 4):
        np.testing.assert_allclose(part.T @ part, np.eye(P), atol=1e-12)


@pytest.mark.parametrize(("size", "error"), [(H, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_bad_sizes(size, error):
    with pytest.raises(error, match="proj_size: got"):
        fb.LSTM(I, H, proj_size=size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_directions_and_lengths(dtype, rng):
    torch = pytest.importorskip("torch")
    warnings.filterwarnings("ignore", "LSTM with projections", UserWarning)
    theirs = torch.nn.LSTM(I, H, 2, proj_size=P, bidirectional=True, dtype=getattr(torch, dtype))
    ours = fb.LSTM(I, H, 2, proj_size=P, bidirectional=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = rng.standard_normal((T, B, I)).astype(dtype), [4, T, 1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), lengths, enforce_sorted=False
    )
    y, (h, c) = theirs(packed)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    got, state = ours(x, lengths=lengths)
    for a, b in ((got, y), (state[0], h), (state[1], c)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=tolerance)


def test_bad_arguments():
    layer = fb.LSTM(I, H, proj_size=P)
    x, h, c = (np.zeros(shape, "float32") for shape in ((T, B, I), (1, B, P), (1, B, H)))
    with pytest.raises(ValueError, match=r"state\[0\]: got shape \(1, 3, 11\), wanted \(1, 3, 4\)"):
        layer(x, (c, c))
    with pytest.raises(ValueError, match=r"state\[1\]: got shape \(1, 3, 4\), wanted \(1, 3, 11\)"):
        layer(x, (h, h))
    with pytest.raises(TypeError, match=r"\(1, 3, 4\) and \(1, 3, 11\)"):
        layer(x, h)
    _, _, tape = layer.forward(x)
    with pytest.raises(ValueError, match="grad_y"):
        layer.backward(tape, np.zeros((T, B, H), "float32"))
    with pytest.raises(ValueError, match=r"in_features 11 .* proj_size 4"):
        fb.Model(layer, fb.Linear(H, 1))


def test_every_option_at_once(rng):
    """Against finite differences, in float64."""
    layer = fb.LSTM(
        I, H, 2, proj_size=P, bidirectional=True, peephole=True, coupled=True, zoneout=(0.2, 0.3),
        recurrent_dropout=0.3, dropout=0.3, learn_initial_state=True, layer_norm=True,
        dtype="float64", seed=0,
    )  # fmt: skip
    for weight in layer.weights.values():
        weight += rng.normal(0.0, 0.2, weight.shape)
    x, resets, mask = (
        rng.standard_normal((T, B, I)),
        rng.random((T, B)) < 0.2,
        rng.random((T, B)) < 0.8,
    )
    given = {"lengths": [T, 2, 5], "resets": resets, "mask": mask, "return_cells": True, "seed": 3}
    y, state, tape, cells = layer.forward(x, **given)
    assert (y.shape, cells.shape) == ((T, B, 2 * P), (T, B, 2 * H))
    assert [part.shape for part in state] == [(4, B, P), (4, B, H)]
    there = (np.arange(T)[:, None] < np.array(given["lengths"]))[..., None]
    of_y, of_cells = (rng.standard_normal(part.shape) * there for part in (y, cells))
    of_state = [rng.standard_normal(part.shape) for part in state]
    grads = layer.backward(tape, of_y, tuple(of_state), grad_cells=of_cells)

    def loss():
        y, state, _, cells = layer.forward(x, **given)
        parts = [(y, of_y), (cells, of_cells), *zip(state, of_state, strict=True)]
        return sum(float((part * weight).sum()) for part, weight in parts)

    for parameter, grad in [
        (x, grads.x),
        *zip(layer.weights.values(), grads.weights.values(), strict=True),
    ]:
        start, direction = parameter.copy(), rng.standard_normal(parameter.shape)
        sides = []
        for step in (2e-6, -2e-6):
            parameter[...] = start + step * direction
            sides.append(loss())
        parameter[...] = start
        measured = (sides[0] - sides[1]) / 4e-6
        assert measured == pytest.approx(float((grad * direction).sum()), rel=1e-6, abs=1e-7)
