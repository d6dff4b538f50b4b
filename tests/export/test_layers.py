"""Layer by layer: every tensor is compared, equal backends agree, and a wrong layer is the first that is named."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from export import layers
from export.layers import COMPARED, compare_layers
from runtime.bundle import load_bundle
from runtime.errors import BackendUnavailableError, DeployError

needs_polygraphy = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("polygraphy", "onnx_graphsurgeon"))),
    reason="needs polygraphy: pip install '.[layers]'",
)


@pytest.fixture(scope="module")
def bundle(micro_bundle):
    return load_bundle(micro_bundle)


@needs_polygraphy
@pytest.mark.parametrize("dense", [False, True], ids=["budget", "dense"])
def test_onnx_runtime_agrees_with_its_own_optimisations_at_every_tensor(bundle, dense):
    found = compare_layers(bundle, "onnxruntime", threads=1, dense=dense)
    graph = onnx.load(bundle.path(bundle.manifest.baseline if dense else bundle.manifest.graph)).graph
    assert [layer.tensor for layer in found] == [name for node in graph.node for name in node.output if name]
    assert {layer.op_type for layer in found} >= {"MatMul", "Softmax", "LayerNormalization"}
    assert min(layer.sqnr_db for layer in found) > 80


@needs_polygraphy
def test_openvino_agrees_layer_by_layer(bundle):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install '.[openvino]'")
    found = compare_layers(bundle, "openvino", threads=1, dense=True)
    assert len(found) > 100 and min(layer.sqnr_db for layer in found) > 80


@needs_polygraphy
def test_wrong_layer_is_the_first_that_is_named(bundle, monkeypatch):
    """The optimised side runs a graph in which one product is scaled; what comes before it agrees."""
    real, changed = layers._session, []

    def session(path, provider, threads, *, optimised=True):
        if optimised:
            changed.append(scale_a_product(path))
        return real(path, provider, threads, optimised=optimised)

    monkeypatch.setattr(layers, "_session", session)
    found = compare_layers(bundle, "onnxruntime", threads=1, dense=True)
    wrong = [layer for layer in found if layer.sqnr_db < 60]
    assert wrong[0].node == changed[0] and wrong[0].op_type == "MatMul"
    assert 0 < found.index(wrong[0]) < len(found) - len(wrong) + 1


def scale_a_product(path) -> str:
    """Scale the weight of a product in the middle of the file; the name of its node."""
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    node = products[len(products) // 2]
    tensor = weights[node.input[1]]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))
    onnx.save(model, path)
    return node.name


@needs_polygraphy
@pytest.mark.parametrize("frame", [-1, 8])
def test_frame_that_the_clip_lacks(bundle, frame):
    with pytest.raises(DeployError, match=rf"frames 0 to 7, not {frame}"):
        compare_layers(bundle, "onnxruntime", frame=frame)


@needs_polygraphy
def test_bundle_without_a_dense_graph(bundle):
    without = replace(bundle, manifest=bundle.manifest.model_copy(update={"baseline": None}))
    with pytest.raises(DeployError, match="has no dense graph"):
        compare_layers(without, "onnxruntime", dense=True)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_backend_that_cannot_be_run_so_says_what_to_do(bundle, backend):
    with pytest.raises(DeployError, match=rf"^{backend} cannot be run .*{COMPARED[-1]}.*polygraphy on the device"):
        compare_layers(bundle, backend)


@pytest.mark.parametrize("package", ["polygraphy", "onnx_graphsurgeon"])
def test_without_polygraphy_says_how_to_get_it(bundle, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailableError, match=rf"needs {package}.*pip install '.\[layers\]'"):
        compare_layers(bundle, "onnxruntime")
