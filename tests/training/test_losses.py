"""Losses against implementations with one loop for each sum, from the definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.losses import (
    Identities,
    dice_loss,
    distillation_loss,
    focus_loss,
    pairwise_cost,
    ratio_loss,
    set_loss,
)

QUERIES, CLASSES, HEIGHT, WIDTH = 6, 4, 5, 7


def case(objects, seed=0, soft=True):
    """Class logits, mask logits, labels and masks with partly covered pixels, of one frame."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(objects, HEIGHT, WIDTH, generator=generator)
    return (
        torch.randn(QUERIES, CLASSES + 1, generator=generator),
        3 * torch.randn(QUERIES, HEIGHT, WIDTH, generator=generator),
        torch.randint(0, CLASSES, (objects,), generator=generator),
        masks if soft else (masks > 0.6).float(),
    )


def plain_dice(logits, mask):
    overlap = total = 0.0
    for logit, target in zip(logits.flatten(), mask.flatten(), strict=True):
        overlap = overlap + logit.sigmoid() * target
        total = total + logit.sigmoid() + target
    return 1 - (2 * overlap + 1) / (total + 1)


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("objects", [1, 3])
def test_pairwise_cost_equals_a_loop(objects, soft):
    class_logits, mask_logits, labels, masks = case(objects, soft=soft)
    cost = pairwise_cost(class_logits, mask_logits, labels, masks)
    assert cost.shape == (QUERIES, objects)
    for q in range(QUERIES):
        for o in range(objects):
            want = (
                5.0 * F.binary_cross_entropy_with_logits(mask_logits[q], masks[o])
                + 5.0 * plain_dice(mask_logits[q], masks[o])
                - 2.0 * class_logits[q].softmax(0)[labels[o]]
            )
            torch.testing.assert_close(cost[q, o], want, rtol=1e-5, atol=1e-5)


def test_pairwise_cost_without_objects_is_empty():
    assert pairwise_cost(*case(0)).shape == (QUERIES, 0)


def test_pairwise_cost_is_least_for_the_query_that_is_right():
    class_logits, mask_logits, labels, masks = case(3, soft=False)
    mask_logits[2], class_logits[2, labels[1]] = 20 * masks[1] - 10, 10.0
    assert pairwise_cost(class_logits, mask_logits, labels, masks)[:, 1].argmin() == 2


def test_dice_loss_equals_a_loop():
    _, mask_logits, _, masks = case(3)
    want = torch.stack([plain_dice(*pair) for pair in zip(mask_logits[:3], masks, strict=True)])
    torch.testing.assert_close(dice_loss(mask_logits[:3], masks), want)


def test_dice_loss_at_both_ends():
    mask = torch.zeros(1, 8, 8)
    mask[0, :4] = 1.0
    assert dice_loss(200 * mask - 100, mask).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(100 - 200 * mask, mask).item() == pytest.approx(1 - 1 / 65, abs=1e-6)


@pytest.mark.parametrize("queries", [[], [4], [5, 0, 3]], ids=len)
def test_set_loss_equals_a_loop(queries):
    class_logits, mask_logits, labels, masks = case(len(queries))
    carried = dict(zip(queries, range(len(queries)), strict=True))
    entropy = weights = 0.0
    for q in range(QUERIES):
        target = int(labels[carried[q]]) if q in carried else CLASSES
        weight = 1.0 if q in carried else 0.1
        entropy -= weight * class_logits[q].log_softmax(0)[target]
        weights += weight
    want = 2.0 * entropy / weights
    for q, o in carried.items():
        want = want + 5.0 * F.binary_cross_entropy_with_logits(mask_logits[q], masks[o]) / len(queries)
        want = want + 5.0 * plain_dice(mask_logits[q], masks[o]) / len(queries)
    torch.testing.assert_close(set_loss(class_logits, mask_logits, queries, labels, masks), want)


