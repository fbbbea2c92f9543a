"""The training step of `torch.nn`, through autograd."""

from __future__ import annotations

import importlib
from typing import Any

from fastbptt.bench.problems import Problem
from fastbptt.bench.training_step import Array, make_data, make_layer


class TorchStep:
    """`torch.nn.RNN`, `LSTM` or `GRU`, and `torch.autograd.grad`."""

    def __init__(self, problem: Problem, dtype: str, threads: int) -> None:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(threads)
        options = {"nonlinearity": problem.nonlinearity} if problem.nonlinearity else {}
        kind = getattr(torch.nn, problem.kind.upper())
        self.layer = kind(problem.I, problem.H, dtype=getattr(torch, dtype), **options)
        weights = make_layer(problem, dtype).weights
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
        x, grad_y = make_data(problem, dtype)
        self.x = torch.from_numpy(x).requires_grad_()
        self.grad_y = torch.from_numpy(grad_y)
        self.inputs = [self.x, *self.layer.parameters()]
        self.grad = torch.autograd.grad

    def run(self) -> list[Array]:
        """See `TrainingStep`."""
        y, _ = self.layer(self.x)
        grads = self.grad(y, self.inputs, self.grad_y)
        return [y.detach().numpy(), *(g.numpy() for g in grads)]
