"""Swap the recurrent layers of a model in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from fastbptt.torch._cells import GRUCell, LSTMCell, RNNCell
from fastbptt.torch._layers import GRU, LSTM, RNN

_SWAPS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}


class Accelerated(NamedTuple):
    """What `accelerate` did.

    Attributes
    ----------
    swapped : list of str
        Names of the layers that are now this library's.
    left_alone : dict
        The names of the other recurrent layers, and why each stayed as it was.
    """

    swapped: list[str]
    left_alone: dict[str, str]


def accelerate(model: torch.nn.Module) -> Accelerated:
    """Make every recurrent layer of a model, or the model itself, one of this library's, in place.

    A layer stays the same object, with the same parameters, hooks, buffers and modes: only its
    class changes. `state_dict`, optimisers and references stay good.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, in float32, float64 or bfloat16; parts that are not are left alone.

    Returns
    -------
    Accelerated
        The names of the layers that were swapped, and of those that were not, with the reason.
        A layer that is this library's already is among neither.

    Raises
    ------
    TypeError
        It is not a module.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> model = torch.nn.Sequential(torch.nn.GRUCell(3, 4), torch.nn.LSTM(4, 5).half())
    >>> fastbptt.torch.accelerate(model)
    Accelerated(swapped=['0'], left_alone={'1': 'weight_ih_l0 is torch.float16'})
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    result = Accelerated([], {})
    for name, module in model.named_modules():
        if not _is_recurrent(module) or type(module) in _SWAPS.values():
            continue
        if reason := _reason_against(module):
            result.left_alone[name] = reason
        else:
            module.__class__ = _SWAPS[type(module)]
            result.swapped.append(name)
    return result


def _is_recurrent(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in {kind.__name__ for kind in _SWAPS}
    return isinstance(module, (RNNBase, RNNCellBase))


def _reason_against(module: torch.nn.Module) -> str:
    """Return why a layer has to stay as it is, or an empty string."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if type(module) not in _SWAPS:
        return f"it is a {type(module).__qualname__}, a class with code of its own"
    if "forward" in vars(module):
        return "its forward is replaced"
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            return f"{name} is on device {parameter.device}"
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            return f"{name} is {parameter.dtype}"
    return ""
