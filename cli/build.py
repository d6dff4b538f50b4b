"""Bundle -> engines for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BundleArgument, read_counts, read_ratios
from cli.terminal import console, plain_table, progress_bar, say, stop_on_signal

if TYPE_CHECKING:
    from export.engine import BuiltEngine


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
    counts = [read_counts(text) or () for text in token_budget or ()]
    request = EngineRequest(
        budgets=budgets_by_name(loaded.manifest, read_ratios(budgets), counts),
        batches=batch or (1,),
        compute_capabilities=compute_capability or (),
        compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        workspace_bytes=workspace * 2**20 if workspace else None,
    )
    with progress_bar() as progress, stop_on_signal() as stop:
        task = progress.add_task("build", total=None)
        watch = Watch(
            lambda text, done, total: progress.update(task, description=text, completed=done, total=total), stop
        )
        built = build_engines(loaded, backend or installed_backend(), request, force=force, watch=watch)
    _print_engines(built)


def _print_engines(built: list[BuiltEngine]) -> None:
    for engine in built:
        record = engine.record
        table = plain_table("profile", "tokens kept", "batch")
        for profile in record.profiles:
            kept = "all, no selection" if profile.token_budget is None else " / ".join(map(str, profile.token_budget))
            table.add_row(profile.name, kept, str(profile.batch))
        console.print(table)
        done = "is up to date" if engine.reused else f"written in {record.build_s:.1f} s"
        say(f"{engine.plan} {done}: {record.plan_bytes / 2**20:.1f} MiB, {record.precision}, for {record.covered}")
        if engine.differences is None:
            say("not read back: no GPU here runs it. On the device: deploy.py build does that, then deploy.py verify")
        for difference in engine.differences or ():
            say(f"other precision than asked: {difference}")
    if any(engine.differences for engine in built):
        raise typer.Exit(1)
