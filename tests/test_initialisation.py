"""What parameters start from: seeded, of the stated distribution, the same in both dtypes."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from fastbptt import initialisers
from reference import CELLS, GATES, make_layer

PARTS = {
    **{cell: lambda cell=cell, **o: make_layer(cell, 7, 9, 2, **o) for cell in CELLS},
    "orthogonal": lambda **o: fb.LSTM(7, 9, 2, init="orthogonal", forget_bias=1.0, **o),
    "chrono": lambda **o: fb.GRU(7, 9, 2, init="orthogonal", chrono=30, **o),
    "embedding": lambda **o: fb.Embedding(11, 3, **o),
    "linear": lambda **o: fb.Linear(7, 9, **o),
}


def same(first, second):
    return all(np.array_equal(w, second.weights[name]) for name, w in first.weights.items())


def assert_uniform(values, bound):
    """Within the bound, and with the moments of the distribution to five standard errors."""
    values = np.asarray(values, np.float64).ravel()
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert np.abs(values).max() > bound * (1 - 10 / values.size)
    error = 5 * bound / np.sqrt(values.size)
    assert abs(values.mean()) < error / np.sqrt(3)
    assert abs(np.abs(values).mean() - bound / 2) < error / np.sqrt(12)


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
class TestSeeds:
    def test_a_seed_decides(self, make):
        assert same(make(seed=3), make(seed=3))
        assert same(make(seed=3), make(seed=np.random.SeedSequence(3)))
        assert not same(make(seed=3), make(seed=4))

    def test_without_one_each_is_different(self, make):
        assert not same(make(), make())
        assert not same(make(seed=None), make(seed=None))

    def test_the_global_generator_is_left_alone(self, make):
        np.random.seed(0)  # noqa: NPY002
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        make(seed=1)
        make()
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002

    def test_both_dtypes_start_from_the_same_point(self, make):
        single, double = make(seed=3, dtype="float32"), make(seed=3, dtype="float64")
        for name, weight in double.weights.items():
            np.testing.assert_array_equal(single.weights[name], weight.astype(np.float32))

    def test_one_generator_may_serve_many(self, make):
        rng = np.random.default_rng(3)
        assert not same(make(seed=rng), make(seed=rng))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestDistributions:
    @pytest.mark.parametrize("cell", CELLS)
    def test_layers_are_uniform(self, cell, dtype):
        layer = make_layer(cell, 50, 64, 2, dtype=dtype, seed=0)
        for weight in layer.weights.values():
            assert_uniform(weight, 1 / 8)

    def test_linear_is_uniform(self, dtype):
        for weight in fb.Linear(64, 200, dtype=dtype, seed=0).weights.values():
            assert_uniform(weight, 1 / 8)

    def test_embedding_is_normal(self, dtype):
        table = fb.Embedding(500, 400, dtype=dtype, seed=0).weights["weight"]  # several blocks
        assert abs(table.mean()) < 0.02
        assert abs(table.std() - 1) < 0.02
        assert abs((np.abs(table) < 1).mean() - 0.6827) < 0.01
        halves = np.split(table, 2)
        assert abs((halves[0] * halves[1]).mean()) < 0.02

    @pytest.mark.parametrize("cell", CELLS)
    def test_orthogonal(self, cell, dtype):
        layer = make_layer(cell, 50, 40, 2, dtype=dtype, seed=0, init="orthogonal")
        weights = layer.weights
        eps = 20 * np.finfo(dtype).eps
        for k, columns in enumerate([50, 40]):
            gates = np.split(weights[f"weight_hh_l{k}"], GATES[cell])
            for gate in gates:
                np.testing.assert_allclose(gate @ gate.T, np.eye(40), atol=eps)
            for gate in gates[1:]:
                assert not np.array_equal(gate, gates[0])
            assert_uniform(weights[f"weight_ih_l{k}"], np.sqrt(6 / (columns + 40)))
            assert not weights[f"bias_ih_l{k}"].any()
            assert not weights[f"bias_hh_l{k}"].any()

    def test_orthogonal_without_bias(self, dtype):
        layer = fb.GRU(3, 4, bias=False, init="orthogonal", dtype=dtype)
        assert sorted(layer.weights) == ["weight_hh_l0", "weight_ih_l0"]


def test_orthogonal_matrices_are_not_all_rotations():
    rng = np.random.default_rng(0)
    matrix, signs = np.empty((3, 3)), set()
    for _ in range(20):
        initialisers.orthogonal(matrix, rng)
        signs.add(round(np.linalg.det(matrix)))
    assert signs == {-1, 1}


@pytest.mark.parametrize("init", ["uniform", "orthogonal"])
def test_forget_bias_sets_the_sum_of_the_two_biases_and_nothing_else(init):
    plain = fb.LSTM(3, 4, 2, seed=0, init=init).weights
    biased = fb.LSTM(3, 4, 2, seed=0, init=init, forget_bias=2.5).weights
    for name, weight in biased.items():
        if name.startswith("bias"):
            forget = weight[4:8].copy()
            assert set(forget) == {2.5 if name.startswith("bias_ih") else 0.0}
            weight[4:8] = plain[name][4:8]
        np.testing.assert_array_equal(weight, plain[name])


def test_a_forget_bias_of_zero_is_one():
    weights = fb.LSTM(3, 4, seed=0, forget_bias=0.0).weights
    assert not weights["bias_ih_l0"][4:8].any()
    assert weights["bias_ih_l0"][:4].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
class TestChrono:
    def test_spans_are_even_up_to_the_longest(self, cell, dtype):
        longest, H = 200, 400
        weights = make_layer(cell, 3, H, 2, dtype=dtype, seed=0, chrono=longest).weights
        gates = GATES[cell]
        drawn = []
        for k in range(2):
            assert not weights[f"bias_hh_l{k}"].any()
            bias = weights[f"bias_ih_l{k}"].reshape(gates, H)
            keeps = bias[1]  # f of the LSTM, z of the GRU: what is left of the old state
            # A gate that is held at f forgets over about 1 / (1 - f) steps.
            spans = 1 / (1 - 1 / (1 + np.exp(-keeps.astype(np.float64))))
            assert spans.min() >= 2 * (1 - 1e-5)
            assert spans.max() <= longest * (1 + 1e-5)
            assert_uniform((spans - 2) / (longest - 2) * 2 - 1, 1.0)
            if cell == "lstm":
                np.testing.assert_array_equal(bias[0], -keeps)
            others = [2, 3] if cell == "lstm" else [0, 2]
            assert not bias[others].any()
            drawn.append(keeps)
        assert not np.array_equal(*drawn)

    @pytest.mark.parametrize("init", ["uniform", "orthogonal"])
    def test_the_matrices_are_those_of_init(self, cell, dtype, init):
        plain = make_layer(cell, 3, 4, 2, dtype=dtype, seed=0, init=init).weights
        chrono = make_layer(cell, 3, 4, 2, dtype=dtype, seed=0, init=init, chrono=50).weights
        for name, weight in chrono.items():
            if name.startswith("weight"):
                np.testing.assert_array_equal(weight, plain[name])

    def test_what_cannot_be_is_named(self, cell, dtype):
        for value in (2, 1.5, -3, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="chrono: got"):
                make_layer(cell, 3, 4, dtype=dtype, chrono=value)
        with pytest.raises(ValueError, match="chrono: got 9 with bias=False"):
            make_layer(cell, 3, 4, dtype=dtype, bias=False, chrono=9)
        with pytest.raises(TypeError, match="chrono: got True"):
            make_layer(cell, 3, 4, dtype=dtype, chrono=True)


def test_a_forget_bias_and_chrono_exclude_each_other():
    with pytest.raises(ValueError, match=r"chrono: got 9 beside forget_bias=1\.0"):
        fb.LSTM(3, 4, forget_bias=1.0, chrono=9)


def test_an_rnn_has_no_gate_to_set():
    with pytest.raises(TypeError):
        fb.RNN(3, 4, chrono=9)
