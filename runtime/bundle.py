"""A bundle on disk: a folder whose files are what the manifest says they are."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError, BundleIntegrityError
from runtime.manifest import MANIFEST_FILE, GraphSpec, Manifest, parse_manifest

INITIAL_STATE_FILE = "initial_state.npz"
REFERENCE_FILE = "reference.npz"


@dataclass(frozen=True)
class Bundle:
    """An exported model whose files have been checked.

    Attributes:
        folder: Where it lies.
        manifest: What it says.
        initial_state: Tensors that streams start from, one row each, by input name.
    """

    folder: Path
    manifest: Manifest
    initial_state: dict[str, NDArray[np.generic]]

    def path(self, graph: GraphSpec) -> Path:
        """The file of a graph."""
        return self.folder / graph.file

    def initial_row(self, graph: GraphSpec, name: str) -> NDArray[np.generic] | None:
        """What a stream without a past feeds to state input ``name``, without the batch axis; None means zeros."""
        pair = next(pair for pair in graph.state if pair.input == name)
        return self.initial_state[name] if pair.initial == "file" else None


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file against its hash.

    Raises:
        BundleError: There is no bundle.
        BundleIntegrityError: A file is missing or has changed, or the manifest contradicts itself.
        BundleSchemaError: The manifest has a schema version that this program does not read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not there"
        raise BundleError(f"{folder} {what}, so it is no bundle. Make one: deploy.py export CHECKPOINT -o {folder}")
    try:
        manifest = parse_manifest(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise BundleIntegrityError(f"{path} is not text: {error}. Export the bundle again.") from error
    for name, expected in manifest.files.items():
        _check_file(folder / name, expected)
    initial_state = _read_arrays(folder / INITIAL_STATE_FILE) if INITIAL_STATE_FILE in manifest.files else {}
    for graph in (manifest.graph, manifest.baseline):
        if graph is not None:
            _check_initial_state(path, graph, initial_state)
    return Bundle(folder, manifest, initial_state)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise BundleIntegrityError(f"{path} is missing from the bundle. Copy it again, or export the bundle again.")
    found = file_sha256(path)
    if found != expected:
        raise BundleIntegrityError(
            f"{path} has changed: its SHA-256 is {found[:12]}..., the manifest says {expected[:12]}.... "
            "Copy the bundle again, or export it again."
        )


def _read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BundleIntegrityError(f"{path} cannot be read: {error}. Export the bundle again.") from error


def _check_initial_state(path: Path, graph: GraphSpec, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Every state that starts from a file has its row there."""
    for pair in graph.state:
        if pair.initial == "file":
            spec, row = graph.input(pair.input), arrays.get(pair.input)
            if row is None or (row.dtype.name, row.shape) != (spec.dtype, spec.shape_for(1)[1:]):
                got = "nothing" if row is None else f"{row.dtype} {list(row.shape)}"
                raise BundleIntegrityError(
                    f"{path}: {pair.input} of {graph.file} starts from {INITIAL_STATE_FILE}, which has {got} for it "
                    f"instead of {spec.dtype} {list(spec.shape[1:])}. Export the bundle again."
                )
