"""Training and predicting in every precision: bfloat16 and bf16x3 follow float64, and what is asked for is what computes."""

import json
from importlib.resources import files

import numpy as np
import pytest

from minivit import Predictor, Trainer, UserError, create_model, load
from minivit.cli import main
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.runtime.precision import OF_PREDICTIONS, PRECISIONS, fastest, precision_for

NANO = {"image_size": 8, "in_channels": 1, "num_classes": 10, "dim": 32, "depth": 2}
CASCADE = {"patches": ((4, 4, 0), (4, 2, 0)), "heads": 2}
FAMILIES = {
    "vit": ("vit", dict(patch_size=2, heads=2, pool="mean", class_token=False)),
    "mixer": ("mixer", dict(patch_size=2)),
    "ff_only": ("ff_only", dict(patch_size=2)),
    "t2t": ("t2t", dict(heads=2, token_dim=32, unfolds=((3, 1, 1), (3, 2, 1), (3, 1, 1)))),
    "localvit": ("localvit", dict(patch_size=2, heads=2, se_reduction=16)),
    "dvt": ("dvt", CASCADE),
}
DROPPING = {
    "vit": (
        "vit",
        dict(
            patch_size=2,
            heads=2,
            layer_scale=0.1,
            drop_rate=0.1,
            pos_drop_rate=0.1,
            proj_drop_rate=0.1,
            attn_drop_rate=0.1,
            drop_path_rate=0.2,
        ),
    ),
    "mixer": ("mixer", dict(patch_size=2, drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.2)),
    "dvt": ("dvt", dict(drop_path_rate=0.2, options=dict(drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1), **CASCADE)),
}


def nano(family, seed=0, **options):
    name, own = FAMILIES[family] if isinstance(family, str) else family
    return create_model(name, **NANO | own | options, seed=seed)


@pytest.fixture(scope="module")
def digits():
    """All 1797 digits, in -1 ... 1 (n, 1, 8, 8), and labels (n,)."""
    with (files("minivit.data") / "digits.npz").open("rb") as file, np.load(file) as arrays:
        return (arrays["images"] / 127.5 - 1)[:, None].astype(np.float32), arrays["labels"].astype(np.int64)


def losses(trainer, digits, steps=200, size=64) -> np.ndarray:
    """The loss of each step, over random batches that are the same each time."""
    images, labels = digits
    rng = np.random.default_rng(0)
    chosen = (rng.integers(0, len(images), size) for _ in range(steps))
    return np.array([trainer.step(images[index], labels[index]) for index in chosen])


