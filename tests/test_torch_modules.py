"""`fastbptt.torch` is `torch.nn` to its user: results, gradients, errors, and the machinery."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import require

torch = require("torch")

from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fastbptt.torch as ft  # noqa: E402
from fastbptt.torch import _cells, _layers, _ops, _verbs  # noqa: E402

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
# And what an option of `torch.nn` makes of one of them.
PROJECTED = pytest.param("LSTM", {"proj_size": 2}, id="LSTM-proj_size")
VARIANTS = [*(pytest.param(kind, {}, id=kind) for kind in LAYERS), PROJECTED]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
T, B, I, H = 6, 3, 4, 5  # noqa: E741


def pair(kind, *sizes, **options):
    """The same module twice, torch's and ours, with the same parameters."""
    theirs = getattr(torch.nn, kind)(*sizes, **options)
    ours = getattr(ft, kind)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(results):
    """The tensors of what a module returned."""
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def outputs_of(module, x, state, pack=None):
    """The tensors that a module makes of x and the parts of a state, of which there may be none."""
    hx = [] if not state else [tuple(state) if len(state) == 2 else state[0]]
    return flat(module(pack(x) if pack else x, *hx))


def outputs_and_gradients(module, x, state, pack=None):
    """Of a random linear function of all outputs."""
    x = x.detach().requires_grad_()
    state = [part.detach().requires_grad_() for part in state]
    outputs = outputs_of(module, x, state, pack)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
        for output in outputs
    )
    return [*outputs, *torch.autograd.grad(loss, [x, *state, *module.parameters()])]


def assert_same(actual, expected, tolerance=None):
    for got, want in zip(actual, expected, strict=True):
        limit = TOLERANCE[want.dtype] if tolerance is None else tolerance
        torch.testing.assert_close(got, want, atol=limit, rtol=limit)


def states_of(kind, shape, dtype=torch.float32, proj_size=0):
    """h, of an LSTM with c behind it; `shape` is that of c."""
    sizes = [proj_size or shape[-1], shape[-1]] if kind.startswith("LSTM") else [shape[-1]]
    return [torch.randn([*shape[:-1], size], dtype=dtype) for size in sizes]


@pytest.mark.parametrize("how", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_results_and_gradients(kind, options, dtype, how, on_the_core):
    torch.manual_seed(0)
    lengths = [3, 6, 1]
    for num_layers, bidirectional, bias, batch_first, given in itertools.product(
        (1, 2, 3), *((False, True),) * 4
    ):
        theirs, ours = pair(
            kind,
            I,
            H,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            dtype=dtype,
            **options,
        )
        x = torch.randn(B, T, I, dtype=dtype)
        x = x if batch_first else x.transpose(0, 1)
        pack = None
        batch = [B]
        if how == "unbatched":
            x, batch = torch.randn(T, I, dtype=dtype), []
        elif how == "packed":

            def pack(x, batch_first=batch_first):
                return pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)

        shape = [num_layers * (1 + bidirectional), *batch, H]
        state = states_of(kind, shape, dtype, **options)
        state = state if given else []
        assert_same(
            outputs_and_gradients(ours, x, state, pack),
            outputs_and_gradients(theirs, x, state, pack),
        )


def test_relu(on_the_core):
    theirs, ours = pair("RNN", I, H, 2, nonlinearity="relu", dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert_same(outputs_and_gradients(ours, x, []), outputs_and_gradients(theirs, x, []))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, dtype, on_the_core):
    torch.manual_seed(0)
    options = [{}] if kind != "RNNCell" else [{}, {"nonlinearity": "relu"}]
    for bias, given, batch, more in itertools.product(
        (True, False), (True, False), ([B], []), options
    ):
        theirs, ours = pair(kind, I, H, bias=bias, dtype=dtype, **more)
        x = torch.randn(*batch, I, dtype=dtype)
        state = states_of(kind, [*batch, H], dtype) if given else []
        assert_same(outputs_and_gradients(ours, x, state), outputs_and_gradients(theirs, x, state))


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_between_layers_draws_what_torch_draws(packed, on_the_core):
    theirs, ours = pair("GRU", I, H, 3, dropout=0.4, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, I)

    def pack(x):
        return pack_padded_sequence(x, [T, 4, 2], batch_first=True)

    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(module, x, [], pack if packed else None))
    assert_same(*results)
    assert_same(flat(ours.eval()(x)), flat(theirs.eval()(x)))


COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::resolve_neg"}


