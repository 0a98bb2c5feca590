"""Make data/task.tiktoken, the small byte-pair vocabulary of the embedded task.

    python -m data.make_vocab

Byte-pair encoding starts from the 256 bytes and merges the most frequent pair of neighbours, again and again. On a
real corpus one stops at some tens of thousands of tokens. This task has so few words that merging goes on until
every word is a single token.
"""

import base64
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import regex
import tiktoken

PATH = Path(__file__).with_name("task.tiktoken")

# Text is first cut into pieces, and bytes are merged only within a piece: a word with the space before it; one to
# three digits; punctuation; white space. Ordinary patterns attach a space to what follows it. Then "7" and " 7" are
# two tokens, and every sum has to be learned twice. Here the space before a digit belongs to the *word in front of
# it*, so a number is the same token everywhere. `<<` and `>>` are pieces of their own, and so one token each: in
# tools.py the model writes the first and only the runtime may write the second.
PATTERN = r" ?[A-Za-z]+(?: (?=\d))?|\d{1,3}|[<>]+|[^\sA-Za-z\d<>]+(?: (?=\d))?|\s+"

ONE_TOKEN_NUMBERS = range(200)  # one token each, so that no carrying from digit to digit has to be learned


def merge(piece, pair):
    """Join every occurrence of the neighbours `pair`: (a, b, c), (a, b) -> (ab, c)."""
    merged = []
    for symbol in piece:
        # A symbol can only be joined to a left neighbour that is not merged yet: "aaa" becomes (aa, a).
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def train_bpe(text):
    """Byte-pair encoding of `text`, until every piece is one token. Returns {token bytes: rank}, as in tiktoken."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    counts = Counter(regex.findall(PATTERN, text))
    pieces = {tuple(bytes([b]) for b in piece.encode()): n for piece, n in counts.items()}
    while True:
        pairs = Counter()
        for piece, n in pieces.items():
            for pair in itertools.pairwise(piece):
                pairs[pair] += n
        if not pairs:
            return ranks  # every piece is one token
        best = max(pairs, key=pairs.get)
        # Two merges can give the same bytes, "al"+"l" and "a"+"ll": one token, one rank.
        ranks.setdefault(best[0] + best[1], len(ranks))
        pieces = {merge(piece, best): n for piece, n in pieces.items()}


def make_vocab(texts=3000):
    """{token bytes: rank} of the embedded task, learned from `texts` texts of its corpus."""
    from data.task import corpus, demonstrations

    text = "\n\n".join(itertools.islice(corpus(seed=0), texts))
    # Calculator annotations are not in that corpus, but the tool chapter writes them.
    text += "\n".join(solution for _, solution in demonstrations(100, annotate=True))
    # Use the merges for words. A number needs none: tiktoken takes a piece that is in the table as one token without
    # looking at its parts.
    ranks = train_bpe(re.sub(r"\d+", "0", text))
    for number in map(str, ONE_TOKEN_NUMBERS):
        ranks.setdefault(number.encode(), len(ranks))
    return ranks


def read_ranks():
    """{token bytes: rank}, read from data/task.tiktoken."""
    # Not with tiktoken's own file loader: it caches by path and would not see a file that was made anew.
    lines = PATH.read_text(encoding="utf-8").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}


def load(name):
    """(pattern, ranks) of a vocabulary by name: "task", or "gpt2" (downloaded once). Exits if it cannot be had."""
    if name == "task":
        return PATTERN, read_ranks()
    if name != "gpt2":
        raise ValueError(f"no tokenizer {name!r}: task or gpt2")
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests has many kinds of error; all mean that there is no file
        sys.exit(
            f"GPT-2's vocabulary is not on this machine and could not be downloaded ({type(error).__name__}). Run once "
            "with a network, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's two gpt2 files."
        )
    return gpt2._pat_str, gpt2._mergeable_ranks


if __name__ == "__main__":
    ranks = make_vocab()
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    PATH.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{PATH.name}: {len(ranks)} tokens, {PATH.stat().st_size} bytes")
