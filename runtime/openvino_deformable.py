"""Deformable attention as one operator in OpenVINO, which has none."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
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
    """

    class_type_info = ov.DiscreteTypeInfo(DEFORMABLE_ATTENTION, "extension")

    def __init__(self, inputs: list[Any], sizes: NDArray[np.int64], threads: int) -> None:
        super().__init__(self)
        self.sizes, self.threads = sizes, threads
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        """Say that the result is [B, q, C]."""
        offsets, values = self.get_input_partial_shape(0), self.get_input_partial_shape(2)
        self.set_output_type(0, ov.Type.f32, ov.PartialShape([offsets[0], offsets[1], values[2]]))

    def clone_with_new_inputs(self, new_inputs: list[Any]) -> MultiScaleDeformableAttention:
        """The same on other inputs."""
        return MultiScaleDeformableAttention(new_inputs, self.sizes, self.threads)

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
        """Compute the result in place."""
        offsets, logits, values, origins = (tensor.data for tensor in inputs)
        deformable_attention(offsets, logits, values, origins, self.sizes, outputs[0].data, self.threads)
        return True


def join_deformable_attention(model: ov.Model, threads: int) -> int:
    """Put one operator in the place of each deformable attention's softmax, reading and summing.

    OpenVINO's GridSample wants its maps as planes, takes 1.2 ns for each channel of each place and writes all that it
    read: with what is done around it 570 of 1230 ms of the published Tiny network in bf16 on one thread. The operator
    takes 110.

    Args:
        threads: Of one step.

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
    return sum(_join(end, readings, threads) for end, readings in found)


def _join(end: Node, readings: Iterable[Node], threads: int) -> bool:
    """Replace one, if it is what :class:`models.vpp_rovis.deformable.DeformableAttention` exports."""
    inputs, sizes = [], {}
    for reading in readings:
        planes, place, product = _up(reading, "Transpose"), _up(reading, "Add", 1), _down(reading, "Multiply")
        turned = place and _up(place, "Transpose")
        offsets, weights = turned and _up(turned, "VariadicSplit"), product and _up(product, "Softmax", 1)
        if not (planes and place and turned and offsets and weights):
            return False
        if _order(planes) != _PLANES or _order(turned) != _POINTS_FIRST:
            return False
        if any(reading.get_attributes()[name] != value for name, value in _PLAIN.items()):
            return False
        picture = reading.input_value(0)  # [B * heads, channels, height, width], reshaped from one output of a split
        level = picture.get_node().input_value(0).get_index()
        sizes[level] = [size.get_length() for size in list(picture.get_partial_shape())[2:]]
        inputs = [offsets.output(0), weights.input_value(0), planes.input_value(0), place.input_value(1)]
    heads, channels = inputs[1].get_partial_shape()[2].get_length(), inputs[2].get_partial_shape()[2].get_length()
    compiled_kernel(channels // heads)  # now, not in the first frame
    workers(threads)  # from here, not from a thread that OpenVINO has bound to one core
    maps = np.array([sizes[level] for level in sorted(sizes)], np.int64)
    joined = MultiScaleDeformableAttention(inputs, maps, threads)
    joined.set_friendly_name(end.get_friendly_name())
    end.output(0).replace(joined.output(0))
    return True


@cache
def _say_that_numba_is_missing() -> None:
    logger.warning(
        "numba is not installed, so OpenVINO computes deformable attention through GridSample, which takes a third "
        "more time for the whole network. Install it: pip install '.[openvino]'"
    )


def _order(transpose: Node) -> list[int]:
    return [int(axis) for axis in transpose.input_value(1).get_node().get_data()]


def _up(node: Node, kind: str, index: int = 0) -> Node | None:
    """The nearest operator of a kind before input ``index`` of a node, along first inputs."""
    node = node.input_value(index).get_node()
    while node.get_type_name() != kind and node.get_input_size():
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == kind else None


def _down(node: Node, kind: str) -> Node | None:
    """The nearest operator of a kind after a node, along its first readers."""
    while node.get_type_name() != kind:
        targets = list(node.output(0).get_target_inputs()) if node.get_output_size() else []
        if not targets:
            return None
        node = targets[0].get_node()
    return node
