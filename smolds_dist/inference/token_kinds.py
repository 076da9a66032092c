"""Kinds of tokens, by their text alone: digits, punctuation, words, scripts, bytes of a character and others.

A kind is a property of the token and not of its context, so keywords are words.
"""

import re
import unicodedata
from typing import Any

SPECIAL, SPACE, DIGITS, PUNCTUATION = "special", "whitespace", "digits", "punctuation"
WORD, LETTERS, IDENTIFIER, MIXED = "word", "letters inside a word", "identifier", "mixed"
FIRST_BYTES, LATER_BYTES = "first bytes of a character", "later bytes of a character"


def token_texts(tokenizer: Any, ids: list[int]) -> tuple[list[str], list[str]]:
    """Return the text of each token, with the space that it begins with, and its kind.

    The text of a token that is not valid UTF-8 has its bytes as `\\xe2\\x80`.
    """
    special, texts, kinds = set(tokenizer.all_special_ids), [], []
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    for i, name, text in zip(ids, tokenizer.convert_ids_to_tokens(ids), decoded, strict=True):
        if name is None:  # an id of the padded vocabulary
            name = text = f"[{i}]"
        if name.startswith("\u2581") and not text.startswith(" "):  # SentencePiece's space, which decoding strips
            text = f" {text}"
        content = _bytes_of(name) if "\ufffd" in text and i not in special else None
        texts.append("".join(chr(b) if b < 128 else f"\\x{b:02x}" for b in content) if content else text)
        kinds.append(SPECIAL if i in special else _kind_of_bytes(content) if content else kind_of(text))
    return texts, kinds


def kind_of(text: str) -> str:
    """Return the kind of a token with valid text; letters of scripts other than Latin have their script's name, which is the
    first word of the character's Unicode name, such as `cyrillic`."""
    core = text.strip()
    if not core:
        return SPACE
    categories = [unicodedata.category(c)[0] for c in core]
    if set(categories) == {"N"}:
        return DIGITS
    # Vowel signs are marks; that which selects an emoji's look belongs to no script.
    letters = [c for c, category in zip(core, categories, strict=True) if category in "LM" and c != "\ufe0f"]
    if not letters and "N" not in categories and "_" not in core:
        return PUNCTUATION
    script = unicodedata.name(letters[0], "unknown").split()[0].lower() if letters else "latin"
    if script != "latin":
        return script
    if core.isalpha() and not re.search("[a-z][A-Z]", core):
        return WORD if text[0] == " " else LETTERS
    return IDENTIFIER if re.fullmatch(r"\w+", core) else MIXED


def _kind_of_bytes(content: bytes) -> str:
    return LATER_BYTES if content[0] & 0xC0 == 0x80 else FIRST_BYTES


def _bytes_of(name: str) -> bytes | None:
    """Return the bytes of a token in the alphabet of byte-level BPE (GPT-2) or SentencePiece's byte fallback."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(match[1])
    alphabet = {c: byte for byte, c in bytes_to_unicode().items()}
    return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else None
