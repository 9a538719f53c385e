"""Which of cuBLASLt's algorithms a product takes, with the emulated cuBLASLt: its algorithms take times of their own, and some fail."""

import ctypes
import hashlib
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_emulation import emulator
from cuda_emulation.emulator import Emulator
from small_models import MODELS, batches, nano

from minivit import Trainer
from minivit.errors import DeviceError
from minivit.kernels.core import arrays, cache, devices
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cuda import choices
from minivit.kernels.cuda.choices import Choices
from minivit.kernels.cuda.compiled import keep
from minivit.kernels.cuda.cublaslt import CublasLt
from minivit.kernels.cuda.cupy_runtime import CupyRuntime
from minivit.kernels.cuda.gemm import gemm
from minivit.kernels.cuda.product import WORKSPACE, Product, ranked

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())
ALL = range(12)  # algorithms of the emulated cuBLASLt
FIRST, FAILING, UNORDERED, ROUNDING, FASTEST, BEYOND = 0, 2, 3, 5, 10, 11  # of a product in bfloat16
M, N, K = 16, 24, 8
rng = np.random.default_rng(0)
A, B, C = (rng.standard_normal(shape).astype(np.float32).astype(BFLOAT16) for shape in ((M, K), (K, N), (M, N)))


class Library:
    """The emulated cuBLASLt, and what it counts."""

    def __init__(self):
        self.functions = ctypes.CDLL(str(emulator.cublaslt_path()))
        self.reset()

    def reset(self):
        self.functions.emulated_reset()

    def set(self, number, seconds=1e-6, status=0, check=0):
        self.functions.emulated_set(number, ctypes.c_double(seconds), status, check)

    asked = property(lambda self: self.functions.emulated_asked())
    checked = property(lambda self: self.functions.emulated_checked())

    def runs(self):
        return {number: runs for number in ALL if (runs := self.functions.emulated_runs(number))}


@pytest.fixture
def library(tmp_path, monkeypatch):
    known = Library()  # built before the cache is elsewhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "PATIENCE", 1e9)  # a machine that stands still changes nothing
    monkeypatch.setattr(choices, "IN_ALL", 1e9)
    cache.say_once.cache_clear()
    yield known
    known.reset()


def multiply(runtime, dtype=BFLOAT16, running=False):
    """A·B, or with `running` A·B added to C in place, on the GPU."""
    with devices.using(runtime):
        a, b, c = (arrays.array_on("cuda", m) for m in (A, B, C.astype(dtype)))
        gemm(c, a, b, running=c if running else None)
        return arrays.to_numpy(c)


def algorithm_of(library, runtime, **options):
    """The algorithm that a product takes: the one that runs when it is computed again."""
    multiply(runtime, **options)
    before = library.runs()
    multiply(runtime, **options)
    (taken,) = {number for number, runs in library.runs().items() if runs > before.get(number, 0)}
    return taken


def kept_files(tmp_path):
    return list(tmp_path.rglob("*.algorithm"))


def test_the_fastest_of_eight_is_taken_and_those_that_fail_are_not(library, tmp_path):
    runtime = Emulator(choose=True)
    assert algorithm_of(library, runtime) == FASTEST
    assert library.asked == 1 and set(library.runs()) == {0, 4, 7, 8, 9, 10} and len(kept_files(tmp_path)) == 1
    np.testing.assert_array_equal(multiply(runtime), multiply(Emulator()))


def test_a_slightly_faster_one_is_not_taken_instead_of_an_earlier_one(library):
    for number in ALL:
        library.set(number, 1e-6 if number == FIRST else 0.99e-6)
    assert algorithm_of(library, Emulator(choose=True)) == FIRST


def test_parts_of_a_sum_are_added_in_order_and_not_rounded(library):
    runtime = Emulator(choose=True)
    assert algorithm_of(library, runtime, dtype=np.float32) == ROUNDING  # which rounds nothing if the result is in float32
    algorithm_of(library, runtime)
    assert UNORDERED not in library.runs()


