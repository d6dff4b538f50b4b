"""How many milliseconds, and where they go."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from cli.options import BackendOption, BundleArgument, PrecisionOption, ThreadsOption
from cli.terminal import console, print_rows, progress_bar, say


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
        progress = stack.enter_context(progress_bar())
        task = progress.add_task("measure", total=total_steps(loaded, request))
        result = profile_bundle(loaded, request, frames, on_step=lambda: progress.advance(task))
        if write_report is not None:
            write_report(result)
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
        return
    say(f"{result.engine}, {result.image_size[0]} x {result.image_size[1]}; {result.machine}")
    for found in tables(result):
        say(f"\n{found.title}")
        print_rows(found.columns, found.rows)
        if found.note:
            say(found.note)
    say("\n" + "\n".join(result.mode))
    if report is not None:
        say(f"written: {report}")
