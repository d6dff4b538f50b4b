"""Deformable attention as one operator in ONNX Runtime, which has none.

The operator is a Python function (onnxruntime-extensions), whose results ONNX Runtime would take over one number at a
time, 47 ns each. So it writes them where an input of the graph lies, and returns their shape; a Reshape of that input
needs the shape, and so comes after.
"""

from __future__ import annotations

import itertools
import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from runtime.deformable_kernel import compiled_kernel, deformable_attention, workers
from runtime.deformable_pattern import PLANES, POINTS_FIRST, Attention, Sampling, attention_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto  # noqa: TID251

logger = logging.getLogger(__name__)

NAME, _DOMAIN = "MultiScaleDeformableAttention", "ai.onnx.contrib"
STREAM = "deformable_attention.stream"  # input of the graph: whose results, [1]
_PACKAGES = ("numba", "onnx", "onnxruntime_extensions")
_PLAIN = {"mode": (b"bilinear", b"linear"), "padding_mode": (b"zeros",), "align_corners": (0,)}

_streams: WeakValueDictionary[int, StreamResults] = WeakValueDictionary()
_numbers = itertools.count(1)


class Operators(NamedTuple):
    """What the operators of a graph have in common.

    Attributes:
        results: Queries and channels of each.
        threads: That share the queries.
    """

    results: tuple[tuple[int, int], ...]
    threads: int


class StreamResults:
    """Where the operators of one stream write.

    Attributes:
        inputs: What is bound to the graph beside its own inputs, by name.
        failures: Of the operators, in the step at hand.
    """

    def __init__(self, operators: Operators, batch: int) -> None:
        self.arrays = [np.zeros((batch, queries, channels), np.float32) for queries, channels in operators.results]
        self.threads, number = operators.threads, next(_numbers)
        self.inputs: dict[str, NDArray[Any]] = {STREAM: np.array([number], np.int64)}
        self.inputs |= {_result_name(index): array.reshape(-1) for index, array in enumerate(self.arrays)}
        self.failures: list[Exception] = []
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        _streams[number] = self

    def run(self, step: Callable[[], object]) -> None:
        """Run a step of the stream, and raise what goes wrong in its operators.

        An exception that leaves an operator ends the process. So they are kept until the step is over; and it runs in a
        thread of its own, since an interrupt is raised in the main one, wherever that is.
        """
        self.failures.clear()
        self._runner.submit(step).result()
        if self.failures:
            raise self.failures[0]


@contextmanager
def joined_file(path: Path, threads: int) -> Iterator[tuple[Path, Operators | None]]:
    """A graph's file with operators in it, for a session that has :func:`operator_library`, and what they are.

    The file lasts as long as the context. (Given as bytes, a session would keep them.) It is the graph's own, and there
    are no operators, where :func:`join_deformable_attention` finds none.
    """
    joined = join_deformable_attention(path, threads)
    if joined is None:
        yield path, None
        return
    import onnx  # noqa: TID251

    model, operators = joined
    with TemporaryDirectory() as folder:
        target = Path(folder, path.name)
        onnx.save(model, target)
        del model, joined  # all weights once more, while the session is made
        yield target, operators


