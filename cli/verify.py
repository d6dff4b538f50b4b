"""Does this machine give the answers of torch?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.options import BackendOption, BundleArgument, PrecisionOption, ThreadsOption
from cli.terminal import console, plain_table, say

if TYPE_CHECKING:
    from export.layers import LayerAgreement
    from runtime.reference import Verification


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
    budgets = plain_table("budget", "tokens kept", "frames", "same tokens by stage", "lowest SNR", "")
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
    tensors = plain_table("tensor", "largest relative difference", "lowest SNR")
    for name, difference in result.worst.items():
        ratio = f"{result.sqnr_db[name]:.0f} dB" if name in result.sqnr_db else ""
        tensors.add_row(name, f"{difference:.1e}", ratio)
    console.print(tensors)
    if not result.failures:
        say(f"{result.frames} frames agree {result.limits} on {result.engine}")


def _print_layers(found: list[LayerAgreement], precision: str) -> None:
    """The first tensors that do not reach the limit of the precision; the lowest if all do."""
    from runtime.agreement import LIMITS

    limit = min(LIMITS[precision].sqnr_db, 80.0)  # fp32: 80 dB are a ten-thousandth
    below = [layer for layer in found if layer.sqnr_db < limit]
    table = plain_table("node", "type", "tensor", "SNR")
    for layer in below[:20] or sorted(found, key=lambda layer: layer.sqnr_db)[:10]:
        table.add_row(*map(escape, (layer.node, layer.op_type, layer.tensor)), f"{layer.sqnr_db:.1f} dB")
    console.print(table)
    say(
        f"{len(below)} of {len(found)} tensors are below {limit:.0f} dB"
        + (", the first of them above in the order of the graph" if below else ", the lowest above")
    )
    if any(layer.op_type == "TopK" for layer in below):
        say("a TopK ranks tokens otherwise, so the rows after it are others: look at what comes before, or use --dense")
