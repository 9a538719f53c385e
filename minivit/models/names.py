"""Names of parameters in other programs' files: those of Google's released ViT and Mixer, and those of Hugging Face's ViT and DeiT."""

from __future__ import annotations

import re

import numpy as np

HUGGING_FACE = {  # their name -> ours; {} stands for the number of a block
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.attention.attention.query": "blocks.{}.attn.query",
    "encoder.layer.{}.attention.attention.key": "blocks.{}.attn.key",
    "encoder.layer.{}.attention.attention.value": "blocks.{}.attn.value",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.proj",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


def norm(ours: str, theirs: str) -> dict[str, str]:
    """The names of a normalisation's parameters."""
    return {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}


def dense(ours: str, theirs: str) -> dict[str, str]:
    """The names of a linear layer's parameters."""
    return {f"{ours}.weight": f"{theirs}/kernel", f"{ours}.bias": f"{theirs}/bias"}


def from_hugging_face(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`state` with the names of Hugging Face's ViT and DeiT, if it has them, replaced by ours; q, k and v are joined.

    The pooler, which no answer of a classifier depends on, is left out. Names that are not known stay as they are.
    """
    bare = {re.sub(r"^(vit|deit)\.", "", name): array for name, array in state.items()}
    if "embeddings.patch_embeddings.projection.weight" not in bare:
        return state
    renamed = {}
    for name, array in bare.items():
        stem, dot, kind = name.rpartition(".")
        number = "".join(re.findall(r"^encoder\.layer\.(\d+)\.", name)[:1])
        general = re.sub(r"^encoder\.layer\.\d+\.", "encoder.layer.{}.", name)
        known = HUGGING_FACE.get(general) or (ours + dot + kind if (ours := HUGGING_FACE.get(general.rpartition(".")[0])) else name)
        if not stem.startswith("pooler"):
            renamed[known.format(number)] = array
    for name in [name for name in renamed if ".attn.query." in name]:
        theirs = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed and renamed[part].shape == renamed[name].shape for part in theirs):
            renamed[name.replace("query", "qkv")] = np.concatenate([renamed.pop(part) for part in theirs])
    return renamed
