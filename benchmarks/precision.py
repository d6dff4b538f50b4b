"""What fp16, bf16, INT8 and FP8 cost in accuracy and are worth in time, on the CPU, with the shipped network.

    python -m models.training.validation data/validation
    python -m benchmarks.precision data/validation

Every row runs all clips frame by frame, its own prior carried. fp16 and bf16 are rounded after every operator of the
typed graph (:func:`export.typed_graph.rounded_graph`), so what is measured is the graph, not this CPU; ``in openvino``
is OpenVINO's own bf16. Calibration sees other scenes than the validation set. Rows are written as they are done, and
a second run goes on after them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from benchmarks.speed import RESULTS, machine
from calib.histogram import METHODS
from calib.observation import Observation, observe
from calib.observed_engine import ObservedEngine
from export.bundle_writer import ExportRequest, export_bundle
from export.lowered_bundle import Lowering, write_lowered
from export.typed_graph import KeepFp32, rounded_graph, to_typed_graph
from models.training.evaluate import evaluate, open_data
from models.training.scenes import write_youtube_vis
from models.training.validation import SCENES
from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle, file_sha256, load_bundle
from runtime.manifest import MANIFEST_FILE
from runtime.stream import Stream
from runtime.video.sources import open_source

CHECKPOINT = Path("models/zoo/vpp-eo-nano-scenes.safetensors")
CALIBRATION_CLIPS = [77_000_000 + clip for clip in range(6)]  # of no other set; the last two are only compared on
FRAMES = 32
RATIO = 0.55
SPEED_STEPS = 30


def main(
    data: Annotated[Path, typer.Argument(help="Validation set, made by models.training.validation.")],
    clips: Annotated[int | None, typer.Option(min=1, help="Run only the first videos.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="fp32 bundle; default: the shipped checkpoint is exported.")
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "precision.json",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 1,
) -> None:
    """Measure and write ``benchmarks/results/precision.json``."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fp32 = load_bundle(bundle or exported(work / "exported"))
        record = Record(output, {"machine": machine(), "keep_ratio": RATIO, "clips": clips, "threads": threads})
        seen, unseen = observed(fp32, work / "scenes", threads)
        ranges = {name: METHODS["minmax"](histogram) for name, histogram in seen.histograms.items()}
        record.part("speed", lambda: speed(fp32, work, ranges, threads))
        record.part("fp32_regions", lambda: regions(fp32, unseen))
        record.part("methods", lambda: methods(fp32, seen, unseen))
        record.part("dense_frames", lambda: dense_ranges(fp32, work / "scenes", seen, unseen, threads))
        accuracy(record, fp32, work, ranges, data, clips, threads)
    print(output.read_text())


class Record:
    """The results file, written after every part; parts that it holds already are not measured again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else settings
        if self.content["clips"] != settings["clips"]:
            raise SystemExit(f"{path} is of {self.content['clips']} clips. Remove it, or give another --output.")

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this name, now or before."""
        if name not in self.content:
            print(f"measure {name}", flush=True)
            self.content[name] = measure()
            self.path.write_text(json.dumps(self.content, indent=2) + "\n")
        return self.content[name]


def exported(folder: Path) -> Path:
    """The shipped checkpoint as an fp32 bundle."""
    export_bundle(ExportRequest(CHECKPOINT, folder, image_size=(288, 512)), print)
    return folder


def observed(bundle: Bundle, scenes: Path, threads: int) -> tuple[Observation, Observation]:
    """What four clips showed, at the usual budget, and two others to compare on."""
    write_youtube_vis(scenes, SCENES, CALIBRATION_CLIPS, workers=1)
    budget = bundle.manifest.budget_rule.for_ratio(RATIO)
    seen, unseen = Observation(), Observation()
    for place, folder in enumerate(sorted((scenes / "JPEGImages").iterdir())):
        into = seen if place < 4 else unseen
        into.merge(observe(bundle, open_source(folder), folder.name, budget, FRAMES, threads=threads))
    return seen, unseen


