"""`fastbptt train` and `fastbptt sample` on texts: what is learnt, saved, resumed and written."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb
from cli_tools import (
    ENGLISH,
    JAPANESE,
    SMALL,
    assert_same_run,
    read_json,
    run,
    write_text,
)
from fastbptt import storage
from fastbptt.cli import loop as cli_loop
from fastbptt.cli.text import IGNORE, Text

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(("name", "sentences"), [("english", ENGLISH), ("日本語", JAPANESE)])
def test_text_is_learnt_saved_and_written(tmp_path, capsys, name, sentences):
    text = write_text(tmp_path / f"{name}.txt", sentences)
    model, figures = tmp_path / f"{name}.safetensors", tmp_path / "figures.json"
    status = run("train", text, *SMALL, "--steps", 300, "--save", model, "--json", figures)
    output = capsys.readouterr()
    assert status == 0
    result = read_json(figures)
    assert result["heldout_bpc"] < 0.6 * result["unigram_bpc"] < 0.6 * result["uniform_bpc"]
    assert result["steps"] == 300
    assert result["characters_per_second"] > 0
    assert result["settings"]["k2"] == result["settings"]["k1"] == 10
    for figure in ("heldout_bpc", "unigram_bpc", "uniform_bpc"):
        assert f"{result[figure]:.3f}" in output.out
    for word in ("loss", "bits/character", "characters/s", "300/300"):
        assert word in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{name}.txt", model.name, figures.name]
    )

    prompt = sentences[0][:3]
    assert run("sample", model, "--prompt", prompt, "--length", 40, "--seed", 1) == 0
    written = capsys.readouterr().out
    assert written.startswith(prompt)
    assert len(written) == len(prompt) + 40 + len("\n")
    assert set(written) <= set("".join(sentences))


def test_sample_obeys_seed_temperature_and_length(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    run("train", text, *SMALL, "--steps", 5, "--save", "m.safetensors")
    capsys.readouterr()

    def sample(*options: object) -> str:
        assert run("sample", "m.safetensors", "--prompt", "The", "--length", 60, *options) == 0
        return capsys.readouterr().out

    assert sample("--seed", 1) == sample("--seed", 1)
    assert sample("--seed", 1) != sample("--seed", 2)
    assert sample("--temperature", 0, "--seed", 1) == sample("--temperature", 0, "--seed", 2)
    assert sample("--temperature", 1e-320, "--seed", 1) == sample("--temperature", 0)
    assert sample("--temperature", 1e300)
    assert run("sample", "m.safetensors", "--prompt", "The", "--length", 0) == 0
    assert capsys.readouterr().out == "The\n"
    assert run("sample", "m.safetensors", "--length", 7, "--seed", 3) == 0
    assert len(capsys.readouterr().out) == 8


@pytest.mark.parametrize(
    "options",
    [
        ["--cell", "lstm", "--optimizer", "adam", "--layers", "2"],
        ["--cell", "gru", "--optimizer", "rmsprop", "--k2", "25"],
        ["--cell", "rnn", "--optimizer", "sgd", "--lr", "0.3", "--clip", "0"],
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_resume_equals_an_uninterrupted_run(tmp_path, options):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    # Twelve updates pass the end of the text, so that position is more than a number of steps.
    common = ["train", text, *SMALL, *options, "--seed", 7, "--lr-decay", 5]
    assert run(*common, "--steps", 120, "--save", whole) == 0
    assert run(*common, "--steps", 1, "--save", parts) == 0
    assert run("train", "--resume", parts, "--steps", 50) == 0
    assert run(*common, "--resume", parts, "--steps", 120) == 0
    assert_same_run(whole, parts)


def test_resume_into_another_file_leaves_the_first(tmp_path):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    run("train", text, *SMALL, "--steps", 2, "--save", "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    args = ("--resume", "a.safetensors", "--steps", 4, "--save", "b.safetensors")
    assert run("train", *args) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert storage.load_training("b.safetensors")[2]["steps"] == 4


def test_interrupted_update_is_resumed_exactly(tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    options = ["train", text, *SMALL, "--k2", 17]
    run(*options, "--steps", 9, "--save", "whole.safetensors")
    original, calls = fb.value_and_grad, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        result = original(*args, **kwargs)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return result

    capsys.readouterr()
    monkeypatch.setattr(cli_loop.fb, "value_and_grad", interrupted)
    status = run(*options, "--steps", 9, "--save", "a.safetensors", "--json", "a.json")
    assert status == 130
    assert "bits per character" in capsys.readouterr().out
    result = read_json(tmp_path / "a.json")
    assert result["steps"] == 4
    assert result["interrupted"]
    assert run("train", "--resume", "a.safetensors") == 0
    assert_same_run(tmp_path / "whole.safetensors", tmp_path / "a.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_saves_and_ends_with_130(tmp_path):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    model = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "fastbptt", "train", text, *SMALL, "--steps", "10000000"]
    process = subprocess.Popen(
        [*command, "--save", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        deadline = time.monotonic() + 60
        while not model.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "held out" in output
    assert "interrupted" in output
    steps = storage.load_training(str(model))[2]["steps"]
    assert steps > 0
    assert [
        path.name for path in tmp_path.iterdir() if path.name not in ("a.txt", model.name)
    ] == []
    assert run("train", "--resume", model, "--steps", steps + 1) == 0


def test_loss_that_becomes_nan_stops_and_leaves_a_good_model(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    wild = ["--optimizer", "sgd", "--lr", "1e38", "--clip", "0", "--cell", "rnn"]
    status = run("train", text, *SMALL, *wild, "--steps", 50, "--save", "m.safetensors")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1
    assert re.search(r"(nan|inf|NaN).* at step \d+", last)
    assert "'m.safetensors' holds the model after" in last
    model = fb.load("m.safetensors")
    assert all(np.isfinite(array).all() for array in model.parameters().values())

    run("train", text, *SMALL, "--steps", 3, "--save", "good.safetensors")
    before = (tmp_path / "good.safetensors").read_bytes()
    status = run("train", text, *SMALL, *wild, "--steps", 50, "--save", "good.safetensors")
    assert status == 1
    assert "as it was before" in capsys.readouterr().err
    assert (tmp_path / "good.safetensors").read_bytes() == before


def test_seconds_end_a_run(tmp_path):
    text = write_text(tmp_path / "a.txt", ENGLISH)
    began = time.monotonic()
    args = ("--seconds", 0.5, "--save", "m.safetensors", "--json", "m.json")
    assert run("train", text, *SMALL, *args) == 0
    assert time.monotonic() - began < 20
    result = read_json(tmp_path / "m.json")
    assert result["steps"] > 0
    assert result["settings"]["steps"] is None


def test_state_is_carried_exactly_to_a_window_that_reaches_back(tmp_path):
    text = write_text(tmp_path / "a.txt", ENGLISH, 20)
    # A rate so small that no weight changes: the state must be that of one long run.
    still = ["--optimizer", "sgd", "--lr", "1e-30", "--k1", 3, "--k2", 8, "--batch", 2]
    for steps in (1, 2, 3, 7):
        assert run("train", text, *SMALL, *still, "--steps", steps, "--save", "m.safetensors") == 0
        model, _, extra = storage.load_training("m.safetensors")
        data = Text(Path(text).read_text(encoding="utf-8"), {"file": text}, "text")
        time_steps = np.arange(max(0, 3 * (steps + 1) - 8))
        index = time_steps[:, None] + np.array([[0, data.targets // 2]])
        if len(index) == 0:
            assert "state_0" not in extra or not extra["state_0"].any()
            continue
        _, state = model(data.window(index, 0)[0])
        for n, expected in enumerate(state):
            np.testing.assert_allclose(extra[f"state_{n}"], expected, rtol=1e-5, atol=1e-7)


def test_held_out_characters_count_once_each_and_cost_all_they_cost():
    # "#" is in the held-out part alone: a class for all, and no class for free.
    content = "ab" * 4500 + "ab#" * 333 + "a"
    data = Text(content, {"file": None}, "text")
    x, target = data._held_out_streams()
    held_out = data._codes[data._split :]
    kept = target.T[target.T != IGNORE]
    np.testing.assert_array_equal(kept, held_out)
    np.testing.assert_array_equal(x.T[target.T != IGNORE], data._codes[data._split - 1 : -1])
    model = fb.Model(fb.Embedding(3, 2), fb.RNN(2, 2), fb.Linear(2, 3))
    for weight in model.parameters().values():
        weight[...] = 0.0
    figures = data.held_out(model)
    assert figures["heldout_bpc"] == pytest.approx(math.log2(3))
    assert figures["uniform_bpc"] == pytest.approx(math.log2(3))
    train = [content[: data._split].count(character) for character in "#ab"]
    bits = -np.log2((np.array(train) + 1) / (data._split + 3))
    assert figures["unigram_bpc"] == pytest.approx(float(bits[held_out].mean()))


def test_held_out_bpc_is_that_of_one_pass(tmp_path):
    text = write_text(tmp_path / "a.txt", ENGLISH, 400)
    run("train", text, *SMALL, "--steps", 60, "--save", "m.safetensors")
    model, _, _ = storage.load_training("m.safetensors")
    data = Text(Path(text).read_text(encoding="utf-8"), {"file": text}, "text")
    assert data._held_out_streams()[0].shape[1] > 1
    codes = data._codes[:, None]
    first = data._split
    _, state = model(codes[: first - 1])
    loss, _ = fb.evaluate(model, codes[first - 1 : -1], codes[first:], state=state)
    assert data.held_out(model)["heldout_bpc"] == pytest.approx(loss / math.log(2), rel=1e-3)


def test_process_writes_utf_8_and_minds_a_closed_pipe(tmp_path):
    text = write_text(tmp_path / "猫.txt", JAPANESE)
    run("train", text, *SMALL, "--steps", 3, "--save", "m.safetensors")
    command = [sys.executable, "-m", "fastbptt", "sample", "m.safetensors", "--prompt", "吾輩"]
    done = subprocess.run(
        [*command, "--length", "20"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )
    assert len(done.stdout.decode("utf-8").rstrip("\r\n")) >= 20
    assert done.stderr == b""
    process = subprocess.Popen(
        [*command, "--length", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert errors == b""
