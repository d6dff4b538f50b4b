"""Parity of an exported graph with torch, frame by frame.

Every frame starts from torch's state, so that rounding cannot pile up. What was kept is compared before values: where
the two choose differently, torch's scores tell whether it is a near-tie; the values are then compared with torch
running on the graph's own choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx_graph import budget_entries, state_name, step_interface
from models.pruned_host import PrunedHost, Selection
from models.selection import gather_tokens
from models.token_subset import TokenSubset
from runtime.backend import Engine
from runtime.errors import ExportMismatchError
from runtime.parity import TIE_MARGIN, FrameParity, compare_frame, relative_difference


class Oracle:
    """A copy of a host in torch, that notes its scores and can be told which tokens to keep.

    Attributes:
        scores: For each stage of the last step, the score of each token it chose from [1, N]; others NaN.
        tied_match: In the last step some token had two keys of the frame before equally similar, within the margin.
    """

    def __init__(self, model: PrunedHost) -> None:
        self.model = copy.deepcopy(model).eval()
        self._choose = self.model.choose
        self.model.choose = self._note_and_choose  # type: ignore[method-assign]
        self.scores: list[NDArray[np.float32]] = []
        self.tied_match = False
        self._forced: Tensor | None = None  # kept_stages int64 [B, N]
        self._state: Any = None

    def run(
        self, image: Tensor, state: Any, budget: tuple[int, ...], mode: Selection, forced: Tensor | None = None
    ) -> tuple[Any, Any]:
        """One step, with the next state as a tracker would hand it on.

        Args:
            forced: ``kept_stages`` int64 [B, N] to follow instead of the scores.
        """
        self.scores, self._forced, self.tied_match, self._state = [], forced, False, state
        with torch.no_grad():
            outputs, next_state = self.model(image, state, torch.tensor(budget), mode)
        return outputs, self.model.example_tracks(outputs, next_state)

    def sensitivity(
        self, image: Tensor, state: Any, budget: tuple[int, ...], mode: Selection, kept_stages: Tensor
    ) -> dict[str, float]:
        """How far each output moves, relatively, if near-ties inside the network fall one way or the other.

        A network without such decisions gives an empty result.

        Args:
            kept_stages: int64 [B, N], tokens to keep.
        """
        if not self.model.has_inner_decisions:
            return {}
        variants = []
        for self.model.inner_margin in (TIE_MARGIN, -TIE_MARGIN, 0.0):
            outputs, _ = self.run(image, state, budget, mode, kept_stages)
            variants.append({name: value.numpy() for name, value in outputs._asdict().items()})
        *moved, plain = variants
        return {name: max(relative_difference(other[name], value) for other in moved) for name, value in plain.items()}

    def _note_and_choose(
        self, stage: int, subset: TokenSubset, scores: Tensor, token_budget: Tensor | None, mode: Selection
    ) -> Tensor:
        dense = scores.new_full(subset.kept_stages.shape, float("nan"))
        while len(self.scores) < stage:  # a stage that dropped nothing had nothing to choose
            self.scores.append(dense.numpy().astype(np.float32))
        self.scores.append(
            (scores if subset.indices is None else dense.scatter(1, subset.indices, scores)).numpy().astype(np.float32)
        )
        if stage == 0:
            self.tied_match = self._has_tied_match(self.model.association(subset.tokens, self._state))
        if self._forced is None:
            return self._choose(stage, subset, scores, token_budget, mode)
        stages = self._forced if subset.indices is None else gather_tokens(self._forced, subset.indices)
        return torch.stack([(row > stage).nonzero().flatten() for row in stages])

    @staticmethod
    def _has_tied_match(association: Tensor | None) -> bool:
        if association is None:
            return False
        best = association.topk(2, dim=2).values
        gap, finite = best[..., 0] - best[..., 1], torch.isfinite(best).all(2)
        return bool((finite & (gap <= TIE_MARGIN * best[..., 0].abs().max())).any())


@dataclass
class Parity:
    """What a comparison over frames found."""

    frames: list[FrameParity] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """Largest relative difference over all frames and outputs."""
        return max((frame.worst for frame in self.frames), default=0.0)

    @property
    def near_ties(self) -> int:
        """Tokens that were chosen differently within the margin of a tie."""
        return sum(frame.near_ties for frame in self.frames)


def check_parity(
    model: PrunedHost,
    engine: Engine,
    frames: Iterable[NDArray[np.uint8]],
    budget: tuple[int, ...],
    tolerance: float = 1e-4,
) -> Parity:
    """Compare a loaded graph with torch on a clip; the first frame has no prior.

    Args:
        frames: uint8 [H, W, 3] each, at the bundle's size.
        budget: Tokens kept at each stage.
        tolerance: Largest relative difference ``max|a - b| / max|b|`` of each output and state tensor.

    Raises:
        ExportMismatchError: A difference beyond the tolerance, with the frame and the tensor.
    """
    mode = Selection(engine.graph.selection)
    oracle, parity = Oracle(model), Parity()
    state = model.initial_state(1)
    buffers = engine.open_stream()
    for index, frame in enumerate(frames):
        used = model.budget_rule.at_reset(budget) if index == 0 else budget
        image = torch.from_numpy(frame)[None]
        buffers.set_state(named_state(model, state, mode))
        buffers.image[0] = frame
        got = {name: np.array(value) for name, value in buffers.run(used).items()}
        buffers.commit()
        got |= {f"next_{name}": value for name, value in buffers.state().items()}
        outputs, next_state = oracle.run(image, state, used, mode)
        scores, tied = oracle.scores, oracle.tied_match
        want = _reference(model, outputs, next_state, mode)
        kept = torch.from_numpy(got["kept_stages"])
        if not np.array_equal(got["kept_stages"], want["kept_stages"]) and mode is not Selection.NONE:
            want |= {
                name: value
                for name, value in _reference(model, *oracle.run(image, state, used, mode, kept), mode).items()
                if name not in ("kept_stages", "tokens_kept")
            }
        counted = used[: budget_entries(model, mode)]
        sensitivity = partial(oracle.sensitivity, image, state, used, mode, kept)
        try:
            parity.frames.append(_compare(got, want, scores, counted, tolerance, tied, sensitivity))
        except ExportMismatchError as error:
            raise ExportMismatchError(f"frame {index}, budget {used}: {error}") from error
        state = next_state
    return parity


def _compare(
    got: dict[str, NDArray[np.generic]],
    want: dict[str, NDArray[np.generic]],
    scores: list[NDArray[np.float32]],
    budget: tuple[int, ...],
    tolerance: float,
    tied: bool,
    sensitivity: Callable[[], dict[str, float]],
) -> FrameParity:
    """One frame; where it differs, as much more is allowed as near-ties inside the network can explain."""
    try:
        return compare_frame(got, want, scores, budget, tolerance, tied)
    except ExportMismatchError:
        if not (explained := sensitivity()):
            raise
        return compare_frame(got, want, scores, budget, tolerance, tied, explained)


def named_state(model: PrunedHost, state: Any, mode: Selection) -> dict[str, NDArray[np.generic]]:
    """The state as a graph of this mode takes it, by input name."""
    return {state_name(field): getattr(state, field).numpy() for field in step_interface(model, mode).state}


def _reference(model: PrunedHost, outputs: Any, state: Any, mode: Selection) -> dict[str, NDArray[np.generic]]:
    """What the graph has to give: all outputs, and the part of the next state that the graph writes."""
    named = {name: value.numpy() for name, value in outputs._asdict().items()}
    carried = {state_name(field) for field in step_interface(model, mode).carried}
    return named | {f"next_{name}": value for name, value in named_state(model, state, mode).items() if name in carried}
