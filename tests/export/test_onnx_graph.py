"""What the exported file is, read with onnx, and what it computes, against torch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from export.check import Oracle
from export.onnx_graph import export_graph, state_name, step_interface
from export.reference import synthetic_frames
from models.configs import config_by_name
from models.pruned_host import Selection
from models.vpp_eo import State, VppEo
from runtime.backend import load_engine
from runtime.budget import reset_budget
from runtime.bundle import load_bundle
from runtime.manifest import GraphSpec
from runtime.parity import count_near_ties, relative_difference

torch.set_num_threads(1)  # 60 tokens: more threads only wait for each other

PATCHES, STAGES = 60, 4
LARGE_SIZE, LARGE_PATCHES = (320, 480), 600
TOLERANCE = 1e-4
BATCHES = 4
DTYPES = {
    "uint8": onnx.TensorProto.UINT8,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
    "float32": onnx.TensorProto.FLOAT,
}
SEEDS = [0, 5, 6, 9]

budgets = st.lists(st.integers(1, PATCHES), min_size=STAGES, max_size=STAGES).map(lambda c: sorted(c, reverse=True))


@pytest.fixture(scope="module")
def bundle(micro_bundle):
    return load_bundle(micro_bundle)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[onnx.ModelProto, GraphSpec]:
    """A budget graph with a grid of 20 x 30 patches."""
    torch.manual_seed(0)
    model = VppEo(replace(config_by_name("vpp-eo-micro"), image_size=LARGE_SIZE)).eval()
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    level = logging.getLogger("torch.onnx").level
    spec = export_graph(model, path, Selection.BUDGET)
    logging.getLogger("torch.onnx").setLevel(level)
    return onnx.load(path), spec


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of every graph within them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from all_nodes(inner)


def constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in all_nodes(model.graph):
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def ancestors(graph: onnx.GraphProto, name: str) -> set[str]:
    """Names of all tensors that ``name`` is computed from."""
    makers = {output: node for node in graph.node for output in node.output}
    found, open_names = set(), [name]
    while open_names:
        current = open_names.pop()
        if current and current not in found:
            found.add(current)
            open_names += makers[current].input if current in makers else []
    return found


def images(seed: int, count: int) -> list[np.ndarray]:
    return list(synthetic_frames((96, 160), count, seed))


# What is in the file


@pytest.mark.slow
def test_budget_graph_has_no_forbidden_operator(large):
    model, _ = large
    nodes = list(all_nodes(model.graph))
    operators = {node.op_type for node in nodes}
    forbidden = {"NonZero", "Multinomial", "Bernoulli", "Dropout", "Loop", "If", "Scan", "Compress", "Unique"}
    assert not operators & forbidden
    assert not [operator for operator in operators if operator.startswith("Random")]
    assert {node.domain for node in nodes} <= {"", "ai.onnx"} and not model.functions, "standard operators alone"
    scatters = [node for node in nodes if node.op_type.startswith("Scatter")]
    assert scatters, "the selection scatters: this test looked for the wrong name"
    for node in scatters:
        reductions = [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "reduction"]
        assert set(reductions) <= {b"none"}, node.name


@pytest.mark.slow
def test_budget_graph_stores_nothing_of_size_n_by_n(large):
    model, _ = large
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in constants(model)}
    largest = max(sizes, key=sizes.__getitem__)
    assert sizes[largest] < LARGE_PATCHES**2 / 4, f"{largest} has {sizes[largest]} values"
    assert any(size == LARGE_PATCHES * 48 for size in sizes.values()), "the position embedding: the sizes are right"


@pytest.mark.slow
def test_each_top_k_takes_its_k_from_the_budget(large):
    model, _ = large
    top_ks = [node for node in all_nodes(model.graph) if node.op_type == "TopK"]
    assert len(top_ks) == STAGES + 1, "one more finds the keys that Map-SM compares with"
    for node in top_ks:
        assert "token_budget" in ancestors(model.graph, node.input[1]), node.name
        assert "image" not in ancestors(model.graph, node.input[1]), "K comes from the data"


@pytest.mark.parametrize("which", ["budget", "dense"])
def test_names_dtypes_and_axes_are_those_of_the_manifest(bundle, which):
    spec = bundle.manifest.graph if which == "budget" else bundle.manifest.baseline
    graph = onnx.load(bundle.path(spec)).graph
    assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
    assert [value.name for value in graph.output] == [tensor.name for tensor in spec.outputs]
    batch_names = set()
    for value, tensor in zip([*graph.input, *graph.output], [*spec.inputs, *spec.outputs], strict=True):
        kind = value.type.tensor_type
        assert kind.elem_type == DTYPES[tensor.dtype], value.name
        axes = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
        assert len(axes) == len(tensor.shape), value.name
        for axis, expected in zip(axes, tensor.shape, strict=True):
            if expected == "batch":
                assert isinstance(axis, str), f"{value.name} has a fixed batch"
                batch_names.add(axis)
            else:
                assert axis == expected, value.name
    assert batch_names == {"batch"}, "all tensors share one batch axis"


def test_state_pairs_cover_all_state_inputs(bundle):
    graph = bundle.manifest.graph
    assert {pair.input: pair.output for pair in graph.state} == {
        f"prior.{name}": f"next_prior.{name}" for name in ("keys", "keep_logits", "kept", "queries")
    }
    assert [pair.input for pair in graph.state if pair.initial == "file"] == ["prior.queries"]


@pytest.mark.parametrize("which", ["budget", "dense", pytest.param("large", marks=pytest.mark.slow)])
def test_checker_and_shape_inference_pass(bundle, which, request):
    specs = {"budget": bundle.manifest.graph, "dense": bundle.manifest.baseline}
    model = request.getfixturevalue("large")[0] if which == "large" else onnx.load(bundle.path(specs[which]))
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    typed = {value.name for value in [*inferred.graph.value_info, *inferred.graph.output]}
    untyped = [node.name for node in inferred.graph.node if node.output[0] not in typed]
    assert not untyped
    assert [opset.version for opset in model.opset_import if not opset.domain] == [bundle.manifest.opset]


@pytest.mark.parametrize("which", ["budget", "dense"])
def test_weights_are_stored_as_they_are_used(bundle, which):
    """Whatever is made of weights alone was computed at export: INT8 needs stored matrices, and no start needs time."""
    graph = onnx.load(bundle.path({"budget": bundle.manifest.graph, "dense": bundle.manifest.baseline}[which])).graph
    stored = {tensor.name for tensor in graph.initializer} | {""}
    assert not [node.name for node in graph.node if node.input and stored.issuperset(node.input)]


def test_dense_graph_selects_nothing(bundle):
    graph = onnx.load(bundle.path(bundle.manifest.baseline)).graph
    operators = {node.op_type for node in all_nodes(graph)}
    assert not operators & {"TopK", "ArgMax", "NonZero", "Gather", "GatherND", "GatherElements", "Where", "Range"}
    assert not [operator for operator in operators if operator.startswith("Scatter")]
    assert not [value.name for value in graph.input if value.name == "token_budget"]


# One file, every budget, every batch


class Pair:
    """The exported graph and torch, stepped side by side; torch goes on from the graph's own state."""

    def __init__(self, engine, model: VppEo, batch: int) -> None:
        self.buffers = engine.open_stream(batch)
        self.oracle = Oracle(model)

    def step(self, frames: list[np.ndarray], budget: tuple[int, ...]) -> dict[str, np.ndarray]:
        """One frame of every stream; raises if the graph and torch disagree."""
        fields = self.oracle.model.state_fields(Selection.BUDGET)
        empty = State(None, None, None, None)
        state = empty._replace(**{name: torch.from_numpy(self.buffers.state()[state_name(name)]) for name in fields})
        self.buffers.image[:] = np.stack(frames)
        got = {name: value.copy() for name, value in self.buffers.run(budget).items()}
        self.buffers.commit()
        got |= {f"next_{name}": value for name, value in self.buffers.state().items()}
        image = torch.from_numpy(np.stack(frames))
        own, _ = self.oracle.run(image, state, budget, Selection.BUDGET)
        for row in range(len(frames)):
            scores = [stage[row] for stage in self.oracle.scores]
            kept = got["kept_stages"][row], own.kept_stages[row].numpy()
            count_near_ties(*kept, scores, budget, self.oracle.tied_match)
        forced = torch.from_numpy(got["kept_stages"])
        outputs, following = self.oracle.run(image, state, budget, Selection.BUDGET, forced)
        want = {name: value.numpy() for name, value in outputs._asdict().items()}
        want |= {f"next_{state_name(name)}": value.numpy() for name, value in following.tensors().items()}
        assert got.keys() == want.keys()
        for name, value in want.items():
            difference = relative_difference(got[name], value)
            assert difference <= (TOLERANCE if value.dtype == np.float32 else 0), f"{name} differs by {difference}"
        np.testing.assert_array_equal(got["tokens_kept"], [budget] * len(frames))
        return got


