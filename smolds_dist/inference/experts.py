"""`smolds experts MODEL`: which tokens the experts of a run, a checkpoint or an export take.

One pass over the run's validation set, or any source, keeps every token's experts: 2 bytes per token, layer and choice.
Everything is computed from these; the result is `experts.json`, which `smolds report --html` shows too.

Shape letters: T tokens, K experts per token, E experts, U token types.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, OptionParser, check_writable
from smolds_dist.files import replace_text
from smolds_dist.inference.evaluate import data_config, mean_loss, read_sources, run_of
from smolds_dist.observe.expert_table import FILE, describe_layer, describe_layers
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import RunConfig

FORMAT = 1


def experts(args: list[str]) -> None:
    """Print a table of the layers, or one layer's experts, and write `experts.json`.

    Raises:
        ConfigError: if the model, its experts or the text is missing, or an option is out of range.
    """
    options, settings = _parse(args)
    config, is_validation = data_config("smolds experts", options.model, options.step, settings)
    run = run_of(options.model)
    to = options.json or (run or options.model) / FILE
    model, tokenizer = load_own_model(options.model, options.step, options.weights)
    check_writable("--json", to)
    layers = routed_layers(model, options)
    sources = {
        name: _even(ids[: options.max_tokens], config.data.seq_len)
        for name, ids, _ in read_sources(config, is_validation, tokenizer, options.max_tokens)
    }
    result: Any = analyze(model, tokenizer, layers, config, sources, options)
    text = json.dumps(result) + "\n"
    to.write_text(text) if options.json else replace_text(to, text)  # --json may be a device or a link
    print(describe_layers(result) if options.layer is None else describe_layer(result, options.layer))
    drawn = "; `smolds report --html` draws it" if run and not options.json else ""
    print(f"\nwrote {to}{drawn}")


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the data settings."""
    parser = OptionParser(
        prog="smolds experts",
        description="Show which tokens the experts take: by source and kind of token, the tokens they take most above "
        "chance, their overlap and the loss without them; on the run's validation set or, with options of smolds train "
        "that begin with --data., on all of --data.source.",
        example="smolds experts runs/first --layer 2 --ablate 10000",
    )
    parser.add_argument("model", type=Path, help="folder of a run (runs/NAME), a checkpoint or an exported model")
    parser.add_checkpoint_options(default="the newest")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="tokens to read per source")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per batch")
    parser.add_argument(
        "--min-count", type=int, default=20, help="occurrences from which a token is compared between experts"
    )
    parser.add_argument(
        "--layer", type=int, help="number of the layer whose experts to print; default: a line per layer"
    )
    parser.add_argument(
        "--ablate", type=int, metavar="TOKENS",
        help="tokens per source on which to compute the loss without each expert, one pass each; default: do not",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="output file; default: experts.json in the model's or run's folder")
    return parser.parse_known_args(args)


def load_own_model(source: Path, step: int | None = None, weights: str = "trained") -> tuple[Any, Any]:
    """Return smolds' own model, on the fastest local device, and tokenizer of a run, a checkpoint or an export.

    Args:
        weights: "trained" or "ema", as in `open_model`.

    Raises:
        ConfigError: if there is none, or its architecture has no counterpart here.
    """
    from smolds_dist.checkpoint.files import checkpoints_in
    from smolds_dist.inference.generate import for_inference
    from smolds_dist.interchange.export import build_model, find_checkpoint, open_model
    from smolds_dist.interchange.import_model import read_model

    is_export = (
        (step, weights) == (None, "trained")
        and not (source / "manifest.json").is_file()
        and not checkpoints_in(source / "checkpoints")
    )
    folder = next((f for f in (source, source / "export") if is_export and (f / "config.json").is_file()), None)
    if folder:
        model, tokenizer = read_model(folder)
    else:
        reader, config, tokenizer = open_model(find_checkpoint(source, step), weights)
        model = build_model(reader, config)
    return for_inference(model), tokenizer


