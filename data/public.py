"""One door to the public data sets: whatever the file looks like, every row comes out the same.

The scripts of this repository train on four plain fields and know nothing of file formats:

    prompt    what is asked                                                    str
    chosen    the better answer (for GSM8K: the worked solution)               str or None
    rejected  the worse answer                                                 str or None
    answer    the gold number of a math problem                                str or None

Published data comes in five shapes (SHAPES below). This file maps each of them, one short function
a shape, and then offers what every preference script needs: clean_pairs, which drops what cannot
be trained on and counts it aloud, and split_pairs, which holds out some prompts.

Try it:
    python -c "from data.public import load_rows; print(load_rows('my_pairs.jsonl')[0])"
    python -c "from data.public import load_rows; print(load_rows('gsm8k', 'test')[0])"
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path

from data.checker import is_right

# Short name -> its name on the hub, its config, and its splits under our two names for them.
HUB = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, {"train": "train", "test": "test"}),
    "ultrafeedback": (
        "HuggingFaceH4/ultrafeedback_binarized",
        None,
        # This publication also has train_sft and train_gen, cut differently from the same prompts.
        {"train": "train_prefs", "test": "test_prefs"},
    ),
}
FILES = (".jsonl", ".jsonl.gz", ".parquet")

# The line that opens an answer, and the one that opens a question, in HH-RLHF's dialogues.
ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"

# What a chat template adds around one question and one answer: the two role marks, the end of the
# question, the end of the answer. A pair that fits without them would be cut short with them.
TEMPLATE_TOKENS = 4


# --- the shapes ------------------------------------------------------------------------------
# Each function takes one row as it was published and returns our four fields. It raises
# ValueError for a row that breaks its shape; load_rows adds the file and the line to the message.


def _row(prompt, chosen=None, rejected=None, answer=None):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": answer}


def _text(row, field):
    """Return row[field], which must be a string: a number or null would fail much later."""
    kind = type(row[field]).__name__
    if kind != "str":
        raise ValueError(f"field {field!r} is {kind}, not a string")
    return row[field]


def _turns(row, field):
    """Return row[field] as a list of (role, content), or say what is wrong with it."""
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise ValueError(f"field {field!r} is {found}, not a list of messages")
    for turn in turns:
        pair = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not all(isinstance(part, str) for part in pair):
            raise ValueError(f"a message in {field!r} is not {{'role': str, 'content': str}}")
    return [(turn["role"], turn["content"]) for turn in turns]


def _render(turns):
    """Write a dialogue as one string: a lone question as it is, several turns with their speakers.

    Several turns come out in HH-RLHF's own form, so that both sources teach a model one form:
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    -> "Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?"
    """
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    speakers = {"user": "Human"}
    return "\n\n".join(f"{speakers.get(role, role.capitalize())}: {text}" for role, text in turns)


def _pair(row):
    """{prompt, chosen, rejected}, each a plain string or a list of messages."""
    if not isinstance(row["chosen"], str):
        return _messages(row)
    is_list = isinstance(row["prompt"], list)
    prompt = _render(_turns(row, "prompt")) if is_list else _text(row, "prompt")
    return _row(prompt, _text(row, "chosen"), _text(row, "rejected"))


def _messages(row):
    """chosen and rejected as lists of messages: the last one is the answer, the rest the prompt."""
    before, last = {}, {}
    for side in ("chosen", "rejected"):
        *before[side], (role, last[side]) = _turns(row, side)
        if role != "assistant":
            raise ValueError(f"field {side!r} ends in a turn of {role!r}, not of the assistant")
    # Two answers are a pair only where they answer the same dialogue.
    if before["chosen"] != before["rejected"]:
        return _row(_render(before["chosen"]))
    if before["chosen"]:
        prompt = _render(before["chosen"])
    # Some publications leave the prompt out of both lists and keep it in a field of its own.
    elif isinstance(row.get("prompt"), list):
        prompt = _render(_turns(row, "prompt"))
    elif "prompt" in row:
        prompt = _text(row, "prompt")
    else:
        raise ValueError("the message lists hold an answer only, and there is no field 'prompt'")
    return _row(prompt, last["chosen"], last["rejected"])


def _dialogues(row):
    """{chosen, rejected} without a prompt: HH-RLHF's whole dialogues, or message lists."""
    if not isinstance(row["chosen"], str):
        return _messages(row)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if ASSISTANT not in chosen and ASSISTANT not in rejected:
        raise ValueError("there is no field 'prompt', and no '\\n\\nAssistant:' to cut one off at")
    # Not the common prefix itself: two answers that both begin "I'm sorry" share that too, and it
    # would end up in the prompt. The last mark inside the prefix is where the answers begin.
    at = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)
    # strip: the blanks around a turn are the file's layout; the template puts its own.
    prompt = chosen[: max(at, 0)].strip()
    answers = [dialogue[at + len(ASSISTANT) :] for dialogue in (chosen, rejected)]
    # A few dialogues go on past that mark on one side (5 of the 2312 in harmless-base's test
    # split). Those are not two answers to one question; trained on, they would teach the model to
    # write the human's lines as well.
    if at < 0 or any(mark in text for mark in (ASSISTANT, HUMAN) for text in answers):
        return _row(prompt)
    return _row(prompt, *(text.strip() for text in answers))


