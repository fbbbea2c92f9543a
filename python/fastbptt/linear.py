"""The affine map that reads an output from the hidden units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, DTypeLike

from fastbptt import _core, initialisers
from fastbptt._arrays import (
    Array,
    as_array,
    as_bool,
    as_dtype,
    as_rng,
    as_size,
    check_parameters,
)
from fastbptt._part import Gradients, Part


class Linear(Part):
    """`y = x weight^T + bias`, with `weight` `[N, K]` and `bias` `[N]`.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    bias : bool
        Whether there is a bias.
    dtype : {"float32", "float64", "bfloat16"}
        Of parameters, inputs and results; in bfloat16 the results and all gradients are float32.
    seed : int, optional
        Of the initial parameters, uniform over `[-1/sqrt(K), 1/sqrt(K))` as in PyTorch; a new one
        each time by default.

    Raises
    ------
    ValueError
        A size is not positive, or their product overflows.
    TypeError
        A size is no integer, or `bias` no bool.
    MemoryError
        The machine cannot hold the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> readout = fb.Linear(4, 2, seed=0)
    >>> readout(np.ones((10, 3, 4), np.float32)).shape
    (10, 3, 2)
    """

    kind = "Linear"
    in_features: int
    out_features: int
    bias: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = "float32",
        seed: Any = None,
    ) -> None:
        self._configure(in_features=in_features, out_features=out_features, bias=bias, dtype=dtype)
        rng = as_rng(seed)
        self._allocate()
        for weight in self._weights.values():
            initialisers.uniform(weight, 1.0 / math.sqrt(self.in_features), rng)

    def _configure(
        self, *, in_features: int, out_features: int, bias: bool, dtype: DTypeLike
    ) -> None:
        self.in_features = K = as_size("in_features", in_features)
        self.out_features = N = as_size("out_features", out_features)
        self.bias = as_bool("bias", bias)
        self.dtype = as_dtype(dtype)
        check_parameters(f"in_features={K}, out_features={N}", (K + self.bias) * N, 2, self.dtype)

    def _settings(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "dtype": self.dtype.name,
        }

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "weight", (self.out_features, self.in_features)
        if self.bias:
            yield "bias", (self.out_features,)

    def __call__(self, x: ArrayLike) -> Array:
        """Return the map of each row of x.

        Parameters
        ----------
        x : array_like
            `[A, K]` or `[A, B, K]`.

        Returns
        -------
        ndarray
            `[A, N]` or `[A, B, N]`.

        Raises
        ------
        ValueError
            The shape of x is wrong.
        TypeError
            The dtype of x is wrong.

        Examples
        --------
        >>> import fastbptt as fb
        >>> fb.Linear(4, 2, bias=False, seed=0)([[0.0, 0.0, 0.0, 0.0]]).tolist()
        [[0.0, 0.0]]
        """
        if type(x) is not ndarray or self.dtype != self.compute_dtype:
            x = self._computed("x", x)
        weights = self._computed_weights()
        return _core.linear(x, weights["weight"], weights.get("bias"))

    def _computed_weights(self) -> dict[str, Array]:
        dtype = self.compute_dtype
        return {name: weight.astype(dtype, copy=False) for name, weight in self._weights.items()}

    def backward(self, x: ArrayLike, grad_y: ArrayLike) -> Gradients[None]:
        """Return the gradients with respect to x and the parameters.

        Parameters
        ----------
        x : array_like
            What the map was called with.
        grad_y : array_like
            Gradient with respect to what it returned, of its shape.

        Returns
        -------
        Gradients
            `x` and `weights`; `state` is None.

        Raises
        ------
        ValueError
            A shape is wrong.
        TypeError
            A dtype is wrong.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> readout = fb.Linear(4, 2, seed=0)
        >>> x = np.ones((3, 4), np.float32)
        >>> grads = readout.backward(x, np.ones((3, 2), np.float32))
        >>> grads.x.shape, grads.weights["bias"].tolist()
        ((3, 4), [3.0, 3.0])
        """
        grads = self._zero_grads()
        grad_x = _core.linear_backward(
            self._computed("x", x),
            self._computed_weights()["weight"],
            as_array("grad_y", grad_y, self.compute_dtype),
            grads["weight"],
            grads.get("bias"),
        )
        return Gradients(grad_x, None, grads)

    def _arguments(self) -> list[str]:
        shown = [f"{self.in_features}", f"{self.out_features}"]
        if not self.bias:
            shown.append("bias=False")
        if self.dtype != np.float32:
            shown.append(f"dtype={self.dtype.name!r}")
        return shown
