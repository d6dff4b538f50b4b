"""What ``deploy.py run`` costs around the model: its start, its memory, its frame rate, and 20,000 frames.

    python -m benchmarks.run

``vpp-eo-tiny`` at 544 x 960 with random weights, on a 720p H.264 file made for the purpose. Start and memory are those
of the command itself, in processes of their own; frame rates are of one process in which frames and bare steps take
turns. The 20,000 frames are of 180 x 320 pixels and go through ``vpp-eo-micro`` at 96 x 160 with all file sinks:
it is the pipeline that might grow, not the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import psutil
import typer

from benchmarks.speed import RESULTS, DecodedClip, bare_loop, machine, random_bundle
from benchmarks.taking_turns import BLOCK, TakingTurns
from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.memory import peak_memory_mib
from runtime.pipeline import run_stream
from runtime.stream import Answer, Stream
from runtime.video.frame import Frame
from runtime.video.sinks import JsonLinesSink, Sink, VideoSink, YouTubeVisSink
from runtime.video.sources import open_source

ROOT = Path(__file__).parents[1]
SINKS = ("out.mp4", "out.json", "out.jsonl")
LOAD = (
    "import sys, time; from pathlib import Path; started = time.perf_counter();"
    "import runtime.pipeline, runtime.stream, runtime.video.sources, runtime.video.sinks;"
    "from runtime.backend import load_engine; from runtime.bundle import load_bundle;"
    "load_bundle(Path(sys.argv[1])); print(time.perf_counter() - started)"
)


def write_clip(path: Path, frames: int) -> Path:
    """The moving pattern of :mod:`benchmarks.speed` as a 720p H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 30, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
        for frame in DecodedClip(frames):
            frame.picture.pts = frame.index
            container.mux(stream.encode(frame.picture))
        container.mux(stream.encode(None))
    return path


def command(bundle: Path, clip: Path, folder: Path, threads: int, sinks: Sequence[str]) -> list[str]:
    """``deploy.py run`` on a clip."""
    options = dict(zip(SINKS, ("--output", "--results", "--json-lines"), strict=True))
    outputs = [part for name in sinks for part in (options[name], str(folder / name))]
    return [sys.executable, str(ROOT / "deploy.py"), "run", str(bundle), "--source", str(clip),
            "--threads", str(threads), *outputs]  # fmt: skip


def import_and_load_s(bundle: Path) -> float:
    """Seconds for importing the runtime and reading and checking a bundle, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(bundle)], cwd=ROOT, capture_output=True, text=True)
    return float(done.stdout)


def first_frame_s(bundle: Path, clip: Path, folder: Path, threads: int) -> float:
    """Seconds from starting the command to the first frame's line in the JSON Lines file; ends the run then."""
    started = time.perf_counter()
    process = subprocess.Popen(command(bundle, clip, folder, threads, SINKS[2:]), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any(part.stat().st_size for part in folder.glob(".*.jsonl")):
        if process.poll() is not None:
            raise RuntimeError(f"run ended with {process.returncode} before its first frame")
        time.sleep(0.002)
    took = time.perf_counter() - started
    process.terminate()
    process.wait()
    return took


def peak_of_run_mib(bundle: Path, clip: Path, folder: Path, threads: int) -> float:
    """Highest resident memory of the command on the whole clip, with all file sinks."""
    process = subprocess.Popen(command(bundle, clip, folder, threads, SINKS), cwd=ROOT, stdout=subprocess.DEVNULL)
    highest = 0.0
    while process.poll() is None:
        highest = peak_memory_mib(process.pid) or highest  # None once it has ended
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"run ended with status {process.returncode}")
    return highest


def file_sinks(folder: Path, classes: Sequence[str]) -> list[Sink]:
    """One sink of each kind that makes a file."""
    video, tracks, lines = (folder / name for name in SINKS)
    return [VideoSink(video, 30.0, classes), YouTubeVisSink(tracks, 1), JsonLinesSink(lines, classes)]


