#!/usr/bin/env python3
"""From a trained, pruned video vision transformer to a stream on the device.

    deploy.py export   checkpoint -> bundle          (needs torch)
    deploy.py run      bundle + video -> objects, overlay video
    deploy.py verify   does this machine give the answers of torch?
    deploy.py profile  how many milliseconds, against the dense network
    deploy.py inspect  what is in a bundle
    deploy.py doctor   what is installed, and what it can do here

Results go to stdout, the log to stderr. Exit code 0: done; 1: found different; 2: cannot be done as asked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime.errors import DeployError, TokenBudgetError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from runtime.budget_controller import TargetCount
    from runtime.manifest import Manifest
    from runtime.pipeline import RunSummary
    from runtime.profiler import Profile
    from runtime.results import FrameResult
    from runtime.video.sinks import Sink

app = typer.Typer(
    help="Export, verify, stream and profile pruned video vision transformers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe or a file wants whole lines
log_console = Console(stderr=True)

BundleArgument = Annotated[Path, typer.Argument(help="Folder made by [b]export[/b].")]
BackendOption = Annotated[
    str, typer.Option(help="What runs the graph; [b]doctor[/b] lists what is there. It never falls back to another.")
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads of one step; 0: one per physical core.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(help="What the backend computes in where it can choose: fp32 or bf16 (openvino). Default: fp32."),
]
KeepRatioOption = Annotated[
    float | None,
    typer.Option(help="Mean share of patch tokens computed, over all blocks: above 0, up to 1 (dense). "
                 "Default: the bundle's preset."),
]  # fmt: skip
BudgetOption = Annotated[
    str | None,
    typer.Option(help="Tokens kept at each stage instead of --keep-ratio: counts with commas, each 1 to N and none "
                 "larger than the one before, e.g. 1428,1142,913,730."),
]  # fmt: skip


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to stderr.")] = False) -> None:
    handler = RichHandler(console=log_console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


@app.command(epilog="Example: deploy.py export nano.safetensors -o nano --image-size 288 512 --keep-ratio 0.55")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="safetensors, or a torch file; nothing in it is executed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; an older bundle there is replaced.")],
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width in pixels, multiples of 16 (vpp-rovis: 32). Default: as trained."),
    ] = None,
    keep_ratio: Annotated[
        float, typer.Option(help="Default preset: mean share of patch tokens computed, above 0, up to 1.")
    ] = 0.55,
    token_budget: BudgetOption = None,
    selection: Annotated[
        str, typer.Option(help="budget: K from an input at every stage; threshold: counts from the data, as published.")
    ] = "budget",
    dense: Annotated[bool, typer.Option("--dense", help="Without any selection: the baseline on its own.")] = False,
    baseline: Annotated[bool, typer.Option(help="Put the dense network into the bundle too, for profile.")] = True,
    model: Annotated[
        str | None,
        typer.Option(
            help="Configuration, for a checkpoint that does not name its own, e.g. vpp-eo-tiny; vpp-rovis for a "
            "released checkpoint of the published network."
        ),
    ] = None,
    opset: Annotated[int, typer.Option(min=18, max=22, help="ONNX operator set, 18 to 22.")] = 20,
) -> None:
    """Turn a checkpoint into a bundle: ONNX graph, manifest, reference vectors; checked against torch."""
    try:
        from export.bundle_writer import ExportRequest, export_bundle
        from models.pruned_host import Selection
    except ImportError as error:
        raise DeployError(f"export needs {error.name}. Install it: pip install '.[export]'") from error
    if selection not in ("budget", "threshold"):
        raise DeployError(f"--selection is {selection!r}, allowed are budget and threshold.")
    request = ExportRequest(
        checkpoint=checkpoint,
        output=output,
        model=model,
        image_size=image_size,
        keep_ratio=keep_ratio,
        budget=_counts(token_budget),
        selection=Selection.NONE if dense else Selection(selection),
        opset=opset,
        baseline=baseline,
    )
    with _progress() as progress:
        task = progress.add_task("export", total=None)
        parity = export_bundle(request, lambda text: progress.update(task, description=text))
    for name, result in parity.items():
        _say(
            f"{name}: {len(result.frames)} frames agree with torch within {result.worst:.1e}"
            + (f", {result.near_ties} near-ties" if result.near_ties else "")
        )
    _say(f"bundle written: {output}")


@app.command(epilog="Example: deploy.py run nano --source street.mp4 --output out.mp4 --results out.json")
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
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    _check_target(latency_target_ms, min_keep_ratio, token_budget)
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    if latency_target_ms is None:
        controller, choice = None, {"budget": _counts(token_budget), "keep_ratio": keep_ratio}
    else:
        controller = controller_for(loaded.manifest, engine.report, latency_target_ms, min_keep_ratio, keep_ratio)
        choice = {"controller": controller}
    several, cameras, written = len(source) > 1, [], []
    with contextlib.ExitStack() as stack:
        progress = _progress()
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
        summaries = run_cameras(cameras, stack.enter_context(_stop_on_signal()))
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


def _advance(progress: Progress, task: TaskID, result: FrameResult) -> None:
    progress.advance(task)


def _print_summary(name: str, summary: RunSummary, paths: list[Path | None]) -> None:
    prefix = f"{name}: " if name else ""
    resets = ", ".join(f"{count} x {reason}" for reason, count in summary.resets.items())
    _say(
        f"{prefix}{summary.frames} frames in {summary.wall_s:.1f} s ({summary.frames_per_second:.1f} per second, "
        f"step {summary.step_ms / max(summary.frames, 1):.1f} ms mean), {summary.tracks} objects, "
        f"without a prior: {resets or 'none'}"
    )
    if summary.source and (summary.source.frames_dropped or summary.source.reconnects or summary.source.decode_errors):
        _say(f"{prefix}source: {summary.source}")
    if summary.interrupted:
        _say(f"{prefix}interrupted; what was written is complete up to here")
    for index, path in enumerate(paths):
        if path and summary.failed is None and (summary.frames or index):  # an empty video is not written
            _say(f"{prefix}written: {path}")


def _print_target(count: TargetCount, manifest: Manifest) -> None:
    used = ", ".join(
        f"{manifest.mean_share(budget):.0%} on {frames} frames" for budget, frames in sorted(count.budgets.items())
    )
    _say(
        f"latency target {count.target_ms:g} ms: met by {count.met:.1%} of {count.frames} frames, "
        f"{count.missed} missed ({count.missed_without_prior} of them without a prior); "
        f"tokens computed: {used or 'none'}; {count.changes} changes"
    )


@app.command(epilog="Example: deploy.py verify nano")
def verify(
    bundle: BundleArgument,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    precision: PrecisionOption = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a tensor over its largest value.")] = 1e-4,
) -> None:
    """Run the bundle's reference clip here and compare with what torch gave; exit code 1 if it differs."""
    from runtime.backend import load_engine
    from runtime.bundle import load_bundle
    from runtime.reference import verify_engine

    loaded = load_bundle(bundle)
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    result = verify_engine(loaded, engine, tolerance)
    table = _table("tensor", "largest relative difference")
    for name, difference in result.worst.items():
        table.add_row(name, f"{difference:.1e}")
    console.print(table)
    _say(
        f"{len(result.frames)} frames agree within {tolerance:.0e} on {engine.report}"
        + (f"; {result.skipped} frames with {result.near_ties} near-ties were not compared" if result.skipped else "")
    )


