from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.budget import reset_budget, stage_ratios, token_budget, token_multiple, validate_budget
from runtime.errors import TokenBudgetError

ROWS = {  # design.md, "Schedules"; written out here so that a change of the table shows
    0.40: ("0.60", "0.42", "0.294", "0.206"),
    0.55: ("0.70", "0.56", "0.448", "0.358"),
    1.00: ("1", "1", "1", "1"),
}
BLOCKS_PER_STAGE = (2, 3, 3, 3)  # blocks 1-2, 3-5, 6-8, 9-11; block 0 is dense


patch_counts = st.integers(1, 10_000)
keep_ratios = st.integers(1, 10_000).map(lambda share: share / 10_000)


def exact_ratios(keep_ratio: Fraction) -> list[Fraction]:
    """The schedule in rational numbers, from the words of the design."""
    low, preset, dense = ([Fraction(text) for text in row] for row in ROWS.values())
    if keep_ratio <= Fraction("0.4"):
        return [ratio * keep_ratio / Fraction("0.4") for ratio in low]
    ends = (Fraction("0.4"), low, Fraction("0.55"), preset)
    if keep_ratio > Fraction("0.55"):
        ends = (Fraction("0.55"), preset, Fraction(1), dense)
    start, first, stop, last = ends
    share = (keep_ratio - start) / (stop - start)
    return [a + share * (b - a) for a, b in zip(first, last, strict=True)]


@pytest.mark.parametrize("keep_ratio", sorted(ROWS))
def test_rows_of_the_schedule_are_exact(keep_ratio):
    """Not one rounding away from the row: floor(N * ratio) would lose a token."""
    assert stage_ratios(keep_ratio) == tuple(float(text) for text in ROWS[keep_ratio])


@pytest.mark.parametrize(("keep_ratio", "mean"), [(0.40, 0.413), (0.55, 0.5415), (1.0, 1.0)])
def test_schedule_has_the_mean_that_names_it(keep_ratio, mean):
    shares = stage_ratios(keep_ratio)
    blocks = 1 + sum(share * blocks for share, blocks in zip(shares, BLOCKS_PER_STAGE, strict=True))
    assert blocks / 12 == pytest.approx(mean, abs=5e-4)


@given(keep_ratios)
@example(0.475)
@example(0.775)
@example(0.2)
def test_schedule_is_linear_between_rows_and_scaled_below(keep_ratio):
    want = [float(ratio) for ratio in exact_ratios(Fraction(str(keep_ratio)))]
    assert stage_ratios(keep_ratio) == pytest.approx(want, rel=1e-12)


@given(patch_counts, keep_ratios, st.integers(0, 300))
@example(2040, 0.4, 50)
@example(60, 0.1, 7)
def test_budget_is_the_largest_multiple_within_the_share(patch_count, keep_ratio, joined):
    counts, multiple = token_budget(patch_count, keep_ratio, joined_tokens=joined), token_multiple(patch_count)
    assert multiple in (2, 4, 8, 16) and (multiple == 2 or multiple <= patch_count / 100)
    for stage, (count, ratio) in enumerate(zip(counts, stage_ratios(keep_ratio), strict=True)):
        share, others = int(patch_count * ratio // 1), joined * (stage == 3)
        assert type(count) is int
        if ratio == 1.0:
            assert count == patch_count
        else:
            whole = [n for n in range(1, share + 1) if (n + others) % multiple == 0]
            assert count == min(max(whole, default=max(1, share)), counts[stage - 1] if stage else patch_count)


@given(patch_counts, keep_ratios)
@example(1, 0.0001)
def test_budget_is_nested_and_within_the_patches(patch_count, keep_ratio):
    counts = token_budget(patch_count, keep_ratio)
    assert patch_count >= counts[0] >= counts[1] >= counts[2] >= counts[3] >= 1
    assert validate_budget(counts, patch_count, 4) == counts


@given(patch_counts, st.tuples(keep_ratios, keep_ratios).map(sorted), st.integers(0, 300))
@example(1000, [math.nextafter(0.55, 0), 0.55], 0)
@example(1000, [0.55, math.nextafter(0.55, 1)], 0)
@example(1000, [0.4, math.nextafter(0.4, 1)], 50)
def test_budget_grows_with_the_keep_ratio(patch_count, ratios, joined):
    smaller, larger = (token_budget(patch_count, ratio, joined_tokens=joined) for ratio in ratios)
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_counts_of_the_published_ratios_are_multiples_of_sixteen():
    assert token_budget(2040, 0.55) == (1424, 1136, 912, 720)  # of 1428, 1142.4, 913.9 and 730.3
    assert token_budget(2040, 0.40) == (1216, 848, 592, 416)  # of 1224, 856.8, 599.8 and 420.2
    assert token_budget(2040, 0.40, joined_tokens=50)[3] + 50 == 464  # so are they with the queries


@pytest.mark.parametrize("patch_count", [1, 7, 60, 2040])
def test_keep_ratio_1_keeps_everything(patch_count):
    assert token_budget(patch_count, 1.0) == (patch_count,) * 4
    assert token_budget(patch_count, 1) == (patch_count,) * 4


def test_keep_ratio_just_below_1_is_nested():
    counts = token_budget(60, math.nextafter(1.0, 0.0))
    assert list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize("keep_ratio", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, "0.5", None])
