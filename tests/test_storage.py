"""Files: what is saved comes back, a failed save changes nothing, a bad file is named as one."""

from __future__ import annotations

import json
import os
import stat
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import fastbptt as fb
from fastbptt import _core, storage
from reference import CELLS, make_layer

OPTIMIZERS = {
    "adam": lambda p: fb.Adam(p, lr=0.02, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01),
    "sgd": lambda p: fb.SGD(p, lr=0.02),
    "momentum": lambda p: fb.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: fb.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.5, centered=True),
}


def make_model(cell="lstm", dtype="float32", **options):
    return fb.Model(
        fb.Embedding(11, 3, dtype=dtype),
        make_layer(cell, 3, 5, 2, dtype=dtype, **options),
        fb.Linear(5, 11, dtype=dtype),
    )


TEXT = np.random.default_rng(0).integers(0, 11, (9, 4))


def train(model, optimizer, steps, state=None):
    losses = []
    for _ in range(steps):
        result = fb.value_and_grad(model, TEXT[:-1], TEXT[1:], state=state)
        optimizer.step(result.grads)
        state = result.state
        losses.append(result.loss)
    return losses, state


def at(array, offset):
    """Return a copy that begins `offset` bytes behind a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + offset
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def assert_same_parameters(actual, expected):
    assert actual.config() == expected.config()
    assert list(actual.parameters()) == list(expected.parameters())
    for name, array in actual.parameters().items():
        assert array.dtype == expected.parameters()[name].dtype
        np.testing.assert_array_equal(array, expected.parameters()[name])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("cell", CELLS)
    def test_models(self, cell, bias, dtype, path):
        model = make_model(cell, dtype, bias=bias, batch_first=True)
        fb.save(path, model)
        other = fb.load(path)
        assert_same_parameters(other, model)
        np.testing.assert_array_equal(other(TEXT)[0], model(TEXT)[0])

    def test_without_embedding_and_readout(self, path):
        model = fb.Model(fb.GRU(3, 4))
        fb.save(path, model)
        assert_same_parameters(fb.load(path), model)

    def test_what_was_loaded_can_be_trained(self, path):
        fb.save(path, make_model())
        model = fb.load(path)
        losses, _ = train(model, fb.Adam(model.parameters(), lr=0.01), 20)
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_a_resumed_training_equals_an_uninterrupted_one(self, make, dtype, path):
        model = make_model(dtype=dtype)
        optimizer = make(model.parameters())
        _, (h, c) = train(model, optimizer, 3)
        fb.save(path, model, optimizer, {"h": h, "c": c, "step": 3})
        expected, _ = train(model, optimizer, 3, (h, c))

        other, its_optimizer, extra = storage.load_training(path)
        assert type(its_optimizer) is type(optimizer)
        assert its_optimizer.config() == optimizer.config()
        losses, _ = train(other, its_optimizer, 3, (extra["h"], extra["c"]))
        assert losses == expected
        assert_same_parameters(other, model)

    def test_an_optimiser_of_some_parameters(self, path):
        model = fb.Model(fb.GRU(3, 4), fb.Linear(4, 2))
        readout = {n: w for n, w in model.parameters().items() if n.startswith("1.")}
        fb.save(path, model, fb.Adam(readout))
        other, optimizer, _ = storage.load_training(path)
        before = {n: w.copy() for n, w in other.parameters().items()}
        optimizer.step({n: np.ones_like(w) for n, w in readout.items()})
        changed = {n for n, w in other.parameters().items() if not np.array_equal(w, before[n])}
        assert changed == set(readout)

    def test_without_optimiser_and_extra(self, path):
        model = make_model()
        fb.save(path, model)
        other, optimizer, extra = storage.load_training(path)
        assert_same_parameters(other, model)
        assert optimizer is None
        assert extra == {}

    def test_extra(self, path):
        plain = {
            "text": "日本語 \0 \U0001f600",
            "numbers": [1, 2.5, -1e300, 2**80, 0.1],
            "nested": {"a": [None, True, {"b": []}]},
            "numpy": np.float32(0.5),
            "infinite": float("inf"),
        }
        arrays = {
            "floats": np.arange(6.0).reshape(2, 3),
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "strided": np.arange(10, dtype=np.int16)[::3],
            "number": np.array(3),
            "none": np.zeros((0, 4), np.uint8),
            "flags": np.array([True, False]),
            "big": np.arange(3, dtype=">f4"),
            "with.dots and spaces": np.float16([1, 2]),
        }
        fb.save(path, make_model(), extra={**plain, **arrays})
        _, _, extra = storage.load_training(path)
        for name, array in arrays.items():
            assert extra[name].shape == array.shape
            assert extra[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(extra.pop(name), array)
        assert extra == plain

    def test_any_reader_of_safetensors_finds_the_names_of_the_parameters(self, path):
        model = make_model()
        fb.save(path, model, fb.Adam(model.parameters()), {"a": np.ones(2)})
        tensors = load_file(path)
        for name, array in model.parameters().items():
            np.testing.assert_array_equal(tensors[name], array)
        rest = set(tensors) - set(model.parameters())
        assert {name.split(".")[0] for name in rest} == {"optimizer", "extra"}

    @pytest.mark.parametrize("kind", [str, os.fsencode, os.fspath])
    def test_kinds_of_path(self, kind, path):
        fb.save(kind(path), make_model())
        fb.load(kind(path))
        assert os.listdir(path.parent) == [path.name]


OFFSETS = range(0, 64, 8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestPlaceInMemory:
    """What is loaded lies elsewhere, and a resumed training may not differ by a bit for it."""

    @pytest.mark.parametrize("cell", CELLS)
    def test_of_what_a_layer_works_on(self, cell, dtype, rng):
        x = rng.standard_normal((9, 3, 5)).astype(dtype)
        grad = rng.standard_normal((9, 3, 7)).astype(dtype)
        outcomes, kept = set(), []  # what is kept, the next results cannot lie upon
        for offset in [*OFFSETS] * 4:
            drawn = make_layer(cell, 5, 7, 2, dtype=dtype, seed=0)
            weights = {name: at(w, offset) for name, w in drawn.weights.items()}
            settings = {k: v for k, v in drawn.config().items() if k != "type"}
            layer = type(drawn)._restore(settings, weights.__getitem__)
            assert all(w is weights[name] for name, w in layer.weights.items())
            y, state, tape = layer.forward(at(x, offset))
            grads = layer.backward(tape, at(grad, offset))
            results = [y, *state, grads.x, *grads.state, *grads.weights.values()]
            kept += [*results, np.empty(len(kept), np.uint8)]
            outcomes.add(tuple(array.tobytes() for array in results))
        assert len(outcomes) == 1

    def test_of_what_readout_and_loss_work_on(self, dtype, rng):
        y = rng.standard_normal((9, 3, 7)).astype(dtype)
        weight = rng.standard_normal((11, 7)).astype(dtype)
        target = rng.integers(0, 11, (9, 3))
        outcomes = set()
        for offset in OFFSETS:
            grads = [at(np.zeros((11, 7), dtype), offset), at(np.zeros(11, dtype), offset)]
            given = [at(array, offset) for array in (y, weight, weight[:, 0])]
            value, grad_y = _core.readout_loss(
                "cross_entropy", *given, target, 1 / 27, -100, *grads, True
            )
            outcomes.add((value, *(array.tobytes() for array in (grad_y, *grads))))
        assert len(outcomes) == 1


class Broken:
    """Raises when the file is about to be written, or about to take its place."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


