"""fp32 graph -> typed graph in fp16 or bf16, for runtimes that take the precision from the graph alone.

TensorRT 11 has no precision flags: a tensor's type is what it is computed in. Inputs, outputs and the state stay fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calib.graph_index import GraphIndex, check_graph, module_of
from calib.ranking import ranking_nodes
from runtime.manifest import GraphSpec

LOW_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST = {"fp16": 65504.0, "bf16": float(np.finfo(np.float32).max)}

_COMPUTING = frozenset(
    {"Add", "Conv", "ConvTranspose", "Div", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Relu", "Sigmoid",
     "Softmax", "Sub", "Tanh"}
)  # fmt: skip
_MOVING = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
     "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
     "Where"}
)  # fmt: skip


@dataclass(frozen=True)
class KeepFp32:
    """What stays fp32 beyond the operators that have no low-precision form here.

    The defaults are what ``benchmarks/precision.py`` showed to matter; see docs/precision.md.

    Attributes:
        ranking: Whatever decides which tokens are kept, see :func:`calib.ranking.ranking_nodes`.
        operators: Types of ONNX operators.
        modules: Modules of the network, with everything in them, as ``patch_embed``.
    """

    ranking: bool = True
    operators: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()

    def names(self, node: NodeProto) -> bool:
        """Whether the node is kept by its type or its module."""
        module = module_of(node)
        return node.op_type in self.operators or any(
            module == name or module.startswith(f"{name}.") for name in self.modules
        )


DEFAULT_KEEP = KeepFp32()


@dataclass
class TypedGraph:
    """What :func:`to_typed_graph` made.

    Attributes:
        model: The graph.
        low: Nodes that compute in the low precision.
        fp32: Nodes that compute in fp32, by the reason.
        casts: Casts that were put in.
    """

    model: ModelProto
    low: int = 0
    fp32: dict[str, int] = field(default_factory=dict)
    casts: int = 0

    def __str__(self) -> str:
        kept = ", ".join(f"{count} {reason}" for reason, count in self.fp32.items())
        return f"{self.low} nodes in low precision, {sum(self.fp32.values())} in fp32 ({kept}), {self.casts} casts"


def to_typed_graph(model: ModelProto, spec: GraphSpec, precision: str, keep: KeepFp32 = DEFAULT_KEEP) -> TypedGraph:
    """Compute in fp16 or bf16 wherever that is allowed.

    Linear layers, convolutions, products, sums, GELU, Softmax and LayerNormalization do; what only moves values
    follows its inputs. The rest stays fp32: what ``keep`` names, sums over many values, everything made of constants
    alone (it is computed once), and nodes with a constant beyond the range of fp16. LayerNormalization keeps
    ``stash_type`` 1, so that its mean and variance are fp32.

    Args:
        model: fp32 graph; it is not changed.
        spec: Its entry in the manifest.
        precision: ``fp16`` or ``bf16``.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: The graph is not valid, before or after.
    """
    check_graph(model)
    typed = _Typing(GraphIndex(model), spec, precision, keep).run()
    check_graph(typed.model)
    return typed


class _Typing:
    """The pass at work: goes through the nodes once, in their order."""

    def __init__(self, index: GraphIndex, spec: GraphSpec, precision: str, keep: KeepFp32) -> None:
        self.index, self.keep, self.precision = index, keep, precision
        self.low_type = LOW_TYPES[precision]
        self.opset = next(entry.version for entry in index.model.opset_import if entry.domain in ("", "ai.onnx"))
        self.ranking = ranking_nodes(index, spec) if keep.ranking else set()
        self.outputs = {value.name for value in index.model.graph.output}
        self.low_tensors: set[str] = set()  # tensors that have their own name in the low type
        self.nodes: list[NodeProto] = []
        self.made: set[str] = set()  # casts and stored tensors, by the name of what they give
        self.stored: list[TensorProto] = []
        self.result = TypedGraph(ModelProto())

    def run(self) -> TypedGraph:
        for node in self.index.model.graph.node:
            if self._is_float(node):
                self._add(node)
            else:
                self.nodes.append(self._with_inputs(node, low=False))
        self.result.model = self.index.with_nodes(self.nodes, self.stored)
        return self.result

    def _is_float(self, node: NodeProto) -> bool:
        return any(self.index.type_of(name) == TensorProto.FLOAT for name in node.output)

    def _add(self, node: NodeProto) -> None:
        reason = self._reason_for_fp32(node)
        if reason:
            self.result.fp32[reason] = self.result.fp32.get(reason, 0) + 1
            self.nodes.append(self._with_inputs(node, low=False))
            return
        self.result.low += 1
        low = self._with_inputs(node, low=True)
        if node.op_type == "Cast":
            low.attribute[0].i = self.low_type
        for place, name in enumerate(node.output):
            if self.index.type_of(name) == TensorProto.FLOAT:
                self.low_tensors.add(name)
                low.output[place] = self._low_name(name)
        self.nodes.append(low)
        for name in self.outputs.intersection(node.output):
            self._cast(self._low_name(name), name, TensorProto.FLOAT)

    def _reason_for_fp32(self, node: NodeProto) -> str:
        """Why a node stays fp32; empty if it does not."""
        if all(name in self.index.fixed for name in node.input):
            return "constant"
        if node.output[0] in self.ranking:
            return "ranking"
        if self.keep.names(node):
            return "kept"
        if node.op_type == "Cast":
            exact = self.index.type_of(node.input[0]) in (TensorProto.UINT8, TensorProto.BOOL)
            return "" if exact else "converted"
        if node.op_type in _MOVING and not self._moves_low_values(node):
            return "moved"
        if node.op_type not in _COMPUTING | _MOVING:
            return "operator"
        if not self._is_defined(node):
            return "undefined"
        return "out of range" if self._has_large_constant(node) else ""

    def _is_defined(self, node: NodeProto) -> bool:
        """Whether ONNX defines the operator for the low type in the graph's opset: Conv in bf16 came with 22."""
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        kind = schema.outputs[0].type_str
        allowed = {
            item for one in schema.type_constraints if one.type_param_str == kind for item in one.allowed_type_strs
        }
        return f"tensor({'float16' if self.precision == 'fp16' else 'bfloat16'})" in allowed

    def _moves_low_values(self, node: NodeProto) -> bool:
        return any(name in self.low_tensors for name in node.input) and not self._has_large_constant(node)

    def _has_large_constant(self, node: NodeProto) -> bool:
        stored = (self.index.initializers[name] for name in node.input if name in self.index.initializers)
        values = (numpy_helper.to_array(tensor) for tensor in stored if tensor.data_type == TensorProto.FLOAT)
        return any(np.abs(array[np.isfinite(array)]).max(initial=0.0) > _LARGEST[self.precision] for array in values)

    def _with_inputs(self, node: NodeProto, *, low: bool) -> NodeProto:
        """A copy of the node that reads its floating-point inputs in fp32, or in the low type."""
        copy = NodeProto()
        copy.CopyFrom(node)
        for place, name in enumerate(node.input):
            if self.index.type_of(name) == TensorProto.FLOAT:
                copy.input[place] = self._as_low(name) if low else self._as_fp32(name)
        return copy

    def _as_low(self, name: str) -> str:
        if name in self.low_tensors:
            return self._low_name(name)
        if name in self.index.initializers:
            return self._store(name)
        return self._cast(name, self._low_name(name), self.low_type)

    def _as_fp32(self, name: str) -> str:
        if name not in self.low_tensors or name in self.outputs:
            return name
        return self._cast(self._low_name(name), name, TensorProto.FLOAT)

    def _low_name(self, name: str) -> str:
        return f"{name}/{self.precision}"

    def _cast(self, source: str, target: str, to: int) -> str:
        if target not in self.made:
            self.made.add(target)
            self.nodes.append(helper.make_node("Cast", [source], [target], f"cast/{target}", to=to))
            self.result.casts += 1
        return target

    def _store(self, name: str) -> str:
        target = self._low_name(name)
        if target not in self.made:
            self.made.add(target)
            values = numpy_helper.to_array(self.index.initializers[name])
            self.stored.append(numpy_helper.from_array(values.astype(low_dtype(self.precision)), target))
        return target


