"""Sizes that nothing can hold: one line, before anything is allocated, whoever gives them."""

import json

import numpy as np
import pytest
import safetensors.numpy
from mutations import check_outcome, memory_limit

import minivit
from minivit import UserError
from minivit.cli import main
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.models import FAMILIES, outline
from minivit.nn.module import outlines

MEMORY = 500 * 2**20  # bytes
NANO = dict(image_size=8, in_channels=1, num_classes=3)
SMALL = {  # by family; the patches are smaller than the image in two ways, and every field that a file could lie in is there
    "vit": dict(patch_size=4, dim=16, depth=1, heads=2),
    "mixer": dict(patch_size=4, dim=16, depth=1, token_hidden=4, channel_hidden=8),
    "ff_only": dict(patch_size=4, dim=16, depth=1, position_grid=2),
    "deepvit": dict(patch_size=4, dim=16, depth=1, heads=2),
    "localvit": dict(patch_size=4, dim=16, depth=1, heads=2, se_reduction=8),
    "dvt": dict(patches=[[4, 4, 0], [2, 2, 0]], dim=16, depth=1, heads=2),
}
SIZES = (10**5, 2**20, 10**8, 10**9, 2**31, 2**64, 10**200, 1e200)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_has_the_shapes_and_takes_no_memory(family):
    options = {"init": "zeros", **NANO, **SMALL.get(family, {})}
    model, planned = minivit.create_model(family, **options), outline(family, options, 10**4)
    assert planned.config == model.config
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in planned.named_parameters()} == shapes
    assert all(not any(parameter.data.strides) for parameter in planned.parameters())  # each is one value
    planned.allocate()
    planned.load_state_dict(model.state_dict())
    assert all(np.array_equal(array, planned.state_dict()[name]) for name, array in model.state_dict().items())


def test_an_outline_ends_with_its_block():
    with pytest.raises(UserError, match="more than 3 parameter arrays"), outlines(3):
        outline("vit", SMALL["vit"], 3)
    assert minivit.create_model("vit", **SMALL["vit"]).head.weight.data.flags.writeable


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("size", SIZES, ids="{:.0e}".format)
def test_sizes_of_users(family, size):
    """A small model may grow by one size, as long as there is memory for it."""
    for name in ("image_size", "in_channels", "num_classes", *SMALL[family]):
        options = NANO | SMALL[family] | {"init": "zeros", name: [[size, size, 0]] * 2 if name == "patches" else size}
        with memory_limit(MEMORY):
            done = check_outcome(lambda: minivit.create_model(family, **options), f"{name}={size}")  # noqa: B023
        assert not done or size <= 2**20


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dim=10**9), "dim must be a whole number of at most 1,048,576, not 1000000000"),
        (dict(depth=2**64), "depth must be a whole number of at most 1,048,576, not 18446744073709551616"),
        (dict(depth=10**6), "the model has more than 16,384 parameter arrays: make it smaller"),
        (dict(dim=12 * 10**4), "vit of this size takes 7,725.7 GiB for its parameters alone, more memory than there is: make it smaller"),
        (dict(dim=2**20, heads=1, mlp_ratio=2.0**20), r"a parameter of shape \(1099511627776, 1048576\) is larger than any memory"),
        (dict(image_size=30_000), "image_size must be a whole number of at most 4,096, not 30000"),
        (dict(image_size=64, patch_size=1, patch_stride=32), "patch_stride must be at most patch_size: 32 is more than 1"),
    ],
)
def test_the_lines_for_sizes(options, message):
    with memory_limit(MEMORY), pytest.raises(UserError, match=f"^{message}"):
        minivit.create_model("vit", **options)


def test_a_size_that_memory_does_not_hold_now(monkeypatch):
    monkeypatch.setattr(minivit.models, "_memory", lambda: 2**60)
    with memory_limit(MEMORY), pytest.raises(UserError, match="more memory than there is"):
        minivit.create_model("vit", dim=12_000)


def test_sizes_on_the_command_line(tmp_path, capsys):
    arguments = ["train", "--model", "vit_nano_patch2_8", "--quiet", "--out", str(tmp_path / "run"), "--model-option"]
    for option, words in (("depth=100000000", "depth must be a whole number"), (f"dim={'9' * 5000}", "dim must be a whole number")):
        assert main([*arguments, option]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"minivit: {words}") and line.count("\n") == 1 and len(line) < 320
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- sizes that files claim
def claims(path, **changes):
    """The file with other fields in its model's configuration, and in its preprocessing where it has that field too."""
    content = path.read_bytes()
    state = safetensors.numpy.load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    for key in ("model", "preprocessing"):
        known = json.loads(metadata[key])
        metadata[key] = json.dumps(known | {name: value for name, value in changes.items() if key == "model" or name in known})
    path.write_bytes(safetensors.numpy.save(state, metadata))


def save(path, family):
    model = minivit.create_model(family, **NANO, **SMALL[family])
    Classifier(model, "abc", Preprocessing(8, 1, (0.3,), (0.4,))).save(path)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("size", SIZES, ids="{:.0e}".format)
def test_sizes_of_files(family, size, tmp_path):
    path = tmp_path / "m.safetensors"
    for name in ("image_size", "in_channels", "num_classes", "patch_stride", "patch_padding", *SMALL[family]):
        save(path, family)
        claims(path, **{name: [[size, size, 0]] * 2 if name == "patches" else size})
        with memory_limit(MEMORY):
            assert not check_outcome(lambda: minivit.load(path), f"{name}={size}")


def test_a_file_of_many_parameters_claims_no_more_than_it_has(tmp_path):
    """814 kB that claim ten to the eighth blocks; and a million, which the range of a depth allows."""
    path = tmp_path / "m.safetensors"
    for depth in (10**8, 10**6):
        save(path, "vit")
        claims(path, depth=depth)
        with memory_limit(MEMORY), pytest.raises(UserError, match=r"depth must be|the model has more than 20 parameter arrays"):
            minivit.load(path)


def test_images_are_prepared_for_the_model_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    for change in ({"image_size": 30_000}, {"image_size": 16}, {"in_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}):
        save(path, "vit")
        content = path.read_bytes()
        state = safetensors.numpy.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        metadata["preprocessing"] = json.dumps(json.loads(metadata["preprocessing"]) | change)
        path.write_bytes(safetensors.numpy.save(state, metadata))
        with pytest.raises(UserError, match=rf"is damaged: preprocessing[.:] ?{next(iter(change))} (is \d+, that of the model|must be)"):
            minivit.load(path)
