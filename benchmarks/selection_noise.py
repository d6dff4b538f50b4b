"""What Gumbel noise at inference does to accuracy: the published code decides with it, the exported graph does not.

    python -m benchmarks.selection_noise DATA CHECKPOINT --work build/accuracy --name shipped

DATA and the work folder are those of ``benchmarks.accuracy``, whose bundle and whose runs without noise are used. The
graph with noise draws anew at every frame; its rows are repeated, since each is another answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.accuracy import export_plain, prepared, run_row
from benchmarks.speed import machine
from export.onnx_graph import export_graph
from models.checkpoints import load_checkpoint
from models.pruned_host import MapSelector, Selection
from models.training.average_precision import paired_bootstrap
from models.training.evaluate import YouTubeVisSet
from models.training.sparse_step import GUMBEL_SCALE
from models.vpp_eo import State, VppEo
from runtime.bundle import file_sha256, load_bundle
from runtime.manifest import MANIFEST_FILE


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel draws, scaled as published; of uniform ones, since a graph has no exponential draws."""
    uniform = torch.rand_like(like).clamp(1e-20, 1.0 - 1e-7)
    return -(-uniform.log()).log() / GUMBEL_SCALE


class NoisyMapSelector(MapSelector):
    """Map-SM that takes the most similar token of noisy similarities."""

    def similarity(self, tokens: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """As :class:`MapSelector`, with noise."""
        logits = super().similarity(tokens, keys, bias)
        return logits + gumbel(logits)


class NoisyVppEo(VppEo):
    """The network with the published noise on every decision."""

    def stage_scores(self, stage: int, tokens: Tensor, state: State, token_budget: Tensor | None = None) -> Tensor:
        """As :class:`VppEo`; noise on both logits is the difference of two draws on their difference."""
        scores = super().stage_scores(stage, tokens, state, token_budget)
        return scores + gumbel(scores) - gumbel(scores)


def export_noisy(checkpoint: Path, target: Path) -> None:
    """A bundle whose graph decides with noise; that graph is not compared with anything."""
    export_plain(checkpoint, target)
    manifest = load_bundle(target).manifest
    quiet = load_checkpoint(checkpoint)
    noisy = NoisyVppEo(quiet.config).eval()
    noisy.map_selector.__class__ = NoisyMapSelector
    noisy.load_state_dict(quiet.state_dict())
    graph = target / manifest.graph.file
    export_graph(noisy, graph, Selection.BUDGET)
    changed = manifest.model_copy(update={"files": manifest.files | {graph.name: file_sha256(graph)}})
    (target / MANIFEST_FILE).write_text(changed.model_dump_json(indent=2) + "\n", encoding="utf-8")


def main(
    data: Annotated[Path, typer.Argument(help="Folder of models.training.validation.")],
    checkpoint: Annotated[Path, typer.Argument(help="A network that selects as published (vpp).")],
    name: Annotated[str, typer.Option(help="Its name in the work folder.")],
    work: Annotated[Path, typer.Option(help="Folder of benchmarks.accuracy.")] = Path("build/accuracy"),
    output: Annotated[Path, typer.Option(help="JSON to write.")] = Path("benchmarks/results/selection-noise.json"),
    keep_ratio: Annotated[list[float], typer.Option(help="May be given several times.")] = [0.55, 0.40],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Runs with noise at each keep ratio.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 1,
) -> None:
    """Run what is missing and write the differences."""
    quiet = prepared(checkpoint, work / name)
    noisy = prepared(checkpoint, work / f"{name}-noise", export_noisy)
    scenes = YouTubeVisSet(data, quiet.manifest.classes)
    rows: list[dict[str, Any]] = []
    for ratio in keep_ratio:
        path = work / name / f"{data.name}-{ratio}.row.json"
        without = scenes.evaluation(run_row(quiet, scenes, ratio, path, threads, lambda: None)["results"])
        for repeat in range(repeats):
            path = work / f"{name}-noise" / f"{data.name}-{ratio}-{repeat}.row.json"
            content = run_row(noisy, scenes, ratio, path, threads, lambda: None)
            evaluation = scenes.evaluation(content["results"])
            low, high = paired_bootstrap(evaluation, without, 500)
            difference = evaluation.scores().ap - without.scores().ap
            rows.append(
                {
                    "keep_ratio": ratio,
                    "AP_without": round(without.scores().ap, 2),
                    "AP_with": round(evaluation.scores().ap, 2),
                    "difference": [round(difference, 2), round(low, 2), round(high, 2)],
                }
            )
            print(rows[-1], flush=True)
    result = {"machine": machine(), "network": name, "data": data.name, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
