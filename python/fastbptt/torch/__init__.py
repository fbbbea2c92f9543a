"""Recurrent layers for PyTorch on the CPU: `torch.nn`'s own classes over this library's kernels.

Each class here is a subclass of the one of the same name in `torch.nn`: signature, parameters,
`state_dict`, initialisation, text and errors are that class's own; only the arithmetic is done
elsewhere, in float32, float64, bfloat16, and under autocast to bfloat16. What the kernels do not
take goes to the original `forward`: another device or dtype, `torch.func` transforms.

Importing `fastbptt` does not import torch; importing this module does.

Examples
--------
>>> import torch
>>> import fastbptt.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5))
>>> fastbptt.torch.accelerate(model)
Accelerated(swapped=['1'], left_alone={})
>>> y, (h, c) = model(torch.ones(10, 2, 3))
>>> y.sum().backward()
>>> model[1].weight_ih_l0.grad.shape
torch.Size([20, 4])
"""

from fastbptt.torch import _flops as _flops
from fastbptt.torch._accelerate import Accelerated, accelerate
from fastbptt.torch._cells import GRUCell, LSTMCell, RNNCell
from fastbptt.torch._layers import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Accelerated",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "accelerate",
]

# Pickled modules name the place where users find the class.
for _class in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell):
    _class.__module__ = __name__
del _class
