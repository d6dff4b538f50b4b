"""The published network as a graph: its reference vectors through ONNX Runtime, and the bundle that users get."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from shutil import copytree
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_cuda import FakeCuda
from fake_tensorrt import fake_tensorrt
from published_files import FRAMES, IMAGE_SIZE, STAGE_OF_BLOCK, reference, reference_weights, save_published

from export import check
from export.bundle_writer import ExportRequest, export_bundle
from export.check import check_parity
from export.engine import build_engines
from export.engine_request import EngineRequest
from export.onnx_graph import GraphStep, budget_entries, example_inputs, step_interface
from export.reference import synthetic_frames
from models.pruned_host import Selection
from models.vpp_rovis import mask_decoder
from models.vpp_rovis.published import load_published
from runtime.backend import load_engine
from runtime.budget import reset_budget
from runtime.bundle import load_bundle
from runtime.errors import CheckpointError, ExportMismatchError
from runtime.manifest import TrackQuerySettings
from runtime.parity import relative_difference
from runtime.reference import verify_engine
from runtime.stream import Stream
from runtime.track_queries import TrackQueryTracker

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return reference()


def float_graph(checkpoint, path, mode: Selection) -> onnxruntime.InferenceSession:
    """The step for pictures that are normalised already, as the reference vectors have them."""
    model = load_published(checkpoint).at_image_size(IMAGE_SIZE)
    model.compares_all = True  # what was published keeps less in one frame than in the one before
    interface = step_interface(model, mode)
    _, state, budget = example_inputs(model, interface, 1)
    image = torch.zeros(1, *IMAGE_SIZE, 3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            GraphStep(model, interface).eval(), (image, state, budget), dynamo=True, opset_version=20, verbose=False,
            input_names=interface.input_names, output_names=interface.output_names,
        )  # fmt: skip
    program.save(path, external_data=False)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Selection.THRESHOLD, Selection.BUDGET])
def test_stream_through_onnx_runtime_equals_the_published_one(vectors, published_checkpoint, tmp_path, mode):
    """Every frame from its own past: the graph's state, and the queries that the tracker chose."""
    session = float_graph(published_checkpoint, tmp_path / "model.onnx", mode)
    model = load_published(published_checkpoint).at_image_size(IMAGE_SIZE)
    names = step_interface(model, mode).output_names
    tracker = TrackQueryTracker(
        TrackQuerySettings(learned_queries=20), model.config.track_queries, model.config.feature_dim, IMAGE_SIZE
    )
    state = {f"prior.{name}": value.numpy() for name, value in model.initial_state(1)._asdict().items()}
    for t in range(FRAMES):
        counts = vectors[f"t{t}.kept"].sum(1)[[1, 3, 6, 9]].astype(np.int64)[: budget_entries(model, mode)]
        image = vectors[f"t{t}.image"].transpose(1, 2, 0)[None]
        state |= tracker.next_state()
        carried = int(state["prior.track_valid"].sum())
        assert carried == int(vectors[f"t{t}.n_track_queries"])
        got = dict(zip(names, session.run(None, {"image": image, "token_budget": counts, **state}), strict=True))
        state = {name[5:]: value for name, value in got.items() if name.startswith("next_")}
        kept = got["kept_stages"][0] >= STAGE_OF_BLOCK[:, None]
        np.testing.assert_array_equal(kept, vectors[f"t{t}.kept"])
        rows = 20 + carried
        for name, key in (("class_logits", "cls_logits"), ("mask_logits", "mask_logits"), ("queries", "queries")):
            assert relative_difference(got[name][0, :rows], vectors[f"t{t}.{key}"]) < TOLERANCE, (t, name)
        found = tracker.update(got["class_logits"][0], got["mask_logits"][0], got["queries"][0])
        np.testing.assert_array_equal(found.track_ids, vectors[f"t{t}.track_ids"])
        np.testing.assert_array_equal(found.labels, vectors[f"t{t}.labels"])
        np.testing.assert_allclose(found.scores, vectors[f"t{t}.scores"], atol=1e-4)
        masks = np.unpackbits(vectors[f"t{t}.masks"], axis=2)[..., : IMAGE_SIZE[1]].astype(bool)
        logits = torch.from_numpy(got["mask_logits"])
        fine = torch.nn.functional.interpolate(logits, IMAGE_SIZE, mode="bilinear")[0, found.queries]
        np.testing.assert_array_equal(fine.numpy() > 0, masks)


