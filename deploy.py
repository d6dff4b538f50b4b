#!/usr/bin/env python3
"""From a trained, pruned video vision transformer to a stream on the device.

    deploy.py export   checkpoint -> bundle          (needs torch)
    deploy.py build    bundle -> engines for a GPU   (TensorRT, TensorRT-RTX)
    deploy.py run      bundle + video -> objects, overlay video
    deploy.py calibrate  bundle + video -> bundle in INT8 or FP8
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
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime.errors import DeployError, EngineMismatchError, TokenBudgetError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from export.calibrated_bundle import Calibrated
    from export.engine import BuiltEngine
    from export.layers import LayerAgreement
    from runtime.acceptance import Trial
    from runtime.budget_controller import TargetCount
    from runtime.bundle import Bundle
    from runtime.manifest import Manifest
    from runtime.pipeline import RunSummary
    from runtime.reference import Verification
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
    typer.Option(
        help="What the backend computes in where it can choose: fp32, bf16 (openvino), tf32 (onnxruntime-cuda). "
        "Default: as the graph."
    ),
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
    precision: Annotated[
        str,
        typer.Option(
            help="What the graph computes in: fp32, fp16 or bf16. The last two are for GPUs; what decides "
            "which tokens are kept stays fp32. For int8 and fp8: calibrate."
        ),
    ] = "fp32",
) -> None:
    """Turn a checkpoint into a bundle: ONNX graph, manifest, reference vectors; checked against torch."""
    try:
        from export.bundle_writer import ExportRequest, export_bundle
        from models.pruned_host import Selection
    except ImportError as error:
        raise DeployError(f"export needs {error.name}. Install it: pip install '.[export]'") from error
    if selection not in ("budget", "threshold"):
        raise DeployError(f"--selection is {selection!r}, allowed are budget and threshold.")
    if precision not in ("fp32", "fp16", "bf16"):
        raise DeployError(
            f"--precision is {precision!r}, export takes fp32, fp16 and bf16. "
            "For int8 and fp8 export in fp32, then: deploy.py calibrate BUNDLE --source VIDEO --precision int8"
        )
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
        precision=precision,  # type: ignore[arg-type]
    )
    found: list[str] = []
    with _progress() as progress:
        task = progress.add_task("export", total=None)
        parity = export_bundle(request, lambda text: progress.update(task, description=text), found.append)
    for name, result in parity.items():
        _say(
            f"{name}: {len(result.frames)} frames agree with torch within {result.worst:.1e}"
            + (f", {result.near_ties} near-ties" if result.near_ties else "")
        )
    for line in found:
        _say(line)
    _say(f"bundle written: {output}")


@app.command(epilog="Example: deploy.py build nano --backend tensorrt-rtx --compute-capability sm89 --budgets 0.4,0.55")
def build(
    bundle: BundleArgument,
    backend: Annotated[
        str | None,
        typer.Option(
            help="tensorrt (Jetson, data centre; builds for the GPU it runs on) or tensorrt-rtx (RTX cards; builds "
            "without a GPU). Default: the first of these that is installed."
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU generation to build for, e.g. sm89; again for more. Default: tensorrt: the GPU here; "
                     "tensorrt-rtx: all from sm80 on."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Keep ratios that the engine runs, with commas. Default: the bundle's presets.")
    ] = None,
    token_budget: Annotated[
        list[str] | None, typer.Option(help="Or token counts, as for [b]run[/b]; again for more.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Streams stepped together; again for more. Default: 1.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Most scratch memory of one layer, MiB. Default: the library's own limit.")
    ] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="Other GPUs that may run it, at a cost in speed: none, same-compute-capability or "
                          "ampere-plus (tensorrt only).")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later minor versions run it too (tensorrt only).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even if nothing has changed.")] = False,
) -> None:  # fmt: skip
    """Build engines for GPUs into the bundle: one profile for each token budget, checked before it starts."""
    from export.engine import build_engines
    from export.engine_plan import Watch
    from export.engine_request import EngineRequest, budgets_by_name
    from runtime.bundle import load_bundle
    from runtime.tensorrt_library import installed_backend

    loaded = load_bundle(bundle)
    counts = [_counts(text) or () for text in token_budget or ()]
    request = EngineRequest(
        budgets=budgets_by_name(loaded.manifest, _ratios(budgets), counts),
        batches=batch or (1,),
        compute_capabilities=compute_capability or (),
        compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        workspace_bytes=workspace * 2**20 if workspace else None,
    )
    with _progress() as progress, _stop_on_signal() as stop:
        task = progress.add_task("build", total=None)
        watch = Watch(
            lambda text, done, total: progress.update(task, description=text, completed=done, total=total), stop
        )
        built = build_engines(loaded, backend or installed_backend(), request, force=force, watch=watch)
    _print_engines(built)


def _print_engines(built: list[BuiltEngine]) -> None:
    for engine in built:
        record = engine.record
        table = _table("profile", "tokens kept", "batch")
        for profile in record.profiles:
            kept = "all, no selection" if profile.token_budget is None else " / ".join(map(str, profile.token_budget))
            table.add_row(profile.name, kept, str(profile.batch))
        console.print(table)
        done = "is up to date" if engine.reused else f"written in {record.build_s:.1f} s"
        _say(f"{engine.plan} {done}: {record.plan_bytes / 2**20:.1f} MiB, {record.precision}, for {record.covered}")
        if engine.differences is None:
            _say("not read back: no GPU here runs it. On the device: deploy.py build does that, then deploy.py verify")
        for difference in engine.differences or ():
            _say(f"other precision than asked: {difference}")
    if any(engine.differences for engine in built):
        raise typer.Exit(1)


@app.command(epilog="Example: deploy.py calibrate nano --source street.mp4 --precision int8")
def calibrate(
    bundle: BundleArgument,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Video to calibrate on, of what the device will see; may be given several times."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the linear layers: int8, or fp8 (GPUs of sm89 and later).")
    ] = "int8",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: BUNDLE-int8 or BUNDLE-fp8.")
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(
            help="What everything else is computed in: fp32, fp16 or bf16. Default: fp32 for int8 (CPUs; take "
            "fp16 for GPUs), fp16 for fp8."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="How a range follows from the values: minmax, percentile (99.99) or entropy (int8 alone)."),
    ] = "minmax",
    frames: Annotated[
        int, typer.Option(min=8, help="Frames of each video, from its start, with the prior carried.")
    ] = 64,
    keep_ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Budget to calibrate at, in (0, 1]; may be given several times. Default: the bundle's preset."
        ),
    ] = None,
    token_budget: BudgetOption = None,
    table: Annotated[
        Path | None, typer.Option(help="A calibration.json of the same network, instead of --source.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer costs, quantized alone.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Leave out the worst layers until the outputs' error (RMS, over that of the output) "
            "is at most this, e.g. 0.05.",
        ),
    ] = None,
    threads: ThreadsOption = 0,
) -> None:
    """Quantize the linear layers of an fp32 bundle, with ranges observed on a stream; writes another bundle."""
    try:
        from export.calibrated_bundle import CalibrationRequest, Watcher, calibrate_bundle
    except ImportError as error:
        raise DeployError(f"calibrate needs {error.name}. Install it: pip install '.[export]'") from error
    from runtime.bundle import load_bundle

    if precision not in ("int8", "fp8"):
        raise DeployError(f"--precision is {precision!r}, calibrate takes int8 and fp8. For fp16 and bf16: export.")
    rest = rest or ("fp16" if precision == "fp8" else "fp32")
    if rest not in ("fp32", "fp16", "bf16"):
        raise DeployError(f"--rest is {rest!r}, allowed are fp32, fp16 and bf16.")
    rule = load_bundle(bundle).manifest.budget_rule
    budgets = [rule.for_ratio(ratio) for ratio in keep_ratio or ()]
    if (counts := _counts(token_budget)) is not None:
        budgets.append(rule.checked(counts))
    request = CalibrationRequest(
        bundle=bundle,
        output=output or bundle.resolve().with_name(f"{bundle.resolve().name}-{precision}"),
        precision=precision,  # type: ignore[arg-type]
        rest=rest,  # type: ignore[arg-type]
        sources=tuple(source or ()),
        budgets=tuple(budgets),
        frames=frames,
        method=method,  # type: ignore[arg-type]
        table=table,
        sensitivity=sensitivity,
        max_error=max_error,
        threads=threads,
    )
    with _progress() as progress:
        task = progress.add_task("calibrate", total=None)
        watcher = Watcher(
            report=lambda text, steps: progress.reset(task, description=text, total=steps or None),
            step=lambda: progress.advance(task),
        )
        result = calibrate_bundle(request, watcher)
    _print_calibration(result)
    _say(f"bundle written: {request.output}")


def _print_calibration(result: Calibrated) -> None:
    layers = result.table.layers
    if any(layer.error is not None for layer in layers.values()):
        table = _table("layer, worst first", "error alone", "range", "largest seen", "")
        for name, layer in sorted(layers.items(), key=lambda item: -(item[1].error or 0.0)):
            error = "" if layer.error is None else f"{100 * layer.error:.2f} %"
            note = "not quantized" if layer.excluded else ""
            table.add_row(name, error, f"{layer.range:.3g}", f"{layer.largest:.3g}", note)
        console.print(table)
    _say(f"{len(result.table.ranges)} of {len(layers)} linear layers quantized")
    _say(f"against fp32, {result.samples} frames each from the state of fp32: {result.deviation}")


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
    from runtime.verified import warn_unless_verified
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    _check_target(latency_target_ms, min_keep_ratio, token_budget)
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    warn_unless_verified(loaded, engine, backend, precision)
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
    tolerance: Annotated[
        float | None,
        typer.Option(help="Only for fp32: largest difference of a tensor over its largest value. Default: 1e-4."),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Instead: every tensor against ONNX Runtime without optimisations, to find where "
                     "values part (needs polygraphy)."),
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="With --layers: the dense graph, in which no TopK changes rows about.")
    ] = False,
    frame: Annotated[int, typer.Option(min=0, help="With --layers: frame of the clip; 0 has no prior.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:  # fmt: skip
    """Run the bundle's reference clip here and compare with what torch gave; exit code 1 if it differs."""
    from runtime.agreement import coarsest
    from runtime.backend import load_engine
    from runtime.bundle import load_bundle
    from runtime.reference import compare_engine
    from runtime.verified import note_verified

    loaded = load_bundle(bundle)
    if layers:
        from export.layers import compare_layers

        found = compare_layers(loaded, backend, precision=precision, threads=threads, frame=frame, dense=dense)
        _print_layers(found, coarsest(loaded.manifest.precision, precision or "fp32"))
        return
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    result = compare_engine(loaded, engine, tolerance)
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
    else:
        _print_verification(result)
    result.check()
    if tolerance is None:  # a tolerance of one's own says nothing to others who run this bundle
        note_verified(loaded, engine, result.sqnr_db)


