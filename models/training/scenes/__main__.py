"""The command that renders scenes; see :mod:`models.training.scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from models.training.scenes.config import SceneConfig
from models.training.scenes.files import write_youtube_vis
from runtime.errors import SinkError


def main(
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    clips: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of clips.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 36,
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of a frame: 16 to 4096 pixels.")] = (288, 512),
    radius: Annotated[
        tuple[float, float], typer.Option(help="Radius of the smallest and the largest object, in frame heights.")
    ] = (0.05, 0.17),
    shared_texture: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that an object looks like something in the background.")
    ] = 0.6,
    typical_texture: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that any other object has the texture typical of its class.")
    ] = 0.0,
    furniture: Annotated[int, typer.Option(min=0, max=1000, help="Most unlabelled things in the background.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Clip i is drawn from seed x 1000000 + i.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 1,
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEG files.")] = 92,
) -> None:
    """Render moving scenes with exact masks, in the layout of YouTube-VIS.

    Example: python -m models.training.scenes data/scenes --clips 64 --frames 36 --size 288 512 --workers 2
    """
    seeds = range(seed * 1_000_000, seed * 1_000_000 + clips)
    try:
        config = SceneConfig(
            height=size[0],
            width=size[1],
            frames=frames,
            smallest_radius=radius[0],
            largest_radius=radius[1],
            shared_texture_probability=shared_texture,
            typical_texture_probability=typical_texture,
            max_furniture=furniture,
        )
        write_youtube_vis(output, config, seeds, workers=workers, jpeg_quality=jpeg_quality)
    except SinkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
