"""Checkpointed: Full's gradient bit for bit, whatever is kept, and never more memory than named."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastbptt as fb
from fastbptt import _core, checkpointing, memory, training
from fastbptt.checkpointing import advanced_steps
from reference import KERNELS, make_layer

CLASSES = 5


def make_model(cell, *, I=3, H=7, layers=1, embedding=False, readout=True, **options):  # noqa: E741
    seeded = {"dtype": options.get("dtype", "float32"), "seed": 1}
    parts = [fb.Embedding(CLASSES, I, **seeded)] if embedding else []
    parts.append(make_layer(cell, I, H, layers, seed=1, **options))
    parts += [fb.Linear(parts[-1].output_size, CLASSES, **seeded)] if readout else []
    return fb.Model(*parts)


def make_data(rng, model, T, B):
    if model.embedding is None:
        x = rng.standard_normal((T, B, model.recurrent.input_size)).astype(model.dtype)
    else:
        x = rng.integers(0, CLASSES, (T, B))
    target = rng.integers(0, CLASSES, (T, B))
    if model.batch_first:
        x, target = x.swapaxes(0, 1).copy(), target.swapaxes(0, 1).copy()
    return x, target


def assert_same(got, wanted, loss_error=1e-12):
    assert list(got.grads) == list(wanted.grads)
    for name, grad in wanted.grads.items():
        np.testing.assert_array_equal(got.grads[name], grad, err_msg=name)
    states = (s if isinstance(s, tuple) else (s,) for s in (got.state, wanted.state))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=loss_error)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", KERNELS)
def test_bit_for_bit(threads, cell, layers, dtype, rng):
    for T, B, H in [(41, 1, 5), (30, 3, 17), (37, 33, 20), (2, 2, 3), (1, 1, 4)]:
        model = make_model(cell, H=H, layers=layers, dtype=dtype, embedding=bool(B % 2))
        x, target = make_data(rng, model, T, B)
        state = model(x[:1])[1]
        wanted = fb.value_and_grad(model, x, target, state=state)
        for schedule in (
            fb.Checkpointed(slots=3),
            fb.Checkpointed(slots=1, segment=4),
            fb.Checkpointed(slots=2, segment=1),
            fb.Checkpointed(slots=5, segment=7),
        ):
            got = fb.value_and_grad(model, x, target, state=state, schedule=schedule)
            assert_same(got, wanted)


# Large enough for threads to share the rows, a step, or the readout; so are the cuts.
@pytest.mark.parametrize("B", [1, 4, 64])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_bit_for_bit_where_threads_share_the_work(cell, B, rng):
    model = make_model(cell, I=40, H=150)
    x, target = make_data(rng, model, 60, B)
    wanted = fb.value_and_grad(model, x, target)
    for segment in (1, 9, 30):
        schedule = fb.Checkpointed(slots=3, segment=segment)
        assert_same(fb.value_and_grad(model, x, target, schedule=schedule), wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("readout", [False, True])
def test_bit_for_bit_for_every_model_and_loss(batch_first, embedding, readout, rng):
    model = make_model("gru", embedding=embedding, readout=readout, batch_first=batch_first)
    x, target = make_data(rng, model, 50, 3)
    width = CLASSES if readout else 7
    values = rng.standard_normal((*target.shape, width)).astype("float32")

    def own(output, wanted, steps):
        return float(((output - wanted) ** 2).sum()), 2 * (output - wanted)

    target[0, 1] = -100
    for loss, wanted in (("cross_entropy", target), ("mse", values), (own, values)):
        full = fb.value_and_grad(model, x, wanted, loss)
        for schedule in (fb.Checkpointed(slots=4), fb.Checkpointed(slots=4, segment=1)):
            little = fb.value_and_grad(model, x, wanted, loss, schedule=schedule)
            assert_same(little, full, 1e-6 if loss is own else 1e-12)


@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_input_gradient_goes_where_it_is_wanted(cell, batch_first, rng, tmp_path):
    model = make_model(cell, batch_first=batch_first)
    x, target = make_data(rng, model, 40, 2)
    wanted = np.empty_like(x)
    fb.value_and_grad(model, x, target, grad_x=wanted)
    assert np.abs(wanted).min() > 0
    there = np.lib.format.open_memmap(tmp_path / "dx.npy", "w+", x.dtype, x.shape)
    fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(slots=3), grad_x=there)
    np.testing.assert_array_equal(there, wanted)
    # Of overlapping windows the parts add up: with windows of the whole it is the whole.
    fb.value_and_grad(model, x, target, schedule=fb.Truncated(10, 40), grad_x=there)
    np.testing.assert_allclose(there, wanted, rtol=1e-3, atol=1e-7)


class Reader:
    """A source that is no array, and remembers how much was asked for at a time."""

    def __init__(self, array, axis):
        self.array, self.axis, self.most = array, axis, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key):
        steps = key[self.axis] if isinstance(key, tuple) else key
        self.most = max(self.most, steps.stop - steps.start)
        return self.array[key].tolist() if self.array.dtype.kind == "i" else self.array[key].copy()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
def test_only_a_segment_is_read_at_a_time(batch_first, embedding, rng):
    model = make_model("lstm", embedding=embedding, batch_first=batch_first)
    x, target = make_data(rng, model, 200, 2)
    wanted = fb.value_and_grad(model, x, target)
    axis = 1 if batch_first else 0
    lazy = Reader(x, axis), Reader(target, axis)
    got = fb.value_and_grad(model, *lazy, schedule=fb.Checkpointed(slots=9))
    assert_same(got, wanted)
    assert lazy[0].most == 20
    assert fb.evaluate(model, *lazy)[0] == pytest.approx(wanted.loss, rel=1e-6)


def random_problem(rng):
    """A model, the arguments of a call with it, and whatever can change what the call allocates."""
    cell, T, B, H = (
        rng.choice(KERNELS),
        *(int(rng.integers(*n)) for n in ((20, 600), (1, 8), (1, 90))),
    )
    embedding, readout, batch_first, lazy = rng.random(4) < 0.5
    dtypes = [np.dtype(name) for name in ("float32", "float64", ml_dtypes.bfloat16)]
    dtype = dtypes[rng.integers(2 if "norm" in cell else 3)]
    loss = str(rng.choice(["mse", "cross_entropy"]))
    layer = make_layer(cell, 9, H, int(rng.integers(1, 4)), batch_first=batch_first, dtype=dtype)
    width = int(rng.integers(1, 60)) if readout else layer.output_size
    model = fb.Model(
        *([fb.Embedding(CLASSES, 9, dtype=dtype)] if embedding else []),
        layer,
        *([fb.Linear(layer.output_size, width, dtype=dtype)] if readout else []),
    )
    x = rng.integers(0, CLASSES, (T, B)) if embedding else rng.standard_normal((T, B, 9))
    if loss == "mse":
        target = rng.standard_normal((T, B, width)).astype(model.compute_dtype)
    else:
        target = rng.integers(0, width, (T, B)).astype(rng.choice(["uint8", "int64"]))
    arrays = [x.astype("uint8" if embedding else dtype), target, rng.random((T, B)) < 0.9]
    if batch_first:
        arrays = [array.swapaxes(0, 1).copy() for array in arrays]
    grad_x = None
    if not embedding and rng.random() < 0.5:
        grad_x = np.empty(arrays[0].shape, model.compute_dtype)
    x, target, mask = (Reader(array, int(batch_first)) if lazy else array for array in arrays)
    return (
        model,
        (x, target, loss),
        {"grad_x": grad_x, "loss_mask": mask if rng.random() < 0.5 else None},
    )


def smallest_memory(model, arguments, options):
    with pytest.raises(ValueError, match="memory: got 1 bytes, wanted at least") as info:
        fb.value_and_grad(model, *arguments, schedule=fb.Checkpointed(memory=1), **options)
    return int(str(info.value).split()[-1])


@pytest.mark.parametrize("seed", range(24))
def test_memory_is_kept(seed):
    """Of the core and of NumPy's arrays together, beyond the input and the result."""
    rng = np.random.default_rng(seed)
    model, arguments, options = random_problem(rng)
    least = smallest_memory(model, arguments, options)
    item = model.compute_dtype.itemsize
    results = sum(p.size * item for p in model.parameters().values())
    schedule = fb.Checkpointed(memory=int(least * rng.uniform(1.2, 6.0)))

    def run():
        fb.value_and_grad(model, *arguments, schedule=schedule, **options)

    run()  # what is made once is there
    gc.collect()
    before, _ = _core.allocated_bytes(True)
    tracemalloc.start()
    run()
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    after, core_peak = _core.allocated_bytes(False)
    assert after == before
    assert core_peak - before + numpy_peak <= schedule.memory + results


