"""What all tests share: optional packages, seeded randomness, the hypothesis profile."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import hypothesis
import numpy as np
import pytest

IN_CI = os.environ.get("CI", "").lower() == "true"

hypothesis.settings.register_profile("here", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if IN_CI else "here")


def require(name: str) -> ModuleType:
    """The module `name`; without it the test is skipped, but in CI (CI=true) it fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there but cannot be imported is a fault, not a reason to skip.
        if IN_CI or error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def one_thread():
    """The calling thread alone does the work."""
    import fastbptt as fb

    before = fb.get_num_threads()
    fb.set_num_threads(1)
    yield
    fb.set_num_threads(before)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    """So many threads, at most, do the work."""
    import fastbptt as fb

    before = fb.get_num_threads()
    fb.set_num_threads(request.param)
    yield request.param
    fb.set_num_threads(before)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder of its own for the test, and the number of threads as it was."""
    import fastbptt as fb

    before = fb.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    fb.set_num_threads(before)


@pytest.fixture
def on_the_core(monkeypatch):
    """Whatever runs in `fastbptt.torch` runs on the core: torch's class could hide a fault."""
    from fastbptt.torch import _cells, _layers

    def required(*arguments):
        assert eligible(*arguments)
        return True

    eligible = _layers.eligible
    monkeypatch.setattr(_layers, "eligible", required)
    monkeypatch.setattr(_cells, "eligible", required)