def _problem(row):
    """GSM8K {question, answer}: a worked solution that ends in `#### 72`."""
    solution = _text(row, "answer")
    gold = solution.rpartition("####")[2].strip()
    is_right(solution, gold)  # raises where the gold is not a number: such a row can never be won
    return _row(_text(row, "question"), chosen=solution, answer=gold)


def _solutions(row):
    """GSM8K's published model solutions: {question, ground_truth, <model>: {is_correct, solution}}.

    One problem gives one pair, of a right and a wrong solution. One and not all of them, so that
    pairs are independent and every problem weighs the same. Of the possible pairs, the one closest
    in length: left to chance, a reward model could score above half by liking longer answers.
    """
    truth = _text(row, "ground_truth")
    gold = truth.rpartition("A:")[2].strip()
    is_right(truth, gold)
    right, wrong = [], []
    for model, entry in row.items():
        if isinstance(entry, dict):
            if entry.get("is_correct") not in (True, False):
                raise ValueError(f"{model!r} has no 'is_correct' that is true or false")
            solution = _text({"solution": None, **entry}, "solution")
            (right if entry["is_correct"] else wrong).append(solution)
    # min keeps the first of equals, so the choice is the same on every run.
    pairs = [(r, w) for r in right for w in wrong]
    best = min(pairs, key=lambda pair: abs(len(pair[0]) - len(pair[1])), default=(None, None))
    return _row(_text(row, "question"), *best, answer=gold)


# The columns that must be there, and who maps them. The first line that fits counts, so the order
# goes from more columns to fewer: a row with a prompt is never read as a promptless dialogue.
SHAPES = (
    (("question", "ground_truth"), _solutions),
    (("question", "answer"), _problem),
    (("prompt", "chosen", "rejected"), _pair),
    (("chosen", "rejected"), _dialogues),
)


# --- reading ---------------------------------------------------------------------------------


