"""Multi-scale deformable attention on a CPU: one pass over the places that are read, compiled by numba.

A graph of operators reads each place through GridSample, writes what it read, weights and sums it. Here a place's four
neighbours go straight into the sum of its query, as one run of channels each, which is how tokens lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from math import factorial
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
    """The loop over queries for heads of that many channels, compiled: one to two seconds at the first call.

    Results of infinite or undefined offsets are undefined, but nothing outside the arrays is read.
    """
    from numba import float32, int64, njit, uint64, void

    zero, half, one, two = np.float32(0), np.float32(0.5), np.float32(1), uint64(2)
    int_one = np.int32(1)
    lowest, log2_e = np.float32(-87), np.float32(1 / np.log(2))  # e^-87 is near the smallest normal number
    ln2_high = np.float32(0.693359375)  # few bits, so that whole multiples are exact
    ln2_low = np.float32(np.log(2) - 0.693359375)
    step, bias = np.float32(2**23), np.int32(127 * 2**23)  # a power of two to the next, as bits; the bits of 1
    c2, c3, c4, c5, c6, c7 = (np.float32(1 / factorial(n)) for n in range(2, 8))

    # One function: what is called in the loop over heads costs more than it does, also inlined. Indices are unsigned:
    # signed ones may count from the end, and that test would keep the loops over places and channels from SIMD.
    def run(
        offsets: Any, logits: Any, values: Any, origins: Any, sizes: Any, result: Any, first: Any, last: Any
    ) -> None:
        heads, places = logits.shape[1], logits.shape[2]
        widths, heights = np.empty(places, np.float32), np.empty(places, np.float32)  # of the map of each place
        starts = np.empty(places, np.int32)
        start, points = 0, places // len(sizes)
        for level in range(len(sizes)):
            for place in range(level * points, (level + 1) * points):
                heights[place], widths[place], starts[place] = sizes[level, 0], sizes[level, 1], start
            start += sizes[level, 0] * sizes[level, 1]
        weights, exponents = np.empty(places, np.float32), np.empty(places, np.int32)
        powers = exponents.view(np.float32)  # the same bits
        cells, shares = np.empty((4, places), np.int32), np.empty((4, places), np.float32)
        total = np.empty(channels, np.float32)
        stride = np.int32(heads * channels)

        for query in range(first, last):
            q = uint64(query)
            origin_x, origin_y = origins[query, 0] + one, origins[query, 1] + one
            for head in range(heads):
                h, channel = uint64(head), np.int32(head * channels)

                # softmax, up to its norm; numba's exp takes one number at a time
                largest, norm = -np.float32(np.inf), zero
                for place in range(places):
                    x = logits[q, h, uint64(place)]
                    largest = x if x > largest else largest
                for place in range(places):
                    k = uint64(place)
                    x = logits[q, h, k] - largest
                    x = x if x > lowest else lowest
                    power = np.floor(x * log2_e + half)
                    x = (x - power * ln2_high) - power * ln2_low  # within ln 2 / 2 of 0: the series is good to 1e-8
                    weights[k] = one + x * (one + x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * (c6 + x * c7))))))
                    exponents[k] = np.int32(power * step) + bias
                for place in range(places):
                    k = uint64(place)
                    weights[k] *= powers[k]
                    norm += weights[k]
                norm = one / norm

                # the four cells around each place, and the share of each
                begin = uint64(2 * head * places)
                for place in range(places):
                    k = uint64(place)
                    width, height = widths[k], heights[k]
                    x = ((origin_x + offsets[q, begin + two * k]) * width - one) * half
                    y = ((origin_y + offsets[q, begin + two * k + uint64(1)]) * height - one) * half
                    x, y = x if x > -one else -one, y if y > -one else -one  # in this order, for NaN
                    x, y = x if x < width else width, y if y < height else height
                    left, top = np.floor(x), np.floor(y)
                    to_left, to_top, weight = x - left, y - top, weights[k] * norm
                    left_share = (one - to_left) if left >= zero and left < width else zero
                    right_share = to_left if left + one < width else zero
                    top_share = (one - to_top) * weight if top >= zero and top < height else zero
                    bottom_share = to_top * weight if top + one < height else zero
                    columns, rows = np.int32(width), np.int32(height)
                    column0, column1 = np.int32(max(left, zero)), np.int32(left + one)
                    row0, row1 = np.int32(max(top, zero)), np.int32(top + one)
                    column0, column1 = min(column0, columns - int_one), min(column1, columns - int_one)
                    row0, row1 = min(row0, rows - int_one), min(row1, rows - int_one)
                    above, below = starts[k] + row0 * columns, starts[k] + row1 * columns
                    cells[0, k] = np.int32((above + column0) * stride + channel)
                    cells[1, k] = np.int32((above + column1) * stride + channel)
                    cells[2, k] = np.int32((below + column0) * stride + channel)
                    cells[3, k] = np.int32((below + column1) * stride + channel)
                    shares[0, k], shares[1, k] = left_share * top_share, right_share * top_share
                    shares[2, k], shares[3, k] = left_share * bottom_share, right_share * bottom_share

                # their sum, in the head's channels
                for index in range(channels):
                    total[index] = zero
                for place in range(places):
                    k = uint64(place)
                    cell0, cell1 = uint64(cells[0, k]), uint64(cells[1, k])
                    cell2, cell3 = uint64(cells[2, k]), uint64(cells[3, k])
                    share0, share1, share2, share3 = shares[0, k], shares[1, k], shares[2, k], shares[3, k]
                    for index in range(channels):
                        c = uint64(index)
                        upper = share0 * values[cell0 + c] + share1 * values[cell1 + c]
                        total[c] += upper + share2 * values[cell2 + c] + share3 * values[cell3 + c]
                target = q * uint64(stride) + uint64(channel)
                for index in range(channels):
                    result[target + uint64(index)] = total[index]

    signature = void(
        float32[:, ::1], float32[:, :, ::1], float32[::1], float32[:, ::1], int64[:, ::1], float32[::1], int64, int64
    )
    # NaN and infinities have to compare as they should, everything else may be done fast
    fast = {"contract", "reassoc", "nsz", "arcp"}
    kernel: Kernel = njit([signature], nogil=True, fastmath=fast, error_model="numpy")(run)
    return kernel


def deformable_attention(
    offsets: Floats,
    logits: Floats,
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
        logits: Whose softmax over the places weights them, [B, q, heads, levels * points].
        values: Cells of all maps, one map after the other, row by row, [B, cells, C]; a head reads its C / heads.
        origins: Of the queries, (x, y) in [-1, 1] from edge to edge of a map, [q, 2].
        sizes: Height and width of each map, [levels, 2].
        result: Written, [B, q, C].
        threads: That share the queries.
    """
    kernel = compiled_kernel(values.shape[2] // logits.shape[2])
    queries = offsets.shape[1]
    pieces = 1 if threads == 1 else _PIECES * threads
    bounds = [(queries * n // pieces, queries * (n + 1) // pieces) for n in range(pieces)]
    for row in range(len(offsets)):
        arrays = offsets[row], logits[row], values[row].reshape(-1), origins, sizes, result[row].reshape(-1)
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
