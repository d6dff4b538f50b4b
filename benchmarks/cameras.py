"""Does it pay to step cameras together? Milliseconds for a frame in batches of 1, 2 and 4, on every backend of a CPU.

    python -m benchmarks.cameras

Weights are random: the time of a step depends on the token counts, not on the values. The batches take turns step by
step, so that a machine whose speed drifts touches all of them alike; quote the ratios.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.speed import ENGINES, RESULTS, machine, random_bundle
from runtime.backend import load_engine
from runtime.bundle import Bundle, load_bundle

BATCHES = (1, 2, 4)


def measure(bundle: Bundle, backend: str, precision: str | None, threads: int, steps: int) -> dict[str, Any]:
    """Median milliseconds for a frame in each batch, with the prior carried, at the default budget."""
    engine = load_engine(bundle, backend=backend, threads=threads, precision=precision)
    budget = bundle.manifest.presets[bundle.manifest.default_preset]
    buffers = {batch: engine.open_stream(batch, budget) for batch in BATCHES}
    times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for one in buffers.values():
        one.image[:] = np.random.default_rng(0).integers(0, 256, one.image.shape, np.uint8)
    for step in range(steps + 2):
        for batch, one in buffers.items():
            started = time.perf_counter()
            one.run(budget)
            one.commit()
            if step >= 2:
                times[batch].append((time.perf_counter() - started) * 1e3 / batch)
    medians = {str(batch): round(float(np.median(values)), 2) for batch, values in times.items()}
    return {"engine": str(engine.report), "ms_per_frame": medians}


def main(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; default: vpp-eo-tiny with random weights.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps per batch.")] = 20,
) -> None:
    """Measure and write ``benchmarks/results/cameras-MODEL.json``."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_bundle(bundle) if bundle else random_bundle("vpp-eo-tiny", (544, 960), Path(folder))
        rows = [measure(loaded, backend, precision, threads, steps) for backend, precision in ENGINES]
    result = {"machine": machine(), "image_size": loaded.manifest.image_size, "weights": "random", "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cameras-{loaded.manifest.origin.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