def test_a_choice_is_kept_and_read_without_timing(library):
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST
    library.reset()
    library.set(FIRST, 1e-9)  # which is faster now
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST
    assert library.asked == 0 and library.checked == 1 and library.runs() == {FASTEST: 2}
    library.reset()
    other = Emulator(choose=True)
    other.name = "another GPU"
    library.set(FIRST, 1e-9)
    assert algorithm_of(library, other) == FIRST


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "changed": lambda content: content[:-1] + b"\xff",
    "of another product": lambda content: content.replace(b"Product(", b"Another("),
    "no algorithm": lambda content: b"\n".join((content.split(b"\n")[0], hashlib.sha256(bytes(64)).hexdigest().encode(), bytes(64))),
    "too short": lambda content: b"\n".join((content.split(b"\n")[0], hashlib.sha256(b"x").hexdigest().encode(), b"x")),
    "no text": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(library, tmp_path, damage):
    multiply(Emulator(choose=True))
    (file,) = kept_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    library.reset()
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST
    assert library.asked == 1 and file.read_bytes() == whole


def test_a_kept_algorithm_that_cublaslt_refuses_is_replaced(library):
    multiply(Emulator(choose=True))
    library.reset()
    library.set(FASTEST, status=15, check=15)
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST - 1
    library.reset()
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST - 1 and library.asked == 0


def test_nothing_is_timed_while_launches_are_captured(library):
    runtime = Emulator(choose=True)
    runtime.in_capture = True
    multiply(runtime)
    assert library.runs() == {FIRST: 1}
    runtime.in_capture = False
    for later in (runtime, Emulator(choose=True)):  # another one would change bits
        assert algorithm_of(library, later) == FIRST


@pytest.mark.parametrize("running", [False, True])
def test_timing_leaves_the_result_right(library, running):
    expected = multiply(Emulator(), running=running)
    np.testing.assert_array_equal(multiply(Emulator(choose=True), running=running), expected)
    assert len(library.runs()) > 2


def test_what_is_prepared_changes_nothing_before_it_runs(library):
    for choose in (False, True):
        with devices.using(Emulator(choose=choose)) as runtime:
            a, b, c = (arrays.array_on("cuda", m) for m in (A, B, C))
            workspace = arrays.empty((WORKSPACE,), np.uint8, "cuda")
            graph = runtime.prepare([(Product(1, M, N, K, 0, 0, False, False), None, (c, a, b, None, c, workspace))])
            assert sum(library.runs().values()) > 0
            np.testing.assert_array_equal(arrays.to_numpy(c), C)
            graph.run()
            np.testing.assert_array_equal(arrays.to_numpy(c), multiply(Emulator(), running=True))


def test_training_has_the_same_losses_with_chosen_algorithms(library):
    losses = []
    for choose in (False, True):
        with devices.using(Emulator(choose=choose)):
            trainer = Trainer(nano("vit", seed=3, **MODELS["vit"]), device="cuda", precision="bfloat16", accumulate=2)
            losses.append([trainer.step(*batch) for batch in batches(2, 4)])
    assert losses[0] == losses[1] and FASTEST in library.runs()


def test_without_time_the_first_that_runs_is_taken_and_kept(library, monkeypatch):
    library.set(FIRST, status=15)
    monkeypatch.setattr(choices, "IN_ALL", 0.0)
    assert algorithm_of(library, Emulator(choose=True)) == 4
    monkeypatch.setattr(choices, "IN_ALL", 1e9)
    assert algorithm_of(library, Emulator(choose=True)) == 4
    monkeypatch.setattr(choices, "PATIENCE", 0.0)
    assert algorithm_of(library, Emulator(choose=True), dtype=np.float32) == 4 and 7 not in library.runs()


def test_a_product_that_no_algorithm_runs_is_an_error(library):
    for number in ALL:
        library.set(number, status=13)
    with pytest.raises(DeviceError, match="cublasLtMatmul failed: a kernel failed"):
        multiply(Emulator(choose=True))


