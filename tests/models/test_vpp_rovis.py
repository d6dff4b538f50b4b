"""The published network: its reference vectors, its checkpoints, and the rewrites against the plain formulation."""

from __future__ import annotations

import pickle
import sys
import types
from dataclasses import replace

import numpy as np
import published_vpp as plain
import pytest
import torch
from published_files import (
    FRAMES,
    IMAGE_SIZE,
    STAGE_OF_BLOCK,
    random_published,
    reference,
    reference_weights,
    save_published,
)

from models.checkpoints import load_host
from models.pruned_host import Selection
from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.deformable import DeformableAttention, cell_centres
from models.vpp_rovis.network import VppRovis
from models.vpp_rovis.published import dead_tensors, load_published, renamed
from runtime.errors import CheckpointError, ImageSizeError
from runtime.parity import relative_difference

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return reference()


@pytest.fixture(scope="module")
def micro(vectors, tmp_path_factory) -> VppRovis:
    path = save_published(tmp_path_factory.mktemp("published") / "micro.pth", reference_weights(vectors))
    return load_published(path).at_image_size(IMAGE_SIZE)


def carried(vectors, t: int) -> torch.Tensor:
    """The track queries that frame t was given: the one object was found by query 12, then by its own."""
    if not int(vectors[f"t{t}.n_track_queries"]):
        return torch.zeros(0, vectors[f"t{t}.queries"].shape[1])
    row = 12 if not int(vectors[f"t{t - 1}.n_track_queries"]) else 20
    return torch.from_numpy(vectors[f"t{t - 1}.queries"][row : row + 1])


def with_tracks(state, queries: torch.Tensor):
    """The state with these queries in its first slots."""
    slots, valid = torch.zeros_like(state.track_queries), torch.zeros_like(state.track_valid)
    slots[0, : len(queries)], valid[0, : len(queries)] = queries, True
    return state._replace(track_queries=slots, track_valid=valid)


# --- the reference vectors ------------------------------------------------------------------------------------------


def test_plain_formulation_gives_the_reference_vectors(vectors):
    weights = reference_weights(vectors)
    backbone = plain.part(weights, "detector.backbone.")
    head = plain.part(weights, "detector.panoptic_head.")
    prior = None
    for t in range(FRAMES):
        image = torch.from_numpy(vectors[f"t{t}.image"])[None]
        maps, kept, prior = plain.backbone(backbone, image, prior, heads=3, keep_ratio=0.7)
        np.testing.assert_array_equal(kept.numpy(), vectors[f"t{t}.kept"])
        tracks = carried(vectors, t)
        classes, masks, queries = plain.head(head, maps, tracks, torch.zeros_like(tracks), layers=2, decoder=3)
        got = {"cls_logits": classes, "mask_logits": masks, "queries": queries}
        got |= {f"f{i}": level for i, level in enumerate(maps, 1)} | {"x_ref": prior.x_ref, "x_map": prior.x_map}
        for name, value in got.items():
            assert relative_difference(value[0].numpy(), vectors[f"t{t}.{name}"]) < 1e-5, (t, name)


@pytest.mark.parametrize("mode", [Selection.THRESHOLD, Selection.BUDGET])
def test_every_frame_equals_the_published_one(vectors, micro, mode, monkeypatch):
    """In budget mode K is what the published thresholds kept, sometimes less than in the frame before."""
    monkeypatch.setattr(micro, "compares_all", True)
    state = micro.initial_state(1)
    for t in range(FRAMES):
        counts = torch.from_numpy(vectors[f"t{t}.kept"].sum(1)[[1, 3, 6, 9]])
        image = torch.from_numpy(vectors[f"t{t}.image"])[None].permute(0, 2, 3, 1)
        tracks = carried(vectors, t)
        state = with_tracks(state, tracks)
        with torch.no_grad():
            maps, _, _ = micro.backbone(image, state, counts, mode)
            outputs, state = micro(image, state, counts, mode)
        kept = outputs.kept_stages[0].numpy() >= STAGE_OF_BLOCK[:, None]
        np.testing.assert_array_equal(kept, vectors[f"t{t}.kept"])
        np.testing.assert_array_equal(state.kept[0].numpy(), vectors[f"t{t}.prior_mask"])
        rows = micro.config.queries + len(tracks)
        got = {"cls_logits": outputs.class_logits, "mask_logits": outputs.mask_logits, "queries": outputs.queries}
        values = {name: value[0, :rows] for name, value in got.items()} | {"x_ref": state.keys[0]}
        values |= {f"f{i}": level[0] for i, level in enumerate(maps, 1)}
        for name, value in values.items():
            assert relative_difference(value.numpy(), vectors[f"t{t}.{name}"]) < TOLERANCE, (t, name)


