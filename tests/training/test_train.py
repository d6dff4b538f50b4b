from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from models.checkpoints import load_checkpoint, save_checkpoint
from models.configs import CONFIGS
from models.training.losses import focus_loss
from models.training.recipe import Recipe, Stage
from models.training.scenes import CLASSES, SceneConfig, write_youtube_vis
from models.training.sparse_step import masked_step
from models.training.train import batches, main, train
from models.training.trainer import SELECTOR_RATE, SELECTORS, Trainer
from models.training.youtube_vis import ClipDataset, YouTubeVis, collate
from models.vpp_eo import VppEo
from runtime.errors import CheckpointError, ImageSizeError, SourceFormatError

torch.set_num_threads(1)  # 60 tokens: more threads only wait for each other

# pycocotools 2.0.11 has not followed NumPy 2 yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE = (96, 160)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    config = SceneConfig(height=SIZE[0], width=SIZE[1], frames=6, smallest_radius=0.1, largest_radius=0.25)
    write_youtube_vis(folder, config, range(4), progress=False)
    return folder


@pytest.fixture
def recipe(data):
    return Recipe(
        stage=Stage.DENSE, data=str(data), model="vpp-eo-micro", steps=5, batch=2, size=SIZE, frames=3, truncate=2,
        max_gap=2, zoom=(1.0, 1.2), learning_rate=2e-3, warmup=2, weight_decay=0.05, clip_norm=1.0, pixel_weight=2.0,
        focus_weight=1.0, seed=3, bf16=False, init=None,
    )  # fmt: skip


def micro(**fields):
    torch.manual_seed(0)
    return VppEo(replace(CONFIGS["vpp-eo-micro"], **{"classes": CLASSES, "image_size": SIZE, **fields}))


@pytest.fixture
def dense(tmp_path):
    """A checkpoint to start the sparse stage from."""
    save_checkpoint(micro(), tmp_path / "dense.safetensors")
    return str(tmp_path / "dense.safetensors")


def clips(recipe, count):
    """One batch of ``count`` clips, as the dataset gives them."""
    dataset = ClipDataset(YouTubeVis(recipe.data), recipe.size, frames=recipe.frames, scale=recipe.zoom)
    return collate([dataset[index] for index in range(count)])


def loss_of(terms):
    return sum(value for name, value in terms.items() if name != "norm")


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("stage", list(Stage))
def test_loss_of_repeated_clips_goes_down(recipe, tmp_path, stage):
    recipe = replace(recipe, stage=stage, steps=30, warmup=5, frames=2)
    trainer, batch = Trainer(recipe, micro().train(), tmp_path), clips(recipe, 4)
    assert any(len(target["labels"]) for target in batch["targets"])
    losses = [loss_of(trainer.update(batch)) for _ in range(30)]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < 0.75 * first, f"{first:.2f} -> {last:.2f}"


@pytest.mark.parametrize("stage", list(Stage))
def test_interrupted_run_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch, dense, stage):
    """Stopped in the middle of an epoch, after a step that was saved and one that was lost."""
    recipe = replace(recipe, stage=stage, init=dense, average=0.5)
    whole = train(recipe, tmp_path / "whole")

    update, save = Trainer.update, Trainer.save
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", lambda self: save(self) if self.step <= 3 else None)
        patch.setattr(Trainer, "update", lambda self, batch: update(self, batch) if self.step < 4 else interrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts", save_every_s=-1.0)
    assert not same_weights(load_checkpoint(tmp_path / "parts" / "model.safetensors"), whole)
    torch.manual_seed(99)  # another process starts from another place
    resumed = train(recipe, tmp_path / "parts")

    assert same_weights(resumed, whole)
    assert [entry["step"] for entry in logged(tmp_path / "parts")] == [1, 2, 3, 4, 4, 5]
    whole_log, parts_log = ([{**entry, "s": 0} for entry in logged(tmp_path / run)] for run in ("whole", "parts"))
    assert parts_log == [*whole_log[:4], *whole_log[3:]], "the losses of the steps are the same ones"


def interrupt():
    raise KeyboardInterrupt


def test_checkpoint_holds_the_moving_average_of_the_weights(recipe, tmp_path):
    trainer, batch = Trainer(replace(recipe, average=0.75), micro().train(), tmp_path), clips(recipe, 2)
    name, expected = "mask_head.classify.weight", None
    for _ in range(3):
        trainer.update(batch)
        weight = trainer.model.state_dict()[name].clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    trainer.save()
    written = load_checkpoint(tmp_path / "model.safetensors").state_dict()[name]
    torch.testing.assert_close(written, expected)
    assert not torch.equal(written, weight)


def test_run_that_is_done_stays_as_it_is(recipe, tmp_path):
    recipe = replace(recipe, steps=2)
    once = train(recipe, tmp_path).state_dict()
    once = {name: value.clone() for name, value in once.items()}
    again = train(recipe, tmp_path)
    assert all(torch.equal(value, once[name]) for name, value in again.state_dict().items())
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2]


