"""Frames of a stream and bare steps of its engine in turns, so that a machine whose speed drifts touches both alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Engine, StreamBuffers

BLOCK = 20  # frames, and bare steps after them


class TakingTurns:
    """An engine in whose stream a block of bare steps follows each block of frames.

    Attributes:
        frames_ms: Milliseconds a frame in each block, the whole of it.
        bare_ms: Milliseconds a bare step in the blocks before, between and after those.
    """

    def __init__(self, engine: Engine) -> None:
        self.report, self.graph, self._engine = engine.report, engine.graph, engine
        self.frames_ms: list[float] = []
        self.bare_ms: list[float] = []

    def open_stream(self, batch: int = 1, usual_budget: tuple[int, ...] | None = None) -> StreamBuffers:
        """The stream's buffers, and a second set for the bare steps."""
        stream, bare = (self._engine.open_stream(batch, usual_budget) for _ in range(2))
        return _Turns(self, stream, bare, usual_budget)

    def close(self) -> None:
        """Leaves the engine open: it is lent."""

    def ratios(self) -> list[float]:
        """Rate of each block of frames over that of the bare steps around it, without the first frame's block."""
        around = [np.mean(pair) for pair in pairwise(self.bare_ms)]
        return [float(bare / frames) for bare, frames in zip(around, self.frames_ms, strict=True)][1:]


class _Turns:
    def __init__(
        self, notes: TakingTurns, stream: StreamBuffers, bare: StreamBuffers, budget: tuple[int, ...] | None
    ) -> None:
        self._notes, self._stream, self._bare, self._budget = notes, stream, bare, budget
        self._count, self._started_s = 0, 0.0
        self.image, self.commit, self.reset = stream.image, stream.commit, stream.reset
        self.state, self.set_state = stream.state, stream.set_state
        bare.image[:] = np.random.default_rng(0).integers(0, 256, bare.image.shape, np.uint8)

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """One step of the stream; before each block of them the bare steps."""
        if self._count % BLOCK == 0:
            if self._count:
                self._notes.frames_ms.append((time.perf_counter() - self._started_s) / BLOCK * 1e3)
            self._notes.bare_ms.append(self._bare_step_ms())
            self._started_s = time.perf_counter()
        self._count += 1
        return self._stream.run(token_budget)

    def _bare_step_ms(self) -> float:
        self._bare_step()  # finds other things in the caches
        started_s = time.perf_counter()
        for _ in range(BLOCK):
            self._bare_step()
        return (time.perf_counter() - started_s) / BLOCK * 1e3

    def _bare_step(self) -> None:
        self._bare.run(self._budget)
        self._bare.commit()
