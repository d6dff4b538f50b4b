"""Verifying an engine against the vectors that a bundle carries: a right one passes, a wrong one is told apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import BackendError, BundleError, DeployError, ExportMismatchError, TokenBudgetError
from runtime.reference import compare_engine, verify_engine

FRAMES = 8
PRESETS = {"0.40": 4, "0.55": FRAMES, "0.70": 4, "1.00": 4}  # frames with vectors at each


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
    assert result.frames + result.skipped == sum(PRESETS.values()) and result.precision == "fp32"
    assert {"class_logits", "mask_logits", "state_ok", "next_prior.keys", "next_prior.queries"} <= set(result.worst)
    assert 0 < max(result.worst.values()) < 1e-4 and min(result.sqnr_db.values()) > 80
    assert result.near_ties >= result.skipped


def test_every_preset_is_compared(micro_bundle):
    manifest, budgets = load_bundle(micro_bundle).manifest, verify(micro_bundle).budgets
    assert {name: budget.frames + budget.skipped for name, budget in budgets.items()} == PRESETS
    for name, budget in budgets.items():
        assert budget.token_budget == manifest.presets[name] and not budget.failures
        assert all(share == 1.0 for share in budget.overlap.values())
        assert {"class_logits", "mask_logits", "next_prior.keys", "next_prior.keep_logits"} <= set(budget.differences)
    assert list(budgets["0.55"].overlap) == [0, 1, 2, 3] and budgets["1.00"].overlap == {}


def test_bundle_with_vectors_of_the_default_preset_alone(changed_bundle):
    """Bundles were written so before the other presets had vectors."""
    folder = changed_bundle()

    def change(arrays) -> None:
        for name in [name for name in arrays if ":" in name]:
            del arrays[name]

    change_vectors(folder, changed_bundle.rehash, change)
    assert list(verify(folder).budgets) == ["0.55"]


def test_threshold_bundle_agrees_with_torch(threshold_bundle):
    result = verify(threshold_bundle)
    assert result.frames + result.skipped == sum(PRESETS.values()) and max(result.worst.values()) < 1e-4


@pytest.mark.slow
def test_dense_bundle_agrees_with_torch(micro_checkpoint, tmp_path):
    from export.bundle_writer import ExportRequest, export_bundle
    from models.pruned_host import Selection

    export_bundle(ExportRequest(micro_checkpoint, tmp_path / "dense", selection=Selection.NONE))
    result = verify(tmp_path / "dense")
    assert result.frames == FRAMES and result.budgets["1.00"].overlap == {} and max(result.worst.values()) < 1e-4


def test_tolerance_is_the_callers(micro_bundle):
    bundle = load_bundle(micro_bundle)
    with pytest.raises(
        ExportMismatchError, match=r"onnxruntime .* on CPU(.|\n)*budget 0.55: frame 0, \(60, .*allowed 1e-12"
    ):
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
        ExportMismatchError, match=r"budget 0.40: frame 0, .*: class_logits differs by .*The kept tokens agree"
    ):
        verify(folder)


def test_changed_position_embedding_is_told_apart(changed_bundle):
    """What goes into all that follows: the choice or a value differs, and the frame is named."""
    folder = changed_bundle()
    change_weights(folder, changed_bundle.rehash, (1, 60, 48), 1.1)
    with pytest.raises(ExportMismatchError, match=r"budget 0.40: frame 0, "):
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


def test_vectors_of_another_preset_are_compared(changed_bundle):
    folder, name = changed_bundle(), "0.70:4.output.mask_logits"
    change_vectors(folder, changed_bundle.rehash, lambda arrays: arrays.update({name: arrays[name] * 1.001}))
    with pytest.raises(ExportMismatchError, match=r"torch:\n  budget 0.70: frame 4, .*mask_logits differs by [^\n]*$"):
        verify(folder)


def test_near_ties_inside_the_network_explain_a_difference(changed_bundle):
    """As much as torch itself moves when they fall the other way, and no more."""
    folder, name = changed_bundle(), "0.70:4.output.mask_logits"

    def change(arrays) -> None:
        arrays.update({name: arrays[name] * 1.001, "0.70:4.explained.mask_logits": np.array(2e-3)})

    change_vectors(folder, changed_bundle.rehash, change)
    assert verify(folder).worst["mask_logits"] == pytest.approx(1e-3, rel=0.01)
    change_vectors(folder, changed_bundle.rehash, lambda arrays: arrays.update({name: arrays[name] * 1.01}))
    with pytest.raises(ExportMismatchError, match=r"budget 0.70: frame 4, .*mask_logits differs"):
        verify(folder)


def test_next_state_of_another_preset_is_compared(changed_bundle):
    folder, name = changed_bundle(), "0.70:4.next.prior.queries"
    change_vectors(folder, changed_bundle.rehash, lambda arrays: arrays.update({name: arrays[name] * 1.01}))
    with pytest.raises(ExportMismatchError, match=r"budget 0.70: frame 4, .*next_prior.queries differs"):
        verify(folder)


def test_every_failure_is_told(changed_bundle):
    folder, names = changed_bundle(), ("2.output.mask_logits", "0.40:6.output.class_logits")

    def change(arrays) -> None:
        arrays.update({name: arrays[name] * 1.001 for name in names})

    change_vectors(folder, changed_bundle.rehash, change)
    with pytest.raises(ExportMismatchError, match=r"budget 0.40: frame 6, .*\n  budget 0.55: frame 2, "):
        verify(folder)
    bundle = load_bundle(folder)
    result = compare_engine(bundle, load_engine(bundle, threads=1))
    assert len(result.failures) == 2 and result.frames > FRAMES  # the other frames are compared all the same
    assert 55 < result.sqnr_db["mask_logits"] < 80  # 0.1 % of one frame of eight


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
    assert after.frames == before.frames - 1


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


# Precisions other than fp32


class Rounded:
    """The micro engine as one that computes in another precision: ``noise`` is relative to each tensor's spread.

    ``swaps`` tokens of the last stage are chosen otherwise in every frame.
    """

    def __init__(self, engine, precision: str, noise: float = 0.0, swaps: int = 0, fails=lambda budget: None) -> None:
        self.report, self.graph = replace(engine.report, precision=precision), engine.graph
        self._engine, self._noise, self._swaps, self._fails = engine, noise, swaps, fails

    def open_stream(self, batch: int = 1, usual_budget=None):
        real, rng = self._engine.open_stream(batch, usual_budget), np.random.default_rng(0)
        run = real.run

        def rounded(budget):
            self._fails(budget)
            outputs = dict(run(budget))
            for name in ("class_logits", "mask_logits"):
                value = outputs[name]
                outputs[name] = value + self._noise * value.std() * rng.standard_normal(value.shape).astype(np.float32)
            kept = outputs["kept_stages"] = outputs["kept_stages"].copy()
            last, before = np.flatnonzero(kept[0] == 4)[: self._swaps], np.flatnonzero(kept[0] == 3)[: self._swaps]
            kept[0, last[: len(before)]], kept[0, before] = 3, 4
            return outputs

        real.run = rounded
        return real


@pytest.fixture
def micro_loaded(micro_bundle):
    bundle = load_bundle(micro_bundle)
    return bundle, load_engine(bundle, threads=1)


@pytest.mark.parametrize(("precision", "noise"), [("bf16", 0.02), ("int8", 0.05), ("fp16", 0.01)])
def test_other_precision_is_judged_by_its_noise(micro_loaded, precision, noise):
    bundle, engine = micro_loaded
    result = verify_engine(bundle, Rounded(engine, precision, noise))
    assert result.precision == precision and result.skipped == 0
    assert result.sqnr_db["mask_logits"] == pytest.approx(-20 * np.log10(noise), abs=3)
    with pytest.raises(ExportMismatchError, match=r"budget 0.40: mask_logits has a signal-to-noise ratio of .* dB"):
        verify_engine(bundle, Rounded(engine, precision, 10 * noise))


def test_other_precision_is_judged_by_the_tokens_it_keeps(micro_loaded):
    bundle, engine = micro_loaded
    with pytest.raises(ExportMismatchError, match=r"budget 0.40: stage 3 keeps 75.0% of .*at least 97%") as caught:
        verify_engine(bundle, Rounded(engine, "int8", swaps=3))  # of 12
    assert "budget 1.00" not in str(caught.value)  # there is nothing to choose
    with pytest.raises(ExportMismatchError, match="chosen differently at stage"):
        verify_engine(bundle, Rounded(engine, "fp32", swaps=3))


def test_the_graph_s_own_precision_counts_too(micro_loaded):
    """A quantized graph on an engine that says fp32 because it computes all else so."""
    bundle, engine = micro_loaded
    int8 = replace(bundle, manifest=bundle.manifest.model_copy(update={"precision": "int8"}))
    assert verify_engine(int8, Rounded(engine, "fp32", 0.05)).limits.sqnr_db == 20


def test_tolerance_is_for_fp32(micro_loaded):
    bundle, engine = micro_loaded
    with pytest.raises(DeployError, match=r"is for fp32; bf16 is judged by at least 20 dB and 97%"):
        verify_engine(bundle, Rounded(engine, "bf16"), tolerance=1e-3)


def test_precision_without_limits_is_an_error(micro_loaded):
    bundle, engine = micro_loaded
    with pytest.raises(BackendError, match=r"precision 'int2', only for fp32"):
        verify_engine(bundle, Rounded(engine, "int2"))


def refuse(*budgets):
    """Raise for these budgets, as an engine that was not built for them."""

    def check(budget) -> None:
        if budget in budgets:
            raise TokenBudgetError(f"{budget} is not built")

    return check


def test_budget_that_is_not_built_is_told_and_no_failure(micro_loaded):
    bundle, engine = micro_loaded
    result = verify_engine(bundle, Rounded(engine, "fp32", fails=refuse(bundle.manifest.presets["0.70"])))
    assert result.budgets["0.70"].not_built.endswith("is not built") and result.budgets["0.70"].frames == 0
    assert list(result.compared) == ["0.40", "0.55", "1.00"]


def test_engine_that_runs_no_budget_did_not_pass(micro_loaded):
    bundle, engine = micro_loaded
    rule, presets = bundle.manifest.budget_rule, bundle.manifest.presets.values()
    nothing = refuse(*presets, *(rule.at_reset(budget) for budget in presets))
    with pytest.raises(ExportMismatchError, match=r"runs none of the bundle's budgets: .* is not built"):
        verify_engine(bundle, Rounded(engine, "fp32", fails=nothing))


def test_result_is_json(micro_loaded):
    bundle, engine = micro_loaded
    content = json.loads(json.dumps(verify_engine(bundle, Rounded(engine, "bf16")).as_dict(), allow_nan=False))
    assert content["passed"] and content["budgets"]["0.55"]["overlap"]["3"] == 1.0
    assert content["budgets"]["0.55"]["token_budget"] == [42, 32, 26, 20]
