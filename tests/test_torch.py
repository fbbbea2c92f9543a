"""Names, shapes, initialisation, results and gradients are those of torch.nn."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from conftest import require
from reference import assert_close, draw, layer_for, load_weights, make_layer, run_library

torch = require("torch")
torch.set_num_threads(1)  # for such sizes the others cost more than they bring

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]  # torch has no GRU that resets before
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def torch_layer(cell, *sizes, dtype="float64", **options):
    kind = {"rnn": torch.nn.RNN, "lst": torch.nn.LSTM, "gru": torch.nn.GRU}[cell[:3]]
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell[4:]
    return kind(*sizes, dtype=getattr(torch, dtype), **options)


def run_torch(problem, module):
    """The results of torch under the names of `reference.run_library`, time-major."""

    def leaf(array):
        return torch.tensor(array, requires_grad=True)

    def time_major(tensor):
        array = tensor.detach().numpy()
        return array.swapaxes(0, 1) if module.batch_first else array

    x, h = leaf(problem.x.swapaxes(0, 1) if module.batch_first else problem.x), leaf(problem.h)
    grad_y = torch.tensor(problem.grad_y)
    results = {}
    if problem.c is None:
        y, last_h = module(x, h)
        total = (last_h * torch.tensor(problem.grad_h)).sum()
    else:
        c = leaf(problem.c)
        y, (last_h, last_c) = module(x, (h, c))
        total = (last_h * torch.tensor(problem.grad_h)).sum()
        total = total + (last_c * torch.tensor(problem.grad_c)).sum()
    (total + (y * (grad_y.swapaxes(0, 1) if module.batch_first else grad_y)).sum()).backward()
    if problem.c is not None:
        results |= {"c": last_c.detach().numpy(), "grad_c": c.grad.numpy()}
    return results | {
        "y": time_major(y),
        "h": last_h.detach().numpy(),
        "grad_x": time_major(x.grad),
        "grad_h": h.grad.numpy(),
        **{f"grad_{name}": p.grad.numpy() for name, p in module.named_parameters()},
    }


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients(cell, dtype, num_layers, batch_first, bias, rng):
    T, B, I, H = 13, 5, 7, 17  # noqa: E741
    problem = draw(rng, cell, T, B, I, H, num_layers, bias=bias, dtype=dtype)
    options = {"bias": bias, "batch_first": batch_first, "dtype": dtype}
    module = torch_layer(cell, I, H, num_layers, **options)
    module.load_state_dict({name: torch.tensor(w) for name, w in problem.weights.items()})

    layer = layer_for(problem, batch_first=batch_first)
    if batch_first:
        y, state, tape = layer.forward(problem.x.swapaxes(0, 1), problem.state())
        grads = layer.backward(tape, problem.grad_y.swapaxes(0, 1), problem.grad_state())
        states = [("h", state, grads.state)] if problem.c is None else []
        if problem.c is not None:
            states = list(zip("hc", state, grads.state, strict=True))
        actual = {"y": y.swapaxes(0, 1), "grad_x": grads.x.swapaxes(0, 1)}
        for name, last, gradient in states:
            actual |= {name: last, f"grad_{name}": gradient}
        actual |= {f"grad_{name}": value for name, value in grads.weights.items()}
    else:
        actual = run_library(problem, layer)
    assert_close(actual, run_torch(problem, module), TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (100, 1, 3, 5), (2, 33, 31, 33)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_other_sizes(cell, sizes, rng):
    problem = draw(rng, cell, *sizes)
    module = torch_layer(cell, sizes[2], sizes[3])
    module.load_state_dict({name: torch.tensor(w) for name, w in problem.weights.items()})
    assert_close(run_library(problem), run_torch(problem, module), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_loads_unchanged(cell, bias, rng):
    module = torch_layer(cell, 7, 5, 3, dtype="float32", bias=bias)
    layer = make_layer(cell, 7, 5, 3, bias=bias)
    state_dict = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert list(layer.weights) == list(state_dict)
    assert {n: w.shape for n, w in layer.weights.items()} == {
        n: w.shape for n, w in state_dict.items()
    }
    load_weights(layer, state_dict)
    x = rng.standard_normal((4, 2, 7)).astype("float32")
    expected = module(torch.tensor(x))[0].detach().numpy()
    np.testing.assert_allclose(layer(x)[0], expected, atol=1e-5)


def test_model_has_the_names_of_sequential():
    class Recurrent(torch.nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    module = torch.nn.Sequential(
        torch.nn.Embedding(11, 3), Recurrent(3, 5, 2), torch.nn.Linear(5, 11)
    )
    model = fb.Model(fb.Embedding(11, 3), fb.LSTM(3, 5, 2), fb.Linear(5, 11))
    parameters = model.parameters()
    assert list(parameters) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        parameters[name][...] = tensor.numpy()

    index = np.array([[0, 10], [3, 3], [7, 1]])
    output, _ = model(index)
    expected = module(torch.tensor(index)).detach().numpy()
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("hidden_size", [1, 16, 100])
@pytest.mark.parametrize("cell", CELLS)
def test_default_initialisation(cell, hidden_size):
    bound = 1.0 / np.sqrt(hidden_size)
    layer = make_layer(cell, 50, hidden_size, 2, seed=0, dtype="float64")
    module = torch_layer(cell, 50, hidden_size, 2)
    for name, tensor in module.named_parameters():
        ours, theirs = layer.weights[name], tensor.detach().numpy()
        assert np.abs(ours).max() <= bound, name
        assert np.abs(theirs).max() <= bound, name
        # The moments of the uniform distribution, within five standard errors.
        error = 5.0 * bound / np.sqrt(ours.size)
        assert abs(ours.mean()) <= error / np.sqrt(3.0), name
        assert abs(np.abs(ours).mean() - bound / 2.0) <= error / np.sqrt(12.0), name


def test_default_initialisation_of_embedding_and_linear():
    table = fb.Embedding(200, 30, seed=0).weights["weight"]
    assert table.shape == tuple(torch.nn.Embedding(200, 30).weight.shape)
    assert abs(table.mean()) < 0.05
    assert table.std() == pytest.approx(1.0, abs=0.05)

    ours = fb.Linear(64, 100, seed=0).weights
    theirs = dict(torch.nn.Linear(64, 100).named_parameters())
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tuple(tensor.shape)
        assert np.abs(ours[name]).max() <= 1.0 / 8.0
        assert np.abs(ours[name]).max() > 0.9 / 8.0


@pytest.mark.parametrize("ignored", [0, 7])
def test_loss_and_gradients_of_a_whole_model(ignored, rng):
    """Embedding, LSTM, readout and cross-entropy, some of the targets left out."""
    V, E, H, T, B = 11, 5, 16, 20, 4
    model = fb.Model(
        fb.Embedding(V, E, dtype="float64"),
        fb.LSTM(E, H, dtype="float64"),
        fb.Linear(H, V, dtype="float64"),
    )
    embedding = torch.nn.Embedding(V, E, dtype=torch.float64)
    lstm = torch.nn.LSTM(E, H, dtype=torch.float64)
    linear = torch.nn.Linear(H, V, dtype=torch.float64)
    modules = torch.nn.Sequential(embedding, lstm, linear)
    modules.load_state_dict({name: torch.tensor(w) for name, w in model.parameters().items()})

    index = rng.integers(0, V, (T, B))
    target = rng.integers(0, V, (T, B))
    target[:ignored, 1] = -100
    result = fb.value_and_grad(model, index, target)

    logits = linear(lstm(embedding(torch.tensor(index)))[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(target).flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    expected = {name: p.grad.numpy() for name, p in modules.named_parameters()}
    assert_close(result.grads, expected, 1e-12)
