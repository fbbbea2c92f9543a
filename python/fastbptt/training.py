"""Losses and gradients of whole sequences, in the order of time that a schedule chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbptt import _core
from fastbptt._arrays import Array, as_array
from fastbptt._part import Part
from fastbptt.losses import Loss, Objective, cut, make_objective
from fastbptt.model import Model
from fastbptt.schedules import Action, Full, Schedule

# Rows of time x batch that `evaluate` runs at once: enough for packing the weights to cost nothing.
_EVALUATED_AT_ONCE = 4096


class ValueAndGrad(NamedTuple):
    """What `value_and_grad` returns.

    Attributes
    ----------
    loss : float
        Of all steps.
    grads : dict of str to ndarray
        Its gradient with respect to each of `model.parameters()`, under the same names.
    state : ndarray or tuple of ndarray
        The state after the last step, for the call that goes on with the sequence.
    """

    loss: float
    grads: dict[str, Array]
    state: Any


def value_and_grad(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    state: Any = None,
    schedule: Schedule | None = None,
    ignore_index: int = -100,
) -> ValueAndGrad:
    """Return the loss of a sequence and its gradient by backpropagation through time.

    The model is not changed. If anything raises, a callable `loss` or Ctrl-C included, nothing is.

    Parameters
    ----------
    model : Model
        What is trained.
    x : array_like
        Class numbers `[T, B]` for a model with an embedding, else `[T, B, I]` of the model's dtype;
        with `batch_first` B comes before T. T and B are at least 1.
    target : array_like
        For "cross_entropy" class numbers `[T, B]`, for "mse" values `[T, B, N]` of the model's
        dtype, with N numbers in an output; `batch_first` as for x. For a callable anything with
        time where x has it, or None.
    loss : {"cross_entropy", "mse"} or callable
        The mean of the negative log-likelihoods of the target classes that are not `ignore_index`,
        in nats, with the output as logits; the mean of the squared differences; or a function
        `loss(output, target, steps)` that is called with a part of the sequence: the outputs
        `[n, B, N]` of some steps, their targets, and the slice of time that they are. It returns
        the part's loss, and its gradient with respect to the outputs, of their shape and dtype. The
        parts add up, so a mean must be divided by the number of all steps, not by that of the part.
    state : ndarray or tuple of ndarray, optional
        The state before the first step, such as an earlier call returned; zeros by default.
    schedule : Schedule, optional
        `Full()`, which is the default, or `Truncated(k1, k2)`.
    ignore_index : int
        A class that does not count; for "cross_entropy" only.

    Returns
    -------
    ValueAndGrad
        `loss`, `grads` and `state`.

    Raises
    ------
    ValueError
        A shape is wrong, a class is out of range, `loss` is unknown, or no target counts.
    TypeError
        A dtype is wrong, or something is not what it should be at all.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.Embedding(5, 8, seed=0), fb.GRU(8, 16, seed=1), fb.Linear(16, 5))
    >>> text = np.arange(41).reshape(-1, 1) % 5
    >>> adam = fb.Adam(model.parameters(), lr=0.01)
    >>> for _ in range(30):
    ...     result = fb.value_and_grad(model, text[:-1], text[1:], schedule=fb.Truncated(10, 20))
    ...     adam.step(result.grads)
    >>> result.loss < 0.1
    True
    """
    schedule = Full() if schedule is None else schedule
    if isinstance(schedule, type) or not hasattr(schedule, "plan"):
        name = schedule.__name__ if isinstance(schedule, type) else type(schedule).__name__
        raise TypeError(f"schedule: got {name}, wanted a schedule such as Full() or Truncated(k1)")
    source = _Input(model, x)
    objective = make_objective(loss, model, target, source.T, source.B, ignore_index)
    run = _Run(model, source, objective, state)
    for action in schedule.plan(source.T):
        run.do(action)
    return run.result()


def evaluate(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    state: Any = None,
    ignore_index: int = -100,
) -> tuple[float, Any]:
    """Return the loss of a sequence, without its gradient.

    The sequence is run a stretch at a time, so that the memory does not grow with its length.

    Parameters
    ----------
    model, x, target, loss, state, ignore_index
        As for `value_and_grad`; of what a callable `loss` returns, only the value is used.

    Returns
    -------
    loss : float
        Of all steps.
    state : ndarray or tuple of ndarray
        The state after the last step.

    Raises
    ------
    ValueError
        A shape is wrong, a class is out of range, `loss` is unknown, or no target counts.
    TypeError
        A dtype is wrong, or something is not what it should be at all.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.LSTM(3, 4))
    >>> x, target = np.ones((100, 2, 3), np.float32), np.zeros((100, 2, 4), np.float32)
    >>> whole, _ = fb.evaluate(model, x, target, "mse")
    >>> first, state = fb.evaluate(model, x[:50], target[:50], "mse")
    >>> second, _ = fb.evaluate(model, x[50:], target[50:], "mse", state)
    >>> abs((first + second) / 2 - whole) < 1e-6
    True
    """
    source = _Input(model, x)
    objective = make_objective(loss, model, target, source.T, source.B, ignore_index)
    value = 0.0
    steps = max(1, _EVALUATED_AT_ONCE // source.B)
    for begin in range(0, source.T, steps):
        end = min(begin + steps, source.T)
        y, state = model.recurrent(source.vectors(begin, end), state)
        value += objective(y, begin, end, None)[0]
    return value, state


class _Input:
    """The input of a model, checked as a whole and read some steps at a time."""

    def __init__(self, model: Model, x: Any) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Model")
        self._embedding = model.embedding
        self._batch_first = model.batch_first
        if model.embedding is None:
            self._array = _vectors(model, x)
        else:
            self._array = _classes(model, model.embedding.num_embeddings, x)
        time = 1 if model.batch_first else 0
        self.T, self.B = self._array.shape[time], self._array.shape[1 - time]

    def classes(self, begin: int, end: int) -> Array:
        """Return the class numbers of some steps, for a model with an embedding."""
        segment: Array = cut(self._array, begin, end, self._batch_first)
        return segment.astype(np.int64, copy=False)

    def vectors(self, begin: int, end: int) -> Array:
        """Return what the recurrent layer gets at some steps."""
        if self._embedding is not None:
            return self._embedding._rows(self.classes(begin, end))
        segment: Array = cut(self._array, begin, end, self._batch_first)
        return segment


def _vectors(model: Model, x: Any) -> Array:
    array = as_array("x", x, model.dtype)
    size = model.recurrent.input_size
    if array.ndim != 3 or array.shape[2] != size:
        axes = "B, T" if model.batch_first else "T, B"
        raise ValueError(f"x: got shape {array.shape}, wanted [{axes}, {size}]")
    if array.dtype != model.dtype:
        raise TypeError(f"x: got dtype {array.dtype}, wanted {model.dtype}")
    return array


def _classes(model: Model, rows: int, x: Any) -> Array:
    # Small integers stay as they are: as int64, a long text would take several times its size.
    plain = type(x) in (np.ndarray, np.memmap) and x.ndim == 2 and x.size
    if plain and x.dtype.kind in "iu" and x.min() >= 0 and x.max() < rows:
        return np.asarray(x)
    return model._index(x)


@dataclass
class _Segment:
    """Steps that are recorded and not yet reversed."""

    t0: int
    t1: int
    y: Array
    tape: _core.Tape


class _Run:
    """Does the actions of a plan, and adds up loss and gradients.

    Readout and loss are run when a segment is reversed: until then only its tape, with its input
    and output, exists.
    """

    def __init__(self, model: Model, source: _Input, objective: Objective, state: Any) -> None:
        self._model = model
        self._source = source
        self._objective = objective
        self._t = 0  # the present state is that before step _t
        self._state = state
        self._last: tuple[Any] | None = None  # the state after all steps, once it is known
        self._stored: dict[int, Any] = {}
        self._segments: list[_Segment] = []
        self._error: tuple[int, Any] | None = None  # a step, and dL/dstate before it
        self._loss = 0.0
        self._steps_with_loss = 0
        # The core adds to these; the recurrent layer's come with its first segment.
        embedding, readout = model.embedding, model.readout
        self._embedding_grads = {} if embedding is None else _zeros_like(embedding)
        self._readout_grads = {} if readout is None else _zeros_like(readout)
        self._recurrent_grads: dict[str, Array] = {}

    def do(self, action: Action) -> None:
        """Do one action."""
        match action.verb:
            case "advance":
                self._expect(action, self._t == action.t0)
                x = self._source.vectors(action.t0, action.t1)
                _, state = self._model.recurrent(x, self._state)
                self._move_to(action.t1, state)
            case "record":
                self._expect(action, self._t == action.t0)
                x = self._source.vectors(action.t0, action.t1)
                y, state, tape = self._model.recurrent.forward(x, self._state)
                self._segments.append(_Segment(action.t0, action.t1, y, tape))
                self._move_to(action.t1, state)
            case "reverse":
                self._reverse(action)
            case "store":
                self._expect(action, self._t == action.t0)
                self._stored[action.t0] = self._state
            case "restore":
                self._expect(action, action.t0 in self._stored)
                take = self._stored.pop if action.last else self._stored.__getitem__
                self._move_to(action.t0, take(action.t0))
            case _:
                self._expect(action, False)

    def _move_to(self, t: int, state: Any) -> None:
        self._t, self._state = t, state
        if t == self._source.T:
            self._last = (state,)

    def _reverse(self, action: Action) -> None:
        top = self._segments[-1] if self._segments else None
        self._expect(action, top is not None and (top.t0, top.t1) == (action.t0, action.t1))
        segment = self._segments.pop()
        grad_state = None
        if self._error is not None and self._error[0] == action.t1:
            grad_state = self._error[1]
        begin = action.t0 if action.loss_from is None else action.loss_from
        grad_y = self._take_loss(segment, begin)
        embedding = self._model.embedding
        grads = self._model.recurrent.backward(
            segment.tape, grad_y, grad_state, need_x=embedding is not None
        )
        self._error = (action.t0, grads.state)
        for name, grad in grads.weights.items():
            total = self._recurrent_grads.setdefault(name, grad)
            if total is not grad:
                total += grad
        if embedding is not None:
            index = self._source.classes(action.t0, action.t1)
            _core.embedding_backward(index, grads.x, self._embedding_grads["weight"])

    def _take_loss(self, segment: _Segment, begin: int) -> Array | None:
        """Add the loss of the steps from `begin` on; return the gradient for the whole segment."""
        if begin >= segment.t1:
            return None
        batch_first = self._model.batch_first
        skipped, steps = begin - segment.t0, segment.t1 - segment.t0
        y = cut(segment.y, skipped, steps, batch_first)
        value, grad = self._objective(y, begin, segment.t1, self._readout_grads)
        self._loss += value
        self._steps_with_loss += steps - skipped
        if skipped == 0:
            return grad
        whole = np.zeros_like(segment.y)
        cut(whole, skipped, steps, batch_first)[...] = grad
        return whole

    def result(self) -> ValueAndGrad:
        """Return what the actions have come to, when all of them are done."""
        T = self._source.T
        if self._segments or self._last is None or self._steps_with_loss != T:
            raise ValueError(
                f"schedule: its plan for {T} steps took the loss of {self._steps_with_loss} steps "
                f"and left {len(self._segments)} segments not reversed"
            )
        model = self._model
        grads = [self._recurrent_grads]
        if model.embedding is not None:
            grads.insert(0, self._embedding_grads)
        if model.readout is not None:
            grads.append(self._readout_grads)
        named = {f"{n}.{name}": grad for n, part in enumerate(grads) for name, grad in part.items()}
        return ValueAndGrad(self._loss, named, self._last[0])

    def _expect(self, action: Action, possible: bool) -> None:
        if not possible:
            raise ValueError(f"schedule: its plan has {action} where that cannot be done")


def _zeros_like(part: Part) -> dict[str, Array]:
    return {name: np.zeros_like(weight) for name, weight in part.weights.items()}
