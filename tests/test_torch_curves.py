"""Training with this library is training with PyTorch: the loss curves lie on each other."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from conftest import require
from reference import make_layer

torch = require("torch")

STEPS = 200
T, B, I, H, CLASSES = 15, 8, 4, 12, 5  # noqa: E741


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Problems this small only wait for each other on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def delayed_classes(rng):
    """The class to name is the largest of the inputs, some steps ago."""
    x = rng.standard_normal((T, B, I))
    target = np.concatenate([np.full((2, B), CLASSES - 1), x.argmax(-1)[:-2]])
    return x, target


@pytest.mark.parametrize("k1", [None, 5], ids=["full", "truncated"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_200_adam_steps(cell, k1, rng):
    x, target = delayed_classes(rng)
    model = fb.Model(
        make_layer(cell, I, H, 2, dtype="float64", seed=1),
        fb.Linear(H, CLASSES, dtype="float64", seed=2),
    )
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[cell]
    layer = kind(I, H, 2, dtype=torch.float64)
    readout = torch.nn.Linear(H, CLASSES, dtype=torch.float64)
    for module, part in ((layer, model.recurrent), (readout, model.readout)):
        module.load_state_dict({name: torch.tensor(w) for name, w in part.weights.items()})

    ours, theirs = [], []
    adam = fb.Adam(model.parameters(), lr=0.01)
    schedule = fb.Full() if k1 is None else fb.Truncated(k1)
    for _ in range(STEPS):
        result = fb.value_and_grad(model, x, target, schedule=schedule)
        adam.step(result.grads)
        ours.append(result.loss)

    inputs, classes = torch.tensor(x), torch.tensor(target)
    reference = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.01)
    for _ in range(STEPS):
        reference.zero_grad()
        total, state = 0.0, None
        for t in range(0, T, k1 or T):
            y, state = layer(inputs[t : t + (k1 or T)], state)
            state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
            logits = readout(y).flatten(0, 1)
            part = torch.nn.functional.cross_entropy(
                logits, classes[t : t + (k1 or T)].flatten(), reduction="sum"
            )
            (part / classes.numel()).backward()
            total += float(part.detach()) / classes.numel()
        reference.step()
        theirs.append(total)

    assert ours[-1] < 0.5 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
