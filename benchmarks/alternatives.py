"""What a user would pick instead: the same network dense or with merged tokens, through public packages.

    python -m benchmarks.alternatives

One run on one machine; all rows take turns. Weights are random: the time of a step depends on the token counts, not on
the values. ToMe merges as many tokens in each block as make its multiply-accumulates equal to those of our budget.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer

from benchmarks.speed import RESULTS, machine, random_bundle
from benchmarks.token_merging import MergingVppEo, counts_of_equal_work, merging_giga_macs
from models.checkpoints import load_host
from models.pruned_host import Selection
from models.vpp_eo import VppEo
from runtime.backend import load_engine
from runtime.bundle import Bundle
from runtime.openvino_core import openvino_core
from runtime.profiling.latency import Distribution, Task, measure_in_turn, stepper

PACKAGES = ("torch", "onnxruntime", "openvino")
RATIOS = ("0.55", "0.40")
PRECISIONS = ("fp32", "bf16")


def torch_task(network: Callable[[], Any]) -> Task:
    """A step in inference mode."""

    def step() -> None:
        with torch.inference_mode():
            network()

    return step


def onnxruntime_task(path: Path, inputs: dict[str, Any], threads: int) -> Task:
    """A session as the package's own documentation makes it, with the number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def openvino_task(path: Path, inputs: dict[str, Any], threads: int, precision: str) -> Task:
    """A compiled model with static shapes, as a user of the package would make it."""
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else precision,
    }
    core = openvino_core()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True)


def export_merging(network: MergingVppEo, inputs: dict[str, Any], path: Path) -> Path:
    """One ONNX file of a network that merges tokens; its counts are fixed."""
    arguments = tuple(torch.from_numpy(value) for value in inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            network.eval(), arguments, dynamo=True, opset_version=20, input_names=list(inputs), verbose=False
        )
    program.save(path, external_data=False)
    return path


def dense_rows(host: VppEo, bundle: Bundle, inputs: dict[str, Any], threads: int) -> Iterator[tuple[str, float, Task]]:
    """Name, GMACs and step of the dense network in every package."""
    macs = bundle.manifest.giga_macs["dense"]
    image = torch.from_numpy(inputs["image"])
    state = host.initial_state(1)
    yield "dense, torch eager", macs, torch_task(lambda: host(image, state, None, Selection.NONE))
    compiled = torch.compile(host)
    yield "dense, torch.compile", macs, torch_task(lambda: compiled(image, state, None, Selection.NONE))
    path = bundle.folder / "dense.onnx"
    yield "dense, onnxruntime", macs, onnxruntime_task(path, _named(inputs, "prior."), threads)
    for precision in PRECISIONS:
        task = openvino_task(path, _named(inputs, "prior."), threads, precision)
        yield f"dense, openvino {precision}", macs, task


def merging_rows(
    host: VppEo, bundle: Bundle, ratio: str, inputs: dict[str, Any], threads: int
) -> Iterator[tuple[str, float, Task]]:
    """The same with tokens merged, at the work of one of our budgets."""
    counts = counts_of_equal_work(host, bundle.manifest.giga_macs[ratio])
    network, macs = MergingVppEo(host, counts).eval(), merging_giga_macs(host, counts)
    arguments = [torch.from_numpy(value) for value in inputs.values()]
    yield f"ToMe at the work of {ratio}, torch eager", macs, torch_task(lambda: network(*arguments))
    path = export_merging(network, inputs, bundle.folder / f"tome-{ratio}.onnx")
    yield f"ToMe at the work of {ratio}, onnxruntime", macs, onnxruntime_task(path, inputs, threads)
    for precision in PRECISIONS:
        task = openvino_task(path, inputs, threads, precision)
        yield f"ToMe at the work of {ratio}, openvino {precision}", macs, task


def our_rows(bundle: Bundle, threads: int) -> Iterator[tuple[str, float, Task]]:
    """This project's runtime at its budgets; one engine serves all of them."""
    manifest = bundle.manifest
    for backend, precision in (("onnxruntime", None), *(("openvino", precision) for precision in PRECISIONS)):
        engine = load_engine(bundle, backend=backend, threads=threads, precision=precision)
        for ratio in RATIOS:
            task = stepper(engine, manifest.presets[ratio], manifest.budget_rule)
            yield f"ours {ratio}, {' '.join(filter(None, (backend, precision)))}", manifest.giga_macs[ratio], task


def _named(inputs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Inputs under the names of the bundle's graphs."""
    return {name if name == "image" else prefix + name: value for name, value in inputs.items()}


def compare(host: VppEo, bundle: Bundle, threads: int, steps: int, warm_up: int) -> list[dict[str, Any]]:
    """One entry for each row: its work, its times, and how much faster it is than the plain ONNX Runtime export."""
    rng = np.random.default_rng(0)
    queries = host.queries.detach().numpy()[None].copy()
    inputs = {"image": rng.integers(0, 256, (1, *host.config.image_size, 3), np.uint8), "queries": queries}
    rows = [*dense_rows(host, bundle, inputs, threads)]
    for ratio in RATIOS:
        rows += merging_rows(host, bundle, ratio, inputs, threads)
    rows += our_rows(bundle, threads)
    turns = measure_in_turn({name: task for name, _, task in rows}, steps, warm_up, lambda: None)
    base = float(np.median(turns.times_ms["dense, onnxruntime"]))
    return [_entry(name, macs, np.array(turns.times_ms[name]), base) for name, macs, _ in rows]


def _entry(name: str, macs: float, times: np.ndarray, base: float) -> dict[str, Any]:
    spread = Distribution.of(times)
    return {
        "name": name,
        "giga_macs": round(macs, 3),
        "p50_ms": spread.p50,
        "p10_ms": round(float(np.percentile(times, 10)), 3),
        "p90_ms": spread.p90,
        "speed_up": round(base / float(np.median(times)), 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | GMACs | p50 | p10 to p90 | speed-up |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['name']} | {row['giga_macs']:.1f} | {row['p50_ms']:.0f} ms | "
        f"{row['p10_ms']:.0f} to {row['p90_ms']:.0f} ms | {row['speed_up']:.2f}x |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one step.")] = 2,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps per row.")] = 30,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps per row before that.")] = 5,
    model: Annotated[str, typer.Option(help="Configuration.")] = "vpp-eo-tiny",
    size: Annotated[tuple[int, int], typer.Option(help="Height and width, pixels.")] = (544, 960),
    output: Annotated[Path | None, typer.Option(help="JSON to write; default: benchmarks/results.")] = None,
) -> None:
    """Measure, print the table, and write ``benchmarks/results/alternatives-MODEL.json``."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = random_bundle(model, size, folder)
        host = load_host(folder / f"{model}.safetensors", None).at_image_size(size).eval()
        rows = compare(host, bundle, threads, steps, warm_up)
    versions = {name: version(name) for name in PACKAGES}
    result = {
        "machine": machine() | {"threads": threads},
        "versions": versions,
        "model": model,
        "image_size": size,
        "steps": steps,
        "warm_up": warm_up,
        "base": "dense, onnxruntime",
        "rows": rows,
    }
    path = output or RESULTS / f"alternatives-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
