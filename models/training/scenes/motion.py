"""How objects and the camera move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.training.scenes.arrays import Matrix, Rng
from models.training.scenes.config import SceneConfig


def _translation(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _turn_and_scale(angle: float, scale_x: float, scale_y: float) -> Matrix:
    """Scale first, then turn, about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos * scale_x, -sin * scale_y, 0.0], [sin * scale_x, cos * scale_y, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Wave:
    """``mean + amplitude * sin(...)`` over the frame index; the period is in frames."""

    mean: float = 0.0
    amplitude: float = 0.0
    period: float = 1.0
    phase: float = 0.0

    def at(self, t: float) -> float:
        """The value at frame ``t``."""
        return float(self.mean + self.amplitude * np.sin(2 * np.pi * t / self.period + self.phase))


def random_wave(rng: Rng, mean: float, amplitude: float, periods: tuple[float, float]) -> Wave:
    """A wave of up to ``amplitude``, with a period of that range of frames."""
    return Wave(mean, amplitude * rng.uniform(0.3, 1), rng.uniform(*periods), rng.uniform(0, 2 * np.pi))


_STILL = Wave()
_UNIT = Wave(mean=1.0)


@dataclass(frozen=True)
class Motion:
    """Where a sprite is at frame t: ``anchor + velocity * (t + surge(t)) + sway(t)``, in pixels of the canvas."""

    anchor: tuple[float, float]  # x, y
    velocity: tuple[float, float] = (0.0, 0.0)  # pixels per frame
    anchor_frame: float = 0.0
    surge: Wave = _STILL  # frames ahead of or behind even speed
    sway_x: Wave = _STILL
    sway_y: Wave = _STILL
    spin: float = 0.0  # radians per frame
    roll: Wave = _STILL
    scale: Wave = _UNIT
    stretch: Wave = _UNIT

    def matrix(self, t: float, side: int) -> Matrix:
        """Pixels of a sprite of ``side`` pixels -> pixels of the canvas."""
        passed = t - self.anchor_frame + self.surge.at(t)
        x = self.anchor[0] + self.velocity[0] * passed + self.sway_x.at(t)
        y = self.anchor[1] + self.velocity[1] * passed + self.sway_y.at(t)
        scale, stretch = self.scale.at(t), self.stretch.at(t)
        middle = (side - 1) / 2
        shape = _turn_and_scale(self.roll.at(t) + self.spin * t, scale * stretch, scale / stretch)
        return _translation(x, y) @ shape @ _translation(-middle, -middle)


def random_motion(rng: Rng, config: SceneConfig, frames: int, margin: int) -> Motion:
    """Half of the objects wander about their anchor, the others cross the frame."""
    height, crosses = config.height * config.speed, rng.random() < 0.55
    speed = height * (rng.uniform(0.015, 0.045) if crosses else rng.uniform(0, 0.006))
    direction = rng.uniform(0, 2 * np.pi)
    sway = height * (0.05 if crosses else 0.2)
    surge_period = rng.uniform(15, 45)
    return Motion(
        anchor=(margin + config.width * rng.uniform(0.02, 0.98), margin + config.height * rng.uniform(0.02, 0.98)),
        velocity=(speed * np.cos(direction), speed * np.sin(direction)),
        anchor_frame=rng.uniform(0, frames),
        surge=Wave(0.0, rng.uniform(0, 0.13) * surge_period, surge_period, rng.uniform(0, 2 * np.pi)),
        sway_x=random_wave(rng, 0.0, sway, (25, 70)),
        sway_y=random_wave(rng, 0.0, sway, (25, 70)),
        spin=rng.normal(0, 0.035) * config.speed,
        roll=random_wave(rng, rng.uniform(0, 2 * np.pi), 0.3, (20, 60)),
        scale=random_wave(rng, 1.0, 0.2, (25, 80)),
        stretch=random_wave(rng, 1.0, 0.1, (12, 40)),
    )


@dataclass(frozen=True)
class Camera:
    """What the frame shows of the canvas: pan, zoom, roll, and the jitter of a hand."""

    pan_x: Wave
    pan_y: Wave
    zoom: Wave
    roll: Wave
    jitter: NDArray[np.float64]  # [T, 2], pixels

    def matrix(self, t: int, config: SceneConfig, margin: int) -> Matrix:
        """Pixels of the canvas -> pixels of the frame."""
        middle_x, middle_y = (config.width - 1) / 2, (config.height - 1) / 2
        seen = _translation(-margin - middle_x - self.pan_x.at(t), -margin - middle_y - self.pan_y.at(t))
        zoom = self.zoom.at(t)
        turned = _turn_and_scale(self.roll.at(t), zoom, zoom)
        return _translation(middle_x + self.jitter[t, 0], middle_y + self.jitter[t, 1]) @ turned @ seen


def random_camera(rng: Rng, config: SceneConfig, frames: int) -> Camera:
    """A slow pan, zoom and roll, with the jitter of a hand."""
    strength, pan = config.camera, 0.16 * config.height * config.camera
    jitter = rng.normal(0, 0.0025 * config.height * strength * rng.uniform(0, 1), (frames, 2))
    return Camera(
        pan_x=random_wave(rng, 0.0, pan, (50, 120)),
        pan_y=random_wave(rng, 0.0, 0.7 * pan, (50, 120)),
        zoom=random_wave(rng, 1.03, 0.12 * strength, (60, 150)),
        roll=random_wave(rng, 0.0, 0.08 * strength, (50, 120)),
        jitter=jitter,
    )
