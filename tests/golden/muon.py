"""Makes muon.safetensors: parameters after 20 steps of torch.optim.Muon and torch.optim.AdamW, in float64. Run it where PyTorch is.

torch.optim.Muon orthogonalises in bfloat16, by `grad.bfloat16()`. Here this method copies a tensor in its own type instead, and all else is
PyTorch's code. Each of q, k and v is a tensor of its own, and so are the weights of the convolution, as a matrix. The gradient of each step
is noise/ and a tenth of the parameter. The noise has singular values from 1 to 10⁻⁶, and that of fc2 begins with two steps of zeros.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

STEPS, PEAK, WEIGHT_DECAY = 20, 0.02, 0.1
MATRICES = {"qkv.weight": (36, 12), "proj.weight": (12, 12), "fc1.weight": (20, 12), "fc2.weight": (12, 20)}
MATRICES |= {"odd.weight": (5, 7), "odd_again.weight": (5, 7), "conv.weight": (6, 3, 2, 2)}
OTHERS = {"head.weight": (4, 12), "qkv.bias": (36,), "pos_embed": (1, 3, 5)}
DECAYED = {"head.weight"}  # of the others
SETTINGS = {"original": {"adjust_lr_fn": "original"}, "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw"}}
SETTINGS |= {"without_nesterov": {"adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.8}}


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    u, s, v = np.linalg.svd(rng.standard_normal((shape[0], int(np.prod(shape[1:])))), full_matrices=False)
    return ((u * s * np.logspace(0, -6, len(s))) @ v).reshape(shape)


def final(arrays: dict[str, np.ndarray], options: dict) -> dict[str, np.ndarray]:
    """The parameters after all steps."""
    whole = {name: torch.tensor(arrays[f"initial/{name}"]) for name in MATRICES | OTHERS}
    parts = {name: list(whole[name].reshape(len(whole[name]), -1).split(12 if name.startswith("qkv") else 99)) for name in MATRICES}
    decayed = {name: WEIGHT_DECAY * (name in DECAYED) for name in OTHERS}
    muon = torch.optim.Muon([p for group in parts.values() for p in group], weight_decay=WEIGHT_DECAY, **options)
    adamw = torch.optim.AdamW([{"params": [whole[name]], "weight_decay": decay} for name, decay in decayed.items()], betas=(0.9, 0.99))
    for step in range(STEPS):
        for name, tensor in whole.items():
            gradient = torch.tensor(arrays[f"noise/{name}"][step]) + 0.1 * tensor
            targets = parts.get(name, [tensor])
            for p, g in zip(targets, gradient.reshape(len(tensor), -1).split(len(targets[0])) if name in parts else [gradient]):
                p.grad = g.clone()
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = PEAK * (step + 1) / STEPS
            optimizer.step()
    return {name: tensor.numpy() for name, tensor in whole.items()}


def main() -> None:
    torch.Tensor.bfloat16 = torch.Tensor.clone
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in (MATRICES | OTHERS).items():
        draw = noise if name in MATRICES else np.random.Generator.standard_normal
        arrays[f"initial/{name}"] = rng.standard_normal(shape)
        arrays[f"noise/{name}"] = np.stack([draw(rng, shape) for _ in range(STEPS)])
    arrays["noise/fc2.weight"][:2] = 0
    arrays["initial/fc2.weight"][...] = 0
    for setting, options in SETTINGS.items():
        arrays |= {f"{setting}/{name}": array for name, array in final(arrays, options).items()}
    config = {"steps": STEPS, "peak": PEAK, "weight_decay": WEIGHT_DECAY, "betas": [0.9, 0.99], "settings": SETTINGS}
    source = f"torch.optim.Muon and AdamW of PyTorch {torch.__version__} in float64, by tests/golden/muon.py"
    save_file(arrays, Path(__file__).with_suffix(".safetensors"), {"config": json.dumps(config), "source": source})


if __name__ == "__main__":
    main()
