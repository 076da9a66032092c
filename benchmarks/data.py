"""`python -m benchmarks data`: tokenization, time of a batch, memory of the order, masked documents, start of a run.

The documents of the standard library are encoded by `tokenizers` from memory, and tokenized to shards from jsonl files, in
turns. Batches come from three sources; the order's memory is measured for a billion samples, without their tokens.
"""

import json
import shutil
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import stdlib_texts
from smolds_dist.bench.common import write_result
from smolds_dist.bench.train import processor
from smolds_dist.config import load_config
from smolds_dist.errors import OptionParser

PARTS = ("tokenize", "batch", "order", "mask", "start", "prepare")
SEQUENCES, SEQ_LEN = 32, 1024
BATCHES = 200
DOCUMENTS = (100, 300, 1000)  # mean tokens per document


def main(args: list[str]) -> None:
    """Measure, print, and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options.
    """
    parser = OptionParser(
        prog="python -m benchmarks data",
        description=(__doc__ or "").partition("\n")[0],
        example="python -m benchmarks data --what order mask",
    )
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS), help="measurements; default: all")
    parser.add_argument("--rounds", type=int, help="rounds per variant; default: 5, for start and prepare 3")
    megabytes = "MB of text; default: 30, for start 1000, for prepare 200"
    parser.add_argument("--megabytes", type=int, help=megabytes)
    parser.add_argument("--steps", type=int, default=180, help="steps whose speed is measured after the start")
    options = parser.parse_args(args)
    rounds = options.rounds or 5
    from benchmarks.data_start import prepare, start

    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": processor()}
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        if "tokenize" in options.what:
            result["tokenize"] = tokenize(folder, rounds, options.megabytes or 30)
        if "batch" in options.what:
            result["batch"] = batch(folder, options.megabytes or 30)
        for name, measure in (("start", start), ("prepare", prepare)):
            if name in options.what:
                (folder / name).mkdir()
                result[name] = measure(folder / name, options.rounds or 3, options.megabytes, options.steps)
    finally:
        shutil.rmtree(folder)
    if "order" in options.what:
        result["order"] = order()
    if "mask" in options.what:
        from smolds_dist.parallel.topology import detect_machine

        machine = detect_machine()
        dtypes = ("fp32", "bf16") if machine.bf16 else ("fp32",)
        if machine.devices[0] == "cuda":
            dtypes = ("bf16",)  # varlen attention only supports half precision
        result["mask"] = [mask(dtype, length, rounds) for dtype in dtypes for length in DOCUMENTS]
    write_result(options, result)
    for line in format_result(result):
        print(line)


def format_result(result: dict[str, Any]) -> list[str]:
    """Return a line for each measurement."""
    lines = []
    if part := result.get("tokenize"):
        lines.append(
            f"reading, tokenizing, writing: {part['smolds']:,.0f} tokens/s; tokenizers alone: {part['tokenizers']:,.0f}; "
            f"ratio {part['ratio']:.3f}"
        )
    if part := result.get("batch"):
        lines.append(f"a batch of {SEQUENCES} x {SEQ_LEN:,} tokens from three sources: {1e3 * part['median_s']:.2f} ms")
    if part := result.get("order"):
        lines.append(
            f"order of {part['samples']:,} samples: {part['peak_bytes'] / 1e6:.1f} MB, {1e3 * part['median_s']:.2f} ms for "
            f"{SEQUENCES} of them"
        )
    if part := result.get("start"):
        lines.append(
            f"first step of {part['megabytes']:,} MB of text after {part['ahead_s']:.1f} s, with a prepared corpus after "
            f"{part['prepared_s']:.1f} s; then {part['ahead_tokens_per_s']:,.0f} and "
            f"{part['prepared_tokens_per_s']:,.0f} tokens/s; ratio {part['ratio']:.2f}"
        )
    if part := result.get("prepare"):
        lines.append(
            f"preparing {part['megabytes']:,} MB: {part['one_s']:.1f} s with one process, {part['two_s']:.1f} s with two; "
            f"{part['ratio']:.2f} times as fast"
        )
    lines += [
        f"attention, {part['dtype']}, documents of {part['length']:,} tokens: masked {1e3 * part['apart_s']:.3g} ms, "
        f"unmasked {1e3 * part['together_s']:.3g} ms; ratio {part['ratio']:.2f}"
        + (f"; with a dense mask {1e3 * part['masked_s']:.3g} ms" if "masked_s" in part else "")
        for part in result.get("mask", [])
    ]
    return lines


