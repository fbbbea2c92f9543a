"""The training step of `torch.nn`, through autograd."""

from __future__ import annotations

import importlib
from typing import Any

from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_data, make_layer


class TorchStep:
    """`torch.nn.RNN`, `LSTM` or `GRU`, and `torch.autograd.grad`.

    As `precision`, "medium" is that of `torch.set_float32_matmul_precision`; in "bfloat16" are
    weights, input and results; with "autocast" what autocast puts into it. "accelerated-" before
    one of them: in the layer of `fastbptt.torch`.
    """

    def __init__(self, problem: Problem, dtype: str, threads: int, precision: str = "") -> None:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(threads)
        options = {"nonlinearity": problem.nonlinearity} if problem.nonlinearity else {}
        accelerated, _, precision = precision.rpartition("-")
        classes = importlib.import_module("fastbptt.torch") if accelerated else torch.nn
        kind = getattr(classes, problem.kind.upper())
        inner = getattr(torch, "bfloat16" if precision == "bfloat16" else dtype)
        self.layer = kind(problem.I, problem.H, dtype=inner, **options)
        weights = make_layer(problem, dtype).weights
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
        x, grad_y = make_data(problem, dtype)
        self.x = torch.from_numpy(x).to(inner).requires_grad_()
        # What comes back has the dtype of y, which autocast chooses.
        grads = torch.from_numpy(grad_y)
        self.grad_y = {kind: grads.to(kind) for kind in {inner, grads.dtype, torch.bfloat16}}
        self.inputs = [self.x, *self.layer.parameters()]
        self.torch = torch
        self.precision = precision

    def run(self) -> list[Array]:
        """See `TrainingStep`."""
        torch = self.torch
        before = torch.get_float32_matmul_precision()
        if self.precision == "medium":
            torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast"):
                y, _ = self.layer(self.x)
            grads = torch.autograd.grad(y, self.inputs, self.grad_y[y.dtype])
        finally:
            torch.set_float32_matmul_precision(before)
        results = [a.detach() for a in (y, *grads)]
        return [(a.view(torch.uint16) if a.dtype == torch.bfloat16 else a).numpy() for a in results]
