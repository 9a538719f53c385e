"""Dynamic Vision Transformer: a cascade of models with increasingly fine grids of patches and an exit after each (Wang et al., 2105.15075).

Every stage is a complete backbone with separate weights; it sees the same image in more patches than the previous stage. A stage can reuse
from the previous one

    features       the tokens after the last block, before the final norm: each block of the next stage embeds them (LN, D → 128, GELU,
                   → 48), upsamples them to its own grid and appends them to the input of its MLP (section 3.3)
    relationships  the scaled attention logits of all blocks, including the logits added by reuse: an MLP over blocks and heads, followed by
                   upsampling of both token axes; the result is added to the logits of each block of the next stage (section 3.3)

In training all exits have equal weight and nothing is detached. In inference an image leaves at the first exit with sufficient confidence
(`minivit.calibrate`).
Parameters: `stages.k.` and the backbone's names, `stages.k.blocks.i.feature_reuse.{0,1.fc1,1.fc2}`, `stages.k.relation_reuse.{0,2}`.

Letters: B batch, N tokens, C channels, L blocks, H heads, u and g the patches of a stage and the next one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import numpy as np

from ... import functional as F
from ...errors import UserError, nearest, shown
from ...nn.initialisers import Initialiser, truncated_normal, uniform
from ...nn.layers import Dropout, LayerNorm, Linear, Mlp, Projection, Random, Sequential
from ...schema import Limits
from ...sides import both
from ...tensor import Tensor
from ..base import Backbone, Model
from ..config import Config, Patch, Positive, Rate, Size, StageConfig
from ..registry import FAMILIES, register
from .calibration import Calibration, fits

FEATURE_HIDDEN, FEATURE_CHANNELS = 128, 48  # of each block's embedding of the features (section 3.3)
SPREAD = 0x9E3779B97F4A7C15  # difference between the seeds of successive stages; the first stage has the model's seed
State = tuple[Tensor | None, ...]  # data for the next stage: tokens (B, N, C) and relationships (B, L·H, N, N); () for the first stage


@dataclass(frozen=True)
class DVTConfig(Config):
    """The defaults are those of DVT-DeiT-S."""

    backbone: str = "vit"  # the family of every stage
    patches: Annotated[Sequence[Patch], Limits(most=64)] = (
        (32, 32, 0),
        (23, 23, 3),
        (16, 16, 0),
    )  # (size, stride, padding) in pixels, one per exit
    feature_reuse: bool = True  # whether a stage reuses the features of the previous stage
    relationship_reuse: bool = True  # whether the attention logits of the previous stage are added to those of a stage
    dim: Size | Sequence[Size] = 384  # channels of a token, for all stages or for each
    depth: Size | Sequence[Size] = 12  # blocks, for all stages or for each
    heads: Size | Sequence[Size] = 6  # attention heads, for all stages or for each; unused by a backbone without attention
    mlp_ratio: Positive = 4.0  # hidden channels of a block's channel MLP, in units of dim
    drop_path_rate: Rate = 0.0  # stochastic depth of every stage
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation of the backbones
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the backbone's configuration

    def __post_init__(self) -> None:
        super().__post_init__()
        exits = len(self.patches)
        if exits < 2:
            raise UserError(f"a cascade has two exits or more, but patches holds {exits}: for one, create the backbone itself")
        for name in ("dim", "depth", "heads"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != exits:
                raise UserError(f"{name} holds {len(value)} numbers for {exits} exits: {shown(value)}")
        family = FAMILIES.get(self.backbone)
        backbones = [name for name, candidate in FAMILIES.items() if issubclass(candidate, Backbone)]
        if family is None or not issubclass(family, Backbone):
            raise UserError(
                f"backbone must be {' or '.join(map(repr, backbones))}, not {shown(self.backbone)}{nearest(self.backbone, backbones)}"
            )
        if self.relationship_reuse and not family.attends:
            raise UserError(f"relationship_reuse needs attention, which {self.backbone} has not: set relationship_reuse=False")
        decided = self.decided(0).keys() - _stage_config(family).patch_options
        allowed = [f.name for f in fields(family.Config) if f.name not in decided and not f.metadata.get("not_in_cascades")]
        for name in self.options:
            if name not in allowed:
                raise UserError(
                    f"options: {self.backbone} has no option {name!r} to set here{nearest(name, allowed)}; it has {', '.join(allowed)}"
                )

    def decided(self, k: int) -> dict[str, Any]:
        """The fields of the k-th stage's configuration that are set by the cascade's configuration."""
        field_names = {f.name for f in fields(FAMILIES[self.backbone].Config)}
        size, stride, padding = self.patches[k]
        values = {
            name: getattr(self, name)
            for name in ("image_size", "in_channels", "num_classes", "dtype", "mlp_ratio", "drop_path_rate", "init")
        }
        values |= _stage_config(FAMILIES[self.backbone]).patch_fields((size, stride, padding), self.options)
        values |= {
            "dim": self._of(self.dim, k),
            "depth": self._of(self.depth, k),
            "heads": self._of(self.heads, k),
            "extra_channels": FEATURE_CHANNELS if k and self.feature_reuse else 0,
        }
        return {name: value for name, value in values.items() if name in field_names}

    def stage(self, k: int) -> StageConfig:
        """The configuration of the k-th stage's backbone. Raises UserError if its patches do not fit the image."""
        size, _, padding = self.patches[k]
        if any(patch > image + 2 * border for patch, image, border in zip(both(size), both(self.image_size), both(padding))):
            raise UserError(
                f"patches: those of exit {k + 1}, of {size} pixels with padding {padding}, do not fit into an image of "
                f"{self.image_size} pixels"
            )
        decided, family = self.decided(k), _stage_config(FAMILIES[self.backbone])
        return family(**family.stage_defaults({"dim": decided["dim"], "mlp_ratio": self.mlp_ratio}) | dict(self.options) | decided)

    @staticmethod
    def _of(value: int | Sequence[int], k: int) -> int:
        return value[k] if isinstance(value, Sequence) else value


