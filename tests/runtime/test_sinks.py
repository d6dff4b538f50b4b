"""Every sink: what it writes, and that nothing half-written is left, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import resource
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from video_clips import picture

from runtime.errors import BackendUnavailableError, SinkError
from runtime.results import FrameResult, Instances
from runtime.video import live_view, video_sink
from runtime.video.frame import Frame
from runtime.video.sinks import BrowserSink, JsonLinesSink, VideoSink, WindowSink, YouTubeVisSink, open_live_view
from runtime.video.sources import open_source

CLASSES = ["dog", "person"]
HEIGHT, WIDTH = 90, 160
MAKERS = {
    "video": lambda path: VideoSink(path.with_suffix(".mp4"), 25.0, CLASSES),
    "lines": lambda path: JsonLinesSink(path.with_suffix(".jsonl"), CLASSES),
    "youtube-vis": lambda path: YouTubeVisSink(path.with_suffix(".json"), 1),
}
decodes_masks = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode
every_file_sink = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def frame(index: int = 0, height: int = HEIGHT, width: int = WIDTH, timestamp_s: float | None = None) -> Frame:
    return Frame(picture(height, width, index), index, index / 25 if timestamp_s is None else timestamp_s)


def result(index: int = 0, tracks: tuple[int, ...] = (3,), height: int = HEIGHT, width: int = WIDTH) -> FrameResult:
    """Objects that move to the right; track t has label t % 2 and score 0.5 + t / 100 + index / 1000."""
    masks = np.zeros((len(tracks), height, width), bool)
    for row, track in enumerate(tracks):
        masks[row, 10:40, 5 * track + index : 5 * track + index + 20] = True
    ids = np.array(tracks, np.int64)
    left = 5.0 * ids + index
    boxes = np.stack([left, 0 * left + 10, left + 20, 0 * left + 40], -1).astype(np.float32)
    scores = (0.5 + ids / 100 + index / 1000).astype(np.float32)
    return FrameResult(
        frame_index=index,
        timestamp_s=index / 25,
        instances=Instances(ids, ids % 2, scores, boxes, masks),
        kept_stages=np.full((6, 10), 2),
        tokens_kept=np.array([60, 60]),
        reset_reason=None if index else "first frame",
        step_ms=12.5,
    )


def decoded(path: Path) -> list[Frame]:
    with open_source(path) as source:
        return list(source)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# Life of a file


@every_file_sink
def test_file_appears_whole_at_close(tmp_path, make):
    with make(tmp_path / "out") as sink:
        sink.write(frame(0), result(0))
        visible = [name for name in left_in(tmp_path) if not name.startswith(".")]
        assert visible == []
    assert [name.startswith("out.") for name in left_in(tmp_path)] == [True]
    sink.close()


@every_file_sink
@pytest.mark.parametrize("how", ["close", "error"])
def test_failure_leaves_the_older_output(tmp_path, make, how):
    older = {tmp_path / f"out{suffix}" for suffix in (".mp4", ".jsonl", ".json")}
    for path in older:
        path.write_text("older")
    with suppress(ZeroDivisionError), make(tmp_path / "out") as sink:
        sink.write(frame(0), result(0))
        if how == "error":
            raise ZeroDivisionError
        sink.close(failed=True)
    assert {tmp_path / name for name in left_in(tmp_path)} == older
    assert {path.read_text() for path in older} == {"older"}


@every_file_sink
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_keeps_what_was_written(tmp_path, make, end):
    with suppress(end), make(tmp_path / "out") as sink:
        for index in range(5):
            sink.write(frame(index), result(index))
        raise end
    (path,) = tmp_path.iterdir()
    counts = {
        ".mp4": lambda: len(decoded(path)),
        ".jsonl": lambda: len([json.loads(line) for line in path.read_text().splitlines()]),
        ".json": lambda: len(json.loads(path.read_text())[0]["segmentations"]),
    }
    assert counts[path.suffix]() == 5


@every_file_sink
@pytest.mark.parametrize(
    ("folder", "says"),
    [("missing", "Create the folder"), ("file.txt", "part of the path is a file"), ("/proc", "/proc")],
)
def test_unwritable_place_is_known_at_opening(tmp_path, make, folder, says):
    (tmp_path / "file.txt").touch()
    with pytest.raises(SinkError, match=says):
        make(tmp_path / folder / "out")
    assert left_in(tmp_path) == ["file.txt"]


@every_file_sink
def test_a_folder_is_no_file(tmp_path, make):
    for suffix in (".mp4", ".jsonl", ".json"):
        (tmp_path / f"out{suffix}").mkdir()
    with pytest.raises(SinkError, match="name a file"):
        make(tmp_path / "out")


@every_file_sink
@pytest.mark.parametrize("size", [0, 700, 20_000])
def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, make, size):
    """Found while writing or at the end, and the sink stays closed."""
    noise = np.random.default_rng(0)
    with disk_of(size), pytest.raises(SinkError, match="cannot be written") as error:
        sink = make(tmp_path / "out")
        for index in range(200):
            pixels = noise.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            masks = noise.random((1, HEIGHT, WIDTH)) > 0.5
            busy = dataclasses.replace(result(index).instances, masks=masks)
            sink.write(Frame(pixels, index, index / 25), dataclasses.replace(result(index), instances=busy))
        sink.close()
    assert str(tmp_path / "out") in str(error.value)
    assert left_in(tmp_path) == []


def test_full_disk_says_so(tmp_path, monkeypatch):
    """The hint for ENOSPC, which a limit on file sizes cannot bring about."""
    sink = JsonLinesSink(tmp_path / "out.jsonl", CLASSES)
    with sink._out, Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sink, "_out", full)
        with pytest.raises(SinkError, match=r"No space left on device\. Free some space"):
            sink.write(frame(), result())
    assert left_in(tmp_path) == []


def test_closed_sink_refuses(tmp_path):
    sink = JsonLinesSink(tmp_path / "out.jsonl", CLASSES)
    sink.close()
    with pytest.raises(SinkError, match="closed"):
        sink.write(frame(), result())


# Video


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_video_has_every_frame_at_its_time(tmp_path, suffix):
    times_s = [5.0, 5.04, 5.05, 5.3, 5.31, 6.25]
    path = tmp_path / f"out{suffix}"
    with VideoSink(path, 25.0, CLASSES) as sink:
        for index, time_s in enumerate(times_s):
            sink.write(frame(index, timestamp_s=time_s), result(index))
    frames = decoded(path)
    np.testing.assert_allclose([got.timestamp_s for got in frames], np.array(times_s) - 5, atol=1e-3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")


def test_video_keeps_colours(tmp_path):
    colour = (200, 40, 90)
    path = tmp_path / "out.mp4"
    plain = dataclasses.replace(result(0, tracks=()), kept_stages=np.zeros((0, 0), np.int64))
    with VideoSink(path, None, CLASSES) as sink:
        sink.write(Frame(np.full((HEIGHT, WIDTH, 3), colour, np.uint8)), plain)
    np.testing.assert_allclose(decoded(path)[0].rgb[20, 80], colour, atol=6)


def test_video_of_odd_size_and_changing_resolution(tmp_path):
    """One more row and column; a frame of another size is fitted into the first one's."""
    path = tmp_path / "out.mp4"
    with VideoSink(path, 25.0, CLASSES) as sink:
        sink.write(frame(0, 75, 101), result(0, height=75, width=101))
        sink.write(frame(1, 60, 120), result(1, height=60, width=120))
    sizes = [(got.height, got.width) for got in decoded(path)]
    assert sizes == [(76, 102), (76, 102)]


