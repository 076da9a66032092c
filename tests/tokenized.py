"""The content of a prepared source for tests: shards in the order of their files."""

from types import SimpleNamespace

import numpy as np

from smolds_dist.data.batch import TrainingData


def load_all(found: TrainingData, name: str) -> SimpleNamespace:
    """Return tokens and documents of both splits; `train_documents` has each file's index among the source's files."""
    source, order = found.sources[name], found.orders[name]
    order.extend(None)
    parts = []
    shards = sorted(range(len(source.shards)), key=lambda shard: source.shards[shard])
    for shard in shards:
        for span in source.spans_in(np.array([shard]), True):
            table = np.array(source.table(shard))
            table = table[(table["start"] >= span.start) & (table["start"] < span.start + span.length)]
            table["start"] -= np.uint64(span.start)
            table["file"] = [source.shards[shard][part].file for part in table["file"]]
            parts.append((source.tokens(shard)[span.start : span.start + span.length], table))
    begins = np.cumsum([0, *(len(tokens) for tokens, _ in parts)]).astype(np.uint64)
    for begin, (_, table) in zip(begins, parts, strict=False):
        table["start"] += begin
    return SimpleNamespace(
        train=np.concatenate([tokens for tokens, _ in parts]),
        train_documents=np.concatenate([table for _, table in parts]),
        train_tokens=int(begins[-1]),
        val=source.validation.tokens,
        val_documents=source.validation.documents,
        val_tokens=len(source.validation.tokens),
        val_bytes=source.validation.bytes,
        val_unigram_entropy=source.validation.unigram_entropy,
        beyond=source.validation.beyond,
        files=[file.path for file in source.files],
        folders=source.folders,
        left_out=source.describe_skipped(),
        tokenizer=found.tokenizer,
    )
