"""Models and batches that take next to no time, for tests of steps."""

import numpy as np

from minivit import create_model

NANO = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10, "dim": 16, "depth": 2}
DROPS = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2}
MODELS = {
    "vit": {"heads": 2, "layer_scale": 0.1, **DROPS},
    "mixer": {"token_hidden": 8, "channel_hidden": 32, "drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.2},
}


def nano(name="vit", **options):
    return create_model(name, **NANO | ({"heads": 2} if name == "vit" else {}) | options)


def batches(count, size=8, soft=False, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        labels = rng.dirichlet(np.ones(10), size).astype(np.float32) if soft else rng.integers(0, 10, size)
        yield rng.standard_normal((size, 1, 8, 8)).astype(np.float32), labels