def operations(call):
    """The names of torch's operations in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("view", ["transposed", "expanded", "strided", "sliced", "no axis dense"])
def test_no_tensor_is_copied(view, batch_first, on_the_core):
    x = {
        "transposed": torch.randn(B, T, I).transpose(0, 1),
        "expanded": torch.randn(T, 1, I).expand(T, B, I),
        "strided": torch.randn(2 * T, B, I)[::2],
        "sliced": torch.randn(T, B, 2 * I)[..., :I],
        "no axis dense": torch.randn(T, B, 2 * I)[..., ::2],
    }[view]
    x = x.requires_grad_()
    theirs, ours = pair("LSTM", I, H, 2, batch_first=batch_first, bidirectional=True)
    state = tuple(torch.randn(4, x.shape[0 if batch_first else 1], H) for _ in range(2))
    grad_y = torch.randn(*x.shape[:2], 2 * H)
    results = []

    def step():
        y = ours(x, state)[0]
        results.extend([y, *torch.autograd.grad(y, [x, *ours.parameters()], grad_y)])

    copied = operations(step) & COPIES
    assert bool(copied) == (view == "no axis dense"), copied
    y = theirs(x, state)[0]
    want = [y, *torch.autograd.grad(y, [x, *theirs.parameters()], grad_y)]
    assert_same(results, want)


def test_tensors_that_lie_otherwise(on_the_core):
    """Signs that are only to be read so, gaps in a state and a weight, zeros without memory."""
    theirs, ours = pair("LSTM", I, H, dtype=torch.float64)
    values = torch.randn(T, B, I, dtype=torch.complex128)
    x = values.conj().imag[...]
    assert x.is_neg()
    h = torch.randn(1, B, 2 * H, dtype=torch.float64)[..., ::2]
    c = torch._neg_view(torch.randn(1, B, H, dtype=torch.float64))
    wide = torch.randn(4 * H, 3 * I, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight_ih_l0 = torch.nn.Parameter(wide[:, ::3])
        module.weight_hh_l0 = torch.nn.Parameter(torch._neg_view(module.weight_hh_l0.detach()))
    assert_same(*(outputs_and_gradients(module, x, [h, c]) for module in (ours, theirs)))
    x = x.requires_grad_()
    y, (h, _) = ours(x)
    grads = torch.autograd.grad([y, h], x, [torch._efficientzerotensor(y.shape, dtype=y.dtype), h])
    assert_same(grads, torch.autograd.grad(ours(x)[1][0], x, h))


@pytest.mark.parametrize("grad", ["expanded", "transposed", "none"])
def test_gradients_of_any_stride(grad, on_the_core):
    theirs, ours = pair("LSTM", I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def loss(module):
        y, (_, c) = module(x)
        if grad == "none":
            return c[0].sum()
        return y.sum() if grad == "expanded" else (y.permute(2, 1, 0) ** 2).contiguous().sum()

    assert_same(*([torch.autograd.grad(loss(m), x)[0]] for m in (ours, theirs)))


# gradcheck and what else autograd promises


def differentiable(kind, **options):
    """A float64 module as a function of its input, its state and its parameters, and arguments."""
    torch.manual_seed(0)
    module = getattr(ft, kind)(2, 3, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    cell = kind in CELLS
    shape = [2] if cell else [2 * (2 if options.get("bidirectional") else 1), 2]
    if not cell and "num_layers" not in options:
        shape[0] //= 2
    x = torch.randn(*([] if cell else [3]), 2, 2, dtype=torch.float64)
    proj_size = options.get("proj_size", 0)
    state = states_of(kind, [*shape, 3], torch.float64, proj_size)
    count = len(state)

    def function(x, *rest):
        hx = tuple(rest[:count]) if count == 2 else rest[0]
        parameters = dict(zip(names, rest[count:], strict=True))
        return tuple(flat(torch.func.functional_call(module, parameters, (x, hx))))

    arguments = [x, *state, *(p.detach() for p in module.parameters())]
    return function, [argument.requires_grad_() for argument in arguments]


@pytest.mark.parametrize("more", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_gradcheck(kind, options, more, on_the_core):
    assert gradcheck(*differentiable(kind, **options, **more), fast_mode=bool(more))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_cells(kind, bias, on_the_core):
    assert gradcheck(*differentiable(kind, bias=bias))


@pytest.mark.parametrize("how", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize(
    ("kind", "options"), [*VARIANTS, pytest.param("RNN", {"nonlinearity": "relu"}, id="relu")]
)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_gradcheck_of_every_option(kind, options, how, on_the_core):
    """Through two layers and both directions, in torch's fast mode: one random direction each."""
    torch.manual_seed(4)  # no sum of the relu near its kink
    module = getattr(ft, kind)
    for bias, batch_first, dropout in itertools.product((True, False), (True, False), (0.0, 0.5)):
        layer = module(
            2, 3, 2, bias=bias, batch_first=batch_first, dropout=dropout, bidirectional=True,
            dtype=torch.float64, **options,
        )  # fmt: skip
        names = [name for name, _ in layer.named_parameters()]

        def function(x, *weights, layer=layer, names=names, batch_first=batch_first):
            torch.manual_seed(1)  # so that the same values are dropped each time
            if how == "packed":
                x = pack_padded_sequence(x, [2, 3], batch_first, enforce_sorted=False)
            parameters = dict(zip(names, weights, strict=True))
            return tuple(flat(torch.func.functional_call(layer, parameters, (x,))))

        shape = (3, 2) if how == "unbatched" else (2, 3, 2) if batch_first else (3, 2, 2)
        arguments = [torch.randn(shape, dtype=torch.float64), *layer.parameters()]
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        assert gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_gradients_can_be_differentiated_again(kind, on_the_core):
    options = {"bidirectional": True} if kind == "LSTM" else {}
    assert gradgradcheck(*differentiable(kind, **options), fast_mode=True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("GRU", {}), PROJECTED])
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_second_gradient_of_packed(kind, options, bidirectional, on_the_core):
    options = {"bidirectional": bidirectional, "dtype": torch.float64} | options
    theirs, ours = pair(kind, I, H, 2, **options)

    def second(module):
        torch.manual_seed(2)
        parts = [torch.randn(n, I, dtype=torch.float64, requires_grad=True) for n in (4, 2, 1)]
        y = module(pack_sequence(parts))[0].data
        first = torch.autograd.grad((y**2).sum(), parts, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [*parts, *module.parameters()])

    assert_same(second(ours), second(theirs))