def test_video_without_h264_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(video_sink, "_has_encoder", lambda name: False)
    path = tmp_path / "out.mp4"
    with VideoSink(path, 29.97, CLASSES) as sink:
        for index in range(4):
            sink.write(frame(index), result(index))
    assert len(decoded(path)) == 4


def test_video_of_unknown_format(tmp_path):
    with pytest.raises(SinkError, match=r"\.mp4"):
        VideoSink(tmp_path / "out.docx", 25.0, CLASSES)
    assert left_in(tmp_path) == []


def test_no_frame_makes_no_video(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), VideoSink(tmp_path / "out.mp4", 25.0, CLASSES):
        pass
    assert left_in(tmp_path) == [] and "no frame" in caplog.text


# Results


@decodes_masks
def test_json_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    with JsonLinesSink(path, CLASSES) as sink:
        sink.write(frame(0), result(0, tracks=(3, 4)))
        (partial,) = tmp_path.iterdir()
        assert json.loads(partial.read_text())["frame_index"] == 0  # each line is out at once
        sink.write(frame(1), result(1, tracks=()))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["reset_reason"] == "first frame" and second["reset_reason"] is None
    assert first["step_ms"] == 12.5 and first["tokens_kept"] == [60, 60] and second["timestamp_s"] == 0.04
    assert second["objects"] == []
    thing = first["objects"][1]
    assert (thing["track_id"], thing["label"], thing["class"]) == (4, 0, "dog")
    assert thing["score"] == pytest.approx(0.54) and thing["box"] == [20, 10, 40, 40]
    np.testing.assert_array_equal(coco_mask.decode(thing["mask"]), result(0, tracks=(4,)).instances.masks[0])


@decodes_masks
def test_youtube_vis(tmp_path):
    """Track 3 is there all the time, track 8 on frames 1 and 3, track 5 on the last frame."""
    path = tmp_path / "out.json"
    tracks = [(3,), (3, 8), (3,), (3, 8), (3, 5)]
    with YouTubeVisSink(path, 17, category_ids=[11, 22]) as sink:
        for index, there in enumerate(tracks):
            sink.write(frame(index), result(index, there))
    entries = json.loads(path.read_text())
    assert [entry["video_id"] for entry in entries] == [17, 17, 17]
    assert [entry["category_id"] for entry in entries] == [22, 22, 11]  # tracks 3, 5, 8
    assert entries[2]["score"] == pytest.approx(np.mean([0.581, 0.583]), abs=1e-6)
    seen = [[segmentation is not None for segmentation in entry["segmentations"]] for entry in entries]
    assert seen == [[True] * 5, [False] * 4 + [True], [False, True, False, True, False]]
    mask = coco_mask.decode(entries[2]["segmentations"][3])
    np.testing.assert_array_equal(mask, result(3, (8,)).instances.masks[0])


