"""What an object looks like on its own: an outline, filled with a texture, lit, with a shadow around it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from models.training.scenes.arrays import Field, Image, Polygon, Rng
from models.training.scenes.textures import Texture, turned_grid


def _circle(radius: float = 1.0, centre_x: float = 0.0) -> Polygon:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1) + [centre_x, 0.0]


def _corners(radii: NDArray[np.float64]) -> Polygon:
    """Polygon with its corners at even angles and the given distances from the middle; the first is on top."""
    angle = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
    return radii[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _box(half_height: float, half_width: float) -> Polygon:
    return np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) * [half_width, half_height]


def _cross(rng: Rng) -> Polygon:
    arm = rng.uniform(0.24, 0.36)
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])  # top arm's right corner, clockwise to the right arm's
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])


def _heart() -> Polygon:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -(y + 2.5)], axis=-1) / 16.5


def class_outline(rng: Rng, name: str) -> tuple[Polygon, Polygon | None]:
    """Outline of one example of a class and the part cut out of it, if any."""
    if name == "square":
        return _box(0.84, 0.84), None
    if name == "triangle":
        return _corners(rng.uniform(0.9, 1.08, 3)), None
    if name == "star":
        return _corners(np.tile([1.0, rng.uniform(0.38, 0.5)], 5)), None
    if name == "ring":
        return _circle(), _circle(rng.uniform(0.48, 0.64))
    if name == "cross":
        return _cross(rng), None
    if name == "crescent":
        return _circle(), _circle(rng.uniform(0.78, 0.9), rng.uniform(0.48, 0.6))
    if name == "heart":
        return _heart(), None
    return _circle(), None


def furniture_outline(rng: Rng) -> Polygon:
    """A slab too long for a square, or a lobed blob too uneven for a disc."""
    if rng.random() < 0.5:
        return _box(rng.uniform(0.2, 0.5), 1.0)
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.full(72, 0.66)
    for lobes in (2, 3, 5):
        radius += rng.uniform(0.08, 0.2) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


_SPRITE_MARGIN = 1.35  # half side over radius: room for the contact shadow and for the deformation
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Sprite:
    """One thing that is drawn: what it shows, and what it hides."""

    colour: Image  # [S, S, 3], multiplied by the coverage of the outline
    cover: Image  # [S, S, 2]: how much of the background is taken away (outline and its shadow), and the outline alone

    @property
    def side(self) -> int:
        """Pixels along one side of the square."""
        return len(self.colour)


def _fill(outline: Polygon, hole: Polygon | None, side: int, radius: float) -> Image:
    """The outline as antialiased coverage, uint8 [side, side]."""
    canvas = np.zeros((side * _OVERSAMPLING, side * _OVERSAMPLING), np.uint8)
    for polygon, value in ((outline, 255), (hole, 0)):
        if polygon is not None:
            points = (polygon * radius + side / 2) * _OVERSAMPLING
            cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], value)
    return np.asarray(cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _shading(rng: Rng, inside: Image, radius: float) -> Field:
    """Brightness factor [S, S]: darker at the edge, brighter towards a light."""
    edge = np.clip(distance_transform_edt(inside > 127) / max(rng.uniform(0.08, 0.25) * radius, 1.0), 0, 1)
    u, _ = turned_grid(len(inside), len(inside), rng.uniform(0, 2 * np.pi), 2 * np.pi * radius)
    towards_light = (u - u.mean()) * rng.uniform(0, 0.25)
    return (rng.uniform(0.8, 1.25) * (1 - rng.uniform(0.2, 0.5) * (1 - edge) + towards_light)).astype(np.float32)


def make_sprite(
    rng: Rng, outline: Polygon, hole: Polygon | None, radius: float, texture: Texture, frame_height: int
) -> Sprite:
    """Fill an outline with a texture, shade it and put a contact shadow around it; ``radius`` in pixels."""
    side = 2 * int(np.ceil(radius * _SPRITE_MARGIN)) + 2
    inside = _fill(outline, hole, side, radius)
    paint = texture.paint(side, side, frame_height) * _shading(rng, inside, radius)[..., None]
    shadow = cv2.GaussianBlur(inside, (0, 0), max(0.09 * radius, 0.5)).astype(np.float32) * rng.uniform(0.35, 0.75)
    colour = np.clip(paint, 0, 255) * (inside[..., None] / np.float32(255))
    cover = np.stack([np.maximum(inside, shadow.astype(np.uint8)), inside], axis=-1)
    return Sprite(colour.astype(np.uint8), cover)
