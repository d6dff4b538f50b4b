"""What is installed, and what it can do here."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.terminal import console, progress_bar, say

if TYPE_CHECKING:
    from runtime.acceptance import Trial

PROGRAM = Path(__file__).parents[1] / "deploy.py"  # each trial is a run of it


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

    with progress_bar() as progress:
        task = progress.add_task("try every backend", total=None)

        def told(trial: Trial) -> None:
            progress.advance(task)
            _print_trial(trial)

        report = run_acceptance(bundles, output, [sys.executable, str(PROGRAM)], steps=steps, on_trial=told)
    say(f"written: {output}")
    if not report.passed:
        raise typer.Exit(1)


def _print_trial(trial: Trial) -> None:
    colour = {"passed": "green", "not here": "yellow", "differs": "red", "failed": "red"}[trial.state]
    name = " ".join([trial.bundle, trial.backend, trial.precision or ""]).strip()
    console.print(f"[{colour}]{trial.state:8}[/] [b]{escape(name)}[/b] {escape(trial.reason)}", soft_wrap=True)
    measured = trial.profile.result if trial.profile else None
    for row in measured.get("rows", []) if isinstance(measured, dict) else []:
        speed_up = f", {row['speed_up']:.2f}x" if row["speed_up"] else ""
        say(f"         {row['name']}: p50 {row['p50_ms']:.1f} ms{speed_up}")