def test_second_gradient_of_an_input_that_depends_on_another(on_the_core):
    theirs, ours = pair("RNN", H, H, dtype=torch.float64)

    def second(module):
        torch.manual_seed(2)
        h = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
        y = module(h.expand(T, B, H) * 0.5, h**2)[0]
        (first,) = torch.autograd.grad((y**2).sum(), h, create_graph=True)
        return [first, *torch.autograd.grad((first**2).sum(), [h, *module.parameters()])]

    assert_same(second(ours), second(theirs))


@pytest.mark.parametrize("kind", LAYERS)
def test_many_gradients_at_once(kind, on_the_core):
    """vmap has one tensor stand for many, which has no memory that the core could read."""
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(3, T, B, H, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        wanted = [x, *module.parameters()]
        results.append(torch.autograd.grad(module(x)[0], wanted, grad_y, is_grads_batched=True))
    assert_same(*results)


def test_backward_twice_and_changed_in_between(on_the_core):
    layer = ft.LSTM(I, H)
    y = layer(torch.randn(T, B, I))[0]
    y.sum().backward(retain_graph=True)
    once = layer.weight_ih_l0.grad.clone()
    y.sum().backward()
    assert_same([layer.weight_ih_l0.grad], [2 * once])
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = layer(torch.randn(T, B, I))[0]
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", ["all", "first layer", "weight_hh_l0", "bias_ih_l1", "input"])
def test_frozen_parameters(frozen, monkeypatch, on_the_core):
    theirs, ours = pair("LSTM", I, H, 2, dtype=torch.float64)
    made = []

    class Watched:
        def __getattr__(self, name):
            return getattr(core, name)

        def backward(self, *arguments):
            made.append(core.backward(*arguments))
            return made[-1]

    core = _verbs.verbs(_verbs.Run("lstm", True))
    monkeypatch.setattr(_ops, "verbs", lambda run: Watched())
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=frozen != "input")
        for name, parameter in module.named_parameters():
            first = frozen == "first layer" and name.endswith("l0")
            parameter.requires_grad_(not (frozen in ("all", name) or first))
        module(x)[0].sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_same([got], [want])
    ((grad_x, _, _, *weights),) = made
    assert (grad_x is None) == (frozen == "input")
    skipped = {"all": 8, "first layer": 4, "bias_ih_l1": 1}.get(frozen, 0)
    assert sum(grad is None for grad in weights) == skipped


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode, monkeypatch, on_the_core):
    kept = []

    def forward(*arguments, keep):
        kept.append(keep)
        return original(*arguments, keep=keep)

    original = _ops._forward
    monkeypatch.setattr(_ops, "_forward", forward)
    theirs, ours = pair("GRU", I, H, 2)
    x = torch.randn(T, B, I)
    with mode():
        outputs = flat(ours(x))
        assert_same(outputs, flat(theirs(x)))
    assert not any(output.requires_grad for output in outputs)
    assert outputs[0].is_inference() == (mode is torch.inference_mode)
    ours.requires_grad_(False)(x)
    assert kept == [False, False]


def test_saved_tensors_hooks(on_the_core):
    """What comes back may lie elsewhere, and is looked at before the core sees it."""
    theirs, ours = pair("LSTM", I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)

    def spread(tensor):
        wide = tensor.new_empty(*tensor.shape, 2)
        wide[..., 0] = tensor.detach()
        return wide

    def gradients(module, pack, unpack):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = module(x)[0]
        return torch.autograd.grad(y.sum(), list(module.parameters()))

    want = torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters()))
    assert_same(gradients(ours, spread, lambda wide: wide[..., 0]), want)
    for wrong in (lambda t: t[..., :-1], lambda t: t.double(), lambda t: t.to("meta")):
        with pytest.raises(RuntimeError, match="wanted"):
            gradients(ours, lambda t: t, wrong)


def test_anomaly_mode_finds_a_nan(on_the_core):
    layer = ft.GRU(I, H)
    x = torch.randn(T, B, I)
    x[2, 1] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly mode is on
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
            layer(x)[0].sum().backward()


