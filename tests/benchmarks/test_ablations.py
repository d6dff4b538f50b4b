"""Key frames of the ablations: all tokens in every n-th frame, the budget in the others."""

from __future__ import annotations

from benchmarks.ablations import key_frames
from runtime.backend import load_engine
from runtime.bundle import load_bundle


def test_every_third_frame_computes_all_tokens(micro_bundle, drifting_frames):
    bundle = load_bundle(micro_bundle)
    rule = bundle.manifest.budget_rule
    with key_frames(3)(bundle, load_engine(bundle, threads=1), keep_ratio=0.4) as stream:
        kept = [tuple(stream.step(frame, timestamp_s=t / 30).tokens_kept) for t, frame in enumerate(drifting_frames(7))]
    every, usual = (bundle.manifest.patch_count,) * 4, rule.for_ratio(0.4)
    assert kept == [every, usual, usual, every, usual, usual, every]
