"""Which kind of device a tensor is on, and whether the code runs at all.

All that the model does otherwise on one kind than on another asks here, so that tests can run every branch on a CPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

_operators = False


def family(x: Tensor) -> str:
    """cpu, cuda or mps."""
    return x.device.type


def is_traced() -> bool:
    """Whether torch.compile or torch.export reads the code instead of running it. Then no number may be waited for, shapes
    follow from those of the inputs, and plain operations are better than functions of our own: the compiler fuses them."""
    return torch.compiler.is_compiling()


def calls_operators() -> bool:
    """Whether kernels are to be called as PyTorch's operators are, so that others can see, and keep, what they give."""
    return is_traced() or _operators  # in this order, or a compiler would watch the second


@contextmanager
def as_operators(inner: AbstractContextManager[None]) -> Iterator[None]:
    """Has `calls_operators` be true in `inner`."""
    global _operators
    before, _operators = _operators, True
    try:
        with inner:
            yield
    finally:
        _operators = before


def is_exported() -> bool:
    """Whether torch.export reads it, in its usual way (`strict=False`): where its graph goes, our own operators are not."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