def test_calls_from_several_threads(on_the_core):
    theirs, ours = pair("LSTM", I, H, dtype=torch.float64)
    inputs = torch.randn(4, T, B, I, dtype=torch.float64)

    def gradients(module, x):
        return torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))

    with ThreadPoolExecutor(4) as pool:
        for got, x in zip(pool.map(lambda x: gradients(ours, x), inputs), inputs, strict=True):
            assert_same(got, gradients(theirs, x))


def test_hooks_anomaly_mode_and_checkpoint(on_the_core):
    theirs, ours = pair("LSTM", I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    calls = []
    for module in (ours, theirs):
        calls.append([])
        module.register_forward_hook(lambda *_, to=calls[-1]: to.append("forward"))
        module.register_full_backward_hook(lambda *_, to=calls[-1]: to.append("backward"))
        module.weight_hh_l0.register_hook(lambda grad, to=calls[-1]: to.append(grad))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that anomaly mode is on
            with torch.autograd.detect_anomaly():
                module(x)[0].sum().backward()
    assert calls[0][:1] + calls[0][2:] == calls[1][:1] + calls[1][2:] == ["forward", "backward"]
    assert_same([calls[0][1]], [calls[1][1]])

    checkpoint = torch.utils.checkpoint.checkpoint
    (want,) = torch.autograd.grad(ours(x)[0].sum(), x)
    y = checkpoint(lambda x: ours(x)[0], x, use_reentrant=False)
    assert_same(torch.autograd.grad(y.sum(), x), [want])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_go_to_the_original():
    theirs, ours = pair("RNN", I, H, dtype=torch.float64)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    results = []
    for module in (ours, theirs):

        def loss(x, module=module):
            return (module(x)[0] ** 2).sum()

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            results.append([torch.func.grad(loss)(x), forward_ad.unpack_dual(loss(dual)).tangent])
    assert_same(*results)
    traced = torch.jit.trace(ours, (x,), check_trace=False)
    longer = torch.randn(2 * T, B, I, dtype=torch.float64)
    assert_same(flat(traced(longer)), flat(theirs(longer)))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64], ids=str)
def test_other_dtypes_go_to_the_original(kind, dtype):
    theirs, ours = pair(kind, I, H, dtype=dtype)
    x = torch.randn(B, I, dtype=dtype) if kind in CELLS else torch.randn(T, B, I, dtype=dtype)
    try:
        want = flat(theirs(x))
    except RuntimeError as error:
        with pytest.raises(type(error)):
            ours(x)
    else:
        for got, expected in zip(flat(ours(x)), want, strict=True):
            assert torch.equal(got, expected)


def test_another_device_goes_to_the_original():
    layer = ft.LSTM(I, H, device="meta")
    assert layer(torch.empty(T, B, I, device="meta"))[0].shape == (T, B, H)


# The module as an object


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_object(kind):
    options = {"bias": False} if kind in CELLS else {"num_layers": 2, "batch_first": True}
    torch.manual_seed(7)
    theirs = getattr(torch.nn, kind)(I, H, **options)
    torch.manual_seed(7)
    ours = getattr(ft, kind)(I, H, **options)
    assert isinstance(ours, getattr(torch.nn, kind))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    x = torch.randn(B, I) if kind in CELLS else torch.randn(B, T, I)
    want = flat(ours(x))
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(ours)
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x)), want, strict=True))
    assert type(ours).__module__ == "fastbptt.torch"
    if kind in LAYERS:
        ours.flatten_parameters()
        assert_same(flat(ours.double()(x.double())), flat(theirs.double()(x.double())))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_signature_and_text(kind):
    theirs, ours = getattr(torch.nn, kind), getattr(ft, kind)
    assert inspect.signature(ours) == inspect.signature(theirs)
    names = [list(inspect.signature(c.forward).parameters) for c in (ours, theirs)]
    assert names[0] == names[1]
    more = {"bias": False, "dtype": torch.float64}
    if kind in LAYERS:
        more |= {"num_layers": 2, "batch_first": True, "dropout": 0.5, "bidirectional": True}
    more |= {"nonlinearity": "relu"} if kind.startswith("RNN") else {}
    more |= {"proj_size": 2} if kind == "LSTM" else {}
    for name, value in more.items():
        options = {name: value, "num_layers": 2} if name == "dropout" else {name: value}
        assert repr(ours(I, H, **options)) == repr(theirs(I, H, **options))
    modules = []
    for made in (ours, theirs):
        torch.manual_seed(5)
        modules.append(made(I, H, **more))
        modules[-1].reset_parameters()
    for (name, got), (wanted, want) in zip(*(m.named_parameters() for m in modules), strict=True):
        assert name == wanted
        assert torch.equal(got, want)


def test_copies_are_independent(on_the_core):
    layer = ft.LSTM(I, H)
    x = torch.randn(T, B, I)
    want = layer(x)[0]
    want.sum().backward()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x)[0].any()
    assert torch.equal(layer(x)[0], want)