@pytest.fixture(scope="module")
def bundle(published_bundle, tmp_path_factory):
    """A copy: engines are built into it."""
    return load_bundle(copytree(published_bundle, tmp_path_factory.mktemp("rovis") / "bundle"))


@pytest.mark.slow
def test_bundle_verifies_and_streams(bundle):
    engine = load_engine(bundle)
    worst = verify_engine(bundle, engine).worst  # near-ties in the decoder's masks may move what comes after them
    assert max(value for name, value in worst.items() if name.startswith("next_prior")) < TOLERANCE
    written = [pair.input for pair in bundle.manifest.graph.state if pair.update == "host"]
    assert written == ["prior.track_queries", "prior.track_valid"]
    pictures = list(synthetic_frames(IMAGE_SIZE, 4))
    with Stream(bundle, engine) as stream, Stream(bundle, engine) as other:
        results = [stream.step(picture, timestamp_s=t / 30) for t, picture in enumerate(pictures)]
        again = [other.step(picture, timestamp_s=t / 30) for t, picture in enumerate(pictures)]
    assert [result.reset_reason for result in results] == ["first frame", None, None, None]
    budget = bundle.manifest.presets[bundle.manifest.default_preset]
    assert results[-1].tokens_kept.tolist() == list(budget)
    for one, same in zip(results, again, strict=True):
        np.testing.assert_array_equal(one.kept_stages, same.kept_stages)
        np.testing.assert_array_equal(one.instances.track_ids, same.instances.track_ids)


@pytest.mark.slow
def test_near_ties_of_the_attention_masks_explain_a_difference(bundle, published_checkpoint, monkeypatch):
    """Torch cuts its attention masks a little beside 0, as another rounding would; values of the graph differ then."""
    cut = mask_decoder._blocked_bias
    monkeypatch.setattr(mask_decoder, "_blocked_bias", lambda logits, margin=0.0: cut(logits, margin + 0.02))
    model, engine = load_published(published_checkpoint).at_image_size(IMAGE_SIZE), load_engine(bundle)
    budget = bundle.manifest.presets["0.55"]
    with pytest.raises(ExportMismatchError, match="logits differs by"):
        check_parity(model, engine, synthetic_frames(IMAGE_SIZE, 2), budget)
    monkeypatch.setattr(check, "TIE_MARGIN", 0.02)
    parity = check_parity(model, engine, synthetic_frames(IMAGE_SIZE, 2), budget)
    assert parity.worst > TOLERANCE


@pytest.mark.slow
def test_track_queries_change_the_answer(bundle):
    """The graph really reads the slots that the tracker writes, and only those that are valid."""
    engine = load_engine(bundle)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*IMAGE_SIZE, 3), np.uint8)
    slots = engine.graph.input("prior.track_queries").shape_for(1)
    queries = rng.normal(size=slots).astype(np.float32)
    budget = (bundle.manifest.patch_count,) * 4

    def masks(valid: int) -> np.ndarray:
        buffers = engine.open_stream()
        buffers.image[0] = picture
        flags = np.zeros(slots[:2], bool)
        flags[:, :valid] = True
        buffers.set_state({"prior.track_queries": queries, "prior.track_valid": flags})
        return np.array(buffers.run(budget)["mask_logits"][0, :20])

    learned_alone = masks(0)
    queries *= 3
    np.testing.assert_array_equal(masks(0), learned_alone)
    assert relative_difference(masks(2), learned_alone) > 1e-3


