"""device="cuda": what is around the kernels, whose own tests are in test_ops.py. On a GPU, or, where there is none, by emulation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import emulator, listing
from small_models import DROPS, MODELS, batches, nano

import minivit
from minivit import Predictor, Tensor, Trainer, UserError, create_model
from minivit.cli import main
from minivit.errors import DeviceError, OutOfMemoryError
from minivit.kernels.core import arrays, devices
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cuda import kernel as cuda
from minivit.kernels.cuda import nvrtc

TESTS = Path(__file__).parents[2]
NORMALISED = ("localvit", "deepvit")  # over whole batches, which have no parts
LOCAL = {"heads": 2, "se_reduction": 8, **DROPS}
FAMILIES = {**MODELS, "localvit": LOCAL, "ff_only": {}, "t2t": {}, "dvt": {}, "crossvit": {}, "deepvit": {"heads": 2}}


def small(name, **options):
    if name == "dvt":
        return create_model("dvt_nano_8", seed=3, depth=1, **options)
    if name == "crossvit":
        return create_model("crossvit_nano_8", seed=3, dims=(8, 16), depths=(1, 1), **options)
    if name == "t2t":
        return create_model("t2t_vit_nano_8", seed=3, dim=16, depth=1, heads=2, token_dim=8, **options)
    return nano(name, seed=3, **{n: v for n, v in FAMILIES[name].items() if name != "ff_only"}, **options)


# ------------------------------------------------------------------------------------------------------------------ arrays
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_tensor_goes_there_and_back(on_cuda, dtype):
    values = np.arange(6.0).reshape(2, 3).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    there = Tensor(values).to("cuda")
    assert (there.device, there.shape, there.dtype, len(there)) == ("cuda", (2, 3), values.dtype, 2)
    np.testing.assert_array_equal(there.numpy(), values)
    assert there.to("cpu").device == "cpu" and "5" in repr(there)
    np.testing.assert_array_equal(there[1:, ::-1].numpy(), values[1:, ::-1])


def test_arithmetic_and_its_gradients(on_cuda):
    a, b = (np.random.default_rng(i).standard_normal((3, 4)) for i in (1, 2))
    results = []
    for place in ("cpu", "cuda"):
        x, y = (Tensor(v, requires_grad=True) for v in (a, b))
        if place == "cuda":
            for t in (x, y):
                t.data = arrays.to_device(t.data, "cuda")
        loss = ((x * 2.0 + y) @ y.T / 3.0 - x.mean(1, keepdims=True)).sum()
        loss.backward()
        results.append([loss.item(), x.grad.numpy(), y.grad.numpy()])
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_arrays_of_two_devices_do_not_meet(on_cuda):
    with pytest.raises(TypeError, match=r"cpu and cuda: move them with \.to\(\)"):
        Tensor(np.ones(3)).to("cuda") + Tensor(np.ones(3))


# ---------------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5}, {"optimizer": "sgd", "nesterov": True}, {"optimizer": "muon", "ema": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_follows_the_cpu(on_cuda, name, options):
    options = {n: v for n, v in options.items() if name not in NORMALISED or n != "accumulate"}
    losses = []
    for place in ("cpu", "cuda"):
        trainer = Trainer(small(name, dtype="float64"), device=place, precision="float64", **options)
        losses.append([trainer.step(*batch) for batch in batches(3, 4)])
        assert {p.device for p in trainer.model.parameters()} == {place}
        state = trainer.model.state_dict()
        losses[-1] += [trainer.gradient_norm, *(float(np.abs(v).sum()) for v in state.values())]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plan_equals_eager_bit_for_bit(on_cuda, name, precision):
    results = []
    for plan in (True, False):
        trainer = Trainer(small(name), device="cuda", precision=precision, plan=plan, ema=0.9)
        seen = [trainer.step(*batch) for batch in batches(3, 4)]
        with trainer.averaged():
            results.append((seen, trainer.model.state_dict()))
    (planned, state), (eager, eager_state) = results
    assert planned == eager and planned[0] != planned[-1]
    for parameter, value in state.items():
        np.testing.assert_array_equal(value, eager_state[parameter], err_msg=parameter)


def test_soft_labels_and_wrong_ones(on_cuda):
    ((images, labels),) = batches(1, 4, soft=True)
    losses = [Trainer(small("vit"), device=place).step(images, labels) for place in ("cpu", "cuda")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    trainer = Trainer(small("vit"), device="cuda")
    for _ in range(2):
        with pytest.raises(UserError, match="label 10 at position 1 is outside"):
            trainer.step(images, np.array([0, 10, 3, 4]))
        trainer.step(images, np.array([0, 9, 3, 4]))


# -------------------------------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("name", FAMILIES)
def test_a_predictor_follows_the_cpu_and_the_weights(on_cuda, name):
    images = next(batches(1, 5))[0]
    model, other = small(name), small(name)
    predictor, there = Predictor(model), Predictor(other, device="cuda")
    for change in (0.0, 0.1):
        state = {n: v + change * np.cos(np.arange(v.size, dtype=v.dtype)).reshape(v.shape) for n, v in model.state_dict().items()}
        model.load_state_dict(state)
        other.load_state_dict(state)
        np.testing.assert_allclose(predictor.logits(images), there.logits(images), rtol=2e-4, atol=2e-5)
    assert Predictor(other.to("cpu"))._recorded[0] is None and other.parameters()[0].device == "cpu"


def test_a_run_on_cuda_is_saved_and_loaded(on_cuda, tmp_path):
    run = minivit.train(
        "vit_nano_patch2_8",
        data="digits",
        epochs=1,
        limit=64,
        batch_size=32,
        device="cuda",
        precision="float32",
        seed=0,
        out=tmp_path / "run",
        progress=False,
        model_options={"depth": 1, "dim": 16, "heads": 2},
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    for place in ("cpu", "cuda"):
        loaded = minivit.load(run.folder, device=place)
        assert loaded.model.parameters()[0].device == place
        np.testing.assert_allclose(loaded.predict(images).probabilities, run.model.predict(images).probabilities, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ errors
def test_bf16x3_is_for_the_cpu(on_cuda):
    with pytest.raises(UserError, match="precision='bf16x3' is for the CPU"):
        Trainer(small("vit"), device="cuda", precision="bf16x3")


def test_a_head_that_is_too_wide_is_refused(on_cuda):
    with pytest.raises(UserError, match="on a GPU a head has at most 128 channels, not 192: take more heads"):
        Predictor(create_model("vit_nano_patch2_8", dim=192, heads=1, depth=1), device="cuda").logits(np.zeros((1, 1, 8, 8), np.float32))


def test_without_cupy(monkeypatch):
    monkeypatch.setattr(devices, "_runtime", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match="device='cuda' needs CuPy, which does not load: install minivit") as raised:
        Trainer(small("vit"), device="cuda")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("command", [["train", "--device", "cuda"], ["predict", "somewhere", "x.png", "--device", "cuda"]], ids=str)
def test_the_command_line_says_it_in_one_line(monkeypatch, capsys, command):
    monkeypatch.setattr(devices, "_runtime", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("minivit: device='cuda' needs CuPy") and said.count("\n") == 1


class NoRoom(emulator.Emulator):
    """A GPU whose memory is full."""

    def empty(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > 2**20:
            raise OutOfMemoryError(size, 2**20)
        return super().empty(shape, dtype)


def test_out_of_memory_says_which_batch_would_fit():
    with devices.using(NoRoom()), pytest.raises(UserError, match=r"a batch of 1 images: the GPU .* the model is too large for it"):
        Trainer(create_model("vit_nano_patch2_8", dim=256), device="cuda")
    with devices.using(NoRoom()), pytest.raises(UserError, match=r"a batch of 64 images: the GPU has no room for .* MiB: 1 MiB are free; "):
        Trainer(create_model("vit_nano_patch2_8"), device="cuda").step(np.zeros((64, 1, 8, 8), np.float32), np.zeros(64, np.int64))


# --------------------------------------------------------------------------------------------------------------- compiling
@pytest.fixture(scope="module")
def every_kernel():
    return listing.kernels_of_ops() | listing.kernels_of_models()


def nvrtc_missing():
    try:
        nvrtc.version()
    except DeviceError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing())
@pytest.mark.parametrize("architecture", listing.ARCHITECTURES)
def test_every_kernel_compiles_without_spills(every_kernel, architecture):
    used = listing.usage(every_kernel, architecture)
    assert len(used) > 100
    assert not {k.expression: u.spilled for k, u in used.items() if u.spilled and "double" not in k.arguments}  # double is for checking


@pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing())
def test_a_wrong_kernel_is_refused_with_the_compilers_words():
    with pytest.raises(DeviceError, match=r"layernorm\.cu does not compile for sm_90:[\s\S]*no_such_kernel"):
        nvrtc.compile_kernel(cuda.Kernel("layernorm", "no_such_kernel", ("float",)), "sm_90")


# --------------------------------------------------------------------------------------------------------------- emulation
def test_the_emulator_sees_a_race_and_a_lost_barrier(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "wrong.cu").write_text("""
        #include <ptx.cuh>
        __global__ void race(int* y) { __shared__ int s; s = threadIdx.x; __syncthreads(); if (threadIdx.x == 0) y[0] = s; }
        __global__ void lost(int* y) { if (threadIdx.x < 3) __syncthreads(); else __syncwarp(); y[0] = 1; }
    """)
    results = set()
    for seed in range(8):
        with devices.using(emulator.Emulator(seed)) as runtime:
            y = runtime.empty((1,), np.dtype(np.int32))
            runtime.launch(cuda.Kernel("wrong", "race", ()), cuda.Grid(1, 64), (y,))
            results.add(int(runtime.to_numpy(y)[0]))
            with pytest.raises(RuntimeError, match="wait at a barrier that others do not reach"):
                runtime.launch(cuda.Kernel("wrong", "lost", ()), cuda.Grid(1, 64), (y,))
            with pytest.raises(TypeError, match="takes 1 arguments, not 2"):
                runtime.launch(cuda.Kernel("wrong", "race", ()), cuda.Grid(1, 64), (y, 1))
    assert len(results) > 1


def sanitized(*command):
    """Run Python under AddressSanitizer."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())
