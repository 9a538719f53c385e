"""ONNX files: in ONNX Runtime they give minivit's own answers."""

# ruff: noqa: E402 (what follows needs the packages)

import json
from copy import deepcopy

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from golden_files import GOLDEN
from models.test_steps import VARIANTS, create
from safetensors import safe_open

import minivit
from minivit import UserError
from minivit.cli.main import main
from minivit.inference import export as module
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.models.cascade.calibration import confidence
from minivit.models.registry import FAMILIES

OTHERS = {  # options that no entry of VARIANTS has
    "vit_distillation_token": ("vit", dict(heads=2, distillation="token")),
    "vit_convolutions": ("vit", dict(heads=2, patch_size=4, stem="convolution", stem_width=4, layer_scale=0.5)),
    "vit_overlapping": ("vit", dict(heads=2, patch_size=4, patch_stride=2, patch_padding=1)),
    "vit_rectangular": ("vit", dict(heads=2, image_size=(8, 12), patch_size=(4, 2))),
    "mixer_convolutions": ("mixer", dict(patch_size=4, stem="convolution", stem_width=4)),
    "deepvit_convolutions": ("deepvit", dict(heads=2, patch_size=4, stem="convolution", stem_width=4)),
    "crossvit_convolutions": ("crossvit", dict(branch_sizes=(8, 6), patch_sizes=(2, 3), dims=(8, 12), heads=(2, 2), stem="convolution")),
    "localvit_mean": ("localvit", dict(heads=2, se_reduction=8, pool="mean", stem="convolution", stem_width=4)),
    "localvit_relu6": ("localvit", dict(heads=2, activation="relu6", channel_attention="eca_hard")),
}


def made(variant, monkeypatch):
    if variant in OTHERS:
        monkeypatch.setitem(VARIANTS, variant, OTHERS[variant])
    return create(variant).eval()


def images_for(model, size=4, seed=0):
    return np.random.default_rng(seed).standard_normal((size, *model.config.image_shape)).astype(np.float32)


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answers(paths, images):
    """The logits of each exit, each file fed with what the one before gives."""
    feeds, found = {"images": images}, []
    for path in paths:
        each = session(path)
        results = dict(zip([output.name for output in each.get_outputs()], each.run(None, feeds)))
        found.append(results.pop("logits"))
        feeds = {"images": images} | results
    return found


def assert_close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def classifier(model=None, **options):
    model = model or minivit.create_model("vit", image_size=8, patch_size=4, in_channels=3, num_classes=3, dim=32, depth=1, heads=2, seed=1)
    preprocessing = Preprocessing(model.config.image_size, model.config.in_channels, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    return Classifier(model, ["ant", "bee", "cat"], preprocessing, **options)


# ---------------------------------------------------------------------------------------------------------------------- families
def test_every_family_is_exported_below():
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS])
def test_the_logits_are_those_of_the_model(variant, tmp_path, monkeypatch):
    model = made(variant, monkeypatch)
    paths = minivit.export(model, tmp_path / "model.onnx")
    assert len(paths) == model.num_exits
    images = images_for(model)
    with minivit.no_grad():
        expected = model.exits(images)
    for given, logits in zip(answers(map(str, paths), images), expected, strict=True):
        assert_close(given, logits.numpy())


