"""A profile: every launch counted once, under the op it is part of, and floors that are the ops' own."""

import math

import numpy as np
import pytest

import minivit
from minivit import Trainer, UserError, create_model
from minivit.functional import cross_entropy
from minivit.kernels.begin_update import PARTS
from minivit.kernels.core import arrays
from minivit.kernels.core.recording import record
from minivit.kernels.cpu import run
from minivit.kernels.cpu.strided import fill
from minivit.runtime.plan import Plan
from minivit.training import profiling

NANO = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10, "dim": 16, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in {"PRODUCT": 64, "STREAM": 1 << 16, "SECONDS": 0.0, "STEP_SECONDS": 0.0}.items():
        monkeypatch.setattr(profiling, name, value)


def nano(**options):
    return create_model("vit", **NANO, **options)


def rows_of(profile):
    return {(row.name, row.phase): row for row in profile.rows}


def test_a_training_step():
    profile = minivit.profile(nano(drop_rate=0.1), batch=4, ema=0.9)
    rows = rows_of(profile)
    assert {
        ("linear", "forward"),
        ("linear", "backward"),
        ("attention", "backward"),
        ("cross_entropy", "forward"),
        ("class_token", "forward"),
        ("class_token", "backward"),
        ("begin_update", "update"),
        ("adamw", "update"),
        ("advance", ""),
    } <= rows.keys()
    assert {phase for _, phase in rows} == {"forward", "backward", "update", ""}
    assert rows["begin_update", "update"].launches == rows["adamw", "update"].launches == 1
    trainer = Trainer(nano(drop_rate=0.1), ema=0.9)
    trainer.step(np.zeros((4, 1, 8, 8), np.float32), np.arange(4))
    assert profile.total.launches == trainer.plans[0].launches == sum(row.launches for row in profile.rows)
    assert profile.total.share == pytest.approx(1) and profile.step > 0
    assert [row.milliseconds for row in profile.rows] == sorted((row.milliseconds for row in profile.rows), reverse=True)
    assert all(row.milliseconds > 0 and (row.arithmetic > 0 or row.memory > 0 or not row.phase) for row in profile.rows)
    assert math.isnan(rows["advance", ""].times)


def test_the_floors_are_the_ops_own():
    profile = minivit.profile(nano(), batch=4)
    rows = rows_of(profile)
    B, N, C, blocks = 4, 17, 16, 2
    tokens = 2 * blocks * B * N * C * 4 * C  # qkv and projection: the MLP is an op of its own
    tokens -= 2 * B * (N - 1) * C * C  # the last projection is of the class token alone
    other = 2 * B * (16 * 4 * C + C * 10)  # patches and head
    assert rows["linear", "forward"].arithmetic * 1e-3 * profile.product_rate == pytest.approx(tokens + other)
    assert rows["linear", "backward"].arithmetic == pytest.approx(2 * rows["linear", "forward"].arithmetic)
    size = Trainer(nano()).flat.data.nbytes
    assert rows["adamw", "update"].memory * 1e-3 * profile.memory_rate == pytest.approx(7 * size + 8 * PARTS, abs=100)
    for row in profile.rows:
        if row.phase:
            assert row.times == pytest.approx(row.milliseconds / max(row.arithmetic, row.memory))


def test_inference_by_name_with_one_thread():
    profile = minivit.profile("dvt_nano_8", batch=2, train=False, threads=1)
    assert {row.phase for row in profile.rows if row.name != "copy_part"} == {"forward"}
    assert profile.title.startswith("dvt_nano_8, inference, batch 2, float32, 1 thread, ")
    assert run.threads() == run.most_threads()


def test_float64():
    assert "float64" in minivit.profile(nano(), batch=2, precision="float64").title
    assert "float64" in minivit.profile("vit_nano_patch2_8", batch=2, precision="float64", train=False).title


def test_the_model_stays_as_it_is():
    model = nano()
    trainer = Trainer(model)
    before = {name: value.copy() for name, value in model.state_dict().items()}
    minivit.profile(model, batch=4)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    trainer.step(np.ones((4, 1, 8, 8), np.float32), np.arange(4))  # its parameters are where they were


def test_as_text():
    lines = str(minivit.profile(nano(), batch=2)).splitlines()
    assert lines[0].startswith("vit, training step, batch 2, float32, ") and lines[0].endswith(" ms")
    assert "GFLOP/s" in lines[1] and lines[2].split()[:3] == ["op", "phase", "launches"]
    assert lines[-1].split()[0] == "all" and len({line.find("%") for line in lines[3:]}) == 1


def test_a_timed_replay_is_a_replay():
    model, images, labels = nano(), np.ones((3, 1, 8, 8), np.float32), np.arange(3)

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        loss = cross_entropy(model.train()(minivit.Tensor(images)), labels)
        loss.backward()
        return (loss.data, model.head.weight.grad.data)

    plan = Plan(step)
    before = [result.copy() for result in plan.results]
    for result in plan.results:
        result[...] = 0
    assert len(plan.timed_replay()) == len(plan.labels) == plan.launches
    for result, expected in zip(plan.results, before):
        np.testing.assert_array_equal(result, expected)


def test_what_no_op_launches_is_no_ops():
    with record() as recording:
        a = minivit.Tensor(np.ones((2, 3), np.float32))
        a + a
        fill(arrays.empty((4,), np.float32), 1.0)
    assert [call and (call.op.name, call.phase) for call in recording.op_calls] == [("add", "forward"), None]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"threads": 0}, "threads must be a whole number of 1 ..."),
        ({"precision": "int4"}, "precision='int4' is not available"),
        ({"train": False, "ema": 0.9}, "inference has no ema"),
        ({"model": "vit_nano"}, "unknown model 'vit_nano'"),
        ({"model": minivit.Module()}, "takes a model of create_model, not Module"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UserError, match=message):
        minivit.profile(**{"model": nano(), "batch": 2} | options)