def test_same_recipe_gives_the_same_weights_and_another_seed_others(recipe, tmp_path):
    recipe = replace(recipe, steps=2)
    first, second = train(recipe, tmp_path / "a"), train(recipe, tmp_path / "b")
    assert same_weights(first, second)
    assert not same_weights(train(replace(recipe, seed=4), tmp_path / "c"), first)


def test_sparse_stage_goes_on_from_the_dense_checkpoint(recipe, tmp_path):
    """As the two commands do it, in bfloat16 as by default."""
    train(replace(recipe, steps=2, bf16=True), tmp_path / "dense")
    init = tmp_path / "dense" / "model.safetensors"
    sparse = replace(recipe, stage=Stage.SPARSE, steps=2, bf16=True, init=str(init), model="vpp-eo-nano")
    train(sparse, tmp_path / "sparse")
    before, after = load_checkpoint(init), load_checkpoint(tmp_path / "sparse" / "model.safetensors")
    assert after.config == before.config == replace(CONFIGS["vpp-eo-micro"], classes=CLASSES, image_size=SIZE)
    for name, value in after.state_dict().items():
        assert value.isfinite().all(), name
    for part in ("map_selector.predictor.mlp.fc2.weight", "selectors.0.mlp.fc2.weight", "selectors.2.mlp.fc2.weight"):
        assert not torch.equal(before.state_dict()[part], after.state_dict()[part]), f"{part} was trained"
    terms = logged(tmp_path / "sparse")[0]
    assert {"set", "deep", "pixels", "focus"} <= terms.keys() and "ratio" not in terms
    assert "focus" not in logged(tmp_path / "dense")[0]
    written = json.loads((tmp_path / "sparse" / "recipe.json").read_text())
    assert (written["stage"], written["init"], written["size"]) == ("sparse", str(init), list(SIZE))


@pytest.mark.parametrize("selector", ["svit", "dynamicvit", "masks", "random"])
def test_another_selector_goes_on_from_the_same_checkpoint(recipe, tmp_path, dense, selector):
    chosen = {"selector": selector, "pruned": "background", "refresh": 40}
    sparse = replace(recipe, stage=Stage.SPARSE, steps=2, init=dense, teacher=dense, **chosen)
    train(sparse, tmp_path / "run")
    after = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (after.config.selector, after.config.pruned, after.config.refresh) == (selector, "background", 40)
    terms = logged(tmp_path / "run")[0]
    assert terms["distil"] > 0
    learned = selector in ("svit", "dynamicvit")
    assert ("focus" in terms) == learned
    if learned:
        start = micro().with_selection(selector, "background", 40).state_dict()
        moved = [name for name, value in after.state_dict().items() if "predictors" in name]
        assert moved and all(not torch.equal(start[name], after.state_dict()[name]) for name in moved[-2:])


def test_published_recipe_teaches_the_selectors_through_the_task(recipe, tmp_path, dense):
    sparse = replace(recipe, stage=Stage.SPARSE, steps=1, init=dense, task_gradient=True)
    train(sparse, tmp_path / "task")
    assert {"focus", "ratio"} <= logged(tmp_path / "task")[0].keys()
    trainers = [
        Trainer(replace(sparse, task_gradient=task, focus_weight=0.0, steps=9), micro().train(), tmp_path)
        for task in (True, False)
    ]
    for trainer in trainers:
        trainer.update(clips(recipe, 2))
    through, without = (trainer.model.selectors[0].mlp.fc2.weight.grad for trainer in trainers)
    assert through.abs().max() > 0 and without.abs().max() == 0


