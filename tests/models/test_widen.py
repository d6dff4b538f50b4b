"""A widened network gives the answers of the narrow one, and all that is new can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.configs import config_by_name
from models.pruned_host import Selection
from models.training.widen import widened
from models.vpp_eo import VppEo
from runtime.errors import CheckpointError

MICRO = config_by_name("vpp-eo-micro")
WIDER = replace(MICRO, name="vpp-eo-wider", embed_dim=80, heads=5, mask_dim=40)


@pytest.fixture(scope="module")
def narrow() -> VppEo:
    """A network none of whose weights is special: norms, biases and means are all away from 0 and 1."""
    torch.manual_seed(1)
    model = VppEo(MICRO).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.03)
    return model


def answers(model: VppEo, frames: int = 3) -> list[torch.Tensor]:
    """Class and mask logits of a stream that carries its queries."""
    pictures = torch.randint(
        0, 256, (frames, 1, *MICRO.image_size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    state, found = model.initial_state(1), []
    for picture in pictures:
        outputs, state = model(picture, state, None, Selection.NONE)
        found += [outputs.class_logits, outputs.mask_logits]
    return found


def test_answers_are_those_of_the_narrow_network(narrow):
    wide = widened(narrow, WIDER)
    assert (wide.config.name, wide.config.embed_dim, wide.config.heads) == ("vpp-eo-wider", 80, 5)
    assert replace(wide.config, name="", embed_dim=1, heads=1, mask_dim=1) == replace(
        MICRO, name="", embed_dim=1, heads=1, mask_dim=1
    )
    with torch.no_grad():
        for got, want in zip(answers(wide), answers(narrow), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.std()))


def test_everything_new_can_learn(narrow):
    wide = widened(narrow, WIDER).train()
    parameters = {
        name: parameter
        for name, parameter in wide.named_parameters()
        if not name.startswith(("map_selector", "selectors"))
    }
    for _ in range(2):  # what feeds an output that starts at zero learns from the second step on
        wide.zero_grad()
        sum(answer.square().mean() for answer in answers(wide, 2)).backward()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 1e-3 * parameter.grad
    assert [name for name, parameter in parameters.items() if not parameter.grad[-1].any()] == []


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (MICRO, "not wider"),
        (replace(WIDER, mask_dim=8), "not wider"),
        (replace(WIDER, heads=4), "heads can be added, not widened"),
    ],
)
def test_what_cannot_be_widened_is_refused(narrow, sizes, words):
    with pytest.raises(CheckpointError, match=words):
        widened(narrow, sizes)
