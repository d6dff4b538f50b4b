"""The fixed validation scenes, on which defaults are chosen (seeds 0 to 2) and then stated once (seeds from 3 on).

    python -m models.training.validation data/validation
    python -m models.training.validation data/unseen --seed 3

The same seeds give the same files bit for bit, so the set is made where it is needed and not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from models.training.scenes import SceneConfig, write_youtube_vis
from runtime.errors import SinkError

CHOSEN_ON = (0, 1, 2)
CLIPS_CHOSEN_ON, CLIPS_UNSEEN = 24, 64  # of each seed
SCENES = SceneConfig(
    height=288,
    width=512,
    frames=36,
    smallest_radius=0.12,
    largest_radius=0.30,
    shared_texture_probability=0.1,
    typical_texture_probability=1.0,
    max_furniture=3,
)
LAST_SEED = 76  # training scenes have 300 and more, calibration 77
CLIP_STRIDE = 1_000_000  # clip i of seed s is drawn from s x this + i, as in models.training.scenes


def write_validation(folder: Path, seeds: Sequence[int] = CHOSEN_ON, *, workers: int = 1) -> None:
    """Write the clips of some seeds as one data set in YouTube-VIS layout.

    Raises:
        SinkError: The folder exists already, or cannot be written.
    """
    counts = {seed: CLIPS_CHOSEN_ON if seed in CHOSEN_ON else CLIPS_UNSEEN for seed in seeds}
    clips = [CLIP_STRIDE * seed + clip for seed, count in counts.items() for clip in range(count)]
    write_youtube_vis(folder, SCENES, clips, workers=workers)


def main(
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    seed: Annotated[list[int], typer.Option(min=0, max=LAST_SEED, help="Repeatable.")] = [*CHOSEN_ON],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 2,
) -> None:
    """Render the validation scenes: 24 clips of 36 frames each for seeds 0, 1 and 2, and 64 for every later one."""
    try:
        write_validation(output, seed, workers=workers)
    except SinkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
