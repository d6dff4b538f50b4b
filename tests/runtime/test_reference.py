"""Verifying an engine against the vectors that a bundle carries: a right one passes, a wrong one is told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import BundleError, ExportMismatchError
from runtime.reference import verify_engine

FRAMES = 8


def change_vectors(folder, rehash, change) -> None:
    """Let ``change`` loose on the reference vectors of a bundle."""
    with np.load(folder / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(folder / "reference.npz", **arrays)
    rehash(folder)


def verify(folder):
    bundle = load_bundle(folder)
    return verify_engine(bundle, load_engine(bundle, threads=1))


def test_micro_bundle_agrees_with_torch(micro_bundle):
    result = verify(micro_bundle)
    assert len(result.frames) + result.skipped == FRAMES and len(result.frames) > 0
    assert {"class_logits", "mask_logits", "state_ok", "next_prior.keys", "next_prior.queries"} <= set(result.worst)
    assert 0 < max(result.worst.values()) < 1e-4
    assert all(frame.near_ties == 0 for frame in result.frames) and result.near_ties >= result.skipped


def test_threshold_bundle_agrees_with_torch(threshold_bundle):
    result = verify(threshold_bundle)
    assert len(result.frames) + result.skipped == FRAMES and max(result.worst.values()) < 1e-4


def test_tolerance_is_the_callers(micro_bundle):
    bundle = load_bundle(micro_bundle)
    with pytest.raises(ExportMismatchError, match=r"frame 0, budget \(60, .*onnxruntime .* on CPU.*allowed 1e-12"):
        verify_engine(bundle, load_engine(bundle, threads=1), tolerance=1e-12)


def change_weights(folder, rehash, shape: tuple[int, ...], factor: float) -> None:
    """Scale the weights of this shape in the graph, as a wrong engine would."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "model.onnx")
    found = 0
    for tensor in model.graph.initializer:
        if tuple(tensor.dims) == shape:
            value = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
            found += 1
    assert found
    onnx.save(model, folder / "model.onnx")
    rehash(folder)


def test_changed_class_head_is_told_apart(changed_bundle):
    folder = changed_bundle()
    change_weights(folder, changed_bundle.rehash, (48, 9), 1.01)
    with pytest.raises(
        ExportMismatchError, match=r"frame 0, budget .*: class_logits differs by .*The kept tokens agree"
    ):
        verify(folder)


def test_changed_position_embedding_is_told_apart(changed_bundle):
    """What goes into all that follows: the choice or a value differs, and the frame is named."""
    folder = changed_bundle()
    change_weights(folder, changed_bundle.rehash, (1, 60, 48), 1.1)
    with pytest.raises(ExportMismatchError, match=r"^frame 0, budget"):
        verify(folder)


def test_value_that_only_the_last_frame_shows(changed_bundle):
    folder, name = changed_bundle(), f"{FRAMES - 1}.output.mask_logits"
    change_vectors(folder, changed_bundle.rehash, lambda arrays: arrays.update({name: arrays[name] * 1.001}))
    with pytest.raises(ExportMismatchError, match=f"frame {FRAMES - 1}, .*mask_logits differs by 1.0e-03"):
        verify(folder)


def test_next_state_is_compared_too(changed_bundle):
    """Frame 3 goes in from there and leaves frame 2 as it should not."""
    folder, name = changed_bundle(), "3.state.prior.queries"
    change_vectors(folder, changed_bundle.rehash, lambda arrays: arrays.update({name: arrays[name] * 1.01}))
    with pytest.raises(ExportMismatchError, match=r"frame 2, .*next_prior\.queries differs"):
        verify(folder)


def swap(arrays, t: int, stage: int) -> None:
    """Let the reference of frame t have kept another token at a stage: the best of those that it dropped there."""
    kept, scores = arrays[f"{t}.output.kept_stages"], arrays[f"{t}.scores.{stage}"]
    inside, outside = np.where(kept[0] == stage + 1, scores[0], np.inf), np.where(kept[0] == stage, scores[0], -np.inf)
    last, next_one = inside.argmin(), outside.argmax()
    assert np.isfinite([inside[last], outside[next_one]]).all()
    kept[0, [last, next_one]] = kept[0, [next_one, last]]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_another_choice_is_told_apart(changed_bundle, stage):
    folder = changed_bundle()

    def change(arrays) -> None:
        arrays["4.tied_match"] = np.array(False)
        swap(arrays, 4, stage)

    change_vectors(folder, changed_bundle.rehash, change)
    with pytest.raises(ExportMismatchError, match=r"frame 4, .*chosen differently at stage"):
        verify(folder)


def test_near_tie_is_counted_and_its_frame_left_out(changed_bundle, micro_bundle):
    """The reference's scores say that the two tokens were as good as equal."""
    folder, before = changed_bundle(), verify(micro_bundle)

    def change(arrays) -> None:
        swap(arrays, 4, 3)
        scores, kept = arrays["4.scores.3"], arrays["4.output.kept_stages"]
        scores[kept == 3], scores[kept == 4] = 1.0, 1.0
        arrays["4.output.mask_logits"] = arrays["4.output.mask_logits"] * 1.5  # as another choice would

    change_vectors(folder, changed_bundle.rehash, change)
    after = verify(folder)
    assert after.skipped == before.skipped + 1 and after.near_ties == before.near_ties + 2
    assert len(after.frames) == len(before.frames) - 1


def threshold_with_another_choice(threshold_bundle, tmp_path, rehash, score_of) -> Path:
    """A copy whose reference dropped one more token at stage 1, of the score that ``score_of`` gives."""
    folder = tmp_path / "threshold"
    shutil.copytree(threshold_bundle, folder)

    def change(arrays) -> None:
        scores, kept = arrays["4.scores.1"][0], arrays["4.output.kept_stages"][0]
        token = np.flatnonzero(kept == 2)[0]
        kept[token] = 1
        scores[token] = score_of(np.sort(scores[~np.isnan(scores)])[::-1], int(arrays["4.budget"][1]))
        arrays["4.tied_match"] = np.array(False)

    change_vectors(folder, rehash, change)
    return folder


def test_near_tie_of_a_threshold_is_a_score_about_zero(threshold_bundle, tmp_path, changed_bundle):
    folder = threshold_with_another_choice(threshold_bundle, tmp_path, changed_bundle.rehash, lambda scores, count: 0.0)
    assert verify(folder).near_ties == verify(threshold_bundle).near_ties + 1


def test_threshold_knows_no_kth_score(threshold_bundle, tmp_path, changed_bundle):
    folder = threshold_with_another_choice(
        threshold_bundle, tmp_path, changed_bundle.rehash, lambda scores, count: scores[count - 1]
    )
    with pytest.raises(ExportMismatchError, match=r"frame 4, .*chosen differently at stage 1"):
        verify(folder)


def test_bundle_without_vectors_says_so(changed_bundle, micro_bundle):
    folder = changed_bundle()
    bundle = load_bundle(folder)
    engine = load_engine(bundle, threads=1)
    (folder / "reference.npz").unlink()
    with pytest.raises(BundleError, match=r"reference\.npz is missing, so there is nothing to verify against"):
        verify_engine(bundle, engine)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["reference.npz"]
    path.write_text(json.dumps(manifest))
    (folder / "reference.npz").write_bytes((micro_bundle / "reference.npz").read_bytes())
    with pytest.raises(BundleError, match="nothing to verify against"):  # vectors that nobody vouches for
        verify_engine(load_bundle(folder), engine)
