"""From a bundle and a video to a bundle in INT8: what comes out, what is refused, and going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from calib import observation
from calib.graph_index import GraphIndex
from calib.linear_layers import linear_layers
from calib.observation import observe
from calib.progress import Progress
from calib.samples import Deviation
from calib.sensitivity import layers_to_exclude
from calib.table import TABLE_FILE, read_table
from export import calibrated_bundle
from export.calibrated_bundle import CalibrationRequest, Watcher, calibrate_bundle
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import CalibrationError, SinkError, SourceNotFoundError
from runtime.stream import Stream
from runtime.video.sources import open_source

from .conftest import FRAMES, write_pictures


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def request_for(micro_bundle, pictures, tmp_path):
    """``request_for(**fields)``: INT8 of the micro bundle into ``tmp_path / "out"``."""
    plain = CalibrationRequest(
        micro_bundle, tmp_path / "out" / "int8", "int8", sources=(str(pictures),), frames=FRAMES, threads=1
    )
    return lambda **fields: replace(plain, **fields)


# What comes out


def test_bundle_is_whole_streams_and_says_what_it_is(calibrated, fp32):
    bundle = load_bundle(calibrated)  # checks every hash
    assert (bundle.manifest.precision, bundle.manifest.rest_precision) == ("int8", "fp32")
    assert set(bundle.manifest.files) == {*fp32.manifest.files, TABLE_FILE}
    assert bundle.manifest.origin == fp32.manifest.origin
    for spec in (bundle.manifest.graph, bundle.manifest.baseline):
        operators = {node.op_type for node in onnx.load(bundle.path(spec)).graph.node}
        assert "QuantizeLinear" in operators, f"{spec.file} is not quantized"
    with Stream(bundle, load_engine(bundle, threads=1), keep_ratio=0.4) as stream:
        kept = [tuple(stream.step(np.full((72, 128, 3), 9, np.uint8)).tokens_kept) for _ in range(3)]
    assert kept[0][0] == 60 and kept[1] == kept[2] == (36, 24, 16, 12)


def test_table_tells_what_was_observed(calibrated, fp32, pictures):
    table = read_table(calibrated / TABLE_FILE)
    (stream,) = table.streams
    assert (stream.source, stream.frames, stream.without_prior) == (str(pictures), FRAMES, 1)
    assert stream.token_budget == fp32.manifest.presets[fp32.manifest.default_preset]
    assert len(table.ranges) == len(table.layers) and all(
        layer.range == layer.largest for layer in table.layers.values()
    )


def test_ranges_are_those_of_the_stream_with_its_prior(fp32, fp32_graph, pictures):
    """Against the same tensor fetched step by step beside an ordinary stream, from the state that one had."""
    layer = next(
        layer
        for layer in reversed(linear_layers(GraphIndex(fp32_graph), fp32.manifest.graph))
        if ".mlp.fc1" in layer.name
    )
    model = onnx.ModelProto()
    model.CopyFrom(fp32_graph)
    model.graph.output.append(onnx.ValueInfoProto(name=layer.input))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    usual, largest = (42, 32, 26, 20), []
    with Stream(fp32, load_engine(fp32, threads=1), budget=usual) as stream, open_source(pictures) as source:
        for frame in source:
            state = stream._buffers.state()
            budget = np.array(usual if largest else (60, *usual[1:]))
            feeds = {"image": stream.prepare(frame).image[None], "token_budget": budget, **state}
            largest.append(np.abs(session.run([layer.input], feeds)[0]).max())
            stream.step(frame)
    seen = observe(fp32, open_source(pictures), "street", usual, FRAMES)
    assert seen.histograms[layer.name].largest == pytest.approx(max(largest), rel=1e-4)
    assert max(largest) > 1.001 * largest[0], "the first frame alone would have done"


def test_it_is_close_to_fp32(request_for):
    result = calibrate_bundle(request_for())
    assert result.samples == observation.SAMPLES_PER_STREAM
    assert 1e-5 < result.deviation.error < 0.05 and result.deviation.smallest_overlap > 0.95, str(result.deviation)


def test_several_videos_and_budgets(request_for, fp32, tmp_path):
    other = write_pictures(tmp_path / "night", seed=9)
    rule = fp32.manifest.budget_rule
    request = request_for(budgets=(rule.for_ratio(0.4), rule.largest), frames=8)
    one = calibrate_bundle(request).table
    both = calibrate_bundle(replace(request, sources=(*request.sources, str(other)))).table
    assert [stream.token_budget for stream in both.streams] == 2 * [rule.for_ratio(0.4), rule.largest]
    assert all(both.layers[name].largest >= one.layers[name].largest for name in one.layers)
    assert any(both.layers[name].largest > one.layers[name].largest for name in one.layers)


def test_a_table_quantizes_without_a_video(request_for, calibrated, tmp_path):
    request = request_for(sources=(), table=calibrated / TABLE_FILE)
    calibrate_bundle(request)
    graph = load_bundle(calibrated).manifest.graph.file
    assert (request.output / graph).read_bytes() == (calibrated / graph).read_bytes()


def test_fp8_with_the_rest_in_fp16(request_for, calibrated):
    request = request_for(sources=(), table=calibrated / TABLE_FILE, precision="fp8", rest="fp16")
    assert calibrate_bundle(request).deviation.error < 0.15
    manifest = load_bundle(request.output).manifest
    assert (manifest.precision, manifest.rest_precision) == ("fp8", "fp16")


# Which layers cost


@pytest.mark.slow
def test_layers_are_left_out_until_the_error_is_met(request_for, calibrated):
    request = request_for(sources=(), table=calibrated / TABLE_FILE)
    all_layers = calibrate_bundle(request).deviation.error
    result = calibrate_bundle(replace(request, max_error=0.6 * all_layers))
    excluded = {name for name, layer in result.table.layers.items() if layer.excluded}
    errors = {name: layer.error for name, layer in result.table.layers.items()}
    assert excluded and result.deviation.error <= 0.6 * all_layers
    assert min(errors[name] for name in excluded) >= max(errors[name] for name in set(errors) - excluded)
    model = onnx.load(request.output / "model.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) < len(errors) - len(excluded) + 1


def fake_measure(errors):
    """A network whose layers' errors add up."""
    return lambda ranges: Deviation({"out": sum(errors[name] for name in ranges)})


