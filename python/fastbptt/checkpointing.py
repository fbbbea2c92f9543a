"""Multi-checkpoint backpropagation: which states to keep, and what to run again between them.

The sequence is cut into segments. One segment at a time is recorded and reversed, the last one
first; to get to its begin, steps are run again from the nearest state that is kept. The cuts make a
binary tree: a range longer than a segment keeps the state at its begin, advances over its left
part, does its right part with one slot less, comes back, and does its left part. A segment that is
in the left part of `r` ranges is advanced over `r` times before it is recorded; one that is in the
right part of `s` ranges needs `s` slots. So with `s` slots no more than

    beta(s, r) = binomial(s + r, s)

segments are advanced over `r` times at most, and at least `T - segment * beta(slots, r)` of the `T`
steps more often than that. Summed over all `r`, these are the fewest steps to advance over, and
the sum is reached (Griewank & Walther 2000, who record single steps): `advanced_steps` has the
sum and `plan` the cuts. Nothing here sees data.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Any

from fastbptt._arrays import as_size
from fastbptt.memory import as_bytes, as_text, needs_of
from fastbptt.model import Model
from fastbptt.schedules import Action, Full, Needs

# Bytes of a segment that is still in a core's own cache when it is reversed, nearly all of it.
_CACHED = 768 << 10


@dataclass(frozen=True, init=False)
class Checkpointed:
    """Backpropagation through all of the sequence, in less memory than all of it.

    States are kept at chosen steps only; each segment between them is run again from the state
    before it, recorded, and reversed. The gradient is that of `Full`, bit for bit with the same
    number of threads. With enough slots for one state a segment, each step runs forward once more;
    with fewer, again and again: as seldom as possible with these slots (Griewank & Walther 2000).

    Parameters
    ----------
    slots : int, optional
        States to keep at a time, at least 1. The sequence is then cut into `slots + 1` segments,
        which is one more run forward, unless `segment` is given too.
    memory : int or str, optional
        Instead of `slots`: the most that a call may allocate beyond its input and results, in bytes
        or as text such as "64MB" (1000**2) or "64MiB" (1024**2). Slots and segment are chosen so
        that the fewest steps are run again; where one percent more steps allow segments that stay
        in the cache, the longest of these are taken, which may leave much of the memory unused.
    segment : int, optional
        With `slots`: steps to record at a time.

    Raises
    ------
    ValueError
        If not exactly one of `slots` and `memory` is given, or one is out of range. From a call, if
        `memory` is too small for the problem: the message has the smallest that works.
    TypeError
        If one has the wrong type.

    References
    ----------
    A. Gruslys et al., "Memory-efficient backpropagation through time", NeurIPS 2016; A. Griewank
    and A. Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26(1), 2000.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.LSTM(3, 4, seed=0), fb.Linear(4, 2, seed=1))
    >>> x, target = np.ones((1000, 2, 3), np.float32), np.zeros((1000, 2), int)
    >>> little = fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(slots=20))
    >>> full = fb.value_and_grad(model, x, target)
    >>> all(np.array_equal(little.grads[name], full.grads[name]) for name in full.grads)
    True
    """

    slots: int | None
    memory: int | None
    segment: int | None

    def __init__(
        self,
        slots: int | None = None,
        memory: int | str | None = None,
        segment: int | None = None,
    ) -> None:
        if (slots is None) == (memory is None):
            got = "neither" if slots is None else "both"
            raise ValueError(f"slots, memory: got {got}, wanted one of them")
        if segment is not None and slots is None:
            raise ValueError("segment: got one with memory, wanted None: the memory decides it")
        for name, value in (("slots", slots), ("segment", segment)):
            object.__setattr__(self, name, None if value is None else as_size(name, value))
        object.__setattr__(self, "memory", None if memory is None else as_bytes("memory", memory))

    def division(self, T: int, needs: Needs) -> tuple[int, int]:
        """Return the slots and the steps of a segment for `T` steps.

        Raises
        ------
        ValueError
            If `memory` is too small.
        """
        if self.slots is not None:
            return self.slots, self.segment or -(-T // (self.slots + 1))
        assert self.memory is not None
        # What is fixed depends on the segment, and the segment on what that leaves: so some lengths
        # are tried, near enough to each other, and what is best with no more than each.
        found = []
        cached = min(T, _CACHED // needs.step)
        for longest in {*_lengths(T), _blocks(T, 2), max(1, cached)}:
            left = self.memory - needs.fixed(longest)
            if left < least_bytes(needs.state, needs.step, T):
                continue
            chosen = choose(T, needs.state, needs.step, left)[1]
            for segment in {min(longest, chosen), longest}:
                left = self.memory - needs.fixed(segment) - segment * needs.step
                used = _blocks(T, segment) - 1
                slots = min(left // needs.state, used)
                if left >= 0 and slots >= min(2, used):
                    found.append((slots, segment))
        if not found:
            raise ValueError(
                f"memory: got {self.memory} bytes, wanted at least {_least_memory(T, needs)}"
            )

        def cost(division: tuple[int, int]) -> int:
            return advanced_steps(T, *division)

        best = min(found, key=cost)
        for slots in range(max(1, best[0] - 1), best[0] + 2):
            left = self.memory - slots * needs.state
            # Binary search for the longest segment beside so many states.
            segment = bisect_left(
                range(1, T), True, key=lambda n: needs.fixed(n) + n * needs.step > left
            )
            if segment >= 1 and slots >= min(2, _blocks(T, segment) - 1):
                best = min(best, (min(slots, _blocks(T, segment) - 1), segment), key=cost)
        # A few steps more are less work than a tape from memory, or than many short calls.
        most = 101 * (T + cost(best)) // 100 - T
        short = [
            division
            for division in (*found, best)
            if division[1] <= cached and cost(division) <= most
        ]
        return max(short, key=lambda division: (division[1], -cost(division)), default=best)

    def plan(self, T: int, needs: Needs) -> Iterator[Action]:
        """Return the actions for `T` steps."""
        slots, segment = self.division(T, needs)
        return plan(T, slots, segment)

    def explain(self, model: Model, T: int, B: int) -> str:
        """Return in words how a sequence of `T` steps of `B` rows would be trained on.

        Parameters
        ----------
        model : Model
            With a named loss; x and target are arrays.
        T, B : int

        Returns
        -------
        str
            Slots, segments, what is run again, and the peak of what is allocated.

        Raises
        ------
        TypeError
            `model` is no Model, or a size no integer.
        ValueError
            A size is too small, the model runs in two directions, or the memory is too small.

        Examples
        --------
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.LSTM(64, 256))
        >>> print(fb.Checkpointed(slots=50).explain(model, T=1020, B=16).split(";")[0])
        50 slots, 51 segments of 20 steps
        """
        if not isinstance(model, Model):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Model")
        if model.recurrent.bidirectional:
            raise ValueError(
                f"model: got {model.recurrent!r}, wanted one direction: time cannot be cut in two"
            )
        T, B = as_size("T", T), as_size("B", B)
        needs = needs_of(model, T, B)
        slots, segment = self.division(T, needs)
        again = advanced_steps(T, slots, segment) / T
        peak = needs.fixed(min(segment, T)) + slots * needs.state + min(segment, T) * needs.step
        whole = needs.fixed(T) + T * needs.step
        return (
            f"{slots} slots, {-(-T // segment)} segments of {min(segment, T)} steps; "
            f"{again:.2f} of the steps run forward again; at most {as_text(peak)} allocated, "
            f"{peak / whole:.1%} of the {as_text(whole)} of Full"
        )


def plan(T: int, slots: int, segment: int, *, granularity: int = 1) -> Iterator[Action]:
    """Return the actions of multi-checkpoint backpropagation that advance least.

    A sequence of no more than `segment` steps is recorded as a whole, and no state is kept.

    Parameters
    ----------
    T : int
        Steps of the sequence, at least 0.
    slots : int
        States that may be kept at a time, the one before the first step included; at least 1, or
        0 if `T` is no more than `segment`.
    segment : int
        Steps that may be recorded at a time, at least 1.
    granularity : int
        Segments begin at multiples of this, counted from the first step. If `T` is more than
        `segment`, that must be a multiple of it.

    Returns
    -------
    iterator of Action
        The actions, made as they are asked for: memory goes with `slots`, not with `T`.

    Raises
    ------
    ValueError
        If an argument is less than it may be, or `segment` is not a multiple of `granularity`.
    TypeError
        If one of them is not an integer.

    References
    ----------
    A. Griewank and A. Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software
    26(1), 2000, doi 10.1145/347837.347846; A. Gruslys et al., "Memory-efficient backpropagation
    through time", NeurIPS 2016.

    Examples
    --------
    >>> from fastbptt.checkpointing import plan
    >>> [(action.verb, action.t0, action.t1) for action in plan(30, slots=1, segment=10)]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('store', 0, 0), ('advance', 0, 20), ('record', 20, 30), ('reverse', 20, 30),
     ('restore', 0, 0), ('advance', 0, 10), ('record', 10, 20), ('reverse', 10, 20),
     ('restore', 0, 0), ('record', 0, 10), ('reverse', 0, 10)]
    """
    T, slots, segment, granularity = _checked(T, slots, segment, granularity)
    return Full().plan(T) if segment >= T else _revolve(T, slots, segment, granularity)


def advanced_steps(T: int, slots: int, segment: int, *, granularity: int = 1) -> int:
    """Return how many steps `plan` advances over: those it runs beside the `T` that it records.

    With `T` rounded up to `granularity`, and `r` the least number for which `segment *
    binomial(slots + r, r)` is at least `T`, it is `r * T - segment * binomial(slots + r, r - 1)`;
    where `T` is no more than `segment` it is 0. No plan with these slots and segments has fewer.

    Parameters
    ----------
    T, slots, segment, granularity : int
        As for `plan`.

    Returns
    -------
    int
        The number of steps, each counted as often as it is advanced over.

    Raises
    ------
    ValueError, TypeError
        As for `plan`.

    Examples
    --------
    >>> from fastbptt.checkpointing import advanced_steps
    >>> [advanced_steps(1000, slots, 10) for slots in (1, 2, 5, 10, 99)]
    [49500, 8450, 3160, 2220, 990]
    """
    T, slots, segment, granularity = _checked(T, slots, segment, granularity)
    if segment >= T:
        return 0
    return _advanced(_blocks(T, granularity) * granularity, slots, segment)


def choose(
    T: int, state_bytes: int, step_bytes: int, available_bytes: int, *, granularity: int = 1
) -> tuple[int, int]:
    """Return the division of a memory between kept states and tape that advances least.

    Of several that advance over as few steps, it is the one that takes the least memory. Where the
    whole sequence can be recorded, that is `(0, T)`.

    Parameters
    ----------
    T : int
        Steps of the sequence, at least 1.
    state_bytes, step_bytes : int
        Memory of one kept state, and of one recorded step.
    available_bytes : int
        Memory to divide, at least `least_bytes(state_bytes, step_bytes, T)`.
    granularity : int
        Segments begin at multiples of this, as for `plan`.

    Returns
    -------
    slots, segment : int
        For `plan`: `slots * state_bytes + segment * step_bytes` is at most `available_bytes`.

    Raises
    ------
    ValueError
        If an argument is less than it may be.
    TypeError
        If one of them is not an integer.

    Examples
    --------
    >>> from fastbptt.checkpointing import advanced_steps, choose
    >>> choose(1000, state_bytes=100, step_bytes=500, available_bytes=40_000)
    (12, 77)
    >>> advanced_steps(1000, 12, 77)
    923
    """
    T = as_size("T", T)
    available = as_size("available_bytes", available_bytes)
    least = least_bytes(state_bytes, step_bytes, T, granularity=granularity)
    if available < least:
        raise ValueError(f"available_bytes: got {available}, wanted at least {least}")
    state, step = as_size("state_bytes", state_bytes), as_size("step_bytes", step_bytes)
    if T * step <= available:
        return 0, T
    granularity = as_size("granularity", granularity)
    slots, blocks = _divide(_blocks(T, granularity), state, granularity * step, available)
    return slots, blocks * granularity


def least_bytes(
    state_bytes: int, step_bytes: int, T: int | None = None, *, granularity: int = 1
) -> int:
    """Return the least memory that `choose` takes: two kept states and one recorded step.

    One state would do, but to go back to it before each step takes time that goes with the square
    of `T`. Short sequences may need less: none if recorded as a whole, one if in two segments.

    Parameters
    ----------
    state_bytes, step_bytes : int
        Memory of one kept state, and of one recorded step.
    T : int, optional
        Steps of the sequence; by default what is enough for any.
    granularity : int
        Segments begin at multiples of this, as for `plan`; so many steps are recorded at least.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If an argument is less than 1.
    TypeError
        If one of them is not an integer.

    Examples
    --------
    >>> from fastbptt.checkpointing import least_bytes
    >>> least_bytes(100, 500), least_bytes(100, 500, T=2), least_bytes(100, 500, T=1)
    (700, 600, 500)
    """
    state, step = as_size("state_bytes", state_bytes), as_size("step_bytes", step_bytes)
    granularity = as_size("granularity", granularity)
    with_two = 2 * state + granularity * step
    if T is None:
        return with_two
    T = as_size("T", T)
    half = _blocks(_blocks(T, granularity), 2) * granularity
    return min(T * step, state + half * step, with_two)


def _checked(T: Any, slots: Any, segment: Any, granularity: Any) -> tuple[int, int, int, int]:
    T, segment = as_size("T", T, least=0), as_size("segment", segment)
    slots, granularity = as_size("slots", slots, least=0), as_size("granularity", granularity)
    if segment < T:
        if slots == 0:
            raise ValueError(
                f"slots: got 0, wanted at least 1 for T = {T} over segment = {segment}"
            )
        if segment % granularity:
            raise ValueError(
                f"segment: got {segment}, wanted a multiple of granularity = {granularity}"
            )
    return T, slots, segment, granularity


def _lengths(T: int) -> Iterator[int]:
    """Return T, then lengths that get shorter by about a seventh each time, from 14 on by 1."""
    length = T
    while length > 0:
        yield length
        length = length * 6 // 7 if length > 14 else length - 1


def _least_memory(T: int, needs: Needs) -> int:
    """Return the least memory for T steps: in one segment, in two, or with two kept states."""
    half = _blocks(T, 2)
    return min(
        needs.fixed(T) + T * needs.step,
        needs.fixed(half) + needs.state + half * needs.step,
        needs.fixed(1) + 2 * needs.state + needs.step,
    )


def _blocks(steps: int, size: int) -> int:
    """Return how many blocks of `size` steps are begun in `steps`."""
    return -(-steps // size)


def _repetitions(T: int, slots: int, segment: int) -> int:
    """Return the least r with `segment * beta(slots, r) >= T`, which is at least 1."""
    high = 1
    while segment * comb(slots + high, high) < T:
        high *= 2
    return bisect_left(range(high), T, key=lambda r: segment * comb(slots + r, r))


def _advanced(T: int, slots: int, segment: int) -> int:
    """Return the sum of `T - segment * beta(slots, r)` over all r where it is more than 0.

    It is the greatest partial sum; the first r terms come to `r * T - segment * binomial(slots + r,
    r - 1)`.
    """
    r = _repetitions(T, slots, segment)
    return r * T - segment * comb(slots + r, r - 1)


def _revolve(T: int, slots: int, segment: int, granularity: int) -> Iterator[Action]:
    """Return the actions for `T > segment`.

    A range of L steps with s slots, to be advanced over r times at most, is cut after k steps. The
    cut loses nothing if none of the terms that `advanced_steps` sums up is positive for one part
    and negative for the other, which is so if both hold:

        segment * beta(s, r - 2)  <=  k      <=  segment * beta(s, r - 1)
        segment * beta(s - 1, r - 1)  <=  L - k  <=  segment * beta(s - 1, r)

    As `segment * beta(s, r - 1) <= L <= segment * beta(s, r)`, there is such a k, and the parts,
    with (s, r - 1) and (s - 1, r), are again such ranges. The largest k is taken: it is a multiple
    of `segment`, or leaves one to the right, so there is one shorter segment at most.
    """
    # The last segment is never run again, so the steps that its last block lacks cost nothing.
    begin, end = 0, _blocks(T, granularity) * granularity
    s = min(slots, _blocks(end, segment) - 1)
    r = _repetitions(end, s, segment)
    beta = comb(s + r, s)
    kept: list[tuple[int, int, int, int]] = []  # begin, s, r and beta of what is left of a cut
    is_kept = False
    while True:
        while end - begin > segment:
            if not is_kept:
                yield Action("store", begin, begin)
            left = beta * r // (s + r)  # beta(s, r - 1)
            rest = left * s // (s + r - 1)  # beta(s - 1, r - 1)
            cut = begin + min(segment * left, end - begin - segment * rest)
            kept.append((begin, s, r - 1, left))
            yield Action("advance", begin, cut)
            begin, s, beta, is_kept = cut, s - 1, beta - left, False
        yield Action("record", begin, min(end, T))
        yield Action("reverse", begin, min(end, T))
        if not kept:
            return
        end = begin
        begin, s, r, beta = kept.pop()
        yield Action("restore", begin, begin, last=end - begin <= segment)
        is_kept = True


def _divide(blocks: int, state: int, block: int, available: int) -> tuple[int, int]:
    """Return slots and blocks of a segment for `choose`, where not all blocks can be recorded.

    More slots leave a shorter segment. Need that not be a whole number of blocks, the cost would be
    the maximum over r of `r * T - segment * binomial(slots + r, r - 1)`, with a segment that gets
    shorter by the same length with each slot. The logarithm of each product is strictly concave in
    the slots, so the cost falls up to one place and rises from there. Whole blocks only add to it:
    from that place to both sides, it is enough to look until this bound is above the best found.
    """

    def bound(slots: int) -> int:
        return _advanced(blocks * block, slots, available - slots * state)  # in bytes of the tape

    def cost(division: tuple[int, int]) -> tuple[int, int]:
        slots, length = division
        return _advanced(blocks, slots, length) * block, slots * state + length * block

    def of_length(length: int) -> tuple[int, int]:
        # As many slots as there is room for, but no more than are used.
        return min((available - length * block) // state, _blocks(blocks, length) - 1), length

    most = (available - block) // state
    lowest = 1 + bisect_left(
        range(1, most), True, key=lambda slots: bound(slots) <= bound(slots + 1)
    )
    best = of_length((available - lowest * state) // block)
    for more in (True, False):
        slots = lowest
        while 1 <= slots <= most and bound(slots) <= cost(best)[0]:
            length = (available - slots * state) // block
            best = min(best, of_length(length), key=cost)
            # The next number of slots that leaves another length.
            if more:
                slots = (available - length * block) // state + 1
            else:
                slots = (available - (length + 1) * block) // state
    return best
