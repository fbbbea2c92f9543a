"""Plans of checkpoints: they can be done, stay inside their memory, and none advances less.

The closed form is held against three others: an exhaustive search over all orders of actions, a
dynamic program over all cuts, and the schedules of the package checkpoint_schedules.
"""

from __future__ import annotations

import heapq
import itertools
import tracemalloc
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fastbptt as fb
from conftest import require
from fastbptt.checkpointing import advanced_steps, choose, least_bytes, plan
from plans import Simulator
from reference import CELLS, make_layer


@cache
def fewest(L, slots, segment, granularity=1):
    """Every cut of a range of L steps is tried; None if there are no slots to cut it."""
    if segment >= L:
        return 0
    if slots == 0:
        return None
    cuts = (
        (k, fewest(L - k, slots - 1, segment, granularity), fewest(k, slots, segment, granularity))
        for k in range(granularity, L, granularity)
    )
    return min(k + left + right for k, right, left in cuts if right is not None)


def fewest_of_any_plan(T, slots, segment):
    """Dijkstra's algorithm over present step, kept states and steps not yet reversed.

    Nothing is taken for granted about the order of actions but that steps are reversed last first,
    each from a tape of `segment` steps at most, and that `slots` states are kept at a time.
    """
    start = (0, frozenset(), T)
    done, queue, ties = set(), [(0, 0, start)], itertools.count(1)
    while queue:
        cost, _, situation = heapq.heappop(queue)
        if situation in done:
            continue
        done.add(situation)
        t, kept, end = situation
        if end == 0:
            return cost
        following = [(0, (step, kept, end)) for step in kept]
        following += [(0, (t, kept - {step}, end)) for step in kept]
        if len(kept) < slots:
            following.append((0, (t, kept | {t}, end)))
        if t < end:
            following.append((1, (t + 1, kept, end)))
        if 0 < end - t <= segment:
            following.append((0, (end, kept, t)))
        for more, new in following:
            if new not in done:
                heapq.heappush(queue, (cost + more, next(ties), new))
    raise AssertionError("every plan gets stuck")


SMALL = [
    (slots, segment, granularity)
    for slots in (1, 2, 3, 4, 6, 9)
    for granularity in (1, 2, 3, 4)
    for segment in range(granularity, 11, granularity)
]


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_plan_at_all_advances_less(slots, segment):
    for T in range(1, 10):
        assert advanced_steps(T, slots, segment) == fewest_of_any_plan(T, slots, segment)


def test_no_cuts_advance_less():
    for slots, segment, granularity in SMALL:
        for T in range(1, 61):
            got = advanced_steps(T, slots, segment, granularity=granularity)
            assert got == fewest(T, slots, segment, granularity), (T, slots, segment, granularity)


def assert_kept(T, slots, segment, granularity=1):
    """The plan can be done, and is what it should be."""
    simulator = Simulator(T).run(plan(T, slots, segment, granularity=granularity))
    expected = advanced_steps(T, slots, segment, granularity=granularity)
    assert simulator.advanced == expected
    assert simulator.most_stored <= slots
    assert simulator.most_recorded <= segment
    # Each step is recorded once, in segments from the last to the first, no more than are needed.
    assert [*(t1 for _, t1 in simulator.recorded), 0] == [T, *(t0 for t0, _ in simulator.recorded)]
    assert all(t0 % granularity == 0 for t0, _ in simulator.recorded)
    assert len(simulator.recorded) == -(-T // segment)
    # The gradient of every step's loss is carried back to the first step.
    assert set(simulator.reach) == set(range(T))
    assert set(simulator.reach.values()) == {0}


def test_small_plans_advance_as_much_as_they_say():
    for slots, segment, granularity in SMALL:
        for T in (*range(1, 31), 60):
            assert_kept(T, slots, segment, granularity)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 30), st.integers(1, 20))
def test_plans_advance_as_much_as_they_say(T, slots, blocks, granularity):
    assert_kept(T, slots, blocks * granularity, granularity)


@pytest.mark.parametrize("name", ["Revolve", "MultistageCheckpointSchedule"])
def test_checkpoint_schedules_advances_as_much(name):
    """Its steps that keep what the reverse needs (`write_adj_deps`) are those recorded here.

    It has one such step at a time: a segment of one step. All other forward steps are advanced,
    those of the first run through the sequence included, and the state at step 0 takes a slot.
    """
    package = require("checkpoint_schedules")
    for T, slots in itertools.product((2, 3, 4, 5, 8, 13, 21, 34, 50), (1, 2, 3, 4, 7, 12, 60)):
        # Revolve takes the slots in memory, the other those in memory and on disk.
        disk = () if name == "Revolve" else (0,)
        advanced, recorded = 0, 0
        for action in getattr(package, name)(T, slots, *disk):
            if isinstance(action, package.Forward):
                steps = action.n1 - action.n0
                advanced += 0 if action.write_adj_deps else steps
                recorded += steps if action.write_adj_deps else 0
            if isinstance(action, package.EndReverse):
                break
        assert recorded == T
        assert advanced_steps(T, slots, 1) == advanced, (T, slots)
        # With longer segments, as many blocks of steps as it has steps.
        assert advanced_steps(7 * T, slots, 7) == 7 * advanced


