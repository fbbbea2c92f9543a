"""Segments of one long sequence run beside each other, as the rows of a batch.

Time is what a recurrent net cannot share out over the cores, nor over the lanes of a vector; rows
of a batch it can. What a segment misses is the state before it, so it is warmed up: it begins some
steps earlier, with a state of zeros. A model that has forgotten that state when its own steps come
computes on them what it would compute in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastbptt import _core
from fastbptt._arrays import Array, as_size
from fastbptt.losses import Objective
from fastbptt.memory import steps_at_once
from fastbptt.model import Model
from fastbptt.source import beside


class Segment(NamedTuple):
    """The steps `[t0, t1)`, whose loss is taken, and the warm-up `[begin, t0)` before them."""

    begin: int
    t0: int
    t1: int


@dataclass(frozen=True, init=False)
class Segmented:
    """Backpropagation through segments of the sequence that run at the same time.

    The sequence is cut into segments of `length` steps, and each begins `overlap` steps before its
    first one, with a state of zeros, or at the first step of the sequence with the state given. The
    loss is that of the whole sequence: each step's is taken once, by its own segment, and the
    gradient is carried back to the begin of the warm-up. Both are exact in the segments that reach
    the first step, hence for an `overlap` of the whole sequence; elsewhere they are as good as the
    model forgets, which `segmentation_error` tells.

    A sequence of T steps of B rows runs as `T / length * B` rows of `overlap + length` steps: work
    for all cores, in larger products where B is small. All of it is held at once, the warm-ups
    too: `1 + overlap / length` times what `Full` takes, and a copy of x, laid out as these rows.
    Segments with a shorter warm-up, at the begin, and a shorter last one run on their own.

    Parameters
    ----------
    length : int
        Steps of a segment, at least 1; the last may have fewer.
    overlap : int
        Steps of warm-up, at least 0.

    Raises
    ------
    ValueError
        If `length` is less than 1 or `overlap` less than 0.
    TypeError
        If one of them is not an integer.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.GRU(3, 4, seed=0), fb.Linear(4, 2, seed=1))
    >>> x, target = np.ones((1000, 1, 3), np.float32), np.zeros((1000, 1), int)
    >>> exact = fb.value_and_grad(model, x, target)
    >>> near = fb.value_and_grad(model, x, target, schedule=fb.Segmented(100, overlap=50))
    >>> abs(near.loss - exact.loss) < 1e-5
    True
    """

    length: int
    overlap: int

    def __init__(self, length: int, overlap: int = 0) -> None:
        object.__setattr__(self, "length", as_size("length", length))
        object.__setattr__(self, "overlap", as_size("overlap", overlap, least=0))

    def segments(self, T: int) -> Iterator[Segment]:
        """Return the segments of `T` steps, the first one first.

        Examples
        --------
        >>> import fastbptt as fb
        >>> [tuple(segment) for segment in fb.Segmented(40, overlap=10).segments(100)]
        [(0, 0, 40), (30, 40, 80), (70, 80, 100)]
        """
        for t0 in range(0, T, self.length):
            yield Segment(max(0, t0 - self.overlap), t0, min(t0 + self.length, T))


class Input(Protocol):
    """The input of a model, read some steps at a time, with time first."""

    T: int
    B: int

    def classes(self, begin: int, end: int) -> Array:
        """Return class numbers `[n, B]`, for a model with an embedding."""

    def vectors(self, begin: int, end: int) -> Array:
        """Return what the recurrent layer gets, `[n, B, I]`."""


class Sums(NamedTuple):
    """What all segments come to: the loss, the gradients by name, the state after the last step."""

    loss: float
    grads: dict[str, Array]
    state: Any


def run_segmented(
    model: Model,
    source: Input,
    objective: Objective,
    state: Any,
    schedule: Segmented,
    grad_x: Array | None,
    batch: dict[str, Any],
) -> Sums:
    """Return the loss of a sequence and its gradients; add the one of x to `grad_x`."""
    if state is not None:
        state = model.recurrent._as_state("state", state)
    if grad_x is not None and model.batch_first:
        grad_x = grad_x.swapaxes(0, 1)

    def kind(segment: Segment) -> tuple[int, int, bool]:
        # The core takes the state given as it is, so what begins with it is not among others.
        with_state = segment.begin == 0 and state is not None
        return segment.t0 - segment.begin, segment.t1 - segment.t0, with_state

    run = _Run(model, source, objective, grad_x, batch)
    for (_, _, with_state), alike in groupby(schedule.segments(source.T), kind):
        run.do(list(alike), state if with_state else None)
    return run.result()


def _stretches(segments: Sequence[Segment], begin: int, end: int) -> list[slice]:
    """Return where steps of segments are, counted from the first one of each."""
    return [slice(segment.begin + begin, segment.begin + end) for segment in segments]


class _Run:
    """Runs batches of segments, and adds up loss and gradients.

    In a batch of segments of the same shape, row `s * B + b` is row b of segment s.
    """

    def __init__(
        self,
        model: Model,
        source: Input,
        objective: Objective,
        grad_x: Array | None,
        batch: dict[str, Any],
    ) -> None:
        self._model = model
        self._source = source
        self._objective = objective
        self._grad_x = grad_x
        self._batch = batch
        self._loss = 0.0
        self._last: Any = None
        self._grads = [part._zero_grads() for part in model.parts]

    def do(self, segments: Sequence[Segment], state: Any) -> None:
        """Run segments of the same shape beside each other, forward and back."""
        warm_up, steps = (t - segments[0].begin for t in (segments[0].t0, segments[0].t1))
        layer = self._model.recurrent
        B = len(segments) * self._source.B
        at_once = steps_at_once(steps, B) if self._objective.in_pieces else steps
        session = layer._stack.session(steps, B, at_once, self._batch_of(segments, steps))
        if "seed" in self._batch:  # batches draw apart from each other
            self._batch = {**self._batch, "seed": (self._batch["seed"] + 1) % (1 << 64)}
        # In pieces, so that what is made on the way back is never as long as the segments.
        pieces: list[tuple[int, int, Array, _core.Tape]] = []
        for first, last in ((0, warm_up), (warm_up, steps)):
            if first == last:
                continue
            x = self._vectors(_stretches(segments, first, last))
            for begin in range(first, last, at_once):
                end = min(begin + at_once, last)
                y, state, tape = session.record(x[begin - first : end - first], state, begin)
                pieces.append((begin, end, y, tape))
        self._last = state
        into = self._grads[-1] if self._model.readout is not None else {}
        error: Any = None
        while pieces:
            begin, end, y, tape = pieces.pop()
            stretches = _stretches(segments, begin, end)
            grad_y: Array | None = None
            if begin >= warm_up:
                value, grad_y = self._objective.beside(y, stretches, into)
                self._loss += value
            error = self._reverse(session, tape, grad_y, error, stretches)
        sums = (grad for grad in session.finish() if grad is not None)
        recurrent = self._grads[self._model.parts.index(layer)]
        for total, grad in zip(recurrent.values(), sums, strict=True):
            total += grad

    def _batch_of(self, segments: Sequence[Segment], steps: int) -> dict[str, Any]:
        """Return what is known of the batch beside x, laid out as its rows are."""
        found: dict[str, Any] = {}
        for name, value in self._batch.items():
            if isinstance(value, np.ndarray):

                def take(begin: int, end: int, flags: Array = value) -> Array:
                    return flags[begin:end]

                found[name] = beside(take, _stretches(segments, 0, steps))
            else:
                found[name] = value
        return found

    def _vectors(self, stretches: Sequence[slice]) -> Array:
        if self._model.embedding is not None:
            return self._model.embedding._rows(beside(self._source.classes, stretches))
        return beside(self._source.vectors, stretches)

    def _reverse(
        self,
        session: _core.Session,
        tape: _core.Tape,
        grad_y: Array | None,
        grad_state: Any,
        stretches: Sequence[slice],
    ) -> Any:
        """Carry the gradient back over stretches of time; return that of the states before them."""
        embedded = self._model.embedding is not None
        need_x = embedded or self._grad_x is not None
        grad, state = session.reverse(tape, grad_y, grad_state, need_x)
        if embedded:
            assert grad is not None
            classes = beside(self._source.classes, stretches)
            _core.embedding_backward(classes, grad, self._grads[0]["weight"])
        elif self._grad_x is not None:
            assert grad is not None
            for place, stretch in enumerate(stretches):
                self._grad_x[stretch] += grad[:, self._rows(place)]
        return state

    def _rows(self, place: int) -> slice:
        """Return the rows of the batch that are those of one segment."""
        return slice(place * self._source.B, (place + 1) * self._source.B)

    def result(self) -> Sums:
        """Return what all batches have come to."""
        named = {
            f"{n}.{name}": grad
            for n, grads in enumerate(self._grads)
            for name, grad in grads.items()
        }
        B = self._source.B
        if isinstance(self._last, tuple):
            return Sums(self._loss, named, tuple(part[:, -B:].copy() for part in self._last))
        return Sums(self._loss, named, self._last[:, -B:].copy())
