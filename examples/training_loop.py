"""A training loop of one's own: batches, a schedule, optimizer steps and a test.

python examples/training_loop.py [EPOCHS]
"""

import sys
from statistics import fmean

import minivit
from minivit.data import Batches
from minivit.inference.evaluate import evaluate
from minivit.optim.schedules import cosine

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20

data = minivit.load_data("digits")
model = minivit.create_model("mixer_nano_patch2_8")
trainer = minivit.Trainer(model, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1)
batches = Batches(
    data.train_images,
    data.train_labels,
    batch_size=32,
    num_classes=data.num_classes,
    mean=data.mean,
    std=data.std,
    augmentation=data.augmentation,
)
steps = epochs * len(batches)
for epoch in range(epochs):
    losses = []
    for images, labels in batches.epoch(epoch):  # (B, C, H, W) float32, (B,)
        trainer.lr = cosine(trainer.steps, steps, lr=3e-3, warmup=steps // 10, min_lr=0.0)
        losses.append(trainer.step(images, labels))
    predictor = minivit.Predictor(model)
    result = evaluate(predictor, data.test_images, data.test_labels, data.mean, data.std, data.num_classes)
    print(f"epoch {epoch + 1}: loss {fmean(losses):.3f}, test accuracy {100 * result.accuracies[-1]:.1f} %")
