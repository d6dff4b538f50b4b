"""The manifest: everything that exporter, backends and stream have to agree on, in one place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from runtime.budget import BudgetRule
from runtime.errors import BundleIntegrityError, BundleSchemaError, TokenBudgetError

# 2: first_stage, reset_stages, giga_macs, depth, stage_blocks; 3: part_costs; 4: joined_tokens
SCHEMA_VERSION = 4
MANIFEST_FILE = "manifest.json"

Count = Annotated[int, Field(ge=1)]
Channel = Annotated[int, Field(ge=0, le=255)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # inside the bundle, never a path
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FloatPrecision = Literal["fp32", "fp16", "bf16"]
DType = Literal["uint8", "int64", "bool", "float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """An input or output of the graph; the first axis of most is the batch, written ``"batch"``."""

    name: str
    dtype: DType
    shape: tuple[Count | Literal["batch"], ...]

    def shape_for(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch axis filled in."""
        return tuple(batch if axis == "batch" else axis for axis in self.shape)


class StatePair(_Strict):
    """A state tensor: what frame t-1 leaves to frame t in the graph's input ``input``.

    ``update`` says who writes it: ``graph``: the graph's output ``output`` of frame t-1 is the input of frame t;
    ``host``: the tracker does, between the frames, from rows of ``output`` if that is given. ``initial`` says what a
    stream without a past feeds: zeros (False for bool), or the tensor of that name in ``initial_state.npz``, one row
    that every stream starts from.
    """

    input: str
    output: str | None
    update: Literal["graph", "host"] = "graph"
    initial: Literal["zeros", "file"] = "zeros"


class GraphSpec(_Strict):
    """One ONNX file with its tensors.

    Attributes:
        file: Name inside the bundle.
        selection: ``budget``: K from ``token_budget`` at every stage; ``threshold``: token counts from the data after
            the first stage; ``none``: no token is ever dropped.
    """

    file: FileName
    selection: Literal["budget", "threshold", "none"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StatePair, ...]

    @model_validator(mode="after")
    def _pairs_exist_and_fit(self) -> GraphSpec:
        inputs = {spec.name: spec for spec in self.inputs}
        outputs = {spec.name: spec for spec in self.outputs}
        for pair in self.state:
            no_output = pair.output is None and pair.update == "host"
            if pair.input not in inputs or not (no_output or pair.output in outputs):
                raise ValueError(f"state pair {pair.input} -> {pair.output} names a tensor that the graph lacks")
            if pair.output is None:
                continue
            one, other = inputs[pair.input], outputs[pair.output]
            rows = slice(-1, None) if pair.update == "host" else slice(None)  # the tracker takes some of the rows
            if (one.dtype, one.shape[rows]) != (other.dtype, other.shape[rows]):
                raise ValueError(f"state pair {pair.input} -> {pair.output} differs in dtype or shape")
        return self

    @property
    def carried(self) -> tuple[StatePair, ...]:
        """The state that the graph itself writes."""
        return tuple(pair for pair in self.state if pair.update == "graph")

    @property
    def has_budget(self) -> bool:
        """Whether ``token_budget`` is an input."""
        return any(spec.name == "token_budget" for spec in self.inputs)

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)


class TrackerSettings(_Strict):
    """How query outputs become tracks where a query's index is an identity.

    Attributes:
        kind: Name of this way of tracking.
        start_score: A query becomes a new track when it is an object, of any class, with this probability, in [0, 1].
        keep_score: A track goes on while that probability is at least this.
        patience: Frames that a track may stay below ``keep_score`` before it ends.
        duplicate_iou: Of two masks that overlap more than this, the lower score is dropped.
    """

    kind: Literal["query-identity"] = "query-identity"
    start_score: Annotated[float, Field(ge=0, le=1)] = 0.65
    keep_score: Annotated[float, Field(ge=0, le=1)] = 0.45
    patience: Annotated[int, Field(ge=0)] = 5
    duplicate_iou: Annotated[float, Field(gt=0, le=1)] = 0.6


class TrackQuerySettings(_Strict):
    """How query outputs become tracks where the queries of tracks are handed on behind the learned ones (RO-VIS).

    Attributes:
        kind: Name of this way of tracking.
        learned_queries: Queries before those that were handed on.
        start_score: A learned query becomes a new track above this score, in [0, 1].
        keep_score: A track goes on while its query is above this score.
        track_iou: Of two tracks whose masks overlap more than this, the one with the lower score ends.
        new_iou: A new mask that overlaps more than this with one that is shown already is dropped.
    """

    kind: Literal["track-queries"] = "track-queries"
    learned_queries: Count
    start_score: Annotated[float, Field(ge=0, le=1)] = 0.30
    keep_score: Annotated[float, Field(ge=0, le=1)] = 0.25
    track_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    new_iou: Annotated[float, Field(gt=0, le=1)] = 0.4


_TRACKER_KINDS = ("query-identity", "track-queries")


def _tracker_kind(settings: Any) -> Any:
    kind = settings.get("kind", _TRACKER_KINDS[0]) if isinstance(settings, dict) else getattr(settings, "kind", None)
    return kind if isinstance(kind, str) else _TRACKER_KINDS[0]


AnyTrackerSettings = Annotated[
    Annotated[TrackerSettings, Tag(_TRACKER_KINDS[0])] | Annotated[TrackQuerySettings, Tag(_TRACKER_KINDS[1])],
    Discriminator(_tracker_kind),
]


class Origin(_Strict):
    """Where the bundle comes from.

    Attributes:
        selection: In words: what decides which patches are computed, and what stands for those that are not.
    """

    model: str
    selection: str = ""
    checkpoint: str
    weights_sha256: Sha256
    exported_with: dict[str, str]


