"""Vocabularies and chat templates of published models: what tokenizer.json and chat_template.jinja say.

A byte-level tokenizer is three things: a pattern that cuts a text into pieces, the byte sequences that are tokens, and
an order in which they are merged within a piece. tiktoken needs the same three things. So every tokenizer.json of this
kind can be read for it, if its pattern is known; anything else is refused by name, because a text that is cut
differently has other ids.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data import make_vocab

OURS = ("task", "gpt2")  # the vocabularies that have a name: see make_vocab.load
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError)

# A word, number or punctuation with the space before it. Of several spaces, the last one belongs to what follows.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The digits are cut out first, one by one, so a piece can also end before a digit: all spaces there stay together.
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Llama 3 has numbers of up to three digits; Qwen has single digits.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


@dataclass
class Vocabulary:
    """What gpt.Tokenizer is made of."""

    pattern: str  # cuts a text into pieces
    ranks: dict  # {token bytes: id}; tokens with smaller ids are merged first
    special: dict = field(default_factory=dict)  # {text: id}: tokens that are no text
    size: int = 0  # ids, with those of the special tokens
    nfc: bool = False  # texts are brought into Unicode's composed form first
    start: tuple = ()  # ids in front of every text (Llama 3: <|begin_of_text|>)
    template: "Template | None" = None  # how a chat model is asked


def load(name):
    """A Vocabulary: ours by name, or that of a published model by its folder. Exits if it cannot be had."""
    if name in OURS or not Path(name).is_dir():
        pattern, ranks = make_vocab.load(name)
        special = {"<|endoftext|>": len(ranks)} if name == "gpt2" else {}
        return Vocabulary(pattern, ranks, special, len(ranks) + len(special))
    try:
        return read(Path(name))
    except ERRORS as error:
        cause = " ".join(str(error).split())[:200]
        sys.exit(f"the tokenizer in {name} cannot be read: {type(error).__name__}: {cause}")


def files(folder):
    """{file name: bytes} of a published tokenizer; nothing if there is no tokenizer.json."""
    if not (folder / FILES[0]).is_file():
        return {}
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def read(folder):
    """The Vocabulary of a folder with tokenizer.json and config.json."""

    def refuse(what):
        sys.exit(f"the tokenizer in {folder} has {what}, which is not supported")

    if not (folder / FILES[0]).is_file():
        sys.exit(f"no tokenizer in {folder}: {FILES[0]} is missing")
    data = {name: json.loads(text) for name, text in files(folder).items() if name.endswith(".json")}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = data.pop(FILES[0])
    model, added = tokenizer["model"], {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        refuse(f"a model of type {model['type']}{' with byte_fallback' * bool(model.get('byte_fallback'))}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            refuse(f"{name} {model[name]!r}")
    normalizer = tokenizer.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        refuse(f"the normalizer {str(normalizer)[:100]}")
    for token in tokenizer["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            refuse(f"a token {token['content']!r} that takes in the spaces beside it")
    pattern = known_pattern(tokenizer.get("pre_tokenizer"))
    if pattern is None:
        refuse(f"the pre-tokenizer {json.dumps(tokenizer.get('pre_tokenizer'))[:300]}")

    # ---- the tokens
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    ranks = {bytes(BYTE[c] for c in token): i for token, i in vocab.items()}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    made = [vocab[first + second] for first, second in pairs]
    if made != sorted(made):
        refuse("ids that are not in the order of its merges")
    if not model.get("ignore_merges") and len(ranks) > len({*made, *(i for t, i in ranks.items() if len(t) == 1)}):
        # tiktoken takes a piece that is a token as it is, without looking at its parts.
        refuse("tokens that no merge makes")
    size = rows = config["vocab_size"]
    template = read_template(folder, data, added)
    if template is None and "chat" in config:  # saved by gpt.py, with our four tokens at the end
        size -= 4
    start = tuple(added[token] for token in first_tokens(tokenizer.get("post_processor")))
    # A token without a row in the embedding would be an IndexError, or have the id of one of our four tokens. If there
    # is a template, added tokens that it does not write are in no prompt and need no row.
    used = added
    if template is not None:
        ids = {*start, template.end, template.pad, *template.pieces("question"), *template.pieces("question", "answer")}
        used = {token: i for token, i in added.items() if i in ids}
    last, i = max((vocab | used).items(), key=lambda item: item[1])
    if i >= size:
        sys.exit(
            f"the tokenizer in {folder} has a token {last!r} with the id {i}, but the model's embedding has rows for "
            f"{size} tokens only. If both belong together, add the rows with `transformers`: "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    added = {token: i for token, i in added.items() if i < size}
    for byte in range(256):
        # Bytes that the vocabulary lacks, because they occur in no text of its language. The ids behind the last one
        # say: leave it out, as `tokenizers` does.
        if ranks.setdefault(bytes([byte]), rows + 4 + byte) > rows and model.get("unk_token"):
            refuse(f"an unk_token {model['unk_token']!r}")
    # Many embeddings have more rows than there are tokens. No text has their ids, but a model could sample them.
    named = {*ranks.values(), *added.values()}
    special = added | {f"<|unused {i}|>": i for i in range(size) if i not in named}
    return Vocabulary(pattern, ranks, special, size, normalizer is not None, start, template)


# The byte that each character of a token stands for. tokenizer.json writes tokens as text, so every byte has a visible
# character in it: printable ones stand for themselves, the others for 256, 257, ... in their order.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE = {chr(byte): byte for byte in PRINTABLE}
BYTE |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


def known_pattern(pre_tokenizer):
    """The pattern of a pre-tokenizer in tokenizer.json, or None if it is another one."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *cuts, last = steps
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):  # GPT-2's pattern is built into this type
        digits = {"type": "Digits", "individual_digits": True}
        return GPT2 if not cuts else DIGITS if cuts == [digits] else None
    for pattern in (LLAMA3, QWEN2):
        if cuts == [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]:
            return pattern
    return None


