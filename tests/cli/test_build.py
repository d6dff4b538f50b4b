"""``build`` as its user sees it, with TensorRT-RTX where it is installed and with its refusals everywhere."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)


@needs_rtx
@pytest.mark.slow
def test_builds_and_finds_nothing_to_do_the_second_time(cli, own_bundle):
    arguments = "build", own_bundle, "--backend", "tensorrt-rtx", "--budgets", "0.55", "--compute-capability", "sm89"
    first = cli(*arguments).check().out
    assert "42 / 32 / 26 / 20" in first and "60 / 32 / 26 / 20" in first and "all, no selection" in first
    assert "written in" in first and "not read back" in first and "for sm89" in first
    second = cli(*arguments).check().out
    assert second.count("is up to date") == 2
    records = [json.loads(path.read_text()) for path in (own_bundle / "engines").glob("*.json")]
    assert {record["graph"] for record in records} == {"model.onnx", "dense.onnx"}
    shown = cli("inspect", own_bundle).check().out
    assert "model.tensorrt-rtx-" in shown and "0.55 reset" in shown
    cli("run", own_bundle, "--source", own_bundle, "--backend", "tensorrt-rtx").refused("no NVIDIA GPU")


def test_refusals_are_one_message(cli, own_bundle):
    cli("build", own_bundle, "--budgets", "0.4;0.5").refused("0.4,0.55,1.0")
    cli("build", own_bundle, "--budgets", "1.5").refused("keep ratio is 1.5")
    cli("build", own_bundle, "--token-budget", "61,1,1,1").refused("61 at stage 0, allowed is 1..60")
    cli("build", own_bundle, "--backend", "cuda").refused("'cuda'", "tensorrt, tensorrt-rtx")
    assert not (own_bundle / "engines").exists()


@needs_rtx
def test_refusals_of_what_the_library_cannot_do(cli, own_bundle):
    build = "build", own_bundle, "--backend", "tensorrt-rtx"
    cli(*build, "--compute-capability", "sm87").refused("build on the Jetson with --backend tensorrt")
    cli(*build, "--version-compatible").refused("--compute-capability")
    assert not (own_bundle / "engines").exists()


def test_without_either_library_it_says_how_to_get_them(cli, own_bundle, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("tensorrt") else real(name))
    cli("build", own_bundle).refused("neither TensorRT nor TensorRT-RTX", "JetPack", "[tensorrt-rtx]")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    cli("build", own_bundle, "--backend", "tensorrt").refused("TensorRT is not there", "JetPack")
