"""What an engine is asked to be, and what is refused before the library starts: it would fail late, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from runtime.bundle import Bundle
from runtime.cuda import Gpu
from runtime.device_precision import check_device_precision
from runtime.engines import RESET_SUFFIX, Compatibility, EngineInputs, Profile
from runtime.errors import BackendError, TokenBudgetError
from runtime.manifest import GraphSpec, Manifest
from runtime.tensorrt_library import TensorRt

LARGEST_TOP_K = 3840  # beyond it TensorRT's TopK fails when it runs; the builder only warns


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        budgets: Tokens kept at each stage, by name; the budget of a frame without a prior is added for each. The
            engine runs these and no others.
        batches: Numbers of streams that may be stepped together.
        compute_capabilities: GPU generations that the plan is for, e.g. ``sm89``. None given: TensorRT builds for the
            GPU it runs on, TensorRT-RTX for all from sm80 on.
        compatibility, version_compatible: See :class:`runtime.engines.EngineInputs`; TensorRT only.
        workspace_bytes: Most scratch memory of one layer; None leaves it to the library.
    """

    budgets: Mapping[str, Sequence[int]]
    batches: Sequence[int] = (1,)
    compute_capabilities: Sequence[str] = ()
    compatibility: str = "none"
    version_compatible: bool = False
    workspace_bytes: int | None = None


def budgets_by_name(
    manifest: Manifest, ratios: Sequence[float] = (), counts: Sequence[Sequence[int]] = ()
) -> dict[str, tuple[int, ...]]:
    """Budgets for keep ratios, and for token counts themselves; the manifest's presets if neither is given.

    Raises:
        TokenBudgetError: One does not fit the model.
    """
    if not ratios and not counts:
        return dict(manifest.presets)
    rule = manifest.budget_rule
    named = {f"{ratio:.2f}": rule.for_ratio(ratio) for ratio in ratios}
    return named | {",".join(map(str, count)): rule.checked(count) for count in counts}


def engine_inputs(
    bundle: Bundle, graph: GraphSpec, request: EngineRequest, library: TensorRt, gpu: Gpu | None
) -> EngineInputs:
    """All that the engine will be built from, checked.

    Args:
        gpu: The GPU of this machine; None builds for others, which only TensorRT-RTX does.

    Raises:
        TokenBudgetError: There is no budget, or one that the model or TensorRT does not take.
        BackendUnavailableError: A GPU that it is for has not what the graph computes in.
        BackendError: The library cannot build this graph, or not as it is asked to.
    """
    profiles = tuple(_profiles(bundle.manifest, graph, _checked(bundle, graph, request, library), request.batches))
    built_on = None if library.is_rtx else gpu
    targets = _targets(request, library, built_on)
    _check_compatibility(request, library)
    for target in targets:
        check_device_precision(bundle.manifest, target)
    return EngineInputs(
        backend=library.backend,  # type: ignore[arg-type]
        library_version=library.version,
        gpu=built_on.name if built_on else None,
        compute_capabilities=targets,
        compatibility=request.compatibility,
        version_compatible=request.version_compatible,
        graph=graph.file,
        graph_sha256=bundle.manifest.files[graph.file],
        precision=bundle.manifest.precision,
        profiles=profiles,
        workspace_bytes=request.workspace_bytes,
    )


