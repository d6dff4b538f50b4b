"""The plot of what :mod:`benchmarks.accuracy` measured: AP over milliseconds, and over the tokens kept.

python -m benchmarks.accuracy_plot benchmarks/results/accuracy.json docs/accuracy.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("agg")  # no display is needed
import matplotlib.pyplot as plt


def main(
    measured: Annotated[Path, typer.Argument(help="JSON of benchmarks.accuracy.")],
    output: Annotated[Path, typer.Argument(help="Picture to write: .svg, .png, .pdf.")],
) -> None:
    """Draw both panels, one line for each network."""
    result: dict[str, Any] = json.loads(measured.read_text())
    rows = result["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    dense = next(row for row in rows if row["keep_ratio"] is None)
    for panel, field, label, factor in (
        (panels[0], "median_ms", "milliseconds per frame (median)", 1.0),
        (panels[1], "tokens_kept", "patch tokens computed (%, mean over blocks and frames)", 100.0),
    ):
        for number, name in enumerate(dict.fromkeys(row["network"] for row in rows if row is not dense)):
            points = sorted((row[field] * factor, row["AP"]) for row in rows if row["network"] == name)
            style = "--" if "reuse" in name else "-"
            panel.plot(*zip(*points, strict=True), style, marker="o", color=f"C{number}", label=name)
        panel.plot(dense[field] * factor, dense["AP"], "k*", markersize=12, label="dense")
        panel.axhline(dense["AP"], color="grey", linewidth=0.6)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("AP, YouTube-VIS protocol")
    panels[1].legend(fontsize=8)
    clips = result["data"]["clips"]
    figure.suptitle(f"{clips} held-out generated clips, {result['engine']}", fontsize=10)
    figure.savefig(output)


if __name__ == "__main__":
    typer.run(main)
