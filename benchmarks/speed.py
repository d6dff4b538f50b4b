"""What pruning is worth: vpp-eo-tiny at 960 x 544 on every backend of a CPU, against its clean dense export.

    python -m benchmarks.speed

Weights are random: the time of a step depends on the token counts, not on the values. The rows of one backend take
turns in blocks of steps, so that a machine whose speed drifts touches all of them alike; quote the ratios.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import torch
import typer
from typing_extensions import Self

from export.bundle_writer import ExportRequest, export_bundle
from models.checkpoints import save_checkpoint
from models.configs import config_by_name
from models.pruned_host import Selection
from models.vpp_eo import VppEo
from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.machine import cpu_name
from runtime.pipeline import run_stream
from runtime.profiling.profile import ProfileRequest, profile_bundle
from runtime.stream import Stream
from runtime.video.frame import Frame
from runtime.video.sources import SourceCounters

OBJECTS = 3  # that a random network shows on its first picture; more later
START_MARGIN = 0.62  # log-odds of the tracker's start score of 0.65
RESULTS = Path(__file__).parent / "results"
ENGINES = (("onnxruntime", None), ("openvino", "fp32"), ("openvino", "bf16"))


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {"cpu": cpu_name(), "cpus": os.cpu_count(), "python": platform.python_version(), "date": str(date.today())}


def random_bundle(name: str, image_size: tuple[int, int], folder: Path) -> Bundle:
    """A bundle of a named configuration with random weights, biased so that a few queries show an object."""
    torch.manual_seed(0)
    model = VppEo(config_by_name(name)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # the export may drop a sum with zeros, as biases begin
            torch.nn.init.normal_(module.bias, std=0.02)
    height, width = model.config.image_size
    picture = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    with torch.no_grad():
        outputs, _ = model(picture, model.initial_state(1), None, Selection.NONE)
        margin = outputs.class_logits[0, :, :-1].logsumexp(-1) - outputs.class_logits[0, :, -1]
        model.mask_head.classify.bias[-1] += margin.sort(descending=True).values[OBJECTS] - START_MARGIN
    checkpoint = folder / f"{name}.safetensors"
    save_checkpoint(model, checkpoint)
    export_bundle(ExportRequest(checkpoint, folder / name, image_size=image_size), print)
    return load_bundle(folder / name)


def bare_loop(bundle: Bundle, engine: Engine, steps: int) -> float:
    """Steps per second of the graph alone, at the default budget, with the prior carried."""
    budget = bundle.manifest.presets[bundle.manifest.default_preset]
    buffers = engine.open_stream(usual_budget=budget)
    buffers.image[:] = np.random.default_rng(0).integers(0, 256, buffers.image.shape, np.uint8)
    for _ in range(3):
        buffers.run(budget)
        buffers.commit()
    started = time.perf_counter()
    for _ in range(steps):
        buffers.run(budget)
        buffers.commit()
    return steps / (time.perf_counter() - started)


class DecodedClip:
    """A source of pictures as a decoder leaves them, 720p yuv420p, in memory already: a pattern that moves."""

    live, frame_rate = False, 30.0

    def __init__(self, frames: int) -> None:
        base = np.random.default_rng(0).integers(0, 256, (45, 80, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        shifted = (np.ascontiguousarray(np.roll(base, 4 * index, axis=1)) for index in range(frames))
        pictures = [av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p") for rgb in shifted]
        self.frame_count, self.counters = frames, SourceCounters()
        self._frames = iter([Frame(picture, index, index / 30.0) for index, picture in enumerate(pictures)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Nothing to give back."""


def run_loop(bundle: Bundle, engine: Engine, frames: int) -> tuple[float, float]:
    """Frames per second of ``run`` on a decoded clip, without sinks, and objects per frame."""
    objects: list[int] = []
    summary = run_stream(
        DecodedClip(frames), Stream(bundle, engine), [], lambda answer: objects.append(len(answer.detections.queries))
    )
    return summary.frames_per_second, float(np.mean(objects))


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps per row.")] = 30,
    model: Annotated[str, typer.Option(help="Configuration.")] = "vpp-eo-tiny",
    size: Annotated[tuple[int, int], typer.Option(help="Height and width, pixels.")] = (544, 960),
) -> None:
    """Measure and write ``benchmarks/results/speed-MODEL.json``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = random_bundle(model, size, folder)
        profiles = [
            _summary(profile_bundle(bundle, ProfileRequest(name, threads, precision, steps)).as_dict())
            for name, precision in ENGINES
        ]
        engine = load_engine(bundle, threads=threads)
        pairs = _loops(bundle, engine, steps)
    result = {
        "machine": machine(),
        "weights": "random",
        "profiles": profiles,
        "bare_steps_per_s": [round(bare, 3) for bare, _ in pairs],
        "run_frames_per_s": [round(run, 3) for _, (run, _) in pairs],
        "run_objects_per_frame": round(pairs[0][1][1], 2),
        "run_over_bare": round(float(np.median([run / bare for bare, (run, _) in pairs])), 4),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"speed-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _summary(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile without every single step and layer, and without the costs that the manifest states."""
    rows = [{name: row[name] for name in row if name not in ("times_ms", "at_s")} for row in profile["rows"]]
    parts = [{name: part[name] for name in ("name", "ms", "lost_ms")} for part in profile["parts"]]
    return {name: value for name, value in profile.items() if name != "layers"} | {"rows": rows, "parts": parts}


def _loops(bundle: Bundle, engine: Engine, steps: int) -> list[tuple[float, tuple[float, float]]]:
    """Bare loop and ``run`` on twice as many frames in turn, five times."""
    return [(bare_loop(bundle, engine, steps), run_loop(bundle, engine, 2 * steps)) for _ in range(5)]


if __name__ == "__main__":
    typer.run(main)
