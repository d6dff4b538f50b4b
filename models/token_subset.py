"""The patch tokens that are still computed, nested stage by stage, and the dense map they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.selection import gather_tokens, scatter_tokens


@dataclass(frozen=True)
class TokenSubset:
    """A nested choice of tokens; every method returns a new one.

    Attributes:
        tokens: The tokens still computed, [B, K, C], in the order of ``indices``.
        indices: Their places in the patch grid, int64 [B, K]; None while all N are there.
        dense: All tokens [B, N, C]; a token that was dropped keeps the value it had then.
        kept_stages: Selection stages that each token passed so far, int64 [B, N].
    """

    tokens: Tensor
    indices: Tensor | None
    dense: Tensor
    kept_stages: Tensor

    @classmethod
    def full(cls, tokens: Tensor) -> TokenSubset:
        """All tokens [B, N, C], before the first stage."""
        return cls(tokens, None, tokens, torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device))

    def keep(self, chosen: Tensor, stage: int) -> TokenSubset:
        """Go on with ``chosen``, int64 [B, K'], positions within ``tokens``; this is selection stage ``stage``."""
        indices = chosen if self.indices is None else gather_tokens(self.indices, chosen)
        return TokenSubset(
            tokens=gather_tokens(self.tokens, chosen),
            indices=indices,
            dense=self.merged(),
            kept_stages=scatter_tokens(self.kept_stages, indices, torch.full_like(indices, stage + 1)),
        )

    def updated(self, tokens: Tensor) -> TokenSubset:
        """The same places with new values [B, K, C]."""
        return replace(self, tokens=tokens)

    def merged(self) -> Tensor:
        """All tokens [B, N, C]: the computed ones, and the last value of each that was dropped."""
        return self.tokens if self.indices is None else scatter_tokens(self.dense, self.indices, self.tokens)
