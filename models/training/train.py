"""Train an encoder-only VPP network on a folder in YouTube-VIS layout.

Two stages, as in Video Patch Pruning (arXiv:2604.00827): ``dense`` learns the task without selection, ``sparse`` goes
on from it with a budget sampled for each clip, so that one checkpoint serves every budget.

    python -m models.training.train dense  --data DATA --output runs/dense --model vpp-eo-nano
    python -m models.training.train sparse --data DATA --output runs/sparse --init runs/dense/model.safetensors
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.checkpoints import load_checkpoint
from models.configs import LARGEST_REFRESH, PRUNED, SELECTOR_STATE, config_by_name
from models.training.recipe import Recipe, Stage
from models.training.trainer import Trainer
from models.training.youtube_vis import Batch, ClipDataset, YouTubeVis, collate
from models.vpp_eo import VppEo
from runtime.errors import CheckpointError, DeployError, SourceFormatError

SelectorName = Enum("SelectorName", {name: name for name in SELECTOR_STATE}, type=str)  # what the command offers
PrunedName = Enum("PrunedName", {name: name for name in PRUNED}, type=str)


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
