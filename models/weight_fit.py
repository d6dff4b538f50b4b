"""Whether the tensors of a file are those of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from runtime.errors import CheckpointError


def check_fit(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], optional: tuple[str, ...] = ()
) -> None:
    """Compare names and shapes.

    Args:
        expected: The network's state dict.
        found: The file's, under the network's names.
        optional: Beginnings of names that the file may lack.

    Raises:
        CheckpointError: Tensors are missing, extra or of another shape; all are listed.
    """
    problems = {
        "missing": sorted(name for name in expected.keys() - found.keys() if not name.startswith(optional)),
        "not part of the model": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name}: {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape
        ],
    }
    lines = [f"  {len(names)} {kind}:\n    " + "\n    ".join(names) for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError(f"the weights of {path} do not fit the model:\n" + "\n".join(lines))
