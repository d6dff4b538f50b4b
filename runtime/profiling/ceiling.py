"""What this machine can do at most: multiply-accumulates in one large matrix product, bytes in one large copy.

Measured, not taken from a data sheet, with the backend, the threads and the precision that are profiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError
from runtime.machine import available_cores
from runtime.openvino_core import openvino_core

SIDES = (512, 2048)  # of the matrices: the small ones stay in the caches, the large ones fill a GPU
COPY_BYTES = 128 << 20  # well above the caches of the CPUs that this runs on
_SECONDS, _TIMES = 0.5, 5  # of each measurement, at least; the best run counts


@dataclass(frozen=True)
class Ceiling:
    """The highest rates seen.

    Attributes:
        giga_macs_per_s: Multiply-accumulates of a product of two square matrices, 10^9 a second; None where the
            backend offers no way to run one.
        gigabytes_per_s: Bytes read plus bytes written by a copy in host memory, 10^9 a second; None on a GPU.
    """

    giga_macs_per_s: float | None
    gigabytes_per_s: float | None


ProductFactory = Callable[[int, int, str | None], Callable[[], object]]  # of side, threads and precision


def measure_ceiling(backend: str, threads: int = 0, precision: str | None = None) -> Ceiling:
    """Run matrix products in the backend, and a copy in numpy; about two seconds."""
    product = PRODUCTS.get(backend)
    macs = None
    if product is not None:
        macs = max(side**3 / _best(product(side, threads, precision)) / 1e9 for side in SIDES)
    if backend not in ("onnxruntime", "openvino"):
        return Ceiling(_rounded(macs), None)
    return Ceiling(_rounded(macs), _rounded(2 * COPY_BYTES / _best_copy(threads or available_cores()) / 1e9))


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _TIMES or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _best_copy(threads: int) -> float:
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    pieces = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter's lock
        return _best(lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces)))


def _matrices(side: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.random((side, side), np.float32) for name in "ab"}


def _onnxruntime(provider: str) -> ProductFactory:
    def make(side: int, threads: int, precision: str | None) -> Callable[[], object]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(_PRODUCT, options, providers=[provider])
        if provider not in session.get_providers():
            raise BackendUnavailableError(f"{provider} cannot be loaded here; see deploy.py doctor.")
        binding = session.io_binding()
        device = "cuda" if provider.startswith("CUDA") else "cpu"
        for name, value in _matrices(side).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
        binding.bind_output("c", device)
        return lambda: (session.run_with_iobinding(binding), binding.synchronize_outputs())

    return make


def _openvino(side: int, threads: int, precision: str | None) -> Callable[[], object]:
    import openvino

    core = openvino_core()
    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": {"bf16": "bf16"}.get(precision or "fp32", "f32")}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    model = core.read_model(_PRODUCT)
    model.reshape({name: [side, side] for name in "ab"})
    request = core.compile_model(model, "CPU", config).create_infer_request()
    for name, value in _matrices(side).items():
        request.set_tensor(name, openvino.Tensor(value))
    return lambda: request.infer()


PRODUCTS: dict[str, ProductFactory] = {
    "onnxruntime": _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "openvino": _openvino,
}

# MatMul of two square float32 matrices, IR version 8, opset 13, as the bytes of a serialized ONNX model
_PRODUCT = bytes.fromhex(
    "08083a5b0a110a01610a016212016322064d61744d756c1201675a150a016112100a0e0801120a0a0312016d0a0312016d5a"
    "150a016212100a0e0801120a0a0312016d0a0312016d62150a016312100a0e0801120a0a0312016d0a0312016d42040a0010"
    "0d"
)
