"""The report as a reader has it: well-formed, complete in one file, and fitting a phone in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from runtime.errors import SinkError
from runtime.profiling import plots
from runtime.profiling.ceiling import Ceiling
from runtime.profiling.layers import Layer
from runtime.profiling.part_table import Part
from runtime.profiling.profile import LatencyRow, Profile, Reading
from runtime.profiling.report import report_file, report_html
from runtime.profiling.tables import tables

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")

# Replaces the page by what a reader's window would show: widths, and letters that lie outside their plot.
PROBE = """<script>addEventListener("load", () => {
  const outside = [...document.querySelectorAll("svg text")].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  }).map(text => text.textContent);
  const paper = getComputedStyle(document.body).backgroundColor;
  const smallest = Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height));
  document.body.textContent = JSON.stringify({
    window: innerWidth, page: window.probed, outside, paper, smallest});
});
addEventListener("DOMContentLoaded", () => { window.probed = document.documentElement.scrollWidth; });
</script>"""


def made_up_row(name: str, ms: float, giga_macs: float) -> LatencyRow:
    preset = None if name == "dense" else name.removeprefix("keep ")
    times = (ms, 1.1 * ms, 0.9 * ms, 1.5 * ms)
    return LatencyRow(
        name=name, preset=preset, token_budget=preset and (1428, 1142, 913, 730), batch=1, p50_ms=ms, p90_ms=1.4 * ms,
        p99_ms=1.5 * ms, max_ms=1.5 * ms, jitter_ms=0.3 * ms, speed_up=290 / ms, giga_macs=giga_macs,
        promise=30.9 / giga_macs, power_w=12.0, millijoules=12.0 * ms, times_ms=times, at_s=(0.0, 0.4, 1.7, 2.1),
    )  # fmt: skip


@pytest.fixture
def profile() -> Profile:
    """Of a large network, with every field in use and the longest words that there are."""
    rows = made_up_row("dense", 290.0, 30.9), made_up_row("keep 0.40", 101.0, 10.3), made_up_row("keep 0.55", 134, 13.7)
    names = "patch embedding", "blocks 9-11 norms and sums", "keep logits for the next frame", "Map-SM"
    numbers = {row.name: row.p50_ms / 4 for row in rows}
    parts = tuple(Part(name, numbers, numbers, numbers, numbers) for name in names)
    layers = {row.name: (Layer("blocks.0.attn/MatMul", "MatMul", "blocks.0.attn", row.p50_ms),) for row in rows}
    return Profile(
        bundle="street-cameras-of-the-north-entrance", model="vpp-eo-tiny", default="0.55",
        engine="onnxruntime 1.31.1 on CPUExecutionProvider, 2 threads", machine="AMD EPYC, 2 CPUs, Linux x86_64",
        measured_at="2026-11-24 16:00", image_size=(544, 960), mode=("Transfers: none.", "CUDA graph: not used."),
        steps=4, warm_up=5, stable=True, rows=rows, stages_ms={"decode": None, "resize": 4.4, "infer": 134.0},
        layers=layers, parts=parts, ceiling=Ceiling(107.0, 21.9), readings=(Reading("power_w", "VDD_IN", 12.0, 13.5),),
        memory_mib=610.0,
    )  # fmt: skip


def seen_in_browser(page: str, folder: Path, *options: str) -> dict[str, object]:
    """What the page looks like in a headless browser, in a frame of 360 pixels: its own window is never so narrow."""
    (folder / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    outer = folder / "phone.html"
    outer.write_text(
        '<!doctype html><iframe src="page.html" style="width:360px;height:700px;border:0"></iframe>'
        '<pre id="seen"></pre><script>addEventListener("load", () => { seen.textContent = '
        "document.querySelector('iframe').contentDocument.body.textContent; });</script>",
        encoding="utf-8",
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'user'}", "--virtual-time-budget=5000", *options, "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return json.loads(found[1])


@needs_browser
def test_page_fits_a_phone(profile, tmp_path):
    seen = seen_in_browser(report_html(profile), tmp_path)
    assert seen["window"] == 360
    assert seen["page"] <= 360, "the page scrolls sideways"
    assert seen["outside"] == [], "letters lie outside their plot"
    assert seen["smallest"] >= 7
    assert seen["paper"] == "rgb(255, 255, 255)"


@needs_browser
def test_page_is_dark_for_a_reader_who_wants_it_dark(profile, tmp_path):
    seen = seen_in_browser(report_html(profile), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert seen["paper"] == "rgb(21, 24, 28)" and seen["page"] <= 360


def test_page_loads_nothing_and_runs_nothing(profile):
    page = report_html(profile)
    assert not re.search(r"<script|<link|<img|https?://|@import|url\(", page)


def test_every_plot_is_well_formed_and_has_words_for_screen_readers(profile):
    drawn = re.findall(r"<svg.*?</svg>", report_html(profile), re.DOTALL)
    assert len(drawn) == 4
    for svg in drawn:
        assert ElementTree.fromstring(svg).get("aria-label")


def test_every_table_is_in_the_page(profile):
    page = report_html(profile)
    made = tables(profile)
    titles = [table.title for table in made]
    assert titles[:4] == ["Step latency", "Cost follows work", "Pipeline, median at the default budget",
                          "Parts of the network"]  # fmt: skip
    assert "Rates at keep 0.55" in titles and titles[-1] == "Device"
    for table in made:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert f"<h2>{table.title}</h2>" in page
    assert all(line in page for line in profile.mode)


def test_names_are_escaped(profile):
    page = report_html(replace(profile, bundle="<b>&", machine='"<i>'))
    assert "<b>&" not in page and "<h1>&lt;b&gt;&amp;</h1>" in page and "<i>" not in page


def test_page_without_layers_and_without_a_dense_graph(profile):
    rows = tuple(replace(row, speed_up=None, giga_macs=None, promise=None) for row in profile.rows[1:])
    page = report_html(replace(profile, rows=rows, layers={}, parts=(), ceiling=None))
    assert page.count("<svg") == 2 and "Parts of the network" not in page and "None" not in page


def test_dense_point_lies_at_the_end_of_the_ideal_line():
    svg = ElementTree.fromstring(
        plots.latency_over_work([("dense", 30.0, 300.0), ("half", 15.0, 200.0)], (30.0, 300.0))
    )
    dashed = next(line for line in svg.iter("polyline") if line.get("stroke-dasharray"))
    start, end = (tuple(map(float, place.split(","))) for place in dashed.get("points").split())
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert dots[0] == end
    on_the_line = start[1] + (end[1] - start[1]) * (dots[1][0] - start[0]) / (end[0] - start[0])
    assert dots[1][1] < on_the_line, "slower than promised is above the line; y grows downwards"


def test_file_is_whole_or_not_there(profile, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(RuntimeError), report_file(path):
        raise RuntimeError("measuring failed")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with report_file(path) as write:
        write(profile)
    assert path.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [path]


def test_place_that_cannot_be_written_is_known_before_measuring(tmp_path):
    with pytest.raises(SinkError, match="Create the folder first"), report_file(tmp_path / "no" / "report.html"):
        pytest.fail("measuring began")
