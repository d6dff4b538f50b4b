"""Streams through the network, each with its prior carried, and what its linear layers saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calib.histogram import Histogram
from calib.observed_engine import ObservedEngine
from calib.samples import Sample, sample_of
from calib.table import ObservedStream
from runtime.bundle import Bundle
from runtime.errors import CalibrationError, SourceError
from runtime.stream import Stream
from runtime.video.sources import Source

FEWEST_FRAMES = 8  # one without a prior and seven with
SAMPLES_PER_STREAM = 8  # kept for comparisons, evenly over the frames

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass
class Observation:
    """What one or several streams showed.

    Attributes:
        histograms: Absolute values of what goes into each linear layer, by its name.
        streams: The streams.
        samples: Some of their frames.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    streams: list[ObservedStream] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def merge(self, other: Observation) -> None:
        """Add what other streams showed."""
        for name, histogram in other.histograms.items():
            self.histograms.setdefault(name, Histogram()).merge(histogram)
        self.streams += other.streams
        self.samples += other.samples


class Observer:
    """Counts what an :class:`calib.observed_engine.ObservedEngine` shows."""

    def __init__(self, frames: int) -> None:
        self.seen = Observation()
        self._steps = 0
        self._sampled = {round(index) for index in np.linspace(0, frames - 1, min(frames, SAMPLES_PER_STREAM))}
        self.engine: ObservedEngine | None = None

    def __call__(self, feeds: Arrays, outputs: Arrays, tensors: Arrays) -> None:
        """Take in one step."""
        assert self.engine is not None
        for layer in self.engine.layers:
            try:
                self.seen.histograms.setdefault(layer.name, Histogram()).add(tensors[layer.input])
            except ValueError as error:
                raise CalibrationError(
                    f"frame {self._steps}: {error} at the input of {layer.name}. No table was written. "
                    "Verify the bundle first: deploy.py verify"
                ) from error
        if self._steps in self._sampled:
            self.seen.samples.append(sample_of(feeds, outputs))
        self._steps += 1


def observe(
    bundle: Bundle,
    source: Source,
    name: str,
    budget: tuple[int, ...],
    frames: int,
    *,
    threads: int = 0,
    on_frame: Callable[[], None] = lambda: None,
) -> Observation:
    """Run the first frames of a source as ``deploy.py run`` would, in fp32 on the CPU.

    Args:
        source: Open; closed by this function.
        name: What the table calls it.
        budget: Tokens kept at each stage.
        frames: How many to run.

    Raises:
        CalibrationError: The source has fewer frames, breaks off or cannot be read; or no frame had a prior.
    """
    if frames < FEWEST_FRAMES:
        raise CalibrationError(
            f"{frames} frames are too few for a stream with its prior: at least {FEWEST_FRAMES}, usual are 64 to 512."
        )
    observer = Observer(frames)
    observer.engine = ObservedEngine(bundle, observer, threads)
    done = 0
    with source, Stream(bundle, observer.engine, budget=budget) as stream:
        try:
            for frame in source:
                stream.step(frame)
                done += 1
                on_frame()
                if done == frames:
                    break
        except SourceError as error:
            raise CalibrationError(
                f"{name} gave {done} of {frames} frames, then: {error} No table was written."
            ) from error
        without_prior = sum(stream.reset_counts.values())
    if done < frames:
        raise CalibrationError(
            f"{name} has only {done} of {frames} frames. No table was written. "
            + (f"Take --frames {done}, or a longer video." if done >= FEWEST_FRAMES else "Take a longer video.")
        )
    if without_prior == done:
        raise CalibrationError(
            f"{name}: all {done} frames ran without a prior ({', '.join(stream.reset_counts)}), so its ranges are not "
            "those of a stream. No table was written. Take a video without a cut at every frame."
        )
    seen = observer.seen
    seen.streams.append(ObservedStream(source=name, token_budget=budget, frames=done, without_prior=without_prior))
    return seen
