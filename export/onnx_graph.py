"""torch -> ONNX: one graph with the state and the token budget as inputs."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnxscript import optimizer
from torch import Tensor, nn

from export.node_names import name_by_module
from models.pruned_host import PrunedHost, Selection
from runtime.manifest import DType, GraphSpec, StatePair, TensorSpec

DEFAULT_OPSET = 20  # the first with Gelu as one operator; ONNX Runtime does not fuse the decomposed one from torch
_DTYPES: dict[torch.dtype, DType] = {
    torch.uint8: "uint8", torch.int64: "int64", torch.bool: "bool", torch.float32: "float32"
}  # fmt: skip


def state_name(field: str) -> str:
    """Name of the graph's input for a field of the state."""
    return f"prior.{field}"


@dataclass(frozen=True)
class StepInterface:
    """Which tensors a graph takes and gives, in order, for one host and one way of selecting.

    Attributes:
        state: Fields of the host's state that the graph takes.
        carried: Those of them that the graph also gives, for the next frame; the program around it writes the others.
        outputs: Fields of the host's outputs.
    """

    selection: Selection
    state: tuple[str, ...]
    carried: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        budget = [] if self.selection is Selection.NONE else ["token_budget"]
        return ["image", *map(state_name, self.state), *budget]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return [*self.outputs, *(f"next_{state_name(field)}" for field in self.carried)]


def step_interface(model: PrunedHost, selection: Selection) -> StepInterface:
    """The interface of a graph of this host that selects in this way."""
    state = model.state_fields(selection)
    carried = tuple(field for field in state if field not in model.host_state)
    return StepInterface(selection, state, carried, model.outputs_type._fields)


class GraphStep(nn.Module):
    """The step with flat inputs and outputs, as a graph has them."""

    def __init__(self, model: PrunedHost, interface: StepInterface) -> None:
        super().__init__()
        self.model, self.interface = model, interface
        self.initial = model.initial_state(1)  # for what this graph does not take

    def forward(
        self, image: Tensor, state: tuple[Tensor, ...], token_budget: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run one step; ``state`` holds the fields of the interface, in its order."""
        full = self.initial._replace(**dict(zip(self.interface.state, state, strict=True)))
        outputs, next_state = self.model(image, full, token_budget, self.interface.selection)
        return (*outputs, *(getattr(next_state, name) for name in self.interface.carried))


def export_graph(model: PrunedHost, path: Path, selection: Selection, opset: int = DEFAULT_OPSET) -> GraphSpec:
    """Write the step as one ONNX file with a dynamic batch and, in ``BUDGET`` mode, dynamic token counts.

    Args:
        model: For one image size, in evaluation mode.
        path: File to write.
        opset: ONNX operator set, 18 or later.

    Returns:
        The graph's tensors and state pairs.
    """
    interface = step_interface(model, selection)
    # a batch of one is taken for a constant; nonzero in THRESHOLD mode only knows a batch of one
    batch = 1 if selection is Selection.THRESHOLD else 2
    image, state, budget = example_inputs(model, interface, batch)
    batch_axis = None if selection is Selection.THRESHOLD else {0: torch.export.Dim("batch", min=1, max=64)}
    arguments = (image, state) if budget is None else (image, state, budget)  # the exporter counts a None as an input
    shapes = (batch_axis, tuple(batch_axis for _ in state), None)[: len(arguments)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        for name in ("torch.onnx", "onnx_ir", "onnxscript"):  # and so do they
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            GraphStep(model, interface).eval(),
            arguments,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=interface.input_names,
            output_names=interface.output_names,
            verbose=False,
        )
    optimizer.fold_constants(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    optimizer.remove_unused_nodes(program.model)
    name_by_module(program.model)
    program.save(path, external_data=False)
    return graph_spec(model, path.name, interface)


def example_inputs(model: PrunedHost, interface: StepInterface, batch: int) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """Inputs of one step, of the right shapes: a grey image, the initial state, half of the tokens."""
    height, width = model.config.image_size
    image = torch.full((batch, height, width, 3), 128, dtype=torch.uint8)
    initial = model.initial_state(batch)
    state = tuple(getattr(initial, name) for name in interface.state)
    budget = torch.full((budget_entries(model, interface.selection),), max(1, model.patch_count // 2))
    return image, state, None if interface.selection is Selection.NONE else budget


def budget_entries(model: PrunedHost, selection: Selection) -> int:
    """Length of the graph's ``token_budget``: in THRESHOLD mode only Map-SM counts its tokens."""
    return 1 if selection is Selection.THRESHOLD else model.config.stages


def graph_spec(model: PrunedHost, file: str, interface: StepInterface) -> GraphSpec:
    """Names, dtypes and shapes of a graph, read off one run of the model."""
    image, state, budget = example_inputs(model, interface, 1)
    step = GraphStep(model, interface)
    with torch.no_grad():
        results = step(image, state, budget)
    inputs = [image, *state, *([] if budget is None else [budget])]
    return GraphSpec(
        file=file,
        selection=interface.selection.value,
        inputs=tuple(_spec(*pair) for pair in zip(interface.input_names, inputs, strict=True)),
        outputs=tuple(_spec(*pair) for pair in zip(interface.output_names, results, strict=True)),
        state=tuple(_pair(model, field) for field in interface.state),
    )


def _pair(model: PrunedHost, field: str) -> StatePair:
    initial = "file" if field in initial_rows(model) else "zeros"
    if field in model.host_state:
        return StatePair(input=state_name(field), output=model.host_state[field], update="host", initial=initial)
    return StatePair(input=state_name(field), output=f"next_{state_name(field)}", initial=initial)


def initial_rows(model: PrunedHost) -> dict[str, Tensor]:
    """Fields of the state in which a new stream does not start from zeros, without the batch axis."""
    state = model.initial_state(1)._asdict()
    return {field: value[0] for field, value in state.items() if value is not None and value.any()}


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape = tuple(value.shape) if name == "token_budget" else ("batch", *value.shape[1:])
    return TensorSpec(name=name, dtype=_DTYPES[value.dtype], shape=shape)
