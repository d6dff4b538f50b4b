"""The engines of a bundle: what each was built from, and which of them runs here.

An engine is two files in the bundle's folder ``engines``: the plan, and a record beside it that says what it was built
from and what it covers. Neither is among the files that the manifest hashes, so building leaves the bundle valid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.bundle import Bundle, file_sha256
from runtime.cuda import Gpu
from runtime.errors import EngineMismatchError
from runtime.manifest import Count, FileName, GraphSpec, Sha256

ENGINES_FOLDER = "engines"
RECORD_VERSION = 1
RESET_SUFFIX = " reset"  # of the name of a budget of frames without a prior
OLDEST_PORTABLE = 80  # https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest, "Compute Capability": 8.0 and later

Compatibility = Literal["none", "same-compute-capability", "ampere-plus"]


class Profile(BaseModel):
    """What one optimisation profile of an engine is for; all its shapes and counts are fixed.

    Attributes:
        name: The preset or keep ratio, with ``reset`` behind it for the budget of a frame without a prior.
        token_budget: Tokens kept at each stage; None for a graph without selection.
        batch: Streams that are stepped together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    token_budget: tuple[Count, ...] | None
    batch: Count


class EngineInputs(BaseModel):
    """All that an engine is built from; an engine with the same inputs need not be built again.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        library_version: Version of that library.
        gpu: Name of the GPU that it was built on; None where none was needed.
        compute_capabilities: What it is for, e.g. ``sm89``; empty: all that TensorRT-RTX covers without being told.
        compatibility: Which other GPUs run it: none, those of the same compute capability, or every one from Ampere on.
        version_compatible: Whether later versions of the library run it too.
        graph: ONNX file in the bundle.
        graph_sha256: Its hash.
        precision: What the graph computes in.
        profiles: In the plan's order.
        workspace_bytes: Most scratch memory of one layer; None is the library's own limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["tensorrt", "tensorrt-rtx"]
    library_version: str
    gpu: str | None
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^sm\d+$")], ...]
    compatibility: Compatibility = "none"
    version_compatible: bool = False
    graph: FileName
    graph_sha256: Sha256
    precision: str
    profiles: tuple[Profile, ...] = Field(min_length=1)
    workspace_bytes: Count | None = None

    @property
    def name(self) -> str:
        """File name without an ending: one engine for each graph, library version and device."""
        device = "-".join((*self.compute_capabilities, *([self.gpu] if self.gpu else []))) or "portable"
        return f"{Path(self.graph).stem}.{self.backend}-{self.library_version}.{_slug(device)}"

    @property
    def budgets(self) -> tuple[tuple[int, ...], ...] | None:
        """Budgets of frames with a prior; None for a graph without selection."""
        found = [
            profile.token_budget
            for profile in self.profiles
            if any(not name.endswith(RESET_SUFFIX) for name in profile.name.split(", "))
        ]
        return tuple(dict.fromkeys(budget for budget in found if budget is not None)) or None

    @property
    def largest_batch(self) -> int:
        """Streams that may be stepped together: every number up to this was built for."""
        batches = {profile.batch for profile in self.profiles}
        return next(count for count in range(len(batches), -1, -1) if batches.issuperset(range(1, count + 1)))

    def why_not(self, version: str, gpu: Gpu) -> str | None:
        """Why the engine does not run with this library version on this GPU; None if it does."""
        if not _covers_version(self, version):
            later = " or a later one of the same major version" if self.version_compatible else ""
            return f"built by version {self.library_version}, runs with that{later}; here is {version}"
        if not _covers_gpu(self, gpu):
            return f"built for {self.covered}; here is {gpu}"
        return None

    @property
    def covered(self) -> str:
        """The GPUs that run it, in words."""
        if self.compatibility == "ampere-plus":
            return f"GPUs from sm{OLDEST_PORTABLE} on"
        capabilities = ", ".join(self.compute_capabilities) or f"GPUs from sm{OLDEST_PORTABLE} on"
        exact = self.gpu is not None and self.compatibility == "none"
        return f"{self.gpu} ({capabilities})" if exact else capabilities


class EngineRecord(EngineInputs):
    """The record beside a plan.

    Attributes:
        plan_sha256, plan_bytes: The plan's hash and size.
        build_s: Time the library took, seconds.
        asked: Layers of the parsed graph that multiply or convolve, by the type that they give.
        found: Layers of the built engine by the type that they give, read back from it; None until it was loaded on a
            GPU by ``build``.
    """

    record_version: Annotated[int, Field(ge=1, le=RECORD_VERSION)] = RECORD_VERSION
    plan_sha256: Sha256
    plan_bytes: Count
    build_s: float
    asked: dict[str, int]
    found: dict[str, int] | None = None

    def inputs(self) -> EngineInputs:
        """What it was built from."""
        return EngineInputs(**{name: getattr(self, name) for name in EngineInputs.model_fields})


def plan_path(bundle: Bundle, inputs: EngineInputs) -> Path:
    """Where the plan of such an engine lies."""
    return bundle.folder / ENGINES_FOLDER / f"{inputs.name}.plan"


def record_path(plan: Path) -> Path:
    """The record beside a plan."""
    return plan.with_name(f"{plan.name.removesuffix('.plan')}.json")


def layers_path(plan: Path) -> Path:
    """What the library tells of the built layers, as its own JSON."""
    return plan.with_name(f"{plan.name.removesuffix('.plan')}.layers.json")


def read_record(plan: Path) -> EngineRecord:
    """The record of a plan.

    Raises:
        EngineMismatchError: It is missing, or is not a record that this program reads.
    """
    path = record_path(plan)
    try:
        return EngineRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineMismatchError(f"{plan} has no record {path.name} beside it.") from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise EngineMismatchError(f"{path} is no record of an engine: {_first_line(error)}.") from error


def plan_is_whole(plan: Path, record: EngineRecord) -> bool:
    """Whether the plan is the file that the record was written for."""
    return plan.is_file() and plan.stat().st_size == record.plan_bytes and file_sha256(plan) == record.plan_sha256


def choose_engine(bundle: Bundle, graph: GraphSpec, backend: str, version: str, gpu: Gpu) -> tuple[Path, EngineRecord]:
    """The engine of a graph that this library runs on this GPU; of several, the one that was built last.

    Raises:
        EngineMismatchError: There is none; the message says why each one that is there does not fit.
    """
    refused: list[str] = []
    for plan in list_plans(bundle, backend):
        try:
            record = read_record(plan)
            reason = _why_not_here(bundle, graph, record, version, gpu)
        except EngineMismatchError as error:
            reason = str(error)
        if reason is None and not plan_is_whole(plan, record):
            reason = (
                f"is not the plan that its record was written for ({record.plan_bytes} bytes): cut short or changed"
            )
        if reason is None:
            return plan, record
        if reason:
            refused.append(f"\n  {plan.name}: {reason}")
    found = "".join(refused) or f"\n  {bundle.folder / ENGINES_FOLDER} holds none for {backend} and {graph.file}"
    raise EngineMismatchError(
        f"no engine of {bundle.folder} runs here ({backend} {version}, {gpu}):{found}\n"
        f"Build one here: deploy.py build {bundle.folder} --backend {backend}"
    )


def list_plans(bundle: Bundle, backend: str = "tensorrt*") -> list[Path]:
    """The plans in a bundle, the newest first."""
    plans = (bundle.folder / ENGINES_FOLDER).glob(f"*.{backend}-[0-9]*.plan")
    return sorted(plans, key=lambda plan: (plan.stat().st_mtime, plan.name), reverse=True)


def _why_not_here(bundle: Bundle, graph: GraphSpec, record: EngineRecord, version: str, gpu: Gpu) -> str | None:
    """None if the engine fits; empty if it is another graph's, which is no news."""
    if record.graph != graph.file:
        return ""
    if record.graph_sha256 != bundle.manifest.files[graph.file]:
        return f"built from another {graph.file} than the bundle has now"
    return record.why_not(version, gpu)


def _covers_version(inputs: EngineInputs, version: str) -> bool:
    built, here = _numbers(inputs.library_version), _numbers(version)
    return built == here or (inputs.version_compatible and built[:1] == here[:1] and built <= here)


def _covers_gpu(inputs: EngineInputs, gpu: Gpu) -> bool:
    number = int(gpu.compute_capability.removeprefix("sm"))
    if inputs.compatibility == "ampere-plus" or not inputs.compute_capabilities:
        return number >= OLDEST_PORTABLE
    if gpu.compute_capability not in inputs.compute_capabilities:
        return False
    return inputs.gpu in (None, gpu.name) or inputs.compatibility == "same-compute-capability"


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what a packager added: 10.13.3.9.post1 gives (10, 13, 3, 9)."""
    return tuple(int(part) for part in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", version))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}"
    return str(error).splitlines()[0]
