"""Dropout between layers, with torch's own random numbers: layer after layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from fastbptt.torch._ops import recurrent
from fastbptt.torch._verbs import Run


def with_dropout(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, h and c of the whole stack, as one run of it would.

    Between the layers time comes first, as in `torch.nn`: so the same seed drops the same values.
    """
    if run.batch_first:
        x = x.transpose(0, 1)
    D = run.directions
    count = D * run.a_layer
    last_h, last_c = [], []
    for number in range(len(weights) // count):
        if number:
            x = drop(x, dropout, True)
        own = slice(number * D, (number + 1) * D)
        x, h_l, c_l = recurrent(
            run._replace(batch_first=False),
            x,
            None if h is None else h[own],
            None if c is None else c[own],
            weights[number * count : (number + 1) * count],
            batch_sizes,
        )
        last_h.append(h_l)
        last_c += [] if c_l is None else [c_l]
    y = x.transpose(0, 1) if run.batch_first else x
    return y, torch.cat(last_h), torch.cat(last_c) if last_c else None