@pytest.fixture(scope="module")
def pairs(bundle, micro_model) -> dict[int, Pair]:
    engine = load_engine(bundle, threads=1)
    return {batch: Pair(engine, micro_model, batch) for batch in range(1, BATCHES + 1)}


@pytest.fixture(scope="module")
def clips() -> list[list[np.ndarray]]:
    return [images(seed, 2) for seed in SEEDS]


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(budgets, budgets, st.integers(1, BATCHES))
@example([PATCHES] * STAGES, [PATCHES] * STAGES, BATCHES)
@example([1] * STAGES, [1] * STAGES, BATCHES)
@example([PATCHES, 1, 1, 1], [1, 1, 1, 1], 1)
@example([PATCHES, PATCHES, PATCHES, 1], [PATCHES, PATCHES, 2, 2], 3)
def test_one_file_serves_every_budget_and_batch(pairs, clips, first, second, batch):
    """Two frames, each with a budget of its own: the prior of the first is chosen from by the second."""
    pair = pairs[batch]
    pair.buffers.reset()
    pair.step([clip[0] for clip in clips[:batch]], reset_budget(first, PATCHES))
    before = pair.buffers.state()
    got = pair.step([clip[1] for clip in clips[:batch]], tuple(second))
    assert before["prior.kept"].sum() == batch * first[1], "the first frame left the prior that its budget says"
    assert got["state_ok"].all()


