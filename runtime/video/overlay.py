"""What a stream found, drawn onto its pictures: masks, boxes, labels, and which patches the model looked at."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..results import FrameResult, Instances
from .frame import Frame
from .letterbox import Letterbox

Pixels = NDArray[np.uint8]  # [H, W, 3], RGB
Colour = tuple[int, int, int]

_MASK_ALPHA = 112  # of 255
_DARKEST_EIGHTHS, _LIGHTEST_EIGHTHS = 2, 5  # brightness of patches pruned at the first and at the last stage
_CAPTION_COLOUR = (16, 16, 16)


class Overlay:
    """Draws results onto frames.

    Args:
        classes: Names that the labels index.
        patch_size: Pixels of the model's input along one patch; with the patch grid it gives the input's size.
    """

    def __init__(self, classes: Sequence[str], *, patch_size: int = 16) -> None:
        self._classes = classes
        self._patch_size = patch_size
        self._canvas: Pixels = np.empty((0, 0, 3), np.uint8)

    def draw(self, frame: Frame, result: FrameResult) -> Pixels:
        """The frame with its result.

        Patches that were pruned are darker, the earlier the darker; each track has its colour; a line at the bottom
        tells the frame's number and time, tokens kept per stage, milliseconds, and why the prior was reset, if it was.

        Args:
            frame: The source's frame; not written to.
            result: The answer to this frame, with masks at the frame's size.

        Returns:
            uint8 [H, W, 3], RGB, C-contiguous; overwritten by the next call.
        """
        if self._canvas.shape != frame.rgb.shape:
            self._canvas = np.empty_like(frame.rgb)
        np.copyto(self._canvas, frame.rgb)
        if result.kept_stages.size:
            shade_patches(self._canvas, result.kept_stages, len(result.tokens_kept), self._patch_size)
        draw_instances(self._canvas, result.instances, self._classes)
        draw_caption(self._canvas, caption(result))
        return self._canvas


def shade_patches(canvas: Pixels, kept_stages: NDArray[np.int64], stages: int, patch_size: int) -> None:
    """Darken in place the patches that were pruned, with thin lines between them.

    Args:
        canvas: uint8 [H, W, 3], the whole source picture.
        kept_stages: int64 [rows, columns], stages that each patch of the letterboxed picture passed, 0 to ``stages``.
        stages: Number of selection stages; a patch that passed all of them keeps its brightness.
        patch_size: Pixels of the letterboxed picture along one patch.
    """
    rows, columns = kept_stages.shape
    letterbox = Letterbox(canvas.shape[0], canvas.shape[1], rows * patch_size, columns * patch_size)
    row_of_y, column_of_x = letterbox.patch_indices(rows, columns)
    eighths = _eighths(stages)[kept_stages.clip(0, stages)][:, column_of_x]  # [rows, W]
    line_x = np.flatnonzero(np.diff(column_of_x)) + 1
    eighths[:, line_x] -= eighths[:, line_x] < 8
    weights = np.repeat(eighths, 3, axis=1)  # [rows, 3 W]
    tops = np.flatnonzero(np.diff(row_of_y, prepend=-1))
    for top, bottom in zip(tops, [*tops[1:], len(canvas)], strict=True):
        weight = weights[row_of_y[top]]
        if (weight < 8).any():
            _multiply_eighths(canvas[top : top + 1], weight - (weight < 8))
            _multiply_eighths(canvas[top + 1 : bottom], weight)


def draw_instances(canvas: Pixels, instances: Instances, classes: Sequence[str]) -> None:
    """Draw masks with their outlines, then boxes, then labels such as ``dog #3 0.87``, in place."""
    thickness = 2 if canvas.shape[0] >= 480 else 1
    colours = [track_colour(int(track_id)) for track_id in instances.track_ids]
    corners = [_pixel_box(box, canvas) for box in instances.boxes]
    if len(instances):
        image = Image.fromarray(canvas)
        for mask, colour in zip(instances.masks, colours, strict=True):
            _draw_mask(image, mask, colour, thickness)
        np.copyto(canvas, np.asarray(image))
    for (x1, y1, x2, y2), colour in zip(corners, colours, strict=True):
        _draw_box(canvas[y1:y2, x1:x2], colour, thickness)
    for index, ((x1, y1, _, _), colour) in enumerate(zip(corners, colours, strict=True)):
        name = classes[instances.labels[index]]
        label = render_text(
            f"{name} #{instances.track_ids[index]}  {instances.scores[index]:.2f}", _text_size(canvas), colour
        )
        _paste(canvas, label, y1 - label.shape[0], x1)