def first_tokens(post_processor):
    """The special tokens that a tokenizer puts in front of every text."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        for item in step.get("single", []) if step.get("type") == "TemplateProcessing" else []:
            if "SpecialToken" not in item:
                break
            yield item["SpecialToken"]["id"]


# ---------------------------------------------------------------------------------------------
# Chat templates


def read_template(folder, data, special):
    """The Template of a folder, or None. data: its .json files; special: {text: id} of all added tokens."""
    settings = data.get("tokenizer_config.json", {}) | data.get("special_tokens_map.json", {})
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {item["name"]: item["template"] for item in source}.get("default")
    if source is None:
        return None
    names = {}  # bos_token and others, which templates write
    for name, token in settings.items():
        token = token.get("content") if isinstance(token, dict) else token  # two spellings
        if name.endswith("_token") and isinstance(token, str):
            names[name] = token
    return Template(source, special, names)


class Template:
    """A chat template: a program in Jinja that writes messages as one text with special tokens ("marks") between them.

    SmolLM2:  <|im_start|>system\nYou are ...<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n

    end is the id of the mark that closes an answer, pad an id for padding that is not end.
    """

    def __init__(self, source, special, names):
        import jinja2  # here, not above: the embedded task has no such template
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def fail(message):
            raise ValueError(message)

        # As in `transformers`: the template is a program from the internet, so it runs in a sandbox.
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        environment = ImmutableSandboxedEnvironment(**options)
        environment.globals["raise_exception"] = fail
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
        # Not as in `transformers`: no strftime_now. Llama 3.2 writes the date with it, or else a fixed one. With a
        # fixed date the same prompt has the same ids tomorrow.
        self.special, self.names = special, names
        marks = sorted((re.escape(token) for token in special if len(token) > 1), key=len, reverse=True)
        self.marks = re.compile("|".join(marks) or "(?!)")  # the longest first; (?!) is found nowhere
        try:
            self.template = environment.from_string(source)
            pieces = self.pieces("question", "the answer")
        except jinja2.TemplateError as error:
            raise ValueError(f"its chat template: {error}") from None
        behind = [b for a, b in zip(pieces, pieces[1:]) if str(a).endswith("the answer") and isinstance(b, int)]
        if not behind:
            raise ValueError("its chat template does not close an answer with a special token")
        self.end = behind[0]
        # Padding must not be the end token: see gpt.Tokenizer. Some models have no other one, so then it is a
        # special token that the template does not use.
        self.pad = special.get(names.get("pad_token"))
        if self.pad in (None, self.end):
            self.pad = next((i for i in sorted(special.values()) if i not in pieces), None)
            if self.pad is None:
                raise ValueError("its chat template leaves no special token for padding")

    def pieces(self, question, answer=None):
        """A prompt, or a question with its answer, as a list of marks (ids) and texts between them. The turns of a
        public.Dialogue are turns of the template too.

        Only the template can write marks. A user's "<|im_end|>" stays text: while the template is rendered, a
        character that occurs nowhere else stands between the letters of it.
        """
        guard = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in question)
        turns = list(getattr(question, "turns", [("user", question)]))
        if answer is not None:
            turns.append(("assistant", answer))
        messages = []
        for role, content in turns:
            while self.marks.search(content):
                content = self.marks.sub(lambda mark: guard.join(mark[0]), content)
            messages.append({"role": role, "content": content})
        try:
            text = self.template.render(
                messages=messages, add_generation_prompt=answer is None, tools=None, documents=None, **self.names
            )
        except ValueError:  # raise_exception: some templates take no system message, or only alternating turns
            if len(messages) == 1 + (answer is not None):
                raise
            return self.pieces(str(question), answer)
        pieces, at = [], 0
        for mark in self.marks.finditer(text):
            pieces += [text[at : mark.start()].replace(guard, ""), self.special[mark[0]]]
            at = mark.end()
        pieces.append(text[at:].replace(guard, ""))
        return [piece for piece in pieces if piece != ""]
