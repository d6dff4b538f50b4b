"""Train an encoder-only VPP network on a folder in YouTube-VIS layout.

Two stages, as in Video Patch Pruning (arXiv:2604.00827): ``dense`` learns the task without selection, ``sparse`` goes
on from it with a budget sampled for each clip, so that one checkpoint serves every budget.

    python -m models.training.train dense  --data DATA --output runs/dense --model vpp-eo-nano
    python -m models.training.train sparse --data DATA --output runs/sparse --init runs/dense/model.safetensors
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.checkpoints import load_checkpoint, save_checkpoint
from models.configs import LARGEST_REFRESH, PRUNED, SELECTOR_STATE, config_by_name
from models.training.losses import Identities, distillation_loss, focus_loss, pairwise_cost, ratio_loss, set_loss
from models.training.sparse_step import Trace, masked_step
from models.training.youtube_vis import Batch, ClipDataset, Target, YouTubeVis, collate
from models.vpp_eo import State, VppEo
from runtime.budget import stage_ratios
from runtime.errors import CheckpointError, DeployError, SourceFormatError

PRESET_RATIOS = (0.55, 0.40)  # keep ratios that half of the clips train at, either by chance
BACKGROUND_WEIGHT = 0.1  # of a background pixel in the auxiliary loss; most pixels are background
CENTRE_WEIGHT = 5.0  # of the distance to the object's centre in the auxiliary loss
SELECTORS = ("map_selector.", "selectors.", "selector.")  # beginnings of the names of what selects
PATCH = 16  # pixels, of every configuration
SELECTOR_RATE = 5.0  # learning rate of the selectors over that of the network
RATIO_RANGE = (0.3, 1.0)  # the other half is spread evenly over these


SelectorName = Enum("SelectorName", {name: name for name in SELECTOR_STATE}, type=str)  # what the command offers
PrunedName = Enum("PrunedName", {name: name for name in PRUNED}, type=str)


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


class PixelHead(nn.Module):
    """Class of each pixel at stride 8 and the way to its object's centre, from the final tokens.

    Speeds up learning from scratch, which set prediction alone makes slow; it is thrown away after training.
    """

    def __init__(self, model: VppEo) -> None:
        super().__init__()
        self.patch_grid = model.patch_grid
        self.classes = len(model.config.classes) + 1
        self.predict = nn.Linear(model.config.embed_dim, 4 * (self.classes + 2))

    def loss(self, tokens: Tensor, label_map: Tensor, centre_map: Tensor) -> Tensor:
        """Cross entropy, and distance to the centre in units of the frame height, of tokens [B, N, C].

        Args:
            label_map: Class index int64 [B, H / 8, W / 8]; the last is background.
            centre_map: Offset (x, y) from a pixel to the centre of its object, float [B, 2, H / 8, W / 8].
        """
        grid = self.predict(tokens).unflatten(-1, (-1, 2, 2)).unflatten(1, self.patch_grid)
        pixels = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).float()
        weight = torch.ones(self.classes)
        weight[-1] = BACKGROUND_WEIGHT
        classes, centres = pixels.split((self.classes, 2), dim=1)
        on_object = (label_map < self.classes - 1).unsqueeze(1)
        distance = ((centres - centre_map).abs() * on_object).sum() / on_object.sum().clamp(min=1)
        return F.cross_entropy(classes, label_map, weight) + CENTRE_WEIGHT * distance


class Clip:
    """The targets of one training clip: ``labels`` int64 [O], ``masks`` float [O, T, H / 4, W / 4]."""

    def __init__(self, target: Target, classes: int) -> None:
        masks = target["masks"].float()
        self.labels = target["labels"]
        self.masks = F.avg_pool2d(masks, 4) if len(masks) else masks.new_zeros(0, *masks.shape[1:2], 1, 1)
        self.visible = masks.flatten(2).any(2)  # [O, T]
        frames, height, width = masks.shape[1:]
        self.label_maps = torch.full((frames, height // 8, width // 8), classes)
        self.centre_maps = torch.zeros(frames, 2, height // 8, width // 8)
        for label, mask in zip(self.labels, masks, strict=True):
            small = F.avg_pool2d(mask, 8)
            self.label_maps[small > 0.5] = label
            self.centre_maps = torch.where((small > 0.5).unsqueeze(1), _to_centre(small), self.centre_maps)
        covered = masks.any(0) if len(masks) else masks.new_zeros(frames, height, width)
        self.object_patches = F.max_pool2d(covered.float().unsqueeze(1), PATCH).flatten(1) > 0  # [T, N]
        self.identities = Identities()


def _to_centre(mask: Tensor) -> Tensor:
    """Offset (x, y) of each pixel to the centre of mass of mask [T, h, w], in units of h: [T, 2, h, w]."""
    height, width = mask.shape[1:]
    place = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")) / height
    mass = mask.sum((1, 2)).clamp(min=1e-6)
    return torch.einsum("thw,chw->tc", mask, place)[:, :, None, None] / mass[:, None, None, None] - place


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
        clips = [Clip(target, len(model.config.classes)) for target in targets]
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

    def _frame_terms(self, trace: Trace, clips: list[Clip], t: int) -> dict[str, Tensor]:
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

    def _selector_terms(self, trace: Trace, clips: list[Clip], t: int) -> dict[str, Tensor]:
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
    def _match(classes: Tensor, masks: Tensor, clip: Clip, t: int) -> tuple[list[int], list[int]]:
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


def batches(dataset: ClipDataset, recipe: Recipe, first_step: int) -> Iterator[Batch]:
    """Endless batches, the same for the same seed and step, decoded ahead by a worker process."""
    per_epoch = max(1, len(dataset) // recipe.batch)
    first_epoch, done = divmod(first_step, per_epoch)
    for epoch in itertools.count(first_epoch):
        dataset.set_epoch(epoch)
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(dataset))
        yield from torch.utils.data.DataLoader(
            torch.utils.data.Subset(dataset, order.tolist()[done * recipe.batch : per_epoch * recipe.batch]),
            batch_size=recipe.batch, collate_fn=collate, num_workers=1, prefetch_factor=4,
        )  # fmt: skip
        done = 0


def train(recipe: Recipe, folder: Path, save_every_s: float = 120.0) -> VppEo:
    """Run a recipe to its end, going on from what ``folder`` holds; progress and losses go to ``log.jsonl`` there."""
    data = YouTubeVis(Path(recipe.data))
    model = _start(recipe, data.classes)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_recipe(recipe, folder)
    trainer = Trainer(recipe, model.train(), folder)
    if trainer.restore():
        typer.echo(f"going on from step {trainer.step}", err=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    dataset = ClipDataset(
        data, size=recipe.size, frames=recipe.frames, max_gap=recipe.max_gap, seed=recipe.seed, scale=recipe.zoom
    )
    if not len(dataset):
        raise SourceFormatError(f"{data.annotations} has no video with frames: there is nothing to train on.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    saved = started = time.monotonic()
    with Progress(*columns) as progress, (folder / "log.jsonl").open("a", buffering=1) as log:
        bar = progress.add_task(recipe.stage.value, total=recipe.steps, completed=trainer.step)
        missing = max(0, recipe.steps - trainer.step)  # 0 for a run that is done: it stays as it is
        for batch in itertools.islice(batches(dataset, recipe, trainer.step), missing):
            losses = trainer.update(batch)
            shown = {name: round(value, 4) for name, value in losses.items()}
            log.write(json.dumps({"step": trainer.step, "s": round(time.monotonic() - started, 1), **shown}) + "\n")
            progress.update(bar, completed=trainer.step, description=f"{recipe.stage.value} {shown}")
            if time.monotonic() - saved > save_every_s:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    return trainer.result


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with a run of another recipe; only its number of steps may change.

    Raises:
        CheckpointError: The folder holds a run that something else decided.
    """
    path = folder / "recipe.json"
    if not (folder / "resume.pt").exists() or not path.exists():
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(asdict(recipe)))
    other = [f"{name}: {before.get(name)} instead of {now[name]}" for name in now if before.get(name) != now[name]]
    if other := [line for line in other if not line.startswith("steps:")]:
        raise CheckpointError(
            f"{folder} holds a run with another recipe ({'; '.join(other)}). Choose another --output, or ask for the "
            "same recipe to go on with it."
        )


