"""Every kind of source: what it delivers, how it ends, and what it says when it cannot."""

from __future__ import annotations

import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
import types
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_clips import cut, picture, write_clip

from runtime.errors import (
    BackendUnavailableError,
    SourceError,
    SourceFormatError,
    SourceLostError,
    SourceNotFoundError,
)
from runtime.video.source_types import Timeline
from runtime.video.sources import ImageFolderSource, LiveOptions, open_source

IMPATIENT = LiveOptions(first_delay_s=0.06, longest_delay_s=0.1, open_timeout_s=2.0, read_timeout_s=0.4, max_retries=3)


def ascends(times: list[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(times))


@contextmanager
def tcp_server(talk: Callable[[socket.socket, int], None], connections: int) -> Iterator[str]:
    """The URL of a server that lets ``talk`` speak to each caller, hangs up, and is gone after some of them."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(5)

    def answer(caller: socket.socket, number: int) -> None:
        with caller, suppress(OSError):  # the caller may go first
            talk(caller, number)

    def serve() -> None:
        with server, suppress(OSError):
            for number in range(connections):
                caller, _ = server.accept()
                threading.Thread(target=answer, args=(caller, number), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://admin:secret@127.0.0.1:{server.getsockname()[1]}/live.ts"
    server.close()
    thread.join(5)


def http_stream(data: bytes, after: Callable[[], None] = lambda: None) -> Callable[[socket.socket, int], None]:
    """Answer as a camera does: no length, the stream, then whatever ``after`` waits for."""

    def talk(caller: socket.socket, number: int) -> None:
        caller.recv(4096)
        caller.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n" + data)
        after()

    return talk


@pytest.fixture(scope="module")
def transport_stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("ts") / "clip.ts", frames=30).read_bytes()


# Files


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".webm"])
def test_file_gives_every_frame_once(tmp_path, suffix):
    with open_source(write_clip(tmp_path / f"clip{suffix}", frames=30)) as source:
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(30))
    assert (source.live, source.frame_rate, source.frame_count) == (False, 25.0, 30)
    assert all(frame.discontinuity is None for frame in frames)
    np.testing.assert_allclose(np.diff([frame.timestamp_s for frame in frames]), 0.04, atol=2e-3)
    assert source.counters.frames_read == 30 and source.counters.decode_errors == 0
    assert frames[7].rgb.shape == (96, 128, 3)
    assert np.abs(frames[7].rgb.astype(int) - picture(96, 128, 7)).mean() < 12  # coded with loss


def test_rgb_is_converted_once_and_not_writable(tmp_path):
    with open_source(write_clip(tmp_path / "clip.mp4", frames=1)) as source:
        frame = next(source)
    assert frame.rgb is frame.rgb and frame.rgb.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        frame.rgb[0] = 0


def test_variable_frame_rate_keeps_its_times(tmp_path):
    times_s = [0.0, 0.04, 0.05, 0.3, 0.31, 1.25]
    with open_source(write_clip(tmp_path / "clip.mp4", frames=6, times_s=times_s)) as source:
        np.testing.assert_allclose([frame.timestamp_s for frame in source], times_s, atol=1e-4)


def test_name_with_colon_percent_and_blank(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=3).rename(tmp_path / "12:30 %03d clip.mp4")
    for spec in (path, str(path), f"file://{tmp_path}/12:30%20%2503d%20clip.mp4"):
        with open_source(spec) as source:
            assert len(list(source)) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_cut_off_file_gives_what_decodes_then_says_so(tmp_path, suffix):
    path = write_clip(
        tmp_path / f"clip{suffix}", frames=60, options={"movflags": "faststart"} if suffix == ".mp4" else {}
    )
    path = cut(path, 0.6137)
    frames = []
    with open_source(path) as source, pytest.raises(SourceLostError) as lost:
        for frame in source:
            frames.append(frame)
    assert 10 < len(frames) < 60  # the encoder makes another file on another number of cores
    assert f"after {len(frames)} frames" in str(lost.value) and path.name in str(lost.value)
    assert ascends([frame.timestamp_s for frame in frames])


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_incomplete_last_packet_takes_no_other_frame_with_it(tmp_path, suffix):
    path = write_clip(
        tmp_path / f"clip{suffix}", frames=30, options={"movflags": "faststart"} if suffix == ".mp4" else {}
    )
    data = path.read_bytes()
    end = data.rindex(b"idx1") if suffix == ".avi" else len(data)
    path.write_bytes(data[: end - 20])
    with open_source(path) as source, pytest.raises(SourceLostError, match="after 29 frames"):
        list(source)


def test_index_at_the_cut_off_end(tmp_path):
    """An MP4 whose index was never written cannot be played at all."""
    with pytest.raises(SourceFormatError, match="cut off"):
        open_source(cut(write_clip(tmp_path / "clip.mp4")))


def test_resolution_change_is_marked_once_and_time_goes_on(tmp_path):
    """Two recordings joined, as cameras do; the second starts its clock at zero again."""
    parts = [write_clip(tmp_path / "a.ts", frames=14), write_clip(tmp_path / "b.ts", frames=14, height=64, width=112)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_source(joined) as source:
        frames = list(source)
    assert len(frames) == 28
    assert [(frame.index, frame.discontinuity) for frame in frames if frame.discontinuity] == [
        (14, "resolution change")
    ]
    assert {(frame.height, frame.width) for frame in frames[14:]} == {(64, 112)}
    times_s = [frame.timestamp_s for frame in frames]
    assert ascends(times_s) and times_s[-1] - times_s[0] == pytest.approx(27 * 0.04, abs=0.1)


def test_damage_in_the_middle_is_counted_not_fatal(tmp_path):
    data = bytearray(write_clip(tmp_path / "clip.avi", frames=40).read_bytes())
    movie = data.index(b"movi")
    chunks = [at for at in range(movie, len(data)) if data[at : at + 4] == b"00dc"][13:40:13]
    for at in chunks:
        data[at + 8 : at + 24] = b"\xff" * 16
    (tmp_path / "clip.avi").write_bytes(data)
    with open_source(tmp_path / "clip.avi") as source:
        assert len(list(source)) >= 36
    assert source.counters.decode_errors >= 1


def test_not_there():
    with pytest.raises(SourceNotFoundError, match=r"nowhere/clip\.mp4"):
        open_source("nowhere/clip.mp4")


def song(path: Path) -> None:
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(16000))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("notes.txt", lambda path: path.write_text("no video\n" * 99)),
        ("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000))),
        ("empty.mp4", lambda path: path.touch()),
        ("song.wav", song),
        ("folder", lambda path: path.mkdir()),
    ],
)
def test_no_video(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(SourceFormatError, match=name):
        open_source(tmp_path / name)


def test_close_twice_and_early(tmp_path):
    source = open_source(write_clip(tmp_path / "clip.mp4"))
    next(source)
    source.close()
    source.close()
    assert list(source) == []


def test_replay_at_its_own_speed(tmp_path):
    with open_source(write_clip(tmp_path / "clip.mp4", frames=8), live=True) as source:
        began_s = time.monotonic()
        assert len(list(source)) == 8
    assert source.live and time.monotonic() - began_s > 7 * 0.04 - 0.02


# Folders of images


def write_images(folder: Path, names: list[str], height: int = 20, width: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(picture(height, width, index)).save(folder / name)
    return folder


def test_folder_in_natural_order(tmp_path):
    folder = write_images(tmp_path / "video", ["img_1.png", "img_2.png", "img_10.png"])
    (folder / "readme.txt").write_text("not an image")
    (folder / "._img_1.png").write_bytes(b"what a Mac leaves")
    with open_source(folder, frame_rate=5) as source:
        frames = list(source)
    assert (source.frame_rate, source.frame_count, source.live) == (5, 3, False)
    assert [frame.timestamp_s for frame in frames] == pytest.approx([0.0, 0.2, 0.4])
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.rgb, picture(20, 30, index))


def test_folder_as_youtube_vis_has_it(tmp_path):
    """The only video below is meant; of several, one has to be named."""
    write_images(tmp_path / "JPEGImages" / "0043f083b5", ["00000.jpg", "00005.jpg"])
    with open_source(tmp_path) as source:
        assert len(list(source)) == 2
    write_images(tmp_path / "JPEGImages" / "00f88c4f0a", ["00000.jpg"])
    with pytest.raises(SourceFormatError, match="0043f083b5"):
        open_source(tmp_path)


def test_folder_with_another_size_and_a_broken_image(tmp_path):
    folder = write_images(tmp_path / "video", ["0.png", "1.png"])
    write_images(folder, ["2.png"], height=40)
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with open_source(folder) as source:
        assert [next(source).discontinuity for _ in range(3)] == [None, None, "resolution change"]
        with pytest.raises(SourceLostError, match=r"3\.png: image 4 of 4 .* 3 were delivered"):
            next(source)


# Network streams


def test_lost_stream_reconnects(transport_stream, caplog):
    """Five connections, more than there are retries in a row: marked, counted, logged once, and time goes on."""
    camera = http_stream(transport_stream[: 188 * 100])
    frames = []
    broken_off = pytest.raises(SourceLostError, match="after 3 attempts")
    with tcp_server(camera, 5) as url, open_source(url, options=IMPATIENT) as source, broken_off as lost:
        for frame in source:
            frames.append(frame)
    assert source.live and source.counters.reconnects == 4
    marks = [frame.index for frame in frames if frame.discontinuity == "reconnect"]
    assert len(marks) == 4 and marks[0] > 5 and len(frames) == source.counters.frames_read
    times_s = [frame.timestamp_s for frame in frames]
    assert ascends(times_s)
    assert all(times_s[mark] - times_s[mark - 1] > IMPATIENT.first_delay_s for mark in marks)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == len(set(warnings)) == 2  # the stream ended; nobody answers
    assert "secret" not in caplog.text + str(lost.value)


def test_silent_stream_is_lost_after_the_time_limit(transport_stream):
    release = threading.Event()
    camera = http_stream(transport_stream, lambda: release.wait(3))
    with tcp_server(camera, 2) as url, open_source(url, options=IMPATIENT) as source:
        began_s = time.monotonic()
        while not next(source).discontinuity:
            pass
        waited_s = time.monotonic() - began_s
        release.set()
    assert source.counters.reconnects == 1 and waited_s > 0.35


def test_close_ends_the_wait_between_attempts(transport_stream):
    patient = LiveOptions(first_delay_s=30.0, open_timeout_s=2.0)
    with tcp_server(http_stream(transport_stream), 1) as url:
        source = open_source(url, options=patient)
        reading = threading.Thread(target=lambda: list(source))
        reading.start()
        while source.counters.frames_read < 30:
            time.sleep(0.01)
        time.sleep(0.1)
        began_s = time.monotonic()
        source.close()
        reading.join(2)
    assert not reading.is_alive() and time.monotonic() - began_s < 0.5


def test_recording_over_http_has_an_end(tmp_path):
    write_clip(tmp_path / "clip.mp4", frames=10, options={"movflags": "faststart"})
    handler = partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with open_source(f"http://127.0.0.1:{server.server_port}/clip.mp4") as source:
            assert not source.live and len(list(source)) == 10
        with pytest.raises(SourceNotFoundError, match="404"):
            open_source(f"http://127.0.0.1:{server.server_port}/other.mp4")
        server.shutdown()


@pytest.mark.parametrize("url", ["rtsp://admin:secret@127.0.0.1:9/stream", "http://admin:secret@127.0.0.1:9/a"])
def test_nobody_answers(url):
    with pytest.raises(SourceNotFoundError, match="Connection refused") as error:
        open_source(url, options=IMPATIENT)
    assert "secret" not in str(error.value) and "127.0.0.1:9" in str(error.value)


def test_unknown_protocol():
    with pytest.raises(SourceError, match="carrier-pigeon"):
        open_source("carrier-pigeon://somewhere")


# Cameras


def test_no_such_device():
    with pytest.raises(SourceNotFoundError, match="/dev/video97"):
        open_source("/dev/video97")


class FakeCapture:
    """A camera that gives two pictures and is unplugged then."""

    def __init__(self, *_: object) -> None:
        self.left = 2

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, picture(8, 10)[..., ::-1]) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.left = 0


@pytest.fixture
def fake_cv2(monkeypatch):
    cv2 = types.SimpleNamespace(
        VideoCapture=FakeCapture,
        CAP_PROP_FPS=5,
        CAP_GSTREAMER=1800,
        COLOR_BGR2RGB=4,
        cvtColor=lambda image, _: np.ascontiguousarray(image[..., ::-1]),
        getBuildInformation=lambda: "  GUI:     NONE\n  Video I/O:\n    GStreamer:    YES (1.20.3)\n",
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)


@pytest.mark.parametrize("spec", [0, "0", "nvarguscamerasrc ! video/x-raw ! appsink"])
def test_camera_through_opencv(fake_cv2, spec):
    with open_source(spec, options=IMPATIENT) as source:
        frames = [next(source) for _ in range(5)]
    assert source.live and source.frame_rate is None
    assert [frame.discontinuity for frame in frames] == [None, None, "reconnect", None, "reconnect"]
    np.testing.assert_array_equal(frames[0].rgb, picture(8, 10))
    assert ascends([frame.timestamp_s for frame in frames])


@pytest.mark.parametrize("spec", [0, "videotestsrc ! appsink"])
def test_camera_without_opencv(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendUnavailableError, match="install"):
        open_source(spec)


def test_imports_without_opencv_torch_and_onnx():
    blocked = "import sys; sys.modules.update(cv2=None, torch=None, onnx=None)"
    code = f"{blocked}; import runtime.video.sources, runtime.video.sinks, runtime.video.reader"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Time


@given(st.lists(st.one_of(st.none(), st.floats(-1e4, 1e6))), st.sampled_from([None, 1.0, 29.97]))
def test_times_ascend_whatever_the_source_says(times_s, frame_rate):
    timeline = Timeline(frame_rate)
    assert ascends([timeline.stamp(time_s) for time_s in times_s])


def test_time_goes_on_after_a_gap():
    timeline = Timeline(10)
    before_s = [timeline.stamp(time_s) for time_s in (7.0, 7.1)]
    timeline.resume_after(2.0)
    after_s = [timeline.stamp(time_s) for time_s in (0.0, 0.5)]
    assert before_s + after_s == pytest.approx([7.0, 7.1, 9.1, 9.6])


def test_named_images_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    for level in (10, 20, 30):
        Image.new("RGB", (8, 6), (level,) * 3).save(tmp_path / f"{level}.png")
    source = ImageFolderSource(tmp_path, names=["30.png", "10.png"])
    assert [int(frame.rgb[0, 0, 0]) for frame in source] == [30, 10]
    with pytest.raises(SourceNotFoundError, match=r"40\.png is missing, and 0 more of 2 images"):
        ImageFolderSource(tmp_path, names=["30.png", "40.png"])
