"""Losses and gradients of whole sequences, in the order of time that a schedule chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbptt import _core
from fastbptt._arrays import Array, as_array, as_lengths
from fastbptt.checkpointing import Checkpointed, plan
from fastbptt.losses import Loss, Objective, make_objective
from fastbptt.memory import RUN_AT_ONCE, as_text, available, needs_of, steps_at_once
from fastbptt.model import Model
from fastbptt.schedules import Action, Full, Needs, Schedule, Truncated
from fastbptt.segmented import Segmented, run_segmented
from fastbptt.source import Source, is_lazy

# Schedules that do not run all of time at once.
_CUTTING = (Checkpointed, Truncated, Segmented)

# Whether it was said that a sequence is checkpointed because it does not fit.
_told: list[bool] = []


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
    schedule: Schedule | Segmented | None = None,
    ignore_index: int = -100,
    grad_x: Array | None = None,
    *,
    lengths: ArrayLike | None = None,
    resets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    seed: int | None = None,
    loss_mask: Any = None,
) -> ValueAndGrad:
    """Return the loss of a sequence and its gradient by backpropagation through time.

    The model is not changed. If anything raises, a callable `loss` or Ctrl-C included, nothing is.

    Parameters
    ----------
    model : Model
        What is trained.
    x : array_like
        Class numbers `[T, B]` for a model with an embedding, else `[T, B, I]` of the model's dtype;
        with `batch_first` B comes before T. T and B are at least 1. A memory map, or any object
        with `shape`, `dtype` and slices over time, is read a segment at a time.
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
        `Full()`, `Checkpointed(...)`, `Truncated(k1, k2)` or `Segmented(length, overlap)`. By
        default `Full()`, or, if that would take more memory than there is, `Checkpointed` within
        half of what there is, which the logger "fastbptt" tells once.
    ignore_index : int
        A class that does not count; for "cross_entropy" only.
    grad_x : ndarray, optional
        Of the shape and dtype of x, a memory map if that is large: the gradient with respect to x
        is written there. Not for a model with an embedding. After an error it holds no meaning.
    lengths : array_like of int, optional
        How many steps each row has, `[B]`, in any order, each from 0 to T; all T by default. Steps
        behind them cost nothing and do not count in the loss; for a callable the outputs there are
        zero, and the gradient that it returns for them is not used.
    resets, mask : array_like of bool, optional
        `[T, B]`, with `batch_first` `[B, T]`: before which steps a row's state begins anew, and
        which steps there are, as the call of the recurrent layer takes them. A step that is
        missing has an output, and its target counts, unless `ignore_index` or `loss_mask` says
        that it does not.
    seed : int, optional
        Of what training draws at random, where the layer does: the same seed draws the same, with
        every schedule but `Segmented`. By default a new one, which the layer's own seed decides.
    loss_mask : array_like of bool, optional
        `[T, B]`, with `batch_first` `[B, T]`: the steps of each row whose loss counts, for a named
        loss, which is the mean over them. What `target` has at the others is never looked at. Like
        x it may be anything with `shape`, `dtype` and slices over time.

    Returns
    -------
    ValueAndGrad
        `loss`, `grads` and `state`.

    Raises
    ------
    ValueError
        A shape is wrong, a class is out of range, `loss` is unknown, no target counts, or the
        schedule cuts time where a layer is bidirectional, or rows that have lengths.
    TypeError
        A dtype is wrong, or something is not what it should be at all.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> layers = fb.Embedding(5, 8, seed=0), fb.GRU(8, 16, seed=1), fb.Linear(16, 5, seed=2)
    >>> model = fb.Model(*layers)
    >>> text = np.arange(41).reshape(-1, 1) % 5
    >>> adam = fb.Adam(model.parameters(), lr=0.01)
    >>> for _ in range(30):
    ...     result = fb.value_and_grad(model, text[:-1], text[1:], schedule=fb.Truncated(10, 20))
    ...     adam.step(result.grads)
    >>> result.loss < 0.1
    True
    """
    wanted = isinstance(schedule, Segmented) or hasattr(schedule, "plan")
    if schedule is not None and (isinstance(schedule, type) or not wanted):
        name = schedule.__name__ if isinstance(schedule, type) else type(schedule).__name__
        raise TypeError(f"schedule: got {name}, wanted a schedule such as Full() or Truncated(k1)")
    _check_cuts(model, schedule, lengths)
    source = _Input(model, x)
    batch = _batch_of(model, source, lengths, resets, mask, seed, training=True)
    objective = make_objective(
        loss, model, target, source.T, source.B, ignore_index, batch.get("lengths"), loss_mask
    )
    if grad_x is not None:
        _check_grad_x(grad_x, source, model, target, state)
        grad_x[...] = 0
    if isinstance(schedule, Segmented):
        sums = run_segmented(model, source, objective, state, schedule, grad_x, batch)
        return ValueAndGrad(*sums)
    needs = needs_of(
        model,
        source.T,
        source.B,
        read_bytes=source.row_bytes(),
        target_bytes=objective.row_bytes,
        in_pieces=_in_pieces(model, objective),
        input_gradient=grad_x is not None,
        batch=batch,
    )
    if schedule is None:
        schedule = Full() if model.recurrent.bidirectional else _fitting(source.T, needs)
    longest = source.T
    if isinstance(schedule, Checkpointed):
        slots, segment = schedule.division(source.T, needs)
        longest, actions = min(longest, segment), plan(source.T, slots, segment)
    else:
        actions = schedule.plan(source.T, needs)
    run = _Run(model, source, objective, state, longest, batch, grad_x=grad_x)
    for action in actions:
        run.do(action)
    return run.result(source.T, source.T)


def each_window(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    state: Any = None,
    schedule: Truncated | None = None,
    ignore_index: int = -100,
    *,
    lengths: ArrayLike | None = None,
    resets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    seed: int | None = None,
    loss_mask: Any = None,
) -> Iterator[ValueAndGrad]:
    """Yield loss and gradient window by window, so that the parameters may change in between.

    The states go on from window to window, so what a window begins with comes from the parameters
    of the windows before it. Memory is that of one window, whatever the length.

    Parameters
    ----------
    model, x, target, loss, state, ignore_index, lengths, resets, mask, seed, loss_mask
        As for `value_and_grad`.
    schedule : Truncated
        Its windows.

    Yields
    ------
    ValueAndGrad
        Of the `k1` steps that are new in the window: a named loss is the mean over those of its
        targets that count, or 0 if there are none, and a callable what it returned for them. Then
        the gradient, through `k2` steps, and the state after the last of them.

    Raises
    ------
    ValueError, TypeError
        As for `value_and_grad`, before the first window; or the schedule is no `Truncated`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> layers = fb.Embedding(5, 8, seed=0), fb.GRU(8, 16, seed=1), fb.Linear(16, 5, seed=2)
    >>> model = fb.Model(*layers)
    >>> text = np.arange(401).reshape(-1, 1) % 5
    >>> adam = fb.Adam(model.parameters(), lr=0.02)
    >>> for window in fb.each_window(model, text[:-1], text[1:], schedule=fb.Truncated(10, 20)):
    ...     adam.step(window.grads)
    >>> window.loss < 0.2
    True
    """
    if not isinstance(schedule, Truncated):
        raise TypeError(f"schedule: got {type(schedule).__name__}, wanted Truncated(k1, k2)")
    _check_cuts(model, schedule, lengths)
    source = _Input(model, x)
    batch = _batch_of(model, source, lengths, resets, mask, seed, training=True)
    objective = make_objective(
        loss, model, target, source.T, source.B, ignore_index, batch.get("lengths"), loss_mask
    )
    return _windows(model, source, objective, state, schedule, batch)


def _windows(
    model: Model,
    source: _Input,
    objective: Objective,
    state: Any,
    schedule: Truncated,
    batch: dict[str, Any],
) -> Iterator[ValueAndGrad]:
    begin = 0
    for number, actions in enumerate(schedule.windows(source.T)):
        new = number * schedule.k1
        end = min(new + schedule.k1, source.T)
        objective.narrow(new, end)
        # The parameters may be others now, so their packed form is made anew.
        run = _Run(model, source, objective, state, end - begin, batch, begin=begin)
        for action in actions:
            run.do(action)
        begin, state = run.present
        found = run.result(end, end - new)
        yield found._replace(state=_copied(found.state))


def _copied(state: Any) -> Any:
    """Return the arrays of a state anew: the caller may write to what a window gave."""
    if isinstance(state, tuple):
        return tuple(part.copy() for part in state)
    return state.copy()


def _check_grad_x(grad_x: Any, source: _Input, model: Model, target: Any, state: Any) -> None:
    if model.embedding is not None:
        raise ValueError("grad_x: got an array for a model with an embedding, wanted None")
    if not isinstance(grad_x, np.ndarray):
        raise TypeError(f"grad_x: got {type(grad_x).__name__}, wanted a NumPy array")
    if grad_x.shape != source.source.shape:
        raise ValueError(f"grad_x: got shape {grad_x.shape}, wanted {source.source.shape}")
    if grad_x.dtype != model.compute_dtype:
        raise TypeError(f"grad_x: got dtype {grad_x.dtype}, wanted {model.compute_dtype}")
    if not grad_x.flags.writeable:
        raise ValueError("grad_x: got a read-only array, wanted a writable one")
    states = state if isinstance(state, (tuple, list)) else (state,)
    for name, other in (("target", target), *(("state", part) for part in states)):
        if isinstance(other, np.ndarray) and np.may_share_memory(grad_x, other):
            raise ValueError(f"grad_x: got memory that {name} lies in, wanted memory of its own")
    if source.source.overlaps(grad_x):
        raise ValueError("grad_x: got memory that x lies in, wanted memory of its own")


def _fitting(T: int, needs: Needs) -> Schedule:
    """Return `Full`, or what fits into half of the memory that is left if that does not."""
    there = available()
    whole = needs.fixed(T) + T * needs.step
    if there is None or whole <= there:
        return Full()
    schedule = Checkpointed(memory=there // 2)
    if not _told:
        _told.append(True)
        logging.getLogger("fastbptt").warning(
            "the tape of %d steps would take %s and there are %s: checkpointing instead, within "
            "half of that; schedule=Checkpointed(memory=...) chooses another limit",
            T,
            as_text(whole),
            as_text(there),
        )
    return schedule


def evaluate(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    state: Any = None,
    ignore_index: int = -100,
    *,
    lengths: ArrayLike | None = None,
    resets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    loss_mask: Any = None,
) -> tuple[float, Any]:
    """Return the loss of a sequence, without its gradient. Nothing is dropped.

    The sequence is run a stretch at a time, so that the memory does not grow with its length; in
    both directions it is run as a whole.

    Parameters
    ----------
    model, x, target, loss, state, ignore_index, lengths, resets, mask, loss_mask
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
    batch = _batch_of(model, source, lengths, resets, mask)
    objective = make_objective(
        loss, model, target, source.T, source.B, ignore_index, batch.get("lengths"), loss_mask
    )
    value = 0.0
    steps = source.T
    if not model.recurrent.bidirectional:
        steps = min(steps, max(1, RUN_AT_ONCE // source.B))
    session = model.recurrent._stack.session(source.T, source.B, steps, batch)
    if state is not None:
        state = model.recurrent._as_state("state", state)
    for begin in range(0, source.T, steps):
        end = min(begin + steps, source.T)
        y, state = session.advance(source.vectors(begin, end), state, begin)
        value += objective(y, begin, end, None)[0]
    return value, state


def _in_pieces(model: Model, objective: Objective) -> bool:
    """Whether a segment may be run in pieces: a direction back in time needs the whole of it."""
    return objective.in_pieces and not model.recurrent.bidirectional


def _check_cuts(model: Model, schedule: Any, lengths: Any) -> None:
    """Refuse a schedule that cuts time where that cannot be."""
    layer = model.recurrent if isinstance(model, Model) else None
    if layer is not None and layer.bidirectional and isinstance(schedule, _CUTTING):
        raise ValueError(
            f"schedule: got {schedule} for {layer!r}, wanted Full(): the direction that runs "
            "backward begins at the last step, so time cannot be cut"
        )
    if lengths is not None and isinstance(schedule, Segmented):
        raise ValueError(
            f"lengths: got an array with {schedule}, wanted None: segments that run beside each "
            "other are rows of one length"
        )


def _batch_of(
    model: Model,
    source: _Input,
    lengths: Any = None,
    resets: Any = None,
    mask: Any = None,
    seed: Any = None,
    training: bool = False,
) -> dict[str, Any]:
    """Return what the core is to know of a batch beside its input."""
    batch: dict[str, Any] = {}
    if lengths is not None:
        batch["lengths"] = as_lengths(lengths, source.T, source.B)
    batch |= model.recurrent._flags(source.T, source.B, resets, mask)
    drawn = model.recurrent._seed_of(seed) if training else None
    if drawn is not None:
        batch["seed"] = drawn
    return batch


class _Input:
    """The input of a model, read some steps at a time, with time first."""

    def __init__(self, model: Model, x: Any) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Model")
        self._model = model
        if is_lazy(x):
            self.source = Source("x", x, model.batch_first)
            self._check_shape()
        elif model.embedding is None:
            self.source = Source("x", as_array("x", x, model.dtype), model.batch_first)
            self._check_shape()
            self._check_dtype(self.source.dtype)
        else:
            x = _classes(model, model.embedding.num_embeddings, x)
            self.source = Source("x", x, model.batch_first)
        self.T, self.B = self.source.leading

    def _check_shape(self) -> None:
        shape, size = self.source.shape, self._model.recurrent.input_size
        axes = "B, T" if self._model.batch_first else "T, B"
        if self._model.embedding is not None:
            if len(shape) != 2:
                raise ValueError(f"x: got shape {shape}, wanted class numbers [{axes}]")
        elif len(shape) != 3 or shape[2] != size:
            raise ValueError(f"x: got shape {shape}, wanted [{axes}, {size}]")

    def _check_dtype(self, dtype: Any) -> None:
        if dtype != self._model.dtype:
            raise TypeError(f"x: got dtype {dtype}, wanted {self._model.dtype}")

    def row_bytes(self) -> int:
        """Return the bytes that reading a row of a step takes."""
        size = 1 if len(self.source.shape) == 2 else self.source.shape[2]
        return size * self._model.dtype.itemsize if self.source.lazy else 0

    def classes(self, begin: int, end: int) -> Array:
        """Return the class numbers of some steps, for a model with an embedding."""
        part = self.source.take(begin, end)
        if self.source.lazy:
            return self._model._index(part)
        return part.astype(np.int64, copy=False)

    def vectors(self, begin: int, end: int) -> Array:
        """Return what the recurrent layer gets at some steps."""
        if self._model.embedding is not None:
            return self._model.embedding._rows(self.classes(begin, end))
        part = self.source.take(begin, end)
        if self.source.lazy:
            self._check_dtype(part.dtype)
        return part


def _classes(model: Model, rows: int, x: Any) -> Array:
    # Small integers stay as they are: as int64, a long text would take several times its size.
    plain = type(x) in (np.ndarray, np.memmap) and x.ndim == 2 and x.size
    if plain and x.dtype.kind in "iu" and x.min() >= 0 and x.max() < rows:
        return np.asarray(x)
    return model._index(x)


class _Piece(NamedTuple):
    """Steps `[t0, t1)` that were recorded in one call."""

    t0: int
    t1: int
    y: Array
    tape: _core.Tape


class _Segment(NamedTuple):
    """Recorded steps `[t0, t1)`, not reversed yet."""

    t0: int
    t1: int
    pieces: list[_Piece]


class _Run:
    """Does the actions of a plan, and adds up loss and gradients.

    Readout and loss are run when a segment is reversed: until then only its tape, with its input
    and output, exists. A long segment is a row of pieces, so that what is made on the way back, the
    gradient of y above all, is never as long as the segment, and each tape goes when it has served.
    """

    def __init__(
        self,
        model: Model,
        source: _Input,
        objective: Objective,
        state: Any,
        longest: int,
        batch: dict[str, Any],
        *,
        begin: int = 0,
        grad_x: Array | None = None,
    ) -> None:
        self._model = model
        self._source = source
        self._objective = objective
        T = source.T if begin == 0 else begin + longest
        if "lengths" in batch:
            batch = {**batch, "lengths": np.minimum(batch["lengths"], T)}
        for name in ("resets", "mask"):
            if name in batch:
                batch = {**batch, name: batch[name][:T]}
        in_pieces = _in_pieces(model, objective)
        self._at_once = steps_at_once(longest, source.B) if in_pieces else longest
        self._session = model.recurrent._stack.session(T, source.B, self._at_once, batch, begin)
        self._advanced_at_once = min(self._at_once, max(1, RUN_AT_ONCE // source.B))
        self._t = begin  # the present state is that before step _t
        self._state = None if state is None else model.recurrent._as_state("state", state)
        self._furthest = begin, self._state  # the last state there was
        self._stored: dict[int, Any] = {}
        self._segments: list[_Segment] = []
        self._error: tuple[int, Any] | None = None  # a step, and dL/dstate before it
        self._loss = 0.0
        self._steps_with_loss = 0
        self._grad_x = None
        if grad_x is not None:
            self._grad_x = grad_x.swapaxes(0, 1) if model.batch_first else grad_x
        # The core adds to these; the recurrent layer's come from the session.
        embedding, readout = model.embedding, model.readout
        self._embedding_grads = {} if embedding is None else embedding._zero_grads()
        self._readout_grads = {} if readout is None else readout._zero_grads()

    def do(self, action: Action) -> None:
        """Do one action."""
        match action.verb:
            case "advance":
                self._expect(action, self._t == action.t0)
                for begin in range(action.t0, action.t1, self._advanced_at_once):
                    end = min(begin + self._advanced_at_once, action.t1)
                    x = self._source.vectors(begin, end)
                    _, state = self._session.advance(x, self._state, begin)
                    self._move_to(end, state)
            case "record":
                self._expect(action, self._t == action.t0)
                pieces: list[_Piece] = []
                for begin in range(action.t0, action.t1, self._at_once):
                    end = min(begin + self._at_once, action.t1)
                    x = self._source.vectors(begin, end)
                    y, state, tape = self._session.record(x, self._state, begin)
                    pieces.append(_Piece(begin, end, y, tape))
                    self._move_to(end, state)
                self._segments.append(_Segment(action.t0, action.t1, pieces))
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
        if t > self._furthest[0]:
            self._furthest = t, state

    @property
    def present(self) -> tuple[int, Any]:
        """A step, and the state before it, that the next action goes on from."""
        return self._t, self._state

    def _reverse(self, action: Action) -> None:
        top = self._segments[-1] if self._segments else None
        self._expect(action, top is not None and (top.t0, top.t1) == (action.t0, action.t1))
        pieces = self._segments.pop().pieces
        loss_from = action.t0 if action.loss_from is None else action.loss_from
        while pieces:
            self._reverse_piece(pieces.pop(), loss_from)

    def _reverse_piece(self, piece: _Piece, loss_from: int) -> None:
        grad_state = None
        if self._error is not None and self._error[0] == piece.t1:
            grad_state = self._error[1]
        grad_y = self._take_loss(piece, max(piece.t0, loss_from))
        embedded = self._model.embedding is not None
        grad_x, state = self._session.reverse(
            piece.tape, grad_y, grad_state, embedded or self._grad_x is not None
        )
        self._error = (piece.t0, state)
        if embedded:
            assert grad_x is not None
            index = self._source.classes(piece.t0, piece.t1)
            _core.embedding_backward(index, grad_x, self._embedding_grads["weight"])
        elif self._grad_x is not None:
            self._grad_x[piece.t0 : piece.t1] += grad_x

    def _take_loss(self, piece: _Piece, begin: int) -> Array | None:
        """Add the loss of the steps from `begin` on; return the gradient for the whole piece."""
        if begin >= piece.t1:
            return None
        skipped = begin - piece.t0
        value, grad = self._objective(piece.y[skipped:], begin, piece.t1, self._readout_grads)
        self._loss += value
        self._steps_with_loss += piece.t1 - begin
        if skipped == 0:
            return grad
        whole = np.zeros(piece.y.shape, self._model.compute_dtype)
        whole[skipped:] = grad
        return whole

    def result(self, end: int, steps: int) -> ValueAndGrad:
        """Return what the actions have come to: up to step `end`, the loss of so many steps."""
        if self._segments or self._furthest[0] != end or self._steps_with_loss != steps:
            raise ValueError(
                f"schedule: its plan for {steps} steps took the loss of {self._steps_with_loss} "
                f"steps and left {len(self._segments)} segments not reversed"
            )
        model = self._model
        layer = model.recurrent
        sums = (grad for grad in self._session.finish() if grad is not None)
        grads = [dict(zip(layer.weights, sums, strict=True))]
        if model.embedding is not None:
            grads.insert(0, self._embedding_grads)
        if model.readout is not None:
            grads.append(self._readout_grads)
        named = {f"{n}.{name}": grad for n, part in enumerate(grads) for name, grad in part.items()}
        return ValueAndGrad(self._loss, named, self._furthest[1])

    def _expect(self, action: Action, possible: bool) -> None:
        if not possible:
            raise ValueError(f"schedule: its plan has {action} where that cannot be done")
