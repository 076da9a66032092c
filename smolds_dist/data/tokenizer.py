"""The tokenizer: from the Hub, from a folder, or a byte-level BPE trained on the corpus."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smolds_dist.activity import LONG, doing
from smolds_dist.errors import ConfigError, first_line
from smolds_dist.inputs import check_tokenizer_files

END_OF_TEXT = "<|endoftext|>"
TRAINING_CHARACTERS = 32_000_000
LONGEST_TOKEN = 64  # bytes: a corpus without spaces would make whole lines tokens


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder or from the Hub.

    Raises:
        ConfigError: if it is missing, not fast, or has no end-of-text token to separate documents.
    """
    check_tokenizer_files(Path(name), "choose another tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"--data.tokenizer {name!r} could not be loaded ({first_line(error)}); "
            "use a folder, a name on the Hub, or `train` to train one on the corpus."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"--data.tokenizer {name!r} has no fast version; choose one with a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"--data.tokenizer {name!r} has no end-of-text token; set eos_token in its tokenizer_config.json."
        )
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= len(tokenizer):
        raise ConfigError(
            f"--data.tokenizer {name!r} has {len(tokenizer)} tokens with ids up to {highest}; number them without gaps, "
            "or choose another."
        )
    return tokenizer


def without_beginning(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the beginning-of-text token that the tokenizer adds, and `text_encoder` does not."""
    added = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if added else None


def text_encoder(tokenizer: PreTrainedTokenizerBase, allow_control_tokens: bool = False) -> Tokenizer:
    """Return an encoder of whole documents as plain text: the spelling of a control token is not encoded as that token,
    unless allowed.

    The encoder is a copy, because prompts may contain control tokens.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = not allow_control_tokens
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save to `folder` in Hugging Face format, in a form that transformers 4, transformers 5 and converters read.

    transformers 5 writes a class name that others do not know, `TokenizersBackend`, and lists further control tokens
    under a key with another meaning in transformers 4.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for how_it_was_found in ("is_local", "local_files_only"):
        settings.pop(how_it_was_found, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all settings that change tokens, including an end-of-text token other than the default."""
    end = "" if tokenizer.eos_token == END_OF_TEXT else str(tokenizer.eos_token)
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + end).encode()).hexdigest()


def train_tokenizer(sources: Mapping[str, Iterable[str]], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it to `folder` in Hugging Face format.

    Args:
        sources: documents by name; the first 32 million characters are used, the same number from each source.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    share = TRAINING_CHARACTERS // len(sources)
    texts = chain.from_iterable(_first_characters(name, texts, share) for name, texts in sources.items())
    with doing("training a tokenizer", LONG):
        tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    save_tokenizer(fast, folder)


def _first_characters(name: str, documents: Iterable[str], limit: int) -> Iterator[str]:
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        raise ConfigError(f"the source {name!r} contains no text; check its files and --data.text_field.")
    for text in chain([first], documents):
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
