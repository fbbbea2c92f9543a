"""The verbs of the core over tensors: memory is made here, and goes to the core by address."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbptt._core import Verbs, packed_rows

# Tapes from here on come from the core: huge pages, and kept for the next training step.
_LARGE = 4 << 20

_GATES = {"lstm": 4, "gru": 3}


class Run(NamedTuple):
    """What a run through time is, beside its tensors."""

    cell: str
    bias: bool
    batch_first: bool = False
    directions: int = 1
    batch_sizes: Tensor | None = None  # of a packed sequence
    projected: bool = False  # an LSTM with proj_size

    @property
    def a_layer(self) -> int:
        """Weights of a layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr, as far as there are."""
        return 2 + 2 * self.bias + self.projected

    def layers(self, weights: Sequence[Any]) -> int:
        """Return how many layers, or layers times directions, these are the weights of."""
        return len(weights) // self.a_layer

    def hidden_size(self, weights: Sequence[Tensor]) -> int:
        """Return H, the values of c."""
        return int(weights[self.a_layer - 1 if self.projected else 1].shape[1])


class Results(NamedTuple):
    """Of a forward run; `last_c` only of an LSTM, `tape` only if asked for."""

    y: Tensor
    last_h: Tensor
    last_c: Tensor | None
    tape: Tensor | None


class Gradients(NamedTuple):
    """Of a backward run; None where not asked for."""

    x: Tensor | None
    h: Tensor | None
    c: Tensor | None
    weights: list[Tensor | None]


@lru_cache(maxsize=1024)
def _verbs(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    directions: int,
    proj_size: int,
    is_double: bool,
) -> Verbs:
    return Verbs(cell, input_size, hidden_size, num_layers, directions, proj_size, is_double)


def sizes(run: Run, x: Tensor) -> tuple[int, int]:
    """Return T and B."""
    if run.batch_sizes is not None:
        return run.batch_sizes.shape[0], int(run.batch_sizes[0])
    T, B = x.shape[:2]
    return (B, T) if run.batch_first else (T, B)


def check(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
) -> str:
    """Return what the core cannot take, or an empty string; nothing behind this looks again."""
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"x: got {dtype}, wanted float32 or float64"
    if x.dim() != (3 if run.batch_sizes is None else 2) or x.numel() == 0:
        return f"x: got shape {tuple(x.shape)}, wanted (T, B, I), none of them 0"
    a_layer, directions = run.a_layer, run.directions
    if directions not in (1, 2):
        return f"directions: got {directions}, wanted 1 or 2"
    if not weights or len(weights) % (a_layer * directions):
        return f"weights: got {len(weights)}, wanted {a_layer * directions} a layer"
    if weights[1].dim() != 2 or weights[a_layer - 1].dim() != 1 + (run.projected or not run.bias):
        return "weights: wanted matrices and, for biases, vectors"
    columns, R, H = x.shape[-1], weights[1].shape[1], run.hidden_size(weights)
    if run.projected and not (run.cell == "lstm" and 0 < R < H):
        return f"weights: got a projection from {H} to {R} values, wanted one of an LSTM, to fewer"
    rows = H * _GATES.get(run.cell, 1)
    for first in range(0, len(weights), a_layer):
        if first == a_layer * directions:
            columns = R * directions
        shapes = ((rows, columns), (rows, R), *(((rows,),) * (2 * run.bias)), (R, H))
        for kind in range(a_layer):
            weight = weights[first + kind]
            if weight.shape != shapes[kind] or weight.dtype is not dtype:
                found = f"{weight.dtype} {tuple(weight.shape)}"
                return f"weights[{first + kind}]: got {found}, wanted {dtype} {shapes[kind]}"
    if run.batch_sizes is not None:
        batch_sizes = run.batch_sizes
        if batch_sizes.dtype is not torch.int64 or not batch_sizes.is_contiguous():
            return "batch_sizes: wanted contiguous int64"
        if packed_rows(batch_sizes.data_ptr(), batch_sizes.shape[0]) != x.shape[0]:
            return f"batch_sizes: wanted a row that never rises, from 1 up, of sum {x.shape[0]}"
    if h is None and c is None:
        return ""
    for name, state, size in (("h", h, R), ("c", c, H)):
        state_shape = (run.layers(weights), sizes(run, x)[1], size)
        if state is None or state.shape != state_shape or state.dtype is not dtype:
            if state is None and name == "c" and run.cell != "lstm":
                continue
            found = "None" if state is None else f"{state.dtype} {tuple(state.shape)}"
            return f"{name}: got {found}, wanted {dtype} {state_shape}"
    return ""


def tape_size(run: Run, x: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the elements of a tape; the sizes of x may be symbols. Not of packed sequences."""
    T, B = sizes(run, x)
    return T * B * verbs_of(run, weights).tape_size(1, 1)