def lowerings(ranges: dict[str, float]) -> dict[str, Lowering]:
    """All that is measured, by name."""
    return {
        "fp32": Lowering("fp32"),
        "fp16": Lowering("fp16"),
        "bf16": Lowering("bf16"),
        "int8": Lowering("fp32", "int8", ranges),
        "int8, rest fp16": Lowering("fp16", "int8", ranges),
        "fp8, rest fp16": Lowering("fp16", "fp8", ranges),
    }


def rounded_bundle(bundle: Bundle, folder: Path, lowering: Lowering) -> Bundle:
    """The bundle in another precision, in a form that this CPU computes as that precision rounds."""
    folder.mkdir()
    write_lowered(bundle, folder, lowering)
    if lowering.rest != "fp32":
        for spec in (bundle.manifest.graph, bundle.manifest.baseline):
            if spec is not None:
                onnx.save(rounded_graph(onnx.load(folder / spec.file)), folder / spec.file)
        path = folder / MANIFEST_FILE
        content = json.loads(path.read_text()) | {"precision": lowering.quantized or "fp32", "rest_precision": "fp32"}
        content["files"] = {name: file_sha256(folder / name) for name in content["files"]}
        path.write_text(json.dumps(content))
    return load_bundle(folder)


def accuracy(
    record: Record, fp32: Bundle, work: Path, ranges: dict[str, float], data: Path, clips: int | None, threads: int
) -> None:
    """AP of every precision, and how many of its tokens fp32 keeps too where each carries its own prior."""
    source = open_data(data, fp32.manifest.classes, clips)
    reference: list[NDArray[np.int64]] = []

    def row(bundle: Bundle, backend: str, precision: str | None) -> dict[str, Any]:
        kept: list[NDArray[np.int64]] = []
        found = evaluate(
            bundle, source, RATIO, backend=backend, threads=threads, precision=precision,
            on_answer=lambda answer: kept.append(answer.header.kept_stages),
        )  # fmt: skip
        if not reference:
            reference.extend(kept)
        return found.summary() | {"overlap": overlap(kept, reference)}

    record.content.get("accuracy fp32") and print("fp32 is run again: the others are compared with its tokens")
    record.content.pop("accuracy fp32", None)
    for name, lowering in lowerings(ranges).items():
        lowered = rounded_bundle(fp32, work / name.replace(", ", "-").replace(" ", "-"), lowering)
        record.part(f"accuracy {name}", lambda: row(lowered, "onnxruntime", None))  # noqa: B023  # called at once
    record.part("accuracy bf16 in openvino", lambda: row(fp32, "openvino", "bf16"))


def overlap(kept: list[NDArray[np.int64]], reference: list[NDArray[np.int64]]) -> list[float]:
    """Of the tokens that a stage keeps, the share that the reference keeps too, by stage."""
    pairs = list(zip(kept, reference, strict=True))
    shares = []
    for stage in range(int(max(other.max() for other in reference))):
        both = sum(int(((one > stage) & (other > stage)).sum()) for one, other in pairs)
        shares.append(round(both / sum(int((other > stage).sum()) for _, other in pairs), 4))
    return shares


def regions(bundle: Bundle, unseen: Observation) -> dict[str, dict[str, Any]]:
    """Error when more, or less, of the graph stays fp32."""
    choices = {
        "as exported": KeepFp32(),
        "ranking low too": KeepFp32(ranking=False),
        "patch embedding fp32": KeepFp32(modules=("patch_embed",)),
        "mask head fp32": KeepFp32(modules=("mask_head",)),
        "residual sums fp32": KeepFp32(operators=frozenset({"Add"})),
    }
    spec = bundle.manifest.graph
    model = onnx.load(bundle.path(spec))
    from calib.samples import deviation

    return {
        precision: {
            name: _summary(deviation(rounded_graph(to_typed_graph(model, spec, precision, keep).model), unseen.samples))
            for name, keep in choices.items()
        }
        for precision in ("fp16", "bf16")
    }


def _summary(found: Any) -> dict[str, Any]:
    return {
        "errors": {name: round(value, 5) for name, value in found.errors.items()},
        "overlap": round(found.smallest_overlap, 4),
    }


