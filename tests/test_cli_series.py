"""`fastbptt train --series`: a one-step-ahead forecaster of a column."""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from cli_tools import assert_same_run, read_json, run, write_table
from fastbptt.cli.series import Series, _late_mse, read_series

FAST = ["--hidden", 16, "--threads", 1]


pytestmark = pytest.mark.usefixtures("own_folder")


def wave(count: int = 800) -> np.ndarray:
    time = np.arange(count)
    return 100 + 20 * np.sin(time / 4) + 5 * np.sin(time / 1.7)


def test_series_beats_tomorrow_equals_today(tmp_path, capsys):
    values = wave()
    table = write_table(tmp_path / "表.csv", {"日付": range(800), "値段": values}, delimiter=";")
    options = ["--series", table, "--column", "値段", *FAST, "--steps", 200]
    assert run("train", *options, "--save", "m.safetensors", "--json", "m.json") == 0
    output = capsys.readouterr()
    result = read_json(tmp_path / "m.json")
    naive = np.sqrt(np.mean(np.square(np.diff(values)[-80:])))
    assert result["naive_rmse"] == pytest.approx(naive)
    assert result["heldout_rmse"] < 0.2 * naive
    assert f"{result['naive_rmse']:.6g}" in output.out
    assert "RMSE" in output.err
    assert fb.load("m.safetensors") is not None
    # A forecaster writes no text.
    assert run("sample", "m.safetensors") == 2
    assert "forecasts the series '値段'" in capsys.readouterr().err


def test_untrained_forecaster_is_tomorrow_equals_today():
    values = np.random.default_rng(0).normal(size=200).cumsum() + 1e6
    series = Series(values, {"series": "a.csv", "column": "x"})
    settings = type("S", (), {"seed": 0, "hidden": 4, "layers": 1, "cell": "gru"})()
    figures = series.held_out(series.build(settings))
    drift = np.diff(values[:180]).mean()
    expected = np.sqrt(np.mean(np.square(np.diff(values)[-20:] - drift)))
    assert figures["heldout_rmse"] == pytest.approx(expected, rel=1e-5)


def test_scaling_knows_the_training_part_alone():
    values = wave(100)
    other = values.copy()
    other[90:] *= 1000
    ours, theirs = (
        Series(column, {"series": "a.csv", "column": "x"}) for column in (values, other)
    )
    assert ours.description() == theirs.description()
    index = np.arange(ours.targets)[:, None]
    np.testing.assert_array_equal(ours.window(index, 0)[0], theirs.window(index, 0)[0])
    np.testing.assert_array_equal(ours.window(index, 0)[1], theirs.window(index, 0)[1])


@pytest.mark.parametrize("k2", [8, 19])
def test_resume_equals_an_uninterrupted_run(tmp_path, k2):
    table = write_table(tmp_path / "a.csv", {"x": wave(200)})
    options = ["--series", table, "--column", "x", *FAST, "--batch", 3, "--k1", 8, "--k2", k2]
    assert run("train", *options, "--steps", 12, "--save", "whole.safetensors") == 0
    assert run("train", *options, "--steps", 5, "--save", "parts.safetensors") == 0
    assert run("train", "--resume", "parts.safetensors", "--steps", 12) == 0
    assert_same_run(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors")


def test_late_mse_is_the_mse_of_the_late_steps(rng):
    output, target = rng.normal(size=(2, 7, 3, 1))
    loss = _late_mse(4, 7)
    pieces = [slice(0, 3), slice(3, 5), slice(5, 7)]
    values, grads = zip(*(loss(output[s], target[s], s) for s in pieces), strict=True)
    assert sum(values) == pytest.approx(np.mean(np.square(output[4:] - target[4:])))
    expected = np.concatenate([np.zeros((4, 3, 1)), 2 / 9 * (output[4:] - target[4:])])
    np.testing.assert_allclose(np.concatenate(grads), expected)


@pytest.mark.parametrize(
    ("content", "column", "wanted"),
    [
        ("x,y\n1,2\n", "z", ["--column", "'z'", "'x', 'y'"]),
        ("x,y\n1,2\n3,\n", "y", ["row 3", "''", "finite number"]),
        ("x,y\n1,2\n3\n", "y", ["row 3", "''", "finite number"]),
        ("x\n1\nabc\n", "x", ["row 3", "'abc'", "finite number"]),
        ("x\n1\nnan\n", "x", ["row 3", "'nan'", "finite number"]),
        ("x\n" + "1\n2\n" * 4, "x", ["8 values", "at least 10"]),
        ("x\n" + "5\n" * 40, "x", ["nothing to learn"]),
        ("x\n" + "1e308\n-1e308\n" * 20, "x", ["1e+308", "finite"]),
        ("x\n" + "1\n2\n" * 20, "x", ["--batch 1 --k1 40", "at least 40"]),
        ("", "x", ["empty"]),
        ("\n", "x", ["--column", "'x'"]),
        (b"x\n\xff\n", "x", ["UTF-8", "0xff"]),
    ],
)
def test_bad_tables_are_named(tmp_path, capsys, content, column, wanted):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("train", "--series", path, "--column", column, "--k1", 40) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in wanted:
        assert word in error


def test_columns_are_found_under_any_usual_delimiter(tmp_path):
    for delimiter in ",;\t":
        table = write_table(
            tmp_path / "a.csv", {"a b": range(50), "c": wave(50)}, delimiter=delimiter
        )
        np.testing.assert_array_equal(read_series(table, "c")._values, wave(50))
