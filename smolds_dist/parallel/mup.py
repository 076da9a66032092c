"""Maximal update parametrization (muP): initial values and learning rates by a tensor's shape and the model's depth, so
that the best learning rate of a small model is that of a wide and deep one.

Width: spectral norms of a matrix and of its update are proportional to sqrt(rows / columns) (arXiv 2310.17813, condition 1;
for AdamW the same as arXiv 2203.03466, table 8). Depth: the output of each of L layers and each update count 1 / sqrt(L)
(arXiv 2310.02244, table 1); a block of multi-token prediction, between two norms, has a depth of its own. The forward pass
has no multipliers. Those of residual branches are part of their last projections' weights, the logits' 1 / width is part of
the last norm's, with the same training: models and exports stay plain.
"""

import math
from dataclasses import dataclass
from typing import Any

from smolds_dist.settings import Train

LAST_NORMS = ("model.norm.weight", ".shared_head.norm.weight")  # before the LM head
BRANCH_ENDS = (".o_proj.weight", ".down_proj.weight")


@dataclass(frozen=True)
class MuP:
    """Ratios to `initializer_range` and `train.lr`, which hold for square matrices of the base width at the base depth.

    All take logical tensors (`parallel.fragments`), so that every expert's matrix counts with its own shape.
    """

    width_ratio: float  # model's hidden size / base width
    base_width: int
    depth_ratio: float  # model's layers / base depth
    layers: int  # without those of multi-token prediction

    def __str__(self) -> str:
        width, base_depth = round(self.width_ratio * self.base_width), round(self.layers / self.depth_ratio)
        return (
            f"muP: learning rate and initial weights are of width {self.base_width} with {base_depth} layers, "
            f"scaled to width {width} with {self.layers}"
        )

    def initial(self, name: str, shape: tuple[int, ...]) -> float:
        """Return the ratio of a matrix's standard deviation, or the value of a norm's weights."""
        if len(shape) == 1:
            return 1 / self.width_ratio if name.endswith(LAST_NORMS) else 1.0
        if not in_block(name):
            return 1.0
        rows, columns = shape
        std = math.sqrt(self.base_width * min(1.0, rows / columns) / columns)
        return std * self._by_depth(name) if name.endswith(BRANCH_ENDS) else std

    def rate(self, name: str, shape: tuple[int, ...], muon: bool) -> float:
        """Return the ratio of a tensor's learning rate. Muon's updates have spectral norm 0.2 sqrt(max(rows, columns))."""
        if not in_block(name):  # an entry of the embedding matrix is one token's: it has no fan-in
            return self.initial(name, shape) if len(shape) == 1 else 1.0
        if name.endswith(LAST_NORMS):
            return 1 / self.width_ratio
        rate = self._by_depth(name)
        if len(shape) > 1:
            rows, columns = shape
            spectral = math.sqrt(self.base_width * rows / (columns * max(shape)))
            rate *= spectral if muon else self.base_width / columns
        return rate * self._by_depth(name) if name.endswith(BRANCH_ENDS) else rate

    def _by_depth(self, name: str) -> float:
        """Return the factor of a block's branch: 1 / sqrt(depth) in the residual stream of all layers."""
        return 1 / math.sqrt(self.depth_ratio) if int(name.split(".")[2]) < self.layers else 1.0


def in_block(name: str) -> bool:
    return name.startswith("model.layers.")


def mup_of(train: Train, model: Any) -> MuP | None:
    """Return the run's parametrization, None for the standard one.

    Args:
        model: `settings.Model` or `DeepSeekV3Config`.
    """
    if not train.mup:
        return None
    width, depth = model.hidden_size / train.mup_base_width, model.num_hidden_layers / train.mup_base_depth
    return MuP(width, train.mup_base_width, depth, model.num_hidden_layers)
