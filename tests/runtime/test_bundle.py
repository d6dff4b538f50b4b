"""A bundle on disk: nothing is loaded that the manifest does not vouch for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import file_sha256, load_bundle
from runtime.errors import BundleError, BundleIntegrityError, BundleSchemaError, DeployError
from runtime.manifest import SCHEMA_VERSION

FILES = ["dense.onnx", "initial_state.npz", "model.onnx", "reference.npz"]


@pytest.fixture
def copy(changed_bundle) -> Path:
    return changed_bundle()


def test_bundle_says_what_it_is(micro_bundle):
    bundle = load_bundle(micro_bundle)
    assert (
        sorted(bundle.manifest.files) == FILES == sorted(p.name for p in micro_bundle.iterdir() if p.suffix != ".json")
    )
    assert bundle.path(bundle.manifest.graph) == micro_bundle / "model.onnx"
    queries = bundle.initial_row(bundle.manifest.graph, "prior.queries")
    assert queries is not None and ("batch", *queries.shape) == bundle.manifest.graph.input("prior.queries").shape
    assert bundle.initial_row(bundle.manifest.graph, "prior.keys") is None  # zeros


def test_copied_bundle_is_as_good(copy, micro_bundle):
    assert load_bundle(copy).manifest == load_bundle(micro_bundle).manifest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1], ids=["first", "middle", "last"])
def test_one_changed_byte_is_found(copy, name, place):
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data)) if place == 0.5 else place] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=rf"{name} has changed: .*SHA-256.*Copy the bundle again"):
        load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, -1], ids=["empty", "one byte less"])
def test_truncated_file_is_found(copy, name, left):
    (copy / name).write_bytes((copy / name).read_bytes()[:left])
    with pytest.raises(BundleIntegrityError, match=f"{name} has changed"):
        load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_found(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleIntegrityError, match=f"{name} is missing from the bundle"):
        load_bundle(copy)


def test_folder_in_place_of_a_file_is_found(copy):
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    with pytest.raises(BundleIntegrityError, match=r"model\.onnx is missing"):
        load_bundle(copy)


def test_no_bundle_says_how_to_make_one(copy, tmp_path):
    with pytest.raises(BundleError, match=r"nowhere is not there, so it is no bundle.*deploy\.py export"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is not there"):
        load_bundle(copy / "model.onnx")
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not text"),
        (b"[]", "is not a valid manifest"),
        (b"null", "is not a valid manifest"),
        (b"{}", "presets: Field required"),
    ],
)
def test_manifest_that_is_none(copy, content, message):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=message):
        load_bundle(copy)


def test_manifest_cut_anywhere_is_refused(copy):
    data = (copy / "manifest.json").read_bytes().rstrip()
    for length in range(0, len(data), max(1, len(data) // 50)):
        (copy / "manifest.json").write_bytes(data[:length])
        with pytest.raises(BundleIntegrityError):
            load_bundle(copy)


def test_unknown_field_is_named(changed_bundle):
    with pytest.raises(BundleIntegrityError, match="frobnication: Extra inputs are not permitted"):
        load_bundle(changed_bundle(frobnication=3))


def test_newer_schema_says_what_to_do(changed_bundle):
    """Even where the newer manifest has fields that this version has never heard of."""
    newer = rf"schema version {SCHEMA_VERSION + 1}, this program reads up to {SCHEMA_VERSION}.*Update the program"
    with pytest.raises(BundleSchemaError, match=newer):
        load_bundle(changed_bundle(schema_version=SCHEMA_VERSION + 1, frobnication=3))


def test_every_refusal_ends_the_program_with_2():
    assert {BundleError.exit_code, BundleIntegrityError.exit_code, BundleSchemaError.exit_code} == {2}
    assert issubclass(BundleError, DeployError)


def test_initial_state_without_a_hash_is_not_read(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["initial_state.npz"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        BundleIntegrityError, match=r"prior\.queries of model\.onnx starts from initial_state\.npz.*nothing"
    ):
        load_bundle(copy)


@pytest.mark.parametrize(
    "arrays", [{}, {"prior.queries": np.zeros((3, 48), np.float32)}, {"prior.queries": np.zeros((8, 48))}]
)
def test_initial_state_that_does_not_fit_is_refused(changed_bundle, arrays):
    folder = changed_bundle()
    np.savez(folder / "initial_state.npz", **arrays)
    with pytest.raises(BundleIntegrityError, match=r"prior\.queries of model\.onnx.*instead of float32 \[8, 48\]"):
        load_bundle(changed_bundle.rehash(folder))


def test_additional_files_are_left_alone(copy):
    (copy / "notes.txt").write_text("engines and calibration tables come beside the files of the export")
    shutil.copytree(copy, copy / "engines")
    load_bundle(copy)


def test_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
