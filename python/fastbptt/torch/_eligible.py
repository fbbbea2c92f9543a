"""What goes to the core, and what to the original class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastbptt.torch import _verbs
from fastbptt.torch._ops import is_traced
from fastbptt.torch._verbs import Run


def eligible(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
) -> bool:
    """Whether the core takes these tensors, here and now.

    What it does not take goes to the original class, which runs it or raises its own error.
    """
    if torch.is_autocast_enabled("cpu"):
        return False
    # torch.func, forward mode and torch.jit see through the original alone.
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    traced = is_traced()
    for tensor in (x, *weights, *(state for state in (h, c) if state is not None)):
        kind = type(tensor)
        # Another class may have no memory of its own; operators cope with that.
        if (
            kind is not Tensor
            and kind is not Parameter
            and not (traced and isinstance(tensor, Tensor))
        ):
            return False
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
    if run.batch_sizes is not None and traced:
        return False
    return not _verbs.check(run, x, h, c, weights)


def split_state(hx: Any, is_lstm: bool, dim: int) -> tuple[Tensor | None, Tensor | None] | None:
    """Return h and c as the caller gave them; None if they are not tensors of so many axes."""
    if hx is None:
        return None, None
    parts = tuple(hx) if is_lstm and isinstance(hx, (tuple, list)) else (hx,)
    if len(parts) != (2 if is_lstm else 1):
        return None
    if not all(isinstance(part, Tensor) and part.dim() == dim for part in parts):
        return None
    return parts[0], parts[1] if is_lstm else None