@pytest.mark.parametrize("hidden_size", [5, 200], ids=["small", "large"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_tensors_like_any_other(mode, hidden_size, on_the_core):
    """Their memory is this library's: nobody else gets it while one of them lives."""
    layer, x = ft.LSTM(4, hidden_size), torch.randn(70, 3, 4)
    with mode():
        y, (h, c) = layer(x)
        kept = [tensor.detach().clone() for tensor in (y, h, c)]
        for _ in range(3):
            layer(x + 1)
        for tensor, values in zip((y, h, c), kept, strict=True):
            assert tensor.is_contiguous()
            assert tensor.is_inference() == (mode is torch.inference_mode)
            assert torch.equal(tensor.detach(), values)
            view = tensor.detach().numpy()
            file = io.BytesIO()
            torch.save(tensor.detach(), file)
            file.seek(0)
            assert torch.equal(torch.load(file), values)
            assert torch.equal(copy.deepcopy(tensor.detach()), values)
            assert (view == values.numpy()).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        y.detach().resize_(10**6)
    part = y.detach()[-1]
    del y, h, c, tensor, view
    layer(x + 1)
    assert torch.equal(part, kept[0][-1])
    assert torch.equal(part.clone().share_memory_(), kept[0][-1])


@pytest.mark.parametrize("place", ["x", "h", "c", "grad"])
def test_what_a_transform_has_left_behind(place):
    """A tensor of `torch.func.grad` that outlives it: a wrapper without memory of its own."""
    left = {}

    def leak(tensor):
        left[place] = tensor * 1
        return tensor.sum()

    theirs, ours = pair("LSTM", I, H)
    tensors = {"x": torch.randn(T, B, I), "h": torch.randn(1, B, H), "c": torch.randn(1, B, H)}
    tensors["grad"] = torch.randn(T, B, H)
    torch.func.grad(leak)(tensors[place])
    found = []
    for module, given in ((theirs, tensors), (ours, {**tensors, **left})):
        x = given["x"].requires_grad_()
        y = module(x, (given["h"], given["c"]))[0]
        found.append([y, *torch.autograd.grad(y, list(module.parameters()), given["grad"])])
    assert_same(*found, 1e-5)


@pytest.mark.parametrize("hidden_size", [5, 200], ids=["small", "large"])
def test_gradients_are_added_up_and_kept(hidden_size, on_the_core):
    theirs, ours = pair("LSTM", 4, hidden_size)
    x = torch.randn(70, 3, 4)
    for module in (theirs, ours):
        for number in range(3):
            module(x + number)[0].square().sum().backward()
    for (name, wanted), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-3, msg=name)
    before = ours.weight_hh_l0.grad
    copied = before.clone()
    ours.zero_grad()
    ours(x)[0].sum().backward()
    assert torch.equal(before, copied)
    assert ours.weight_hh_l0.grad is not before


def test_weights_are_read_anew_each_time(on_the_core):
    """Moved, shrunk and changed in place: nothing of a call is kept for the next."""
    theirs, ours = pair("GRU", I, H)
    x = torch.randn(T, B, I)
    for change in (
        lambda m: setattr(m.weight_hh_l0, "data", torch.ones(3 * H, H)),
        lambda m: m.weight_ih_l0.data.mul_(2),
        lambda m: setattr(m.bias_ih_l0, "data", torch.arange(6.0 * H)[::2]),
        lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
        lambda m: m.share_memory(),
        lambda m: setattr(m, "bias_hh_l0", m.bias_ih_l0),
    ):
        for module in (ours, theirs):
            change(module)
        assert_same(outputs_and_gradients(ours, x, []), outputs_and_gradients(theirs, x, []))


def test_a_weight_that_has_shrunk_goes_to_the_original():
    theirs, ours = pair("GRU", I, H)
    for module in (ours, theirs):
        module.weight_ih_l0.data = module.weight_ih_l0.data[:-1]
    x = torch.randn(T, B, I)
    assert_same_error(lambda: ours(x), lambda: theirs(x))


def test_parametrised_and_replaced_weights(on_the_core):
    theirs, ours = pair("GRU", I, H)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight_ih_l0 = torch.nn.Parameter(torch.ones(3 * H, I))
    assert_same(flat(ours(x)), flat(theirs(x)))
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert_same(flat(ours(x)), flat(theirs(x)))


BAD = {
    "axes": lambda m: m(torch.zeros(2, 2, 2, 2)),
    "one axis": lambda m: m(torch.zeros(I)),
    "input_size": lambda m: m(torch.zeros(T, B, I + 1)),
    "dtype": lambda m: m(torch.zeros(T, B, I, dtype=torch.float64)),
    "no steps": lambda m: m(torch.zeros(0, B, I)),
    "list": lambda m: m([[1.0]]),
    "state axes": lambda m: m(torch.zeros(T, B, I), state(m, (1, H))),
    "state size": lambda m: m(torch.zeros(T, B, I), state(m, (1, B, H + 1))),
    "state batch": lambda m: m(torch.zeros(T, B, I), state(m, (1, B + 1, H))),
    "state dtype": lambda m: m(torch.zeros(T, B, I), state(m, (1, B, H), torch.float64)),
    "state of unbatched": lambda m: m(torch.zeros(T, I), state(m, (1, 1, H))),
    "packed input_size": lambda m: m(pack_sequence([torch.zeros(T, I + 1)])),
    "packed state": lambda m: m(pack_sequence([torch.zeros(T, I)]), state(m, (1, 2, H))),
    "packed sizes": lambda m: m(PackedSequence(torch.zeros(T, I), torch.tensor([2, 2, 1]))),
    "packed rise": lambda m: m(PackedSequence(torch.zeros(4, I), torch.tensor([1, 2, 1]))),
}
BAD_CELL = {
    "axes": lambda m: m(torch.zeros(2, 2, 2)),
    "input_size": lambda m: m(torch.zeros(B, I + 1)),
    "dtype": lambda m: m(torch.zeros(B, I, dtype=torch.float64)),
    "state axes": lambda m: m(torch.zeros(B, I), state(m, (1, B, H))),
    "state size": lambda m: m(torch.zeros(B, I), state(m, (B, H + 1))),
    "state batch": lambda m: m(torch.zeros(B, I), state(m, (B + 1, H))),
}
BAD_OPTIONS = {
    "sizes": ((0, H), {}),
    "hidden": ((I, -1), {}),
    "float": ((I, 1.5), {}),
    "layers": ((I, H, 0), {}),
    "dropout": ((I, H, 2), {"dropout": 2}),
    "bias": ((I, H), {"bias": "no"}),
    "proj_size": ((I, H), {"proj_size": H}),
    "unknown": ((I, H), {"peephole": True}),
    "nonlinearity": ((I, H), {"nonlinearity": "sin"}),
}


def state(module, shape, dtype=torch.float32):
    h = torch.zeros(shape, dtype=dtype)
    return (h, h) if isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)) else h


