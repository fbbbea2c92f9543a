"""RNN, LSTM and GRU: `torch.nn`'s classes with a forward of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt.torch._dropout import with_dropout
from fastbptt.torch._eligible import eligible, split_state, under_autocast
from fastbptt.torch._leaf import as_leaf
from fastbptt.torch._ops import recurrent
from fastbptt.torch._unseen import unseen
from fastbptt.torch._verbs import Run

_CELLS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class _Layers(torch.nn.RNNBase):
    """The forward of all three."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run through time, as the forward of the class in `torch.nn` does.

        Parameters
        ----------
        input : Tensor or PackedSequence
            `[T, B, I]`, or `[B, T, I]` with `batch_first`, or `[T, I]` without a batch.
        hx : Tensor or tuple of Tensor, optional
            The state before the first step, `[L*D, B, H]` or `[L*D, H]`; of an LSTM a tuple
            `(h, c)`; zeros by default.

        Returns
        -------
        output : Tensor or PackedSequence
            The output h of the last layer at each step, `[T, B, D*H]`.
        hx : Tensor or tuple of Tensor
            The state after the last step.

        Raises
        ------
        ValueError, RuntimeError
            As in `torch.nn`.
        """
        # How long the parts of a packed sequence are is decided by values: no graph can hold it.
        if torch.compiler.is_compiling() and not isinstance(input, PackedSequence):
            return self._forward(input, hx)
        return self._forward_unseen(input, hx)

    def _forward(self, input: Any, hx: Any) -> Any:
        if isinstance(input, PackedSequence):
            results = self._forward_packed(input, hx)
        elif isinstance(input, Tensor):
            results = self._forward_tensor(input, hx)
        else:
            results = as_leaf(self, input, hx)
        return super().forward(input, hx) if results is None else results

    # torch.compile refuses recurrent layers unless told otherwise, and then takes each function
    # behind this for a program of its own.
    _forward_unseen = unseen(_forward)

    def _forward_tensor(self, x: Tensor, hx: Any) -> Any:
        batched = x.dim() == 3
        state = split_state(hx, self.mode == "LSTM", x.dim())
        if state is None or x.dim() not in (2, 3):
            return None
        h, c = state
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            h = None if h is None else h.unsqueeze(1)
            c = None if c is None else c.unsqueeze(1)
        results = self._run(x, h, c, None)
        if results is None:
            return None
        y, h, c = results
        if not batched:
            y = y.squeeze(0 if self.batch_first else 1)
            h, c = h.squeeze(1), None if c is None else c.squeeze(1)
        return y, h if c is None else (h, c)

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> Any:
        if hx is not None:
            hx = self.permute_hidden(hx, packed.sorted_indices)
        state = split_state(hx, self.mode == "LSTM", 3)
        if state is None:
            return None
        results = self._run(packed.data, *state, packed.batch_sizes)
        if results is None:
            # The LSTM of `torch.nn` does not do this, and reads what memory happens to be there.
            self.check_input(packed.data, packed.batch_sizes)
            if hx is not None:
                self.check_forward_args(packed.data, hx, packed.batch_sizes)
            return None
        y, h, c = results
        _, sizes, order, back = packed
        last: Any = h if c is None else (h, c)
        last = self.permute_hidden(last, back)
        return PackedSequence(y, sizes, order, back), last

    def _run(
        self, x: Tensor, h: Tensor | None, c: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return y, h and c; None if this is for the original class."""
        parameters: Any = self._parameters
        # A parametrised weight is a property, and not among the parameters.
        weights: list[Any] = [
            parameters[name] if name in parameters else getattr(self, name, None)
            for name in self._flat_weights_names
        ]
        directions = 2 if self.bidirectional else 1
        batch_first = self.batch_first and batch_sizes is None
        projected = self.proj_size > 0
        run = Run(_CELLS[self.mode], self.bias, batch_first, directions, projected)
        run = under_autocast(run, x, h, rounds_h=self.mode == "LSTM" and batch_sizes is None)
        if not eligible(run, x, h, c, weights, batch_sizes):
            return None
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        if dropout == 0.0:
            return recurrent(run, x, h, c, weights, batch_sizes)
        return with_dropout(run, x, h, c, weights, batch_sizes, dropout)


class RNN(_Layers, torch.nn.RNN):
    """`torch.nn.RNN` over this library's kernels (Elman 1990).

    `h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`, or relu.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.RNN`: `input_size, hidden_size, num_layers=1, nonlinearity="tanh",
        bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None`.

    Raises
    ------
    ValueError, TypeError
        As in `torch.nn`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> layer = fastbptt.torch.RNN(3, 4, nonlinearity="relu")
    >>> y, h = layer(torch.ones(10, 2, 3))
    >>> y.shape, h.shape
    (torch.Size([10, 2, 4]), torch.Size([1, 2, 4]))
    """


class LSTM(_Layers, torch.nn.LSTM):
    """`torch.nn.LSTM` over this library's kernels (Hochreiter & Schmidhuber 1997, Gers 2000).

    `c_t = f*c_{t-1} + i*g`, `h_t = o*tanh(c_t)`, with `proj_size` `h_t = W_hr (o*tanh(c_t))` (Sak
    2014).

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.LSTM`: `input_size, hidden_size, num_layers=1, bias=True,
        batch_first=False, dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None`.

    Raises
    ------
    ValueError, TypeError
        As in `torch.nn`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> layer = fastbptt.torch.LSTM(3, 4, bidirectional=True)
    >>> y, (h, c) = layer(torch.ones(10, 2, 3))
    >>> y.shape, h.shape, c.shape
    (torch.Size([10, 2, 8]), torch.Size([2, 2, 4]), torch.Size([2, 2, 4]))
    """


class GRU(_Layers, torch.nn.GRU):
    """`torch.nn.GRU` over this library's kernels (Cho 2014).

    `n = tanh(W_in x_t + b_in + r*(W_hn h_{t-1} + b_hn))`, `h_t = (1-z)*n + z*h_{t-1}`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.GRU`: `input_size, hidden_size, num_layers=1, bias=True,
        batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None`.

    Raises
    ------
    ValueError, TypeError
        As in `torch.nn`.

    Examples
    --------
    >>> import torch
    >>> import fastbptt.torch
    >>> layer = fastbptt.torch.GRU(3, 4, batch_first=True)
    >>> y, h = layer(torch.ones(2, 10, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 10, 4]), torch.Size([1, 2, 4]))
    """
