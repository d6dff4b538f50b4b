"""The plot of what :mod:`benchmarks.accuracy` measured: AP over the time of a frame, and over the tokens kept.

    python -m benchmarks.accuracy_plot docs/accuracy.svg benchmarks/results/accuracy.json [MORE.json ...]

Times are shares of the dense network's in the same run, so that runs on different machines fit into one plot.
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
    output: Annotated[Path, typer.Argument(help="Picture to write: .svg, .png, .pdf.")],
    measured: Annotated[
        list[Path], typer.Argument(help="JSON of benchmarks.accuracy; of equal rows the first counts.")
    ],
) -> None:
    """Draw both panels, one line for each network."""
    results: list[dict[str, Any]] = [json.loads(path.read_text()) for path in measured]
    found = {(row["network"], row["keep_ratio"]): row for result in reversed(results) for row in result["rows"]}
    if any("speed_up" not in row for row in found.values()):
        raise typer.BadParameter("there are rows without times. Run benchmarks.accuracy again, without --steps 0.")
    rows = [row | {"time": 1.0 / row["speed_up"]} for row in found.values()]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    dense = next(row for row in rows if row["keep_ratio"] is None)
    for panel, field, label, factor in (
        (panels[0], "time", "time of a frame (%, median, of the dense network's in the same run)", 100.0),
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
    clips = results[0]["data"]["clips"]
    figure.suptitle(f"{clips} held-out generated clips, {results[0]['engine']}", fontsize=10)
    figure.savefig(output)


if __name__ == "__main__":
    typer.run(main)