def assert_same_error(ours, theirs):
    errors = []
    for call in (ours, theirs):
        try:
            call()
        except Exception as error:
            errors.append((type(error), str(error)))
    assert len(errors) in (0, 2)
    assert errors[:1] == errors[1:]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bad", BAD)
def test_errors(kind, bad):
    theirs, ours = pair(kind, I, H)
    if kind == "LSTM" and bad in ("packed input_size", "packed state"):
        # torch's own LSTM reads what memory happens to be there; the GRU raises this.
        with pytest.raises(RuntimeError, match=r"Expected hidden|must be equal to input_size"):
            BAD[bad](ours)
        return
    assert_same_error(lambda: BAD[bad](ours), lambda: BAD[bad](theirs))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bad", BAD_CELL)
def test_errors_of_cells(kind, bad):
    theirs, ours = pair(kind, I, H)
    assert_same_error(lambda: BAD_CELL[bad](ours), lambda: BAD_CELL[bad](theirs))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_errors_of_construction(kind, bad):
    sizes, options = BAD_OPTIONS[bad]
    assert_same_error(
        lambda: getattr(ft, kind)(*sizes, **options),
        lambda: getattr(torch.nn, kind)(*sizes, **options),
    )


def test_nothing_of_wrong_shape_reaches_the_core():
    """torch reads whatever memory is there; by address the core would, too."""
    layer = ft.LSTM(I, H)
    x, weights = torch.zeros(T, B, I), weights_of(layer)
    core = _verbs.verbs(_verbs.Run("lstm", True))
    h, c = states_of("LSTM", (1, B, H))
    assert core.problem(x, h, c, weights, None) == ""
    for other in (3, "x", x.as_subclass(type("Own", (torch.Tensor,), {}))):
        assert "plain tensors" in core.problem(other, h, c, weights, None)
    for i, weight in enumerate(weights):
        for wrong in (weight[1:], weight[None], weight.double(), weight.narrow(-1, 1, 1), None):
            changed = [*weights[:i], wrong, *weights[i + 1 :]]
            assert "weights" in core.problem(x, h, c, changed, None)
            with pytest.raises(RuntimeError, match="weights"):
                core.forward(x, h, c, changed, None, True, 1)
    for wrong in (h[..., 1:], h[:, 1:], h[0], h.double(), h.to("meta"), None):
        for name, state in (("h", (wrong, c)), ("c", (h, wrong))):
            assert core.problem(x, *state, weights, None).startswith(f"{name}: got")
    for wrong in (x[0], x[None], x.half(), x.int(), x[:0], x.to("meta"), x.to_sparse()):
        assert core.problem(wrong, h, c, weights, None).startswith("x: ")

    y, _, _, tape = core.forward(x, None, None, weights, None, True, 1)
    right = [x, None, None, weights, None, y, tape, y, h, c, [True] * 7, 1]
    core.backward(*right)
    for place, name in enumerate(("y", "tape", "grad_y", "grad_h", "grad_c"), 5):
        tensor = right[place]
        for wrong in (tensor[1:], tensor[None], tensor.double(), tensor.to("meta")):
            with pytest.raises(RuntimeError, match=name):
                core.backward(*right[:place], wrong, *right[place + 1 :])
    with pytest.raises(RuntimeError, match="needed: got 6, wanted 7"):
        core.backward(*right[:10], [True] * 6, 1)
    rows = torch.zeros(4, I)
    for batch_sizes in ([2, 2], [2, 1, 1]):
        assert core.problem(rows, None, None, weights, torch.tensor(batch_sizes)) == ""
    for batch_sizes in ([1, 2, 1], [2, 2, 1], [2, 1], [4, 0], [-4, 8], [2**62, 2**62], [5]):
        problem = core.problem(rows, None, None, weights, torch.tensor(batch_sizes))
        assert problem.startswith("batch_sizes: ")
    assert "batch_sizes" in core.problem(rows, None, None, weights, torch.tensor([2, 2]).int())


