"""Makes hugging_face/: a ViT and two DeiT as transformers saves them, one in several files, with images and their logits. Run it where
transformers is.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

HERE = Path(__file__).parent / "hugging_face"
SMALL = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=12, patch_size=4)
NAMES = {0: "ant", 1: "bee", 2: "cat"}
MODELS = {
    "vit": (ViTConfig, ViTForImageClassification, dict(qkv_bias=False, hidden_act="gelu_pytorch_tanh")),
    "deit": (DeiTConfig, DeiTForImageClassification, {}),
    "deit_with_teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher, dict(hidden_act="gelu")),
}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(0)
    for name, (config, kind, options) in MODELS.items():
        model = kind(config(**SMALL, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}, **options)).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        folder = HERE / name
        model.save_pretrained(folder, **({"max_shard_size": "8KB"} if name == "deit" else {}))
        crop = {"do_center_crop": name != "vit", "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        (folder / "preprocessor_config.json").write_text(json.dumps(crop | {"do_normalize": True, "do_rescale": True, "size": 12}) + "\n")
        images = torch.randn(3, 3, 12, 12)
        with torch.no_grad():
            logits = model(pixel_values=images).logits
        np.savez_compressed(folder / "answers.npz", images=images.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