def test_keys_of_training_are_the_input_of_block_one(vectors, micro):
    as_trained = VppRovis(replace(micro.config, overwritten_keys=False)).eval()
    as_trained.load_state_dict(micro.state_dict())
    image = torch.from_numpy(vectors["t0.image"])[None].permute(0, 2, 3, 1)
    budget = torch.tensor([micro.patch_count] * 4)
    with torch.no_grad():
        _, state = as_trained(image, as_trained.initial_state(1), budget)
        pixels = image.permute(0, 3, 1, 2)
        _, sides = as_trained.spatial_prior(pixels)
        side = torch.cat([x + level for x, level in zip(sides, as_trained.level_embed, strict=True)], 1)
        x = as_trained.patch_embed(pixels).flatten(2).transpose(1, 2) + as_trained._positions()
        want = as_trained.blocks[0](as_trained.interactions[0].injector(x, side))
    torch.testing.assert_close(state.keys, want)
    assert relative_difference(state.keys[0].numpy(), vectors["t0.x_ref"]) > 0.01


# --- rewrites against the plain formulation -------------------------------------------------------------------------


@pytest.mark.parametrize("tracks", [0, 3])
def test_random_network_equals_the_plain_formulation(tmp_path, tracks):
    """Other sizes than the reference's, several tracks, a batch of two different pictures."""
    config = VppRovisConfig(
        classes=("a", "b", "c"), embed_dim=48, heads=3, stem_dim=8, map_hidden=20, selector_hidden=10, feature_dim=64,
        queries=7, encoder_layers=3, encoder_ffn=48, decoder_layers=4, decoder_ffn=56,
    )  # fmt: skip
    weights = random_published(config, seed=3)
    model = load_published(save_published(tmp_path / "random.pth", weights)).at_image_size((64, 96))
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    queries = torch.randn(2, tracks, 64, generator=torch.Generator().manual_seed(1))
    state = model.initial_state(2)
    state.track_queries[:, :tracks], state.track_valid[:, :tracks] = queries, True
    count = model.patch_count
    with torch.no_grad():
        outputs, _ = model(pictures, state, torch.tensor([count] * 4))
    rows = config.queries + tracks
    backbone = plain.part(weights, "detector.backbone.")
    for j in range(3):  # the plain formulation decides by threshold: let every token pass
        backbone[f"selective_modules.{j}.mlp.fc2.bias"] = torch.tensor([1e3, 0.0])
    for b in range(2):
        with torch.no_grad():
            maps, _, _ = plain.backbone(backbone, pictures[b : b + 1].permute(0, 3, 1, 2), None, 3, 1.0)
            head = plain.part(weights, "detector.panoptic_head.")
            want = plain.head(head, maps, queries[b], torch.zeros(tracks, 64), layers=3, decoder=4)
        got = (outputs.class_logits, outputs.mask_logits, outputs.queries)
        for value, expected in zip(got, want, strict=True):
            assert relative_difference(value[b, :rows].numpy(), expected[0].numpy()) < TOLERANCE


