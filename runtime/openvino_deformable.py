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
from runtime.deformable_pattern import PLANES, POINTS_FIRST, Sampling, attention_of

Node = Any  # openvino.Node has no stubs

logger = logging.getLogger(__name__)

NAME = "MultiScaleDeformableAttention"
_PLAIN = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}


class MultiScaleDeformableAttention(ov.Op):  # type: ignore[misc]  # it has no stubs
    """Offsets, logits, values and origins to sums, see :func:`runtime.deformable_kernel.deformable_attention`.

    In bf16 too OpenVINO computes it in its own fp32, so places are exact and only the offsets are rounded.

    Args:
        inputs: The four, fp32.
        sizes: Height and width of each map, [levels, 2].
        threads: That share the queries.
        failures: What goes wrong is left here: OpenVINO does not say so, it ends the run and leaves the results before.
    """

    class_type_info = ov.DiscreteTypeInfo(NAME, "extension")

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

    OpenVINO's GridSample wants its maps as planes and writes all that it read. On the published Tiny network in bf16
    (960 x 544, one thread) a step takes 723 ms instead of 1099, of which 128 are the operator's.

    Args:
        threads: Of one step.
        failures: What goes wrong in a step is added; see there after each.

    Returns:
        How many there were; 0 without numba, which is said if there are some.
    """
    nodes = model.get_ops()  # kept, so that what is cut off lives until the end
    ends: dict[str, list[Node]] = {}  # by the transposition that their sum goes through
    for node in nodes:
        if node.get_type_name() == "GridSample" and (end := _down(node, "Transpose")) is not None:
            ends.setdefault(end.get_friendly_name(), []).append(node)
    found = [(node, ends[node.get_friendly_name()]) for node in nodes if node.get_friendly_name() in ends]
    if found and not has_numba():
        _say_that_numba_is_missing()
        return 0
    return sum(_join(end, samplings, threads, failures) for end, samplings in found)


def _join(end: Node, samplings: Iterable[Node], threads: int, failures: list[Exception]) -> bool:
    """Replace one, if it is what :class:`models.vpp_rovis.deformable.DeformableAttention` exports."""
    attention = attention_of([_sampling(node) for node in samplings], _shape)
    if attention is None:
        return False
    compiled_kernel(attention.channels // attention.heads)  # now, not in the first frame
    workers(threads)  # from here, not from a thread that OpenVINO has bound to one core
    inputs = [_as(value, ov.Type.f32) for value in attention.inputs]
    joined = MultiScaleDeformableAttention(inputs, attention.maps, threads, failures)
    joined.set_friendly_name(end.get_friendly_name())
    end.output(0).replace(_as(joined.output(0), end.get_output_element_type(0)))
    return True


def _sampling(node: Node) -> Sampling | None:
    """Read a GridSample; None if it is of anything else."""
    picture, grid = node.input_values()  # the picture is [B * heads, channels, height, width]
    level, planes, place = _source(picture, "VariadicSplit"), _source(picture, "Transpose"), _source(grid, "Add")
    product = _down(node, "Multiply")
    weights = product and _source(product.input_value(1), "Softmax")
    turned = place and _source(_input(place), "Transpose")
    offsets = turned and _source(_input(turned), "VariadicSplit")
    if not (level and planes and place and turned and offsets and weights):
        return None
    is_plain = all(node.get_attributes()[name] == value for name, value in _PLAIN.items())
    if not is_plain or _order(planes) != PLANES or _order(turned) != POINTS_FIRST:
        return None
    inputs = offsets, _input(weights), _input(planes), _input(place, 1)
    return Sampling(level.get_index(), (_length(picture, 2), _length(picture, 3)), inputs)


def _as(value: Any, kind: ov.Type) -> Any:
    """An output of a node in another type, if it has not that one: graphs in fp16, bf16 or INT8 name theirs."""
    return value if value.get_element_type() == kind else opset13.convert(value, kind.to_string()).output(0)


@cache
def _say_that_numba_is_missing() -> None:
    logger.warning(
        "numba is not installed, so OpenVINO computes deformable attention through GridSample, and a step takes half "
        "as much time again. Install it: pip install '.[openvino]'"
    )


def _order(turned: Any) -> list[int]:
    return [int(axis) for axis in _input(turned, 1).get_node().get_data()]


def _input(value: Any, index: int = 0) -> Any:
    """What the operator that gives a value takes."""
    return value.get_node().input_value(index)


def _length(value: Any, axis: int) -> int:
    return int(value.get_partial_shape()[axis].get_length())


def _shape(value: Any) -> list[int]:
    """Lengths; 0 where one is not known."""
    return [axis.get_length() if axis.is_static else 0 for axis in value.get_partial_shape()]


def _source(value: Any, kind: str) -> Any | None:
    """The nearest result of an operator of a kind that a value is made of, along first inputs."""
    while value.get_node().get_type_name() != kind:
        if not value.get_node().get_input_size():
            return None
        value = _input(value)
    return value


def _down(node: Node, kind: str) -> Node | None:
    """The nearest operator of a kind after a node, along its first readers."""
    while node.get_type_name() != kind:
        targets = list(node.output(0).get_target_inputs()) if node.get_output_size() else []
        if not targets:
            return None
        node = targets[0].get_node()
    return node
