"""Does a stream run on without growing? Whole videos through a bundle, with all sinks, twice.

    python -m benchmarks.endurance BUNDLE VIDEO...

Writes frames in and out, whether both runs gave the same result, resets, and the highest resident memory before and
after frame 100.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import av
import psutil
import typer

from benchmarks.speed import RESULTS, machine
from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.pipeline import run_stream
from runtime.stream import Answer, Stream
from runtime.video.sinks import JsonLinesSink, VideoSink, YouTubeVisSink
from runtime.video.sources import open_source


@dataclass
class Watch:
    """Hash of all results and memory in MiB after each frame."""

    digest: Any = field(default_factory=hashlib.sha256)
    memory_mib: list[float] = field(default_factory=list)

    def __call__(self, answer: Answer) -> None:
        """Take one answer."""
        result = answer.result()
        objects = result.instances
        for array in (result.kept_stages, objects.track_ids, objects.labels, objects.scores, objects.masks):
            self.digest.update(array.tobytes())
        self.memory_mib.append(psutil.Process().memory_info().rss / 2**20)


def stream_once(bundle: Bundle, engine: Engine, video: Path, folder: Path) -> dict[str, Any]:
    """Run one video to its end with all file sinks."""
    watch, manifest = Watch(), bundle.manifest
    with open_source(video) as source:
        sinks = [
            VideoSink(folder / "out.mp4", source.frame_rate, manifest.classes),
            YouTubeVisSink(folder / "out.json", 1),
            JsonLinesSink(folder / "out.jsonl", manifest.classes),
        ]
        summary = run_stream(source, Stream(bundle, engine), sinks, watch)
    with av.open(str(folder / "out.mp4")) as container:
        frames_out = sum(1 for _ in container.decode(video=0))
    settled, later = watch.memory_mib[50:101], watch.memory_mib[101:]  # frames in flight make both rise and fall
    return {
        "video": video.name,
        "frames_in": summary.source.frames_read if summary.source else None,
        "frames_out": frames_out,
        "resets": dict(summary.resets),
        "sha256": watch.digest.hexdigest(),
        "memory_mib_largest_of_frames_50_to_100": round(max(settled, default=0.0), 1),
        "memory_mib_largest_after_100": round(max(later, default=0.0), 1),
        "memory_mib_at_end": round(watch.memory_mib[-1], 1),
        "frames_per_s": round(summary.frames_per_second, 2),
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder made by deploy.py export.")],
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
) -> None:
    """Stream every video twice and write ``benchmarks/results/endurance.json``."""
    loaded = load_bundle(bundle)
    engine = load_engine(loaded, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = [stream_once(loaded, engine, video, Path(folder)) for video in videos for _ in range(2)]
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        first["same_result_twice"] = second["same_result_twice"] = first["sha256"] == second["sha256"]
    manifest = loaded.manifest
    result = {
        "machine": machine(),
        "model": manifest.origin.model,
        "image_size": manifest.image_size,
        "token_budget": manifest.presets[manifest.default_preset],
        "engine": str(engine.report),
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "endurance.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