@pytest.mark.parametrize(("slots", "segment"), [(0, 8), (1, 8), (5, 8), (0, 100)])
def test_a_sequence_that_fits_is_recorded_whole(slots, segment):
    assert list(plan(8, slots, segment, granularity=3)) == list(fb.Full().plan(8))
    assert advanced_steps(8, slots, segment, granularity=3) == 0
    assert list(plan(0, slots, segment)) == []


def test_the_last_segment_is_recorded_in_the_first_run():
    verbs = [action.verb for action in plan(100, 4, 10)]
    first = verbs.index("record")
    assert set(verbs[:first]) == {"store", "advance"}
    recorded = next(action for action in plan(100, 4, 10) if action.verb == "record")
    assert recorded.t1 == 100


@pytest.mark.parametrize(
    ("T", "slots", "segment", "granularity"),
    [(10**6, 15, 64, 1), (10**6, 200, 4992, 32), (999_999, 999, 1000, 8), (10**6, 2, 1000, 1)],
)
def test_long_plans(T, slots, segment, granularity):
    stored, present, end, advanced = set(), 0, T, 0
    for action in plan(T, slots, segment, granularity=granularity):
        t0, t1 = action.t0, action.t1
        if action.verb == "restore":
            assert t0 in stored
            present = t0
            stored -= {t0} if action.last else set()
        elif action.verb == "reverse":
            assert (t0, t1) == (present, end)
            end = t0
        else:
            assert t0 == present
            if action.verb == "store":
                stored.add(t0)
                assert len(stored) <= slots
            elif action.verb == "advance":
                advanced += t1 - t0
                present = t1
            else:
                assert t1 == end
                assert t1 - t0 <= segment
                assert t0 % granularity == 0
    assert end == 0
    assert not stored
    assert advanced == advanced_steps(T, slots, segment, granularity=granularity)


def test_plans_are_produced_as_they_are_used():
    actions = plan(10**15, 40, 7)
    assert [next(actions).verb for _ in range(3)] == ["store", "advance", "store"]


@pytest.mark.parametrize("slots", [3, 30, 3000])
def test_the_memory_of_a_plan_goes_with_its_slots(slots):
    tracemalloc.start()
    try:
        for _ in plan(10**6, slots, 200):
            pass
        assert tracemalloc.get_traced_memory()[1] < 10_000 + 500 * slots
    finally:
        tracemalloc.stop()


class Checkpoints:
    def __init__(self, *sizes):
        self.sizes = sizes

    def plan(self, T, needs=None):
        return plan(T, *self.sizes)


