"""Both directions, and dropout between layers, out of runs of one layer in one direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from fastbptt.torch._ops import recurrent
from fastbptt.torch._verbs import Run


def composed(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, h and c of the whole stack, as one run of it would.

    Between the layers time comes first, as in `torch.nn`: so the same seed drops the same values.
    """
    if run.batch_first:
        x = x.transpose(0, 1)
    count = directions * (4 if run.bias else 2)
    layers = [weights[i : i + count] for i in range(0, len(weights), count)]
    last_h, last_c = [], []
    for number, layer in enumerate(layers):
        if number and dropout:
            x = drop(x, dropout, True)
        outputs = []
        for direction in range(directions):
            own = slice(direction * count // directions, (direction + 1) * count // directions)
            k = number * directions + direction
            y, h_k, c_k = recurrent(
                run._replace(batch_first=False, reversed=direction == 1),
                x,
                None if h is None else h[k : k + 1],
                None if c is None else c[k : k + 1],
                layer[own],
            )
            outputs.append(y)
            last_h.append(h_k)
            last_c += [] if c_k is None else [c_k]
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    y = x.transpose(0, 1) if run.batch_first else x
    return y, torch.cat(last_h), torch.cat(last_c) if last_c else None
