"""Pictures to calibrate on, and a bundle calibrated once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from PIL import Image

from export.calibrated_bundle import CalibrationRequest, calibrate_bundle
from export.reference import synthetic_frames
from runtime.bundle import Bundle, load_bundle

FRAMES = 12


def write_pictures(folder: Path, frames: int = FRAMES, seed: int = 3) -> Path:
    folder.mkdir(parents=True)
    for index, frame in enumerate(synthetic_frames((96, 160), frames, seed)):
        Image.fromarray(frame).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 drifting pictures. Read only."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "street")


@pytest.fixture(scope="session")
def fp32(micro_bundle: Path) -> Bundle:
    return load_bundle(micro_bundle)


@pytest.fixture(scope="session")
def fp32_graph(fp32: Bundle) -> onnx.ModelProto:
    """Read only."""
    return onnx.load(fp32.path(fp32.manifest.graph))


@pytest.fixture(scope="session")
def calibrated(micro_bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro bundle in INT8. Read only."""
    output = tmp_path_factory.mktemp("calibrated") / "micro-int8"
    calibrate_bundle(CalibrationRequest(micro_bundle, output, "int8", sources=(str(pictures),), frames=FRAMES))
    return output
