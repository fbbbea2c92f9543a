"""loss_mask: what it leaves out changes nothing, and what it has is all that counts."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer

T, B, I, H, N = 29, 3, 4, 6, 5  # noqa: E741

orders = pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
losses = pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
schedules = pytest.mark.parametrize(
    "schedule",
    [fb.Full(), fb.Truncated(4, 9), fb.Checkpointed(slots=4), fb.Segmented(6, 4)],
    ids=str,
)


class Task:
    def __init__(self, rng, loss, cell="lstm", *, batch_first=False, dtype="float64"):
        layer = make_layer(cell, I, H, 2, seed=1, dtype=dtype, batch_first=batch_first)
        self.model = fb.Model(layer, fb.Linear(H, N, seed=2, dtype=dtype))
        self.loss = loss
        x = rng.standard_normal((T, B, I)).astype(dtype)
        loss_mask = rng.random((T, B)) < 0.6
        loss_mask[8:15] = False  # whole windows have nothing that counts
        if loss == "mse":
            target = rng.standard_normal((T, B, N)).astype(dtype)
        else:
            target = rng.integers(0, N, (T, B))
        arrays = (x, target, loss_mask)
        self.x, self.target, self.loss_mask = (
            np.ascontiguousarray(a.swapaxes(0, 1)) if batch_first else a for a in arrays
        )

    def by_hand(self, output, target, steps):
        """The same loss as a function of the user's."""
        cut = np.s_[:, steps] if self.model.batch_first else np.s_[steps]
        loss_mask, count = self.loss_mask[cut], np.count_nonzero(self.loss_mask)
        if self.loss == "mse":
            difference = np.where(loss_mask[..., None], output - target, 0.0)
            scale = 1.0 / (count * N)
            return scale * np.square(difference).sum(), 2.0 * scale * difference
        share = np.exp(output - output.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        places = (*np.nonzero(loss_mask), target[loss_mask])
        value = -np.log(share[places]).sum() / count
        share[places] -= 1.0
        return value, np.where(loss_mask[..., None], share / count, 0.0)


@losses
@orders
@schedules
@pytest.mark.parametrize("cell", CELLS)
def test_only_the_steps_of_the_mask_count(cell, schedule, batch_first, loss, rng):
    task = Task(rng, loss, cell, batch_first=batch_first)
    wanted = fb.value_and_grad(task.model, task.x, task.target, task.by_hand, schedule=schedule)
    got = fb.value_and_grad(
        task.model, task.x, task.target, loss, schedule=schedule, loss_mask=task.loss_mask
    )
    assert got.loss == pytest.approx(wanted.loss, rel=1e-12)
    for name, grad in wanted.grads.items():
        np.testing.assert_allclose(got.grads[name], grad, rtol=1e-9, atol=1e-14)
    if not isinstance(schedule, fb.Segmented):  # which has another loss, of states warmed up
        value, _ = fb.evaluate(task.model, task.x, task.target, loss, loss_mask=task.loss_mask)
        assert value == pytest.approx(wanted.loss, rel=1e-12)


@losses
@schedules
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_left_out_is_never_looked_at(dtype, schedule, loss, rng):
    task = Task(rng, loss, dtype=dtype)
    arguments = {"schedule": schedule, "loss_mask": task.loss_mask}
    wanted = fb.value_and_grad(task.model, task.x, task.target, loss, **arguments)
    task.target[~task.loss_mask] = 10**6 if loss == "cross_entropy" else np.nan
    got = fb.value_and_grad(task.model, task.x, task.target, loss, **arguments)
    assert got.loss == wanted.loss
    for name, grad in wanted.grads.items():
        np.testing.assert_array_equal(got.grads[name], grad)


@losses
def test_a_mask_of_all_steps_is_none(loss, rng):
    task = Task(rng, loss)
    wanted = fb.value_and_grad(task.model, task.x, task.target, loss)
    loss_mask = np.ones((T, B), bool)
    for given in (loss_mask, loss_mask.tolist(), np.repeat(loss_mask, 2, axis=1)[:, ::2]):
        got = fb.value_and_grad(task.model, task.x, task.target, loss, loss_mask=given)
        assert got.loss == wanted.loss
        for name, grad in wanted.grads.items():
            np.testing.assert_array_equal(got.grads[name], grad)


@losses
def test_windows_are_means_over_what_counts_in_them(loss, rng):
    task = Task(rng, loss)
    schedule = fb.Truncated(4, 6)
    whole = fb.value_and_grad(
        task.model, task.x, task.target, loss, schedule=schedule, loss_mask=task.loss_mask
    )
    windows = fb.each_window(
        task.model, task.x, task.target, loss, schedule=schedule, loss_mask=task.loss_mask
    )
    counts = [np.count_nonzero(task.loss_mask[t : t + 4]) for t in range(0, T, 4)]
    found = list(windows)
    assert 0 in counts
    assert [window.loss == 0.0 for window in found] == [count == 0 for count in counts]
    total = sum(w.loss * count for w, count in zip(found, counts, strict=True)) / sum(counts)
    assert total == pytest.approx(whole.loss, rel=1e-12)


def test_both_a_mask_and_ignore_index(rng):
    task = Task(rng, "cross_entropy")
    both = task.target.copy()
    more = rng.random((T, B)) < 0.3
    both[more] = 2
    got = fb.value_and_grad(task.model, task.x, both, loss_mask=task.loss_mask, ignore_index=2)
    wanted = fb.value_and_grad(task.model, task.x, both, loss_mask=task.loss_mask & (both != 2))
    assert got.loss == wanted.loss


class Lazy:
    def __init__(self, array, longest):
        self.array, self.longest = array, longest
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, steps):
        assert steps.stop - steps.start <= self.longest
        return self.array[steps]