def test_choosing_can_be_turned_off(library, tmp_path):
    with ranked(0):
        assert algorithm_of(library, Emulator(choose=True)) == FIRST
    assert library.runs() == {FIRST: 2} and not kept_files(tmp_path)
    with ranked(7):  # the last of the eight, two of which do not run
        assert algorithm_of(library, Emulator(choose=True)) == FASTEST


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are no copies here")
def test_processes_that_choose_at_the_same_time_take_the_same(library, tmp_path, monkeypatch):
    copies = multiprocessing.get_context("fork")
    together, chosen, found = copies.Barrier(3), Choices._chosen, copies.Queue()

    def and_wait(self, *arguments):
        algorithm = chosen(self, *arguments)
        together.wait(60)
        return algorithm

    monkeypatch.setattr(Choices, "_chosen", and_wait)

    def choose(fastest):
        library.set(fastest, 1e-9)
        found.put(algorithm_of(library, Emulator(choose=True)))

    processes = [copies.Process(target=choose, args=(number,)) for number in (0, 4, 7)]
    for process in processes:
        process.start()
    taken = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(taken) == 1 and taken == {algorithm_of(library, Emulator(choose=True))} and len(kept_files(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no mode here")
def test_choices_that_others_may_have_written_are_not_read(library, tmp_path, capfd):
    multiply(Emulator(choose=True))
    (file,) = kept_files(tmp_path)
    keep(file, (file.read_bytes().split(b"\n")[0].decode(), bytes(64)))
    file.parent.chmod(0o777)
    library.reset()
    assert algorithm_of(library, Emulator(choose=True)) == FASTEST and library.checked == 0
    assert "algorithms of products are chosen for this process alone" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_costs_one_line(library, tmp_path, capfd):
    (tmp_path / "minivit").write_text("")
    for dtype in (BFLOAT16, np.float32):
        multiply(Emulator(choose=True), dtype=dtype)
    assert capfd.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- with a CuPy of clocks
class Gpu:
    """A CuPy whose kernels are the emulated cuBLASLt's: captured ones take their time when their graph is launched."""

    class Array:
        def __init__(self, values):
            self.values, self.shape, self.dtype, self.nbytes = values, values.shape, values.dtype, values.nbytes
            self.data = SimpleNamespace(ptr=values.ctypes.data)

    def __init__(self, library):
        self.library, self.now, self.capturing_since, self.graphs = library, 0.0, None, []
        library.functions.emulated_clock.restype = ctypes.c_double
        runtime = SimpleNamespace(CUDARuntimeError=ZeroDivisionError)
        memory = SimpleNamespace(OutOfMemoryError=MemoryError)
        self.cuda = SimpleNamespace(Event=lambda: Gpu.Event(self), runtime=runtime, memory=memory)
        self.cuda.get_elapsed_time = lambda before, after: 1000 * (after.at - before.at)
        self.ptr = 0

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self, stream):
            self.at = self.gpu.now

    def empty(self, shape, dtype):
        return Gpu.Array(np.full(shape, 0xFF, dtype))

    __enter__ = __exit__ = lambda self, *exception: None

    def begin_capture(self):
        assert not self.is_capturing()
        self.capturing_since = self.library.functions.emulated_clock(), self.library.runs(), self.library.asked

    def end_capture(self):
        (start, runs, asked), self.capturing_since = self.capturing_since, None
        assert self.library.asked == asked, "the heuristic is asked before the capture"
        seconds = self.library.functions.emulated_clock() - start
        captured = {n: m - runs.get(n, 0) for n, m in self.library.runs().items() if m > runs.get(n, 0)}
        self.graphs.append(captured)
        return SimpleNamespace(launch=lambda stream: setattr(self, "now", self.now + seconds))

    def is_capturing(self):
        return self.capturing_since is not None

    def synchronize(self):
        pass


def test_a_step_is_captured_after_its_choices_on_a_stream_that_queues(library):
    gpu = Gpu(library)
    runtime = CupyRuntime.__new__(CupyRuntime)
    runtime._cupy, runtime.stream, runtime.architecture, runtime.name, runtime._functions = gpu, gpu, "sm_90", "a GPU", {}
    runtime._blas = CublasLt(str(emulator.cublaslt_path()), runtime)
    a, b, c = (Gpu.Array(m.copy()) for m in (A, B, C))
    workspace = Gpu.Array(np.zeros(WORKSPACE, np.uint8))
    call = Product(1, M, N, K, 0, 0, False, False), None, (c, a, b, None, c, workspace)
    with devices.using(runtime):
        runtime.prepare([call] * 3)
    *timed, step = gpu.graphs
    assert step == {FASTEST: 3} and len(timed) == 12 and all(len(graph) == 1 for graph in timed)
    assert {number for graph in timed for number in graph} == {0, 4, 7, 8, 9, 10}