def frame_rates(bundle: Bundle, engine: Engine, clip: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Frame rate of a run on the file over that of bare steps: in blocks that take turns; with all sinks as a whole."""
    ratios: list[float] = []
    bare_ms: list[float] = []
    with_sinks: list[float] = []
    for _ in range(rounds):
        turns = TakingTurns(engine)
        run_stream(open_source(clip), Stream(bundle, turns), [])
        ratios += turns.ratios()
        bare_ms += turns.bare_ms
        summary = run_stream(open_source(clip), Stream(bundle, engine), file_sinks(folder, bundle.manifest.classes))
        bare = np.mean([1e3 / turns.bare_ms[-1], bare_loop(bundle, engine, BLOCK)])
        with_sinks.append(summary.frames_per_second / float(bare))
    return {
        "bare_step_ms": round(float(np.median(bare_ms)), 1),
        "blocks": len(ratios),
        "run_over_bare_median": round(float(np.median(ratios)), 4),
        "run_over_bare_quartiles": [round(float(value), 4) for value in np.percentile(ratios, [25, 75])],
        "run_over_bare": [round(ratio, 3) for ratio in ratios],
        "run_with_sinks_over_bare_median": round(float(np.median(with_sinks)), 4),
        "run_with_sinks_over_bare": [round(ratio, 3) for ratio in with_sinks],
    }


def endurance(path: Path, frames: int, folder: Path) -> dict[str, Any]:
    """Resident memory during a long run of a bundle with all file sinks: the highest of each twentieth of it."""
    bundle, memory = load_bundle(path), []

    def watch(answer: Answer) -> None:
        memory.append(psutil.Process().memory_info().rss / 2**20)

    engine = load_engine(bundle, threads=1)
    summary = run_stream(Repeated(frames), Stream(bundle, engine), file_sinks(folder, bundle.manifest.classes), watch)
    part = max(1, frames // 20)
    return {
        "model": bundle.manifest.origin.model,
        "image_size": bundle.manifest.image_size,
        "frames": summary.frames,
        "frames_per_s": round(summary.frames_per_second, 1),
        "resets": dict(summary.resets),
        "memory_mib_highest_of_each_twentieth": [
            round(max(memory[start : start + part]), 1) for start in range(0, len(memory), part)
        ],
    }


class Repeated(DecodedClip):
    """The moving pattern at 180 x 320, to and fro, on and on."""

    def __init__(self, frames: int) -> None:
        super().__init__(24)
        there = [frame.picture.reformat(width=320, height=180) for frame in self._frames]
        pictures = islice(cycle(there + there[-2:0:-1]), frames)
        self.frame_count = frames
        self._frames = (Frame(picture, index, index / 30.0) for index, picture in enumerate(pictures))


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
    clip_frames: Annotated[int, typer.Option(min=3 * BLOCK, help="Frames of the clip.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, of which the median counts.")] = 5,
    endurance_frames: Annotated[int, typer.Option(min=20, help="Frames of the long run.")] = 20_000,
    bundle: Annotated[Path | None, typer.Option(help="Bundle; default: vpp-eo-tiny with random weights.")] = None,
) -> None:
    """Measure and write ``benchmarks/results/run-MODEL.json``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = load_bundle(bundle) if bundle else random_bundle("vpp-eo-tiny", (544, 960), folder)
        clip = write_clip(folder / "clip.mp4", clip_frames)
        path = loaded.folder
        loads = [import_and_load_s(path) for _ in range(rounds)]
        firsts = [first_frame_s(path, clip, folder, threads) for _ in range(rounds)]
        peak = peak_of_run_mib(path, clip, folder, threads)
        rates = {
            f"{count} threads": frame_rates(loaded, load_engine(loaded, threads=count), clip, folder, rounds)
            for count in sorted({1, threads})  # with one, a core is left for decoding and sinks
        }
        micro = random_bundle("vpp-eo-micro", (96, 160), folder).folder
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:  # the heap of this one has holes by now
            long = alone.submit(endurance, micro, endurance_frames, folder).result()
    result = {
        "machine": machine(),
        "model": loaded.manifest.origin.model,
        "image_size": loaded.manifest.image_size,
        "weights": "random",
        "threads": threads,
        "clip": f"{clip_frames} frames, 720p H.264",
        "import_and_load_bundle_s": round(float(np.median(loads)), 3),
        "first_frame_s": round(float(np.median(firsts)), 3),
        "peak_memory_mib_with_all_sinks": round(peak, 1),
        "frames_per_s": rates,
        "endurance": long,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"run-{result['model']}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
