"""A video stream through a model: one frame in, objects out, the prior carried from frame to frame."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Engine, EngineReport, StreamBuffers
from runtime.budget_controller import BudgetController
from runtime.bundle import Bundle
from runtime.errors import FrameShapeError, StepError
from runtime.manifest import Manifest, TrackerSettings
from runtime.resets import (
    FAILED_STEP,
    FIRST_FRAME,
    NON_FINITE_STATE,
    RESOLUTION_CHANGE,
    ResetDetector,
    ResetSettings,
    thumbnail_of,
)
from runtime.results import FrameResult, Instances
from runtime.track_queries import TrackQueryTracker
from runtime.tracks import Detections, ObjectTracker, Tracker
from runtime.video.frame import Frame
from runtime.video.letterbox import Letterbox

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedFrame:
    """A frame and the model's input made of it.

    Attributes:
        image: uint8 [height, width, 3] of the bundle's image size, letterboxed.
        letterbox: How it was fitted; one object as long as the source keeps its resolution.
        thumbnail: What a cut is told from, see :mod:`runtime.resets`.
        preprocess_ms: Time that took, milliseconds.
        in_place: ``image`` is where the engine reads it, in the stream's own buffers.
    """

    frame: Frame
    image: NDArray[np.uint8]
    letterbox: Letterbox
    thumbnail: NDArray[np.float32]
    preprocess_ms: float
    in_place: bool = False


@dataclass(frozen=True)
class Answer:
    """What the model said about one frame, with masks still on the model's own grid.

    Attributes:
        detections: Objects by track id.
        mask_logits: float32 [O, h, w], one for each detection.
        header: The result without its objects.
    """

    detections: Detections
    mask_logits: NDArray[np.float32]
    letterbox: Letterbox
    header: FrameResult

    def result(self) -> FrameResult:
        """Objects in pixels of the frame; may be called in another thread than the stream's."""
        masks = self.letterbox.masks_to_source(self.mask_logits)
        return replace(self.header, instances=_instances(self.detections, masks))


@dataclass(frozen=True)
class Turn:
    """A frame whose turn has come, before it runs.

    Attributes:
        reset_reason: Why it runs without a prior; None if it has one.
        budget: Tokens kept at each stage.
        started_s: When it was taken up, seconds of ``time.perf_counter``; what it waits for after that is latency.
    """

    prepared: PreparedFrame
    reset_reason: str | None
    budget: tuple[int, ...]
    started_s: float


