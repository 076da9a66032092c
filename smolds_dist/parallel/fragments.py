"""A model's training state by name, independent of layout: a rank holds flat ranges of *logical tensors*.

A logical tensor is a weight of the single-process model; each matrix of each expert is its own logical tensor
(`model.layers.0.mlp.experts.3.gate_proj.weight`). A flattened parameter of any engine is a concatenation of full logical
tensors, and a rank holds a range of it. Checkpoints store only logical tensors, so any layout can read what another wrote.

Shape letters: E experts, I expert width, H hidden.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Size, Tensor, nn

# Names of expert weights: ours, stacked [E, 2 I, H] and [E, H, I]; and AutoEP's, of a rank's experts.
_EXPERT_MATRICES = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of a logical tensor, as views [n] of the engine's tensors."""

    name: str
    shape: tuple[int, ...]  # of the logical tensor
    start: int
    tensors: dict[str, Tensor]  # "value" in fp32 and the optimizer's state, such as "exp_avg"
    replica: int = 0  # index among the `replicas` ranks with the same elements
    replicas: int = 1

    def only(self, *kinds: str) -> "Fragment":
        """Return a fragment with only these kinds."""
        return replace(self, tensors={kind: self.tensors[kind] for kind in kinds})

    def share(self) -> "Fragment":
        """Return the slice that this rank writes of elements shared with replicas."""
        length = len(self.tensors["value"])
        begin, end = (length * index // self.replicas for index in (self.replica, self.replica + 1))
        tensors = {kind: t[begin:end] for kind, t in self.tensors.items()}
        return Fragment(self.name, self.shape, self.start + begin, tensors)


def logical_shapes(name: str, shape: Size | tuple[int, ...], first_expert: int = 0) -> dict[str, tuple[int, ...]]:
    """Return the logical tensors of a parameter, in the order of its elements.

    Args:
        name: of the parameter in the engine's model.
        shape: of the full parameter.
        first_expert: index of the parameter's first expert.
    """
    prefix, _, weight = name.rpartition(".")
    if not prefix.endswith(".experts") or weight not in _EXPERT_MATRICES:
        # AutoEP's router holds a Linear, ours the weight itself.
        return {name.replace(".router.gate.", ".gate.").replace(".router.", ".gate."): tuple(shape)}
    experts, rows, columns = shape
    matrices = _EXPERT_MATRICES[weight]
    return {
        f"{prefix}.{first_expert + expert}.{matrix}.weight": (rows // len(matrices), columns)
        for expert, matrix in product(range(experts), matrices)
    }


def split_by_tensor(
    shapes: dict[str, tuple[int, ...]], start: int, tensors: dict[str, Tensor], **replica: int
) -> Iterator[Fragment]:
    """Split a parameter's local range at the borders of its logical tensors.

    Args:
        shapes: `logical_shapes` of the parameter.
        start: first local element of the parameter.
        tensors: views [n] by kind; elements past the parameter's end are padding.
        replica: `replica` and `replicas` of the fragments.
    """
    end = start + len(tensors["value"])
    begin = 0
    for name, shape in shapes.items():
        after = begin + Size(shape).numel()
        first, last = max(begin, start), min(after, end)
        if first < last:
            part = slice(first - start, last - start)
            yield Fragment(name, shape, first - begin, {kind: t[part] for kind, t in tensors.items()}, **replica)
        begin = after


@torch.no_grad()
def fill_parameters(
    model: nn.Module, fill: Callable[[Fragment], None], experts: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Fill this rank's slices of a model, one logical tensor at a time.

    Args:
        experts: names of this rank's expert weights, each with the index of its first expert.
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # at ZeRO 3, this rank's slice
        start = 0 if held is parameter else parameter.ds_zero_partition_rank * held.numel()
        shapes = logical_shapes(name, full_shape(parameter), experts.get(name, 0))
        for fragment in split_by_tensor(shapes, start, {"value": held.detach().view(-1)}):
            fill(fragment)


def offset_in(flats: list[Tensor], view: Tensor) -> tuple[int, int]:
    """Return the index of the flat tensor that contains `view`, and the view's first element in it."""
    for index, flat in enumerate(flats):
        if 0 <= (distance := view.data_ptr() - flat.data_ptr()) < flat.nbytes:
            return index, distance // flat.element_size()
    raise ValueError("not a view of any of the tensors")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's full shape, also if ZeRO 3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def tensor_shapes(model: nn.Module, experts: Container[str] = (), ranks: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's logical tensors, including those on other ranks.

    Args:
        experts: names of expert weights that are sharded over `ranks` ranks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows, *others = full_shape(parameter)
        shapes |= logical_shapes(name, (rows * ranks if name in experts else rows, *others))
    return shapes