def test_the_file_is_as_onnx_wants_it_and_small(tmp_path):
    model = create("localvit")
    (path,) = minivit.export(model, tmp_path / "a.onnx")
    found = onnx.load(path)
    onnx.checker.check_model(found, full_check=True)
    assert [(each.domain, each.version) for each in found.opset_import] == [("", 17)]
    # Batch normalisations are folded into the weights, and nothing is stored twice.
    assert "Sqrt" not in {node.op_type for node in found.graph.node}
    assert path.stat().st_size < 4 * sum(p.size for p in model.parameters()) + 40_000
    shapes = [
        [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (found.graph.input[0], found.graph.output[0])
    ]
    assert shapes == [["batch", 2, 8, 8], ["batch", 3]]


def test_the_model_stays_as_it_is(tmp_path):
    model = create("localvit").train()
    before = model.state_dict()
    minivit.export(model, tmp_path / "a.onnx")
    assert model.training and all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_float64_model(tmp_path):
    model = create("vit", "float64")
    paths = minivit.export(model, tmp_path / "a.onnx")
    images = images_for(model)
    (given,) = answers(map(str, paths), images)
    assert given.dtype == np.float32
    assert_close(given, model(images.astype(np.float64)).numpy())


# ------------------------------------------------------------------------------------------------------------------- classifiers
def test_preprocessing_is_in_the_graph(tmp_path):
    model = classifier()
    paths = minivit.export(model, tmp_path / "a.onnx", preprocessing=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    (given,) = answers(map(str, paths), pixels)
    (inputs,) = model.preprocessing.batches(pixels)
    assert_close(given, model.model(inputs).numpy())


def test_the_metadata_says_what_the_model_is(tmp_path):
    (path,) = minivit.export(classifier(), tmp_path / "a.onnx")
    about = session(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["ant", "bee", "cat"]
    assert json.loads(about["preprocessing"])["std"] == [0.2, 0.25, 0.3]
    assert json.loads(about["model"])["family"] == "vit" and about["minivit"] == minivit.__version__


@pytest.mark.parametrize("variant", ["vit_convolutions", "mixer", "localvit"])
def test_weights_in_8_bits(variant, tmp_path, monkeypatch):
    model = made(variant, monkeypatch)
    model = minivit.create_model(model.family, **{**vars(model.config), "dim": 64, "num_classes": 3}, seed=1)
    model.head.weight.data += np.random.default_rng(0).standard_normal(model.head.weight.shape)
    exact, small = (minivit.export(model, tmp_path / f"{name}.onnx", precision=name)[0] for name in ("float32", "int8"))
    assert small.stat().st_size < 0.6 * exact.stat().st_size
    minivit.save_weights(model, tmp_path / "a.safetensors", precision="int8")
    rounded = deepcopy(model)
    minivit.load_weights(rounded, tmp_path / "a.safetensors")
    images = images_for(model)
    (given,) = answers([str(small)], images)
    with minivit.no_grad():
        assert_close(given, rounded(images).numpy())
        assert np.abs(given - model(images).numpy()).max() > 1e-4


def test_a_classifier_that_predicts_in_8_bits_is_exported_so(tmp_path):
    sizes = [minivit.export(classifier(precision=p), tmp_path / f"{p}.onnx")[0].stat().st_size for p in ("int8", "float32")]
    assert sizes[0] < 0.7 * sizes[1]


# ---------------------------------------------------------------------------------------------------------------------- cascades
def test_a_cascade_is_a_file_for_each_exit(tmp_path):
    model = create("dvt")
    paths = minivit.export(model, tmp_path / "a.onnx")
    assert [path.name for path in paths] == [f"a_exit{k}.onnx" for k in (1, 2, 3)]
    first, second = (session(str(path)) for path in paths[:2])
    handed_on = {output.name for output in first.get_outputs()} - {"logits"}
    assert handed_on and {each.name for each in second.get_inputs()} == {"images"} | handed_on
    assert confidence(answers(map(str, paths[:1]), images_for(model))[0]).shape == (4,)


# -------------------------------------------------------------------------------------------------------------------------- timm
TIMM = json.loads((GOLDEN / "timm_names.json").read_text())["models"]


@pytest.mark.parametrize("name", TIMM)
def test_the_names_and_the_call_are_those_of_timm(name, tmp_path):
    family, options = timm_names()[name]
    model = minivit.create_model(family, **options)
    (path,) = minivit.export(model, tmp_path / "a.safetensors")
    with safe_open(path, "np") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == TIMM[name]["state_dict"]  # noqa: SIM118 (no dict)
        assert json.loads(file.metadata()["timm"]) == TIMM[name]["call"] and file.metadata()["format"] == "pt"
    again = minivit.create_model(family, **options, seed=1)
    assert minivit.load_weights(again, path) == ()


def timm_names():
    """The models of the script that made the golden file, which itself needs timm."""
    text = (GOLDEN / "timm_names.py").read_text()
    names = {}
    exec(text[text.index("SMALL =") : text.index("def created")], names)
    return names["MODELS"]


def test_a_classifier_comes_back(tmp_path):
    (path,) = minivit.export(classifier(), tmp_path / "a.safetensors")
    assert minivit.load(path).class_names == ("ant", "bee", "cat")


# ------------------------------------------------------------------------------------------------------------------ large, wrong
def test_weights_that_onnx_cannot_hold_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_FILE", 100)
    model = create("vit")
    for _ in range(2):  # the second one replaces the files
        paths = minivit.export(model, tmp_path / "a.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    images = images_for(model)
    assert_close(answers(map(str, paths), images)[0], model(images).numpy())


class Own(minivit.Module):
    def forward(self, images):
        return images


@pytest.mark.parametrize(
    "model, path, options, message",
    [
        (create("vit"), "a.pt", {}, r"exported as \.onnx or \.safetensors"),
        (create("deepvit"), "a.safetensors", {}, "timm has no deepvit"),
        (create("dvt"), "a.safetensors", {}, "timm has no dvt"),
        (create("vit"), "a.safetensors", {"precision": "int8"}, "options of .onnx files"),
        (
            minivit.create_model("vit", image_size=8, patch_size=4, dim=8, heads=2, stem="convolution"),
            "a.safetensors",
            {},
            "do not overlap",
        ),
        (minivit.create_model("vit", image_size=8, patch_size=4, dim=8, heads=2, distillation="token"), "a.safetensors", {}, "of its own"),
        (create("vit_attention_pool"), "a.safetensors", {}, "mean of the tokens by learned scores"),
        (create("crossvit"), "a.safetensors", {"preprocessing": True}, "options of .onnx files"),
        (create("vit"), "a.onnx", {"preprocessing": True}, "give a model of load"),
        (create("vit"), "a.onnx", {"precision": "bfloat16"}, "float32 or int8"),
        (Own(), "a.onnx", {}, "a model of minivit"),
    ],
)
def test_what_cannot_be_exported(model, path, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        minivit.export(model, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_a_new_op_needs_an_entry(tmp_path, monkeypatch):
    from minivit.io import onnx_ops

    monkeypatch.delitem(onnx_ops.TRANSLATIONS, "attention")
    with pytest.raises(UserError, match="the op attention has no ONNX form"):
        minivit.export(create("vit"), tmp_path / "a.onnx")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minivit.io.onnx_ops", None)
    monkeypatch.delattr("minivit.io.onnx_ops", raising=False)
    with pytest.raises(UserError, match="pip install onnx"):
        minivit.export(create("vit"), tmp_path / "a.onnx")


# -------------------------------------------------------------------------------------------------------------- the command line
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = classifier()
    model.save("run.safetensors")
    assert main(["export", "run.safetensors", "a.onnx", "--preprocessing", "--precision", "int8"]) == 0
    assert capsys.readouterr().out == "a.onnx\n"
    assert session("a.onnx").get_inputs()[0].type == "tensor(uint8)"
    assert main(["export", "run.safetensors", "b.safetensors"]) == 0
    file, call = capsys.readouterr().out.splitlines()
    assert file == "b.safetensors" and call.startswith("timm.create_model(model_name='vit_base_patch16_224', img_size=8")
    assert main(["export", "run.safetensors", "b.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": ["b.safetensors"], "timm": call}
    assert main(["export", "run.safetensors", "a.pb"]) == 2
    assert capsys.readouterr().err == "minivit: models are exported as .onnx or .safetensors: a.pb has another ending\n"