def test_set_loss_teaches_the_class_to_all_queries_and_masks_to_those_matched():
    class_logits, mask_logits, labels, masks = case(2)
    class_logits.requires_grad_(), mask_logits.requires_grad_()
    set_loss(class_logits, mask_logits, [4, 1], labels, masks).backward()
    assert (class_logits.grad.abs().sum(1) > 0).all()
    assert (mask_logits.grad.abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == [1, 4]


def test_set_loss_is_least_for_the_truth():
    _, _, labels, masks = case(2, soft=False)
    class_logits = torch.full((QUERIES, CLASSES + 1), -20.0)
    class_logits[:, CLASSES] = 20.0
    class_logits[[4, 1], CLASSES] = -20.0
    class_logits[[4, 1], labels] = 20.0
    mask_logits = torch.zeros(QUERIES, HEIGHT, WIDTH)
    mask_logits[[4, 1]] = 100 * masks - 50
    assert set_loss(class_logits, mask_logits, [4, 1], labels, masks).item() == pytest.approx(0, abs=1e-5)
    assert set_loss(class_logits, mask_logits, [1, 4], labels, masks).item() > 1


# --- identities -------------------------------------------------------------------------------------------------------


@st.composite
def clips(draw):
    """Frames of a clip: which objects are visible, and the seed of the costs; never more objects than queries."""
    queries = draw(st.integers(1, 7))
    names = draw(st.lists(st.integers(0, 50), min_size=1, max_size=queries, unique=True))
    shown = st.lists(st.sampled_from(names), unique=True)
    return queries, draw(st.lists(st.tuples(shown, st.integers(0, 2**31)), min_size=1, max_size=8))


def random_cost(queries, objects, seed):
    return torch.rand(queries, objects, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(clips())
def test_object_keeps_its_query_and_no_two_share_one(clip):
    queries, frames = clip
    identities, first = Identities(), {}
    for objects, seed in frames:
        matched = identities.match(random_cost(queries, len(objects), seed), objects)
        assert len(matched) == len(objects)
        assert all(0 <= query < queries for query in matched)
        for name, query in zip(objects, matched, strict=True):
            assert name in first or query not in first.values(), "a new object gets a free query"
            assert first.setdefault(name, query) == query, "an object seen before keeps its query"
        assert len(set(first.values())) == len(first)
    assert identities.query_of == first


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 3))
def test_new_objects_are_matched_at_the_least_cost_among_the_free_queries(seed, known, new):
    identities = Identities({name: 2 * name for name in range(known)})  # queries 0, 2, 4 are taken
    objects = [*range(known), *range(10, 10 + new)]
    cost = random_cost(7, len(objects), seed)
    free = [query for query in range(7) if query not in identities.query_of.values()]
    least = min(
        sum(float(cost[q, known + i]) for i, q in enumerate(choice)) for choice in itertools.permutations(free, new)
    )
    matched = identities.match(cost, objects)
    assert matched[:known] == [2 * name for name in range(known)]
    assert sum(float(cost[q, known + i]) for i, q in enumerate(matched[known:])) == pytest.approx(least, abs=1e-5)


def test_forgetting_frees_all_queries():
    identities = Identities()
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert identities.match(cost, [5, 6]) == [0, 1]
    assert identities.match(cost.flip(0), [5, 6]) == [0, 1]
    identities.forget()
    assert identities.match(cost.flip(0), [5, 6]) == [1, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_cost_that_is_not_finite_still_matches(value):
    cost = torch.full((4, 2), value)
    assert len(set(Identities().match(cost, [0, 1]))) == 2


def test_nan_is_the_worst_match():
    cost = torch.tensor([[torch.nan, 5.0], [5.0, torch.nan]])
    assert Identities().match(cost, [0, 1]) == [1, 0]


def test_frame_without_objects():
    assert Identities({3: 1}).match(torch.zeros(4, 0), []) == []


def test_object_without_a_free_query_gets_none():
    """More objects than queries: a clip over a cut shows ten, vpp-eo-micro has eight queries."""
    identities = Identities()
    cost = torch.tensor([[0.0, 9.0, 5.0], [9.0, 0.0, 5.0]])
    assert identities.match(cost, [0, 1, 2]) == [0, 1, None]
    assert identities.match(cost[:, 2:], [2]) == [None], "nor does it take one over later"
    assert identities.query_of == {0: 0, 1: 1}


# --- ratio loss -------------------------------------------------------------------------------------------------------


def test_ratio_loss_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2, 60, generator=generator)
    masks = [(torch.rand(2, 60, generator=generator) < 0.6).float() for _ in range(3)]
    targets = [0.56, 0.448, 0.358]
    stages = sum((float(mask.sum()) / 120 - target) ** 2 for mask, target in zip(masks, targets, strict=True))
    with_prior = 40 * (10 * (float(probability.sum()) / 120 - 0.5) ** 2 + stages) / 13
    assert ratio_loss(probability, masks, targets).item() == pytest.approx(with_prior, rel=1e-4)
    assert ratio_loss(None, masks, targets).item() == pytest.approx(40 * stages / 3, rel=1e-4)