def verbs_of(run: Run, weights: Sequence[Tensor]) -> Verbs:
    """Return the verbs of the core for this run."""
    w_ih, w_hh = weights[0], weights[1]
    return _verbs(
        run.cell,
        int(w_ih.shape[1]),
        run.hidden_size(weights),
        run.layers(weights) // run.directions,
        run.directions,
        int(w_hh.shape[1]) if run.projected else 0,
        w_ih.dtype is torch.float64,
    )


def forward(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    keep: bool,
) -> Results:
    """Run through time: `record` if a tape is to be kept, else `advance`."""
    core = verbs_of(run, weights)
    T, B = sizes(run, x)
    L, R, packed = run.layers(weights), weights[1].shape[1], _address(run.batch_sizes)
    x, h, c, weights = _rows(x), _whole(h), _whole(c), _all_whole(weights)
    y = x.new_empty((*x.shape[:-1], run.directions * R))
    last_h = x.new_empty((L, B, R))
    last_c = x.new_empty((L, B, run.hidden_size(weights))) if run.cell == "lstm" else None
    tape = _new_tape(core, x, core.tape_size(T, B, packed)) if keep else None
    core.forward(
        T,
        B,
        packed,
        _sequence(run, x),
        _address(h),
        _address(c),
        _addresses(run, weights),
        _sequence(run, y),
        last_h.data_ptr(),
        _address(last_c),
        _address(tape),
        torch.get_num_threads(),
    )
    return Results(y, last_h, last_c, tape)


def backward(
    run: Run,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    tape: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    need_x: bool,
    need_state: bool,
    need_weights: Sequence[bool],
) -> Gradients:
    """Run back through time: `reverse`. `grads` are those of y and of the last h and c.

    Work is left out for x, for a layer whose weights are not needed, and for nothing less.
    """
    core = verbs_of(run, weights)
    T, B = sizes(run, x)
    grad_y, grad_h, grad_c = grads
    x, h, c, weights = _rows(x), _whole(h), _whole(c), _all_whole(weights)
    grad_y = None if grad_y is None else _rows(grad_y)
    grad_h, grad_c = _whole(grad_h), _whole(grad_c)
    to_x = x.new_empty(x.shape) if need_x else None
    to_h = torch.empty_like(h) if need_state and h is not None else None
    to_c = torch.empty_like(c) if need_state and c is not None else None
    to_weights = _new_gradients(run, weights, need_weights)
    core.backward(
        T,
        B,
        _address(run.batch_sizes),
        _sequence(run, x),
        _address(h),
        _address(c),
        _addresses(run, weights),
        _sequence(run, y),
        tape.data_ptr(),
        _sequence(run, grad_y),
        _address(grad_h),
        _address(grad_c),
        _sequence(run, to_x),
        _address(to_h),
        _address(to_c),
        _addresses(run, to_weights),
        torch.get_num_threads(),
    )
    return Gradients(to_x, to_h, to_c, to_weights)


def _new_gradients(
    run: Run, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return what the core writes to. It computes all matrices of a layer, or none."""
    if all(needed):
        return [torch.empty_like(weight) for weight in weights]
    grads: list[Tensor | None] = []
    for i, weight in enumerate(weights):
        first = i - i % run.a_layer
        wanted = any(needed[first : first + run.a_layer]) if weight.dim() == 2 else needed[i]
        grads.append(torch.empty_like(weight) if wanted else None)
    return grads


def _new_tape(core: Verbs, x: Tensor, size: int) -> Tensor:
    if size * x.element_size() < _LARGE:
        return x.new_empty(size)
    return torch.from_numpy(core.new_tape(size))


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis contiguous, mostly itself."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _all_whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sequence(run: Run, tensor: Tensor | None) -> tuple[int, int, int]:
    """Return the address and the strides of time and batch."""
    if tensor is None:
        return 0, 0, 0
    if run.batch_sizes is not None:
        return tensor.data_ptr(), 0, tensor.stride(0)
    if run.batch_first:
        return tensor.data_ptr(), tensor.stride(1), tensor.stride(0)
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _addresses(run: Run, tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the addresses as the core lists them, 0 for what is not there."""
    addresses = [_address(tensor) for tensor in tensors]
    # Behind them learned states and peepholes, which `torch.nn` has not.
    biases, behind = [0] * (2 - 2 * run.bias), [0] * (1 - run.projected + 3)
    whole: list[int] = []
    for i in range(0, len(addresses), run.a_layer):
        layer = addresses[i : i + run.a_layer]
        whole += [*layer[:2], *biases, *layer[2:], *behind]
    return whole
