"""Verifying an engine on its device against the reference vectors that the bundle carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.agreement import LIMITS, Agreement, Limits, coarsest
from runtime.backend import Engine, StreamBuffers
from runtime.bundle import REFERENCE_FILE, Bundle
from runtime.errors import BundleError, DeployError, ExportMismatchError, TokenBudgetError
from runtime.manifest import GraphSpec
from runtime.parity import compare_frame

MASK_STRIDE = 4  # mask logits are stored at every 4th row and column

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class BudgetAgreement:
    """How an engine answers at one preset of the bundle.

    Attributes:
        token_budget: Tokens kept at each stage of a frame with a prior.
        frames: Frames compared.
        skipped: In fp32, frames not compared: they hold near-ties chosen otherwise, and the reference does not say
            what another choice gives.
        near_ties: Tokens chosen otherwise in those frames.
        differences: Largest relative difference ``max|a - b| / max|b|`` of each tensor.
        sqnr_db: Signal-to-noise ratio of each floating-point tensor over all frames, decibels.
        overlap: By stage that chose among tokens: share of those kept that both kept, in [0, 1].
        failures: What did not agree, in words.
        not_built: Why the engine does not run this budget; empty if it does.
    """

    token_budget: tuple[int, ...]
    frames: int = 0
    skipped: int = 0
    near_ties: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    overlap: dict[int, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    not_built: str = ""


@dataclass(frozen=True)
class Verification:
    """What :func:`compare_engine` found.

    Attributes:
        engine: What it ran on.
        precision: The coarser of the graph's and the engine's, which the limits go by.
        budgets: By name of the preset.
    """

    engine: str
    precision: str
    limits: Limits
    budgets: dict[str, BudgetAgreement]

    @property
    def compared(self) -> dict[str, BudgetAgreement]:
        """The budgets that the engine runs."""
        return {name: budget for name, budget in self.budgets.items() if not budget.not_built}

    @property
    def frames(self) -> int:
        """Frames compared, over all budgets."""
        return sum(budget.frames for budget in self.budgets.values())

    @property
    def skipped(self) -> int:
        """Frames not compared because of near-ties, over all budgets."""
        return sum(budget.skipped for budget in self.budgets.values())

    @property
    def near_ties(self) -> int:
        """Tokens chosen otherwise within the margin of a tie, over all budgets."""
        return sum(budget.near_ties for budget in self.budgets.values())

    @property
    def worst(self) -> dict[str, float]:
        """Largest relative difference of each tensor over all budgets."""
        return _extreme(max, (budget.differences for budget in self.budgets.values()))

    @property
    def sqnr_db(self) -> dict[str, float]:
        """Smallest signal-to-noise ratio of each tensor over all budgets, decibels."""
        return _extreme(min, (budget.sqnr_db for budget in self.budgets.values()))

    @property
    def failures(self) -> list[str]:
        """What did not agree, in words."""
        found = [f"budget {name}: {text}" for name, budget in self.budgets.items() for text in budget.failures]
        if not self.compared:
            found.append(f"the engine runs none of the bundle's budgets: {next(iter(self.budgets.values())).not_built}")
        elif not self.frames:
            found.append(f"all {self.skipped} frames hold near-ties, so no value could be compared")
        return found

    def check(self) -> Verification:
        """This, if the engine agrees.

        Raises:
            ExportMismatchError: It does not; the message has every reason.
        """
        if failures := self.failures:
            raise ExportMismatchError(f"{self.engine} does not agree with torch:\n  " + "\n  ".join(failures))
        return self

    def as_dict(self) -> dict[str, object]:
        """For JSON, where an infinite number is written as None."""
        return {"passed": not self.failures, **_finite(asdict(self))}


def verify_engine(bundle: Bundle, engine: Engine, tolerance: float | None = None) -> Verification:
    """:func:`compare_engine`, with an error if the engine does not agree.

    Raises:
        BundleError: The bundle carries no reference vectors.
        ExportMismatchError: A difference beyond the limits, or no frame that could be compared.
    """
    return compare_engine(bundle, engine, tolerance).check()


def compare_engine(bundle: Bundle, engine: Engine, tolerance: float | None = None) -> Verification:
    """Run the bundle's reference clip at every preset; every frame starts from the reference's state.

    What an engine in fp32 keeps has to be the same up to near-ties, and its values within a relative tolerance. Any
    other precision is judged by ratios over the frames of a budget, see :data:`runtime.agreement.LIMITS`.

    Args:
        tolerance: In fp32 only: largest relative difference ``max|a - b| / max|b|`` of each tensor; None is 1e-4.

    Raises:
        BundleError: The bundle carries no reference vectors.
        BackendError: A step failed, or the precision has no limits.
        DeployError: A tolerance was given for another precision than fp32.
    """
    precision = coarsest(bundle.manifest.precision, engine.report.precision)
    limits = LIMITS[precision]
    if tolerance is not None:
        if limits.tolerance is None:
            raise DeployError(
                f"a tolerance of {tolerance} is for fp32; {precision} is judged by at least {limits.sqnr_db:.0f} dB "
                f"and {limits.overlap:.0%} of the same tokens. Leave --tolerance out."
            )
        limits = Limits(limits.sqnr_db, limits.overlap, tolerance)
    reference = read_reference(bundle)
    budgets = {}
    for name, preset in bundle.manifest.presets.items():
        if frames := cases(bundle, reference, name):
            buffers = engine.open_stream(usual_budget=preset)
            budgets[name] = _compare_budget(reference, engine, buffers, preset, frames, limits)
    return Verification(str(engine.report), precision, limits, budgets)


def read_reference(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    """The reference vectors, by name.

    Raises:
        BundleError: There are none that the manifest vouches for.
    """
    path = bundle.folder / REFERENCE_FILE
    if REFERENCE_FILE not in bundle.manifest.files or not path.is_file():
        raise BundleError(f"{path} is missing, so there is nothing to verify against. Export the bundle again.")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@dataclass(frozen=True)
class Case:
    """One frame of the clip at one budget.

    Attributes:
        t: Index of the frame, from 0.
        prefix: What the names of its vectors start with.
    """

    t: int
    prefix: str


def cases(bundle: Bundle, reference: Arrays, preset: str) -> list[Case]:
    """The frames at which a preset has vectors: all of the clip for the default one, some of them for the others."""
    frames = range(int(reference["frames"]))
    if preset == bundle.manifest.default_preset:
        return [Case(t, f"{t}.") for t in frames]
    return [Case(t, f"{preset}:{t}.") for t in frames if f"{preset}:{t}.budget" in reference]


def inputs(reference: Arrays, case: Case, graph: GraphSpec) -> dict[str, NDArray[np.generic]]:
    """What a graph takes at a frame, by name: image, the reference's state, and token counts where it selects."""
    values = _section(reference, f"{case.t}.state.") | {"image": reference[f"{case.t}.image"][None]}
    for spec in graph.inputs:
        if spec.name == "token_budget":
            values[spec.name] = reference[f"{case.prefix}budget"][: spec.shape_for(1)[0]]
    return {spec.name: values[spec.name].astype(spec.dtype) for spec in graph.inputs}


