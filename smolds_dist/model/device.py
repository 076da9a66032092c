"""Which kind of device a tensor is on.

All that the model does otherwise on one kind than on another asks here, so that tests can run every branch on a CPU.
"""

from torch import Tensor


def family(x: Tensor) -> str:
    """cpu, cuda or mps."""
    return x.device.type
