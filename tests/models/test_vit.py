"""Parts of a plain vision transformer: what is exported is written otherwise than what is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.configs import IMAGENET_MEAN, IMAGENET_STD
from models.vit import Attention, PatchEmbed


def seeded(module, seed=0):
    """All weights and biases random: a new layer's biases are so small that none would be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


def test_exported_attention_cuts_nothing_apart_and_gives_the_same():
    attention, x = seeded(Attention(12, 3)), torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
    program = torch.export.export(attention, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), attention(x), rtol=1e-4, atol=1e-4)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function"]
    assert (2, 7, 36) not in [tuple(value.shape) for value in values], "queries, keys and values are never one tensor"


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 2)])
def test_patch_embedding_is_the_convolution_of_normalised_pixels(grid):
    embed = seeded(PatchEmbed(4, 6, IMAGENET_MEAN, IMAGENET_STD))
    size = 2, 4 * grid[0], 4 * grid[1], 3
    image = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = (image / 255.0 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    want = F.conv2d(pixels.permute(0, 3, 1, 2), embed.proj.weight, embed.proj.bias, stride=4)
    torch.testing.assert_close(embed(image), want.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
