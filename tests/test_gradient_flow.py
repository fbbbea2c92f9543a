"""`fb.gradient_flow` shows the gradient there is: its norms against derivatives that were taken
one number at a time, in a network written out in NumPy.
"""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbptt as fb
from conftest import require
from fastbptt import diagnostics, flow_plot, gate_gradients, initialisers
from reference import CELLS, layer_for, make_layer
from reference import draw as draw_problem


def logistic(a):
    return 1.0 / (1.0 + np.exp(-a))


def cell_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh):
    """One step of one layer by its formula; biases may be 0."""
    H = h.shape[1]
    a = x @ w_ih.T + b_ih
    if cell == "gru_reset_before":
        u = h @ w_hh[: 2 * H].T + np.broadcast_to(b_hh, 3 * H)[: 2 * H]
        r, z = np.split(logistic(a[:, : 2 * H] + u), 2, axis=1)
        new = (r * h) @ w_hh[2 * H :].T + np.broadcast_to(b_hh, 3 * H)[2 * H :]
        return (1 - z) * np.tanh(a[:, 2 * H :] + new) + z * h, None
    u = h @ w_hh.T + b_hh
    if cell == "rnn_tanh":
        return np.tanh(a + u), None
    if cell == "rnn_relu":
        return np.maximum(a + u, 0.0), None
    if cell == "lstm":
        i, f, g, o = np.split(a + u, 4, axis=1)
        c = logistic(f) * c + logistic(i) * np.tanh(g)
        return logistic(o) * np.tanh(c), c
    r, z = np.split(logistic(a[:, : 2 * H] + u[:, : 2 * H]), 2, axis=1)
    return (1 - z) * np.tanh(a[:, 2 * H :] + r * u[:, 2 * H :]) + z * h, None


class Slow:
    """A stack in which a state, or a parameter at one step alone, can be moved a little."""

    def __init__(self, problem, loss_of):
        self.problem, self.loss_of = problem, loss_of

    def loss(self, what=None, layer=0, step=0, index=None, by=0.0):
        p = self.problem
        h = list(p.h)
        c = [None] * p.num_layers if p.c is None else list(p.c)
        y = []
        for t, x in enumerate(p.x):
            for k in range(p.num_layers):
                here = (layer, step) == (k, t)
                weights = [0.0 if w is None else w for w in p.layer_weights(k)]
                if here and isinstance(what, int):
                    weights[what] = moved(weights[what], index, by)
                # dL/dc counts the way through h: so c is moved between the two.
                h[k], c[k] = self.step(k, x, h[k], c[k], weights, by_c=(here, what, index, by))
                if here and what == "h":
                    h[k] = moved(h[k], index, by)
                x = h[k]
            y.append(x)
        return self.loss_of(np.stack(y))

    def step(self, k, x, h, c, weights, by_c):
        here, what, index, by = by_c
        new_h, new_c = cell_step(self.problem.cell, x, h, c, *weights)
        if here and what == "c":
            o = new_h / np.tanh(new_c)
            new_c = moved(new_c, index, by)
            new_h = o * np.tanh(new_c)
        return new_h, new_c

    def norm(self, what, layer, step, shape):
        """The norm of a gradient, by central differences."""
        eps, total = 1e-5, 0.0
        for index in np.ndindex(shape):
            up = self.loss(what, layer, step, index, eps)
            down = self.loss(what, layer, step, index, -eps)
            total += ((up - down) / (2 * eps)) ** 2
        return np.sqrt(total)


def moved(array, index, by):
    array = np.array(array)
    array[index] += by
    return array


def close(got, wanted, tolerance=1e-7):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * wanted.max())


