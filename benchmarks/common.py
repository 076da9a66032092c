"""Helpers of several benchmarks: subprocesses, metrics of a run, validation loss, documents."""

import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def run_python(arguments: list[str]) -> str:
    """Run Python in a subprocess and return its output.

    Raises:
        ConfigError: if it fails, with its last line of output.
    """
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if finished.returncode:
        last = (finished.stderr.strip() or "killed").splitlines()[-1]
        raise ConfigError(f"{' '.join(arguments[:3])} failed: {last}")
    return finished.stdout


QUIET = ("--train.eval_every=0", "--checkpoint.every=0", "--log.sample_every=0")
# The presets' text and tokenizers are on the Hub. Speed does not depend on the text; the vocabulary is as large as theirs.
OFFLINE = ("--data.source=stdlib", "--data.tokenizer=train", "--model.vocab_size=49152")


def rows_of_training(given: list[str], run_dir: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """Return the metrics rows of `smolds train` (`smolds launch` for several ranks), without saves, evaluations and samples
    during training.

    Raises:
        ConfigError: if it fails.
    """
    from smolds_dist.observe.rows import read_rows

    start = ["train"] if ranks == 1 else ["launch", "--nproc-per-node", str(ranks), "--"]
    run_python(["-m", "smolds_dist", *start, *given, "-q", *QUIET])
    return read_rows(run_dir / "metrics.jsonl")


def mean_validation_loss(
    loss_of: Callable[["Tensor", "Tensor"], float], tokens: "np.ndarray", seq_len: int, eval_sequences: int
) -> float:
    """Return the mean loss in nats per token over the first `eval_sequences` sequences of validation tokens.

    Args:
        loss_of: returns the mean loss of ids [B, S] with labels [B, S]; negative labels do not count.
    """
    import torch

    from smolds_dist.data.batch import evaluation_batch

    num_sequences = min(eval_sequences, len(tokens) // seq_len)
    total = labeled = 0.0
    with torch.no_grad():
        for start in range(0, num_sequences, 8):
            ids, labels = evaluation_batch(tokens, seq_len, range(start, start + 8), num_sequences)
            count = (labels[:, 1:] >= 0).sum().item()
            total += loss_of(ids, labels) * count
            labeled += count
    return total / labeled


def stdlib_texts(megabytes: int) -> list[str]:
    """Return the standard library's modules, repeated up to this size."""
    from smolds_dist.data.source import files_of
    from smolds_dist.data.text import documents

    data = load_config(["--preset", "debug", "-q"]).data
    texts = [str(document.text) for document in documents(data.mixed["stdlib"], files_of(data.mixed["stdlib"]), data)]
    size = sum(map(len, texts))
    texts *= -(-megabytes * 10**6 // size)
    ends = accumulate(map(len, texts))
    return [text for text, end in zip(texts, ends, strict=True) if end - len(text) < megabytes * 10**6]
