"""Bundle and videos -> objects and files."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from cli.options import (
    BackendOption,
    BudgetOption,
    BundleArgument,
    KeepRatioOption,
    PrecisionOption,
    ThreadsOption,
    read_counts,
)
from cli.terminal import progress_bar, say, stop_on_signal
from runtime.errors import TokenBudgetError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from runtime.budget_controller import TargetCount
    from runtime.manifest import Manifest
    from runtime.pipeline import RunSummary
    from runtime.stream import Answer
    from runtime.video.sinks import Sink


def run(
    bundle: BundleArgument,
    source: Annotated[
        list[str],
        typer.Option(
            help="Video file, image folder, rtsp:// or http:// address, /dev/video0, webcam number, or a "
            "GStreamer pipeline that ends in appsink. Give it once for each camera: all run on one engine, and none "
            "waits for another."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Annotated video to write (.mp4, .mkv). With several sources out.mp4 becomes out-0.mp4, out-1.mp4, "
            "... in the order given; so for the two below."
        ),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="YouTube-VIS results to write (.json).")] = None,
    json_lines: Annotated[Path | None, typer.Option(help="One JSON object per frame to write (.jsonl).")] = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Live view: a window, or a page where there is no display or several sources."),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the live page on this machine; one more for each source.")
    ] = 8080,
    keep_ratio: KeepRatioOption = None,
    token_budget: BudgetOption = None,
    latency_target_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds that 95 of 100 frames have to meet, from picture to objects. The token budget then "
            "follows the machine, between --min-keep-ratio and --keep-ratio (here the largest; default 1)."
        ),
    ] = None,
    min_keep_ratio: Annotated[
        float | None,
        typer.Option(help="Keep ratio that --latency-target-ms does not go below, above 0, up to 1. Default: 0.4."),
    ] = None,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    precision: PrecisionOption = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second of an image folder; default 30.")] = None,
    live: Annotated[
        bool | None, typer.Option("--live/--recorded", help="Drop stale frames, or none; default: by the source.")
    ] = None,
    video_id: Annotated[int, typer.Option(help="video_id in --results; one more for each source.")] = 1,
) -> None:
    """Stream a video, or several at once, through a bundle, the prior carried from frame to frame."""
    from runtime.backend import load_engine
    from runtime.budget_controller import controller_for
    from runtime.bundle import load_bundle
    from runtime.pipeline import Camera, run_cameras
    from runtime.stream import Stream
    from runtime.verified import warn_unless_verified
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    _check_target(latency_target_ms, min_keep_ratio, token_budget)
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    warn_unless_verified(loaded, engine, backend, precision)
    if latency_target_ms is None:
        controller, choice = None, {"budget": read_counts(token_budget), "keep_ratio": keep_ratio}
    else:
        controller = controller_for(loaded.manifest, engine.report, latency_target_ms, min_keep_ratio, keep_ratio)
        choice = {"controller": controller}
    several, cameras, written = len(source) > 1, [], []
    with contextlib.ExitStack() as stack:
        progress = progress_bar()
        for number, spec in enumerate(source):
            opened = stack.enter_context(open_source(spec, live=live, frame_rate=frame_rate, patient=several))
            paths = [_numbered(path, number if several else None) for path in (output, results, json_lines)]
            page = (port + number if port else 0) if show else None
            sinks = _open_sinks(stack, paths, opened.frame_rate, loaded.manifest, video_id + number, page, not several)
            name = f"camera {number}" if several else ""
            task = progress.add_task(name or str(engine.report), total=opened.frame_count)
            advance = functools.partial(_advance, progress, task)
            cameras.append(Camera(opened, Stream(loaded, engine, **choice), sinks, advance, name))
            written.append(paths)
        stack.enter_context(progress)
        summaries = run_cameras(cameras, stack.enter_context(stop_on_signal()))
    for camera, summary, paths in zip(cameras, summaries, written, strict=True):
        _print_summary(camera.name, summary, paths)
    if controller is not None:
        _print_target(controller.count, loaded.manifest)
    for summary in summaries:
        if (error := summary.failed or summary.lost) is not None:
            raise error


def _check_target(target_ms: float | None, min_keep_ratio: float | None, token_budget: str | None) -> None:
    """The options of a latency target, as far as they can be told apart without a bundle."""
    if target_ms is not None and token_budget is not None:
        raise TokenBudgetError("--latency-target-ms chooses the token budget itself. Leave --token-budget out.")
    if target_ms is None and min_keep_ratio is not None:
        raise TokenBudgetError("--min-keep-ratio limits --latency-target-ms. Give that too, or --keep-ratio alone.")


def _numbered(path: Path | None, number: int | None) -> Path | None:
    return path if path is None or number is None else path.with_stem(f"{path.stem}-{number}")


def _open_sinks(
    stack: contextlib.ExitStack,
    paths: list[Path | None],
    frame_rate: float | None,
    manifest: Manifest,
    video_id: int,
    page: int | None,
    windows: bool,
) -> list[Sink]:
    """One camera's sinks; ``page`` is the port of its live view, None for no view."""
    from runtime.video.result_sinks import JsonLinesSink, YouTubeVisSink
    from runtime.video.video_sink import VideoSink

    classes, patch_size = manifest.classes, manifest.patch_size
    output, results, json_lines = paths
    sinks: list[Sink] = []
    if output:
        sinks.append(stack.enter_context(VideoSink(output, frame_rate, classes, patch_size=patch_size)))
    if results:
        sinks.append(stack.enter_context(YouTubeVisSink(results, video_id)))
    if json_lines:
        sinks.append(stack.enter_context(JsonLinesSink(json_lines, classes)))
    if page is not None:
        from runtime.video.live_view import open_live_view

        view = open_live_view(classes, port=page, patch_size=patch_size, windows=windows)
        sinks.append(stack.enter_context(view))
    return sinks


def _advance(progress: Progress, task: TaskID, answer: Answer) -> None:
    progress.advance(task)


def _print_summary(name: str, summary: RunSummary, paths: list[Path | None]) -> None:
    prefix = f"{name}: " if name else ""
    resets = ", ".join(f"{count} x {reason}" for reason, count in summary.resets.items())
    say(
        f"{prefix}{summary.frames} frames in {summary.wall_s:.1f} s ({summary.frames_per_second:.1f} per second, "
        f"step {summary.step_ms / max(summary.frames, 1):.1f} ms mean), {summary.tracks} objects, "
        f"without a prior: {resets or 'none'}"
    )
    if summary.source and (summary.source.frames_dropped or summary.source.reconnects or summary.source.decode_errors):
        say(f"{prefix}source: {summary.source}")
    if summary.interrupted:
        say(f"{prefix}interrupted; what was written is complete up to here")
    for index, path in enumerate(paths):
        if path and summary.failed is None and (summary.frames or index):  # an empty video is not written
            say(f"{prefix}written: {path}")


def _print_target(count: TargetCount, manifest: Manifest) -> None:
    used = ", ".join(
        f"{manifest.mean_share(budget):.0%} on {frames} frames" for budget, frames in sorted(count.budgets.items())
    )
    say(
        f"latency target {count.target_ms:g} ms: met by {count.met:.1%} of {count.frames} frames, "
        f"{count.missed} missed ({count.missed_without_prior} of them without a prior); "
        f"tokens computed: {used or 'none'}; {count.changes} changes"
    )
