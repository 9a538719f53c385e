"""The cascade: against the authors' code, what stages hand on, true early exits, thresholds that travel with the weights."""

import json

import numpy as np
import pytest
from golden_files import assert_matches, golden_path, part, read_golden
from safetensors.numpy import save_file

import minivit
from minivit import Tensor, UserError
from minivit.grad_mode import current_tracer
from minivit.inference.predictor import Predictor
from minivit.models.cascade.calibration import Calibration, fingerprint

PATCHES = ((4, 4, 0), (4, 2, 0), (3, 2, 1))  # 2, 3 and 4 a side of 8 pixels


def cascade(**options):
    given = dict(image_size=8, in_channels=2, num_classes=3, dim=12, depth=2, heads=2, patches=PATCHES) | options
    model = minivit.create_model("dvt", **given)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape)
    return model


def pictures(number=9, dtype="float32", seed=1):
    return np.random.default_rng(seed).standard_normal((number, 2, 8, 8)).astype(dtype)


def calibrated(model, *thresholds, unit="macs"):
    """The model with these thresholds for the budget of all exits."""
    macs = tuple(map(float, model.cost().exits))
    zeros = (0.0,) * len(macs)
    model.calibration = Calibration(
        unit, "exact", "max", (macs[-1],), (thresholds,), (0.0,), (0.0,), (zeros,), macs, macs, zeros, 100, fingerprint(model)
    )
    return model, macs[-1]


# ------------------------------------------------------------------------------------------------------- the authors' code
def golden_model(name, dtype):
    arrays, config = read_golden(f"{name}.safetensors")
    own = dict(patches=config["patch_kernel_stride_padding"]) if "patch_kernel_stride_padding" in config else t2t_options(config)
    model = minivit.create_model(
        "dvt",
        image_size=config["image_size"],
        in_channels=config["channels"],
        num_classes=config["classes"],
        dim=config["dim"],
        depth=config["depth"],
        heads=config["heads"],
        mlp_ratio=config["mlp_ratio"],
        feature_reuse=config["feature_reuse"],
        relationship_reuse=config["relationship_reuse"],
        dtype=dtype,
        **own,
    )
    assert [stage.grid for stage in model.stages] == [(side, side) for side in config["token_grids"]]
    model.load_state_dict(model.rename_foreign(part(arrays, "weights/")))
    return model, arrays


def t2t_options(config):
    first, *later = zip(*config["unfold_kernel_stride_padding"])
    assert all(unfolds == ([3, 2, 1],) * 3 for unfolds in map(tuple, later))
    options = dict(token_dim=config["token_dim"], kernel_features=config["performer_features"])
    return dict(backbone="t2t", patches=first, options=options)


GOLDEN = pytest.mark.parametrize("name", ["dvt_deit", "dvt_t2t", "dvt_t2t_none"])