def join_deformable_attention(path: Path, threads: int) -> tuple[ModelProto, Operators] | None:
    """Put one operator in the place of each deformable attention's softmax, reading and summing.

    ONNX Runtime's GridSample wants its maps as planes and writes all that it read. On the published Tiny network
    (960 x 544, two threads) a step takes 840 ms instead of 1191, of which 94 are the operator's.

    Args:
        threads: Of one step.

    Returns:
        None if there are no such attentions in fp32, or if a package is missing, which is said.
    """
    if not _samples_maps(path):
        return None
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        _say_that_packages_are_missing(tuple(missing))
        return None
    import onnx  # noqa: TID251  # if it is there: ONNX Runtime cannot change a graph

    model = onnx.load(path)
    found = dict(_attentions(model))
    if not found:
        return None
    for attention in found.values():
        compiled_kernel(attention.channels // attention.heads)  # now, not in the first frame
    workers(threads)
    _put_operators(model, found)
    results = tuple((attention.queries, attention.channels) for attention in found.values())
    return model, Operators(results, threads)


@cache
def operator_library() -> str:
    """Path of the library that brings the operator to a session; says once in each process what it computes."""
    from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

    floats, integers = PyCustomOpDef.dt_float, PyCustomOpDef.dt_int64

    @onnx_op(op_type=NAME, inputs=[floats] * 4 + [integers] * 3, outputs=[integers])  # type: ignore[untyped-decorator]
    def compute(offsets: Any, logits: Any, values: Any, origins: Any, sizes: Any, index: Any, stream: Any) -> Any:
        results = _streams[int(stream[0])]
        result = results.arrays[int(index[0])]
        try:
            deformable_attention(offsets, logits, values, origins, sizes, result, results.threads)
        except Exception as error:
            results.failures.append(error)
        return np.array(result.shape, np.int64)

    return str(get_library_path())


class _Reader:
    """Finds its way in a graph."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import TensorProto  # noqa: TID251

        graph = model.graph
        self.nodes = list(graph.node)
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, NodeProto] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, node)
        self.shapes: dict[str, list[int]] = {}  # of fp32 tensors; 0 where a length is not known
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type == TensorProto.FLOAT:
                self.shapes[value.name] = [axis.dim_value for axis in tensor.shape.dim]
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                self.shapes[tensor.name] = list(tensor.dims)

    def source(self, name: str, kind: str) -> str:
        """The nearest result of an operator of a kind that a value is made of, along first inputs; empty if none."""
        while (node := self._makers.get(name)) is not None and node.op_type != kind:
            name = self.input(name)
        return name if node is not None else ""

    def input(self, name: str, index: int = 0) -> str:
        """What the operator that makes a value takes; empty if there is no such operator or input."""
        node = self._makers.get(name)
        return node.input[index] if node is not None and index < len(node.input) else ""

    def reader(self, name: str, kind: str) -> str:
        """The nearest result of an operator of a kind that a value goes into, along first readers; empty if none."""
        while (node := self._readers.get(name)) is not None and node.op_type != kind:
            name = node.output[0]
        return node.output[0] if node is not None else ""

    def sampling(self, node: NodeProto) -> Sampling | None:
        """Read a GridSample; None if it is of anything else."""
        picture, grid = node.input  # the picture is [B * heads, channels, height, width]
        level, planes = self.source(picture, "Split"), self.source(picture, "Transpose")
        place = self.source(grid, "Add")
        turned = self.source(self.input(place), "Transpose")
        weights = self.source(self.input(self.reader(node.output[0], "Mul"), 1), "Softmax")
        if not (level and _is_plain(node) and self._order(planes) == PLANES and self._order(turned) == POINTS_FIRST):
            return None
        offsets = self.source(self.input(turned), "Split")
        inputs = offsets, self.input(weights), self.input(planes), self.input(place, 1)
        if any(name not in self.shapes for name in (picture, *inputs)):
            return None
        _, _, height, width = self.shapes[picture]
        return Sampling(list(self._makers[level].output).index(level), (height, width), inputs)

    def _order(self, turned: str) -> list[int]:
        """The axes of the Transpose that makes a value."""
        attributes = self._makers[turned].attribute if turned else ()
        return [axis for attribute in attributes if attribute.name == "perm" for axis in attribute.ints]


def _is_plain(sampling: NodeProto) -> bool:
    given = {attribute.name: attribute.s or attribute.i for attribute in sampling.attribute}
    return all(given.get(name, values[0]) in values for name, values in _PLAIN.items())


def _attentions(model: ModelProto) -> Iterable[tuple[str, Attention]]:
    """All that are what :class:`models.vpp_rovis.deformable.DeformableAttention` exports in fp32, and their results."""
    reader = _Reader(model)
    summed: dict[str, list[NodeProto]] = {}  # by the result of the transposition that their sum goes through
    for node in reader.nodes:
        if node.op_type == "GridSample" and (end := reader.reader(node.output[0], "Transpose")):
            summed.setdefault(end, []).append(node)
    for result, nodes in summed.items():
        attention = attention_of([reader.sampling(node) for node in nodes], lambda name: reader.shapes[name])
        if attention is not None and result in reader.shapes:
            yield result, attention


def _put_operators(model: ModelProto, found: Mapping[str, Attention]) -> None:
    """Replace the nodes that make their results, and take out what is then read by nobody."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: TID251

    graph, numbers = model.graph, {result: number for number, result in enumerate(found)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        number = numbers.get(node.output[0])
        if number is None:
            nodes.append(node)
            continue
        attention, name = found[node.output[0]], f"{NAME}.{number}"
        graph.initializer.append(numpy_helper.from_array(attention.maps, f"{name}.sizes"))
        graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), f"{name}.index"))
        # one axis, so that no optimization takes the Reshape for needless
        graph.input.append(helper.make_tensor_value_info(_result_name(number), TensorProto.FLOAT, [None]))
        inputs = [*attention.inputs, f"{name}.sizes", f"{name}.index", STREAM]
        place = node.name.rsplit("/", 1)[0]  # parts of a profile go by names
        nodes.append(helper.make_node(NAME, inputs, [f"{name}.shape"], f"{place}/{name}", domain=_DOMAIN))
        reshaped = [_result_name(number), f"{name}.shape"]
        nodes.append(helper.make_node("Reshape", reshaped, [node.output[0]], f"{place}/{name}.result"))
    graph.input.append(helper.make_tensor_value_info(STREAM, TensorProto.INT64, [1]))
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    wanted, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _result_name(number: int) -> str:
    return f"{NAME}.{number}.values"


def _samples_maps(path: Path) -> bool:
    """Whether there is a GridSample in a graph, without reading it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"GridSample") >= 0


@cache
def _say_that_packages_are_missing(names: tuple[str, ...]) -> None:
    logger.warning(
        "%s not installed, so ONNX Runtime computes deformable attention through GridSample, and a step takes four "
        "tenths as much time again. Install: pip install '.[deformable]'",
        " and ".join(names) + (" is" if len(names) == 1 else " are"),
    )
