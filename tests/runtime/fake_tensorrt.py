"""TensorRT in the published names of one version, computing through ONNX Runtime on the memory of a fake CUDA.

:func:`fake_tensorrt` makes a module whose classes have no name that the version lacks, by ``tensorrt_api.json`` in
``tests/data``, so code that goes through it calls only what is there. A plan is JSON.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fake_cuda import FakeCuda

API = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api.json").read_text())
VERSIONS = list(API)
MAGIC = b"fake plan "
SCRATCH = 4096  # bytes for the first profile; each later one takes as much more
_TYPES = {1: "FLOAT", 2: "UINT8", 7: "INT64", 9: "BOOL", 10: "HALF"}
_NUMPY = {"FLOAT": "float32", "UINT8": "uint8", "INT64": "int64", "BOOL": "bool", "HALF": "float16"}


@lru_cache
def _session(path: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def signature_faults(module: ModuleType, surface: dict[str, Any]) -> list[str]:
    """Methods of the fake whose parameters are not those that the version publishes."""
    faults = []
    for name, published in surface["classes"].items():
        for method, function in vars(getattr(module, name, object)).items():
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            parameters = list(inspect.signature(function).parameters.values())[1:]
            own = [parameter.name for parameter in parameters]
            known = [[argument.rstrip("=") for argument in arguments] for arguments in published[method]]
            if own not in known:
                faults.append(f"{name}.{method}{tuple(own)} is published as {known}")
    return faults


def fake_tensorrt(version: str, cuda: FakeCuda) -> ModuleType:
    """The module of a version, one of :data:`VERSIONS`.

    ``module.state`` holds switches for tests: ``out_of_memory``, ``refuse`` (context methods that return False),
    ``capturable``, ``types`` (types that the inspector tells) and counters.
    """
    surface = API[version]
    package, number = version.split()
    rtx = package == "tensorrt-rtx"
    module = ModuleType(package.replace("-", "_"))
    module.__version__ = number
    state = module.state = SimpleNamespace(
        out_of_memory=False, refuse=set(), capturable=True, types=["Row major linear FP32"], builds=0, executed=0
    )
    enums = {name: enum.IntEnum(name, members, start=0) for name, members in surface["enums"].items()}

    class Strict:
        """Sets no attribute that the version does not publish."""

        def __setattr__(self, name: str, value: object) -> None:
            published = next(
                surface["classes"][base.__name__] for base in type(self).__mro__ if base.__name__ in surface["classes"]
            )
            subclass = type(self).__module__ != __name__
            if not name.startswith("_") and name not in published and not subclass:
                raise AttributeError(f"{version}: {type(self).__name__} has no {name}")
            super().__setattr__(name, value)

    class ILogger(Strict):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class IProgressMonitor(Strict):
        pass

    class IProfiler(Strict):
        pass

    class Tensor(Strict):
        def __init__(self, name, dtype, shape) -> None:
            self._all = name, enums["DataType"][dtype], shape

        name = property(lambda self: self._all[0])
        dtype = property(lambda self: self._all[1])
        shape = property(lambda self: self._all[2])
        is_shape_tensor = property(lambda self: self.name == "token_budget")

    Tensor.__name__ = "ITensor"

    class ILayer(Strict):
        def __init__(self, kind) -> None:
            self._kind = kind

        type = property(lambda self: enums["LayerType"][self._kind])

        def get_output(self, index):
            return Tensor("", "FLOAT", ())

    class INetworkDefinition(Strict):
        def __init__(self) -> None:
            self._path, self._inputs, self._outputs, self._layers = None, [], [], []

        num_inputs = property(lambda self: len(self._inputs))
        num_outputs = property(lambda self: len(self._outputs))
        num_layers = property(lambda self: len(self._layers))

        def get_input(self, index):
            return self._inputs[index]

        def get_output(self, index):
            return self._outputs[index]

        def get_layer(self, index):
            return self._layers[index]

    class OnnxParser(Strict):
        def __init__(self, network, logger) -> None:
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def parse_from_file(self, model):
            import onnx

            graph = onnx.load(model, load_external_data=False).graph
            network, one = self._network, 1
            for values, kept in ((graph.input, network._inputs), (graph.output, network._outputs)):
                for value in values:
                    kind = value.type.tensor_type
                    shape = [axis.dim_value or -one for axis in kind.shape.dim]
                    kept.append(Tensor(value.name, _TYPES[kind.elem_type], shape))
            kinds = {"MatMul": "MATRIX_MULTIPLY", "Conv": "CONVOLUTION", "Softmax": "SOFTMAX"}
            network._layers[:] = [ILayer(kinds[node.op_type]) for node in graph.node if node.op_type in kinds]
            network._path = model
            return True

        def get_error(self, index):
            return self._errors[index]

    class IOptimizationProfile(Strict):
        def __init__(self) -> None:
            self._shapes, self._values = {}, {}

        def set_shape(self, input, min, opt, max):
            self._shapes[input] = list(opt)

        def set_shape_input(self, input, min, opt, max):
            self._values[input] = list(opt)

    class ITimingCache(Strict):
        def __init__(self, data) -> None:
            self._data = data

        def serialize(self):
            return self._data or f"timings of {version}".encode()

    class IBuilderConfig(Strict):
        def __init__(self) -> None:
            self._flags, self._profiles, self._cache, self._limits = {"TF32"}, [], ITimingCache(b""), {}

        def set_flag(self, flag):
            self._flags.add(flag.name)

        def clear_flag(self, flag):
            self._flags.discard(flag.name)

        def set_memory_pool_limit(self, pool, pool_size):
            self._limits[pool.name] = pool_size

        def add_optimization_profile(self, profile):
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache, ignore_mismatch):
            fits = not cache._data or cache._data == f"timings of {version}".encode() or ignore_mismatch
            if fits:
                self._cache = cache
            return fits

        def get_timing_cache(self):
            return self._cache

        def set_compute_capability(self, compute_capability, index):
            return True

    class Builder(Strict):
        def __init__(self, logger) -> None:
            self._log = logger

        def create_network(self, flags=0):
            typed = getattr(enums["NetworkDefinitionCreationFlag"], "STRONGLY_TYPED", None)
            assert typed is None or flags == 1 << typed, "the network has to be strongly typed"
            return INetworkDefinition()

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            monitor, state.config = config.progress_monitor, config
            monitor.phase_start("Building engine", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building engine", step):
                    return None
            monitor.phase_finish("Building engine")
            if state.out_of_memory:
                self._log.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 24558500 bytes.)")
                return None
            state.builds += 1
            tensors = [[tensor.name, tensor.dtype.name, tensor.shape] for tensor in network._inputs + network._outputs]
            profiles = [[profile._shapes, profile._values] for profile in config._profiles]
            content = {"path": network._path, "version": version, "tensors": tensors, "profiles": profiles}
            content["inputs"] = len(network._inputs)
            return MAGIC + json.dumps(content).encode()

    class EngineInspector(Strict):
        def get_engine_information(self, format):
            layers = [
                {"Name": f"__myl_{index}", "LayerType": "kgen", "Metadata": f"[ONNX Layer: blocks.{index}.mlp/Gelu_1]",
                 "Outputs": [{"Name": "x", "Format/Datatype": kind}]}
                for index, kind in enumerate(state.types)
            ]  # fmt: skip
            return json.dumps({"Layers": layers})

    class IRuntimeConfig(Strict):
        def __init__(self) -> None:
            self._strategy = None

        def set_execution_context_allocation_strategy(self, strategy):
            self._strategy = strategy

    class IExecutionContext(Strict):
        def __init__(self, engine, strategy) -> None:
            assert strategy.name == "USER_MANAGED"
            self._engine, self._profile, self._shapes, self._addresses, self._scratch = engine, None, {}, {}, 0
            self.profiler = None

        def set_optimization_profile_async(self, profile_index, stream_handle):
            self._profile = self._engine._plan["profiles"][profile_index]
            self._needed = self._engine.get_device_memory_size_for_profile_v2(profile_index)
            return "set_optimization_profile_async" not in state.refuse

        def set_device_memory(self, memory, size):
            assert cuda.inside(memory, size, cuda.device)
            self._scratch = size

        def set_input_shape(self, name, shape):
            self._shapes[name] = list(shape)
            return "set_input_shape" not in state.refuse and self._profile[0].get(name, list(shape)) == list(shape)

        def set_tensor_address(self, name, memory):
            self._addresses[name] = memory
            return "set_tensor_address" not in state.refuse

        def infer_shapes(self):
            return [name for name in self._engine._inputs if name not in self._shapes or name not in self._addresses]

        def get_tensor_shape(self, name):
            batch = self._shapes["image"][0]
            return [batch if axis == -1 else axis for axis in self._engine._tensors[name][1]]

        def is_stream_capturable(self, stream):
            return state.capturable

        def execute_async_v3(self, stream_handle):
            if "execute_async_v3" in state.refuse:
                self._engine._log.log(ILogger.ERROR, "enqueueV3: Error Code 1: something is wrong inside")
                return False
            assert self._scratch >= self._needed, "too little scratch memory"
            if cuda.streams[stream_handle].recording is None:
                state.executed += 1
            on_host = {name: self._read(name).copy() for name in self._profile[1]}  # frozen from here on
            for name, allowed in self._profile[1].items():
                assert on_host[name].tolist() == allowed, "a budget that the profile does not have"
            cuda.streams[stream_handle].enqueue(lambda: self._compute(on_host))
            if self.profiler is not None:
                assert cuda.streams[stream_handle].recording is None, "a profiler waits, which cannot be recorded"
                for index in range(len(state.types)):
                    self.profiler.report_layer_time(f"__myl_{index}", 0.25 * (index + 1))
            return True

        def _read(self, name):
            dtype = np.dtype(_NUMPY[self._engine._tensors[name][0]])
            shape = self._shapes.get(name) or self.get_tensor_shape(name)
            size = int(np.prod(shape)) * dtype.itemsize
            if name not in self._profile[1]:
                assert cuda.inside(self._addresses[name], size, cuda.device), f"{name} is not on the GPU"
            memory = (ctypes.c_ubyte * size).from_address(self._addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

        def _compute(self, on_host):
            feeds = {
                name: on_host[name] if name in on_host else self._read(name).copy() for name in self._engine._inputs
            }
            outputs = [name for name in self._engine._tensors if name not in self._engine._inputs]
            for name, value in zip(outputs, _session(self._engine._plan["path"]).run(outputs, feeds), strict=True):
                self._read(name)[...] = value

    class ICudaEngine(Strict):
        def __init__(self, plan, log) -> None:
            self._plan, self._log = plan, log
            self._tensors = {name: (dtype, shape) for name, dtype, shape in plan["tensors"]}
            self._inputs = list(self._tensors)[: plan["inputs"]]

        num_io_tensors = property(lambda self: len(self._tensors))

        def get_tensor_name(self, index):
            return list(self._tensors)[index]

        def get_tensor_dtype(self, name):
            return enums["DataType"][self._tensors[name][0]]

        def get_tensor_location(self, name):
            return enums["TensorLocation"]["HOST" if name == "token_budget" else "DEVICE"]

        def get_device_memory_size_for_profile_v2(self, profile_index):
            return SCRATCH * (profile_index + 1)

        def create_engine_inspector(self):
            return EngineInspector()

        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, strategy):
            if state.out_of_memory:
                self._log.log(ILogger.ERROR, "Error Code 2: OutOfMemory")
                return None
            return IExecutionContext(self, strategy._strategy if rtx else strategy)

    class Runtime(Strict):
        def __init__(self, logger) -> None:
            self._log = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if cuda.gpu is None:
                raise AssertionError("the real library may end the process here")
            if state.out_of_memory:
                self._log.log(ILogger.ERROR, "Error Code 2: OutOfMemory")
                return None
            return ICudaEngine(json.loads(serialized_engine.removeprefix(MAGIC)), self._log)

    fakes = [ILogger, IProgressMonitor, IProfiler, Tensor, ILayer, INetworkDefinition, OnnxParser, IOptimizationProfile]
    fakes += [ITimingCache, IBuilderConfig, Builder, EngineInspector, IRuntimeConfig, IExecutionContext]
    for fake in (*fakes, ICudaEngine, Runtime):
        published = surface["classes"].get(fake.__name__)
        if published is None:
            continue
        for name in [name for name in vars(fake) if not name.startswith("_") and name not in published]:
            if not name.isupper():
                delattr(fake, name)
        setattr(module, fake.__name__, fake)
    for name, values in enums.items():
        setattr(module, name, values)
    return module
