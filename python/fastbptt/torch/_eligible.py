"""What goes to the core, and what to the original class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbptt.torch._ops import is_traced
from fastbptt.torch._verbs import Run, sizes, verbs

MIXED = torch.float32, torch.bfloat16  # what autocast puts beside each other


def under_autocast(run: Run, x: Tensor, h: Tensor | None, rounds_h: bool = False) -> Run:
    """Return the run as torch's autocast to bfloat16 would have it, where that is on.

    The RNN, the projection and oneDNN's LSTM (`rounds_h`) give h in bfloat16; elsewhere h has the
    dtype of the state before it.
    """
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return run
    rounds_h = rounds_h or run.projected or run.cell.startswith("rnn")
    wide = not rounds_h and (x if h is None else h).dtype == torch.float32
    return run._replace(autocast="float32" if wide else "bfloat16")


def eligible(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Any],
    batch_sizes: Tensor | None = None,
) -> bool:
    """Whether the core takes these tensors, here and now.

    What it does not take goes to the original class, which runs it or raises its own error.
    """
    if torch.is_autocast_enabled("cpu") and not run.autocast:
        return False
    # torch.func, forward mode and torch.jit see through the original alone.
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    if is_traced():
        return batch_sizes is None and _looks_right(run, x, h, c, weights)
    return not verbs(run).problem(x, h, c, weights, batch_sizes)


def _looks_right(
    run: Run, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Any]
) -> bool:
    """Whether the core would take tensors whose memory is elsewhere, and sizes maybe symbols."""
    taken = MIXED if run.autocast else (x.dtype,)
    if x.dtype not in (*MIXED, torch.float64) or x.dim() != 3 or x.numel() == 0:
        return False
    for tensor in (x, *weights, *(state for state in (h, c) if state is not None)):
        if not (
            isinstance(tensor, Tensor)
            and tensor.dtype in taken
            and tensor.is_cpu
            and tensor.layout is torch.strided
        ):
            return False
    if x.shape[2] != weights[0].shape[1]:
        return False
    layers, (_, B) = run.layers(weights), sizes(run, x)
    return (h is None or h.shape == (layers, B, weights[1].shape[1])) and (
        c is None or c.shape == (layers, B, run.hidden_size(weights))
    )


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
