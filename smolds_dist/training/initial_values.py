"""A new model's initial values: each a pure function of the seed, its logical tensor's name and its index there.

So every layout starts from the same model, and a rank generates only its own slices.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from smolds_dist.activity import beat
from smolds_dist.parallel.fragments import Fragment
from smolds_dist.parallel.mup import MuP

BLOCK = 2**16
"""Elements drawn from one counter of the generator (Philox, Salmon et al., SC 2011)."""


@dataclass(frozen=True)
class InitialValues:
    """Normal with standard deviation `std` for matrices, 1 for the weights of norms, or as `mup` scales them."""

    seed: int  # of the run
    std: float  # the model's `initializer_range`
    mup: MuP | None = None

    @torch.no_grad()
    def fill(self, fragment: Fragment) -> None:
        """Fill the fragment's value, in its dtype."""
        out = fragment.tensors["value"]
        ratio = self.mup.initial(fragment.name, fragment.shape) if self.mup else 1.0
        if len(fragment.shape) == 1:
            out.fill_(ratio)
            return
        key = int.from_bytes(hashlib.sha256(f"{self.seed}:{fragment.name}".encode()).digest()[:16])
        start, end = fragment.start, fragment.start + len(out)
        for number in range(start // BLOCK, -(-end // BLOCK)):
            beat()
            begin = number * BLOCK
            first, last = max(begin, start), min(begin + BLOCK, end)
            # 2^128 draws separate two blocks, so that they never overlap.
            generator = np.random.Generator(np.random.Philox(key=key, counter=number << 128))
            values = generator.standard_normal(last - begin, dtype=np.float32)[first - begin :]
            out[first - start : last - start].copy_(torch.from_numpy(values).mul_(self.std * ratio))
