"""Bundle + video -> bundle in INT8 or FP8: observe a stream, choose ranges, put Q/DQ into the graphs, compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

from calib.graph_index import GraphIndex
from calib.histogram import METHODS, PERCENTILE
from calib.linear_layers import linear_layers
from calib.observation import Observation, observe
from calib.progress import Progress
from calib.samples import Deviation, Sample, reference_samples
from calib.sensitivity import layer_errors, layers_to_exclude
from calib.table import TABLE_FILE, CalibrationTable, LayerRange, read_table
from export.bundle_folder import check_replaceable, partial_folder, replace_folder
from export.lowered_bundle import Lowering, write_lowered
from runtime.bundle import Bundle, load_bundle
from runtime.errors import CalibrationError, SinkError
from runtime.manifest import FloatPrecision
from runtime.video.sources import open_source


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate.

    Attributes:
        bundle: In fp32.
        precision: Of the linear layers.
        rest: What everything else is computed in.
        sources: Videos, each run at each budget.
        budgets: Tokens kept at each stage; empty takes the bundle's default preset.
        frames: Of each video.
        method: How a range follows from what was observed, one of :data:`calib.histogram.METHODS`.
        table: A table to take instead of sources.
        sensitivity: Measure each layer alone.
        max_error: Leave out the worst layers until the error of the outputs is at most this; implies ``sensitivity``.
    """

    bundle: Path
    output: Path
    precision: Literal["int8", "fp8"]
    rest: FloatPrecision = "fp32"
    sources: tuple[str, ...] = ()
    budgets: tuple[tuple[int, ...], ...] = ()
    frames: int = 64
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    table: Path | None = None
    sensitivity: bool = False
    max_error: float | None = None
    threads: int = 0


@dataclass(frozen=True)
class Calibrated:
    """What came out.

    Attributes:
        deviation: Of the new bundle from the fp32 one, over ``samples`` frames.
    """

    table: CalibrationTable
    deviation: Deviation
    samples: int


@dataclass(frozen=True)
class Watcher:
    """Who is told how far it is.

    Attributes:
        report: Called with a line and the number of steps before each part.
        step: Called after each step of a part.
    """

    report: Callable[[str, int], None] = field(default=lambda text, steps: None)
    step: Callable[[], None] = field(default=lambda: None)


def calibrate_bundle(request: CalibrationRequest, watcher: Watcher | None = None) -> Calibrated:
    """Calibrate; the new bundle appears whole or not at all.

    A run that was stopped goes on after the last video and budget, and the last layer, that it had finished.

    Raises:
        BundleError: There is no bundle.
        CalibrationError: It is not in fp32, the table is not its own, a video is too short or breaks off, or the
            largest error cannot be met. Nothing was written.
        SourceError: A video cannot be opened.
        SinkError: The bundle cannot be written.
    """
    target = Path(os.path.realpath(request.output))
    _check_request(request, target)
    bundle = load_bundle(request.bundle)
    _check_precision(bundle)
    check_replaceable(target)
    work = _Calibration(request, bundle, Progress(target), watcher or Watcher())
    table, samples = work.table()
    table = work.with_sensitivity(table, samples)
    found = work.measure(samples)(table.ranges)
    with partial_folder(target) as folder:
        try:
            (folder / TABLE_FILE).write_text(table.model_dump_json(indent=2) + "\n", encoding="utf-8")
            write_lowered(bundle, folder, Lowering(request.rest, request.precision, table.ranges))
            replace_folder(folder, target)
        except OSError as error:
            raise SinkError(f"{request.output} cannot be written: {error}. Nothing was changed.") from error
    work.progress.clear()
    return Calibrated(table, found, len(samples))


def _check_request(request: CalibrationRequest, target: Path) -> None:
    if bool(request.sources) == (request.table is not None):
        raise CalibrationError("calibration takes videos (--source) or a table (--table), one of the two.")
    if target == Path(os.path.realpath(request.bundle)):
        raise CalibrationError(
            f"{request.output} is the fp32 bundle itself, which other calibrations need. Choose another --output."
        )
    if request.method not in METHODS:
        raise CalibrationError(f"method {request.method!r} is unknown; there are {', '.join(METHODS)}.")
    if request.precision == "fp8" and request.method == "entropy":
        raise CalibrationError(
            "method entropy weighs the even steps of int8; those of fp8 grow with the value. "
            "Take --method minmax or percentile."
        )