@GOLDEN
def test_equals_the_authors_code(name):
    model, arrays = golden_model(name, "float64")
    images = Tensor(arrays["input"], requires_grad=True)
    exits = model.exits(images)
    for k, logits in enumerate(exits):
        assert_matches(logits.numpy(), arrays[f"logits/{k}"], f"exit {k}")
    loss = (exits[0] * arrays["R/0"]).sum()
    for k in (1, 2):
        loss = loss + (exits[k] * arrays[f"R/{k}"]).sum()
    loss.backward()
    assert_matches(images.grad.numpy(), arrays["input_gradient"], "input gradient")
    expected = model.rename_foreign(part(arrays, "gradients/"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == trained.keys()
    for name, parameter in trained.items():
        assert_matches(parameter.grad.numpy(), expected[name], name)


@pytest.mark.parametrize("name", ["dvt_deit", "dvt_t2t"])
def test_what_a_stage_hands_on(name):
    model, arrays = golden_model(name, "float64")
    logits, (tokens, relation) = model.stage(0, Tensor(arrays["input"]), (None, None))
    assert_matches(logits.numpy(), arrays["logits/0"], "logits")
    assert_matches(tokens.numpy(), arrays["feature/0"], "features")
    assert_matches(relation.numpy(), arrays["relation/0"], "relationships")
    _, (tokens, _) = model.stage(1, Tensor(arrays["input"]), (tokens, relation))
    assert_matches(tokens.numpy(), arrays["feature/1"], "features")


@GOLDEN
def test_float32(name):
    model, arrays = golden_model(name, "float32")
    for k, logits in enumerate(model.exits(arrays["input"].astype(np.float32))):
        assert logits.dtype == np.float32
        assert np.abs(logits.numpy() - arrays[f"logits/{k}"]).max() < 1e-4 * np.abs(arrays[f"logits/{k}"]).max()


def test_weights_under_the_authors_names(tmp_path):
    model, arrays = golden_model("dvt_deit", "float64")
    save_file(part(arrays, "weights/"), tmp_path / "released.safetensors")
    again = minivit.create_model(
        "dvt",
        seed=1,
        **{
            name: getattr(model.config, name)
            for name in ("image_size", "in_channels", "num_classes", "dim", "depth", "heads", "patches", "dtype")
        },
    )
    minivit.load_weights(again, tmp_path / "released.safetensors")
    assert all(np.array_equal(array, again.state_dict()[name]) for name, array in model.state_dict().items())
    other = minivit.create_model("dvt", num_classes=7, image_size=224, in_channels=1, dim=12, depth=2, heads=2)
    with pytest.raises(UserError, match="the head is for other classes than the model's 7"):
        minivit.load_weights(other, tmp_path / "released.safetensors")
    minivit.load_weights(other, tmp_path / "released.safetensors", head=False)
    assert other.stages[1].head.weight.shape == (7, 12)


@pytest.mark.parametrize(
    "reuse, parameters",
    [
        (dict(), 70_442_232),
        (dict(feature_reuse=False, relationship_reuse=False), 67_257_912),
        (dict(relationship_reuse=False), 70_379_448),
        (dict(feature_reuse=False), 67_320_696),
    ],
)
def test_parameter_counts_of_dvt_deit_small(reuse, parameters):
    model = minivit.create_model("dvt_deit_small", init="zeros", **reuse)
    assert sum(p.size for p in model.parameters()) == parameters
    if not reuse:
        assert json.loads(golden_path("names/dvt_deit_small.json").read_text())["parameters"] == parameters


# ------------------------------------------------------------------------------------------------------------------- stages
def test_stages_begin_differently_and_the_first_as_the_backbone_alone():
    model = minivit.create_model("dvt", image_size=8, num_classes=3, dim=12, depth=2, heads=2, patches=PATCHES, seed=4)
    alone = minivit.create_model("vit", image_size=8, num_classes=3, dim=12, depth=2, heads=2, patch_size=4, seed=4)
    for name, array in alone.state_dict().items():
        assert np.array_equal(model.state_dict()[f"stages.0.{name}"], array), name
    qkv = [stage.blocks[0].attn.qkv.weight.data for stage in model.stages]
    assert not np.array_equal(qkv[1], qkv[2]) and not np.array_equal(qkv[0], qkv[1])
    assert model.stages[1].blocks[0].feature_reuse.layers[1].fc1.weight.data.std() > 0.01
    assert model.stages[1].relation_reuse.layers[0].weight.data.std() > 0.1


def test_stages_of_other_sizes():
    model = cascade(dim=(4, 8, 12), depth=(1, 2, 3), heads=(1, 2, 4))
    assert [len(stage.blocks) for stage in model.stages] == [1, 2, 3]
    assert model.stages[2].relation_reuse.layers[2].weight.shape == (12, 12, 1, 1)
    assert [logits.shape for logits in model.exits(pictures())] == [(9, 3)] * 3
    assert np.array_equal(model(pictures()).numpy(), model.exits(pictures())[-1].numpy())


@pytest.mark.parametrize(
    "options, changed",
    [
        (dict(), (1, 2)),
        (dict(relationship_reuse=False), (1, 2)),
        (dict(feature_reuse=False), (1, 2)),
        (dict(feature_reuse=False, relationship_reuse=False), ()),
    ],
)
def test_what_reuses_the_first_stage(options, changed):
    model = cascade(**options)
    before = [logits.numpy().copy() for logits in model.exits(pictures())]
    for block in model.stages[0].blocks:
        block.attn.qkv.weight.data[...] *= 1.5
    after = [logits.numpy() for logits in model.exits(pictures())]
    assert not np.allclose(before[0], after[0], atol=1e-6)
    assert tuple(k for k in (1, 2) if not np.allclose(before[k], after[k], rtol=1e-7, atol=1e-7)) == changed


def test_reset_head():
    model = cascade()
    model.reset_head(5)
    assert [logits.shape for logits in model.exits(pictures())] == [(9, 5)] * 3 and model.config.num_classes == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patches=((4, 4, 0),)), "a cascade has two exits or more, but patches holds 1"),
        (
            dict(patches=((4, 4, 0), (12, 2, 0))),
            "patches: those of exit 2, of 12 pixels with padding 0, do not fit into an image of 8 pixels",
        ),
        (dict(patches=((4, 4), (2, 2))), r"patches\[0\] must hold 3 values, not 2: \(4, 4\)"),
        (dict(patches=4), "patches must be a list, not 4"),
        (dict(patches=((4, 4, 0), (2, 0, 0))), r"patches\[1\]\[1\] must be a whole number of at least 1, not 0"),
        (dict(patches=((4, 4, 0), (2, 2, True))), r"patches\[1\]\[2\] must be a whole number of at least 0, not True"),
        (dict(patches=((4, 4, 0), (2, 3, 0))), "patch_stride must be at most patch_size: 3 is more than 2"),
        (dict(backbone="vitt"), r"backbone must be .*'vit'.*, not 'vitt' \(nearest: vit"),
        (dict(backbone="mixer"), "relationship_reuse needs attention, which mixer has not: set relationship_reuse=False"),
        (dict(backbone="dvt"), "backbone must be "),
        (dict(depth=(1, 2)), r"depth holds 2 numbers for 3 exits: \(1, 2\)"),
        (dict(depth=(1, 2, 0)), r"depth\[2\] must be a whole number of at least 1, not 0"),
        (dict(heads=5), "^heads must divide dim: 12 is not a multiple of 5$"),
        (dict(options=dict(pol="mean")), r"options: vit has no option 'pol' to set here \(nearest: pool"),
        (dict(options=dict(dim=3)), "options: vit has no option 'dim' to set here"),
        (dict(options=3), "options must be a mapping of names to values, not 3"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message) as caught:
        cascade(**options)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- early exits
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(options=dict(pool="mean", class_token=False)),
        dict(relationship_reuse=False),
        dict(feature_reuse=False, relationship_reuse=False),
        dict(backbone="mixer", relationship_reuse=False),
        dict(backbone="t2t", options=dict(token_dim=4, unfolds=((3, 1, 1), (3, 1, 1)))),
        dict(patches=PATCHES[:2]),
    ],
)
def test_images_that_stop_have_the_answers_of_their_exits(options):
    model = cascade(**options)
    images = pictures(23)
    predictor = Predictor(model, batch_size=16)
    every = [logits.numpy() for logits in model.exits(images)]
    np.testing.assert_allclose(predictor.logits(images), every, rtol=1e-5, atol=1e-5)
    sure = np.stack([answer.confidence for answer in predictor.exits(images)])  # (exits, B)
    _, budget = calibrated(model, *(float(np.median(c)) for c in sure[:-1]))
    answer = predictor.predict(images, budget=budget)
    wanted = np.full(23, len(every) - 1)
    for k in reversed(range(len(every) - 1)):
        wanted[sure[k] >= np.median(sure[k])] = k
    assert np.array_equal(answer.exits, wanted) and len(np.unique(wanted)) == len(every)
    assert np.array_equal(answer.macs, np.array(model.cost().exits)[wanted])
    expected = np.stack([a.probabilities for a in predictor.exits(images)])[wanted, np.arange(23)]
    np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(predictor.predict(images).exits, np.full(23, len(every) - 1))
    assert np.array_equal(predictor.predict(images[:1], budget=budget).exits, wanted[:1])
    stopped = predictor(images, budget=budget)  # the logits of these answers
    assert np.array_equal(stopped.argmax(1), answer.labels)
    np.testing.assert_allclose(stopped, np.stack(every)[wanted, np.arange(23)], rtol=1e-4, atol=1e-4)


