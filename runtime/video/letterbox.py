"""From the source's picture to the model's input, and from the model's answers back to source pixels.

Two coordinate systems, both continuous, with pixel (i, j) covering [j, j + 1) x [i, i + 1) and its centre at .5:
*source* is the upright picture of the camera, *target* the model's input, which holds the resized picture (the content)
in its middle and padding around it. They are related by ``target = source * scale + offset`` on each axis. The scales
come from the rounded size of the content, so they differ a little between the axes and the mapping is exact.
"""

from __future__ import annotations

import math

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from ..errors import FrameShapeError
from .frame import Frame, rgb_view

_ROWS_AT_ONCE = 64  # keeps one block of interpolated logits within the L2 cache


class Letterbox:
    """Aspect-preserving resize with centred padding, and its exact inverse for boxes, masks and patches.

    An odd row or column of padding goes to the bottom or to the right.

    Args:
        source_height, source_width: Size of the upright source picture.
        target_height, target_width: Size of the model's input.
        pad_value: Red, green and blue of the padding, 0 to 255.

    Attributes:
        content_height, content_width: Size of the picture within the target, rounded to whole pixels, at least 1.
        top, left: First row and column of the content within the target.
        scale_y, scale_x: Target pixels for one source pixel.

    >>> box = Letterbox(720, 1280, 544, 960)
    >>> (box.content_height, box.content_width), (box.top, box.left), (box.scale_y, box.scale_x)
    ((540, 960), (2, 0), (0.75, 0.75))
    """

    def __init__(
        self,
        source_height: int,
        source_width: int,
        target_height: int,
        target_width: int,
        pad_value: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        if min(source_height, source_width, target_height, target_width) < 1:
            raise ValueError("a letterbox needs a source and a target of at least 1 x 1 pixels")
        self.source_height, self.source_width = source_height, source_width
        self.target_height, self.target_width = target_height, target_width
        self._pad_row = np.full((1, target_width, 3), pad_value, np.uint8)
        ratio = min(target_height / source_height, target_width / source_width)
        self.content_height = min(target_height, max(1, math.floor(source_height * ratio + 0.5)))
        self.content_width = min(target_width, max(1, math.floor(source_width * ratio + 0.5)))
        self.top = (target_height - self.content_height) // 2
        self.left = (target_width - self.content_width) // 2
        self.scale_y = self.content_height / source_height
        self.scale_x = self.content_width / source_width
        self._scaler, self._packer = VideoReformatter(), VideoReformatter()
        self._scratch = _Scratch()
        self._taps_of: dict[tuple[int, int], tuple[_Taps, _Taps]] = {}

    def fit(self, frame: Frame, out: NDArray[np.uint8]) -> None:
        """Write the model's input for one frame into ``out``.

        Conversion to RGB and resizing are one pass of the scaler, bilinear, with its support widened when shrinking.
        It goes to four bytes a pixel, of which the fourth is dropped after: straight to three, the scaler takes a
        millisecond more (2.1 and 1.2 for 720p to 540p) and is further off (-1.5 levels in the mean).

        Args:
            frame: A frame of the source size.
            out: uint8 [target_height, target_width, 3]; all of it is overwritten, the padding too.

        Raises:
            FrameShapeError: The frame has another size than the letterbox was made for, or ``out`` does not fit;
                ``out`` is unchanged.
        """
        self._check(frame, out)
        height, width = self.content_height, self.content_width
        if frame.quarter_turns % 2:
            height, width = width, height
        resized = self._scaler.reformat(
            _as_video_frame(frame), width, height, "rgba", interpolation=Interpolation.BILINEAR
        )
        resized = self._packer.reformat(resized, format="rgb24")
        bottom, right = self.top + self.content_height, self.left + self.content_width
        out[self.top : bottom, self.left : right] = np.rot90(rgb_view(resized), frame.quarter_turns)
        middle = out[self.top : bottom]
        for border in (out[: self.top], out[bottom:], middle[:, : self.left], middle[:, right:]):
            border[...] = self._pad_row[:, : border.shape[1]]

    def boxes_to_source(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes of the target in source pixels, cut off at the picture's border.

        Args:
            boxes: [..., 4] as (x1, y1, x2, y2) in target pixels.

        Returns:
            float32, same shape, in source pixels; a box that lies in the padding comes back empty.
        """
        offset, scale = self._offset_and_scale()
        limit = np.array([self.source_width, self.source_height] * 2, np.float64)
        return np.clip((boxes - offset) / scale, 0, limit).astype(np.float32)

    def boxes_to_target(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes [..., 4] of the source in target pixels, float32; nothing is cut off."""
        offset, scale = self._offset_and_scale()
        return (boxes * scale + offset).astype(np.float32)

    def masks_to_source(self, mask_logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Masks at the source's size from logits on a coarse grid over the target.

        One bilinear interpolation, from the grid to the centres of the source pixels: with half-pixel centres, the
        source pixel at y has the grid coordinate ``((y + 0.5) * scale_y + top) * grid_h / target_height - 0.5``, held
        within the grid's first and last centre. Interpolated logits above 0 are the mask. That is
        ``R_y @ logits @ R_x.T > 0`` with two non-zeros in each row of R. (Resizing to the target first and to the
        source then, as torch code does, interpolates twice and blurs thin parts.)

        Only the rows and columns next to a positive logit are computed: elsewhere the result cannot be positive.
        One thread at a time may call this.

        Args:
            mask_logits: float32 [K, grid_h, grid_w] over the whole target, usually a quarter of its size.

        Returns:
            bool [K, source_height, source_width], a new array.
        """
        masks = np.zeros((len(mask_logits), self.source_height, self.source_width), np.bool_)
        rows, columns = self._taps(mask_logits.shape[1], mask_logits.shape[2])
        for logits, mask in zip(mask_logits.astype(np.float32, copy=False), masks, strict=True):
            _interpolate_mask(logits, rows, columns, mask, self._scratch)
        return masks

    def patches_to_source(self, patches: NDArray[np.generic]) -> NDArray[np.generic]:
        """A value per patch of the target, as a value per source pixel.

        Args:
            patches: [rows, columns] of a grid that covers the whole target.

        Returns:
            [source_height, source_width], same dtype: the value of the patch that holds the pixel's centre.
        """
        rows, columns = self.patch_indices(patches.shape[0], patches.shape[1])
        return patches[rows[:, None], columns[None, :]]

    def patch_indices(self, grid_height: int, grid_width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row [source_height] and column [source_width] of the patch that holds each source pixel's centre, int64."""
        y, x = self._centres()
        rows = np.floor(y * (grid_height / self.target_height)).astype(np.int64)
        columns = np.floor(x * (grid_width / self.target_width)).astype(np.int64)
        return rows.clip(0, grid_height - 1), columns.clip(0, grid_width - 1)

    def _centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Target coordinates of the centres of the source rows and columns."""
        y = (np.arange(self.source_height, dtype=np.float64) + 0.5) * self.scale_y + self.top
        x = (np.arange(self.source_width, dtype=np.float64) + 0.5) * self.scale_x + self.left
        return y, x

    def _offset_and_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array([self.left, self.top] * 2, np.float64), np.array([self.scale_x, self.scale_y] * 2, np.float64)

    def _taps(self, grid_height: int, grid_width: int) -> tuple[_Taps, _Taps]:
        grid = grid_height, grid_width
        if grid not in self._taps_of:
            y, x = self._centres()
            rows = _Taps(y * (grid_height / self.target_height) - 0.5, grid_height)
            self._taps_of[grid] = rows, _Taps(x * (grid_width / self.target_width) - 0.5, grid_width)
        return self._taps_of[grid]

    def _check(self, frame: Frame, out: NDArray[np.uint8]) -> None:
        if (frame.height, frame.width) != (self.source_height, self.source_width):
            raise FrameShapeError(
                f"frame {frame.index} is {frame.height} x {frame.width}, the letterbox was made for "
                f"{self.source_height} x {self.source_width}. Make a new one when the resolution changes."
            )
        if out.shape != (self.target_height, self.target_width, 3) or out.dtype != np.uint8:
            raise FrameShapeError(
                f"the buffer is {out.dtype} {list(out.shape)}, "
                f"the letterbox writes uint8 [{self.target_height}, {self.target_width}, 3]."
            )


class _Taps:
    """One interpolation matrix: row i gives ``1 - part[i]`` to grid value ``low[i]`` and ``part[i]`` to ``high[i]``."""

    def __init__(self, coordinates: NDArray[np.float64], size: int) -> None:
        held = np.clip(coordinates, 0, size - 1)
        self.low = np.minimum(held.astype(np.int64), max(size - 2, 0))
        self.high = np.minimum(self.low + 1, size - 1)
        self.part = (held - self.low).astype(np.float32)

    def touching(self, first: int, last: int) -> slice:
        """The rows that give any weight to the grid values ``first`` to ``last``; one run, as ``low`` ascends."""
        start, stop = np.searchsorted(self.low, [first - 1, last + 1])
        return slice(int(start), int(stop))


class _Scratch:
    """Memory that is used again for every mask: fresh arrays of this size cost more than what is done with them.

    (43 ms instead of 9 for nine masks at 720p, where the C library fetches them from the system each time; those of a
    run it may keep, see :mod:`runtime.memory`.)
    """

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.float32]] = {}

    def array(self, name: str, rows: int, columns: int) -> NDArray[np.float32]:
        """float32 [rows, columns], C-contiguous, of any content; valid until the next call with this name."""
        size = rows * columns
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, np.float32)
        return self._arrays[name][:size].reshape(rows, columns)


def _interpolate_mask(
    logits: NDArray[np.float32], rows: _Taps, columns: _Taps, out: NDArray[np.bool_], scratch: _Scratch
) -> None:
    """Set ``out`` [H, W], which comes in all False, where the interpolated ``logits`` [grid_h, grid_w] are positive."""
    positive = logits > 0
    positive_rows, positive_columns = np.flatnonzero(positive.any(1)), np.flatnonzero(positive.any(0))
    if not len(positive_rows):
        return
    y = rows.touching(positive_rows[0], positive_rows[-1])
    x = columns.touching(positive_columns[0], positive_columns[-1])
    top = max(positive_rows[0] - 1, 0)
    low, part = rows.low[y] - top, rows.part[y, None]
    limit, rise = _limits_and_rises(logits[top : positive_rows[-1] + 2], columns, x, scratch)
    inside, width = out[y, x], limit.shape[1]
    rises, limits = scratch.array("rises", _ROWS_AT_ONCE, width), scratch.array("limits", _ROWS_AT_ONCE, width)
    for start in range(0, len(low), _ROWS_AT_ONCE):
        block = low[start : start + _ROWS_AT_ONCE]
        some = slice(len(block))
        rise.take(block, 0, out=rises[some], mode="clip")  # the indices are in range; "raise" would copy the output
        limit.take(block, 0, out=limits[some], mode="clip")
        rises[some] *= part[start : start + _ROWS_AT_ONCE]
        np.greater(rises[some], limits[some], out=inside[start : start + _ROWS_AT_ONCE])


def _limits_and_rises(
    logits: NDArray[np.float32], columns: _Taps, x: slice, scratch: _Scratch
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each grid row, what ``part * rise`` has to exceed to be inside, and the rise to the row below [grid_h, x].

    ``low + part * rise > 0``, written as ``part * rise > -low``, is one pass less for each source row.
    """
    low = columns.low[x]
    wide, rise = scratch.array("wide", len(logits), len(low)), scratch.array("rise", len(logits), len(low))
    logits.take(low, 1, out=wide, mode="clip")
    logits.take(columns.high[x], 1, out=rise, mode="clip")
    rise -= wide
    rise *= columns.part[x]
    wide += rise
    np.subtract(wide[1:], wide[:-1], out=rise[:-1])
    rise[-1] = 0
    return np.negative(wide, out=wide), rise


def _as_video_frame(frame: Frame) -> av.VideoFrame:
    if isinstance(frame.picture, av.VideoFrame):
        return frame.picture
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.picture), format="rgb24")