# Compilers


def weights_of(module):
    return list(module.parameters())


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_operators(kind, options):
    """torch's own check of schema, fake kernels, autograd and the compiler's view of it."""
    name = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    layer = getattr(ft, kind)(I, H, 2, **options)
    states = [part.requires_grad_() for part in states_of(kind, (2, B, H), **options)]
    projected = bool(options)
    h, c = states if len(states) == 2 else (states[0], None)
    x = torch.randn(T, B, I, requires_grad=True)
    torch.library.opcheck(
        _ops.record, (x, h, c, weights_of(layer), name, True, False, 1, projected, "")
    )
    layer = getattr(ft, kind)(I, H, 2, bidirectional=True, **options)
    frozen = [weight.detach() for weight in layer.parameters()]
    how = name, True, True, 2, projected, ""
    torch.library.opcheck(_ops.advance, (x.detach().transpose(0, 1), None, None, frozen, *how))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("need_x", [False, True])
def test_flops_are_counted(need_x, frozen):
    P = 2
    layer = ft.LSTM(I, H, 2, bidirectional=True, proj_size=P)
    first, second = 4 * H * (I + P) + P * H, 4 * H * (2 * P + P) + P * H  # of one direction
    for parameter in layer.parameters():
        parameter.requires_grad_(not frozen)
    x = torch.randn(T, B, I, requires_grad=need_x)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)[0]
        forward = counter.get_total_flops()
        if need_x or not frozen:
            y.sum().backward()
    all_weights = 2 * T * B * 2 * (first + second)
    assert forward == all_weights
    weights = 0 if frozen else all_weights
    through = all_weights - (0 if need_x else 2 * T * B * 2 * 4 * H * I)
    back = through + weights if need_x or not frozen else 0
    assert counter.get_total_flops() == forward + back


def test_operators_check_their_arguments():
    layer = ft.LSTM(I, H)
    x, weights, how = torch.zeros(T, B, I), weights_of(layer), ("lstm", True, False, 1, False, "")
    y, _, _, tape = _ops.record(x, None, None, weights, *how)
    needs = False, False, [True] * 4
    for call in (
        lambda: _ops.advance(x[..., 1:], None, None, weights, *how),
        lambda: _ops.advance(x, None, None, weights[:3], *how),
        lambda: _ops.advance(x, torch.zeros(1, B, H), None, weights, *how),
        lambda: _ops.advance(x, None, None, weights, "peephole", *how[1:]),
        lambda: _ops.advance(x, None, None, weights, *how[:3], 0, False, ""),
        lambda: _ops.advance(x, None, None, weights, *how[:3], 2, False, ""),
        lambda: _ops.advance(x, None, None, weights, *how[:5], "float16"),
        lambda: _ops.reverse(x, None, None, weights, y, tape[1:], y, None, None, *how, *needs),
        lambda: _ops.reverse(x, None, None, weights, y, tape, y[1:], None, None, *how, *needs),
        lambda: _ops.reverse(
            x, None, None, weights, y, tape, y, None, None, *how, False, False, [True]
        ),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


class Net(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.recurrent = ft.LSTM(I, H, 2, **options)
        size = options.get("proj_size", H)
        self.cell = ft.GRUCell(2 * size if options.get("bidirectional") else size, size)

    def forward(self, x):
        y, (h, _) = self.recurrent(x)
        return self.cell(torch.tanh(y[-1])) + h[0]


def test_tape_size_is_that_of_the_core():
    cells = {"rnn_tanh": 1, "lstm": 4, "gru": 3}
    for name, bias, L, D in itertools.product(cells, (True, False), (1, 3), (1, 2)):
        weights = []
        for k in range(L * D):
            G = cells[name] * H
            weights += [torch.zeros(G, D * H if k >= D else I), torch.zeros(G, H)]
            weights += [torch.zeros(G)] * 2 if bias else []
        run = _verbs.Run(name, bias, directions=D)
        for steps, rows in ((1, 1), (7, 3), (300, 50)):
            x = torch.zeros(steps, rows, I)
            tape = _verbs.verbs(run).forward(x, None, None, weights, None, True, 1)[3]
            assert _verbs.tape_size(run, x, weights) == tape.numel()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._dynamo.config.patch(allow_rnn=True)
def test_compile_in_one_graph(backend):
    """Which torch allows only if asked, for its own recurrent layers and what derives from them."""
    torch.manual_seed(0)
    net = Net(**{"bidirectional": True} if backend == "aot_eager" else {"proj_size": 2})
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=backend == "aot_eager")
    for steps in (5, 9) if backend == "aot_eager" else (5,):
        x = torch.randn(steps, B, I)
        assert_same(outputs_and_gradients(compiled, x, []), outputs_and_gradients(net, x, []))
        with torch.no_grad():
            assert_same([compiled(x)], [net(x)])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("allow_rnn", [False, True])
def test_compile_with_breaks(allow_rnn):
    patch = torch._dynamo.config.patch(allow_rnn=allow_rnn)
    net = torch.nn.Sequential(torch.nn.Linear(I, I), ft.GRU(I, H))
    x = torch.randn(T, B, I)
    packed = pack_sequence([torch.randn(4, I), torch.randn(2, I)])
    with patch:
        compiled = torch.compile(net, backend="aot_eager")
        assert_same(outputs_and_gradients(compiled, x, []), outputs_and_gradients(net, x, []))
        compiled = torch.compile(net[1], backend="aot_eager")
        assert_same(flat(compiled(packed)), flat(net[1](packed)))
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_export(options):
    net = Net(**options)
    x = torch.randn(T, B, I)
    steps, rows = torch.export.Dim("steps", min=2), torch.export.Dim("rows", min=2)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: steps, 1: rows},))
    assert "fastbptt.advance" in program.graph_module.code
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = torch.randn(2 * T, B + 4, I)
    for exported in (program, torch.export.load(file)):
        assert_same([exported.module()(other)], [net(other)])


