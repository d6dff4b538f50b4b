"""What a built engine computes in: read back from it, and compared with what its graph asked for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

# The inspector writes types as part of a format ("Row major linear FP16"), in other words in other versions ("Half").
_WORDS = {
    "FP8": r"FP8|Float8|E4M3",
    "INT8": r"Int8",
    "BF16": r"BF16|BFloat16",
    "HALF": r"FP16|Half|Float16",
    "FLOAT": r"FP32|Float32|Float",
}
_PATTERNS = {name: re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])", re.I) for name, words in _WORDS.items()}
_NARROW = ("FP8", "INT8", "BF16", "HALF")


def layer_types(told: str) -> dict[str, int]:
    """Layers by the narrowest type among their outputs, from such an account.

    >>> layer_types('{"Layers": [{"Outputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16"}]}]}')
    {'HALF': 1}
    """
    layers = json.loads(told).get("Layers", [])
    found = (_narrowest(layer["Outputs"]) for layer in layers if isinstance(layer, dict) and layer.get("Outputs"))
    return dict(Counter(name for name in found if name is not None))


def differences(asked: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Narrow types that were asked for and are not found, or the other way round; fp32 is everywhere."""
    missing = [name for name in _NARROW if asked.get(name) and not found.get(name)]
    extra = [name for name in _NARROW if found.get(name) and not asked.get(name)]
    return [f"{name} was asked for in {asked[name]} layers and is in none" for name in missing] + [
        f"{name} is in {found[name]} layers and was not asked for" for name in extra
    ]


def _narrowest(outputs: list[dict[str, Any]]) -> str | None:
    words = " ; ".join(_type_words(outputs))
    return next((name for name, pattern in _PATTERNS.items() if pattern.search(words)), None)


def _type_words(outputs: list[dict[str, Any]]) -> Iterator[str]:
    for output in outputs:
        yield from (str(value) for key, value in output.items() if "type" in key.lower())
