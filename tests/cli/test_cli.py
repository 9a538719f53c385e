"""The command line: its output, its exit status, and one line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minivit
from minivit.cli import gradcheck as gradcheck_command
from minivit.cli import main
from minivit.cli.main import COMMANDS
from minivit.cli.train import NOT_OPTIONS
from minivit.inference.calibrate import halves
from minivit.kernels.cpu.run import most_threads, threads
from minivit.runtime.precision import fastest
from minivit.testing.checks import Report
from minivit.training import profiling

TRAIN = (
    "train",
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--limit",
    "96",
    "--model-option",
    "dim=16",
    "--model-option",
    "depth=1",
    "--model-option",
    "heads=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--quiet", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trained_cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "run"
    assert main(["train", "--model", "dvt_nano_8", *TRAIN[1:6], "240", *TRAIN[7:], "--quiet", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def cascade(trained_cascade, tmp_path):
    return Path(shutil.copytree(trained_cascade, tmp_path / "cascade"))


@pytest.fixture
def digit_files(tmp_path):
    images = minivit.load_data("digits").test_images[:3, :, :, 0]
    paths = [tmp_path / f"digit {i}.png" for i in range(3)]
    for image, path in zip(images, paths):
        Image.fromarray(image).save(path)
    return list(map(str, paths))


def told(capsys, *arguments, status=2):
    """The one line that a mistake is told in."""
    assert main([str(a) for a in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minivit: ") and err.endswith("\n") and err.count("\n") == 1
    return err[len("minivit: ") : -1]


def run(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(minivit.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8", env=environment, **options)


# -------------------------------------------------------------------------------------------------------------- commands
def test_train_ends_with_the_accuracy_and_the_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    output, progress = capsys.readouterr()
    accuracy = minivit.load(out) and json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert output == f"test accuracy {100 * accuracy:.1f} % · {out}\n"
    assert "epoch 2/2" in progress


def test_train_default_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--quiet"]) == 0
    assert capsys.readouterr().out.endswith(" % · runs/localvit_micro_patch2_8-digits-1\n")


def test_train_as_json(tmp_path, capsys):
    assert main([*TRAIN, "--json", "--lr", "0.01", "--seed", "3", "--overwrite", "--out", str(tmp_path / "run")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(tmp_path / "run") and len(result["history"]) == 2
    assert result["test_accuracy"] == result["history"][-1]["test_accuracy"]
    arguments = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    assert (arguments["lr"], arguments["seed"], arguments["model_options"]) == (0.01, 3, {"dim": 16, "depth": 1, "heads": 2})


def test_train_on_one_thread_with_a_profile(tmp_path, capsys, monkeypatch):
    for name, value in {"PRODUCT": 64, "STREAM": 1 << 16, "SECONDS": 0.0, "STEP_SECONDS": 0.0}.items():
        monkeypatch.setattr(profiling, name, value)
    results = []
    for options in (["--threads", "1", "--profile"], []):
        out = tmp_path / f"run{len(results)}"
        assert main([*TRAIN, *options, "--json", "--quiet", "--out", str(out)]) == 0
        output, told = capsys.readouterr()
        step = f"localvit_micro_patch2_8, training step, batch 32, {fastest()[0]}, 1 thread"
        assert (step in told and "orthogonalise" in told) == bool(options)
        results.append([{**line, "seconds": 0, "images_per_second": 0} for line in json.loads(output)["history"]])
    assert results[0] == results[1]
    assert threads() == most_threads()


def test_every_keyword_of_train_is_an_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in signature(minivit.train).parameters.keys() - NOT_OPTIONS:
        assert f"--{name.replace('_', '-')} " in text, name
    for flag in ("--model-option NAME=VALUE", "--json", "--quiet", "highest learning rate"):
        assert flag in text


def test_eval(folder, capsys):
    accuracy = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert main(["eval", str(folder), "--data", "digits"]) == 0
    assert capsys.readouterr().out.endswith(" · 359 test images of digits\n")
    assert main(["eval", str(folder), "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"] == "digits" and (result["images"], result["part"]) == (96, "test")  # as the run was limited
    assert result["test_accuracy"] == accuracy


def test_predict(folder, digit_files, capsys):
    prediction = minivit.load(folder).predict(digit_files)
    assert main(["predict", str(folder), *digit_files]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[path, name, f"{p:.4f}"] for path, name, p in zip(digit_files, prediction.names, prediction.confidence)]
    assert main(["predict", str(folder), digit_files[1], "--json", "--threads", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["path"] == digit_files[1] and row["label"] == prediction.names[1]
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert row["probability"] == max(row["probabilities"].values())


def test_predict_a_folder(folder, digit_files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    assert main(["predict", str(folder), str(tmp_path), digit_files[1]]) == 0
    out, err = capsys.readouterr()
    assert main(["predict", str(folder), *digit_files, digit_files[1]]) == 0
    assert out == capsys.readouterr().out
    assert err == f"{tmp_path}: left out, since the ending is none of an image that minivit reads: 1 .txt\n"
    assert main(["predict", str(folder), str(tmp_path), "--json"]) == 0
    listed = capsys.readouterr().out
    assert listed == json.dumps(json.loads(listed), indent=2) + "\n"
    assert [row["path"] for row in json.loads(listed)] == digit_files


def test_predict_past_bad_files(folder, digit_files, tmp_path, capsys):
    bad = tmp_path / "digit 1b.png"
    bad.write_bytes(b"no image")
    reason = f"cannot read image {bad}: not an image of a known format"
    for arguments in ([], ["--json"]):
        message = told(capsys, "predict", folder, tmp_path, *arguments)
        assert message == f"{reason}; leave such images out with --skip-bad-images"
    assert main(["predict", str(folder), str(tmp_path), "--skip-bad-images"]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == digit_files
    assert err == f"skipped: {reason}\nskipped 1 unreadable images\n"
    assert told(capsys, "predict", folder, bad, "--skip-bad-images") == f"none of the 1 images can be read: {reason}"


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("NUMBA_NUM_THREADS", "0", "Numba cannot start: Number of threads specified must be > 0."),
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set, and minivit's kernels run compiled only: unset it"),
    ],
)
def test_settings_of_numba_with_which_nothing_runs(name, value, message):
    command = [sys.executable, "-m", "minivit", "gradcheck", "softmax"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {name: value})
    assert done.returncode == 2 and done.stderr.startswith(f"minivit: {message}") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp1252", "utf-8"])
def test_output_of_any_encoding(folder, digit_files, tmp_path, encoding):
    path = tmp_path / "größe\t雪.png"
    path.write_bytes(Path(digit_files[0]).read_bytes())
    for arguments in (["eval", folder], ["predict", folder, path], ["predict", folder, path, "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "minivit", *arguments], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=True
        )
        output = done.stdout.decode(encoding)
        if arguments[-1] == "--json":
            assert json.loads(output)[0]["path"] == str(path)
        elif arguments[0] == "predict":
            assert output.count("\t") == 2 and output.startswith(str(tmp_path))


def test_calibrate_saves_thresholds(cascade, capsys):
    assert main(["calibrate", str(cascade), "--budgets", "0.9", "0.2", "--quiet"]) == 0
    printed = capsys.readouterr().out
    calibration = minivit.load(cascade).model.calibration
    assert calibration.budgets == (0.2, 0.9) and (calibration.unit, calibration.method, calibration.images) == ("share", "exact", 120)
    assert printed.startswith("of 240 test images of digits, 120 for calibration, 120 others for testing")
    assert f"saved with the model: {cascade / 'model.safetensors'}\nuse: minivit predict {cascade} IMAGE ... --budget " in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("  ", "budget"))][-3:]
    assert [row[0] for row in rows] == ["budget,", "20.000", "90.000"]
    for row, thresholds, accuracy in zip(rows[1:], calibration.thresholds, calibration.accuracies):
        told = ["all" if t == 0 else "none" if t == 2 else f"{t:.4f}" for t in thresholds]
        assert row[1:4] == [*told, f"{100 * accuracy:.2f}"]


def test_calibrate_as_json(cascade, capsys):
    options = ["--data", "digits", "--unit", "macs", "--method", "sweep", "--confidence", "margin", "--json", "--quiet"]
    assert main(["calibrate", str(cascade), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    classifier = minivit.load(cascade)
    assert json.loads(json.dumps(classifier.model.calibration.to_json())) == result["calibration"]
    assert (result["calibration"]["method"], result["calibration"]["confidence"], result["data"]) == ("sweep", "margin", "digits")
    assert result["calibration"]["images"] + result["unseen"]["images"] == 359
    dataset = minivit.load_data("digits")
    unseen = halves(dataset.test_labels)[1]
    for budget, outcome in zip(result["calibration"]["budgets"], result["unseen"]["outcomes"], strict=True):
        answer = classifier.predict(dataset.test_images[unseen], budget)
        assert outcome["mean_cost"] == pytest.approx(answer.macs.mean())
        assert outcome["accuracy"] == pytest.approx((answer.labels == dataset.test_labels[unseen]).mean())


def test_predict_with_a_budget(cascade, digit_files, capsys):
    assert main(["calibrate", str(cascade), "--quiet"]) == 0
    classifier = minivit.load(cascade)
    first, *_, last = classifier.cost().exits
    capsys.readouterr()
    assert main(["predict", str(cascade), *digit_files]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line.split("\t")[3:] == ["3", f"{last / 1e6:.3f}"]  # without a budget, the last exit
    assert main(["predict", str(cascade), *digit_files, "--budget", str(first / last)]) == 0
    for line, path in zip(capsys.readouterr().out.splitlines(), digit_files, strict=True):
        assert line.split("\t")[::3] == [path, "1"] and line.endswith(f"\t{first / 1e6:.3f}")
    assert main(["predict", str(cascade), digit_files[0], "--budget", "0.5", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    answer = classifier.predict(digit_files[:1], 0.5)
    assert (row["exit"], row["macs"], row["label"]) == (answer.exits[0] + 1, answer.macs[0], answer.names[0])
    assert row["probability"] == max(row["probabilities"].values())


def test_mistakes_with_budgets(cascade, folder, digit_files, tmp_path, capsys):
    before = (cascade / "model.safetensors").read_bytes()
    assert "the model has no thresholds yet: calibrate it" in told(capsys, "predict", cascade, digit_files[0], "--budget", "0.5")
    assert "the model has one exit" in told(capsys, "predict", folder, digit_files[0], "--budget", "0.5")
    assert "localvit_micro_patch2_8 has one exit" in told(capsys, "calibrate", folder, "--quiet")
    assert "the cheapest, all images at exit 1, costs " in told(capsys, "calibrate", cascade, "--budgets", "0.001", "--quiet")
    assert told(capsys, "calibrate", cascade, "--unit", "joule", "--quiet").startswith("unknown unit 'joule'")
    data = minivit.load_data("digits")
    for images, labels, message in (
        (data.train_images, data.train_labels, "are of the training set"),
        (data.test_images[:150], data.test_labels[:150], "thresholds need at least 100 images, got 7"),
    ):
        np.savez(
            tmp_path / "data.npz",
            train_images=images[:40],
            train_labels=labels[:40],
            test_images=images,
            test_labels=labels,
            class_names=data.class_names,
        )
        assert message in told(capsys, "calibrate", cascade, "--data", tmp_path / "data.npz", "--quiet")
    assert (cascade / "model.safetensors").read_bytes() == before
    assert main(["calibrate", str(cascade), "--budgets", "0.4", "--quiet"]) == 0
    capsys.readouterr()
    assert "no thresholds for a budget of 30 %" in told(capsys, "predict", cascade, digit_files[0], "--budget", "0.3")
    changed = minivit.load(cascade)
    changed.model.head.bias.data += 1
    changed.save(cascade / "model.safetensors")
    assert told(capsys, "predict", cascade, digit_files[0], "--budget", "0.5").startswith("thresholds of another model")
    for patches, message in (
        ("[[4,4,0]]", "a cascade has two exits or more"),
        ("[[4,4,0],[9,2,0]]", "do not fit into an image of 8 pixels"),
    ):
        assert message in told(capsys, "train", "--model", "dvt_nano_8", "--model-option", f"patches={patches}")


def test_gradcheck_prints_a_table(capsys):
    assert main(["gradcheck", "layernorm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "worst relative error" in lines[0] and "backend" in lines[0]
    assert all(line.startswith("ok     layernorm ") for line in lines[1:])
    assert [line.split()[3:5] for line in lines[1:]] == [
        ["float64", "differences"],
        ["float64", "reference"],
        ["float32", "reference"],
        ["bfloat16", "reference"],
    ]


def test_a_gradient_that_is_wrong_fails(capsys, monkeypatch):
    reports = [
        Report("gemm", "cpu", "float64", "differences", 2, 10, 1e-10),
        Report("bad", "cpu", "float64", "differences", 2, 10, 0.5, "bad: da[0]"),
    ]
    monkeypatch.setattr(gradcheck_command, "check", lambda *arguments, **options: iter(reports))
    assert main(["gradcheck"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].startswith("FAILED bad")
    assert captured.err == "minivit: bad: da[0]\n"
    assert main(["gradcheck", "--json"]) == 1
    assert [row["passed"] for row in json.loads(capsys.readouterr().out)] == [True, False]


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("minivit", "CPU", "instructions", "threads", "BLAS", "GPU", "cache", "numba"):
        assert word in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["minivit"] == minivit.__version__ and found["versions"]["numpy"] == np.__version__
    assert 1 <= found["threads"] <= found["most_threads"]


# -------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tran"], f"unknown command 'tran' (nearest: train): choose {', '.join(COMMANDS)}"),
        (["train", "--epoch", "3"], "unknown option --epoch (nearest: --epochs"),
        (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'; minivit train --help tells more"),
        (["train", "--model", "vit_tiny_patch4"], "unknown model 'vit_tiny_patch4' (nearest: vit_tiny_patch4_32"),
        (["train", "--data", "cifar"], "unknown dataset 'cifar' (nearest: cifar10"),
        (["train", "--data", "nowhere/photos"], "nowhere/photos does not exist"),
        (["train", "--model-option", "dim"], "--model-option takes NAME=VALUE, as depth=4, got 'dim'"),
        (["train", "--model-option", "dmi=3"], "localvit_micro_patch2_8 has no option 'dmi'"),
        (["train", "--model-option", "image_size=9"], "image_size is not for model_options"),
        (["train", "--fit", "squeeze"], "unknown fit 'squeeze': choose crop, pad, stretch"),
        (["train", "--class-weights", "3=two"], "--class-weights takes balanced or CLASS=NUMBER,..., as cat=2,dog=1, got '3=two'"),
        (["train", "--class-weights", "3=2,3=1"], "--class-weights names '3' twice, in '3=2,3=1'"),
        (["train", "--class-weights", "cat=2"], "class_weights: there is no class 'cat': see the data's class names"),
        (["train", "--class-weights", "balance"], "class_weights must be 'balanced' or a table, got 'balance'"),
        (["train", "--device", "tpu"], "device='tpu' is not available: choose 'cpu' or 'cuda'"),
        (["train", "--threads", "0"], f"threads must be a whole number of 1 ... {most_threads()}, the cores of this process, got 0"),
        (["predict", "no_such_run", "x.png", "--threads", "100000"], f"threads must be a whole number of 1 ... {most_threads()}"),
        (["eval", "no_such_run"], "there is no run no_such_run"),
        (["predict", "no_such_run"], "the following arguments are required: IMAGE; minivit predict --help tells more"),
        (["gradcheck", "layernrom"], "no op or model is called 'layernrom' (nearest: layernorm"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert told(capsys, *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text, third", [("3=5,0=1.5", 5), ("balanced", None)])
def test_class_weights(tmp_path, text, third):
    assert main([*TRAIN, "--quiet", "--epochs", "1", "--class-weights", text, "--out", str(tmp_path / "run")]) == 0
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]["class_weights"]
    assert len(kept) == 10 and (kept[3] == third if third else np.ptp(kept) > 0)


def test_a_run_that_exists(capsys, folder):
    assert told(capsys, *TRAIN, "--quiet", "--out", folder).endswith("or overwrite=True (--overwrite) to replace its run")


def test_bad_files(capsys, folder, tmp_path, digit_files):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png" in told(capsys, "predict", folder, digit_files[0], tmp_path / "broken.png")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in told(capsys, "predict", tmp_path / "cut.safetensors", digit_files[0])
    (tmp_path / "alone.safetensors").write_bytes(whole)
    assert told(capsys, "eval", tmp_path / "alone.safetensors", "--quiet").endswith("give --data")


def test_images_of_too_many_pixels(capsys, folder, tmp_path, digit_files):
    for name in ("0", "1"):
        for number in range(2):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(digit_files[0]).read_bytes())
    data = "--data", tmp_path / "images"
    for arguments in (
        ("predict", folder, digit_files[0]),
        ("eval", folder, *data, "--quiet"),
        ("plot", folder, "--image", digit_files[0]),
        ("train", *data, "--quiet", "--out", tmp_path / "run"),
    ):
        assert "and max_pixels is 10: make it smaller, or raise max_pixels (--max-pixels)" in told(capsys, *arguments, "--max-pixels", "10")


def test_data_of_other_classes(capsys, folder, tmp_path):
    np.savez(tmp_path / "two.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 2)
    message = told(capsys, "eval", folder, "--data", tmp_path / "two.npz", "--quiet")
    assert message.startswith("the classes of two (0, 1) are not the model's (0, 1, 2, and 7 more)")


def test_an_interrupt_is_one_line(capsys, monkeypatch, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("minivit.training.loop.Progress.step", interrupt)
    message = told(capsys, *TRAIN, "--quiet", "--out", tmp_path / "run", status=130)
    folder = tmp_path / "run"
    assert message == f"interrupted; {folder} holds the model after 0 of 2 epochs; minivit train --resume {folder} goes on"
    assert len(minivit.load(tmp_path / "run").class_names) == 10


# -------------------------------------------------------------------------------------------------------------- processes
def test_help_is_instant():
    code = (
        "import sys; from minivit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'numba', 'matplotlib', 'cupy', 'PIL', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run("-c", code)
    assert done.stderr.strip() == ""
    assert all(command in done.stdout for command in COMMANDS)


def test_as_a_process(tmp_path):
    done = run("-m", "minivit", "trian", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"minivit: unknown command 'trian' (nearest: train): choose {', '.join(COMMANDS)}"]
    assert run("-m", "minivit", "--version").stdout == f"minivit {minivit.__version__}\n"