def test_streams_of_a_batch_do_not_mix(pairs, clips):
    """What a stream gets in a batch of three is what it gets alone."""
    budget = (42, 32, 26, 20)
    for pair in pairs.values():
        pair.buffers.reset()
    together = [pairs[3].step([clip[t] for clip in clips[:3]], (PATCHES, *budget[1:])) for t in range(2)]
    for row in range(3):
        pairs[1].buffers.reset()
        for t in range(2):
            alone = pairs[1].step([clips[row][t]], (PATCHES, *budget[1:]))
            np.testing.assert_array_equal(alone["kept_stages"][0], together[t]["kept_stages"][row])
            assert relative_difference(alone["mask_logits"][0], together[t]["mask_logits"][row]) < TOLERANCE


# Threshold mode


def run_threshold(path: Path, model: VppEo, frames: list[np.ndarray], first: int):
    """The graph in ONNX Runtime and torch over some frames, each frame from torch's state: (got, want, scores) each."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    oracle, state = Oracle(model), model.initial_state(1)
    names = step_interface(model, Selection.THRESHOLD).output_names
    for t, frame in enumerate(frames):
        budget = (PATCHES if t == 0 else first,)
        feed = {"image": frame[None], "token_budget": np.array(budget)}
        feed |= {state_name(name): value.numpy() for name, value in state.tensors().items()}
        got = dict(zip(names, session.run(names, feed), strict=True))
        outputs, state = oracle.run(torch.from_numpy(frame)[None], state, budget, Selection.THRESHOLD)
        want = {name: value.numpy() for name, value in outputs._asdict().items()}
        want |= {f"next_{state_name(name)}": value.numpy() for name, value in state.tensors().items()}
        yield got, want, oracle


def test_threshold_counts_come_from_the_data_as_in_torch(threshold_bundle, micro_model):
    counts = []
    for got, want, oracle in run_threshold(threshold_bundle / "model.onnx", micro_model, images(3, 5), first=42):
        if not oracle.tied_match:
            count_near_ties(got["kept_stages"][0], want["kept_stages"][0], [s[0] for s in oracle.scores], (42,))
        np.testing.assert_array_equal(got["tokens_kept"], want["tokens_kept"])
        counts.append(tuple(got["tokens_kept"][0].tolist()))
    assert [count[0] for count in counts] == [PATCHES, 42, 42, 42, 42]
    assert len(set(counts[1:])) > 1, f"the counts do not depend on the data: {counts}"


@pytest.mark.parametrize("empty_stage", [1, 2, 3])
def test_a_stage_that_keeps_nothing_gives_finite_outputs(threshold_bundle, micro_model, tmp_path, empty_stage):
    """The drop logit of one selector is raised, in the graph and in torch alike."""
    graph = onnx.load(threshold_bundle / "model.onnx")
    decisions = [node for node in graph.graph.node if node.op_type == "GreaterOrEqual"]
    assert len(decisions) == STAGES - 1
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1e3, np.float32), "raised"))
    decisions[empty_stage - 1].input[1] = "raised"  # all-zero biases share one initializer, so not the bias itself
    onnx.save(graph, tmp_path / "model.onnx")
    model = copy.deepcopy(micro_model)
    with torch.no_grad():
        model.selectors[empty_stage - 1].mlp.fc2.bias.copy_(torch.tensor([0.0, 1e3]))
    for got, want, _ in run_threshold(tmp_path / "model.onnx", model, images(3, 2), first=42):
        assert got["tokens_kept"][0, empty_stage:].tolist() == [0] * (STAGES - empty_stage)
        assert got["tokens_kept"][0, empty_stage - 1] > 0, "an earlier stage kept nothing"
        np.testing.assert_array_equal(got["kept_stages"], want["kept_stages"])
        np.testing.assert_array_equal(got["state_ok"], [empty_stage > 1])  # the prior is taken after stage 1
        for tensor, value in want.items():
            assert np.isfinite(got[tensor]).all(), tensor
            assert relative_difference(got[tensor], value) <= TOLERANCE, tensor
