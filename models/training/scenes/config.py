"""What the scenes are like."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring", "cross", "crescent", "heart")


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
