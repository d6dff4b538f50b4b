"""Every row of the comparison runs the network that its name says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import alternatives
from benchmarks.token_merging import MergingVppEo, counts_for

pytestmark = pytest.mark.slow


def test_all_rows_are_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda network: network)  # takes a minute and a C++ compiler
    monkeypatch.setattr(alternatives, "RATIOS", ("0.55",))
    path = tmp_path / "alternatives.json"
    alternatives.main(threads=1, steps=3, warm_up=1, model="vpp-eo-micro", size=(96, 160), output=path)
    result = json.loads(path.read_text())
    names = [row["name"] for row in result["rows"]]
    assert len(names) == len(set(names)) == 5 + 4 + 3
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["dense, onnxruntime"]["speed_up"] == pytest.approx(1.0, abs=1e-3)
    ours, theirs = by_name["ours 0.55, onnxruntime"], by_name["ToMe at the work of 0.55, onnxruntime"]
    assert ours["giga_macs"] <= theirs["giga_macs"] <= 1.05 * ours["giga_macs"]
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)


def test_exported_merging_answers_as_torch(micro_model, tmp_path):
    import onnxruntime

    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.integers(0, 256, (1, 96, 160, 3), np.uint8),
        "queries": micro_model.queries.detach().numpy()[None].copy(),
    }
    network = MergingVppEo(micro_model, counts_for(60, 12, 80)).eval()
    path = alternatives.export_merging(network, inputs, tmp_path / "tome.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = network(*map(torch.from_numpy, inputs.values()))
    for one, other in zip(session.run(None, inputs), want, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)
