"""One training run: weights, optimiser, and what a step does."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.checkpoints import load_checkpoint, save_checkpoint
from models.training.clip_targets import ClipTargets
from models.training.losses import distillation_loss, focus_loss, pairwise_cost, ratio_loss, set_loss
from models.training.pixel_head import PixelHead
from models.training.recipe import Recipe, Stage
from models.training.sparse_step import Trace, masked_step
from models.training.youtube_vis import Batch, Target
from models.vpp_eo import State, VppEo
from runtime.budget import stage_ratios

PRESET_RATIOS = (0.55, 0.40)  # keep ratios that half of the clips train at, either by chance
RATIO_RANGE = (0.3, 1.0)  # the other half is spread evenly over these
SELECTORS = ("map_selector.", "selectors.", "selector.")  # beginnings of the names of what selects
SELECTOR_RATE = 5.0  # learning rate of the selectors over that of the network


class Trainer:
    """Weights, optimiser and step count of one run; saved and restored as one file."""

    def __init__(self, recipe: Recipe, model: VppEo, folder: Path) -> None:
        self.recipe, self.model, self.folder = recipe, model, folder
        self.pixel_head = PixelHead(model)
        self.teacher = (
            None if recipe.teacher is None else load_checkpoint(Path(recipe.teacher)).at_image_size(recipe.size)
        )
        self.optimiser = torch.optim.AdamW(self._parameter_groups(), lr=recipe.learning_rate, betas=(0.9, 0.99))
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        self.step = 0

    @property
    def result(self) -> VppEo:
        """The network with the weights that the checkpoint holds."""
        return self.averaged.module

    def _parameter_groups(self) -> list[dict]:
        named = [*self.model.named_parameters(), *self.pixel_head.named_parameters()]
        groups = {(decay, rate): [] for decay in (self.recipe.weight_decay, 0.0) for rate in (1.0, SELECTOR_RATE)}
        for name, parameter in named:
            decays = parameter.ndim > 1 and "pos_embed" not in name and name != "queries"
            rate = SELECTOR_RATE if name.startswith(SELECTORS) else 1.0
            groups[self.recipe.weight_decay if decays else 0.0, rate].append(parameter)
        return [{"params": each, "weight_decay": decay, "rate": rate} for (decay, rate), each in groups.items() if each]

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to 1 % of the peak."""
        recipe = self.recipe
        if self.step < recipe.warmup:
            return recipe.learning_rate * (self.step + 1) / recipe.warmup
        share = (self.step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share))))

    def save(self) -> None:
        """Write everything needed to go on, whole or not at all."""
        content = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "pixel_head": self.pixel_head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        partial = self.folder / ".resume.pt.partial"
        torch.save(content, partial)
        os.replace(partial, self.folder / "resume.pt")
        save_checkpoint(self.result, self.folder / "model.safetensors", notes={"steps": str(self.step)})

    def restore(self) -> bool:
        """Go on from ``resume.pt`` if there is one."""
        path = self.folder / "resume.pt"
        if not path.exists():
            return False
        content = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.averaged.load_state_dict(content["averaged"])
        self.pixel_head.load_state_dict(content["pixel_head"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.step = content["step"]
        return True

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimiser step on a batch of clips; returns the mean of each loss term."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)  # a resumed run draws what it would have drawn
        rate = self.learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimiser.zero_grad(set_to_none=True)
        learns = any(name.startswith(SELECTORS) for name, _ in self.model.named_parameters())
        selectors_alone = self.recipe.stage is Stage.SPARSE and learns and self.step < self.recipe.selector_steps
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not selectors_alone or name.startswith(SELECTORS))
        terms = self._clip_loss(batch["images"], batch["targets"], selectors_alone)
        moved = [p for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(moved, self.recipe.clip_norm)
        if torch.isfinite(norm):  # a broken step is skipped, not learned from
            self.optimiser.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return {**terms, "norm": float(norm)}

    def _clip_loss(self, images: Tensor, targets: list[Target], selectors_alone: bool) -> dict[str, float]:
        """Run the clips frame by frame and back-propagate every ``truncate`` frames."""
        recipe, model = self.recipe, self.model
        clips = [ClipTargets(target, len(model.config.classes)) for target in targets]
        ratios = [1.0] * len(clips) if selectors_alone else self._sample_ratios(len(clips))
        state = model.initial_state(len(clips))
        state = state._replace(queries=model.queries.expand(len(clips), -1, -1))
        taught = None if self.teacher is None else self.teacher.initial_state(len(clips))
        totals: dict[str, float] = {}
        pending: list[Tensor] = []
        for t in range(recipe.frames):
            budget = None if recipe.stage is Stage.DENSE else self._budgets(ratios, first=t == 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                trace, state = masked_step(
                    model, images[:, t], state, budget, noise=True, task_gradient=recipe.task_gradient
                )
                terms = self._selector_terms(trace, clips, t)
                terms |= {} if selectors_alone else self._frame_terms(trace, clips, t)
                if self.teacher is not None and not selectors_alone:
                    terms["distil"], taught = self._distil(trace, images[:, t], taught)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / recipe.frames
            pending.append(torch.stack(list(terms.values())).sum() / recipe.frames)
            if len(pending) == recipe.truncate or t == recipe.frames - 1:
                torch.stack(pending).sum().backward()
                pending, state = [], state.map(Tensor.detach)
        return totals

    def _distil(self, trace: Trace, image: Tensor, taught: State) -> tuple[Tensor, State]:
        """Distance to the dense network, and the state that it goes on from."""
        with torch.no_grad():
            wanted, taught = masked_step(self.teacher, image, taught, None, noise=False)
        loss = distillation_loss(*trace.predictions[-1], trace.features, (*wanted.predictions[-1], wanted.features))
        return self.recipe.distil_weight * loss, taught

    def _frame_terms(self, trace: Trace, clips: list[ClipTargets], t: int) -> dict[str, Tensor]:
        """Loss terms of one frame, averaged over the clips."""
        # unbound, not indexed: the gradient of an index is a tensor of the whole batch, one for each clip
        each = [tuple(zip(classes.float(), masks.float(), strict=True)) for classes, masks in trace.predictions]
        final = [self._match(*each[-1][b], clip, t) for b, clip in enumerate(clips)]
        predictions = [
            torch.stack(
                [
                    set_loss(classes, masks, queries, clip.labels[shown], clip.masks[shown, t])
                    for (classes, masks), clip, (shown, queries) in zip(block, clips, final, strict=True)
                ]
            ).mean()
            for block in each
        ]
        label_map = torch.stack([clip.label_maps[t] for clip in clips])
        centre_map = torch.stack([clip.centre_maps[t] for clip in clips])
        return {
            "set": predictions[-1],
            "deep": torch.stack(predictions[:-1]).mean(),
            "pixels": self.recipe.pixel_weight * self.pixel_head.loss(trace.features, label_map, centre_map),
        }

    def _selector_terms(self, trace: Trace, clips: list[ClipTargets], t: int) -> dict[str, Tensor]:
        """Loss terms of the selectors that learn, of one frame."""
        terms = {}
        if trace.focus_scores:
            patches = torch.stack([clip.object_patches[t] for clip in clips])
            terms["focus"] = self.recipe.focus_weight * focus_loss(trace.focus_scores, patches)
        if trace.stage_decisions and self.recipe.task_gradient:
            targets = list(stage_ratios(PRESET_RATIOS[0], self.model.config.first_stage)[1:])
            terms["ratio"] = ratio_loss(trace.map_probability, trace.stage_decisions, targets)
        return terms

    @staticmethod
    def _match(classes: Tensor, masks: Tensor, clip: ClipTargets, t: int) -> tuple[list[int], list[int]]:
        """(objects visible in frame t, the query of each); without those for which no query was free."""
        shown = clip.visible[:, t].nonzero().flatten().tolist()
        if not shown:
            return [], []
        with torch.no_grad():
            cost = pairwise_cost(classes, masks, clip.labels[shown], clip.masks[shown, t])
        matched = clip.identities.match(cost, shown)
        pairs = [(name, query) for name, query in zip(shown, matched, strict=True) if query is not None]
        return [name for name, _ in pairs], [query for _, query in pairs]

    def _sample_ratios(self, count: int) -> list[float]:
        rng = np.random.default_rng((self.recipe.seed, self.step))
        return [
            float(rng.choice(PRESET_RATIOS) if rng.random() < 0.5 else rng.uniform(*RATIO_RANGE)) for _ in range(count)
        ]

    def _budgets(self, ratios: list[float], *, first: bool) -> Tensor:
        rule = self.model.budget_rule
        budgets = [rule.for_ratio(ratio) for ratio in ratios]
        return torch.tensor([rule.at_reset(budget) if first else budget for budget in budgets])
