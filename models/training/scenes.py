"""Moving scenes with exact masks, for training and testing video instance segmentation without a public data set.

A clip is one shot, or two with a cut between them. A shot has a large textured background with a moving camera over it,
unlabelled furniture (blobs and slabs), and up to five objects that move, turn, deform and cover one another in a fixed
order of depth. What an object is, is decided by its outline; by choice its texture tells it too, as fur tells a dog, or
misleads: an object may be painted like background and furniture. From the command line::

    python -m models.training.scenes data/scenes --clips 64 --frames 36 --size 288 512 --seed 0 --workers 2
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import track
from scipy.ndimage import distance_transform_edt

from runtime.errors import SinkError

CLASSES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring", "cross", "crescent", "heart")

MIN_VISIBLE_PIXELS = 12  # in one frame; a smaller mask is emptied
MIN_OBJECT_PIXELS = 40  # in its best frame; an object that never shows more is left out

Image = NDArray[np.uint8]  # [H, W, 3], RGB
Field = NDArray[np.float32]  # [H, W], in [0, 1]
Matrix = NDArray[np.floating[Any]]  # [3, 3], maps (x, y, 1) in pixels
Polygon = NDArray[np.float64]  # [N, 2], (x, y) in units of the radius
Rng = np.random.Generator


_LIMITS = (
    (("height", "width"), 16, 4096),
    (("frames",), 1, 100_000),
    (("max_objects",), 1, 200),  # with one layer of furniture the layers of a shot are counted in 8 bits
    (("max_furniture",), 0, 1000),
    (("cut_probability", "look_alike_probability"), 0, 1),
    (("shared_texture_probability", "typical_texture_probability"), 0, 1),
    (("smallest_radius", "largest_radius"), 0.01, 0.5),
    (("speed", "camera"), 0, 10),
    (("deformation",), 0, 0.2),
    (("noise",), 0, 25),
)


@dataclass(frozen=True)
class SceneConfig:
    """What the scenes are like; lengths and speeds are relative to the frame height, so scenes look alike at any size.

    Raises:
        ValueError: A field is out of range; the message gives the range. Sides are 16 to 4096 pixels.
    """

    height: int = 288
    width: int = 512
    frames: int = 36
    max_objects: int = 5
    """Most objects in one shot; a clip with a cut may hold twice as many identities."""
    cut_probability: float = 0.15
    max_furniture: int = 8
    look_alike_probability: float = 0.3
    """Chance that an object copies outline and texture of one before it."""
    smallest_radius: float = 0.05
    """Radius of the smallest object, in frame heights."""
    largest_radius: float = 0.17
    """Radius of the largest; sizes are spread evenly over the logarithm."""
    shared_texture_probability: float = 0.6
    """Chance that an object takes its texture from the pool of background and furniture."""
    typical_texture_probability: float = 0.0
    """Chance that an object that does not has the pattern and about the colour that most of its class have."""
    speed: float = 1.0
    """Factor on the speed of the objects; at 1 a fast one moves 4.5 % of the frame height per frame."""
    camera: float = 1.0
    """Factor on pan, zoom, roll and jitter of the camera; 0 holds it still."""
    deformation: float = 0.05
    """Largest displacement of an outline, as a share of the object's width."""
    noise: float = 3.0
    """Standard deviation of the sensor noise, in steps of 8-bit intensity."""

    def __post_init__(self) -> None:
        for names, low, high in _LIMITS:
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name} is {getattr(self, name)}; it has to be in {low}..{high}")
        if self.smallest_radius > self.largest_radius:
            raise ValueError(f"smallest_radius {self.smallest_radius} is above largest_radius {self.largest_radius}")


