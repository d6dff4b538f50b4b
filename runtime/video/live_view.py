"""Watching a stream while it runs: a window, or a browser where there is no display."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import BackendUnavailableError, SinkError
from ..results import FrameResult
from .frame import Frame
from .opencv import import_cv2
from .overlay import Overlay
from .sink_types import Sink, SinkContext

logger = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"
_BOUNDARY = "next-picture"
_ESCAPE = 27
_PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Live view</title>
<style>html,body{margin:0;height:100%;background:#111}img{width:100%;height:100%;object-fit:contain}</style>
<img src="/stream" alt="The stream has not started yet, or has ended."></html>
"""


class WindowSink(SinkContext):
    """A window on this computer's display; to be used from the main thread.

    Args:
        classes: Names that the labels index.
        title: The window's title.
        patch_size: Pixels of the model's input along one patch.

    Attributes:
        was_closed: Whether the user closed the window, or pressed Q or Escape in it; frames are ignored from then on.

    Raises:
        BackendUnavailableError: OpenCV is not installed, was built without windows, or finds no display.
    """

    def __init__(self, classes: Sequence[str], *, title: str = "Live view", patch_size: int = 16) -> None:
        self._cv2 = import_cv2("a window")
        self._title = title
        self._overlay = Overlay(classes, patch_size=patch_size)
        self.was_closed = False
        try:
            self._cv2.namedWindow(title, self._cv2.WINDOW_NORMAL)
        except self._cv2.error as error:
            raise BackendUnavailableError(
                "this OpenCV opens no window: it is a headless build, or there is no display. "
                "pip install opencv-python, or use the browser view."
            ) from error

    def write(self, frame: Frame, result: FrameResult) -> None:
        """Show one frame, unless the user has closed the window."""
        if self.was_closed:
            return
        self._cv2.imshow(self._title, np.ascontiguousarray(self._overlay.draw(frame, result)[..., ::-1]))
        key = self._cv2.waitKey(1) & 0xFF
        is_visible = self._cv2.getWindowProperty(self._title, self._cv2.WND_PROP_VISIBLE) >= 1
        if key in (_ESCAPE, ord("q")) or not is_visible:
            self.close()

    def close(self, *, failed: bool = False) -> None:
        """Close the window; may be called twice."""
        if not self.was_closed:
            self.was_closed = True
            self._cv2.destroyAllWindows()


class BrowserSink(SinkContext):
    """A page on this computer that shows the stream, for machines without a display.

    A frame is drawn only when a browser waits for one, and encoded and sent by the browser's own thread: a slow browser
    misses frames and never holds up the stream. Only this computer can connect (from elsewhere: ``ssh -L``).

    Args:
        classes: Names that the labels index.
        port: TCP port on 127.0.0.1; 0 takes a free one.
        patch_size: Pixels of the model's input along one patch.
        quality: Of the JPEG pictures, 1 to 95.

    Attributes:
        url: Where to look.

    Raises:
        SinkError: The port is taken.
    """

    def __init__(self, classes: Sequence[str], *, port: int = 8080, patch_size: int = 16, quality: int = 80) -> None:
        self._overlay = Overlay(classes, patch_size=patch_size)
        self._newest = _NewestPicture(quality)
        try:
            self._server = _Server(port, self._newest)
        except OSError as error:
            raise SinkError(f"port {port} on {_ADDRESS}: {error.strerror}. Choose another, or 0 for any.") from error
        self.url = f"http://{_ADDRESS}:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="live-view", daemon=True)
        self._thread.start()
        logger.info("live view at %s", self.url)

    def write(self, frame: Frame, result: FrameResult) -> None:
        """Draw one frame if somebody waits for it."""
        if self._newest.is_wanted():
            self._newest.put(self._overlay.draw(frame, result).copy())

    def close(self, *, failed: bool = False) -> None:
        """End the page's stream and free the port; may be called twice."""
        if self._thread.is_alive():
            self._newest.end()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def open_live_view(classes: Sequence[str], *, port: int = 8080, patch_size: int = 16, windows: bool = True) -> Sink:
    """A window if there is a display and an OpenCV that can open one, else a page for the browser.

    Args:
        classes: Names that the labels index.
        port: Of the page, see :class:`BrowserSink`.
        patch_size: Pixels of the model's input along one patch.
        windows: False asks for the page at once: OpenCV's windows do not take several threads.

    Raises:
        SinkError: There is no window to be had, and the port is taken.
    """
    if windows and _has_display():
        try:
            return WindowSink(classes, patch_size=patch_size)
        except BackendUnavailableError as error:
            logger.info("no window, so a page for the browser: %s", error)
    return BrowserSink(classes, port=port, patch_size=patch_size)


def _has_display() -> bool:
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class _NewestPicture:
    """Hands the newest picture to whoever waits for one."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        self._changed = threading.Condition()
        self._pixels: NDArray[np.uint8] | None = None
        self._number = 0
        self._wanted = False
        self._ended = False

    def is_wanted(self) -> bool:
        """Whether somebody waits for a picture; asking settles that one is on its way."""
        with self._changed:
            wanted, self._wanted = self._wanted, False
            return wanted

    def put(self, pixels: NDArray[np.uint8]) -> None:
        """Give a picture [H, W, 3] away; it is not to be written to any more."""
        with self._changed:
            self._pixels = pixels
            self._number += 1
            self._changed.notify_all()

    def end(self) -> None:
        """There will be no more pictures."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def next_jpeg(self, after: int) -> tuple[int, bytes] | None:
        """Wait for a picture with a number above ``after``: its number, and it as JPEG; None after the end."""
        with self._changed:
            self._wanted = True
            self._changed.wait_for(lambda: self._number > after or self._ended)
            number, pixels = self._number, self._pixels
            if self._ended or pixels is None:
                return None
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=self._quality)
        return number, encoded.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, newest: _NewestPicture) -> None:
        super().__init__((_ADDRESS, port), _Handler)
        self.newest = newest


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answer with the page, or with the endless stream of pictures in it."""
        try:
            if self.path == "/stream":
                self._send_stream()
            else:
                self._send_page()
        except ConnectionError:
            logger.debug("a browser went away")

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep requests out of the terminal."""
        logger.debug(format, *arguments)

    def _send_page(self) -> None:
        is_page = self.path == "/"
        self.send_response(200 if is_page else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(_PAGE if is_page else b"")

    def _send_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        number = 0
        while (picture := self.server.newest.next_jpeg(after=number)) is not None:
            number, jpeg = picture
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