def tokenize(folder: Path, rounds: int, megabytes: int) -> dict[str, Any]:
    """Measure tokens per second of the tokenizer alone, and from files to shards; return their ratio by medians."""
    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.data.shards import Corpus, write_shard
    from smolds_dist.data.source import files_of
    from smolds_dist.data.tokenizer import text_encoder

    texts = stdlib_texts(megabytes)
    (folder / "text").mkdir()
    for number in range(8):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::8])
        (folder / "text" / f"{number}.jsonl").write_text("".join(lines))
    options = ["--preset", "debug", "-q", f"--data.cache_dir={folder}/cache"]
    tokenizer = prepare_data(load_config([*options, "--data.max_tokens=100000"])).tokenizer
    config = load_config([*options, f"--data.source=jsonl:{folder}/text"])
    encoder, speeds = text_encoder(tokenizer), {"tokenizers": list[float](), "smolds": list[float]()}
    for number in range(rounds + 1):
        begin = time.perf_counter()
        tokens = sum(
            len(encoding)
            for start in range(0, len(texts), 512)
            for encoding in encoder.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
        )
        alone = tokens / (time.perf_counter() - begin)
        begin = time.perf_counter()
        source = config.data.mixed["jsonl"]
        corpus = Corpus("jsonl", source.source, source, files_of(source), config.data, tokenizer)
        for at, shard in enumerate(corpus.shards):
            out = folder / f"units{number}-{at}"
            out.mkdir()
            write_shard(out, shard, corpus)
        ours = tokens / (time.perf_counter() - begin)
        if number:  # the first turn is a warm-up
            speeds["tokenizers"].append(alone)
            speeds["smolds"].append(ours)
    of = {name: median(values) for name, values in speeds.items()}
    return of | {"ratio": of["smolds"] / of["tokenizers"], "tokens": tokens, "speeds": speeds}


def batch(folder: Path, megabytes: int) -> dict[str, Any]:
    """Measure seconds per batch from three sources in the file cache."""
    from smolds_dist.data.prepare import prepare_data

    texts = stdlib_texts(megabytes)
    for number in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::3])
        (folder / f"{number}.jsonl").write_text(rows)
    sources = {f"s{n}": {"source": f"jsonl:{folder}/{n}.jsonl", "weight": (0.6, 0.3, 0.1)[n]} for n in range(3)}
    data = prepare_data(
        load_config([
            "--preset", "debug", "-q", f"--data.cache_dir={folder}/cache", f"--data.sources={json.dumps(sources)}",
            f"--data.seq_len={SEQ_LEN}", f"--train.global_batch={SEQUENCES}", f"--train.steps={BATCHES}",
        ])
    )  # fmt: skip
    seconds = []
    for number in range(BATCHES):
        begin = time.perf_counter()
        data.batch(range(number * SEQUENCES, (number + 1) * SEQUENCES))
        seconds.append(time.perf_counter() - begin)
    return {"median_s": median(seconds), "slowest_s": max(seconds)}


def order() -> dict[str, Any]:
    """Measure memory of the order of a billion samples of 1,024 tokens in shards of 2^22 tokens, and the time to look up
    some of them once all shards are known."""
    from smolds_dist.data.order import SampleOrder, TokenSpan

    samples, shard_tokens = 10**9, 2**22
    shards = samples * SEQ_LEN // shard_tokens

    def make() -> SampleOrder:
        made = SampleOrder(
            shards, lambda following, _: [TokenSpan(int(following[0]), 0, shard_tokens)], SEQ_LEN, 0, 2**28
        )
        made.extend(None)
        return made

    begin = time.perf_counter()
    made = make()
    known_s = time.perf_counter() - begin
    seconds = []
    for number in range(100):
        positions = np.arange(SEQUENCES) + number * (made.num_samples // 100)
        begin = time.perf_counter()
        made.spans(positions)
        seconds.append(time.perf_counter() - begin)
    tracemalloc.start()  # which slows everything down
    made = make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"samples": samples, "peak_bytes": peak, "known_s": known_s, "median_s": median(seconds)}


def mask(dtype: str, length: int, rounds: int) -> dict[str, Any]:
    """Measure seconds of attention, forward and backward, with and without document masks, in turns; on a GPU also of
    PyTorch's attention with a mask.

    The reference model's heads over 4 x 1,024 tokens, on a GPU 16 x 1,024, with random document lengths.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from smolds_dist.model.causal_attention import Documents, causal_attention

    generator = torch.Generator().manual_seed(0)
    on_gpu, kind = torch.cuda.is_available(), torch.float32 if dtype == "fp32" else torch.bfloat16
    device, rows, repeats = ("cuda", 16, 50) if on_gpu else ("cpu", 4, 3)
    shapes = [(rows, heads, SEQ_LEN, 64) for heads in (6, 2, 2)]
    query, key, value = (torch.randn(one, generator=generator).to(device, kind).requires_grad_() for one in shapes)
    begins = torch.rand(rows, SEQ_LEN, generator=generator) < 1 / length
    places = torch.arange(SEQ_LEN)
    first = torch.where(begins, places, 0).cummax(1).values
    positions = (places - first).to(device)
    seen = ((first[:, :, None] <= places) & (places <= places[:, None])).to(device)[:, None]
    fused = partial(scaled_dot_product_attention, query, key, value, scale=0.125, enable_gqa=True)
    ways = {"apart": lambda: causal_attention(query, key, value, 0.125, Documents(positions))}
    if on_gpu:
        ways |= {"masked": partial(fused, attn_mask=seen), "together": partial(fused, is_causal=True)}
    else:
        ways["together"] = lambda: causal_attention(query, key, value, 0.125)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, attend in ways.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                attend().sum().backward()
            if on_gpu:
                torch.cuda.synchronize()
            if number:  # the first turn is a warm-up
                seconds[name].append((time.perf_counter() - begin) / repeats)
    times = {f"{name}_s": median(values) for name, values in seconds.items()}
    return {
        "dtype": dtype,
        "length": length,
        "device": device,
        **times,
        "ratio": times["apart_s"] / times["together_s"],
    }
