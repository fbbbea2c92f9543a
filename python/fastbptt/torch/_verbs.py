"""The verbs of the core over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

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

    @property
    def a_layer(self) -> int:
        """Weights of a layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr, as far as there are."""
        return 2 + 2 * self.bias + self.projected

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
    layers = run.layers(weights) // run.directions
    stack = int(w_ih.shape[1]), run.hidden_size(weights), layers, proj_size
    return T * B * verbs(run).tape_size(1, 1, *stack)