# ----------------------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "mixer", "ff_only"])
def test_loss_curves_follow_float64(family, digits):
    """200 AdamW steps. A training that amplifies roundings, as of a class token out of its plateau, parts from float64 in float32 too."""
    curves = {p: losses(Trainer(nano(family), precision=p, threads=1), digits) for p in ("float64", "bf16x3", "bfloat16")}
    high = curves["float64"]
    assert high[-1] < 0.7 * high[0]
    assert np.abs(curves["bf16x3"] - high).max() < 1e-4
    assert np.abs(curves["bfloat16"] - high).max() < 0.05
    assert (curves["bf16x3"] != high).any() and (curves["bfloat16"] != curves["bf16x3"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gives_nearly_the_same_logits(family, digits):
    model = nano(family)
    trainer = Trainer(model, precision="bfloat16", lr=3e-3)
    curve = losses(trainer, digits, steps=30)
    assert curve[-5:].mean() < 0.95 * curve[:5].mean()
    assert all(p.dtype == np.float32 for p in model.parameters())
    high = Predictor(model, precision="float32").logits(digits[0][:50])
    for precision, error in (("bfloat16", 3e-2), ("bf16x3", 3e-5)):
        low = Predictor(model, precision=precision).logits(digits[0][:50])
        assert low.dtype == np.float32 and 0 < np.abs(low - high).max() < error * np.abs(high).max(), precision


@pytest.mark.slow
@pytest.mark.parametrize("family", DROPPING)
def test_dropping_models_learn_alike(family, digits):
    """Masks are the same in every precision."""
    few = digits[0][:16], digits[1][:16]
    curves = {
        p: losses(Trainer(nano(DROPPING[family]), precision=p, lr=3e-3, label_smoothing=0.1, threads=1), few, steps=60, size=32)
        for p in ("float32", "bf16x3", "bfloat16")
    }
    assert np.abs(curves["bf16x3"] - curves["float32"])[:10].max() < 1e-4
    assert 0 < np.abs(curves["bfloat16"] - curves["float32"])[:10].max() < 0.02
    assert all(curve[-5:].mean() < 0.8 * curve[:5].mean() for curve in curves.values())


def test_accumulated_parts_and_averages_in_bfloat16(digits):
    results = []
    for accumulate in (1, 4):
        trainer = Trainer(nano("vit"), precision="bfloat16", accumulate=accumulate, ema=0.5, optimizer="sgd", lr=0.1)
        curve = losses(trainer, digits, steps=10)
        own = trainer.model.state_dict()
        with trainer.averaged():
            results.append((curve, own, trainer.model.state_dict()))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-3)
    for own, averaged, other, other_averaged in zip(*(state.values() for result in results for state in result[1:])):
        np.testing.assert_allclose(own, other, rtol=0, atol=5e-3)
        np.testing.assert_allclose(averaged, other_averaged, rtol=0, atol=5e-3)
    assert any((results[0][1][name] != results[0][2][name]).any() for name in results[0][1])


def test_rows_of_probabilities_in_bfloat16(digits):
    images, labels = digits
    given = [labels[:16], np.eye(10)[labels[:16]]]
    hard, soft = (Trainer(nano("vit"), precision="bfloat16").step(images[:16], target) for target in given)
    assert hard == pytest.approx(soft, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize(
    "name, parameters, activations",
    [
        ("float32", "float32", "float32"),
        ("bf16x3", "float32", "float32"),
        ("bfloat16", "float32", BFLOAT16),
        ("float64", "float64", "float64"),
    ],
)
def test_what_is_computed_in(name, parameters, activations):
    found = precision_for(name, np.dtype(np.float32))
    assert (found.name, found.parameters, found.activations) == (name, parameters, activations)


@pytest.mark.parametrize("make", [Trainer, Predictor])
def test_auto_is_the_fastest_of_this_cpu(make):
    name, why = fastest()
    assert name in PRECISIONS and "CPU" in why
    assert make(nano("vit"), precision="auto").precision.name == name


@pytest.mark.parametrize("make", [Trainer, Predictor])
@pytest.mark.parametrize("precision", [*PRECISIONS, "auto"])
def test_a_float64_model_stays_float64(make, precision):
    model = nano("vit", dtype="float64")
    assert make(model, precision=precision).precision.name == "float64"
    assert all(p.dtype == np.float64 for p in model.parameters())


@pytest.mark.parametrize("make, more", [(Trainer, ""), (Predictor, ", int8")])
def test_an_unknown_precision_is_told(make, more):
    with pytest.raises(UserError) as caught:
        make(nano("vit"), precision="int4")
    assert str(caught.value).startswith("precision='int4' is not available")
    assert str(caught.value).endswith(": choose auto, float32, bf16x3, bfloat16, float64" + more)


@pytest.mark.parametrize("name", ["int8", "bf16x3"])
def test_what_is_for_the_cpu_alone(name):
    with pytest.raises(UserError, match=f"precision='{name}' is for the CPU: choose float32 or bfloat16 on a GPU"):
        precision_for(name, np.dtype(np.float32), "cuda", OF_PREDICTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_in_8_bits_are_nearly_the_same(family, digits):
    model, rng = nano(family), np.random.default_rng(1)
    for parameter in model.parameters():  # away from a zero head
        parameter.data += 0.1 * rng.standard_normal(parameter.shape)
    high, low = (Predictor(model, precision).logits(digits[0][:200]) for precision in ("float32", "int8"))
    assert 0 < np.abs(low - high).max() < 0.05 * np.abs(high).max()
    one = Predictor(model, "int8", threads=1).logits(digits[0][:200])
    np.testing.assert_array_equal(one, low)  # the same bits for any number of threads


def test_training_in_8_bits_is_refused():
    with pytest.raises(UserError, match=r"not available.*: choose auto, float32, bf16x3, bfloat16, float64$"):
        Trainer(nano("vit"), precision="int8")


def test_predictors_of_a_model_in_several_precisions_stay_apart(digits):
    model, images = nano("vit", seed=2), digits[0][:9]
    for parameter in model.parameters():  # away from a zero head
        parameter.data += 0.1 * np.random.default_rng(1).standard_normal(parameter.shape)
    every = {p: Predictor(model, precision=p) for p in (None, "float32", "bf16x3", "bfloat16")}
    first = {p: predictor(images) for p, predictor in every.items()}
    np.testing.assert_array_equal(first[None], first["float32"])
    for p, predictor in every.items():  # now as plans
        np.testing.assert_array_equal(predictor(images), first[p])
    assert len({logits.tobytes() for logits in first.values()}) == 3


def test_the_command_line_chooses(tmp_path, capsys):
    losses, weights = {}, {}
    for precision in ("auto", "float32", "bf16x3", "bfloat16"):
        out = tmp_path / precision
        assert (
            main(
                [
                    "train",
                    "--epochs",
                    "2",
                    "--batch-size",
                    "32",
                    "--limit",
                    "96",
                    "--model-option",
                    "dim=24",
                    "--precision",
                    precision,
                    "--threads",
                    "1",
                    "--quiet",
                    "--json",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        losses[precision] = [line["train_loss"] for line in json.loads(capsys.readouterr().out)["history"]]
        weights[precision] = load(out).model.head.weight.data.tobytes()
    assert weights["auto"] == weights[fastest()[0]] and len(set(weights.values())) == 3
    for precision, error in (("bf16x3", 1e-4), ("bfloat16", 0.02)):
        np.testing.assert_allclose(losses[precision], losses["float32"], rtol=error)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    single, half = (load(out, precision).predict(pixels).probabilities for precision in ("float32", "bfloat16"))
    assert 0 < np.abs(single - half).max() < 0.02
    shown = {}
    for precision in ("float32", "int8"):
        assert main(["eval", str(out), "--precision", precision, "--json"]) == 0
        shown[precision] = json.loads(capsys.readouterr().out)["test_loss"]
    assert 0 < abs(shown["int8"] - shown["float32"]) < 0.02 * shown["float32"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_that_would_lose_more_than_digits_are_refused(precision):
    images = np.zeros((2, 1, 8, 8), np.complex64)
    with pytest.raises(TypeError, match="same_kind"):
        Trainer(create_model("vit_nano_patch2_8"), precision=precision).step(images, np.zeros(2, int))
    with pytest.raises(TypeError, match="same_kind"):
        Predictor(create_model("vit_nano_patch2_8"), precision=precision)(images)