@pytest.mark.parametrize("sizes", [(1, 4), (2, 1), (3, 5), (9, 2)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_is_that_of_the_whole(cell, sizes, rng):
    model = fb.Model(make_layer(cell, 3, 5, 2, dtype="float64", seed=1))
    x, target = rng.standard_normal((23, 2, 3)), rng.standard_normal((23, 2, 5))
    full = fb.value_and_grad(model, x, target, "mse")
    result = fb.value_and_grad(model, x, target, "mse", schedule=Checkpoints(*sizes))
    assert result.loss == pytest.approx(full.loss, rel=1e-13)
    for name, grad in full.grads.items():
        np.testing.assert_allclose(result.grads[name], grad, rtol=1e-11, atol=1e-14)
    for got, want in zip(np.atleast_1d(result.state), np.atleast_1d(full.state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13)


def best(T, state, step, available, granularity, most_slots=None):
    """Every division is tried: the fewest steps, then the least memory."""
    if T * step <= available:
        return 0, T * step
    lengths = range(granularity, (available - state) // step + 1, granularity)
    return min(
        (advanced_steps(T, slots, length, granularity=granularity), slots * state + length * step)
        for length in lengths
        for slots in range(1, min((available - length * step) // state, most_slots or T) + 1)
    )


def assert_best(T, state, step, available, granularity):
    slots, segment = choose(T, state, step, available, granularity=granularity)
    memory = slots * state + segment * step
    assert memory <= available
    cost = advanced_steps(T, slots, segment, granularity=granularity)
    assert (cost, memory) == best(T, state, step, available, granularity)


@given(
    T=st.integers(1, 150),
    state=st.integers(1, 40),
    step=st.integers(1, 40),
    more=st.integers(0, 1500),
    granularity=st.integers(1, 12),
)
@example(T=150, state=1, step=40, more=1500, granularity=1)
@example(T=150, state=40, step=1, more=70, granularity=1)
def test_no_division_advances_less_or_takes_less_memory(T, state, step, more, granularity):
    least = least_bytes(state, step, T, granularity=granularity)
    assert_best(T, state, step, least + more, granularity)


def test_all_divisions_of_small_memories():
    for T, state, step, granularity in itertools.product((2, 7, 30), (1, 3, 8), (1, 2, 5), (1, 3)):
        least = least_bytes(state, step, T, granularity=granularity)
        for available in range(least, least + 60):
            assert_best(T, state, step, available, granularity)


@pytest.mark.parametrize(
    ("state", "step", "available", "granularity"),
    [(2048, 20_000, 10**7, 1), (10**5, 100, 10**7, 32), (1, 1, 300, 1), (3, 1000, 30_000, 2)],
)
def test_divisions_for_long_sequences(state, step, available, granularity):
    T = 10**6
    slots, segment = choose(T, state, step, available, granularity=granularity)
    cost = advanced_steps(T, slots, segment, granularity=granularity)
    # For each number of slots the longest segment is the best one.
    longest = {
        slots: (available - slots * state) // (granularity * step) * granularity
        for slots in range(1, (available - granularity * step) // state + 1)
    }
    assert cost == min(
        advanced_steps(T, slots, segment, granularity=granularity)
        for slots, segment in longest.items()
    )


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 256))
def test_the_least_memory_is_enough_and_needed(T, state, step, granularity):
    least = least_bytes(state, step, T, granularity=granularity)
    assert least <= least_bytes(state, step, granularity=granularity)
    slots, segment = choose(T, state, step, least, granularity=granularity)
    assert slots * state + segment * step <= least
    if least > 1:
        with pytest.raises(ValueError, match=f"available_bytes: got {least - 1}, .*{least}"):
            choose(T, state, step, least - 1, granularity=granularity)


def test_more_memory_is_never_worse():
    costs = [
        advanced_steps(100_000, *choose(100_000, 64, 500, available))
        for available in np.geomspace(1000, 60_000_000, 200).astype(int)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_integers_of_numpy():
    assert list(plan(*np.array([50, 2, 10]))) == list(plan(50, 2, 10))
    assert all(type(size) is int for size in choose(*np.array([50, 2, 3, 60])))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: plan(-1, 2, 3), ValueError, "T: got -1, wanted at least 0"),
        (lambda: plan(9, -1, 3), ValueError, "slots: got -1, wanted at least 0"),
        (lambda: plan(9, 0, 3), ValueError, "slots: got 0, wanted at least 1 for T = 9 over"),
        (lambda: plan(9, 2, 0), ValueError, "segment: got 0, wanted at least 1"),
        (
            lambda: plan(9, 2, 6, granularity=4),
            ValueError,
            "segment: got 6, wanted a multiple of granularity = 4",
        ),
        (lambda: plan(9, 2, 3, granularity=0), ValueError, "granularity: got 0"),
        (lambda: plan(9.0, 2, 3), TypeError, "T: got 9.0, wanted an integer"),
        (lambda: plan(9, True, 3), TypeError, "slots: got True, wanted an integer"),
        (lambda: plan(9, 2, "3"), TypeError, "segment: got '3', wanted an integer"),
        (lambda: advanced_steps(9, 0, 3), ValueError, "slots: got 0, wanted at least 1"),
        (lambda: advanced_steps(9, None, 3), TypeError, "slots: got None, wanted an integer"),
        (lambda: choose(0, 1, 1, 9), ValueError, "T: got 0, wanted at least 1"),
        (lambda: choose(9, 0, 1, 9), ValueError, "state_bytes: got 0, wanted at least 1"),
        (lambda: choose(9, 1, 0, 9), ValueError, "step_bytes: got 0, wanted at least 1"),
        (lambda: choose(9, 2, 3, 0), ValueError, "available_bytes: got 0"),
        (lambda: choose(9, 2, 3, 6), ValueError, "available_bytes: got 6, wanted at least 7"),
        (lambda: choose(9, 2, 3, 1e6), TypeError, "available_bytes: got 1000000.0"),
        (lambda: choose(9, 2, 3, 99, granularity=1.5), TypeError, "granularity: got 1.5"),
        (lambda: least_bytes(0, 3), ValueError, "state_bytes: got 0"),
        (lambda: least_bytes(2, 3, 0), ValueError, "T: got 0, wanted at least 1"),
        (lambda: least_bytes(2, "3"), TypeError, "step_bytes: got '3'"),
    ],
)
def test_bad_arguments(call, error, words):
    """They are refused at the call, not when the first action is asked for."""
    with pytest.raises(error, match=words):
        call()


def test_explain_refuses_what_cannot_be_cut():
    with pytest.raises(TypeError, match="model: got GRU, wanted a Model"):
        fb.Checkpointed(slots=3).explain(fb.GRU(2, 3), 10, 1)
    with pytest.raises(ValueError, match="wanted one direction"):
        fb.Checkpointed(slots=3).explain(fb.Model(fb.GRU(2, 3, bidirectional=True)), 10, 1)
