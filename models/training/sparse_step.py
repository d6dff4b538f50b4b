"""The step of :class:`models.vpp_eo.VppEo` in the form that trains: nothing is removed, masks do the selecting.

Pruned tokens are hidden as attention keys and keep their value: ``mask * block(x) + (1 - mask) * x``, with a
straight-through mask, so that the selectors receive gradients (Video Patch Pruning, arXiv:2604.00827). Without noise
the result equals the pruned network's; a test holds that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import selection
from models.selectors import Ranking
from models.vpp_eo import State, VppEo

GUMBEL_SCALE = 10.0  # logits enter the softmax as l + g / 10


@dataclass
class Trace:
    """What a training step saw on its way, for the losses.

    Attributes:
        predictions: (class logits, mask logits) after each block that carries queries, the last is the result.
        map_probability: Map-SM's soft keep probability [B, N]; None where no clip of the batch had a prior.
        stage_decisions: Straight-through two-logit decision [B, N] of each selective module.
        focus_scores: Score [B, N] that each predictor gives its tokens, Map-SM's at the prior block; features detached,
            so that the loss on it teaches the predictors and leaves the network alone.
        features: Final dense tokens [B, N, C], those that were dropped filled in as the network does.
    """

    predictions: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    map_probability: Tensor | None = None
    stage_decisions: list[Tensor] = field(default_factory=list)
    focus_scores: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None


def masked_step(
    model: VppEo,
    image: Tensor,
    state: State,
    token_budget: Tensor | None,
    *,
    noise: bool,
    task_gradient: bool = True,
) -> tuple[Trace, State]:
    """Run one frame of a batch of clips, each with its own budget.

    Args:
        image: uint8 [B, H, W, 3].
        state: The state that the frame before left.
        token_budget: int64 [B, stages]; None runs dense.
        noise: Add Gumbel noise to every decision.
        task_gradient: Let what follows a decision teach the selectors, straight through it, as published. Without it
            they learn from :attr:`Trace.focus_scores` alone.
    """
    config, trace = model.config, Trace()
    x, queries = model.embed(image), state.queries
    keys, keep_logits, kept = state.keys, state.keep_logits, state.kept
    mask: Tensor | None = None
    kept_stages = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    ranking = Ranking(None, None)
    selecting = token_budget is not None

    for number, block in enumerate(model.blocks):
        if selecting and number in config.stage_blocks:
            stage = config.stage_blocks.index(number)
            if stage == 0:
                keys, ranking = x, _ranking(model, x, state, token_budget)
            if stage >= config.first_stage:
                mask_before = mask
                with torch.set_grad_enabled(torch.is_grad_enabled() and task_gradient):
                    score = _score(model, stage, x, mask, state, ranking, trace, noise)
                    mask = _top_mask(score, ranking.refreshed, token_budget[:, stage], mask)
                if stage > 0 and ranking.scores is None:
                    trace.focus_scores.append(_predict(model, stage, x.detach(), mask_before, state))
            kept_stages = kept_stages + (1 if mask is None else (mask.detach() > 0.5).long())
        joined = number >= config.query_block
        x, queries = _masked_block(block, x, mask, queries if joined else None, queries)
        if number == config.prior_block and selecting and config.selector == "vpp":
            keep_logits, kept = model.map_selector.predictor(x), mask.detach() > 0.5
            trace.focus_scores.append(selection.keep_score(model.map_selector.predictor(x.detach())))
        if joined:
            others = model.instead_of_dropped(state, x, kept_stages) if selecting else None
            trace.features = _filled(x, mask, others)
            trace.predictions.append(model.mask_head(trace.features, queries))

    next_state = state._replace(queries=model.next_queries(queries))
    if selecting:
        next_state = next_state._replace(keys=keys, keep_logits=keep_logits, kept=kept, final=trace.features)
        next_state = model.next_memory(next_state, mask.detach() > 0.5, *trace.predictions[-1])
    return trace, next_state


def _filled(x: Tensor, mask: Tensor | None, others: Tensor | None) -> Tensor:
    """Features of dropped tokens replaced by ``others``, if there are any."""
    return x if mask is None or others is None else others + mask.unsqueeze(2) * (x - others)


def _ranking(model: VppEo, x: Tensor, state: State, token_budget: Tensor) -> Ranking:
    """As :meth:`models.vpp_eo.VppEo.ranking`, each clip with its own budget."""
    rows = [
        model.ranking(x[b : b + 1], state.map(lambda entry, b=b: entry[b : b + 1]), budget)
        for b, budget in enumerate(token_budget)
    ]
    parts = (tuple(getattr(row, name) for row in rows) for name in ("scores", "refreshed"))
    return Ranking(*(None if part[0] is None else torch.cat(part) for part in parts))


def _masked_block(block, x: Tensor, mask: Tensor | None, joined: Tensor | None, queries: Tensor):
    """One block over all patches, and over the queries if they have joined; pruned patches keep their value."""
    tokens = x if joined is None else torch.cat([x, joined], dim=1)
    key_mask = None
    if mask is not None:
        visible = mask.detach() > 0.5
        key_mask = visible if joined is None else torch.cat([visible, visible.new_ones(joined.shape[:2])], dim=1)
    result = block(tokens, key_mask)
    patches = result[:, : x.shape[1]]
    if mask is not None:
        patches = x + mask.unsqueeze(2) * (patches - x)
    return patches, queries if joined is None else result[:, x.shape[1] :]


def _score(
    model: VppEo,
    stage: int,
    x: Tensor,
    mask: Tensor | None,
    state: State,
    ranking: Ranking,
    trace: Trace,
    noise: bool,
) -> Tensor:
    """Ranking score [B, N] of one stage; of one that is learned the decision is noted, for the losses."""
    if ranking.scores is not None:
        return ranking.scores
    if stage == 0:
        association = _straight_through_argmax(model.map_selector.association(x, state), noise)
        plain = model.map_selector.smooth(selection.keep_score(association @ state.keep_logits))
        score = _with_noise(plain, noise)
        has_prior = state.kept.any(1)
        if has_prior.any():
            trace.map_probability = score[has_prior].sigmoid()
        return score

    score = _with_noise(_predict(model, stage, x, mask, state), noise)
    soft = score.sigmoid()
    trace.stage_decisions.append((score >= 0).to(soft.dtype) - soft.detach() + soft)
    return score


def _predict(model: VppEo, stage: int, x: Tensor, mask: Tensor | None, state: State) -> Tensor:
    """Score [B, N] of a stage after the first, of a selector that learns one."""
    if model.config.selector == "vpp":
        return model.stage_scores(stage, x, state)
    return model.selector.stage_scores(stage, x, mask)


def _straight_through_argmax(logits: Tensor, noise: bool) -> Tensor:
    """One-hot argmax of [B, N, N] with the gradient of the softmax; all-(-inf) rows give a zero gradient."""
    if noise:
        logits = logits - torch.empty_like(logits).exponential_().log() / GUMBEL_SCALE
    empty = torch.isinf(logits).all(2, keepdim=True)
    soft = torch.where(empty, 0.0, logits).softmax(2)
    hard = torch.zeros_like(soft).scatter_(2, logits.argmax(2, keepdim=True), 1.0)
    return torch.where(empty, hard, hard - soft.detach() + soft)


def _with_noise(score: Tensor, noise: bool) -> Tensor:
    """Add the difference of two Gumbel draws, scaled as published."""
    if not noise:
        return score
    draws = torch.empty(2, *score.shape, device=score.device).exponential_().log()
    return score + (draws[1] - draws[0]) / GUMBEL_SCALE


def _top_mask(score: Tensor, refreshed: Tensor | None, counts: Tensor, previous: Tensor | None) -> Tensor:
    """Straight-through mask [B, N] of the ``counts`` [B] highest scores among the tokens of ``previous``."""
    ranked = score if refreshed is None else score.masked_fill(refreshed, float("inf"))
    ranked = ranked if previous is None else ranked.masked_fill(previous.detach() < 0.5, float("-inf"))
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    rank = torch.zeros_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    hard = (rank < counts.unsqueeze(1)).to(score.dtype)
    soft = score.sigmoid()
    mask = hard - soft.detach() + soft
    return mask if previous is None else mask * previous