def _check_precision(bundle: Bundle) -> None:
    if (precision := bundle.manifest.precision) != "fp32":
        raise CalibrationError(
            f"{bundle.folder} is in {precision} already; calibration starts from fp32. Take the bundle that it was "
            "made from, or export the checkpoint again. For the rest in fp16 there is --rest fp16."
        )


class _Calibration:
    """The work on one bundle."""

    def __init__(self, request: CalibrationRequest, bundle: Bundle, progress: Progress, watcher: Watcher) -> None:
        self.request, self.bundle, self.progress, self.watcher = request, bundle, progress, watcher
        manifest = bundle.manifest
        self.spec, self.origin = manifest.graph, manifest.origin
        self.model = onnx.load(bundle.path(self.spec))
        layers = linear_layers(GraphIndex(self.model), self.spec)
        self.names = list(dict.fromkeys(layer.name for layer in layers))
        self.budgets = request.budgets or (manifest.presets[manifest.default_preset],)

    def table(self) -> tuple[CalibrationTable, list[Sample]]:
        """The table, and frames to measure on: those of the stream, or the bundle's reference clip."""
        if self.request.table is not None:
            table = read_table(self.request.table)
            table.check_fits(self.bundle, self.names)
            return table, reference_samples(self.bundle)
        seen = Observation()
        for source in self.request.sources:
            for budget in self.budgets:
                seen.merge(self._observed(source, budget))
        return self._table_of(seen), seen.samples

    def _observed(self, source: str, budget: tuple[int, ...]) -> Observation:
        made_from = {
            "graph": self.bundle.manifest.files[self.spec.file],
            "source": _fingerprint(source),
            "budget": budget,
            "frames": self.request.frames,
        }
        if (before := self.progress.observation(**made_from)) is not None:
            return before
        counts = " / ".join(map(str, budget))
        self.watcher.report(f"observe {Path(source).name}, {counts} tokens", self.request.frames)
        seen = observe(
            self.bundle, open_source(source), source, budget, self.request.frames,
            threads=self.request.threads, on_frame=self.watcher.step,
        )  # fmt: skip
        self.progress.save_observation(seen, **made_from)
        return seen

    def _table_of(self, seen: Observation) -> CalibrationTable:
        choose = METHODS[self.request.method]
        layers = {}
        for name in self.names:
            histogram = seen.histograms[name]
            limit = choose(histogram) if histogram.largest else 0.0
            cut_off = histogram.share_beyond(limit) if limit < histogram.largest else 0.0
            layers[name] = LayerRange(range=limit, largest=histogram.largest, cut_off=cut_off)
        return CalibrationTable(
            model=self.origin.model,
            weights_sha256=self.origin.weights_sha256,
            image_size=self.bundle.manifest.image_size,
            method=self.request.method,
            percentile=PERCENTILE if self.request.method == "percentile" else None,
            streams=tuple(seen.streams),
            layers=layers,
        )

    def measure(self, samples: list[Sample]) -> Callable[[Mapping[str, float]], Deviation]:
        """How far the network is from fp32 with the layers quantized that have a range."""
        request = self.request

        def measured(ranges: Mapping[str, float]) -> Deviation:
            lowering = Lowering(request.rest, request.precision, ranges)
            return lowering.deviation(self.model, self.spec, samples, request.threads)

        return measured

    def with_sensitivity(self, table: CalibrationTable, samples: list[Sample]) -> CalibrationTable:
        """The table with each layer's own error, and without the layers that cost too much."""
        request = self.request
        if not request.sensitivity and request.max_error is None:
            return table
        table = table.excluding(set())
        ranges, measure = table.ranges, self.measure(samples)
        made_from: dict[str, Any] = {
            "graph": self.bundle.manifest.files[self.spec.file],
            "ranges": ranges,
            "streams": [stream.model_dump(mode="json") for stream in table.streams],
            "into": [request.precision, request.rest],
        }
        known = self.progress.errors(**made_from)
        self.watcher.report("quantize one layer at a time", len(ranges) - len(known))

        def keep(errors: dict[str, float]) -> None:
            self.progress.save_errors(errors, **made_from)
            self.watcher.step()

        errors = layer_errors(measure, ranges, known, keep)
        table = table.with_errors(errors)
        if request.max_error is None:
            return table
        self.watcher.report(f"leave out layers until the error is {request.max_error}", 0)
        return table.excluding(layers_to_exclude(measure, ranges, errors, request.max_error))


def _fingerprint(source: str) -> list[Any]:
    """What tells a file from another one under its name."""
    path = Path(source)
    if not path.exists():
        return [source]
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
