from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import save_file

from models.checkpoints import load_checkpoint, save_checkpoint, weight_hash
from models.configs import CONFIGS
from models.vpp_eo import VppEo
from runtime.errors import CheckpointError

MICRO = CONFIGS["vpp-eo-micro"]


def micro(seed=0, **fields):
    torch.manual_seed(seed)
    return VppEo(replace(MICRO, **fields))


@pytest.fixture(scope="module")
def model():
    return micro(classes=("cat", "dog", "perro salvaje ñ"), image_size=(32, 64))


@pytest.fixture(scope="module")
def weights():
    return micro().state_dict()


def refusal(path, *args):
    """The message of the refusal; it has to name the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, *args)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_round_trip_is_exact_in_fp32(model, tmp_path):
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert weight_hash(loaded) == weight_hash(model)


def test_half_is_stored_in_half_and_read_as_fp32(model, tmp_path):
    path, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    save_checkpoint(model, path, half=True)
    save_checkpoint(model, full)
    assert path.stat().st_size < 0.6 * full.stat().st_size
    for name, value in load_checkpoint(path).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].half().float()), name


def test_notes_and_configuration_are_readable_without_us(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, notes={"command": "train dense"})
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert metadata["command"] == "train dense"
    assert json.loads(metadata["config"])["classes"] == ["cat", "dog", "perro salvaje ñ"]


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("older")
    save_checkpoint(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    load_checkpoint(path)


def test_saving_that_fails_leaves_the_older_file(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(model, path, notes={"steps": 12})  # metadata has to be text
    assert path.read_bytes() == before


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    before = weight_hash(model)
    save_checkpoint(model, tmp_path / "half.safetensors", half=True)
    assert weight_hash(model) == before
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert model.training


def test_weight_hash_tells_networks_apart(weights):
    model = micro()
    start = weight_hash(model)
    assert len(start) == 64
    assert weight_hash(micro()) == start
    assert weight_hash(micro(seed=1)) != start
    with torch.no_grad():
        model.pos_embed[0, 3, 5] += 1e-6
    assert weight_hash(model) != start


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_file_with_a_model_name(weights, tmp_path, wrap):
    path = tmp_path / "weights.pth"
    torch.save(weights if wrap is None else {wrap: weights, "epoch": 3}, path)
    loaded = load_checkpoint(path, "vpp-eo-micro")
    assert loaded.config == MICRO
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_torch_file_may_carry_its_configuration(tmp_path):
    model = micro(classes=("cat", "dog"))
    torch.save({"state_dict": model.state_dict(), "config": json.dumps(vars(model.config))}, tmp_path / "w.pt")
    assert load_checkpoint(tmp_path / "w.pt").config == model.config


def test_half_torch_file_is_read_as_fp32(weights, tmp_path):
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "w.pt")
    loaded = load_checkpoint(tmp_path / "w.pt", "vpp-eo-micro")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("count", [1, 3, 40])
def test_class_count_is_read_off_the_weights(tmp_path, count):
    model = micro(classes=tuple(f"name {index}" for index in range(count)))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_checkpoint(tmp_path / "w.pt", "vpp-eo-micro")
    assert loaded.config.classes == tuple(f"class {index}" for index in range(count))
    assert loaded.mask_head.classify.out_features == count + 1


def test_safetensors_without_configuration_needs_a_name(weights, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file(weights, path)
    message = refusal(path)
    assert "--model" in message
    assert all(name in message for name in CONFIGS)
    assert load_checkpoint(path, "vpp-eo-micro").config == MICRO


def test_unknown_model_name_lists_those_there_are(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'vpp-eo-huge'; there are vpp-eo-micro, vpp-eo-nano"):
        load_checkpoint(tmp_path / "w.pt", "vpp-eo-huge")


def test_another_model_than_was_asked_for(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    assert "holds a vpp-eo-micro, not the vpp-eo-nano" in refusal(path, "vpp-eo-nano")
    load_checkpoint(path, "vpp-eo-micro")


def test_all_that_does_not_fit_is_listed(weights, tmp_path):
    """Everything in one message: nobody wants to find seven problems in seven runs."""
    wrong = dict(weights)
    missing = ["blocks.3.attn.qkv.weight", "queries", "selectors.2.norm.bias"]
    for name in missing:
        del wrong[name]
    extra = {"head.weight": torch.zeros(2), "blocks.12.norm1.bias": torch.zeros(48)}
    shapes = {"pos_embed": (1, 196, 48), "blocks.0.mlp.fc1.weight": (96, 48), "mask_head.upsample.bias": ()}
    wrong |= extra | {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(wrong, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", "vpp-eo-micro")

    for heading, names in (("3 missing", missing), ("2 not part of the model", extra), ("3 of another shape", shapes)):
        section = message.partition(f"{heading}:\n")[2].partition(":\n  ")[0]
        assert all(f"\n    {name}" in "\n" + section for name in names), heading
    for name, shape in shapes.items():
        assert f"{name}: {shape} instead of {tuple(weights[name].shape)}" in message
    assert "blocks.1.norm1.bias" not in message, "what fits is not listed"


def test_extra_weight_alone_is_refused(weights, tmp_path):
    torch.save({**weights, "head.weight": torch.zeros(2)}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", "vpp-eo-micro")
    assert "1 not part of the model:\n    head.weight" in message
    assert "missing" not in message


# --- files that are no checkpoint -------------------------------------------------------------------------------------


def write_image(path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, "PNG")


def write_truncated(path):
    save_checkpoint(micro(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_cut_header(path):
    save_checkpoint(micro(), path)
    path.write_bytes(path.read_bytes()[:500])


def write_truncated_torch(path):
    torch.save(micro().state_dict(), path)
    path.write_bytes(path.read_bytes()[:20_000])


NO_CHECKPOINTS = {
    "text": lambda path: path.write_text("epoch 3: loss 0.4\n" * 20),
    "json": lambda path: path.write_text('{"state_dict": {}}'),
    "empty": lambda path: path.write_bytes(b""),
    "few bytes": lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0"),
    "image": write_image,
    "truncated safetensors": write_truncated,
    "cut header": write_cut_header,
    "truncated torch": write_truncated_torch,
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + b"{" + b" " * 100),
    "pickled list": lambda path: torch.save([torch.zeros(2)], path),
    "bare tensor": lambda path: torch.save(torch.zeros(2), path),
    "numbers": lambda path: torch.save({"epoch": 3, "loss": 0.5}, path),
    "empty dict": lambda path: torch.save({}, path),
    "empty state dict": lambda path: torch.save({"state_dict": {}}, path),
    "unnamed weights": lambda path: torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, path),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, kind, suffix):
    path = tmp_path / f"model{suffix}"
    NO_CHECKPOINTS[kind](path)
    assert refusal(path, "vpp-eo-micro").strip()


def test_file_that_is_not_there(tmp_path):
    assert "there is no checkpoint" in refusal(tmp_path / "none.safetensors")
    assert "there is no checkpoint" in refusal(tmp_path)


class Payload:
    """Makes a folder when it is unpickled by somebody who trusts it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["alone", "beside", "inside", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(weights, tmp_path, place):
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    payload = Payload(marker)
    content = {"alone": payload, "inside": {**weights, "x": payload}}.get(
        place, {"state_dict": weights, "args": payload}
    )
    if place == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    message = refusal(path, "vpp-eo-micro")
    assert not marker.exists()
    assert "nothing in it was executed" in message
    assert "torch.save(model.state_dict(), path)" in message

    torch.load(path, weights_only=False) if place != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the file would have run code"


# --- configurations that cannot be read -------------------------------------------------------------------------------


def with_config(path, weights, text):
    save_file(weights, path, metadata={"config": text})
    return path


def config_text(**changes):
    return json.dumps({**vars(MICRO), **changes})


BROKEN = {
    "broken JSON": '{"name": "vpp-eo-micro", ',
    "empty": "",
    "not JSON": "vpp-eo-micro",
    "a list": "[1, 2]",
    "a number": "3",
    "a field missing": json.dumps({"name": "vpp-eo-micro"}),
    "a field too many": config_text(dropout=0.1),
    "a width of text": config_text(embed_dim="wide"),
    "heads that do not divide": config_text(heads=5),
    "an image size of one number": config_text(image_size=96),
    "a patch size of 0": config_text(patch_size=0),
    "an image size off the grid": config_text(image_size=[100, 160]),
    "no classes": config_text(classes=None),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_configuration_is_refused(weights, tmp_path, kind):
    message = refusal(with_config(tmp_path / "model.safetensors", weights, BROKEN[kind]))
    assert "configuration" in message


def test_configuration_of_another_size_lists_the_shapes(weights, tmp_path):
    path = with_config(tmp_path / "model.safetensors", weights, config_text(queries=9, image_size=[96, 176]))
    message = refusal(path)
    assert "2 of another shape" in message
    assert "queries: (8, 48) instead of (9, 48)" in message
    assert "pos_embed: (1, 60, 48) instead of (1, 66, 48)" in message
