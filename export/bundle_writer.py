"""Checkpoint -> bundle: export, parity check and hashes in a temporary folder, which then takes the bundle's place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from export.bundle_folder import check_replaceable, partial_folder, replace_folder
from export.check import Parity, check_parity
from export.lowered_bundle import lower_in_place
from export.onnx_graph import DEFAULT_OPSET, export_graph, initial_rows, state_name
from export.part_costs import part_costs
from export.reference import FRAMES, synthetic_frames, write_reference
from models.checkpoints import load_host, weight_hash
from models.macs import giga_macs
from models.pruned_host import PrunedHost, Selection
from runtime.backend import load_engine
from runtime.bundle import INITIAL_STATE_FILE, REFERENCE_FILE, file_sha256, load_bundle
from runtime.errors import CheckpointError, SinkError
from runtime.manifest import MANIFEST_FILE, SCHEMA_VERSION, FloatPrecision, GraphSpec, Manifest, Origin, PartCost
from runtime.verified import note_verified

PRESET_RATIOS = (0.40, 0.55, 0.70, 1.0)


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        image_size: (height, width); None takes the size that the checkpoint was trained at.
        keep_ratio: The preset that is used where nothing else is asked for.
        budget: Token counts of the default preset instead of ``keep_ratio``.
        baseline: Also write the dense network, for ``profile`` to measure against.
        precision: What the graphs compute in; they are checked in fp32 first.
    """

    checkpoint: Path
    output: Path
    model: str | None = None
    image_size: tuple[int, int] | None = None
    keep_ratio: float = 0.55
    budget: tuple[int, ...] | None = None
    selection: Selection = Selection.BUDGET
    opset: int = DEFAULT_OPSET
    baseline: bool = True
    tolerance: float = 1e-4
    precision: FloatPrecision = "fp32"


def export_bundle(
    request: ExportRequest,
    report: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Parity]:
    """Export a checkpoint; the bundle appears whole, checked against torch, or not at all.

    Args:
        report: Called with a line before each step.
        tell: Called with what a comparison in another precision than fp32 found.

    Returns:
        The parity of each budget that was checked, in fp32.

    Raises:
        CheckpointError, ImageSizeError, TokenBudgetError: The request cannot be met.
        ExportMismatchError: The graph does not agree with torch.
        SinkError: The bundle cannot be written.
    """
    report("read checkpoint")
    model = load_host(request.checkpoint, request.model)
    if not model.has_selectors and request.selection is not Selection.NONE:
        raise CheckpointError(
            f"{request.checkpoint} is a dense checkpoint: it has no selectors. Export it with --dense, or take the "
            "checkpoint of the sparse stage."
        )
    if request.selection is Selection.THRESHOLD and not model.has_decisions:
        raise CheckpointError(
            f"{request.checkpoint} ranks tokens without a keep and a drop logit ({model.selection_summary}): "
            "there is no threshold. Export it with --selection budget."
        )
    model = model.at_image_size(request.image_size or model.config.image_size)
    presets, default = _presets(model, request)
    target = Path(os.path.realpath(request.output))  # of a link, what it points to
    check_replaceable(target)
    with partial_folder(target) as folder:
        try:
            parity = _fill(model, request, folder, presets, default, report)
            if request.precision != "fp32":
                report(f"compute in {request.precision}")
                tell(f"{request.precision}: {lower_in_place(folder, request.precision)}, {FRAMES} frames against torch")
            replace_folder(folder, target)
        except OSError as error:
            raise SinkError(f"{request.output} cannot be written: {error}. Nothing was changed.") from error
    return parity


def _presets(model: PrunedHost, request: ExportRequest) -> tuple[dict[str, tuple[int, ...]], str]:
    rule = model.budget_rule
    if request.selection is Selection.NONE:
        return {"1.00": rule.largest}, "1.00"
    presets = {_preset_name(ratio): rule.for_ratio(ratio) for ratio in PRESET_RATIOS}
    if request.budget is not None:
        return {**presets, "custom": rule.checked(request.budget)}, "custom"
    default = _preset_name(request.keep_ratio)
    return {**presets, default: rule.for_ratio(request.keep_ratio)}, default


def _preset_name(keep_ratio: float) -> str:
    """The ratio in two decimals, in more where two are not enough: 0.554 is not the preset 0.55."""
    short = f"{keep_ratio:.2f}"
    return short if float(short) == keep_ratio else str(keep_ratio)


