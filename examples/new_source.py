"""A custom source: write any Python iterable of documents to a JSON-lines file and train on it. Run it with

    python examples/new_source.py sums.jsonl --train.steps 300

and any option of `smolds train`. Here the documents are sums, and the model learns to add.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from smolds_dist import load_config, train


def documents(count: int) -> Iterator[str]:
    chance = random.Random(0)
    for _ in range(count):
        sums = ((chance.randrange(100), chance.randrange(100)) for _ in range(20))
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in sums)


def main(path: Path, args: list[str]) -> None:
    with path.open("w") as file:
        for text in documents(5000):
            file.write(json.dumps({"text": text}) + "\n")
    result = train(
        load_config([
            "--preset", "debug", "--run.name=sums", f"--data.source=jsonl:{path}", "--data.tokenizer_vocab_size=512",
            "--log.sample_prompts=['12 + 30 =', '7 + 8 =']", *args,
        ])
    )  # fmt: skip
    print(f"{result.run_dir}: {result.val_bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
