"""ONNX Runtime and OpenVINO as contenders in inference: PyTorch's model, exported to ONNX in a process of its own, without its memory.

(OpenVINO is as fast from ONNX as from what it converts itself.) In int8, products are quantised by ONNX Runtime: weights by output
channels, activations as they come, by tensors; in 7 bits, since an instruction that it uses on CPUs without VNNI saturates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .sides import Side
from .worker import Problem, Worker

EXPORTER = Side("PyTorch", "float32")
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class Contender:
    def __init__(self, problem: Problem, side: Side) -> None:
        self.problem, threads = problem, int(os.environ["OMP_NUM_THREADS"])
        parts = threads if "streams" in side.words else 1
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with Worker(EXPORTER, replace(problem, batch=problem.batch // parts), threads) as exporter:
                exporter.call("export", str(path))
            if side.precision == "int8":
                quantise(path)
            self.run = LIBRARIES[side.library](path, side.precision, threads, parts)

    def infer(self) -> np.ndarray:
        return self.run(self.problem.images)


def quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(path), str(path))
    quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def onnx_runtime(path: Path, precision: str, threads: int, parts: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino(path: Path, precision: str, threads: int, parts: int) -> Callable[[np.ndarray], np.ndarray]:
    """parts: that a batch is computed in at once, by a stream of threads each."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(path),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "NUM_STREAMS": parts,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    requests = [compiled.create_infer_request() for _ in range(parts)]

    def run(images: np.ndarray) -> np.ndarray:
        for request, part in zip(requests, np.split(images, parts)):
            request.start_async({0: part}, share_inputs=True)
        for request in requests:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request in requests])

    return run


LIBRARIES = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}