def test_keep_ratio_out_of_range_is_refused(keep_ratio):
    with pytest.raises(TokenBudgetError, match=r"allowed is a number in \(0, 1\]") as caught:
        token_budget(60, keep_ratio)
    assert str(keep_ratio) in str(caught.value)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(500, 1000))
def test_valid_budget_comes_back_as_ints(counts, patch_count):
    counts = sorted(counts, reverse=True)
    for given_as in (counts, tuple(counts), [float(count) for count in counts], np.array(counts)):
        checked = validate_budget(given_as, patch_count, len(counts))
        assert checked == tuple(counts)
        assert all(type(count) is int for count in checked)


@pytest.mark.parametrize(
    ("budget", "stage", "value"),
    [
        ((0, 0, 0, 0), 0, "0"),
        ((30, 20, 10, 0), 3, "0"),
        ((30, -1, -2, -3), 1, "-1"),
        ((61, 30, 20, 10), 0, "61"),
        ((60, 61, 20, 10), 1, "61"),
        ((30.0, 20.5, 10.0, 5.0), 1, "20.5"),
        ((30, 20, math.nan, 10), 2, "nan"),
        ((True, True, True, True), 0, "True"),
        (("60", 30, 20, 10), 0, "60"),
        ((math.inf, 30, 20, 10), 0, "inf"),
        ((60, 30, None, 10), 2, "None"),
    ],
    ids=str,
)
def test_count_that_cannot_be_is_named_with_its_stage(budget, stage, value):
    with pytest.raises(TokenBudgetError, match=f"{value} at stage {stage}"):
        validate_budget(budget, 60, 4)


def test_range_of_a_count_is_told():
    with pytest.raises(TokenBudgetError, match=r"61 at stage 0, allowed is 1\.\.60"):
        validate_budget((61, 30, 20, 10), 60, 4)


@pytest.mark.parametrize(("budget", "stage"), [((20, 30, 10, 5), 1), ((30, 20, 10, 11), 3)])
def test_stage_that_grows_is_named(budget, stage):
    with pytest.raises(
        TokenBudgetError, match=f"stage {stage} keeps {budget[stage]} of the {budget[stage - 1]} "
    ) as it:
        validate_budget(budget, 60, 4)
    assert ",".join(map(str, budget)) in str(it.value)


@pytest.mark.parametrize("budget", [(), (30,), (30, 20, 10), (30, 20, 10, 5, 2)], ids=len)
def test_another_number_of_stages_is_refused_with_an_example(budget):
    with pytest.raises(TokenBudgetError, match=f"has {len(budget)} counts, the model selects at 4 stages") as caught:
        validate_budget(budget, 60, 4)
    assert "42,32,26,20" in str(caught.value)  # even numbers within 60 * (0.70, 0.56, 0.448, 0.358)


@given(st.integers(1, 5000), st.lists(st.integers(1, 5000), min_size=4, max_size=4))
def test_reset_budget_keeps_all_at_stage_0_alone(patch_count, counts):
    counts = sorted((min(count, patch_count) for count in counts), reverse=True)
    reset = reset_budget(counts, patch_count)
    assert reset == (patch_count, *counts[1:])
    assert validate_budget(reset, patch_count, 4) == reset


def test_reset_budget_leaves_its_argument_alone():
    counts = [42, 32, 26, 20]
    assert reset_budget(counts, 60) == (60, 32, 26, 20)
    assert counts == [42, 32, 26, 20]