class PartCost(_Strict):
    """What a part of the network costs in one step of one picture.

    Attributes:
        part: Path of a module, see :mod:`runtime.profiling.parts`.
        giga_macs: Multiply-accumulates of its matrix products and convolutions, in 10^9.
        megabytes: What its operators read and write as the graph is written, without any fusion, in 10^6 bytes.
    """

    part: str
    giga_macs: Annotated[float, Field(ge=0)]
    megabytes: Annotated[float, Field(ge=0)]


class Manifest(_Strict):
    """The contract of a bundle; see the attributes of its parts.

    Attributes:
        image_size: (height, width) that frames are letterboxed to, pixels.
        patch_grid: (rows, columns) of patches, row-major.
        pad_value: RGB of the letterbox's border, 0..255; the mean of the training images.
        normalisation: ``mean`` and ``std`` that the graph applies to ``pixel / 255``; the input is raw uint8.
        presets: Token budgets by name; the name is the keep ratio that gave them.
        default_preset: The preset that is used where nothing else is asked for.
        stages: Selection stages; every budget has that many counts.
        depth: Transformer blocks.
        stage_blocks: Block before which each selection stage stands.
        first_stage, reset_stages, joined_tokens: See :class:`runtime.budget.BudgetRule`.
        baseline: The same weights without any selection operator, to measure against.
        giga_macs: Multiply-accumulates of one step with a prior, in 10^9, by preset, and ``dense`` without selection.
        precision: What the linear layers are computed in.
        rest_precision: Where ``precision`` is ``int8`` or ``fp8``: what everything else is computed in.
        part_costs: The same by part, and bytes; empty where the data decides how many tokens stay.
        files: SHA-256 of every other file of the bundle.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION, strict=True)]
    task: Literal["video-instance-segmentation"]
    classes: tuple[str, ...] = Field(min_length=1)
    image_size: tuple[Count, Count]
    patch_size: Count
    patch_grid: tuple[Count, Count]
    pad_value: tuple[Channel, Channel, Channel]
    normalisation: dict[Literal["mean", "std"], tuple[float, float, float]]
    stages: Count
    depth: Count
    stage_blocks: tuple[Annotated[int, Field(ge=0)], ...]
    first_stage: Annotated[int, Field(ge=0, le=1)] = 0
    reset_stages: Count = 1
    joined_tokens: Annotated[int, Field(ge=0)] = 0
    presets: dict[str, tuple[int, ...]]
    default_preset: str
    graph: GraphSpec
    baseline: GraphSpec | None
    giga_macs: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    part_costs: dict[str, tuple[PartCost, ...]] = Field(default_factory=dict)
    tracker: AnyTrackerSettings
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    rest_precision: FloatPrecision = "fp32"
    opset: Count
    origin: Origin
    files: dict[FileName, Sha256]

    @property
    def patch_count(self) -> int:
        """Patch tokens N of one image."""
        return self.patch_grid[0] * self.patch_grid[1]

    def mean_share(self, tokens_kept: Sequence[int]) -> float:
        """Share of the patch tokens that a block computes, mean over the blocks, from the tokens kept at each stage."""
        ends = (*self.stage_blocks[1:], self.depth)
        lengths = [end - start for start, end in zip(self.stage_blocks, ends, strict=True)]
        computed = sum(length * int(count) for length, count in zip(lengths, tokens_kept, strict=True))
        return (self.stage_blocks[0] + computed / self.patch_count) / self.depth

    @property
    def budget_rule(self) -> BudgetRule:
        """Which budgets the network takes."""
        return BudgetRule(self.patch_count, self.stages, self.first_stage, self.reset_stages, self.joined_tokens)

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        rows, columns = self.patch_grid
        if (rows * self.patch_size, columns * self.patch_size) != self.image_size:
            raise ValueError(
                f"patch grid {self.patch_grid} x patch size {self.patch_size} is not the image size {self.image_size}"
            )
        if self.default_preset not in self.presets:
            raise ValueError(f"default preset {self.default_preset} is none of {', '.join(self.presets)}")
        for name, budget in self.presets.items():
            try:
                self.budget_rule.checked(budget)
            except TokenBudgetError as error:
                raise ValueError(f"preset {name}: {error}") from error
        blocks = [*self.stage_blocks, self.depth]
        if len(blocks) != self.stages + 1 or blocks != sorted(set(blocks)):
            raise ValueError(
                f"stage_blocks {self.stage_blocks} are not {self.stages} rising numbers below {self.depth}"
            )
        image = TensorSpec(name="image", dtype="uint8", shape=("batch", *self.image_size, 3))
        for spec in (self.graph, self.baseline):
            if spec is not None and spec.file not in self.files:
                raise ValueError(f"{spec.file} has no hash under files")
            if spec is not None and image not in spec.inputs:
                raise ValueError(f"{spec.file} has no input image that is uint8 {list(image.shape)}")
        return self


def parse_manifest(text: str, path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        BundleIntegrityError: It is not JSON, or contradicts itself.
        BundleSchemaError: It has a schema version that this program does not read.
    """
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise BundleIntegrityError(f"{path} is not JSON: {error}. Export the bundle again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleSchemaError(
            f"{path} has schema version {version}, this program reads up to {SCHEMA_VERSION}. "
            "Update the program, or export the bundle with this version."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        lines = "\n".join(f"  {_field(item['loc'])}: {item['msg']}" for item in error.errors())
        raise BundleIntegrityError(f"{path} is not a valid manifest:\n{lines}\nExport the bundle again.") from error


def _field(location: tuple[int | str, ...]) -> str:
    """Where in the manifest something is wrong, without the kind of tracker that was assumed."""
    return ".".join(str(part) for part in location if part not in _TRACKER_KINDS) or "manifest"
