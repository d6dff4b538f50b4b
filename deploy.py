#!/usr/bin/env python3
"""From a trained, pruned video vision transformer to a stream on the device.

    deploy.py export   checkpoint -> bundle          (needs torch)
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
    from export.calibrated_bundle import Calibrated
    from runtime.profiler import Profile
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
        str,
        typer.Option(
            help="Video file, image folder, rtsp:// or http:// address, /dev/video0, webcam number, or a "
            "GStreamer pipeline that ends in appsink."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Annotated video to write (.mp4, .mkv).")] = None,
    results: Annotated[Path | None, typer.Option(help="YouTube-VIS results to write (.json).")] = None,
    json_lines: Annotated[Path | None, typer.Option(help="One JSON object per frame to write (.jsonl).")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Live view: a window, or a page where there is no display.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the live page on this machine.")] = 8080,
    keep_ratio: KeepRatioOption = None,
    token_budget: BudgetOption = None,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    precision: PrecisionOption = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second of an image folder; default 30.")] = None,
    live: Annotated[
        bool | None, typer.Option("--live/--recorded", help="Drop stale frames, or none; default: by the source.")
    ] = None,
    video_id: Annotated[int, typer.Option(help="video_id in --results.")] = 1,
) -> None:
    """Stream a video through a bundle, the prior carried from frame to frame."""
    from runtime.backend import load_engine
    from runtime.bundle import load_bundle
    from runtime.pipeline import run_stream
    from runtime.stream import Stream
    from runtime.video.sinks import JsonLinesSink, VideoSink, YouTubeVisSink, open_live_view
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    classes, patch_size = loaded.manifest.classes, loaded.manifest.patch_size
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    stream = Stream(loaded, engine, budget=_counts(token_budget), keep_ratio=keep_ratio)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_source(source, live=live, frame_rate=frame_rate))
        sinks: list[Sink] = []
        if output:
            sinks.append(stack.enter_context(VideoSink(output, opened.frame_rate, classes, patch_size=patch_size)))
        if results:
            sinks.append(stack.enter_context(YouTubeVisSink(results, video_id)))
        if json_lines:
            sinks.append(stack.enter_context(JsonLinesSink(json_lines, classes)))
        if show:
            sinks.append(stack.enter_context(open_live_view(classes, port=port, patch_size=patch_size)))
        progress = stack.enter_context(_progress())
        task = progress.add_task(str(engine.report), total=opened.frame_count)
        stop = stack.enter_context(_stop_on_signal())
        summary = run_stream(opened, stream, sinks, lambda result: progress.advance(task), stop)
    resets = ", ".join(f"{count} x {reason}" for reason, count in summary.resets.items())
    _say(
        f"{summary.frames} frames in {summary.wall_s:.1f} s ({summary.frames_per_second:.1f} per second, "
        f"step {summary.step_ms / max(summary.frames, 1):.1f} ms mean), {summary.tracks} objects, "
        f"without a prior: {resets or 'none'}"
    )
    if summary.source and (summary.source.frames_dropped or summary.source.reconnects or summary.source.decode_errors):
        _say(f"source: {summary.source}")
    if summary.interrupted:
        _say("interrupted; what was written is complete up to here")
    for path in (output, results, json_lines):
        if path and (summary.frames or path is not output):
            _say(f"written: {path}")
    if summary.lost is not None:
        raise summary.lost


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
