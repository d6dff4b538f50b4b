"""What every selector keeps of the accuracy, and what it saves: one table and one plot from the deployed graphs.

    python -m benchmarks.accuracy DATA dense=dense.safetensors vpp-stale=vpp.safetensors random-reuse=... \\
        --work build/accuracy --output benchmarks/results/accuracy.json

DATA is made by ``models.training.validation``. Each checkpoint is exported and run over all clips at each keep ratio;
of the one called ``dense`` the graph without selection is taken. What was run is kept in the work folder, so that a run
that was stopped goes on. Times are measured at the end, all graphs in one run, taking turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.speed import machine
from export.bundle_writer import ExportRequest, export_bundle
from models.training.average_precision import TrackEvaluation, paired_bootstrap
from models.training.evaluate import DENSE, Row, YouTubeVisSet, evaluate
from runtime.backend import load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.profiling.latency import measure_in_turn, stepper
from runtime.stream import Stream

Key = tuple[str, float | None]  # name of the network, and keep ratio; None for the dense graph


def export_plain(checkpoint: Path, target: Path) -> None:
    """The bundle as ``deploy.py export`` makes it."""
    export_bundle(ExportRequest(checkpoint, target))


def prepared(checkpoint: Path, folder: Path, make: Callable[[Path, Path], object] = export_plain) -> Bundle:
    """The checkpoint's bundle; made again, and its rows thrown away, if the checkpoint has changed.

    Args:
        folder: Of this bundle and what was run with it.
        make: Writes the bundle of a checkpoint to a folder.
    """
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    mark = folder / "checkpoint.sha256"
    target = folder / "bundle"
    if not mark.is_file() or mark.read_text() != digest:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.row.json"):
            stale.unlink()
        make(checkpoint, target)
        mark.write_text(digest)
    return load_bundle(target)


def run_row(
    bundle: Bundle,
    data: YouTubeVisSet,
    ratio: float | None,
    path: Path,
    threads: int,
    on_frame: Callable[[], None],
    stream_type: type[Stream] = Stream,
) -> dict[str, Any]:
    """One network at one keep ratio over all clips; read from ``path`` if that was done before."""
    if not path.is_file():
        row: Row = evaluate(bundle, data, ratio, threads=threads, stream_type=stream_type, on_frame=on_frame)
        path.write_text(json.dumps({"summary": row.summary(), "results": row.results}))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def run_rows(
    bundles: dict[str, Bundle], scenes: YouTubeVisSet, keys: list[Key], work: Path, threads: int
) -> dict[Key, dict[str, Any]]:
    """:func:`run_row` for each network and keep ratio, with a progress bar."""
    contents = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for name, ratio in keys:
            task = progress.add_task(f"{name} {ratio or ''}", total=frame_count(scenes))
            path = work / name / f"{scenes.name}-{ratio or DENSE}.row.json"
            contents[name, ratio] = run_row(
                bundles[name], scenes, ratio, path, threads, lambda task=task: progress.advance(task)
            )
    return contents


def frame_count(scenes: YouTubeVisSet) -> int:
    """Frames of all clips."""
    return sum(len(clip.names) for clip in scenes.clips)


def times(bundles: dict[str, Bundle], rows: list[Key], threads: int, steps: int) -> dict[Key, float]:
    """Median milliseconds of one step with a prior, all rows taking turns."""
    tasks = {}
    for name, ratio in rows:
        bundle = bundles[name]
        manifest = bundle.manifest
        engine = load_engine(bundle, manifest.baseline if ratio is None else None, threads=threads)
        budget = None if ratio is None else manifest.budget_rule.for_ratio(ratio)
        tasks[f"{name}/{ratio}"] = stepper(engine, budget, manifest.budget_rule)
    measured = measure_in_turn(tasks, steps, 3, lambda: None)
    return {(name, ratio): float(np.median(measured.times_ms[f"{name}/{ratio}"])) for name, ratio in rows}


def main(
    data: Annotated[Path, typer.Argument(help="Folder of models.training.validation.")],
    networks: Annotated[list[str], typer.Argument(help="NAME=CHECKPOINT, one of them named dense.")],
    work: Annotated[Path, typer.Option(help="Folder for bundles and what was run.")] = Path("build/accuracy"),
    output: Annotated[Path, typer.Option(help="JSON to write.")] = Path("benchmarks/results/accuracy.json"),
    keep_ratio: Annotated[list[float], typer.Option(help="May be given several times.")] = [0.55, 0.40],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="Measured steps per row; 0 leaves times out.")] = 40,
    draws: Annotated[int, typer.Option(min=10, help="Draws of the bootstrap.")] = 500,
) -> None:
    """Run, measure and write the table."""
    checkpoints = {name: Path(path) for name, _, path in (text.partition("=") for text in networks)}
    if DENSE not in checkpoints:
        raise typer.BadParameter("one of the networks has to be dense=CHECKPOINT")
    bundles = {name: prepared(path, work / name) for name, path in checkpoints.items()}
    scenes = YouTubeVisSet(data, bundles[DENSE].manifest.classes)
    keys: list[Key] = [(DENSE, None), *((name, ratio) for name in bundles if name != DENSE for ratio in keep_ratio)]
    contents = run_rows(bundles, scenes, keys, work, threads)
    measured = times(bundles, keys, threads, steps) if steps else {}
    evaluations = {key: scenes.evaluation(content["results"]) for key, content in contents.items()}
    rows = [_row(key, contents[key], evaluations, measured, draws) for key in keys]
    result = {
        "machine": machine(),
        "engine": f"onnxruntime {onnxruntime.__version__}, fp32, {threads} threads",
        "data": {"name": data.name, "clips": len(scenes.clips), "frames": frame_count(scenes)},
        "bootstrap": f"95 % interval over clips, {draws} draws, of the difference in AP to dense",
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(row)


def _row(
    key: Key,
    content: dict[str, Any],
    evaluations: dict[Key, TrackEvaluation],
    measured: dict[Key, float],
    draws: int,
) -> dict[str, Any]:
    name, ratio = key
    summary = {field: value for field, value in content["summary"].items() if field not in ("name", "median_ms")}
    row: dict[str, Any] = {"network": name, "keep_ratio": ratio, **summary}
    if key in measured:
        row["median_ms"] = round(measured[key], 2)
        row["speed_up"] = round(measured[DENSE, None] / measured[key], 3)
    if ratio is not None:
        low, high = paired_bootstrap(evaluations[key], evaluations[DENSE, None], draws)
        row["to_dense"] = [round(row["AP"] - evaluations[DENSE, None].scores().ap, 2), round(low, 2), round(high, 2)]
    return row


if __name__ == "__main__":
    typer.run(main)
