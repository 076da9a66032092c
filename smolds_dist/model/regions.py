"""Elementwise code between matmuls: plain functions of tensors that a compiler fuses into one pass over memory.

They run eagerly until `compile_regions` hands them to torch.compile. Compiling the full model traces through them. Compiled
code keeps intermediate results in fp32, where the plain function rounds each to its dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from smolds_dist.model import device

Backend = str | Callable[..., Any]  # torch.compile's
Given = ParamSpec("Given")
Result = TypeVar("Result")
_regions: list["region[Any, Any]"] = []


class region(Generic[Given, Result]):  # noqa: N801 - a decorator
    """Decorate a function of tensors whose first dimension is rows, without branches on values; it runs eagerly or
    compiled."""

    def __init__(self, function: Callable[Given, Result]):
        update_wrapper(self, function)
        self.plain = function
        self.compiled: Callable[Given, Result] | None = None
        self.dynamic = True
        _regions.append(self)

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        tensors: list[Any] = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # A single row runs eagerly: the compiler specializes on size 1.
        if self.compiled is None or device.is_traced() or tensors[0].shape[0] == 1:
            return self.plain(*args, **kwargs)
        for tensor in tensors if self.dynamic else ():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.compiled(*args, **kwargs)


def compile_regions(backend: Backend = "inductor", dynamic: bool = True) -> None:
    """Compile all regions of this process, each at its first call.

    Args:
        dynamic: the number of rows is dynamic, so that changing expert loads do not recompile.
    """
    for one in _regions:
        one.dynamic = dynamic
        one.compiled = torch.compile(one.plain, backend=backend, dynamic=None if dynamic else False)


def run_regions_eagerly() -> None:
    """Undo `compile_regions`."""
    for one in _regions:
        one.compiled = None


@contextmanager
def eager_regions() -> Iterator[None]:
    """Run regions eagerly outside training: other shapes, and no gradients, would each recompile."""
    compiled = [one.compiled for one in _regions]
    run_regions_eagerly()
    try:
        yield
    finally:
        for one, before in zip(_regions, compiled, strict=True):
            one.compiled = before
