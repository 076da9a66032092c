"""What runs between matrix products: plain functions of tensors, each of which a compiler makes one pass over memory.

They run as they are written, until `compile_regions` hands them to torch.compile. Whoever compiles a whole model reads
through them. What the compiler makes keeps intermediate results in fp32, where the plain function rounds each to its dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from smolds_dist.model import device

Given = ParamSpec("Given")
Result = TypeVar("Result")
_regions: list["region[Any, Any]"] = []


class region(Generic[Given, Result]):  # noqa: N801 - a decorator
    """Marks a function of tensors whose first dimension counts rows, without branches on their values: it runs as it is
    written or compiled."""

    def __init__(self, function: Callable[Given, Result]):
        update_wrapper(self, function)
        self.plain = function
        self.compiled: Callable[Given, Result] | None = None
        _regions.append(self)

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        tensors: list[Any] = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # A single row runs as it is written: for the compiler, 1 is no number of rows but a case of its own.
        if self.compiled is None or device.is_traced() or tensors[0].shape[0] == 1:
            return self.plain(*args, **kwargs)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.compiled(*args, **kwargs)


def compile_regions(backend: str = "inductor") -> None:
    """From now on all regions of this process run compiled, each from its first call on.

    The number of rows is a variable for the compiler, so that it is not asked again when the experts' numbers change.
    """
    for one in _regions:
        one.compiled = torch.compile(one.plain, backend=backend)


def run_regions_eagerly() -> None:
    """Takes `compile_regions` back."""
    for one in _regions:
        one.compiled = None


@contextmanager
def eager_regions() -> Iterator[None]:
    """Around what is no training: other shapes, and no gradients, would each be compiled anew."""
    compiled = [one.compiled for one in _regions]
    run_regions_eagerly()
    try:
        yield
    finally:
        for one, before in zip(_regions, compiled, strict=True):
            one.compiled = before
