"""A table of vectors, looked up by class number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbptt import _core, initialisers
from fastbptt._arrays import (
    Array,
    as_array,
    as_dtype,
    as_index,
    as_rng,
    as_size,
    check_parameters,
)
from fastbptt._part import Part


class Embedding(Part):
    """A table `weight` `[V, E]` of vectors, looked up by index.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        V rows of E numbers, drawn from N(0, 1) as in PyTorch.
    dtype : {"float32", "float64", "bfloat16"}
        Of the table; the gradient of one in bfloat16 is float32.
    seed : int, optional
        Of the table; a new one each time by default.

    Raises
    ------
    ValueError
        A size is not positive, or their product overflows.
    TypeError
        A size is no integer.
    MemoryError
        The machine cannot hold the table.

    Examples
    --------
    >>> import fastbptt as fb
    >>> table = fb.Embedding(10, 3, seed=0)
    >>> table([[1, 2], [9, 0]]).shape
    (2, 2, 3)
    """

    kind = "Embedding"
    num_embeddings: int
    embedding_dim: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: DTypeLike = "float32",
        seed: Any = None,
    ) -> None:
        self._configure(num_embeddings=num_embeddings, embedding_dim=embedding_dim, dtype=dtype)
        rng = as_rng(seed)
        self._allocate()
        initialisers.normal(self._weights["weight"], rng)

    def _configure(self, *, num_embeddings: int, embedding_dim: int, dtype: DTypeLike) -> None:
        self.num_embeddings = V = as_size("num_embeddings", num_embeddings)
        self.embedding_dim = E = as_size("embedding_dim", embedding_dim)
        self.dtype = as_dtype(dtype)
        check_parameters(f"num_embeddings={V}, embedding_dim={E}", V * E, 1, self.dtype)

    def _settings(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "dtype": self.dtype.name,
        }

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "weight", (self.num_embeddings, self.embedding_dim)

    def __call__(self, index: ArrayLike) -> Array:
        """Return the rows that `index` names.

        Parameters
        ----------
        index : array_like of int
            Any shape; each from 0 to V - 1.

        Returns
        -------
        ndarray
            The shape of `index`, and E behind it.

        Raises
        ------
        ValueError
            An index is out of range.
        TypeError
            An index is no integer.

        Examples
        --------
        >>> import fastbptt as fb
        >>> fb.Embedding(10, 3, seed=0)([4, 4, 2]).shape
        (3, 3)
        """
        return self._rows(as_index("index", index, self.num_embeddings))

    def _rows(self, index: NDArray[np.int64]) -> Array:
        return self._weights["weight"].take(index, axis=0, mode="clip")  # nothing to clip

    def backward(self, index: ArrayLike, grad_y: ArrayLike) -> dict[str, Array]:
        """Return the gradient with respect to the table: for each row the sum over its uses.

        Parameters
        ----------
        index : array_like of int
            What the table was called with.
        grad_y : array_like
            Gradient with respect to what it returned, of its shape.

        Returns
        -------
        dict of str to ndarray
            `weight` `[V, E]`.

        Raises
        ------
        ValueError
            An index is out of range, or a shape is wrong.
        TypeError
            An index is no integer, or a dtype is wrong.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> table = fb.Embedding(3, 2)
        >>> table.backward([1, 2, 1], np.ones((3, 2), np.float32))["weight"].tolist()
        [[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]]
        """
        rows = as_index("index", index, self.num_embeddings)
        grad = as_array("grad_y", grad_y, self.compute_dtype)
        wanted = (*rows.shape, self.embedding_dim)
        if grad.shape != wanted:
            raise ValueError(f"grad_y: got shape {grad.shape}, wanted {wanted}")
        if grad.dtype != self.compute_dtype:
            raise TypeError(f"grad_y: got dtype {grad.dtype}, wanted {self.compute_dtype}")
        weight = self._zero_grads()["weight"]
        flat = grad.reshape(1, rows.size, self.embedding_dim)
        _core.embedding_backward(rows.reshape(1, -1), flat, weight)
        return {"weight": weight}

    def _arguments(self) -> list[str]:
        dtype = [] if self.dtype == np.float32 else [f"dtype={self.dtype.name!r}"]
        return [f"{self.num_embeddings}", f"{self.embedding_dim}", *dtype]
