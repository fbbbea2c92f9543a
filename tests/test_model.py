"""The model: parts that fit, one set of parameters, and errors that name what does not."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

import fastbptt as fb
from reference import CELLS, make_layer


def whole(dtype="float32", **options):
    return fb.Model(
        fb.Embedding(11, 3, dtype=dtype, seed=1),
        fb.LSTM(3, 5, 2, dtype=dtype, seed=2, **options),
        fb.Linear(5, 4, dtype=dtype, seed=3),
    )


class TestComposition:
    @pytest.mark.parametrize("readout", [False, True])
    @pytest.mark.parametrize("embedding", [False, True])
    @pytest.mark.parametrize("cell", CELLS)
    def test_it_runs_its_parts_one_after_the_other(self, cell, embedding, readout, rng):
        recurrent = make_layer(cell, 3, 5, 2)
        table, linear = fb.Embedding(11, 3), fb.Linear(5, 4)
        model = fb.Model(*[table] * embedding, recurrent, *[linear] * readout)
        x = rng.integers(0, 11, (6, 2)) if embedding else rng.standard_normal((6, 2, 3), "f4")
        y, state = recurrent(table(x) if embedding else x)
        output, last = model(x)
        np.testing.assert_array_equal(output, linear(y) if readout else y)
        np.testing.assert_array_equal(last, state)
        again, _ = model(x, state)
        y, _ = recurrent(table(x) if embedding else x, state)
        np.testing.assert_array_equal(again, linear(y) if readout else y)

    def test_parts_have_names(self):
        model = whole(batch_first=True)
        assert model.parts == (model.embedding, model.recurrent, model.readout)
        assert model.batch_first
        assert model.dtype == np.float32
        alone = fb.Model(fb.GRU(3, 5))
        assert alone.embedding is None
        assert alone.readout is None

    def test_batch_first(self):
        index = np.arange(10).reshape(5, 2)
        expected, state = whole()(index)
        output, last = whole(batch_first=True)(index.T)
        np.testing.assert_allclose(output.swapaxes(0, 1), expected, rtol=1e-6)
        np.testing.assert_allclose(last, state, rtol=1e-6)

    @pytest.mark.parametrize("T", [0, 1])
    def test_short_input(self, T):
        output, (h, c) = whole()(np.zeros((T, 2), np.int64))
        assert output.shape == (T, 2, 4)
        assert h.shape == c.shape == (2, 2, 5)

    def test_lists_and_small_integers_are_input(self):
        model, index = whole(), np.arange(10).reshape(5, 2)
        expected, _ = model(index)
        for same in (index.tolist(), index.astype(np.uint8), np.asfortranarray(index)):
            np.testing.assert_array_equal(model(same)[0], expected)

    def test_repr(self):
        assert repr(whole()) == "Model(Embedding(11, 3), LSTM(3, 5, num_layers=2), Linear(5, 4))"


class TestParameters:
    def test_they_are_the_arrays_of_the_parts(self):
        model = whole()
        parameters = model.parameters()
        assert list(parameters) == [
            "0.weight",
            *(
                f"1.{kind}_l{layer}"
                for layer in (0, 1)
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ),
            "2.weight",
            "2.bias",
        ]
        for name, array in parameters.items():
            place, own = name.split(".")
            assert array is model.parts[int(place)].weights[own]

    def test_writing_into_them_changes_the_output(self):
        model = whole()
        for array in model.parameters().values():
            array[...] = 0.0
        assert not model([[1], [2]])[0].any()

    def test_load_state_dict(self):
        first, second = whole(), whole()
        for array in first.parameters().values():
            array += 1.0
        before = second.parameters()
        second.load_state_dict(first.parameters())
        for name, array in second.parameters().items():
            assert array is before[name]
            np.testing.assert_array_equal(array, first.parameters()[name])

    def test_load_state_dict_is_all_or_nothing(self):
        model = whole()
        before = copy.deepcopy(model.parameters())
        for name, value in (("2.bias", np.zeros(5, "f4")), ("2.bias", None), ("3.bias", [0.0])):
            values = {n: array + 1 for n, array in before.items()} | {name: value}
            with pytest.raises((ValueError, TypeError), match=name):
                model.load_state_dict(values)
        for name, array in model.parameters().items():
            np.testing.assert_array_equal(array, before[name])

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_independent(self, how):
        model = whole()
        expected, _ = model([[1], [2]])
        other = how(model)
        np.testing.assert_array_equal(other([[1], [2]])[0], expected)
        assert other.config() == model.config()
        for array in other.parameters().values():
            array[...] = 0.0
        np.testing.assert_array_equal(model([[1], [2]])[0], expected)
        assert not other([[1], [2]])[0].any()

    def test_a_deep_copy_with_its_optimiser_stays_together(self):
        model = whole()
        optimizer = fb.SGD(model.parameters(), lr=1.0)
        other, its_optimizer = copy.deepcopy((model, optimizer))
        its_optimizer.step({n: np.ones_like(w) for n, w in other.parameters().items()})
        for name, array in other.parameters().items():
            np.testing.assert_allclose(array, model.parameters()[name] - 1, atol=1e-6)


class TestConfig:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("cell", CELLS)
    def test_it_goes_through_json(self, cell, dtype):
        layer = make_layer(cell, 3, 5, 2, bias=False, batch_first=True, dtype=dtype)
        linear = fb.Linear(5, 4, False, dtype=dtype)
        model = fb.Model(fb.Embedding(11, 3, dtype=dtype), layer, linear)
        again = fb.Model.from_config(json.loads(json.dumps(model.config())))
        assert again.config() == model.config()
        assert repr(again) == repr(model)
        shapes = {name: (w.shape, w.dtype) for name, w in model.parameters().items()}
        assert {name: (w.shape, w.dtype) for name, w in again.parameters().items()} == shapes

    def test_a_subclass_is_saved_as_what_it_extends(self):
        class Mine(fb.GRU):
            pass

        assert fb.Model(Mine(2, 3)).config()["parts"][0]["type"] == "GRU"

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (None, "config: got None"),
            ([], r"config: got \[\]"),
            ({}, "config: got {}"),
            ({"parts": "GRU"}, "config: got"),
            ({"parts": []}, "parts: got none"),
            ({"parts": ["GRU"]}, "config: got part 'GRU', wanted the type Embedding, RNN"),
            ({"parts": [{"type": "Transformer"}]}, "config: got part .*Transformer"),
            ({"parts": [{"type": ["GRU"]}]}, "config: got part"),
            ({"parts": [{"type": "GRU"}]}, r"config: part 0 \(GRU\): .*input_size"),
            ({"parts": [{"type": "GRU", "input_size": 1, "hidden_size": 0}]}, "hidden_size: got 0"),
            ({"parts": [{"type": "GRU", "input_size": 1, "hidden_size": 1, "a": 1}]}, "'a'"),
        ],
    )
    def test_what_is_none(self, config, words):
        with pytest.raises(ValueError, match=words):
            fb.Model.from_config(config)


class TestBadParts:
    @pytest.mark.parametrize(
        "parts",
        [
            lambda: [],
            lambda: [fb.Linear(2, 2)],
            lambda: [fb.Embedding(2, 2), fb.Linear(2, 2)],
            lambda: [fb.GRU(2, 2), fb.GRU(2, 2)],
            lambda: [fb.Linear(2, 2), fb.GRU(2, 2)],
            lambda: [fb.GRU(2, 2), fb.Embedding(2, 2)],
            lambda: [fb.GRU(2, 2), fb.Linear(2, 2), fb.Linear(2, 2)],
            lambda: [fb.Embedding(2, 2), fb.Embedding(2, 2), fb.GRU(2, 2)],
        ],
    )
    def test_number_and_order(self, parts):
        got = ", ".join(type(part).__name__ for part in parts()) or "none"
        with pytest.raises(ValueError, match=f"parts: got {got}; wanted an Embedding or none"):
            fb.Model(*parts())

    @pytest.mark.parametrize("part", [None, "GRU", fb.GRU, [fb.GRU(2, 2)], np.zeros(3)])
    def test_what_is_no_part(self, part):
        with pytest.raises(TypeError, match=r"parts\[1\]: got"):
            fb.Model(fb.Embedding(2, 2), part)

    def test_sizes(self):
        with pytest.raises(ValueError, match=r"embedding_dim 4 before .*input_size 3"):
            fb.Model(fb.Embedding(11, 4), fb.LSTM(3, 5))
        with pytest.raises(ValueError, match=r"in_features 6 behind .*hidden_size 5"):
            fb.Model(fb.LSTM(3, 5), fb.Linear(6, 4))

    def test_dtypes(self):
        with pytest.raises(ValueError, match=r"Linear\(5, 4\) of float32 beside .*float64"):
            fb.Model(fb.LSTM(3, 5, dtype="float64"), fb.Linear(5, 4))
        with pytest.raises(ValueError, match=r"Embedding.* of float64 beside .*float32"):
            fb.Model(fb.Embedding(11, 3, dtype="float64"), fb.LSTM(3, 5))


class TestBadInput:
    @pytest.mark.parametrize(
        ("x", "error", "words"),
        [
            ([1, 2, 3], ValueError, r"x: got shape \(3,\), wanted class numbers \[T, B\]"),
            (np.zeros((2, 2, 2), int), ValueError, r"x: got shape \(2, 2, 2\)"),
            ([[0], [11]], ValueError, r"x: got 11 at \[1, 0\], wanted from 0 to 10 \(11 rows\)"),
            ([[-1]], ValueError, r"x: got -1 at \[0, 0\]"),
            ([[1.0]], TypeError, "x: got list of float64, wanted integers"),
            (np.zeros((2, 2), np.float32), TypeError, "x: got ndarray of float32, wanted integers"),
            (np.zeros((2, 0), int), ValueError, "x: .*batch"),
            ([[1], [1, 2]], ValueError, "x: "),
        ],
    )
    def test_class_numbers(self, x, error, words):
        with pytest.raises(error, match=words):
            whole()(x)

    def test_class_numbers_with_the_batch_first(self):
        with pytest.raises(ValueError, match=r"wanted class numbers \[B, T\]"):
            whole(batch_first=True)([1, 2])

    def test_vectors(self):
        model = fb.Model(fb.GRU(3, 5), fb.Linear(5, 4))
        with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 4\), wanted \(any, any, 3\)"):
            model(np.zeros((2, 1, 4), np.float32))
        with pytest.raises(TypeError, match="x: got dtype int64, wanted float32"):
            model(np.zeros((2, 1, 3), np.int64))

    def test_states(self):
        model = whole()
        with pytest.raises(TypeError, match=r"state: .*wanted a tuple \(h, c\)"):
            model([[1]], np.zeros((2, 1, 5), np.float32))
        _, state = model([[1, 2]])
        with pytest.raises(ValueError, match=r"state\[0\]: got shape \(2, 2, 5\)"):
            model([[1]], state)


def test_settings_stay():
    model = fb.Model(fb.Embedding(5, 3), fb.LSTM(3, 4, 2, dropout=0.5), fb.Linear(4, 5))
    for part in (model, *model.parts):
        own = ["recurrent", "parts", "readout"]
        for name in own if part is model else set(part.config()) - {"type"}:
            before = getattr(part, name)
            with pytest.raises(AttributeError, match=f"{name}: got None, but the settings of a"):
                setattr(part, name, None)
            assert getattr(part, name) is before
    model.recurrent.note = "what is no setting may be set"