class Stream:
    """One camera on an engine; several streams share one engine, each with its own state.

    :meth:`step` is all that most programs need. It is :meth:`prepare`, :meth:`infer` and :meth:`Answer.result` one
    after the other, which a pipeline calls in threads of their own. :class:`runtime.stream_group.StreamGroup` steps
    several streams together.

    >>> with Stream(bundle, load_engine(bundle)) as stream:  # doctest: +SKIP
    ...     for frame in frames:
    ...         result = stream.step(frame, timestamp_s=time.monotonic())

    Args:
        bundle: What the engine was loaded from.
        engine: Stays open when the stream is closed.
        budget: Tokens kept at each stage; None takes the bundle's default preset, or what the engine has nearest to it.
        keep_ratio: Instead of ``budget``: mean share of tokens over all blocks, in (0, 1].
        controller: Instead of both: chooses the budget of each frame; streams of one engine may share it.
        resets: When to drop the prior.

    Raises:
        TokenBudgetError: The budget does not fit the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        budget: Sequence[int] | None = None,
        keep_ratio: float | None = None,
        controller: BudgetController | None = None,
        resets: ResetSettings | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle, self.engine, self.controller = bundle, engine, controller
        self._budget = choose_budget(bundle.manifest, engine.report, budget, keep_ratio)
        self._buffers: StreamBuffers | None = None
        self._letterbox: Letterbox | None = None  # of the last frame prepared
        self._last_letterbox: Letterbox | None = None  # of the last frame run
        self._detector = ResetDetector(resets)
        self._tracker = make_tracker(manifest)
        self._frames = 0
        self.reset_counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def budget(self) -> tuple[int, ...]:
        """Tokens that the next frame keeps at each stage if it has a prior."""
        return self._budget if self.controller is None else self.controller.budget

    @property
    def usual_budget(self) -> tuple[int, ...] | None:
        """The budget of all frames with a prior; None where a controller chooses."""
        return self._budget if self.controller is None else None

    @property
    def buffers(self) -> StreamBuffers:
        """The stream's own memory, with its state; allocated on first use."""
        self.open()
        assert self._buffers is not None
        return self._buffers

    def open(self) -> None:
        """Allocate all buffers; does nothing if the stream is open. One that was closed starts without a prior."""
        if self._buffers is None:
            self._buffers = self.engine.open_stream(usual_budget=self.usual_budget)
            self._detector.note(FIRST_FRAME)

    def close(self) -> None:
        """Give the buffers back; may be called twice."""
        self._buffers = None

    def reset(self, reason: str = "reset by caller") -> None:
        """Forget the past: the next frame runs as the first frame of a new stream, and track ids go on."""
        self._detector.note(reason)

    def step(self, frame: NDArray[np.uint8] | Frame, *, timestamp_s: float | None = None) -> FrameResult:
        """Run one frame and carry the prior to the next.

        Args:
            frame: uint8 [H, W, 3], RGB, of any size, or a :class:`Frame` of a source.
            timestamp_s: Capture time, seconds; later than that of the frame before. A ``Frame`` brings its own.

        Returns:
            Objects in pixels of ``frame``; the arrays are the caller's own.

        Raises:
            FrameShapeError: This is no RGB picture; the prior is unchanged.
            StepError: The backend failed; the prior is dropped, the next frame runs without one.
        """
        return self.infer(self.prepare(self._as_frame(frame, timestamp_s), in_place=True)).result()

    def prepare(self, frame: Frame, *, in_place: bool = False) -> PreparedFrame:
        """Letterbox a frame for the model; of all threads one at a time may call it, in the order of the frames.

        Args:
            in_place: Write the model's input where the engine reads it. Only for the frame that is run next, and not
                before the step on the one before has ended.

        Raises:
            FrameShapeError: This is no RGB picture; nothing has changed.
        """
        if isinstance(frame.picture, np.ndarray):
            _check_picture(frame.picture)
        height, width = self.bundle.manifest.image_size
        image = self.buffers.image[0] if in_place else np.empty((height, width, 3), np.uint8)
        started = time.perf_counter()  # a stream that had to be opened first is not the frame's latency
        size = frame.height, frame.width
        if self._letterbox is None or (self._letterbox.source_height, self._letterbox.source_width) != size:
            self._letterbox = Letterbox(*size, height, width, self.bundle.manifest.pad_value)
        self._letterbox.fit(frame, image)
        thumbnail = thumbnail_of(_content(image, self._letterbox))
        took_ms = (time.perf_counter() - started) * 1e3
        return PreparedFrame(frame, image, self._letterbox, thumbnail, took_ms, in_place)

    def infer(self, prepared: PreparedFrame) -> Answer:
        """Run one prepared frame and carry the prior to the next.

        Raises:
            StepError: The backend failed; the prior is dropped, the next frame runs without one.
        """
        turn = self.begin(prepared, time.perf_counter())
        answer = self.run_alone(turn)
        if self.controller is not None and turn.reset_reason is None:
            self.controller.record(answer.header.latency_ms)
        return answer

    def begin(self, prepared: PreparedFrame, started_s: float) -> Turn:
        """Decide whether a frame may use the prior, which is dropped from :attr:`buffers` if not."""
        self.open()
        frame = prepared.frame
        if self._last_letterbox not in (None, prepared.letterbox):
            self._detector.note(RESOLUTION_CHANGE)
        self._last_letterbox = prepared.letterbox
        reason = self._detector.check(prepared.thumbnail, frame.timestamp_s, frame.discontinuity)
        budget = self.budget
        if reason is not None:
            self._drop_prior(reason)
            budget = self.bundle.manifest.budget_rule.at_reset(budget)
        return Turn(prepared, reason, budget, started_s)

    def run_alone(self, turn: Turn, when_computed: Callable[[], None] | None = None) -> Answer:
        """Run a frame in the stream's own buffers, which hold its state.

        Args:
            when_computed: Called as soon as the backend is done, before the tracks are.

        Raises:
            StepError: As :meth:`infer`.
        """
        buffers, started = self.buffers, time.perf_counter()
        if not turn.prepared.in_place:
            buffers.image[0] = turn.prepared.image
        try:
            outputs = buffers.run(turn.budget if self.engine.graph.has_budget else None)
        except StepError:
            self.fail()
            raise
        if bool(outputs["state_ok"][0]):
            buffers.commit()
        step_ms = (time.perf_counter() - started) * 1e3
        if when_computed is not None:
            when_computed()
        answer = self.finish(turn, outputs, step_ms)
        if written := self.written_state():
            buffers.set_state(written)
        return answer

    def fail(self) -> None:
        """A frame was lost to the backend: the next one runs without a prior."""
        self._detector.note(FAILED_STEP)
        self._frames += 1

    def finish(self, turn: Turn, outputs: Mapping[str, NDArray[np.generic]], step_ms: float) -> Answer:
        """Make the answer of what the graph gave for this frame, and count it.

        Args:
            outputs: By name, one row each.
            step_ms: Time in the backend, milliseconds.
        """
        if not bool(outputs["state_ok"][0]):
            self._detector.note(NON_FINITE_STATE)
        class_logits = np.asarray(outputs["class_logits"][0], np.float32)
        mask_logits = np.asarray(outputs["mask_logits"][0], np.float32)
        queries = np.asarray(outputs["queries"][0], np.float32) if "queries" in outputs else None
        detections = self._tracker.update(class_logits, mask_logits, queries)
        header = self._header(turn, outputs, step_ms)
        self._frames += 1
        return Answer(detections, mask_logits[detections.queries], turn.prepared.letterbox, header)

    def written_state(self) -> dict[str, NDArray[np.generic]]:
        """State that the tracker leaves to the next frame, by input name, one row each; mostly none."""
        return self._tracker.next_state()

    def _as_frame(self, frame: NDArray[np.uint8] | Frame, timestamp_s: float | None) -> Frame:
        if isinstance(frame, Frame):
            return frame
        _check_picture(frame)
        return Frame(frame, self._frames, time.monotonic() if timestamp_s is None else timestamp_s)

    def _drop_prior(self, reason: str) -> None:
        self.buffers.reset()
        self._tracker.reset()
        self.reset_counts[reason] += 1
        logger.info("frame %d runs without a prior: %s", self._frames, reason)

    def _header(self, turn: Turn, outputs: Mapping[str, NDArray[np.generic]], step_ms: float) -> FrameResult:
        prepared, controller = turn.prepared, self.controller
        latency_ms = prepared.preprocess_ms + (time.perf_counter() - turn.started_s) * 1e3
        budget = turn.budget if turn.reset_reason is None else None
        return FrameResult(
            frame_index=prepared.frame.index,
            timestamp_s=prepared.frame.timestamp_s,
            instances=Instances.none(prepared.frame.height, prepared.frame.width),
            kept_stages=np.array(outputs["kept_stages"][0], np.int64).reshape(self.bundle.manifest.patch_grid),
            tokens_kept=np.array(outputs["tokens_kept"][0], np.int64),
            reset_reason=turn.reset_reason,
            step_ms=step_ms,
            preprocess_ms=prepared.preprocess_ms,
            latency_ms=latency_ms,
            missed_target=None if controller is None else controller.tally(latency_ms, budget),
        )


