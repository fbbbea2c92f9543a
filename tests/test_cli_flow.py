"""`fastbptt flow`: the data it takes, what it says, the picture, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb
from cli_tools import ENGLISH, SMALL, read_json, run, write_table, write_text
from conftest import require

require("matplotlib")

pytestmark = pytest.mark.usefixtures("own_folder")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def text_model(tmp_path, capsys):
    """A text, and a model that has learnt a little of it."""
    text = write_text(tmp_path / "a.txt", ENGLISH)
    assert run("train", text, *SMALL, "--steps", 3, "--save", "m.safetensors") == 0
    capsys.readouterr()
    return text, "m.safetensors"


def test_without_a_model_three_cells_are_compared(tmp_path, capsys):
    assert run("flow", "--steps", 40, "--rows", 3, "--hidden", 8, "--json", "flow.json") == 0
    said = capsys.readouterr().out
    assert is_picture(tmp_path / "flow.png")
    flows = read_json(tmp_path / "flow.json")["flows"]
    assert [flow["name"] for flow in flows] == ["RNN", "LSTM", "GRU"]
    for flow in flows:
        assert np.shape(flow["h"]) == (1, 40)
        assert flow["distance"] == list(range(39, -1, -1))
        assert (flow["c"] is None) == (flow["name"] != "LSTM")
        assert set(flow["weights"]) >= {"0.weight_ih_l0", "0.weight_hh_l0"}
        near, far = flow["h"][0][-1], flow["h"][0][0]
        word = "vanishes" if near > 1e3 * far else "does not vanish"
        assert f"{flow['name']}, layer 0 {word}: |dL/dh| is {near:.3g} at the target" in said


def test_a_seed_decides(tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        assert run("flow", "--steps", 5, "--hidden", 4, "--seed", seed, "--json", name) == 0
    a, b, c = (read_json(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_a_saved_model_is_looked_at_on_its_own_data(tmp_path, capsys, text_model):
    _, model = text_model
    options = ["--steps", 12, "--rows", 5, "--plot", "p.png", "--json", "p.json"]
    assert run("flow", model, *options) == 0
    assert "5 x 12 characters" in capsys.readouterr().out
    assert is_picture(tmp_path / "p.png")
    # The same by hand: stretches of the training part, evenly apart.
    characters = (tmp_path / "a.txt").read_text(encoding="utf-8")
    place = {character: code for code, character in enumerate(sorted(set(characters)))}
    codes = np.array([place[character] for character in characters])
    train = len(codes) - len(codes) // 10 - 1
    starts = np.linspace(0, train - 12, 5).astype(int)
    index = starts[None, :] + np.arange(12)[:, None]
    wanted = fb.gradient_flow(fb.load(model), codes[index], codes[index + 1])
    (got,) = read_json(tmp_path / "p.json")["flows"]
    np.testing.assert_allclose(got["h"], wanted.h, rtol=1e-6)
    # A text that has moved; noise.
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert run("flow", model, "b.txt", *options) == 0
    assert read_json(tmp_path / "p.json")["flows"][0]["h"] == got["h"]
    assert run("flow", model, "--random", *options) == 0
    assert "steps of noise" in capsys.readouterr().out


def test_a_series(tmp_path, capsys):
    table = write_table(tmp_path / "s.csv", {"v": np.sin(np.arange(300) / 3)})
    data = ["--series", table, "--column", "v"]
    assert run("train", *data, "--hidden", 4, "--steps", 2, "--save", "s.safetensors") == 0
    assert run("flow", "s.safetensors", "--steps", 30, "--targets", "all") == 0
    said = capsys.readouterr().out
    assert "16 x 30 values" in said
    assert "explode" in said
    assert "vanish" not in said


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
def test_a_model_from_python_gets_noise(tmp_path, capsys, batch_first, embedding):
    parts = [fb.LSTM(3, 4, 2, batch_first=batch_first, dtype="float64")]
    if embedding:
        parts = [fb.Embedding(7, 3, dtype="float64"), *parts, fb.Linear(4, 7, dtype="float64")]
    fb.save("p.safetensors", fb.Model(*parts))
    assert run("flow", "p.safetensors", "--steps", 6, "--rows", 2, "--json", "p.json") == 0
    said = capsys.readouterr().out
    assert "2 x 6 steps of noise" in said
    assert "layer 1 " in said
    assert np.shape(read_json(tmp_path / "p.json")["flows"][0]["h"]) == (2, 6)


def test_a_model_that_went_astray_has_no_flow(tmp_path, capsys):
    model = fb.Model(fb.RNN(1, 2, nonlinearity="relu", seed=0))
    model.recurrent.weights["weight_ih_l0"][...] = 1e38
    model.recurrent.weights["weight_hh_l0"][...] = 1e25
    fb.save("p.safetensors", model)
    assert run("flow", "p.safetensors", "--steps", 3, "--json", "p.json") == 1
    assert "the loss is " in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_norms_that_are_no_numbers_are_null_in_json(tmp_path, capsys, monkeypatch):
    found = fb.GradientFlow(1.0, np.array([[np.inf, 2.0, 1.0]]), None)
    monkeypatch.setattr(fb, "gradient_flow", lambda *arguments, **options: found)
    assert run("flow", "--json", "p.json") == 0
    assert "layer 0 explodes: |dL/dh| is inf, two steps before it" in capsys.readouterr().out
    assert read_json(tmp_path / "p.json")["flows"][0]["h"] == [[None, 2.0, 1.0]]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run("flow", *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fastbptt: error: ")
    assert output.err.count("\n") == 1
    return output.err


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            (["--steps", "0"], ["--steps", "'0'"]),
            (["--rows", "-1"], ["--rows", "'-1'"]),
            (["--targets", "some"], ["--targets", "'some'"]),
            (["--plot", "flow.jpg"], ["--plot", "'flow.jpg'", ".png"]),
            (["--plot", "nowhere/flow.png"], ["--plot", "'nowhere'"]),
            (["--json", "flow.png"], ["--plot", "--json"]),
            (["--random"], ["MODEL"]),
            (["--series", "a.csv", "--column", "v"], ["MODEL"]),
            (["nothing.safetensors"], ["MODEL", "'nothing.safetensors'"]),
            (["nothing.safetensors", "--hidden", "3"], ["--hidden", "3", "MODEL"]),
        ],
    )
    def test_options(self, capsys, options, wanted):
        error = refused(capsys, *options)
        for words in wanted:
            assert words in error

    def test_data(self, tmp_path, capsys, text_model):
        text, model = text_model
        other = write_text(tmp_path / "b.txt", ENGLISH[:2])
        assert "other content" in refused(capsys, model, other)
        assert "--random" in refused(capsys, model, text, "--random")
        assert "at most" in refused(capsys, model, "--steps", 10**6)
        (tmp_path / "a.txt").unlink()
        assert "a.txt" in refused(capsys, model)

    def test_what_it_reads_is_not_written_over(self, tmp_path, capsys, text_model):
        text, model = text_model
        before = [Path(name).read_bytes() for name in text_model]
        for name in text_model:
            assert "is in use" in refused(capsys, model, "--json", name)
            assert "is in use" in refused(capsys, model, text, "--json", name)
        picture = tmp_path / "m.png"
        picture.symlink_to(model)
        assert "is in use" in refused(capsys, model, "--plot", picture)
        assert before == [Path(name).read_bytes() for name in text_model]

    @pytest.mark.parametrize(
        ("layer", "extra", "words"),
        [
            (fb.GRU(3, 4, bidirectional=True), {}, "bidirectional"),
            (fb.LSTM(3, 4, proj_size=2), {}, "plain"),
            (fb.GRU(3, 4), {"source": {"url": "a"}}, "does not say what it was trained on"),
        ],
    )
    def test_models_without_a_flow(self, tmp_path, capsys, layer, extra, words):
        path = tmp_path / "m.safetensors"
        fb.save(path, fb.Model(layer), extra=extra)
        assert run("flow", path) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1

    def test_without_matplotlib_it_says_so_first(self, capsys, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        assert "pip install 'fastbptt[plot]'" in refused(capsys)