def expected(reference: Arrays, case: Case, carried: set[str]) -> dict[str, NDArray[np.generic]]:
    """What torch gave: outputs, and the next state as far as the graph writes it (inputs ``carried``).

    The default preset's next state stands where the next frame starts from; other presets store what differs from it.
    """
    following = _section(reference, f"{case.t + 1}.state.") | _section(reference, f"{case.prefix}next.")
    outputs = _section(reference, f"{case.prefix}output.")
    return outputs | {f"next_{name}": value for name, value in following.items() if name in carried}


def _compare_budget(
    reference: Arrays,
    engine: Engine,
    buffers: StreamBuffers,
    preset: tuple[int, ...],
    frames: list[Case],
    limits: Limits,
) -> BudgetAgreement:
    agreement, failures, near_ties = Agreement(), [], []
    carried = {pair.input for pair in engine.graph.carried}  # the tracker writes the rest
    for case in frames:
        try:
            got = _step(buffers, inputs(reference, case, engine.graph), _budget(reference, case))
        except TokenBudgetError as error:
            return BudgetAgreement(preset, not_built=str(error))
        want = expected(reference, case, carried)
        if limits.tolerance is not None:
            try:
                if ties := _compare_exactly(reference, engine, case, got, want, limits.tolerance):
                    near_ties.append(ties)
                    continue
            except ExportMismatchError as error:
                failures.append(f"frame {case.t}, {_budget(reference, case)}: {error}")
        agreement.add(got, want)
    return BudgetAgreement(
        preset,
        frames=len(frames) - len(near_ties),
        skipped=len(near_ties),
        near_ties=sum(near_ties),
        differences=dict(agreement.differences),
        sqnr_db=agreement.sqnr_db,
        overlap=agreement.overlap,
        failures=tuple(agreement.failures(limits) if limits.tolerance is None else failures),
    )


def _budget(reference: Arrays, case: Case) -> tuple[int, ...]:
    return tuple(int(count) for count in reference[f"{case.prefix}budget"])


def _step(buffers: StreamBuffers, given: Arrays, budget: tuple[int, ...]) -> dict[str, NDArray[np.generic]]:
    """Outputs and next state by name, mask logits thinned out as the reference's are."""
    buffers.set_state({name: value for name, value in given.items() if name not in ("image", "token_budget")})
    buffers.image[:] = given["image"]
    got = {name: np.array(value) for name, value in buffers.run(budget).items()}
    got["mask_logits"] = got["mask_logits"][..., ::MASK_STRIDE, ::MASK_STRIDE]
    buffers.commit()
    return got | {f"next_{name}": value for name, value in buffers.state().items()}


def _compare_exactly(
    reference: Arrays,
    engine: Engine,
    case: Case,
    got: Arrays,
    want: Arrays,
    tolerance: float,
) -> int:
    """Near-ties of one frame; with any, its values are not compared."""
    budget = _budget(reference, case)
    by_stage = _section(reference, f"{case.prefix}scores.").values()  # written in the order of the stages
    scores = [stage.astype(np.float32) for stage in by_stage]
    tied = bool(reference[f"{case.prefix}tied_match"])
    counted = budget[:1] if engine.graph.selection == "threshold" else budget  # the stages that decide by a count
    if "kept_stages" in want:
        choice = compare_frame(got, {"kept_stages": want["kept_stages"]}, scores, counted, tolerance, tied)
        if choice.near_ties:
            return choice.near_ties
    explained = {name: float(value) for name, value in _section(reference, f"{case.prefix}explained.").items()}
    return compare_frame(got, want, scores, counted, tolerance, tied, explained).near_ties


def _section(reference: Arrays, prefix: str) -> dict[str, NDArray[np.generic]]:
    return {name[len(prefix) :]: value for name, value in reference.items() if name.startswith(prefix)}


def _extreme(choose: Callable[..., float], found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the chosen one of its values."""
    values: dict[str, list[float]] = {}
    for one in found:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    return {name: choose(each) for name, each in values.items()}


def _finite(value: Any) -> Any:
    """The same without infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
