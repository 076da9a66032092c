"""A byte-level BPE tokenizer for a GGUF file, if llama.cpp supports it.

llama.cpp describes a tokenizer by its tokens, its merges, and a name for how it splits text before merging
(`PRE_TOKENIZERS`); all other content of a tokenizer.json must match llama.cpp's fixed behavior.
"""

import json
from itertools import product
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.tokenizer import text_encoder
from smolds_dist.errors import ConfigError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# By llama.cpp's name, the expressions that split text one after the other: of smolds' tokenizers, and of SmolLM2's.
PRE_TOKENIZERS = {"gpt-2": (_GPT2,), "smollm": (r"\p{N}", _GPT2)}

# Text that might be split differently: spaces of all kinds, code, digits, umlauts, other scripts, emoji.
SAMPLE = (
    "The fox's 1234567 jumps, they'll  say   it's 3.14159e-10!\n\n\tdef add(first, second):\n\t    return first+second\n"
    "Ärger über Größe: straße, ÉTÉ, naïve café, \u00bd \u2167 x\u00b2 \u0661\u0662\u0663\r\n\u00a0\u2003wide\u3000space "
    " \n \n  日本語のテキスト мир शांति 한국어 e\u0301 \u200b\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\u2764\ufe0f <a href='x'>&amp;</a> {\"k\": [1, 22, 333]} // --- ''' DON'T can't WE'RE 's   "
)


class Vocabulary(NamedTuple):
    pre: str  # llama.cpp's name for how text is split
    tokens: list[str]
    kinds: list[int]  # `gguf.TokenType` of each
    merges: list[str]  # "LEFT RIGHT", in the order of merging
    bos: bool  # True if the tokenizer adds its bos token
    eos: bool  # True if it adds its eos token


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary for llama.cpp; tokens that the model has beyond the tokenizer's are `[PADn]` and unused.

    Raises:
        ConfigError: if llama.cpp would tokenize text differently.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    pre = _pre_tokenizer(spec["pre_tokenizer"])
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for wrong, what in (
        (model["type"] != "BPE", f"a {model['type']} model"),
        (pre is None, f"the pre-tokenizer {json.dumps(spec['pre_tokenizer'])}"),
        (spec["normalizer"], f"the normalizer {json.dumps(spec['normalizer'])}"),
        (model.get("ignore_merges") or model.get("dropout") or model.get("byte_fallback"), "unusual merging"),
        (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"), "prefixes or suffixes of words"),
        (model["type"] == "BPE" and not alphabet <= model["vocab"].keys(), "bytes without a token"),
        (
            any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"]),
            "control tokens that strip spaces or match only whole words",
        ),
    ):
        if wrong:
            raise ConfigError(
                f"the tokenizer has {what}, which llama.cpp has no counterpart for; use --format transformers."
            )
    assert pre is not None
    texts = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if max(texts) >= size:
        raise ConfigError(
            f"the tokenizer has {max(texts) + 1} tokens, more than the model's {size}; use the run's tokenizer."
        )
    return Vocabulary(
        pre,
        [texts.get(number, f"[PAD{number}]") for number in range(size)],
        [int(kinds.get(number, TokenType.UNUSED)) for number in range(size)],
        [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        *_ends(tokenizer),
    )


def _pre_tokenizer(spec: dict[str, Any] | None) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer, or None."""
    spec = spec or {}
    *before, last = spec["pretokenizers"] if spec.get("type") == "Sequence" else [spec]
    byte_level = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last["add_prefix_space"]
    if not byte_level or before not in ([], [{"type": "Digits", "individual_digits": True}]):
        return None
    return "smollm" if before else "gpt-2"


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether the tokenizer adds its bos token before a text, and its eos token after it."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    added = tokenizer("a").input_ids
    for bos, eos in product((False, True), repeat=2):
        if added == [tokenizer.bos_token_id] * bos + text + [tokenizer.eos_token_id] * eos:
            return bos, eos
    raise ConfigError(
        f"the tokenizer encodes the text 'a' as {tokenizer.convert_ids_to_tokens(added)}, but llama.cpp can only add a bos "
        "and an eos token; use --format transformers."
    )


def write_vocabulary(
    vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None, writer: GGUFWriter
) -> None:
    """Write the tokenizer, the end-of-text tokens, and the chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.kinds)
    writer.add_token_merges(vocab.merges)
    # Without one, llama.cpp uses token 11 of GPT-2.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    writer.add_bos_token_id(bos)
    # llama.cpp has keys for three end-of-text tokens, and finds other common ones by their spelling.
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, ends if isinstance(ends, list) else [tokenizer.eos_token_id], strict=False):
        add(token)
    if template := tokenizer.chat_template:
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(vocab.bos)
    writer.add_add_eos_token(vocab.eos)


def check_vocabulary(vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenize a sample text as llama.cpp would with the content of the file, and compare with our tokenizer.

    Raises:
        RuntimeError: if they differ, which no tokenizer accepted by `vocabulary` should cause.
    """
    numbered = enumerate(vocab.tokens)
    normal = {text: number for number, text in numbered if vocab.kinds[number] != TokenType.UNUSED}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocab.merges)]
    theirs = Tokenizer(models.BPE(normal, merges))
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[vocab.pre]]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]  # its stub has no setter
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    control = [text for text, number in normal.items() if vocab.kinds[number] == TokenType.CONTROL]
    theirs.add_special_tokens(control)
    theirs.add_tokens([text for text, number in normal.items() if vocab.kinds[number] == TokenType.USER_DEFINED])
    for allowed in (False, True):
        theirs.encode_special_tokens = not allowed
        page = SAMPLE + "".join(f"a{text} b" for text in control)
        ours = text_encoder(tokenizer, allow_control_tokens=allowed).encode(page, add_special_tokens=False)
        if ours.ids != theirs.encode(page, add_special_tokens=False).ids:
            raise RuntimeError("llama.cpp would tokenize text differently from the tokenizer")