def test_slots_take_what_explain_says(rng):
    model = make_model("lstm", I=16, H=64)
    T, B = 4000, 2
    x, target = make_data(rng, model, T, B)
    schedule = fb.Checkpointed(30)
    needs = memory.needs_of(model, T, B)
    kept, segment = schedule.division(T, needs)
    allowed = needs.fixed(segment) + kept * needs.state + segment * needs.step
    assert memory.as_text(allowed) in schedule.explain(model, T, B)
    results = sum(p.nbytes for p in model.parameters().values())
    fb.value_and_grad(model, x, target, schedule=schedule)
    before, _ = _core.allocated_bytes(True)
    tracemalloc.start()
    fb.value_and_grad(model, x, target, schedule=schedule)
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert _core.allocated_bytes(False)[1] - before + numpy_peak <= allowed + results


@pytest.mark.parametrize("seed", range(30))
def test_memory_is_divided_within_two_percent_of_the_best(seed):
    """Every length of a segment is tried, with as many states as there is room for beside it."""
    rng = np.random.default_rng(seed)
    T, B, I, H, layers, N = (  # noqa: E741
        int(rng.integers(*n)) for n in ((2, 1500), (1, 30), (1, 60), (1, 80), (1, 3), (1, 300))
    )
    layer = make_layer(rng.choice(KERNELS), I, H, layers)
    model = fb.Model(layer, fb.Linear(layer.output_size, N))
    needs = memory.needs_of(model, T, B)
    least = int(smallest(T, needs))
    whole = needs.fixed(T) + T * needs.step
    size = int(np.exp(rng.uniform(np.log(least), np.log(max(whole, least)))))
    slots, segment = fb.Checkpointed(memory=size).division(T, needs)
    assert needs.fixed(segment) + slots * needs.state + min(segment, T) * needs.step <= size
    best = T * T
    for length in range(1, T + 1):
        left = size - needs.fixed(length) - length * needs.step
        if left >= (needs.state if length < T else 0):
            best = min(best, advanced_steps(T, int(left // needs.state), length))
    assert T + advanced_steps(T, slots, segment) <= 1.02 * (T + best)


@pytest.mark.parametrize("seed", range(20))
def test_little_memory_is_divided_for_the_fewest_calls(seed):
    """Of short segments that take hardly more steps than the best, the longest."""
    rng = np.random.default_rng(seed)
    T, B, I, H = (int(rng.integers(*n)) for n in ((200, 3000), (1, 30), (1, 60), (8, 80)))  # noqa: E741
    layer = make_layer(rng.choice(KERNELS), I, H)
    model = fb.Model(layer, fb.Linear(layer.output_size, 3))
    needs = memory.needs_of(model, T, B)
    size = needs.fixed(4) + 4 * needs.step + int(rng.integers(2, 40)) * needs.state
    _, segment = fb.Checkpointed(memory=size).division(T, needs)
    costs = {}
    for length in range(1, 8):
        slots = (size - needs.fixed(length) - length * needs.step) // needs.state
        if slots >= 2 and length * needs.step <= checkpointing._CACHED:
            costs[length] = T + advanced_steps(T, int(slots), length)
    least = min(costs.values())
    longest = max(length for length, cost in costs.items() if cost <= 1.005 * least)
    assert segment >= longest


@pytest.mark.parametrize("seed", range(10))
def test_long_sequences_run_in_segments_that_stay_in_the_cache(seed):
    """The memory would allow segments several times as long, which save next to nothing."""
    rng = np.random.default_rng(seed)
    B, I, H = (int(rng.integers(*n)) for n in ((1, 5), (1, 60), (8, 80)))  # noqa: E741
    model = fb.Model(make_layer(rng.choice(KERNELS), I, H), fb.Linear(H, 3))
    T = 1_000_000
    needs = memory.needs_of(model, T, B)
    longest = checkpointing._CACHED // needs.step
    size = 2 * (needs.fixed(longest) + longest * needs.step + T // longest * needs.state)
    slots, segment = fb.Checkpointed(memory=size).division(T, needs)
    assert longest / 2 < segment <= longest
    assert advanced_steps(T, slots, segment) < T
    words = fb.Checkpointed(memory=size).explain(model, T, B)
    assert f"segments of {segment} steps" in words


def smallest(T, needs):
    with pytest.raises(ValueError, match="memory: got 1 bytes") as info:
        fb.Checkpointed(memory=1).division(T, needs)
    return str(info.value).split()[-1]


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 50])
def test_the_smallest_memory_works_for_few_steps(T, cell, rng):
    for B, H in ((1, 1), (1, 40), (7, 5), (64, 33)):
        model = make_model(cell, H=H)
        x, target = make_data(rng, model, T, B)
        least = smallest_memory(model, (x, target), {})
        schedule = fb.Checkpointed(memory=least)
        got = fb.value_and_grad(model, x, target, schedule=schedule)
        assert_same(got, fb.value_and_grad(model, x, target))
        with pytest.raises(ValueError, match=f"wanted at least {least}$"):
            fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(memory=least - 1))


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("cell", KERNELS)
def test_pieces_change_nothing(cell, embedding, rng, monkeypatch):
    model = make_model(cell, layers=2, embedding=embedding)
    x, target = make_data(rng, model, 83, 3)
    seen = []

    def whole(output, target, steps):
        seen.append(steps)
        return 0.0, np.zeros_like(output)

    for schedule in (fb.Full(), fb.Truncated(20, 33), fb.Checkpointed(slots=2)):
        monkeypatch.undo()
        wanted = fb.value_and_grad(model, x, target, schedule=schedule)
        for rows, pieces in ((1, 1000), (24, 1000), (1, 5)):
            monkeypatch.setattr(memory, "RUN_AT_ONCE", rows)
            monkeypatch.setattr(memory, "_MOST_PIECES", pieces)
            got = fb.value_and_grad(model, x, target, schedule=schedule)
            assert_same(got, wanted, 1e-6)
    fb.value_and_grad(model, x, target, whole)
    assert seen == [slice(0, 83)]


def test_full_holds_no_gradient_as_long_as_the_sequence(rng):
    """Tape and y, and little else."""
    model = make_model("gru", I=8, H=64)
    T, B = 20_000, 2
    x, target = make_data(rng, model, T, B)
    before, _ = _core.allocated_bytes(True)
    tracemalloc.start()
    fb.value_and_grad(model, x, target, schedule=fb.Full())
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    y = T * B * 64 * 4
    assert _core.allocated_bytes(False)[1] - before + numpy_peak < 1.1 * (4 * y + y)


def test_the_smallest_memory_is_named_and_works(rng):
    model = make_model("gru", H=12)
    x, target = make_data(rng, model, 300, 2)
    with pytest.raises(ValueError, match=r"memory: got 1000 bytes, wanted at least (\d+)") as info:
        fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(memory=1000))
    least = int(str(info.value).split()[-1])
    with pytest.raises(ValueError, match=f"at least {least}$"):
        fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(memory=least - 1))
    got = fb.value_and_grad(model, x, target, schedule=fb.Checkpointed(memory=least))
    assert_same(got, fb.value_and_grad(model, x, target))


