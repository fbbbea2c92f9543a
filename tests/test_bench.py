"""`fastbptt bench`: right results, the table, its files, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastbptt as fb
from cli_tools import read_json, run
from conftest import require
from fastbptt.bench import libraries, memory_point, memory_step
from fastbptt.bench.anonymous_memory import PeakGrowth
from fastbptt.bench.fresh_process import FreshProcess, ProcessError, thread_environment
from fastbptt.bench.libraries import WrongResultError, check_same, exact, make_step
from fastbptt.bench.peak_memory import peak_memory
from fastbptt.bench.problems import GATES, Problem, length_suite, read_problems, suites

CELLS = tuple(GATES)
QUICK = ("--seconds", 0.01)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (7, 3, 5, 9), (4, 1, 2, 16), (1, 5, 3, 2)])
def test_numpy_is_right(cell, sizes, one_thread):
    problem = Problem("", cell, *sizes)
    got, wanted = make_step("numpy", problem, "float64", 1).run(), exact(problem, 1)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_libraries_agree(cell, dtype, library, one_thread):
    if library == "torch":
        threads = require("torch").get_num_threads()
    problem = Problem("", cell, 6, 3, 5, 8)
    check_same(
        library, problem, make_step(library, problem, dtype, 1).run(), exact(problem, 1), dtype
    )
    if library == "torch":
        require("torch").set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax_agrees(dtype):
    # Imported in the fresh process alone: its threads and warnings are its own.
    if importlib.util.find_spec("jax") is None:
        require("jax")
    with FreshProcess(thread_environment(1)) as process:
        for cell in CELLS:
            problem = Problem("", cell, 6, 3, 5, 8)
            process.call(_check, "jax", problem, dtype)


def _check(library: str, problem: Problem, dtype: str) -> None:
    check_same(
        library, problem, make_step(library, problem, dtype, 1).run(), exact(problem, 1), dtype
    )


def test_a_wrong_result_is_not_timed(one_thread):
    problem = Problem("", "gru", 4, 2, 3, 5)
    wanted = exact(problem, 1)
    for place in range(len(wanted)):
        got = [array.astype("float32") for array in wanted]
        got[place] = got[place] * np.float32(1.01)
        with pytest.raises(WrongResultError, match=r"numpy: \w+ is off by 1.0e-02"):
            check_same("numpy", problem, got, wanted, "float32")
        got[place] = np.full_like(got[place], np.nan)
        with pytest.raises(WrongResultError, match="off by nan"):
            check_same("numpy", problem, got, wanted, "float32")
    with pytest.raises(WrongResultError, match="float64"):
        check_same("numpy", problem, wanted, wanted, "float32")


def test_table_and_json(tmp_path, capsys):
    path = tmp_path / "a.json"
    arguments = ("--problem", "5,2,3,4", "--problem", "3,1,2,8", "--cell", "rnn,lstm")
    assert run("bench", *arguments, "--beside", "numpy", *QUICK, "--json", path) == 0
    output = capsys.readouterr()
    assert output.err == ""
    rows = [line.split() for line in output.out.splitlines() if re.match(r"lstm|gru|rnn", line)]
    assert [row[:3] for row in rows] == [
        [cell, sizes, library]
        for sizes in ("5,2,3,4", "3,1,2,8")
        for cell in ("lstm", "rnn_tanh")
        for library in ("fastbptt", "numpy")
    ]

    summary = read_json(path)
    assert summary.keys() == {
        *("version", "versions", "machine", "dtype", "threads", "seconds", "points", "lengths")
    }
    assert {"fastbptt", "numpy"} <= summary["versions"].keys()
    assert summary["machine"].keys() == {"cpu", "cpus", "caches", "isa", "system", "python"}
    assert (summary["dtype"], summary["threads"], summary["lengths"]) == ("float32", 1, [])
    assert len(summary["points"]) == 4
    for point in summary["points"]:
        T, B, I, H = (point[size] for size in "TBIH")  # noqa: E741
        assert point["operations"] == 3 * 2 * T * B * GATES[point["cell"]] * H * (I + H)
        assert point["matrix_library"] in ("numpy", "torch")
        assert point["results"].keys() == {"fastbptt", "numpy"}
        ours = point["results"]["fastbptt"]["seconds"]
        for result in point["results"].values():
            assert result["seconds"] > 0
            assert result["runs"] >= 5
            assert math.isclose(result["gflops"], point["operations"] / result["seconds"] / 1e9)
            assert math.isclose(result["ratio"], result["seconds"] / ours)
            assert math.isclose(result["share"], result["gflops"] / point["matrix_gflops"])


def test_float64_and_two_threads(tmp_path):
    path = tmp_path / "a.json"
    options = ("--dtype", "float64", "--threads", 2, "--beside", "none", "--json", path)
    assert run("bench", "--problem", "3,2,3,4", "--cell", "gru", *QUICK, *options) == 0
    summary = read_json(path)
    assert (summary["dtype"], summary["threads"]) == ("float64", 2)
    assert [point["results"].keys() for point in summary["points"]] == [{"fastbptt"}]


def test_plot(tmp_path, monkeypatch):
    require("matplotlib")
    from fastbptt.bench import problems

    monkeypatch.setattr(problems, "LENGTHS", (4, 8))
    png, summary = tmp_path / "a.png", tmp_path / "a.json"
    arguments = ("--problem", "5,2,3,4", "--cell", "gru", "--beside", "numpy", *QUICK)
    assert run("bench", *arguments, "--plot", png, "--json", summary) == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lengths = read_json(summary)["lengths"]
    assert [point["T"] for point in lengths] == [4, 8]
    assert all(result["peak_bytes"] >= 0 for p in lengths for result in p["results"].values())
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.png"]


def test_memory_table_and_json(tmp_path, capsys):
    path = tmp_path / "a.json"
    options = ("--problem", "200,2,3,4", "--cell", "lstm", "--beside", "none", *QUICK)
    assert run("bench", "--memory", *options, "--json", path) == 0
    output = capsys.readouterr()
    assert output.err == ""
    points = read_json(path)["points"]
    rows = [line.split() for line in output.out.splitlines() if line.startswith("lstm")]
    assert [row[1] for row in rows] == [f"{point['T']},2,3,4" for point in points]
    assert [point["T"] for point in points] == [100] * 5 + [200] * 5
    schedules = [way.name for way in memory_step.WAYS]
    assert [point["schedule"] for point in points] == schedules * 2
    for point in points:
        assert point["seconds"] > 0
        assert point["peak_bytes"] >= 0
        # y at the least.
        assert point["allocated_bytes"] >= 100 * 2 * 4 * 4
    exact = [point for point in points[:5] if not point["schedule"].startswith("Truncated")]
    assert len({point["loss"] for point in exact}) == 1
    assert len({point["gradient_norm"] for point in exact}) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_memory_plot_and_torch(tmp_path):
    require("matplotlib")
    require("torch")
    png, summary = tmp_path / "a.png", tmp_path / "a.json"
    options = ("--cell", "rnn", "--dtype", "float64", "--beside", "torch", *QUICK)
    files = ("--plot", png, "--json", summary)
    assert run("bench", "--memory", "--problem", "40,2,3,4", *options, *files) == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    points = read_json(summary)["points"]
    assert [point["T"] for point in points] == [40] * 6
    assert points[-1]["schedule"] == "torch"
    assert points[-1]["allocated_bytes"] is None


def test_memory_leaves_out_what_cannot_be_measured(monkeypatch, capsys):
    from fastbptt.cli import bench_memory

    small = memory_step.Way("small", fb.Checkpointed(memory=1000))
    monkeypatch.setattr(bench_memory, "WAYS", (memory_step.WAYS[0], small))
    monkeypatch.setattr(bench_memory, "_LONGEST", 1e-9)
    options = ("--problem", "200,2,3,4", "--cell", "gru", "--beside", "none", *QUICK)
    assert run("bench", "--memory", *options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gru")]
    assert len(lines) == 4
    assert "memory: got 1000 bytes, wanted at least" in lines[1]
    assert "left out: about" in lines[2]


def test_memory_is_not_shown_for_a_wrong_result():
    full, truncated = memory_step.WAYS[0], memory_step.WAYS[-1]
    wanted = memory_step.Outcome(1.0, 2.0)
    memory_point.check_same(truncated, memory_step.Outcome(1.0, 3.0), wanted, "float32")
    with pytest.raises(WrongResultError, match="Full: norm is 3, wanted 2"):
        memory_point.check_same(full, memory_step.Outcome(1.0, 3.0), wanted, "float32")
    with pytest.raises(WrongResultError, match="loss is nan"):
        memory_point.check_same(truncated, memory_step.Outcome(math.nan, 2.0), wanted, "float32")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells of anonymous memory")
def test_growth_is_that_of_anonymous_memory(tmp_path):
    size = 1 << 25
    (tmp_path / "a").write_bytes(bytes(size))
    with FreshProcess(thread_environment(1)) as process:
        assert size <= process.call(_growth, str(tmp_path / "a"), True) < 1.2 * size
        assert process.call(_growth, str(tmp_path / "a"), False) < 0.2 * size


def _growth(path: str, own: bool) -> int:
    with PeakGrowth() as growth:
        data = np.memmap(path, np.uint8, "r")
        if own:
            data = data + 1
        assert data.sum(dtype=np.int64) == data.size * own
    return growth.bytes


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--memory", "--suite", "small"], ["--suite", "--memory", "--problem"]),
        (["--cell", "cnn"], ["--cell", "'cnn'", "lstm"]),
        (["--cell", ""], ["--cell", "''"]),
        (["--cell", "lstm,"], ["--cell", "'lstm,'"]),
        (["--problem", "1,2,3"], ["--problem", "'1,2,3'", "T,B,I,H"]),
        (["--problem", "1,2,3,4,5"], ["--problem", "T,B,I,H"]),
        (["--problem", "0,1,1,1"], ["--problem", "'0,1,1,1'", "at least 1"]),
        (["--problem", "1,1,x,1"], ["--problem", "'1,1,x,1'"]),
        (["--problem", "1,1,1.5,1"], ["--problem", "'1,1,1.5,1'"]),
        (["--problem", "1,1,1,1", "--suite", "small"], ["--problem", "--suite"]),
        (["--suite", "tiny"], ["--suite", "'tiny'", "small", "deepbench"]),
        (["--beside", "eigen"], ["--beside", "'eigen'", "numpy"]),
        (["--beside", "jax"], ["--beside", "'jax'", "not installed"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--threads", "1025"], ["--threads", "'1025'"]),
        (["--dtype", "float16"], ["--dtype", "'float16'", "float64"]),
        (["--seconds", "0"], ["--seconds", "'0'"]),
        (["--seconds", "nan"], ["--seconds", "'nan'"]),
        (["--json", "nowhere/a.json"], ["--json", "'nowhere'"]),
        (["--json", "."], ["--json", "folder"]),
        (["--plot", "nowhere/a.png"], ["--plot", "'nowhere'"]),
        (["--plot", "a.jpg"], ["--plot", "'a.jpg'", ".png"]),
        (["--plot", "a.png", "--json", "./a.png"], ["--plot", "'a.png'", "--json"]),
        (["--plot", "a.png"], ["--plot", "matplotlib", "fastbptt[plot]"]),
        (["small"], ["small"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_bad_options(tmp_path, monkeypatch, capsys, options, wanted):
    missing = importlib.util.find_spec

    def find(name: str, package: str | None = None):
        return None if name in ("jax", "matplotlib") else missing(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.chdir(tmp_path)
    assert run("bench", *options) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fastbptt: error: ")
    assert output.err.count("\n") == 1
    for word in wanted:
        assert word in output.err
    assert os.listdir(tmp_path) == []


def test_a_problem_beyond_memory(capsys):
    assert run("bench", "--problem", "1000000000,1000,1000,4", "--beside", "none", *QUICK) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1000000000,1000,1000,4: does not fit into memory" in error


def test_import_leaves_other_libraries_alone():
    code = (
        "import sys, fastbptt, fastbptt.cli\n"
        "print([name for name in ('torch', 'jax', 'matplotlib') if name in sys.modules])\n"
        "print('fastbptt.bench.numpy_step' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert output.stdout == "[]\nFalse\n"


def test_the_table_of_problems():
    assert suites() == ["small", "medium", "large", "deepbench"]
    problems = read_problems()
    for suite in suites():
        assert {p.kind for p in problems if p.suite == suite} == {"rnn", "lstm", "gru"}
    assert len(set(problems)) == len(problems)
    assert {p.cell for p in length_suite()} == {"rnn_tanh", "lstm", "gru"}


def test_fresh_process():
    with FreshProcess(thread_environment(3)) as process:
        assert process.call(os.getenv, "OMP_NUM_THREADS") == "3"
        assert process.call(_threads_of_the_library) == 3
        with pytest.raises(ProcessError, match="JSONDecodeError: Expecting value") as raised:
            process.call(json.loads, "")
        assert raised.value.kind == "JSONDecodeError"
        assert process.call(math.sqrt, 4.0) == 2.0
        with pytest.raises(ProcessError, match="ended with status 7"):
            process.call(os._exit, 7)
    assert os.environ.get("OMP_NUM_THREADS") != "3"


def _threads_of_the_library() -> int:
    import fastbptt

    return fastbptt.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory starts anew on Linux alone")
def test_peak_memory_sees_the_tape():
    # y and the five numbers that the tape holds a step, row and unit; not the input.
    peak = peak_memory("fastbptt", Problem("", "lstm", 400, 32, 16, 64))
    tape = 400 * 32 * 64 * 6 * 4
    assert tape <= peak <= 1.6 * tape


def test_every_library_is_known():
    assert libraries.LIBRARIES == ("fastbptt", "numpy", "torch", "jax")
    assert libraries.installed("numpy")
    assert libraries.version("numpy") == np.__version__
