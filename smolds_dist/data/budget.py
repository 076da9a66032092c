"""The disk budget: tokens that lie behind a run give way to those that it wants next (`data.disk_budget_gb`).

What a unit held stays known, so that the order does not need its tokens; they are made again where a later epoch wants them.
"""

from smolds_dist.data.batch import TrainingData
from smolds_dist.data.order import SourceOrder
from smolds_dist.data.unit_source import UnitSource


class DiskBudget:
    """Of one machine's cache; for one process of it.

    Args:
        budget: bytes of tokens that may be there.
    """

    def __init__(self, data: TrainingData, budget: float):
        self._data, self._budget = data, budget
        self._at: list[tuple[int, int]] = []

    def keep(self, samples: int) -> bool:
        """The run has come so far: removes what lies behind, the oldest first, where there is too much.

        Returns:
            Whether it has come to another window.
        """
        at = [order.window_of(taken) for _, order, taken in unit_orders(self._data, samples)]
        if at == self._at:
            return False
        self._at = at
        over = bytes_there(self._data) - self._budget
        for source, order, taken in unit_orders(self._data, samples):
            for unit in order.units_behind(taken).tolist():
                over -= source.remove(unit) if over > 0 else 0
        return True


def unit_orders(data: TrainingData, samples: int) -> list[tuple[UnitSource, SourceOrder, int]]:
    """Sources that are made of several units, with their orders, and the last of their samples among the run's first."""
    totals = data.mixture.totals(samples).tolist()
    triples = zip(data.sources.values(), data.orders.values(), totals, strict=True)
    return [(source, order, max(0, taken - 1)) for source, order, taken in triples if len(source.units) > 1]


def bytes_there(data: TrainingData) -> int:
    """Bytes of all tokens that are there."""
    return sum(source.bytes_there() for source in data.sources.values())
