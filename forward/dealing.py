"""Which rows of a step go to which process and micro-batch: neighbors in length together, so that little is padded.

Losses are sums over global counts, so any dealing gives the same gradient. Every process computes the same table.
"""

import math
from collections.abc import Sequence


def deal(costs: Sequence[int], micro_size: int, world_size: int, budget: int | None = None) -> list[list[list[int]]]:
    """Return [rank][micro-batch] -> places of the rows, the same number of micro-batches for every rank.

    costs: tokens of each row. A micro-batch holds at most `micro_size` rows, or with a `budget` as many as its tokens
    allow (at least one). Some may be empty. The ranks' k-th micro-batches are neighbors in length: nobody waits long.
    """
    order = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    bins = _by_size(order, micro_size, world_size) if budget is None else _by_tokens(order, costs, budget)
    steps = max(1, math.ceil(len(bins) / world_size))
    bins += [[] for _ in range(steps * world_size - len(bins))]
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    for step in range(steps):
        group = bins[step * world_size : (step + 1) * world_size]
        for rank, one in enumerate(reversed(group) if step % 2 else group):  # who had the longest has the shortest next
            dealt[rank].append(one)
    return dealt


def _by_size(order: list[int], micro_size: int, world_size: int) -> list[list[int]]:
    """Cut the order into as few micro-batches as every rank needs, none larger than the next by more than one row."""
    number = world_size * max(1, math.ceil(math.ceil(len(order) / world_size) / micro_size))
    bounds = [len(order) * i // number for i in range(number + 1)]
    return [order[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def _by_tokens(order: list[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Fill micro-batches up to the budget, longest rows first: the first place that a row fits into."""
    bins: list[list[int]] = []
    room: list[int] = []
    for place in order:
        fits = next((i for i, left in enumerate(room) if costs[place] <= left), None)
        if fits is None:
            bins.append([])
            room.append(budget)
            fits = len(bins) - 1
        bins[fits].append(place)
        room[fits] -= costs[place]
    return bins
