"""Losses over a sequence, taken a segment at a time.

The readout belongs to the loss here: the two run together over blocks of rows, so that the outputs
of all steps never exist at once. Segments are scaled so that their losses add up to that of the
whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from fastbptt import _core
from fastbptt._arrays import Array, as_array, from_any
from fastbptt.model import Model
from fastbptt.source import Source, beside, is_lazy

LossFunction: TypeAlias = Callable[[Array, Any, slice], tuple[float, Array]]
Loss: TypeAlias = str | LossFunction

# Class numbers that are checked at a time, so that no array as long as the sequence is made.
_CHECKED_AT_ONCE = 1 << 11


class Objective(Protocol):
    """The loss of one sequence, readout included, ready to be taken in segments.

    Attributes
    ----------
    row_bytes : int
        What reading the target of a row of a step takes.
    in_pieces : bool
        Whether a segment may be taken in pieces, which a user's function would see.
    """

    row_bytes: int
    in_pieces: bool

    def narrow(self, begin: int, end: int) -> None:
        """Let the loss be the mean over these steps, not over all."""

    def __call__(
        self, y: Array, begin: int, end: int, grads: dict[str, Array] | None
    ) -> tuple[float, Array | None]:
        """Return what the steps `[begin, end)` add to the loss, and the gradient.

        Parameters
        ----------
        y : ndarray
            The recurrent layer's output at these steps, and at no others, `[n, B, H]`.
        begin, end : int
            Where they are in the sequence.
        grads : dict of str to ndarray or None
            Gradients of the readout's parameters, which are added to. None: the loss alone.

        Returns
        -------
        value : float
        grad_y : ndarray or None
            None if `grads` is.
        """

    def beside(
        self, y: Array, stretches: Sequence[slice], grads: dict[str, Array]
    ) -> tuple[float, Array]:
        """Return what stretches of as many steps add to the loss, and the gradient.

        Parameters
        ----------
        y : ndarray
            The output at these steps, `[n, len(stretches) * B, H]`: the rows of the first stretch,
            then those of the second, and so on.
        stretches : sequence of slice
            Where they are in the sequence.
        grads : dict of str to ndarray
            Gradients of the readout's parameters, which are added to.

        Returns
        -------
        value : float
        grad_y : ndarray
        """


def make_objective(
    loss: Loss,
    model: Model,
    target: Any,
    T: int,
    B: int,
    ignore_index: int,
    lengths: Array | None = None,
    mask: Any = None,
) -> Objective:
    """Return the loss of `T` steps of `B` rows, its target checked as a whole.

    With `lengths` `[B]` the steps behind that of a row do not count, with `mask` `[T, B]`, which a
    user knows as `loss_mask`, those where it is False.

    Raises
    ------
    ValueError
        The name of the loss, the shape of target or mask or a class is wrong, or no target counts.
    TypeError
        The loss is no name and cannot be called, or target or mask has the wrong dtype.
    """
    if isinstance(loss, str):
        if loss not in ("cross_entropy", "mse"):
            raise ValueError(f"loss: got {loss!r}, wanted 'cross_entropy', 'mse' or a callable")
        if loss == "mse":
            return _MeanSquare(model, target, T, B, lengths, mask)
        return _CrossEntropy(model, target, T, B, ignore_index, lengths, mask)
    if callable(loss):
        if mask is not None:
            raise ValueError(
                "loss_mask: got one with a callable loss, wanted None: it knows the steps itself"
            )
        return _Custom(loss, model, target, T, B, lengths)
    raise TypeError(f"loss: got {type(loss).__name__}, wanted 'cross_entropy', 'mse' or a callable")


def _width(model: Model) -> int:
    """Return the size of one output."""
    if model.readout is None:
        return model.recurrent.output_size
    return model.readout.out_features


def _leading(model: Model, T: int, B: int) -> tuple[int, int]:
    return (B, T) if model.batch_first else (T, B)


def _no_target(target: str) -> ValueError:
    return ValueError(f"target: no target counts: got {target}, wanted at least one that does")


class _Fused:
    """Readout and loss in one pass, by the core; `scale` makes the sum over segments the mean.

    With lengths only the rows that are there are given to it, one behind the other.
    """

    kind: str
    in_pieces = True
    ignore_index = 0
    scale: float
    row_bytes: int

    def __init__(
        self, model: Model, target: Source, T: int, B: int, lengths: Array | None, mask: Any
    ) -> None:
        self._dtype = model.compute_dtype
        self._weights = {} if model.readout is None else model.readout._computed_weights()
        self._target = target
        self._lengths = lengths
        self._mask: Source | None = None
        self._core_mask: Source | None = None  # where the target itself cannot say what counts
        if mask is None:
            return
        self._mask = Source("loss_mask", mask, model.batch_first)
        wanted = _leading(model, T, B)
        if self._mask.shape != wanted:
            raise ValueError(f"loss_mask: got shape {self._mask.shape}, wanted {wanted}")
        if self._mask.dtype != np.bool_:
            raise TypeError(f"loss_mask: got dtype {self._mask.dtype}, wanted bool")
        if self.kind == "mse":
            self._core_mask = self._mask

    def _cut(self, begin: int, end: int) -> Array:
        return self._target.take(begin, end)

    def __call__(
        self, y: Array, begin: int, end: int, grads: dict[str, Array] | None
    ) -> tuple[float, Array | None]:
        target = self._cut(begin, end)
        counts = None if self._core_mask is None else self._core_mask.take(begin, end)
        if self._lengths is None:
            return self._take(y, target, counts, grads)
        there = present(self._lengths, begin, end)
        if not there.any():
            return 0.0, None if grads is None else np.zeros(y.shape, self._dtype)
        counts = None if counts is None else counts[there][:, None]
        value, grad = self._take(y[there][:, None], target[there][:, None], counts, grads)
        if grad is None:
            return value, None
        whole = np.zeros(y.shape, self._dtype)
        whole[there] = grad[:, 0]
        return value, whole

    def beside(
        self, y: Array, stretches: Sequence[slice], grads: dict[str, Array]
    ) -> tuple[float, Array]:
        counts = None if self._core_mask is None else beside(self._core_mask.take, stretches)
        value, grad = self._take(y, beside(self._cut, stretches), counts, grads)
        assert grad is not None
        return value, grad

    def _take(
        self, y: Array, target: Array, counts: Array | None, grads: dict[str, Array] | None
    ) -> tuple[float, Array | None]:
        into = grads or {}
        return _core.readout_loss(
            self.kind,
            y.astype(self._dtype, copy=False),
            self._weights.get("weight"),
            self._weights.get("bias"),
            target,
            self.scale,
            self.ignore_index,
            into.get("weight"),
            into.get("bias"),
            grads is not None,
            counts,
        )


def present(lengths: Array, begin: int, end: int) -> Array:
    """Return which rows are there at the steps `[begin, end)`, `[n, B]`."""
    there: Array = np.arange(begin, end)[:, None] < lengths
    return there


class _MeanSquare(_Fused):
    """The mean of the squared differences, over the steps that count."""

    kind = "mse"

    def __init__(
        self, model: Model, target: Any, T: int, B: int, lengths: Array | None, mask: Any
    ) -> None:
        if not is_lazy(target):
            target = as_array("target", target, model.compute_dtype)
        array = Source("target", target, model.batch_first)
        wanted = (*_leading(model, T, B), _width(model))
        if array.shape != wanted:
            raise ValueError(f"target: got shape {array.shape}, wanted {wanted}")
        if array.dtype != model.compute_dtype:
            raise TypeError(f"target: got dtype {array.dtype}, wanted {model.compute_dtype}")
        size = math.prod(array.shape)
        if size == 0:
            raise _no_target(f"shape {array.shape}")
        super().__init__(model, array, T, B, lengths, mask)
        # A copy unless it lies in order.
        self.row_bytes = _width(model) * model.compute_dtype.itemsize + (0 if mask is None else 1)
        self._row_size = size // (T * B)
        self._rows = B
        if self._count(0, T) == 0:
            raise _no_target(
                "lengths that are all 0" if mask is None else "a loss_mask that is False everywhere"
            )
        self.narrow(0, T)

    def narrow(self, begin: int, end: int) -> None:
        self.scale = 1.0 / (self._row_size * max(1, self._count(begin, end)))

    def _count(self, begin: int, end: int) -> int:
        if self._mask is not None:
            return self._count_mask(self._mask, begin, end)
        if self._lengths is None:
            return self._rows * (end - begin)
        return int(np.clip(self._lengths - begin, 0, end - begin).sum())

    def _count_mask(self, mask: Source, first: int, last: int) -> int:
        count, steps = 0, max(1, _CHECKED_AT_ONCE // self._rows)
        for begin in range(first, last, steps):
            end = min(begin + steps, last)
            counts = mask.take(begin, end)
            if self._lengths is not None:
                counts = counts & present(self._lengths, begin, end)
            count += int(np.count_nonzero(counts))
        return count


class _CrossEntropy(_Fused):
    """The mean of the negative log-likelihoods of the classes that count.

    Those are not `ignore_index`, and the mask has them.
    """

    kind = "cross_entropy"

    def __init__(
        self,
        model: Model,
        target: Any,
        T: int,
        B: int,
        ignore_index: int,
        lengths: Array | None,
        mask: Any,
    ) -> None:
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
            raise TypeError(f"ignore_index: got {ignore_index!r}, wanted an integer")
        array = Source("target", target, model.batch_first)
        wanted = _leading(model, T, B)
        if array.shape != wanted:
            raise ValueError(f"target: got shape {array.shape}, wanted class numbers {wanted}")
        if 0 in array.shape:
            raise _no_target(f"shape {array.shape}")
        if np.dtype(array.dtype).kind not in "iu":
            raise TypeError(f"target: got dtype {array.dtype}, wanted class numbers, integers")
        super().__init__(model, array, T, B, lengths, mask)
        # As int64, and in order; with a mask another copy of them, and the mask.
        self.row_bytes = 16 if mask is None else 25
        self._batch_first = model.batch_first
        self.ignore_index = int(ignore_index)
        self._classes = _width(model)
        count = self._count(0, T)
        if count == 0:
            where = "everywhere" if lengths is None else "wherever a row is there"
            under = "" if mask is None else " under the loss_mask"
            raise _no_target(f"ignore_index = {self.ignore_index} {where}{under}")
        self.scale = 1.0 / count

    def _cut(self, begin: int, end: int) -> Array:
        given = super()._cut(begin, end)
        if given.dtype == np.uint64 and given.size and given.max() > np.iinfo(np.int64).max:
            raise ValueError(
                f"target: got class {given.max()}, wanted from 0 to {self._classes - 1}"
            )
        classes = given.astype(np.int64, copy=False)
        if self._mask is None:
            return classes
        return np.where(self._mask.take(begin, end), classes, self.ignore_index)

    def narrow(self, begin: int, end: int) -> None:
        self.scale = 1.0 / max(1, self._count(begin, end))

    def _count(self, first: int, last: int) -> int:
        """Return how many targets count; every one of them is checked before any work is done."""
        count, classes = 0, self._classes
        steps = max(1, _CHECKED_AT_ONCE // self._target.leading[1])
        for begin in range(first, last, steps):
            chunk = self._cut(begin, min(begin + steps, last))
            counts = chunk != self.ignore_index
            if self._lengths is not None:
                counts &= present(self._lengths, begin, begin + len(chunk))
            count += int(np.count_nonzero(counts))
            # As unsigned numbers the negative ones are the largest: one comparison sees both ends.
            wrong = counts & (chunk.view(np.uint64) >= classes)
            if wrong.any():
                step, row = np.unravel_index(int(wrong.argmax()), wrong.shape)
                place = (row, begin + step) if self._batch_first else (begin + step, row)
                raise ValueError(
                    f"target: got class {chunk[step, row]} at [{place[0]}, {place[1]}], wanted "
                    f"from 0 to {classes - 1}, or ignore_index = {self.ignore_index}"
                )
        return count


class _Custom:
    """A loss of the user's, called with the outputs of a segment."""

    row_bytes = 0  # the user's own
    in_pieces = False

    def narrow(self, begin: int, end: int) -> None:
        """Do nothing: what it is divided by is the user's affair."""

    def __init__(
        self,
        loss: LossFunction,
        model: Model,
        target: Any,
        T: int,
        B: int,
        lengths: Array | None,
    ) -> None:
        self._lengths = lengths
        self._dtype = model.compute_dtype
        self._weights = None if model.readout is None else model.readout._computed_weights()
        self._loss = loss
        self._target = target
        self._batch_first = model.batch_first
        if T == 0 or B == 0:
            raise _no_target(f"x of {T} steps and a batch of {B}")
        if target is None:
            return
        if not hasattr(target, "shape"):
            self._target = target = from_any("target", target)
        axes = 2 if self._batch_first else 1
        if len(target.shape) < axes or target.shape[axes - 1] != T:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, wanted {T} steps on axis {axes - 1}"
            )

    def __call__(
        self, y: Array, begin: int, end: int, grads: dict[str, Array] | None
    ) -> tuple[float, Array | None]:
        output = y = y.astype(self._dtype, copy=False)
        weights = self._weights
        if weights is not None:
            output = _core.linear(y, weights["weight"], weights.get("bias"), cuts=True)
        if self._lengths is not None:
            away = ~present(self._lengths, begin, end)
            if weights is not None:  # else it is zero there already
                output[away] = 0.0
        if weights is None:
            # The way back reads it too.
            output = output.view()
            output.flags.writeable = False
        if self._batch_first:
            output = output.swapaxes(0, 1)
        target = self._target
        if target is not None:
            target = target[:, begin:end] if self._batch_first else target[begin:end]
        value, grad = as_pair(self._loss(output, target, slice(begin, end)))
        if grads is None:
            return value, None
        grad = as_array("grad_output of loss", grad, output.dtype)
        if grad.shape != output.shape:
            raise ValueError(f"grad_output of loss: got shape {grad.shape}, wanted {output.shape}")
        if grad.dtype != output.dtype:
            raise TypeError(f"grad_output of loss: got dtype {grad.dtype}, wanted {output.dtype}")
        if self._batch_first:
            grad = grad.swapaxes(0, 1)
        if self._lengths is not None:
            grad = np.where(away[..., None], np.zeros((), grad.dtype), grad)
        if weights is None:
            return value, grad
        into = grads["weight"], grads.get("bias")
        return value, _core.linear_backward(y, weights["weight"], grad, *into)

    def beside(
        self, y: Array, stretches: Sequence[slice], grads: dict[str, Array]
    ) -> tuple[float, Array]:
        loss, B = 0.0, y.shape[1] // len(stretches)
        grad_y = np.empty(y.shape, self._dtype)
        for place, stretch in enumerate(stretches):
            rows = slice(place * B, (place + 1) * B)
            part = np.ascontiguousarray(y[:, rows])
            value, grad_y[:, rows] = self(part, stretch.start, stretch.stop, grads)
            loss += value
        return loss, grad_y


def as_pair(result: Any) -> tuple[float, Any]:
    """Return value and gradient of what a callable loss returned."""
    try:
        value, grad = result
        return float(value), grad
    except (TypeError, ValueError):
        raise TypeError(
            f"loss: its result was {type(result).__name__}, wanted (value, grad_output): a number "
            "and an array"
        ) from None
