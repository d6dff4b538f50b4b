"""Arguments and options that several commands take, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.errors import TokenBudgetError

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
                 "larger than the one before, e.g. 1424,1136,912,718."),
]  # fmt: skip


def read_counts(text: str | None) -> tuple[int, ...] | None:
    """Token counts written with commas."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise TokenBudgetError(
            f"token budget {text!r}: every count is an integer, separated by commas, e.g. 1424,1136,912,718."
        ) from error


def read_ratios(text: str | None) -> tuple[float, ...]:
    """Keep ratios written with commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise TokenBudgetError(
            f"budgets {text!r}: keep ratios with commas, each in (0, 1], e.g. 0.4,0.55,1.0."
        ) from error
