"""Make data/task.tiktoken, the small byte-pair vocabulary of the embedded task.

    python -m data.make_vocab

Byte-pair encoding starts from the 256 bytes and merges the most frequent neighbours, again and
again. On a real corpus one stops at some tens of thousands of tokens; this task has so few words that
we merge until every one of them is a single token.
"""

import base64
import itertools
import re
from collections import Counter
from pathlib import Path

import regex

PATH = Path(__file__).with_name("task.tiktoken")

# Text is first cut into pieces, and only within a piece can bytes merge: a word with the space before
# it; a run of digits; punctuation; white space. Ordinary patterns glue a space to what follows it,
# which makes "7" and " 7" two tokens and every sum a thing to learn twice. Here the space before a
# digit goes to the *word in front of it*, so that a number is the same token wherever it stands.
# `<<` and `>>` are pieces of their own: a later chapter stops at them.
PATTERN = r" ?[A-Za-z]+(?: (?=\d))?|\d{1,3}|[<>]+|[^\sA-Za-z\d<>]+(?: (?=\d))?|\s+"

ONE_TOKEN_NUMBERS = range(200)  # one token each: no carrying from digit to digit to learn


def merge(piece, pair):
    """Join every occurrence of the neighbours `pair`: (a, b, c), (a, b) -> (ab, c)."""
    merged = []
    for symbol in piece:
        # A symbol can only be swallowed by an unmerged left neighbour: "aaa" becomes (aa, a).
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def train_bpe(text):
    """Byte-pair encoding of `text` to the end. Returns {token bytes: rank}, as tiktoken wants it."""
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
        # The same bytes can be reached by two merges, "al"+"l" and "a"+"ll": one token, one rank.
        ranks.setdefault(best[0] + best[1], len(ranks))
        pieces = {merge(piece, best): n for piece, n in pieces.items()}


def make_vocab(texts=3000):
    """The ranks of the embedded task, learned from `texts` texts of its corpus."""
    from data.task import corpus, demonstrations

    text = "\n\n".join(itertools.islice(corpus(seed=0), texts))
    # Calculator annotations are not in the corpus, but a later chapter writes them.
    text += "\n".join(solution for _, solution in demonstrations(100, annotate=True))
    # Spend the merges on words. A number needs none: tiktoken takes a piece that is in the table as
    # one token without looking at its parts.
    ranks = train_bpe(re.sub(r"\d+", "0", text))
    for number in map(str, ONE_TOKEN_NUMBERS):
        ranks.setdefault(number.encode(), len(ranks))
    return ranks


if __name__ == "__main__":
    ranks = make_vocab()
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    PATH.write_text("".join(lines))
    print(f"{PATH.name}: {len(ranks)} tokens, {PATH.stat().st_size} bytes")
