"""A shot: background, furniture and objects, drawn from the back to the front, and the clip made of shots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from models.training.scenes.arrays import Field, Image, Matrix, Rng
from models.training.scenes.config import CLASSES, SceneConfig
from models.training.scenes.motion import Camera, Motion, Wave, random_camera, random_motion, random_wave
from models.training.scenes.sprites import Sprite, class_outline, furniture_outline, make_sprite
from models.training.scenes.textures import Texture, random_texture, turned_grid, typical_texture

MIN_VISIBLE_PIXELS = 12  # in one frame; a smaller mask is emptied
MIN_OBJECT_PIXELS = 40  # in its best frame; an object that never shows more is left out


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


@dataclass(frozen=True)
class _Layer:
    sprite: Sprite
    motion: Motion
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


@dataclass(frozen=True)
class _Shot:
    canvas: Image
    margin: int  # pixels of canvas on each side of the frame
    layers: tuple[_Layer, ...]  # from the back to the front
    camera: Camera
    light: tuple[Wave, Wave, Wave]  # brightness factor of each channel
    softness: float  # standard deviation of the blur, pixels


def _random_regions(rng: Rng, canvas: Image, textures: list[Texture], frame_height: int) -> None:
    """Paint up to three large regions over the canvas: a floor, a wall, a patch."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.35) * height
        u, v = turned_grid(height, width, angle, 2 * np.pi)
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


def _make_furniture(rng: Rng, config: SceneConfig, textures: list[Texture], margin: int) -> _Layer:
    radius = config.height * rng.uniform(0.06, 0.28)
    texture = textures[int(rng.integers(len(textures)))]
    sprite = make_sprite(rng, furniture_outline(rng), None, radius, texture, config.height)
    anchor = (rng.uniform(0, 2 * margin + config.width), rng.uniform(0, 2 * margin + config.height))
    return _Layer(sprite, Motion(anchor=anchor, roll=Wave(mean=rng.uniform(0, 2 * np.pi))))


def _make_canvas(rng: Rng, config: SceneConfig, textures: list[Texture], margin: int) -> Image:
    """Background with the furniture that nothing can pass behind."""
    height, width = config.height + 2 * margin, config.width + 2 * margin
    canvas = textures[0].paint(height, width, config.height)
    _random_regions(rng, canvas, textures, config.height)
    owner = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(config.max_furniture // 3, config.max_furniture + 1))):
        _draw(_make_furniture(rng, config, textures, margin), 0, np.eye(3), canvas, owner, 0)
    return _light_canvas(rng, canvas)


def _object_texture(rng: Rng, config: SceneConfig, textures: list[Texture], label: int) -> Texture:
    if rng.random() < config.shared_texture_probability:
        return textures[int(rng.integers(len(textures)))]
    if rng.random() < config.typical_texture_probability:
        return typical_texture(rng, label)
    return random_texture(rng)


def _make_object(rng: Rng, config: SceneConfig, textures: list[Texture], motion: Motion) -> _Layer:
    label = int(rng.integers(len(CLASSES)))
    radius = config.height * float(np.exp(rng.uniform(np.log(config.smallest_radius), np.log(config.largest_radius))))
    texture = _object_texture(rng, config, textures, label)
    sprite = make_sprite(rng, *class_outline(rng, CLASSES[label]), radius, texture, config.height)
    bend = rng.uniform(0, 1) * config.deformation * 2 * radius
    return _Layer(sprite, motion, label, bend, rng.uniform(12, 40), rng.uniform(0, 2 * np.pi))


def _make_objects(rng: Rng, config: SceneConfig, textures: list[Texture], frames: int, margin: int) -> list[_Layer]:
    objects: list[_Layer] = []
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        motion = random_motion(rng, config, frames, margin)
        if objects and rng.random() < config.look_alike_probability:
            model = objects[int(rng.integers(len(objects)))]
            objects.append(replace(model, motion=motion, phase=rng.uniform(0, 2 * np.pi)))
        else:
            objects.append(_make_object(rng, config, textures, motion))
    return objects


def _make_shot(rng: Rng, config: SceneConfig, frames: int) -> _Shot:
    textures = [random_texture(rng) for _ in range(4)]
    margin = int(np.ceil(0.3 * config.height))
    layers = _make_objects(rng, config, textures, frames, margin)
    if config.max_furniture and rng.random() < 0.5:  # something to pass behind
        layers.insert(int(rng.integers(len(layers) + 1)), _make_furniture(rng, config, textures, margin))
    level, period = rng.uniform(0.85, 1.15), rng.uniform(30, 90)
    light = [random_wave(rng, level * rng.uniform(0.95, 1.05), 0.08, (period, 1.3 * period)) for _ in range(3)]
    return _Shot(
        canvas=_make_canvas(rng, config, textures, margin),
        margin=margin,
        layers=tuple(layers),
        camera=random_camera(rng, config, frames),
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
    """Masks [O, T, H, W] and labels of the objects that can be seen; see the two limits at the top."""
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
