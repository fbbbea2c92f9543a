"""What the command line refuses: one line on stderr, what was got and what was wanted, status 2."""

from __future__ import annotations

import os

import pytest

import fastbptt as fb
from cli_tools import ENGLISH, JAPANESE, SMALL, run, write_table, write_text

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "a.txt", ENGLISH)


def refused(capsys, *arguments: object) -> str:
    """The one line that a refused command writes."""
    capsys.readouterr()
    status = run(*arguments)
    output = capsys.readouterr()
    assert status == 2, output
    assert output.out == ""
    assert output.err.startswith("fastbptt: error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--hidden", "0"], ["--hidden", "'0'", "at least 1"]),
        (["--hidden", "1.5"], ["--hidden", "'1.5'", "whole number"]),
        (["--hidden", "100000000"], ["--hidden", "GB"]),
        (["--layers", "1000000000"], ["--layers", "GB"]),
        (["--embedding", "-1"], ["--embedding", "'-1'"]),
        (["--batch", "0"], ["--batch", "'0'"]),
        (["--batch", "100000"], ["--batch 100000", "wanted at least"]),
        (["--k1", "0"], ["--k1", "'0'"]),
        (["--k1", "4000", "--batch", "1"], ["--k1 4000", "wanted at least 4000"]),
        (["--k1", "8", "--k2", "7"], ["--k2", "got 7", "k1 = 8"]),
        (["--lr", "0"], ["--lr", "'0'", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "inf"], ["--lr", "'inf'"]),
        (["--clip", "-1"], ["--clip", "'-1'"]),
        (["--lr-decay", "-1"], ["--lr-decay", "'-1'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--threads", "1025"], ["--threads", "'1025'", "1024"]),
        (["--steps", "0"], ["--steps", "'0'"]),
        (["--seconds", "0"], ["--seconds", "'0'"]),
        (["--cell", "cnn"], ["--cell", "'cnn'", "lstm"]),
        (["--optimizer", "lbfgs"], ["--optimizer", "'lbfgs'", "adam"]),
        (["--hidde", "8"], ["--hidde"]),
        (["--save", ""], ["--save", "''"]),
        (["--save", "."], ["--save", "folder"]),
        (["--save", "nowhere/m.safetensors"], ["--save", "'nowhere'"]),
        (["--save", "a.txt"], ["--save", "'a.txt'", "data"]),
        (["--save", "b.txt"], ["--save", "'b.txt'", "no model"]),
        (["--json", "a.txt"], ["--json", "'a.txt'"]),
        (["--json", "nowhere/a.json"], ["--json", "'nowhere'"]),
        (["--series", "a.csv", "--column", "x"], ["FILE", "--series"]),
        (["--column", "x"], ["--column", "--series"]),
        (["--resume", "nowhere.safetensors"], ["--resume", "'nowhere.safetensors'", "no such"]),
        (["--resume", "b.txt"], ["--resume", "b.txt"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_bad_options(tmp_path, capsys, text, options, wanted):
    (tmp_path / "b.txt").write_text("not a model, not empty, and dear to somebody")
    error = refused(capsys, "train", text, *options)
    for word in wanted:
        assert word in error
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]
    assert (tmp_path / "b.txt").read_text().startswith("not a model")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, ["no such file"]),
        (b"", ["empty", "wanted text"]),
        (b"short", ["5 characters", "at least 10"]),
        (b"long enough to hold a tenth out, and no more", ["--batch 1 --k1 64", "at least 64"]),
        (b"\x89PNG\r\n\x1a\n" * 100, ["UTF-8", "0x89", "offset 0"]),
        (b"a" * 1000 + b"\0" * 1000, ["binary", "offset 1000"]),
        ("文".encode("utf-16") * 100, ["UTF-8", "0xff"]),
        ("カタカナ".encode("shift-jis") * 100, ["UTF-8", "0x83"]),
    ],
)
def test_bad_texts(tmp_path, capsys, content, wanted):
    path = tmp_path / "a.bin"
    if content is not None:
        path.write_bytes(content)
    error = refused(capsys, "train", path)
    assert "a.bin" in error or "--batch" in error
    for word in wanted:
        assert word in error


