"""Ratios over frames: exact on small arrays, and the same however a clip is split."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.agreement import LIMITS, Agreement, Limits, coarsest
from runtime.errors import BackendError


def frame(kept, **tensors) -> dict[str, np.ndarray]:
    """A frame of a network of two stages."""
    kept = np.array(kept)
    counts = np.array([[(kept > 0).sum(), (kept > 1).sum()]])
    return {"kept_stages": kept[None], "tokens_kept": counts} | {
        name: np.array(value) for name, value in tensors.items()
    }


def agreement(*pairs) -> Agreement:
    found = Agreement()
    for got, want in pairs:
        found.add(got, want)
    return found


def test_ratio_of_ten_to_one_is_20_db():
    one = frame([2, 2], masks=[[3.0, -4.0]]), frame([2, 2], masks=[[3.0, -4.5]])
    assert agreement(one).sqnr_db["masks"] == pytest.approx(10 * math.log10((9 + 20.25) / 0.25))
    exact = frame([2, 2], masks=[[10.0]]), frame([2, 2], masks=[[10.0]])
    assert agreement(exact).sqnr_db == {"masks": math.inf}
    assert agreement((frame([2], masks=[[0.0]]), frame([2], masks=[[0.0]]))).sqnr_db == {"masks": math.inf}
    assert agreement((frame([2], masks=[[0.1]]), frame([2], masks=[[0.0]]))).sqnr_db == {"masks": -math.inf}


@given(
    st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2), min_size=2, max_size=20),
    st.integers(1, 19),
)
def test_frames_are_summed_and_not_averaged(values, cut):
    """However a clip is cut into frames, the ratio is that of all its values."""
    got, want = (np.array(column, np.float32)[None] for column in zip(*values, strict=True))
    whole = agreement((frame([2], x=got), frame([2], x=want)))
    parts = agreement(
        *((frame([2], x=got[:, part]), frame([2], x=want[:, part])) for part in (slice(cut), slice(cut, None)))
    )
    assert parts.sqnr_db["x"] == pytest.approx(whole.sqnr_db["x"], rel=1e-6)
    assert parts.differences.keys() == {"x"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_is_not_finite_is_all_noise(bad):
    one = agreement((frame([2], masks=[[bad, 1.0]]), frame([2], masks=[[0.0, 1.0]])))
    assert one.sqnr_db == {"masks": -math.inf} and one.failures(LIMITS["int8"])


def test_overlap_is_by_stage_and_over_all_frames():
    first = frame([2, 2, 1, 0]), frame([2, 1, 2, 0])  # stage 0 the same three, stage 1 one of two
    second = frame([2, 2, 1, 0]), frame([2, 2, 0, 1])  # stage 0 two of three, stage 1 both
    assert agreement(first, second).overlap == {0: 5 / 6, 1: 3 / 4}


def test_stage_that_keeps_all_that_came_chose_nothing():
    assert agreement((frame([2, 2]), frame([2, 2]))).overlap == {}
    assert agreement((frame([2, 0]), frame([2, 0]))).overlap == {0: 1.0}


def test_another_count_of_tokens_shows_in_the_overlap():
    assert agreement((frame([1, 1, 1, 1]), frame([1, 0, 0, 0]))).overlap == {0: 0.25, 1: 1.0}


def test_state_of_patches_is_compared_where_both_computed_it():
    got = frame([2, 0, 1], next_keep=[[[1.0], [9.0], [3.0]]], next_queries=[[[1.0], [2.0]]])
    want = frame([2, 1, 0], next_keep=[[[1.0], [0.0], [0.0]]], next_queries=[[[1.0], [2.0]]])
    assert agreement((got, want)).sqnr_db == {"next_keep": math.inf, "next_queries": math.inf}
    got["next_keep"][0, 0] = 2.0
    assert agreement((got, want)).sqnr_db["next_keep"] == 0.0


def test_outputs_are_compared_on_every_value():
    """Masks have as many queries as there happen to be patches."""
    got, want = frame([2, 0], masks=[[1.0, 9.0]]), frame([2, 1], masks=[[1.0, 1.0]])
    assert agreement((got, want)).sqnr_db["masks"] < 0


def test_what_is_no_number_has_to_be_equal():
    wrong = agreement((frame([2], state_ok=[False]), frame([2], state_ok=[True])))
    assert wrong.failures(LIMITS["int8"]) == [
        "state_ok is missing, of another shape, or differs where the same tokens were kept"
    ]
    assert agreement((frame([2], masks=[1.0]), frame([2], masks=[1.0, 2.0]))).unequal == {"masks"}
    assert agreement((frame([2]), frame([2], masks=[1.0]))).unequal == {"masks"}


def test_failures_name_what_was_reached_and_what_is_asked():
    one = agreement((frame([2, 0, 1], masks=[[1.1, 0.0]]), frame([0, 2, 1], masks=[[1.0, 0.0]])))
    assert one.failures(Limits(40.0, 0.97)) == [
        "stage 0 keeps 50.0% of the reference's tokens (at least 97%)",
        "stage 1 keeps 0.0% of the reference's tokens (at least 97%)",
        "masks has a signal-to-noise ratio of 20.0 dB (at least 40)",
    ]
    assert one.failures(Limits(19.9, 0.0)) == []


def test_coarsest_is_what_is_allowed_most():
    assert coarsest("fp32", "fp32") == "fp32" and coarsest("bf16", "fp16") == "bf16"
    assert all(coarsest("fp32", name) == name for name in LIMITS)
    with pytest.raises(BackendError, match=r"precision 'int2', only for fp32, tf32, fp16, bf16, fp8, int8"):
        coarsest("fp32", "int2")