class TestAtomicWrite:
    @pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
    @pytest.mark.parametrize(
        "where", ["storage.save_file", "_files.os.replace", "_files._flush", "_files.os.chmod"]
    )
    def test_a_failed_save_leaves_the_old_file_and_nothing_else(
        self, where, error, path, monkeypatch
    ):
        model = make_model()
        fb.save(path, model)
        before = path.read_bytes()
        monkeypatch.setattr(f"fastbptt.{where}", Broken(error))
        with pytest.raises(type(error)):
            fb.save(path, make_model("gru"))
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_a_failed_first_save_leaves_nothing(self, path, monkeypatch):
        monkeypatch.setattr("fastbptt._files.os.replace", Broken(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            fb.save(path, make_model())
        assert os.listdir(path.parent) == []

    def test_half_a_file_never_has_the_name(self, path, monkeypatch):
        fb.save(path, make_model())
        seen = []

        def write(tensors, filename, metadata):
            save_file(tensors, filename, metadata)
            seen.append(fb.load(path).config())

        monkeypatch.setattr("fastbptt.storage.save_file", write)
        old = fb.load(path).config()
        fb.save(path, make_model("gru"))
        assert seen == [old]
        assert fb.load(path).config() != old

    @pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
    def test_permissions_are_those_of_any_new_file_or_of_the_old_one(self, path):
        before = os.umask(0o027)
        try:
            fb.save(path, make_model())
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        fb.save(path, make_model())
        assert stat.S_IMODE(path.stat().st_mode) == 0o604

    @pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
    def test_a_link_stays_one(self, path, tmp_path):
        (tmp_path / "there").mkdir()
        target = tmp_path / "there" / "target"
        path.symlink_to(target)
        for _ in range(2):
            fb.save(path, make_model())
            assert path.is_symlink()
            fb.load(target)
        assert os.listdir(target.parent) == ["target"]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
    def test_what_is_no_file_is_not_replaced(self, path):
        os.mkfifo(path)
        with pytest.raises(OSError, match="not a regular file"):
            fb.save(path, make_model())
        assert stat.S_ISFIFO(path.stat().st_mode)

    def test_a_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError):
            fb.save(tmp_path, make_model())
        with pytest.raises((IsADirectoryError, PermissionError)):
            fb.load(tmp_path)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere") as caught:
            fb.save(tmp_path / "nowhere" / "model", make_model())
        assert caught.value.filename == str(tmp_path / "nowhere" / "model")

    def test_a_very_long_name(self, tmp_path):
        path = tmp_path / ("x" * 250)
        fb.save(path, make_model())
        fb.load(path)


class TestBadArguments:
    def test_model(self, path):
        for model in (fb.GRU(2, 3), None, {"0.weight": np.zeros(3)}):
            with pytest.raises(TypeError, match=r"model: got \w+, wanted a Model"):
                fb.save(path, model)

    def test_path(self):
        for path in (None, 3, ["a"]):
            with pytest.raises(TypeError, match="path: got"):
                fb.save(path, make_model())
            with pytest.raises(TypeError, match="path: got"):
                fb.load(path)

    def test_optimizer(self, path):
        model = make_model()
        for optimizer in ("adam", fb.Adam, model):
            with pytest.raises(TypeError, match="optimizer: got"):
                fb.save(path, model, optimizer)
        with pytest.raises(ValueError, match=r"optimizer: .*'0\.weight'"):
            fb.save(path, model, fb.Adam(make_model().parameters()))

    @pytest.mark.parametrize(
        "extra",
        [
            {"a": object()},
            {"a": {1, 2}},
            {"a": b"bytes"},
            {"a": [np.zeros(3)]},
            {"a": np.array(["text"])},
            {"a": np.array([None])},
            {"a": np.zeros(3, complex)},
            {"a": np.ma.zeros(3)},
            {3: "a"},
            ["a"],
            "a",
        ],
    )
    def test_extra(self, extra, path):
        model = make_model()
        fb.save(path, model)
        before = path.read_bytes()
        with pytest.raises(TypeError, match="extra: got"):
            fb.save(path, model, extra=extra)
        assert path.read_bytes() == before

    def test_extra_that_contains_itself(self, path):
        endless = []
        endless.append(endless)
        with pytest.raises(TypeError, match="extra: got"):
            fb.save(path, make_model(), extra={"a": endless})


def edited(path, change=lambda header: None, tensors=lambda tensors: None):
    """Write the file again with other metadata or other tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fastbptt"])
    arrays = load_file(path)
    header = change(header) or header
    tensors(arrays)
    save_file(arrays, path, metadata={"fastbptt": json.dumps(header)})


def set_in(*keys, value):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.fixture
def saved(path):
    model = make_model()
    fb.save(path, model, fb.Adam(model.parameters()), {"a": np.ones(2), "b": 1})
    return path


def assert_refused(path, words="", load=storage.load_training):
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    message = str(caught.value)
    assert repr(str(path)) in message
    assert "wanted" in message
    assert "\n" not in message


class TestBadFiles:
    @pytest.mark.parametrize("load", [fb.load, storage.load_training])
    def test_missing(self, load, path):
        with pytest.raises(FileNotFoundError, match="model"):
            load(path)

    @pytest.mark.parametrize("load", [fb.load, storage.load_training])
    def test_truncated_anywhere(self, load, saved):
        content = saved.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        for length in (0, 1, 7, 8, 9, 8 + size // 2, 8 + size, 9 + size, len(content) - 1):
            saved.write_bytes(content[:length])
            assert_refused(saved, "is no model", load)

    def test_something_behind_the_end(self, saved):
        saved.write_bytes(saved.read_bytes() + b"\0")
        assert_refused(saved, "is no model")

    @pytest.mark.parametrize(
        "content",
        [b"text\n" * 100, b"\0" * 100, b"\xff" * 100, b"{}", b"\x80\x04K\x01."],
        ids=["text", "zeros", "ones", "json", "pickle"],
    )
    def test_not_a_model_at_all(self, content, path):
        path.write_bytes(content)
        assert_refused(path, "is no model", fb.load)

    @pytest.mark.parametrize(
        "metadata", [None, {}, {"format": "pt"}, {"fastbptt": ""}, {"fastbptt": "[1]"}]
    )
    def test_safetensors_of_others(self, metadata, path):
        save_file({"0.weight": np.zeros((3, 3))}, path, metadata=metadata)
        assert_refused(path, "is no model", fb.load)

    @pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
    def test_another_format_version(self, version, saved):
        edited(saved, set_in("format", value=version))
        for load in (fb.load, storage.load_training):
            assert_refused(saved, r"got format version .*, wanted 1", load)

    def test_a_tensor_is_missing(self, saved):
        edited(saved, tensors=lambda t: t.pop("1.bias_hh_l1"))
        assert_refused(saved, "1.bias_hh_l1", fb.load)

    @pytest.mark.parametrize(
        "array", [np.zeros(20), np.zeros(19, "f4"), np.zeros((1, 20), "f4"), np.zeros(20, "i4")]
    )
    def test_a_tensor_of_another_shape_or_dtype(self, array, saved):
        edited(saved, tensors=lambda t: t.update({"1.bias_hh_l1": array}))
        assert_refused(saved, r"bias_hh_l1: got .*, wanted float32 of shape \(20,\)", fb.load)

    @pytest.mark.parametrize(
        "change",
        [
            lambda header: header.pop("model"),
            set_in("model", value=None),
            set_in("model", value={"parts": 3}),
            set_in("model", "parts", value=[]),
            set_in("model", "parts", 1, value={"type": "Transformer"}),
            set_in("model", "parts", 1, "hidden_size", value=-1),
            set_in("model", "parts", 1, "hidden_size", value="5"),
            set_in("model", "parts", 1, "hidden_size", value=6),
            set_in("model", "parts", 1, "hidden_size", value=2**20),
            set_in("model", "parts", 1, "hidden_size", value=2**29),
            set_in("model", "parts", 1, "hidden_size", value=2**70),
            set_in("model", "parts", 1, "num_layers", value=2**40),
            set_in("model", "parts", 1, "num_layers", value=10**6),
            set_in("model", "parts", 1, "attention", value=0.1),
            lambda header: header["model"]["parts"][1].pop("dtype"),
        ],
    )
    def test_a_config_that_does_not_fit(self, change, saved):
        edited(saved, lambda header: change(header) and None)
        assert_refused(saved, "is no model", fb.load)
        assert_refused(saved, "is no model")

    @pytest.mark.parametrize(
        "change",
        [
            set_in("optimizer", value=3),
            set_in("optimizer", value={}),
            set_in("optimizer", "type", value="Adagrad"),
            set_in("optimizer", "config", "lr", value=-1.0),
            set_in("optimizer", "config", "gamma", value=1.0),
            set_in("optimizer", "parameters", 0, value="9.weight"),
            set_in("optimizer", "parameters", value=[]),
            set_in("optimizer", "state", "values", value={}),
            set_in("optimizer", "state", "values", "step", value=-1),
            set_in("optimizer", "state", "arrays", 0, value="nothing"),
            set_in("extra", value=None),
            set_in("extra", "arrays", 0, value="nothing"),
        ],
    )
    def test_a_training_state_that_does_not_fit(self, change, saved):
        edited(saved, change)
        assert_refused(saved, "is no model")
        fb.load(saved)  # the model is good


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("storage") / "model"
    model = fb.Model(fb.GRU(2, 3), fb.Linear(3, 1))
    fb.save(path, model, fb.SGD(model.parameters(), momentum=0.5), {"a": np.ones(2)})
    return path, path.read_bytes()


@given(st.data())
def test_a_damaged_file_is_a_value_error_or_a_file_with_other_content(content, data):
    path, original = content
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with suppress(ValueError):  # and nothing else
        storage.load_training(path)