def _checked(bundle: Bundle, graph: GraphSpec, request: EngineRequest, library: TensorRt) -> dict[str, tuple[int, ...]]:
    """The budgets, each with the one of a frame without a prior, if the library can run them all."""
    manifest, rule = bundle.manifest, bundle.manifest.budget_rule
    if graph.selection == "threshold" and library.is_rtx:
        raise BackendError(
            f"{bundle.folder} selects by threshold; TensorRT-RTX has no NonZero, so it cannot count tokens from the "
            "data. Export the checkpoint again with --selection budget."
        )
    if not request.budgets:
        raise TokenBudgetError(
            f"an engine is built for named budgets and none was given. {bundle.folder} has the presets "
            f"{', '.join(manifest.presets)}."
        )
    if not request.batches or min(request.batches) < 1:
        raise BackendError(f"the batch is {list(request.batches)}, allowed are numbers of streams, each at least 1.")
    checked = {name: rule.checked(counts) for name, counts in request.budgets.items()}
    checked |= {f"{name}{RESET_SUFFIX}": rule.at_reset(counts) for name, counts in list(checked.items())}
    if graph.has_budget:
        for name, counts in checked.items():
            _check_top_k(manifest, name, counts[: graph.input("token_budget").shape_for(1)[0]])
    return checked


def _check_top_k(manifest: Manifest, name: str, counts: tuple[int, ...]) -> None:
    if max(counts) > LARGEST_TOP_K:
        height, width = manifest.image_size
        raise TokenBudgetError(
            f"budget {name} keeps {max(counts)} tokens at one stage, TensorRT's TopK takes 1..{LARGEST_TOP_K}. "
            f"Use a smaller --keep-ratio, or export with a smaller --image-size: {height} x {width} has "
            f"{manifest.patch_count} patches, all of which a frame without a prior keeps."
        )


def _profiles(
    manifest: Manifest, graph: GraphSpec, budgets: Mapping[str, tuple[int, ...]], batches: Sequence[int]
) -> Iterator[Profile]:
    """One for each different budget and batch; all names of a budget are told."""
    names: dict[tuple[int, ...] | None, list[str]] = {}
    for name, counts in budgets.items() if graph.has_budget else [("dense", None)]:
        names.setdefault(counts, []).append(name)
    for batch in sorted(set(batches)):
        for counts, same in names.items():
            yield Profile(name=", ".join(same), token_budget=counts, batch=batch)


def _targets(request: EngineRequest, library: TensorRt, built_on: Gpu | None) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(name.lower() for name in request.compute_capabilities))
    if built_on is not None:
        if asked not in ((), (built_on.compute_capability,)):
            raise BackendError(
                f"{library} builds for the GPU that it runs on, {built_on}, not for {', '.join(asked)}. Build there, "
                "or build with --backend tensorrt-rtx, which needs no GPU."
            )
        return (built_on.compute_capability,)
    known = [name.lower() for name in library.api.ComputeCapability.__members__ if name.startswith("SM")]
    for name in asked:
        if name not in known:
            raise BackendError(
                f"{library} builds for the compute capabilities {', '.join(known)}, not for {name!r}."
                + (" For a Jetson, build on the Jetson with --backend tensorrt." if name in _JETSONS else "")
            )
    return asked


_JETSONS = ("sm53", "sm62", "sm72", "sm87", "sm101", "sm110")


def _check_compatibility(request: EngineRequest, library: TensorRt) -> None:
    if request.compatibility not in get_args(Compatibility):
        raise BackendError(
            f"hardware compatibility is {request.compatibility!r}, allowed are {', '.join(get_args(Compatibility))}."
        )
    if library.is_rtx and (request.compatibility != "none" or request.version_compatible):
        raise BackendError(
            f"{library} has no compatibility with other versions or by hardware level: name the GPUs with "
            "--compute-capability, and build again after an update, which takes seconds."
        )
    if request.compatibility != "none" and hardware_level(library.api, request.compatibility) is None:
        known = ", ".join(_option(name) for name in library.api.HardwareCompatibilityLevel.__members__)
        raise BackendError(f"{library} has no hardware compatibility {request.compatibility}, only {known}.")


def hardware_level(api: Any, compatibility: str) -> Any:
    """The module's own constant; None if this version lacks it."""
    return getattr(api.HardwareCompatibilityLevel, compatibility.upper().replace("-", "_"), None)


def _option(name: str) -> str:
    return name.lower().replace("_", "-")
