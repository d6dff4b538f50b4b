"""Every layer of a real graph finds its part, and costs agree with what torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.manifest import PartCost
from runtime.profiling.layers import Layer, LayerRow, measure_layers
from runtime.profiling.openvino_layers import OpenVinoLayerTimer
from runtime.profiling.part_table import parts_of_network
from runtime.profiling.parts import REST, group_of, part_of, parts_in_order

BLOCK_PARTS = {f"blocks.{number}.{part}" for number in range(12) for part in ("attn", "mlp", "norms")}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def layers(request, micro):
    manifest = micro.manifest
    rows = {"dense": LayerRow(manifest.baseline, None), "keep 0.40": LayerRow(manifest.graph, manifest.presets["0.40"])}
    return measure_layers(micro, rows, backend=request.param, threads=1, steps=2, warm_up=1)


def test_layers_of_a_real_graph_fall_into_all_parts(layers):
    """With the names of nodes that fusion replaced, too: every block of both graphs has its attention and its MLP."""
    shared = BLOCK_PARTS | {"patch_embed", "mask_head", "mask_head.upsample"}
    assert shared <= {layer.part for layer in layers["dense"]}
    own = {"map_selector", "map_selector.predictor", "token_moves", *(f"selectors.{stage}" for stage in range(3))}
    assert shared | own <= {layer.part for layer in layers["keep 0.40"]}
    assert not own & {layer.part for layer in layers["dense"]}


def test_products_are_in_the_parts_that_compute_them(layers):
    """Block by block as many matrix products as the network has; a fused GELU goes with its MLP."""
    for each in layers.values():
        for number in range(12):
            inside = {kind: [layer.op for layer in each if layer.part == f"blocks.{number}.{kind}"] for kind in BLOCK}
            products = [op for op in inside["mlp"] if op in ("MatMul", "FullyConnected")]
            assert len(products) == 2
            assert sum("Gelu" in op for op in inside["mlp"]) == 1
            assert not any("Gelu" in op or op == "MatMul" for op in inside["norms"])


BLOCK = ("attn", "mlp", "norms")


def test_layers_take_time_and_have_one_name_each(layers):
    for each in layers.values():
        names = [layer.name for layer in each]
        assert len(names) == len(set(names))
        assert all(layer.ms >= 0 for layer in each) and sum(layer.ms for layer in each) > 0


def test_openvino_steps_are_told_apart_and_budgets_too(micro):
    """Its counters are means over all steps of a graph; the steps of a budget have to sum to its own."""
    manifest = micro.manifest
    large, small = manifest.presets["1.00"], manifest.presets["0.40"]
    timer = OpenVinoLayerTimer(micro, manifest.graph, 1, "fp32")
    for budget in (large, large, small, large, small):
        timer.step(budget)
    counters = {budget: stream.counters() for budget, stream in timer.streams.items()}
    steps = timer.events()
    for budget, places in ((large, (0, 1, 3)), (small, (2, 4))):
        for layer, (name, _, mean_ms) in enumerate(counters[budget]):
            events = [steps[place][layer] for place in places]
            assert {event.name for event in events} == {name}
            assert sum(event.ms for event in events) == pytest.approx(len(places) * mean_ms, abs=0.002 * len(places))


def test_backend_without_a_timer_has_no_layers(micro):
    rows = {"dense": LayerRow(micro.manifest.baseline, None)}
    assert measure_layers(micro, rows, backend="abacus") == {}


def test_costs_in_the_bundle_sum_to_what_torch_counts(micro):
    """``giga_macs`` is counted by torch, ``part_costs`` from the shapes in the exported graph."""
    manifest = micro.manifest
    assert manifest.part_costs.keys() == manifest.giga_macs.keys() == {"dense", "0.40", "0.55", "0.70", "1.00"}
    for name, costs in manifest.part_costs.items():
        assert sum(cost.giga_macs for cost in costs) == pytest.approx(manifest.giga_macs[name], rel=0.01)
        assert all(cost.megabytes > 0 for cost in costs if cost.giga_macs > 0)


def test_block_costs_are_those_of_its_tokens(micro):
    """An MLP of width 48 and ratio 4: 8 C^2 multiply-accumulates a token; attention: 4 C^2 and 2 C for each pair."""
    manifest, width = micro.manifest, 48
    costs = {cost.part: cost.giga_macs * 1e9 for cost in manifest.part_costs["0.40"]}
    tokens = manifest.presets["0.40"][0]
    assert costs["blocks.1.mlp"] == pytest.approx(8 * width**2 * tokens, rel=1e-3)
    assert costs["blocks.1.attn"] == pytest.approx(4 * width**2 * tokens + 2 * width * tokens**2, rel=1e-3)
    assert costs["blocks.0.mlp"] == pytest.approx(8 * width**2 * 60, rel=1e-3)


def test_lost_time_sums_to_what_the_row_is_slower_than_promised(micro):
    def layer(part, ms):
        return Layer(f"{part}/x", "MatMul", part, ms)

    layers = {
        "dense": [layer("patch_embed", 4.0), layer("blocks.1.mlp", 16.0)],
        "keep 0.40": [layer("patch_embed", 4.0), layer("map_selector", 1.0), layer("blocks.1.mlp", 8.0)],
    }
    costs = {
        "dense": (_cost("patch_embed", 1.0), _cost("blocks.1.mlp", 9.0)),
        "0.40": (_cost("patch_embed", 1.0), _cost("blocks.1.mlp", 4.0)),
    }
    manifest = micro.manifest.model_copy(update={"part_costs": costs})
    parts = parts_of_network(manifest, {"dense": "dense", "keep 0.40": "0.40"}, layers)
    lost = {part.name: part.lost_ms["keep 0.40"] for part in parts}
    assert lost == {"patch embedding": 2.0, "Map-SM": 1.0, "blocks 1-2 MLP": 0.0}
    assert sum(lost.values()) == pytest.approx(13.0 - 20.0 * 5.0 / 10.0)
    assert sum(part.lost_ms["dense"] for part in parts) == pytest.approx(0.0)


def _cost(part, giga_macs):
    return PartCost(part=part, giga_macs=giga_macs, megabytes=1.0)


def test_a_layer_without_a_name_belongs_to_the_one_before():
    names = ["Squeeze_1", "blocks.0.mlp.fc1/MatMul", "BiasGelu", "blocks.0.mlp.fc2/MatMul"]
    assert parts_in_order(names) == [REST, "blocks.0.mlp", "blocks.0.mlp", "blocks.0.mlp"]


@given(number=st.integers(0, 11))
def test_groups_of_blocks_cover_each_block_once(number):
    group = group_of(part_of(f"blocks.{number}.attn.qkv/MatMul_3"), (1, 3, 6, 9), 12)
    first, _, last = group.removesuffix(" attention").split()[-1].partition("-")
    assert int(first) <= number <= int(last or first)


def test_no_path_of_the_exporting_machine_is_in_the_graph(micro):
    content = micro.path(micro.manifest.graph).read_bytes()
    assert b"stack_trace" not in content and b"export/onnx_graph.py" not in content


def test_older_manifest_without_part_costs_is_read(micro):
    older = micro.manifest.model_dump(mode="json") | {"schema_version": 2}
    del older["part_costs"]
    assert type(micro.manifest).model_validate(older).part_costs == {}
    assert replace(micro, manifest=type(micro.manifest).model_validate(older)).manifest.schema_version == 2