def _print_verification(result: Verification) -> None:
    budgets = _table("budget", "tokens kept", "frames", "same tokens by stage", "lowest SNR", "")
    for name, budget in result.budgets.items():
        tokens = " / ".join(map(str, budget.token_budget))
        if not budget.frames:
            budgets.add_row(name, tokens, "0", "", "", escape(budget.not_built) or "near-ties in all frames")
            continue
        overlap = " / ".join(f"{share:.1%}" for share in budget.overlap.values()) or "all kept"
        notes = f"{budget.skipped} with near-ties not compared" if budget.skipped else ""
        lowest = f"{min(budget.sqnr_db.values()):.0f} dB"
        budgets.add_row(name, tokens, str(budget.frames), overlap, lowest, notes)
    console.print(budgets)
    tensors = _table("tensor", "largest relative difference", "lowest SNR")
    for name, difference in result.worst.items():
        ratio = f"{result.sqnr_db[name]:.0f} dB" if name in result.sqnr_db else ""
        tensors.add_row(name, f"{difference:.1e}", ratio)
    console.print(tensors)
    if not result.failures:
        _say(f"{result.frames} frames agree {result.limits} on {result.engine}")


def _print_layers(found: list[LayerAgreement], precision: str) -> None:
    """The first tensors that do not reach the limit of the precision; the lowest if all do."""
    from runtime.agreement import LIMITS

    limit = min(LIMITS[precision].sqnr_db, 80.0)  # fp32: 80 dB are a ten-thousandth
    below = [layer for layer in found if layer.sqnr_db < limit]
    table = _table("node", "type", "tensor", "SNR")
    for layer in below[:20] or sorted(found, key=lambda layer: layer.sqnr_db)[:10]:
        table.add_row(*map(escape, (layer.node, layer.op_type, layer.tensor)), f"{layer.sqnr_db:.1f} dB")
    console.print(table)
    _say(
        f"{len(below)} of {len(found)} tensors are below {limit:.0f} dB"
        + (", the first of them above in the order of the graph" if below else ", the lowest above")
    )
    if any(layer.op_type == "TopK" for layer in below):
        _say(
            "a TopK ranks tokens otherwise, so the rows after it are others: look at what comes before, or use --dense"
        )


