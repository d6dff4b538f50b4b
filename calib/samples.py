"""Frames of a stream with what the fp32 network made of them, and how far another graph of it is from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from runtime.agreement import Agreement, Limits
from runtime.bundle import REFERENCE_FILE, Bundle
from runtime.reference import MASK_STRIDE

COMPARED = ("class_logits", "mask_logits", "kept_stages", "tokens_kept")

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Sample:
    """One frame: what goes into the graph, the state included, and what fp32 gave.

    Attributes:
        feeds: By input name.
        outputs: Those of :data:`COMPARED`, ``mask_logits`` at every ``MASK_STRIDE``-th row and column.
    """

    feeds: Arrays
    outputs: Arrays


def sample_of(feeds: Arrays, outputs: Arrays) -> Sample:
    """A sample of one step; the arrays are copied."""
    return Sample({name: np.array(value) for name, value in feeds.items()}, _compared(outputs))


def _compared(outputs: Arrays) -> dict[str, NDArray[np.generic]]:
    masks = outputs["mask_logits"][..., ::MASK_STRIDE, ::MASK_STRIDE]
    return {name: np.array(masks if name == "mask_logits" else outputs[name]) for name in COMPARED}


def reference_samples(bundle: Bundle) -> list[Sample]:
    """The bundle's reference clip, with what torch made of it."""
    with np.load(bundle.folder / REFERENCE_FILE, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    spec = bundle.manifest.graph
    samples = []
    for t in range(int(arrays["frames"])):
        feeds = {"image": arrays[f"{t}.image"][None]}
        feeds |= {pair.input: arrays[f"{t}.state.{pair.input}"] for pair in spec.state}
        if spec.has_budget:
            feeds["token_budget"] = arrays[f"{t}.budget"][: spec.input("token_budget").shape_for(1)[0]]
        samples.append(Sample(feeds, {name: arrays[f"{t}.output.{name}"] for name in COMPARED}))
    return samples


@dataclass(frozen=True)
class Deviation:
    """How far a graph is from the fp32 network over some samples, each starting from the state of the fp32 network.

    Attributes:
        errors: Of each output, root mean square of the difference over that of the output.
        overlap: By selection stage that chose among tokens: share of those kept that both kept, in [0, 1].
    """

    errors: dict[str, float] = field(default_factory=dict)
    overlap: dict[int, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest error of an output; infinite where one is NaN."""
        return max((value if math.isfinite(value) else math.inf for value in self.errors.values()), default=0.0)

    @property
    def smallest_overlap(self) -> float:
        """Over the stages."""
        return min(self.overlap.values(), default=1.0)

    def reaches(self, limits: Limits) -> bool:
        """Whether it is as near as an engine of that precision has to be."""
        return self.error <= 10 ** (-limits.sqnr_db / 20) and self.smallest_overlap >= limits.overlap

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {100 * value:.2f} %" for name, value in self.errors.items())
        return f"error of {errors}; {100 * self.smallest_overlap:.1f} % of the same tokens"


def deviation(model: ModelProto, samples: Sequence[Sample], threads: int = 0) -> Deviation:
    """Run a graph on samples, on ONNX Runtime's CPU provider.

    Args:
        model: In fp32 operators and Q/DQ; a typed graph goes through :func:`export.typed_graph.rounded_graph` first.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer):
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # it fuses FP8 into an integer product
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = Agreement()
    for sample in samples:
        values = session.run(list(COMPARED), dict(sample.feeds))
        found.add(_compared(dict(zip(COMPARED, values, strict=True))), sample.outputs)
    errors = {name: 10 ** (-ratio / 20) for name, ratio in found.sqnr_db.items()}
    return Deviation(errors, found.overlap)
