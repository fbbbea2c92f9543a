"""Threads: the same bits for the same count, also beside other calls and after fork; idle sleep."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastbptt as fb
from reference import (
    KERNELS,
    Problem,
    Results,
    assert_close,
    draw,
    layer_for,
    rounding,
    run_library,
)

HERE = Path(__file__).parent

# Few rows are worked on by all threads together, more are shared out among them.
BATCHES = {"shared steps": 3, "shared batch": 25}


@pytest.fixture(autouse=True)
def keep_num_threads():
    before = fb.get_num_threads()
    yield
    fb.set_num_threads(before)


def problem_of(cell: str, batch: str, dtype: str = "float32") -> Problem:
    B = BATCHES[batch]
    rng = np.random.default_rng(B)
    # A single layer of relu units: of more, one or another sum is always near the kink.
    return draw(rng, cell, 20 if B < 9 else 7, B, 90, 121, dtype=dtype, relu_margin=1e-6)


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert set(actual) == set(expected)
    for name, want in expected.items():
        np.testing.assert_array_equal(actual[name], want, err_msg=name)


def in_threads(count: int, body) -> None:
    """Calls body(k) in `count` threads at once; what one raises comes out."""
    raised = []

    def guarded(k):
        try:
            body(k)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        raise error


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, here among the tests."""
    kept = {name: value for name, value in os.environ.items() if name != "FASTBPTT_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | env,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def run_here(function: str, **env: str) -> None:
    done = python(f"import test_threads; test_threads.{function}()", **env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_repeated_and_concurrent_calls_give_the_same_bits(cell, batch, threads):
    fb.set_num_threads(threads)
    problem = problem_of(cell, batch)
    layer = layer_for(problem)
    expected = run_library(problem, layer)

    def calls(_):
        for _ in range(3):
            assert_same_bits(run_library(problem, layer), expected)

    calls(0)
    in_threads(4, calls)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", KERNELS)
def test_thread_counts_agree_to_rounding(cell, dtype, batch):
    problem = problem_of(cell, batch, dtype)
    fb.set_num_threads(1)
    expected = run_library(problem)
    for threads in (2, 3, 5, 16):
        fb.set_num_threads(threads)
        assert_close(run_library(problem), expected, 2.0 * rounding(problem))


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize(("hidden_size", "batch"), [(800, 16), (1200, 32)])
def test_threads_share_large_weights(cell, hidden_size, batch, rng):
    """Not the rows of the batch: so the sums are those of one thread, bit for bit."""
    problem = draw(rng, cell, 2, batch, 5, hidden_size, dtype="float32", relu_margin=0)
    layer = layer_for(problem)
    results = []
    for count in (1, 2):
        fb.set_num_threads(count)
        results.append(run_library(problem, layer))
    assert_same_bits(*results)


def test_a_training_step_gives_the_same_bits_beside_others():
    fb.set_num_threads(3)
    model = fb.Model(fb.Embedding(50, 40, seed=0), fb.LSTM(40, 80, 2, seed=1), fb.Linear(80, 50))
    text = np.random.default_rng(0).integers(0, 50, (4, 41, 30))

    def step(k):
        result = fb.value_and_grad(model, text[k, :-1], text[k, 1:], schedule=fb.Truncated(16))
        return {"loss": np.array(result.loss), **result.grads}

    expected = [step(k) for k in range(4)]

    def calls(k):
        for _ in range(3):
            assert_same_bits(step(k), expected[k])

    in_threads(4, calls)


def test_the_count_may_change_while_calls_run():
    problem = problem_of("lstm", "shared steps")
    layer = layer_for(problem)
    fb.set_num_threads(1)
    expected = run_library(problem, layer)

    def calls(k):
        for n in range(10):
            fb.set_num_threads(1 + (n + k) % 4)
            assert_close(run_library(problem, layer), expected, 2.0 * rounding(problem))

    in_threads(3, calls)


def test_a_loss_is_right_while_the_count_changes(rng):
    model = fb.Model(fb.RNN(8, 64, seed=0), fb.Linear(64, 500, seed=0))
    x, target = rng.standard_normal((40, 16, 8), "f"), rng.integers(0, 500, (40, 16))
    expected = fb.value_and_grad(model, x, target).loss
    before = fb.get_num_threads()
    ended = threading.Event()

    def change():
        for n in itertools.cycle((1, 2, 64)):
            fb.set_num_threads(n)
            if ended.is_set():
                return

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(100):
            assert abs(fb.value_and_grad(model, x, target).loss - expected) < 1e-5
    finally:
        ended.set()
        changing.join()
        fb.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity to set")
def test_the_bits_do_not_depend_on_the_cpus():
    program = """
import os, sys, numpy as np, fastbptt as fb
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
fb.set_num_threads(2)
layer = fb.LSTM(64, 256, seed=0)
y, _, tape = layer.forward(np.random.default_rng(0).standard_normal((50, 4, 64), "f"))
sys.stdout.buffer.write(b"".join(g.tobytes() for g in layer.backward(tape, y).weights.values()))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", program, cpus], capture_output=True, check=True, timeout=60
        ).stdout
        for cpus in ("1", "2")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("call", ["layer(x)", "fb.value_and_grad(model, x, target)"])
def test_a_daemon_may_compute_at_the_end_of_the_process(call):
    program = f"""
import threading, time, numpy as np, fastbptt as fb
layer = fb.GRU(4, 8)
model = fb.Model(layer, fb.Linear(8, 3))
x, target = np.ones((5, 2, 4), "f"), np.zeros((5, 2), int)

def work():
    while True:
        {call}

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


def fork_and_compare() -> None:
    """Children of a process whose pool is at work compute the same bits and end."""
    context = multiprocessing.get_context("fork")
    fb.set_num_threads(2)
    problems = [problem_of("lstm", batch) for batch in BATCHES]
    layers = [layer_for(problem) for problem in problems]

    def results() -> list[Results]:
        return [
            run_library(problem, layer) for problem, layer in zip(problems, layers, strict=True)
        ]

    expected = results()

    def child() -> None:
        for actual, wanted in zip(results(), expected, strict=True):
            assert_same_bits(actual, wanted)
        assert fb.get_num_threads() == 2

    def fork() -> None:
        process = context.Process(target=child)
        process.start()
        process.join(60)
        if process.exitcode != 0:
            process.kill()
            sys.exit(f"a forked child ended with {process.exitcode}, None: not at all")

    fork()
    ended = threading.Event()

    def busy():
        while not ended.is_set():
            results()

    background = threading.Thread(target=busy)
    background.start()
    try:
        for _ in range(5):
            fork()
    finally:
        ended.set()
        background.join()
    for actual, wanted in zip(results(), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_and_ends():
    # Python itself warns of a fork beside threads.
    done = python(
        "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
        "import test_threads; test_threads.fork_and_compare()"
    )
    assert done.returncode == 0, done.stderr


def idle_time() -> None:
    fb.set_num_threads(4)
    for batch in BATCHES:
        run_library(problem_of("lstm", batch))
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.5)
    used = time.process_time() - start
    if used > 0.1:
        sys.exit(f"{used:.3f} s of CPU time in 0.5 s without work")


def test_idle_workers_sleep():
    run_here("idle_time")


def wait_for_a_signal() -> None:
    fb.set_num_threads(3)
    run_library(problem_of("lstm", "shared batch"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1


@pytest.mark.skipif(not hasattr(signal, "sigwait"), reason="no sigwait on this system")
def test_workers_take_no_signal_that_the_program_waits_for():
    # NumPy's OpenBLAS has workers that would.
    run_here("wait_for_a_signal", OPENBLAS_NUM_THREADS="1")


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), ("1024", 1024)])
def test_the_environment_sets_the_count(value, threads):
    done = python("import fastbptt as fb; print(fb.get_num_threads())", FASTBPTT_NUM_THREADS=value)
    assert done.stdout == f"{threads}\n", done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "1025", "two", "2.5", "2 ", "1e2", "9" * 30])
