"""A run through time as autograd and the compiler see it.

Twice the same: an `autograd.Function` for plain tensors, and operators with fake kernels for what
traces the program, such as `torch.compile`. The dispatcher takes a tenth of a millisecond for an
operator written in Python, as long as a whole training step of a small layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbptt.torch._steps import differentiable_gradients
from fastbptt.torch._verbs import Run, tape_dtype, tape_size, verbs


def recurrent(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y and the last h and c of tensors that `eligible` has seen."""
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad
        or any(weight.requires_grad for weight in weights)
        or (h is not None and h.requires_grad)
        or (c is not None and c.requires_grad)
    )
    if is_traced():
        if needs_grad:
            y, last_h, last_c, _ = record(x, h, c, list(weights), *run)
        else:
            y, last_h, last_c = advance(x, h, c, list(weights), *run)
        return y, last_h, last_c if run.cell == "lstm" else None
    if needs_grad:
        return _apply(run, batch_sizes, x, h, c, *weights)
    return _forward(run, x, h, c, weights, batch_sizes, keep=False)[:3]


def is_traced() -> bool:
    """Whether operators are looked at by something that cannot look into the core."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _forward(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    threads = torch.get_num_threads()
    return verbs(run).forward(x, h, c, weights, batch_sizes, keep, threads)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        batch_sizes: Tensor | None,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, last_h, last_c, tape = _forward(run, x, h, c, weights, batch_sizes, keep=True)
        ctx.run = run
        ctx.batch_sizes = batch_sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, y, tape, *weights)
        return y, last_h, last_c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        run, batch_sizes, needed = ctx.run, ctx.batch_sizes, ctx.needs_input_grad[2:]
        x, h, c, y, tape, *weights = ctx.saved_tensors
        core = verbs(run)
        # With create_graph, or where one gradient stands for many (is_grads_batched).
        if torch.is_grad_enabled() or not core.can_read(grads):
            inputs = (x, h, c, *weights)
            found = differentiable_gradients(run, batch_sizes, inputs, needed, grads)
            return None, None, *found
        threads, (grad_y, grad_h, grad_c) = torch.get_num_threads(), grads
        return (
            None,
            None,
            *core.backward(
                x, h, c, weights, batch_sizes, y, tape, grad_y, grad_h, grad_c, needed, threads
            ),
        )


# `Function.apply` without its work for torch.func, whose tensors `eligible` keeps out: dead ones
# too, as they have no memory to read.
_apply: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
_apply = super(torch.autograd.Function, _Recurrent).apply


def _or_empty(last_c: Tensor | None, run: Run, x: Tensor, c: Tensor | None) -> Tensor:
    return x.new_empty(0, dtype=run.dtype_of_c(x, c)) if last_c is None else last_c


@torch.library.custom_op("fastbptt::advance", mutates_args=(), device_types="cpu")
def advance(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the last h and c; of other cells than the LSTM, c is empty."""
    run = Run(cell, bias, batch_first, directions, projected, autocast)
    y, last_h, last_c, _ = _forward(run, x, h, c, weights, None, keep=False)
    return y, last_h, _or_empty(last_c, run, x, c)


@torch.library.custom_op("fastbptt::record", mutates_args=(), device_types="cpu")
def record(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `advance` does, and the tape."""
    run = Run(cell, bias, batch_first, directions, projected, autocast)
    y, last_h, last_c, tape = _forward(run, x, h, c, weights, None, keep=True)
    assert tape is not None
    return y, last_h, _or_empty(last_c, run, x, c), tape


@torch.library.custom_op("fastbptt::reverse", mutates_args=(), device_types="cpu")
def reverse(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    tape: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
    need_x: bool,
    need_state: bool,
    need_weights: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of x, h, c and the weights; empty ones where not needed."""
    run = Run(cell, bias, batch_first, directions, projected, autocast)
    needed = need_x, need_state, need_state, *need_weights
    threads = torch.get_num_threads()
    found = verbs(run).backward(
        x, h, c, weights, None, y, tape, grad_y, grad_h, grad_c, needed, threads
    )
    wanted = _wanted(h, c, need_x, need_state, need_weights)
    return [
        grad if grad is not None and need else _no_gradient(x, tensor)
        for grad, need, tensor in zip(found, wanted, (x, h, c, *weights), strict=True)
    ]


def _no_gradient(x: Tensor, tensor: Tensor | None) -> Tensor:
    return (x if tensor is None else tensor).new_empty(0)


def _wanted(
    h: Tensor | None, c: Tensor | None, need_x: bool, need_state: bool, need_weights: Sequence[bool]
) -> list[bool]:
    return [need_x, need_state and h is not None, need_state and c is not None, *need_weights]


@advance.register_fake
def _(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = Run(cell, bias, batch_first, directions, projected, autocast)
    L, B, R = run.layers(weights), x.shape[0 if batch_first else 1], weights[1].shape[1]
    of_c = (L, B, run.hidden_size(weights)) if cell == "lstm" else 0
    return (
        x.new_empty((*x.shape[:-1], directions * R), dtype=run.dtype(x)),
        x.new_empty((L, B, R), dtype=run.dtype(x)),
        x.new_empty(of_c, dtype=run.dtype_of_c(x, c)),
    )


@record.register_fake
def _(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = Run(cell, bias, batch_first, directions, projected, autocast)
    y, last_h, last_c = advance(x, h, c, weights, *run)
    tape = x.new_empty(tape_size(run, x, weights), dtype=tape_dtype(run, x))
    return y, last_h, last_c, tape


@reverse.register_fake
def _(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    tape: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    cell: str,
    bias: bool,
    batch_first: bool,
    directions: int,
    projected: bool,
    autocast: str,
    need_x: bool,
    need_state: bool,
    need_weights: Sequence[bool],
) -> list[Tensor]:
    wanted = _wanted(h, c, need_x, need_state, need_weights)
    return [
        tensor.new_empty(tensor.shape) if tensor is not None and need else _no_gradient(x, tensor)
        for tensor, need in zip((x, h, c, *weights), wanted, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, c, weights, *ctx.how = inputs
    y, _, _, tape = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, c, y, tape, *weights)


def _reverse(
    ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: Any
) -> Any:
    x, h, c, y, tape, *weights = ctx.saved_tensors
    need_x, need_h, need_c, need_weights, *_ = ctx.needs_input_grad
    if ctx.how[0] != "lstm":
        grad_c = None
    needs = need_x, need_h or need_c, list(need_weights)
    found = reverse(x, h, c, weights, y, tape, grad_y, grad_h, grad_c, *ctx.how, *needs)
    grads = [
        grad if need else None for grad, need in zip(found, _wanted(h, c, *needs), strict=True)
    ]
    return (*grads[:3], grads[3:], *(None for _ in ctx.how))


record.register_autograd(_reverse, setup_context=_keep)
