"""The libraries that can run a training step, and whether their results agree."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import numpy as np

from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, TrainingStep, widened

# Where the step of each is; a module is imported when its library is asked for.
_STEPS = {
    "fastbptt": ("fastbptt.bench.fastbptt_step", "FastbpttStep"),
    "numpy": ("fastbptt.bench.numpy_step", "NumpyStep"),
    "torch": ("fastbptt.bench.torch_step", "TorchStep"),
    "jax": ("fastbptt.bench.jax_step", "JaxStep"),
}
LIBRARIES = tuple(_STEPS)
# The same steps at other precisions than float32's own, as "library:precision": of the matrix
# products alone, in all that a library does, or where torch's autocast has it; accelerated: by
# `fastbptt.torch`.
PRECISIONS = (
    "fastbptt:high",
    "fastbptt:medium",
    "torch:medium",
    "torch:bfloat16",
    "torch:autocast",
    "torch:accelerated-bfloat16",
    "torch:accelerated-autocast",
)
# In norm, relative to the result in float64.
TOLERANCES = {"float32": 1e-3, "float64": 1e-8}
# Eight bits, and what a recurrent network makes of their errors over hundreds of steps.
ROUGH = 0.3
# At the kink of the relu a rounding error decides whether the error of that one unit and step
# passes; a thousand units lose 2e-3 of their gradient by one of them.
_KINK = 10


class WrongResultError(Exception):
    """A library's result is not that of the others; it is not timed."""


def installed(library: str) -> bool:
    """Whether the library can be imported here; it is not."""
    return importlib.util.find_spec(library) is not None


def version(library: str) -> str:
    """Return the version that is installed."""
    return importlib.metadata.version(library)


def make_step(library: str, problem: Problem, dtype: str, threads: int) -> TrainingStep:
    """Return the step of `library`, with its weights and data in place."""
    library, _, precision = library.partition(":")
    module, name = _STEPS[library]
    options = {"precision": precision} if precision else {}
    step: TrainingStep = getattr(importlib.import_module(module), name)(
        problem, dtype, threads, **options
    )
    return step


def exact(problem: Problem, threads: int) -> list[Array]:
    """Return what every library has to give: the results of this one in float64."""
    return make_step("fastbptt", problem, "float64", threads).run()


def check_same(
    library: str, problem: Problem, got: list[Array], wanted: list[Array], dtype: str
) -> None:
    """Raise `WrongResultError` unless each array is near the wanted one, in norm."""
    names = ("y", "grad_x", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    precision = library.partition(":")[2]
    tolerance = ROUGH if precision not in ("", "high") else TOLERANCES[dtype]
    tolerance *= _KINK if problem.nonlinearity == "relu" else 1
    for name, a, b in zip(names, widened(got), wanted, strict=True):
        if a.shape != b.shape or a.dtype != dtype:
            raise WrongResultError(
                f"{library}: {name}: got {a.dtype} {a.shape}, wanted {dtype} {b.shape}"
            )
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(dtype).tiny)
        if not error <= tolerance:
            raise WrongResultError(
                f"{library}: {name} is off by {error:.1e}, more than {tolerance:g}"
            )
