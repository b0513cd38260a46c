"""The sections world and map: the small world, and the map of its cells. Keys: config/section/NAME.yaml."""

from dataclasses import dataclass, field
from typing import Any

from settings.typed import Place, Places, one_of, require

SHOP_PAIRS = 4_000  # training pairs of the shop world (worlds.shop.PAIRS_TRAIN)


@dataclass(frozen=True)
class WorldConfig:
    """The `world` section: which generated world task=world writes. The defaults serve stored runs without knobs."""

    name: str
    pairs: int = SHOP_PAIRS
    flipped: float = 0.0
    extra_prompts: int | None = None
    own_pairs: Place | None = None

    def __post_init__(self) -> None:
        one_of("world.name", self.name, ("shop", "arithmetic"))
        require(1 <= self.pairs <= SHOP_PAIRS, f"world.pairs={self.pairs} must be from 1 to {SHOP_PAIRS}")
        blocks = abs(self.flipped * 50 - round(self.flipped * 50)) < 1e-9  # shop.FLIP_BLOCK
        require(
            0 <= self.flipped <= 1 and blocks,
            f"world.flipped={self.flipped} must be a share of the pairs in steps of 0.02, e.g. 0.2",
        )
        extra = self.extra_prompts
        require(extra is None or extra >= 0, f"world.extra_prompts={extra} must not be negative (or null)")
        turned = (self.pairs, self.flipped, extra, self.own_pairs) != (SHOP_PAIRS, 0.0, None, None)
        require(
            self.name == "shop" or not turned,
            f"world.name={self.name} has no knobs: leave world.pairs, flipped, extra_prompts and own_pairs as they are",
        )


@dataclass(frozen=True)
class MapConfig:
    """The `map` section: the cells of a grid, and what task=map shows of them. The defaults serve stored runs."""

    evaluations: dict[str, Places] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    methods: list[str] = field(default_factory=list)
    comparisons: list[list[str]] = field(default_factory=list)
    columns: str | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        for cell in self.evaluations:
            require(bool(self.knobs.get(cell)), f"map.knobs.{cell} is missing: what is turned in that cell")
        for pair in self.comparisons:
            require(len(pair) == 2, f"map.comparisons holds {pair}: two models each")
