"""The README's commands and code, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(micro_bundle, drifting_frames, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "model").symlink_to(micro_bundle)
    monkeypatch.chdir(tmp_path)
    seen = []
    frames = drifting_frames(3)
    exec(compile(code + "        seen.append(result)\n", "README.md", "exec"), {"camera": frames, "seen": seen})
    assert [result.frame_index for result in seen] == [0, 1, 2]
    assert seen[0].reset_reason == "first frame"
    assert seen[1].reset_reason is None


@pytest.mark.slow
def test_the_four_commands_run(micro_checkpoint, drifting_frames, tmp_path):
    lines = re.findall(r"^    (deploy\.py (?:export|verify|run|profile) .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["export", "verify", "run", "profile"]
    (tmp_path / "model.safetensors").symlink_to(micro_checkpoint)
    _write_video(tmp_path / "street.mp4", drifting_frames(5, (144, 256)))
    for line in lines:
        line = line.replace("--image-size 288 512", "--image-size 96 160")
        done = subprocess.run(
            [sys.executable, str(ROOT / "deploy.py"), *line.split()[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "out.mp4").stat().st_size > 0
    assert (tmp_path / "out.json").is_file()


def _write_video(path: Path, frames) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
