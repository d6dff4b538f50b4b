"""Frames of a stream with what the fp32 network made of them, and how far another graph of it is from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from runtime.bundle import REFERENCE_FILE, Bundle
from runtime.reference import MASK_STRIDE

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Sample:
    """One frame: what goes into the graph, the state included, and what fp32 gave.

    Attributes:
        feeds: By input name.
        outputs: ``class_logits``, ``mask_logits`` at every ``MASK_STRIDE``-th row and column, and ``kept_stages``.
    """

    feeds: Arrays
    outputs: Arrays


def sample_of(feeds: Arrays, outputs: Arrays) -> Sample:
    """A sample of one step; the arrays are copied."""
    return Sample({name: np.array(value) for name, value in feeds.items()}, _compared(outputs))


def _compared(outputs: Arrays) -> dict[str, NDArray[np.generic]]:
    masks = outputs["mask_logits"][..., ::MASK_STRIDE, ::MASK_STRIDE]
    wanted = {"class_logits": outputs["class_logits"], "mask_logits": masks, "kept_stages": outputs["kept_stages"]}
    return {name: np.array(value) for name, value in wanted.items()}


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
        names = ("class_logits", "mask_logits", "kept_stages")
        samples.append(Sample(feeds, {name: arrays[f"{t}.output.{name}"] for name in names}))
    return samples


@dataclass(frozen=True)
class Deviation:
    """How far a graph is from the fp32 network over some samples, each starting from the state of the fp32 network.

    Attributes:
        errors: Of each output, root mean square of the difference over that of the output.
        overlap: By selection stage that chose among tokens: share of those it kept that both kept, in [0, 1].
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
    names = ["class_logits", "mask_logits", "kept_stages"]
    got = [_compared(dict(zip(names, session.run(names, dict(sample.feeds)), strict=True))) for sample in samples]
    want = [sample.outputs for sample in samples]
    errors = {name: _error([one[name] for one in got], [one[name] for one in want]) for name in names[:2]}
    return Deviation(errors, _overlap([one[names[2]] for one in got], [one[names[2]] for one in want]))


def _error(got: Sequence[NDArray[np.generic]], want: Sequence[NDArray[np.generic]]) -> float:
    noise = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(got, want, strict=True))
    signal = sum(float(np.square(b.astype(np.float64)).sum()) for b in want)
    return math.sqrt(noise / signal) if signal else math.sqrt(noise)


def _overlap(got: Sequence[NDArray[np.generic]], want: Sequence[NDArray[np.generic]]) -> dict[int, float]:
    shares = {}
    for stage in range(int(max(kept.max(initial=0) for kept in want))):
        both = kept = 0
        for one, other in zip(got, want, strict=True):
            if int((other > stage).sum()) < int((other >= stage).sum()):  # a stage that keeps all chooses nothing
                both += int(((one > stage) & (other > stage)).sum())
                kept += int((other > stage).sum())
        if kept:
            shares[stage] = both / kept
    return shares
