"""`minivit info MODEL`: what a model is and costs."""

import json

import pytest

import minivit
from minivit.cli import main


def rows_of(text):
    return dict(line.split(maxsplit=1) for line in text.replace("up to exit ", "exit").splitlines() if line)


def test_a_preset(capsys):
    assert main(["info", "vit_tiny_patch4_32"]) == 0
    rows = rows_of(capsys.readouterr().out)
    cost = minivit.create_model("vit_tiny_patch4_32", init="zeros").cost()
    assert rows == {
        "model": "vit_tiny_patch4_32 (vit)",
        "input": "(3, 32, 32), float32",
        "classes": "10",
        "parameters": "4,028,170",
        "multiply-adds": f"{cost.total:,} an image",
        "activations": f"{cost.activations:,} numbers an image",
    }


def test_the_table_by_layer(capsys):
    assert main(["info", "mixer_nano_patch2_8", "--layers"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"\n\n{minivit.create_model('mixer_nano_patch2_8').cost()}\n")


def test_exits(capsys):
    assert main(["info", "dvt_nano_8"]) == 0
    rows = rows_of(capsys.readouterr().out)
    exits = minivit.create_model("dvt_nano_8").cost().exits
    assert [rows[f"exit{k}"] for k in (1, 2, 3)] == [f"{macs:,} ({100 * macs / exits[-1]:.1f} %)" for macs in exits]
    assert rows["exit3"].endswith("(100.0 %)")


def test_json(capsys):
    assert main(["info", "dvt_nano_8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cost = minivit.create_model("dvt_nano_8").cost()
    assert found["macs"] == cost.total == sum(found["layers"].values()) and found["exits"] == list(cost.exits)
    assert list(found["layers"].items()) == list(cost.layers.items())
    assert (found["model"], found["family"], found["input"], found["classes"]) == ("dvt_nano_8", "dvt", [1, 8, 8], 10)


@pytest.mark.parametrize("name", minivit.list_models())
def test_parameters_of_every_preset(name, capsys):
    assert main(["info", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = minivit.create_model(name, init="zeros").parameters()
    assert found["parameters"] == sum(p.size for p in parameters)
    assert found["trainable"] == sum(p.size for p in parameters if p.requires_grad)


def test_a_run(tmp_path, capsys, monkeypatch):
    run = minivit.train(
        model_options={"dim": 16, "depth": 1, "heads": 2},
        epochs=1,
        limit=96,
        batch_size=32,
        out=tmp_path / "runs" / "tried",
        progress=False,
    )
    monkeypatch.chdir(tmp_path)
    for name in (str(run.folder), "tried", str(run.folder / "model.safetensors")):
        assert main(["info", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["macs"] == run.model.cost().total and found["family"] == run.model.unwrapped().family


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vit_tiny_patch4"], "vit_tiny_patch4 is no model (nearest: vit_tiny_patch4_32"),
        (["nothing/like/that"], "nothing/like/that is no model and no run: list_models() names the models"),
        (["--layers"], "--layers tells of a model: minivit info MODEL --layers"),
        (["empty"], "empty is no run folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["info", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minivit: {message}") and err.count("\n") == 1
