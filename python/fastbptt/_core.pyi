"""The C++ core. Every argument is checked there, under the name it has in the public API."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
State: TypeAlias = Array | tuple[Array, Array]

def cpu_info() -> dict[str, Any]: ...
def allocated_bytes(reset: bool) -> tuple[int, int]:
    """Return the bytes of the core's own memory now, and the most since the last reset."""

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def set_float32_matmul_precision(precision: str) -> None: ...
def get_float32_matmul_precision() -> str: ...

class Tape:
    """What one `Stack.record` kept; `Stack.reverse` consumes it."""

    @property
    def nbytes(self) -> int: ...
    @property
    def consumed(self) -> bool: ...

class Session:
    """The verbs over parts of one sequence `[T, B, .]`, reversed from its end to its beginning.

    The packed weights and the sums of the weight gradients are kept from part to part, so that
    where the sequence is cut does not change a bit. The weights must not change meanwhile.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that all the verbs together take for themselves, tapes and results apart."""
    def advance(self, x: Array, state: State | None, begin: int) -> tuple[Array, State]:
        """Run the steps from `begin` on, as many as x has."""
    def record(self, x: Array, state: State | None, begin: int) -> tuple[Array, State, Tape]: ...
    def reverse(
        self, tape: Tape, grad_y: Array | None, grad_state: State | None, need_x: bool
    ) -> tuple[Array | None, State]: ...
    def finish(self) -> list[Array | None]:
        """Return the weight gradients of all parts; once, at the end."""