def test_deformable_attention_equals_reading_place_by_place():
    """The definition, written with loops: bilinear reads of each head's channels at centre + offset."""
    torch.manual_seed(0)
    shapes, heads, dim, points = ((3, 5), (2, 2)), 2, 8, 4
    centres = cell_centres(((2, 3),))
    attention = DeformableAttention(dim, heads, shapes, centres, points).eval()
    queries, values = torch.randn(1, 6, dim), torch.randn(1, 19, dim)
    with torch.no_grad():
        got = attention(queries, values)[0]
        offsets = attention.sampling_offsets(queries)[0].view(6, heads, 2, points, 2)
        weights = attention.attention_weights(queries)[0].view(6, heads, 8).softmax(-1).view(6, heads, 2, points)
        maps = attention.value_proj(values)[0].split([15, 4])
        read = torch.zeros(6, heads, dim // heads)
        for q, h, level, p in np.ndindex(6, heads, 2, points):
            rows, columns = shapes[level]
            picture = maps[level].view(rows, columns, heads, -1)[:, :, h]
            x = float(centres[q, 0] * columns + offsets[q, h, level, p, 0]) - 0.5
            y = float(centres[q, 1] * rows + offsets[q, h, level, p, 1]) - 0.5
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                row, column = int(np.floor(y)) + i, int(np.floor(x)) + j
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                if 0 <= row < rows and 0 <= column < columns:
                    read[q, h] += weights[q, h, level, p] * share * picture[row, column]
        want = attention.output_proj(read.flatten(1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_stage_that_keeps_nothing_gives_a_valid_result(micro):
    model = VppRovis(micro.config).eval()
    model.load_state_dict(micro.state_dict())
    with torch.no_grad():
        model.selectors[1].mlp.fc2.bias.copy_(torch.tensor([0.0, 1e3]))
        picture = torch.zeros(1, *IMAGE_SIZE, 3, dtype=torch.uint8)
        outputs, state = model(picture, model.initial_state(1), torch.tensor([60]), Selection.THRESHOLD)
    assert outputs.tokens_kept[0, 2:].tolist() == [0, 0] and outputs.tokens_kept[0, 1] > 0
    assert all(value.isfinite().all() for value in outputs if value.is_floating_point())
    assert outputs.state_ok.all() and state.kept.any()


def test_prior_that_keeps_nothing_is_no_prior(micro):
    model = VppRovis(micro.config).eval()
    model.load_state_dict(micro.state_dict())
    with torch.no_grad():
        model.selectors[0].mlp.fc2.bias.copy_(torch.tensor([0.0, 1e3]))
        picture = torch.zeros(1, *IMAGE_SIZE, 3, dtype=torch.uint8)
        outputs, state = model(picture, model.initial_state(1), torch.tensor([60]), Selection.THRESHOLD)
        assert not outputs.state_ok.any() and not state.kept.any()  # the stream drops such a state
        again, _ = model(picture, state, torch.tensor([60]), Selection.THRESHOLD)
    for one, other in zip(outputs[:2], again[:2], strict=True):
        torch.testing.assert_close(one, other)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_names_of_the_reference_are_all_accounted_for(vectors, micro):
    names = list(reference_weights(vectors))
    dead = dead_tensors(names)
    assert sorted(name.rpartition("matching_module.")[2] for name in dead) == [
        "init_mlp.weight", "norm_input.bias", "norm_input.weight",
    ]  # fmt: skip
    assert sorted(renamed(name) for name in names if name not in dead) == sorted(micro.state_dict())


@pytest.mark.parametrize("map_hidden", [24, 17])
def test_sizes_come_from_the_tensors(tmp_path, map_hidden):
    """Also where the selectors have another width than the token width suggests, as the Small files may."""
    config = VppRovisConfig(
        classes=tuple(f"class {i}" for i in range(3)), embed_dim=96, heads=3, stem_dim=8, map_hidden=map_hidden,
        selector_hidden=11, feature_dim=32, queries=9, encoder_layers=1, encoder_ffn=24, decoder_layers=2,
        decoder_ffn=40, pretrain_grid=7,
    )  # fmt: skip
    loaded = load_published(save_published(tmp_path / "small.pth", random_published(config)))
    assert loaded.config == config


def test_dead_tensors_are_named(vectors, tmp_path, caplog):
    with caplog.at_level("INFO", logger="models.vpp_rovis.published"):
        load_published(save_published(tmp_path / "micro.pth", reference_weights(vectors)))
    assert "init_mlp.weight" in caplog.text and "norm_input.bias" in caplog.text


def test_class_names_of_the_trainer_are_taken(vectors, tmp_path):
    weights, names = reference_weights(vectors), ("person", "dog", "cat", "car", "bird")
    path = save_published(tmp_path / "named.pth", weights, meta={"dataset_meta": {"classes": names}})
    assert load_published(path).config.classes == names


def test_dense_checkpoint_loads_and_says_that_it_is_dense(vectors, tmp_path):
    dense = {}
    for name, value in reference_weights(vectors).items():
        if "matching_module" in name or "selective_modules" in name:
            continue
        for old, new in (("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj", "attn.proj"),
                         ("linear", "mlp.fc"), ("TransformerEncoderLayer.", "")):  # fmt: skip
            name = name.replace(old, new) if ".blocks." in name else name
        dense[name] = value
    assert "detector.backbone.blocks.3.mlp.fc1.weight" in dense
    model = load_published(save_published(tmp_path / "dense.pth", dense)).at_image_size(IMAGE_SIZE)
    assert not model.has_selectors and model.config.block_eps == 1e-6
    picture = torch.zeros(1, *IMAGE_SIZE, 3, dtype=torch.uint8)
    outputs, _ = model(picture, model.initial_state(1), None, Selection.NONE)
    assert outputs.class_logits.isfinite().all()


def test_missing_extra_and_reshaped_tensors_are_all_listed(vectors, tmp_path):
    weights = reference_weights(vectors)
    del weights["detector.backbone.level_embed"]
    weights["detector.backbone.surprise"] = torch.zeros(1)
    weights["detector.backbone.up.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        load_published(save_published(tmp_path / "odd.pth", weights))
    assert all(name in str(error.value) for name in ("level_embed", "surprise", "up.bias: (3,) instead of (48,)"))


def test_file_with_foreign_classes_loads_without_them(vectors, tmp_path, monkeypatch):
    """As mmengine writes it: a message hub full of classes that are not installed here."""
    module = types.ModuleType("mmengine_of_long_ago")
    hub = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = hub
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = hub()
    buffer.log = np.arange(3.0)
    path = save_published(tmp_path / "epoch_6.pth", reference_weights(vectors), message_hub={"loss": buffer})
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    assert load_published(path).config.queries == 20


class RunsCode:
    """An object whose unpickling would make a file."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_would_run_code_runs_none(vectors, tmp_path, legacy):
    path, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
    content = {"state_dict": reference_weights(vectors), "message_hub": RunsCode(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert load_published(path).config.queries == 20
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is harmless, so the test shows nothing"


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint at all", pickle.dumps({"state_dict": {"a": 1}}), pickle.dumps([1, 2])],
    ids=["empty", "text", "no tensors", "list"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_published(tmp_path / "bad.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"state_dict": {"blocks.0.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no published VPP network"):
        load_host(tmp_path / "other.pth", "vpp-rovis")


@pytest.mark.parametrize("size", [(96, 168), (0, 32), (48, 160)])
def test_size_that_32_does_not_divide_is_refused(micro, size):
    with pytest.raises(ImageSizeError, match="32"):
        micro.at_image_size(size)
