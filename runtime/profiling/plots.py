"""Small plots as SVG text, drawn without any package: a device has no matplotlib.

Colours are CSS variables of the page (``--ink``, ``--faint``, ``--c0`` ...), so that a plot follows its dark mode. All
are 360 units wide, so that letters have the same size in every plot and stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 8.0, 34.0
COLOURS = 8
Point = tuple[float, float]


@dataclass
class Axes:
    """A rectangle of data on the page.

    Attributes:
        x_range, y_range: Values at the left and right, bottom and top edges.
        body: SVG elements drawn so far.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: float = HEIGHT
    left: float = LEFT
    body: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Place of a value, in units of the picture."""
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        """Place of a value, in units of the picture; downwards."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / ((high - low) or 1.0) * (self.height - BOTTOM - TOP)

    def line(self, points: Sequence[Point], style: str) -> None:
        """Straight lines through points."""
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.body.append(f'<polyline points="{places}" fill="none" {style}/>')

    def dot(self, point: Point, style: str, title: str, radius: float = 3.5) -> None:
        """A filled circle with a text that appears under the pointer."""
        place = f'cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="{radius}"'
        self.body.append(f"<circle {place} {style}><title>{escape(title)}</title></circle>")

    def text(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        """Words at a place of the picture."""
        self.body.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def ticks(self, x_label: str, y_label: str, *, y_ticks: bool = True) -> None:
        """Faint lines at round values, with numbers, and what the axes show."""
        for value in round_values(*self.x_range):
            self.line([(value, self.y_range[0]), (value, self.y_range[1])], _FAINT)
            self.text(self.x(value), self.height - BOTTOM + 13, f"{value:g}")
        for value in round_values(*self.y_range) if y_ticks else ():
            self.line([(self.x_range[0], value), (self.x_range[1], value)], _FAINT)
            self.text(self.left - 5, self.y(value) + 4, f"{value:g}", "end")
        self.text((self.left + WIDTH) / 2, self.height - 5, x_label)
        if y_label:
            self.body.append(
                f'<text transform="translate(11 {self.height / 2 - 8:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(y_label)}</text>"
            )

    def svg(self, label: str) -> str:
        """The picture, with what a screen reader says."""
        return (
            f'<svg viewBox="0 0 {WIDTH:.0f} {self.height:.0f}" role="img" aria-label="{escape(label)}">'
            + "".join(self.body)
            + "</svg>"
        )


_FAINT = 'stroke="var(--faint)" stroke-width="1"'


def _stroke(number: int) -> str:
    return f'stroke="var(--c{number % COLOURS})" stroke-width="1.6"'


def _fill(number: int) -> str:
    return f'fill="var(--c{number % COLOURS})"'


def round_values(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` values that are 1, 2 or 5 times a power of ten apart, within the range.

    >>> round_values(0.0, 290.0), round_values(0.0, 0.9)
    ([0.0, 100.0, 200.0], [0.0, 0.2, 0.4, 0.6, 0.8])
    """
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def legend(names: Mapping[str, int]) -> str:
    """Names with the colours of their numbers, as HTML."""
    items = (f'<li style="--c:var(--c{number % COLOURS})">{escape(name)}</li>' for name, number in names.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def latency_over_work(points: Sequence[tuple[str, float, float]], dense: tuple[float, float] | None) -> str:
    """Median over GMACs of each row, and the line from nothing to the dense network, on which cost follows work.

    Args:
        points: Name, GMACs and milliseconds.
        dense: GMACs and milliseconds of the dense network.
    """
    axes = Axes((0.0, 1.08 * max(macs for _, macs, _ in points)), (0.0, 1.08 * max(ms for _, _, ms in points)))
    axes.ticks("GMACs of a picture", "p50, ms")
    if dense is not None:
        axes.line([(0.0, 0.0), dense], 'stroke="var(--ink)" stroke-width="1.2" stroke-dasharray="4 4"')
    for number, (name, macs, ms) in enumerate(points):
        axes.dot((macs, ms), _fill(number), f"{name}: {macs:.2f} GMACs, {ms:.1f} ms")
    return axes.svg("Latency over multiply-accumulates, and the line on which cost follows work")


def distribution(times: Mapping[str, Sequence[float]]) -> str:
    """Share of the steps that took at most so long, for each row."""
    largest = max(max(values) for values in times.values())
    axes = Axes((0.0, 1.03 * largest), (0.0, 100.0))
    axes.ticks("step, ms", "share of steps, %")
    for number, values in enumerate(times.values()):
        ordered = sorted(values)
        steps = [(ordered[0], 0.0)]
        for rank, value in enumerate(ordered, 1):
            steps += [(value, steps[-1][1]), (value, 100.0 * rank / len(ordered))]
        axes.line(steps, _stroke(number))
    return axes.svg("Distribution of step times")


def timeline(times: Mapping[str, Sequence[Point]]) -> str:
    """Milliseconds of every step over the seconds at which it started."""
    ends = max(points[-1][0] for points in times.values())
    largest = max(ms for points in times.values() for _, ms in points)
    axes = Axes((0.0, ends or 1.0), (0.0, 1.05 * largest))
    axes.ticks("seconds since the first measured step", "step, ms")
    for number, points in enumerate(times.values()):
        for second, ms in points:
            axes.dot((second, ms), _fill(number), f"{ms:.1f} ms", radius=1.8)
    return axes.svg("Step times in the order of measuring")


def bars(parts: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, int], unit: str = "ms") -> str:
    """For each part one bar for each row, one below the other, with its value.

    Args:
        parts: Name of the part, and its value in each row.
        colours: The rows, with the numbers of their colours.
    """
    rows = len(colours)
    thick, gap = 8.0, 18.0
    height = TOP + BOTTOM + sum(gap + thick * rows for _ in parts)
    largest = max(max(values.values()) for _, values in parts)
    axes = Axes((0.0, 1.18 * largest), (0.0, 1.0), height=height, left=8.0)
    axes.ticks(unit, "", y_ticks=False)
    top = TOP
    for name, values in parts:
        axes.text(axes.left, top + gap - 5, name, "start")
        for place, (row, colour) in enumerate(colours.items()):
            axes.body.append(_bar(axes, top + gap + thick * place, thick, values[row], colour))
        top += gap + thick * rows
    return axes.svg("Milliseconds of each part of the network")


def _bar(axes: Axes, top: float, thick: float, value: float, colour: int) -> str:
    start, end = axes.x(0.0), axes.x(value)
    return (
        f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(end - start, 0.5):.1f}" height="{thick - 1:.1f}" '
        f'{_fill(colour)}/><text class="small" x="{end + 3:.1f}" y="{top + thick - 1.5:.1f}">{value:.1f}</text>'
    )
