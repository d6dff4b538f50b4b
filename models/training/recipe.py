"""What decides a training run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(str, Enum):
    """What a run trains."""

    DENSE = "dense"
    SPARSE = "sparse"


@dataclass(frozen=True)
class Recipe:
    """All that decides a run, written beside its weights.

    Attributes:
        size: (height, width) of training crops, pixels.
        frames: Frames per clip; gradients flow through ``truncate`` of them.
        max_gap: Largest distance between frames of a clip, in frames of the video.
        zoom: Range of the zoom of a crop; 1 shows as much of the frame as fits.
        focus_weight: Weight of the selectors' loss against where objects are, in the sparse stage.
        pixel_weight: Weight of the auxiliary per-pixel loss; its head is not part of the checkpoint.
        selector, pruned, refresh: How the network selects, see :class:`models.configs.VppEoConfig`; a selector that
            ``init`` does not hold starts untrained.
        teacher: Checkpoint of the dense network that the sparse stage learns to agree with.
        distil_weight: Weight of that agreement.
        task_gradient: The task teaches the selectors too, straight through their decisions, as published, and the ratio
            loss calibrates them; without it they learn where objects are and nothing else.
        selector_steps: Steps at the start of the sparse stage in which the selectors alone learn, on all tokens.
        average: Decay per step of the moving average of the weights, which is what the checkpoint holds; 0: none.
    """

    stage: Stage
    data: str
    model: str
    steps: int
    batch: int
    size: tuple[int, int]
    frames: int
    truncate: int
    max_gap: int
    zoom: tuple[float, float]
    learning_rate: float
    warmup: int
    weight_decay: float
    clip_norm: float
    pixel_weight: float
    focus_weight: float
    seed: int
    bf16: bool
    init: str | None
    selector: str = "vpp"
    pruned: str = "stale"
    refresh: int = 0
    teacher: str | None = None
    distil_weight: float = 1.0
    task_gradient: bool = False
    selector_steps: int = 0
    average: float = 0.0
