"""The manifest: what is written is what is read, and nothing that contradicts itself is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import BundleIntegrityError, BundleSchemaError
from runtime.manifest import SCHEMA_VERSION, GraphSpec, Manifest, StatePair, TensorSpec, TrackerSettings, parse_manifest

PATH = Path("somewhere/manifest.json")
HASH = "0123456789abcdef" * 4


def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


EXAMPLE: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "task": "video-instance-segmentation",
    "classes": ["dog", "cat"],
    "image_size": [32, 64],
    "patch_size": 16,
    "patch_grid": [2, 4],
    "pad_value": [124, 116, 104],
    "normalisation": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "stages": 2,
    "depth": 6,
    "stage_blocks": [1, 4],
    "presets": {"0.55": [5, 3], "1.00": [8, 8]},
    "default_preset": "0.55",
    "graph": {
        "file": "model.onnx",
        "selection": "budget",
        "inputs": [
            tensor("image", "uint8", "batch", 32, 64, 3),
            tensor("prior.keys", "float32", "batch", 8, 4),
            tensor("token_budget", "int64", 2),
        ],
        "outputs": [tensor("kept", "int64", "batch", 8), tensor("next_prior.keys", "float32", "batch", 8, 4)],
        "state": [{"input": "prior.keys", "output": "next_prior.keys"}],
    },
    "baseline": None,
    "tracker": {"start_score": 0.5, "keep_score": 0.35, "patience": 5, "duplicate_iou": 0.6},
    "precision": "fp32",
    "opset": 20,
    "origin": {"model": "m", "checkpoint": "m.safetensors", "weights_sha256": HASH, "exported_with": {"torch": "2"}},
    "files": {"model.onnx": HASH},
}


def changed(**at: object) -> str:
    """The example as JSON with other values, ``changed(graph__file="x")`` for one further down."""
    content = copy.deepcopy(EXAMPLE)
    for path, value in at.items():
        *parents, last = path.split("__")
        target: Any = content
        for name in parents:
            target = target[int(name) if name.isdecimal() else name]
        if value is None:
            del target[last]
        else:
            target[int(last) if last.isdecimal() else last] = value
    return json.dumps(content)


# --- round trip -----------------------------------------------------------------------------------------------------

file_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,11}", fullmatch=True)
names = st.text(min_size=1, max_size=12)
unit = st.floats(0, 1)
sides = st.integers(1, 40)


@st.composite
def graphs(draw: Callable, image_size: tuple[int, int], file: str) -> GraphSpec:
    shape = ("batch", *draw(st.lists(sides, max_size=3)))
    dtype = draw(st.sampled_from(["bool", "int64", "float32", "float16"]))
    states = draw(st.lists(names.filter(lambda name: name not in ("image", "token_budget")), unique=True, max_size=4))
    image = TensorSpec(name="image", dtype="uint8", shape=("batch", *image_size, 3))
    return GraphSpec(
        file=file,
        selection=draw(st.sampled_from(["budget", "threshold", "none"])),
        inputs=(image, *(TensorSpec(name=name, dtype=dtype, shape=shape) for name in states)),
        outputs=tuple(TensorSpec(name=f"next_{name}", dtype=dtype, shape=shape) for name in states),
        state=tuple(
            StatePair(input=name, output=f"next_{name}", initial=draw(st.sampled_from(["zeros", "file"])))
            for name in states
        ),
    )


@st.composite
def manifests(draw: Callable) -> Manifest:
    rows, columns, patch, stages = draw(sides), draw(sides), draw(sides), draw(st.integers(1, 5))
    image_size = rows * patch, columns * patch
    budgets = st.lists(st.integers(1, rows * columns), min_size=stages, max_size=stages).map(
        lambda counts: tuple(sorted(counts, reverse=True))
    )
    presets = draw(st.dictionaries(names, budgets, min_size=1, max_size=4))
    triple = st.tuples(unit, unit, unit)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        task="video-instance-segmentation",
        classes=tuple(draw(st.lists(names, min_size=1, max_size=4))),
        image_size=image_size,
        patch_size=patch,
        patch_grid=(rows, columns),
        pad_value=draw(st.tuples(*[st.integers(0, 255)] * 3)),
        normalisation={"mean": draw(triple), "std": draw(triple)},
        stages=stages,
        depth=draw(st.integers(stages + 1, 12)),
        stage_blocks=tuple(range(1, stages + 1)),
        presets=presets,
        default_preset=draw(st.sampled_from(sorted(presets))),
        graph=draw(graphs(image_size, "model.onnx")),
        baseline=draw(st.none() | graphs(image_size, "dense.onnx")),
        tracker=TrackerSettings(
            start_score=draw(unit), keep_score=draw(unit), patience=draw(st.integers(0, 99)), duplicate_iou=0.6
        ),
        precision=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        opset=draw(st.integers(1, 30)),
        origin={"model": "m", "checkpoint": "c", "weights_sha256": HASH, "exported_with": {}},
        files={
            "model.onnx": HASH,
            "dense.onnx": HASH[::-1],
            **draw(st.dictionaries(file_names, st.just(HASH), max_size=2)),
        },
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifests())
def test_what_is_written_is_what_is_read(manifest):
    text = manifest.model_dump_json(indent=2)
    assert parse_manifest(text, PATH) == manifest
    assert parse_manifest(text, PATH).model_dump_json(indent=2) == text
    assert manifest.patch_count * manifest.patch_size**2 == manifest.image_size[0] * manifest.image_size[1]


@settings(deadline=None)
@given(
    st.sampled_from(sorted(EXAMPLE)),
    st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3),
)
def test_any_other_value_is_read_or_refused_with_the_field_named(field, value):
    text = json.dumps(EXAMPLE | {field: value})
    try:
        assert parse_manifest(text, PATH)
    except BundleSchemaError:
        assert field == "schema_version" and value > SCHEMA_VERSION
    except BundleIntegrityError as error:
        assert str(PATH) in str(error) and (field in str(error) or field.replace("_", " ") in str(error))


def test_example_is_good():
    manifest = parse_manifest(changed(), PATH)
    assert manifest.patch_count == 8
    assert manifest.graph.has_budget and manifest.graph.input("token_budget").shape == (2,)
    assert manifest.graph.input("prior.keys").shape_for(3) == (3, 8, 4)
    assert manifest.graph.state == (StatePair(input="prior.keys", output="next_prior.keys", update="graph"),)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"patch_grid": [2, 5]}, r"patch grid \(2, 5\) x patch size 16 is not the image size \(32, 64\)"),
        ({"patch_size": 0}, "patch_size: "),
        ({"image_size": [32]}, r"image_size"),
        ({"default_preset": "0.40"}, "default preset 0.40 is none of 0.55, 1.00"),
        ({"presets": {}}, "default preset 0.55 is none of"),
        ({"presets__0.55": [9, 3]}, r"preset 0.55: .*9 at stage 0, allowed is 1\.\.8"),
        ({"presets__0.55": [3, 5]}, "preset 0.55: .*nested"),
        ({"presets__1.00": [8]}, "preset 1.00: .*has 1 counts, the model selects at 2 stages"),
        ({"stages": 3}, "preset 0.55: .*3 stages"),
        ({"pad_value": [0, 0, 256]}, r"pad_value\.2"),
        ({"pad_value": [0, -1, 0]}, r"pad_value\.1"),
        ({"classes": []}, "classes: "),
        ({"classes": None}, "classes: Field required"),
        ({"task": "chess"}, "task: "),
        ({"precision": "int4"}, "precision: "),
        ({"tracker__start_score": 1.5}, r"tracker\.start_score: "),
        ({"tracker__patience": -1}, r"tracker\.patience: "),
        ({"files": {}}, "model.onnx has no hash under files"),
        ({"files__model.onnx": "abc"}, r"files\.model\.onnx"),
        ({"origin__weights_sha256": "xyz"}, r"origin\.weights_sha256"),
        ({"baseline": {**EXAMPLE["graph"], "file": "dense.onnx"}}, "dense.onnx has no hash"),
        ({"graph__file": "other.onnx"}, "other.onnx has no hash"),
        ({"graph__inputs__0__shape__1": 48}, r"model\.onnx has no input image that is uint8 \['batch', 32, 64, 3\]"),
        ({"graph__inputs__0__dtype": "float32"}, "no input image that is uint8"),
        ({"graph__inputs__1__shape__2": 5}, "graph: .*prior.keys -> next_prior.keys differs in dtype or shape"),
        ({"graph__outputs__1__dtype": "float16"}, "prior.keys -> next_prior.keys differs in dtype or shape"),
        (
            {"graph__inputs__1__name": "prior.values"},
            "prior.keys -> next_prior.keys names a tensor that the graph lacks",
        ),
        ({"graph__state__0__output": "keys"}, "prior.keys -> keys names a tensor that the graph lacks"),
        ({"graph__inputs__1__dtype": "complex64"}, r"graph\.inputs\.1\.dtype"),
        ({"graph__inputs__1__shape__1": 0}, r"graph\.inputs\.1\.shape\.1"),
        ({"graph__inputs__1__shape__1": "many"}, r"graph\.inputs\.1\.shape\.1"),
        ({"graph__selection": "random"}, r"graph\.selection"),
        ({"graph__state__0__update": "sometimes"}, r"graph\.state\.0\.update"),
        ({"stage_blocks": [1]}, r"stage_blocks \(1,\) are not 2 rising numbers below 6"),
        ({"stage_blocks": [4, 1]}, "rising numbers below 6"),
        ({"stage_blocks": [1, 6]}, "rising numbers below 6"),
        ({"giga_macs": {"dense": 0}}, r"giga_macs\.dense"),
        ({"first_stage": 1}, "preset 0.55: token budget 5,3: this network drops no token before stage 1"),
        ({"graph__colour": "red"}, r"graph\.colour: Extra inputs"),
        ({"schema_version": None}, "schema_version: Field required"),
        ({"schema_version": 0}, "schema_version: "),
        ({"schema_version": str(SCHEMA_VERSION + 1)}, "schema_version: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradiction_is_refused_with_the_field_named(at, message):
    with pytest.raises(BundleIntegrityError, match=message) as caught:
        parse_manifest(changed(**at), PATH)
    assert str(PATH) in str(caught.value) and "Export the bundle again" in str(caught.value)


def test_all_that_is_wrong_is_listed():
    with pytest.raises(BundleIntegrityError) as caught:
        parse_manifest(changed(precision="int4", classes=[], opset=None), PATH)
    for field in ("precision", "classes", "opset"):
        assert f"\n  {field}: " in str(caught.value)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_newer_schema_is_another_error(version):
    with pytest.raises(BundleSchemaError, match=f"schema version {version}, this program reads up to {SCHEMA_VERSION}"):
        parse_manifest(changed(schema_version=version, classes=None), PATH)


@pytest.mark.parametrize("text", ["", "{", "not json", "{'a': 1}", changed()[:-1]], ids=range(5))
def test_not_json(text):
    with pytest.raises(BundleIntegrityError, match="is not JSON"):
        parse_manifest(text, PATH)


def test_mean_share_counts_blocks():
    """Blocks 0 with all 8 tokens, 1 to 3 with 5 and 4 to 5 with 3."""
    assert parse_manifest(changed(), PATH).mean_share((5, 3)) == pytest.approx((8 + 3 * 5 + 2 * 3) / 48)


def test_budget_rule_is_the_bundles_own():
    rule = parse_manifest(changed(first_stage=1, reset_stages=2, presets={"0.55": [8, 3]}), PATH).budget_rule
    assert rule.at_reset((8, 3)) == (8, 8) and rule.smallest == (8, 1)


def test_manifest_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_manifest(changed(), PATH).opset = 3