def _fill(
    model: PrunedHost,
    request: ExportRequest,
    folder: Path,
    presets: dict[str, tuple[int, ...]],
    default: str,
    report: Callable[[str], None],
) -> dict[str, Parity]:
    """Write all files of the bundle and check its graphs."""
    report("export graph")
    graph = export_graph(model, folder / "model.onnx", request.selection, request.opset)
    baseline = None
    if request.baseline and request.selection is not Selection.NONE:
        report("export dense baseline")
        baseline = export_graph(model, folder / "dense.onnx", Selection.NONE, request.opset)
    initial = {state_name(field): row.numpy() for field, row in initial_rows(model).items()}
    np.savez(folder / INITIAL_STATE_FILE, **initial)
    report("write reference vectors")
    write_reference(model, folder / REFERENCE_FILE, presets, default, request.selection)
    manifest = _manifest(model, request, folder, presets, default, graph, baseline)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return _check(model, request, folder, presets[default], report)


def _check(
    model: PrunedHost, request: ExportRequest, folder: Path, usual: tuple[int, ...], report: Callable[[str], None]
) -> dict[str, Parity]:
    """Parity with torch at the smallest, the usual and the largest budget."""
    bundle = load_bundle(folder)
    engine = load_engine(bundle)
    rule = model.budget_rule
    budgets = {"smallest": rule.smallest, "usual": usual, "largest": rule.largest}
    if request.selection is Selection.NONE:
        budgets = {"dense": usual}
    parity = {}
    for name, budget in budgets.items():
        report(f"compare with torch, {name} budget, {FRAMES} frames")
        frames = synthetic_frames(model.config.image_size, seed=1)
        parity[name] = check_parity(model, engine, frames, budget, request.tolerance)
    if bundle.manifest.baseline is not None:
        report(f"compare the dense baseline with torch, {FRAMES} frames")
        frames = synthetic_frames(model.config.image_size, seed=1)
        dense = load_engine(bundle, bundle.manifest.baseline)
        parity["dense baseline"] = check_parity(model, dense, frames, rule.largest, request.tolerance)
    note_verified(bundle, engine, {})
    return parity


def _manifest(
    model: PrunedHost,
    request: ExportRequest,
    folder: Path,
    presets: dict[str, tuple[int, ...]],
    default: str,
    graph: GraphSpec,
    baseline: GraphSpec | None,
) -> Manifest:
    config = model.config
    return Manifest(
        schema_version=SCHEMA_VERSION,
        task="video-instance-segmentation",
        classes=config.classes,
        image_size=config.image_size,
        patch_size=config.patch_size,
        patch_grid=model.patch_grid,
        pad_value=tuple(round(255 * value) for value in config.mean),
        normalisation={"mean": config.mean, "std": config.std},
        stages=config.stages,
        depth=config.depth,
        stage_blocks=config.stage_blocks,
        first_stage=model.budget_rule.first_stage,
        reset_stages=model.budget_rule.reset_stages,
        joined_tokens=model.budget_rule.joined_tokens,
        presets=presets,
        default_preset=default,
        graph=graph,
        baseline=baseline,
        giga_macs=_giga_macs(model, presets, request.selection),
        part_costs=_part_costs(folder, graph, baseline, presets),
        tracker=model.tracker_settings(),
        precision="fp32",
        opset=request.opset,
        origin=Origin(
            model=config.name,
            selection="none" if request.selection is Selection.NONE else model.selection_summary,
            checkpoint=request.checkpoint.name,
            weights_sha256=weight_hash(model),
            exported_with={name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        ),
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )


def _giga_macs(model: PrunedHost, presets: dict[str, tuple[int, ...]], mode: Selection) -> dict[str, float]:
    dense = {"dense": round(giga_macs(model, model.budget_rule.largest, Selection.NONE), 4)}
    if mode is Selection.NONE:
        return dense
    return {name: round(giga_macs(model, budget), 4) for name, budget in presets.items()} | dense


def _part_costs(
    folder: Path, graph: GraphSpec, baseline: GraphSpec | None, presets: dict[str, tuple[int, ...]]
) -> dict[str, tuple[PartCost, ...]]:
    costs = {}
    if graph.selection == "budget":
        costs = {name: part_costs(folder, graph, budget) for name, budget in presets.items()}
    dense = graph if graph.selection == "none" else baseline
    return costs if dense is None else costs | {"dense": part_costs(folder, dense, ())}
