"""Which tokens a step sees: a pure function of the shards, the sequence length, the seed and the global sample index.

No topology enters, so every world size trains on the same global batches and a resumed run goes on at the exact sample.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState's stream is frozen by NumPy's compatibility policy; default_rng's may change between versions.
    return np.random.RandomState([seed % 2**32, epoch]).permutation(num_samples)


def sample_at(global_index: int, num_samples: int, seed: int) -> int:
    """The sample that is seen `global_index`-th: each epoch is a new permutation of all of them."""
    epoch, position = divmod(global_index, num_samples)
    return int(_epoch_order(num_samples, seed, epoch)[position])


def training_batch(tokens: np.ndarray, seq_len: int, seed: int, global_indices: range) -> Tensor:
    """Token ids [len(global_indices), seq_len] (int64) at those places of the order."""
    num_samples = len(tokens) // seq_len
    starts = [sample_at(index, num_samples, seed) * seq_len for index in global_indices]
    return torch.from_numpy(np.stack([tokens[start : start + seq_len] for start in starts]).astype(np.int64))


def evaluation_batch(tokens: np.ndarray, seq_len: int, indices: range, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [len(indices), seq_len] of held-out sequences; past `num_sequences` the labels are -100.

    Every rank has to run as many forward passes as the others, so the last batch is filled with sequences that do not count.
    """
    sequences = [tokens[i * seq_len : (i + 1) * seq_len] for i in (min(index, num_sequences - 1) for index in indices)]
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    counted = torch.tensor([index < num_sequences for index in indices])
    return ids, ids.masked_fill(~counted[:, None], -100)
