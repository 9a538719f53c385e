"""Training steps: PyTorch's numbers, and a plan that gives the same as eager steps without allocating."""

import gc
import json
import threading
import tracemalloc
from importlib.resources import files

import numpy as np
import pytest
from golden_files import golden_path, part, read_golden
from safetensors import safe_open
from small_models import MODELS, batches, nano

import minivit
from minivit import Trainer, UserError, create_model
from minivit.kernels.cpu import run
from minivit.nn.layers import Linear
from minivit.training import trainer as trainer_module
from minivit.training.trainer import SHAPES, TrainingError


def digits():
    """All 1797 digits as scikit-learn holds them: levels 0 ... 16 (n, 8, 8), labels (n,)."""
    with (files("minivit.data") / "digits.npz").open("rb") as file, np.load(file) as arrays:
        return np.rint(arrays["images"] * (16 / 255)), arrays["labels"].astype(np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_forty_steps_follow_pytorch(name, plan):
    arrays, theirs = read_golden(f"training_{name}.safetensors")
    with safe_open(golden_path(f"training_{name}.safetensors"), "np") as file:
        recipe = json.loads(file.metadata()["recipe"])
    model = nano(name, dim=32, depth=3, dtype="float64", **({"heads": theirs["num_heads"]} if name == "vit" else {}))
    model.load_state_dict(part(arrays, "initial/"))
    images, labels = digits()
    images = ((images / 16 - 0.5) / 0.5)[:, None]  # (1797, 1, 8, 8)
    trainer = Trainer(
        model,
        precision="float64",
        weight_decay=recipe["weight_decay"],
        clip_norm=recipe["clip_global_norm"],
        label_smoothing=recipe["label_smoothing"],
        plan=plan,
    )
    for step, index in enumerate(arrays["batch_index"]):
        trainer.lr = arrays["learning_rate"][step]
        assert trainer.step(images[index], labels[index]) == pytest.approx(arrays["loss"][step], rel=1e-8), step
        assert trainer.gradient_norm == pytest.approx(arrays["gradient_norm"][step], rel=1e-8), step
    state = model.state_dict()
    for parameter, expected in part(arrays, "final/").items():
        np.testing.assert_allclose(state[parameter], expected, rtol=1e-8, atol=1e-8, err_msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"ema": 0.9, "clip_norm": 0.5, "label_smoothing": 0.1},
        {"optimizer": "sgd", "nesterov": True},
        {"precision": "bf16x3"},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "accumulate": 2, "ema": 0.9, "clip_norm": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_plan_equals_eager_bit_for_bit(name, soft, options):
    results = []
    for plan in (True, False):
        model = nano(name, seed=3, **MODELS[name])
        trainer = Trainer(model, plan=plan, **options)
        seen = []
        for i, (images, labels) in enumerate(batches(5, soft=soft)):
            trainer.lr = 1e-3 * (i + 1)
            seen.append((trainer.step(images, labels), trainer.gradient_norm))
        with trainer.averaged():
            results.append((seen, model.state_dict()))
    (planned, planned_state), (eager, eager_state) = results
    assert planned == eager
    assert planned[0] != planned[-1]
    for parameter, value in planned_state.items():
        np.testing.assert_array_equal(value, eager_state[parameter], err_msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("plan, precision", [(True, "float32"), (False, "float32"), (True, "bf16x3"), (True, "bfloat16")])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_threads_gives_the_same_bits(name, plan, precision):
    results = []
    for threads in {1, run.most_threads(), None}:
        trainer = Trainer(nano(name, seed=3, dim=48, **MODELS[name]), plan=plan, precision=precision, threads=threads)
        assert trainer.threads == (threads or run.threads())
        results.append([trainer.step(images, labels) for images, labels in batches(3, 64)])
        assert all(p.threads == trainer.threads for p in trainer.plans) and len(trainer.plans) == plan
    assert all(result == results[0] for result in results)
    assert run.threads() == run.most_threads()


def test_a_trainer_keeps_its_threads_wherever_it_steps():
    trainer, other, data, seen = Trainer(nano(), threads=1), Trainer(nano()), [*batches(3)], []
    for batch in data:  # each in a thread of Python's own, whose setting is another
        thread = threading.Thread(target=lambda batch=batch: seen.append((trainer.step(*batch), run.threads())))
        thread.start()
        thread.join()
    assert seen == [(other.step(*batch), run.most_threads()) for batch in data]
    assert [plan.threads for plan in trainer.plans] == [1]


def test_an_error_leaves_the_number_of_threads():
    with pytest.raises(UserError, match="labels have"):
        Trainer(nano(), threads=1).step(np.ones((2, 1, 8, 8), np.float32), np.ones((2, 9)))
    assert run.threads() == run.most_threads()


def test_a_plan_serves_batches_of_several_shapes():
    states = []
    for plan in (True, False):
        trainer = Trainer(nano(), plan=plan)
        for size in (8, 4, 8, 2, 4, 6, 3, 5, 8):  # more than SHAPES
            for images, labels in batches(1, size, seed=size):
                trainer.step(images, labels)
        assert len(trainer._shapes) == SHAPES
        states.append(trainer.model.state_dict())
    for parameter, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][parameter])


