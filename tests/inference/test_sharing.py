"""Models that are shared: by threads, by processes that begin as copies of another, by pickles and deep copies."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_models import batches, nano

import minivit
from minivit import Predictor, Trainer, UserError, calibrate, create_model
from minivit import functional as F
from minivit.kernels.cpu.run import most_threads
from minivit.runtime.plan import Plan

IMAGES = np.random.default_rng(0).standard_normal((40, 1, 8, 8)).astype(np.float32)


def cascade(threads=None):
    model = create_model("dvt_nano_8", seed=1, depth=1)
    predictor = Predictor(model, threads=threads)
    images = np.random.default_rng(1).standard_normal((120, 1, 8, 8)).astype(np.float32)
    calibrate(predictor, images, np.arange(120) % 10, budgets=[0.5, 1.0], unit="share")
    return predictor


# --------------------------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("threads, count", [(None, 100), *(pytest.param(t, 1000, marks=pytest.mark.slow) for t in (1, None))])
@pytest.mark.parametrize("kind", ["vit", "cascade"])
def test_threads_get_the_answers_of_one(kind, threads, count):
    """8 threads with `count` predictions each: every answer is bit for bit that of one thread for the same images."""
    predictor = cascade(threads) if kind == "cascade" else Predictor(nano(), threads=threads)
    budget = 0.5 if kind == "cascade" else None
    parts = [IMAGES[first : first + size] for size in (1, 2, 3) for first in range(0, len(IMAGES) - size, 5)]
    wanted = [predictor.predict(part, budget) for part in parts]
    start = threading.Barrier(8)

    def answer(worker):
        start.wait()
        for i in range(worker, worker + count):
            found, alone = predictor.predict(parts[i % len(parts)], budget), wanted[i % len(parts)]
            if not (np.array_equal(found.probabilities, alone.probabilities) and np.array_equal(found.exits, alone.exits)):
                return i
        return None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8))) == [None] * 8
    assert kind == "vit" or len({tuple(answer.exits) for answer in wanted}) > 1


def test_threads_may_use_ops_at_once():
    def gradient(seed):
        rng = np.random.default_rng(seed)
        x, w = (minivit.Tensor(rng.standard_normal((7, 7)), requires_grad=True) for _ in range(2))
        F.softmax(F.linear(x, w) * x).sum(0).backward(np.arange(7.0))
        return x.grad.numpy(), w.grad.numpy()

    alone = [gradient(seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(gradient, range(40))):
            assert all(np.array_equal(a, b) for a, b in zip(one, other))


def test_a_trainer_is_for_one_thread():
    trainer, failures, start = Trainer(nano()), [], threading.Barrier(4)
    data = list(batches(20, size=64))

    def work():
        start.wait()
        for images, labels in data:
            try:
                trainer.step(images, labels)
            except UserError as error:
                failures.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert trainer.steps == 80 - len(failures)
    assert all("one step at a time" in failure for failure in failures)


def test_a_trainer_in_a_step_refuses_another():
    trainer = Trainer(nano())
    with trainer._lock, pytest.raises(UserError, match="one step at a time"):
        trainer.step(*next(batches(1)))
    trainer.step(*next(batches(1)))


# -------------------------------------------------------------------------------------------------------------------- processes
def answers(predictor):
    return predictor(IMAGES[:3])


PREDICTOR: list = []  # for children of fork


def answer_of_the_parent(start):
    return PREDICTOR[0](IMAGES[start : start + 3])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_a_child_of_fork_predicts_and_trains():
    PREDICTOR[:] = [Predictor(nano())]
    wanted = [answer_of_the_parent(i) for i in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for _ in range(2):
            found = pool.map_async(answer_of_the_parent, range(4)).get(timeout=120)
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted))
        loss = pool.apply_async(one_step).get(timeout=120)
    assert loss == one_step()
    assert np.array_equal(answer_of_the_parent(0), wanted[0])  # the parent goes on


def one_step() -> float:
    return Trainer(nano()).step(*next(batches(1)))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_predictor_goes_to_other_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    predictor = Predictor(nano())
    wanted = answers(predictor)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert np.array_equal(pool.apply_async(answers, (predictor,)).get(timeout=120), wanted)


def answer_of(predictor, number):
    """What a process that begins answers: its number, and the logits of one image."""
    return number, predictor(IMAGES[number % len(IMAGES)][None])


def predict_in_children(run_in_children, predictor):
    """50 processes, each of which predicts once: run_in_children(function, arguments) returns their results."""
    wanted = [predictor(image[None]) for image in IMAGES]  # use in the parent, on all its threads
    results = list(run_in_children(answer_of, [(predictor, number) for number in range(50)]))
    assert [number for number, _ in results] == list(range(50))
    assert all(np.array_equal(logits, wanted[number % len(IMAGES)]) for number, logits in results)
    assert np.array_equal(predictor(IMAGES[:1]), wanted[0])  # the parent goes on


@pytest.mark.slow
@pytest.mark.parametrize("method, kind", [("fork", "vit"), ("fork", "cascade"), ("spawn", "vit"), ("forkserver", "vit")])
def test_fifty_processes_predict(method, kind):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        predict_in_children(
            lambda function, arguments: pool.starmap_async(function, arguments, chunksize=1).get(timeout=500),
            cascade() if kind == "cascade" else Predictor(nano()),
        )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_fifty_calls_through_joblib(backend):
    joblib = pytest.importorskip("joblib")
    predict_in_children(
        lambda function, arguments: joblib.Parallel(2, backend=backend, batch_size=1, timeout=300)(
            joblib.delayed(function)(*each) for each in arguments
        ),
        Predictor(nano()),
    )


def exit_status_of_a_child(action):
    """That of a copy of this process; None for one that hangs."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        return None
    return process.exitcode


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
class TestForkWhileThreadsPredict:
    def test_while_one_is_in_a_prediction(self, monkeypatch):
        predictor, parent = Predictor(nano(), threads=most_threads()), os.getpid()
        wanted = answers(predictor)
        waits, goes_on = threading.Event(), threading.Event()

        def replay(self, real=Plan.replay):
            if os.getpid() == parent:
                waits.set()
                goes_on.wait(60)
            real(self)

        monkeypatch.setattr(Plan, "replay", replay)
        worker = threading.Thread(target=answers, args=[predictor])
        worker.start()
        waits.wait(60)
        try:
            assert exit_status_of_a_child(lambda: sys.exit(not np.array_equal(answers(predictor), wanted))) == 0
        finally:
            goes_on.set()
            worker.join()

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["vit", "cascade"])
    def test_fifty_times_at_any_moment(self, kind):
        predictor = cascade() if kind == "cascade" else Predictor(nano())
        wanted, stopped = answers(predictor), threading.Event()

        def predict_on_and_on():
            while not stopped.is_set():
                answers(predictor)

        workers = [threading.Thread(target=predict_on_and_on) for _ in range(2)]
        for worker in workers:
            worker.start()
        try:
            statuses = [exit_status_of_a_child(lambda: sys.exit(not np.array_equal(answers(predictor), wanted))) for _ in range(50)]
        finally:
            stopped.set()
            for worker in workers:
                worker.join()
        assert statuses == [0] * 50


