"""The published network in ONNX Runtime, where one operator of ours computes each deformable attention."""

from __future__ import annotations

import gc
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.typed_graph import to_typed_graph
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import StepError
from runtime.onnxruntime_backend import OnnxRuntimeEngine
from runtime.parity import relative_difference
from runtime.reference import verify_engine

onnx = pytest.importorskip("onnx")
pytest.importorskip("numba")
pytest.importorskip("onnxruntime_extensions")
deformable = pytest.importorskip("runtime.onnxruntime_deformable")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(published_bundle):
    return load_bundle(published_bundle)


@pytest.fixture
def without_packages(monkeypatch):
    """A machine that lacks one of the packages."""
    deformable._say_that_packages_are_missing.cache_clear()
    monkeypatch.setattr(deformable, "find_spec", lambda name: None if name == "onnxruntime_extensions" else name)


def kinds(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


def changed_graph(published, folder, change):
    """The graph's file after a change to each of its GridSamples."""
    model = onnx.load(published.path(published.manifest.graph))
    for node in [node for node in model.graph.node if node.op_type == "GridSample"]:
        change(model.graph, node)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


@pytest.mark.parametrize("which", ["graph", "baseline"])
def test_every_deformable_attention_is_one_operator(published, which):
    path = published.path(getattr(published.manifest, which))
    after, operators = deformable.join_deformable_attention(path, threads=1)
    before = onnx.load(path)
    modules = {node.name.split("/")[0] for node in before.graph.node if node.op_type == "GridSample"}
    joined = [node.name.split("/")[0] for node in after.graph.node if node.op_type == deformable.NAME]
    assert sorted(joined) == sorted(modules) and len(joined) == len(operators.results) > 10
    assert "GridSample" not in kinds(after) and "Softmax" in kinds(after)
    assert [output.name for output in after.graph.output] == [output.name for output in before.graph.output]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_those_of_gridsample(published, agrees_with_gridsample, batch, threads):
    agrees_with_gridsample(published, load_engine(published, threads=threads), batch)


def test_the_joined_file_is_gone_when_the_engine_is_there(published, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_engine(published, threads=1)
    assert not list(tmp_path.iterdir())


def test_a_graph_without_sampling_needs_no_temporary_folder(micro_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    load_engine(load_bundle(micro_bundle), threads=1)


def test_streams_of_one_engine_keep_apart(published, drifting_frames):
    """In turns on one session, with batches of their own, they answer as each does alone."""
    budget = published.manifest.budget_rule.at_reset(published.manifest.presets["0.55"])
    pictures = drifting_frames(3, published.manifest.image_size)
    engine = load_engine(published, threads=1)

    def answer(buffers, picture):
        buffers.image[:] = picture
        return np.array(buffers.run(budget)["mask_logits"])

    alone = [answer(engine.open_stream(), picture) for picture in pictures]
    one, pair = engine.open_stream(), engine.open_stream(2)
    for t in range(2):
        np.testing.assert_array_equal(answer(one, pictures[t])[0], alone[t][0])
        both = answer(pair, np.stack([pictures[t + 1], pictures[t]]))
        for row, wanted in zip(both, (alone[t + 1], alone[t]), strict=True):
            assert relative_difference(row, wanted[0]) < 1e-3


def test_a_closed_stream_leaves_nothing_behind(published):
    engine = load_engine(published, threads=1)
    gc.collect()
    before = len(deformable._streams)
    buffers = engine.open_stream()
    assert len(deformable._streams) == before + 1
    del buffers
    gc.collect()
    assert len(deformable._streams) == before


def test_layers_of_a_profile_name_the_operators(published, tmp_path):
    engine = OnnxRuntimeEngine(published, published.manifest.graph, threads=1, profile_to=tmp_path / "layers")
    engine.open_stream().run(published.manifest.budget_rule.at_reset(published.manifest.presets["0.55"]))
    events = [event["name"] for event in json.loads(Path(engine.end_profiling()).read_text())]
    assert any(name.startswith("pixel_decoder.layers.0.attn/") and deformable.NAME in name for name in events)


def test_without_a_package_gridsample_stays_and_that_is_said(published, without_packages, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            path = published.path(published.manifest.graph)
            assert deformable.join_deformable_attention(path, threads=1) is None
        verify_engine(published, load_engine(published, threads=1))
    assert caplog.text.count("onnxruntime_extensions is not installed") == 1
    assert "pip install '.[deformable]'" in caplog.text


def test_a_graph_without_sampling_asks_for_no_package(micro_bundle, without_packages, caplog):
    bundle = load_bundle(micro_bundle)
    with caplog.at_level(logging.WARNING):
        path = bundle.path(bundle.manifest.graph)
        assert deformable.join_deformable_attention(path, threads=1) is None
    assert not caplog.text


@pytest.mark.parametrize(
    ("attribute", "value"), [("align_corners", 1), ("padding_mode", "border"), ("mode", "nearest")]
)
def test_deformable_attention_that_samples_in_another_way_stays(published, tmp_path, attribute, value):
    def change(graph, node):
        kept = [each for each in node.attribute if each.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    changed = changed_graph(published, tmp_path, change)
    assert deformable.join_deformable_attention(changed, threads=1) is None


def test_a_graph_in_fp16_stays(published, tmp_path):
    """The operator takes fp32 alone."""
    model = onnx.load(published.path(published.manifest.graph))
    onnx.save(to_typed_graph(model, published.manifest.graph, "fp16").model, tmp_path / "fp16.onnx")
    assert deformable.join_deformable_attention(tmp_path / "fp16.onnx", threads=1) is None


def test_failed_operator_is_a_failed_step_and_the_next_one_runs(published, monkeypatch):
    buffers = load_engine(published, threads=1).open_stream()
    budget = published.manifest.budget_rule.at_reset(published.manifest.presets["0.55"])
    with monkeypatch.context() as patch:
        patch.setattr(deformable, "deformable_attention", lambda *arguments: 1 / 0)
        with pytest.raises(StepError, match="division by zero"):
            buffers.run(budget)
    assert buffers.run(budget)["state_ok"].all()


def test_an_interrupt_during_steps_is_one_and_no_crash(published):
    code = """
import sys
from pathlib import Path
from runtime.backend import load_engine
from runtime.bundle import load_bundle
bundle = load_bundle(Path(sys.argv[1]))
buffers = load_engine(bundle, threads=1).open_stream()
budget = bundle.manifest.presets["1.00"]
buffers.run(budget)
print("running", flush=True)
while True:
    buffers.run(budget)
"""
    command = [sys.executable, "-c", code, str(published.folder)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, said
    assert said.rstrip().endswith("KeyboardInterrupt")
