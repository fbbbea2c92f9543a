"""Every instruction set of this machine runs when it is forced, and gives the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb
from reference import KERNELS, assert_close, draw, layer_for, rounding, run_library

HERE = Path(__file__).parent
AVAILABLE = fb.cpu_info()["available"]
KNOWN = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
SIZES = [(7, 3, 5, 17, 2), (3, 1, 1, 1, 1), (5, 17, 33, 31, 1), (2, 6, 8, 64, 1)]


def problems():
    rng = np.random.default_rng(7)
    for cell in KERNELS:
        for dtype in ("float32", "float64"):
            for sizes in SIZES:
                name = f"{cell} {dtype} {'x'.join(map(str, sizes))}"
                yield name, draw(rng, cell, *sizes, dtype=dtype)


def write_results(path: str) -> None:
    """All problems' results into a file; runs in a process of its own."""
    results = {}
    for name, problem in problems():
        for key, value in run_library(problem).items():
            results[f"{name}/{key}"] = value
        # The call that keeps nothing has a path of its own.
        results[f"{name}/advance"] = layer_for(problem)(problem.x, problem.state())[0]
    np.savez(path, **results)
    print(json.dumps(fb.cpu_info()))


def python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "FASTBPTT_ISA"}
    if isa is not None:
        env["FASTBPTT_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isa")
    kept = {}

    def results(isa):
        if isa not in kept:
            path = folder / f"{isa}.npz"
            done = python(f"import test_isa; test_isa.write_results({str(path)!r})", isa)
            assert done.returncode == 0, done.stderr
            with np.load(path) as file:
                kept[isa] = (json.loads(done.stdout), dict(file))
        return kept[isa]

    return results


def test_the_best_one_runs_unless_another_is_forced():
    assert "baseline" in AVAILABLE
    done = python("import json, fastbptt as fb; print(json.dumps(fb.cpu_info()))", None)
    info = json.loads(done.stdout)
    assert info["isa"] == info["available"][0]
    assert set(info["available"]) <= set(info["built"]) <= set(KNOWN)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_the_forced_one_runs(isa, results_of):
    info, _ = results_of(isa)
    assert info["isa"] == isa
    assert info["available"] == AVAILABLE


@pytest.mark.parametrize("isa", [isa for isa in AVAILABLE if isa != "baseline"])
def test_same_results_and_gradients_as_the_baseline(isa, results_of):
    _, expected = results_of("baseline")
    _, actual = results_of(isa)
    assert set(actual) == set(expected)
    for name, problem in problems():
        prefix = f"{name}/"
        assert_close(
            {key: value for key, value in actual.items() if key.startswith(prefix)},
            {key: value for key, value in expected.items() if key.startswith(prefix)},
            2.0 * rounding(problem),
        )


@pytest.mark.parametrize("isa", [*(isa for isa in KNOWN if isa not in AVAILABLE), "sse9", "AVX2 "])
def test_one_that_is_not_there_is_refused_at_import(isa):
    done = python(
        "try:\n"
        "    import fastbptt\n"
        "except (ImportError, ValueError) as error:\n"
        "    print(error)\n"
        "else:\n"
        "    raise SystemExit('imported')\n",
        isa,
    )
    assert done.returncode == 0, done.stderr
    for wanted in ("FASTBPTT_ISA", f"'{isa}'", *AVAILABLE):
        assert wanted in done.stdout


def test_an_empty_value_forces_nothing():
    done = python("import fastbptt as fb; print(fb.cpu_info()['isa'])", "")
    assert done.stdout.strip() == AVAILABLE[0]