def test_the_fewest_layers_are_left_out():
    errors = {"a": 0.01, "b": 0.30, "c": 0.02, "d": 0.10}
    ranges = dict.fromkeys(errors, 1.0)
    measure = fake_measure(errors)
    for allowed, want in ((1.0, set()), (0.14, {"b"}), (0.03, {"b", "d"}), (0.01, {"b", "d", "c"})):
        assert layers_to_exclude(measure, ranges, errors, allowed) == want
    with pytest.raises(CalibrationError, match="only with no layer quantized"):
        layers_to_exclude(measure, ranges, errors, 0.001)
    with pytest.raises(CalibrationError, match=r"with no layer quantized it is 0\.0500"):
        layers_to_exclude(lambda ranges: Deviation({"out": 0.05}), ranges, errors, 0.01)


# Going on after a stop


@pytest.mark.slow
def test_a_stopped_run_goes_on(request_for, tmp_path, monkeypatch):
    other = write_pictures(tmp_path / "night", seed=9)
    request = request_for(frames=8)
    request = replace(request, sources=(*request.sources, str(other)), sensitivity=True)
    steps = []

    def stop_at(number):
        def step():
            steps.append(1)
            if len(steps) == number:
                raise KeyboardInterrupt

        return Watcher(step=step)

    with pytest.raises(KeyboardInterrupt):
        calibrate_bundle(request, stop_at(13))  # in the second video
    with pytest.raises(KeyboardInterrupt):
        calibrate_bundle(request, stop_at(13 + 8 + 3))  # at the third layer
    assert left_in(tmp_path / "out") == [".int8.calibration"]
    monkeypatch.setattr(calibrated_bundle, "observe", lambda *arguments, **named: pytest.fail("observed again"))
    done = len(steps)
    resumed = calibrate_bundle(request, stop_at(10**9))
    assert len(steps) - done == len(resumed.table.layers) - 3, "layers were measured again"
    assert left_in(tmp_path / "out") == ["int8"]
    monkeypatch.undo()
    fresh = calibrate_bundle(replace(request, output=tmp_path / "fresh"))
    assert resumed.table == fresh.table


