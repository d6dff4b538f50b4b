"""The record of what has passed: it speaks for the same engine on a machine of the same make, and for no other."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from runtime import machine, verified
from runtime.bundle import load_bundle
from runtime.verified import is_verified, note_verified, warn_unless_verified

DIGEST = "0" * 64


@pytest.fixture
def bundle(changed_bundle):
    """A copy of the micro bundle that nobody has verified."""
    folder = changed_bundle()
    (folder / "verified.json").unlink(missing_ok=True)
    return load_bundle(folder)


def other_engine(engine, graph=None, **report):
    return SimpleNamespace(report=replace(engine.report, **report), graph=graph or engine.graph)


def test_engine_is_verified_once_it_was_noted(bundle, micro_engine):
    assert not is_verified(bundle, micro_engine)
    note_verified(bundle, micro_engine, {"masks": 30.24, "classes": 41.0})
    assert is_verified(bundle, micro_engine) and is_verified(load_bundle(bundle.folder), micro_engine)
    (record,) = json.loads((bundle.folder / "verified.json").read_text())
    assert record["lowest_sqnr_db"] == 30.2 and record["passed_at"].endswith("+00:00")
    assert record["graph_sha256"] == bundle.manifest.files["model.onnx"]


def test_export_notes_what_it_compared(micro_bundle, micro_engine):
    assert is_verified(load_bundle(micro_bundle), micro_engine)
    assert not is_verified(load_bundle(micro_bundle), other_engine(micro_engine, backend="openvino"))


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "tensorrt"},
        {"version": "0.1"},
        {"provider": "CUDAExecutionProvider"},
        {"precision": "bf16"},
        {"plan_sha256": DIGEST},
    ],
    ids=str,
)
def test_another_engine_is_not_verified(bundle, micro_engine, change):
    other = other_engine(micro_engine, **change)
    note_verified(bundle, micro_engine, {})
    assert not is_verified(bundle, other)
    note_verified(bundle, other, {})
    assert is_verified(bundle, other) and is_verified(bundle, micro_engine)  # both stand there


def test_threads_make_no_other_engine(bundle, micro_engine):
    note_verified(bundle, micro_engine, {})
    assert is_verified(bundle, other_engine(micro_engine, threads=7))


def test_another_graph_is_not_verified(bundle, micro_engine):
    note_verified(bundle, micro_engine, {})
    assert not is_verified(bundle, other_engine(micro_engine, graph=bundle.manifest.baseline))


def test_another_machine_is_not_verified(bundle, micro_engine, monkeypatch):
    note_verified(bundle, micro_engine, {})
    monkeypatch.setattr(verified, "machine_name", lambda: "NVIDIA Jetson AGX Orin")
    assert not is_verified(bundle, micro_engine)


def test_second_pass_replaces_the_first(bundle, micro_engine):
    for ratio in (30.0, 40.0):
        note_verified(bundle, micro_engine, {"masks": ratio})
    (record,) = json.loads((bundle.folder / "verified.json").read_text())
    assert record["lowest_sqnr_db"] == 40.0


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, null]", "\x00"], ids=repr)
def test_damaged_record_is_none(bundle, micro_engine, text):
    (bundle.folder / "verified.json").write_text(text)
    assert not is_verified(bundle, micro_engine)
    note_verified(bundle, micro_engine, {})
    assert is_verified(bundle, micro_engine)


def test_bundle_that_cannot_be_written_is_a_warning(bundle, micro_engine, caplog):
    (bundle.folder / "verified.json").mkdir()
    before = sorted(path.name for path in bundle.folder.iterdir())
    note_verified(bundle, micro_engine, {})
    assert "cannot be written, so run will ask for verify again" in caplog.text
    assert sorted(path.name for path in bundle.folder.iterdir()) == before


def test_warning_names_the_command(bundle, micro_engine, caplog):
    caplog.set_level(logging.WARNING)
    warn_unless_verified(bundle, micro_engine, "openvino", "bf16")
    assert f"deploy.py verify {bundle.folder} --backend openvino --precision bf16" in caplog.text
    caplog.clear()
    note_verified(bundle, micro_engine, {})
    warn_unless_verified(bundle, micro_engine, "onnxruntime")
    assert caplog.text == ""


# Which machine


def machine_of(monkeypatch, tmp_path, cpu: str = "", board: str = "", *gpus: str) -> str:
    for name, text in (("_BOARD", board), ("_CPU", cpu)):
        path = tmp_path / name
        if text:
            path.write_text(text)
        monkeypatch.setattr(machine, name, path)
    for index, text in enumerate(gpus):
        (tmp_path / f"gpus/0000:0{index}:00.0").mkdir(parents=True)
        (tmp_path / f"gpus/0000:0{index}:00.0/information").write_text(text)
    monkeypatch.setattr(machine, "_GPUS", tmp_path / "gpus")
    return machine.machine_name()


def test_board_is_told_before_its_processor(monkeypatch, tmp_path):
    assert (
        machine_of(monkeypatch, tmp_path, "model name\t: ARMv8\n", "NVIDIA Jetson Orin Nano\0")
        == "NVIDIA Jetson Orin Nano"
    )


def test_processors_of_one_brand_are_told_apart(monkeypatch, tmp_path):
    """Virtual machines give a brand alone; its generations differ in what they compute, and how fast."""
    cpu = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    assert machine_of(monkeypatch, tmp_path, cpu) == "AMD EPYC (family 26, model 2)"


def test_processor_and_cards(monkeypatch, tmp_path):
    cpu = "processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: AMD EPYC\n"
    card = "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 1\n"
    assert machine_of(monkeypatch, tmp_path, cpu, "", card, card) == (
        "AMD EPYC, NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090"
    )


def test_machine_that_tells_nothing_has_a_name_all_the_same(monkeypatch, tmp_path):
    assert machine_of(monkeypatch, tmp_path)
