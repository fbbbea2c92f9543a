"""each_window: Truncated's gradient by parts, with parameters that may change in between."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer

T, B, CLASSES = 23, 3, 4


def make_task(rng, cell="lstm", **options):
    seeded = {"dtype": "float64", "seed": 1}
    layer = make_layer(cell, 3, 5, 2, **seeded, **options)
    model = fb.Model(layer, fb.Linear(5, CLASSES, **seeded))
    x, target = rng.standard_normal((T, B, 3)), rng.integers(0, CLASSES, (T, B))
    if model.batch_first:
        x, target = x.swapaxes(0, 1).copy(), target.swapaxes(0, 1).copy()
    return model, x, target


@pytest.mark.parametrize("k", [(4, 4), (4, 9), (5, 30), (1, 6), (30, 30)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_the_windows_add_up(cell, batch_first, k, rng):
    model, x, target = make_task(rng, cell, batch_first=batch_first)
    schedule = fb.Truncated(*k)
    whole = fb.value_and_grad(model, x, target, schedule=schedule)
    windows = list(fb.each_window(model, x, target, schedule=schedule))
    steps = [min(k[0], T - new) for new in range(0, T, k[0])]
    assert len(windows) == len(steps)
    shares = [n / T for n in steps]
    loss = sum(w.loss * share for w, share in zip(windows, shares, strict=True))
    assert loss == pytest.approx(whole.loss, rel=1e-12)
    for name, grad in whole.grads.items():
        parts = [w.grads[name] * share for w, share in zip(windows, shares, strict=True)]
        np.testing.assert_allclose(sum(parts), grad, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(
        np.atleast_1d(windows[-1].state), np.atleast_1d(whole.state), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_parameters_may_change_in_between(rng):
    """Each window is a call of its own on what the parameters are then."""
    model, x, target = make_task(rng)
    other = fb.Model.from_config(model.config())
    other.load_state_dict(model.parameters())
    first, second = (fb.SGD(m.parameters(), lr=0.1) for m in (model, other))
    state = None
    for number, window in enumerate(fb.each_window(model, x, target, schedule=fb.Truncated(6))):
        steps = slice(6 * number, 6 * number + 6)
        wanted = fb.value_and_grad(other, x[steps], target[steps], state=state)
        state = wanted.state
        assert window.loss == pytest.approx(wanted.loss, rel=1e-12)
        first.step(window.grads)
        second.step(wanted.grads)
    for name, parameter in model.parameters().items():
        np.testing.assert_allclose(parameter, other.parameters()[name], rtol=1e-10)


def test_a_window_without_targets_has_no_loss(rng):
    model, x, target = make_task(rng)
    target[6:12] = -100
    losses = [w.loss for w in fb.each_window(model, x, target, schedule=fb.Truncated(6))]
    assert losses[1] == 0.0
    assert all(loss > 0 for n, loss in enumerate(losses) if n != 1)


def test_bad_arguments(rng):
    model, x, target = make_task(rng)
    with pytest.raises(TypeError, match="schedule: got Full, wanted Truncated"):
        fb.each_window(model, x, target, schedule=fb.Full())
    with pytest.raises(ValueError, match="x: got shape"):
        fb.each_window(model, x[0], target, schedule=fb.Truncated(3))


@pytest.mark.parametrize("k2", [3, 5])
def test_writing_to_the_state_of_a_window_changes_none_behind_it(k2, rng):
    model = fb.Model(fb.LSTM(2, 4, seed=0), fb.Linear(4, 1, seed=0))
    x, target = rng.standard_normal((12, 2, 2), "f"), rng.standard_normal((12, 2, 1), "f")

    def losses(write):
        found = []
        for window in fb.each_window(model, x, target, "mse", schedule=fb.Truncated(3, k2)):
            found.append(window.loss)
            for part in window.state if write else ():
                part[...] = 9
        return found

    assert losses(True) == losses(False)