def _stage_config(family: type[Model]) -> type[StageConfig]:
    assert issubclass(family.Config, StageConfig)
    return family.Config


def _t2t_preset(dim: int, depth: int, heads: int, ratio: float) -> dict[str, Any]:
    return dict(backbone="t2t", patches=((14, 8, 3), (11, 6, 5), (7, 4, 2)), dim=dim, depth=depth, heads=heads, mlp_ratio=ratio)


PRESETS: dict[str, dict[str, Any]] = {
    "dvt_deit_small": dict(),
    "dvt_nano_8": dict(
        image_size=8,
        in_channels=1,
        num_classes=10,
        patches=((4, 4, 0), (4, 2, 0), (2, 2, 0)),
        dim=64,
        depth=4,
        heads=4,
        init="jax",
        options=dict(pool="mean", class_token=False),
    ),
    "dvt_nano_32": dict(
        image_size=32,
        num_classes=10,
        patches=((12, 8, 2), (8, 5, 1), (6, 4, 1)),
        dim=(64, 96, 128),
        depth=3,
        heads=(2, 3, 4),
        init="jax",
        options=dict(pool="mean", class_token=False),
    ),
    "dvt_t2t_vit_12": _t2t_preset(256, 12, 4, 2.0),
    "dvt_t2t_vit_14": _t2t_preset(384, 14, 6, 3.0),
    "dvt_t2t_tiny_32": dict(
        backbone="t2t",
        image_size=32,
        num_classes=10,
        patches=((7, 4, 2), (5, 3, 3), (5, 2, 2)),  # 8, 12 and 16 a side, of which the second unfold leaves 4, 6 and 8
        dim=192,
        depth=9,
        heads=3,
        mlp_ratio=3.0,
        options=dict(unfolds=((3, 2, 1), (3, 1, 1))),
    ),
    "dvt_tiny_32": dict(image_size=32, num_classes=10, patches=((12, 8, 2), (8, 5, 1), (6, 4, 1)), dim=192, depth=9, heads=3),
}


