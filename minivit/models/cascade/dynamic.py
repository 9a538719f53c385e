"""Dynamic Vision Transformer: a cascade of models over ever finer grids of patches, with an exit after each (Wang et al., 2105.15075).

Every stage is a whole backbone with weights of its own that sees the same image in more patches than the one before. From the stage before,
an image's next stage can reuse

    features       the tokens after its last block, before the final norm: each block of the next stage embeds them (LN, D → 128, GELU,
                   → 48), upsamples them to its own grid and appends them to the input of its MLP (section 3.3)
    relationships  the scaled attention logits of all its blocks, with what they reused themselves: an MLP over blocks and heads, then the
                   upsampling of both token axes, then added to the logits of each block of the next stage (section 3.3)

In training all exits count alike and nothing is detached. In use an image stops at the first exit that is sure (`minivit.calibrate`).
Parameters: `stages.k.` and the backbone's names, `stages.k.blocks.i.feature_reuse.{0,1.fc1,1.fc2}`, `stages.k.relation_reuse.{0,2}`.

Letters: B batch, N tokens, C channels, L blocks, H heads, u and g the grids of a stage and the next one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np

from ... import functional as F
from ...errors import UserError, nearest
from ...nn.initialisers import Initialiser, truncated_normal, uniform
from ...nn.layers import Dropout, LayerNorm, Linear, Mlp, Projection, Random, Sequential
from ...tensor import Tensor
from ..base import Backbone, Model
from ..config import BackboneConfig, Config
from ..registry import FAMILIES, register
from .calibration import Calibration, fits

FEATURE_HIDDEN, FEATURE_CHANNELS = 128, 48  # of each block's embedding of the features (section 3.3)
SPREAD = 0x9E3779B97F4A7C15  # between the seeds of stages; the first has the model's own
State = tuple[Tensor | None, ...]  # of one stage for the next: its tokens (B, N, C) and relationships (B, L·H, N, N); () before the first


@dataclass(frozen=True)
class DVTConfig(Config):
    """The defaults are DVT-DeiT-S's."""

    backbone: str = "vit"  # the family of every stage
    patches: Sequence[Sequence[int]] = ((32, 32, 0), (23, 23, 3), (16, 16, 0))  # (size, stride, padding) in pixels, an exit each
    feature_reuse: bool = True  # whether a stage sees the features of the one before
    relationship_reuse: bool = True  # whether its attention starts from the logits of the one before
    dim: int | Sequence[int] = 384  # channels of a token: of all stages, or of each
    depth: int | Sequence[int] = 12  # blocks, likewise
    heads: int | Sequence[int] = 6  # attention heads, likewise; unused by a backbone without attention
    mlp_ratio: float = 4.0  # hidden channels of a block's channel MLP, in units of dim
    drop_path_rate: float = 0.0  # stochastic depth of every stage
    init: Literal["timm", "jax", "zeros"] = "timm"  # how the backbones' weights begin
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the backbone's configuration

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "patches", _checked_patches(self.patches))
        for name in ("dim", "depth", "heads"):
            object.__setattr__(self, name, _checked_stages(name, getattr(self, name), len(self.patches)))
        family = FAMILIES.get(self.backbone) if isinstance(self.backbone, str) else None
        backbones = [name for name, known in FAMILIES.items() if issubclass(known, Backbone)]
        if family is None or not issubclass(family, Backbone):
            raise UserError(
                f"backbone must be {' or '.join(map(repr, backbones))}, not {self.backbone!r}{nearest(str(self.backbone), backbones)}"
            )
        if self.relationship_reuse and not family.attends:
            raise UserError(f"relationship_reuse needs attention, which {self.backbone} has not: set relationship_reuse=False")
        if not isinstance(self.options, Mapping):
            raise UserError(f"options must map names of the backbone's options to values, not {self.options!r}")
        free = [f.name for f in fields(family.Config) if f.name not in self.decided(0)]
        for name in self.options:
            if name not in free:
                raise UserError(
                    f"options: {self.backbone} has no option {name!r} to set here{nearest(name, free)}; it has {', '.join(free)}"
                )
        object.__setattr__(self, "options", dict(self.options))

    def decided(self, k: int) -> dict[str, Any]:
        """The fields of the k-th stage's configuration that this one decides."""
        known = {f.name for f in fields(FAMILIES[self.backbone].Config)}
        size, stride, padding = self.patches[k]
        dim = self._of(self.dim, k)
        given = {
            name: getattr(self, name)
            for name in ("image_size", "in_channels", "num_classes", "dtype", "mlp_ratio", "drop_path_rate", "init")
        }
        given |= {
            "patch_size": size,
            "patch_stride": stride,
            "patch_padding": padding,
            "dim": dim,
            "depth": self._of(self.depth, k),
            "heads": self._of(self.heads, k),
            "extra_channels": FEATURE_CHANNELS if k and self.feature_reuse else 0,
        }
        return {name: value for name, value in given.items() if name in known}

    def stage(self, k: int) -> BackboneConfig:
        """The configuration of the k-th stage's backbone. Raises UserError where the image does not take its patches."""
        decided = self.decided(k)
        size, padding = decided["patch_size"], decided["patch_padding"]
        if size > self.image_size + 2 * padding:
            raise UserError(
                f"patches: those of exit {k + 1}, of {size} pixels with padding {padding}, do not fit into an image of "
                f"{self.image_size} pixels"
            )
        family = FAMILIES[self.backbone].Config
        assert issubclass(family, BackboneConfig)
        defaults = family.stage_defaults({"dim": decided["dim"], "mlp_ratio": self.mlp_ratio})
        return family(**decided, **defaults | dict(self.options))

    @staticmethod
    def _of(value: int | Sequence[int], k: int) -> int:
        return value[k] if isinstance(value, Sequence) else value


