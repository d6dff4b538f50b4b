"""Verifying an engine on its device against the reference vectors that the bundle carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Engine
from runtime.bundle import REFERENCE_FILE, Bundle
from runtime.errors import BundleError, ExportMismatchError
from runtime.parity import FrameParity, compare_frame

MASK_STRIDE = 4  # mask logits are stored at every 4th row and column


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_engine` found.

    Attributes:
        frames: Agreement of each frame whose tokens were chosen as in the reference.
        near_ties: Tokens chosen differently within the margin of a tie; values of such frames are not compared,
            because the reference does not hold what another choice would give.
        skipped: Number of such frames.
    """

    frames: list[FrameParity]
    near_ties: int
    skipped: int

    @property
    def worst(self) -> dict[str, float]:
        """Largest relative difference of each tensor over the frames compared."""
        names = dict.fromkeys(name for frame in self.frames for name in frame.differences)
        return {name: max(frame.differences.get(name, 0.0) for frame in self.frames) for name in names}


def verify_engine(bundle: Bundle, engine: Engine, tolerance: float = 1e-4) -> Verification:
    """Run the bundle's reference clip; every frame starts from the reference's state.

    Args:
        tolerance: Largest relative difference ``max|a - b| / max|b|`` of each tensor.

    Raises:
        BundleError: The bundle carries no reference vectors.
        ExportMismatchError: A difference beyond the tolerance, or no frame that could be compared.
    """
    path = bundle.folder / REFERENCE_FILE
    if REFERENCE_FILE not in bundle.manifest.files or not path.is_file():
        raise BundleError(f"{path} is missing, so there is nothing to verify against. Export the bundle again.")
    with np.load(path, allow_pickle=False) as file:
        reference = {name: file[name] for name in file.files}
    buffers = engine.open_stream()
    frames, near_ties, skipped = [], 0, 0
    for t in range(int(reference["frames"])):
        result = _compare(reference, engine, buffers, t, tolerance)
        near_ties += result.near_ties
        if result.near_ties:
            skipped += 1
        else:
            frames.append(result)
    if not frames:
        raise ExportMismatchError(f"all {skipped} frames hold near-ties, so no value could be compared.")
    return Verification(frames, near_ties, skipped)


def _compare(reference: Mapping[str, NDArray], engine: Engine, buffers, t: int, tolerance: float) -> FrameParity:  # type: ignore[no-untyped-def, type-arg]
    """One frame of the clip."""
    budget = tuple(int(count) for count in reference[f"{t}.budget"])
    buffers.set_state(_section(reference, f"{t}.state."))
    buffers.image[0] = reference[f"{t}.image"]
    got = {name: np.array(value) for name, value in buffers.run(budget).items()}
    got["mask_logits"] = got["mask_logits"][..., ::MASK_STRIDE, ::MASK_STRIDE]
    buffers.commit()
    got |= {f"next_{name}": value for name, value in buffers.state().items()}
    want = _section(reference, f"{t}.output.")
    carried = {pair.input for pair in engine.graph.carried}  # the tracker writes the rest
    following = _section(reference, f"{t + 1}.state.")
    want |= {f"next_{name}": value for name, value in following.items() if name in carried}
    scores = [reference[f"{t}.scores.{stage}"] for stage in range(len(_section(reference, f"{t}.scores.")))]
    tied = bool(reference[f"{t}.tied_match"])
    counted = budget[:1] if engine.graph.selection == "threshold" else budget  # the stages that decide by a count
    kept = {name: want[name] for name in ("kept_stages",) if name in want}
    try:
        if kept:
            choice = compare_frame(got, kept, scores, counted, tolerance, tied)
            if choice.near_ties:
                return choice
        return compare_frame(got, want, scores, counted, tolerance, tied)
    except ExportMismatchError as error:
        raise ExportMismatchError(f"frame {t}, budget {budget}, {engine.report}: {error}") from error


def _section(reference: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:  # type: ignore[type-arg]
    return {name[len(prefix) :]: value for name, value in reference.items() if name.startswith(prefix)}
