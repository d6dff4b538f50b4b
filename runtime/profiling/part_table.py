"""What each part of the network takes at each budget, and where a speed-up is lost against what its work promises."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.manifest import Manifest
from runtime.profiling.layers import Layer
from runtime.profiling.parts import group_of


@dataclass(frozen=True)
class Part:
    """One group of parts in every measured row.

    Attributes:
        name: In words.
        ms: Milliseconds, by row.
        giga_macs: Multiply-accumulates that the bundle states, in 10^9, by row; missing where it states none.
        megabytes: Bytes that the bundle states, in 10^6, by row; so too.
        lost_ms: By row: its milliseconds above what its multiply-accumulates would take at the mean rate of the whole
            dense network. Over all parts these sum to what the row is slower than promised.
    """

    name: str
    ms: dict[str, float]
    giga_macs: dict[str, float]
    megabytes: dict[str, float]
    lost_ms: dict[str, float]


def parts_of_network(
    manifest: Manifest, presets: Mapping[str, str], layers: Mapping[str, Sequence[Layer]]
) -> tuple[Part, ...]:
    """Layers and stated costs, by group, in the order in which the groups run.

    Args:
        presets: Of each row, the key of its costs in the manifest.
        layers: Of each row, as they ran.
    """

    def group(part: str) -> str:
        return group_of(part, manifest.stage_blocks, manifest.depth)

    ms = {row: _sums((group(layer.part), layer.ms) for layer in each) for row, each in layers.items()}
    costs = {row: manifest.part_costs.get(presets[row], ()) for row in layers}
    macs = {row: _sums((group(cost.part), cost.giga_macs) for cost in each) for row, each in costs.items()}
    moved = {row: _sums((group(cost.part), cost.megabytes) for cost in each) for row, each in costs.items()}
    rate = _dense_rate(ms, macs)
    return tuple(
        Part(
            name=name,
            ms={row: round(ms[row].get(name, 0.0), 3) for row in ms},
            giga_macs={row: round(macs[row].get(name, 0.0), 4) for row in macs if macs[row]},
            megabytes={row: round(moved[row].get(name, 0.0), 2) for row in moved if moved[row]},
            lost_ms={
                row: round(ms[row].get(name, 0.0) - macs[row].get(name, 0.0) * rate, 3)
                for row in ms
                if macs[row] and rate is not None
            },
        )
        for name in _in_order(group, layers)
    )


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, value in pairs:
        sums[name] += value
    return dict(sums)


def _dense_rate(ms: Mapping[str, Mapping[str, float]], macs: Mapping[str, Mapping[str, float]]) -> float | None:
    """Milliseconds for 10^9 multiply-accumulates in the dense network as a whole."""
    whole = sum(macs.get("dense", {}).values())
    return sum(ms["dense"].values()) / whole if whole else None


def _in_order(group: Callable[[str], str], layers: Mapping[str, Sequence[Layer]]) -> list[str]:
    """Groups by the place of their longest layer; small operations of a part may run long before the rest of it."""
    places: dict[str, tuple[float, float]] = {}
    for each in layers.values():
        for number, layer in enumerate(each):
            name, place = group(layer.part), (layer.ms, number / len(each))
            places[name] = max(places.get(name, place), place)
    return sorted(places, key=lambda name: places[name][1])