@app.command(epilog="Example: deploy.py inspect nano")
def inspect(
    bundle: BundleArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Show what a bundle is: inputs, outputs, state, presets, origin, hashes."""
    from runtime.bundle import load_bundle

    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    if as_json:
        console.print_json(manifest.model_dump_json())
        return
    height, width = manifest.image_size
    rows, columns = manifest.patch_grid
    rest = "" if manifest.rest_precision in ("fp32", manifest.precision) else f" and {manifest.rest_precision}"
    _say(f"{manifest.origin.model}, {manifest.task}, {manifest.precision}{rest}, opset {manifest.opset}")
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
    _print_built(loaded)


def _print_built(bundle: Bundle) -> None:
    """One line for each engine in the bundle."""
    from runtime.engines import list_plans, read_record

    table = _table("engine", "for", "budgets")
    for plan in list_plans(bundle):
        try:
            record = read_record(plan)
        except EngineMismatchError as error:
            table.add_row(plan.name, "", str(error))
            continue
        names = "; ".join(dict.fromkeys(profile.name for profile in record.profiles))
        table.add_row(plan.name, record.covered, names)
    if table.row_count:
        console.print(table)


@app.command(epilog="Example: deploy.py profile nano --threads 2 --report report.html")
def profile(
    bundle: BundleArgument,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    precision: PrecisionOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps per row.")] = 30,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="Steps per row before that. Default: until the times are stable.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures of one step; give it again for more rows. Default: 1.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also time each layer, in a run of its own, by part.")
    ] = True,
    source: Annotated[
        str | None, typer.Option(help="Video for the stages of the pipeline; default: a 720p picture in memory.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Page with plots to write (.html), complete in one file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure every preset against the dense network: latency, stages of the pipeline, parts of the network."""
    from runtime.bundle import load_bundle
    from runtime.profiling.profile import ProfileRequest, profile_bundle, total_steps
    from runtime.profiling.report import report_file
    from runtime.profiling.tables import tables
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    request = ProfileRequest(
        backend=backend, threads=threads, precision=precision, steps=steps, warm_up=warm_up,
        batches=tuple(dict.fromkeys(batch or [1])), layers=layers,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        write_report = stack.enter_context(report_file(report)) if report is not None else None
        frames = iter(stack.enter_context(open_source(source))) if source else None
        progress = stack.enter_context(_progress())
        task = progress.add_task("measure", total=total_steps(loaded, request))
        result = profile_bundle(loaded, request, frames, on_step=lambda: progress.advance(task))
        if write_report is not None:
            write_report(result)
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
        return
    _say(f"{result.engine}, {result.image_size[0]} x {result.image_size[1]}; {result.machine}")
    for found in tables(result):
        _say(f"\n{found.title}")
        _print_rows(found.columns, found.rows)
        if found.note:
            _say(found.note)
    _say("\n" + "\n".join(result.mode))
    if report is not None:
        _say(f"written: {report}")


def _print_rows(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> None:
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@app.command(epilog="Example: deploy.py doctor --acceptance nano")
def doctor(
    acceptance: Annotated[
        list[Path] | None,
        typer.Option(
            help="Bundle to build, verify and profile with every backend that is here, into one file to send "
            "back. May be given again, for the same network in another precision."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File of --acceptance (.json). Default: acceptance-DATE-TIME.json here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps per row of --acceptance.")] = 30,
) -> None:
    """Say what is installed, what each backend can really do on this machine, and what to install."""
    from runtime.doctor import examine

    if acceptance:
        _accept(acceptance, output or Path(f"acceptance-{datetime.now():%Y%m%d-%H%M%S}.json"), steps)
        return
    for finding in examine():
        colour = {"ok": "green", "missing": "yellow", "problem": "red"}[finding.state]
        console.print(f"[{colour}]{finding.state:8}[/] [b]{finding.what}[/b]: {escape(finding.detail)}", soft_wrap=True)


def _accept(bundles: list[Path], output: Path, steps: int) -> None:
    """Run the trials, saying of each how it ended; exit code 1 if one differed or failed, or none could run."""
    from runtime.acceptance import run_acceptance

    with _progress() as progress:
        task = progress.add_task("try every backend", total=None)

        def told(trial: Trial) -> None:
            progress.advance(task)
            _print_trial(trial)

        report = run_acceptance(bundles, output, [sys.executable, __file__], steps=steps, on_trial=told)
    _say(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)


def _print_trial(trial: Trial) -> None:
    colour = {"passed": "green", "not here": "yellow", "differs": "red", "failed": "red"}[trial.state]
    name = " ".join([trial.bundle, trial.backend, trial.precision or ""]).strip()
    console.print(f"[{colour}]{trial.state:8}[/] [b]{escape(name)}[/b] {escape(trial.reason)}", soft_wrap=True)
    measured = trial.profile.result if trial.profile else None
    for row in measured.get("rows", []) if isinstance(measured, dict) else []:
        speed_up = f", {row['speed_up']:.2f}x" if row["speed_up"] else ""
        _say(f"         {row['name']}: p50 {row['p50_ms']:.1f} ms{speed_up}")


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


def _ratios(text: str | None) -> tuple[float, ...]:
    """Keep ratios written with commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise TokenBudgetError(
            f"budgets {text!r}: keep ratios with commas, each in (0, 1], e.g. 0.4,0.55,1.0."
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