def test_youtube_vis_track_takes_the_class_that_its_scores_favour(tmp_path):
    path = tmp_path / "out.json"
    with YouTubeVisSink(path, 1) as sink:
        for index, (label, score) in enumerate([(0, 0.3), (0, 0.3), (1, 0.9)]):
            seen = dataclasses.replace(
                result(index).instances, labels=np.array([label]), scores=np.array([score], np.float32)
            )
            sink.write(frame(index), dataclasses.replace(result(index), instances=seen))
    (entry,) = json.loads(path.read_text())
    assert entry["category_id"] == 2 and entry["score"] == pytest.approx(0.5)


def test_youtube_vis_without_objects(tmp_path):
    with YouTubeVisSink(tmp_path / "out.json", 1) as sink:
        sink.write(frame(0), result(0, ()))
    assert json.loads((tmp_path / "out.json").read_text()) == []


# Live views


def next_picture(stream: io.BufferedIOBase) -> np.ndarray:
    assert stream.readline().startswith(b"--")
    headers = {}
    while (line := stream.readline().strip()) != b"":
        name, value = line.decode().split(": ")
        headers[name] = value
    jpeg = stream.read(int(headers["Content-Length"]))
    stream.readline()
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def test_browser_sees_the_newest_frame():
    with BrowserSink(CLASSES, port=0) as sink:
        sink.write(frame(0), result(0))  # nobody watches: not even drawn
        with urllib.request.urlopen(sink.url, timeout=5) as page:
            assert b"/stream" in page.read()
        with urllib.request.urlopen(f"{sink.url}stream", timeout=5) as stream:
            for index in (1, 40):
                while not sink._newest._wanted:
                    time.sleep(0.005)
                sink.write(frame(index), result(index))
                seen = next_picture(stream)
                assert seen.shape == (HEIGHT, WIDTH, 3)
                assert np.abs(seen[45:70].astype(int) - picture(HEIGHT, WIDTH, index)[45:70]).mean() < 12
            sink.close()
            assert stream.read() == b""  # the page learns of the end


def test_browser_that_reads_nothing_holds_nothing_up():
    with BrowserSink(CLASSES, port=0) as sink, socket.create_connection(sink._server.server_address) as deaf:
        deaf.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        slowest_s = 0.0
        for index in range(60):
            began_s = time.monotonic()
            sink.write(frame(index, 360, 640), result(index, height=360, width=640))
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            time.sleep(0.002)
    assert slowest_s < 10, "a write waited for the browser"  # which never reads; a busy machine is slow, not stuck


def test_browser_port_taken():
    with BrowserSink(CLASSES, port=0) as first, pytest.raises(SinkError, match="Choose another"):
        BrowserSink(CLASSES, port=first._server.server_port)


def test_browser_serves_only_this_computer():
    with BrowserSink(CLASSES, port=0) as sink:
        assert sink._server.server_address[0] == "127.0.0.1" and sink.url.startswith("http://127.0.0.1:")


class FakeWindow:
    """OpenCV's windows; the user presses Q at the third frame."""

    error = type("error", (Exception,), {})
    WINDOW_NORMAL, WND_PROP_VISIBLE = 0, 4

    def __init__(self, has_gui: bool = True) -> None:
        self.has_gui = has_gui
        self.shown: list[np.ndarray] = []

    def namedWindow(self, *_: object) -> None:
        if not self.has_gui:
            raise self.error("The function is not implemented")

    def imshow(self, _: str, image: np.ndarray) -> None:
        self.shown.append(image)

    def waitKey(self, _: int) -> int:
        return ord("q") if len(self.shown) == 3 else -1

    def getWindowProperty(self, *_: object) -> float:
        return 1.0

    def destroyAllWindows(self) -> None:
        pass


def test_window_shows_frames_until_it_is_closed(monkeypatch):
    window = FakeWindow()
    monkeypatch.setattr(live_view, "import_cv2", lambda purpose: window)
    with WindowSink(CLASSES) as sink:
        for index in range(5):
            sink.write(frame(index), result(index))
    assert sink.was_closed and len(window.shown) == 3
    np.testing.assert_array_equal(window.shown[0][50, 5], picture(HEIGHT, WIDTH, 0)[50, 5, ::-1])


@pytest.mark.parametrize(("has_display", "has_gui"), [(True, True), (True, False), (False, True)])
def test_live_view_is_a_window_where_there_can_be_one(monkeypatch, has_display, has_gui):
    monkeypatch.setattr(live_view, "import_cv2", lambda purpose: FakeWindow(has_gui))
    monkeypatch.setattr(live_view.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0" if has_display else "")
    with open_live_view(CLASSES, port=0) as view:
        assert isinstance(view, WindowSink if has_display and has_gui else BrowserSink)


def test_window_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendUnavailableError, match="pip install"):
        WindowSink(CLASSES)