def test_ratio_loss_is_zero_on_target():
    masks = [torch.tensor([[1.0, 0.0, 1.0, 0.0]])]
    assert ratio_loss(torch.full((1, 4), 0.5), masks, [0.5]).item() == 0
    assert ratio_loss(None, masks, [0.25]).item() == pytest.approx(40 * 0.0625)


def test_ratio_loss_refuses_another_number_of_targets():
    with pytest.raises(ValueError, match="zip"):
        ratio_loss(None, [torch.ones(1, 4)], [0.5, 0.4])


def test_focus_loss_is_small_where_scores_tell_objects():
    patches = torch.tensor([[True, False, False, True], [False, False, True, False]])
    right = torch.where(patches, 8.0, -8.0)
    assert focus_loss([right, right], patches) < 1e-3
    assert focus_loss([torch.zeros(2, 4)], patches) == pytest.approx(math.log(2), abs=1e-6)
    assert focus_loss([right, -right], patches) == pytest.approx(4.0, abs=1e-2)  # the mean of about 0 and 8


def test_focus_loss_pulls_scores_towards_objects():
    scores = torch.zeros(1, 4, requires_grad=True)
    focus_loss([scores], torch.tensor([[True, False, True, False]])).backward()
    assert scores.grad.sign().tolist() == [[-1.0, 1.0, -1.0, 1.0]]


def student_and_teacher(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 5, 4), (2, 5, 6, 8), (2, 12, 16)
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(2)]


def test_distillation_loss_equals_a_loop():
    (classes, masks, features), teacher = student_and_teacher()
    wanted = teacher[0].softmax(-1)
    terms = {True: [0.0, 0.0], False: [0.0, 0.0]}
    pixels = [0.0, 0.0]
    for b in range(2):
        for q in range(5):
            sure = 1 - float(wanted[b, q, -1])
            divergence = float((wanted[b, q] * (wanted[b, q].log() - classes[b, q].log_softmax(-1))).sum())
            for kind, weight in ((True, sure), (False, 1 - sure)):
                terms[kind][0] += weight * divergence
                terms[kind][1] += weight
            target = teacher[1][b, q].sigmoid()
            each = [
                -(t * math.log(1 / (1 + math.exp(-x))) + (1 - t) * math.log(1 / (1 + math.exp(x))))
                for x, t in zip(masks[b, q].flatten().tolist(), target.flatten().tolist(), strict=True)
            ]
            pixels[0] += sure * sum(each) / len(each)
            pixels[1] += sure

    def normalised(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    distance = float(((normalised(features) - normalised(teacher[2])) ** 2).mean())
    want = sum(total / max(weight, 1.0) for total, weight in terms.values()) + 5 * pixels[0] / max(pixels[1], 1.0)
    got = float(distillation_loss(classes, masks, features, teacher))
    assert got == pytest.approx(want + distance, rel=1e-4)


def test_distillation_loss_is_least_for_the_teachers_own_answer():
    student, teacher = student_and_teacher()
    own = tuple(value.clone().requires_grad_() for value in teacher)
    loss = distillation_loss(*own, teacher)
    loss.backward()
    assert loss < distillation_loss(*student, teacher)
    assert all(value.grad.abs().max() < 1e-5 for value in own), "nothing pulls away from it"