class Stack:
    """The recurrent layers of one module, over parameter arrays that belong to the caller.

    `weights` holds for each layer, and in it each direction, `weight_ih`, `weight_hh`, `bias_ih`,
    `bias_hh`, `weight_hr`, `h0`, `c0`, `weight_peephole`, `weight_ln_ih`, `weight_ln_hh`,
    `weight_ln_c` and `bias_ln_c`, `None` for what it does not have, C-contiguous and of `dtype`;
    they are kept by reference. `options` may have `bidirectional`, `dropout`, `peephole`,
    `layer_norm`, `recurrent_dropout`, `zoneout_h`, `zoneout_c`, `proj_size`, `narrow_tape`
    and `precision`.

    `batch` has what is known of a batch beside x: `lengths`, int64 `[B]`, and `seed`, of the
    dropout.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dtype: str,
        weights: list[Array | None],
        options: dict[str, Any],
    ) -> None: ...
    def session(
        self, T: int, B: int, longest: int, batch: dict[str, Any] | None = None, begin: int = 0
    ) -> Session:
        """For parts of at most `longest` steps of a sequence of T steps of B rows.

        The session is for its steps from `begin` on.
        """
    def tape_nbytes(self, T: int, B: int) -> int: ...
    def advance(
        self, x: Array, state: State | None, batch: dict[str, Any] | None = None
    ) -> tuple[Array, State]: ...
    def record(
        self, x: Array, state: State | None, batch: dict[str, Any] | None = None
    ) -> tuple[Array, State, Tape]: ...
    def reverse(
        self,
        tape: Tape,
        grad_y: Array | None,
        grad_state: State | None,
        need_x: bool,
        grad_cells: Array | None = None,
    ) -> tuple[Array | None, State, list[Array | None]]: ...

def linear(x: Array, weight: Array, bias: Array | None, cuts: bool = False) -> Array:
    """Return `x @ weight.T + bias` over the last axis; x has two or three axes.

    With `cuts` a row's bits do not depend on how many others there are.
    """

def linear_backward(
    x: Array, weight: Array, grad_y: Array, grad_weight: Array, grad_bias: Array | None
) -> Array:
    """Return the gradient with respect to x; add to `grad_weight` and `grad_bias`."""

def embedding_backward(index: NDArray[np.int64], grad: Array, grad_weight: Array) -> None:
    """Add the rows of `grad` `[A, B, E]` to the rows of `grad_weight` that `index` names."""

def readout_loss(
    loss: str,
    y: Array,
    weight: Array | None,
    bias: Array | None,
    target: Array,
    scale: float,
    ignore_index: int,
    grad_weight: Array | None,
    grad_bias: Array | None,
    need_grad: bool,
    counts: Array | None = None,
) -> tuple[float, Array | None]:
    """Linear readout and loss, a block of rows at a time, so that the logits never exist whole.

    `loss` is `"cross_entropy"` (`target` int64 `[A, B]`) or `"mse"` (`target` `[A, B, V]`). Returns
    `scale` times the sum over the targets that count, and its gradient with respect to `y`
    `[A, B, H]`; adds to `grad_weight` and `grad_bias`. Without `weight`, y is the prediction. Of
    "mse", `counts` `[A, B]`, bool, says which rows count; by default all do.
    """

def readout_nbytes(K: int, N: int, rows: int, is_double: bool) -> int:
    """Return what `readout_loss` with gradients takes for itself, at most."""

def philox(counter: list[int], key: int) -> list[int]:
    """Return the block of Philox4x32-10 at this counter of four words."""

def draw_mask(key: int, draw: int, layer: int, step: int, row: int, p: float, n: int) -> Array:
    """Return 0 with probability p, else 1, for the first n units of a place: fastbptt/random.h."""

class Verbs:
    """The three verbs over tensors of another library, which has DLPack's C exchange.

    `tensor` is its class, `parameter` one derived from it whose objects are as plain. Tensors have
    torch's shapes; nothing is kept from call to call. What it cannot take is a `RuntimeError`.
    `autocast` is the dtype of h from step to step where x, state and weights may be float32 and
    bfloat16 side by side, or empty: then all are of one dtype.
    """

    def __init__(
        self,
        tensor: type[Any],
        parameter: type[Any],
        cell: str,
        bias: bool,
        batch_first: bool,
        directions: int,
        projected: bool,
        autocast: str,
    ) -> None: ...
    def problem(self, x: Any, h: Any, c: Any, weights: Sequence[Any], batch_sizes: Any) -> str:
        """Return what the core cannot take of these tensors, or an empty string."""

    def can_read(self, gradients: tuple[Any, ...]) -> bool:
        """Whether each is None or a tensor in memory, and does not stand for many, or for zeros."""

    def tape_size(
        self, T: int, B: int, input_size: int, hidden_size: int, num_layers: int, proj_size: int
    ) -> int: ...
    def forward(
        self,
        x: Any,
        h: Any,
        c: Any,
        weights: Sequence[Any],
        batch_sizes: Any,
        keep: bool,
        threads: int,
    ) -> tuple[Any, Any, Any, Any]:
        """Return y, the last h and c (None without) and the tape (None if it is not to be kept)."""

    def backward(
        self,
        x: Any,
        h: Any,
        c: Any,
        weights: Sequence[Any],
        batch_sizes: Any,
        y: Any,
        tape: Any,
        grad_y: Any,
        grad_h: Any,
        grad_c: Any,
        needed: Sequence[bool],
        threads: int,
    ) -> tuple[Any, ...]:
        """Return the gradients of x, h, c and each weight.

        `needed` says of each whether it is wanted; those that are not are None, but all matrices of
        a layer are computed where one of its weights is.
        """

class Block:
    """Some steps of all streams, checked; `prediction` `[n, B, N]` is filled as they are run."""

    @property
    def prediction(self) -> Array: ...

class Stream:
    """B streams through embedding, recurrent layers and readout, learning as they run.

    Time comes first in all arrays. `weights` is as for `Stack`; `k1` and `k2` are read for the rule
    "Truncated", `seed` for "UORO". A loss other than "cross_entropy" or "mse" takes `attempt` and
    `keep` in place of `push`.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        dtype: str,
        B: int,
        rule: str,
        k1: int,
        k2: int,
        seed: int,
        loss: str,
        weights: list[Array | None],
        embedding: Array | None,
        readout: Array | None,
        readout_bias: Array | None,
    ) -> None: ...
    def open(
        self,
        n: int,
        x: Array | None,
        x_mask: Array | None,
        target: Array | None,
        target_mask: Array | None,
        ignore_index: int,
    ) -> Block:
        """Check n steps; masks are uint8 `[n, B]`, zero where something is missing."""
    def push(
        self, block: Block, begin: int, end: int
    ) -> tuple[float, int, int, BaseException | None]:
        """Run and keep steps; return loss, targets, steps, and what ended them early."""
    def attempt(self, block: Block, t: int) -> Array:
        """Run a step, which `keep` may then keep; return the predictions of the block."""
    def keep(self, grad: Array | None) -> None:
        """Keep the step tried last, with the gradient `[1, B, N]` of its prediction."""
    def gather(self, grads: list[Array]) -> None:
        """Add the gradients since the last gather to arrays in the order of the parameters."""
    def reset(self, rows: Array) -> None: ...
    def state(self) -> dict[str, Array]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
