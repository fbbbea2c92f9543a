"""The verbs of the core over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastbptt._core import Verbs


class Run(NamedTuple):
    """What a run through time is, beside its tensors."""

    cell: str
    bias: bool
    batch_first: bool = False
    directions: int = 1
    projected: bool = False  # an LSTM with proj_size
    # Under autocast the dtype of h from step to step, "bfloat16" or "float32": x, state and weights
    # may then be of either. Else empty, and all tensors are of one dtype.
    autocast: str = ""

    @property
    def a_layer(self) -> int:
        """Weights of a layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr, as far as there are."""
        return 2 + 2 * self.bias + self.projected

    def dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of y and the last h."""
        return getattr(torch, self.autocast) if self.autocast else x.dtype

    def dtype_of_c(self, x: Tensor, c: Tensor | None) -> torch.dtype:
        """Return the dtype of the last c; autocast of a projected LSTM rounds h alone."""
        return (x if c is None else c).dtype if self.projected else self.dtype(x)

    def layers(self, weights: Sequence[Any]) -> int:
        """Return how many layers, or layers times directions, these are the weights of."""
        return len(weights) // self.a_layer

    def hidden_size(self, weights: Sequence[Tensor]) -> int:
        """Return H, the values of c."""
        return int(weights[self.a_layer - 1 if self.projected else 1].shape[1])


@cache
def verbs(run: Run) -> Verbs:
    """Return the verbs of the core for this run."""
    return Verbs(Tensor, Parameter, *run)


def sizes(run: Run, x: Tensor, batch_sizes: Tensor | None = None) -> tuple[int, int]:
    """Return T and B."""
    if batch_sizes is not None:
        return batch_sizes.shape[0], int(batch_sizes[0])
    T, B = x.shape[:2]
    return (B, T) if run.batch_first else (T, B)


def tape_size(run: Run, x: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the elements of a tape; the sizes of x may be symbols. Not of packed sequences."""
    T, B = sizes(run, x)
    w_ih, w_hh = weights[0], weights[1]
    proj_size = int(w_hh.shape[1]) if run.projected else 0
    D, L, core = run.directions, run.layers(weights) // run.directions, verbs(run)
    stack = int(w_ih.shape[1]), run.hidden_size(weights)
    # Of a step and row, the values of a layer in one direction; and all, with y between the layers.
    of_layer = core.tape_size(1, 1, *stack, 1, proj_size) // D
    between = core.tape_size(1, 1, *stack, L, proj_size) - L * D * of_layer
    if run.dtype(x) != torch.bfloat16:
        return T * B * (L * D * of_layer + between)
    # Two values in the place of one float32; each part begins with one of its own.
    of_y = between // max(L - 1, 1)
    return L * D * ((T * B * of_layer + 1) // 2) + (L - 1) * ((T * B * of_y + 1) // 2)


def tape_dtype(run: Run, x: Tensor) -> torch.dtype:
    """Return the dtype of a tape: of bfloat16 two values lie in each float32."""
    return torch.float32 if run.dtype(x) == torch.bfloat16 else run.dtype(x)