def lines(path):
    """Yield (line number, row) from a .jsonl or .jsonl.gz.

    Line by line and not through a library: the reader of a broken file needs to know which line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # Bytes: text mode would also break lines at a lone carriage return.
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line.decode("utf-8-sig"))
                # JSONDecodeError and UnicodeDecodeError are both ValueErrors. RecursionError is
                # what a line of a hundred thousand "[" raises.
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"{path}: damaged gzip file ({error}); download it again"
        raise ValueError(message) from None


def _parquet(path):
    """Yield (row number, row) from a .parquet file."""
    import datasets  # here and not above: it takes a second, and a .jsonl does not need it

    try:
        # Streamed, because the other way first copies the whole file into a cache under the home
        # folder. Escaped, because the library would read "[1]" in a file name as a pattern.
        name = glob.escape(str(path))
        yield from enumerate(
            datasets.load_dataset("parquet", data_files=name, split="train", streaming=True), 1
        )
    # Broad, here and below: which kinds of error the libraries raise differs by their version.
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{path}: cannot be read as parquet ({_one_line(error)})") from None


def _hub(source, split):
    """Yield (row number, row) from the hub, or from the copy that an earlier run left behind."""
    name, config, splits = HUB[source]
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; take one of {', '.join(splits)}")
    import datasets
    from huggingface_hub import HfApi

    # Without a network the library tries for half a minute, a warning a try, before it gives up.
    # So ask once, briefly; no answer means offline mode, in which it takes a cached copy or fails
    # at once. HfApi and not a bare socket: it knows of proxies, mirrors and log-ins.
    trouble = None
    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # noqa: BLE001
        trouble = error
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or trouble is not None
        rows = datasets.load_dataset(name, config, split=splits[split])
    except Exception as error:  # noqa: BLE001
        # from None: a hundred lines of the library's traceback would bury the one that matters.
        raise ConnectionError(
            f"{name} could not be loaded from the hub ({_one_line(trouble or error)}); "
            f"download it elsewhere and pass the file's path ({', '.join(FILES)})"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    yield from enumerate(rows, 1)


def _one_line(error):
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_rows(source, split="train"):
    """Read a public data set, or a file in the form of one, into rows of the same four fields.

    Args:
        source: `gsm8k`, `hh-rlhf` or `ultrafeedback` (fetched from the hub), or the path of a
            .jsonl, .jsonl.gz or .parquet file. The columns decide how a file is read (see SHAPES).
        split: "train" or "test", for the hub's names. A file is one split, and this is ignored.

    Returns:
        A list of {"prompt": str, "chosen": str or None, "rejected": str or None,
        "answer": str or None}, one for each row of the source and in its order. A row that does
        not hold two answers to one prompt keeps its place, with chosen and rejected None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name, split, file type or shape, or a malformed row; the message
            names the file, the line and the cause.
        ConnectionError: the hub did not answer and there is no cached copy.

    Example:
        {"question": "6 * 7?", "answer": "6 * 7 = 42\\n#### 42"} in a file comes out as
        {"prompt": "6 * 7?", "chosen": "6 * 7 = 42\\n#### 42", "rejected": None, "answer": "42"}
    """
    source = str(source)
    ways = f"give {', '.join(HUB)}, or the path of a {', '.join(FILES)} file"
    path = Path(source).expanduser()
    if source in HUB:
        records, unit = _hub(source, split), "row"
    elif not source.endswith(FILES):
        raise ValueError(f"{source!r} is neither a known data set nor a known file type; {ways}")
    elif not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file; {ways}")
    elif source.endswith(".parquet"):
        records, unit = _parquet(path), "row"
    else:
        records, unit = lines(path), "line"

    rows, needed, to_row = [], None, None
    for number, record in records:
        where = f"{source}, {unit} {number}"
        kind = type(record).__name__
        if kind != "dict":
            raise ValueError(f"{where}: {kind}, not an object with named fields")
        if needed is None:
            # The first row decides the shape for all. Decided row by row, a row that lost its
            # prompt would silently be taken for a row of another shape.
            fits = (shape for shape in SHAPES if set(shape[0]) <= set(record))
            needed, to_row = next(fits, (None, None))
        if needed is None:
            shapes = "; ".join(" + ".join(columns) for columns, _ in SHAPES)
            found = ", ".join(record) or "none"
            raise ValueError(f"{where}: unknown columns ({found}); understood are: {shapes}")
        missing = [field for field in needed if field not in record]
        if missing:
            raise ValueError(f"{where}: field {missing[0]!r} is missing")
        try:
            rows.append(to_row(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{source} holds no rows; is the download complete?")
    return rows


def load_or_exit(source, split="train"):
    """load_rows for a script: what is wrong with the data is said in one line, without a traceback."""
    try:
        return load_rows(source, split)
    except (OSError, ValueError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise SystemExit(str(error)) from None


# --- preparing pairs -------------------------------------------------------------------------


def clean_pairs(rows, encode, max_tokens):
    """Drop the rows that no preference loss can use, and count them by reason.

    Nothing is truncated. A cut answer has lost its end, which is often what made it better or
    worse, and a model trained on it never sees where to stop.

    Args:
        rows: rows as load_rows returns them.
        encode: function from a string to its list of token ids.
        max_tokens: the longest sequence the model takes. Prompt, longer answer and the template's
            4 tokens must fit into it together.

    Returns:
        (kept, counts): the rows that stay, in order, and a dict that says for each row where it
        went: "kept", "identical" (chosen and rejected are the same: the margin is always 0, and
        so is the gradient), "too long", "empty" (a text that is blank) and "no pair". A row is
        counted once.

    Example:
        >>> rows = [_row("Hi", "Hello!", "What?"), _row("Hi", "Yes", "Yes"), _row("Hi", "Yes")]
        >>> clean_pairs(rows, lambda text: list(text.encode()), 12)[1]
        {'kept': 1, 'identical': 1, 'too long': 0, 'empty': 0, 'no pair': 1}
    """
    kept, counts = [], dict.fromkeys(("kept", "identical", "too long", "empty", "no pair"), 0)
    for row in rows:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if chosen is None or rejected is None:
            counts["no pair"] += 1
        elif not (prompt.strip() and chosen.strip() and rejected.strip()):
            counts["empty"] += 1
        elif chosen == rejected:
            counts["identical"] += 1
        else:
            # The longer one in tokens: the one with more characters may have fewer of them.
            longer = max(len(encode(chosen)), len(encode(rejected)))
            fits = len(encode(prompt)) + longer + TEMPLATE_TOKENS <= max_tokens
            counts["kept" if fits else "too long"] += 1
            if fits:
                kept.append(row)
    return kept, counts


def say_counts(source, counts, max_tokens=None):
    """Print in one line what clean_pairs dropped. Data that vanishes unsaid is a bug in waiting.

    Args:
        source: what was read, as the line should name it.
        counts: the dict that clean_pairs returned.
        max_tokens: the limit it was given, to be named beside the rows that were too long.

    Example:
        pairs.jsonl: 1000 pairs read, 4 identical, 112 too long for 512 tokens, 884 kept
    """
    words = {
        "no pair": "without a pair",
        "empty": "with an empty text",
        "identical": "identical",
        "too long": "too long" + (f" for {max_tokens} tokens" if max_tokens else ""),
    }
    dropped = "".join(f" {counts[key]} {words[key]}," for key in words if counts[key])
    print(f"{source}: {sum(counts.values())} pairs read,{dropped} {counts['kept']} kept")


def split_pairs(pairs, held_out=0.2, seed=0):
    """Split pairs into a training and a held-out part, so that no prompt is in both.

    Whole prompts move, and not single pairs: a model that has seen a question with its answers in
    training does better on another pair of the same question, and the held-out accuracy would
    report that memory as skill.

    A prompt's side depends on nothing but its text and the seed. So a prompt that the reward model
    holds out is held out from DPO as well, though the two may keep different rows of the file.

    Args:
        pairs: rows with a "prompt".
        held_out: the share of prompts to hold out, from 0 to below 1. It is met on average; where
            both are possible, each side gets at least one prompt.
        seed: another seed, another split.

    Returns:
        (train, held_out): two lists of the same rows, each in the order of `pairs`.

    Raises:
        ValueError: a share outside that range, or fewer than two different prompts to split.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be from 0 to below 1, not {held_out}")
    if held_out == 0:
        return list(pairs), []
    place = {}  # prompt -> a number in [0, 1) that looks random and never changes
    for pair in pairs:
        # Not hash(): Python salts it for strings, anew in every process.
        # surrogatepass: JSON can spell half a character ("\ud83d"), which plain UTF-8 refuses.
        key = f"{seed}\n{pair['prompt']}".encode("utf-8", "surrogatepass")
        place[pair["prompt"]] = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    if len(place) < 2:
        raise ValueError(f"cannot hold out a part of {len(place)} different prompts; give more")
    by_place = sorted(place, key=place.get)
    below = sum(number < held_out for number in place.values())
    # On a handful of prompts chance may put all on one side, and a mean over nothing fails later.
    chosen = set(by_place[: min(max(below, 1), len(place) - 1)])
    return (
        [pair for pair in pairs if pair["prompt"] not in chosen],
        [pair for pair in pairs if pair["prompt"] in chosen],
    )
