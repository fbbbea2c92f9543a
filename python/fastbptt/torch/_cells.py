"""RNNCell, LSTMCell and GRUCell: one step a call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from fastbptt.torch._eligible import eligible, split_state, under_autocast
from fastbptt.torch._leaf import as_leaf
from fastbptt.torch._ops import recurrent
from fastbptt.torch._verbs import Run


class _Cell(RNNCellBase):
    """The forward of all three."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Go one step, as the forward of the class in `torch.nn` does.

        Parameters
        ----------
        input : Tensor
            `[B, I]`, or `[I]` without a batch.
        hx : Tensor or tuple of Tensor, optional
            The state before, `[B, H]` or `[H]`; of an LSTM a tuple `(h, c)`; zeros by default.

        Returns
        -------
        Tensor or tuple of Tensor
            The state after.

        Raises
        ------
        ValueError, RuntimeError
            As in `torch.nn`.
        """
        step = self._step if isinstance(input, Tensor) else partial(as_leaf, self)
        results = step(input, hx)
        return super().forward(input, hx) if results is None else results

    def _cell(self) -> str | None:
        """Return the core's name of the cell; None if it has none."""
        raise NotImplementedError

    def _step(self, x: Tensor, hx: Any) -> Any:
        cell, axes = self._cell(), x.dim()
        state = split_state(hx, cell == "lstm", axes)
        if cell is None or state is None or axes not in (1, 2):
            return None
        # To the core it is a sequence of one step, and the state that of a stack of one layer.
        x, h, c = (_with_axes(tensor, 3 - axes) for tensor in (x, *state))
        weights: list[Any] = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        run = under_autocast(Run(cell, self.bias), x, h)
        if not eligible(run, x, h, c, weights):
            return None
        _, h, c = recurrent(run, x, h, c, weights)
        h, c = (_without_axes(tensor, 3 - axes) for tensor in (h, c))
        return h if c is None else (h, c)


def _with_axes(tensor: Any, count: int) -> Any:
    for _ in range(0 if tensor is None else count):
        tensor = tensor.unsqueeze(0)
    return tensor


def _without_axes(tensor: Any, count: int) -> Any:
    for _ in range(0 if tensor is None else count):
        tensor = tensor.squeeze(0)
    return tensor


class RNNCell(_Cell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` over this library's kernels; see `fastbptt.torch.RNN`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.RNNCell`: `input_size, hidden_size, bias=True, nonlinearity="tanh",
        device=None, dtype=None`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> fastbptt.torch.RNNCell(3, 4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def _cell(self) -> str | None:
        return {"tanh": "rnn_tanh", "relu": "rnn_relu"}.get(self.nonlinearity)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` over this library's kernels; see `fastbptt.torch.LSTM`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.LSTMCell`: `input_size, hidden_size, bias=True, device=None, dtype=None`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> h, c = fastbptt.torch.LSTMCell(3, 4)(torch.ones(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    def _cell(self) -> str | None:
        return "lstm"


class GRUCell(_Cell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` over this library's kernels; see `fastbptt.torch.GRU`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.GRUCell`: `input_size, hidden_size, bias=True, device=None, dtype=None`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> fastbptt.torch.GRUCell(3, 4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def _cell(self) -> str | None:
        return "gru"