def test_a_changed_model_needs_a_new_trainer():
    model = create_model("vit_nano_patch2_8")
    trainer = Trainer(model)
    images, labels = np.zeros((4, 1, 8, 8), np.float32), np.arange(4)
    trainer.step(images, labels)
    model.reset_head(10)
    with pytest.raises(UserError, match="make a new Trainer"):
        trainer.step(images, labels)


def test_a_replayed_step_allocates_nothing():
    trainer = Trainer(nano(**MODELS["vit"]), ema=0.99, clip_norm=1.0)
    images, labels = next(batches(1, size=32))
    for _ in range(3):
        trainer.step(images, labels)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(5):
            trainer.lr = 1e-3
            trainer.step(images, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 2  # a few Python numbers; one copy of the batch alone would be 8 KiB


def test_arena_is_much_smaller_than_all_buffers():
    trainer = Trainer(create_model("vit_nano_patch2_8"))
    trainer.step(*next(batches(1, size=64)))
    (plan,) = [batch.plan for batch in trainer._shapes.values()]
    assert plan.buffer_bytes > 2.5 * plan.arena_bytes


@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_accumulated_parts_equal_one_batch(name):
    states = []
    for accumulate in (1, 2, 3, 9):  # of 8 images: as a whole, alike, not alike, one each
        trainer = Trainer(nano(name, dtype="float64"), accumulate=accumulate, optimizer="sgd", lr=0.1)
        losses = [trainer.step(images, labels) for images, labels in batches(3)]
        states.append((losses, trainer.gradient_norm, trainer.model.state_dict()))
    for losses, norm, state in states[1:]:
        np.testing.assert_allclose(losses, states[0][0], rtol=1e-12)
        assert norm == pytest.approx(states[0][1], rel=1e-12)
        for parameter, value in state.items():
            np.testing.assert_allclose(value, states[0][2][parameter], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [True, False])
def test_parts_are_chosen_by_what_backward_keeps(plan, monkeypatch):
    images, labels = next(batches(1, size=64))
    options = {"plan": plan, "optimizer": "sgd", "lr": 0.1}
    whole, chosen = (Trainer(nano(depth=6), **options) for _ in range(2))
    assert Trainer(nano()).parts(64) == 1 and len(whole._new_batch(images, labels).parts) == 1  # small: as a whole
    losses = [whole.step(images, labels) for _ in range(2)]
    weights, kept = whole.flat.data.nbytes, 64 * whole.model.cost().activations * 4
    monkeypatch.setattr(trainer_module, "PART_BYTES", 1)
    assert chosen.parts(64) == round((kept / (trainer_module.PART_OF_WEIGHTS * weights)) ** 0.5) > 2
    monkeypatch.setattr(trainer_module, "PART_OF_WEIGHTS", 0)
    monkeypatch.setattr(trainer_module, "PART_BYTES", kept // 64)
    assert [chosen.parts(images) for images in (64, 16, 4, 2, 1)] == [8, 4, 2, 1, 1]
    np.testing.assert_allclose([chosen.step(images, labels) for _ in range(2)], losses, rtol=1e-6)
    if plan:
        assert chosen.plans[0].arena_bytes < 2 / chosen.parts(64) * whole.plans[0].arena_bytes


def test_only_what_is_known_to_keep_images_apart_is_computed_in_parts(monkeypatch):
    class Centred(minivit.Module):
        """Its answers depend on the whole batch."""

        def __init__(self):
            self.linear = Linear(64, 10)

        def forward(self, images):
            x = images.reshape(len(images), -1)
            return self.linear(x - x.mean(0, keepdims=True))

    monkeypatch.setattr(trainer_module, "PART_BYTES", 1)
    assert Trainer(Centred()).parts(64) == 1 < Trainer(nano()).parts(64)


def test_parts_of_a_batch_draw_masks_of_their_own():
    images, labels = next(batches(1))
    doubled = np.concatenate([images, images]), np.concatenate([labels, labels])
    options = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0}
    once, twice = (Trainer(nano(drop_path_rate=0.5), accumulate=a, **options) for a in (1, 2))
    assert once.step(images, labels) != twice.step(*doubled)


def test_the_same_model_learns():
    trainer = Trainer(nano(), lr=1e-2)
    images, labels = next(batches(1, size=16))
    losses = [trainer.step(images, labels) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_precision_float64_converts_the_model():
    trainer = Trainer(nano(), precision="float64")
    trainer.step(*next(batches(1)))
    assert all(p.dtype == np.float64 for p in trainer.model.parameters())
    assert trainer.model.config.dtype == "float64"


def test_frozen_parameters_stay():
    model = nano()
    model.pos_embed.requires_grad = False
    before = model.pos_embed.data.copy()
    trainer = Trainer(model, lr=0.1)
    trainer.step(*next(batches(1)))
    np.testing.assert_array_equal(model.pos_embed.data, before)


def test_averaged_weights_are_lent_only():
    trainer = Trainer(nano(), ema=0.5, lr=0.1)
    for batch in batches(3):
        trainer.step(*batch)
    own = trainer.model.state_dict()
    with trainer.averaged():
        assert any((value != own[name]).any() for name, value in trainer.model.state_dict().items())
    for name, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, own[name])


@pytest.mark.parametrize("plan", [True, False])
def test_a_loss_that_is_not_finite_stops(plan):
    trainer = Trainer(nano(), lr=3e-4, plan=plan)
    images, labels = next(batches(1))
    trainer.step(images, labels)
    images[2, 0, 1, 1] = np.nan
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 with learning rate 0.0003: lower lr"):
        trainer.step(images, labels)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        ((8, 1, 8, 8), np.array([0, 1, 2, 3, 4, 5, 6, 10]), "label 10 at position 7 is outside 0 … 9"),
        ((8, 1, 8, 8), np.array([0, 1, 2, -3, 4, 5, 6, 7]), "label -3 at position 3 is outside 0 … 9"),
        ((8, 1, 8, 8), np.zeros(7, int), r"labels must have the shape \(8,\) or \(8, classes\), got \(7,\)"),
        ((8, 1, 8, 8), np.zeros(8), "labels must be integers"),
        ((8, 1, 8, 8), np.ones((8, 9)) / 9, "labels have 9 columns, the model 10 classes"),
        ((8, 8, 8), np.zeros(8, int), r"images must have the shape \(B, C, H, W\)"),
        ((8, 3, 8, 8), np.zeros(8, int), "images have shape"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_that_does_not_fit_is_told_and_changes_nothing(images, labels, message, warm):
    trainer = Trainer(nano(), accumulate=2)
    if warm:
        trainer.step(*next(batches(1)))
    before = trainer.model.state_dict()
    with pytest.raises(UserError, match=message):
        trainer.step(np.ones(images, np.float32), labels)
    for name, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    trainer.step(*next(batches(1)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "bfloat17"}, r"precision='bfloat17' is not available \(nearest: bfloat16.*: choose auto, float32, bf16x3, bfloat16"),
        ({"device": "tpu"}, "device='tpu' is not available: choose 'cpu' or 'cuda'"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam' \(nearest: adamw\): choose adamw, muon, sgd"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": float("nan")}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
        ({"eps": 0.0}, "eps must"),
        ({"clip_norm": -1.0}, "clip_norm must"),
        ({"label_smoothing": 1.0}, "label_smoothing must"),
        ({"accumulate": 0}, "accumulate must be 1 or more"),
        ({"ema": 1.5}, "ema must"),
        ({"threads": 0}, r"threads must be a whole number of 1 \.\.\. \d+, the cores of this process, got 0"),
        ({"threads": run.most_threads() + 1}, "threads must be a whole number"),
        ({"threads": 1.0}, "got 1.0"),
        ({"threads": True}, "got True"),
    ],
)
def test_settings_out_of_range_are_told(options, message):
    with pytest.raises(UserError, match=message):
        Trainer(nano(), **options)


def test_a_model_that_another_trainer_took_over_is_told():
    model = nano()
    first = Trainer(model)
    Trainer(model)
    with pytest.raises(UserError, match="another Trainer"):
        first.step(*next(batches(1)))


def test_a_module_of_ones_own_trains():
    class Probe(minivit.Module):
        def __init__(self):
            self.weight = minivit.Parameter(np.zeros((10, 64), np.float32))

        def forward(self, images):
            return minivit.functional.linear(images.reshape(len(images), 64), self.weight)

    trainer = Trainer(Probe(), lr=0.1)
    images, labels = next(batches(1))
    assert trainer.step(images, labels) == pytest.approx(np.log(10), rel=1e-6)
    assert trainer.step(images, labels) < np.log(10)
