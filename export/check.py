"""Parity of an exported graph with torch, frame by frame.

Every frame starts from torch's state, so that rounding cannot pile up. What was kept is compared before values: where
the two choose differently, torch's scores tell whether it is a near-tie; the values are then compared with torch
running on the graph's own choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx_graph import STATE_NAMES, budget_entries, step_interface
from models.pruned_host import Outputs, Selection
from models.selection import gather_tokens
from models.token_subset import TokenSubset
from models.vpp_eo import State, VppEo
from runtime.backend import Engine
from runtime.budget import reset_budget
from runtime.errors import ExportMismatchError
from runtime.parity import TIE_MARGIN, FrameParity, compare_frame


class Oracle(VppEo):
    """The network in torch, that notes its scores and can be told which tokens to keep."""

    scores: list[NDArray[np.float32]]
    forced: Tensor | None = None  # kept_stages int64 [B, N]
    tied_match = False

    @classmethod
    def of(cls, model: VppEo) -> Oracle:
        """An oracle with the weights of ``model``."""
        oracle = cls(model.config)
        oracle.load_state_dict(model.state_dict())
        return oracle.eval()

    def run(
        self, image: Tensor, state: State, budget: tuple[int, ...], mode: Selection, forced: Tensor | None = None
    ) -> tuple[Outputs, State]:
        """One step; ``scores`` then holds, for each stage, the score of each token it chose from (others NaN)."""
        self.scores, self.forced = [], forced
        self.tied_match = mode is not Selection.NONE and self._has_tied_match(image, state)
        with torch.no_grad():
            return self(image, state, torch.tensor(budget), mode)

    def _has_tied_match(self, image: Tensor, state: State) -> bool:
        """Whether some token has two keys of the frame before that are equally similar, within the margin."""
        with torch.no_grad():
            tokens = self.blocks[0](self.embed(image)) if self.config.map_block == 1 else self.embed(image)
            best = self.map_selector.association(tokens, state).topk(2, dim=2).values
        gap, finite = best[..., 0] - best[..., 1], torch.isfinite(best).all(2)
        return bool((finite & (gap <= TIE_MARGIN * best[..., 0].abs().max())).any())

    def _choose(
        self, stage: int, subset: TokenSubset, state: State, token_budget: Tensor | None, mode: Selection
    ) -> Tensor:
        scores = self.stage_scores(stage, subset.tokens, state)
        dense = scores.new_full(subset.kept_stages.shape, float("nan"))
        self.scores.append(
            (scores if subset.indices is None else dense.scatter(1, subset.indices, scores)).numpy().astype(np.float32)
        )
        if self.forced is None:
            return super()._choose(stage, subset, state, token_budget, mode)
        stages = self.forced if subset.indices is None else gather_tokens(self.forced, subset.indices)
        return torch.stack([(row > stage).nonzero().flatten() for row in stages])


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
    model: VppEo,
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
    oracle, parity = Oracle.of(model), Parity()
    state = model.initial_state(1)
    buffers = engine.open_stream()
    for index, frame in enumerate(frames):
        used = reset_budget(budget, model.patch_count) if index == 0 else budget
        image = torch.from_numpy(frame)[None]
        buffers.set_state(_named(state, mode))
        buffers.image[0] = frame
        got = {name: np.array(value) for name, value in buffers.run(used).items()}
        buffers.commit()
        got |= {f"next_{name}": value for name, value in buffers.state().items()}
        outputs, next_state = oracle.run(image, state, used, mode)
        scores, tied = oracle.scores, oracle.tied_match
        want = _reference(outputs, next_state, mode)
        if not np.array_equal(got["kept_stages"], want["kept_stages"]) and mode is not Selection.NONE:
            forced = torch.from_numpy(got["kept_stages"])
            want |= {
                name: value
                for name, value in _reference(*oracle.run(image, state, used, mode, forced), mode).items()
                if name not in ("kept_stages", "tokens_kept")
            }
        counted = used[: budget_entries(model, mode)]
        try:
            parity.frames.append(compare_frame(got, want, scores, counted, tolerance, tied))
        except ExportMismatchError as error:
            raise ExportMismatchError(f"frame {index}, budget {used}: {error}") from error
        state = next_state
    return parity


def _named(state: State, mode: Selection) -> dict[str, NDArray[np.generic]]:
    return {STATE_NAMES[name]: getattr(state, name).numpy() for name in step_interface(mode).state}


def _reference(outputs: Outputs, state: State, mode: Selection) -> dict[str, NDArray[np.generic]]:
    named = {name: value.numpy() for name, value in outputs._asdict().items()}
    return named | {f"next_{name}": value for name, value in _named(state, mode).items()}
