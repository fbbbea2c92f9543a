"""The recurrent layers, Embedding and Linear as objects: what they accept, refuse, keep and copy.

That their results and gradients are right is the business of test_gradients.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
import weakref

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, GATES, make_layer

DTYPES = ["float32", "float64"]


def state_of(layer, B, value=0.5):
    h = np.full((layer.num_layers, B, layer.hidden_size), value, layer.dtype)
    return (h, h + 1) if isinstance(layer, fb.LSTM) else h


def input_for(layer, T=4, B=3):
    rng = np.random.default_rng(1)
    return rng.standard_normal((T, B, layer.input_size)).astype(layer.dtype)


def arrays(result):
    """All arrays in the result of a call, in order."""
    if isinstance(result, (tuple, list)):
        return [array for part in result for array in arrays(part)]
    return [result] if isinstance(result, np.ndarray) else []


def assert_same(actual, expected):
    assert len(arrays(actual)) == len(arrays(expected))
    for got, want in zip(arrays(actual), arrays(expected), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(params=CELLS)
def layer(request):
    return make_layer(request.param, 5, 7, 2, seed=0)


class TestShapesAndNames:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("cell", CELLS)
    def test_weights(self, cell, bias, dtype):
        layer = make_layer(cell, 5, 7, 2, bias=bias, dtype=dtype)
        rows = 7 * GATES[cell]
        wanted = {}
        for k, columns in enumerate([5, 7]):
            wanted |= {f"weight_ih_l{k}": (rows, columns), f"weight_hh_l{k}": (rows, 7)}
            if bias:
                wanted |= {f"bias_ih_l{k}": (rows,), f"bias_hh_l{k}": (rows,)}
        assert {name: w.shape for name, w in layer.weights.items()} == wanted
        assert list(layer.weights) == list(wanted)
        assert all(w.dtype == dtype for w in layer.weights.values())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("T", [0, 1, 6])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("cell", CELLS)
    def test_results(self, cell, batch_first, T, dtype):
        layer = make_layer(cell, 5, 7, 2, batch_first=batch_first, dtype=dtype)
        axes = (3, T) if batch_first else (T, 3)
        x = np.ones((*axes, 5), dtype)
        y, state, tape = layer.forward(x)
        grads = layer.backward(tape, y, state)
        assert y.shape == (*axes, 7)
        assert grads.x.shape == x.shape
        for value in (state, grads.state):
            assert isinstance(value, tuple) == (cell == "lstm")
            assert [part.shape for part in arrays([value])] == [(2, 3, 7)] * (1 + (cell == "lstm"))
        assert {n: g.shape for n, g in grads.weights.items()} == {
            n: w.shape for n, w in layer.weights.items()
        }
        assert {a.dtype.name for a in arrays([y, state, grads.x, grads.state])} == {dtype}

    def test_zeros_are_the_default_of_state_and_gradients(self, layer):
        x, zeros = input_for(layer), state_of(layer, 3, 0.0)
        zeros = (zeros[0], zeros[0]) if isinstance(zeros, tuple) else zeros
        assert_same(layer(x), layer(x, zeros))

        def gradients(*grad):
            y, _, tape = layer.forward(x)
            grads = layer.backward(tape, *(grad or (y,)))
            return [grads.x, grads.state, *grads.weights.values()]

        y, _ = layer(x)
        assert_same(gradients(), gradients(y, zeros))
        assert_same(gradients(None, zeros), gradients(np.zeros_like(y)))
        assert not any(array.any() for array in arrays(gradients(None)))

    def test_a_gradient_of_x_that_nobody_needs_is_left_out(self, layer):
        x = input_for(layer)
        (y, _, tape), (_, _, again) = layer.forward(x), layer.forward(x)
        full, part = layer.backward(tape, y), layer.backward(again, y, need_x=False)
        assert part.x is None
        assert_same([part.state, *part.weights.values()], [full.state, *full.weights.values()])

    def test_lists_are_arrays(self, layer):
        x, state = input_for(layer), state_of(layer, 3)
        listed = [part.tolist() for part in arrays([state])]
        listed = tuple(listed) if isinstance(state, tuple) else listed[0]
        assert_same(layer(x.tolist(), listed), layer(x, state))
        y, last, tape = layer.forward(x.tolist(), listed)
        assert_same([y, last], layer(x, state))
        grads = layer.backward(tape, y.tolist(), listed)
        _, _, tape = layer.forward(x, state)
        wanted = layer.backward(tape, y, state)
        assert_same([grads.x, *grads.weights.values()], [wanted.x, *wanted.weights.values()])

    def test_whole_numbers_in_lists_are_numbers(self):
        layer = fb.GRU(1, 2, seed=0)
        assert_same(layer([[[1], [2]]]), layer(np.array([[[1], [2]]], np.float32)))

    def test_array_subclasses_are_arrays(self, layer, tmp_path):
        x = input_for(layer)
        mapped = np.memmap(tmp_path / "x", x.dtype, "w+", shape=x.shape)
        mapped[...] = x
        y, state, tape = layer.forward(mapped)
        assert type(y) is np.ndarray
        assert_same([y, state], layer(x))
        assert type(layer.backward(tape, y).x) is np.ndarray

    def test_repr_shows_what_is_not_the_default(self):
        assert repr(fb.LSTM(3, 4)) == "LSTM(3, 4)"
        options = {"num_layers": 2, "bias": False, "batch_first": True, "dtype": "float64"}
        for layer in (
            fb.LSTM(3, 4, **options),
            fb.GRU(3, 4, **options, reset_after=False),
            fb.RNN(3, 4, **options, nonlinearity="relu"),
            fb.Linear(3, 4, False, dtype="float64"),
            fb.Embedding(3, 4, dtype="float64"),
        ):
            again = eval(f"fb.{layer!r}")
            assert again.config() == layer.config()


class TestWeights:
    def test_writing_into_an_array_changes_the_layer(self, layer):
        for weight in layer.weights.values():
            weight[...] = 0.0
        y, _ = layer(input_for(layer))
        assert not y.any()

    def test_they_cannot_be_rebound(self, layer):
        before = layer.weights
        with pytest.raises(AttributeError):
            layer.weights = {}
        layer.weights["weight_ih_l0"] = None
        layer.weights.clear()
        assert all(layer.weights[name] is w for name, w in before.items())
        with pytest.raises(ValueError, match="referenc"):
            layer.weights["weight_ih_l0"].resize(1)

    @pytest.mark.parametrize("part", ["layer", "linear", "embedding"])
    def test_load_state_dict_copies_into_the_same_arrays(self, part):
        first, second = {
            "layer": lambda: (fb.LSTM(3, 4, 2, seed=1), fb.LSTM(3, 4, 2, seed=2)),
            "linear": lambda: (fb.Linear(3, 4, seed=1), fb.Linear(3, 4, seed=2)),
            "embedding": lambda: (fb.Embedding(3, 4, seed=1), fb.Embedding(3, 4, seed=2)),
        }[part]()
        before = second.weights
        second.load_state_dict(first.weights)
        for name, weight in second.weights.items():
            assert weight is before[name]
            assert not np.shares_memory(weight, first.weights[name])
            np.testing.assert_array_equal(weight, first.weights[name])

    def test_load_state_dict_takes_lists_and_exact_conversions(self):
        layer = fb.RNN(2, 2, dtype="float64")
        values = {n: w.astype(np.float32) + 1 for n, w in layer.weights.items()}
        values["bias_ih_l0"] = [1, 2.5]
        layer.load_state_dict(values)
        for name, weight in layer.weights.items():
            np.testing.assert_array_equal(weight, values[name])

    def test_load_state_dict_may_permute_its_own_parameters(self):
        layer = fb.RNN(2, 2, seed=0)
        old = copy.deepcopy(layer.weights)
        swap = {"weight_ih": "weight_hh", "weight_hh": "weight_ih"}
        own = layer.weights
        layer.load_state_dict({n: own[f"{swap.get(n[:-3], n[:-3])}_l0"] for n in own})
        np.testing.assert_array_equal(layer.weights["weight_hh_l0"], old["weight_ih_l0"])
        np.testing.assert_array_equal(layer.weights["weight_ih_l0"], old["weight_hh_l0"])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda v: v.pop("bias_hh_l0"), ValueError, "'bias_hh_l0' missing"),
            (lambda v: v.update(gain=1), ValueError, "'gain' unknown"),
            (lambda v: v.update(bias_hh_l0=np.zeros(3, "f4")), ValueError, r"\(3,\).*\(28,\)"),
            (lambda v: v.update(bias_hh_l0=np.zeros(28)), TypeError, "bias_hh_l0.*float64.*float3"),
            (lambda v: v.update(bias_hh_l0="zero"), TypeError, "bias_hh_l0: got str"),
            (lambda v: v.update(bias_hh_l0=[[1], [1, 2]]), ValueError, "bias_hh_l0"),
        ],
    )
    def test_load_state_dict_is_all_or_nothing(self, change, error, words):
        layer = fb.LSTM(5, 7, seed=0)
        before = copy.deepcopy(layer.weights)
        values = {n: w + 1 for n, w in before.items()}
        change(values)
        with pytest.raises(error, match=words):
            layer.load_state_dict(values)
        for name, weight in layer.weights.items():
            np.testing.assert_array_equal(weight, before[name])

    def test_load_state_dict_leaves_all_as_it_was_if_one_parameter_is_read_only(self):
        layer = fb.RNN(2, 2, seed=0)
        before = copy.deepcopy(layer.weights)
        layer.weights["bias_hh_l0"].flags.writeable = False
        with pytest.raises(ValueError, match=r"bias_hh_l0.*read-only"):
            layer.load_state_dict({n: w + 1 for n, w in before.items()})
        for name, weight in layer.weights.items():
            np.testing.assert_array_equal(weight, before[name])

    def test_load_state_dict_wants_a_mapping(self, layer):
        with pytest.raises(TypeError, match="mapping: got list"):
            layer.load_state_dict(list(layer.weights.values()))


def copied(how, part):
    return copy.deepcopy(part) if how == "deepcopy" else pickle.loads(pickle.dumps(part))


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_computes_the_same_over_its_own_weights(self, layer, how):
        x = input_for(layer)
        expected = layer(x)
        other = copied(how, layer)
        assert other.config() == layer.config()
        assert repr(other) == repr(layer)
        assert_same(other(x), expected)
        for weight in other.weights.values():
            weight[...] = 0.0
        assert_same(layer(x), expected)
        assert not other(x)[0].any()

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_of_embedding_and_linear(self, how):
        table, readout = fb.Embedding(5, 3, seed=0), fb.Linear(3, 2, seed=0)
        np.testing.assert_array_equal(copied(how, table)([1, 4]), table([1, 4]))
        x = np.ones((2, 3), np.float32)
        np.testing.assert_array_equal(copied(how, readout)(x), readout(x))

    def test_a_shallow_copy_shares_the_weights(self, layer):
        other = copy.copy(layer)
        for weight in layer.weights.values():
            weight[...] = 0.0
        assert not other(input_for(layer))[0].any()

    def test_a_deep_copy_keeps_arrays_that_belong_together(self):
        layer = fb.RNN(2, 2)
        other, weights = copy.deepcopy((layer, layer.weights))
        assert all(other.weights[name] is w for name, w in weights.items())

    def test_unpickled_over_read_only_memory(self, layer):
        buffers = []
        data = pickle.dumps(layer, protocol=5, buffer_callback=buffers.append)
        frozen = [bytes(buffer.raw()) for buffer in buffers]
        other = pickle.loads(data, buffers=frozen)
        assert all(weight.flags.writeable for weight in other.weights.values())
        assert_same(other(input_for(layer)), layer(input_for(layer)))

    def test_a_subclass_and_its_attributes_survive(self):
        other = pickle.loads(pickle.dumps(Named("first")))
        assert isinstance(other, Named)
        assert other.name == "first"


class Named(fb.GRU):
    def __init__(self, name):
        super().__init__(2, 3)
        self.name = name


class TestTape:
    def test_y_is_read_only_while_the_tape_refers_to_it(self, layer):
        y, _, tape = layer.forward(input_for(layer))
        with pytest.raises(ValueError, match="read-only"):
            y += 1
        assert layer(input_for(layer))[0].flags.writeable
        assert layer.forward(input_for(layer), training=False)[0].flags.writeable
        assert not tape.consumed

    def test_without_training_there_is_none(self, layer):
        y, state, tape = layer.forward(input_for(layer), None, False)
        assert tape is None
        assert_same([y, state], layer(input_for(layer)))

    def test_it_holds_what_the_design_says(self):
        T, B, H = 10, 3, 7
        x = np.zeros((T, B, 5), np.float32)
        for cell, width in {"rnn_tanh": 0, "lstm": 5, "gru": 4}.items():
            _, _, tape = make_layer(cell, 5, H).forward(x)
            assert tape.nbytes == 4 * width * T * B * H, cell

    def test_used_twice(self, layer):
        y, _, tape = layer.forward(input_for(layer))
        layer.backward(tape, y)
        assert tape.consumed
        assert tape.nbytes == 0
        with pytest.raises(ValueError, match=r"tape.*used"):
            layer.backward(tape, y)

    def test_lets_go_of_what_it_kept_once_used(self):
        layer = fb.LSTM(2, 3)
        x = np.zeros((4, 1, 2), np.float32)
        y, _, tape = layer.forward(x)
        seen = [weakref.ref(x), weakref.ref(y)]
        layer.backward(tape)
        del x, y
        gc.collect()
        assert [reference() for reference in seen] == [None, None]

    def test_outlives_its_layer_and_arrays(self):
        def record():
            layer = fb.LSTM(2, 3)
            return layer.forward(np.zeros((4, 1, 2), np.float32))[2]

        tape = record()
        gc.collect()
        assert tape.nbytes > 0

    def test_of_another_layer(self, layer):
        other = copy.deepcopy(layer)
        y, _, tape = other.forward(input_for(layer))
        with pytest.raises(ValueError, match=r"tape.*another layer"):
            layer.backward(tape, y)
        other.backward(tape, y)  # where it belongs it is still good

    def test_of_another_kind_of_layer(self):
        x = np.zeros((4, 1, 2), np.float32)
        _, _, tape = fb.LSTM(2, 3).forward(x)
        for layer in (fb.GRU(2, 3), fb.RNN(2, 3), fb.LSTM(2, 3, dtype="float64")):
            with pytest.raises(ValueError, match=r"tape.*another layer"):
                layer.backward(tape)

    def test_no_tape(self, layer):
        for value, name in ((None, "NoneType"), (np.zeros(3), "ndarray"), ("tape", "str")):
            with pytest.raises(TypeError, match=f"tape: got {name}"):
                layer.backward(value)

    def test_a_failed_backward_leaves_it_usable(self, layer):
        y, _, tape = layer.forward(input_for(layer))
        with pytest.raises(ValueError, match="grad_y"):
            layer.backward(tape, y[1:])
        assert not tape.consumed
        layer.backward(tape, y)

    def test_cannot_be_pickled(self, layer):
        _, _, tape = layer.forward(input_for(layer))
        with pytest.raises(TypeError):
            pickle.dumps(tape)


BAD_SIZES = [
    (0, ValueError, "got 0, wanted at least 1"),
    (-3, ValueError, "got -3, wanted at least 1"),
    (np.int64(0), ValueError, "got 0, wanted at least 1"),
    (2.0, TypeError, "got 2.0, wanted an integer"),
    (np.float32(2), TypeError, "wanted an integer"),
    (True, TypeError, "got True, wanted an integer"),
    ("2", TypeError, "got '2', wanted an integer"),
    (None, TypeError, "got None, wanted an integer"),
    ([2], TypeError, "wanted an integer"),
]


class TestBadSettings:
    @pytest.mark.parametrize(("size", "error", "words"), BAD_SIZES)
    @pytest.mark.parametrize("place", ["input_size", "hidden_size", "num_layers"])
    @pytest.mark.parametrize("kind", [fb.RNN, fb.LSTM, fb.GRU])
    def test_sizes(self, kind, place, size, error, words):
        sizes = {"input_size": 2, "hidden_size": 3, "num_layers": 1, place: size}
        with pytest.raises(error, match=f"{place}: .*{words}"):
            kind(**sizes)

    @pytest.mark.parametrize(("size", "error", "words"), BAD_SIZES)
    @pytest.mark.parametrize(
        ("kind", "places"),
        [
            (fb.Linear, ["in_features", "out_features"]),
            (fb.Embedding, ["num_embeddings", "embedding_dim"]),
        ],
    )
    def test_sizes_of_embedding_and_linear(self, kind, places, size, error, words):
        for place in places:
            with pytest.raises(error, match=f"{place}: .*{words}"):
                kind(**{**dict.fromkeys(places, 2), place: size})

    @pytest.mark.parametrize(
        "sizes",
        [(1, 2**31), (2**31, 2**31), (2**62, 1), (1, 2**63), (10**30, 3), (1, 3, 2**60)],
        ids=str,
    )
    @pytest.mark.parametrize("kind", [fb.RNN, fb.LSTM, fb.GRU])
    def test_sizes_whose_product_overflows(self, kind, sizes):
        with pytest.raises(ValueError, match="overflow"):
            kind(*sizes)

    @pytest.mark.parametrize("kind", [fb.Linear, fb.Embedding])
    def test_sizes_whose_product_overflows_of_embedding_and_linear(self, kind):
        for sizes in ((2**32, 2**32), (2**63, 1), (1, 10**30)):
            with pytest.raises(ValueError, match="overflow"):
                kind(*sizes)

    @pytest.mark.skipif(sys.maxsize < 2**62, reason="they overflow")
    @pytest.mark.parametrize(
        "make",
        [
            lambda: fb.LSTM(1, 2**27),
            lambda: fb.GRU(1, 1, 2**40),
            lambda: fb.Linear(2**28, 2**28),
            lambda: fb.Embedding(2**28, 2**28),
        ],
    )
    def test_sizes_that_no_machine_can_hold(self, make):
        with pytest.raises(MemoryError, match="GB"):
            make()

    @pytest.mark.parametrize("name", ["bias", "batch_first"])
    @pytest.mark.parametrize("kind", [fb.RNN, fb.LSTM, fb.GRU])
    def test_switches(self, kind, name):
        for value in (1, 0.5, None, "yes"):
            with pytest.raises(TypeError, match=f"{name}: got .*, wanted True or False"):
                kind(2, 3, **{name: value})
        assert getattr(kind(2, 3, **{name: np.bool_(True)}), name) is True

    def test_choices(self):
        with pytest.raises(ValueError, match="nonlinearity: got 'sine', wanted 'tanh' or 'relu'"):
            fb.RNN(2, 3, nonlinearity="sine")
        with pytest.raises(TypeError, match="reset_after"):
            fb.GRU(2, 3, reset_after="yes")
        with pytest.raises(ValueError, match="init: got 'zeros', wanted 'uniform' or 'orthogonal'"):
            fb.GRU(2, 3, init="zeros")

    @pytest.mark.parametrize("make", [fb.RNN, fb.LSTM, fb.GRU, fb.Linear, fb.Embedding])
    def test_dtypes(self, make):
        for dtype in ("float64", np.float64, float, np.dtype("f8")):
            assert make(2, 3, dtype=dtype).dtype == np.float64
        for dtype in ("float16", np.int32, "complex64", object, ">f4"):
            with pytest.raises(ValueError, match=r"dtype: got .*, wanted 'float32', 'float64' or"):
                make(2, 3, dtype=dtype)
        for dtype in (None, "real", 32):
            with pytest.raises(TypeError, match=r"dtype: got .*, wanted 'float32', 'float64' or"):
                make(2, 3, dtype=dtype)

    @pytest.mark.parametrize("make", [fb.RNN, fb.LSTM, fb.GRU, fb.Linear, fb.Embedding])
    def test_seeds(self, make):
        with pytest.raises(ValueError, match="seed: got -1"):
            make(2, 3, seed=-1)
        for seed in (0.5, "zero"):
            with pytest.raises(TypeError, match="seed: got"):
                make(2, 3, seed=seed)

    def test_forget_bias(self):
        with pytest.raises(ValueError, match=r"forget_bias: got 1\.0 with bias=False"):
            fb.LSTM(2, 3, bias=False, forget_bias=1.0)
        for value in (np.nan, np.inf, 10**400):
            with pytest.raises(ValueError, match=r"forget_bias: .*finite"):
                fb.LSTM(2, 3, forget_bias=value)
        for value in ("1", True, [1.0, 2.0]):
            with pytest.raises(TypeError, match=r"forget_bias: .*number"):
                fb.LSTM(2, 3, forget_bias=value)


class Elsewhere:
    """An array on another device, as NumPy meets it."""

    dtype = "float32"

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


BAD_INPUTS = [
    (np.zeros((4, 5), "f4"), ValueError, r"x: got shape \(4, 5\), wanted \(any, any, 5\)"),
    (np.zeros((1, 4, 3, 5), "f4"), ValueError, r"x: got shape \(1, 4, 3, 5\)"),
    (np.zeros((4, 3, 6), "f4"), ValueError, r"x: got shape \(4, 3, 6\), wanted \(any, any, 5\)"),
    (np.zeros((4, 0, 5), "f4"), ValueError, "x: .*batch of at least 1"),
    (np.zeros((4, 3, 5)), TypeError, "x: got dtype float64, wanted float32"),
    (np.zeros((4, 3, 5), "i4"), TypeError, "x: got dtype int32, wanted float32"),
    (np.zeros((4, 3, 5), ">f4"), TypeError, "x: got dtype >f4, wanted float32"),
    (np.zeros((4, 3, 5), object), TypeError, "x: got dtype object"),
    (np.zeros((4, 3, 5)).view(np.recarray), TypeError, "x: got dtype float64"),
    (np.ma.zeros((4, 3, 5), "f4"), TypeError, "x: got a masked array"),
    ([[[1.0, 2.0], [3.0]]], ValueError, "x: "),
    ([[1.0, 2.0]], ValueError, r"x: got shape \(1, 2\)"),
    ([[["a", "b", "c", "d", "e"]]], TypeError, "x: got list of <U1"),
    ([[["1", "2", "3", "4", "5"]]], TypeError, "x: got list of <U1"),
    ([[[True] * 5]], TypeError, "x: got list of bool"),
    ([[[1j] * 5]], TypeError, "x: got list of complex128"),
    ([[[None] * 5]], TypeError, "x: got list of object"),
    ([], ValueError, r"x: got shape \(0,\)"),
    (None, TypeError, "x: got NoneType"),
    ("text", TypeError, "x: got str"),
    ({"x": 1}, TypeError, "x: got dict"),
    (1.0, ValueError, r"x: got shape \(\)"),
    (Elsewhere(), TypeError, "x: got Elsewhere.*cuda"),
]


class TestBadInput:
    @pytest.mark.parametrize(("x", "error", "words"), BAD_INPUTS)
    @pytest.mark.parametrize("cell", CELLS)
    def test_x(self, cell, x, error, words):
        layer = make_layer(cell, 5, 7)
        for call in (layer, layer.forward, lambda x: layer.forward(x, training=False)):
            with pytest.raises(error, match=words):
                call(x)

    def test_nesting_too_deep_to_be_an_array(self):
        endless = []
        endless.append(endless)
        with pytest.raises((ValueError, TypeError), match="x: "):
            fb.RNN(2, 3)(endless)

    def test_float32_into_a_float64_layer(self):
        with pytest.raises(TypeError, match="x: got dtype float32, wanted float64"):
            fb.LSTM(2, 3, dtype="float64")(np.zeros((1, 1, 2), np.float32))

    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "words"),
        [
            ((3, 7), "f4", ValueError, r"got shape \(3, 7\), wanted \(2, 3, 7\)"),
            ((1, 3, 7), "f4", ValueError, r"got shape \(1, 3, 7\), wanted \(2, 3, 7\)"),
            ((2, 1, 7), "f4", ValueError, r"got shape \(2, 1, 7\), wanted \(2, 3, 7\)"),
            ((2, 3, 8), "f4", ValueError, r"got shape \(2, 3, 8\), wanted \(2, 3, 7\)"),
            ((2, 3, 7), "f8", TypeError, "got dtype float64, wanted float32"),
        ],
    )
    @pytest.mark.parametrize("where", ["state", "grad_state"])
    def test_states(self, layer, where, shape, dtype, error, words):
        good, bad = np.zeros((2, 3, 7), "f4"), np.zeros(shape, dtype)
        is_lstm = isinstance(layer, fb.LSTM)
        faults = [((bad, good), r"\[0\]"), ((good, bad), r"\[1\]")] if is_lstm else [(bad, "")]
        x = input_for(layer)
        for state, place in [
            fault if isinstance(fault, tuple) else (fault, "") for fault in faults
        ]:
            if where == "state":
                calls = (layer, layer.forward)
                for call in calls:
                    with pytest.raises(error, match=f"{where}{place}: {words}"):
                        call(x, state)
            else:
                _, _, tape = layer.forward(x)
                with pytest.raises(error, match=f"{where}{place}: {words}"):
                    layer.backward(tape, None, state)

    def test_a_state_of_another_layer(self):
        x = np.zeros((4, 3, 5), np.float32)
        lstm, gru = fb.LSTM(5, 7), fb.GRU(5, 7)
        _, pair = lstm(x)
        _, single = gru(x)
        for call in (gru, gru.forward):
            with pytest.raises(TypeError, match=r"got a tuple, wanted an array \[L\*D, B, H\]"):
                call(x, pair)
        for call in (lstm, lstm.forward):
            with pytest.raises(TypeError, match=r"state: .*wanted a tuple \(h, c\)"):
                call(x, single)
        for wrong in ((single,), (single, single, single), "state", 3, {"h": single}):
            with pytest.raises(TypeError, match="state"):
                lstm(x, wrong)
        for wrong in ("state", {"h": single}):
            with pytest.raises(TypeError, match="state"):
                gru(x, wrong)
        _, other = fb.GRU(5, 6)(x)
        with pytest.raises(ValueError, match=r"state: got shape \(1, 3, 6\), wanted \(1, 3, 7\)"):
            gru(x, other)

    @pytest.mark.parametrize(
        ("grad", "error", "words"),
        [
            (
                np.zeros((4, 3, 5), "f4"),
                ValueError,
                r"grad_y: got shape \(4, 3, 5\), wanted \(4, 3, 7\)",
            ),
            (np.zeros((3, 3, 7), "f4"), ValueError, r"grad_y: got shape \(3, 3, 7\)"),
            (np.zeros((4, 1, 7), "f4"), ValueError, r"grad_y: got shape \(4, 1, 7\)"),
            (np.zeros((4, 3, 7)), TypeError, "grad_y: got dtype float64, wanted float32"),
            (1.0, ValueError, r"grad_y: got shape \(\)"),
            ("y", TypeError, "grad_y: got str"),
            ([[1.0], [1.0, 2.0]], ValueError, "grad_y: "),
        ],
    )
    def test_grad_y(self, layer, grad, error, words):
        _, _, tape = layer.forward(input_for(layer))
        with pytest.raises(error, match=words):
            layer.backward(tape, grad)

    def test_training_is_a_switch(self, layer):
        with pytest.raises(TypeError, match="training: got 0"):
            layer.forward(input_for(layer), None, 0)


class TestEmbedding:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows(self, dtype):
        table = fb.Embedding(11, 3, dtype=dtype, seed=0)
        weight = table.weights["weight"]
        assert weight.dtype == dtype
        for shape in ((), (4,), (0,), (4, 2), (2, 0), (2, 3, 2)):
            index = np.random.default_rng(0).integers(0, 11, shape)
            np.testing.assert_array_equal(table(index), weight[index])

    @pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "u8", ">i8"])
    def test_all_integers_are_indices(self, dtype):
        table = fb.Embedding(11, 3)
        index = np.array([[0, 10], [3, 3]])
        np.testing.assert_array_equal(table(index.astype(dtype)), table(index))
        np.testing.assert_array_equal(table(index.tolist()), table(index))
        np.testing.assert_array_equal(table(np.asfortranarray(index)), table(index))

    def test_it_returns_a_copy(self):
        table = fb.Embedding(3, 2, seed=0)
        before = table.weights["weight"].copy()
        table([0])[...] = 7.0
        np.testing.assert_array_equal(table.weights["weight"], before)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_backward_adds_the_uses_of_each_row(self, dtype, rng):
        table = fb.Embedding(5, 3, dtype=dtype)
        index = rng.integers(0, 5, (6, 4))
        grad = rng.standard_normal((6, 4, 3)).astype(dtype)
        expected = np.zeros((5, 3))
        np.add.at(expected, index, grad)
        for value in (index, index.tolist(), index.astype(np.uint8)):
            got = table.backward(value, grad)["weight"]
            assert got.dtype == dtype
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("index", "error", "words"),
        [
            ([0, 11], ValueError, r"index: got 11 at \[1\], wanted from 0 to 10 \(11 rows\)"),
            ([[0, -1]], ValueError, r"index: got -1 at \[0, 1\]"),
            (np.array([2**64 - 1], np.uint64), ValueError, "index: got 18446744073709551615"),
            (np.array(11), ValueError, r"index: got 11 at \[\]"),
            ([1.0], TypeError, "index: got list of float64, wanted integers"),
            (np.zeros(2), TypeError, "index: got ndarray of float64, wanted integers"),
            (np.zeros(0), TypeError, "index: got ndarray of float64, wanted integers"),
            ([True], TypeError, "index: got list of bool, wanted integers"),
            (["a"], TypeError, "index: got list of <U1, wanted integers"),
            (None, TypeError, "index: got NoneType, wanted integers"),
            ([[1], [1, 2]], ValueError, "index: "),
            ([10**30], TypeError, "index: got list of object"),
        ],
    )
    def test_bad_index(self, index, error, words):
        table = fb.Embedding(11, 3)
        with pytest.raises(error, match=words):
            table(index)
        with pytest.raises(error, match=words):
            table.backward(index, np.zeros((1, 3), np.float32))

    def test_bad_gradient(self):
        table = fb.Embedding(11, 3)
        with pytest.raises(ValueError, match=r"grad_y: got shape \(2, 2\), wanted \(2, 3\)"):
            table.backward([0, 1], np.zeros((2, 2), np.float32))
        with pytest.raises(TypeError, match="grad_y: got dtype float64, wanted float32"):
            table.backward([0, 1], np.zeros((2, 3)))


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (0, 3, 5), (0, 5), (1, 1, 5)], ids=str)
    def test_forward_and_backward(self, shape, dtype, bias, rng):
        readout = fb.Linear(5, 2, bias, dtype=dtype, seed=0)
        weights = readout.weights
        assert list(weights) == (["weight", "bias"] if bias else ["weight"])
        x = rng.standard_normal(shape).astype(dtype)
        grad_y = rng.standard_normal((*shape[:-1], 2)).astype(dtype)
        rows, grad_rows = x.reshape(-1, 5), grad_y.reshape(-1, 2)
        expected = x @ weights["weight"].T + weights.get("bias", 0)
        y, grads = readout(x), readout.backward(x, grad_y)
        assert y.dtype == grads.x.dtype == dtype
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(y, expected, **close)
        np.testing.assert_allclose(grads.x, grad_y @ weights["weight"], **close)
        np.testing.assert_allclose(grads.weights["weight"], grad_rows.T @ rows, **close)
        if bias:
            np.testing.assert_allclose(grads.weights["bias"], grad_rows.sum(0), **close)
        assert grads.state is None
        assert list(grads.weights) == list(weights)

    def test_lists_and_strides(self, rng):
        readout = fb.Linear(5, 2, seed=0)
        x = rng.standard_normal((4, 10)).astype(np.float32)[:, ::2]
        y = readout(x.copy())
        np.testing.assert_array_equal(readout(x), y)
        np.testing.assert_array_equal(readout(x.tolist()), y)
        grads = readout.backward(x.tolist(), y.tolist())
        np.testing.assert_array_equal(grads.x, readout.backward(x, y).x)

    @pytest.mark.parametrize(
        ("x", "error", "words"),
        [
            (np.zeros((4, 6), "f4"), ValueError, r"x: got shape \(4, 6\)"),
            (np.zeros(5, "f4"), ValueError, r"x: got shape \(5,\)"),
            (np.zeros((1, 1, 1, 5), "f4"), ValueError, r"x: got shape \(1, 1, 1, 5\)"),
            (np.zeros((4, 5)), TypeError, "x: got dtype float64, wanted float32"),
            ([[1.0], [1.0, 2.0]], ValueError, "x: "),
            ("x", TypeError, "x: got str"),
        ],
    )
    def test_bad_input(self, x, error, words):
        readout = fb.Linear(5, 2)
        with pytest.raises(error, match=words):
            readout(x)
        with pytest.raises(error, match=words):
            readout.backward(x, np.zeros((4, 2), np.float32))

    def test_bad_gradient(self):
        readout, x = fb.Linear(5, 2), np.zeros((4, 5), np.float32)
        for grad_y in (np.zeros((3, 2), "f4"), np.zeros((4, 3), "f4"), np.zeros((1, 2, 2), "f4")):
            with pytest.raises(ValueError, match="grad_y: got shape"):
                readout.backward(x, grad_y)
        with pytest.raises(TypeError, match="grad_y: got dtype float64"):
            readout.backward(x, np.zeros((4, 2)))


class TestThreads:
    def test_set_and_get(self):
        before = fb.get_num_threads()
        try:
            fb.set_num_threads(np.int64(3))
            assert fb.get_num_threads() == 3
        finally:
            fb.set_num_threads(before)

    @pytest.mark.parametrize(
        ("n", "error"),
        [
            *((n, ValueError) for n in (0, -1, 1025, 2**70)),
            *((n, TypeError) for n in (1.5, "2", True, None)),
        ],
    )
    def test_bad_number(self, n, error):
        before = fb.get_num_threads()
        with pytest.raises(error, match=r"n: got|threads"):
            fb.set_num_threads(n)
        assert fb.get_num_threads() == before


def test_odd_settings_are_named():
    with pytest.raises(ValueError, match=re.escape("init: got []")):
        fb.LSTM(3, 4, init=[])
    swapped = np.dtype(np.float32).newbyteorder()
    with pytest.raises(ValueError, match="in this machine's byte order"):
        fb.LSTM(3, 4, dtype=swapped)
