"""The errors that `activations.h` states, in units in the last place, seen through whole cells."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb

# Where the result is a normal number.
LOWEST = {"float32": -87.0, "float64": -708.0}
ULP = {
    ("tanh", "float32"): 7,
    ("tanh", "float64"): 2,
    ("logistic", "float32"): 4,
    ("logistic", "float64"): 3,
}


def arguments(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Of every size and sign, as many as it takes to meet the worst of them nearly."""
    n = 200_000
    sizes = np.exp(rng.uniform(np.log(1e-30), np.log(-LOWEST[dtype]), n)) * rng.choice([-1, 1], n)
    both = np.concatenate([sizes, rng.uniform(-20, 20, n), rng.uniform(LOWEST[dtype], 20, n)])
    return both.astype(dtype)


def tanh(x: np.ndarray) -> np.ndarray:
    """h of an RNN whose sums are x."""
    layer = fb.RNN(1, 1, bias=False, dtype=x.dtype.name, seed=0)
    layer.weights["weight_ih_l0"][:] = 1
    return layer(x.reshape(1, -1, 1))[0].reshape(-1)


def logistic(x: np.ndarray) -> np.ndarray:
    """c = f c' + i g of an LSTM with c' = 1 and g = 0, whose forget gate has the sums x."""
    layer = fb.LSTM(1, 1, bias=False, dtype=x.dtype.name, seed=0)
    layer.weights["weight_ih_l0"][:] = [[0], [1], [0], [0]]
    h, c = np.zeros((1, x.size, 1), x.dtype), np.ones((1, x.size, 1), x.dtype)
    return layer(x.reshape(1, -1, 1), (h, c))[1][1].reshape(-1)


def exact(name: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.longdouble)
    return np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="long double is double here"
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", [tanh, logistic])
def test_error_is_as_stated(rng, function, dtype):
    x = arguments(rng, dtype)
    wanted = exact(function.__name__, x)
    error = np.abs(function(x) - wanted) / np.spacing(np.abs(wanted).astype(dtype))
    worst = int(error.argmax())
    assert error[worst] <= ULP[function.__name__, dtype], f"at {x[worst]}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", [tanh, logistic])
def test_nan_and_the_far_ends(function, dtype):
    x = np.array([np.nan, 1e30, -1e30, 0], dtype)
    low = -1 if function is tanh else 0
    ends = [np.nan, 1, low, (1 + low) / 2]
    np.testing.assert_allclose(function(x), ends, rtol=0, atol=np.finfo(dtype).tiny)


# The other gates of `logistic` have weights of zero, to which an infinity is NaN by right.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_of_infinities(dtype):
    assert tanh(np.array([np.inf, -np.inf], dtype)).tolist() == [1, -1]
