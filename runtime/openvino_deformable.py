"""Deformable attention as one operator in OpenVINO, which has none."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as opset13
from numpy.typing import NDArray

from runtime.deformable_kernel import compiled_kernel, deformable_attention, has_numba, workers
from runtime.openvino_rewrites import DEFORMABLE_ATTENTION

Node = Any  # openvino.Node has no stubs

logger = logging.getLogger(__name__)

_POINTS_FIRST = [3, 0, 2, 4, 1, 5]  # [B, q, heads, levels, points, 2] -> [levels, B, heads, points, q, 2]
_PLANES = [0, 2, 1]
_PLAIN = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}


class MultiScaleDeformableAttention(ov.Op):  # type: ignore[misc]  # it has no stubs
    """Offsets, logits, values and origins to sums, see :func:`runtime.deformable_kernel.deformable_attention`.

    Args:
        inputs: The four, fp32.
        sizes: Height and width of each map, [levels, 2].
        threads: That share the queries.
        failures: What goes wrong is left here: OpenVINO does not say so, it ends the run and leaves the results before.
    """

    class_type_info = ov.DiscreteTypeInfo(DEFORMABLE_ATTENTION, "extension")

    def __init__(self, inputs: list[Any], sizes: NDArray[np.int64], threads: int, failures: list[Exception]) -> None:
        super().__init__(self)
        self.sizes, self.threads, self.failures = sizes, threads, failures
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        """Say that the result is [B, q, C]."""
        offsets, values = self.get_input_partial_shape(0), self.get_input_partial_shape(2)
        self.set_output_type(0, ov.Type.f32, ov.PartialShape([offsets[0], offsets[1], values[2]]))

    def clone_with_new_inputs(self, new_inputs: list[Any]) -> MultiScaleDeformableAttention:
        """The same on other inputs."""
        return MultiScaleDeformableAttention(new_inputs, self.sizes, self.threads, self.failures)

    def get_type_info(self) -> ov.DiscreteTypeInfo:
        """Name of the operator."""
        return self.class_type_info

    def visit_attributes(self, visitor: Any) -> bool:
        """Nothing that a file would hold: the operator never leaves this process."""
        return True

    def has_evaluate(self) -> bool:
        """True: the plugin for CPUs runs :meth:`evaluate`."""
        return True

    def evaluate(self, outputs: list[ov.Tensor], inputs: list[ov.Tensor]) -> bool:
        """Compute the result in place; False if that failed."""
        try:
            offsets, logits, values, origins = (tensor.data for tensor in inputs)
            deformable_attention(offsets, logits, values, origins, self.sizes, outputs[0].data, self.threads)
        except Exception as error:
            self.failures.append(error)
            return False
        return True


def join_deformable_attention(model: ov.Model, threads: int, failures: list[Exception]) -> int:
    """Put one operator in the place of each deformable attention's softmax, reading and summing.

    OpenVINO's GridSample wants its maps as planes, takes 1.2 ns for each channel of each place and writes all that it
    read: with what is done around it 570 of 1230 ms of the published Tiny network in bf16 on one thread. The operator
    takes 110.

    Args:
        threads: Of one step.
        failures: What goes wrong in a step is added; see there after each.

    Returns:
        How many there were; 0 without numba, which is said if there are some.
    """
    nodes = model.get_ops()  # kept, so that what is cut off lives until the end
    ends: dict[str, list[Node]] = {}  # readings, by the transposition that their sum goes through
    for node in nodes:
        if node.get_type_name() == "GridSample" and (end := _down(node, "Transpose")) is not None:
            ends.setdefault(end.get_friendly_name(), []).append(node)
    found = [(node, ends[node.get_friendly_name()]) for node in nodes if node.get_friendly_name() in ends]
    if found and not has_numba():
        _say_that_numba_is_missing()
        return 0
    return sum(_join(end, readings, threads, failures) for end, readings in found)


def _join(end: Node, readings: Iterable[Node], threads: int, failures: list[Exception]) -> bool:
    """Replace one, if it is what :class:`models.vpp_rovis.deformable.DeformableAttention` exports."""
    inputs, sizes = [], {}
    for reading in readings:
        level, planes = _source(reading.input_value(0), "VariadicSplit"), _source(reading.input_value(0), "Transpose")
        place, product = _source(reading.input_value(1), "Add"), _down(reading, "Multiply")
        turned = place and _source(place.get_node().input_value(0), "Transpose")
        offsets = turned and _source(turned.get_node().input_value(0), "VariadicSplit")
        weights = product and _source(product.input_value(1), "Softmax")
        if not (level and planes and place and turned and offsets and weights):
            return False
        if _order(planes) != _PLANES or _order(turned) != _POINTS_FIRST:
            return False
        if any(reading.get_attributes()[name] != value for name, value in _PLAIN.items()):
            return False
        picture = list(reading.get_input_partial_shape(0))  # [B * heads, channels, height, width]
        sizes[level.get_index()] = [size.get_length() for size in picture[2:]]
        logits, tokens = weights.get_node().input_value(0), planes.get_node().input_value(0)
        inputs = [offsets, logits, tokens, place.get_node().input_value(1)]
    maps = np.array([sizes[level] for level in sorted(sizes)], np.int64)
    heads, places = (size.get_length() for size in list(inputs[1].get_partial_shape())[2:])
    cells, channels = (size.get_length() for size in list(inputs[2].get_partial_shape())[1:])
    offset_count = inputs[0].get_partial_shape()[2].get_length()
    if maps.prod(1).sum() != cells or offset_count != 2 * heads * places or places % len(maps) or channels % heads:
        return False
    compiled_kernel(channels // heads)  # now, not in the first frame
    workers(threads)  # from here, not from a thread that OpenVINO has bound to one core
    joined = MultiScaleDeformableAttention([_as(value, ov.Type.f32) for value in inputs], maps, threads, failures)
    joined.set_friendly_name(end.get_friendly_name())
    end.output(0).replace(_as(joined.output(0), end.get_output_element_type(0)))
    return True


def _as(value: Any, kind: ov.Type) -> Any:
    """An output of a node in another type, if it has not that one: graphs in fp16, bf16 or INT8 name theirs."""
    return value if value.get_element_type() == kind else opset13.convert(value, kind.to_string()).output(0)


@cache
def _say_that_numba_is_missing() -> None:
    logger.warning(
        "numba is not installed, so OpenVINO computes deformable attention through GridSample, which takes a third "
        "more time for the whole network. Install it: pip install '.[openvino]'"
    )


def _order(turned: Any) -> list[int]:
    return [int(axis) for axis in turned.get_node().input_value(1).get_node().get_data()]


def _source(value: Any, kind: str) -> Any | None:
    """The nearest result of an operator of a kind that a value is made of, along first inputs."""
    while value.get_node().get_type_name() != kind:
        if not value.get_node().get_input_size():
            return None
        value = value.get_node().input_value(0)
    return value


def _down(node: Node, kind: str) -> Node | None:
    """The nearest operator of a kind after a node, along its first readers."""
    while node.get_type_name() != kind:
        targets = list(node.output(0).get_target_inputs()) if node.get_output_size() else []
        if not targets:
            return None
        node = targets[0].get_node()
    return node