def test_all_stop_at_once_and_none_does():
    model = cascade()
    predictor = Predictor(model)
    _, budget = calibrated(model, 0.0, 0.0)
    assert not predictor.predict(pictures(), budget=budget).exits.any()
    calibrated(model, 2.0, 2.0)
    answer = predictor.predict(pictures(), budget=budget)
    assert (answer.exits == 2).all()
    np.testing.assert_allclose(answer.probabilities, predictor.predict(pictures()).probabilities, rtol=1e-6)


def test_stages_that_are_not_needed_do_not_run(monkeypatch):
    model = cascade()
    _, budget = calibrated(model, 0.0, 0.0)
    predictors = [Predictor(model), Predictor(model)]
    ran = []
    stage = type(model).stage

    def noted(self, k, *rest):
        ran.extend([k] if current_tracer() is None else [])  # counting multiply-adds computes nothing
        return stage(self, k, *rest)

    monkeypatch.setattr(type(model), "stage", noted)
    answers = predictors[0].exits(pictures())
    next(answers)
    assert ran == [0]
    next(answers)
    assert ran == [0, 1]
    predictors[1].predict(pictures(), budget=budget)
    assert ran == [0, 1, 0]


def test_a_budget_needs_thresholds_of_these_weights():
    model = cascade()
    predictor = Predictor(model)
    with pytest.raises(UserError, match="the model has no thresholds yet: calibrate it"):
        predictor.predict(pictures(), budget=1e6)
    other, budget = calibrated(cascade(), 0.5, 0.5)
    other.stages[0].head.bias.data += 1
    model.calibration = other.calibration
    predictor.predict(pictures(), budget=budget)  # equal weights
    with pytest.raises(UserError, match="thresholds of another model"):
        Predictor(other).predict(pictures(), budget=budget)
    with pytest.raises(UserError, match="the model has one exit; a budget is for cascades"):
        Predictor(minivit.create_model("vit_nano_patch2_8")).predict(np.zeros((1, 1, 8, 8)), budget=0.5)


