"""What many tests share: a micro network with random weights, exported once for the whole session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

SIZE = (96, 160)  # 6 x 10 = 60 patches


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder once for all worker processes: the first to take the lock does it, the others wait."""
    import time

    lock = folder.with_suffix(".lock")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        for _ in range(8000):
            if folder.exists():
                return folder
            time.sleep(0.1)
        raise TimeoutError(f"nobody made {folder}") from None
    make(folder)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of this session, the same for all worker processes."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def micro_model():
    """vpp-eo-micro with random weights whose selectors do not all agree, in evaluation mode."""
    import torch

    from models.configs import config_by_name
    from models.vpp_eo import VppEo

    torch.manual_seed(0)
    return VppEo(config_by_name("vpp-eo-micro")).eval()


@pytest.fixture(scope="session")
def micro_checkpoint(shared_folder: Path, micro_model) -> Path:
    """A safetensors file of :func:`micro_model`."""
    from models.checkpoints import save_checkpoint

    def make(folder: Path) -> None:
        partial = folder.with_suffix(".making")
        partial.mkdir()
        save_checkpoint(micro_model, partial / "micro.safetensors")
        partial.rename(folder)

    return _once(shared_folder / "micro-checkpoint", make) / "micro.safetensors"


@pytest.fixture(scope="session")
def micro_bundle(shared_folder: Path, micro_checkpoint: Path) -> Path:
    """The bundle of :func:`micro_model` in ``budget`` mode. Read only: copy it to change it."""
    from export.bundle_writer import ExportRequest, export_bundle

    return _once(
        shared_folder / "micro-bundle", lambda folder: export_bundle(ExportRequest(micro_checkpoint, folder)) and None
    )


@pytest.fixture(scope="session")
def threshold_bundle(shared_folder: Path, micro_checkpoint: Path) -> Path:
    """The same in ``threshold`` mode."""
    from export.bundle_writer import ExportRequest, export_bundle
    from models.pruned_host import Selection

    request = ExportRequest(
        micro_checkpoint, shared_folder / "threshold-bundle", selection=Selection.THRESHOLD, baseline=False
    )
    return _once(request.output, lambda folder: export_bundle(request) and None)


@pytest.fixture(scope="session")
def published_checkpoint(shared_folder: Path) -> Path:
    """A file of the published network, micro size, with the weights of its reference vectors."""
    from published_files import reference, reference_weights, save_published

    def make(folder: Path) -> None:
        partial = folder.with_suffix(".making")
        partial.mkdir()
        save_published(partial / "epoch_6.pth", reference_weights(reference()))
        partial.rename(folder)

    return _once(shared_folder / "published", make) / "epoch_6.pth"


@pytest.fixture(scope="session")
def published_bundle(shared_folder: Path, published_checkpoint: Path) -> Path:
    """The bundle of :func:`published_checkpoint`. Read only: copy it to change it."""
    from published_files import IMAGE_SIZE

    from export.bundle_writer import ExportRequest, export_bundle

    request = ExportRequest(
        published_checkpoint, shared_folder / "published-bundle", model="vpp-rovis", image_size=IMAGE_SIZE
    )
    return _once(request.output, lambda folder: export_bundle(request) and None)


@pytest.fixture
def drifting_frames() -> Callable[..., list[NDArray[np.uint8]]]:
    """``drifting_frames(count, size=SIZE, seed=0)``: smooth patterns that move, uint8 [H, W, 3] each."""
    from export.reference import synthetic_frames

    def make(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[NDArray[np.uint8]]:
        return list(synthetic_frames(size, count, seed))

    return make
