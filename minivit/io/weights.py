"""Loading and saving of weights: safetensors with timm's names, and Google's released npz files for ViT and Mixer.

A file that does not fit the model is rejected before anything is changed, with a UserError that describes the differences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from ..data.npz import read_npz
from ..errors import UserError, listed, reason, shown
from ..files import atomic_file, open_regular, writing
from ..models import MOST_PARAMETERS, outline
from ..models.base import Model
from ..schema import checked, parse_json
from ..version import __version__
from .int8 import restored, rounded

State = dict[str, np.ndarray]  # parameter name -> array


def description_of(model: Model) -> str:
    """The model's family, name and configuration, as JSON."""
    return json.dumps({"family": model.family, "name": model.name, **asdict(model.config)})


def save_weights(
    model: Model, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None, precision: str | None = None
) -> None:
    """Write the parameters as a safetensors file, whose metadata contains the model's family, name and configuration as JSON under "model",
    and the model's own metadata (`Model.metadata`), such as the thresholds of a cascade under "calibration".

    metadata: additional metadata. precision: "int8" rounds all matrices of weights but the head to 8 bits (`io/int8.py`); None: they are
    stored as they are. The file is written atomically: an existing one is kept if writing fails. Raises UserError.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are saved as .safetensors: {path} has another ending")
    if precision not in (None, "int8"):
        raise UserError(f"precision={shown(precision)}: weights are saved as they are, or in int8")
    all_metadata = {"format": "minivit", "version": __version__, "model": description_of(model), **(metadata or {}), **model.metadata()}
    state = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    content = save(rounded(state, _of_head) if precision else state, all_metadata)
    with writing(path), atomic_file(path) as file:
        file.write(content)


def load_weights(model: Model, path: str | os.PathLike[str], *, head: bool = True) -> tuple[str, ...]:
    """Load weights into a model: `.safetensors` with timm's names, or `.npz` with the names of Google's ViT and Mixer files.

    head=False keeps the model's head, for a file with another number of classes. A ViT's position embedding is resized to the model's grid
    as in timm: bicubic with antialiasing from safetensors, bilinear from npz. A patch projection for another number of channels is
    converted as in timm: for a gray model the weights of all channels are summed (`models/channels.py`). The result has a line for each
    array that was resized or converted. The thresholds of a cascade are loaded if all of its weights are those of the file. Names of the
    original authors' code are accepted too (`Model.rename_foreign`), and names that all begin with "module.", "model." or "_orig_mod.".
    Google's `pre_logits` layer is a part of the file's head, so it needs head=False.
    path may be a folder with model.safetensors, or the index of weights in several files, model.safetensors.index.json, or its folder.
    Raises UserError, without changing the model, for a file that is missing, damaged or does not fit, and for a pickle (.pth, .pt, .bin).
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix == ".npz":
        state, method = _from_google(model, _read_npz(path), path, head), "bilinear"
    else:
        if path.name.endswith(INDEX) or path.is_dir():
            state = read_shards(path)
        elif path.suffix == ".safetensors":
            state, metadata = read_safetensors(path)
        else:
            refuse_pickles(path)
            raise UserError(f"weights are .safetensors or .npz files: {path} has another ending")
        try:
            state, method = model.rename_foreign(_without_wrappers(state)), "bicubic_antialias"
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    head_state = {name: parameter.numpy() for name, parameter in model.named_parameters() if _of_head(name)}
    if not head:
        state = {name: array for name, array in state.items() if not _of_head(name)} | head_state
    mismatches = [f"{n} is {state[n].shape}, not {a.shape}" for n, a in head_state.items() if n in state and state[n].shape != a.shape]
    if mismatches:
        raise UserError(
            f"{path}: the head is for other classes than the model's {model.config.num_classes} ({'; '.join(mismatches)}): "
            "create the model with its num_classes, or load with head=False to keep the model's own"
        )
    try:
        content = model.read_metadata(metadata)
        if head_state and {name for name, _ in model.named_parameters()} - state.keys() == head_state.keys():
            raise UserError("the file has no head: load it with head=False to keep the model's own")
        converted = model.convert_channels(model.resize_positions(state, method))
        model.load_state_dict(converted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model.restore(content, own_file=False)
    return tuple(_changes(model, state, converted, method))


def _changes(model: Model, given: State, converted: State, method: str) -> Iterator[str]:
    """A line for each parameter of another shape than the file's, in the order of the model."""
    for name, _ in model.named_parameters():
        old, new = given[name].shape, converted[name].shape
        if old != new and len(new) == 4:
            yield f"{name}: {old[1]} channels became {new[1]}, {'summed' if new[1] == 1 else 'repeated and scaled'}"
        elif old != new:
            yield f"{name}: resized from {old} to {new}, {method}"


def _without_wrappers(state: State) -> State:
    """The state dict without a prefix that all names have because the module was wrapped when it was saved."""
    while prefix := next((p for p in _WRAPPERS if state and all(name.startswith((p, "head.")) for name in state)), ""):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


# Data-parallel training, Lightning and the like, compiled modules, and the network without the head of self-supervised training.
_WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.")


def _of_head(name: str) -> bool:
    return not {"head", "head_dist"}.isdisjoint(name.split(".")[:-1])


def model_of(family: str, config: Mapping[str, Any], state: State) -> Model:
    """The model of a configuration with the arrays of a file, in evaluation mode. Raises UserError if they do not fit each other.

    Nothing is allocated before the shapes are known to be those of the file.
    """
    model = outline(family, config, most=len(state))
    model.check_state_dict(state)
    model.allocate()
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------------------------------ reading
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
INDEX = ".safetensors.index.json"  # the end of the name of a file that says which weights are in which files
LARGEST_INDEX = 2**23  # bytes


def refuse_pickles(path: Path) -> None:
    """Raises UserError for a file of PyTorch's, by its ending, with the line that converts it."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which may run code when it is read; convert it where PyTorch is: "
            f"from safetensors.torch import save_file; save_file(torch.load({path.name[:40]!r}, weights_only=True), 'model.safetensors')"
        )


def read_shards(path: Path) -> State:
    """The arrays of a folder of weights, or of several files by their index. Raises UserError if one is missing or damaged."""
    if path.is_dir():
        single, found = path / "model.safetensors", sorted(path.glob(f"*{INDEX}"))
        if single.is_file() or not found:
            for pickle in () if single.is_file() else sorted(each for each in path.iterdir() if each.suffix in PICKLES):
                refuse_pickles(pickle)
            return read_safetensors(single)[0]
        path = found[0]
    try:
        with open_regular(path) as file:
            content = checked("its content", parse_json(file.read(LARGEST_INDEX).decode(), "its text"), Mapping[str, Any])
        weight_map = checked("weight_map", content.get("weight_map"), Mapping[str, str])
        for name in set(weight_map.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{shown(name)} is no name of a file beside it")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is no index of safetensors files: {error}: get it again") from error
    state: State = {}
    for name in sorted(set(weight_map.values())):
        state |= read_safetensors(path.with_name(name))[0]
    missing = [name for name in weight_map if name not in state]
    if missing:
        raise UserError(f"{path} names weights that its files have not: {listed(missing)}: get them again")
    return state


def read_safetensors(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    """The arrays of a file, bfloat16 and 8 bits converted to float32, and its metadata. Raises UserError if it is missing or damaged."""
    refuse_pickles(Path(path))
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            file.seek(0)
            content = file.read()
        raw = safetensors.deserialize(content)  # also holds the lengths that the header claims against those that there are
        if len(raw) > MOST_PARAMETERS:
            raise ValueError(f"{len(raw):,} arrays")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        arrays = restored({name: _array(path, name, item["dtype"], item["data"]).reshape(item["shape"]) for name, item in raw})
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except UserError:
        raise
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): get or make it again") from error
    return arrays, metadata


LARGEST_HEADER = 2**23  # bytes: twice what the names of all parameters of the largest model need
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def _array(path: str | os.PathLike[str], name: str, dtype: str, data: bytes) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {dtype}: convert it to F32")
    return np.frombuffer(data, _DTYPES[dtype])


def _read_npz(path: Path) -> State:
    arrays, _ = read_npz(path)
    non_numeric = [name for name, array in arrays.items() if array.dtype.kind not in "fiu"]
    if non_numeric:
        raise UserError(f"{path} is no npz file of weights: {listed(non_numeric)} hold no numbers")
    return arrays


# --------------------------------------------------------------------------------------------------------------- Google's files
_PREFIXES = ("opt/target/", "params/img/", "params/")  # of training checkpoints and big_vision files


def _from_google(model: Model, arrays: State, path: Path, head: bool) -> State:
    """The arrays with the model's parameter names and layout; without those of the file's head unless `head`."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in arrays)), "")
    arrays = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    try:
        names = model.google_names(arrays.keys())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if names is None:
        raise UserError(f"{path}: there is no npz import for {model.family}: use a .safetensors file")
    if not head:
        names = {ours: theirs for ours, theirs in names.items() if not _of_head(ours)}
        arrays = {name: array for name, array in arrays.items() if not name.startswith(("head/", "pre_logits/"))}
    elif any(name.startswith("pre_logits/") for name in arrays):
        raise UserError(f"{path}: its head has a layer pre_logits, which {model.name} does not: load with head=False")
    table = {
        ours: [theirs.replace("{query,key,value}", part) for part in ("query", "key", "value")] if "{" in theirs else [theirs]
        for ours, theirs in names.items()
    }
    expected = [name for parts in table.values() for name in parts]
    missing, unexpected = [n for n in expected if n not in arrays], sorted(arrays.keys() - set(expected))
    errors = [f"{problem}: {listed(found)}" for problem, found in (("missing", missing), ("unexpected", unexpected)) if found]
    if errors:
        raise UserError(f"{path}: names do not fit {model.name}; {'; '.join(errors)}")
    return {ours: _concatenate(path, {name: arrays[name] for name in parts}) for ours, parts in table.items()}


def _concatenate(path: Path, parts: State) -> np.ndarray:
    try:
        return np.concatenate([_convert_layout(name, array) for name, array in parts.items()])
    except (ValueError, IndexError, TypeError):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in parts.items())
        raise UserError(f"{path}: shapes that do not fit: {shapes}") from None


def _convert_layout(name: str, array: np.ndarray) -> np.ndarray:
    kind = name.split("/")[-2:]
    if kind[0] in ("query", "key", "value"):  # kernel (C, H, D), bias (H, D)
        return array.reshape(len(array), -1).T if kind[1] == "kernel" else array.reshape(-1)
    if kind == ["out", "kernel"]:  # (H, D, C)
        return array.reshape(-1, array.shape[-1]).T
    if kind[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T  # (P, P, in, out) or (in, out)
