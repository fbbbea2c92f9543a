"""`fastbptt.torch` in bfloat16 and under autocast: torch's dtypes, and the core's arithmetic."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

from conftest import require

torch = require("torch")
pytest.importorskip("ml_dtypes")

from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402

import fastbptt as fb  # noqa: E402
import fastbptt.torch as ft  # noqa: E402
from fastbptt.torch import _ops, _verbs  # noqa: E402
from test_torch_modules import (  # noqa: E402
    CELLS,
    LAYERS,
    VARIANTS,
    Net,
    flat,
    outputs_and_gradients,
    outputs_of,
    pair,
    states_of,
    weights_of,
)

BF16 = torch.bfloat16
T, B, I, H = 6, 3, 4, 5  # noqa: E741
# Of a value that is rounded to 8 bits, at most; and what h, gates, c and gradients are rounded to
# one after the other on the way through a step, in norm, with room for the steps before it.
UNIT = 2.0**-8
ROUGH = 8 * UNIT

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def near(actual, expected, allowed=ROUGH):
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        got, want = got.double(), want.double()
        assert (got - want).norm() <= allowed * want.norm().clamp(min=1e-2)


def function_of(outputs, dtype):
    """A random linear function, of numbers that this dtype has."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(each.shape, generator=generator, dtype=dtype) for each in outputs]
    wide = (each.to(torch.promote_types(each.dtype, dtype)) for each in outputs)
    return sum((each * draw).sum() for each, draw in zip(wide, draws, strict=True))


def exact(module, x, state, pack=None, dtype=BF16):
    """Outputs and gradients in float64, with the numbers that all these have."""
    module = copy.deepcopy(module).double()
    x = x.double().requires_grad_()
    state = [part.double().requires_grad_() for part in state]
    outputs = outputs_of(module, x, state, pack)
    inputs = [x, *state, *module.parameters()]
    return [*outputs, *torch.autograd.grad(function_of(outputs, dtype), inputs)]


def dtypes(tensors):
    return [tensor.dtype for tensor in tensors]


@pytest.mark.parametrize("how", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_results_and_gradients(kind, options, how, on_the_core):
    """The dtypes of torch in bfloat16, and the numbers of torch in float64."""
    torch.manual_seed(0)
    for num_layers, bidirectional, bias, batch_first, given in itertools.product(
        (1, 2), *((False, True),) * 4
    ):
        more = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, **options}
        theirs, ours = pair(kind, I, H, num_layers, dtype=BF16, **more)
        x = torch.randn(B, T, I, dtype=BF16)
        x = x if batch_first else x.transpose(0, 1)
        pack, batch = None, [B]
        if how == "unbatched":
            x, batch = torch.randn(T, I, dtype=BF16), []
        elif how == "packed":

            def pack(x, batch_first=batch_first):
                return pack_padded_sequence(x, [3, 6, 1], batch_first, enforce_sorted=False)

        shape = [num_layers * (1 + bidirectional), *batch, H]
        state = states_of(kind, shape, BF16, **options) if given else []
        got = outputs_and_gradients(ours, x, state, pack)
        assert dtypes(got) == dtypes(outputs_and_gradients(theirs, x, state, pack))
        near(got, exact(theirs, x, state, pack))


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, on_the_core):
    torch.manual_seed(0)
    for bias, given, batch in itertools.product((True, False), (True, False), ([B], [])):
        theirs, ours = pair(kind, I, H, bias=bias, dtype=BF16)
        x = torch.randn(*batch, I, dtype=BF16)
        state = states_of(kind, [*batch, H], BF16) if given else []
        got = outputs_and_gradients(ours, x, state)
        assert dtypes(got) == dtypes(outputs_and_gradients(theirs, x, state))
        near(got, exact(theirs, x, state))


@pytest.mark.parametrize("layout", ["few", "chunks", "batch first"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_layer_of_numpy(kind, bidirectional, layout, on_the_core):
    """To the bit, and the gradients are its float32 ones, rounded once."""
    options = {"bidirectional": bidirectional, "batch_first": layout == "batch first"}
    theirs = getattr(fb, kind)(I, H, 2, dtype="bfloat16", seed=0, **options)
    ours = getattr(ft, kind)(I, H, 2, dtype=BF16, **options)
    ours.load_state_dict({n: from_numpy(w) for n, w in theirs.weights.items()})
    # What goes in and comes back is widened and rounded in chunks of 256 rows.
    sizes = (60, 17) if layout == "chunks" else (T, B)
    x = torch.randn(*sizes, I, dtype=BF16, requires_grad=True)
    y, last = ours(x)
    grad_y = torch.randn(y.shape, dtype=BF16)
    y.backward(grad_y)
    got_y, state, tape = theirs.forward(to_numpy(x))
    grads = theirs.backward(tape, grad_y.float().numpy())
    assert torch.equal(y, from_numpy(got_y))
    for part, want in zip(flat(last), state if kind == "LSTM" else [state], strict=True):
        assert torch.equal(part, from_numpy(want).to(BF16))
    assert torch.equal(x.grad, torch.from_numpy(grads.x).to(BF16))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, torch.from_numpy(grads.weights[name]).to(BF16))


def from_numpy(array):
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16).copy()).view(BF16)


