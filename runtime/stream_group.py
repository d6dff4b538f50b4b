"""Streams of several cameras on one engine: those that are ready together are stepped together where that pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backend import StreamBuffers
from runtime.errors import StepError
from runtime.stream import Answer, PreparedFrame, Stream, Turn


@dataclass
class _Batch:
    """Buffers of several rows.

    Attributes:
        owners: The camera whose newest state each row holds, None for a row that holds nobody's; empty likewise.
    """

    buffers: StreamBuffers
    owners: tuple[int | None, ...] = field(default=())


class StreamGroup:
    """Steps the frames of one round: of each camera that has one ready.

    Frames with the same budget run as one batch, of up to the engine's ``report.largest_batch``. A frame without a
    prior has a budget of its own and runs alone. A stream's state lies where its last frame ran: in its own buffers,
    or in its row of the batch. So cameras that keep being ready together pass nothing to and fro.

    Args:
        streams: On one engine, with one controller or none; opened and closed by the caller.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        engine = streams[0].engine
        self._largest = min(len(streams), engine.report.largest_batch)
        usual = streams[0].usual_budget
        self._batches = {size: _Batch(engine.open_stream(size, usual)) for size in range(2, self._largest + 1)}

    def infer(
        self, ready: Mapping[int, PreparedFrame], when_computed: Callable[[], None] | None = None
    ) -> dict[int, Answer | StepError]:
        """Run one frame of each camera in ``ready`` and carry their priors on.

        Args:
            ready: One at least.
            when_computed: Called once the backend is done with all of them and only tracks remain to be told; left
                out where its last step fails.

        Returns:
            The answer for each, or why there is none: that camera's next frame then runs without a prior.
        """
        started_s = time.perf_counter()
        turns = {camera: self._streams[camera].begin(ready[camera], started_s) for camera in sorted(ready)}
        answers: dict[int, Answer | StepError] = {}
        *first, last = self._steps(turns)
        for cameras in first:
            answers |= self._run({camera: turns[camera] for camera in cameras})
        answers |= self._run({camera: turns[camera] for camera in last}, when_computed)
        self._learn(turns, answers)
        return answers

    def _steps(self, turns: Mapping[int, Turn]) -> list[Sequence[int]]:
        """The cameras that run in each step."""
        without_prior: list[Sequence[int]] = []
        carrying: dict[tuple[int, ...], list[int]] = {}
        for camera, turn in turns.items():
            if turn.reset_reason is None:
                carrying.setdefault(turn.budget, []).append(camera)
            else:
                without_prior.append([camera])
        return [*without_prior, *(chunk for cameras in carrying.values() for chunk in _chunks(cameras, self._largest))]

    def _run(
        self, turns: Mapping[int, Turn], when_computed: Callable[[], None] | None = None
    ) -> dict[int, Answer | StepError]:
        if len(turns) > 1:
            return self._together(turns, when_computed)
        ((camera, turn),) = turns.items()
        if turn.reset_reason is None:
            self._bring_home(camera)
        else:
            self._disown(camera)
        try:
            return {camera: self._streams[camera].run_alone(turn, when_computed)}
        except StepError as error:
            return {camera: error}

    def _together(
        self, turns: Mapping[int, Turn], when_computed: Callable[[], None] | None
    ) -> dict[int, Answer | StepError]:
        cameras = tuple(turns)
        streams = [self._streams[camera] for camera in cameras]
        batch, started = self._batch_of(cameras), time.perf_counter()
        for row, turn in enumerate(turns.values()):
            batch.buffers.image[row] = turn.prepared.image
        budget = turns[cameras[0]].budget if streams[0].engine.graph.has_budget else None
        try:
            outputs = batch.buffers.run(budget)
        except StepError as error:
            batch.owners = ()
            for stream in streams:
                stream.fail()
            return dict.fromkeys(cameras, error)
        batch.buffers.commit()  # a row whose state is not finite is dropped before its next frame
        step_ms = (time.perf_counter() - started) * 1e3
        if when_computed is not None:
            when_computed()
        answers: dict[int, Answer | StepError] = {}
        for row, (camera, stream) in enumerate(zip(cameras, streams, strict=True)):
            own = {name: output[row : row + 1] for name, output in outputs.items()}
            answers[camera] = stream.finish(turns[camera], own, step_ms)
        if written := _rows([stream.written_state() for stream in streams]):
            batch.buffers.set_state(written)
        return answers

    def _batch_of(self, cameras: tuple[int, ...]) -> _Batch:
        """The batch of this size, with the state of these cameras in its rows."""
        batch = self._batches[len(cameras)]
        if batch.owners != cameras:
            for camera in cameras:
                self._bring_home(camera)
            self._dissolve(batch)
            batch.buffers.set_state(_rows([self._streams[camera].buffers.state() for camera in cameras]))
            batch.owners = cameras
        return batch

    def _bring_home(self, camera: int) -> None:
        for batch in self._batches.values():
            if camera in batch.owners:
                self._dissolve(batch)

    def _dissolve(self, batch: _Batch) -> None:
        """Give the streams that own a row their state back."""
        if any(camera is not None for camera in batch.owners):
            state = batch.buffers.state()
            for row, camera in enumerate(batch.owners):
                if camera is not None:
                    own = {name: value[row : row + 1] for name, value in state.items()}
                    self._streams[camera].buffers.set_state(own)
        batch.owners = ()

    def _disown(self, camera: int) -> None:
        """Its state in a batch is not worth keeping."""
        for batch in self._batches.values():
            batch.owners = tuple(None if owner == camera else owner for owner in batch.owners)

    def _learn(self, turns: Mapping[int, Turn], answers: Mapping[int, Answer | StepError]) -> None:
        """The slowest frame of a round has to fit; a round in which one had no prior or failed says nothing."""
        controller = self._streams[0].controller
        latencies_ms = [answer.header.latency_ms for answer in answers.values() if isinstance(answer, Answer)]
        is_usual = all(turn.reset_reason is None for turn in turns.values()) and len(latencies_ms) == len(turns)
        if controller is not None and latencies_ms and is_usual:
            controller.record(max(latencies_ms))


def _rows(states: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, NDArray[np.generic]]:
    """The states of several streams as one of that many rows."""
    return {name: np.concatenate([state[name] for state in states]) for name in states[0]}


def _chunks(cameras: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The cameras in groups of at most ``size``."""
    return (cameras[start : start + size] for start in range(0, len(cameras), size))
