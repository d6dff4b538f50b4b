"""The linear layers of a graph: what quantization is about."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from calib.graph_index import GraphIndex, module_of
from calib.ranking import ranking_nodes
from runtime.manifest import GraphSpec


@dataclass(frozen=True)
class LinearLayer:
    """One product with a stored matrix; a module that runs several times has several, all with its name.

    Attributes:
        name: Module of the network, as ``blocks.3.mlp.fc1``.
        node: The MatMul.
        input: Tensor that goes in, [..., in].
        weight: Stored tensor [in, out].
    """

    name: str
    node: NodeProto
    input: str
    weight: str


def linear_layers(index: GraphIndex, spec: GraphSpec) -> list[LinearLayer]:
    """All of them in the order of the graph, without those that decide which tokens are kept, or that read pixels.

    Pixels are 0 to 255: symmetric codes would take one of their eight bits.
    """
    ranking = ranking_nodes(index, spec)
    return [
        LinearLayer(module_of(node), node, node.input[0], node.input[1])
        for node in index.model.graph.node
        if node.output[0] not in ranking and _is_linear(node, index) and not _is_image(node.input[0], index)
    ]


def _is_linear(node: NodeProto, index: GraphIndex) -> bool:
    """A MatMul of a computed tensor with a stored matrix."""
    if node.op_type != "MatMul" or node.input[0] in index.fixed:
        return False
    weight = index.initializers.get(node.input[1])
    return weight is not None and len(weight.dims) == 2


def _is_image(tensor: str, index: GraphIndex) -> bool:
    """The graph's image, in another order or type."""
    while (node := index.producers.get(tensor)) is not None and node.op_type in ("Cast", "Reshape", "Transpose"):
        tensor = node.input[0]
    return tensor == "image"
