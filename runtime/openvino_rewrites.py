"""What OpenVINO leaves to us: fp32 amid bf16, a fixed budget, and keys that move as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

Node = Any  # openvino.Node has no stubs

BUDGET = "token_budget"  # the input
_VALUES = ("Parameter", "Constant")
_MOVES = ("Concat", "Gather", "Reshape", "Transpose", "Unsqueeze")
_KEYS_ORDER = [0, 2, 3, 1]  # [B, N, heads, d] -> [B, heads, d, N]
_SOURCES = ("MatMul", *_VALUES)  # where rounding has happened, or cannot
# One operator with the attribute that keeps it in its own precision; Python can copy the attribute but not make it.
_PRECISE_RELU = """
<net name="precise" version="11">
  <layers>
    <layer id="0" name="x" type="Parameter" version="opset1">
      <data shape="1" element_type="f32"/>
      <output><port id="0" precision="FP32"><dim>1</dim></port></output>
    </layer>
    <layer id="1" name="y" type="ReLU" version="opset1">
      <rt_info><attribute name="precise" version="0"/></rt_info>
      <input><port id="0" precision="FP32"><dim>1</dim></port></input>
      <output><port id="1" precision="FP32"><dim>1</dim></port></output>
    </layer>
    <layer id="2" name="z" type="Result" version="opset1">
      <input><port id="0" precision="FP32"><dim>1</dim></port></input>
    </layer>
  </layers>
  <edges>
    <edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
    <edge from-layer="1" from-port="1" to-layer="2" to-port="0"/>
  </edges>
</net>
"""


def keep_fp32(core: ov.Core, model: ov.Model) -> int:
    """Mark what is not to be computed in bf16, for a model that otherwise is.

    Map-SM's product, the scores and what ranks them; and where a map is sampled: a place is a number in [-1, 1] that
    bf16 rounds to an eighth of a cell of a map of 60. OpenVINO still rounds the score of a token of the frame before,
    the difference of its two logits: it takes no heed of the mark there.

    Returns:
        How many operators were marked.
    """
    marked: dict[str, Node] = {}
    for best in filter(_is_arg_max, model.get_ops()):
        products = _spread(marked, [best.input_value(0).get_node()], _producers, _SOURCES)
        for product in (_with_transpose_inside(node) for node in products if node.get_type_name() == "MatMul"):
            _mark(marked, [product, *(mover for factor in _producers(product) for mover in _movers(factor))])
        ranking: dict[str, Node] = {}  # from the place to the first stage's TopK
        _spread(ranking, _consumers(best), _consumers, ("TopK",))
        _mark(marked, ranking.values())
        for node in ranking.values():
            _spread(marked, _producers(node), _producers, _SOURCES)
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            _spread(marked, [node], _producers, _SOURCES)
        if node.get_type_name() == "GridSample":
            _spread(marked, [node.input_value(1).get_node()], _producers, _SOURCES)
            _spread(marked, [node], _consumers, _SOURCES)
    precise = _precise(core)
    for node in marked.values():
        for name, value in precise.items():
            node.set_rt_info(value, name)
    return len(marked)


def fix_budget(model: ov.Model, budget: tuple[int, ...]) -> None:
    """Put the token counts into the graph in place of its input ``token_budget``, so that all shapes are known."""
    from openvino import opset13 as ops

    parameter = next(node for node in model.get_parameters() if node.get_friendly_name() == BUDGET)
    parameter.output(0).replace(ops.constant(np.array(budget, np.int64)).output(0))
    model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def move_keys_as_rows(model: ov.Model) -> int:
    """Bring the keys of an attention [B, N, heads, d] into the product's order in two steps instead of one.

    The first, [B, heads, N, d], moves rows of d values; the second OpenVINO's attention kernel does as it reads. In one
    step an operator before it moves value by value.

    Returns:
        How many products read keys in that way.
    """
    from openvino import opset13 as ops

    rewritten = 0
    for product in [node for node in model.get_ops() if node.get_type_name() == "MatMul"]:
        keys = product.input_value(1).get_node()
        if keys.get_type_name() != "Transpose" or keys.input_value(1).get_node().get_data().tolist() != _KEYS_ORDER:
            continue
        rows = ops.transpose(keys.input_value(0), np.array([0, 2, 1, 3]), name=f"{keys.get_friendly_name()}/rows")
        columns = ops.transpose(rows, np.array([0, 1, 3, 2]), name=keys.get_friendly_name())
        product.input(1).replace_source_output(columns.output(0))
        rewritten += 1
    return rewritten


def _spread(
    found: dict[str, Node], start: Iterable[Node], onward: Callable[[Node], list[Node]], stop: tuple[str, ...]
) -> list[Node]:
    """Add to ``found`` what can be reached from ``start`` without passing an operator of the types ``stop``.

    Returns:
        The operators where that ended.
    """
    waiting, ends = list(start), []
    while waiting:
        node = waiting.pop()
        if node.get_type_name() in (*stop, "Result"):
            ends.append(node)
        elif node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            waiting += onward(node)
    return ends


def _mark(marked: dict[str, Node], nodes: Iterable[Node]) -> None:
    marked |= {node.get_friendly_name(): node for node in nodes if node.get_type_name() not in _VALUES}


def _with_transpose_inside(product: Node) -> Node:
    """The MatMul with the transposition of its second factor as an attribute, which OpenVINO's passes would make."""
    from openvino import opset13 as ops

    second = product.input_value(1).get_node()
    if second.get_type_name() != "Transpose" or any(product.get_attributes().values()):
        return product
    joined = ops.matmul(product.input_value(0), second.input_value(0), False, True)
    product.output(0).replace(joined.output(0))
    return joined


def _producers(node: Node) -> list[Node]:
    return [value.get_node() for value in node.input_values()]


def _consumers(node: Node) -> list[Node]:
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]


def _movers(node: Node) -> list[Node]:
    """The operator and those before it, as far as they only move values."""
    if node.get_type_name() not in _MOVES:
        return []
    return [node, *(mover for producer in _producers(node) for mover in _movers(producer))]


def _is_arg_max(node: Node) -> bool:
    """A TopK of one whose value nobody reads."""
    if node.get_type_name() != "TopK" or node.output(0).get_target_inputs():
        return False
    count, mode = node.input_value(1).get_node(), node.get_attributes()["mode"]
    return mode == "max" and count.get_type_name() == "Constant" and int(count.get_data().item()) == 1


@lru_cache(maxsize=1)
def _precise(core: ov.Core) -> Any:
    """The attribute that keeps an operator out of bf16, by its name."""
    model = core.read_model(_PRECISE_RELU.encode(), b"")
    return next(op for op in model.get_ops() if op.get_type_name() == "Relu").get_rt_info()
