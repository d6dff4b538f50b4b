"""fp32 bundle -> the same bundle in another precision: its graphs go through the passes, everything else stays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto

from calib.qdq import insert_qdq
from calib.samples import Deviation, Sample, deviation, reference_samples
from export.typed_graph import rounded_graph, to_typed_graph
from runtime.agreement import LIMITS
from runtime.bundle import Bundle, file_sha256, load_bundle
from runtime.errors import ExportMismatchError
from runtime.manifest import MANIFEST_FILE, FloatPrecision, GraphSpec


@dataclass(frozen=True)
class Lowering:
    """What the graphs of a bundle become.

    Attributes:
        rest: What everything is computed in that is not quantized.
        quantized: ``int8`` or ``fp8`` for the linear layers that have a range; None quantizes nothing.
        ranges: See :func:`calib.qdq.insert_qdq`.
    """

    rest: FloatPrecision
    quantized: Literal["int8", "fp8"] | None = None
    ranges: Mapping[str, float] = field(default_factory=dict)

    def graph(self, model: ModelProto, spec: GraphSpec) -> ModelProto:
        """The passes over one fp32 graph."""
        if self.rest != "fp32":
            model = to_typed_graph(model, spec, self.rest).model
        if self.quantized is not None:
            model = insert_qdq(model, spec, self.ranges, self.quantized).model
        return model

    def deviation(self, model: ModelProto, spec: GraphSpec, samples: list[Sample], threads: int = 0) -> Deviation:
        """How far this takes an fp32 graph from what it gave, on a CPU that rounds as the precision does."""
        lowered = self.graph(model, spec)
        return deviation(lowered if self.rest == "fp32" else rounded_graph(lowered), samples, threads)


def write_lowered(bundle: Bundle, folder: Path, lowering: Lowering) -> None:
    """Write a bundle in another precision into a folder, which may be the bundle's own.

    Files that are already in the folder, such as a calibration table, become part of the bundle.
    """
    manifest = bundle.manifest
    if folder != bundle.folder:
        for name in manifest.files:
            shutil.copyfile(bundle.folder / name, folder / name)
    for spec in (manifest.graph, manifest.baseline):
        if spec is not None:
            onnx.save(lowering.graph(onnx.load(bundle.path(spec)), spec), folder / spec.file)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_FILE)
    changes = {
        "precision": lowering.quantized or lowering.rest,
        "rest_precision": lowering.rest,
        "files": {name: file_sha256(folder / name) for name in names},
    }
    text = manifest.model_copy(update=changes).model_dump_json(indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def lower_in_place(folder: Path, precision: FloatPrecision) -> Deviation:
    """Make the fp32 bundle in a folder one that computes in ``fp16`` or ``bf16``, and compare it with torch.

    Raises:
        ExportMismatchError: It is too far from torch; the folder holds a bundle that is not to be used.
    """
    bundle, lowering = load_bundle(folder), Lowering(precision)
    spec = bundle.manifest.graph
    found = lowering.deviation(onnx.load(bundle.path(spec)), spec, reference_samples(bundle))
    limits = LIMITS[precision]
    if not found.reaches(limits):
        raise ExportMismatchError(
            f"in {precision} the graph is too far from torch: {found}. It has to agree {limits}. Export it in fp32, or "
            f"in {_other(precision)}."
        )
    write_lowered(bundle, folder, lowering)
    return found


def _other(precision: str) -> str:
    return "bf16" if precision == "fp16" else "fp16"