def test_thresholds_travel_with_the_weights(tmp_path):
    model, budget = calibrated(cascade(), 0.4, 0.5)
    minivit.save_weights(model, tmp_path / "cascade.safetensors")
    again = cascade(seed=3)
    minivit.load_weights(again, tmp_path / "cascade.safetensors")
    assert again.calibration == model.calibration
    expected = Predictor(model).predict(pictures(), budget=budget)
    given = Predictor(again).predict(pictures(), budget=budget)
    assert np.array_equal(expected.exits, given.exits) and np.array_equal(expected.probabilities, given.probabilities)
    again.calibration = None
    minivit.save_weights(again, tmp_path / "cascade.safetensors")
    minivit.load_weights(model, tmp_path / "cascade.safetensors")
    assert model.calibration is None


def test_a_run_holds_them_too(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 8, 8, 1)).astype(np.uint8) + (60 * labels[:, None, None, None]).astype(np.uint8)
    run = minivit.train(
        model="dvt",
        data=(images, labels),
        epochs=2,
        batch_size=16,
        out=tmp_path / "run",
        progress=False,
        model_options=dict(patches=PATCHES, dim=12, depth=1, heads=2),
    )
    assert len(run.history[-1]["exit_accuracies"]) == 3 and run.history[-1]["exit_accuracies"][-1] == run.test_accuracy
    with pytest.raises(UserError, match="these images are of the training set"):
        minivit.calibrate(run.model, images, labels, budgets=[0.5], unit="share")
    fresh = rng.integers(0, 60, (120, 8, 8, 1)).astype(np.uint8) + (60 * labels[:, None, None, None]).astype(np.uint8)
    calibration = minivit.calibrate(run.model, fresh, labels, budgets=[0.5, 1.0], unit="share")
    run.model.save(tmp_path / "run" / "model.safetensors")
    loaded = minivit.load(tmp_path / "run")
    assert loaded.model.calibration == calibration and loaded.training_sketch == run.model.training_sketch
    answer = loaded.predict(fresh[:30], budget=0.5)
    assert np.array_equal(answer.exits, run.model.predict(fresh[:30], budget=0.5).exits)
