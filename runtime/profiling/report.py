"""A profile as one HTML file: tables and plots, no script, nothing loaded; for a desktop and for a phone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from runtime.profiling import plots
from runtime.profiling.profile import Profile
from runtime.profiling.tables import Table, tables
from runtime.video.output_file import OutputFile, writing

SEEN = 0.01  # share of the whole network below which a part has no bar


@contextmanager
def report_file(path: Path) -> Generator[Callable[[Profile], None], None, None]:
    """A function that writes the page; the file appears whole or not at all.

    Raises:
        SinkError: The place is not writable, which is known before anything is measured.
    """
    file = OutputFile(path)

    def write(profile: Profile) -> None:
        with writing(path):
            file.partial.write_text(report_html(profile), encoding="utf-8")
        file.commit()

    try:
        yield write
    finally:
        file.discard()


def report_html(profile: Profile) -> str:
    """The whole page."""
    title = f"{profile.bundle} on {profile.engine}"
    body = "".join([_head(profile), *_plots(profile), *map(_table, tables(profile)), _mode(profile)])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _head(profile: Profile) -> str:
    height, width = profile.image_size
    facts = [
        f"{profile.model}, {height} x {width}",
        profile.engine,
        profile.machine,
        f"measured {profile.measured_at}",
    ]
    return f"<h1>{escape(profile.bundle)}</h1><p>{'<br>'.join(map(escape, facts))}</p>" + _summary(profile)


def _summary(profile: Profile) -> str:
    """The one number that most readers came for."""
    row = next((row for row in profile.rows if row.preset == profile.default and row.batch == 1), None)
    if row is None:
        return ""
    speed_up = "" if row.speed_up is None else f", {row.speed_up:.2f} times as fast as the dense network"
    kept = "" if row.kept_promise is None else f": {row.kept_promise:.0%} of what its work promises"
    return f'<p class="lead"><b>{row.p50_ms:.1f} ms</b> at {escape(row.name)}{speed_up}{kept}.</p>'


def _plots(profile: Profile) -> Iterator[str]:
    rows = [row for row in profile.rows if row.batch == 1]
    names = _colours(profile)
    points = [(row.name, row.giga_macs, row.p50_ms) for row in rows if row.giga_macs is not None]
    dense = next(((macs, ms) for name, macs, ms in points if name == "dense"), None)
    if points:
        yield _figure(
            "Latency over work", plots.latency_over_work(points, dense), {name: names[name] for name, _, _ in points},
            "On the dashed line cost follows work; above it, a part of the speed-up is lost.",
        )  # fmt: skip
    yield _figure("Distribution", plots.distribution({row.name: row.times_ms for row in rows}), names)
    over_time = {row.name: list(zip(row.at_s, row.times_ms, strict=True)) for row in rows}
    yield _figure("Over time", plots.timeline(over_time), names, "Rows take turns; a drift touches all alike.")
    if chart := _part_chart(profile):
        yield chart


def _part_chart(profile: Profile) -> str:
    """Bars of the dense network, the default budget and the smallest one, for the parts that can be seen."""
    presets = {row.name: row.preset for row in profile.rows if profile.layers.get(row.name)}
    pruned = [name for name, preset in presets.items() if preset is not None]
    default = [name for name in pruned if presets[name] == profile.default]
    names = list(dict.fromkeys([*(name for name in presets if name not in pruned), *default, *pruned[:1]]))
    if not names:
        return ""
    whole = max(sum(part.ms[name] for part in profile.parts) for name in names)
    parts = [(part.name, {name: part.ms[name] for name in names}) for part in profile.parts]
    seen = [(name, ms) for name, ms in parts if max(ms.values()) > SEEN * whole]
    note = f"Layers timed in a run of their own; parts under {SEEN:.0%} of the whole are only in the table."
    colours = {name: number for name, number in _colours(profile).items() if name in names}
    return _figure("Parts of the network", plots.bars(seen, colours), colours, note)


def _colours(profile: Profile) -> dict[str, int]:
    """The rows of batch 1, each with the number of its colour, the same in all plots."""
    return {row.name: number for number, row in enumerate(row for row in profile.rows if row.batch == 1)}


def _figure(title: str, svg: str, names: dict[str, int], note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<h2>{escape(title)}</h2><figure>{plots.legend(names)}{svg}{caption}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _mode(profile: Profile) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in profile.mode)
    return f"<h2>How it was measured</h2><ul>{lines}</ul>"


# Eight colours that differ in lightness too (after Okabe and Ito's palette for colour-blind readers).
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--faint:#e3e6ea;
--c0:#444c56;--c1:#d55e00;--c2:#0072b2;--c3:#009e73;--c4:#b65a93;--c5:#9a7500;--c6:#3a8fc4;--c7:#7a3b00}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ec;--soft:#9aa4ae;--faint:#2d333a;
--c0:#aab4be;--c1:#ff8a3d;--c2:#4fb0ee;--c3:#2fd0a2;--c4:#e39ac6;--c5:#e0bd3f;--c6:#8fd0f7;--c7:#d79a62}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}h1{margin:.2rem 0;font-size:1.5rem;overflow-wrap:anywhere}
h2{margin:1.8rem 0 .5rem;font-size:1.15rem}p{margin:.4rem 0;overflow-wrap:anywhere}.lead{font-size:1.1rem}
figure{margin:0;max-width:40rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}svg text.small{fill:var(--soft);font-size:8px}
.note,figcaption{color:var(--soft);font-size:.875rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:0 0 .4rem;padding:0;list-style:none;font-size:.875rem}
.legend li::before{content:"";display:inline-block;width:.7rem;height:.7rem;margin-right:.35rem;background:var(--c)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint)}
th:first-child,td:first-child{padding-left:0;text-align:left}th{color:var(--soft);font-weight:600}
"""
