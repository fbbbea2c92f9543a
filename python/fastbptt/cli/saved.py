"""What `fastbptt train` keeps in a model file beside the model, and how it is read back."""

from __future__ import annotations

from typing import Any

import fastbptt as fb
from fastbptt import storage
from fastbptt.cli.errors import UsageError


def load(path: str, name: str) -> tuple[fb.Model, Any, dict[str, Any]]:
    """Return model, optimiser (or None) and the rest; a `UsageError` that begins with `name`."""
    try:
        model, optimizer, extra = storage.load_training(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{name}: cannot read {path!r}: {reason}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error
    return model, optimizer, dict(extra or {})


def text_model(path: str) -> tuple[fb.Model, str]:
    """Return a text model and its vocabulary."""
    model, _, extra = load(path, "MODEL")
    if extra.get("kind") == "series":
        source = extra.get("source")
        column = source.get("column") if isinstance(source, dict) else None
        raise UsageError(
            f"MODEL: {path!r} forecasts the series {column!r}; "
            "wanted a model that was trained on a text"
        )
    vocabulary = extra.get("vocabulary")
    if not isinstance(vocabulary, str):
        raise UsageError(
            f"MODEL: {path!r} has no vocabulary; wanted a file that `fastbptt train` has saved"
        )
    if model.embedding is None or model.readout is None:
        raise UsageError(f"MODEL: {path!r} has no embedding or no readout; wanted a model of text")
    for size in (model.embedding.num_embeddings, model.readout.out_features):
        if size != len(vocabulary):
            raise UsageError(
                f"MODEL: {path!r} has a vocabulary of {len(vocabulary)} characters, wanted {size}"
            )
    return model, vocabulary


def is_replaceable(path: str) -> bool:
    """Whether the file that is at `path` is a model, so that another may take its place."""
    try:
        storage.load_training(path)
    except (OSError, ValueError, TypeError):
        return False
    return True