def _checked_patches(patches: Any) -> tuple[tuple[int, ...], ...]:
    rows = [tuple(row) if isinstance(row, (list, tuple)) else row for row in patches] if isinstance(patches, (list, tuple)) else patches
    fits = isinstance(rows, list) and all(
        isinstance(row, tuple)
        and len(row) == 3
        and all(isinstance(n, Integral) for n in row)
        and row[0] >= 1
        and row[1] >= 1
        and row[2] >= 0
        for row in rows
    )
    if not fits:
        raise UserError(f"patches must hold (size, stride, padding) in pixels for each exit, as ((8, 8, 0), (4, 4, 0)), not {patches!r}")
    if len(rows) < 2:
        raise UserError(f"a cascade has two exits or more, but patches holds {len(rows)}: {patches!r}; for one, create the backbone itself")
    return tuple(tuple(map(int, row)) for row in rows)


def _checked_stages(name: str, value: Any, stages: int) -> int | tuple[int, ...]:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in numbers):
        raise UserError(f"{name} must be a whole number of at least 1, or one for each exit, not {value!r}")
    if isinstance(value, (list, tuple)) and len(value) != stages:
        raise UserError(f"{name} holds {len(value)} numbers for {stages} exits: {value!r}")
    return tuple(map(int, numbers)) if isinstance(value, (list, tuple)) else int(value)


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
    "dvt_tiny_32": dict(image_size=32, num_classes=10, patches=((12, 8, 2), (8, 5, 1), (6, 4, 1)), dim=192, depth=9, heads=3),
}


class FeatureReuse(Sequential):
    """A block's own embedding of the tokens of the stage before: (B, prefix + u², C) -> (B, prefix + g², 48), zeros for the class token."""

    def __init__(self, dim: int, grids: tuple[int, int], prefix: int, eps: float, random: Random, dtype: str) -> None:
        super().__init__(LayerNorm(dim, eps, dtype), Mlp(dim, FEATURE_HIDDEN, random, dtype=dtype, out=FEATURE_CHANNELS))
        self.grids, self.class_token = grids, "zero" if prefix else "none"

    def forward(self, features: Tensor) -> Tensor:
        return F.resample(super().forward(features), *self.grids, "upsample", self.class_token)


class RelationReuse(Sequential):
    """The logits that each block of a stage adds to its own, made from all those of the stage before.

    An MLP over the L·H maps of the stage before, as convolutions of 1×1, then the upsampling of both token axes, S R Sᵀ, the class token's
    row and column with them: (B, L·H, N, N) -> for each of L' blocks (B, H', M, M).
    """

    def __init__(self, maps: int, depth: int, heads: int, grids: tuple[int, int], prefix: int, dtype: str) -> None:
        super().__init__(Projection(maps, 3 * maps, 1, dtype), None, Projection(3 * maps, depth * heads, 1, dtype))  # 1: the GELU
        self.depth, self.grids, self.class_token = depth, grids, "keep" if prefix else "none"

    def forward(self, relation: Tensor) -> tuple[Tensor, ...]:
        first, _, second = self.layers
        B, maps, N, _ = relation.shape
        mixed = F.token_mixing_mlp(
            relation.reshape(B, maps, N * N), first.weight.reshape(-1, maps), first.bias, second.weight.reshape(-1, 3 * maps), second.bias
        )  # (B, L'·H', N²)
        rows = F.resample(mixed.reshape(-1, N, N), *self.grids, "upsample", self.class_token)  # (B·L'·H', M, N)
        M = rows.shape[1]
        both = F.resample(rows.reshape(-1, N, 1), *self.grids, "upsample", self.class_token)  # (B·L'·H'·M, M, 1)
        return F.split(both.reshape(B, -1, M, M), self.depth, axis=1)