class FeatureReuse(Sequential):
    """One block's embedding of the previous stage's tokens: (B, prefix + u, C) -> (B, prefix + g, 48), zeros for the class token."""

    def __init__(
        self, dim: int, grids: tuple[tuple[int, int], tuple[int, int]], prefix: int, eps: float, random: Random, dtype: str
    ) -> None:
        super().__init__(LayerNorm(dim, eps, dtype), Mlp(dim, FEATURE_HIDDEN, random, dtype=dtype, out=FEATURE_CHANNELS))
        self.grids, self.class_token = grids, "zero" if prefix else "none"

    def forward(self, features: Tensor) -> Tensor:
        return F.resample(super().forward(features), *self.grids, "upsample", self.class_token)


class RelationReuse(Sequential):
    """The logits added to those of each block of a stage, computed from all logits of the previous stage.

    An MLP over the L·H maps of the previous stage, as 1×1 convolutions, followed by upsampling of both token axes, S R Sᵀ, including the
    row and column of the class token: (B, L·H, N, N) -> for each of L' blocks (B, H', M, M).
    """

    def __init__(self, maps: int, depth: int, heads: int, grids: tuple[tuple[int, int], tuple[int, int]], prefix: int, dtype: str) -> None:
        # None stands for the GELU
        super().__init__(Projection(maps, 3 * maps, 1, dtype), None, Projection(3 * maps, depth * heads, 1, dtype))
        self.depth, self.grids, self.class_token = depth, grids, "keep" if prefix else "none"

    def forward(self, relation: Tensor) -> tuple[Tensor, ...]:
        first, _, second = self.layers
        B, maps, N, _ = relation.shape
        mixed = F.token_mixing_mlp(
            relation.reshape(B, maps, N * N), first.weight.reshape(-1, maps), first.bias, second.weight.reshape(-1, 3 * maps), second.bias
        )  # (B, L'·H', N²)
        rows = F.resample(mixed.reshape(-1, N, N), *self.grids, "upsample", self.class_token)  # (B·L'·H', M, N)
        M = rows.shape[1]
        upsampled = F.resample(rows.reshape(-1, N, 1), *self.grids, "upsample", self.class_token)  # (B·L'·H'·M, M, 1)
        return F.split(upsampled.reshape(B, -1, M, M), self.depth, axis=1)