def test_progress_of_another_setting_or_a_damaged_file_is_not_taken(tmp_path):
    progress = Progress(tmp_path / "int8")
    progress.save_errors({"a": 1.0}, graph="x")
    assert progress.errors(graph="x") == {"a": 1.0} and progress.errors(graph="y") == {}
    for path in progress.folder.iterdir():
        path.write_text('["not errors"]')
    assert progress.errors(graph="x") == {} and progress.observation(graph="x") is None


# Refused, with nothing written


@pytest.fixture
def refused(request_for, tmp_path):
    """``refused(message, **fields)``: the calibration ends with it and leaves nothing."""

    def check(message: str, error: type[Exception] = CalibrationError, **fields) -> None:
        with pytest.raises(error, match=message):
            calibrate_bundle(request_for(**fields))
        assert not (tmp_path / "out").exists() or left_in(tmp_path / "out") == []

    return check


def test_short_video(refused, tmp_path):
    one = write_pictures(tmp_path / "one", frames=1)
    refused(r"only 1 of 8 frames\. No table was written\. Take a longer video", sources=(str(one),), frames=8)
    nine = write_pictures(tmp_path / "nine", frames=9)
    refused(r"only 9 of 64 frames(.|\n)*--frames 9", sources=(str(nine),), frames=64)


def test_too_few_frames_asked_for(refused):
    refused("1 frames are too few for a stream with its prior: at least 8", frames=1)


def test_video_that_breaks_off(refused, tmp_path):
    folder = write_pictures(tmp_path / "broken")
    (folder / "005.png").write_bytes(b"no picture")
    refused(r"gave 5 of 12 frames, then: (.|\n)*005\.png(.|\n)*No table was written", sources=(str(folder),))


def test_video_that_is_not_there(refused, tmp_path):
    refused("no such file", SourceNotFoundError, sources=(str(tmp_path / "nothing.mp4"),))


def test_bundle_that_is_quantized_already(refused, calibrated):
    refused("is in int8 already; calibration starts from fp32", bundle=calibrated)


def test_table_of_another_model_size_or_network(refused, calibrated, tmp_path):
    content = json.loads((calibrated / TABLE_FILE).read_text())
    path = tmp_path / "other.json"
    for change, message in (
        ({"weights_sha256": "0" * 64}, "the table is of vpp-eo-micro with weights 000000000000"),
        ({"image_size": [96, 128]}, "image size of 96 x 128"),
        ({"layers": {"blocks.0.mlp.fc1": {"range": 1, "largest": 1}}}, "differ in .* linear layers"),
    ):
        path.write_text(json.dumps(content | change))
        refused(message, sources=(), table=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no calibration table"),
        ('{"table_version": 2}', r"table_version: Input should be 1"),
        ("\udcff", "is not JSON"),
    ],
)
def test_damaged_table(refused, tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(message, sources=(), table=path)


def test_table_with_a_range_that_is_no_number(refused, calibrated, tmp_path):
    text = (calibrated / TABLE_FILE).read_text()
    content = json.loads(text)
    content["layers"]["blocks.0.mlp.fc1"]["range"] = -1.0
    (tmp_path / "table.json").write_text(json.dumps(content))
    refused(r"layers\.blocks\.0\.mlp\.fc1\.range: ", sources=(), table=tmp_path / "table.json")
    refused("cannot be read", sources=(), table=tmp_path / "nothing.json")


def test_both_or_neither_of_video_and_table(refused, calibrated):
    refused("one of the two", table=calibrated / TABLE_FILE)
    refused("one of the two", sources=())


def test_entropy_is_for_int8(refused):
    refused("even steps of int8", precision="fp8", method="entropy")


def test_output_that_is_the_bundle_or_no_bundle(request_for, micro_bundle, tmp_path):
    with pytest.raises(CalibrationError, match="is the fp32 bundle itself"):
        calibrate_bundle(request_for(output=micro_bundle))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("five years")
    with pytest.raises(SinkError, match="no bundle; it was left alone"):
        calibrate_bundle(request_for(output=tmp_path / "thesis"))
    assert left_in(tmp_path / "thesis") == ["chapter"]


def test_video_of_which_no_frame_has_a_prior(refused, tmp_path):
    """Each picture has another size than the one before."""
    folder = tmp_path / "album"
    folder.mkdir()
    for index in range(8):
        Image.new("RGB", (160, 96 + index)).save(folder / f"{index}.png")
    refused("all 8 frames ran without a prior", sources=(str(folder),), frames=8)