@pytest.mark.parametrize("at", [-1, 1, None])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_every_norm_is_that_of_finite_differences(cell, num_layers, at, rng):
    T, B, I, H = 3, 2, 2, 3  # noqa: E741
    bias = at != 1
    p = draw_problem(rng, cell, T, B, I, H, num_layers, bias=bias, relu_margin=1e-3)
    target = p.grad_y
    model = fb.Model(layer_for(p))
    flow = fb.gradient_flow(model, p.x, target, "mse", p.state(), at=at)
    steps = slice(None) if at is None else slice(at % T, at % T + 1)
    slow = Slow(p, lambda y: np.square(y[steps] - target[steps]).mean())
    n = T if at is None else at % T + 1
    assert flow.h.shape == (num_layers, n)
    close(flow.loss, slow.loss())
    everywhere = [(k, t) for k in range(num_layers) for t in range(n)]
    for what, got in {"h": flow.h, "c": flow.c}.items():
        if got is not None:
            wanted = [slow.norm(what, k, t, (B, H)) for k, t in everywhere]
            close(got.ravel(), wanted)
    assert (flow.c is not None) == (cell == "lstm")
    assert set(flow.weights) == set(model.parameters())
    for k in range(num_layers):
        for place, weight in enumerate(p.layer_weights(k)):
            if weight is not None:
                name = f"0.{['weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'][place]}_l{k}"
                wanted = [slow.norm(place, k, t, weight.shape) for t in range(n)]
                close(flow.weights[name], wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_a_product_of_jacobians(cell, rng):
    """Over forty steps: dL/ds of the whole state, by Jacobians of one step of the layer each."""
    T, B, H = 40, 1, 4
    p = draw_problem(rng, cell, T, B, 2, H, relu_margin=1e-4)
    layer = layer_for(p)

    def one_step(t, s):
        state = (s[None, None, :H], s[None, None, H:]) if cell == "lstm" else s[None, None]
        _, after = layer(p.x[t : t + 1], state)
        return np.concatenate(
            [np.ravel(part) for part in after] if cell == "lstm" else [after.ravel()]
        )

    s = np.concatenate([part.ravel() for part in (p.h, p.c) if part is not None])
    jacobians = []
    for t in range(T):
        eps = 1e-6 * np.eye(len(s))
        columns = [(one_step(t, s + e) - one_step(t, s - e)) / 2e-6 for e in eps]
        jacobians.append(np.stack(columns, axis=1))
        s = one_step(t, s)
    error = np.zeros(len(s))
    error[:H] = 2 * (s[:H] - p.grad_y[-1, 0]) / H
    wanted = []
    for jacobian in reversed(jacobians):
        wanted.append(np.linalg.norm(error[:H]))
        error = jacobian.T @ error
    flow = fb.gradient_flow(fb.Model(layer), p.x, p.grad_y, "mse", p.state())
    np.testing.assert_allclose(flow.h[0, ::-1], wanted, rtol=1e-5)


def test_an_rnn_is_a_product_of_its_recurrent_matrix(rng):
    layer = fb.RNN(3, 5, seed=0, dtype="float64")
    x, target = rng.standard_normal((60, 1, 3)), rng.standard_normal((60, 1, 5))
    y, _ = layer(x)
    error = 2 * (y[-1, 0] - target[-1, 0]) / 5
    wanted = []
    for h in y[::-1, 0]:
        wanted.append(np.linalg.norm(error))
        error = layer.weights["weight_hh_l0"].T @ ((1 - h**2) * error)
    flow = fb.gradient_flow(fb.Model(layer), x, target, "mse")
    np.testing.assert_allclose(flow.h[0, ::-1], wanted, rtol=1e-12)
    np.testing.assert_array_equal(flow.distance, np.arange(60)[::-1])


@pytest.mark.parametrize("cell", CELLS)
def test_an_exploding_gradient_is_shown_and_not_warned_of(cell):
    layer = make_layer(cell, 1, 4, seed=0)
    for name, weight in layer.weights.items():
        weight[...] = 1e3 * np.eye(len(weight), weight.shape[1]) if "weight" in name else 0.0
    x, target = np.full((30, 1, 1), 1e-30, np.float32), np.ones((30, 1, 4), np.float32)
    flow = fb.gradient_flow(fb.Model(layer), x, target, lambda *_: (0.0, target[:1].copy()))
    assert flow.h.shape == (1, 30)
    if cell == "rnn_tanh":
        assert "|dL/dh| is inf, 13 steps before it" in str(flow.exploding())
        assert flow.exploding()


@given(
    cell=st.sampled_from(CELLS),
    sizes=st.tuples(*[st.sampled_from([1, 2, 5, 17, 40])] * 3),
    options=st.fixed_dictionaries(
        {
            "num_layers": st.sampled_from([1, 3]),
            "bias": st.booleans(),
            "batch_first": st.booleans(),
            "dtype": st.sampled_from(["float32", "float64"]),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_step_contributes_the_whole_gradient(cell, sizes, options, seed):
    B, I, H = sizes  # noqa: E741
    rng = np.random.default_rng(seed)
    layer = make_layer(cell, I, H, seed=seed, **options)
    readout = fb.Linear(H, 3, seed=1, dtype=options["dtype"])
    model = fb.Model(layer, readout)
    x = rng.standard_normal((B, 1, I) if options["batch_first"] else (1, B, I))
    x = x.astype(options["dtype"])
    target = rng.integers(0, 3, x.shape[:2])
    result = fb.value_and_grad(model, x, target)
    flow = fb.gradient_flow(model, x, target)
    tolerance = 1e-11 if options["dtype"] == "float64" else 2e-4
    close(flow.loss, result.loss, tolerance)
    names = [name for name in result.grads if name.startswith("0.")]
    assert list(flow.weights) == names
    for name in names:
        wanted = np.linalg.norm(result.grads[name].astype(float))
        largest = max(np.linalg.norm(g) for g in result.grads.values())
        assert abs(flow.weights[name][0] - wanted) <= tolerance * largest, name


@pytest.mark.parametrize("cell", CELLS)
def test_cuts_into_blocks_change_nothing(cell, rng, monkeypatch):
    p = draw_problem(rng, cell, 23, 3, 4, 5, 2)
    model = fb.Model(layer_for(p))
    whole = fb.gradient_flow(model, p.x, p.grad_y, "mse", p.state())
    monkeypatch.setattr(diagnostics, "_BLOCK", 3 * 5 * 7)
    parts = fb.gradient_flow(model, p.x, p.grad_y, "mse", p.state())
    assert whole.weights.keys() == parts.weights.keys()
    for name, norms in whole.weights.items():
        np.testing.assert_allclose(parts.weights[name], norms, rtol=1e-12)
    if cell == "lstm":
        np.testing.assert_allclose(parts.c, whole.c, rtol=1e-12)


def test_the_two_ways_to_the_norm_of_a_product(rng):
    for B, R, C in [(1, 9, 4), (3, 9, 4), (40, 9, 4), (2, 1, 1)]:
        left, right = rng.standard_normal((5, B, R)), rng.standard_normal((5, B, C))
        wanted = [np.linalg.norm(a.T @ b) ** 2 for a, b in zip(left, right, strict=True)]
        np.testing.assert_allclose(diagnostics._squared_product(left, right), wanted, rtol=1e-12)


def test_classes_embeddings_and_input_as_it_comes(rng):
    layers = fb.Embedding(7, 3, seed=0), fb.LSTM(3, 4, 2, batch_first=True, seed=1)
    model = fb.Model(*layers, fb.Linear(4, 7, seed=2))
    text = rng.integers(0, 7, (2, 12))
    flow = fb.gradient_flow(model, text, text)
    assert list(flow.weights) == [n for n in model.parameters() if n.startswith("1.")]
    wide = np.repeat(text, 3, axis=1)[:, ::3].copy()
    wide.flags.writeable = False
    again = fb.gradient_flow(model, wide[::-1][::-1], text.tolist(), contributions=False)
    np.testing.assert_array_equal(again.h, flow.h)
    assert again.weights == {}
    before = {name: w.copy() for name, w in model.parameters().items()}
    every = fb.gradient_flow(model, text, text, at=None)
    assert abs(every.loss - fb.evaluate(model, text, text)[0]) < 1e-6
    for name, weight in model.parameters().items():
        np.testing.assert_array_equal(weight, before[name])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learned_initial_states_are_begun_with(cell, rng):
    p = draw_problem(rng, cell, 7, 2, 3, 4, 2)
    plain = fb.Model(layer_for(p))
    layer = make_layer(cell, 3, 4, 2, dtype="float64", learn_initial_state=True, dropout=0.5)
    for name, weight in layer.weights.items():
        weight[...] = p.weights[name] if name in p.weights else rng.standard_normal(weight.shape)
    names = ("h0", "c0") if cell == "lstm" else ("h0",)
    parts = [np.stack([layer.weights[f"{n}_l{k}"] for k in range(2)]) for n in names]
    state = tuple(np.repeat(part[:, None], 2, axis=1) for part in parts)
    state = state if cell == "lstm" else state[0]
    learned = fb.gradient_flow(fb.Model(layer), p.x, p.grad_y, "mse")
    given_state = fb.gradient_flow(plain, p.x, p.grad_y, "mse", state)
    np.testing.assert_array_equal(learned.h, given_state.h)
    assert list(learned.weights) == list(given_state.weights)


def test_targets_that_do_not_count(rng):
    model = fb.Model(fb.GRU(3, 4, seed=0), fb.Linear(4, 5, seed=1))
    x = rng.standard_normal((6, 2, 3), np.float32)
    target = rng.integers(0, 5, (6, 2))
    target[-1] = -100
    with pytest.raises(ValueError, match=r"target: .*step 5.*at="):
        fb.gradient_flow(model, x, target)
    target[-1, 0] = 2
    flow = fb.gradient_flow(model, x, target)
    wanted = np.full((6, 2), -100)
    wanted[-1] = target[-1]
    assert abs(flow.loss - fb.evaluate(model, x, wanted)[0]) < 1e-6


def test_a_callable_loss_sees_the_step_alone(rng):
    model = fb.Model(fb.RNN(3, 4, seed=0), fb.Linear(4, 2, seed=1))
    x = rng.standard_normal((6, 2, 3), np.float32)
    seen = []

    def loss(output, target, steps):
        seen.append((output.shape, target, steps))
        return float(output.sum()), np.ones_like(output)

    flow = fb.gradient_flow(model, x, None, loss, at=2)
    assert seen == [((1, 2, 2), None, slice(2, 3))]
    assert flow.h.shape == (1, 3)


def scaled_identity(scale, T=50, H=4):
    """The flow of h_t = scale * h_{t-1}."""
    model = fb.Model(fb.RNN(1, H, nonlinearity="relu", dtype="float64"))
    weights = model.recurrent.weights
    for weight in weights.values():
        weight[...] = 0.0
    weights["weight_hh_l0"][...] = scale * np.eye(H)
    x, target = np.zeros((T, 1, 1)), np.zeros((T, 1, H))
    return fb.gradient_flow(model, x, target, "mse", np.ones((1, 1, H)))


class TestVerdicts:
    @pytest.mark.parametrize("half_life", [1.0, 2.5, 30.0])
    def test_the_half_life_is_that_of_the_recurrence(self, half_life):
        flow = scaled_identity(0.5 ** (1 / half_life), T=20)
        assert abs(flow.half_life() - half_life) < 1e-9
        assert flow.half_life(0) == flow.half_life(-1)

    def test_what_vanishes(self):
        flow = scaled_identity(0.5)
        verdict = flow.vanishing()
        assert verdict
        assert str(verdict).startswith("layer 0 vanishes: |dL/dh| is ")
        assert "5.63e+14 times less; it halves every 1.0 steps" in str(verdict)
        figures = verdict.figures[0]
        assert figures["target"] / figures["first"] == 2.0**49
        assert figures["half_life"] == pytest.approx(1.0)
        assert not flow.vanishing(factor=1e15)
        assert not flow.exploding()

    def test_what_explodes(self):
        flow = scaled_identity(2.0)
        assert flow.half_life() == np.inf
        assert not flow.vanishing()
        verdict = flow.exploding()
        assert verdict
        assert "49 steps before it" in str(verdict)
        assert verdict.figures[0]["distance"] == 49

    def test_what_does_neither(self):
        flow = scaled_identity(1.0)
        assert flow.half_life() == np.inf
        assert not flow.vanishing()
        assert not flow.exploding()
        assert str(flow.exploding()).endswith(", there")

    def test_zero_is_named_as_such(self):
        flow = fb.GradientFlow(1.0, np.array([[0.0, 0.0, 0.5, 1.0]]), None)
        assert "from two steps before it on; it halves every 1.0 steps" in str(flow.vanishing())
        cut = fb.GradientFlow(1.0, np.array([[0.0, 0.0, 1.0]]), None)
        assert cut.half_life() == 0.0
        assert cut.vanishing()
        nothing = fb.GradientFlow(0.0, np.zeros((1, 3)), None)
        assert not nothing.vanishing()
        assert not nothing.exploding()
        assert nothing.half_life() == np.inf

    def test_what_is_not_finite_has_exploded(self):
        flow = fb.GradientFlow(1.0, np.array([[np.nan, np.inf, 2.0, 1.0]]), None)
        assert "|dL/dh| is inf, two steps before it" in str(flow.exploding())
        assert flow.exploding()
        assert not flow.vanishing()

    def test_one_step(self):
        flow = scaled_identity(0.5, T=1)
        assert flow.half_life() == np.inf
        assert not flow.vanishing()
        assert "but one step" in str(flow.vanishing())

    def test_a_line_a_layer(self):
        flow = fb.GradientFlow(1.0, np.array([[1e-9, 1.0], [1.0, 1.0]]), None)
        assert [f["layer"] for f in flow.vanishing().figures] == [0, 1]
        assert str(flow.vanishing()).count("\n") == 1
        assert flow.vanishing()
        assert not flow.vanishing(layer=1)
        assert flow.vanishing(layer=-2)

    def test_of_all_targets_only_growth_can_be_told(self):
        flow = fb.GradientFlow(1.0, np.array([[1e9, 1.0]]), None, all_targets=True)
        assert flow.exploding()
        for name in ("vanishing", "half_life"):
            with pytest.raises(ValueError, match=rf"{name}: .*at=-1"):
                getattr(flow, name)()


class TestErrors:
    @pytest.fixture
    def problem(self, rng):
        model = fb.Model(fb.GRU(3, 4, seed=0), fb.Linear(4, 5, seed=1))
        return model, rng.standard_normal((6, 2, 3), np.float32), rng.integers(0, 5, (6, 2))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"at": 6}, ValueError, r"at: got 6, wanted None or from -6 to 5"),
            ({"at": -7}, ValueError, "at: got -7"),
            ({"at": 1.5}, TypeError, "at: got 1.5"),
            ({"contributions": 1}, TypeError, "contributions: got 1"),
            ({"loss": "huber"}, ValueError, "loss: got 'huber'"),
            ({"state": np.zeros((1, 3, 4), np.float32)}, ValueError, "state"),
            ({"state": np.zeros((2, 2, 4), np.float32)}, ValueError, "state"),
            ({"state": np.zeros((1, 2, 4))}, TypeError, "state"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, problem, options, error, match):
        with pytest.raises(error, match=match):
            fb.gradient_flow(*problem, **options)

    def test_input_of_the_wrong_kind(self, problem):
        model, x, target = problem
        with pytest.raises(TypeError, match="model"):
            fb.gradient_flow(model.recurrent, x, target)
        with pytest.raises(ValueError, match="x: got shape"):
            fb.gradient_flow(model, x[..., :2], target)
        with pytest.raises(TypeError, match="x: got dtype float64"):
            fb.gradient_flow(model, x.astype(np.float64), target)
        with pytest.raises(ValueError, match="target"):
            fb.gradient_flow(model, x[:0], target[:0])

    def test_a_layer_with_other_options_is_refused_and_not_taken_for_a_plain_one(
        self, problem, monkeypatch
    ):
        model, x, target = problem
        for name, value in {
            "_cell": lambda self: "gru_of_another_kind",
            "weights": property(lambda self: {**self._weights, "weight_hr_l0": x}),
        }.items():
            with monkeypatch.context() as patch:
                patch.setattr(fb.GRU, name, value)
                with pytest.raises(ValueError, match=r"model: got GRU\(3, 4\), wanted"):
                    fb.gradient_flow(model, x, target)

    def test_two_directions_are_refused(self, problem):
        _, x, target = problem
        model = fb.Model(fb.LSTM(3, 4, bidirectional=True))
        with pytest.raises(ValueError, match=r"model: got LSTM\(.*without bidirectional"):
            fb.gradient_flow(model, x, target)

    @pytest.mark.parametrize("layer", [1, -2])
    def test_there_is_no_such_layer(self, layer):
        flow = fb.GradientFlow(1.0, np.ones((1, 3)), None)
        for ask in (flow.half_life, flow.vanishing, flow.exploding):
            with pytest.raises(ValueError, match="layer"):
                ask(layer)

    @pytest.mark.parametrize("factor", [1.0, 0.0, np.inf])
    def test_a_factor_is_above_one(self, factor):
        flow = fb.GradientFlow(1.0, np.ones((1, 3)), None)
        for ask in (flow.vanishing, flow.exploding):
            with pytest.raises(ValueError, match="factor"):
                ask(factor=factor)


class TestPlot:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        return require("matplotlib")

    def test_every_norm_is_a_line_and_zeros_are_left_out(self, tmp_path, rng):
        p = draw_problem(rng, "lstm", 9, 2, 3, 4, 2)
        flow = fb.gradient_flow(fb.Model(layer_for(p)), p.x, p.grad_y, "mse")
        flow.h[0, :3] = 0.0
        figure = flow.plot(tmp_path / "flow.png")
        assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
        states, weights = figure.axes
        assert states.get_yscale() == weights.get_yscale() == "log"
        labels = [line.get_label() for line in states.lines]
        assert labels == ["dL/dh, layer 0", "dL/dc, layer 0", "dL/dh, layer 1", "dL/dc, layer 1"]
        np.testing.assert_array_equal(states.lines[0].get_xdata(), flow.distance)
        drawn = states.lines[0].get_ydata()
        np.testing.assert_array_equal(np.isnan(drawn), flow.h[0] == 0.0)
        np.testing.assert_array_equal(drawn[3:], flow.h[0, 3:])
        assert [line.get_label() for line in weights.lines] == list(flow.weights)

    def test_flows_beside_each_other(self):
        flow = fb.GradientFlow(1.0, np.ones((1, 3)), None, {"0.weight_hh_l0": np.ones(3)})
        figure = flow_plot.compare({"RNN": flow, "GRU": flow}, "two")
        labels = [[line.get_label() for line in axes.lines] for axes in figure.axes]
        assert labels == [["RNN dL/dh", "GRU dL/dh"], ["RNN 0.weight_hh_l0", "GRU 0.weight_hh_l0"]]

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        def missing(name, *arguments):
            raise ImportError(name)

        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.raises(ImportError, match=r"pip install 'fastbptt\[plot\]'"):
            fb.GradientFlow(1.0, np.ones((1, 3)), None).plot()


@pytest.mark.parametrize("module", [diagnostics, gate_gradients, flow_plot, initialisers])
def test_the_examples_run(module):
    if module is flow_plot:
        require("matplotlib")
    assert doctest.testmod(module).failed == 0


def test_norms_that_are_no_numbers_have_no_half_life():
    flow = fb.GradientFlow(loss=1.0, h=np.array([[np.nan, np.nan, 1.0]]), c=None)
    assert np.isnan(flow.half_life())
    assert "0.0 steps" not in str(flow.vanishing())
