"""Ctrl-C stops a long call within a second, and other Python threads run beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb

HERE = Path(__file__).parent
SECONDS = 5.0  # that a call would take if nothing stopped it
PATIENCE = 1.0  # from the signal to the exception


class Work:
    """A call of a chosen length, its layer, and a small problem that tells if all is well."""

    def __init__(self, verb: str, seconds: float) -> None:
        # Large weights and one row: much time a step, in few bytes of input and tape.
        wide = verb == "wide_input"
        self.layer = fb.LSTM(2048, 128) if wide else fb.LSTM(1, 2048)
        self.model = fb.Model(self.layer, fb.Linear(self.layer.hidden_size, 1))
        self.rng = np.random.default_rng(0)
        self.shape = (16 if wide else 1, self.layer.input_size)
        call = getattr(self, verb)
        # The time of a step, from a run that is long beside the fixed cost of a call.
        T = 16
        for _ in range(3):
            prepared = call(T)
            start = time.perf_counter()
            prepared()
            taken = time.perf_counter() - start
            if taken > 0.2:
                break
            T = int(T * min(0.3 / taken, 50.0)) + 1
        self.call = call(max(1, int(T * seconds / taken)))

    def x(self, T: int) -> np.ndarray:
        """One step, T times: to draw all of them would take longer than the call."""
        step = self.rng.standard_normal(self.shape, dtype=np.float32)
        return np.broadcast_to(step, (T, *self.shape))

    def advance(self, T: int):
        x = self.x(T)
        return lambda: self.layer(x)

    wide_input = advance

    def record(self, T: int):
        x = self.x(T)
        return lambda: self.layer.forward(x)

    def reverse(self, T: int):
        y, _, tape = self.layer.forward(self.x(T))
        return lambda: self.layer.backward(tape, y)

    def value_and_grad(self, T: int):
        x = self.x(T)
        return lambda: fb.value_and_grad(self.model, x, x, loss="mse")

    def truncated(self, T: int):
        x = self.x(T)
        schedule = fb.Truncated(100)
        return lambda: fb.value_and_grad(self.model, x, x, loss="mse", schedule=schedule)

    def checkpointed(self, T: int):
        x = self.x(T)
        schedule = fb.Checkpointed(slots=4)
        return lambda: fb.value_and_grad(self.model, x, x, loss="mse", schedule=schedule)

    def evaluate(self, T: int):
        x = self.x(T)
        return lambda: fb.evaluate(self.model, x, x, loss="mse")

    def small(self) -> list[np.ndarray]:
        x = np.sin(np.arange(3.0 * self.shape[1])).reshape(3, 1, -1).astype("float32")
        y, state, tape = self.layer.forward(x)
        grads = self.layer.backward(tape, y, state)
        return [y, *state, grads.x, *grads.state, *grads.weights.values()]


def delay_of(call: Callable[[], object]) -> float:
    """How long the call, which a signal interrupts, goes on behind it; no longer than it may."""
    # A shell's background job inherits SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent = []

    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.1, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        delay = time.perf_counter() - sent[0]
    else:
        sys.exit("the call ended as if nothing had happened")
    timer.join()
    if delay > PATIENCE:
        sys.exit(f"the call went on for {delay:.2f} s")
    return delay


def in_a_process(call: str) -> None:
    """Call a function of this file in a process of its own: no signal is to end the tests."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_interrupt; test_interrupt.{call}"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def interrupt(verb: str) -> None:
    work = Work(verb, SECONDS)
    expected = work.small()
    delay = delay_of(work.call)
    for actual, wanted in zip(work.small(), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    print(f"{delay:.3f}")


VERBS = [
    "advance",
    "record",
    "reverse",
    "wide_input",
    "value_and_grad",
    "truncated",
    "checkpointed",
    "evaluate",
]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process on Windows")
@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_stops_a_long_call_and_leaves_all_usable(verb):
    in_a_process(f"interrupt({verb!r})")


@pytest.mark.parametrize("verb", ["advance", "record", "reverse"])
def test_other_threads_run_beside_a_call(verb):
    work = Work(verb, 0.5)
    ticks = []
    ended = threading.Event()

    def tick():
        while not ended.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        start = time.perf_counter()
        work.call()
        end = time.perf_counter()
    finally:
        ended.set()
        ticker.join()
    during = np.array([start, *(tick for tick in ticks if start < tick < end), end])
    assert np.diff(during).max() < 0.5 * (end - start)


def interrupt_block() -> None:
    """An interrupted block has counted what it has learnt."""
    model = fb.Model(fb.GRU(8, 96, seed=0))
    streams = [fb.Stream(model, "mse", fb.RTRL(every=10**6)) for _ in range(2)]
    x, target = np.ones((3000, 1, 8), np.float32), np.ones((3000, 1, 96), np.float32)
    for stream in streams:
        stream.push(x[:1], target[:1])
    delay_of(lambda: streams[0].push(x[1:], target[1:]))
    steps = streams[0].steps
    streams[1].push(x[1:steps], target[1:steps])
    for a, b in zip(*(stream.state_dict()["stream"].values() for stream in streams), strict=True):
        np.testing.assert_array_equal(a, b)
    assert streams[0].state_dict()["config"] == streams[1].state_dict()["config"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process on Windows")
def test_ctrl_c_in_a_block_of_a_stream():
    in_a_process("interrupt_block()")


def test_calls_from_several_threads_do_not_mix():
    layer = fb.GRU(7, 33, 2, dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((50, 4, 7)) for _ in range(4)]

    def results(x):
        y, _, tape = layer.forward(x)
        grads = layer.backward(tape, y)
        return [y, grads.x, *grads.weights.values()]

    expected = [results(x) for x in inputs]
    wrong = []

    def worker(k):
        for _ in range(20):
            for actual, wanted in zip(results(inputs[k]), expected[k], strict=True):
                if not np.array_equal(actual, wanted):
                    wrong.append(k)

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
