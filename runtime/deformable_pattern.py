"""What an export leaves of a deformable attention: how a backend knows it again, to put one operator in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of :class:`models.vpp_rovis.deformable.DeformableAttention`
POINTS_FIRST = [3, 0, 2, 4, 1, 5]  # [B, q, heads, levels, points, 2] -> [levels, B, heads, points, q, 2]
PLANES = [0, 2, 1]  # of values


class Sampling(NamedTuple):
    """What one GridSample tells: its map, and the operator's inputs."""

    level: int
    size: tuple[int, int]  # height and width of the map
    inputs: tuple[Any, Any, Any, Any]  # offsets, logits, values, origins


class Attention(NamedTuple):
    """One deformable attention: what the operator takes, and sizes."""

    inputs: tuple[Any, Any, Any, Any]  # offsets, logits, values, origins
    maps: NDArray[np.int64]  # height and width of each, [levels, 2]
    heads: int
    queries: int
    channels: int


def attention_of(samplings: Sequence[Sampling | None], shape: Callable[[Any], Sequence[int]]) -> Attention | None:
    """The attention that samples so; None if there is none.

    Args:
        samplings: All whose results are summed; None for one that is of anything else.
        shape: Of an input; lengths that are not known are 0.
    """
    known = [sampling for sampling in samplings if sampling is not None]
    if not known or len(known) < len(samplings):
        return None
    offsets, logits, values, origins = (shape(value) for value in known[0].inputs)
    if (len(offsets), len(logits), len(values), len(origins)) != (3, 4, 3, 2):
        return None
    maps = np.array([sampling.size for sampling in sorted(known, key=lambda each: each.level)], np.int64)
    (heads, places), (cells, channels) = logits[2:], values[1:]
    is_whole = maps.prod(1).sum() == cells and offsets[2] == 2 * heads * places > 0
    if not is_whole or places % len(maps) or channels % heads:
        return None
    return Attention(known[0].inputs, maps, heads, origins[0], channels)
