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

from runtime.errors import DeployError, TokenBudgetError

if TYPE_CHECKING:
    from export.layers import LayerAgreement
    from runtime.acceptance import Trial
    from runtime.profiler import Profile
    from runtime.reference import Verification
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
    from runtime.verified import warn_unless_verified
    from runtime.video.sinks import JsonLinesSink, VideoSink, YouTubeVisSink, open_live_view
    from runtime.video.sources import open_source

    loaded = load_bundle(bundle)
    classes, patch_size = loaded.manifest.classes, loaded.manifest.patch_size
    engine = load_engine(loaded, backend=backend, threads=threads, precision=precision)
    warn_unless_verified(loaded, engine, backend, precision)
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
