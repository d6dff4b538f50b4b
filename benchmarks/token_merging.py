"""Token merging in the vpp-eo host: what pruning without a video prior would be compared with.

The algorithm of ToMe (arXiv:2210.09461), written anew: in every block, between attention and MLP, the most similar
pairs of tokens become one, and attention weighs a token by the number of patches in it. Every patch is shown the token
that it went into, so that the mask head has a dense map. Queries are never merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.vit import Block
from models.vpp_eo import VppEo


@dataclass(frozen=True)
class Matching:
    """Which tokens become one; even and odd tokens are counted separately.

    Attributes:
        kept: Even tokens that stay on their own, int64 [B, E - r].
        merged: Even tokens that go into another, int64 [B, r].
        targets: The odd token that each of them goes into, int64 [B, r].
    """

    kept: Tensor
    merged: Tensor
    targets: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Sums of x [B, N, C] within each remaining token, [B, N - r, C]: kept even ones first, then the odd ones."""
        even, odd = x[:, ::2], x[:, 1::2]
        index = self.targets.unsqueeze(2).expand(-1, -1, x.shape[2])
        return torch.cat([_rows(even, self.kept), odd.scatter_add(1, index, _rows(even, self.merged))], dim=1)

    def places(self, tokens: int) -> Tensor:
        """The place of each of ``tokens`` tokens after :meth:`apply`, int64 [B, N]."""
        batch, kept = self.kept.shape
        odd = torch.arange(kept, kept + tokens // 2, device=self.kept.device).expand(batch, -1)
        own = torch.arange(kept, device=self.kept.device).expand(batch, -1)
        even = torch.zeros(batch, (tokens + 1) // 2, dtype=torch.int64, device=self.kept.device)
        even = even.scatter(1, self.kept, own).scatter(1, self.merged, kept + self.targets)
        both = torch.stack([even[:, : tokens // 2], odd], dim=2).flatten(1)
        return both if tokens % 2 == 0 else torch.cat([both, even[:, -1:]], dim=1)


def match(keys: Tensor, count: int) -> Matching:
    """Pair every even token with the odd one whose key is most similar (cosine), and merge the ``count`` best pairs.

    Args:
        keys: [B, N, d], mean over the heads.
        count: Tokens to merge, at most half of them.
    """
    keys = F.normalize(keys, dim=2)
    best, target = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=2)
    order = best.argsort(dim=1, descending=True) if not torch.compiler.is_exporting() else best.topk(best.shape[1])[1]
    merged = order[:, :count]
    return Matching(order[:, count:], merged, target.gather(1, merged))


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2]))


class MergingVppEo(nn.Module):
    """The dense network of a host, with tokens merged block by block.

    Args:
        host: Its weights are used as they are: ToMe needs no training.
        counts: Tokens to merge in each block.
    """

    def __init__(self, host: VppEo, counts: Sequence[int]) -> None:
        super().__init__()
        self.host, self.counts = host, tuple(counts)

    def forward(self, image: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 image [B, H, W, 3], queries [B, Q, C] -> class logits, mask logits, the next frame's queries."""
        host = self.host
        patches = host.embed(image)
        size = torch.ones_like(patches[..., :1])
        place = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[0], -1)
        for number, (block, count) in enumerate(zip(host.blocks, self.counts, strict=True)):
            joined = number >= host.config.query_block
            x = torch.cat([patches, queries], dim=1) if joined else patches
            x, keys = attend_by_size(block, x, size)
            patches, others = x[:, : patches.shape[1]], x[:, patches.shape[1] :]
            if count:
                matching = match(keys[:, : patches.shape[1]], count)
                place = matching.places(patches.shape[1]).gather(1, place)
                merged_size = matching.apply(size)
                patches, size = matching.apply(patches * size) / merged_size, merged_size
            x = torch.cat([patches, others], dim=1) if joined else patches
            x = x + block.mlp(block.norm2(x))
            patches, queries = x[:, : patches.shape[1]], x[:, patches.shape[1] :] if joined else queries
        class_logits, mask_logits = host.mask_head(_rows(patches, place), queries)
        return class_logits, mask_logits, host.next_queries(queries)


def attend_by_size(block: Block, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The attention half of a block, a token of s patches weighing as much as s tokens; and the keys' mean over heads.

    Args:
        x: Tokens [B, N, C], patches first; those after them count as one each.
        size: Patches in each of the first tokens, [B, P, 1].
    """
    attention = block.attn
    query, key, value = attention.qkv(block.norm1(x))  # [B, heads, N, d]
    weight = F.pad(size.squeeze(2).log(), (0, x.shape[1] - size.shape[1]))[:, None, None, :]
    if torch.compiler.is_exporting():  # written out, as the host's own attention is
        out = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3) + weight).softmax(-1) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=weight)
    return x + attention.proj(out.transpose(1, 2).flatten(2)), key.mean(1)


def counts_for(tokens: int, depth: int, permille: int) -> tuple[int, ...]:
    """Tokens to merge in each block: the same share, in thousandths, of those that are there; at most half of them.

    As published the same count is merged in every block, with which 12 blocks run out of tokens before they have saved
    two thirds of the work.

    >>> counts_for(100, 4, 100)
    (10, 9, 8, 7)
    """
    counts, left = [], tokens
    for _ in range(depth):
        counts.append(min(left * permille // 1000, left // 2))
        left -= counts[-1]
    return tuple(counts)


def counts_of_equal_work(host: VppEo, giga_macs: float) -> tuple[int, ...]:
    """The counts with which a step computes about as much as ``giga_macs``, and not less."""
    tokens, depth = host.patch_count, host.config.depth
    low, high = 0, 500
    while low < high:
        middle = (low + high + 1) // 2
        enough = merging_giga_macs(host, counts_for(tokens, depth, middle)) >= giga_macs
        low, high = (middle, high) if enough else (low, middle - 1)
    return counts_for(tokens, depth, low)


def merging_giga_macs(host: VppEo, counts: Sequence[int]) -> float:
    """Multiply-accumulates of one step, in 10^9, as :func:`models.macs.giga_macs` counts those of the host."""
    shapes = deepcopy(host).to("meta")  # operations are counted without running them
    image = torch.zeros(1, *host.config.image_size, 3, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        MergingVppEo(shapes, counts)(image, shapes.queries[None])
    return counter.get_total_flops() / 2 / 1e9
