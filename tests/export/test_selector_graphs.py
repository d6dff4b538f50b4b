"""Every selector as a graph: it agrees with torch, streams, and holds no operator that engines refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from export.bundle_writer import ExportRequest, export_bundle
from export.check import Oracle
from export.reference import synthetic_frames
from models.checkpoints import save_checkpoint
from models.configs import CONFIGS
from models.pruned_host import Selection
from models.vpp_eo import VppEo
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import CheckpointError, TokenBudgetError
from runtime.reference import verify_engine
from runtime.stream import Stream

pytestmark = pytest.mark.slow

KINDS = [
    ("vpp", "background", 30),
    ("vpp", "adapted", 0),
    ("svit", "stale", 0),
    ("dynamicvit", "reuse", 0),
    ("masks", "background", 50),
    ("difference", "stale", 20),
    ("random", "reuse", 0),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def bundle(request, tmp_path_factory):
    name, pruned, refresh = request.param
    torch.manual_seed(0)
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], selector=name, pruned=pruned, refresh=refresh))
    folder = tmp_path_factory.mktemp("selector")
    save_checkpoint(model, folder / "model.safetensors")
    parity = export_bundle(ExportRequest(folder / "model.safetensors", folder / "bundle", baseline=False))
    assert parity.keys() == {"smallest", "usual", "largest"} and all(each.worst < 1e-4 for each in parity.values())
    return load_bundle(folder / "bundle")


def test_verifies_and_streams_with_the_state_it_names(bundle):
    manifest, engine = bundle.manifest, load_engine(bundle)
    name, _, rest = manifest.origin.selection.partition(", dropped tokens ")
    assert (name, rest.split(",")[0]) in [kind[:2] for kind in KINDS]
    assert max(verify_engine(bundle, engine).worst.values()) < 1e-4
    pictures = list(synthetic_frames(manifest.image_size, 5))
    with Stream(bundle, engine, keep_ratio=0.4) as stream, Stream(bundle, engine, keep_ratio=0.4) as other:
        kept = [stream.step(picture, timestamp_s=t / 30) for t, picture in enumerate(pictures)]
        again = [other.step(picture, timestamp_s=t / 30) for t, picture in enumerate(pictures)]
        stream.reset()
        first = stream.step(pictures[0], timestamp_s=1.0)
    rule = manifest.budget_rule
    assert kept[0].tokens_kept.tolist() == list(rule.at_reset(rule.for_ratio(0.4)))
    assert all(result.tokens_kept.tolist() == list(rule.for_ratio(0.4)) for result in kept[1:])
    for one, same in zip(kept, again, strict=True):
        np.testing.assert_array_equal(one.kept_stages, same.kept_stages)
    np.testing.assert_array_equal(first.kept_stages, kept[0].kept_stages)  # a reset forgets all of the state


def test_graph_has_no_node_that_engines_refuse(bundle):
    graph = onnx.load(bundle.path(bundle.manifest.graph)).graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"NonZero", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "If", "Loop"}


def test_scores_are_noted_under_their_stage():
    """A selector that starts at stage 1 has chosen nothing at stage 0."""
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], selector="svit"))
    oracle, image = Oracle(model), torch.from_numpy(next(synthetic_frames((96, 160))))[None]
    oracle.run(image, model.initial_state(1), model.budget_rule.for_ratio(0.4), Selection.BUDGET)
    assert [int((~np.isnan(scores)).sum()) for scores in oracle.scores] == [
        0,
        *(60, *model.budget_rule.for_ratio(0.4)[1:3]),
    ]


@pytest.mark.parametrize("name", ["masks", "random", "difference"])
def test_ranking_without_a_decision_has_no_threshold_mode(name, tmp_path):
    save_checkpoint(VppEo(replace(CONFIGS["vpp-eo-micro"], selector=name)), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="there is no threshold"):
        export_bundle(ExportRequest(tmp_path / "model.safetensors", tmp_path / "b", selection=Selection.THRESHOLD))
    assert not (tmp_path / "b").exists()


def test_budget_that_the_selector_cannot_take_is_refused(bundle):
    manifest = bundle.manifest
    if manifest.first_stage == 0:
        assert manifest.budget_rule.checked((50, 40, 30, 20)) == (50, 40, 30, 20)
        return
    with pytest.raises(TokenBudgetError, match="drops no token before stage 1"):
        Stream(bundle, load_engine(bundle), budget=(50, 40, 30, 20))
