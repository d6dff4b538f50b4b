"""Named configurations of the encoder-only VPP host."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Which state a selector reads; the names of the selectors are those of :mod:`models.selectors`.
SELECTOR_STATE: dict[str, tuple[str, ...]] = {
    "vpp": ("keys", "keep_logits", "kept"),
    "svit": (),
    "dynamicvit": (),
    "masks": ("focus",),
    "difference": ("keys",),
    "random": ("draw",),
}
PRUNED = ("stale", "adapted", "reuse", "background")  # see VppEoConfig.pruned
OF_THIS_FRAME = ("stale", "adapted")  # those that take nothing from the frame before
IMAGE_ONLY = ("svit", "dynamicvit")
LARGEST_REFRESH = 50

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SelectionStages:
    """Where the selection stages of a host stand; the host's configuration names the three kinds of blocks."""

    map_block: int
    selection_blocks: tuple[int, ...]
    prior_block: int

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks before which a selection stage stands."""
        return (self.map_block, *self.selection_blocks)

    @property
    def stages(self) -> int:
        """Selection stages: Map-SM and the selective modules."""
        return len(self.stage_blocks)

    @property
    def prior_stage(self) -> int:
        """Selection stage in force at ``prior_block``."""
        return sum(block <= self.prior_block for block in self.selection_blocks)


@dataclass(frozen=True)
class VppEoConfig(SelectionStages):
    """Sizes of one encoder-only VPP network.

    Attributes:
        name: Configuration name, ``vpp-eo-*``.
        classes: Names of the object classes; the class head has one more output, for "no object".
        embed_dim: Token width C.
        heads: Attention heads of each block.
        depth: Transformer blocks.
        mlp_ratio: Width of the block's MLP over C.
        patch_size: Side of a square patch, pixels.
        image_size: (height, width) that the position embedding was trained at; other sizes resample it.
        queries: Learned object queries Q.
        query_block: Block at which the queries join the patch tokens; not before the last selection.
        mask_dim: Channels of the mask features at stride 8.
        pool_radius: Map-SM smooths its scores over 2 r + 1 patches in both directions. 4 as published, for 34 x 60
            patches; a grid of 12 x 20 would lose nearly all of its detail to that.
        map_block: Block before which Map-SM selects from the prior.
        selection_blocks: Blocks before which the selective modules choose among the tokens still there.
        prior_block: Block whose output gives the keep logits that the next frame uses.
        mean, std: Normalisation of RGB values in [0, 1].
        selector: What decides which patches are computed: a key of :data:`SELECTOR_STATE`.
        pruned: What the mask head sees of a token that was dropped. ``stale``: the value that it had then (published).
            ``adapted``: that, moved by a small network towards what the blocks that it missed would have made of it.
            ``reuse``: its final features of the frame before. ``background``: those, but only where the frame before
            saw no object, so that an object that has moved on leaves no ghost.
        refresh: Percent of the last stage's tokens, 0 to 50, that go to those that waited longest.

    The blocks of selection and prior are those of Video Patch Pruning (arXiv:2604.00827).
    """

    name: str
    classes: tuple[str, ...]
    embed_dim: int
    heads: int
    depth: int = 12
    mlp_ratio: int = 4
    patch_size: int = 16
    image_size: tuple[int, int] = (288, 512)
    queries: int = 50
    query_block: int = 9
    mask_dim: int = 96
    pool_radius: int = 4
    map_block: int = 1
    selection_blocks: tuple[int, ...] = (3, 6, 9)
    prior_block: int = 5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    selector: str = "vpp"
    pruned: str = "stale"
    refresh: int = 0

    def __post_init__(self) -> None:
        if self.selector not in SELECTOR_STATE:
            raise ValueError(f"no selector is called {self.selector!r}; there are {', '.join(SELECTOR_STATE)}")
        if self.pruned not in PRUNED:
            raise ValueError(f"pruned is {self.pruned!r}; it has to be one of {', '.join(PRUNED)}")
        if not 0 <= self.refresh <= LARGEST_REFRESH:
            raise ValueError(f"refresh is {self.refresh}; it has to be in 0..{LARGEST_REFRESH} percent")

    @property
    def first_stage(self) -> int:
        """The first stage that drops tokens: a selector without a prior starts at block 3, as published."""
        return 1 if self.selector in IMAGE_ONLY else 0

    @property
    def selection_state(self) -> tuple[str, ...]:
        """Fields of the state that selecting needs."""
        extra = {"stale": (), "adapted": (), "reuse": ("final",), "background": ("final", "focus")}[self.pruned]
        age = ("age",) if self.refresh else ()
        return tuple(dict.fromkeys((*SELECTOR_STATE[self.selector], *extra, *age)))


def unnamed_classes(count: int) -> tuple[str, ...]:
    """Names for classes of which a checkpoint tells no more than how many there are."""
    return tuple(f"class {index}" for index in range(count))


_ABSTRACT_CLASSES = unnamed_classes(8)

CONFIGS: dict[str, VppEoConfig] = {
    config.name: config
    for config in (
        VppEoConfig(
            "vpp-eo-micro", _ABSTRACT_CLASSES, embed_dim=48, heads=3, image_size=(96, 160), queries=8, mask_dim=24
        ),
        VppEoConfig("vpp-eo-nano", _ABSTRACT_CLASSES, embed_dim=128, heads=2, queries=24, mask_dim=64, pool_radius=1),
        VppEoConfig("vpp-eo-tiny", _ABSTRACT_CLASSES, embed_dim=192, heads=3, mask_dim=96),
        VppEoConfig("vpp-eo-small", _ABSTRACT_CLASSES, embed_dim=384, heads=6, mask_dim=128),
    )
}


def config_by_name(name: str, classes: tuple[str, ...] | None = None) -> VppEoConfig:
    """The named configuration, with other classes if given.

    Raises:
        KeyError: No such name; the message lists the names there are.
    """
    if name not in CONFIGS:
        raise KeyError(f"no model is called {name!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[name] if classes is None else replace(CONFIGS[name], classes=tuple(classes))
