"""Accuracy of a bundle at every budget, by the field's own protocols, through the graph that is deployed.

    python -m models.training.evaluate BUNDLE DATA --keep-ratio 1.0 --keep-ratio 0.55 --keep-ratio 0.40

DATA is a folder in YouTube-VIS layout (``JPEGImages`` and a JSON file; average precision of tracks) or in that of
DAVIS (``JPEGImages`` and ``Annotations`` with index masks; J). Videos run as in ``deploy.py run --results``: frame by
frame, the prior carried.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.configs import unnamed_classes
from models.training.average_precision import TrackEvaluation
from models.training.davis import Davis, region_similarity
from models.training.youtube_vis import ANNOTATION_NAMES, YouTubeVis
from runtime.backend import DEFAULT_BACKEND, load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.errors import DeployError, SourceFormatError
from runtime.pipeline import run_stream
from runtime.stream import Answer, Stream
from runtime.video.output_file import OutputFile, writing
from runtime.video.sinks import YouTubeVisSink
from runtime.video.sources import ImageFolderSource

DENSE = "dense"  # the bundle's network without any selection
DEFAULT_RATIOS = (1.0, 0.55, 0.40)


@dataclass(frozen=True)
class Clip:
    """One video to run: its id in the results, and its frames in time order."""

    id: int
    folder: Path
    names: tuple[str, ...]


class DataSet(Protocol):
    """Videos and how results on them are scored.

    Attributes:
        clips: The videos.
        category_ids: Of the model's classes, for the results; None for 1, 2, 3, ...
    """

    clips: Sequence[Clip]
    category_ids: Sequence[int] | None

    def score(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Measures in percent by name."""


