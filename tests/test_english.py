"""Words that must not come back to what users and developers read, each with better ones."""

import ast
import re
from pathlib import Path

import pytest
from ranks import ROOT

# Regular expressions from the beginning to the end of a word; a blank is any white space, case does not matter.
WORDS = {
    r"(is|are|was|were) told|tells?|told": "logs, reports, raises an error",
    r"says? so|said": "logs it, reports it",
    r"held[- ]out": "validation set",
    r"texts": "documents",
    r"mend(s|ed|ing)?": "fix",
    r"heed(s|ed|ing)?": "handle",
    r"anew": "again",
    r"for ever": "indefinitely",
    r"at once": "immediately, simultaneously",
    r"meanwhile": "in the background",
    r"likewise": "also",
    r"besides?": "in addition to",
    r"whole checkpoints?": "complete checkpoint",
    r"whole (matrix|matrices|model)": "full",
    r"ways? on from": "continued training from",
    r"(go|goes|going|gone|went) on": "continue, resume",
    r"starts? again|started again": "restart",
    r"(go|goes|going|went) back": "roll back, return",
    r"(go|goes|going|went) over": "exceed, override",
    r"mak(e|es|ing) tokens|tokens are made": "tokenize",
    r"tokens of others": "pre-tokenized data",
    r"refus(e|es|ed|ing|al)": "reject, raise an error",
    r"(is|are) not here": "is not installed",
    r"(keep|keeps|kept) apart": "mask, separate",
    r"(leave|leaves|left|leaving) out": "skip, exclude, unset",
    r"signs? of life": "heartbeat",
    r"(hold|holds|held) against": "compare with",
    r"comput(e|es|ed|ing) again": "recompute",
    r"(matrix )?products": "matmuls",
    r"processor times?": "CPU time",
    r"flops utili[sz]ation": "MFU",
    r"pictures?": "plot",
    r"slow ranks?": "straggler",
    r"(lie|lies) behind": "is already consumed",
    r"so many": "a noun or a number",
    r"without a word": "without output",
    r"in a sentence": "as an error",
    r"a person": "the user",
    r"is no (multiple|number|folder|file|tracker|setting)": "is not a",
    r"stands? (on|beside|in)": "is",
    # British spellings
    r"\w*(initial|normal|quant|recogn|serial|summar|synchron|token)is(e[ds]?|ers?|ing|ations?)": "-ize",
    r"(general|maxim|minim|optim|organ|orthogonal|random|real|special|util|visual)is(e[ds]?|ers?|ing|ations?)": "-ize",
    r"analys(e|ed|ing)|cent(re|res|red)|(cancel|label|model|travel)l(ed|ing)|metres?|programmes?": "American spelling",
    r"(behavi|col|fav|hon|neighb)our\w*|artefacts?|catalogues?|grey|judgement|learnt|licences?": "American spelling",
}
BANNED = re.compile("|".join(rf"(?<![-\w])(?:{words})\b".replace(" ", r"\s+") for words in WORDS), re.IGNORECASE)
STORED = {"held out"}  # keys, which no user reads

# What is read: pages without their code; of modules, docstrings and string literals.
PATHS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docs" / "run" / "README.md"]
PATHS += [path for folder in ("benchmarks", "examples", "smolds_dist") for path in (ROOT / folder).rglob("*.py")]


def without_code(page: str) -> str:
    """Return a page without code and addresses, with its lines where they were."""
    for code in (r"^```.*?^```", r"`[^`]*`", r"(?<=\])\([^)]*\)"):
        page = re.sub(code, lambda found: "_" + "\n" * found[0].count("\n"), page, flags=re.DOTALL | re.MULTILINE)
    return page


def strings(source: str) -> str:
    """Return the docstrings and string literals of a module, each as one line, where it begins."""
    lines = [""] * (source.count("\n") + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name_or_key = " " not in node.value or node.value in STORED
            lines[node.lineno - 1] += "_" + re.sub(r"`[^`]*`", "_", "" if name_or_key else " ".join(node.value.split()))
    return "\n".join(lines)


def banned_words(path: Path) -> list[str]:
    text = path.read_text()
    text = strings(text) if path.suffix == ".py" else without_code(text)
    found = []
    for match in BANNED.finditer(text):
        word = " ".join(match[0].split())
        better = next(better for words, better in WORDS.items() if re.fullmatch(words, word, re.IGNORECASE))
        found.append(f"line {text.count(chr(10), 0, match.start()) + 1}: {word!r}, better: {better}")
    return found


@pytest.mark.parametrize("path", sorted(PATHS), ids=lambda path: str(path.relative_to(ROOT)))
def test_page_or_module_has_no_banned_word(path):
    assert not banned_words(path)


def test_banned_words_are_found(tmp_path):
    """In prose, over the end of a line, and in messages; not in code, options and keys."""
    page = tmp_path / "page.md"
    page.write_text("It goes\non.\n\n```bash\nmend\n```\n\nTokenised `anew` with --picture.\n")
    assert [found.split(",")[0] for found in banned_words(page)] == ["line 1: 'goes on'", "line 8: 'Tokenised'"]
    module = tmp_path / "module.py"
    module.write_text('key = "held out"\nprint(f"{key}: mend it")  # mend\n')
    assert banned_words(module) == ["line 2: 'mend', better: fix"]