@register
class DVT(Model):
    """The complete cascade; `model(images)` is the output of the last exit.

    calibration: thresholds for budgets, set by `minivit.calibrate`; None before. Raises UserError for an invalid stage configuration.
    """

    family, Config, presets = "dvt", DVTConfig, PRESETS

    config: DVTConfig

    def __init__(self, config: DVTConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.calibration: Calibration | None = None
        self.stages: list[Backbone] = []
        family = FAMILIES[config.backbone]
        for k in range(len(config.patches)):
            stage = family(config.stage(k), (seed + k * SPREAD) % 2**63, self.random)
            assert isinstance(stage, Backbone)
            if k:
                self._join(self.stages[-1], stage)
            self.stages.append(stage)
        self.initialise()

    def _join(self, previous: Backbone, stage: Backbone) -> None:
        """Add to a stage the modules that reuse the data of the previous stage."""
        grids, dtype = (previous.grid, stage.grid), self.config.dtype
        previous_config, config = vars(previous.config), vars(stage.config)
        if self.config.feature_reuse:
            for block in stage.blocks:
                block.feature_reuse = FeatureReuse(previous_config["dim"], grids, stage.prefix, previous_config["eps"], self.random, dtype)
        if self.config.relationship_reuse:
            maps = previous_config["depth"] * previous_config["heads"]
            stage.relation_reuse = RelationReuse(maps, config["depth"], config["heads"], grids, stage.prefix, dtype)

    def initialisers(self) -> dict[str, Initialiser]:
        if self.config.init == "zeros":  # the stages are initialised already
            return {}
        convolutions = {
            f"stages.{k}.relation_reuse.{i}.*": uniform(stage.relation_reuse.layers[i].weight.shape[1] ** -0.5)
            for k, stage in enumerate(self.stages)
            if stage.relation_reuse
            for i in (0, 2)
        }
        return {"*.feature_reuse.1.*.weight": truncated_normal(0.02), **convolutions}

    @property
    def head(self) -> Linear:  # type: ignore[override]
        return self.stages[-1].head

    @property
    def head_drop(self) -> Dropout:  # type: ignore[override]
        return self.stages[-1].head_drop

    @property
    def num_exits(self) -> int:
        return len(self.stages)

    def stage(self, k: int, images: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Run one stage: returns its logits (B, num_classes), and the state that the next stage reuses.

        images: (B, in_channels, H, W) in the model's dtype. state: the state returned by stage k - 1 for these images; () for the first.
        """
        tokens, next_state = self._tokens(k, images, state)
        stage = self.stages[k]
        return stage.head(stage.head_drop(stage.pool(tokens)), precise=True), next_state

    def _tokens(self, k: int, images: Tensor, state: State) -> tuple[Tensor, State]:
        """The tokens (B, N, C) after the last block of one stage that its head or the next stage reads, and the state that this reuses."""
        is_last = k == len(self.stages) - 1
        logits: list[Tensor] | None = [] if self.config.relationship_reuse and not is_last else None
        features, relationships = state or (None, None)
        x = self.stages[k].encode(images, features, relationships, logits, all_tokens=self.config.feature_reuse and not is_last)
        relation = F.concatenate(*logits, axis=1) if logits else None  # (B, L·H, N, N)
        return x, (x if self.config.feature_reuse and not is_last else None, relation)

    def exits(self, images: Any) -> list[Tensor]:
        """The logits (B, num_classes) of every exit. images: (B, in_channels, H, W), a float array or Tensor."""
        images = self.begin(images)
        outputs = []
        state: State = ()
        for k in range(len(self.stages)):
            logits, state = self.stage(k, images, state)
            outputs.append(logits)
        return outputs

    def features(self, images: Any) -> Tensor:
        """The input of the last exit's head: (B, dim)."""
        images = self.begin(images)
        state: State = ()
        for k in range(len(self.stages)):
            tokens, state = self._tokens(k, images, state)
        return self.stages[-1].pool(tokens)

    def reset_head(self, num_classes: int) -> None:
        self.config = replace(self.config, num_classes=num_classes)
        self.calibration = None
        for stage in self.stages:
            stage.reset_head(num_classes)

    def rename_foreign(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames the authors' names: less_less_token, less_token and normal_token stand for the (last) stages."""
        theirs = ("less_less_token.", "less_token.", "normal_token.")[-len(self.stages) :]
        table = {name: f"stages.{k}." for k, name in enumerate(theirs)}
        renamed = {}
        for name, array in state.items():
            stage, dot, rest = name.partition(".")
            rest = rest.replace("feature_resuse_mlp", "feature_reuse").replace("relation_reuse_conv", "relation_reuse")
            renamed[table[stage + dot] + rest if stage + dot in table else name] = array
        return renamed

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        resized = dict(state)
        for k, stage in enumerate(self.stages):
            prefix = f"stages.{k}."
            stage_state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            resized |= {prefix + name: array for name, array in stage.resize_positions(stage_state, method).items()}
        return resized

    def backbones(self) -> list[Backbone]:
        return self.stages

    def restart(self, seed: int) -> None:
        super().restart(seed)
        self.calibration = None  # the thresholds are invalid for other weights

    def metadata(self) -> dict[str, str]:
        return {"calibration": json.dumps(self.calibration.to_json())} if self.calibration else {}

    def read_metadata(self, metadata: Mapping[str, str]) -> Calibration | None:
        return Calibration.from_text(metadata["calibration"]) if "calibration" in metadata else None

    def restore(self, content: Calibration | None, own_file: bool) -> None:
        self.calibration = content if content and (own_file or fits(content, self)) else None