def methods(bundle: Bundle, seen: Observation, unseen: Observation) -> dict[str, dict[str, Any]]:
    """Ways of choosing ranges, on frames that were not calibrated on."""
    spec = bundle.manifest.graph
    model = onnx.load(bundle.path(spec))
    rows = {}
    for precision, rest in (("int8", "fp32"), ("fp8", "fp16")):
        for name, choose in METHODS.items():
            if (precision, name) != ("fp8", "entropy"):
                ranges = {layer: choose(histogram) for layer, histogram in seen.histograms.items()}
                lowering = Lowering(rest, precision, ranges)  # type: ignore[arg-type]
                rows[f"{precision} {name}"] = _summary(lowering.deviation(model, spec, unseen.samples))
    return rows


def dense_ranges(bundle: Bundle, scenes: Path, seen: Observation, unseen: Observation, threads: int) -> dict[str, Any]:
    """The same frames, each as a first frame with all tokens, as calibration without a stream would run them."""
    dense = Observation()
    for folder in sorted((scenes / "JPEGImages").iterdir())[:4]:
        dense.merge(observe_dense(bundle, folder, threads))
    spec = bundle.manifest.graph
    model = onnx.load(bundle.path(spec))
    ratios = {name: dense.histograms[name].largest / seen.histograms[name].largest for name in seen.histograms}
    errors = {
        name: _summary(
            Lowering("fp32", "int8", {layer: each.largest for layer, each in of.histograms.items()}).deviation(
                model, spec, unseen.samples
            )
        )
        for name, of in (("stream", seen), ("dense frames", dense))
    }
    values = {
        name: round(_mean_size(dense, name) / _mean_size(seen, name), 4)
        for name in sorted(ratios, key=lambda name: abs(np.log(ratios[name])), reverse=True)[:12]
    }
    return {
        "largest_dense_over_stream": {name: round(ratios[name], 4) for name in values},
        "mean_size_dense_over_stream": values,
        "layers_more_than_5_percent_apart": sum(abs(ratio - 1) > 0.05 for ratio in ratios.values()),
        "layers": len(ratios),
        "int8": errors,
    }


def observe_dense(bundle: Bundle, folder: Path, threads: int) -> Observation:
    """Every frame without a prior, at the largest budget."""
    from calib.observation import Observer

    observer = Observer(FRAMES)
    engine = observer.engine = ObservedEngine(bundle, observer, threads)
    with open_source(folder) as source, Stream(bundle, engine, budget=bundle.manifest.budget_rule.largest) as stream:
        for frame, _ in zip(source, range(FRAMES), strict=False):
            stream.reset()
            stream.step(frame)
    return observer.seen


def _mean_size(observation: Observation, name: str) -> float:
    histogram = observation.histograms[name]
    places = (np.arange(len(histogram.counts)) + 0.5) * histogram.reach / len(histogram.counts)
    return float(histogram.counts @ places / histogram.counts.sum())


def speed(bundle: Bundle, work: Path, ranges: dict[str, float], threads: int) -> dict[str, Any]:
    """Median time of a step in ONNX Runtime, the rows taking turns."""
    engines = {}
    for name in ("fp32", "int8"):
        (work / f"speed-{name}").mkdir()
        write_lowered(bundle, work / f"speed-{name}", lowerings(ranges)[name])
        engines[name] = load_engine(load_bundle(work / f"speed-{name}"), threads=threads)
    return {
        f"keep {ratio:.2f}": _step_times(engines, bundle.manifest.budget_rule.for_ratio(ratio))
        for ratio in (1.0, RATIO, 0.40)
    }


def _step_times(engines: dict[str, Engine], budget: tuple[int, ...]) -> dict[str, float]:
    import time

    buffers = {name: engine.open_stream() for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    picture = np.random.default_rng(0)
    for step in range(SPEED_STEPS + 3):
        for name, one in buffers.items():
            one.image[:] = picture.integers(0, 256, one.image.shape, np.uint8)
            started = time.perf_counter()
            one.run(budget)
            if step >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
            one.commit()
    medians = {f"{name}_ms": round(float(np.median(values)), 2) for name, values in times.items()}
    return medians | {"speed_up": round(medians["fp32_ms"] / medians["int8_ms"], 3)}


if __name__ == "__main__":
    typer.run(main)