def test_no_kernel_leaves_its_arrays():
    done = sanitized(TESTS / "cuda_emulation" / "sanitized.py")
    assert done.returncode == 0 and "stayed within their arrays" in done.stdout, done.stderr[-3000:]


PLANTED = """
import sys
from pathlib import Path
import numpy as np
from cuda_emulation.emulator import Emulator
from minivit.kernels.cuda import kernel as cuda
cuda.FOLDER = Path(sys.argv[1])
runtime = Emulator(sanitize=True)
y = runtime.empty((64,), np.dtype(np.float32))
runtime.launch(cuda.Kernel("wrong", sys.argv[2], ()), cuda.Grid(1, 64, 256), (y,))
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())
@pytest.mark.parametrize("name, seen", [("fine", False), ("write", True), ("read", True), ("shared_memory", True)])
def test_an_access_out_of_bounds_is_seen(tmp_path, name, seen):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "wrong.cu").write_text("""
        #include <ptx.cuh>
        __global__ void fine(float* y) { y[threadIdx.x] = 1; }
        __global__ void write(float* y) { y[threadIdx.x + 1] = 1; }
        __global__ void read(float* y) { const float x = y[threadIdx.x + 1]; __syncthreads(); y[threadIdx.x] = x; }
        __global__ void shared_memory(float* y) {
            DYNAMIC_SHARED(memory);
            float* shared = reinterpret_cast<float*>(memory);
            shared[threadIdx.x + 16] = 1;
            y[threadIdx.x] = shared[threadIdx.x];
        }
    """)
    done = sanitized("-c", PLANTED, tmp_path, name)
    assert (done.returncode != 0) == ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == seen, done.stderr[-3000:]
