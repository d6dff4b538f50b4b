"""What a profile holds; how long things take is no subject of a test."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from runtime.budget import token_budget
from runtime.errors import BackendUnavailableError
from runtime.profiling.profile import ProfileRequest, profile_bundle, total_steps
from runtime.video.frame import Frame

REQUEST = ProfileRequest(threads=1, steps=4, warm_up=1)
QUICK = replace(REQUEST, steps=2, warm_up=0, layers=False)


@pytest.fixture(scope="module")
def calls() -> list[None]:
    return []


@pytest.fixture(scope="module")
def profile(micro, calls):
    return profile_bundle(micro, REQUEST, on_step=lambda: calls.append(None))


def test_rows_are_the_dense_graph_and_every_preset(profile):
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40", "keep 0.55", "keep 0.70", "keep 1.00"]
    assert [row.token_budget for row in profile.rows] == [None, *(token_budget(60, r) for r in (0.40, 0.55, 0.70, 1.0))]


def test_percentiles_are_in_order_and_made_of_the_steps(profile):
    for row in profile.rows:
        assert len(row.times_ms) == len(row.at_s) == 4
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms <= row.max_ms == max(row.times_ms)
        assert row.p50_ms == pytest.approx(np.median(row.times_ms), abs=2e-3)
        assert list(row.at_s) == sorted(row.at_s)


def test_speed_up_is_against_the_dense_median(profile):
    dense = profile.rows[0]
    for row in profile.rows:
        assert row.speed_up == pytest.approx(dense.p50_ms / row.p50_ms, abs=2e-3, rel=2e-3)
    assert dense.speed_up == pytest.approx(1.0, abs=2e-3)


def test_promise_is_the_ratio_of_the_work(profile, micro):
    macs = micro.manifest.giga_macs
    for row in profile.rows:
        assert row.promise == pytest.approx(macs["dense"] / macs[row.preset or "dense"], abs=1e-3)
        assert row.kept_promise == pytest.approx(row.speed_up / row.promise)


def test_progress_is_told_of_every_step(profile, calls, micro):
    assert len(calls) == total_steps(micro, REQUEST) == 5 * (4 + 1) + 5 * (10 + 3)


def test_stages_of_the_pipeline_are_there(profile):
    """Without a video nothing is decoded, and on a CPU nothing moves up or down."""
    known = {name for name, ms in profile.stages_ms.items() if ms is not None}
    assert known == {"resize", "check", "infer", "tracks", "masks", "overlay"}
    assert set(profile.stages_ms) - known == {"decode", "upload", "download"}
    assert profile.stages_ms["infer"] > 0 and profile.stages_ms["overlay"] > 0


def test_profile_says_what_it_measured(profile):
    assert profile.engine.startswith("onnxruntime ") and "CPUExecutionProvider, 1 threads" in profile.engine
    assert (profile.image_size, profile.steps, profile.warm_up) == ((96, 160), 4, 1)
    text = " ".join(profile.mode)
    assert "CUDA graph: not used" in text and "Transfers: none" in text and "Threads of one step: 1" in text
    assert profile.memory_mib > 20
    content = json.loads(json.dumps(profile.as_dict()))
    assert content["rows"][0]["name"] == "dense" and content["rows"][0]["token_budget"] is None
    assert content["stages_ms"].keys() == profile.stages_ms.keys()


def test_some_presets_and_frames_of_the_caller(micro, drifting_frames):
    """A video that ends before the steps do is enough."""
    taken = count()

    def frames():
        for index, picture in enumerate(drifting_frames(2, size=(48, 80))):
            next(taken)
            yield Frame(picture, index, index / 30)

    profile = profile_bundle(micro, replace(QUICK, steps=3, presets=["0.40"]), frames())
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40"]
    assert next(taken) == 2 and profile.stages_ms["decode"] is not None


def test_batches_are_measured_each_against_their_own_dense_row(micro):
    profile = profile_bundle(micro, replace(QUICK, presets=["0.40"], batches=(1, 3)))
    rows = {row.name: row for row in profile.rows}
    assert list(rows) == ["dense", "keep 0.40", "dense, batch 3", "keep 0.40, batch 3"]
    ratio = rows["dense, batch 3"].p50_ms / rows["keep 0.40, batch 3"].p50_ms
    assert rows["keep 0.40, batch 3"].batch == 3
    assert rows["keep 0.40, batch 3"].speed_up == pytest.approx(ratio, rel=2e-3, abs=2e-3)


def test_without_layers_there_are_no_parts_and_no_ceiling(micro):
    profile = profile_bundle(micro, replace(QUICK, presets=["0.40"]))
    assert profile.layers == {} and profile.parts == () and profile.ceiling is None
    assert total_steps(micro, replace(QUICK, presets=["0.40"])) == 4


def test_bundle_without_a_dense_graph_has_no_speed_up(micro):
    alone = replace(micro, manifest=micro.manifest.model_copy(update={"baseline": None}))
    profile = profile_bundle(alone, replace(QUICK, presets=["1.00"]))
    assert [(row.name, row.speed_up, row.kept_promise) for row in profile.rows] == [("keep 1.00", None, None)]


def test_bundle_of_an_older_schema_has_parts_without_costs(micro):
    older = replace(micro, manifest=micro.manifest.model_copy(update={"part_costs": {}}))
    profile = profile_bundle(older, replace(REQUEST, presets=["0.40"]))
    assert {"Map-SM", "mask head"} <= {part.name for part in profile.parts}
    assert all(not part.giga_macs and not part.lost_ms for part in profile.parts)


def test_threshold_bundle_can_be_profiled(threshold_bundle):
    from runtime.bundle import load_bundle

    profile = profile_bundle(load_bundle(threshold_bundle), QUICK)
    assert len(profile.rows) == 4 and np.isfinite([row.p99_ms for row in profile.rows]).all()


def test_backend_that_is_not_there_is_an_error(micro):
    with pytest.raises(BackendUnavailableError):
        profile_bundle(micro, replace(QUICK, backend="abacus"))