def test_a_threading_layer_of_numba_that_takes_one_caller():
    code = (
        "import numpy as np, minivit\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "p = minivit.Predictor(minivit.create_model('vit_nano_patch2_8', depth=1))\n"
        "x = np.ones((2, 1, 8, 8), np.float32)\n"
        "with ThreadPoolExecutor(4) as pool: print(len(list(pool.map(lambda i: p(x), range(100)))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr[-2000:]


# --------------------------------------------------------------------------------------------------------- pickles and copies
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"])
@pytest.mark.slow
class TestCopies:
    def test_of_a_model(self, copied):
        for model in (nano(), cascade().model):
            other = copied(model)
            assert other.state_dict().keys() == model.state_dict().keys() and other.config == model.config
            assert np.array_equal(Predictor(other)(IMAGES), Predictor(model)(IMAGES))
            assert other.calibration == model.calibration

    def test_of_a_predictor_after_use(self, copied):
        for predictor in (Predictor(nano()), cascade()):
            before = predictor(IMAGES)
            other = copied(predictor)
            assert np.array_equal(other(IMAGES), before) and np.array_equal(predictor(IMAGES), before)

    def test_of_a_classifier_after_use(self, copied, tmp_path):
        run = minivit.train(
            "vit_nano_patch2_8", epochs=1, limit=64, batch_size=32, progress=False, out=tmp_path / "run", precision="float32"
        )
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
        for classifier in (run.model, minivit.load(run.folder)):
            for _ in range(2):  # before its first prediction, and after
                other = copied(classifier)
                assert np.array_equal(other.predict(images).probabilities, classifier.predict(images).probabilities)
                assert other.class_names == classifier.class_names

    @pytest.mark.parametrize(
        "options",
        [
            {"ema": 0.9},
            {"optimizer": "sgd", "nesterov": True, "precision": "bfloat16"},
            {"optimizer": "muon", "momentum": 0.9, "adjust_lr_fn": "original", "ns_steps": 3, "ema": 0.9},
        ],
        ids=str,
    )
    def test_of_a_trainer_which_goes_on_bit_for_bit(self, copied, options):
        trainer = Trainer(nano(drop_path_rate=0.2, proj_drop_rate=0.1), lr=1e-2, clip_norm=1.0, **options)
        data = list(batches(6))
        for batch in data[:3]:
            trainer.step(*batch)
        trainer.lr = 5e-3
        other = copied(trainer)
        for batch in data[3:]:
            assert other.step(*batch) == trainer.step(*batch)
        assert (other.steps, other.lr, other.gradient_norm) == (trainer.steps, trainer.lr, trainer.gradient_norm)
        for t in (trainer, other):
            t.swap_average()
        for name, value in trainer.model.state_dict().items():
            assert np.array_equal(other.model.state_dict()[name], value), name

    def test_of_a_tensor(self, copied):
        x = minivit.Tensor(np.arange(3.0), requires_grad=True)
        y = x * x
        y.sum().backward()
        other = copied(x)
        assert other.requires_grad and np.array_equal(other.grad.numpy(), [0, 2, 4]) and np.array_equal(copied(y).numpy(), [0, 1, 4])
