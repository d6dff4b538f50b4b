"""Ranges from counts: against numpy on the values themselves, and entropy against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import entropy

from calib.histogram import BINS, CANDIDATE_STEP, LEVELS, Histogram, entropy_value, percentile_value

values = arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32))


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


@given(st.lists(values, min_size=1, max_size=4))
def test_counts_do_not_depend_on_the_order_or_the_split(parts):
    one, other = histogram_of(*parts), histogram_of(np.concatenate(parts)[::-1])
    merged = Histogram()
    for part in reversed(parts):
        merged.merge(histogram_of(part))
    for each in (other, merged):
        np.testing.assert_array_equal(each.counts, one.counts)
        assert (each.reach, each.largest) == (one.reach, one.largest)
    assert one.counts.sum() == sum(part.size for part in parts)
    assert one.largest == np.abs(np.concatenate(parts)).max()


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99])
def test_percentile_agrees_with_numpy_within_a_bin(percentile):
    sample = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    histogram = histogram_of(sample)
    want = np.percentile(np.abs(sample), percentile, method="inverted_cdf")
    assert want <= percentile_value(histogram, percentile) <= want + 1.01 * histogram.reach / BINS


def test_share_beyond():
    histogram = histogram_of(np.arange(100, dtype=np.float32))
    assert histogram.share_beyond(90.0) == pytest.approx(0.10) and histogram.share_beyond(1e9) == 0.0


def divergence(counts: np.ndarray, length: int) -> float:
    """Migacz' definition, level by level."""
    reference = counts[:length].astype(float)
    levelled = np.zeros(length)
    for level in range(LEVELS):
        members = [place for place in range(length) if place * LEVELS // length == level and reference[place] > 0]
        for place in members:
            levelled[place] = reference[members].sum() / len(members)
    reference[-1] += counts[length:].sum()
    return float(entropy(reference, np.maximum(levelled / levelled.sum(), 1e-12)))


def test_entropy_finds_the_smallest_divergence():
    rng = np.random.default_rng(1)
    sample = np.concatenate([rng.normal(size=20_000), rng.normal(size=40) * 20]).astype(np.float32)
    histogram = histogram_of(sample)
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    lengths = range(used, LEVELS - 1, -CANDIDATE_STEP)
    want = min(lengths, key=lambda length: divergence(histogram.counts[:used], length))
    assert entropy_value(histogram) == pytest.approx(want * histogram.reach / BINS)
    assert entropy_value(histogram) < 0.7 * histogram.largest, "outliers were not cut off"


def test_nan_is_an_error_and_changes_nothing():
    histogram = histogram_of(np.ones(3, np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            histogram.add(np.array([5.0, bad], np.float32))
    assert (histogram.counts.sum(), histogram.largest) == (3, 1.0)