def test_a_bad_count_in_the_environment_fails_the_import(value):
    done = python(
        "try:\n"
        "    import fastbptt\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    raise SystemExit('imported')\n",
        FASTBPTT_NUM_THREADS=value,
    )
    assert done.returncode == 0, done.stderr
    for wanted in ("FASTBPTT_NUM_THREADS", f"'{value}'", "1 to 1024"):
        assert wanted in done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize("variable", [{}, {"FASTBPTT_NUM_THREADS": ""}])
@pytest.mark.parametrize("cpus", ["{min(allowed)}", "allowed"])
def test_the_default_is_the_cpus_of_the_process(cpus, variable):
    done = python(
        "import os\n"
        "allowed = os.sched_getaffinity(0)\n"
        f"os.sched_setaffinity(0, {cpus})\n"
        "import fastbptt as fb\n"
        "print(fb.get_num_threads(), len(os.sched_getaffinity(0)))\n",
        **variable,
    )
    assert done.returncode == 0, done.stderr
    got, wanted = map(int, done.stdout.split())
    assert got == wanted


@pytest.mark.parametrize("n", [0, -1, 1025, 2**40, -(2**70)])
def test_a_count_out_of_range_is_refused(n):
    before = fb.get_num_threads()
    with pytest.raises(ValueError, match=r"^n: got .*, wanted .*"):
        fb.set_num_threads(n)
    assert fb.get_num_threads() == before


@pytest.mark.parametrize("n", [1.5, 2.0, "a", "2", True, None, [2]])
def test_a_count_that_is_no_integer_is_refused(n):
    before = fb.get_num_threads()
    with pytest.raises(TypeError, match=r"^n: got .*, wanted .*"):
        fb.set_num_threads(n)
    assert fb.get_num_threads() == before


def test_the_count_is_what_was_set():
    for n in (1, 2, np.int64(7), 1024):
        fb.set_num_threads(n)
        assert fb.get_num_threads() == n


def without_gil() -> None:
    assert not sys._is_gil_enabled()
    fb.set_num_threads(2)
    problems = [problem_of(cell, "shared batch") for cell in KERNELS]
    layers = [layer_for(problem) for problem in problems]
    expected = [run_library(*each) for each in zip(problems, layers, strict=True)]

    def calls(k):
        for each in range(10):
            i = (k + each) % len(KERNELS)
            assert_same_bits(run_library(problems[i], layers[i]), expected[i])

    in_threads(4, calls)
    assert not sys._is_gil_enabled()


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter has a GIL"
)
def test_free_threaded_python_stays_without_gil():
    # A module that is not made for it turns the GIL on, with a RuntimeWarning.
    done = python("import sys, fastbptt; sys.exit(sys._is_gil_enabled())", PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    run_here("without_gil")
