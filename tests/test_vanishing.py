"""benchmarks/vanishing.py in seconds: it trains, resumes, and writes its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb
from conftest import require

require("matplotlib")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def vanishing(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vanishing

    return vanishing


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results"


def test_it_trains_resumes_and_reports(vanishing, folder, tmp_path, capsys):
    quick = ["--quick", "--folder", str(folder)]
    names = [run.name for run in vanishing.quick_configs()]
    vanishing.main([*quick, "--run", names[0]])
    vanishing.main([*quick, "--list"])
    assert capsys.readouterr().out.split()[-len(names) + 1 :] == names[1:]
    first = (folder / f"{names[0]}.json").stat().st_mtime_ns
    vanishing.main(quick)
    assert (folder / f"{names[0]}.json").stat().st_mtime_ns == first
    said = capsys.readouterr().out
    assert said.count("learnt after") == len(names) - 1
    outcomes = {n: json.loads((folder / f"{n}.json").read_text()) for n in names}
    for outcome in outcomes.values():
        assert np.isfinite(outcome["curve"]).all()
        assert outcome["updates"] <= 300
    # The gated cell is well on its way, and what is tested is the model that was saved.
    gated = outcomes["adding-12-GRU-default-0"]
    assert gated["test"]["loss"] < 0.5 * gated["without_memory"]
    model = fb.load(folder / "adding-12-GRU-default-0.safetensors")
    task = vanishing.Adding(12)
    again = task.test(model, *task.draw(np.random.default_rng(2), vanishing.TEST_ROWS))
    assert again["loss"] == pytest.approx(gated["test"]["loss"], rel=1e-5)

    document = tmp_path / "docs.md"
    tables = ("lengths", "starts", "clipping", "copy", "long", "flows")
    document.write_text("\n".join(f"{t}\n<!-- {t} -->\nold\n<!-- end -->" for t in tables))
    vanishing.main([*quick, "--report", "--document", str(document)])
    text = document.read_text()
    assert "old" not in text
    assert text.count("\n| 12 | GRU |") == 3
    for picture in ("vanishing-flow.png", "vanishing-curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    document.write_text("no place for a table")
    with pytest.raises(ValueError, match="lengths"):
        vanishing.main([*quick, "--report", "--document", str(document)])


def test_the_adding_problem_is_what_it_says(vanishing):
    task = vanishing.Adding(30)
    x, target = task.draw(np.random.default_rng(0), 4000)
    marks = x[..., 1]
    assert set(np.unique(marks)) == {0.0, 1.0}
    assert (marks.sum(axis=0) == 2).all()
    np.testing.assert_allclose(target[:, 0], (x[..., 0] * marks).sum(axis=0), rtol=1e-6)
    assert abs(np.square(target - 1).mean() - task.without_memory) < 0.01
    assert (marks.mean(axis=1) > 0.04).all()  # no step is left out


def test_the_copy_task_is_what_it_says(vanishing):
    task = vanishing.Copying(30)
    x, target = task.draw(np.random.default_rng(0), 50)
    assert x.shape == (50, 50, 10)
    classes = x.argmax(axis=2)
    np.testing.assert_array_equal(classes[:10], target[-10:])
    assert set(np.unique(target[-10:])) == set(range(1, 9))
    assert not target[:-10].any()
    assert (classes[39] == 9).all()
    assert not np.delete(classes[10:], 29, axis=0).any()
    # The best without memory: sure of the blanks, even over the eight symbols.
    logits = np.full((50, 50, 10), -100.0)
    logits[:-10, :, 0] = 0
    logits[-10:, :, 1:9] = 0
    loss = np.log(np.exp(logits).sum(2)) - np.take_along_axis(logits, target[..., None], 2)[..., 0]
    assert loss.mean() == pytest.approx(task.without_memory)


def test_every_run_has_a_name_of_its_own(vanishing):
    runs = vanishing.configs(3)
    assert len({run.name for run in runs}) == len(runs)
    assert len({run for run in runs if run.decay}) == 2