def routed_layers(model: Any, options: argparse.Namespace) -> dict[int, Any]:
    """Return the layers that choose among experts, by their number in the model.

    Raises:
        ConfigError: if there are none, or `--layer` or `--ablate` does not fit them.
    """
    from smolds_dist.model.moe import DeepSeekMoE

    config = model.config
    found = enumerate(model.model.layers[: config.num_hidden_layers])  # those of multi-token prediction come after
    layers = {number: block.mlp for number, block in found if isinstance(block.mlp, DeepSeekMoE)}
    if not layers or config.num_experts < 2:
        raise ConfigError(f"{options.model} has no layer with several experts; use a mixture-of-experts model.")
    if options.layer is not None and options.layer not in layers:
        wanted = f"--layer {options.layer} is not a layer with experts"
        raise ConfigError(f"{wanted}; choose from {min(layers)} to {max(layers)}.")
    group = config.num_experts // (config.n_group or 1)
    if options.ablate and config.n_group and group == 2:
        raise ConfigError(
            "--ablate needs groups of more than 2 experts, since a group is chosen by its two best; remove --ablate."
        )
    reachable = group * (config.topk_group or 1)
    if options.ablate and reachable <= config.num_experts_per_tok:
        raise ConfigError(
            f"--ablate needs an expert that can replace the one removed, but each token takes all {reachable} that it can "
            "reach; remove --ablate."
        )
    return layers