@register
class DVT(Model):
    """The whole cascade; `model(images)` is the last exit's answer.

    calibration: thresholds for budgets, from `minivit.calibrate`; None before. Raises UserError for a configuration that no stage can have.
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

    def _join(self, before: Backbone, stage: Backbone) -> None:
        """Give a stage the modules that reuse what the one before it computed."""
        grids, dtype = (before.grid, stage.grid), self.config.dtype
        earlier, own = vars(before.config), vars(stage.config)
        if self.config.feature_reuse:
            for block in stage.blocks:
                block.feature_reuse = FeatureReuse(earlier["dim"], grids, stage.prefix, earlier["eps"], self.random, dtype)
        if self.config.relationship_reuse:
            maps = earlier["depth"] * earlier["heads"]
            stage.relation_reuse = RelationReuse(maps, own["depth"], own["heads"], grids, stage.prefix, dtype)

    def initialisers(self) -> dict[str, Initialiser]:
        if self.config.init == "zeros":  # the stages have begun on their own
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
        """One stage alone: logits (B, num_classes), and what the next stage reuses.

        images: (B, in_channels, S, S) in the model's dtype. state: what stage k - 1 gave for these images; () for the first.
        """
        tokens, handed = self._tokens(k, images, state)
        stage = self.stages[k]
        return stage.head(stage.head_drop(stage.pool(tokens)), precise=True), handed

    def _tokens(self, k: int, images: Tensor, state: State) -> tuple[Tensor, State]:
        """The tokens (B, N, C) after the last block of one stage, and what the next stage reuses."""
        last = k == len(self.stages) - 1
        logits: list[Tensor] | None = [] if self.config.relationship_reuse and not last else None
        features, relationships = state or (None, None)
        x = self.stages[k].encode(images, features, relationships, logits)
        relation = F.concatenate(*logits, axis=1) if logits else None  # (B, L·H, N, N)
        return x, (x if self.config.feature_reuse and not last else None, relation)

    def exits(self, images: Any) -> list[Tensor]:
        """The logits (B, num_classes) of every exit: images (B, in_channels, S, S), a float array or Tensor."""
        images = self.begin(images)
        answers = []
        state: State = ()
        for k in range(len(self.stages)):
            answer, state = self.stage(k, images, state)
            answers.append(answer)
        return answers

    def features(self, images: Any) -> Tensor:
        """What the last exit's head sees: (B, dim)."""
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
        """Takes the names of the authors' released code too: less_less_token, less_token, normal_token for the (last) stages."""
        theirs = ("less_less_token.", "less_token.", "normal_token.")[-len(self.stages) :]
        table = {name: f"stages.{k}." for k, name in enumerate(theirs)}
        renamed = {}
        for name, array in state.items():
            stage, dot, rest = name.partition(".")
            rest = rest.replace("feature_resuse_mlp", "feature_reuse").replace("relation_reuse_conv", "relation_reuse")
            renamed[table[stage + dot] + rest if stage + dot in table else name] = array
        return renamed

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        fitted = dict(state)
        for k, stage in enumerate(self.stages):
            prefix = f"stages.{k}."
            own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            fitted |= {prefix + name: array for name, array in stage.resize_positions(own, method).items()}
        return fitted

    def backbones(self) -> list[Backbone]:
        return self.stages

    def restart(self, seed: int) -> None:
        super().restart(seed)
        self.calibration = None  # other weights will want other thresholds

    def metadata(self) -> dict[str, str]:
        return {"calibration": json.dumps(self.calibration.to_json())} if self.calibration else {}

    def read_metadata(self, metadata: Mapping[str, str]) -> Calibration | None:
        return Calibration.from_text(metadata["calibration"]) if "calibration" in metadata else None

    def restore(self, content: Calibration | None, own_file: bool) -> None:
        self.calibration = content if content and (own_file or fits(content, self)) else None