def low_dtype(precision: str) -> np.dtype[np.generic]:
    """The numpy type of ``fp16`` or ``bf16``."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(LOW_TYPES[precision]))


def rounded_graph(model: ModelProto) -> ModelProto:
    """A typed graph in fp32 operators, each result rounded to the type that it has there.

    This is how a graph in fp16 or bf16 is tried on a CPU. ONNX Runtime's CPU provider has hardly an operator for
    either: it computes a graph in fp16 in fp32, without rounding in between, and refuses one in bf16.
    """
    index = GraphIndex(model)
    low_types = set(LOW_TYPES.values())
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        kinds = {name: index.type_of(name) for name in node.output}
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Cast" and copy.attribute[0].i in low_types:
            copy.attribute[0].i = TensorProto.FLOAT
        nodes.append(copy)
        for place, (name, kind) in enumerate(kinds.items()):
            if kind in low_types:
                copy.output[place] = f"{name}/exact"
                low = helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], f"round/{name}", to=kind)
                back = helper.make_node("Cast", [f"{name}/rounded"], [name], f"widen/{name}", to=TensorProto.FLOAT)
                nodes.extend([low, back])
    rounded = index.with_nodes(nodes, [])
    stored = [_in_fp32(tensor) for tensor in rounded.graph.initializer]
    del rounded.graph.initializer[:]
    rounded.graph.initializer.extend(stored)
    check_graph(rounded)
    return rounded


def _in_fp32(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in LOW_TYPES.values():
        return tensor
    values: NDArray[np.float32] = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(values, tensor.name)
