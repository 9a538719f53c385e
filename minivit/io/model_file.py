"""Model files: weights with the configuration of their model, and what else a classifier needs, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from ..errors import UserError, reason
from ..models import Model
from ..schema import Limits, checked, parse_json
from .weights import model_of, read_safetensors, save_weights


@contextmanager
def reading(what: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Convert an error of the block about what a file says into a UserError that names the file, and ends with the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {what}: {reason(error)}") from error
    except ValueError as error:  # UserError is one
        raise UserError(f"{what} is damaged: {error}: {remedy}") from error


Name = Annotated[str, Limits(most=100)]  # of a model: pictures have it in their titles


def save_model(path: str | os.PathLike[str], model: Model, about: Mapping[str, Any], precision: str | None = None) -> None:
    """Write a model with its configuration and the metadata `about`, whose values JSON can represent. Raises UserError.

    precision: of the weights in the file, as for `save_weights`.
    """
    save_weights(model, path, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}, precision)


def load_model(path: Path) -> tuple[Model, dict[str, Any]]:
    """(model in evaluation mode, `about`) from a file written by `save_model`. Raises UserError."""
    state, metadata = read_safetensors(path)
    if "model" not in metadata:
        raise UserError(f"{path} does not say which model its weights are of: create that, and use load_weights")
    with reading(path, "get or make it again, or create the model and use load_weights"):
        config = dict(checked("model", parse_json(metadata["model"], "model"), Mapping[str, Any]))
        family, name = (checked(f"model.{key}", config.pop(key, None), Name) for key in ("family", "name"))
        model = model_of(family, config, state)
        model.name = name
        model.restore(model.read_metadata(metadata), own_file=True)
        about = metadata.keys() - model.metadata().keys() - {"format", "version", "model"}
        return model, {key: parse_json(metadata[key], key) for key in about}
