"""What `torch.utils.flop_counter` counts of the operators: their matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastbptt.torch import _ops as _ops  # which makes the operators
from fastbptt.torch._verbs import Run

Shape = Sequence[int]
_OPERATORS = torch.ops.fastbptt


def _of_weights(x: Shape, weights: Sequence[Shape]) -> int:
    """Multiplications and additions of every step and row with these weights, once."""
    return 2 * x[0] * x[1] * sum(prod(weight) for weight in weights if len(weight) == 2)


@register_flop_formula([_OPERATORS.advance, _OPERATORS.record])
def _forward(x: Shape, h: Any, c: Any, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _of_weights(x, weights)


@register_flop_formula(_OPERATORS.reverse)
def _backward(x: Shape, h: Any, c: Any, weights: Sequence[Shape], *others: Any, **_: Any) -> int:
    *how, need_x, _need_state, need_weights = others[-9:]
    run = Run(*how)
    needed = [weight for weight, need in zip(weights, need_weights, strict=True) if need]
    of_x = weights[: run.directions * run.a_layer : run.a_layer]
    through = _of_weights(x, weights) - (0 if need_x else _of_weights(x, of_x))
    return through + _of_weights(x, needed)
