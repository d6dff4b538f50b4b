"""A profile as tables of text, for the terminal and for the report."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.profiling.part_table import Part
from runtime.profiling.profile import LatencyRow, Profile

Row = tuple[str, ...]
SMALL_MS = 0.05  # parts below this in every row are left out of the table; the JSON has them


@dataclass(frozen=True)
class Table:
    """Columns, rows, and what to read them by."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""


def tables(profile: Profile) -> list[Table]:
    """All tables that have something to say."""
    made = [latency_table(profile), work_table(profile), stage_table(profile), part_table(profile), rate_table(profile)]
    return [table for table in [*made, device_table(profile)] if table.rows]


def latency_table(profile: Profile) -> Table:
    """Percentiles of every row."""
    return Table(
        "Step latency",
        ("", "tokens kept", "p50 ms", "p90 ms", "p99 ms", "max ms", "jitter ms", "ms/frame", "speed-up"),
        tuple(_latency(row) for row in profile.rows),
        "Speed-up: dense median over this median.",
    )


def _latency(row: LatencyRow) -> Row:
    tokens = "all, no selection" if row.token_budget is None else " / ".join(map(str, row.token_budget))
    times = (row.p50_ms, row.p90_ms, row.p99_ms, row.max_ms, row.jitter_ms, row.p50_ms / row.batch)
    return (row.name, tokens, *(f"{value:.1f}" for value in times), _times(row.speed_up))


def work_table(profile: Profile) -> Table:
    """Does cost follow work?"""
    rows = [row for row in profile.rows if row.kept_promise is not None and row.preset is not None]
    return Table(
        "Cost follows work",
        ("", "GMACs", "promised", "measured", "kept"),
        tuple(
            (row.name, f"{row.giga_macs:.2f}", _times(row.promise), _times(row.speed_up), f"{row.kept_promise:.0%}")
            for row in rows
        ),
        "Promised: dense GMACs over these. Kept: measured speed-up over the promised one.",
    )


def stage_table(profile: Profile) -> Table:
    """Stages of the pipeline."""
    known = {name: ms for name, ms in profile.stages_ms.items() if ms is not None}
    return Table(
        "Pipeline, median at the default budget",
        ("stage", "ms"),
        tuple((name, f"{ms:.1f}") for name, ms in known.items()),
        "Not told apart: " + ", ".join(name for name in profile.stages_ms if name not in known) + ".",
    )


def part_table(profile: Profile) -> Table:
    """Milliseconds of each part in each row, and what it loses."""
    names = [name for name in profile.layers if profile.layers[name]]
    shown = [part for part in profile.parts if max(part.ms.values()) >= SMALL_MS]
    lossy = [name for name in names if name != "dense" and all(name in part.lost_ms for part in shown)]
    columns = ["part"]
    for name in names:
        columns += [f"{name} ms", "lost"] if name in lossy else [f"{name} ms"]
    return Table(
        "Parts of the network",
        tuple(columns),
        (*(_part(part, names, lossy) for part in shown), *(_sum(profile.parts, names, lossy) if shown else ())),
        "Lost: milliseconds above what the part's multiply-accumulates take at the dense network's mean rate.",
    )


def _part(part: Part, names: list[str], lossy: list[str]) -> Row:
    cells = [part.name]
    for name in names:
        cells.append(f"{part.ms[name]:.2f}")
        if name in lossy:
            cells.append(f"{part.lost_ms[name]:+.2f}")
    return tuple(cells)


def _sum(parts: tuple[Part, ...], names: list[str], lossy: list[str]) -> tuple[Row, ...]:
    ms = {name: sum(part.ms[name] for part in parts) for name in names}
    lost = {name: sum(part.lost_ms[name] for part in parts) for name in lossy}
    return (_part(Part("sum", ms, {}, {}, lost), names, lossy),)


def rate_table(profile: Profile) -> Table:
    """GMACs and bytes of each part at the default budget, and the share of the machine's ceilings."""
    row = next((row.name for row in profile.rows if row.name in profile.layers and row.preset == profile.default), "")
    parts = [part for part in profile.parts if part.ms.get(row, 0.0) >= SMALL_MS and row in part.giga_macs]
    ceiling = profile.ceiling
    at_most = "not measured"
    if ceiling is not None:
        at_most = f"{_or_absent(ceiling.giga_macs_per_s)} GMAC/s, {_or_absent(ceiling.gigabytes_per_s)} GB/s"
    return Table(
        f"Rates at {row}",
        ("part", "ms", "GMACs", "of ceiling", "MB", "of ceiling"),
        tuple(_rate(part, row, profile) for part in parts),
        f"Ceiling of this machine: {at_most}. MB: as the graph is written; over 100 % where operators were fused or "
        "the caches held the data.",
    )


def _rate(part: Part, row: str, profile: Profile) -> Row:
    ms, macs, moved = part.ms[row], part.giga_macs[row], part.megabytes[row]
    macs_ceiling = profile.ceiling.giga_macs_per_s if profile.ceiling else None
    bytes_ceiling = profile.ceiling.gigabytes_per_s if profile.ceiling else None
    return (
        part.name,
        f"{ms:.2f}",
        f"{macs:.3f}" if macs else "",
        _share(macs / ms * 1e3, macs_ceiling) if macs else "",
        f"{moved:.1f}",
        _share(moved / ms, bytes_ceiling),
    )


def _share(rate: float, ceiling: float | None) -> str:
    return "" if ceiling is None else f"{rate / ceiling:.0%}"


def device_table(profile: Profile) -> Table:
    """What the device told."""
    units = {"power_w": "W", "temperature_c": "°C", "clock_mhz": "MHz"}
    rows: list[Row] = [
        (reading.name, f"{reading.mean:.1f} {units[reading.kind]}", f"{reading.max:.1f} {units[reading.kind]}")
        for reading in profile.readings
    ]
    rows += [
        (f"energy of a frame, {row.name}", f"{row.millijoules:.1f} mJ", "")
        for row in profile.rows
        if row.millijoules is not None
    ]
    if profile.memory_mib is not None:
        rows.append(("memory of the process, peak", f"{profile.memory_mib:.0f} MiB", ""))
    told = {reading.kind for reading in profile.readings}
    absent = [kind.split("_")[0] for kind in units if kind not in told]
    note = f"This device does not tell: {', '.join(absent)}." if absent else ""
    return Table("Device", ("", "mean", "max"), tuple(rows), note)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _or_absent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
