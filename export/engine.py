"""Bundle -> engine plan: TensorRT parses the bundle's graph and tunes it for each token budget.

Neither torch nor onnx is needed here, and TensorRT-RTX builds without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.errors import BackendError, BackendUnavailableError, TokenBudgetError
from runtime.manifest import GraphSpec

logger = logging.getLogger(__name__)

LARGEST_TOP_K = 3840  # beyond it TensorRT's TopK fails when it runs; the builder only warns


def build_rtx_plan(
    bundle: Bundle, budgets: Mapping[str, Sequence[int]], compute_capabilities: Sequence[str] = ("sm89",)
) -> bytes:
    """Build the bundle's graph with TensorRT-RTX: batch 1, one optimisation profile per budget, in their order.

    Args:
        budgets: Tokens kept at each stage, by name. The plan runs these and no others, so a stream's budget goes with
            its :func:`runtime.budget.reset_budget`.
        compute_capabilities: GPU generations that the plan is for, by name, e.g. ``sm86`` or ``sm120``.

    Returns:
        The serialized engine.

    Raises:
        TokenBudgetError: There is no budget, or one that the model or TensorRT does not take.
        BackendUnavailableError: TensorRT-RTX is not installed.
        BackendError: The graph selects by threshold, or TensorRT-RTX refuses it; the message has its reasons.
    """
    graph, path = bundle.manifest.graph, bundle.path(bundle.manifest.graph)
    checked = _check_request(bundle, budgets)
    trt = _import_tensorrt_rtx()
    log = _error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    config = builder.create_builder_config()
    _set_compute_capabilities(trt, config, compute_capabilities)
    _parse(trt, network, log, path)
    for budget in checked:
        config.add_optimization_profile(_profile(builder, graph, budget))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT-RTX {trt.__version__} builds no engine from {path}: {_lines(log.errors)}")
    return bytes(plan)


def _check_request(bundle: Bundle, budgets: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """The budgets, if TensorRT can run this bundle with all of them."""
    manifest = bundle.manifest
    if manifest.graph.selection == "threshold":
        raise BackendError(
            f"{bundle.folder} selects by threshold; TensorRT-RTX has no NonZero, so it cannot count tokens from the "
            "data. Export the checkpoint again with --selection budget."
        )
    if not budgets:
        raise TokenBudgetError(
            f"an engine is built for named budgets and none was given. {bundle.folder} has the presets "
            f"{', '.join(manifest.presets)}."
        )
    checked = {name: manifest.budget_rule.checked(counts) for name, counts in budgets.items()}
    for name, counts in checked.items():
        if manifest.graph.has_budget and max(counts) > LARGEST_TOP_K:
            raise TokenBudgetError(
                f"budget {name} keeps {max(counts)} tokens at one stage, TensorRT's TopK takes 1..{LARGEST_TOP_K}. "
                f"Use a smaller --keep-ratio, or export with a smaller --image-size: {manifest.image_size[0]} x "
                f"{manifest.image_size[1]} has {manifest.patch_count} patches, all of which the first frame keeps."
            )
    return list(checked.values())


def _import_tensorrt_rtx() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise BackendUnavailableError(
            f"TensorRT-RTX is not there ({error}). Install it: pip install '.[tensorrt-rtx]'"
        ) from error
    return tensorrt_rtx


def _error_log(trt: Any) -> Any:
    """A TensorRT logger that keeps the errors in ``errors`` and passes the rest on."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            else:
                logger.debug("%s", message)

    return ErrorLog()


def _parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise BackendError(f"TensorRT-RTX {trt.__version__} does not take {path}: {_lines(reasons)}")


def _set_compute_capabilities(trt: Any, config: Any, names: Sequence[str]) -> None:
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if name.upper() not in known:
            allowed = ", ".join(key.lower() for key in known if key.startswith("SM"))
            raise BackendError(f"TensorRT-RTX {trt.__version__} does not build for {name!r}, only for {allowed}.")
        config.set_compute_capability(known[name.upper()], index)


def _profile(builder: Any, graph: GraphSpec, budget: tuple[int, ...]) -> Any:
    """One profile: every shape fixed, and the values of ``token_budget``, from which the token counts follow."""
    profile = builder.create_optimization_profile()
    for spec in graph.inputs:
        if spec.name == "token_budget":
            counts = budget[: spec.shape_for(1)[0]]
            profile.set_shape_input(spec.name, counts, counts, counts)
        else:
            profile.set_shape(spec.name, *[spec.shape_for(1)] * 3)
    return profile


def _lines(reasons: Sequence[str]) -> str:
    return "".join(f"\n  {reason}" for reason in reasons) or "it gives no reason."
