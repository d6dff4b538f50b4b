"""Checkpoint -> bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import BudgetOption, read_counts
from cli.terminal import progress_bar, say
from runtime.errors import DeployError


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
        budget=read_counts(token_budget),
        selection=Selection.NONE if dense else Selection(selection),
        opset=opset,
        baseline=baseline,
        precision=precision,  # type: ignore[arg-type]
    )
    found: list[str] = []
    with progress_bar() as progress:
        task = progress.add_task("export", total=None)
        parity = export_bundle(request, lambda text: progress.update(task, description=text), found.append)
    for name, result in parity.items():
        say(
            f"{name}: {len(result.frames)} frames agree with torch within {result.worst:.1e}"
            + (f", {result.near_ties} near-ties" if result.near_ties else "")
        )
    for line in found:
        say(line)
    say(f"bundle written: {output}")