# accelerate


class Wrapped(torch.nn.LSTM):
    pass


def test_accelerate_swaps_in_place():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(7, I),
            "layers": torch.nn.ModuleList(getattr(torch.nn, kind)(I, H) for kind in LAYERS),
            "cells": torch.nn.ModuleList(getattr(torch.nn, kind)(I, H) for kind in CELLS),
            "projected": torch.nn.LSTM(I, H, proj_size=2),
            "subclass": Wrapped(I, H),
            "short": torch.nn.GRU(I, H, dtype=torch.float16),
            "elsewhere": torch.nn.GRU(I, H, device="meta"),
            "ours": ft.GRU(I, H),
        }
    )
    model["layers"][0].forward = model["layers"][0].forward
    model["layers"][1].eval()
    model["again"] = model["layers"][1]
    calls = []
    model["layers"][1].register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    x = torch.randn(T, B, I)
    want = flat(model["layers"][1](x))

    done = ft.accelerate(model)
    assert done.swapped == ["layers.1", "layers.2", "cells.0", "cells.1", "cells.2", "projected"]
    assert done.left_alone == {
        "layers.0": "its forward is replaced",
        "subclass": "it is a Wrapped, a class with code of its own",
        "short": "weight_ih_l0 is torch.float16",
        "elsewhere": "weight_ih_l0 is on device meta",
    }
    layer = model["layers"][1]
    assert type(layer) is ft.LSTM
    assert layer is model["again"]
    assert not layer.training
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_same(flat(layer(x)), want)
    assert calls == [1, 1]
    assert ft.accelerate(model).swapped == []


def test_accelerate_takes_a_layer_and_nothing_but_modules():
    layer = torch.nn.LSTM(I, H)
    assert ft.accelerate(layer) == ft.Accelerated([""], {})
    assert type(layer) is ft.LSTM
    with pytest.raises(TypeError, match="model: got int"):
        ft.accelerate(3)


# The process


def python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_library_does_not_import_torch():
    python(
        "import sys, fastbptt, fastbptt.bench.libraries, fastbptt.cli\n"
        "assert 'torch' not in sys.modules"
    )


def test_threads_are_those_of_torch():
    """With one thread none is started, with two no more than one; the library's setting stays."""
    python(
        "import os, torch\n"
        "import fastbptt as fb, fastbptt.torch as ft\n"
        "fb.set_num_threads(3)\n"
        "layer, x = ft.LSTM(64, 128), torch.randn(50, 32, 64)\n"
        "counts = []\n"
        "for threads in (1, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    (torch.randn(600, 600) @ torch.randn(600, 600)).sum()\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    layer(x)[0].sum().backward()\n"
        "    counts.append(len(os.listdir('/proc/self/task')) - before)\n"
        "assert counts == [0, 1], counts\n"
        "assert fb.get_num_threads() == 3\n"
    )


def test_docstrings():
    import doctest

    for module in (ft, _layers, _cells, ft._accelerate):
        assert doctest.testmod(module).failed == 0


def test_examples_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "torch.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_symbolic_trace_sees_a_module(kind):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleDict({"layer": getattr(ft, kind)(3, 4)})

        def forward(self, x, h=None):
            return self.inner["layer"](x, h), self.inner["layer"](x + 1)

    net = Net()
    traced = torch.fx.symbolic_trace(net, concrete_args={"h": None})
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["inner.layer"] * 2
    x = torch.randn(*([] if "Cell" in kind else [5]), 2, 3)
    for got, want in zip(traced(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_an_output_that_was_changed_in_place_is_refused_by_backward():
    y, _ = ft.GRU(3, 4)(torch.randn(5, 2, 3))
    y = torch.nn.functional.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
