"""One picture on its way from a source to the sinks."""

from __future__ import annotations

import av
import numpy as np
from numpy.typing import NDArray

Picture = av.VideoFrame | NDArray[np.uint8]


class Frame:
    """One picture of a source, with its place in the stream.

    The picture stays in the decoder's pixel format until somebody asks for :attr:`rgb`, because the model's input is
    made from it directly. A frame is used by one thread at a time.

    Attributes:
        picture: As decoded, not turned upright: an ``av.VideoFrame``, or uint8 [H, W, 3], RGB. Not written to.
        index: Count of frames that the source delivered before this one; frames dropped later keep their number.
        timestamp_s: Capture time on the source's own clock; later than that of the frame before.
        discontinuity: Why this frame does not continue the frame before (``"reconnect"``, ``"resolution change"``), so
            that nothing may be carried over to it; None if it does.
        quarter_turns: Counter-clockwise quarter turns, 0 to 3, that bring ``picture`` upright (phones store how they
            were held). :attr:`height`, :attr:`width` and :attr:`rgb` are upright already.
    """

    def __init__(
        self, picture: Picture, index: int = 0, timestamp_s: float = 0.0, discontinuity: str | None = None
    ) -> None:
        self.picture = picture
        self.index = index
        self.timestamp_s = timestamp_s
        self.discontinuity = discontinuity
        self.quarter_turns = round(picture.rotation / 90) % 4 if isinstance(picture, av.VideoFrame) else 0
        self._rgb: NDArray[np.uint8] | None = None

    @property
    def height(self) -> int:
        """Rows of the upright picture."""
        return stored_size(self.picture)[self.quarter_turns % 2]

    @property
    def width(self) -> int:
        """Columns of the upright picture."""
        return stored_size(self.picture)[1 - self.quarter_turns % 2]

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """The upright picture, uint8 [H, W, 3], C-contiguous, read-only; converted once and kept with the frame."""
        if self._rgb is None:
            self._rgb = np.ascontiguousarray(np.rot90(self._stored_rgb(), self.quarter_turns)).view()
            self._rgb.flags.writeable = False
        return self._rgb

    def _stored_rgb(self) -> NDArray[np.uint8]:
        if isinstance(self.picture, av.VideoFrame):
            return rgb_view(self.picture.reformat(format="rgb24"))
        return self.picture


def stored_size(picture: Picture) -> tuple[int, int]:
    """Height and width of a picture as it is stored, before it is turned upright."""
    if isinstance(picture, av.VideoFrame):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def rgb_view(picture: av.VideoFrame) -> NDArray[np.uint8]:
    """The pixels of an rgb24 picture, uint8 [H, W, 3], without a copy; valid as long as somebody holds the array."""
    plane = picture.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # type: ignore[call-overload]
    pixels: NDArray[np.uint8] = rows[:, : picture.width * 3].reshape(picture.height, picture.width, 3)
    return pixels
