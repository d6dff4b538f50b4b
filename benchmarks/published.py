"""The published network (Tiny, 960 x 544, random weights): plain PyTorch against the graph in each CPU backend.

    python -m benchmarks.published

The baseline is the straightforward formulation of ``tests/models/published_vpp.py`` at the published keep ratio 0.70.
The time of a step depends on token counts, not on values. All rows take turns; quote the ratios.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer

from benchmarks.speed import RESULTS, machine
from export.bundle_writer import ExportRequest, export_bundle
from models.pruned_host import Selection
from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.published import load_published
from runtime.backend import StreamBuffers, load_engine
from runtime.budget import reset_budget
from runtime.bundle import Bundle, load_bundle
from runtime.openvino_core import computes_in_bf16
from tests.models import published_vpp as plain
from tests.models.published_files import random_published, save_published

IMAGE_SIZE = (544, 960)
KEEP_RATIO = 0.7  # Map-SM's, as published
Key = TypeVar("Key")
PLAIN_PARTS = ("plain torch: backbone", "plain torch: head")


def plain_rows(checkpoint: Path) -> dict[str, Callable[[], object]]:
    """Backbone and head of the straightforward formulation, each frame with the prior of the one before."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    backbone, head = (plain.part(weights, f"detector.{name}.") for name in ("backbone", "panoptic_head"))
    image = torch.randn(1, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    tracks = torch.zeros(0, 256)
    carried: dict[str, Any] = {"prior": None}

    def run_backbone() -> None:
        with torch.no_grad():
            carried["maps"], _, carried["prior"] = plain.backbone(backbone, image, carried["prior"], 3, KEEP_RATIO)

    def run_head() -> None:
        with torch.no_grad():
            plain.head(head, carried["maps"], tracks, tracks, layers=6, decoder=9)

    return dict(zip(PLAIN_PARTS, (run_backbone, run_head), strict=True))


def module_row(checkpoint: Path) -> Callable[[], object]:
    """Our module in torch eager, at the budget 0.55."""
    model = load_published(checkpoint).at_image_size(IMAGE_SIZE)
    image = torch.zeros(1, *IMAGE_SIZE, 3, dtype=torch.uint8)
    count = model.patch_count
    budget = torch.tensor([int(count * share) for share in (0.70, 0.56, 0.448, 0.358)])
    with torch.no_grad():
        _, state = model(image, model.initial_state(1), torch.tensor([count, *budget.tolist()[1:]]))

    def run() -> None:
        with torch.no_grad():
            model(image, state, budget, Selection.BUDGET)

    return run


def graph_row(buffers: StreamBuffers, budget: tuple[int, ...] | None, patches: int) -> Callable[[], object]:
    """One step of the graph, with the prior carried."""
    buffers.image[:] = np.random.default_rng(0).integers(0, 256, buffers.image.shape, np.uint8)
    buffers.run(None if budget is None else reset_budget(budget, patches))
    buffers.commit()

    def run() -> None:
        buffers.run(budget)
        buffers.commit()

    return run


def graph_rows(bundle: Bundle, threads: int) -> dict[str, Callable[[], object]]:
    """The dense graph and the pruned one at the two published budgets, in each backend and precision of this CPU."""
    manifest, rows = bundle.manifest, {}
    for backend, precision in backends():
        label = backend if precision is None else f"{backend} {precision}"
        options: dict[str, Any] = {"backend": backend, "threads": threads, "precision": precision}
        engine = load_engine(bundle, **options)
        for name in ("0.40", "0.55"):
            rows[f"{label}: keep {name}"] = graph_row(
                engine.open_stream(usual_budget=manifest.presets[name]), manifest.presets[name], manifest.patch_count
            )
        if manifest.baseline is not None:
            dense = load_engine(bundle, manifest.baseline, **options)
            rows[f"{label}: dense"] = graph_row(dense.open_stream(), None, manifest.patch_count)
    return rows


def backends() -> list[tuple[str, str | None]]:
    """Backend and precision of each group of rows."""
    return [("onnxruntime", None), ("openvino", "fp32"), *([("openvino", "bf16")] if computes_in_bf16() else [])]


def measure(rows: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, list[float]]:
    """Milliseconds of every row, in turn; the first round is not counted."""
    times: dict[Key, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, row in rows.items():
            started = time.perf_counter()
            row()
            if turn:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Measured rounds.")] = 7,
    bundle: Annotated[Path | None, typer.Option(help="Bundle of an earlier run instead of a new export.")] = None,
) -> None:
    """Measure and write ``benchmarks/results/published-tiny.json``."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save_published(folder / "tiny.pth", random_published(VppRovisConfig()))
        if bundle is None:
            bundle = folder / "bundle"
            export_bundle(ExportRequest(checkpoint, bundle, model="vpp-rovis", image_size=IMAGE_SIZE), print)
        loaded = load_bundle(bundle)
        rows = {**plain_rows(checkpoint), "our module, torch": module_row(checkpoint), **graph_rows(loaded, threads)}
        times = measure(rows, rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    baseline = sum(medians[name] for name in PLAIN_PARTS)
    result = {
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "weights": "random",
        "baseline_ms": round(baseline, 1),
        "rows": {
            name: {
                "p50_ms": round(value, 1),
                "spread_ms": [round(min(times[name]), 1), round(max(times[name]), 1)],
                "speed_up": None if name in PLAIN_PARTS else round(baseline / value, 3),
            }
            for name, value in medians.items()
        },
    }
    (RESULTS / "published-tiny.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
