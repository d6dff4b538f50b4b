"""What a profile holds; how long things take is no subject of a test."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from runtime.budget import token_budget
from runtime.errors import BackendUnavailableError
from runtime.profiler import profile_bundle, total_steps
from runtime.video.frame import Frame

STEPS, WARM_UP = 4, 1


@pytest.fixture(scope="module")
def calls() -> list[None]:
    return []


@pytest.fixture(scope="module")
def profile(micro, calls):
    return profile_bundle(
        micro, backend="onnxruntime", threads=1, steps=STEPS, warm_up=WARM_UP, on_step=lambda: calls.append(None)
    )


def test_rows_are_the_dense_graph_and_every_preset(profile):
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40", "keep 0.55", "keep 0.70", "keep 1.00"]
    assert [row.token_budget for row in profile.rows] == [None, *(token_budget(60, r) for r in (0.40, 0.55, 0.70, 1.0))]


def test_percentiles_are_in_order(profile):
    for row in profile.rows:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms


def test_speed_up_is_against_the_dense_median(profile):
    dense = profile.rows[0]
    for row in profile.rows:
        assert row.speed_up == pytest.approx(dense.p50_ms / row.p50_ms, abs=2e-3, rel=2e-3)
    assert dense.speed_up == pytest.approx(1.0, abs=2e-3)


def test_progress_is_told_of_every_step(profile, calls, micro):
    assert len(calls) == total_steps(micro, STEPS, WARM_UP) == 5 * (STEPS + WARM_UP)


def test_parts_of_the_pipeline_are_there(profile):
    assert list(profile.stages_ms) == ["decode", "preprocess", "infer", "post"]
    assert all(value >= 0 for value in profile.stages_ms.values())
    assert profile.stages_ms["infer"] > 0


def test_profile_says_what_it_measured(profile):
    assert profile.engine.startswith("onnxruntime ") and "CPUExecutionProvider, 1 threads" in profile.engine
    assert (profile.image_size, profile.steps) == ((96, 160), STEPS)
    content = json.loads(json.dumps(profile.as_dict()))
    assert content["rows"][0]["name"] == "dense" and content["rows"][0]["token_budget"] is None
    assert content["stages_ms"].keys() == profile.stages_ms.keys()


def test_some_presets_and_frames_of_the_caller(micro, drifting_frames):
    """A video that ends before the steps do is enough."""
    calls, taken = [], count()

    def frames():
        for index, picture in enumerate(drifting_frames(2, size=(48, 80))):
            next(taken)
            yield Frame(picture, index, index / 30)

    profile = profile_bundle(
        micro, backend="onnxruntime", threads=1, steps=3, warm_up=0, presets=["0.40"], frames=frames(),
        on_step=lambda: calls.append(None),
    )  # fmt: skip
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40"]
    assert len(calls) == total_steps(micro, 3, 0, ["0.40"]) == 6
    assert next(taken) == 2 and len(profile.stages_ms) == 4


def test_bundle_without_a_dense_graph_has_no_speed_up(micro):
    alone = replace(micro, manifest=micro.manifest.model_copy(update={"baseline": None}))
    profile = profile_bundle(alone, backend="onnxruntime", threads=1, steps=2, warm_up=0, presets=["1.00"])
    assert [(row.name, row.speed_up) for row in profile.rows] == [("keep 1.00", None)]
    assert total_steps(alone, 2, 0, ["1.00"]) == 2


def test_threshold_bundle_can_be_profiled(threshold_bundle):
    from runtime.bundle import load_bundle

    profile = profile_bundle(load_bundle(threshold_bundle), backend="onnxruntime", threads=1, steps=2, warm_up=0)
    assert len(profile.rows) == 4 and np.isfinite([row.p99_ms for row in profile.rows]).all()


def test_backend_that_is_not_there_is_an_error(micro):
    with pytest.raises(BackendUnavailableError):
        profile_bundle(micro, backend="abacus")
