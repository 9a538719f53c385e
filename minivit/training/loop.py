"""The loop of `train`: epochs, tests, history and progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import cached_property
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..data import Batches, Dataset
from ..errors import UserError
from ..files import writing
from ..inference.classifier import Classifier
from ..inference.evaluate import Evaluation, evaluate
from ..interrupts import check_interrupt, deferred
from ..io.checkpoints import Checkpoint
from ..io.run_folder import CURVES, RunFolder
from ..models import Model
from ..optim import SCHEDULES
from ..plots import save_learning_curves
from ..progress import say
from ..reports.report import report_at_end
from .checkpoints import Pace, Progressed, hash_of_data
from .progress_bar import Progress
from .recipes import Recipe
from .trainer import PendingLoss, Trainer, TrainingError
from .watchers import Watcher


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
    pace: when a checkpoint is written. keep_checkpoint: whether the last one is kept when the run is complete. frozen: what the model does
    not train by itself. watchers: who is told of steps and tests. steps: the number of optimizer steps so far.
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
        pace: Pace | None = None,
        keep_checkpoint: bool = False,
        frozen: tuple[str, ...] = (),
    ) -> None:
        self.phases, self.classifier, self.dataset = [*phases], classifier, dataset
        _, self.trainer, self.batches, _ = phases[-1]
        self.recipe, self.folder, self.test_every = recipe, folder, test_every
        self.schedule = SCHEDULES[recipe.schedule]
        self.at_end = at_end
        self.final, self.part = final, "validation" if final else "test"
        self.best: dict[str, Any] | None = None  # the line of the weights that are kept, if there is a validation part
        self.kept: dict[str, np.ndarray] = {}  # these weights
        self.tested: dict[str, Evaluation] = {}  # the last test of each part, and that of these weights
        self.pace, self.keep_checkpoint, self.frozen = pace or Pace(0), keep_checkpoint, frozen
        self.watchers: list[Watcher] = []
        self.steps = self.told = 0  # steps so far, and those that the watchers know of
        self.losses: list[float] = []  # of the steps since the last test
        self.pending: PendingLoss | None = None  # of the last step, which a GPU may still compute
        self.seconds = 0.0  # since the last test, before `start`
        self.start = perf_counter()
        self.is_whole, self.is_resumed = True, False  # whether no step is half done; whether the folder is that of a stopped run

    def run(self, progress: bool) -> None:
        """Train all epochs; the model then has the weights that were tested. Raises Interrupted, TrainingError, UserError."""
        work: list[int] = []  # pixels of an image, by epoch
        for phase in self.phases:
            work += [phase.batches.images[0].size] * (phase.end - len(work))
        progress_bar = Progress(progress, work, len(self.batches), self.steps)
        try:
            if not self.is_resumed:
                self.folder.begin(self.classifier.save)
            self._train_all(progress_bar)
            self.is_whole = False
            self._finish()
            self._draw()
            self._report()
            self._remove_checkpoints()
        except (KeyboardInterrupt, UserError) as stop:
            if isinstance(stop, KeyboardInterrupt) and self.is_whole:
                self._save_interrupted()
            with suppress(UserError):  # whatever stops the run is the message
                self._draw()
            state = self.folder.state(self.recipe.epochs)
            if isinstance(stop, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {state}{self._way_on()}") from None
            raise (TrainingError if isinstance(stop, TrainingError) else UserError)(f"{stop}; {state}") from stop
        finally:
            progress_bar.close()
            self.at_end()
        if not self.folder.is_usable():
            raise UserError(f"{self.folder.path} was deleted or moved while the model was trained")

    def close(self) -> None:
        """Let other trainings use the folder, and the watchers end."""
        self.folder.close()
        for watcher in self.watchers:
            watcher.close()

    def _train_all(self, progress_bar: Progress) -> None:
        """The epochs that are left, each test with those before it."""
        if self.pace.at_once:
            self.checkpoint()
        epochs = self.recipe.epochs
        tested = self.folder.history[-1]["epoch"] if self.folder.history else 0
        tests = [*range(self.test_every, epochs, self.test_every), epochs]  # the epochs that end with a test
        for end in (epoch for epoch in tests if epoch > tested):
            self._train_and_test(end, progress_bar)
            line = self.folder.history[-1]
            progress_bar.epoch(line)
            for watcher in self.watchers:
                watcher.epoch(line)
            if self.pace.is_due(True) or (end == epochs and self.keep_checkpoint):
                self.checkpoint()

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
        if self.folder.keeps_files and self.folder.history and self.folder.is_usable() and not self.folder.replaces:
            path = self.folder.path / CURVES
            with writing(path):
                save_learning_curves(self.folder.history, path, f"{self.classifier.model.name} on {self.dataset.name}")
            self.folder.save_table()

    def _report(self) -> None:
        validation, known = self.dataset if self.final else None, self.tested
        report_at_end(self.folder, self.classifier, self.final or self.dataset, validation, known.get("test"), known.get("kept"))

    def checkpoint(self) -> None:
        """Write a checkpoint of the state after the last step. Training goes on without one that cannot be written: a line tells."""
        self._read_loss()
        if not self.folder.keeps_files:
            return
        try:
            with self.pace.counting():
                self.folder.save_checkpoint(self._checkpoint())
        except UserError as error:
            say(f"there is no new checkpoint: {error}")

    def _save_interrupted(self) -> None:
        trainer = self.phases[0].trainer
        if trainer.is_averaged:  # an interrupt came before its weights were swapped back
            trainer.swap_average()
        with suppress(TrainingError):  # of a loss that is not finite
            self.checkpoint()

    def _checkpoint(self) -> Checkpoint:
        trainer = self.phases[0].trainer
        about = Progressed(
            config=self.folder.config,
            history=tuple(self.folder.history),
            phases_left=len(self.phases),
            seconds=self.elapsed(),
            told=self.told,
            frozen=self.frozen,
            data_hash=self._data_hash,
            best=self.best,
        )
        kept = {f"kept.{name}": value for name, value in self.kept.items()}
        return Checkpoint(self.steps, {**trainer.state_dict(), **kept, "losses": np.array(self.losses)}, asdict(about))

    @cached_property
    def _data_hash(self) -> str:
        return hash_of_data(self.dataset)

    def restore(self, checkpoint: Checkpoint, about: Progressed) -> None:
        """Go on where a checkpoint was written. Raises UserError if it is of another model, or of other data."""
        if about.data_hash != self._data_hash:
            raise UserError(f"the data is not what {self.folder.path} was trained on: give the very images, or train another run")
        state = dict(checkpoint.arrays)
        losses, names = state.pop("losses"), [name for name in state if name.startswith("kept.")]
        self.kept = {name.removeprefix("kept."): state.pop(name) for name in names}
        del self.phases[: -about.phases_left]
        self.phases[0].trainer.load_state_dict(state)
        self.folder.history = [dict(line) for line in about.history]
        self.best = dict(about.best) if about.best else None
        self.losses, self.seconds = losses.tolist(), about.seconds
        self.steps, self.told = checkpoint.step, about.told

    def _remove_checkpoints(self) -> None:
        if self.folder.keeps_files and not self.keep_checkpoint:
            try:
                self.folder.checkpoints.remove()
            except UserError as error:
                say(f"the checkpoints of the complete run are left: {error}")

    def _way_on(self) -> str:
        """How a run that was interrupted goes on, for a message."""
        folder = self.folder
        if not folder.keeps_files or not (folder.checkpoints.exist() if folder.replaces else folder.is_usable()):
            return ""
        return f"; minivit train --resume {shlex.quote(str(folder.path))} goes on{' with the new one instead' if folder.replaces else ''}"

    def _train_and_test(self, end: int, progress_bar: Progress) -> None:
        """Train what is left of the epochs before number `end`, and test."""
        steps = len(self.batches)
        self.start = perf_counter()
        for trainer, images, labels in self._batches(end):
            self._step(trainer, images, labels)
            progress_bar.step()
            self._tell_steps()
            check_interrupt()
            if self.steps < end * steps and self.pace.is_due(self.steps % steps == 0):
                self.checkpoint()
        self._read_loss()
        self._tell_steps()
        training_seconds = self.elapsed()
        with self._tested_weights():
            line = {
                "epoch": end,
                "train_loss": fmean(self.losses),
                **self._test(self.dataset, self.part),
                "learning_rate": self.phases[0].trainer.lr,
                "seconds": round(self.elapsed(), 3),
                "images_per_second": round(len(self.losses) * self.batches.batch_size / training_seconds, 1),
            }
            best, kept = self.best, self.kept
            if self.final and (best is None or line["validation_accuracy"] >= best["validation_accuracy"]):
                best, kept = line, self.classifier.model.state_dict()
                self.tested["kept"] = self.tested[self.part]
            with deferred():
                self._save(kept, line)
                self.best, self.kept, self.losses, self.seconds, self.start = best, kept, [], 0.0, perf_counter()

    def elapsed(self) -> float:
        """Seconds of training and testing since the last test."""
        return self.seconds + perf_counter() - self.start

    def _step(self, trainer: Trainer, images: Any, labels: Any) -> None:
        """One optimizer step. An interrupt waits for its end, but not for the compilation of the kernels of a first step."""
        with deferred() if trainer.plans else nullcontext():
            self.is_whole = False
            trainer.lr = self._lr(self.steps)
            step = trainer.submit(images, labels)
            self._read_loss()  # of the step before: one step later, so that a GPU always has work
            self.pending, self.steps, self.is_whole = step, self.steps + 1, True

    def _lr(self, step: int) -> float:
        recipe, steps = self.recipe, len(self.batches)
        return self.schedule(step, recipe.epochs * steps, recipe.lr, round(recipe.warmup * steps), recipe.min_lr)

    def _read_loss(self) -> None:
        """Wait for the loss of the last step. Raises TrainingError if it is not finite."""
        if self.pending:
            self.losses.append(self.pending.value())
            self.pending = None

    def _tell_steps(self) -> None:
        """Tell the watchers of the steps whose losses are known."""
        known = self.steps - (self.pending is not None)
        while self.told < known:
            self.told += 1
            if self.watchers:
                step, loss, lr = self.told - 1, self.losses[self.told - known - 1], self._lr(self.told - 1)
                told = {"step": step + 1, "epoch": step // len(self.batches) + 1, "loss": loss, "learning_rate": lr}
                for watcher in self.watchers:
                    watcher.step(told)

    def _batches(self, end: int) -> Iterator[tuple[Trainer, Any, Any]]:
        """The batches that are left of the epochs before number `end`, and who is trained with each."""
        first, start = divmod(self.steps, len(self.batches))
        for epoch in range(first, end):
            with deferred():
                while epoch >= self.phases[0].end:
                    before = self.phases[0].model
                    self.phases[1].model.take_weights(before)
                    del self.phases[0]
            _, trainer, batches, _ = self.phases[0]
            yield from ((trainer, images, labels) for images, labels in batches.epoch(epoch, start))
            start = 0

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
        self.tested[part] = result
        return {
            f"{part}_loss": result.loss,
            f"{part}_accuracy": result.accuracies[-1],
            "balanced_accuracy": result.balanced_accuracy,
            **({"exit_accuracies": result.accuracies} if len(result.accuracies) > 1 else {}),
        }

    def _save(self, kept: Mapping[str, np.ndarray], line: Mapping[str, Any]) -> None:
        """Save the model, with the weights `kept` if there are any."""
        model = self.classifier.model
        current = model.state_dict() if kept else {}
        try:
            model.load_state_dict(kept, strict=False)
            self.folder.save(self.classifier.save, line)
        finally:
            model.load_state_dict(current, strict=False)

    def _check_finite(self, test_loss: float) -> None:
        """Raises TrainingError before a model that computes nothing any more replaces a good one."""
        broken = next((name for name, p in self.classifier.model.named_parameters() if not np.isfinite(p.numpy()).all()), "")
        if broken or not np.isfinite(test_loss):
            reason = f"{broken} is not finite" if broken else f"the test loss is {test_loss}"
            raise TrainingError(f"{reason} at the end of an epoch: lower lr, or set clip_norm")
