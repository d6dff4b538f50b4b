"""The micro bundle loaded, and engines that fail on demand."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.errors import StepError
from runtime.manifest import TrackerSettings
from runtime.parity import relative_difference


@pytest.fixture(scope="session")
def micro(micro_bundle: Path) -> Bundle:
    """The micro bundle, whose random weights are sure of nothing: with these limits every query shows an object."""
    bundle = load_bundle(micro_bundle)
    tracker = TrackerSettings(start_score=0.0, keep_score=0.0, duplicate_iou=1.0)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"tracker": tracker}))


@pytest.fixture(scope="session")
def micro_engine(micro: Bundle) -> Engine:
    """The micro bundle's graph on one thread; streams may share it."""
    return load_engine(micro, threads=1)


class FaultyBuffers:
    """Real buffers around which each step takes the next fault from a list: None, ``"fail"`` or ``"not ok"``."""

    def __init__(self, buffers: Any, faults: deque[str | None]) -> None:
        self._buffers, self._faults = buffers, faults
        self.image = buffers.image
        self.budgets: list[tuple[int, ...] | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffers, name)

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        self.budgets.append(token_budget)
        fault = self._faults.popleft() if self._faults else None
        if fault == "fail":
            raise StepError("the device is gone")
        outputs = self._buffers.run(token_budget)
        return outputs if fault is None else {**outputs, "state_ok": np.array([False])}


class FaultyEngine:
    """An engine that fails where it is told to."""

    def __init__(self, engine: Engine, faults: list[str | None]) -> None:
        self.report, self.graph = engine.report, engine.graph
        self._engine, self._faults = engine, deque(faults)

    def open_stream(self, batch: int = 1, usual_budget=None) -> FaultyBuffers:
        return FaultyBuffers(self._engine.open_stream(batch, usual_budget), self._faults)

    def close(self) -> None:
        pass


@pytest.fixture
def faulty_engine(micro_engine: Engine) -> Callable[[list[str | None]], FaultyEngine]:
    """``faulty_engine([None, "fail"])``: the first step works, the second fails, all others work."""
    return lambda faults: FaultyEngine(micro_engine, faults)


@pytest.fixture
def changed_bundle(micro_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """``changed_bundle(**fields)``: a copy with other fields in its manifest.

    ``changed_bundle.rehash(folder)`` makes the hashes fit again after a file was changed.
    """

    def make(**fields: object) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(micro_bundle, folder)
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    def rehash(folder: Path) -> Path:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]
        }
        path.write_text(json.dumps(manifest))
        return folder

    make.rehash = rehash  # type: ignore[attr-defined]
    return make


@pytest.fixture
def agrees_with_gridsample(drifting_frames, monkeypatch) -> Callable[[Bundle, Engine, int], None]:
    """``agrees_with_gridsample(bundle, engine, batch)``: three frames, each from the state of ONNX Runtime's own
    operators, give its tokens and, within 1e-3, its answers.
    """

    def check(bundle: Bundle, engine: Engine, batch: int) -> None:
        budget = bundle.manifest.presets["0.55"]
        one = engine.open_stream(batch, usual_budget=budget)
        with monkeypatch.context() as patch:
            patch.setattr("runtime.onnxruntime_deformable.join_deformable_attention", lambda *arguments: None)
            other = load_engine(bundle, threads=1).open_stream(batch)
        clips = [drifting_frames(3, bundle.manifest.image_size, seed=seed) for seed in range(batch)]
        for t in range(3):
            one.set_state(other.state())
            one.image[:] = other.image[:] = np.stack([clip[t] for clip in clips])
            used = bundle.manifest.budget_rule.at_reset(budget) if t == 0 else budget
            found, wanted = one.run(used), other.run(used)
            np.testing.assert_array_equal(found["kept_stages"], wanted["kept_stages"])
            for name in ("class_logits", "mask_logits", "queries"):
                assert relative_difference(found[name], wanted[name]) < 1e-3, name
            other.commit()

    return check
