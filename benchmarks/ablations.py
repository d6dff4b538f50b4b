"""What a score over whole videos hides: cuts, entering objects, a slow camera, key frames, a long run, the threshold.

    python -m benchmarks.ablations DATA CHECKPOINT --name vpp-stale --dense dense.safetensors --work build/accuracy

DATA and the work folder are those of ``benchmarks.accuracy``, whose runs are used where there are any.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.accuracy import prepared, run_row
from benchmarks.speed import machine
from export.bundle_writer import ExportRequest, export_bundle
from models.pruned_host import Selection
from models.training.average_precision import TrackEvaluation
from models.training.evaluate import DENSE, YouTubeVisSet
from models.training.scenes import write_youtube_vis
from models.training.track_windows import Window, after_cuts, cut_out, detection_delays
from models.training.validation import CLIP_STRIDE, SCENES
from runtime.bundle import Bundle
from runtime.stream import PreparedFrame, Stream, Turn

RATIOS = (0.55, 0.40)
AFTER_CUT = 3  # frames
LONG = 300  # frames of a clip in the drift test
KEY_FRAME_PERIODS = (8, 32)  # frames from one that computes all tokens to the next
LONG_SEED = 4  # of its scenes, which nothing else uses

Rows = dict[str, list[dict[str, Any]]]  # results by the name of the row


class Thinned(YouTubeVisSet):
    """Every n-th frame of a data set, as a slow camera would see it."""

    def __init__(self, whole: YouTubeVisSet, every: int) -> None:
        windows = [Window(clip.id, 0, len(clip.names), every) for clip in whole.clips]
        self.name = f"{whole.name}-every-{every}"
        self.truth, _ = cut_out(whole.truth, [], windows)
        self.category_ids = whole.category_ids
        self.clips = [replace(clip, id=number, names=clip.names[::every]) for number, clip in enumerate(whole.clips, 1)]


def key_frames(every: int) -> type[Stream]:
    """A stream that computes all tokens in every n-th frame."""

    class KeyFrames(Stream):
        def begin(self, prepared: PreparedFrame, started_s: float) -> Turn:
            turn = super().begin(prepared, started_s)
            if prepared.frame.index % every:
                return turn
            return replace(turn, budget=(self.bundle.manifest.patch_count,) * len(turn.budget))

    return KeyFrames


def results_of(bundles: dict[str, Bundle], data: YouTubeVisSet, folder: Path, threads: int) -> Rows:
    """Results of the dense graph and of the pruned one at both ratios; kept in the work folder."""
    rows: Rows = {}
    for ratio in (None, *RATIOS):
        which = DENSE if ratio is None else "pruned"
        target = folder / (DENSE if ratio is None else bundles["pruned"].folder.parent.name)
        path = target / f"{data.name}-{ratio or DENSE}.row.json"
        print(f"{data.name}, {which} {ratio or ''}", flush=True)
        rows[DENSE if ratio is None else f"{ratio:.2f}"] = run_row(
            bundles[which], data, ratio, path, threads, lambda: None
        )["results"]
    return rows


def scores_in_windows(truth: dict[str, Any], rows: Rows, windows: list[Window]) -> dict[str, float]:
    """AP within windows, by row."""
    parts = {name: cut_out(truth, results, windows) for name, results in rows.items()}
    return {name: round(TrackEvaluation(*part).scores().ap, 2) for name, part in parts.items()}


def delays(truth: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """How many frames later than the dense network each budget finds entering objects."""
    dense = detection_delays(truth, rows[DENSE])
    summary: dict[str, Any] = {"objects": len(dense), "found_dense": sum(d is not None for d in dense.values())}
    for name, results in rows.items():
        found = detection_delays(truth, results)
        both = [found[n] - d for n, d in dense.items() if d is not None and found[n] is not None]
        later = np.percentile(both, (50, 90)).tolist() if both else [None, None]
        summary[name] = {
            "found": sum(d is not None for d in found.values()),
            "only_dense": sum(d is not None and found[n] is None for n, d in dense.items()),
            "later_median": later[0],
            "later_p90": later[1],
        }
    return summary


def with_key_frames(bundle: Bundle, data: YouTubeVisSet, folder: Path, threads: int) -> dict[str, dict[str, Any]]:
    """What was run at the lowest ratio with all tokens in every n-th frame, by row."""
    contents = {}
    for every in KEY_FRAME_PERIODS:
        path = folder / f"{data.name}-{RATIOS[-1]}-key-{every}.row.json"
        print(f"{data.name}, key frame every {every}", flush=True)
        contents[f"{RATIOS[-1]:.2f}, key frame every {every}"] = run_row(
            bundle, data, RATIOS[-1], path, threads, lambda: None, key_frames(every)
        )
    return contents


def drift(bundles: dict[str, Bundle], work: Path, clips: int, threads: int) -> dict[str, Any]:
    """AP in the successive parts of long clips without a cut."""
    folder = work / f"long-{LONG}"
    if not folder.is_dir():
        scenes = replace(SCENES, frames=LONG, cut_probability=0.0)
        write_youtube_vis(folder, scenes, [LONG_SEED * CLIP_STRIDE + clip for clip in range(clips)])
    data = YouTubeVisSet(folder, bundles["pruned"].manifest.classes)
    rows = results_of(bundles, data, work, threads)
    keyed = with_key_frames(bundles["pruned"], data, bundles["pruned"].folder.parent, threads)
    rows |= {name: content["results"] for name, content in keyed.items()}
    starts = range(0, LONG, LONG // 5)
    return {"clips": len(data.clips)} | {
        f"{start}-{start + LONG // 5 - 1}": scores_in_windows(
            data.truth, rows, [Window(clip.id, start, start + LONG // 5) for clip in data.clips]
        )
        for start in starts
    }


def export_threshold(checkpoint: Path, target: Path) -> None:
    """The bundle in which the stages after the first keep what their own decision says."""
    export_bundle(ExportRequest(checkpoint, target, selection=Selection.THRESHOLD, baseline=False))


def threshold(checkpoint: Path, data: YouTubeVisSet, folder: Path, threads: int) -> dict[str, Any]:
    """What the same weights give in such a bundle."""
    bundle = prepared(checkpoint, folder, export_threshold)
    rows = {}
    for ratio in RATIOS:
        content = run_row(bundle, data, ratio, folder / f"{data.name}-{ratio}.row.json", threads, lambda: None)
        rows[f"{ratio:.2f}"] = content["summary"]
    return rows


def main(
    data: Annotated[Path, typer.Argument(help="Folder of models.training.validation.")],
    checkpoint: Annotated[Path, typer.Argument(help="The pruned network.")],
    dense: Annotated[Path, typer.Option(help="The dense network.")],
    name: Annotated[str, typer.Option(help="The pruned network's name in the work folder.")],
    work: Annotated[Path, typer.Option(help="Folder of benchmarks.accuracy.")] = Path("build/accuracy"),
    output: Annotated[Path, typer.Option(help="JSON to write.")] = Path("benchmarks/results/ablations.json"),
    long_clips: Annotated[int, typer.Option(min=1, help="Clips of the drift test.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 1,
    further: Annotated[bool, typer.Option(help="Also what needs runs beyond those of benchmarks.accuracy.")] = True,
) -> None:
    """Run what is missing and write the answers."""
    bundles = {DENSE: prepared(dense, work / DENSE), "pruned": prepared(checkpoint, work / name)}
    scenes = YouTubeVisSet(data, bundles[DENSE].manifest.classes)
    rows = results_of(bundles, scenes, work, threads)
    cuts = after_cuts(scenes.truth, AFTER_CUT)
    answers: dict[str, Any] = {
        "machine": machine(),
        "network": name,
        "after_cut": {"cuts": len(cuts), "frames": AFTER_CUT, "AP": scores_in_windows(scenes.truth, rows, cuts)},
        "entering": delays(scenes.truth, rows),
    }
    if further:
        answers |= further_answers(bundles, checkpoint, scenes, work, long_clips, threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(answers, indent=2) + "\n")
    print(json.dumps(answers, indent=2))


def further_answers(
    bundles: dict[str, Bundle], checkpoint: Path, scenes: YouTubeVisSet, work: Path, long_clips: int, threads: int
) -> dict[str, Any]:
    """A slow camera, key frames, a long run, the threshold."""
    answers: dict[str, Any] = {}
    for every in (2, 4):
        thinned = Thinned(scenes, every)
        rows_thinned = results_of(bundles, thinned, work, threads)
        answers[f"every_{every}_frames"] = {
            row: round(thinned.evaluation(results).scores().ap, 2) for row, results in rows_thinned.items()
        }
    keyed = with_key_frames(bundles["pruned"], scenes, bundles["pruned"].folder.parent, threads)
    answers["key_frames"] = {row: content["summary"] for row, content in keyed.items()}
    answers["drift"] = drift(bundles, work, long_clips, threads)
    own = bundles["pruned"].folder.parent
    answers["threshold"] = threshold(checkpoint, scenes, own.with_name(f"{own.name}-threshold"), threads)
    return answers


if __name__ == "__main__":
    typer.run(main)
