"""Device type of a tensor, and whether the code is being traced.

Every device-specific branch of the model asks here, so that tests can run all of them on a CPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

_operators = False
_family: str | None = None


def family(x: Tensor) -> str:
    """Return cpu, cuda or mps."""
    return _family or x.device.type


@contextmanager
def as_family(kind: str) -> Iterator[None]:
    """Take the branches of another kind of device."""
    global _family
    before, _family = _family, kind
    try:
        yield
    finally:
        _family = before


def is_traced() -> bool:
    """Return True while torch.compile or torch.export traces the code. Then shapes must not depend on data, and plain
    operations are better than custom autograd functions: the compiler fuses them."""
    return torch.compiler.is_compiling()


def is_fused(x: Tensor) -> bool:
    """Return True while code for CUDA is traced: plain operations that Inductor fuses are then better than few operators."""
    return is_traced() and family(x) == "cuda"


def calls_operators() -> bool:
    """Return True if kernels must be called as PyTorch operators, so that torch can see and save their outputs."""
    return is_traced() or _operators  # in this order, or a compiler would guard on the second


@contextmanager
def as_operators(inner: AbstractContextManager[None]) -> Iterator[None]:
    """Make `calls_operators` true within `inner`."""
    global _operators
    before, _operators = _operators, True
    try:
        with inner:
            yield
    finally:
        _operators = before


def is_exported() -> bool:
    """Return True while torch.export traces (`strict=False`, its default): its graph must run without our operators."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
