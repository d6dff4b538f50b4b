"""Multi-scale deformable attention on a CPU: one pass over the places that are read, compiled by numba.

A graph of operators reads each place through GridSample, writes what it read, weights and sums it. Here a place's four
neighbours go straight into the sum of its query, as one run of channels each, which is how tokens lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from threading import Barrier
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Kernel = Callable[[Floats, Floats, Floats, Floats, Integers, Floats, int, int], None]

_PIECES = 4  # per thread, so that a core that is busy with something else holds up little


def has_numba() -> bool:
    """Whether the kernel can be compiled here."""
    return find_spec("numba") is not None


@cache
def compiled_kernel(channels: int) -> Kernel:
    """The loop over queries for heads of that many channels, compiled: about a second at the first call.

    Results of infinite or undefined offsets are undefined, but nothing outside the arrays is read.
    """
    from numba import float32, int64, njit, void

    zero, half, one = np.float32(0), np.float32(0.5), np.float32(1)
    signature = void(
        float32[:, ::1], float32[:, :, ::1], float32[::1], float32[:, ::1], int64[:, ::1], float32[::1], int64, int64
    )

    # indices are unsigned, since numba wraps signed ones, and a test for each keeps the loop over channels from SIMD
    def read(
        offsets: Any, weights: Any, values: Any, origins: Any, sizes: Any, result: Any, first: Any, last: Any
    ) -> None:
        heads, places, levels = weights.shape[1], weights.shape[2], len(sizes)
        stride = np.int32(heads * channels)
        widths, heights = np.empty(places, np.float32), np.empty(places, np.float32)
        starts = np.empty(places, np.int32)
        start, points = 0, places // levels
        for level in range(levels):
            for k in range(level * points, (level + 1) * points):
                heights[k], widths[k], starts[k] = sizes[level, 0], sizes[level, 1], start
            start += sizes[level, 0] * sizes[level, 1]
        cells, shares = np.empty((4, places), np.int32), np.empty((4, places), np.float32)
        total = np.empty(channels, np.float32)
        for q in range(first, last):
            origin_x, origin_y = origins[q, 0] + one, origins[q, 1] + one
            for head in range(heads):
                begin, channel = np.uint64(2 * head * places), np.int32(head * channels)
                for place in range(places):
                    k = np.uint64(place)
                    width, height = widths[k], heights[k]
                    x = ((origin_x + offsets[np.uint64(q), begin + k + k]) * width - one) * half
                    y = ((origin_y + offsets[np.uint64(q), begin + k + k + np.uint64(1)]) * height - one) * half
                    x, y = x if x > -one else -one, y if y > -one else -one  # in this order, for NaN
                    x, y = x if x < width else width, y if y < height else height
                    left, top = np.floor(x), np.floor(y)
                    right_share, bottom_share = x - left, y - top
                    weight = weights[np.uint64(q), np.uint64(head), k]
                    x0 = (one - right_share) if left >= zero and left < width else zero
                    x1 = right_share if left + one < width else zero
                    y0 = (one - bottom_share) * weight if top >= zero and top < height else zero
                    y1 = bottom_share * weight if top + one < height else zero
                    row = np.int32(width)
                    column0, column1 = np.int32(max(left, zero)), np.int32(left + one)
                    column0, column1 = min(column0, row - np.int32(1)), min(column1, row - np.int32(1))
                    row0, row1 = np.int32(max(top, zero)), np.int32(top + one)
                    row0, row1 = min(row0, np.int32(height) - np.int32(1)), min(row1, np.int32(height) - np.int32(1))
                    above, below = starts[k] + row0 * row, starts[k] + row1 * row
                    cells[0, k] = np.int32((above + column0) * stride + channel)
                    cells[1, k] = np.int32((above + column1) * stride + channel)
                    cells[2, k] = np.int32((below + column0) * stride + channel)
                    cells[3, k] = np.int32((below + column1) * stride + channel)
                    shares[0, k], shares[1, k], shares[2, k], shares[3, k] = x0 * y0, x1 * y0, x0 * y1, x1 * y1
                for c in range(channels):
                    total[c] = zero
                for place in range(places):
                    k = np.uint64(place)
                    a, b = np.uint64(cells[0, k]), np.uint64(cells[1, k])
                    d, e = np.uint64(cells[2, k]), np.uint64(cells[3, k])
                    of_a, of_b, of_d, of_e = shares[0, k], shares[1, k], shares[2, k], shares[3, k]
                    for channel_index in range(channels):
                        c = np.uint64(channel_index)
                        total[c] += (
                            of_a * values[a + c] + of_b * values[b + c] + of_d * values[d + c] + of_e * values[e + c]
                        )
                target = np.uint64(q) * np.uint64(stride) + np.uint64(channel)
                for channel_index in range(channels):
                    result[target + np.uint64(channel_index)] = total[channel_index]

    # NaN and infinities have to compare as they should, everything else may be done fast
    fast = {"contract", "reassoc", "nsz", "arcp"}
    kernel: Kernel = njit([signature], nogil=True, fastmath=fast, error_model="numpy")(read)
    return kernel


def deformable_attention(
    offsets: Floats,
    weights: Floats,
    values: Floats,
    origins: Floats,
    sizes: Integers,
    result: Floats,
    threads: int,
) -> None:
    """Read feature maps at a few places per query and head, bilinearly, zero outside, and sum with weights.

    Arrays are contiguous. Source: Deformable DETR, arXiv:2010.04159, equation 3, without its projections.

    Args:
        offsets: Places (x, y) from ``origins``, in units of half a map, [B, q, heads * levels * points * 2].
        weights: Of each place, [B, q, heads, levels * points].
        values: Cells of all maps, one map after the other, row by row, [B, cells, C]; a head reads its C / heads.
        origins: Of the queries, (x, y) in [-1, 1] from edge to edge of a map, [q, 2].
        sizes: Height and width of each map, [levels, 2].
        result: Written, [B, q, C].
        threads: That share the queries.
    """
    kernel = compiled_kernel(values.shape[2] // weights.shape[2])
    queries = offsets.shape[1]
    pieces = 1 if threads == 1 else _PIECES * threads
    bounds = [(queries * n // pieces, queries * (n + 1) // pieces) for n in range(pieces)]
    for row in range(len(offsets)):
        arrays = offsets[row], weights[row], values[row].reshape(-1), origins, sizes, result[row].reshape(-1)
        if threads == 1:
            kernel(*arrays, 0, queries)
            continue
        for part in [workers(threads).submit(kernel, *arrays, first, last) for first, last in bounds]:
            part.result()


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    """That many threads, all started: a thread may run on the cores of the one that starts it.

    So the first call must not come from a thread of a library that binds its own to one core each.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="deformable-attention")
    all_there = Barrier(threads)
    for task in [pool.submit(all_there.wait) for _ in range(threads)]:
        task.result()
    return pool