def test_selectors_learn_alone_at_first(recipe, tmp_path, dense):
    recipe = replace(recipe, stage=Stage.SPARSE, init=dense, selector_steps=2)
    trainer, batch = Trainer(recipe, micro().train(), tmp_path), clips(recipe, 2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def moved() -> set[str]:
        now = trainer.model.state_dict()
        return {name for name, value in before.items() if not torch.equal(value, now[name])}

    for _ in range(2):
        assert trainer.update(batch).keys() == {"focus", "norm"}
    assert moved() and all(name.startswith(SELECTORS) for name in moved())
    assert "set" in trainer.update(batch)
    assert "blocks.0.mlp.fc1.weight" in moved()


def test_teacher_is_left_alone_and_agreed_with(recipe, tmp_path, dense):
    """The teacher is another network, so there is a way to go."""
    torch.manual_seed(7)
    other = VppEo(micro().config)
    with torch.no_grad():
        other.mask_head.classify.bias[2] += 3.0
    save_checkpoint(other, tmp_path / "teacher.safetensors")
    recipe = replace(
        recipe, stage=Stage.SPARSE, steps=25, init=dense, teacher=str(tmp_path / "teacher.safetensors"), frames=2,
        distil_weight=50.0, pixel_weight=0.0, focus_weight=0.0,
    )  # fmt: skip
    trainer, batch = Trainer(recipe, micro().train(), tmp_path), clips(recipe, 2)
    before = [value.clone() for value in trainer.teacher.state_dict().values()]
    distances = [trainer.update(batch)["distil"] for _ in range(25)]
    assert sum(distances[-3:]) < 0.7 * sum(distances[:3])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher.state_dict().values(), strict=True))


def test_focus_teaches_the_predictors_and_not_the_network(recipe, tmp_path, dense):
    recipe = replace(recipe, stage=Stage.SPARSE, init=dense, frames=2)
    model, images = micro().train(), clips(recipe, 2)["images"]
    state = model.initial_state(2)
    for t in range(2):
        rule = model.budget_rule
        budget = torch.tensor([rule.at_reset(rule.for_ratio(0.55)) if t == 0 else rule.for_ratio(0.55)] * 2)
        trace, state = masked_step(model, images[:, t], state, budget, noise=True)
        assert len(trace.focus_scores) == 4, "three stages, and Map-SM's predictor where it will be read"
    focus_loss(trace.focus_scores, torch.rand(2, 60) < 0.5).backward()
    for name, parameter in model.named_parameters():
        is_predictor = name.startswith(("map_selector", "selectors"))
        assert (parameter.grad is not None) == is_predictor, name


def test_sparse_stage_at_another_size_resamples_the_positions(recipe, tmp_path):
    save_checkpoint(micro(image_size=(64, 96)), tmp_path / "small.safetensors")
    model = train(replace(recipe, steps=1, init=str(tmp_path / "small.safetensors")), tmp_path / "run")
    assert model.config.image_size == SIZE
    assert model.pos_embed.shape == (1, 60, 48)


def test_clips_without_objects_train(recipe, tmp_path):
    batch = clips(recipe, 2)
    for target in batch["targets"]:
        target["masks"], target["labels"] = target["masks"][:0], target["labels"][:0]
    terms = Trainer(recipe, micro(), tmp_path).update(batch)
    assert torch.isfinite(torch.tensor(list(terms.values()))).all()


def test_clip_with_more_objects_than_queries_trains(recipe, tmp_path):
    """A clip over a cut shows up to ten objects."""
    recipe = replace(recipe, stage=Stage.SPARSE)
    batch = clips(recipe, 2)
    for target in batch["targets"]:
        target["masks"] = torch.rand(12, recipe.frames, *SIZE) < 0.1
        target["labels"] = torch.arange(12) % len(CLASSES)
    terms = Trainer(recipe, micro(), tmp_path).update(batch)
    assert torch.isfinite(torch.tensor(list(terms.values()))).all()