@dataclass(frozen=True)
class Clip:
    """Frames with the visible part of every object.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        masks: bool [O, T, H, W]; what neither another object, furniture nor the frame border hides. Disjoint.
        labels: int64 [O], indices into :data:`CLASSES`.
        cuts: Index of the first frame after each cut.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    cuts: tuple[int, ...]


# --- textures -------------------------------------------------------------------------------------------------------


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


def _turned_grid(height: int, width: int, angle: float, period: float) -> tuple[Field, Field]:
    """Row and column coordinates turned by ``angle``, in radians of a wave of ``period`` pixels."""
    scale = np.float32(2 * np.pi / period)
    y, x = np.mgrid[:height, :width].astype(np.float32) * scale
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return y * cos - x * sin, y * sin + x * cos


def _stripes(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, _ = _turned_grid(height, width, rng.uniform(0, np.pi), cell)
    bend = _noise(rng, height, width, 4 * cell, 1) * rng.uniform(0, 4)
    return _sharpen(0.5 + 0.5 * np.sin(u + bend), rng.uniform(1, 4))


def _checks(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, v = _turned_grid(height, width, rng.uniform(0, np.pi), 1.6 * cell)
    return _sharpen(0.5 + 0.5 * np.sin(u) * np.sin(v), rng.uniform(2, 6))


def _blobs(rng: Rng, height: int, width: int, cell: float) -> Field:
    return _sharpen(_noise(rng, height, width, 1.2 * cell, 2), rng.uniform(4, 9))


def _gradient(rng: Rng, height: int, width: int, cell: float) -> Field:
    u, _ = _turned_grid(height, width, rng.uniform(0, np.pi), 8 * cell)
    return np.abs(np.mod(u / np.float32(np.pi), 2) - 1)


_FAMILIES: tuple[Callable[[Rng, int, int, float], Field], ...] = (_noise, _stripes, _checks, _blobs, _gradient)


@dataclass(frozen=True)
class _Texture:
    """A recipe that paints the same pattern at any size: what is painted depends on nothing else."""

    family: int
    cell: float  # size of a feature, in frame heights
    colours: NDArray[np.float64]  # [3, 3]: three RGB stops, 0..255
    grain: float  # share of fine noise
    seed: int

    def paint(self, height: int, width: int, frame_height: int) -> Image:
        rng = np.random.Generator(np.random.PCG64(self.seed))
        field = _FAMILIES[self.family](rng, height, width, max(self.cell * frame_height, 2.0))
        grain = rng.random((height, width), np.float32)
        level = cv2.convertScaleAbs(field * (1 - self.grain) + grain * self.grain, alpha=255)
        stops = [np.interp(np.arange(256), [0, 128, 255], channel) for channel in self.colours.T]
        return np.stack(stops, axis=-1).astype(np.uint8)[level]


def _random_texture(rng: Rng) -> _Texture:
    base = rng.uniform(60, 195) + rng.uniform(0, 55) * rng.normal(0, 1, 3)
    spread = rng.uniform(25, 95) * rng.normal(0, 1, (3, 1)) + rng.normal(0, 22, (3, 3))
    return _Texture(
        family=int(rng.integers(len(_FAMILIES))),
        cell=float(np.exp(rng.uniform(np.log(0.025), np.log(0.12)))),
        colours=np.clip(base + spread, 10, 245),
        grain=float(rng.uniform(0.05, 0.25)),
        seed=int(rng.integers(2**31)),
    )


def _typical_texture(rng: Rng, label: int) -> _Texture:
    """Pattern and hue that belong to a class, with the differences that its members have."""
    hue = 2 * np.pi * label / len(CLASSES) + rng.normal(0, 0.15)
    tint = np.cos(hue - np.array([0, 1, 2]) * 2 * np.pi / 3)
    middle = rng.uniform(100, 150) + rng.uniform(45, 75) * tint
    contrast = rng.uniform(35, 70) * np.array([[-1.0], [0.0], [1.0]])
    return _Texture(
        family=label % len(_FAMILIES),
        cell=float(0.05 * np.exp(rng.normal(0, 0.2))),
        colours=np.clip(middle + contrast, 10, 245),
        grain=float(rng.uniform(0.05, 0.25)),
        seed=int(rng.integers(2**31)),
    )


# --- outlines -------------------------------------------------------------------------------------------------------


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


def _outline(rng: Rng, name: str) -> tuple[Polygon, Polygon | None]:
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


def _furniture_outline(rng: Rng) -> Polygon:
    """A slab too long for a square, or a lobed blob too uneven for a disc."""
    if rng.random() < 0.5:
        return _box(rng.uniform(0.2, 0.5), 1.0)
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.full(72, 0.66)
    for lobes in (2, 3, 5):
        radius += rng.uniform(0.08, 0.2) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


# --- sprites --------------------------------------------------------------------------------------------------------

_SPRITE_MARGIN = 1.35  # half side over radius: room for the contact shadow and for the deformation
_OVERSAMPLING = 4


@dataclass(frozen=True)
class _Sprite:
    colour: Image  # [S, S, 3], multiplied by the coverage of the outline
    cover: Image  # [S, S, 2]: how much of the background is taken away (outline and its shadow), and the outline alone

    @property
    def side(self) -> int:
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
    u, _ = _turned_grid(len(inside), len(inside), rng.uniform(0, 2 * np.pi), 2 * np.pi * radius)
    towards_light = (u - u.mean()) * rng.uniform(0, 0.25)
    return (rng.uniform(0.8, 1.25) * (1 - rng.uniform(0.2, 0.5) * (1 - edge) + towards_light)).astype(np.float32)


def _make_sprite(
    rng: Rng, outline: Polygon, hole: Polygon | None, radius: float, texture: _Texture, frame_height: int
) -> _Sprite:
    side = 2 * int(np.ceil(radius * _SPRITE_MARGIN)) + 2
    inside = _fill(outline, hole, side, radius)
    paint = texture.paint(side, side, frame_height) * _shading(rng, inside, radius)[..., None]
    shadow = cv2.GaussianBlur(inside, (0, 0), max(0.09 * radius, 0.5)).astype(np.float32) * rng.uniform(0.35, 0.75)
    colour = np.clip(paint, 0, 255) * (inside[..., None] / np.float32(255))
    cover = np.stack([np.maximum(inside, shadow.astype(np.uint8)), inside], axis=-1)
    return _Sprite(colour.astype(np.uint8), cover)


# --- motion ---------------------------------------------------------------------------------------------------------


def _translation(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _turn_and_scale(angle: float, scale_x: float, scale_y: float) -> Matrix:
    """Scale first, then turn, about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos * scale_x, -sin * scale_y, 0.0], [sin * scale_x, cos * scale_y, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class _Wave:
    """``mean + amplitude * sin(...)`` over the frame index; the period is in frames."""

    mean: float = 0.0
    amplitude: float = 0.0
    period: float = 1.0
    phase: float = 0.0

    def at(self, t: float) -> float:
        return float(self.mean + self.amplitude * np.sin(2 * np.pi * t / self.period + self.phase))


def _random_wave(rng: Rng, mean: float, amplitude: float, periods: tuple[float, float]) -> _Wave:
    return _Wave(mean, amplitude * rng.uniform(0.3, 1), rng.uniform(*periods), rng.uniform(0, 2 * np.pi))


_STILL = _Wave()
_UNIT = _Wave(mean=1.0)


@dataclass(frozen=True)
class _Motion:
    """Where a sprite is at frame t: ``anchor + velocity * (t + surge(t)) + sway(t)``, in pixels of the canvas."""

    anchor: tuple[float, float]  # x, y
    velocity: tuple[float, float] = (0.0, 0.0)  # pixels per frame
    anchor_frame: float = 0.0
    surge: _Wave = _STILL  # frames ahead of or behind even speed
    sway_x: _Wave = _STILL
    sway_y: _Wave = _STILL
    spin: float = 0.0  # radians per frame
    roll: _Wave = _STILL
    scale: _Wave = _UNIT
    stretch: _Wave = _UNIT

    def matrix(self, t: float, side: int) -> Matrix:
        """Pixels of a sprite of ``side`` pixels -> pixels of the canvas."""
        passed = t - self.anchor_frame + self.surge.at(t)
        x = self.anchor[0] + self.velocity[0] * passed + self.sway_x.at(t)
        y = self.anchor[1] + self.velocity[1] * passed + self.sway_y.at(t)
        scale, stretch = self.scale.at(t), self.stretch.at(t)
        middle = (side - 1) / 2
        shape = _turn_and_scale(self.roll.at(t) + self.spin * t, scale * stretch, scale / stretch)
        return _translation(x, y) @ shape @ _translation(-middle, -middle)


def _random_motion(rng: Rng, config: SceneConfig, frames: int, margin: int) -> _Motion:
    """Half of the objects wander about their anchor, the others cross the frame."""
    height, crosses = config.height * config.speed, rng.random() < 0.55
    speed = height * (rng.uniform(0.015, 0.045) if crosses else rng.uniform(0, 0.006))
    direction = rng.uniform(0, 2 * np.pi)
    sway = height * (0.05 if crosses else 0.2)
    surge_period = rng.uniform(15, 45)
    return _Motion(
        anchor=(margin + config.width * rng.uniform(0.02, 0.98), margin + config.height * rng.uniform(0.02, 0.98)),
        velocity=(speed * np.cos(direction), speed * np.sin(direction)),
        anchor_frame=rng.uniform(0, frames),
        surge=_Wave(0.0, rng.uniform(0, 0.13) * surge_period, surge_period, rng.uniform(0, 2 * np.pi)),
        sway_x=_random_wave(rng, 0.0, sway, (25, 70)),
        sway_y=_random_wave(rng, 0.0, sway, (25, 70)),
        spin=rng.normal(0, 0.035) * config.speed,
        roll=_random_wave(rng, rng.uniform(0, 2 * np.pi), 0.3, (20, 60)),
        scale=_random_wave(rng, 1.0, 0.2, (25, 80)),
        stretch=_random_wave(rng, 1.0, 0.1, (12, 40)),
    )


@dataclass(frozen=True)
class _Camera:
    """What the frame shows of the canvas: pan, zoom, roll, and the jitter of a hand."""

    pan_x: _Wave
    pan_y: _Wave
    zoom: _Wave
    roll: _Wave
    jitter: NDArray[np.float64]  # [T, 2], pixels

    def matrix(self, t: int, config: SceneConfig, margin: int) -> Matrix:
        """Pixels of the canvas -> pixels of the frame."""
        middle_x, middle_y = (config.width - 1) / 2, (config.height - 1) / 2
        seen = _translation(-margin - middle_x - self.pan_x.at(t), -margin - middle_y - self.pan_y.at(t))
        zoom = self.zoom.at(t)
        turned = _turn_and_scale(self.roll.at(t), zoom, zoom)
        return _translation(middle_x + self.jitter[t, 0], middle_y + self.jitter[t, 1]) @ turned @ seen


def _random_camera(rng: Rng, config: SceneConfig, frames: int) -> _Camera:
    strength, pan = config.camera, 0.16 * config.height * config.camera
    jitter = rng.normal(0, 0.0025 * config.height * strength * rng.uniform(0, 1), (frames, 2))
    return _Camera(
        pan_x=_random_wave(rng, 0.0, pan, (50, 120)),
        pan_y=_random_wave(rng, 0.0, 0.7 * pan, (50, 120)),
        zoom=_random_wave(rng, 1.03, 0.12 * strength, (60, 150)),
        roll=_random_wave(rng, 0.0, 0.08 * strength, (50, 120)),
        jitter=jitter,
    )


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    sprite: _Sprite
    motion: _Motion
    label: int | None = None  # None: furniture
    bend: float = 0.0  # displacement of the outline, in pixels of the sprite
    bend_period: float = 30.0  # frames
    phase: float = 0.0


def _bounds(matrix: Matrix, side: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the frame that a sprite can touch; empty slices if it is outside."""
    corners = matrix @ np.array([[0, side, side, 0], [0, 0, side, side], [1, 1, 1, 1]])
    x0, y0 = np.maximum(np.floor(corners[:2].min(axis=1)).astype(int), 0)
    x1, y1 = np.ceil(corners[:2].max(axis=1)).astype(int) + 1
    return slice(y0, max(y0, min(y1, height))), slice(x0, max(x0, min(x1, width)))


def _sprite_coordinates(layer: _Layer, t: float, inverse: Matrix, rows: slice, columns: slice) -> tuple[Field, Field]:
    """Where in the sprite, as x and y, each pixel of the frame in ``rows`` and ``columns`` looks."""
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :]
    a = inverse.astype(np.float32)
    u, v = a[0, 0] * x + (a[0, 1] * y + a[0, 2]), a[1, 0] * x + (a[1, 1] * y + a[1, 2])
    if layer.bend:
        turn = np.float32(2 * np.pi * t / layer.bend_period + layer.phase)
        wave, bend = np.float32(2 * np.pi / layer.sprite.side), np.float32(layer.bend)
        u, v = u + bend * np.sin(wave * v + turn), v + bend * np.sin(wave * u - turn)
    return u, v


def _draw(layer: _Layer, t: float, view: Matrix, frame: Image, owner: NDArray[np.uint8], number: int) -> None:
    """Put a layer on top of ``frame`` and write ``number`` where its outline covers ``owner`` [H, W]."""
    sprite = layer.sprite
    matrix = view @ layer.motion.matrix(t, sprite.side)
    rows, columns = _bounds(matrix, sprite.side, *owner.shape)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    u, v = _sprite_coordinates(layer, t, np.linalg.inv(matrix), rows, columns)
    colour = cv2.remap(sprite.colour, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    hidden, inside = cv2.split(cv2.remap(sprite.cover, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT))
    behind = cv2.multiply(frame[rows, columns], cv2.merge([255 - hidden] * 3), scale=1 / 255)
    frame[rows, columns] = cv2.add(behind, colour)
    owner[rows, columns][inside > 127] = number


# --- shots ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shot:
    canvas: Image
    margin: int  # pixels of canvas on each side of the frame
    layers: tuple[_Layer, ...]  # from the back to the front
    camera: _Camera
    light: tuple[_Wave, _Wave, _Wave]  # brightness factor of each channel
    softness: float  # standard deviation of the blur, pixels


def _random_regions(rng: Rng, canvas: Image, textures: list[_Texture], frame_height: int) -> None:
    """Paint up to three large regions over the canvas: a floor, a wall, a patch."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.35) * height
        u, v = _turned_grid(height, width, angle, 2 * np.pi)
        middle, half = v.mean() + rng.uniform(-0.3, 0.3) * width, rng.uniform(0.2, 1) * width
        inside = (u - u.mean() > offset) & (np.abs(v - middle) < half)
        texture = textures[int(rng.integers(len(textures)))]
        canvas[inside] = texture.paint(height, width, frame_height)[inside]


def _light_canvas(rng: Rng, canvas: Image) -> Image:
    """Uneven light, so that no texture has one brightness all over."""
    height, width = canvas.shape[:2]
    coarse = rng.uniform(0.65, 1.15, (3, 4)).astype(np.float32)
    light = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.multiply(canvas, cv2.merge([light] * 3), dtype=cv2.CV_8U), np.uint8)


def _make_furniture(rng: Rng, config: SceneConfig, textures: list[_Texture], margin: int) -> _Layer:
    radius = config.height * rng.uniform(0.06, 0.28)
    texture = textures[int(rng.integers(len(textures)))]
    sprite = _make_sprite(rng, _furniture_outline(rng), None, radius, texture, config.height)
    anchor = (rng.uniform(0, 2 * margin + config.width), rng.uniform(0, 2 * margin + config.height))
    return _Layer(sprite, _Motion(anchor=anchor, roll=_Wave(mean=rng.uniform(0, 2 * np.pi))))


def _make_canvas(rng: Rng, config: SceneConfig, textures: list[_Texture], margin: int) -> Image:
    """Background with the furniture that nothing can pass behind."""
    height, width = config.height + 2 * margin, config.width + 2 * margin
    canvas = textures[0].paint(height, width, config.height)
    _random_regions(rng, canvas, textures, config.height)
    owner = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(config.max_furniture // 3, config.max_furniture + 1))):
        _draw(_make_furniture(rng, config, textures, margin), 0, np.eye(3), canvas, owner, 0)
    return _light_canvas(rng, canvas)


def _object_texture(rng: Rng, config: SceneConfig, textures: list[_Texture], label: int) -> _Texture:
    if rng.random() < config.shared_texture_probability:
        return textures[int(rng.integers(len(textures)))]
    if rng.random() < config.typical_texture_probability:
        return _typical_texture(rng, label)
    return _random_texture(rng)


def _make_object(rng: Rng, config: SceneConfig, textures: list[_Texture], motion: _Motion) -> _Layer:
    label = int(rng.integers(len(CLASSES)))
    radius = config.height * float(np.exp(rng.uniform(np.log(config.smallest_radius), np.log(config.largest_radius))))
    texture = _object_texture(rng, config, textures, label)
    sprite = _make_sprite(rng, *_outline(rng, CLASSES[label]), radius, texture, config.height)
    bend = rng.uniform(0, 1) * config.deformation * 2 * radius
    return _Layer(sprite, motion, label, bend, rng.uniform(12, 40), rng.uniform(0, 2 * np.pi))


def _make_objects(rng: Rng, config: SceneConfig, textures: list[_Texture], frames: int, margin: int) -> list[_Layer]:
    objects: list[_Layer] = []
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        motion = _random_motion(rng, config, frames, margin)
        if objects and rng.random() < config.look_alike_probability:
            model = objects[int(rng.integers(len(objects)))]
            objects.append(replace(model, motion=motion, phase=rng.uniform(0, 2 * np.pi)))
        else:
            objects.append(_make_object(rng, config, textures, motion))
    return objects


def _make_shot(rng: Rng, config: SceneConfig, frames: int) -> _Shot:
    textures = [_random_texture(rng) for _ in range(4)]
    margin = int(np.ceil(0.3 * config.height))
    layers = _make_objects(rng, config, textures, frames, margin)
    if config.max_furniture and rng.random() < 0.5:  # something to pass behind
        layers.insert(int(rng.integers(len(layers) + 1)), _make_furniture(rng, config, textures, margin))
    level, period = rng.uniform(0.85, 1.15), rng.uniform(30, 90)
    light = [_random_wave(rng, level * rng.uniform(0.95, 1.05), 0.08, (period, 1.3 * period)) for _ in range(3)]
    return _Shot(
        canvas=_make_canvas(rng, config, textures, margin),
        margin=margin,
        layers=tuple(layers),
        camera=_random_camera(rng, config, frames),
        light=(light[0], light[1], light[2]),
        softness=rng.uniform(0.3, 0.9) * config.height / 288,
    )


def _expose(rng: Rng, frame: Image, shot: _Shot, t: int, noise: NDArray[np.int8]) -> Image:
    """Lens blur, light and sensor noise; ``noise`` is larger than the frame and read at a random place."""
    height, width = frame.shape[:2]
    soft = cv2.GaussianBlur(frame, (3, 3), shot.softness)
    lit = cv2.multiply(soft, np.array([*(wave.at(t) for wave in shot.light), 0.0]))  # OpenCV: one factor per channel
    y, x = (int(rng.integers(have - need + 1)) for have, need in zip(noise.shape, (height, width), strict=False))
    return np.asarray(cv2.add(lit, noise[y : y + height, x : x + width], dtype=cv2.CV_8U), np.uint8)


def _render_shot(rng: Rng, config: SceneConfig, shot: _Shot, frames: Image, owner: Image) -> None:
    """Fill ``frames`` [T, H, W, 3] and ``owner`` [T, H, W]: 0, or 1 + the index of the layer that is seen."""
    size = (config.width, config.height)
    noise = rng.normal(0, config.noise, (config.height + 32, config.width + 32, 3)).astype(np.int8)
    for t in range(len(frames)):
        view = shot.camera.matrix(t, config, shot.margin)
        frame = np.asarray(cv2.warpAffine(shot.canvas, view[:2], size, borderMode=cv2.BORDER_REFLECT_101), np.uint8)
        for index, layer in enumerate(shot.layers):
            _draw(layer, t, view, frame, owner[t], index + 1)
        frames[t] = _expose(rng, frame, shot, t, noise)


def _visible_masks(shot: _Shot, owner: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Masks [O, T, H, W] and labels of the objects that can be seen; see the two limits on top of this file."""
    masks, labels = [], []
    for index, layer in enumerate(shot.layers):
        mask = owner == index + 1
        pixels = mask.sum(axis=(1, 2))
        if layer.label is not None and pixels.max() > MIN_OBJECT_PIXELS:
            mask[pixels < MIN_VISIBLE_PIXELS] = False
            masks.append(mask)
            labels.append(layer.label)
    return np.array(masks, bool).reshape(-1, *owner.shape), np.array(labels, np.int64)


def _cuts(rng: Rng, config: SceneConfig) -> tuple[int, ...]:
    wanted = rng.random() < config.cut_probability
    cut = round(rng.uniform(0.25, 0.75) * config.frames)
    return (cut,) if wanted and 0 < cut < config.frames else ()


def render_clip(config: SceneConfig, seed: int) -> Clip:
    """Draw the clip that belongs to a seed.

    The same configuration and seed give the same bytes on one machine; another build of OpenCV may round differently.

    Args:
        config: What the scenes are like.
        seed: Any integer from 0.

    Returns:
        The clip. Objects are numbered from the back to the front, those of a later shot behind those before it, and
        O may be 0 if nothing came into view.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    cuts = _cuts(rng, config)
    frames = np.empty((config.frames, config.height, config.width, 3), np.uint8)
    owner = np.zeros(frames.shape[:3], np.uint8)
    masks, labels = [], []
    for start, stop in pairwise((0, *cuts, config.frames)):
        shot = _make_shot(rng, config, stop - start)
        _render_shot(rng, config, shot, frames[start:stop], owner[start:stop])
        part, part_labels = _visible_masks(shot, owner[start:stop])
        masks.append(np.pad(part, ((0, 0), (start, config.frames - stop), (0, 0), (0, 0))))
        labels.append(part_labels)
    return Clip(frames, np.concatenate(masks), np.concatenate(labels), cuts)


# --- YouTube-VIS layout ---------------------------------------------------------------------------------------------


def _encode(mask: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Compressed run lengths of one mask [H, W], or None where nothing is seen."""
    if not mask.any():
        return None
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _annotation(masks: NDArray[np.bool_], label: int) -> dict[str, Any]:
    """One object of a video without its ids; ``masks`` is [T, H, W]."""
    segmentations = [_encode(mask) for mask in masks]
    return {
        "category_id": int(label) + 1,
        "iscrowd": 0,
        "height": masks.shape[1],
        "width": masks.shape[2],
        "segmentations": segmentations,
        "bboxes": [None if code is None else [float(n) for n in rle.toBbox(code)] for code in segmentations],
        "areas": [None if code is None else int(rle.area(code)) for code in segmentations],
    }


def _write_frames(folder: Path, frames: NDArray[np.uint8], jpeg_quality: int) -> list[str]:
    """JPEG files in a new folder; returns their names relative to its parent."""
    folder.mkdir(parents=True)
    names = [f"{folder.name}/{t:05d}.jpg" for t in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        path = folder.parent / name
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]):
            raise SinkError(f"{path} could not be written. Is there space left, and may you write there?")
    return names


@dataclass(frozen=True)
class _ClipWriter:
    """Renders and stores one clip; an object rather than a closure, so that it can be sent to a worker."""

    images: Path
    config: SceneConfig
    jpeg_quality: int

    def __call__(self, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        clip = render_clip(self.config, seed)
        names = _write_frames(self.images / f"scene_{seed:010d}", clip.frames, self.jpeg_quality)
        size = {"width": self.config.width, "height": self.config.height}
        video = {**size, "length": len(names), "file_names": names, "cuts": list(clip.cuts)}
        return video, [_annotation(*pair) for pair in zip(clip.masks, clip.labels, strict=True)]


def _one_thread() -> None:
    cv2.setNumThreads(1)  # the workers already share the cores


def _map_clips(write: _ClipWriter, seeds: list[int], workers: int) -> Iterator[tuple[Any, Any]]:
    if workers == 1:
        yield from map(write, seeds)
        return
    context = multiprocessing.get_context("spawn")  # a fork copies the locks of threads that do not exist in it
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(write, seeds, chunksize=4)


def _data_set(clips: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]], description: str) -> dict[str, Any]:
    """The JSON of a whole data set; videos and objects are numbered from 1 in the given order."""
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for video, objects in clips:
        videos.append({"id": len(videos) + 1, **video})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "video_id": len(videos), **entry})
    categories = [{"id": index + 1, "name": name, "supercategory": "object"} for index, name in enumerate(CLASSES)]
    info = {"description": description, "version": "1.0"}
    return {"info": info, "videos": videos, "categories": categories, "annotations": annotations}


@contextmanager
def _renamed_whole(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` at the end, and is removed if anything fails."""
    if folder.exists():
        raise SinkError(f"{folder} exists already. Remove it, or write to another folder.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_youtube_vis(
    folder: Path,
    config: SceneConfig,
    seeds: Iterable[int],
    *,
    workers: int = 1,
    jpeg_quality: int = 92,
    progress: bool = True,
) -> None:
    """Write clips as a data set in the layout of YouTube-VIS: ``JPEGImages/<video>/00000.jpg`` and ``instances.json``.

    Args:
        folder: Made here; it appears under its name only when it is complete.
        config: What the scenes are like.
        seeds: One clip each, see :func:`render_clip`; no seed twice.
        workers: Processes that render, from 1; 1 renders in this process. What is written does not depend on it.
        jpeg_quality: 1 to 100.
        progress: Show a bar on stderr.

    Raises:
        ValueError: A seed comes twice, or ``workers`` is below 1.
        SinkError: The folder exists already, or a frame could not be written. Nothing is left behind.
    """
    seeds = list(seeds)
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed comes twice; two clips would be the same and have one name")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it has to be at least 1")
    with _renamed_whole(Path(folder)) as partial:
        (partial / "JPEGImages").mkdir()
        clips = _map_clips(_ClipWriter(partial / "JPEGImages", config, jpeg_quality), seeds, workers)
        bar = track(clips, "scenes", len(seeds), console=Console(stderr=True), disable=not progress)
        data = _data_set(bar, f"{len(seeds)} rendered scenes, {config}")
        (partial / "instances.json").write_text(json.dumps(data), encoding="utf-8")


def main(
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    clips: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of clips.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 36,
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of a frame: 16 to 4096 pixels.")] = (288, 512),
    radius: Annotated[
        tuple[float, float], typer.Option(help="Radius of the smallest and the largest object, in frame heights.")
    ] = (0.05, 0.17),
    shared_texture: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that an object looks like something in the background.")
    ] = 0.6,
    typical_texture: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that any other object has the texture typical of its class.")
    ] = 0.0,
    furniture: Annotated[int, typer.Option(min=0, max=1000, help="Most unlabelled things in the background.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Clip i is drawn from seed x 1000000 + i.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 1,
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEG files.")] = 92,
) -> None:
    """Render moving scenes with exact masks, in the layout of YouTube-VIS.

    Example: python -m models.training.scenes data/scenes --clips 64 --frames 36 --size 288 512 --workers 2
    """
    seeds = range(seed * 1_000_000, seed * 1_000_000 + clips)
    try:
        config = SceneConfig(
            height=size[0],
            width=size[1],
            frames=frames,
            smallest_radius=radius[0],
            largest_radius=radius[1],
            shared_texture_probability=shared_texture,
            typical_texture_probability=typical_texture,
            max_furniture=furniture,
        )
        write_youtube_vis(output, config, seeds, workers=workers, jpeg_quality=jpeg_quality)
    except SinkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