@losses
def test_a_mask_is_read_a_part_at_a_time(loss, rng, monkeypatch):
    monkeypatch.setattr("fastbptt.losses._CHECKED_AT_ONCE", 4 * B)
    task = Task(rng, loss)
    wanted = fb.value_and_grad(task.model, task.x, task.target, loss, loss_mask=task.loss_mask)
    got = fb.value_and_grad(
        task.model,
        task.x,
        task.target,
        loss,
        schedule=fb.Checkpointed(slots=6),
        loss_mask=Lazy(task.loss_mask, 5),
    )
    for name, grad in wanted.grads.items():
        np.testing.assert_array_equal(got.grads[name], grad)


@pytest.mark.parametrize("run", [fb.value_and_grad, fb.evaluate])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"loss_mask": np.ones((T, B + 1), bool)},
            ValueError,
            r"loss_mask: got shape \(29, 4\), wanted",
        ),
        ({"loss_mask": np.ones((T, B))}, TypeError, "loss_mask: got dtype float64, wanted bool"),
        ({"loss_mask": np.ones((T, B), int)}, TypeError, "loss_mask: got dtype int64, wanted bool"),
        (
            {"loss_mask": np.zeros((T, B), bool)},
            ValueError,
            "no target counts.* a loss_mask that is False",
        ),
        (
            {"loss_mask": np.zeros((T, B), bool), "loss": "cross_entropy"},
            ValueError,
            "no target counts: got ignore_index = -100 everywhere under the loss_mask",
        ),
        (
            {"loss_mask": np.ones((T, B), bool), "loss": lambda *_: (0.0, 0.0)},
            ValueError,
            "loss_mask: got",
        ),
    ],
)
def test_bad_masks(run, changes, error, words, rng):
    task = Task(rng, changes.get("loss", "mse"))
    arguments = {"model": task.model, "x": task.x, "target": task.target, "loss": "mse", **changes}
    with pytest.raises(error, match=words):
        run(**arguments)
