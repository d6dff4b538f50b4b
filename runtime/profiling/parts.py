"""Parts of a network, read off the names that the export gave to the nodes of its graph.

A node is called ``MODULE/OPERATION``. Two sizes of parts are made of the module's path: the *part*, at most three
steps deep (``blocks.3.attn``), by which costs are kept in the manifest, and the *group* of parts (``blocks 3-5
attention``), the rows that people read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOVES = "token_moves"  # choosing, gathering and scattering of tokens by the network itself
REST = "step"  # what else it does outside its modules

_WORDS = {
    "patch_embed": "patch embedding",
    "map_selector": "Map-SM",
    "map_selector.predictor": "keep logits for the next frame",
    "selectors": "selective modules",
    "selector": "selector",
    MOVES: "gather and scatter",
    "mask_head": "mask head",
    "query_update": "next queries",
    REST: "rest",
}
_BLOCK_WORDS = {"attn": "attention", "mlp": "MLP"}


def part_of(node: str) -> str:
    """The part that a node belongs to; empty for a node without a module in its name.

    >>> part_of("blocks.3.attn.qkv/MatMul_29"), part_of("blocks.3/add_7"), part_of("mask_head.kernels.fc1/MatMul_1")
    ('blocks.3.attn', 'blocks.3.norms', 'mask_head.kernels')
    >>> part_of("selectors.0.mlp.fc1/MatMul"), part_of("BiasGelu_token_3")
    ('selectors.0', '')
    """
    if "/" not in node:
        return ""
    path = node.split("/")[0].split(".")
    if path[0] == "blocks" and len(path) > 1:
        inner = path[2] if len(path) > 2 and path[2] in _BLOCK_WORDS else "norms"
        return f"blocks.{path[1]}.{inner}"
    return ".".join(path[:2])


def parts_in_order(nodes: Iterable[str]) -> list[str]:
    """The part of each node of a run, in the order in which they ran.

    A node that a library put in the place of others has lost its name; it belongs to the part that ran just before.
    """
    parts, current = [], REST
    for node in nodes:
        current = part_of(node) or current
        parts.append(current)
    return parts


def group_of(part: str, stage_blocks: Sequence[int], depth: int) -> str:
    """The row of the table that a part goes into; blocks between two selection stages share theirs.

    >>> group_of("blocks.4.attn", (1, 3, 6, 9), 12), group_of("blocks.0.mlp", (1, 3, 6, 9), 12)
    ('blocks 3-5 attention', 'block 0 MLP')
    >>> group_of("mask_head.refine", (1, 3), 12), group_of("pixel_decoder.layers", (1, 3), 12)
    ('mask head', 'pixel decoder')
    """
    path = part.split(".")
    if path[0] != "blocks" or len(path) < 3:
        return _WORDS.get(part) or _WORDS.get(path[0]) or path[0].replace("_", " ")
    starts = [0, *stage_blocks, depth]
    first = max(start for start in starts if start <= int(path[1]))
    last = min(start for start in starts if start > int(path[1])) - 1
    blocks = f"block {first}" if first == last else f"blocks {first}-{last}"
    return f"{blocks} {_BLOCK_WORDS.get(path[2], 'norms and sums')}"
