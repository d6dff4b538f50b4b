"""An ONNX graph that can be asked who makes a tensor, what it holds and which module of the network it is part of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto


class GraphIndex:
    """What passes ask of a graph.

    Attributes:
        model: The graph; an index is not updated when it changes.
        producers: The node that makes each tensor.
        initializers: The stored tensors by name.
        fixed: Tensors that do not depend on any input, the stored ones included.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.producers = {name: node for node in graph.node for name in node.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.fixed = set(self.initializers) | {""}
        for node in graph.node:
            if node.input and all(name in self.fixed for name in node.input):
                self.fixed.update(node.output)
        typed = onnx.shape_inference.infer_shapes(model)
        values = (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {name: tensor.data_type for name, tensor in self.initializers.items()}

    def type_of(self, tensor: str) -> int:
        """``TensorProto.DataType`` of a tensor."""
        return self._types.get(tensor, TensorProto.UNDEFINED)

    def with_nodes(self, nodes: Sequence[NodeProto], stored: Iterable[TensorProto]) -> ModelProto:
        """A copy of the graph with other nodes.

        Args:
            stored: Tensors that the nodes read beside those of the graph; of both, only what is read stays.
        """
        model = ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        graph.initializer.extend(tensor for tensor in (*self.initializers.values(), *stored) if tensor.name in read)
        return model


def module_of(node: NodeProto) -> str:
    """The innermost module of the network that a node came from, as ``blocks.3.mlp.fc1``; its own name if unknown.

    Exported nodes are named ``MODULE/OPERATION``, see :mod:`export.node_names`.
    """
    return node.name.rpartition("/")[0] or node.name


def check_graph(model: ModelProto) -> None:
    """What every pass does before and after: onnx's checker, and shape inference that finds every contradiction.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: The graph is not valid.
    """
    onnx.checker.check_model(model)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
