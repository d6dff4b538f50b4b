import dataclasses
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from typer.testing import CliRunner

from models.training.scenes import CLASSES, SceneConfig, files, render_clip, sprites, write_youtube_vis
from models.training.scenes.__main__ import main
from models.training.scenes.shots import MIN_OBJECT_PIXELS, MIN_VISIBLE_PIXELS
from models.training.scenes.textures import typical_texture
from runtime.errors import SinkError

# pycocotools 2.0.11 has not followed NumPy 2 yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL = SceneConfig(height=72, width=128, frames=6)


def clips(count, **changes):
    return [render_clip(dataclasses.replace(SMALL, **changes), seed) for seed in range(count)]


def assert_same_clip(one, other):
    np.testing.assert_array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.cuts == other.cuts


def tree(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_is_a_clip():
    assert_same_clip(render_clip(SMALL, 3), render_clip(SMALL, 3))
    assert not np.array_equal(render_clip(SMALL, 3).frames, render_clip(SMALL, 4).frames)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    frames=st.integers(1, 5),
    max_objects=st.integers(1, 7),
    max_furniture=st.integers(0, 4),
    cut_probability=st.sampled_from([0.0, 1.0]),
    camera=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**40),
)
def test_any_scene_keeps_its_promises(seed, **fields):
    config = SceneConfig(**fields)
    clip = render_clip(config, seed)

    objects = len(clip.labels)
    assert clip.frames.shape == (config.frames, config.height, config.width, 3)
    assert clip.masks.shape == (objects, *clip.frames.shape[:3])
    assert (clip.frames.dtype, clip.masks.dtype, clip.labels.dtype) == (np.uint8, bool, np.int64)
    assert objects <= config.max_objects * (1 + len(clip.cuts))
    assert ((clip.labels >= 0) & (clip.labels < len(CLASSES))).all()
    assert clip.masks.sum(axis=0, dtype=int).max(initial=0) <= 1, "masks overlap"
    pixels = clip.masks.sum(axis=(2, 3))
    assert not ((pixels > 0) & (pixels < MIN_VISIBLE_PIXELS)).any()
    assert (pixels.max(axis=1) > MIN_OBJECT_PIXELS).all()


@pytest.mark.parametrize(
    ("field", "value"), [("frames", 0), ("height", 8), ("cut_probability", 1.5), ("max_objects", 300), ("noise", -1.0)]
)
def test_config_names_what_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it has to be in"):
        SceneConfig(**{field: value})