def test_step_whose_gradient_is_not_finite_is_skipped(recipe, tmp_path, monkeypatch):
    trainer, batch = Trainer(recipe, micro().train(), tmp_path), clips(recipe, 2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    clip_loss = Trainer._clip_loss

    def broken(self, *arguments):
        terms = clip_loss(self, *arguments)
        self.model.queries.grad[0, 0] = torch.nan
        return terms

    monkeypatch.setattr(Trainer, "_clip_loss", broken)
    trainer.update(batch)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    monkeypatch.undo()
    trainer.update(batch)
    assert not torch.equal(trainer.model.queries, before["queries"]), "the next one is learned from"
    assert trainer.step == 2


def test_learning_rate_warms_up_and_falls_to_one_percent(recipe, tmp_path):
    trainer = Trainer(replace(recipe, steps=102, warmup=2, learning_rate=1.0), micro(), tmp_path)
    rates = []
    for trainer.step in range(103):
        rates.append(trainer.learning_rate())
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.505)
    assert rates[102] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_matrices_decay_and_embeddings_do_not(recipe, tmp_path):
    trainer = Trainer(recipe, micro(), tmp_path)
    names = {id(p): name for name, p in [*trainer.model.named_parameters(), *trainer.pixel_head.named_parameters()]}
    decayed, rest, fast = set(), set(), set()
    for group in trainer.optimiser.param_groups:
        found = {names.pop(id(p)) for p in group["params"]}
        (decayed if group["weight_decay"] else rest).update(found)
        fast |= found if group["rate"] == SELECTOR_RATE else set()
    assert not names, "every parameter is trained, once"
    assert {group["weight_decay"] for group in trainer.optimiser.param_groups} == {0.05, 0.0}
    assert fast == {name for name, _ in trainer.model.named_parameters() if name.startswith(SELECTORS)}
    assert {"pos_embed", "queries", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.bias"} <= rest
    assert {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "predict.weight"} <= decayed


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_from_any_step_are_those_of_a_run_from_the_start(recipe, batch):
    recipe = replace(recipe, batch=batch, frames=1)

    def take(first_step, count):
        dataset = ClipDataset(YouTubeVis(recipe.data), recipe.size, frames=1, seed=recipe.seed)
        return [part["images"] for part, _ in zip(batches(dataset, recipe, first_step), range(count), strict=False)]

    whole = take(0, 5)
    assert {len(images) for images in whole} == {min(batch, 4)}
    for first_step in (1, 4):
        for a, b in zip(take(first_step, 5 - first_step), whole[first_step:], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(whole[0], whole[4]), "another epoch, other clips"


def test_data_without_frames_is_refused(recipe, tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({"videos": [], "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(SourceFormatError, match="nothing to train on"):
        train(replace(recipe, data=str(tmp_path)), tmp_path / "run")


def test_checkpoint_of_other_classes_is_refused(recipe, tmp_path):
    save_checkpoint(micro(classes=("cat", "dog")), tmp_path / "pets.safetensors")
    with pytest.raises(CheckpointError, match=r"knows the classes \('cat', 'dog'\), the data has \('disc', "):
        train(replace(recipe, init=str(tmp_path / "pets.safetensors")), tmp_path / "run")


def test_size_off_the_grid_is_refused(recipe, tmp_path):
    with pytest.raises(ImageSizeError, match="The nearest that is: 96 160"):
        train(replace(recipe, size=(100, 160)), tmp_path / "run")


def test_help_is_there():
    done = subprocess.run([sys.executable, "-m", "models.training.train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("dense", "sparse", "--data", "--output", "--init", "--truncate"):
        assert word in done.stdout


def test_command_line_trains_and_says_what_was_written(data, tmp_path):
    options = ["--steps", "1", "--batch", "1", "--frames", "2", "--size", "96", "160", "--model", "vpp-eo-micro"]
    result = CliRunner().invoke(command(), ["dense", "--data", str(data), "--output", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'model.safetensors'} written by" in result.output.replace("\n", "")
    assert load_checkpoint(tmp_path / "model.safetensors").config.classes == CLASSES


def test_command_line_reports_an_error_without_a_traceback(data, tmp_path):
    result = CliRunner().invoke(
        command(), ["sparse", "--data", str(data), "--output", str(tmp_path), "--init", "none.pt"]
    )
    assert result.exit_code == 2
    assert "CheckpointError: there is no checkpoint at none.pt." in result.output


def command():
    app = typer.Typer()
    app.command()(main)
    return app
