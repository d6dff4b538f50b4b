"""Every graph that is exported passes the checks that other tools start with: onnx's own and polygraphy's lint.

polygraphy runs a graph node by node in ONNX Runtime and reports each one that is malformed or fails.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.onnx_graph import export_graph
from models.pruned_host import Selection
from runtime.bundle import Bundle, load_bundle
from runtime.manifest import GraphSpec

pytest.importorskip("onnx_graphsurgeon", reason="polygraphy's lint needs it: pip install '.[layers]'")
lint_tool = pytest.importorskip("polygraphy.tools.check.subtool.lint", reason="pip install '.[layers]'")


@dataclass(frozen=True)
class Exported:
    """A graph on disk."""

    path: Path
    spec: GraphSpec
    patch_count: int


def exported(bundle: Bundle, spec: GraphSpec) -> Exported:
    return Exported(bundle.path(spec), spec, bundle.manifest.patch_count)


@pytest.fixture(scope="module")
def rovis(published_checkpoint, tmp_path_factory) -> dict[str, Exported]:
    """vpp-rovis with random weights, at the size of its reference vectors."""
    from published_files import IMAGE_SIZE

    from models.vpp_rovis.published import load_published

    folder = tmp_path_factory.mktemp("rovis-graphs")
    model = load_published(published_checkpoint).at_image_size(IMAGE_SIZE)
    made = {}
    for mode in (Selection.BUDGET, Selection.THRESHOLD):
        path = folder / f"{mode.value}.onnx"
        made[mode.value] = Exported(path, export_graph(model, path, mode), model.patch_count)
    return made


GRAPHS = [
    "budget",
    "dense",
    "threshold",
    pytest.param("rovis budget", marks=pytest.mark.slow),
    pytest.param("rovis threshold", marks=pytest.mark.slow),
]


@pytest.fixture
def graph(request) -> Exported:
    kind = request.param
    if kind.startswith("rovis"):
        return request.getfixturevalue("rovis")[kind.split()[1]]
    bundle = load_bundle(request.getfixturevalue("threshold_bundle" if kind == "threshold" else "micro_bundle"))
    return exported(bundle, bundle.manifest.baseline if kind == "dense" else bundle.manifest.graph)


def feed(graph: Exported, first_count: int | None = None) -> dict[str, np.ndarray]:
    """Inputs of one step: a noisy picture, an empty state, nested token counts."""
    rng = np.random.default_rng(0)
    inputs = {spec.name: np.zeros(spec.shape_for(1), spec.dtype) for spec in graph.spec.inputs}
    inputs["image"] = rng.integers(0, 256, inputs["image"].shape, np.uint8)
    if graph.spec.has_budget:
        stages = inputs["token_budget"].size
        inputs["token_budget"][:] = np.linspace(first_count or graph.patch_count, graph.patch_count // 4, stages)
    return inputs


def lint(graph: Exported, folder: Path, inputs: dict[str, np.ndarray]) -> tuple[int, dict]:
    """Exit code and report of ``polygraphy check lint``."""
    from polygraphy.json import save_json

    save_json([inputs], str(folder / "inputs.json"))
    tool, report = lint_tool.Lint(), folder / "report.json"
    options = ["--load-inputs", folder / "inputs.json", "--output", report, "--silent"]
    arguments = tool.setup_parser().parse_args([str(graph.path), *map(str, options)])
    tool.parse(arguments)
    return tool.run(arguments), json.loads(report.read_text())


@pytest.mark.parametrize("graph", GRAPHS, indirect=True)
def test_passes_polygraphy_s_lint(graph, tmp_path):
    code, report = lint(graph, tmp_path, feed(graph))
    assert report["lint_entries"] == [] and report["summary"]["failing"] == [] and code == 0
    nodes = {node.name for node in onnx.load(graph.path).graph.node}
    assert nodes <= set(report["summary"]["passing"])


@pytest.mark.parametrize("graph", ["budget"], indirect=True)
def test_lint_finds_what_fails(graph, tmp_path):
    """More tokens than there are: the first TopK fails."""
    code, report = lint(graph, tmp_path, feed(graph, graph.patch_count + 1))
    (name,) = report["summary"]["failing"]
    assert code == 1 and "TopK" in {node.op_type for node in onnx.load(graph.path).graph.node if node.name == name}


@pytest.mark.parametrize("graph", GRAPHS, indirect=True)
def test_passes_onnx_s_checker_and_shape_inference(graph):
    model = onnx.load(graph.path)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for values, specs in ((inferred.graph.input, graph.spec.inputs), (inferred.graph.output, graph.spec.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == np.dtype(spec.dtype), spec.name
            assert len(tensor.shape.dim) == len(spec.shape), spec.name
            fixed = [(dim.dim_value, axis) for dim, axis in zip(tensor.shape.dim, spec.shape, strict=True)]
            assert all(value in (0, axis) for value, axis in fixed if axis != "batch"), (spec.name, fixed)
