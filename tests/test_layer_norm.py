"""LSTM and GRU with `layer_norm`: what the tests over all kernels and options do not look at.

That the results are those of the reference, with any option, on every instruction set, with any
threads and schedule, is in their tests; here they are those of PyTorch's own layer normalisation.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fastbptt as fb
from reference import load_weights

T, B, I = 7, 3, 5  # noqa: E741
KINDS = ["lstm", "coupled", "peephole", "projection", "gru"]


def make(kind, H, num_layers=1, seed=0, **options):
    options["seed"] = seed
    if kind == "gru":
        return fb.GRU(I, H, num_layers, layer_norm=True, **options)
    own = {
        "lstm": {},
        "coupled": {"coupled": True},
        "peephole": {"peephole": True},
        "projection": {"proj_size": (H + 1) // 2},
    }[kind]
    return fb.LSTM(I, H, num_layers, layer_norm=True, **own, **options)


def shake(layer, rng):
    """Move all parameters away from ones and zeros."""
    for weight in layer.weights.values():
        weight += rng.normal(0.0, 0.3, weight.shape)
    return layer


def in_torch(torch, layer, kind, x, state):
    """Run the formula in float64 with autograd: the outputs, and all that they depend on."""
    norm = torch.nn.functional.layer_norm
    w = {name: torch.tensor(v).requires_grad_() for name, v in layer.weights.items()}
    x, state = torch.tensor(x).requires_grad_(), [torch.tensor(s).requires_grad_() for s in state]
    H, below, last = layer.hidden_size, list(x), []
    for number in range(layer.num_layers):

        def own(name, number=number):
            found = w.get(f"{name}_l{number}")
            return torch.zeros(1) if found is None else found

        def sums(side, v, groups, own=own):
            v = v @ own(f"weight_{side}").T
            parts = [norm(part, part.shape[-1:]) for part in v.split(groups, -1)]
            return own(f"weight_ln_{side}") * torch.cat(parts, -1) + own(f"bias_{side}")

        h = state[0][number]
        c = None if kind == "gru" else state[1][number]
        for t, value in enumerate(below):
            if kind == "gru":
                groups = [2 * H, H]
                a, u = (
                    part.split(H, -1) for part in (sums("ih", value, groups), sums("hh", h, groups))
                )
                r, z = (torch.sigmoid(a[i] + u[i]) for i in (0, 1))
                h = (1 - z) * torch.tanh(a[2] + r * u[2]) + z * h
            else:
                G = len(own("weight_ih")) // H
                *i, f, g, o = (sums("ih", value, G * H) + sums("hh", h, G * H)).split(H, -1)
                if kind == "peephole":
                    p_i, p_f, p_o = own("weight_peephole").split(H)
                    i, f = [i[0] + p_i * c], f + p_f * c
                f, g = torch.sigmoid(f), torch.tanh(g)
                c = f * c + (1 - f if kind == "coupled" else torch.sigmoid(i[0])) * g
                o = torch.sigmoid(o + p_o * c if kind == "peephole" else o)
                h = o * torch.tanh(own("weight_ln_c") * norm(c, (H,)) + own("bias_ln_c"))
                if kind == "projection":
                    h = h @ own("weight_hr").T
            below[t] = h
        last.append((h, c))
    y = torch.stack(below) if below else torch.zeros(0, *h.shape, dtype=x.dtype)
    ends = [torch.stack([part[i] for part in last]) for i in range(len(state))]
    return y, ends, x, state, w


@pytest.mark.parametrize(
    "sizes", [(7, 3, 11, True), (1, 1, 4, False), (0, 2, 3, True), (4, 9, 33, False)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_layer_norm_of_torch(dtype, kind, sizes, rng):
    torch = pytest.importorskip("torch")
    T, B, H, bias = sizes
    exact = shake(make(kind, H, 2, bias=bias, dtype="float64"), rng)
    layer = make(kind, H, 2, bias=bias, dtype=dtype)
    load_weights(layer, exact.weights)
    load_weights(exact, layer.weights)
    R = layer.output_size
    x, *state, weight, end = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((T, B, I), (2, B, R), (2, B, H), (T, B, R), (2, B, R))
    )
    state = state[:1] if kind == "gru" else state
    wanted, ends, *_ = parts = in_torch(
        torch, exact, kind, x.astype(float), [s.astype(float) for s in state]
    )
    ((wanted * torch.tensor(weight)).sum() + (ends[0] * torch.tensor(end)).sum()).backward()
    _, _, x_, state_, w = parts

    start = state[0] if kind == "gru" else tuple(state)
    y, last, tape = layer.forward(x, start)
    np.testing.assert_array_equal(layer(x, start)[0], y) if T > 1 else None
    grad_end = end if kind == "gru" else (end, np.zeros_like(state[1]))
    grads = layer.backward(tape, weight, grad_end)
    got_last = [last] if kind == "gru" else list(last)
    got_state = [grads.state] if kind == "gru" else list(grads.state)
    pairs = [(y, wanted), *zip(got_last, ends, strict=True), (grads.x, x_.grad)]
    pairs += [(got, s.grad) for got, s in zip(got_state, state_, strict=True)]
    pairs += [(grads.weights[name], value.grad) for name, value in w.items()]
    tolerance = 1e-11 if dtype == "float64" else 2e-4
    for got, want in pairs:
        want = np.zeros_like(got) if want is None else want.detach().numpy()
        scale = max(1.0, np.abs(want).max(initial=0.0))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", ["lstm", "coupled", "gru"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_single_unit_has_no_variance(dtype, kind, rng):
    """Its c, and the candidate of a GRU, are their own mean: what is left is the shift."""
    layer = shake(make(kind, 1, dtype=dtype), rng)
    x = rng.standard_normal((T, B, I)).astype(dtype)
    y, state, tape = layer.forward(x)
    grads = layer.backward(tape, np.ones_like(y))
    assert all(np.isfinite(grad).all() for grad in (grads.x, *grads.weights.values()))
    if kind == "gru":
        candidate = slice(2, 3)
        for name in ("weight_ih", "weight_hh", "weight_ln_ih", "weight_ln_hh"):
            assert not grads.weights[f"{name}_l0"][candidate].any()
    else:
        bound = np.tanh(abs(layer.weights["bias_ln_c_l0"]))
        assert (np.abs(y) < bound).all()
        assert not grads.weights["weight_ln_c_l0"].any()
        assert state[1].any()


@pytest.mark.parametrize("scale", [1e-20, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_sums(kind, scale, rng):
    """The products are of any size; float32 squares above 1e19 are too large for it."""
    H = 19
    exact = shake(make(kind, H, dtype="float64"), rng)
    layer = make(kind, H)
    load_weights(layer, exact.weights)
    load_weights(exact, layer.weights)
    x = (rng.standard_normal((T, B, I)) * scale).astype(np.float32)
    x[2] = 0.0
    weight = rng.standard_normal((T, B, layer.output_size)).astype(np.float32)
    results = []
    for one in (layer, exact):
        y, _, tape = one.forward(x.astype(one.dtype))
        grads = one.backward(tape, weight.astype(one.dtype))
        results.append({"y": y, "x": grads.x.astype(float) * scale, **grads.weights})
    for name, want in results[1].items():
        assert np.isfinite(results[0][name]).all(), name
        there = np.ones(len(want), bool)
        if name == "x":
            there[2] = False  # a row of zeros has a gradient of another size
        error = np.abs(results[0][name] - want)[there].max()
        assert error <= 1e-4 * np.abs(want)[there].max() + 1e-30, name


def test_rows_of_equal_sums(rng):
    """No variance at all: the formula gives the shifts, and finite gradients."""
    layer = fb.LSTM(I, 8, layer_norm=True, dtype="float64", seed=0)
    layer.weights["weight_ih_l0"][...] = 1.0
    layer.weights["weight_hh_l0"][...] = 0.0
    layer.weights["bias_ih_l0"][...] = rng.standard_normal(32)
    y, _, tape = layer.forward(np.round(rng.standard_normal((T, B, I)), 1) * 4)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-9)
    grads = layer.backward(tape, np.ones_like(y))
    assert all(np.isfinite(grad).all() for grad in (grads.x, *grads.weights.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_a_product_does_not_matter(kind, rng):
    """What the normalisation is for; up to its epsilon."""
    layer = shake(make(kind, 12, dtype="float64"), rng)
    x = rng.standard_normal((T, B, I))
    y, _ = layer(x)
    layer.weights["weight_ih_l0"][...] *= 1e4
    there, _ = layer(x)
    layer.weights["weight_ih_l0"][...] *= 1e4
    np.testing.assert_allclose(layer(x)[0], there, rtol=1e-7)
    assert np.abs(y - there).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_with_gains_of_one(kind):
    layer = (
        make(kind, 6, 2, bidirectional=True, forget_bias=1.0)
        if kind != "gru"
        else make(kind, 6, 2, bidirectional=True)
    )
    forget = slice(0, 6) if kind == "coupled" else slice(6, 12)
    for name, weight in layer.weights.items():
        if "_ln_" in name and name.startswith("weight"):
            assert (weight == 1.0).all()
        elif name.startswith("bias"):
            wanted = np.zeros_like(weight)
            if name.startswith("bias_ih") and kind != "gru":
                wanted[forget] = 1.0
            np.testing.assert_array_equal(weight, wanted)
        else:
            assert (weight != 1.0).all()
    names = {name.partition("_l1")[0] for name in layer.weights if "_l1" in name}
    own = {"weight_ln_ih", "weight_ln_hh"} | (
        set() if kind == "gru" else {"weight_ln_c", "bias_ln_c"}
    )
    assert own <= names


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_survive(kind, tmp_path, rng):
    layer = shake(make(kind, 6, 2, seed=0), rng)
    assert "layer_norm=True" in repr(layer)
    model = fb.Model(layer, fb.Linear(layer.output_size, 2, seed=0))
    fb.save(tmp_path / "model.safetensors", model)
    x = rng.standard_normal((T, B, I)).astype(np.float32)
    for again in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        fb.load(tmp_path / "model.safetensors").recurrent,
    ):
        assert again.config() == layer.config()
        np.testing.assert_array_equal(again(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_threads_share_has_the_bits_of_one_thread(kind, rng):
    """With all that happens in a step; two rows are too few to be shared out themselves."""
    inside = {} if kind == "projection" else {"recurrent_dropout": 0.2, "zoneout": 0.3}
    layer = shake(make(kind, 130, learn_initial_state=True, **inside), rng)
    x = rng.standard_normal((30, 2, I)).astype(np.float32)
    marks = {} if kind == "projection" else {"resets": rng.random((30, 2)) < 0.2}
    before, results = fb.get_num_threads(), []
    for count in (1, 2, 3):
        fb.set_num_threads(count)
        y, _, tape = layer.forward(x, seed=1, **marks)
        grads = layer.backward(tape, y)
        results.append({"y": y, "x": grads.x, **grads.weights})
    fb.set_num_threads(before)
    for result in results[1:]:
        for name, want in results[0].items():
            np.testing.assert_array_equal(result[name], want, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tape_has_the_width_that_is_documented(kind, rng):
    layer = make(kind, 9)
    _, _, tape = layer.forward(np.zeros((T, B, I), np.float32))
    width = {"gru": 6, "coupled": 7}.get(kind, 9)
    assert tape.nbytes == T * B * (width * 9 + 4) * 4


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_memory_budget_is_kept(kind, rng):
    model = fb.Model(make(kind, 24, 2), fb.Linear(24, 2))
    x = rng.standard_normal((300, 4, I)).astype(np.float32)
    target = rng.standard_normal((300, 4, 2)).astype(np.float32)
    full = fb.value_and_grad(model, x, target, "mse")
    part = fb.value_and_grad(model, x, target, "mse", schedule=fb.Checkpointed(memory="1MB"))
    for name, grad in full.grads.items():
        np.testing.assert_array_equal(part.grads[name], grad, err_msg=name)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="layer_norm: got True beside reset_after=False"):
        fb.GRU(3, 4, reset_after=False, layer_norm=True)
    with pytest.raises(TypeError, match="layer_norm: got 1"):
        fb.LSTM(3, 4, layer_norm=1)
    model, x = fb.Model(fb.GRU(3, 4, layer_norm=True)), np.zeros((4, 2, 3), np.float32)
    with pytest.raises(ValueError, match="wanted a layer without layer_norm"):
        fb.gradient_flow(model, x, np.zeros((4, 2, 4), np.float32), "mse")
    with pytest.raises(ValueError, match="a stream has no layer_norm"):
        fb.Stream(model, "mse", fb.Truncated(1))
