"""`smolds bench generate`: milliseconds for a token early and late in a text, with and without the key/value cache.

Beside our model, transformers' ERNIE MoE of the same shape, which has the cache too. All write greedily, one text, in turn.
"""

import time
from itertools import pairwise
from statistics import median
from typing import Any

from smolds_dist.bench.common import bench_parser, check_at_least_one, keep, parse
from smolds_dist.bench.train import describe_machine, make_task, say
from smolds_dist.errors import ConfigError

PROMPT = 16  # tokens


def bench_generate(args: list[str]) -> None:
    """Measures, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none, or a text that is too short to have quarters or too long for the model.
    """
    parser = bench_parser("generate", __doc__)
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a text")
    parser.add_argument("--rounds", type=int, default=3, help="texts of each")
    options, settings = parse(parser, args)
    check_at_least_one(options, "rounds")
    options.sequences, options.dtype = 1, "fp32"
    task = make_task(options, settings)
    longest = task.model_settings()["max_position_embeddings"] - PROMPT
    if not 8 <= options.max_new_tokens <= longest:
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens} is out of range; it must lie between 8 and {longest}."
        )
    result = describe_machine(task) | {
        "tokens": options.max_new_tokens,
        "ms": measure(task, options.max_new_tokens, options.rounds),
    }
    keep(options, result)
    print(f"{result['preset']}, {options.max_new_tokens} tokens after {PROMPT}, fp32, on {result['machine']}")
    print(f"{'':24}{'first quarter':>15}{'last quarter':>15}{'ratio':>8}")
    for name, (first, last) in result["ms"].items():
        print(f"{name:24}{first:>12.2f} ms{last:>12.2f} ms{last / first:>8.2f}")


def measure(task: Any, tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of a token's milliseconds in the first and last quarter of a text."""
    import torch
    import transformers

    from smolds_dist.interchange.transformers_format import transformers_config
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepSeekV3Config(**task.model_settings())
    ours: Any = DeepSeekV3ForCausalLM(config).to(task.device).eval()
    models = {"smolds": (ours, True), "smolds without cache": (ours, False)}
    try:
        theirs: Any = transformers.AutoModelForCausalLM.from_config(transformers_config(config))
        models["transformers"] = (theirs.to(task.device).eval(), True)
    except ValueError as error:
        say(f"transformers' model is left out: {error}")
    ids = torch.randint(0, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(task.device)
    spent: dict[str, list[list[float]]] = {name: [] for name in models}
    for number in range(rounds):
        for name, (model, cached) in models.items():
            say(f"round {number + 1} of {rounds}: {name}")
            ends: list[float] = []

            def note(_ids: Any, scores: Any, ends: list[float] = ends) -> Any:
                if scores.device.type != "cpu":
                    torch.accelerator.synchronize(scores.device)
                ends.append(time.perf_counter())
                return scores

            with torch.no_grad():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=cached, logits_processor=[note],
                    min_new_tokens=tokens, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            spent[name].append([1e3 * (after - before) for before, after in pairwise(ends)])
    quarter = tokens // 4
    return {
        name: (
            median(ms for text in texts for ms in text[:quarter]),
            median(ms for text in texts for ms in text[-quarter:]),
        )
        for name, texts in spent.items()
    }
