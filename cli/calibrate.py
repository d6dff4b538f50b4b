"""Bundle and video -> bundle in INT8 or FP8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BudgetOption, BundleArgument, ThreadsOption, read_counts
from cli.terminal import console, plain_table, progress_bar, say
from runtime.errors import DeployError

if TYPE_CHECKING:
    from export.calibrated_bundle import Calibrated


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
    if (counts := read_counts(token_budget)) is not None:
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
    with progress_bar() as progress:
        task = progress.add_task("calibrate", total=None)
        watcher = Watcher(
            report=lambda text, steps: progress.reset(task, description=text, total=steps or None),
            step=lambda: progress.advance(task),
        )
        result = calibrate_bundle(request, watcher)
    _print_calibration(result)
    say(f"bundle written: {request.output}")


def _print_calibration(result: Calibrated) -> None:
    layers = result.table.layers
    if any(layer.error is not None for layer in layers.values()):
        table = plain_table("layer, worst first", "error alone", "range", "largest seen", "")
        for name, layer in sorted(layers.items(), key=lambda item: -(item[1].error or 0.0)):
            error = "" if layer.error is None else f"{100 * layer.error:.2f} %"
            note = "not quantized" if layer.excluded else ""
            table.add_row(name, error, f"{layer.range:.3g}", f"{layer.largest:.3g}", note)
        console.print(table)
    say(f"{len(result.table.ranges)} of {len(layers)} linear layers quantized")
    say(f"against fp32, {result.samples} frames each from the state of fp32: {result.deviation}")
