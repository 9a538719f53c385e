"""Makes timm_names.json, the names and shapes of timm's models, once they give minivit's logits to 1e-5. Run it where timm and PyTorch are.

Each model is made by minivit, exported, made by timm from the call in the file's metadata, and loaded without a missing name.
"""

import functools  # noqa: F401 (the calls use it)
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minivit

SMALL = dict(image_size=32, patch_size=8, in_channels=2, num_classes=5, dim=24, depth=2)
CROSS = dict(image_size=48, branch_sizes=(48, 32), in_channels=3, num_classes=5, dims=(12, 24), depths=(1, 2), stages=2, heads=(3, 4))
MODELS = {
    "vit": ("vit", dict(heads=3, **SMALL)),
    "vit_mean": ("vit", dict(heads=3, pool="mean", class_token=False, qkv_bias=False, mlp_ratio=2.7, activation="gelu_tanh", **SMALL)),
    "vit_scaled": ("vit", dict(heads=2, pool="mean", layer_scale=0.1, eps=1e-3, **SMALL) | {"image_size": (32, 16), "patch_size": (8, 4)}),
    "deit": ("vit", dict(heads=3, distillation="head", **SMALL)),
    "mixer": ("mixer", dict(token_hidden=7, channel_hidden=50, **SMALL)),
    "crossvit": ("crossvit", dict(patch_sizes=(12, 16), mlp_ratios=(3.0, 4.0), **CROSS)),
    "crossvit_dagger": ("crossvit", dict(patch_sizes=(12, 16), stem="convolution", **CROSS)),
}


def created(family, options):
    model = minivit.create_model(family, **options)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data += np.float32(0.2) * rng.standard_normal(parameter.shape, np.float32)
    return model


def main():
    found = {}
    for name, (family, options) in MODELS.items():
        model = created(family, options)
        with TemporaryDirectory() as folder:
            (path,) = minivit.export(model, Path(folder, "a.safetensors"))
            with safe_open(path, "np") as file:
                call = json.loads(file.metadata()["timm"])
            theirs = eval(call).eval()
            theirs.load_state_dict(load_file(path))
        images = np.random.default_rng(1).standard_normal((3, *model.config.image_shape), np.float32)
        with torch.no_grad():
            logits = theirs(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(model(images).numpy(), logits, rtol=1e-5, atol=1e-5 * max(1, np.abs(logits).max()))
        found[name] = {"call": call, "state_dict": {key: list(value.shape) for key, value in theirs.state_dict().items()}}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in found.items())
    Path(__file__).with_suffix(".json").write_text(f'{{"source": "timm {timm.__version__}", "models": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
