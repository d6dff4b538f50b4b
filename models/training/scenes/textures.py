"""Textures: noise, stripes, checks, blobs and gradients between three colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.training.scenes.arrays import Field, Image, Rng
from models.training.scenes.config import CLASSES


def _noise(rng: Rng, height: int, width: int, cell: float, octaves: int = 3) -> Field:
    """Smooth noise with features of ``cell`` pixels and finer ones on top."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = max(cell / 2**octave, 1.0)
        grid = rng.random((int(height / step) + 2, int(width / step) + 2), np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.asarray(cv2.normalize(total, total, 0.0, 1.0, cv2.NORM_MINMAX), np.float32)


def _sharpen(field: NDArray[np.floating[Any]], slope: float) -> Field:
    return np.asarray(np.clip((field - 0.5) * slope + 0.5, 0.0, 1.0), np.float32)


def turned_grid(height: int, width: int, angle: float, period: float) -> tuple[Field, Field]:
    """Row and column coordinates turned by ``angle``, in radians of a wave of ``period`` pixels."""
    scale = np.float32(2 * np.pi / period)
    y, x = np.mgrid[:height, :width].astype(np.float32) * scale
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return y * cos - x * sin, y * sin + x * cos


def _stripes(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, _ = turned_grid(height, width, rng.uniform(0, np.pi), cell)
    bend = _noise(rng, height, width, 4 * cell, 1) * rng.uniform(0, 4)
    return _sharpen(0.5 + 0.5 * np.sin(u + bend), rng.uniform(1, 4))


def _checks(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, v = turned_grid(height, width, rng.uniform(0, np.pi), 1.6 * cell)
    return _sharpen(0.5 + 0.5 * np.sin(u) * np.sin(v), rng.uniform(2, 6))


def _blobs(rng: Rng, height: int, width: int, cell: float) -> Field:
    return _sharpen(_noise(rng, height, width, 1.2 * cell, 2), rng.uniform(4, 9))


def _gradient(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, _ = turned_grid(height, width, rng.uniform(0, np.pi), 8 * cell)
    return np.abs(np.mod(u / np.float32(np.pi), 2) - 1)


_FAMILIES: tuple[Callable[[Rng, int, int, float], Field], ...] = (_noise, _stripes, _checks, _blobs, _gradient)


@dataclass(frozen=True)
class Texture:
    """A recipe that paints the same pattern at any size: what is painted depends on nothing else."""

    family: int
    cell: float  # size of a feature, in frame heights
    colours: NDArray[np.float64]  # [3, 3]: three RGB stops, 0..255
    grain: float  # share of fine noise
    seed: int

    def paint(self, height: int, width: int, frame_height: int) -> Image:
        """The pattern on ``height`` x ``width`` pixels of a frame that is ``frame_height`` pixels high."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        field = _FAMILIES[self.family](rng, height, width, max(self.cell * frame_height, 2.0))
        grain = rng.random((height, width), np.float32)
        level = cv2.convertScaleAbs(field * (1 - self.grain) + grain * self.grain, alpha=255)
        stops = [np.interp(np.arange(256), [0, 128, 255], channel) for channel in self.colours.T]
        return np.stack(stops, axis=-1).astype(np.uint8)[level]


def random_texture(rng: Rng) -> Texture:
    """Any pattern in three colours that go together."""
    base = rng.uniform(60, 195) + rng.uniform(0, 55) * rng.normal(0, 1, 3)
    spread = rng.uniform(25, 95) * rng.normal(0, 1, (3, 1)) + rng.normal(0, 22, (3, 3))
    return Texture(
        family=int(rng.integers(len(_FAMILIES))),
        cell=float(np.exp(rng.uniform(np.log(0.025), np.log(0.12)))),
        colours=np.clip(base + spread, 10, 245),
        grain=float(rng.uniform(0.05, 0.25)),
        seed=int(rng.integers(2**31)),
    )


def typical_texture(rng: Rng, label: int) -> Texture:
    """Pattern and hue that belong to a class, with the differences that its members have."""
    hue = 2 * np.pi * label / len(CLASSES) + rng.normal(0, 0.15)
    tint = np.cos(hue - np.array([0, 1, 2]) * 2 * np.pi / 3)
    middle = rng.uniform(100, 150) + rng.uniform(45, 75) * tint
    contrast = rng.uniform(35, 70) * np.array([[-1.0], [0.0], [1.0]])
    return Texture(
        family=label % len(_FAMILIES),
        cell=float(0.05 * np.exp(rng.normal(0, 0.2))),
        colours=np.clip(middle + contrast, 10, 245),
        grain=float(rng.uniform(0.05, 0.25)),
        seed=int(rng.integers(2**31)),
    )
