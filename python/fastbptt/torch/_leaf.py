"""A module that the tracers of `torch.fx` do not look into, as those of `torch.nn` are to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx


def as_leaf(module: torch.nn.Module, input: Any, hx: Any) -> Any:
    """Return the node of a call of `module`; None if no tracer is at work, or it traces that."""
    if not isinstance(input, torch.fx.Proxy):
        return None
    tracer: Any = input.tracer
    if tracer.root is module:
        return None
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})