def test_folder_in_place_of_a_text(tmp_path, capsys):
    assert "directory" in refused(capsys, "train", tmp_path)


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["sample"], ["train", "a", "b"], ["--wrong"]]
)
def test_bad_commands(capsys, arguments):
    refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 0
    assert "usage: fastbptt" in capsys.readouterr().out


def test_resume_refuses_other_settings_other_text_and_no_work(tmp_path, capsys, text):
    run("train", text, *SMALL, "--steps", 3, "--save", "m.safetensors")
    other = write_text(tmp_path / "b.txt", JAPANESE)
    table = write_table(tmp_path / "c.csv", {"x": range(100)})
    resume = ("train", "--resume", "m.safetensors", "--steps", 9)
    for options, wanted in [
        (["--hidden", 25], ["--hidden", "25", "24"]),
        (["--lr", 0.5], ["--lr", "0.5"]),
        (["--cell", "gru"], ["--cell", "gru", "lstm"]),
        (["--k2", 20], ["--k2", "20", "10"]),
        ([other], ["b.txt", "a.txt", "other content"]),
        (["--series", table, "--column", "x"], ["--resume"]),
    ]:
        error = refused(capsys, *resume, *options)
        for word in wanted:
            assert word in error
    assert "3 updates" in refused(capsys, "train", "--resume", "m.safetensors", "--steps", 3)
    assert "3 updates" in refused(capsys, "train", "--resume", "m.safetensors")
    with open(text, "a", encoding="utf-8") as file:
        file.write("!")
    assert "other content" in refused(capsys, *resume)
    os.unlink(text)
    assert "no such file" in refused(capsys, *resume)


def test_models_that_are_none(tmp_path, capsys, text):
    run("train", text, *SMALL, "--steps", 1, "--save", "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "head.safetensors").write_bytes(content[:5])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("x" * 1000)
    model = fb.Model(fb.Embedding(5, 4), fb.LSTM(4, 6), fb.Linear(6, 5))
    fb.save("plain.safetensors", model)
    for name in ("half", "head", "empty", "text", "plain", "missing"):
        path = f"{name}.safetensors"
        assert path in refused(capsys, "sample", path)
        assert path in refused(capsys, "train", text, "--resume", path)


def test_sample_names_bad_values(capsys, text):
    run("train", text, *SMALL, "--steps", 1, "--save", "m.safetensors")
    assert "'猫' (U+732B)" in refused(capsys, "sample", "m.safetensors", "--prompt", "The 猫")
    assert "--length" in refused(capsys, "sample", "m.safetensors", "--length", -1)
    assert "--temperature" in refused(capsys, "sample", "m.safetensors", "--temperature", -0.1)
    assert "--temperature" in refused(capsys, "sample", "m.safetensors", "--temperature", "nan")
    assert "--seed" in refused(capsys, "sample", "m.safetensors", "--seed", "x")


@pytest.mark.parametrize(
    "model",
    [
        fb.Model(fb.GRU(3, 4), fb.Linear(4, 3)),
        fb.Model(fb.Embedding(3, 2), fb.GRU(2, 3)),
        fb.Model(fb.Embedding(3, 2), fb.GRU(2, 4), fb.Linear(4, 5)),
    ],
    ids=["no embedding", "no readout", "too many outputs"],
)
def test_sample_refuses_models_of_no_text(tmp_path, capsys, model):
    path = tmp_path / "m.safetensors"
    fb.save(path, model, extra={"vocabulary": "abc"})
    assert "MODEL" in refused(capsys, "sample", path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_json_goes_into_a_pipe_and_through_a_link(tmp_path, text):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    options = ["train", text, *SMALL, "--steps", 1]
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run(*options, "--save", tmp_path / "a.st", "--json", pipe) == 0
    assert os.read(reader, 1 << 16).startswith(b"{")
    os.close(reader)
    assert pipe.is_fifo()
    assert run(*options, "--save", tmp_path / "b.st", "--json", link) == 0
    assert link.is_symlink()
    assert file.read_text().startswith("{")
    assert file.stat().st_mode & 0o777 == 0o600
