"""Gradients that can be differentiated again: the run once more, step by step, in torch's cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbptt.torch._verbs import Run, sizes


def differentiable_gradients(
    run: Run,
    batch_sizes: Tensor | None,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of x, h, c and the weights as functions of them and of `grads`.

    Slow: one torch operation after the other, for what the core cannot do. What is bfloat16 is
    widened to float32 for it, and h is not rounded from step to step.
    """
    # With grad, which is off where nobody differentiates again.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Views of their own, or an input that was made from another would have its gradient twice.
        views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
        wide = [t if t is None or t.dtype == torch.float64 else t.float() for t in views]
        results: tuple[Any, ...] = _forward(run, batch_sizes, *wide)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    if not used:
        return [None] * len(views)
    found = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad.to(result.dtype) for result, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needed]


def _forward(
    run: Run,
    batch_sizes: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    T, B = sizes(run, x, batch_sizes)
    if batch_sizes is not None:
        steps = list(torch.split(x, batch_sizes.tolist()))
    else:
        steps = list(x.unbind(1 if run.batch_first else 0))
    last_h, last_c = [], []
    for layer in range(run.layers(weights) // run.directions):
        outputs = []
        for k in range(layer * run.directions, (layer + 1) * run.directions):
            own = weights[k * run.a_layer : (k + 1) * run.a_layer]
            h_k = x.new_zeros(B, own[1].shape[1]) if h is None else h[k]
            c_k = x.new_zeros(B, run.hidden_size(weights)) if c is None else c[k]
            results = list(steps)
            for t in range(T) if k % run.directions == 0 else range(T - 1, -1, -1):
                n = len(steps[t])
                results[t], new_c = _step(run, steps[t], h_k[:n], c_k[:n], own)
                h_k, c_k = torch.cat([results[t], h_k[n:]]), torch.cat([new_c, c_k[n:]])
            outputs.append(results)
            last_h.append(h_k)
            last_c.append(c_k)
        steps = [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
    y = torch.cat(steps) if batch_sizes is not None else torch.stack(steps, int(run.batch_first))
    return y, torch.stack(last_h), torch.stack(last_c) if run.cell == "lstm" else None


def _step(
    run: Run, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    if run.projected:
        return _projected_step(x, h, c, *weights)
    if run.cell == "lstm":
        return torch.lstm_cell(x, (h, c), *weights)
    if run.cell == "gru":
        return torch.gru_cell(x, h, *weights), c
    if run.cell == "rnn_relu":
        return torch.rnn_relu_cell(x, h, *weights), c
    return torch.rnn_tanh_cell(x, h, *weights), c


def _projected_step(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Step of an LSTM with `proj_size`; `torch.lstm_cell` has none."""
    *biases, w_hr = rest
    b_ih, b_hh = biases or (None, None)
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return linear(torch.sigmoid(o) * torch.tanh(c), w_hr), c
