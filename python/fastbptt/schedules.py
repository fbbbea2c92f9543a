"""Schedules: the order in which a sequence is run forward and back.

A schedule is a planner. It gets the number of steps and gives the actions that train on them, one
after the other; it sees no data, so it can be tested alone, and plans are produced as they are
used, so that a long sequence costs no memory here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

from fastbptt._arrays import as_size

Verb: TypeAlias = Literal["advance", "record", "reverse", "store", "restore"]


class Action(NamedTuple):
    """One action of a plan, over the steps `[t0, t1)`.

    Parameters
    ----------
    verb : {"advance", "record", "reverse", "store", "restore"}
        advance: run from the state at `t0` to the state at `t1` and keep nothing.
        record: the same, and put a tape of these steps on the pile of tapes.
        reverse: take the tape of these steps from the top of the pile, and carry the gradient back
        from `t1` to `t0`. It begins with the gradient of the state that the reverse before it left,
        if that ended at `t1`, and with zero otherwise.
        store: keep the present state, at `t0`. restore: make the one that was kept the present one.
    t0, t1 : int
        First step, and the one behind the last. Equal for store and restore.
    loss_from : int, optional
        For reverse: the loss of the steps `[loss_from, t1)` is taken here; all of them if None.
    last : bool
        For restore: no later restore wants this state, so it need not be kept.
    """

    verb: Verb
    t0: int
    t1: int
    loss_from: int | None = None
    last: bool = False


@dataclass(frozen=True)
class Needs:
    """The memory that training a model on a sequence takes, in bytes.

    Parameters
    ----------
    state : int
        A state of all layers and rows, kept.
    step : int
        A recorded step, until it is reversed.
    fixed : callable
        All that is there throughout, given the most steps that are recorded or advanced at a time.
    """

    state: int
    step: int
    fixed: Callable[[int], int]


class Schedule(Protocol):
    """What `value_and_grad` asks of a schedule."""

    def plan(self, T: int, needs: Needs) -> Iterator[Action]:
        """Return the actions for `T` steps; the loss of each step is taken exactly once."""


@dataclass(frozen=True)
class Full:
    """Backpropagation through all of the sequence.

    Every step is kept until the end: the memory grows with the length.

    References
    ----------
    P. J. Werbos, "Backpropagation through time: what it does and how to do it", Proceedings of the
    IEEE 78(10), 1990.

    Examples
    --------
    >>> from fastbptt import Full
    >>> [(action.verb, action.t0, action.t1) for action in Full().plan(100)]
    [('record', 0, 100), ('reverse', 0, 100)]
    """

    def plan(self, T: int, needs: Needs | None = None) -> Iterator[Action]:
        """Return the actions for `T` steps: record them all, and go back through them."""
        if T > 0:
            yield Action("record", 0, T)
            yield Action("reverse", 0, T)


@dataclass(frozen=True, init=False)
class Truncated:
    """Truncated backpropagation through time.

    Every `k1` steps, the gradient of the loss of these steps is carried back `k2` steps from the
    last of them. States are those of the whole sequence, so only the gradient is approximate. The
    memory is that of `k2` steps. Where the length is not a multiple of `k1`, the last window is cut
    off at its end: it begins where it would begin if the sequence went on.

    Parameters
    ----------
    k1 : int
        Steps from one gradient to the next, at least 1.
    k2 : int, optional
        Steps that a gradient reaches back, at least `k1`; `k1` if not given.

    Raises
    ------
    ValueError
        If `k1` is less than 1 or `k2` less than `k1`.
    TypeError
        If one of them is not an integer.

    References
    ----------
    R. J. Williams and J. Peng, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories", Neural Computation 2(4), 1990: BPTT(k2; k1).

    Examples
    --------
    >>> from fastbptt import Truncated
    >>> [(action.verb, action.t0, action.t1) for action in Truncated(40).plan(100)]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('record', 0, 40), ('reverse', 0, 40), ('record', 40, 80), ('reverse', 40, 80),
     ('record', 80, 100), ('reverse', 80, 100)]
    """

    k1: int
    k2: int

    def __init__(self, k1: int, k2: int | None = None) -> None:
        k1 = as_size("k1", k1)
        k2 = k1 if k2 is None else as_size("k2", k2)
        if k2 < k1:
            raise ValueError(f"k2: got {k2}, wanted at least k1 = {k1}")
        object.__setattr__(self, "k1", k1)
        object.__setattr__(self, "k2", k2)

    def plan(self, T: int, needs: Needs | None = None) -> Iterator[Action]:
        """Return the actions for `T` steps, window by window."""
        for window in self.windows(T):
            yield from window

    def windows(self, T: int) -> Iterator[list[Action]]:
        """Return the actions of each window; the loss of `k1` steps is taken in one.

        A window that overlaps the next is recorded in two parts, so that the state at which the
        next one begins can be kept on the way.
        """
        k1, k2 = self.k1, self.k2
        begin = 0
        for new in range(0, T, k1):
            end = min(new + k1, T)
            following = max(0, new + 2 * k1 - k2)
            if end == T or following == end:
                yield [Action("record", begin, end), Action("reverse", begin, end, loss_from=new)]
            else:
                early = begin < following
                yield [
                    *([Action("record", begin, following)] if early else []),
                    Action("store", following, following),
                    Action("record", following, end),
                    Action("reverse", following, end, loss_from=max(new, following)),
                    *(
                        [Action("reverse", begin, following, loss_from=min(new, following))]
                        if early
                        else []
                    ),
                    Action("restore", following, following, last=True),
                ]
            begin = following
