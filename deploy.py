#!/usr/bin/env python3
"""From a trained, pruned video vision transformer to a stream on the device.

    deploy.py export     checkpoint -> bundle             (needs torch)
    deploy.py calibrate  bundle + video -> bundle in INT8 or FP8
    deploy.py build      bundle -> engines for a GPU      (TensorRT, TensorRT-RTX)
    deploy.py run        bundle + video -> objects, overlay video
    deploy.py verify     does this machine give the answers of torch?
    deploy.py profile    how many milliseconds, against the dense network
    deploy.py inspect    what is in a bundle
    deploy.py doctor     what is installed, and what it can do here

Results go to stdout, the log to stderr. Exit code 0: done; 1: found different; 2: cannot be done as asked.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.logging import RichHandler

from cli.build import build
from cli.calibrate import calibrate
from cli.doctor import doctor
from cli.export import export
from cli.inspect import inspect
from cli.profile import profile
from cli.run import run
from cli.terminal import log_console
from cli.verify import verify
from runtime.errors import DeployError

EXAMPLES = {
    export: "export nano.safetensors -o nano --image-size 288 512 --keep-ratio 0.55",
    calibrate: "calibrate nano --source street.mp4 --precision int8",
    build: "build nano --backend tensorrt-rtx --compute-capability sm89 --budgets 0.4,0.55",
    run: "run nano --source street.mp4 --output out.mp4 --results out.json",
    verify: "verify nano",
    profile: "profile nano --threads 2 --report report.html",
    inspect: "inspect nano",
    doctor: "doctor --acceptance nano",
}

app = typer.Typer(
    help="Export, verify, stream and profile pruned video vision transformers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: deploy.py {example}")(command)


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to stderr.")] = False) -> None:
    handler = RichHandler(console=log_console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


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
