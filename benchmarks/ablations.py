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
from models.training.evaluate import DENSE, YouTubeVisSet, evaluate
from models.training.scenes import write_youtube_vis
from models.training.track_windows import Window, after_cuts, cut_out, detection_delays
from models.training.validation import CLIP_STRIDE, SCENES
from runtime.bundle import Bundle
from runtime.stream import Answer, PreparedFrame, Stream, Turn

RATIOS = (0.55, 0.40)
AFTER_CUT = 3  # frames
LONG = 300  # frames of a clip in the drift test
FRAME_STEP = 3  # of which every n-th is also scored by itself
KEY_FRAME_PERIODS = (8, 32)  # frames from one that computes all tokens to the next
LONG_SEED = 4  # of its scenes, which nothing else uses

Rows = dict[str, list[dict[str, Any]]]  # results by name


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


def long_run(bundle: Bundle, data: YouTubeVisSet, ratio: float | None, path: Path, threads: int) -> Rows:
    """Tracks of all clips, and what every third frame shows by itself; read from ``path`` if that was done before."""
    if not path.is_file():
        print(f"{data.name}, {DENSE if ratio is None else ratio}", flush=True)
        seen = FrameAnswers(data)
        row = evaluate(bundle, data, ratio, threads=threads, on_answer=seen.note)
        path.write_text(json.dumps({"tracks": row.results, "frames": seen.results}))
    content: Rows = json.loads(path.read_text())
    return content


class FrameAnswers:
    """Objects with the label and score that they have in one frame, as a viewer sees them, not by votes of a track."""

    def __init__(self, data: YouTubeVisSet) -> None:
        self._clips, self._category_ids = iter(data.clips), data.category_ids
        self._clip = 0
        self.results: list[dict[str, Any]] = []

    def note(self, answer: Answer) -> None:
        """Take the next frame's answer; the frames of one clip after those of the other."""
        frame = answer.header.frame_index
        if frame == 0:
            self._clip = next(self._clips).id
        if frame % FRAME_STEP:
            return
        objects = answer.result().instances
        for label, score, mask in zip(objects.labels, objects.scores, objects.run_lengths, strict=True):
            self.results.append(
                {
                    "video_id": self._clip,
                    "frame": frame,
                    "category_id": self._category_ids[label],
                    "score": float(score),
                    "segmentations": [mask],
                }
            )


def scores_of_frames(data: YouTubeVisSet, rows: Rows, start: int, stop: int) -> dict[str, float]:
    """AP where each frame counts by itself, by row."""
    frames = [(clip.id, frame) for clip in data.clips for frame in range(start, stop) if frame % FRAME_STEP == 0]
    truth, _ = cut_out(data.truth, [], [Window(clip, frame, frame + 1) for clip, frame in frames])
    number = {place: video for video, place in enumerate(frames, 1)}
    scores = {}
    for name, row in rows.items():
        found = [(number.get((entry["video_id"], entry["frame"])), entry) for entry in row]
        results = [{**entry, "video_id": video} for video, entry in found if video is not None]
        scores[name] = round(TrackEvaluation(truth, results).scores().ap, 2)
    return scores


def drift(bundles: dict[str, Bundle], work: Path, clips: int, threads: int) -> dict[str, Any]:
    """AP in the successive parts of long clips without a cut: of tracks, and of frames by themselves."""
    folder = work / f"long-{LONG}-{clips}"
    if not folder.is_dir():
        scenes = replace(SCENES, frames=LONG, cut_probability=0.0)
        write_youtube_vis(folder, scenes, [LONG_SEED * CLIP_STRIDE + clip for clip in range(clips)])
    data = YouTubeVisSet(folder, bundles["pruned"].manifest.classes)
    tracks, frames = {}, {}
    for ratio in (None, *RATIOS):
        bundle = bundles[DENSE if ratio is None else "pruned"]
        content = long_run(bundle, data, ratio, bundle.folder.parent / f"{data.name}-{ratio}-frames.row.json", threads)
        name = DENSE if ratio is None else f"{ratio:.2f}"
        tracks[name], frames[name] = content["tracks"], content["frames"]
    answers: dict[str, Any] = {"clips": len(data.clips)}
    for start in range(0, LONG, LONG // 5):
        stop = start + LONG // 5
        answers[f"{start}-{stop - 1}"] = {
            "tracks": scores_in_windows(data.truth, tracks, [Window(clip.id, start, stop) for clip in data.clips]),
            "frames": scores_of_frames(data, frames, start, stop),
        }
    return answers


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
    long_clips: Annotated[int, typer.Option(min=1, help="Clips of the drift test.")] = 24,
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