class YouTubeVisSet:
    """A folder in YouTube-VIS layout; one without annotations gives results for the evaluation server alone."""

    def __init__(self, folder: Path, classes: Sequence[str], limit: int | None = None) -> None:
        data = YouTubeVis(folder)
        self.name = folder.name
        if tuple(classes) not in (data.classes, unnamed_classes(len(data.classes))):
            raise SourceFormatError(
                f"the bundle knows {len(classes)} classes ({_few(classes)}), {data.annotations} has "
                f"{len(data.classes)} ({_few(data.classes)}). They have to be the same, in the order of the ids."
            )
        self.truth = json.loads(data.annotations.read_text(encoding="utf-8"))
        self.truth["videos"] = self.truth["videos"][:limit]
        kept = {video["id"] for video in self.truth["videos"]}
        annotations = self.truth.get("annotations") or []
        self.truth["annotations"] = [track for track in annotations if track["video_id"] in kept]
        self.category_ids = sorted(category["id"] for category in self.truth["categories"])
        self.clips = [Clip(video.id, data.folder / "JPEGImages", video.file_names) for video in data.videos[:limit]]

    def score(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Average precision and recall; nothing without annotations."""
        return self.evaluation(results).scores().named() if self.truth["annotations"] else {}

    def evaluation(self, results: list[dict[str, Any]]) -> TrackEvaluation:
        """For further statistics."""
        return TrackEvaluation(self.truth, results)


class DavisSet:
    """A folder in DAVIS layout; classes do not count."""

    category_ids = None

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.videos = Davis(folder).videos[:limit]
        self.clips = [Clip(number, video.folder, video.names) for number, video in enumerate(self.videos, 1)]

    def score(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """J, mean over all objects of all videos."""
        values: list[float] = []
        for number, video in enumerate(self.videos, 1):
            values += region_similarity(video, [track for track in results if track["video_id"] == number])
        return {"J": float(np.mean(values)) if values else float("nan")}


def open_data(folder: Path, classes: Sequence[str], limit: int | None = None) -> YouTubeVisSet | DavisSet:
    """The data set in a folder, by its layout.

    Args:
        classes: The model's.
        limit: Take only the first videos.

    Raises:
        SourceNotFoundError, SourceFormatError: It is in neither layout, or has other classes.
    """
    is_davis = any(folder.glob("Annotations*/")) and not any((folder / name).is_file() for name in ANNOTATION_NAMES)
    return DavisSet(folder, limit) if is_davis else YouTubeVisSet(folder, classes, limit)


@dataclass
class Row:
    """What one budget gave on a whole data set.

    Attributes:
        name: ``dense`` or ``keep 0.55``.
        results: As the YouTube-VIS evaluation server takes them.
        tokens_kept: Mean share of the patch tokens that a block computed, frames without a prior included.
        giga_macs: Of one step with a prior, 10^9; None where the bundle does not tell.
        median_ms: Time of one step in the backend.
        scores: Percent, by the name of the measure.
    """

    name: str
    results: list[dict[str, Any]]
    tokens_kept: float
    giga_macs: float | None
    median_ms: float
    scores: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """All but the results, for JSON."""
        return {
            "name": self.name,
            **{name: round(value, 2) for name, value in self.scores.items()},
            "tokens_kept": round(self.tokens_kept, 4),
            "giga_macs": self.giga_macs,
            "median_ms": round(self.median_ms, 2),
        }


def evaluate(
    bundle: Bundle,
    data: DataSet,
    keep_ratio: float | None,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int = 0,
    precision: str | None = None,
    stream_type: type[Stream] = Stream,
    on_frame: Callable[[], None] = lambda: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> Row:
    """Run all clips at one budget and score what came out.

    Args:
        keep_ratio: None runs the dense graph of the bundle.
        threads: CPU threads of one step; 0 leaves it to the library.
        precision: See :func:`runtime.backend.load_engine`.
        stream_type: What carries the prior through a clip.
        on_frame: Called after each frame, for a progress bar.
        on_answer: Called with each frame's answer, in order.

    Raises:
        DeployError: The bundle holds no dense graph, or a video cannot be read.
    """
    manifest = bundle.manifest
    if keep_ratio is None and manifest.baseline is None:
        raise DeployError(f"{bundle.folder} holds no dense graph. Export it again, without --no-baseline.")
    graph = manifest.baseline if keep_ratio is None else None
    engine = load_engine(bundle, graph, backend=backend, threads=threads, precision=precision)
    shares, step_ms, results = [], [], []

    def watch(answer: Answer) -> None:
        shares.append(manifest.mean_share(answer.header.tokens_kept))
        step_ms.append(answer.header.step_ms)
        on_frame()
        on_answer(answer)

    for clip in data.clips:
        stream = stream_type(bundle, engine, keep_ratio=keep_ratio)
        results += _run_clip(stream, clip, data.category_ids, watch)
    if keep_ratio is None:
        name, preset = DENSE, DENSE
    else:
        budget = manifest.budget_rule.for_ratio(keep_ratio)
        preset = next((preset for preset, counts in manifest.presets.items() if counts == budget), "")
        name = f"keep {keep_ratio:.2f}" if round(keep_ratio, 2) == keep_ratio else f"keep {keep_ratio}"
    macs = manifest.giga_macs.get(preset)
    median = float(np.median(step_ms)) if step_ms else float("nan")
    return Row(name, results, float(np.mean(shares)) if shares else float("nan"), macs, median, data.score(results))


def _run_clip(
    stream: Stream,
    clip: Clip,
    category_ids: Sequence[int] | None,
    watch: Callable[[Answer], None],
) -> list[dict[str, Any]]:
    """Results of one video, read back from what the sink wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        source = ImageFolderSource(clip.folder, names=clip.names)
        sink = YouTubeVisSink(path, clip.id, category_ids=category_ids)
        summary = run_stream(source, stream, [sink], watch)
        if summary.lost is not None:
            raise summary.lost
        if summary.interrupted:
            raise KeyboardInterrupt
        tracks: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return tracks


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results for the evaluation server: JSON, or with the ending .zip the archive that it takes.

    Raises:
        SinkError: The file cannot be written; nothing is left behind.
    """
    text = json.dumps(list(results))
    output = OutputFile(path)
    try:
        with writing(path):
            if path.suffix == ".zip":
                with zipfile.ZipFile(output.partial, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr("results.json", text)
            else:
                output.partial.write_text(text, encoding="utf-8")
        output.commit()
    finally:
        output.discard()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder made by deploy.py export.")],
    data: Annotated[Path, typer.Argument(help="Folder in YouTube-VIS or DAVIS layout.")],
    keep_ratio: Annotated[
        list[float], typer.Option(help="Mean share of tokens computed, in (0, 1]; may be given several times.")
    ] = list(DEFAULT_RATIOS),  # noqa: B006  # typer reads it
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Also the network without any selection.")] = True,
    results: Annotated[
        Path | None,
        typer.Option(help="Results to write, of the last keep ratio: .json, or .zip for the evaluation server."),
    ] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Run only the first videos.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the graph.")] = DEFAULT_BACKEND,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of one step; 0: one per physical core.")] = 0,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16, for openvino.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run a data set through a bundle at every budget; print accuracy, tokens, GMACs and milliseconds."""
    try:
        loaded = load_bundle(bundle)
        source = open_data(data, loaded.manifest.classes, clips)
        ratios: list[float | None] = [None] if dense and loaded.manifest.baseline is not None else []
        ratios += keep_ratio
        total = len(ratios) * sum(len(clip.names) for clip in source.clips)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        rows = []
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("frames", total=total)
            for ratio in ratios:
                rows.append(
                    evaluate(
                        loaded,
                        source,
                        ratio,
                        backend=backend,
                        threads=threads,
                        precision=precision,
                        on_frame=lambda: progress.advance(task),
                    )
                )
        if results is not None:
            write_results(results, rows[-1].results)
    except DeployError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    if as_json:
        typer.echo(json.dumps([row.summary() for row in rows], indent=2))
    else:
        _print(rows)


def _print(rows: Sequence[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False)
    measures = list(rows[0].scores) if rows else []
    for name in ("", *measures, "tokens kept", "GMACs", "p50 ms"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        macs = "" if row.giga_macs is None else f"{row.giga_macs:.2f}"
        values = [f"{row.scores[name]:.1f}" for name in measures]
        table.add_row(row.name, *values, f"{100 * row.tokens_kept:.1f} %", macs, f"{row.median_ms:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