def test_a_cut_changes_picture_and_objects():
    """The step over the cut is large against the steps within a shot, and no object is on both sides of it."""
    for clip in clips(10, cut_probability=1.0, frames=8):
        (cut,) = clip.cuts
        steps = np.abs(np.diff(clip.frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
        assert steps[cut - 1] > 1.5 * np.delete(steps, cut - 1).max()
        seen = clip.masks.any(axis=(2, 3))
        assert not (seen[:, :cut].any(axis=1) & seen[:, cut:].any(axis=1)).any()


def test_no_cut_unless_asked_for():
    assert all(clip.cuts == () for clip in clips(10, cut_probability=0.0))


def test_objects_move_enter_and_leave():
    entered = left = 0
    for clip in clips(20, frames=24, cut_probability=0.0):
        seen = clip.masks.any(axis=(2, 3))
        entered += (~seen[:, 0]).sum()
        left += (~seen[:, -1]).sum()
    assert entered >= 5
    assert left >= 5


def test_a_still_camera_without_speed_moves_no_background():
    """Where no object ever is, only light and noise change."""
    clip = render_clip(dataclasses.replace(SMALL, camera=0.0, noise=0.0, max_objects=1, cut_probability=0.0), 1)
    near = cv2.dilate(clip.masks.any(axis=(0, 1)).astype(np.uint8), np.ones((25, 25))) > 0
    first, last = clip.frames[0][~near].astype(float), clip.frames[-1][~near].astype(float)
    assert np.corrcoef(first.ravel(), last.ravel())[0, 1] > 0.99


def test_objects_differ_from_what_surrounds_them():
    """The rim inside an object against the rim outside it, in the median over many objects."""
    kernel = np.ones((3, 3))
    contrasts = []
    for clip in clips(25, height=144, width=256, frames=1):
        for mask in clip.masks[:, 0].astype(np.uint8):
            inner = (mask - cv2.erode(mask, kernel)) > 0
            outer = (cv2.dilate(mask, kernel) - mask) > 0
            if inner.any() and outer.any():
                contrasts.append(np.abs(clip.frames[0][inner].mean(axis=0) - clip.frames[0][outer].mean(axis=0)).max())
    assert np.median(contrasts) > 15


def test_outlines_of_classes_differ():
    """Area over the area of the enclosing circle, as far as it goes: every class fills its sprite differently."""
    rng = np.random.default_rng(0)
    shares = {name: sprites._fill(*sprites.class_outline(rng, name), 110, 40.0).mean() / 255 for name in CLASSES}
    assert len({round(share, 3) for share in shares.values()}) == len(CLASSES)
    assert max(shares, key=shares.__getitem__) == "disc"


def test_all_classes_and_look_alikes_occur():
    labels = [tuple(clip.labels) for clip in clips(60, frames=1)]
    assert {label for clip in labels for label in clip} == set(range(len(CLASSES)))
    assert any(len(set(clip)) < len(clip) for clip in labels)


def test_youtube_vis_fields(tmp_path):
    write_youtube_vis(tmp_path / "set", SMALL, [1, 2, 3], progress=False)

    data = json.loads((tmp_path / "set" / "instances.json").read_text())
    assert {"info", "videos", "categories", "annotations"} <= data.keys()
    assert [(entry["id"], entry["name"]) for entry in data["categories"]] == list(enumerate(CLASSES, start=1))
    assert [video["id"] for video in data["videos"]] == [1, 2, 3]
    for video in data["videos"]:
        assert (video["height"], video["width"], video["length"]) == (72, 128, 6)
        assert video["file_names"][0].endswith("/00000.jpg")
        assert all((tmp_path / "set" / "JPEGImages" / name).is_file() for name in video["file_names"])
    assert [entry["id"] for entry in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))


def test_annotations_describe_the_masks(tmp_path):
    """Run lengths by pycocotools, box and area by counting pixels."""
    write_youtube_vis(tmp_path / "set", SMALL, [5], progress=False)
    clip = render_clip(SMALL, 5)

    annotations = json.loads((tmp_path / "set" / "instances.json").read_text())["annotations"]
    assert len(annotations) == len(clip.labels) > 0
    for entry, masks, label in zip(annotations, clip.masks, clip.labels, strict=True):
        assert (entry["video_id"], entry["category_id"], entry["iscrowd"]) == (1, label + 1, 0)
        assert (entry["height"], entry["width"]) == (72, 128)
        for code, box, area, mask in zip(entry["segmentations"], entry["bboxes"], entry["areas"], masks, strict=True):
            assert_frame_entry(code, box, area, mask)


def assert_frame_entry(code, box, area, mask):
    if not mask.any():
        assert code is box is area is None
        return
    np.testing.assert_array_equal(rle.decode(code), mask)
    y, x = np.nonzero(mask)
    assert box == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    assert area == mask.sum()


def test_workers_change_nothing(tmp_path):
    for workers in (1, 2):
        write_youtube_vis(tmp_path / str(workers), SMALL, range(5), workers=workers, progress=False)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(config, seed):
        raise RuntimeError("no clip")

    monkeypatch.setattr(files, "render_clip", fail)
    with pytest.raises(RuntimeError, match="no clip"):
        write_youtube_vis(tmp_path / "set", SMALL, [1], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(SinkError, match="exists already"):
        write_youtube_vis(tmp_path / "set", SMALL, [1], progress=False)
    with pytest.raises(ValueError, match="comes twice"):
        write_youtube_vis(tmp_path / "other", SMALL, [1, 1], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_command_line(tmp_path):
    app = typer.Typer()
    app.command()(main)
    arguments = [str(tmp_path / "set"), "--clips", "2", "--frames", "3", "--size", "48", "64", "--seed", "7"]

    assert CliRunner().invoke(app, arguments).exit_code == 0
    videos = json.loads((tmp_path / "set" / "instances.json").read_text())["videos"]
    assert [video["file_names"][0] for video in videos] == [f"scene_000700000{i}/00000.jpg" for i in (0, 1)]

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "SinkError" in again.output

    small = CliRunner().invoke(app, [str(tmp_path / "small"), "--size", "8", "64"])
    assert small.exit_code == 2
    assert "height is 8" in small.output


def test_typical_texture_tells_the_class_by_its_hue():
    """Members of a class look alike and unlike those of the class on the other side of the colour circle."""
    rng = np.random.default_rng(0)
    for label in range(len(CLASSES)):
        colours = [typical_texture(rng, label).colours[1] for _ in range(8)]
        others = [typical_texture(rng, (label + 4) % len(CLASSES)).colours[1] for _ in range(8)]
        tints = [np.array(group) - np.mean(group, axis=1, keepdims=True) for group in (colours, others)]
        own = tints[0].mean(0)
        assert (tints[0] @ own > 0).all() and (tints[1] @ own < 0).all()
        assert len({typical_texture(rng, label).family for _ in range(4)}) == 1


def test_typical_texture_changes_objects_alone():
    plain = SceneConfig(48, 64, frames=2, max_furniture=0, shared_texture_probability=0, max_objects=2)
    clips = [render_clip(replace(plain, typical_texture_probability=share), 3) for share in (0.0, 1.0)]
    assert (clips[0].frames != clips[1].frames).any()
    with pytest.raises(ValueError, match="typical_texture_probability"):
        replace(plain, typical_texture_probability=1.5)
