"""What each part of a graph computes and moves at a budget, counted from the shapes of one run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime

from runtime.manifest import GraphSpec, PartCost, TensorSpec
from runtime.profiling.parts import parts_in_order

_NOTHING_MOVED = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape")  # the same bytes, another view
_BITS = {"bool": 8, "uint8": 8, "int32": 32, "int64": 64, "float": 32, "float16": 16, "bfloat16": 16, "double": 64}


@dataclass(frozen=True)
class _Executed:
    """One node of a run, with the dtype and shape of each tensor."""

    name: str
    op: str
    inputs: list[tuple[str, tuple[int, ...]]]
    outputs: list[tuple[str, tuple[int, ...]]]


def part_costs(folder: Path, graph: GraphSpec, budget: tuple[int, ...]) -> tuple[PartCost, ...]:
    """Multiply-accumulates and bytes of each part of a graph, in the order in which they run first.

    The graph is run as it was exported, without any optimization: a backend that fuses operators moves less.

    Args:
        folder: Where the graph lies.
        budget: Tokens kept at each stage; of no meaning for a graph without selection.
    """
    nodes = _run(folder / graph.file, _inputs(graph, budget))
    macs: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for node, part in zip(nodes, parts_in_order(node.name for node in nodes), strict=True):
        macs[part] += multiply_accumulates(node.op, [shape for _, shape in node.inputs], node.outputs[0][1])
        moved[part] += _bytes_moved(node)
    return tuple(
        PartCost(part=part, giga_macs=round(macs[part] / 1e9, 6), megabytes=round(moved[part] / 1e6, 4))
        for part in macs
    )


def multiply_accumulates(op: str, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of one node: matrix products and convolutions, 0 for all else.

    >>> multiply_accumulates("MatMul", [(1, 5, 7), (7, 3)], (1, 5, 3))
    105
    >>> multiply_accumulates("Conv", [(1, 3, 8, 8), (16, 3, 2, 2)], (1, 16, 4, 4))
    3072
    """
    if op in ("MatMul", "Gemm"):
        return math.prod(output) * (math.prod(inputs[0]) // math.prod(output[:-1]))
    if op == "Conv":
        return math.prod(output) * math.prod(inputs[1][1:])
    if op == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    return 0


def _bytes_moved(node: _Executed) -> int:
    """What a node reads and writes, every operand once; of a table that it gathers from, only the rows taken."""
    if node.op in _NOTHING_MOVED:
        return 0
    written = sum(map(_size, node.outputs))
    return 2 * written if node.op == "Gather" else written + sum(map(_size, node.inputs))


def _size(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return math.prod(shape) * _BITS.get(dtype, 32) // 8


def _inputs(graph: GraphSpec, budget: tuple[int, ...]) -> dict[str, Any]:
    """Any values of the right shapes: costs follow the token counts alone."""
    values = {spec.name: _example(spec) for spec in graph.inputs}
    if graph.has_budget:
        values["token_budget"] = np.array(budget[: graph.input("token_budget").shape_for(1)[0]], np.int64)
    return values


def _example(spec: TensorSpec) -> Any:
    return np.ones(spec.shape_for(1), spec.dtype)


def _run(path: Path, inputs: dict[str, Any]) -> list[_Executed]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are not among the shapes
    options.enable_profiling = True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/run"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_executed(event) for event in events if event["name"].endswith("_kernel_time")]


def _executed(event: dict[str, Any]) -> _Executed:
    inputs, outputs = (
        [(dtype, tuple(shape)) for tensor in event["args"][key] for dtype, shape in tensor.items()]
        for key in ("input_type_shape", "output_type_shape")
    )
    return _Executed(event["name"].removesuffix("_kernel_time"), event["args"]["op_name"], inputs, outputs)
