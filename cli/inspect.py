"""What is in a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BundleArgument
from cli.terminal import console, plain_table, say
from runtime.errors import EngineMismatchError

if TYPE_CHECKING:
    from runtime.bundle import Bundle


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
    say(f"{manifest.origin.model}, {manifest.task}, {manifest.precision}{rest}, opset {manifest.opset}")
    say(f"image {height} x {width} (height x width), {rows} x {columns} = {manifest.patch_count} patches")
    say(f"classes: {', '.join(manifest.classes)}")
    say(f"selection: {manifest.origin.selection}")
    say(f"from {manifest.origin.checkpoint}, weights {manifest.origin.weights_sha256[:16]}")
    tensors = plain_table("tensor", "dtype", "shape", "state")
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
    presets = plain_table("preset", *(f"stage {stage}" for stage in range(manifest.stages)), "share of tokens", "GMACs")
    for name, budget in sorted(manifest.presets.items()):
        mark = " (default)" if name == manifest.default_preset else ""
        macs = f"{manifest.giga_macs[name]:.2f}" if name in manifest.giga_macs else ""
        presets.add_row(name + mark, *map(str, budget), f"{manifest.mean_share(budget):.3f}", macs)
    console.print(presets)
    files = plain_table("file", "SHA-256")
    for name, digest in manifest.files.items():
        files.add_row(name, digest)
    console.print(files)
    _print_built(loaded)


def _print_built(bundle: Bundle) -> None:
    """One line for each engine in the bundle."""
    from runtime.engines import list_plans, read_record

    table = plain_table("engine", "for", "budgets")
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
