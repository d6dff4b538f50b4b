"""The command line, in this process and in another one, and clips to feed it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def check(self) -> Ended:
        """This, if the command succeeded."""
        assert self.code == 0, self.err + self.out
        return self

    def refused(self, *words: str, code: int = 2) -> str:
        """The message, if the command was refused as it should be: clear, on stderr, without a traceback."""
        assert self.code == code, f"exit code {self.code}\n{self.err}{self.out}"
        assert "Traceback" not in self.err + self.out, self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, f"{missing} not in: {self.err}"
        return self.err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``cli("inspect", bundle)``: ``deploy.py`` with these arguments, in this process."""
    import deploy

    monkeypatch.setattr(signal, "signal", lambda *args: None)  # the test runner's own handlers stay
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["deploy.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            deploy.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``deploy.py`` in a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "deploy.py"), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """``make_clip(path, frames=12, height=72, width=128)``: a video of drifting waves at 25 frames per second."""

    def make(path: Path, frames: int = 12, height: int = 72, width: int = 128) -> Path:
        y, x = np.mgrid[:height, :width]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", 25, options={"preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.gop_size = 12
            for index in range(frames):
                waves = 2 * x + 6 * (index % 100), 2 * y, x + y
                picture = np.stack([128 + 100 * np.sin(wave / 40) for wave in waves], axis=-1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory, make_clip: Callable[..., Path]) -> Path:
    """A clip of 12 frames. Read only."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def own_bundle(micro_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the micro bundle, to change."""
    return Path(shutil.copytree(micro_bundle, tmp_path / "own-bundle"))


@pytest.fixture(scope="session")
def eager_bundle(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro bundle, whose random network is never sure, with a tracker that shows all the same."""
    bundle = Path(shutil.copytree(micro_bundle, tmp_path_factory.mktemp("eager") / "eager-bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["tracker"] |= {"start_score": 0.05, "keep_score": 0.02}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture
def disk_of() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """``with disk_of(size)``: no file may grow beyond ``size`` bytes, as on a disk that is full."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores SIGXFSZ
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit
