"""Which nodes decide: what is looked at, and whether a state is fit. They stay fp32, and are never quantized."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from calib.graph_index import GraphIndex
from runtime.manifest import GraphSpec

_DECIDING = {"TopK": 0, "ArgMax": 0, "NonZero": 0, "GridSample": 1}  # with the input that decides
_FOLLOWED = (TensorProto.FLOAT, TensorProto.BOOL)


def ranking_nodes(index: GraphIndex, spec: GraphSpec) -> set[str]:
    """First outputs of the nodes that scores are made of, up to TopK, ArgMax and NonZero, and places, up to GridSample.

    So are those of the test whether the state is finite: its sums over all tokens go beyond the range of fp16.

    A place is a number in [-1, 1]: bf16 rounds it to an eighth of a cell of a map of 60. The way back ends, inclusive,
    at the LayerNormalization with which a predictor reads the tokens, at a product of two computed tensors, which
    Map-SM's is, and at a sum. Where it meets a state input, it goes on at the output of the frame before, because
    Map-SM's scores are the keep logits of that frame.
    """
    carried = {pair.input: pair.output for pair in spec.carried}
    found: set[str] = set()
    waiting = [node.input[_DECIDING[node.op_type]] for node in index.model.graph.node if node.op_type in _DECIDING]
    waiting.append("state_ok")
    while waiting:
        tensor = waiting.pop()
        if tensor in carried:
            waiting.append(carried[tensor] or "")
        node = index.producers.get(tensor)
        if node is None or node.output[0] in found or tensor in index.fixed:
            continue
        found.add(node.output[0])
        if not _ends(node, index):
            waiting += [name for name in node.input if index.type_of(name) in _FOLLOWED]
    return found


def _ends(node: NodeProto, index: GraphIndex) -> bool:
    return node.op_type in ("LayerNormalization", "ReduceSum") or (
        node.op_type == "MatMul" and not any(name in index.fixed for name in node.input)
    )
