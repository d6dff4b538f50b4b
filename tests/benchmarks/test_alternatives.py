"""Every row of the comparison runs the network that its name says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import alternatives
from benchmarks.token_merging import MergingVppEo

pytestmark = pytest.mark.slow


def answers_as_torch(path: Path, network: MergingVppEo, inputs: dict[str, np.ndarray]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = network(*map(torch.from_numpy, inputs.values()))
    for one, other in zip(session.run(None, inputs), want, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)


def test_all_rows_are_measured_and_written(tmp_path, monkeypatch, capsys):
    checked, plain_export = [], alternatives.export_merging

    def export_and_check(network, inputs, path):
        answers_as_torch(plain_export(network, inputs, path), network, inputs)
        checked.append(path.name)
        return path

    monkeypatch.setattr(alternatives, "export_merging", export_and_check)
    monkeypatch.setattr(torch, "compile", lambda network: network)  # takes a minute and a C++ compiler
    monkeypatch.setattr(alternatives, "RATIOS", ("0.55",))
    path = tmp_path / "alternatives.json"
    alternatives.main(threads=1, steps=3, warm_up=1, model="vpp-eo-micro", size=(96, 160), output=path)
    assert checked == ["tome-0.55.onnx"]
    result = json.loads(path.read_text())
    names = [row["name"] for row in result["rows"]]
    assert len(names) == len(set(names)) == 5 + 4 + 3
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["dense, onnxruntime"]["speed_up"] == 1.0
    ours, theirs = by_name["ours 0.55, onnxruntime"], by_name["ToMe at the work of 0.55, onnxruntime"]
    assert ours["giga_macs"] <= theirs["giga_macs"] <= 1.05 * ours["giga_macs"] + 0.001  # three decimals of both
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)