@pytest.mark.slow
def test_batch_of_two_equals_two_alone(bundle):
    """Two cameras through one graph, three frames, each with its own prior."""
    engine = load_engine(bundle)
    clips = [list(synthetic_frames(IMAGE_SIZE, 3, seed)) for seed in (0, 1)]
    budget = bundle.manifest.presets[bundle.manifest.default_preset]
    together, alone = engine.open_stream(2), [engine.open_stream(), engine.open_stream()]
    for t in range(3):
        used = reset_budget(budget, bundle.manifest.patch_count) if t == 0 else budget
        for row, one in enumerate(alone):
            together.image[row] = one.image[0] = clips[row][t]
        got = {name: np.array(value) for name, value in together.run(used).items()}
        together.commit()
        for row, one in enumerate(alone):
            for name, value in one.run(used).items():
                assert relative_difference(got[name][row], value[0]) < TOLERANCE, (t, row, name)
            one.commit()


@pytest.mark.slow
def test_graph_has_no_node_that_engines_refuse(bundle):
    graph = onnx.load(bundle.path(bundle.manifest.graph)).graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"NonZero", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "If", "Loop"}
    for node in graph.node:
        reductions = [attribute.s for attribute in node.attribute if attribute.name == "reduction"]
        assert not node.op_type.startswith("Scatter") or all(value == b"none" for value in reductions)


@pytest.mark.slow
def test_manifest_names_the_tracker(bundle):
    content = json.loads((bundle.folder / "manifest.json").read_text())
    assert content["tracker"]["kind"] == "track-queries" and content["tracker"]["learned_queries"] == 20
    assert bundle.manifest.origin.model == "vpp-rovis"


def test_dense_checkpoint_is_only_exported_dense(vectors, tmp_path):
    dense = {
        name: value
        for name, value in reference_weights(vectors).items()
        if "matching_module" not in name and "selective_modules" not in name
    }
    path = save_published(tmp_path / "dense.pth", dense)
    with pytest.raises(CheckpointError, match="--dense"):
        export_bundle(ExportRequest(path, tmp_path / "bundle", model="vpp-rovis", image_size=IMAGE_SIZE))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(bundle):
    pytest.importorskip("tensorrt_rtx")
    usual = {"usual": bundle.manifest.presets[bundle.manifest.default_preset]}
    model, *_ = build_engines(
        bundle, "tensorrt-rtx", EngineRequest(usual, compute_capabilities=["sm86", "sm89", "sm120"])
    )
    assert model.plan.stat().st_size == model.record.plan_bytes and model.record.asked.keys() == {"FLOAT"}
    assert [profile.name for profile in model.record.profiles] == ["usual", "usual reset"]


@pytest.mark.slow
def test_state_of_the_tracker_reaches_the_gpu(bundle, monkeypatch):
    """On a fake GPU: state that the tracker writes is one tensor for both sets, and is uploaded between frames."""
    cuda = FakeCuda()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("tensorrt 10.3.0", cuda))
    build_engines(bundle, "tensorrt", EngineRequest(bundle.manifest.presets))
    kept = []
    for engine in (load_engine(bundle), load_engine(bundle, backend="tensorrt")):
        with Stream(bundle, engine) as stream:
            pictures = enumerate(synthetic_frames(IMAGE_SIZE, 6))
            kept.append([stream.step(picture, timestamp_s=t / 30) for t, picture in pictures])
    for one, same in zip(*kept, strict=True):
        np.testing.assert_array_equal(one.kept_stages, same.kept_stages)
        np.testing.assert_array_equal(one.instances.track_ids, same.instances.track_ids)
        np.testing.assert_array_equal(one.instances.masks, same.instances.masks)
    assert cuda.calls["cudaGraphLaunch"] == 3  # the first frame resets; two run kernel by kernel, one on each state set
