"""Linear layers in INT8 or FP8, as pairs of QuantizeLinear and DequantizeLinear in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calib.graph_index import GraphIndex, check_graph
from calib.linear_layers import LinearLayer, linear_layers
from runtime.errors import CalibrationError
from runtime.manifest import GraphSpec

FP8_OPSET = 19  # the first that has FP8, and fp16 inputs of QuantizeLinear
QUANTIZED_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
LARGEST_CODE = {"int8": 127.0, "fp8": 448.0}  # of int8 without -128, so that codes are symmetric; of float8 e4m3fn


@dataclass(frozen=True)
class QuantizedGraph:
    """What :func:`insert_qdq` made.

    Attributes:
        model: The graph.
        layers: Names of the layers that are quantized.
        left: Names of those that are not.
    """

    model: ModelProto
    layers: tuple[str, ...]
    left: tuple[str, ...]


def insert_qdq(model: ModelProto, spec: GraphSpec, ranges: Mapping[str, float], precision: str) -> QuantizedGraph:
    """Quantize the input and the weight of every linear layer that has a range.

    Symmetric, because TensorRT takes no zero point but 0. The weight has a scale for each output channel and is stored
    in its codes; the input has one scale. Sums, biases and results keep the type that they had in the graph, fp32 or
    the low type of a typed graph, which is also the type of the scales.

    Args:
        model: It is not changed.
        spec: Its entry in the manifest.
        ranges: Largest absolute value of a layer's input that a code stands for, by the layer's name.
        precision: ``int8`` or ``fp8``.

    Raises:
        CalibrationError: The graph has Q/DQ pairs already, or an operator set before FP8's.
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: The graph is not valid, before or after.
    """
    check_graph(model)
    _check_operators(model)
    index = GraphIndex(model)
    layers = linear_layers(index, spec)
    chosen = {layer.node.output[0]: layer for layer in layers if layer.name in ranges}
    quantized = _Insertion(index, precision).run(chosen, ranges)
    check_graph(quantized)
    names = dict.fromkeys(layer.name for layer in layers)
    return QuantizedGraph(
        quantized, tuple(name for name in names if name in ranges), tuple(name for name in names if name not in ranges)
    )


def _check_operators(model: ModelProto) -> None:
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise CalibrationError("the graph is quantized already. Calibrate the fp32 bundle that it was made from.")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < FP8_OPSET:
        raise CalibrationError(
            f"the graph uses ONNX operator set {opset}; quantization needs {FP8_OPSET} or later. "
            "Export the checkpoint again, with --opset 20."
        )


class _Insertion:
    """The pass at work."""

    def __init__(self, index: GraphIndex, precision: str) -> None:
        self.index, self.precision = index, precision
        self.nodes: list[NodeProto] = []
        self.stored: dict[str, TensorProto] = {}
        self.done: set[str] = set()  # tensors whose pair is there

    def run(self, chosen: Mapping[str, LinearLayer], ranges: Mapping[str, float]) -> ModelProto:
        for node in self.index.model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            if (layer := chosen.get(node.output[0])) is not None:
                dtype = self.index.initializers[layer.weight].data_type
                copy.input[0] = self._input_pair(layer, ranges[layer.name], dtype)
                copy.input[1] = self._weight(layer, dtype)
            self.nodes.append(copy)
        return self.index.with_nodes(self.nodes, self.stored.values())

    def _input_pair(self, layer: LinearLayer, largest: float, dtype: int) -> str:
        name = f"{layer.input}/{layer.name}"
        if name not in self.done:
            self.done.add(name)
            scale = self._store(f"{name}/scale", np.array(largest / LARGEST_CODE[self.precision]), dtype)
            zero = self._zero(f"{name}/zero_point", ())
            self._node("QuantizeLinear", [layer.input, scale, zero], f"{name}/codes")
            self._node("DequantizeLinear", [f"{name}/codes", scale, zero], f"{name}/dequantized")
        return f"{name}/dequantized"

    def _weight(self, layer: LinearLayer, dtype: int) -> str:
        name = layer.weight
        if name not in self.done:
            self.done.add(name)
            values = numpy_helper.to_array(self.index.initializers[name]).astype(np.float32)
            largest = np.abs(values).max(axis=0)
            scales = np.where(largest > 0, largest, 1.0) / LARGEST_CODE[self.precision]
            scale = self._store(f"{name}/scale", scales, dtype)
            exact = numpy_helper.to_array(self.stored[scale]).astype(np.float32)  # as it is stored
            codes = self._store_codes(f"{name}/codes", values / exact)
            zero = self._zero(f"{name}/zero_point", scales.shape)
            self._node("DequantizeLinear", [codes, scale, zero], f"{name}/dequantized", axis=1)
        return f"{name}/dequantized"

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], f"{operator}/{output}", **attributes))

    def _store(self, name: str, values: NDArray[np.floating], dtype: int) -> str:
        self.stored[name] = numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)
        return name

    def _store_codes(self, name: str, values: NDArray[np.floating]) -> str:
        largest = LARGEST_CODE[self.precision]
        clipped = np.clip(values, -largest, largest)
        codes = np.rint(clipped) if self.precision == "int8" else clipped
        kind = QUANTIZED_TYPES[self.precision]
        self.stored[name] = numpy_helper.from_array(codes.astype(helper.tensor_dtype_to_np_dtype(kind)), name)
        return name

    def _zero(self, name: str, shape: tuple[int, ...]) -> str:
        kind = helper.tensor_dtype_to_np_dtype(QUANTIZED_TYPES[self.precision])
        self.stored[name] = numpy_helper.from_array(np.zeros(shape, kind), name)
        return name