def make_tracker(manifest: Manifest) -> ObjectTracker:
    """The tracker that a bundle asks for."""
    settings = manifest.tracker
    if isinstance(settings, TrackerSettings):
        return Tracker(settings)
    _, slots, query_dim = manifest.graph.input("prior.track_queries").shape_for(1)
    return TrackQueryTracker(settings, slots, query_dim, manifest.image_size)


def _check_picture(picture: object) -> None:
    got = type(picture).__name__
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
            return
        got = f"{picture.dtype} {list(picture.shape)}"
    raise FrameShapeError(f"a frame is uint8 [height, width, 3], RGB; got {got}. The prior is unchanged.")


def _content(image: NDArray[np.uint8], letterbox: Letterbox) -> NDArray[np.uint8]:
    """The picture without the letterbox's border."""
    top, left = letterbox.top, letterbox.left
    return image[top : top + letterbox.content_height, left : left + letterbox.content_width]


def choose_budget(
    manifest: Manifest, report: EngineReport, budget: Sequence[int] | None, keep_ratio: float | None
) -> tuple[int, ...]:
    """The budget that was asked for, checked; the default if nothing was, see :func:`default_budget`.

    Raises:
        TokenBudgetError: It does not fit the model.
    """
    rule = manifest.budget_rule
    if budget is None and keep_ratio is None:
        chosen = default_budget(manifest, report)
        if chosen != manifest.presets[manifest.default_preset]:
            logger.warning(
                "the engine was not built for the bundle's default budget, keep ratio %s; it runs at %.2f, the "
                "nearest that it was built for",
                manifest.default_preset,
                manifest.mean_share(chosen),
            )
        return chosen
    return rule.checked(budget) if budget is not None else rule.for_ratio(keep_ratio or 0.0)


def default_budget(manifest: Manifest, report: EngineReport) -> tuple[int, ...]:
    """The bundle's default preset; for an engine that was built without it, its own budget with the nearest work."""
    wanted = manifest.presets[manifest.default_preset]
    if report.budgets is None or wanted in report.budgets:
        return wanted
    share = manifest.mean_share
    return min(report.budgets, key=lambda built: abs(share(built) - share(wanted)))


def _instances(detections: Detections, masks: NDArray[np.bool_]) -> Instances:
    """Objects with a mask that is not empty in the source frame."""
    edges = [_box(mask) for mask in masks]
    seen = np.array([box is not None for box in edges], np.bool_)
    boxes = np.array([box for box in edges if box is not None], np.float32).reshape(-1, 4)
    masks = masks if seen.all() else masks[seen]  # mostly all are seen, and a copy is as much as the masks are
    return Instances(detections.track_ids[seen], detections.labels[seen], detections.scores[seen], boxes, masks)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
