"""A model's training state by name, whatever the layout: what a rank holds are flat ranges of *logical tensors*.

A logical tensor is a weight as a model without ranks knows it; every matrix of every expert is one of its own
(`model.layers.0.mlp.experts.3.gate_proj.weight`). A parameter of any engine, flattened, is a run of whole logical tensors
one after the other, and a rank holds a range of it. Checkpoints store nothing but logical tensors, so what one layout has
written any other can read.

Shape letters: E experts, I expert width, H hidden.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Size, Tensor, nn

# Names of expert weights: ours, stacked [E, 2 I, H] and [E, H, I]; and AutoEP's, of the experts that a rank has.
_EXPERT_MATRICES = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of a logical tensor, as views [n] of what the engine works on."""

    name: str
    shape: tuple[int, ...]  # of the logical tensor
    start: int
    tensors: dict[str, Tensor]  # "value" in fp32 and the optimizer's state, such as "exp_avg"
    replica: int = 0  # which of the `replicas` ranks that hold the same elements this one is
    replicas: int = 1

    def only(self, *kinds: str) -> "Fragment":
        """Some of its kinds, which it has."""
        return replace(self, tensors={kind: self.tensors[kind] for kind in kinds})

    def share(self) -> "Fragment":
        """The part that this rank writes where several hold the same."""
        length = len(self.tensors["value"])
        begin, end = (length * place // self.replicas for place in (self.replica, self.replica + 1))
        tensors = {kind: t[begin:end] for kind, t in self.tensors.items()}
        return Fragment(self.name, self.shape, self.start + begin, tensors)


def logical_shapes(name: str, shape: Size | tuple[int, ...], first_expert: int = 0) -> dict[str, tuple[int, ...]]:
    """The logical tensors of a parameter, in the order of its elements.

    Args:
        name: of the parameter in the engine's model.
        shape: of the whole parameter.
        first_expert: number of the first expert that the parameter holds.
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
    """Cuts a parameter's held range at the borders of its logical tensors.

    Args:
        shapes: `logical_shapes` of the parameter.
        start: first element of the parameter that is held.
        tensors: views [n] by kind; what lies past the parameter's end is padding.
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
    """Fills what is here of a model, logical tensor by logical tensor.

    Args:
        experts: names of expert weights of which this rank has a part, each with the number of the first expert in it.
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # at ZeRO 3 this rank's slice
        start = 0 if held is parameter else parameter.ds_zero_partition_rank * held.numel()
        shapes = logical_shapes(name, full_shape(parameter), experts.get(name, 0))
        for fragment in split_by_tensor(shapes, start, {"value": held.detach().view(-1)}):
            fill(fragment)


def offset_in(flats: list[Tensor], view: Tensor) -> tuple[int, int]:
    """Which of the flat tensors `view` is a view of, and its first element there."""
    for index, flat in enumerate(flats):
        if 0 <= (distance := view.data_ptr() - flat.data_ptr()) < flat.nbytes:
            return index, distance // flat.element_size()
    raise ValueError("a view of none of the tensors")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has left a slice of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def tensor_shapes(model: nn.Module, experts: Container[str] = (), ranks: int = 1) -> dict[str, tuple[int, ...]]:
    """All logical tensors of a model, those on other ranks too.

    Args:
        experts: names of expert weights that are shared by `ranks` ranks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows, *others = full_shape(parameter)
        shapes |= logical_shapes(name, (rows * ranks if name in experts else rows, *others))
    return shapes
