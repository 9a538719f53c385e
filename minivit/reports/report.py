"""`report`: a page about a run, report.html, which stands alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from ..data import Dataset
from ..data.image_file import MAX_PIXELS
from ..errors import reason
from ..files import atomic_file, user_path, writing
from ..inference.classifier import Classifier, load
from ..inference.evaluate import Evaluation, evaluate_on
from ..inference.run_data import data_of_run
from ..io.model_file import reading
from ..io.run_folder import CONFIG, REPORT, RunFolder, find_model
from ..progress import say
from ..schema import Limits, checked
from .page import page
from .sections import Subject, sections


def report(
    run: str | os.PathLike[str],
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    precision: str | None = None,
    device: str = "cpu",
    tta: bool = False,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> Path:
    """Test a run again, and write a page about it: one HTML file with all pictures in it, which loads nothing. Returns its path.

    run: the folder, its name in runs/, or a .safetensors file. data: a dataset whose test images replace those of the run (`load_data`).
    out: the file; None: report.html in the run folder. precision, device, tta: of predictions, as for `load`.
    Raises UserError for a missing or damaged run, and if it does not record its data and no data is given.
    """
    file = find_model(Path(run))
    classifier = load(file, precision, device, tta)
    dataset = data_of_run(run, classifier, data, skip_bad_images=skip_bad_images, max_pixels=max_pixels, progress=progress)
    folder = RunFolder(file.parent)
    config = folder.read_config() if (folder.path / CONFIG).is_file() else {}
    validation = _validation(folder, config, dataset) if data is None else None
    path = folder.path / REPORT if out is None else user_path(out)
    write_report(path, classifier, dataset, config, folder.read_metrics(), validation, own=data is None)
    return path


def report_at_end(
    folder: RunFolder,
    classifier: Classifier,
    dataset: Dataset,
    validation: Dataset | None,
    tested: Evaluation | None,
    validated: Evaluation | None,
) -> None:
    """Write the page about a run that is done, if it has a folder; whatever goes wrong is a line. The rest as for `write_report`."""
    path = folder.path / REPORT
    try:
        if folder.keeps_files and folder.is_usable():
            write_report(path, classifier, dataset, folder.config, folder.history, validation, tested, validated)
    except Exception as error:
        say(f"no {REPORT}: {reason(error)}; minivit report {folder.path} writes it")


def write_report(
    path: Path,
    classifier: Classifier,
    dataset: Dataset,
    config: dict[str, Any],
    history: list[dict[str, Any]],
    validation: Dataset | None = None,
    tested: Evaluation | None = None,
    validated: Evaluation | None = None,
    own: bool = True,
) -> None:
    """Write the page about a model.

    dataset: its test images are judged. validation: has the images that decided which weights are kept as test images. tested, validated:
    what `evaluate` says of these, if it is known. config, history: of the run folder. own: whether the dataset is that of the training.
    Raises UserError if the file cannot be written.
    """
    held_out = None
    if validation:
        held_out = (validated or evaluate_on(classifier, validation)).logits[-1], validation.test_labels
    subject = Subject(classifier, dataset, tested or evaluate_on(classifier, dataset), held_out, config, history, own)
    content = page(f"{classifier.model.name} on {dataset.name}", sections(subject))
    with writing(path), atomic_file(path) as file:
        file.write(content)


def _validation(folder: RunFolder, config: dict[str, Any], dataset: Dataset) -> Dataset | None:
    """The dataset with the validation part of the run as test images; None if it has none."""
    with reading(folder.path / CONFIG, "give the data, or train again"):
        arguments = config.get("arguments", {})
        fraction = checked("validation_fraction", arguments.get("validation_fraction", 0.0), Annotated[float, Limits(0, 1)])
        seed = checked("split_seed", arguments.get("split_seed", 0), Annotated[int, Limits(0, 2**64 - 1)])
    return dataset.validating(fraction, seed) if 0 < fraction < 1 else None