def analyze(
    model: Any, tokenizer: Any, layers: dict[int, Any], config: RunConfig, sources: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of `experts.json` (docs/watching.md).

    Args:
        sources: token ids [T] by name.
    """
    from smolds_dist.data.batch import document_separator
    from smolds_dist.inference.expert_statistics import entropy, layer_statistics

    how = config.data.seq_len, options.batch_size, document_separator(config.data, tokenizer)
    with recorded(layers, sum(map(len, sources.values()))) as record:
        losses = {name: mean_loss(model, ids, *how)[0] for name, ids in sources.items()}
    text = _labeled(sources, tokenizer, config.data.seq_len, options.min_count)
    result: dict[str, Any] = {
        "format": FORMAT, "model": str(options.model), "step": options.step, "weights": options.weights,
        "sequence_length": how[0], "experts_per_token": model.config.num_experts_per_tok, "min_count": options.min_count,
        "sources": {name: {"tokens": len(ids), "loss": round(losses[name], 5)} for name, ids in sources.items()},
        "source_entropy_bits": round(entropy(_counts(text.sources)), 5),
        "kinds": dict(zip(text.kinds.names, _counts(text.kinds).tolist(), strict=True)),
        "layers": [],
    }  # fmt: skip
    for number, layer in layers.items():
        chosen_TK, weight_E = record.pop(number)
        statistics = {"layer": number} | layer_statistics(text, chosen_TK, weight_E)
        _add_similarity(layer, statistics)
        result["layers"].append(statistics)
    if options.ablate:
        result["ablation_tokens"] = options.ablate
        _add_ablation(model, layers, {name: ids[: options.ablate] for name, ids in sources.items()}, how, result)
    return result


@contextmanager
def recorded(layers: dict[int, Any], tokens: int) -> Iterator[dict[int, tuple[Any, Any]]]:
    """Record the routers' choices in the forward passes of the block, and show the progress.

    Yields:
        A dict of NumPy arrays, filled at the end: each layer's chosen experts [T, K] and sums of its experts' weights [E].
    """
    import numpy as np
    import torch

    result: dict[int, tuple[Any, Any]] = {}
    chosen: dict[int, list[Any]] = {number: [] for number in layers}
    sums = {number: np.zeros(layer.config.num_experts) for number, layer in layers.items()}
    bar, first = ProgressBar("Routing: token", tokens), next(iter(layers))

    def keep(number: int, output: tuple[Any, Any, Any]) -> None:
        weights_TK, chosen_TK = (tensor.detach().cpu() for tensor in output[:2])
        chosen[number].append(chosen_TK.to(torch.int16).numpy())
        sums[number] += np.bincount(chosen_TK.flatten(), weights_TK.flatten(), len(sums[number]))
        if number == first:
            bar.show(sum(map(len, chosen[first])))

    hooks = [
        layer.gate.register_forward_hook(lambda _module, _input, output, number=number: keep(number, output))
        for number, layer in layers.items()
    ]
    try:
        yield result
        result |= {number: (np.concatenate(chosen.pop(number)), sums[number]) for number in layers}
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()


def _even(ids: Any, length: int) -> Any:
    """Return the ids that `mean_loss` passes through the model: all but a single one after the last full sequence."""
    return ids[:-1] if len(ids) > 1 and len(ids) % length == 1 else ids


def _labeled(sources: dict[str, Any], tokenizer: Any, length: int, min_count: int) -> Any:
    """Return the tokens as a `Text`: sources, kinds, and types with at least `min_count` occurrences.

    Sources are shuffled by sequence, kinds by token.
    """
    import numpy as np

    from smolds_dist.inference.expert_statistics import Labels, Text, shuffled
    from smolds_dist.inference.token_kinds import token_texts

    ids_T = np.concatenate([np.asarray(ids, np.int64) for ids in sources.values()])
    sizes = np.array([len(ids) for ids in sources.values()])
    sources_T = np.repeat(np.arange(len(sizes)), sizes)
    starts_T = np.concatenate([np.arange(size) % length == 0 for size in sizes])
    types_U, type_T, counts_U = np.unique(ids_T, return_inverse=True, return_counts=True)
    texts_U, kinds_U = token_texts(tokenizer, types_U.tolist())
    names, kind_U = np.unique(kinds_U, return_inverse=True)
    kinds_T = kind_U[type_T]
    common = np.flatnonzero(counts_U >= min_count)
    number_U = np.full(len(types_U), -1)
    number_U[common] = np.arange(len(common))
    return Text(
        Labels(list(sources), sources_T, shuffled(sources_T, starts_T.cumsum() - 1)),
        Labels(names.tolist(), kinds_T, shuffled(kinds_T, np.arange(len(kinds_T)))),
        [texts_U[u] for u in common],
        number_U[type_T],
        counts_U[common],
    )


def _counts(labels: Any) -> Any:
    import numpy as np

    return np.bincount(labels.of_token, minlength=len(labels.names))


def _add_similarity(layer: Any, statistics: dict[str, Any]) -> None:
    """Add the experts with the most similar weights, by the cosine of all weights. Hidden units are not matched, so experts
    that compute the same with permuted units do not look similar."""
    from smolds_dist.inference.expert_statistics import cosines, nearest

    gram_EE = 0.0
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        flat = weight.detach().flatten(1).float()
        gram_EE = gram_EE + flat @ flat.T
    cosine_EE = cosines(gram_EE.double().cpu().numpy())  # type: ignore[attr-defined]
    for expert, entry in enumerate(statistics["experts"]):
        entry["similar_weights"] = nearest(cosine_EE, expert)


def _add_ablation(
    model: Any, layers: dict[int, Any], sources: dict[str, Any], how: tuple[Any, ...], result: dict[str, Any]
) -> None:
    """Add the increase of the loss without each expert, in nats per token, over all tokens and by source."""

    def losses() -> tuple[float, dict[str, float]]:
        found = {name: mean_loss(model, ids, *how) for name, ids in sources.items()}
        total = sum(loss * counted for loss, counted in found.values()) / sum(counted for _, counted in found.values())
        return total, {name: loss for name, (loss, _) in found.items()}

    (before, before_of), number = losses(), model.config.num_experts
    bar = ProgressBar("Ablation: expert", len(layers) * number)
    for done, (layer, statistics) in enumerate(zip(layers.values(), result["layers"], strict=True)):
        for expert, entry in enumerate(statistics["experts"]):
            with without_expert(layer, expert):
                after, after_of = losses()
            entry["ablation"] = round(after - before, 5)
            entry["ablation_sources"] = {name: round(loss - before_of[name], 5) for name, loss in after_of.items()}
            bar.show(done * number + expert + 1)
    bar.close()


@contextmanager
def without_expert(layer: Any, expert: int) -> Iterator[None]:
    """Remove an expert of a layer in the block: the router chooses among the others, so that its tokens go to the next best
    (as experts are pruned in arXiv 2402.14800, section 3.1)."""
    bias_E = layer.gate.e_score_correction_bias
    before = bias_E.clone()
    bias_E[expert] = -float("inf")
    try:
        yield
    finally:
        bias_E.copy_(before)
