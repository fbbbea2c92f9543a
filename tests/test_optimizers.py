"""Optimisers are those of torch.optim; a step happens as a whole or not at all."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest

import fastbptt as fb
from conftest import require

KINDS = {
    "adam": (fb.Adam, {}),
    "adam_all": (fb.Adam, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adam_no_memory": (fb.Adam, {"betas": (0.0, 0.0)}),
    "sgd": (fb.SGD, {}),
    "sgd_decay": (fb.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "sgd_momentum": (fb.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd_nesterov": (
        fb.SGD,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    "rmsprop": (fb.RMSprop, {}),
    "rmsprop_momentum": (fb.RMSprop, {"alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop_centered": (fb.RMSprop, {"alpha": 0.8, "centered": True, "eps": 1e-4}),
    "rmsprop_all": (fb.RMSprop, {"lr": 0.03, "momentum": 0.5, "centered": True}),
}
# The long one fills blocks of its own, the others share them.
SHAPES = {
    "0.weight": (7, 3),
    "1.bias": (5,),
    "1.scale": (),
    "2.none": (0, 3),
    "2.long": (257, 259),
    "3.weight": (3, 4),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def parameters_of(rng, dtype="float64"):
    return {name: np.asarray(rng.standard_normal(s), dtype) for name, s in SHAPES.items()}


@every_kind
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_with_its_own_parameters(kind, how, rng):
    cls, options = KINDS[kind]
    parameters = parameters_of(rng)
    optimizer = cls(parameters, **options)
    optimizer.step(parameters_of(rng))
    others, other = how((parameters, optimizer))
    grads = parameters_of(rng)
    for both in (optimizer, other):
        both.step(grads)
    for name, parameter in parameters.items():
        assert not np.shares_memory(parameter, others[name])
        np.testing.assert_array_equal(others[name], parameter)
    for name, value in optimizer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value)


@every_kind
def test_steps_are_those_of_torch(kind, rng):
    torch = require("torch")
    torch.set_num_threads(1)
    cls, options = KINDS[kind]
    ours = parameters_of(rng)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in ours.items()}
    optimizer = cls(ours, **options)
    reference = getattr(torch.optim, cls.__name__)(theirs.values(), **options)
    for step in range(100):
        grads = parameters_of(rng)
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad)
        before = {name: grad.copy() for name, grad in grads.items()}
        if step == 50:
            optimizer.lr *= 0.5
            reference.param_groups[0]["lr"] *= 0.5
        optimizer.step(grads)
        reference.step()
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, before[name])
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_torch():
    torch = require("torch")
    for cls in (fb.Adam, fb.SGD, fb.RMSprop):
        reference = getattr(torch.optim, cls.__name__)([torch.zeros(1)]).param_groups[0]
        for name, value in cls({"w": np.zeros(1)}).config().items():
            expected = list(reference[name]) if name == "betas" else reference[name]
            assert value == expected, (cls, name)


@every_kind
def test_float32_stays_near_float64(kind, rng):
    cls, options = KINDS[kind]
    wide = parameters_of(rng)
    narrow = {name: p.astype("float32") for name, p in wide.items()}
    first, second = cls(wide, **options), cls(narrow, **options)
    for _ in range(20):
        grads = parameters_of(rng)
        first.step(grads)
        second.step({name: grad.astype("float32") for name, grad in grads.items()})
    for name, parameter in narrow.items():
        assert parameter.dtype == np.float32
        np.testing.assert_allclose(parameter, wide[name], rtol=1e-3, atol=1e-3)


@every_kind
def test_state_goes_on_bit_for_bit(kind, rng):
    cls, options = KINDS[kind]
    first = parameters_of(rng)
    optimizer = cls(first, **options)
    for _ in range(5):
        optimizer.step(parameters_of(rng))

    state, config = optimizer.state_dict(), json.loads(json.dumps(optimizer.config()))
    second = {name: p.copy() for name, p in first.items()}
    resumed = cls(second, **config)
    resumed.load_state_dict(state)
    assert resumed.config() == optimizer.config()
    for _ in range(5):
        grads = parameters_of(rng)
        optimizer.step(grads)
        resumed.step(grads)
    for name, parameter in first.items():
        np.testing.assert_array_equal(second[name], parameter)
    # What state_dict returned is a copy: further steps have not changed it.
    resumed.load_state_dict(state)
    for key, value in resumed.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


@every_kind
def test_parameters_of_two_dtypes(kind, rng):
    cls, options = KINDS[kind]
    alone, mixed, grads = {}, {}, {}
    for n, (name, parameter) in enumerate(parameters_of(rng).items()):
        dtype = ("float32", "float64")[n % 2]
        mixed[name] = parameter.astype(dtype)
        grads[name] = np.asarray(rng.standard_normal(parameter.shape), dtype)
        alone[name] = mixed[name].copy()
        cls({name: alone[name]}, **options).step({name: grads[name]})
    cls(mixed, **options).step(grads)
    for name, parameter in mixed.items():
        np.testing.assert_array_equal(parameter, alone[name])


def test_state_has_names_of_kinds_and_parameters():
    parameters = {"0.weight": np.zeros((2, 3))}
    adam = fb.Adam(parameters)
    assert list(adam.state_dict()) == ["step", "exp_avg.0.weight", "exp_avg_sq.0.weight"]
    assert fb.SGD(parameters).state_dict() == {}
    rms = fb.RMSprop(parameters, momentum=0.1, centered=True)
    assert list(rms.state_dict()) == [
        "square_avg.0.weight",
        "grad_avg.0.weight",
        "momentum_buffer.0.weight",
    ]


def wrong_grads():
    good = {"a": np.ones((2, 3)), "b": np.ones(4)}
    return {
        "missing": ({"a": good["a"]}, ValueError, "grads: 'b' missing"),
        "unknown": ({**good, "c": good["b"]}, ValueError, "grads: 'c' unknown"),
        "shape": ({**good, "b": np.ones((4, 1))}, ValueError, r"grads\['b'\]: got shape \(4, 1\)"),
        "dtype": ({**good, "b": np.ones(4, "float32")}, TypeError, "got dtype float32, wanted"),
        "list": ({**good, "b": [1.0] * 4}, TypeError, r"grads\['b'\]: got list"),
        "no_mapping": ([good["a"], good["b"]], TypeError, "grads: got list, wanted a mapping"),
    }


@pytest.mark.parametrize("fault", wrong_grads())
@every_kind
def test_a_bad_step_changes_nothing(kind, fault):
    cls, options = KINDS[kind]
    grads, error, words = wrong_grads()[fault]
    parameters = {"a": np.ones((2, 3)), "b": np.ones(4)}
    optimizer = cls(parameters, **options)
    with pytest.raises(error, match=words):
        optimizer.step(grads)
    assert all((parameter == 1.0).all() for parameter in parameters.values())
    for value in optimizer.state_dict().values():
        assert not np.any(value)


def test_bad_states_change_nothing():
    parameters = {"a": np.zeros(3)}
    adam = fb.Adam(parameters)
    adam.step({"a": np.ones(3)})
    good = adam.state_dict()
    faults = [
        ({"step": 1}, ValueError, "missing"),
        ({**good, "more": 1}, ValueError, "'more' unknown"),
        ({**good, "step": -1}, ValueError, "got -1, wanted at least 0"),
        ({**good, "step": 1.5}, TypeError, "got 1.5, wanted an integer"),
        ({**good, "step": True}, TypeError, "got True"),
        ({**good, "exp_avg_sq.a": np.zeros(4)}, ValueError, "got shape"),
        ({**good, "exp_avg_sq.a": np.zeros(3, "f4")}, TypeError, "got dtype float32"),
        (None, TypeError, "state: got NoneType"),
    ]
    for state, error, words in faults:
        if state is not None and "exp_avg.a" in state:
            state["exp_avg.a"] = np.full(3, 7.0)
        with pytest.raises(error, match=words):
            adam.load_state_dict(state)
        for key, value in adam.state_dict().items():
            np.testing.assert_array_equal(value, good[key])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: fb.Adam(p, lr=-1.0), ValueError, "lr: got -1.0, wanted at least 0"),
        (lambda p: fb.Adam(p, lr=math.nan), ValueError, "lr: got nan"),
        (lambda p: fb.SGD(p, lr="1"), TypeError, "lr: got '1', wanted a number"),
        (lambda p: fb.Adam(p, betas=(0.9, 1.0)), ValueError, r"betas\[1\]: got 1.0"),
        (lambda p: fb.Adam(p, betas=0.9), TypeError, "betas: got 0.9, wanted two numbers"),
        (lambda p: fb.Adam(p, eps=-1e-8), ValueError, "eps: got -1e-08"),
        (lambda p: fb.SGD(p, momentum=-0.1), ValueError, "momentum: got -0.1"),
        (lambda p: fb.SGD(p, nesterov=True), ValueError, "nesterov: got True with momentum=0.0"),
        (lambda p: fb.SGD(p, momentum=0.1, nesterov=1), TypeError, "nesterov: got 1"),
        (lambda p: fb.RMSprop(p, alpha=1.0), ValueError, "alpha: got 1.0"),
        (lambda p: fb.RMSprop(p, weight_decay=-1), ValueError, "weight_decay: got -1"),
        (lambda p: fb.Adam({}), ValueError, "parameters: got none"),
        (lambda p: fb.Adam([p["a"]]), TypeError, "parameters: got list"),
        (lambda p: fb.Adam({"a": [1.0]}), TypeError, r"parameters\['a'\]: got list"),
        (lambda p: fb.Adam({"a": np.zeros(3, int)}), TypeError, "got dtype int64"),
        (lambda p: fb.Adam({"a": np.zeros((3, 3)).T[1:]}), ValueError, "C-contiguous"),
        (lambda p: fb.Adam({"a": np.broadcast_to(1.0, 3)}), ValueError, "writable"),
    ],
)
def test_bad_options(make, error, words):
    with pytest.raises(error, match=words):
        make({"a": np.zeros(3)})


def test_gradients_may_be_strided(rng):
    weights = [np.zeros((4, 6)), np.zeros((4, 6))]
    grad = rng.standard_normal((6, 4)).T
    fb.SGD({"w": weights[0]}).step({"w": grad})
    fb.SGD({"w": weights[1]}).step({"w": np.ascontiguousarray(grad)})
    np.testing.assert_array_equal(*weights)


def test_a_variance_that_rounds_below_zero_is_zero():
    weight = np.zeros(1)
    optimizer = fb.RMSprop({"w": weight}, centered=True)
    for _ in range(5000):
        optimizer.step({"w": np.array([0.1])})
    assert np.isfinite(weight).all()


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3, 0.0, math.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_clipping_is_that_of_torch(dtype, max_norm, rng):
    torch = require("torch")
    grads = parameters_of(rng, dtype)
    theirs = [torch.nn.Parameter(torch.zeros(())) for _ in grads]
    for parameter, grad in zip(theirs, grads.values(), strict=True):
        parameter.data = torch.tensor(grad)
        parameter.grad = torch.tensor(grad)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    assert fb.clip_grad_norm(grads, max_norm) == pytest.approx(float(expected), rel=tolerance)
    for parameter, grad in zip(theirs, grads.values(), strict=True):
        assert grad.dtype == dtype
        np.testing.assert_allclose(grad, parameter.grad.numpy(), rtol=tolerance, atol=1e-300)


def test_clipping_bounds_the_norm(rng):
    grads = parameters_of(rng)
    grads["1.strided"] = rng.standard_normal((3, 4)).T
    before = math.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    assert fb.clip_grad_norm(grads, 0.5) == pytest.approx(before, rel=1e-12)
    assert fb.clip_grad_norm(grads, 0.5) == pytest.approx(0.5, rel=1e-5)


def test_clipping_sees_the_norm_of_large_float32():
    grads = {"w": np.full(4, 1e30, "float32")}
    assert fb.clip_grad_norm(grads, 1.0) == pytest.approx(2e30, rel=1e-6)
    np.testing.assert_allclose(grads["w"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_are_left_alone(bad):
    grads = {"a": np.array([1.0, bad]), "b": np.array([2.0])}
    assert not math.isfinite(fb.clip_grad_norm(grads, 1.0))
    np.testing.assert_array_equal(grads["a"], [1.0, bad])
    np.testing.assert_array_equal(grads["b"], [2.0])


@pytest.mark.parametrize(
    ("grads", "max_norm", "error", "words"),
    [
        ({"a": np.ones(2)}, -1.0, ValueError, "max_norm: got -1.0"),
        ({"a": np.ones(2)}, math.nan, ValueError, "max_norm: got nan"),
        ({"a": np.ones(2)}, None, TypeError, "max_norm: got None"),
        ([np.ones(2)], 1.0, TypeError, "grads: got list"),
        ({"b": np.ones(2), "a": [1.0]}, 1.0, TypeError, r"grads\['a'\]: got list"),
        ({"b": np.ones(2), "a": np.ones(2, int)}, 1.0, TypeError, "got dtype int64"),
        ({"b": np.ones(2), "a": np.broadcast_to(1.0, 2)}, 1.0, ValueError, "read-only"),
    ],
)
def test_bad_clipping_changes_nothing(grads, max_norm, error, words):
    with pytest.raises(error, match=words):
        fb.clip_grad_norm(grads, max_norm)
    for grad in grads.values() if isinstance(grads, dict) else grads:
        assert np.all(np.asarray(grad) == 1.0)


def test_settings_stay_but_the_learning_rate():
    for optimizer in (fb.SGD({"w": np.zeros(3)}), fb.Adam({"w": np.zeros(3)})):
        optimizer.lr = 0.5
        before = optimizer.config()
        for name in set(before) - {"lr"}:
            with pytest.raises(AttributeError, match=f"{name}: got 0.9, but the settings of a"):
                setattr(optimizer, name, 0.9)
        assert optimizer.config() == before
