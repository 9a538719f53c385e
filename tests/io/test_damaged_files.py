"""Damaged files of models and runs: each gives a result that works, or one clear line, in little time and memory."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy
from mutations import check_outcome, json_mutations, memory_limit, mutations, twice_its_memory, with_enough_memory

import minivit
from minivit import UserError
from minivit.cli import main
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.io.run_folder import CONFIG, METRICS, MODEL, RunFolder
from minivit.plots.curves import learning_curves, save_learning_curves

FLOOR = 32 << 20  # bytes: of what drawing a picture takes now and then
COUNTS = [50, pytest.param(1000, marks=pytest.mark.slow)]
NANO = dict(image_size=8, patch_size=4, in_channels=1, num_classes=10, dim=16, depth=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)


def vit(**options):
    return minivit.create_model("vit", **NANO | {"heads": 2} | options)


def cascade():
    options = {name: value for name, value in NANO.items() if name != "patch_size"}
    return minivit.create_model("dvt", **options, patches=[[4, 4, 0], [2, 2, 0]], heads=2)


def save(path, model, precision=None):
    Classifier(model, [*"0123456789"], Preprocessing(8, 1, (0.3,), (0.4,)), range_of_hashes(model)).save(path, precision)


def range_of_hashes(model):
    return [*range(20)] if model.num_exits > 1 else ()


@pytest.fixture(scope="module")
def calibrated():
    """A cascade with thresholds, whose predictions are compiled."""
    model, rng = cascade(), np.random.default_rng(0)
    minivit.calibrate(model, rng.standard_normal((100, 1, 8, 8)).astype(np.float32), np.arange(100) % 10, unit="share")
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {name: NANO[name] for name in ("dim", "depth")}
    minivit.train("vit_nano_patch2_8", limit=200, epochs=2, model_options=options, out=folder, progress=False)
    assert main(["eval", str(folder), "--quiet"]) == 0
    return folder


# ------------------------------------------------------------------------------------------------- where damage is put into files
def safetensors_file(header, data):
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def parts_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damaged_headers(content, count, seed):
    header, data = parts_of(content)
    header["__metadata__"] = {"format": "minivit"}
    return (safetensors_file(text, data) for text in json_mutations(header, count, seed))


def damaged_metadata(content, count, seed):
    """What the metadata says is damaged as JSON, one key after the other."""
    header, data = parts_of(content)
    known = {key: text for key, text in header["__metadata__"].items() if key not in ("format", "version")}
    for i, key in enumerate(known):
        for text in json_mutations(json.loads(known[key]), count // len(known), seed + i):
            yield safetensors_file(header | {"__metadata__": header["__metadata__"] | {key: text}}, data)


def outcomes(path, contents, read):
    """Reads each damaged file, in at most twice the memory of the one that lies there now; how many gave a result."""
    good, allowed = 0, max(FLOOR, twice_its_memory(read))  # what the process has free already is not measured
    for i, content in enumerate(contents):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with memory_limit(allowed), np.errstate(all="ignore"):
            good += check_outcome(with_enough_memory(read), f"{path.name} {i}")
    return good


def predicts(path, budget=None):
    classifier = minivit.load(path)
    assert classifier.predict(PIXELS).probabilities.shape == (2, 10)
    if budget:
        classifier.predict(PIXELS, budget)


def loads(path, model):
    minivit.load_weights(model, path)
    assert model(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("damage", [mutations, damaged_headers, damaged_metadata])
@pytest.mark.parametrize("kind", ["vit", "int8", "cascade"])
def test_model_files(kind, damage, count, calibrated, tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, calibrated if kind == "cascade" else vit(), "int8" if kind == "int8" else None)
    predicts(path, 1.0 if kind == "cascade" else None)
    good = outcomes(path, damage(path.read_bytes(), count, 0), lambda: predicts(path, 1.0 if kind == "cascade" else None))
    assert good < count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("damage", [mutations, damaged_headers])
def test_weights_of_others(damage, count, tmp_path):
    path, model = tmp_path / "w.safetensors", vit()
    safetensors.numpy.save_file({f"module.{name}": array for name, array in model.state_dict().items()}, path)
    loads(path, model)
    assert outcomes(path, damage(path.read_bytes(), count, 1), lambda: loads(path, model)) < count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_google(compressed, count, tmp_path):
    from test_weights import to_google

    path, model = tmp_path / "w.npz", vit()
    (np.savez_compressed if compressed else np.savez)(path, **to_google(model))
    loads(path, model)
    assert outcomes(path, mutations(path.read_bytes(), count, 2), lambda: loads(path, model)) < count


def command(capsys, *arguments):
    """Runs a command line; its line of an error is raised."""
    status = main([*map(str, arguments), "--quiet"])
    error = capsys.readouterr().err
    if status:
        assert status == 2 and error.startswith("minivit: ") and error.endswith("\n") and error.count("\n") == 1
        raise UserError(error[:-1].removeprefix("minivit: "))


def linked(run, folder):
    """A run folder with the files of another one."""
    folder.mkdir()
    for file in (CONFIG, METRICS, MODEL):
        os.link(run / file, folder / file)
    return folder


@pytest.mark.parametrize("count", COUNTS)
def test_configurations_of_runs(count, run, tmp_path, capsys):
    folder = linked(run, tmp_path / "run")
    content = (folder / CONFIG).read_bytes()
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_bytes(content)  # not into the other run's file
    arguments = {
        name: json.loads(content)["arguments"][name] for name in ("data", "test_fraction", "split_seed", "limit", "skip_bad_images")
    }
    damaged = [*mutations(content, count, 3), *json_mutations({"arguments": arguments}, count, 3)]
    assert 0 < outcomes(folder / CONFIG, damaged, lambda: command(capsys, "eval", folder)) < len(damaged)


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_of_runs(count, run, tmp_path):
    folder = linked(run, tmp_path / "run")
    content = (folder / METRICS).read_bytes()
    (folder / METRICS).unlink()
    (folder / METRICS).write_bytes(content)
    lines = [json.loads(line) for line in content.splitlines()]
    damaged = [*mutations(content, count, 4), *(text + "\n" + json.dumps(lines[1]) for text in json_mutations(lines[0], count, 4))]

    def read():
        if history := RunFolder(folder).read_metrics():
            save_learning_curves(history, tmp_path / "curves.png") if count > 50 else learning_curves(history)

    assert 0 < outcomes(folder / METRICS, damaged, read) < len(damaged)