@app.command(epilog="Example: deploy.py inspect nano")
def inspect(
    bundle: BundleArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Show what a bundle is: inputs, outputs, state, presets, origin, hashes."""
    from runtime.bundle import load_bundle

    manifest = load_bundle(bundle).manifest
    if as_json:
        console.print_json(manifest.model_dump_json())
        return
    height, width = manifest.image_size
    rows, columns = manifest.patch_grid
    _say(f"{manifest.origin.model}, {manifest.task}, {manifest.precision}, opset {manifest.opset}")
    _say(f"image {height} x {width} (height x width), {rows} x {columns} = {manifest.patch_count} patches")
    _say(f"classes: {', '.join(manifest.classes)}")
    _say(f"selection: {manifest.origin.selection}")
    _say(f"from {manifest.origin.checkpoint}, weights {manifest.origin.weights_sha256[:16]}")
    tensors = _table("tensor", "dtype", "shape", "state")
    partner = {
        pair.input: f"from {pair.output}" if pair.update == "graph" else "written by the tracker"
        for pair in manifest.graph.state
    }
    partner |= {pair.output: f"to {pair.input}" for pair in manifest.graph.state if pair.output}
    for kind, specs in (("in", manifest.graph.inputs), ("out", manifest.graph.outputs)):
        for spec in specs:
            shape = " x ".join(map(str, spec.shape))
            tensors.add_row(f"{kind}  {spec.name}", spec.dtype, shape, partner.get(spec.name, ""))
    console.print(tensors)
    presets = _table("preset", *(f"stage {stage}" for stage in range(manifest.stages)), "share of tokens", "GMACs")
    for name, budget in sorted(manifest.presets.items()):
        mark = " (default)" if name == manifest.default_preset else ""
        macs = f"{manifest.giga_macs[name]:.2f}" if name in manifest.giga_macs else ""
        presets.add_row(name + mark, *map(str, budget), f"{manifest.mean_share(budget):.3f}", macs)
    console.print(presets)
    files = _table("file", "SHA-256")
    for name, digest in manifest.files.items():
        files.add_row(name, digest)
    console.print(files)


@app.command(epilog="Example: deploy.py profile nano --threads 2 --json")
def profile(
    bundle: BundleArgument,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    precision: PrecisionOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps per row.")] = 30,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps per row before that.")] = 5,
    source: Annotated[
        str | None, typer.Option(help="Video for the parts of the pipeline; default: a 720p picture in memory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure the step at every preset against the dense network, and the parts of the pipeline."""
    from runtime.bundle import load_bundle
    from runtime.profiler import profile_bundle, total_steps
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    with contextlib.ExitStack() as stack:
        frames = iter(stack.enter_context(open_source(source))) if source else None
        progress = stack.enter_context(_progress())
        task = progress.add_task("measure", total=total_steps(loaded, steps, warm_up))
        result = profile_bundle(
            loaded, backend=backend, threads=threads, precision=precision, steps=steps, warm_up=warm_up, frames=frames,
            on_step=lambda: progress.advance(task),
        )  # fmt: skip
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
    else:
        _print_profile(result)


def _print_profile(result: Profile) -> None:
    _say(f"{result.engine}, {result.image_size[0]} x {result.image_size[1]}, {result.steps} steps a row")
    table = _table("", "tokens kept", "p50 ms", "p90 ms", "p99 ms", "speed-up")
    for row in result.rows:
        tokens = "all, no selection" if row.token_budget is None else " / ".join(map(str, row.token_budget))
        speed_up = "" if row.speed_up is None else f"{row.speed_up:.2f}x"
        table.add_row(row.name, tokens, f"{row.p50_ms:.1f}", f"{row.p90_ms:.1f}", f"{row.p99_ms:.1f}", speed_up)
    console.print(table)
    parts = ", ".join(f"{name} {value:.1f} ms" for name, value in result.stages_ms.items())
    _say(f"pipeline at the default budget, median: {parts}")


@app.command(epilog="Example: deploy.py doctor")
def doctor() -> None:
    """Say what is installed, what each backend can really do on this machine, and what to install."""
    from runtime.doctor import examine

    for finding in examine():
        colour = {"ok": "green", "missing": "yellow", "problem": "red"}[finding.state]
        console.print(f"[{colour}]{finding.state:8}[/] [b]{finding.what}[/b]: {escape(finding.detail)}", soft_wrap=True)


def _counts(text: str | None) -> tuple[int, ...] | None:
    """Token counts written with commas."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise TokenBudgetError(
            f"token budget {text!r}: every count is an integer, separated by commas, e.g. 1428,1142,913,730."
        ) from error


def _say(text: str) -> None:
    """Print one line as it is: a path or a class name may hold brackets, and a pipe wants no line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=log_console, transient=True)


def _table(*columns: str):  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a run ends between two frames and its files are finished."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line; errors that a user can mend are one message and an exit code."""
    try:
        app()
    except DeployError as error:
        log_console.print(
            f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