def to_numpy(tensor):
    return tensor.detach().view(torch.int16).numpy().view(fb.LSTM(1, 1, dtype="bfloat16").dtype)


def test_c_is_rounded_at_the_border_alone():
    layer = ft.LSTM(I, H, dtype=BF16)
    x = torch.randn(T, B, I, dtype=BF16)
    whole = layer(x)[0]
    first, state = layer(x[: T // 2])
    assert dtypes(state) == [BF16, BF16]
    assert torch.equal(first, whole[: T // 2])
    near([layer(x[T // 2 :], state)[0]], [whole[T // 2 :]], UNIT)


@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_that_lie_otherwise(autocast, on_the_core):
    layer = ft.LSTM(I, H, 2, bidirectional=True, dtype=torch.float32 if autocast else BF16)
    for x in (
        torch.randn(B, T, I).transpose(0, 1),
        torch.randn(T, 1, I).expand(T, B, I),
        torch.randn(T, B, 2 * I)[..., ::2],
        torch.randn(2 * T, B, I)[::2],
    ):
        with torch.autocast("cpu", BF16, enabled=autocast):
            given = x if autocast else x.to(BF16)
            got = outputs_and_gradients(layer, given, [])
            want = outputs_and_gradients(layer, given.contiguous(), [])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_parameters_and_no_gradient(autocast, on_the_core):
    layer = ft.GRU(I, H, 2, dtype=torch.float32 if autocast else BF16)
    x = torch.randn(T, B, I, dtype=BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        (want,) = torch.autograd.grad(layer(x)[0].float().sum(), [layer.weight_ih_l1])
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter is layer.weight_ih_l1)
        layer(x)[0].float().sum().backward()
        assert torch.equal(layer.weight_ih_l1.grad, want)
        y = layer(x)[0]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(layer(x)[0], y)


def test_dropout_between_layers_draws_what_torch_draws(on_the_core):
    theirs, ours = pair("GRU", I, H, 3, dropout=0.4, bidirectional=True, dtype=BF16)
    x = torch.randn(T, B, I, dtype=BF16)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(module, x, []))
    # Those of torch are rounded after each of its operations.
    near(*results, 2 * ROUGH)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_gradients_are_those_of_float32(kind, on_the_core):
    layer = getattr(ft, kind)(I, H, dtype=BF16)
    wide = getattr(torch.nn, kind)(I, H)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I, dtype=BF16)
    found = []
    for module, given in ((layer, x), (wide, x.float())):
        given = given.detach().requires_grad_()
        (grad,) = torch.autograd.grad(module(given)[0].sum(), given, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), module.parameters())][:3])
    assert dtypes(found[0]) == [BF16] * 3
    near(*found)


def test_copies_and_state_dicts(on_the_core):
    layer = ft.LSTM(I, H).bfloat16()
    x = torch.randn(T, B, I, dtype=BF16)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x)[0], layer(x)[0])
    original = torch.nn.LSTM(I, H, dtype=BF16)
    original.load_state_dict(layer.state_dict())
    near(flat(original(x)), flat(layer(x)))
    ours = ft.LSTM(I, H)
    ours.load_state_dict(original.state_dict())
    near(flat(ours(x.float())), flat(layer(x)))
    model = torch.nn.Sequential(original)
    assert ft.accelerate(model).swapped == ["0"]
    assert torch.equal(model(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_other_dtypes_beside_it_are_torchs_errors(kind):
    theirs, ours = pair(kind, I, H, dtype=BF16)
    x = torch.randn(B, I) if kind in CELLS else torch.randn(T, B, I)
    for given in (x, x.double(), x.half()):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            theirs(given)
        with pytest.raises(type(wanted.value)) as got:
            ours(given)
        assert str(got.value) == str(wanted.value)


# Compilers


@pytest.mark.parametrize("autocast", ["", "float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_operators(kind, options, autocast):
    name = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    dtype = torch.float32 if autocast else BF16
    layer = getattr(ft, kind)(I, H, 3, dtype=dtype, **options)
    states = [part.requires_grad_() for part in states_of(kind, (3, B, H), dtype, **options)]
    h, c = states if len(states) == 2 else (states[0], None)
    x = torch.randn(T, B, I, dtype=BF16, requires_grad=True)
    how = name, True, False, 1, bool(options), autocast
    torch.library.opcheck(
        _ops.record,
        (x, h, c, weights_of(layer), *how),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        rtol=ROUGH,
        atol=ROUGH,
    )


def test_tape_size_is_that_of_the_core():
    for (kind, name), L, D in itertools.product(
        {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}.items(), (1, 2, 3), (1, 2)
    ):
        weights = weights_of(getattr(torch.nn, kind)(I, H, L, bidirectional=D == 2, dtype=BF16))
        run = _verbs.Run(name, True, directions=D)
        for steps, rows in ((1, 1), (7, 3), (3, 5)):
            x = torch.zeros(steps, rows, I, dtype=BF16)
            tape = _verbs.verbs(run).forward(x, None, None, weights, None, True, 1)[3]
            assert tape.dtype == torch.float32
            assert _verbs.tape_size(run, x, weights) == tape.numel()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("autocast", [False, True])
@torch._dynamo.config.patch(allow_rnn=True)
def test_compile_in_one_graph(autocast):
    torch.manual_seed(0)
    net = Net() if autocast else Net().to(BF16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, B, I, dtype=torch.float32 if autocast else BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        got, want = (outputs_and_gradients(module, x, []) for module in (compiled, net))
    assert dtypes(got) == dtypes(want)
    near(got, want)
    torch._dynamo.reset()


# Autocast


def in_autocast(module, x, state, pack=None):
    """Outputs inside, gradients of a random function of them outside, as training does."""
    x = x.detach().requires_grad_()
    state = [part.detach().requires_grad_() for part in state]
    with torch.autocast("cpu", BF16):
        outputs = outputs_of(module, x, state, pack)
    inputs = [x, *state, *module.parameters()]
    return [*outputs, *torch.autograd.grad(function_of(outputs, torch.float32), inputs)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"), [*VARIANTS, *(pytest.param(kind, {}, id=kind) for kind in CELLS)]
)
def test_autocast(kind, options, packed, on_the_core):
    if packed and kind in CELLS:
        pytest.skip("cells take no packed sequences")
    torch.manual_seed(0)
    sizes = [I, H] if kind in CELLS else [I, H, 2]

    def pack(x):
        return pack_padded_sequence(x, [5, 3, 2])

    for of_x, of_state in itertools.product((torch.float32, BF16), (None, torch.float32, BF16)):
        theirs, ours = pair(kind, *sizes, **options)
        x = torch.randn(*([B, I] if kind in CELLS else [T, B, I])).to(of_x)
        shape = [B, H] if kind in CELLS else [2, B, H]
        state = [] if of_state is None else states_of(kind, shape, **options)
        state = [part.to(of_state) for part in state]
        got = in_autocast(ours, x, state, pack if packed else None)
        near(got, exact(theirs, x, state, pack if packed else None, torch.float32))
        if kind == "LSTM" and not options and not packed:
            # Here torch runs oneDNN where it can: all in bfloat16. Elsewhere it fails, or does not.
            count = 3
            assert dtypes(got[:count]) == [BF16] * count
            assert dtypes(got[count:]) == dtypes([x, *state, *ours.parameters()])
        else:
            want = in_autocast(theirs, x, state, pack if packed else None)
            assert dtypes(got) == dtypes(want)


def test_gradients_of_float32_parameters_are_not_rounded(on_the_core):
    layer = ft.LSTM(I, H)
    x = torch.randn(T, B, I)
    grads = in_autocast(layer, x, [])[4:]
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert not any(torch.equal(grad, grad.to(BF16).float()) for grad in grads)
    # And those of a layer in bfloat16 are their roundings.
    narrow = copy.deepcopy(layer).to(BF16)
    y = narrow(x.to(BF16))[0]
    with torch.autocast("cpu", BF16):
        same = layer(x)[0]
    assert torch.equal(y, same)
    grad_y = torch.randn(y.shape, dtype=BF16)
    wide = torch.autograd.grad(same, layer.parameters(), grad_y)
    rounded = torch.autograd.grad(y, narrow.parameters(), grad_y)
    for a, b in zip(wide, rounded, strict=True):
        assert torch.equal(a.to(BF16), b)


def test_autocast_nested_disabled_and_of_another_dtype(on_the_core):
    layer = ft.RNN(I, H)
    x = torch.randn(T, B, I)
    plain = layer(x)[0]
    with torch.autocast("cpu", BF16):
        inside = layer(x)[0]
        assert inside.dtype == BF16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x)[0], plain)
        with torch.autocast("cpu", BF16):
            assert torch.equal(layer(x)[0], inside)
    assert torch.equal(layer(x)[0], plain)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_float16_and_float64_under_autocast_are_torchs(kind):
    theirs, ours = pair(kind, I, H)
    x = torch.randn(B, I) if kind in CELLS else torch.randn(T, B, I)
    for given, dtype in ((x, torch.float16), (x.double(), BF16), (x.half(), BF16)):
        results = []
        for module in (theirs, ours):
            with torch.autocast("cpu", dtype):
                try:
                    results.append(flat(module(given)))
                except RuntimeError as error:
                    results.append(str(error))
        if isinstance(results[0], str):
            assert results[1] == results[0]
        else:
            assert all(map(torch.equal, *results))


def test_it_trains_under_autocast(on_the_core):
    torch.manual_seed(0)
    embed, layer, head = torch.nn.Linear(I, I), ft.GRU(I, 16), torch.nn.Linear(16, 2)
    model = torch.nn.ModuleList([embed, layer, head])
    x, target = torch.randn(20, 8, I), torch.randn(20, 8, 2).cumsum(0).tanh()
    adam = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(150):
        adam.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = torch.nn.functional.mse_loss(head(layer(embed(x))[0]).float(), target)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
