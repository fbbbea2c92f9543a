"""The linear readout and its losses, for few outputs and many: beside float64, cut, and shared."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import fastbptt as fb
from fastbptt import _core

# Up to four outputs are products of their own; more are panels of packets.
OUTPUTS = [1, 2, 3, 4, 5, 17, 70]
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


def draw(rng, N, dtype):
    K, rows = int(rng.integers(1, 90)), int(rng.integers(1, 3000))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((rows, 1, K), (N, K), (N,)))


def near(got, wanted, terms):
    """Whether a sum of so many terms is off by no more than the order of them explains."""
    allowed = TOLERANCE[got.dtype.name] * np.sqrt(terms) * max(1.0, np.abs(wanted).max())
    assert np.abs(got - wanted).max() <= allowed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("N", OUTPUTS)
def test_it_is_the_product_and_its_gradients(N, with_bias, dtype, rng, threads):
    x, weight, bias = draw(rng, N, dtype)
    rows, _, K = x.shape
    bias = bias if with_bias else None
    wide_x, wide = x[:, 0].astype(float), weight.astype(float)
    wanted = wide_x @ wide.T + (0 if bias is None else bias.astype(float))
    near(_core.linear(x, weight, bias, cuts=True)[:, 0], wanted, K)
    near(_core.linear(x[:3], weight, bias)[:, 0], wanted[:3], K)  # without packing

    grad = rng.standard_normal((rows, 1, N)).astype(dtype)
    into = np.ones_like(weight), None if bias is None else np.ones_like(bias)
    near(_core.linear_backward(x, weight, grad, *into)[:, 0], grad[:, 0].astype(float) @ wide, N)
    near(into[0], 1 + grad[:, 0].astype(float).T @ wide_x, rows)
    if bias is not None:
        near(into[1], 1 + grad[:, 0].astype(float).sum(0), rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("N", OUTPUTS)
def test_no_gradient_depends_on_cuts_or_threads(N, loss, dtype, rng, one_thread):
    x, weight, bias = draw(rng, N, dtype)
    rows = len(x)
    if loss == "mse":
        target = rng.standard_normal((rows, 1, N)).astype(dtype)
    else:
        target = rng.integers(0, N, (rows, 1))

    def run(cuts, threads):
        fb.set_num_threads(threads)
        into = np.zeros_like(weight), np.zeros_like(bias)
        value, parts = 0.0, []
        for begin, end in list(pairwise(cuts))[::-1]:
            part = x[begin:end], weight, bias, target[begin:end], 0.25, -1, *into, True, None
            here, grad = _core.readout_loss(loss, *part)
            value += here
            parts.insert(0, grad)
        return value, [np.concatenate(parts), *into]

    cuts = sorted({0, rows, *rng.integers(0, rows + 1, 3).tolist()})
    value, whole = run([0, rows], 1)
    for other_cuts, threads in ((cuts, 1), ([0, rows], 2), (cuts, 3)):
        same, grads = run(other_cuts, threads)
        np.testing.assert_allclose(same, value, rtol=TOLERANCE[dtype])
        for got, wanted in zip(grads, whole, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize(("N", "rows"), [(1, 600_000), (4, 200_000), (5, 60_000)])
def test_more_threads_than_inputs(N, rows, K, rng, one_thread):
    """So many rows that three threads share columns of which there are fewer."""
    x, weight, target = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, 1, K), (N, K), (rows, 1, N))
    )
    bias, found = np.zeros(N, np.float32), []
    for threads in (1, 3):
        fb.set_num_threads(threads)
        into = np.zeros_like(weight), np.zeros_like(bias)
        _core.readout_loss("mse", x, weight, bias, target, 1e-3, -1, *into, True, None)
        found.append(into)
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(got, wanted)
