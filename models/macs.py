"""How much a step computes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.pruned_host import PrunedHost, Selection


def giga_macs(model: PrunedHost, budget: tuple[int, ...], mode: Selection = Selection.BUDGET) -> float:
    """Multiply-accumulates of one step with a prior, in 10^9: matrix products and convolutions, as torch counts them.

    Args:
        budget: Tokens kept at each stage; of no meaning for ``Selection.NONE``. In threshold mode the data decides
            after the first stage: count with ``BUDGET``.
    """
    height, width = model.config.image_size
    image = torch.full((1, height, width, 3), 128, dtype=torch.uint8)
    counts = None if mode is Selection.NONE else torch.tensor(budget)
    # With gradients on, attention is written out as two products; the counter does not know torch's fused operator.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(image, model.initial_state(1), counts, mode)
    return counter.get_total_flops() / 2 / 1e9
