"""How two implementations are compared: choices first, ties excused exactly as far as the margin goes."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import ExportMismatchError
from runtime.parity import TIE_MARGIN, compare_frame, count_near_ties, relative_difference, undecided

NAN, INF = float("nan"), float("inf")


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def stages(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# --- relative difference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want", "difference"),
    [
        ([1, 2], [1, 2], 0.0),
        ([1, 2.5], [1, 2], 0.25),
        ([1, 2], [1, -4], 1.5),
        ([0.5], [0], 0.5),  # nothing to relate it to: the difference itself
        ([], [], 0.0),
        ([NAN, 1], [NAN, 1], 0.0),
        ([INF, 1], [INF, 1], 0.0),
        ([-INF, 1], [-INF, 1], 0.0),
        ([NAN, 1], [0, 1], INF),
        ([0, 1], [NAN, 1], INF),
        ([INF, 1], [1e30, 1], INF),
        ([INF, 1], [-INF, 1], INF),
        ([NAN, 1], [INF, 1], INF),
        ([INF, 1], [INF, 2], 0.5),  # an infinity on both sides hides nothing
        ([NAN, 1], [NAN, 2], 0.5),
        ([1e308, 1], [-1e308, 1], INF),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_relative_difference(got, want, difference):
    assert relative_difference(np.array(got, float), np.array(want, float)) == pytest.approx(difference)


def test_relative_difference_of_bool_and_integers():
    assert relative_difference(np.array([True, False]), np.array([True, True])) == 1.0
    assert relative_difference(stages(3, 4), stages(3, 5)) == pytest.approx(0.2)


# --- near-ties ------------------------------------------------------------------------------------------------------


def test_only_scores_within_the_margin_of_the_kth_are_open():
    near, far = 4 - 0.5 * TIE_MARGIN * 10, 4 - 2 * TIE_MARGIN * 10  # the largest score is 10
    assert undecided(scores(10, 4, near, far, -3), 2).tolist() == [False, True, True, False, False]


def test_margin_is_a_share_of_the_largest_score_of_either_sign():
    close = scores(0.001, 0.0005, -100)
    assert undecided(close, 1).tolist() == [True, True, False]
    assert undecided(close[:2], 1).tolist() == [True, False]


def test_stage_that_keeps_all_leaves_nothing_open():
    assert not undecided(scores(1, 1, 1), 3).any()
    assert not undecided(scores(1, NAN, 1), 2).any()
    assert not undecided(scores(NAN, NAN), 1).any()


def test_tokens_that_were_not_there_to_choose_are_not_open():
    assert undecided(scores(NAN, 1, 1, NAN), 1).tolist() == [False, True, True, False]


def test_threshold_stage_is_open_around_zero():
    assert undecided(scores(5, 4e-5, -4e-5, 6e-5, -5), None).tolist() == [False, True, True, False, False]


def test_no_difference_is_no_tie():
    assert count_near_ties(stages(1, 0), stages(1, 0), [scores(2, 1)], (1,)) == 0


def test_swap_within_the_margin_is_counted():
    assert count_near_ties(stages(0, 1, 0), stages(1, 0, 0), [scores(1, 1 - 1e-6, 0.5)], (1,)) == 2


def test_swap_of_the_kth_and_the_next_beyond_the_margin_is_an_error():
    """Both are next to the decision, and still the choice is wrong."""
    with pytest.raises(
        ExportMismatchError, match=r"1 tokens are chosen differently at stage 0.*token 1, kept for 1 stages"
    ):
        count_near_ties(stages(0, 1, 0), stages(1, 0, 0), [scores(1, 0.9, 0.5)], (1,))


@pytest.mark.parametrize("tokens", [(0, 2), (1, 2), (0, 3)])
def test_any_other_swap_is_an_error(tokens):
    want = stages(1, 1, 0, 0)
    got = want.copy()
    got[list(tokens)] = want[list(tokens)[::-1]]
    with pytest.raises(ExportMismatchError, match="at stage 0 although their scores are no near-ties"):
        count_near_ties(got, want, [scores(3, 2, 1.9, 0)], (2,))


def test_another_count_of_tokens_is_an_error():
    with pytest.raises(ExportMismatchError):
        count_near_ties(stages(1, 1, 0), stages(1, 0, 0), [scores(3, 2, 1)], (1,))


def test_what_follows_a_near_tie_is_excused():
    """Stage 0 chose another token by a tie, so stage 1 scored other tokens."""
    first, second = scores(2, 1, 1 + 1e-7, 0), scores(5, NAN, 1, NAN)
    assert count_near_ties(stages(1, 2, 0, 0), stages(2, 0, 1, 0), [first, second], (2, 1)) == 3


def test_wrong_choice_after_agreement_is_an_error():
    first, second = scores(2, 1, 0), scores(5, 1, NAN)
    with pytest.raises(ExportMismatchError, match="at stage 1"):
        count_near_ties(stages(1, 2, 0), stages(2, 1, 0), [first, second], (2, 1))


def test_wrong_choice_beside_a_near_tie_is_an_error():
    with pytest.raises(ExportMismatchError, match="the first is token 3"):
        count_near_ties(stages(1, 0, 1, 1), stages(1, 1, 0, 0), [scores(9, 1, 1 + 1e-6, -4)], (2,))


def test_choice_with_all_tokens_kept_cannot_differ():
    with pytest.raises(ExportMismatchError):
        count_near_ties(stages(1, 0), stages(1, 1), [scores(1, 1)], (2,))


def test_threshold_stages_follow_the_counted_ones():
    first, second = scores(3, 2, 1), scores(1e-7, -1, NAN)
    assert count_near_ties(stages(1, 1, 0), stages(2, 1, 0), [first, second], (2,)) == 1
    with pytest.raises(ExportMismatchError, match="at stage 1"):
        count_near_ties(stages(1, 1, 0), stages(2, 1, 0), [first, scores(0.5, -1, NAN)], (2,))


def test_tie_between_keys_leaves_all_scores_open():
    assert count_near_ties(stages(0, 1), stages(1, 0), [scores(9, 1)], (1,), tied_match=True) == 2


# --- a whole frame --------------------------------------------------------------------------------------------------


def frame(**changes) -> dict[str, np.ndarray]:
    return {"kept_stages": stages(1, 0)[None], "masks": scores(1, -2)[None], "ok": np.array([True])} | changes


def compare(got, want, tolerance=1e-4):
    return compare_frame(got, want, [scores(2, 1)[None]], (1,), tolerance)


def test_equal_frames_agree():
    parity = compare(frame(), frame())
    assert parity.near_ties == 0 and parity.worst == 0.0 and set(parity.differences) == {"masks", "ok"}


def test_value_within_the_tolerance_is_reported():
    assert compare(frame(masks=scores(1.0001, -2)[None]), frame()).worst == pytest.approx(5e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": scores(1.001, -2)[None]}, "masks differs by 5.0e-04 of its largest value .allowed 1e-04"),
        ({"masks": scores(1, NAN)[None]}, "masks differs by inf"),
        ({"masks": scores(1, -2)}, r"masks has shape \(2,\), expected \(1, 2\)"),
        ({"ok": np.array([False])}, r"ok differs by 1\.0e\+00 .* .allowed 0e\+00"),
        ({"kept_stages": stages(0, 1)[None], "masks": scores(9, 9)[None]}, "tokens are chosen differently"),
    ],
    ids=["value", "nan", "shape", "bool", "choice first"],
)
def test_difference_is_an_error_that_names_it(changes, message):
    with pytest.raises(ExportMismatchError, match=message):
        compare(frame(**changes), frame())


def test_what_near_ties_inside_the_network_explain_is_allowed_for_that_tensor_alone():
    got = frame(masks=scores(1.001, -2)[None])
    compare_frame(got, frame(), [scores(2, 1)[None]], (1,), 1e-4, explained={"masks": 4.5e-4})
    for explained in ({"masks": 3.5e-4}, {"other": 1.0}):
        with pytest.raises(ExportMismatchError, match="masks differs by"):
            compare_frame(got, frame(), [scores(2, 1)[None]], (1,), 1e-4, explained=explained)


def test_tensor_that_is_missing_is_an_error():
    got = frame()
    del got["masks"]
    with pytest.raises(ExportMismatchError, match="masks is missing"):
        compare(got, frame())


def test_mismatch_ends_the_program_with_1():
    assert ExportMismatchError.exit_code == 1
