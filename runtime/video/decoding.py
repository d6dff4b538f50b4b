"""PyAV containers: opened with errors that a user understands, decoded so that nothing that decodes is lost."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ..errors import SourceError, SourceFormatError, SourceNotFoundError

logger = logging.getLogger(__name__)

TimedPicture = tuple[av.VideoFrame, float | None]  # with its time in seconds, where the video says it

_NO_VIDEO_FORMATS = {"tty"}  # FFmpeg plays text files as ANSI art
_MPEG_TS_PACKET_BYTES = (188, 192, 204)
_SLOWEST_RATE = 1.0
_PERMISSION_HINT = "Check the permissions, or the user name and password in the address."
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def without_credentials(url: str) -> str:
    """The URL as it may be shown and logged.

    >>> without_credentials("rtsp://admin:secret@10.0.0.7/stream1")
    'rtsp://***@10.0.0.7/stream1'
    """
    return _CREDENTIALS.sub("***@", url)


class Decoder:
    """One opened video: the pictures of its first real video stream.

    Args:
        url: What PyAV opens; a file is given as ``file:PATH``, because a name may hold a colon.
        name: What messages call it.
        container_format: PyAV's name of the format, None to find out.
        options: Options of the format and the protocol.
        timeouts_s: How long opening and reading one packet may take; None for no limit.
        low_delay: Decode within a frame rather than across frames: slower, but no frame waits for the next. None for
            whatever suits: a video without an end is live.

    Attributes:
        frame_rate, frame_count: As announced, or None.
        duration_s: As announced, None for a source without an end.

    Raises:
        SourceNotFoundError: Nothing answers there.
        SourceFormatError: It is not a video, or has no video stream that can be decoded.
        SourceError: It may not be opened.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        container_format: str | None = None,
        options: Mapping[str, str] | None = None,
        timeouts_s: tuple[float, float] | None = None,
        low_delay: bool | None = None,
    ) -> None:
        self.name = name
        self._container = _open(url, name, container_format, options, timeouts_s)
        try:
            self._stream = _video_stream(self._container, name)
        except SourceError:
            self._container.close()
            raise
        self._loss: av.FFmpegError | None = None
        self._is_cut_off = False
        self._end_s = 0.0
        self._tick_s = float(self._stream.time_base or 0)
        self.frame_rate = float(self._stream.average_rate) if self._stream.average_rate else None
        self.duration_s = _duration_s(self._container, self._stream)
        self.frame_count = self._stream.frames or _estimate(self.duration_s, self.frame_rate)
        is_live = self.duration_s is None if low_delay is None else low_delay
        self._stream.thread_type = "SLICE" if is_live else "AUTO"

    def close(self) -> None:
        """Close the file or connection; may be called twice, but not while another thread reads."""
        self._container.close()

    def pictures(self, on_error: Callable[[], None]) -> Generator[TimedPicture, None, None]:
        """Every picture that decodes, in the order in which they are shown, with its time in seconds.

        A last packet that is incomplete is left out: its error would take good pictures with it that are still inside
        the decoder.

        Args:
            on_error: Called for each packet that does not decode.
        """
        waiting: list[av.Packet[VideoStream]] = []
        for packet in self._demux():
            ready = [*waiting, packet]
            waiting = [ready.pop()] if packet.is_corrupt else []
            for whole in ready:
                yield from self._decode(whole, on_error)
        self._is_cut_off = bool(waiting)
        yield from self._decode(None, on_error)

    def missing(self) -> str | None:
        """After the last picture: what shows that the video was cut off; None if it seems whole."""
        if self._loss is not None:
            return _reason(self._loss)
        if self._is_cut_off:
            return "its last packet is incomplete"
        size = self._container.size
        if self._container.format.name == "mpegts" and size > 0 and all(size % n for n in _MPEG_TS_PACKET_BYTES):
            return f"{size} bytes are no whole number of packets"
        short_s = (self.duration_s or 0.0) - self._end_s
        if short_s > max(0.25, 3 / (self.frame_rate or _SLOWEST_RATE)):
            return f"it announces {self.duration_s:.1f} s and ends {short_s:.1f} s before"
        return None

    def _demux(self) -> Generator[av.Packet[VideoStream], None, None]:
        """The packets of the stream; what ends them too early is left in ``_loss``."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0 and packet.dts is None:
                    return  # PyAV's request to flush the decoder
                if packet.pts is not None:
                    end = packet.pts + (packet.duration or 0) - (self._stream.start_time or 0)
                    self._end_s = max(self._end_s, end * self._tick_s)
                yield packet
        except av.FFmpegError as error:
            self._loss = error

    def _decode(
        self, packet: av.Packet[VideoStream] | None, on_error: Callable[[], None]
    ) -> Generator[TimedPicture, None, None]:
        """The pictures that come out when ``packet`` goes in; None lets out all that are still inside."""
        try:
            pictures = self._stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            logger.debug("%s: a packet does not decode: %s", self.name, _reason(error))
            on_error()
            return
        for picture in pictures:
            stamp = picture.dts if picture.pts is None else picture.pts
            yield picture, None if stamp is None else stamp * self._tick_s


def _open(
    url: str,
    name: str,
    container_format: str | None,
    options: Mapping[str, str] | None,
    timeouts_s: tuple[float, float] | None,
) -> InputContainer:
    try:
        return av.open(url, format=container_format, options=dict(options or {}), timeout=timeouts_s)
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise SourceFormatError(
            f"{name}: this is no video that can be decoded ({_reason(error)}). "
            "If it should be one, its beginning is damaged, or it was cut off before its index at the end was written."
        ) from error
    except (av.error.PermissionError, av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError) as error:
        raise SourceError(f"{name}: it may not be opened ({_reason(error)}). {_PERMISSION_HINT}") from error
    except (av.error.ProtocolNotFoundError, av.error.DemuxerNotFoundError) as error:
        raise SourceFormatError(
            f"{name}: this build of PyAV cannot read such an address ({_reason(error)})."
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise SourceNotFoundError(
            f"{name}: nothing answers there ({_reason(error)}). Check the name, and that the device is on."
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong without the address, which may hold a password."""
    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or type(error).__name__)


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    covers = Disposition.attached_pic  # a song's cover is no video
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or container.format.name in _NO_VIDEO_FORMATS:
        raise SourceFormatError(f"{name}: there is no video in it. Give a video file, an image folder or a camera.")
    if streams[0].codec_context is None:
        raise SourceFormatError(f"{name}: this build of PyAV has no decoder for its video. Convert it to H.264.")
    return streams[0]


def _duration_s(container: InputContainer, stream: VideoStream) -> float | None:
    """Length of the video stream itself where it is announced: sound often ends later."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _estimate(duration_s: float | None, frame_rate: float | None) -> int | None:
    return round(duration_s * frame_rate) if duration_s and frame_rate else None
