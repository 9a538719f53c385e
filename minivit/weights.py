"""Weights in and out: safetensors under timm's names, and the npz files Google released for ViT and Mixer.

A file that does not fit is refused before anything is changed, with one UserError that says what differs.
"""

from __future__ import annotations

import json
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from . import __version__
from .calibration import Calibration, fits
from .errors import UserError
from .files import atomic_file
from .models import DVT, Mixer, Model, ViT

State = dict[str, np.ndarray]  # parameter name -> array


def save_weights(model: Model, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the parameters as a safetensors file, whose metadata holds the model's family, name and configuration as JSON under "model",
    and a cascade's thresholds under "calibration".

    metadata: more of it. The file takes its name only when it is complete: what was there stays if the disk is full. Raises UserError.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are saved as .safetensors: {path} has another ending")
    model_as_json = json.dumps({"family": model.family, "name": model.name, **asdict(model.config)})
    described = {"format": "minivit", "version": __version__, "model": model_as_json, **(metadata or {})}
    if isinstance(model, DVT) and model.calibration:
        described["calibration"] = json.dumps(model.calibration.to_json())
    content = save({name: parameter.numpy() for name, parameter in model.named_parameters()}, described)
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error


def load_weights(model: Model, path: str | os.PathLike[str], *, head: bool = True) -> None:
    """Fill a model from a file: `.safetensors` under timm's names, or `.npz` under the names of Google's ViT and Mixer files.

    head=False keeps the model's own head, for another number of classes. A ViT's position embedding is resized to the model's grid as timm
    does it: bicubic with antialiasing from safetensors, bilinear from npz. A cascade's thresholds are the file's from then on,
    where all of its weights are. The names of the authors' own code are taken too (`models/dynamic.py`).
    Raises UserError for a file that is missing, damaged or does not fit; the model is unchanged then.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        state, method = model.own_names(state), "bicubic_antialias"
    elif path.suffix == ".npz":
        state, method = _from_google(model, _read_npz(path), path), "bilinear"
    else:
        raise UserError(f"weights are .safetensors or .npz files: {path} has another ending")
    own = {name: parameter.numpy() for name, parameter in model.named_parameters() if _of_head(name)}
    if not head:
        state = {name: array for name, array in state.items() if not _of_head(name)} | own
    differing = [f"{n} is {state[n].shape}, not {a.shape}" for n, a in own.items() if n in state and state[n].shape != a.shape]
    if differing:
        raise UserError(
            f"{path}: the head is for other classes than the model's {model.config.num_classes} ({'; '.join(differing)}): "
            "create the model with its num_classes, or load with head=False to keep the model's own"
        )
    try:
        thresholds = read_calibration(metadata)
        model.load_state_dict(model.fit_positions(state, method))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(model, DVT):
        model.calibration = thresholds if thresholds and fits(thresholds, model) else None


def read_calibration(metadata: Mapping[str, str]) -> Calibration | None:
    """The thresholds in a file's metadata, where it has any. Raises UserError where they are damaged."""
    if "calibration" not in metadata:
        return None
    try:
        return Calibration.from_json(json.loads(metadata["calibration"]))
    except json.JSONDecodeError as error:
        raise UserError(f"the thresholds that were saved with the model are damaged ({error}): calibrate it again") from error


def _of_head(name: str) -> bool:
    return "head" in name.split(".")[:-1]


# ------------------------------------------------------------------------------------------------------------------------ reading
def read_safetensors(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    """The arrays of a file, bfloat16 widened to float32, and its metadata. Raises UserError where it is missing or damaged."""
    try:
        content = Path(path).read_bytes()
        raw = safetensors.deserialize(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except OSError as error:
        raise _unreadable(path, error) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): get or make it again") from error
    return {name: _array(path, name, item["dtype"], item["data"]).reshape(item["shape"]) for name, item in raw}, metadata


_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def _array(path: str | os.PathLike[str], name: str, dtype: str, data: bytes) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {dtype}: convert it to F32")
    return np.frombuffer(data, _DTYPES[dtype])


# What numpy.load and the modules below it raise for files of every kind of damage, and for files that are none.
_NPZ_FAULTS = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    OverflowError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read_npz(path: Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except FileNotFoundError as error:
        raise _unreadable(path, error) from error
    except _NPZ_FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or no npz file of plain arrays ({reason}): get or make it again") from error
    other = [name for name, array in arrays.items() if array.dtype.kind not in "fiu"]
    if other:
        raise UserError(f"{path} is damaged or no npz file of plain arrays: {', '.join(other)} hold no numbers")
    return arrays


def _unreadable(path: str | os.PathLike[str], error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror or error}")


# ----------------------------------------------------------------------------------------------------- names of Google's files
_PREFIXES = ("opt/target/", "params/img/", "params/")  # of training checkpoints and of big_vision


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}


def _dense(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}/kernel", f"{ours}.bias": f"{theirs}/bias"}


def _google_vit(model: ViT, names: Collection[str]) -> dict[str, str]:
    released = "Transformer/encoderblock_0/LayerNorm_2/scale" in names  # big_vision counts each kind of layer from 0
    attention, norm2, mlp = (1, 2, 3) if released else (0, 1, 0)
    position = "pos_embedding" if "pos_embedding" in names else "Transformer/posembed_input/pos_embedding"
    table = ({"cls_token": "cls"} if model.config.class_token else {}) | {"pos_embed": position}
    for i in range(model.config.depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        table |= _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{norm2}")
        table |= _dense(f"{ours}.attn.qkv", f"{theirs}/MultiHeadDotProductAttention_{attention}/{{query,key,value}}")
        table |= _dense(f"{ours}.attn.proj", f"{theirs}/MultiHeadDotProductAttention_{attention}/out")
        for k in (0, 1):
            table |= _dense(f"{ours}.mlp.fc{k + 1}", f"{theirs}/MlpBlock_{mlp}/Dense_{k}")
    norm = "norm" if model.norm else "fc_norm"
    return table | _dense("patch_embed.proj", "embedding") | _norm(norm, "Transformer/encoder_norm") | _dense("head", "head")


def _google_mixer(model: Mixer, names: Collection[str]) -> dict[str, str]:
    table = _dense("stem.proj", "stem") | _norm("norm", "pre_head_layer_norm") | _dense("head", "head")
    for i in range(model.config.depth):
        ours, theirs = f"blocks.{i}", f"MixerBlock_{i}"
        table |= _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
        for k in (0, 1):
            table |= _dense(f"{ours}.mlp_tokens.fc{k + 1}", f"{theirs}/token_mixing/Dense_{k}")
            table |= _dense(f"{ours}.mlp_channels.fc{k + 1}", f"{theirs}/channel_mixing/Dense_{k}")
    return table


# For each family a table {our name: Google's name}; where ours is of q, k and v together, theirs is of "{query,key,value}".
_GOOGLE: dict[str, Callable[..., dict[str, str]]] = {"vit": _google_vit, "mixer": _google_mixer}


def _from_google(model: Model, arrays: State, path: Path) -> State:
    """The arrays under the model's own names and in its layout."""
    if model.family not in _GOOGLE:
        raise UserError(f"{path}: there is no npz import for {model.family}: use a .safetensors file")
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in arrays)), "")
    arrays = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    table = {
        ours: [theirs.replace("{query,key,value}", part) for part in ("query", "key", "value")] if "{" in theirs else [theirs]
        for ours, theirs in _GOOGLE[model.family](model, arrays.keys()).items()
    }
    wanted = [name for names in table.values() for name in names]
    missing, unexpected = [n for n in wanted if n not in arrays], sorted(arrays.keys() - set(wanted))
    faults = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if faults:
        raise UserError(f"{path}: names do not fit {model.name}; {'; '.join(faults)}")
    return {ours: _joined(path, {name: arrays[name] for name in names}) for ours, names in table.items()}


def _joined(path: Path, parts: State) -> np.ndarray:
    try:
        return np.concatenate([_in_our_layout(name, array) for name, array in parts.items()])
    except (ValueError, IndexError, TypeError):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in parts.items())
        raise UserError(f"{path}: shapes that do not fit: {shapes}") from None


def _in_our_layout(name: str, array: np.ndarray) -> np.ndarray:
    kind = name.split("/")[-2:]
    if kind[0] in ("query", "key", "value"):  # kernel (C, H, D), bias (H, D)
        return array.reshape(len(array), -1).T if kind[1] == "kernel" else array.reshape(-1)
    if kind == ["out", "kernel"]:  # (H, D, C)
        return array.reshape(-1, array.shape[-1]).T
    if kind[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T  # (P, P, in, out) or (in, out)
