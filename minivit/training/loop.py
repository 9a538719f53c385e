"""The loop of `train`: epochs, their tests, history and progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from statistics import fmean
from time import perf_counter
from typing import Any

from tqdm import tqdm

from ..data import Batches, Dataset
from ..inference.classifier import Classifier
from ..inference.evaluate import evaluate
from ..io.run_folder import CURVES, MODEL, RunFolder, writing
from ..optim import SCHEDULES
from ..plots import save_learning_curves
from .recipes import Recipe
from .trainer import Trainer, TrainingError


class Interrupted(KeyboardInterrupt):
    """An interrupt that left a usable run folder; the message says where."""


class Loop:
    """Epochs of training, each followed by a test, a line of metrics and a saved model."""

    def __init__(
        self, trainer: Trainer, classifier: Classifier, dataset: Dataset, batches: Batches, recipe: Recipe, schedule: str, folder: RunFolder
    ) -> None:
        self.trainer, self.classifier, self.dataset, self.batches, self.recipe, self.folder = (
            trainer,
            classifier,
            dataset,
            batches,
            recipe,
            folder,
        )
        self.schedule = SCHEDULES[schedule]

    def run(self, progress: bool) -> None:
        """Train to the end; the model then has the weights that were tested. Raises Interrupted, TrainingError, UserError."""
        self.classifier.save(self.folder.path / MODEL)  # so that the folder is usable from here on, and a full disk shows at once
        shown = Progress(progress, self.recipe.epochs, len(self.batches))
        try:
            for epoch in range(self.recipe.epochs):
                self.folder.add_metrics(self._epoch(epoch, shown))
                shown.epoch(self.folder.history[-1])
        except (KeyboardInterrupt, TrainingError) as stop:
            self._draw()
            kept = f"{self.folder.path} holds the model after {len(self.folder.history)} of {self.recipe.epochs} epochs"
            if isinstance(stop, TrainingError):
                raise TrainingError(f"{stop}; {kept}") from None
            raise Interrupted(f"interrupted; {kept}") from None
        finally:
            shown.close()
        self._draw()
        self.trainer.swap_average()
        self.classifier.eval()

    def _draw(self) -> None:
        if self.folder.history:
            path = self.folder.path / CURVES
            with writing(path):
                save_learning_curves(self.folder.history, path, f"{self.classifier.model.name} on {self.dataset.name}")

    def _epoch(self, epoch: int, shown: Progress) -> dict[str, Any]:
        recipe, trainer, steps = self.recipe, self.trainer, len(self.batches)
        start, losses, last = perf_counter(), [], None
        for number, (images, labels) in enumerate(self.batches.epoch(epoch), epoch * steps):
            trainer.lr = self.schedule(number, recipe.epochs * steps, recipe.lr, round(recipe.warmup * steps), recipe.min_lr)
            step = trainer.submit(images, labels)
            if last:  # asked for one step later, so that a GPU always has one to compute
                losses.append(last.value())
            last = step
            shown.step()
        if last:
            losses.append(last.value())
        trained = perf_counter() - start
        dataset = self.dataset
        with trainer.averaged():
            test_loss, accuracies = evaluate(
                self.classifier.predictor, dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, dataset.num_classes
            )
            self.classifier.save(self.folder.path / MODEL)
        return {
            "epoch": epoch + 1,
            "train_loss": fmean(losses),
            "test_loss": test_loss,
            "test_accuracy": accuracies[-1],
            **({"exit_accuracies": accuracies} if len(accuracies) > 1 else {}),
            "learning_rate": trainer.lr,
            "seconds": round(perf_counter() - start, 3),
            "images_per_second": round(len(losses) * self.batches.batch_size / trained, 1),
        }


class Progress:
    """A bar on a terminal, a line an epoch elsewhere, on standard error."""

    def __init__(self, shown: bool, epochs: int, steps: int) -> None:
        self.lines, self.epochs = shown and not sys.stderr.isatty(), epochs
        self.bar = tqdm(total=epochs * steps, unit="step", dynamic_ncols=True, disable=not shown or self.lines)

    def step(self) -> None:
        self.bar.update()

    def epoch(self, line: Mapping[str, Any]) -> None:
        accuracy = f"{100 * line['test_accuracy']:.1f} %"
        if self.lines:
            say(
                f"epoch {line['epoch']}/{self.epochs}  train loss {line['train_loss']:.4f}  test loss {line['test_loss']:.4f}  "
                f"test accuracy {accuracy}  {line['images_per_second']:.0f} images/s"
            )
        self.bar.set_postfix_str(f"epoch {line['epoch']}/{self.epochs}, train loss {line['train_loss']:.3f}, test accuracy {accuracy}")

    def close(self) -> None:
        self.bar.close()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
