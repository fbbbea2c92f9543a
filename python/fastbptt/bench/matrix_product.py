"""The machine's own rate, by which a recurrent step is judged: a large matrix product."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbptt.bench.libraries import installed

SIZE = 1024
OPERATIONS = 2 * SIZE**3


def matrix_products(dtype: str, threads: int) -> dict[str, Callable[[], object]]:
    """Return the product of two `[SIZE, SIZE]` matrices by each BLAS that is here."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, SIZE, SIZE)).astype(dtype)
    out = np.empty_like(a)
    products: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    if installed("torch"):
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(threads)
        left, right, result = (torch.from_numpy(array) for array in (a, b, out))
        products["torch"] = lambda: torch.mm(left, right, out=result)
    return products
