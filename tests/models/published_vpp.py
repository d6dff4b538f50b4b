"""The published VPP network written down step by step: the oracle that `models.vpp_rovis` is compared with.

Plain functions over the published state dict, one frame at a time, batch 1, nothing rewritten for speed: full masks
after every decoder layer, one-hot association, gather and scatter in every block. The Gumbel noise is taken out. Its
own correctness is shown by the vectors of the published code in ``tests/data/vpp_rovis_micro.npz``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
INTERACTIONS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
ADAPTER_HEADS, HEADS, POINTS = 6, 8, 4


@dataclass
class Prior:
    """What the backbone keeps of a frame."""

    x_ref: Tensor
    x_map: Tensor
    mask: Tensor


@dataclass
class Frame:
    """Everything that the reference vectors hold of one frame."""

    kept: Tensor  # bool [12, N]
    maps: list[Tensor]  # strides 4, 8, 16, 32
    class_logits: Tensor
    mask_logits: Tensor
    queries: Tensor
    prior: Prior


def part(weights: Weights, prefix: str) -> Weights:
    """The tensors below a prefix."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def batch_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(w[f"{name}.{kind}"] for kind in names))


def group_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"])


def centres(height: int, width: int) -> Tensor:
    """Centres (x, y) of the cells of a grid over the unit square, [h * w, 2]."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def deformable_attention(w: Weights, query, reference, value, shapes, heads: int) -> Tensor:
    """mmcv's multi-scale deformable attention without its identity; query [1, q, C], value [1, sum(h * w), C]."""
    count, levels = query.shape[1], len(shapes)
    offsets = linear(query, w, "sampling_offsets").view(count, heads, levels, POINTS, 2)
    weights = linear(query, w, "attention_weights").view(count, heads, levels * POINTS).softmax(-1)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
    places = reference[:, None, None, None] + offsets / sizes[None, None, :, None]
    values = linear(value, w, "value_proj").view(-1, heads, query.shape[2] // heads)
    sampled = []
    for level, (height, width) in enumerate(shapes):
        values, rest = values[: height * width], values[height * width :]
        picture = values.permute(1, 2, 0).reshape(heads, -1, height, width)
        grid = 2 * places[:, :, level].transpose(0, 1) - 1  # [heads, q, points, 2]
        sampled.append(F.grid_sample(picture, grid, "bilinear", "zeros", align_corners=False))
        values = rest
    stacked = torch.stack(sampled, -2).flatten(-2)  # [heads, C / heads, q, levels * points]
    out = (stacked * weights.transpose(0, 1)[:, None]).sum(-1)  # [heads, C / heads, q]
    return linear(out.flatten(0, 1).T[None], w, "output_proj")


def spatial_prior(w: Weights, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = image
    for conv, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.relu(batch_norm(F.conv2d(x, w[f"stem.{conv}.weight"], stride=stride, padding=1), w, f"stem.{conv + 1}"))
    pyramid = [F.max_pool2d(x, 3, 2, 1)]
    for name in ("conv2", "conv3", "conv4"):
        x = F.conv2d(pyramid[-1], w[f"{name}.0.weight"], stride=2, padding=1)
        pyramid.append(F.relu(batch_norm(x, w, f"{name}.1")))
    maps = [F.conv2d(x, w[f"fc{i}.weight"], w[f"fc{i}.bias"]) for i, x in enumerate(pyramid, 1)]
    return maps[0], [x.flatten(2).transpose(1, 2) for x in maps[1:]]


def injector(w: Weights, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
    query = layer_norm(x, w, "query_norm", 1e-6)
    attended = deformable_attention(
        part(w, "attn."), query, centres(*grid), layer_norm(c, w, "feat_norm", 1e-6), side_shapes(grid), ADAPTER_HEADS
    )
    return x + w["gamma"] * (attended + query)  # mmcv adds its query where no identity is given


def extractor(w: Weights, c: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
    query = layer_norm(c, w, "query_norm", 1e-6)
    reference = torch.cat([centres(*shape) for shape in side_shapes(grid)])
    values = layer_norm(x, w, "feat_norm", 1e-6)
    c = c + deformable_attention(part(w, "attn."), query, reference, values, [grid], ADAPTER_HEADS) + query
    hidden = linear(layer_norm(c, w, "ffn_norm", 1e-6), w, "ffn.fc1")
    levels = hidden.split([height * width for height, width in side_shapes(grid)], dim=1)
    mixed = [
        F.conv2d(
            level.transpose(1, 2).unflatten(2, shape), w["ffn.dwconv.dwconv.weight"], w["ffn.dwconv.dwconv.bias"],
            padding=1, groups=level.shape[2],
        ).flatten(2).transpose(1, 2)
        for level, shape in zip(levels, side_shapes(grid), strict=True)
    ]  # fmt: skip
    return c + linear(F.gelu(torch.cat(mixed, 1)), w, "ffn.fc2")


def side_shapes(grid: tuple[int, int]) -> list[tuple[int, int]]:
    height, width = grid
    return [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]


def block(w: Weights, x: Tensor, heads: int) -> Tensor:
    normed = layer_norm(x, w, "norm1", 1e-5)
    qkv = F.linear(normed, w["self_attn.in_proj_weight"], w["self_attn.in_proj_bias"])
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + linear(attended, w, "self_attn.out_proj")
    hidden = F.gelu(linear(layer_norm(x, w, "norm2", 1e-5), w, "linear1"))
    return x + linear(hidden, w, "linear2")


def two_logits(w: Weights, x: Tensor, norm: str, mlp: str) -> Tensor:
    hidden = F.gelu(linear(layer_norm(x, w, norm, 1e-5), w, f"{mlp}.fc1"))
    return linear(hidden, w, f"{mlp}.fc2").log_softmax(-1)


def map_selector(w: Weights, x: Tensor, prior: Prior, grid: tuple[int, int], count: int) -> Tensor:
    height, width = grid
    y, xx = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    place = torch.stack([xx, y], -1).flatten(0, 1)
    distance = (place[:, None] - place[None]).abs().sum(-1)
    association = x @ prior.x_ref.transpose(1, 2) + torch.log10(10 * (2 - distance) / 2 + 1e-6)
    association = association.masked_fill(~prior.mask[:, None], float("-inf"))
    one_hot = F.one_hot(association.argmax(-1), x.shape[1]).to(x.dtype)
    logits = two_logits(w, one_hot @ prior.x_map, "norm_selector", "selector").transpose(1, 2).unflatten(2, grid)
    smooth = F.avg_pool2d(F.pad(logits, (4, 4, 4, 4), mode="replicate"), 9, 1).flatten(2)
    score = smooth[:, 0] - smooth[:, 1]
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[0, score.argsort(dim=1, descending=True, stable=True)[0, :count]] = True
    return mask


def backbone(
    w: Weights, image: Tensor, prior: Prior | None, heads: int, keep_ratio: float, overwritten_keys: bool = True
) -> tuple[list[Tensor], Tensor, Prior]:
    """Maps of strides 4 to 32, tokens kept per block, and the prior for the next frame."""
    grid = image.shape[2] // 16, image.shape[3] // 16
    count = grid[0] * grid[1]
    stem, sides = spatial_prior(part(w, "spm."), image)
    c = torch.cat([side + w["level_embed"][i] for i, side in enumerate(sides)], 1)
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    old = round(math.sqrt(w["pos_embed"].shape[1] - 1))
    position = w["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (old, old))
    x = x + F.interpolate(position, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    mask = torch.ones(1, count, dtype=torch.bool)
    kept, next_prior = [], Prior(x, x, mask)
    for index, numbers in enumerate(INTERACTIONS):
        v = part(w, f"interactions.{index}.")
        x = injector(part(v, "injector."), x, c, grid)
        for number in numbers:
            if number == 1:
                next_prior.x_ref = x
                if prior is not None and prior.mask.any():
                    selector = part(w, "interactions.0.matching_module.")
                    mask = map_selector(selector, x, prior, grid, int(count * keep_ratio))
            elif number in (3, 6, 9):
                logits = two_logits(w, x, f"selective_modules.{index - 1}.norm", f"selective_modules.{index - 1}.mlp")
                mask = mask & (logits[..., 0] >= logits[..., 1])
            kept.append(mask[0])
            x = x.clone()
            x[mask] = block(part(w, f"blocks.{number}.TransformerEncoderLayer."), x[mask][None], heads)[0]
            if number == 2 and overwritten_keys:
                next_prior.x_ref = x
            if number == 5:
                next_prior.x_map, next_prior.mask = x, mask
        c = extractor(part(v, "extractor."), c, x, grid)
        for extra in range(2 if index == 3 else 0):
            c = extractor(part(v, f"extra_extractors.{extra}."), c, x, grid)
    shapes = side_shapes(grid)
    levels = c.split([height * width for height, width in shapes], 1)
    sides = [level.transpose(1, 2).unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
    stem = F.conv_transpose2d(sides[0], w["up.weight"], w["up.bias"], stride=2) + stem
    tokens = x.transpose(1, 2).unflatten(2, grid)
    maps = [
        side + F.interpolate(tokens, side.shape[2:], mode="bilinear", align_corners=False) for side in [stem, *sides]
    ]
    return [batch_norm(m, w, f"norm{i}") for i, m in enumerate(maps, 1)], torch.stack(kept), next_prior


def sine_positions(height: int, width: int, dim: int) -> Tensor:
    """Mask2Former's position encoding [h * w, dim], rows first."""
    half = dim // 2
    scale = 10000 ** (2 * (torch.arange(half) // 2) / half)
    parts = []
    for axis, size in ((0, height), (1, width)):
        place = torch.arange(1, size + 1) / (size + 1e-6) * 2 * math.pi
        angle = place[:, None] / scale
        wave = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)
        parts.append((wave[:, None] if axis == 0 else wave[None]).expand(height, width, half))
    return torch.cat(parts, -1).flatten(0, 1)


def pixel_decoder(w: Weights, maps: list[Tensor], layers: int) -> tuple[Tensor, list[Tensor]]:
    """Mask features at stride 4, and memories of strides 32, 16, 8 as maps."""
    tokens, positions, shapes = [], [], []
    for i, x in enumerate([maps[3], maps[2], maps[1]]):
        y = F.conv2d(x, w[f"input_convs.{i}.conv.weight"], w[f"input_convs.{i}.conv.bias"])
        y = group_norm(y, w, f"input_convs.{i}.gn")
        shapes.append(tuple(y.shape[2:]))
        tokens.append(y.flatten(2).transpose(1, 2))
        positions.append(sine_positions(*y.shape[2:], y.shape[1]) + w["level_encoding.weight"][i])
    x, position = torch.cat(tokens, 1), torch.cat(positions)
    reference = torch.cat([centres(*shape) for shape in shapes])
    for i in range(layers):
        v = part(w, f"encoder.layers.{i}.")
        x = x + deformable_attention(part(v, "attentions.0."), x + position, reference, x, shapes, HEADS)
        x = layer_norm(x, v, "norms.0", 1e-5)
        x = x + linear(F.relu(linear(x, v, "ffns.0.layers.0.0")), v, "ffns.0.layers.1")
        x = layer_norm(x, v, "norms.1", 1e-5)
    memories = x.transpose(1, 2).split([h * w_ for h, w_ in shapes], 2)
    memories = [m.unflatten(2, shape) for m, shape in zip(memories, shapes, strict=True)]
    side = group_norm(F.conv2d(maps[0], w["lateral_convs.0.conv.weight"]), w, "lateral_convs.0.gn")
    fine = side + F.interpolate(memories[-1], side.shape[2:], mode="bilinear", align_corners=False)
    fine = F.conv2d(fine, w["output_convs.0.conv.weight"], padding=1)
    fine = F.relu(group_norm(fine, w, "output_convs.0.gn"))
    return F.conv2d(fine, w["mask_feature.weight"], w["mask_feature.bias"]), memories


def attention(w: Weights, query, key, value, blocked: Tensor | None) -> Tensor:
    qw, kw, vw = w["attn.in_proj_weight"].chunk(3)
    qb, kb, vb = w["attn.in_proj_bias"].chunk(3)
    heads = [
        F.linear(t, weight, bias).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for t, weight, bias in ((query, qw, qb), (key, kw, kb), (value, vw, vb))
    ]
    mask = None if blocked is None else ~blocked[:, None]
    return linear(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2), w, "attn.out_proj")


def predict(w: Weights, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    x = layer_norm(queries, w, "transformer_decoder.post_norm", 1e-5)
    kernel = x
    for i in (0, 2, 4):
        kernel = linear(kernel, w, f"mask_embed.{i}")
        kernel = F.relu(kernel) if i < 4 else kernel
    return linear(x, w, "cls_embed"), torch.einsum("bqc,bchw->bqhw", kernel, features)


def head(w: Weights, maps: list[Tensor], track_queries: Tensor, track_positions: Tensor, layers: int, decoder: int):
    features, memories = pixel_decoder(part(w, "pixel_decoder."), maps, layers)
    queries = torch.cat([w["query_feat.weight"], track_queries])[None]
    position = torch.cat([w["query_embed.weight"], track_positions])[None]
    keys = [m.flatten(2).transpose(1, 2) + w["level_embed.weight"][i] for i, m in enumerate(memories)]
    places = [sine_positions(*m.shape[2:], m.shape[1])[None] for m in memories]
    class_logits, mask_logits = predict(w, queries, features)
    for i in range(decoder):
        v, level = part(w, f"transformer_decoder.layers.{i}."), i % 3
        small = F.interpolate(mask_logits, memories[level].shape[2:], mode="bilinear", align_corners=False)
        blocked = small.flatten(2).sigmoid() < 0.5
        blocked = blocked & ~blocked.all(2, keepdim=True)
        key = keys[level]
        queries = queries + attention(part(v, "attentions.0."), queries + position, key + places[level], key, blocked)
        queries = layer_norm(queries, v, "norms.0", 1e-5)
        with_place = queries + position
        queries = queries + attention(part(v, "attentions.1."), with_place, with_place, queries, None)
        queries = layer_norm(queries, v, "norms.1", 1e-5)
        queries = queries + linear(F.relu(linear(queries, v, "ffns.0.layers.0.0")), v, "ffns.0.layers.1")
        queries = layer_norm(queries, v, "norms.2", 1e-5)
        class_logits, mask_logits = predict(w, queries, features)
    return class_logits, mask_logits, queries
