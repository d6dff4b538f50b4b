"""Does the token budget hold a latency target on this machine, also when a load starts in the middle?

    python -m benchmarks.controller

The target lies halfway between the 95th percentiles of the keep ratios 0.4 and 0.7, measured first, in turns. After
half of the frames a process starts that keeps one core busy for a part of the time. What the smallest budget takes
under that load is measured too: a target that even this misses cannot be held. Then the same for a target out of reach.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.speed import RESULTS, DecodedClip, machine, random_bundle
from runtime.backend import Engine, load_engine
from runtime.budget_controller import BudgetController, controller_for, percentile_95
from runtime.bundle import Bundle, load_bundle
from runtime.stream import Stream
from runtime.video.frame import Frame

LOW, HIGH = 0.4, 0.7
SETTLING = 50  # frames that a controller may learn from before it is judged
PERIOD_S = 0.02  # of the load
TOGETHER = 20  # frames whose median is written
ROW = ("latency_ms", "share")


def busy(share: float) -> None:
    """Use one core for a share of the time, for ever."""
    while True:
        end = time.perf_counter() + share * PERIOD_S
        while time.perf_counter() < end:
            pass
        time.sleep((1 - share) * PERIOD_S)


@contextmanager
def load_of(share: float) -> Iterator[None]:
    """A competing process, for as long as the context lasts."""
    process = multiprocessing.get_context("spawn").Process(target=busy, args=(share,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def endless_frames() -> Iterator[Frame]:
    """A pattern that moves to and fro, on a clock of 30 frames per second."""
    there = [frame.picture for frame in DecodedClip(24)]
    for index, picture in enumerate(cycle(there + there[-2:0:-1])):
        yield Frame(picture, index, index / 30)


def p95s(bundle: Bundle, engine: Engine, ratios: tuple[float, ...], frames: int) -> list[float]:
    """95th percentile of the latency at each keep ratio, milliseconds; the streams take turns."""
    streams = [Stream(bundle, engine, keep_ratio=ratio) for ratio in ratios]
    latencies: list[list[float]] = [[] for _ in ratios]
    source = endless_frames()
    for index in range(frames + 5):
        frame = next(source)
        for stream, values in zip(streams, latencies, strict=True):
            result = stream.step(frame)
            if index >= 5:
                values.append(result.latency_ms)
    return [percentile_95(values) for values in latencies]


def follow(stream: Stream, source: Iterator[Frame], frames: int) -> list[dict[str, Any]]:
    """Latency, share of tokens and whether the target was met, of each frame."""
    share = stream.bundle.manifest.mean_share
    results = (stream.step(next(source)) for _ in range(frames))
    return [
        {"latency_ms": round(result.latency_ms, 1), "share": round(share(result.tokens_kept), 3),
         "met": not result.missed_target}
        for result in results
    ]  # fmt: skip


def hold(controller: BudgetController, bundle: Bundle, engine: Engine, frames: int, load: float) -> dict[str, Any]:
    """Follow a target for half of the frames alone, and for the other half against a load."""
    source = endless_frames()
    with Stream(bundle, engine, controller=controller) as stream:
        alone = follow(stream, source, frames // 2)
        with load_of(load):
            (smallest_ms,) = p95s(bundle, engine, (LOW,), 40)
            against = follow(stream, source, frames - frames // 2)
    judged = [row["met"] for row in alone[SETTLING:] + against]
    return {
        "target_ms": round(controller.count.target_ms, 1),
        "met_after_50": round(float(np.mean(judged)), 4),
        "met_alone_after_50": round(float(np.mean([row["met"] for row in alone[SETTLING:]])), 4),
        "met_against_load": round(float(np.mean([row["met"] for row in against])), 4),
        "p95_of_0.4_against_load_ms": round(smallest_ms, 1),
        "changes": controller.count.changes,
        "median_share_alone": float(np.median([row["share"] for row in alone[SETTLING:]])),
        "median_share_against_load": float(np.median([row["share"] for row in against])),
        f"medians_of_{TOGETHER}_frames": medians(alone + against),
    }


def medians(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Latency and share over time."""
    blocks = [rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER)]
    return {name: [round(float(np.median([row[name] for row in block])), 3) for block in blocks] for name in ROW}


def out_of_reach(controller: BudgetController, bundle: Bundle, engine: Engine, frames: int) -> dict[str, Any]:
    """Follow a target that cannot be met, and note when that is said."""
    said: list[int] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(controller.count.frames)  # type: ignore[method-assign]
    logging.getLogger("runtime.budget_controller").addHandler(handler)
    with Stream(bundle, engine, controller=controller) as stream:
        rows = follow(stream, endless_frames(), frames)
    return {"target_ms": round(controller.count.target_ms, 1), "said_at_frame": said, "share_at_end": rows[-1]["share"]}


def main(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; default: vpp-eo-tiny with random weights.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the graph.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
    frames: Annotated[int, typer.Option(min=200, help="Frames with a target within reach.")] = 600,
    load: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of one core that the load takes.")] = 0.25,
) -> None:
    """Measure and write ``benchmarks/results/controller-MODEL-load-LOAD.json``."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_bundle(bundle) if bundle else random_bundle("vpp-eo-tiny", (544, 960), Path(folder))
        engine = load_engine(loaded, backend=backend, threads=threads)
    manifest = loaded.manifest
    low_ms, high_ms = p95s(loaded, engine, (LOW, HIGH), 60)
    targets = (low_ms + high_ms) / 2, low_ms / 2
    within, beyond = (controller_for(manifest, engine.report, target) for target in targets)
    result = {
        "machine": machine(),
        "model": manifest.origin.model,
        "engine": str(engine.report),
        "load_share_of_one_core": load,
        "p95_ms": {str(LOW): round(low_ms, 1), str(HIGH): round(high_ms, 1)},
        "within_reach": hold(within, loaded, engine, frames, load),
        "out_of_reach": out_of_reach(beyond, loaded, engine, 150),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"controller-{manifest.origin.model}-load-{load:g}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