def test_what_does_not_fit_is_checkpointed_and_said_once(rng, monkeypatch, caplog):
    model = make_model("lstm", H=40)
    x, target = make_data(rng, model, 3000, 2)
    wanted = fb.value_and_grad(model, x, target)
    monkeypatch.setattr(training, "available", lambda: 3_000_000)
    monkeypatch.setattr(training, "_told", [])
    with caplog.at_level(logging.WARNING, logger="fastbptt"):
        for _ in range(2):
            assert_same(fb.value_and_grad(model, x, target), wanted)
    assert [record.name for record in caplog.records] == ["fastbptt"]
    assert "checkpointing instead" in caplog.text


def test_explain():
    model = make_model("lstm", H=64)
    words = fb.Checkpointed(memory="8MB").explain(model, T=100_000, B=1)
    assert "slots" in words
    assert "segments of" in words
    peak = float(words.split("at most ")[1].split(" MB")[0])
    assert 7.5 < peak <= 8.0
    assert "0 slots, 1 segments of 10 steps; 0.00" in fb.Checkpointed(memory="1GB").explain(
        model, 10, 1
    )


@pytest.mark.parametrize("place", ["loss", "source"])
def test_a_fault_frees_all_and_changes_nothing(place, rng):
    model = make_model("lstm", H=64)
    x, target = make_data(rng, model, 500, 4)
    before = {name: p.copy() for name, p in model.parameters().items()}
    state = model(x[:1])[1]
    kept = [part.copy() for part in state]
    calls = []

    def fail(output, wanted, steps):
        calls.append(steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0, np.zeros_like(output)

    class Broken(Reader):
        def __getitem__(self, key):
            calls.append(key)
            if len(calls) == 30:
                raise OSError("the disk is gone")
            return super().__getitem__(key)

    source = x if place == "loss" else Broken(x, 0)
    gc.collect()
    there, _ = _core.allocated_bytes(False)
    with pytest.raises((KeyboardInterrupt, OSError)):
        fb.value_and_grad(
            model,
            source,
            target,
            fail if place == "loss" else "cross_entropy",
            state,
            fb.Checkpointed(slots=20),
        )
    gc.collect()
    assert _core.allocated_bytes(False)[0] == there
    for name, parameter in model.parameters().items():
        np.testing.assert_array_equal(parameter, before[name])
    for part, was in zip(state, kept, strict=True):
        np.testing.assert_array_equal(part, was)


@pytest.mark.parametrize("room", [160, 205, 210])
def test_out_of_memory_in_the_middle_leaves_all_usable(room):
    """With the address space bounded the tape of Full fails; a small one then still works.

    What the library keeps of freed memory must not stand in its way, however much fits beside it.
    """
    pytest.importorskip("resource")
    script = """
import gc, resource
import ml_dtypes
import numpy as np
import fastbptt as fb
from fastbptt import _core
fb.set_num_threads(1)
model = fb.Model(fb.LSTM(8, 64, seed=0), fb.Linear(64, 3, seed=0))
before = {name: p.copy() for name, p in model.parameters().items()}
T = 300_000
x, target = np.ones((T, 1, 8), np.float32), np.zeros((T, 1), np.int64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (ROOM << 20),) * 2)
# Full wants 600 MB; Truncated gets to the last window, whose tape is too large.
for schedule in (fb.Full(), fb.Truncated(250_000), fb.Checkpointed(slots=1)):
    try:
        fb.value_and_grad(model, x, target, schedule=schedule)
    except MemoryError:
        print("MemoryError")
gc.collect()
assert _core.allocated_bytes(False)[0] == 0
assert all(np.array_equal(p, before[name]) for name, p in model.parameters().items())
print(fb.value_and_grad(model, x[:20000], target[:20000], schedule=fb.Checkpointed(100)).loss > 0)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    script = script.replace("ROOM", str(room))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split() == ["MemoryError"] * 3 + ["True"], run.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "slots, memory: got neither, wanted one of them"),
        ({"slots": 2, "memory": 10}, ValueError, "slots, memory: got both"),
        ({"slots": 0}, ValueError, "slots: got 0, wanted at least 1"),
        ({"slots": 2.5}, TypeError, "slots: got 2.5, wanted an integer"),
        ({"slots": 2, "segment": 0}, ValueError, "segment: got 0"),
        ({"memory": 100, "segment": 5}, ValueError, "segment: got one with memory"),
        ({"memory": "64 parsec"}, ValueError, "memory: got '64 parsec', wanted a number of bytes"),
        ({"memory": "iB"}, ValueError, "memory: got 'iB'"),
        ({"memory": -1}, ValueError, "memory: got -1"),
        ({"memory": None, "slots": True}, TypeError, "slots: got True"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        fb.Checkpointed(**arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("1.5 MiB", 3 << 19), ("2kb", 2000), ("7B", 7), ("1GiB", 1 << 30)],
)
def test_sizes_in_words(text, size):
    assert fb.Checkpointed(memory=text).memory == size


def test_bad_input_gradients(rng):
    model = make_model("gru")
    x, target = make_data(rng, model, 6, 2)
    for grad_x, error, words in (
        (np.zeros((6, 2, 4), "f"), ValueError, "grad_x: got shape"),
        (np.zeros(x.shape), TypeError, "grad_x: got dtype float64"),
        ([0.0], TypeError, "grad_x: got list"),
    ):
        with pytest.raises(error, match=words):
            fb.value_and_grad(model, x, target, grad_x=grad_x)
    fixed = np.zeros_like(x)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="grad_x: got a read-only"):
        fb.value_and_grad(model, x, target, grad_x=fixed)
    embedded = make_model("gru", embedding=True)
    with pytest.raises(ValueError, match="grad_x: got an array for a model with an embedding"):
        fb.value_and_grad(embedded, target, target, grad_x=np.zeros((6, 2)))


def test_lazy_input_is_checked(rng):
    model = make_model("gru")
    x, target = make_data(rng, model, 60, 2)
    short = Reader(x, 0)
    short.shape = (90, 2, 3)
    wide = np.concatenate([target, target[:30]])
    with pytest.raises(ValueError, match=r"x: got shape .* for the steps"):
        fb.value_and_grad(model, short, wide, schedule=fb.Checkpointed(slots=4))
    with pytest.raises(TypeError, match="x: got dtype float64"):
        fb.value_and_grad(model, Reader(x.astype("float64"), 0), target)
    embedded = make_model("gru", embedding=True)
    classes = target.copy()
    classes[50, 1] = CLASSES
    with pytest.raises(ValueError, match="x: got 5 at"):
        fb.value_and_grad(embedded, Reader(classes, 0), target)