def _start(recipe: Recipe, classes: tuple[str, ...]) -> VppEo:
    torch.manual_seed(recipe.seed)
    if recipe.init is None:
        config = replace(config_by_name(recipe.model, classes), image_size=recipe.size)
        return VppEo(replace(config, selector=recipe.selector, pruned=recipe.pruned, refresh=recipe.refresh))
    model = load_checkpoint(Path(recipe.init))
    if model.config.classes != classes:
        raise CheckpointError(f"{recipe.init} knows the classes {model.config.classes}, the data has {classes}.")
    return model.at_image_size(recipe.size).with_selection(recipe.selector, recipe.pruned, recipe.refresh)


def main(
    stage: Annotated[Stage, typer.Argument(help="dense: learn the task; sparse: go on with selection.")],
    data: Annotated[Path, typer.Option(help="Folder in YouTube-VIS layout, e.g. of models.training.scenes.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on from it.")],
    model: Annotated[str, typer.Option(help="Configuration by name; --init overrides it.")] = "vpp-eo-nano",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Clips per step.")] = 4,
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of training crops, pixels.")] = (288, 512),
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip, in time order.")] = 3,
    truncate: Annotated[int, typer.Option(min=1, help="Frames that gradients flow through.")] = 3,
    max_gap: Annotated[int, typer.Option(min=1, help="Largest distance between two frames of a clip.")] = 2,
    zoom: Annotated[tuple[float, float], typer.Option(help="Range of the crop's zoom; 1 is the frame.")] = (0.8, 1.5),
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-4,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of linear warm-up.")] = 200,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.05,
    clip_norm: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    pixel_weight: Annotated[float, typer.Option(help="Weight of the auxiliary per-pixel loss.")] = 2.0,
    focus_weight: Annotated[float, typer.Option(help="Weight of the loss of the selectors against objects.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, clips and budgets.")] = 0,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where autocast allows.")] = True,
    selector: Annotated[SelectorName, typer.Option(help="What decides which patches are computed.")] = SelectorName.vpp,
    pruned: Annotated[
        PrunedName,
        typer.Option(
            help="What stands for a dropped token: its old value; that, moved by a small network; its final features "
            "of the frame before; or those where that saw no object."
        ),
    ] = PrunedName.stale,
    refresh: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_REFRESH, help="Percent of the last stage's tokens for the longest waiting."),
    ] = 0,
    teacher: Annotated[Path | None, typer.Option(help="Dense checkpoint that the sparse stage agrees with.")] = None,
    distil_weight: Annotated[float, typer.Option(help="Weight of that agreement.")] = 1.0,
    task_gradient: Annotated[
        bool, typer.Option(help="Teach the selectors through the task too, as published, and by the ratio loss.")
    ] = False,
    selector_steps: Annotated[
        int, typer.Option(min=0, help="First steps of the sparse stage, in which the selectors alone learn.")
    ] = 0,
    average: Annotated[
        float, typer.Option(min=0.0, max=0.9999, help="Decay per step of the weights' moving average; 0: none.")
    ] = 0.0,
) -> None:
    """Train on clips of a YouTube-VIS folder; resumable, and the same for the same seed."""
    recipe = Recipe(
        stage, str(data), model, steps, batch, size, frames, truncate, max_gap, zoom, learning_rate, warmup,
        weight_decay, clip_norm, pixel_weight, focus_weight, seed, bf16, None if init is None else str(init),
        selector.value, pruned.value, refresh, None if teacher is None else str(teacher), distil_weight, task_gradient,
        selector_steps, average,
    )  # fmt: skip
    try:
        train(recipe, output)
    except DeployError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    command = shlex.join(["python", "-m", "models.training.train", *sys.argv[1:]])
    typer.echo(f"{output / 'model.safetensors'} written by: {command}")


if __name__ == "__main__":
    typer.run(main)
