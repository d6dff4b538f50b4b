"""Where results go: an annotated video, JSON Lines, YouTube-VIS results, a window, a browser."""

from __future__ import annotations

from .live_view import BrowserSink, WindowSink, open_live_view
from .result_sinks import JsonLinesSink, YouTubeVisSink
from .sink_types import Sink
from .video_sink import VideoSink

__all__ = ["BrowserSink", "JsonLinesSink", "Sink", "VideoSink", "WindowSink", "YouTubeVisSink", "open_live_view"]
