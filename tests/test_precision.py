"""The precisions of float32 products: as accurate as their names say, whatever the data.

Which of them is made of bfloat16 parts depends on the machine; what is promised does not.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastbptt as fb
from fastbptt.bench import numpy_step
from reference import KERNELS, make_layer

PRECISIONS = ["highest", "high", "medium"]
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
# T, B, I, H: large enough for parts on every machine that has them; odd sizes, full tiles, and more
# rows and columns than a tile has.
SIZES = [(9, 17, 35, 41), (6, 64, 32, 48), (5, 33, 70, 130), (1, 70, 40, 33)]
# Of sums of products, relative to the largest: bits of a factor, and room for what follows.
ALLOWED = {"high": 2.0**-13, "medium": 2.0**-5}
# What has parts somewhere in this build's choice for these sizes.
MADE_OF_PARTS = {"amx": PRECISIONS, "avx512_bf16": ["medium"]}.get(fb.cpu_info()["isa"], [])


@pytest.fixture(autouse=True)
def _one_thread():
    before, precision = fb.get_num_threads(), fb.get_float32_matmul_precision()
    fb.set_num_threads(1)
    yield
    fb.set_num_threads(before)
    fb.set_float32_matmul_precision(precision)


def draw(rng, cell, T, B, I, H, *, x_scale=1.0, grad_scale=1.0, **options):  # noqa: E741
    """Return a layer, x and dL/dy."""
    layer = make_layer(cell, I, H, seed=int(rng.integers(1 << 30)), **options)
    x = (x_scale * rng.standard_normal((T, B, I))).astype("float32")
    grad_y = (grad_scale * rng.standard_normal((T, B, layer.output_size))).astype("float32")
    return layer, x, grad_y


def twin(cell, layer, **options):
    """Return a layer with the same weights and other options."""
    other = make_layer(cell, layer.input_size, layer.hidden_size, **options)
    for name, weight in layer.weights.items():
        other.weights[name][...] = weight
    return other


def run(layer, x, grad_y):
    x, grad_y = (a.astype(layer.dtype) for a in (x, grad_y))
    y, _, tape = layer.forward(x)
    grads = layer.backward(tape, grad_y)
    return {"y": y, "x": grads.x, **grads.weights}


def errors(got, exact):
    """Return the error of each array, in norm, relative to the exact one."""
    return {
        name: float(
            np.linalg.norm(got[name].astype("float64") - want) / (np.linalg.norm(want) or 1.0)
        )
        for name, want in exact.items()
    }


def product_in_order(a, b):
    """Return a.T @ b, added up as the way back goes through time: row after row, the last first.

    Of a product NumPy adds up pieces, which for thousands of rows is more accurate.
    """
    a, b = np.ascontiguousarray(a[::-1]), np.ascontiguousarray(b[::-1])
    return np.stack([(column[:, None] * b).sum(axis=0) for column in a.T])


def numpy_errors(cell, layer, x, grad_y, exact):
    """Return the errors of plain float32, written in NumPy."""

    def gradients(x, h, w_ih, grad_a, grad_u):
        results = whole(x, h, w_ih, grad_a, grad_u)
        for i, (grad, seen) in enumerate([(grad_a, x), (grad_u, h[:-1])], start=1):
            rows = [a.reshape(-1, a.shape[-1]) for a in (grad, seen)]
            results[i] = product_in_order(*rows)
        return results

    whole = numpy_step._gradients
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        patch.setattr(numpy_step, "_gradients", gradients)
        results = getattr(numpy_step, cell)(x, grad_y, *layer.weights.values())
    return errors(dict(zip(exact, results, strict=True)), exact)


def assert_as_accurate(ours, plain, factor=1.5):
    """No error of products much above plain float32's: sums of roundings fall either way.

    The gradients of biases are none, and NumPy adds up in pairs.
    """
    for name, error in ours.items():
        if name.startswith("bias"):
            continue
        assert error <= factor * plain[name] + 4e-7, f"{name}: {error:.2g}, not {plain[name]:.2g}"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", SIZES)
def test_highest_is_as_accurate_as_float32(cell, sizes, rng):
    layer, x, grad_y = draw(rng, cell, *sizes)
    exact = run(twin(cell, layer, dtype="float64"), x, grad_y)
    ours = errors(run(layer, x, grad_y), exact)
    assert_as_accurate(ours, numpy_errors(cell, layer, x, grad_y, exact))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_highest_is_as_accurate_over_a_thousand_steps(cell, rng):
    layer, x, grad_y = draw(rng, cell, 1000, 16, 20, 36)
    grad_y[:-1] = 0.0  # all of the gradient comes from the end
    exact = run(twin(cell, layer, dtype="float64"), x, grad_y)
    ours = errors(run(layer, x, grad_y), exact)
    assert_as_accurate(ours, numpy_errors(cell, layer, x, grad_y, exact))


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("cell", KERNELS)
def test_others_are_as_accurate_as_their_parts(cell, precision, rng):
    for sizes in SIZES:
        layer, x, grad_y = draw(rng, cell, *sizes, precision=precision)
        exact = run(twin(cell, layer, dtype="float64"), x, grad_y)
        # At the kink of the relu an error decides whether the error of a unit passes.
        allowed = ALLOWED[precision] * (8 if cell == "rnn_relu" else 1)
        for name, error in errors(run(layer, x, grad_y), exact).items():
            assert error <= allowed, f"{sizes} {name}: {error:.2g}"


@pytest.mark.parametrize("precision", MADE_OF_PARTS)
@pytest.mark.parametrize("cell", CELLS)
def test_parts_are_really_used(cell, precision, rng):
    """Of each product: else a test above would prove nothing of it."""
    layer, x, grad_y = draw(rng, cell, 6, 64, 64, 96, precision=precision)
    exact = run(twin(cell, layer, dtype="float64"), x, grad_y)
    got = errors(run(layer, x, grad_y), exact)
    products = [name for name in got if not name.startswith("bias")]
    if precision != "highest":
        least = {"high": 1e-7, "medium": 1e-4}[precision]
        assert all(got[name] > least for name in products), got


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("power", [-36, -30, -20, -10, 10, 20, 30])
def test_badly_scaled_gradients(cell, precision, power, rng):
    """What comes in on the way back is only multiplied: its scale changes nothing."""
    layer, x, grad_y = draw(rng, cell, 5, 32, 33, 40, precision=precision)
    scaled = (grad_y.astype("float64") * 10.0**power).astype("float32")
    exact = run(twin(cell, layer, dtype="float64"), x, scaled)
    ours = errors(run(layer, x, scaled), exact)
    if precision == "highest":
        assert_as_accurate(ours, numpy_errors(cell, layer, x, scaled, exact), 2.0)
    elif power >= -30:
        assert max(ours.values()) <= ALLOWED[precision], ours


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("power", [-38, -20, 20, 30])
def test_badly_scaled_inputs(precision, power, rng):
    """Weights of the other scale bring the sums back to where the cell is not saturated."""
    layer, x, grad_y = draw(rng, "rnn_tanh", 5, 32, 33, 40, precision=precision)
    x = (x.astype("float64") * 10.0**power).astype("float32")
    layer.weights["weight_ih_l0"][...] *= np.float32(10.0**-power)
    exact = run(twin("rnn_tanh", layer, dtype="float64"), x, grad_y)
    ours = errors(run(layer, x, grad_y), exact)
    if precision == "highest":
        plain = numpy_errors("rnn_tanh", layer, x, grad_y, exact)
        assert_as_accurate(ours, plain)
    else:
        assert max(ours.values()) <= ALLOWED[precision], ours


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_scales_of_their_own(precision, rng):
    """Each row, of the batch and of the weights, is as accurate as if it stood alone."""
    layer, x, _ = draw(rng, "rnn_relu", 1, 64, 40, 48, bias=False, precision=precision)
    rows, units = 10.0 ** rng.integers(-18, 18, (64, 1)), 10.0 ** rng.integers(-18, 18, (48, 1))
    x = (x * rows).astype("float32")
    layer.weights["weight_ih_l0"][...] *= units.astype("float32")
    y = layer(x)[0][0]
    exact = twin("rnn_relu", layer, dtype="float64", bias=False)(x.astype("float64"))[0][0]
    sizes = np.linalg.norm(x[0], axis=1)[:, None] * np.linalg.norm(
        layer.weights["weight_ih_l0"], axis=1
    )
    error = np.abs(y - exact) / sizes
    assert error.max() <= {"highest": 3e-7, "high": 2.0**-15, "medium": 2.0**-7}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e35, 1e-45])
def test_not_finite_where_float32_is_not_finite(cell, precision, value, rng):
    """Nothing here overflows, so that float64 says where that is."""
    layer, x, grad_y = draw(rng, cell, 6, 32, 40, 48, precision=precision)
    exact = twin(cell, layer, dtype="float64")
    for where in ("x", "weight_ih_l0", "grad"):
        arrays = {"x": x.copy(), "grad": grad_y.copy(), **layer.weights}
        at = (3, 4) if where == "weight_ih_l0" else (2, 5, 7)
        before, arrays[where][at] = arrays[where][at], value
        exact.weights["weight_ih_l0"][...] = layer.weights["weight_ih_l0"]
        got = run(layer, arrays["x"], arrays["grad"])
        wanted = run(exact, arrays["x"], arrays["grad"])
        arrays[where][at] = before
        for name, want in wanted.items():
            np.testing.assert_array_equal(
                np.isfinite(got[name]), np.isfinite(want), f"{where} {name}"
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_numbers_do_not_round_to_infinity(precision, rng):
    layer, x, _ = draw(rng, "rnn_relu", 1, 64, 40, 48, precision=precision)
    layer.weights["weight_ih_l0"][...] *= np.float32(1e-3)
    x[...] = np.copysign(np.finfo("float32").max, x)
    exact = twin("rnn_relu", layer, dtype="float64")(x.astype("float64"))[0]
    assert errors({"y": layer(x)[0]}, {"y": exact})["y"] <= 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", KERNELS)
def test_where_time_is_cut_changes_no_bit(cell, precision, rng):
    for T, B, H in [(30, 17, 40), (24, 64, 33)]:
        parts = make_layer(cell, 35, H, 2, seed=1, precision=precision)
        model = fb.Model(parts, fb.Linear(parts.output_size, 3, seed=2))
        x = rng.standard_normal((T, B, 35)).astype("float32")
        x[5] *= 1e-30  # steps that parts are not for, beside others
        x[11, 3] *= 1e30
        target = rng.integers(0, 3, (T, B))
        wanted = fb.value_and_grad(model, x, target)
        again = fb.value_and_grad(model, x, target)
        for schedule in (None, fb.Checkpointed(slots=3), fb.Checkpointed(slots=2, segment=5)):
            got = (
                again
                if schedule is None
                else fb.value_and_grad(model, x, target, schedule=schedule)
            )
            for name, grad in wanted.grads.items():
                np.testing.assert_array_equal(got.grads[name], grad, err_msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_options_go_with_every_precision(cell, precision, rng):
    """Lengths, resets, missing steps, two directions and layers."""
    layer, x, grad_y = draw(
        rng, cell, 12, 24, 33, 40, num_layers=2, bidirectional=True, precision=precision
    )
    marks = {"resets": rng.random((12, 24)) < 0.2, "mask": rng.random((12, 24)) < 0.8}
    x[~marks["mask"]] = np.nan
    exact = twin(cell, layer, num_layers=2, bidirectional=True, dtype="float64")
    for options in (marks, {"lengths": rng.integers(1, 13, 24)}):
        if "lengths" in options:
            x = np.nan_to_num(x)
        results = []
        for one in (layer, exact):
            y, _, tape = one.forward(x.astype(one.dtype), **options)
            grads = one.backward(tape, grad_y.astype(one.dtype))
            results.append({"y": y, "x": grads.x, **grads.weights})
        allowed = 2e-6 if precision == "highest" else ALLOWED[precision]
        for name, error in errors(*results).items():
            assert error <= allowed, f"{name}: {error:.2g}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_missing_steps_hold_decides_nothing(cell, precision, rng):
    """Not even which products the other rows of the step go through."""
    layer, x, grad_y = draw(rng, cell, 6, 24, 33, 40, precision=precision)
    mask = rng.random((6, 24)) < 0.7
    found = []
    for value in (0.0, 1e30, np.inf, np.nan):
        x[~mask] = value
        y, _, tape = layer.forward(x, mask=mask)
        grads = layer.backward(tape, grad_y)
        found.append({"y": y, "x": grads.x, **grads.weights})
    for other in found[1:]:
        for name, wanted in found[0].items():
            np.testing.assert_array_equal(other[name], wanted, err_msg=name)


def test_the_layers_own_comes_before_the_global_one(rng):
    fb.set_float32_matmul_precision("medium")
    assert fb.get_float32_matmul_precision() == "medium"
    layer, x, grad_y = draw(rng, "lstm", 5, 64, 64, 64)
    assert layer.precision is None
    as_set = run(layer, x, grad_y)
    for precision in PRECISIONS:
        fb.set_float32_matmul_precision("medium")
        own = run(twin("lstm", layer, precision=precision), x, grad_y)
        fb.set_float32_matmul_precision(precision)
        for results in (run(layer, x, grad_y), as_set if precision == "medium" else own):
            for name, value in own.items():
                np.testing.assert_array_equal(results[name], value, err_msg=name)


def test_float64_knows_no_precision(rng):
    layer = fb.GRU(40, 48, dtype="float64", seed=0)
    other = fb.GRU(40, 48, dtype="float64", seed=0, precision="medium")
    x = rng.standard_normal((3, 64, 40))
    np.testing.assert_array_equal(layer(x)[0], other(x)[0])


def test_wrong_names_are_refused():
    for call in (fb.set_float32_matmul_precision, lambda name: fb.LSTM(2, 3, precision=name)):
        with pytest.raises(ValueError, match="precision: got 'low', wanted 'highest', 'high'"):
            call("low")
        with pytest.raises(TypeError, match="precision: got int, wanted str"):
            call(1)
    assert fb.get_float32_matmul_precision() == "highest"


def test_it_is_saved_and_shown(tmp_path):
    model = fb.Model(fb.RNN(2, 3, precision="high"), fb.Linear(3, 2))
    assert repr(model.recurrent) == "RNN(2, 3, precision='high')"
    fb.save(tmp_path / "model", model)
    assert fb.load(tmp_path / "model").recurrent.precision == "high"
