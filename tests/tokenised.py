"""All that a prepared source holds, as a test likes to look at it: units in the order of their files."""

from types import SimpleNamespace

import numpy as np

from smolds_dist.data.batch import TrainingData


def whole(found: TrainingData, name: str) -> SimpleNamespace:
    """Tokens and documents of both splits; `train_documents` has the number of the file among the source's."""
    source, order = found.sources[name], found.orders[name]
    order.extend(None)
    parts = []
    units = sorted(range(len(source.units)), key=lambda unit: source.units[unit])
    for unit in units:
        for piece in source.spans_in(np.array([unit]), True):
            table = np.array(source.table(unit))
            table = table[(table["start"] >= piece.start) & (table["start"] < piece.start + piece.length)]
            table["start"] -= np.uint64(piece.start)
            table["file"] = [source.units[unit][part].file for part in table["file"]]
            parts.append((source.tokens(unit)[piece.start : piece.start + piece.length], table))
    begins = np.cumsum([0, *(len(tokens) for tokens, _ in parts)]).astype(np.uint64)
    for begin, (_, table) in zip(begins, parts, strict=False):
        table["start"] += begin
    return SimpleNamespace(
        train=np.concatenate([tokens for tokens, _ in parts]),
        train_documents=np.concatenate([table for _, table in parts]),
        train_tokens=int(begins[-1]),
        val=source.held_out.tokens,
        val_documents=source.held_out.documents,
        val_tokens=len(source.held_out.tokens),
        val_bytes=source.held_out.bytes,
        val_unigram_entropy=source.held_out.unigram_entropy,
        beyond=source.held_out.beyond,
        files=[file.path for file in source.files],
        folders=source.folders,
        left_out=source.left_out(),
        tokenizer=found.tokenizer,
    )
