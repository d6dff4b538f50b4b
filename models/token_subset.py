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

    def keep_all(self, stage: int) -> TokenSubset:
        """Selection stage ``stage``, before any token was dropped, drops none."""
        return replace(self, kept_stages=torch.full_like(self.kept_stages, stage + 1))

    def take(self, values: Tensor) -> Tensor:
        """The values [B, N] of the tokens that are still there, [B, K]."""
        return values if self.indices is None else gather_tokens(values, self.indices)

    def updated(self, tokens: Tensor) -> TokenSubset:
        """The same places with new values [B, K, C]."""
        return replace(self, tokens=tokens)

    def merged(self, others: Tensor | None = None) -> Tensor:
        """All tokens [B, N, C]: the computed ones, and of those that were dropped the last value, or ``others``."""
        if self.indices is None:
            return self.tokens
        return scatter_tokens(self.dense if others is None else others, self.indices, self.tokens)
