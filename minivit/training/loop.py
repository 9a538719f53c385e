"""The loop of `train`: epochs, tests, history and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..data import Batches, Dataset
from ..errors import UserError
from ..files import writing
from ..inference.classifier import Classifier
from ..inference.evaluate import evaluate
from ..interrupts import check_interrupt
from ..io.run_folder import CURVES, RunFolder
from ..models import Model
from ..optim import SCHEDULES
from ..plots import save_learning_curves
from ..progress import say, standard_error
from .recipes import Recipe
from .trainer import Trainer, TrainingError


class Interrupted(KeyboardInterrupt):
    """An interrupt of a run whose folder is usable; the message names the folder."""


class Phase(NamedTuple):
    """Epochs with images of one size."""

    model: Model
    trainer: Trainer
    batches: Batches
    end: int  # the number of the first epoch after it


class Loop:
    """Training epochs; after each, or each `test_every`, a test, a line of metrics and saving of the model.

    phases: the last one trains the model; those before it, if there are any, models for smaller images, whose weights it takes over.
    dataset: the images that are trained on, and those that are tested after epochs. final: None, and the weights after the last epoch are
    kept; or data, of which the test images are tested once, at the end, with the weights that did best on those of `dataset`.
    at_end: called after the training, however it ends.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        classifier: Classifier,
        dataset: Dataset,
        recipe: Recipe,
        folder: RunFolder,
        test_every: int = 1,
        final: Dataset | None = None,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.phases, self.classifier, self.dataset = [*phases], classifier, dataset
        _, self.trainer, self.batches, _ = phases[-1]
        self.recipe, self.folder, self.test_every = recipe, folder, test_every
        self.schedule = SCHEDULES[recipe.schedule]
        self.at_end = at_end
        self.final, self.part = final, "validation" if final else "test"
        self.best: dict[str, Any] | None = None  # the line of the weights that are kept, if there is a validation part
        self.kept: dict[str, np.ndarray] = {}  # these weights

    def run(self, progress: bool) -> None:
        """Train all epochs; the model then has the weights that were tested. Raises Interrupted, TrainingError, UserError."""
        work: list[int] = []  # pixels of an image, by epoch
        for phase in self.phases:
            work += [phase.batches.images[0].size] * (phase.end - len(work))
        progress_bar = Progress(progress, work, len(self.batches))
        try:
            self.folder.begin(self.classifier.save)
            epochs = self.recipe.epochs
            last_tests = [*range(self.test_every, epochs, self.test_every), epochs]  # the epochs that end with a test
            for first, end in pairwise([0, *last_tests]):
                self._train_and_test(range(first, end), progress_bar)
                progress_bar.epoch(self.folder.history[-1])
            self._finish()
            self._draw()
        except (KeyboardInterrupt, UserError) as stop:
            with suppress(UserError):  # whatever stops the run is the message
                self._draw()
            state = self.folder.state(self.recipe.epochs)
            if isinstance(stop, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {state}") from None
            raise (TrainingError if isinstance(stop, TrainingError) else UserError)(f"{stop}; {state}") from stop
        finally:
            progress_bar.close()
            self.at_end()
        if not self.folder.is_usable():
            raise UserError(f"{self.folder.path} was deleted or moved while the model was trained")

    def _finish(self) -> None:
        """Give the model the weights that are kept, and test them, if only others have been tested."""
        self.trainer.swap_average()
        if self.final:
            self.classifier.model.load_state_dict(self.kept)
            start = perf_counter()
            tested = self._test(self.final, "test")
            self.folder.save(self.classifier.save, {**(self.best or {}), **tested, "seconds": round(perf_counter() - start, 3)})
        self.classifier.eval()

    def _draw(self) -> None:
        if self.folder.keeps_files and self.folder.history and self.folder.is_usable():
            path = self.folder.path / CURVES
            with writing(path):
                save_learning_curves(self.folder.history, path, f"{self.classifier.model.name} on {self.dataset.name}")

    def _train_and_test(self, epochs: range, progress_bar: Progress) -> None:
        recipe, steps = self.recipe, len(self.batches)
        start, losses, pending = perf_counter(), [], None
        for step_number, (trainer, images, labels) in enumerate(self._batches(epochs), epochs[0] * steps):
            trainer.lr = self.schedule(step_number, recipe.epochs * steps, recipe.lr, round(recipe.warmup * steps), recipe.min_lr)
            step = trainer.submit(images, labels)
            if pending:  # read one step later, so that a GPU always has work
                losses.append(pending.value())
            pending = step
            progress_bar.step()
            check_interrupt()
        if pending:
            losses.append(pending.value())
        training_seconds = perf_counter() - start
        with self._tested_weights():
            line = {
                "epoch": epochs[-1] + 1,
                "train_loss": fmean(losses),
                **self._test(self.dataset, self.part),
                "learning_rate": trainer.lr,
                "seconds": round(perf_counter() - start, 3),
                "images_per_second": round(len(losses) * self.batches.batch_size / training_seconds, 1),
            }
            if self.final and (self.best is None or line["validation_accuracy"] >= self.best["validation_accuracy"]):
                self.best, self.kept = line, self.classifier.model.state_dict()
            self.folder.save(self._save, line)

    def _batches(self, epochs: range) -> Iterator[tuple[Trainer, Any, Any]]:
        """The batches of epochs, and who is trained with each."""
        for epoch in epochs:
            while epoch >= self.phases[0].end:
                before = self.phases.pop(0).model
                self.phases[0].model.take_weights(before)
            _, trainer, batches, _ = self.phases[0]
            yield from ((trainer, images, labels) for images, labels in batches.epoch(epoch))

    @contextmanager
    def _tested_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that are tested and saved."""
        model, trainer, *_ = self.phases[0]
        with trainer.averaged():
            if trainer is not self.trainer:
                self.classifier.model.take_weights(model)
            yield

    def _test(self, dataset: Dataset, part: str) -> dict[str, Any]:
        """What a line of metrics tells of the test images of a dataset, which are a part called `part`."""
        result = evaluate(
            self.classifier.predictor, dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, dataset.num_classes
        )
        self._check_finite(result.loss)
        return {
            f"{part}_loss": result.loss,
            f"{part}_accuracy": result.accuracies[-1],
            "balanced_accuracy": result.balanced_accuracy,
            **({"exit_accuracies": result.accuracies} if len(result.accuracies) > 1 else {}),
        }

    def _save(self, path: Path) -> None:
        """Save the model with the weights that are kept so far."""
        model = self.classifier.model
        current = model.state_dict() if self.kept else {}
        model.load_state_dict(self.kept, strict=False)
        self.classifier.save(path)
        model.load_state_dict(current, strict=False)

    def _check_finite(self, test_loss: float) -> None:
        """Raises TrainingError before a model that computes nothing any more replaces a good one."""
        broken = next((name for name, p in self.classifier.model.named_parameters() if not np.isfinite(p.numpy()).all()), "")
        if broken or not np.isfinite(test_loss):
            reason = f"{broken} is not finite" if broken else f"the test loss is {test_loss}"
            raise TrainingError(f"{reason} at the end of an epoch: lower lr, or set clip_norm")


MEASURED = 20  # steps from which the duration of all is known


def duration(seconds: float) -> str:
    """A time for a message, as in "50 s", "9 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """Progress on standard error: a bar on a terminal, otherwise one line per epoch.

    work: about how long each epoch takes, in any unit. steps: of an epoch.
    """

    def __init__(self, shown: bool, work: Sequence[float], steps: int) -> None:
        self.lines, self.work, self.epochs = shown and not standard_error.isatty(), work, len(work)
        self.start, self.done, self.steps = perf_counter(), 0, steps
        self.bar = tqdm(total=self.epochs * steps, unit="step", dynamic_ncols=True, disable=not shown or self.lines, file=standard_error)

    def step(self) -> None:
        """Report the end of a step; after some of many, a line tells how long all will take."""
        self.bar.update()
        self.done += 1
        if self.done == 1:  # which compiled and recorded the step
            self.start = perf_counter()
        elif self.lines and self.done == 1 + MEASURED and self.epochs * self.steps > 10 * MEASURED:
            first_epoch = (perf_counter() - self.start) / MEASURED * self.steps
            say(f"{self.epochs} epochs: about {duration(first_epoch * sum(self.work) / self.work[0])}, and the tests")

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Report the end of an epoch, with its line of metrics."""
        part = "validation" if "validation_loss" in line else "test"
        accuracy = f"{100 * line[f'{part}_accuracy']:.1f} %"
        if self.lines:
            left = (perf_counter() - self.start) * (sum(self.work) / sum(self.work[: line["epoch"]]) - 1)
            say(
                f"epoch {line['epoch']}/{self.epochs}  train loss {line['train_loss']:.4f}  {part} loss {line[f'{part}_loss']:.4f}  "
                f"{part} accuracy {accuracy}  {line['images_per_second']:.0f} images/s"
                f"{f'  {duration(left)} left' if line['epoch'] < self.epochs else ''}"
            )
        self.bar.set_postfix_str(f"epoch {line['epoch']}/{self.epochs}, train loss {line['train_loss']:.3f}, {part} accuracy {accuracy}")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