def draw_caption(canvas: Pixels, text: str) -> None:
    """Write one line along the bottom edge, in place, on a darkened strip."""
    line = render_text(text, _text_size(canvas), _CAPTION_COLOUR)
    height = min(line.shape[0], canvas.shape[0])
    canvas[-height:] >>= 2
    _paste(canvas, line, canvas.shape[0] - height, 0)


def caption(result: FrameResult) -> str:
    """The line below the picture.

    >>> import numpy as np
    >>> nothing = Instances(*(np.empty(0) for _ in range(5)))
    >>> caption(FrameResult(7, 0.28, nothing, np.empty((0, 0)), np.array([1122, 897]), "scene cut", 41.26))
    'frame 7 | 0.28 s | kept 1122 / 897 | 41.3 ms | reset: scene cut'
    """
    parts = [f"frame {result.frame_index}", f"{result.timestamp_s:.2f} s"]
    if len(result.tokens_kept):
        parts.append("kept " + " / ".join(str(count) for count in result.tokens_kept))
    parts.append(f"{result.step_ms:.1f} ms")
    if result.reset_reason is not None:
        parts.append(f"reset: {result.reset_reason}")
    return " | ".join(parts)


def track_colour(track_id: int) -> Colour:
    """A colour for a track; neighbouring ids are far apart on the colour circle (golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(track_id * 0.618034 % 1, 0.75 if track_id % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


@lru_cache(maxsize=256)
def render_text(text: str, size: int, background: Colour) -> Pixels:
    """One line of text as a small picture, uint8 [h, w, 3], read-only; black or white, whichever reads better."""
    font = ImageFont.load_default(size)
    left, _, right, _ = font.getbbox(text)
    image = Image.new("RGB", (round(right - left) + size // 2, round(size * 1.3)), background)
    bright = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), background, strict=True)) > 128
    ink = (0, 0, 0) if bright else (255, 255, 255)
    ImageDraw.Draw(image).text((size // 4 - left, 0), text, fill=ink, font=font)
    pixels: Pixels = np.array(image)
    pixels.flags.writeable = False
    return pixels


def _eighths(stages: int) -> NDArray[np.uint16]:
    """Brightness in eighths of a patch that passed 0, 1, ... ``stages`` stages."""
    pruned = np.linspace(_DARKEST_EIGHTHS, _LIGHTEST_EIGHTHS, max(stages, 1))[:stages]
    return np.append(np.round(pruned), 8).astype(np.uint16)


def _multiply_eighths(rows: Pixels, weight: NDArray[np.uint16]) -> None:
    """Multiply rows [n, W, 3] in place by ``weight`` [3 W] / 8."""
    product = rows.reshape(len(rows), -1).astype(np.uint16)
    product *= weight
    product >>= 3
    rows[...] = product.reshape(rows.shape)


def _draw_mask(image: Image.Image, mask: NDArray[np.bool_], colour: Colour, thickness: int) -> None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[window]
    alpha = inside * np.uint8(255)
    alpha -= _eroded(inside, thickness) * np.uint8(255 - _MASK_ALPHA)
    image.paste(colour, (int(columns[0]), int(rows[0])), Image.fromarray(alpha))


def _eroded(mask: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """The mask without its outermost pixels; what lies outside of the array counts as outside of the mask."""
    inner = np.pad(mask, times)
    for _ in range(times):
        inner = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    return inner


def _draw_box(region: Pixels, colour: Colour, thickness: int) -> None:
    for edge in (region[:thickness], region[-thickness:], region[:, :thickness], region[:, -thickness:]):
        edge[...] = colour


def _pixel_box(box: NDArray[np.float32], canvas: Pixels) -> tuple[int, int, int, int]:
    """Whole pixels that the box touches, held within the picture."""
    height, width = canvas.shape[:2]
    x1, y1 = np.floor(box[:2]).clip(0, (width, height)).tolist()
    x2, y2 = np.ceil(box[2:]).clip(0, (width, height)).tolist()
    return int(x1), int(y1), int(x2), int(y2)


def _text_size(canvas: Pixels) -> int:
    return max(12, int(canvas.shape[0]) // 42)


def _paste(canvas: Pixels, picture: Pixels, top: int, left: int) -> None:
    """Copy ``picture`` onto ``canvas``, moved to lie within it where it fits, cut off where it does not."""
    top = max(0, min(top, canvas.shape[0] - picture.shape[0]))
    left = max(0, min(left, canvas.shape[1] - picture.shape[1]))
    region = canvas[top : top + picture.shape[0], left : left + picture.shape[1]]
    region[...] = picture[: region.shape[0], : region.shape[1]]
