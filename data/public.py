"""Public datasets: whatever a file looks like, every row is read into the same four fields.

    prompt    what is asked                                                    str
    chosen    the better answer (for GSM8K: the worked solution)               str or None
    rejected  the worse answer                                                 str or None
    answer    the gold number of a math problem                                str or None

Data comes in a dozen layouts: those of TRL's documentation, of the Alpaca and ShareGPT files, and of GSM8K, HH-RLHF and
UltraFeedback as they were published (SHAPES below). Nearly everywhere a text can also be a list of messages. Each
layout is read by one short function. A row need not have all fields:

    a pair                      chosen and rejected
    a demonstration             chosen only
    a judgement of one answer   chosen only if the label is true, rejected only if it is false
    a prompt                    neither
    a text without a prompt     chosen, and prompt is None

The rest of the file is what every script with real data needs: clean_pairs and clean_demonstrations drop and count the
rows that cannot be trained on, and split_pairs holds out some prompts. The scripts use it through data/lessons.py.

Try it:
    python -c "from data.public import load_rows; print(load_rows('my_pairs.jsonl')[0])"
    python -c "from data.public import load_rows; print(load_rows('gsm8k', 'test')[0])"
"""

import glob
import gzip
import hashlib
import json
import os
import random
import re
import zlib
from collections import Counter
from pathlib import Path

from data.checker import NUMBER, is_correct, last_answer

# Short name -> name on the hub, config, and {our name of a split: its name}.
HUB = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, {"train": "train", "test": "test"}),
    "ultrafeedback": (
        "HuggingFaceH4/ultrafeedback_binarized",
        None,
        # This publication also has train_sft and train_gen: other splits of the same prompts.
        {"train": "train_prefs", "test": "test_prefs"},
    ),
    # The same prompts with all four answers and their scores.
    "ultrafeedback-scores": ("openbmb/UltraFeedback", None, {"train": "train"}),
}
FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet")

# The line that opens an answer, and the one that opens a question, in HH-RLHF's dialogues.
ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"

# Tokens that a chat template adds to one question and one answer: two role marks, the end of the question, the end of
# the answer. They take room in the context too. (The template in gpt.py does not mark the end of the question: 3.)
TEMPLATE_TOKENS = 4

# A text with more characters than this per allowed token, plus a margin for small limits, is too long without being
# encoded. English has about four characters per token. tiktoken panics on some texts of a million characters.
CHARACTERS_PER_TOKEN, MARGIN = 20, 1000


# --- the shapes ------------------------------------------------------------------------------
# Each function takes one row as it was published and returns our four fields. It raises ValueError for a row that
# does not have its layout; load_rows adds the file and the line to the message.


class Dialogue(str):
    """A prompt of several turns as one string, and .turns, its [(role, content)]: a model with a chat template is asked
    in turns (see vocabularies.Template), any other one with the string."""

    def __new__(cls, text, turns):
        self = super().__new__(cls, text)
        self.turns = turns
        return self

    def __reduce__(self):  # to be copied and pickled
        return Dialogue, (str(self), self.turns)


class NoPair(Exception):
    """The row is well formed, but a text of it is missing. It keeps its place and is counted as "no pair"."""


def _row(prompt, chosen=None, rejected=None, answer=None):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": answer}


def _text(row, field):
    """row[field], which must be a string. A number or null would fail much later, and less clearly."""
    kind = type(row[field]).__name__
    if kind != "str":
        raise ValueError(f"field {field!r} is {kind}, not a string")
    return row[field]


def _turns(row, field, calls=False):
    """row[field] as a list of (role, content). A message is {role, content} or, in ShareGPT's files, {from, value}.

    Raises ValueError if it is not a list of messages. Raises NoPair if a content is null, as in a message that only
    calls a tool: such a dialogue is valid, but it cannot be written as text. With calls=True, the calls are the text:
    "add({"a": 1, "b": 2})".
    """
    turns = row[field]
    if isinstance(turns, dict):  # ShareGPT's chosen and rejected: a message without a list around it
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise ValueError(f"field {field!r} is {found}, not a list of messages")
    said = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        names = ("from", "value") if "from" in turn else ("role", "content")
        role, content = map(turn.get, names)
        # Some publications leave the content out beside tool calls.
        is_null = content is None and (names[1] in turn or "tool_calls" in turn)
        if not isinstance(role, str) or not (isinstance(content, str) or is_null):
            raise ValueError(f"a message in {field!r} is not {{'role': str, 'content': str}}")
        if is_null and calls:
            content = _calls(turn.get("tool_calls"))
        said.append(({"human": "user", "gpt": "assistant"}.get(role, role), content))
    if any(content is None for _, content in said):
        raise NoPair(f"a message in {field!r} has no content")
    return said


def _calls(calls):
    """Tool calls in OpenAI's form as text, one a line, or None if they have another form."""
    try:
        functions = [call["function"] for call in calls]
        return "\n".join(f"{f['name']}({f['arguments']})" for f in functions) or None
    except (TypeError, KeyError):
        return None


def _render(turns):
    """A dialogue as one string: a single question as it is, several turns as a Dialogue with their speakers.

    Several turns get HH-RLHF's form, so that both sources teach a model the same form:
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    -> "Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?"
    """
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    speakers = {"user": "Human"}
    return Dialogue("\n\n".join(f"{speakers.get(role, role.capitalize())}: {text}" for role, text in turns), turns)


def _spoken(text):
    """HH-RLHF's "Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?" as a Dialogue. Another text stays what it is."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    roles = [{"Human": "user", "Assistant": "assistant"}[speaker] for speaker in parts[::2]]
    if before or not roles:
        return text
    return Dialogue(text, [(role, said.strip()) for role, said in zip(roles, parts[1::2])])


def _asked(row):
    """row["prompt"], a string or a list of messages, as a list of (role, content), with what layouts put beside it."""
    if isinstance(row["prompt"], list):
        turns = _turns(row, "prompt")
    else:
        turns = [("user", _text(row, "prompt"))]
        if row["prompt"] == row.get("instruction"):  # Alpaca's: the instruction, then what it is about
            about = next((name for name in ("input", "context") if row.get(name)), None)
            turns = [("user", f"{row['prompt']}\n\n{_text(row, about)}")] if about else turns
            for earlier in reversed(row.get("history") or []):  # LLaMA-Factory's: [question, answer] of earlier turns
                if not (isinstance(earlier, list) and [type(text) for text in earlier] == [str, str]):
                    raise ValueError("field 'history' is not a list of [question, answer]")
                turns = [("user", earlier[0]), ("assistant", earlier[1]), *turns]
    return _with_system(row, turns)


def _with_system(row, turns):
    """The turns, after the system message that some layouts have in a column of its own."""
    system = row.get("system") or row.get("system_prompt")
    return [("system", system), *turns] if isinstance(system, str) and system.strip() else turns


def _pair(row):
    """{prompt, chosen, rejected}, each a plain string or a list of messages."""
    if not isinstance(row["chosen"], str):
        return _messages(row)
    return _row(_render(_asked(row)), _text(row, "chosen"), _text(row, "rejected"))


def _messages(row):
    """chosen and rejected as lists of messages: the last message is the answer, the others are the prompt."""
    before, last = {}, {}
    for side in ("chosen", "rejected"):
        *before[side], (role, last[side]) = _turns(row, side)
        if role != "assistant":
            raise ValueError(f"field {side!r} ends in a turn of {role!r}, not of the assistant")
    # Two answers are a pair only if they answer the same dialogue.
    if before["chosen"] != before["rejected"]:
        return _row(_render(before["chosen"]))
    if before["chosen"]:
        prompt = _render(before["chosen"])
    # Some publications have the prompt in a field of its own and in neither list.
    elif "prompt" in row:
        prompt = _render(_asked(row))
    else:
        raise ValueError("the message lists hold an answer only, and there is no field 'prompt'")
    return _row(prompt, last["chosen"], last["rejected"])


def _dialogues(row):
    """{chosen, rejected} without a prompt: message lists, HH-RLHF's whole dialogues, or texts that begin alike."""
    if not isinstance(row["chosen"], str):
        return _messages(row)
    # Files that passed through Windows have \r\n inside the texts. The marks below are written with \n.
    chosen, rejected = (_text(row, field).replace("\r\n", "\n") for field in ("chosen", "rejected"))
    if ASSISTANT not in chosen and ASSISTANT not in rejected:
        return _continuations(chosen, rejected)
    # Not the common prefix itself: if both answers begin "I'm sorry", the prefix contains that. The answers begin
    # at the last mark inside the prefix.
    at = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)
    # strip: the blanks around a turn belong to the file's layout; the chat template has its own.
    prompt = _spoken(chosen[: max(at, 0)].strip())
    answers = [dialogue[at + len(ASSISTANT) :] for dialogue in (chosen, rejected)]
    # In a few dialogues one side goes on with further turns (5 of the 2312 in harmless-base's test split). Those
    # are not two answers to one question, and they would teach the model to write the human's lines.
    if at < 0 or any(mark in text for mark in (ASSISTANT, HUMAN) for text in answers):
        return _row(prompt)
    return _row(prompt, *(text.strip() for text in answers))


def _continuations(chosen, rejected):
    """Two texts that begin with the same prompt (TRL's "implicit prompt").

    Where the prompt ends is written nowhere. It is taken to end with the last sentence or line that both texts share,
    or, if they share none, with the last word: "2 + 2? It is 4." and "2 + 2? It might be 5." have the prompt "2 + 2?",
    although "It" is common too.
    """
    common = os.path.commonprefix([chosen, rejected])
    ends = list(re.finditer(r"[.?!:]\s+|\n", common)) or list(re.finditer(r"\S\s+", common))
    if not ends:
        raise ValueError(
            "there is no field 'prompt', no '\\n\\nAssistant:' to cut one off at, and chosen and rejected do not begin "
            "with the same words"
        )
    at = ends[-1].end()
    return _row(chosen[:at].strip(), chosen[at:].strip(), rejected[at:].strip())


def _scored(row):
    """UltraFeedback as OpenBMB published it: {instruction, completions: [{response, overall_score}]}, scored by GPT-4.

    The best answer against one of those with a lower score, drawn with the prompt as the seed: the worst one would
    always be easy to tell. If no answer has a lower score, the row is a tie and is dropped, because there is nothing
    to prefer.
    """
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) and "response" in c for c in completions):
        raise ValueError("field 'completions' is not a list of {'response': str, 'overall_score': number}")
    scored = [(c["overall_score"], _text(c, "response")) for c in completions if c.get("overall_score") is not None]
    if not all(isinstance(score, (int, float)) for score, _ in scored):
        raise ValueError("an 'overall_score' is not a number")
    prompt = _text(row, "instruction")
    if len(scored) < 2:
        return _row(prompt)
    best, chosen = max(scored, key=lambda one: one[0])  # of several best ones the first
    lower = [response for score, response in scored if score < best]
    if not lower:
        return _row(prompt, chosen) | {"tied": True}
    return _row(prompt, chosen, random.Random(prompt).choice(lower))


def _completion(row):
    """{prompt, completion}, or Alpaca's {instruction, input, output}: a demonstration."""
    turns = _asked(row)
    if isinstance(row["completion"], list):
        *more, (_, answer) = _turns(row, "completion")
        turns += more
    else:
        # TRL's completions begin with the blank that separates them from the prompt; the chat template has its own.
        answer = _text(row, "completion").strip()
    return _row(_render(turns), answer)


def _chat(row):
    """{messages}, or ShareGPT's {conversations}: the assistant's last answer, to everything that was said before it."""
    turns = _with_system(row, _turns(row, "messages", calls=True))
    at = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    return _row(_render(turns)) if at is None else _row(_render(turns[:at]), turns[at][1])


def _judged(row):
    """A demonstration with a label: true, this is how to answer, or false. No other answer to compare it with."""
    if row["label"] not in (True, False):
        raise ValueError(f"the label is {str(row['label'])[:60]!r}, not true or false")
    one = _completion(row) if "completion" in row else _chat(row)
    return one if row["label"] else _row(one["prompt"], rejected=one["chosen"])


def _plain_text(row):
    """{text}: text to be continued. It is no answer, so there is no prompt, which is not the same as a blank one."""
    return _row(None, _text(row, "text"))


def _prompt_alone(row):
    return _row(_render(_asked(row)))


def _problem(row):
    """{question, answer}: a problem, and a solution that ends in its gold number.

    GSM8K's mark is `#### 72`. Without it, the gold answer is what the checker reads (`\\boxed{72}`), or the number that
    is the whole answer. An answer in words has no gold number; it is a demonstration. A number alone is no solution: a
    model that imitates it would not learn to work.
    """
    solution = row["answer"]
    solution = str(solution) if type(solution) in (int, float) else _text(row, "answer")
    _, mark, after = solution.rpartition("####")
    if mark and "\\boxed{" not in after:
        gold = after.strip()
        is_correct(solution, gold)  # raises if gold is not a number: no answer to such a row could be correct
    else:
        numbers = (last_answer(text) for text in (solution, f"A: {solution}"))
        gold = next((str(number) for number in numbers if number is not None), None)
    alone = gold is not None and NUMBER.fullmatch(solution.strip())
    return _row(_render(_asked(row)), chosen=None if alone else solution, answer=gold)


def _solutions(row):
    """GSM8K's published model solutions: {question, ground_truth, <model>: {is_correct, solution}}.

    One problem gives one pair of a correct and a wrong solution. Only one, so that pairs are independent and every
    problem has the same weight. It is the pair whose lengths are closest, so that length says little about
    correctness: in the published file the correct solution is the longer one in 53 % of the pairs.
    """
    truth = _text(row, "ground_truth")
    gold = truth.rpartition("A:")[2].strip()
    is_correct(truth, gold)
    correct, wrong = [], []
    for model, entry in row.items():
        if isinstance(entry, dict):
            if entry.get("is_correct") not in (True, False):
                raise ValueError(f"{model!r} has no 'is_correct' that is true or false")
            solution = _text({"solution": None, **entry}, "solution")
            (correct if entry["is_correct"] else wrong).append(solution)
    # min returns the first of equals, so the choice is the same in every run.
    pairs = [(c, w) for c in correct for w in wrong]
    best = min(pairs, key=lambda pair: abs(len(pair[0]) - len(pair[1])), default=(None, None))
    return _row(_text(row, "question"), *best, answer=gold)


# The columns that a layout needs, and the function that reads it. The first line that fits is used. So the pairs with
# a prompt come before those without: a row with a prompt is never read as a dialogue without one. For the same reason
# the layouts with an answer come before the prompts alone.
SHAPES = (
    (("question", "ground_truth"), _solutions),
    (("instruction", "completions"), _scored),
    (("prompt", "chosen", "rejected"), _pair),
    (("chosen", "rejected"), _dialogues),
    (("prompt", "completion", "label"), _judged),
    (("messages", "label"), _judged),
    (("prompt", "completion"), _completion),
    (("prompt", "answer"), _problem),
    (("messages",), _chat),
    (("text",), _plain_text),
    (("prompt",), _prompt_alone),
)
# Other names of these columns.
ALSO = {
    "prompt": ("question", "instruction", "problem", "conversations"),
    "completion": ("output", "response"),
    "answer": ("solution", "ground_truth"),
    "messages": ("conversations",),
    "label": ("kto_tag",),
}


def _find_shape(record):
    """({column of the layout: its name in this record}, the function that reads it), or (None, None)."""
    for columns, to_row in SHAPES:
        names = {c: next((n for n in (c, *ALSO.get(c, ())) if n in record), None) for c in columns}
        # Without any model's solution, ground_truth is another name of the answer.
        solved = to_row is not _solutions or any(isinstance(entry, dict) for entry in record.values())
        if None not in names.values() and solved:
            return names, to_row
    return None, None


# --- reading ---------------------------------------------------------------------------------


def lines(path):
    """Yield (place, row) from a .jsonl or .jsonl.gz: ("line 1", {...}), or from a JSON array: ("row 1", {...}).

    Line by line, not through a library, so that an error can name the line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # As bytes: text mode would also end a line at a single carriage return.
        with opener(path, "rb") as file:
            first = True
            for number, line in enumerate(file, 1):
                if number == 1:
                    # From the byte order mark, or from the zero bytes beside the first characters.
                    encoding = json.detect_encoding(line)
                    # A file of zero bytes only, as a crash can leave it, is no text at all.
                    if not encoding.startswith("utf-8") and line.strip(b"\0"):
                        raise ValueError(f"{path} is {encoding[:6].upper()}; save it as UTF-8")
                if not line.strip():
                    continue
                if first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    # An array: one JSON text over all lines, which can only be read as a whole.
                    array = _parsed(path, number, line + file.read())
                    yield from ((f"row {i}", record) for i, record in enumerate(array, 1))
                    return
                first = False
                yield f"line {number}", _parsed(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"{path}: damaged gzip file ({error}); download it again"
        raise ValueError(message) from None


def _parsed(path, number, content):
    """The JSON in these bytes, which begin in that line of the file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number += content.count(b"\n", 0, error.start)
        position = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        byte = f"byte {content[error.start]:#04x} at position {position}"
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({byte}); save it as UTF-8") from None
    try:
        record = json.loads(text)
        # Only such an escape can hold half a character.
        return _whole_characters(record) if "\\ud" in text.lower() else record
    # JSONDecodeError is a ValueError. A line of a hundred thousand "[" raises RecursionError.
    except (ValueError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{path}, line {number}: not JSON: {error}") from None


def _whole_characters(record):
    """The record with U+FFFD for every half of a character, in values and in names.

    JSON can hold one half of an emoji ("\\ud83d"), for example where a text was cut. UTF-8 cannot: the tokenizer, the
    terminal and every file would refuse it later.
    """
    return json.loads(re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(record, ensure_ascii=False)))


def _parquet(path):
    """Yield (place, row) from a .parquet file."""
    import datasets  # here, not above: it takes a second, and a .jsonl does not need it

    try:
        # Streamed: otherwise the library first copies the whole file into a cache in the home folder. Escaped: the
        # library reads "[1]" in a file name as a pattern.
        name = glob.escape(str(path))
        rows = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    # Broad, here and below: the libraries raise different kinds of error in different versions.
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{path}: cannot be read as parquet ({_one_line(error)})") from None


def _hub(source, split):
    """Yield (place, row) from the hub, or from the cache of an earlier download."""
    name, config, splits = HUB[source]
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; take one of {', '.join(splits)}")
    import datasets
    from huggingface_hub import HfApi

    # Without a network the library tries for half a minute, with a warning per try. So ask once, briefly. Without
    # an answer use offline mode, which takes a cached copy or fails at once. HfApi uses the configured proxies,
    # mirrors and log-ins.
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
        # from None: without the library's traceback of a hundred lines.
        raise ConnectionError(
            f"{name} could not be loaded from the hub ({_one_line(trouble or error)}); "
            f"download it elsewhere and pass the file's path ({', '.join(FILES)})"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _one_line(error):
    """The first line of an error's text, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_rows(source, split="train"):
    """Read a public dataset, or a file with the layout of one, into rows of the same four fields.

    Args:
        source: `gsm8k`, `hh-rlhf`, `ultrafeedback` or `ultrafeedback-scores` (fetched from the hub), or
            the path of a .jsonl, .jsonl.gz, .json or .parquet file. The columns decide how a file is
            read (see SHAPES).
        split: "train" or "test", for the hub's names. A file is one split, and this is ignored.

    Returns:
        A list of {"prompt": str, "chosen": str or None, "rejected": str or None,
        "answer": str or None}, one for each row of the source and in its order. Which of them a
        row has depends on the layout (see the top of this file); the prompt is None for a text
        without one. Of a dialogue of several turns, the last answer is the answer, and the turns
        before it are the prompt (a Dialogue). A row that does not hold two answers to one prompt although its
        layout is that of pairs keeps its place, with rejected None (and chosen None too, except for
        ties, which also have "tied": True). So does a row of messages with `"content": null`.
        Half a character (a lone surrogate such as "\\ud83d") is read as U+FFFD.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name, split, file type or shape, or a malformed row; the message of
            a malformed row names the file, the line and the cause.
        ConnectionError: the hub did not answer and there is no cached copy.

    Example:
        {"question": "6 * 7?", "answer": "6 * 7 = 42\\n#### 42"} in a file comes out as
        {"prompt": "6 * 7?", "chosen": "6 * 7 = 42\\n#### 42", "rejected": None, "answer": "42"}
    """
    source = str(source)
    ways = f"give {', '.join(HUB)}, or the path of a {', '.join(FILES)} file"
    path = Path(source).expanduser()
    if source in HUB:
        records = _hub(source, split)
    elif not source.endswith(FILES):
        raise ValueError(f"{source!r} is neither a known dataset nor a known file type; {ways}")
    elif not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file; {ways}")
    elif source.endswith(".parquet"):
        records = _parquet(path)
    else:
        records = lines(path)

    rows, names, to_row = [], None, None
    for place, record in records:
        where = f"{source}, {place}"
        kind = type(record).__name__
        if kind != "dict":
            raise ValueError(f"{where}: {kind}, not an object with named fields")
        if names is None:
            # The first row decides the layout of all. If each row decided, a row without its prompt would silently
            # be read with another layout.
            names, to_row = _find_shape(record)
        if names is None:
            shapes = "; ".join(" + ".join(columns) for columns, _ in SHAPES)
            also = "; ".join(f"{', '.join(others)} for {column}" for column, others in ALSO.items())
            found = ", ".join(record) or "none"
            raise ValueError(f"{where}: unknown columns ({found}); understood are: {shapes} (or {also})")
        missing = [name for name in names.values() if name not in record]
        if missing:
            raise ValueError(f"{where}: field {missing[0]!r} is missing")
        try:
            rows.append(to_row(record | {column: record[name] for column, name in names.items()}))
        except NoPair:
            rows.append(_row(""))
        except ValueError as error:
            message = str(error)
            for column, name in names.items():  # as the file calls it
                message = message.replace(repr(column), repr(name))
            raise ValueError(f"{where}: {message}") from None
    if not rows:
        raise ValueError(f"{source} holds no rows; is the download complete?")
    return rows


def load_or_exit(source, split="train"):
    """load_rows for a script: if something is wrong with the data, exit with one line, without a traceback."""
    try:
        return load_rows(source, split)
    except (OSError, ValueError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise SystemExit(str(error)) from None


def has_solutions(source):
    """Is the source a file of published model solutions, objects with is_correct? (Exits if it is no data.)"""
    load_or_exit(source)
    file = Path(source).expanduser()
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        return False
    entries = [entry for entry in next(lines(file))[1].values() if isinstance(entry, dict)]
    return any("is_correct" in entry for entry in entries)


def model_solutions(path):
    """GSM8K's published model solutions, one entry per problem: (gold answer, {model: its final answer, a Fraction or
    None}, {model: the published is_correct mark}). Exits with one line if the file holds no such solutions.

    Example: [(5, {"small": 4, "large": 5}, {"small": False, "large": True})]
    """
    rows, file = [], Path(path).expanduser()
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise SystemExit(f"{path}: published solutions are a local .jsonl or .jsonl.gz file")
    load_or_exit(str(file))  # says in one line what is wrong with a file, and where
    for place, row in lines(file):
        entries = {name: entry for name, entry in row.items() if isinstance(entry, dict)}
        gold = last_answer(row.get("ground_truth", ""))
        if entries and gold is not None:
            if rows and entries.keys() != rows[0][1].keys():
                raise SystemExit(f"{path}, {place}: other models than in the lines before")
            said = {name: last_answer(entry["solution"]) for name, entry in entries.items()}
            rows.append((gold, said, {name: entry["is_correct"] for name, entry in entries.items()}))
    if not rows:
        raise SystemExit(
            f"{path} holds no published solutions: each line needs ground_truth and, for every model, an object with "
            "solution and is_correct"
        )
    return rows


# --- preparing rows --------------------------------------------------------------------------


def _without_prompt(row):
    """The row with its prompt cut off both answers, if both begin with it; otherwise the same row.

    Some publications have the whole text in chosen and rejected. A model trained on them would learn to repeat the
    question. Blanks around prompt and answers do not matter, and the answers lose theirs.

    A short prompt may stand at the start of both answers by chance ("Hi", "Hi there!", "Hi Leo."). So the prompt must
    have at least 20 characters, or at least three words. In the second case it must also end in a punctuation mark, or
    a blank must follow it in both answers: "Good morning, Sam" stays in "Good morning, Sam! How are you?".
    """
    prompt, sides = (row["prompt"] or "").strip(), (row["chosen"], row["rejected"])
    if not prompt or not all(side is not None and side.lstrip().startswith(prompt) for side in sides):
        return row
    chosen, rejected = (side.lstrip()[len(prompt) :] for side in sides)
    complete = not prompt[-1].isalnum() or not any(rest[:1].strip() for rest in (chosen, rejected))
    if len(prompt) < 20 and not (complete and len(prompt.split()) >= 3):
        return row
    return {**row, "chosen": chosen.strip(), "rejected": rejected.strip()}


def _length(encode, text, max_tokens):
    """Tokens of the text. A text that is far too long is not encoded, and counts as one token too many."""
    return max_tokens + 1 if len(text) > CHARACTERS_PER_TOKEN * max_tokens + MARGIN else len(encode(text))


def _contradictions(pairs):
    """How many pairs contradict another pair: the same prompt and answers with the opposite preference.

    Every pair is counted against at most one other. So three pairs A > B and one pair B > A count 1: one pair is the
    least that must go until the rest agree.
    """
    times = Counter((p["prompt"], p["chosen"], p["rejected"]) for p in pairs)
    opposite = ((n, times[prompt, worse, better]) for (prompt, better, worse), n in list(times.items()))
    return sum(map(min, opposite)) // 2  # every contradiction was met from both sides


def clean_pairs(rows, encode, max_tokens):
    """Drop the rows that a preference loss cannot use, and count them by reason.

    Nothing is truncated. A truncated answer has lost its end, which often made it better or worse, and a model
    trained on it never sees where to stop.

    Args:
        rows: rows as load_rows returns them.
        encode: function from a string to its list of token ids. It is not called for a text of more
            than 20 * max_tokens + 1000 characters, which is too long in any case.
        max_tokens: the longest sequence the model takes. Prompt, longer answer and the template's
            4 tokens must fit into it together.

    Returns:
        (kept, counts): the rows that are kept, in order, and how many rows are "kept", "identical" (chosen and
        rejected are the same, so margin and gradient are always 0), "too long", "empty" (a text is blank) and "no
        pair"; where they occur, also those that are "tied" (see _scored). Every row is counted once.

        Where they occur, two more counts say something about the rows that are kept: "prompt cut" (both answers
        began with the prompt, which was cut off, see _without_prompt) and "contradict" (see _contradictions).

    Example:
        >>> rows = [_row("Hi", "Hello!", "What?"), _row("Hi", "Yes", "Yes"), _row("Hi", "Yes")]
        >>> clean_pairs(rows, lambda text: list(text.encode()), 12)[1]
        {'kept': 1, 'identical': 1, 'too long': 0, 'empty': 0, 'no pair': 1}
    """
    kept, counts = [], dict.fromkeys(("kept", "identical", "too long", "empty", "no pair"), 0)
    counts |= {"tied": 0} if any(row.get("tied") for row in rows) else {}
    cut = 0
    for published in rows:
        row = _without_prompt(published)
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if chosen is None or rejected is None:
            counts["tied" if row.get("tied") else "no pair"] += 1
        elif not (prompt.strip() and chosen.strip() and rejected.strip()):
            counts["empty"] += 1
        elif chosen == rejected:
            counts["identical"] += 1
        else:
            # The longer one in tokens: the answer with more characters may have fewer tokens.
            longer = max(_length(encode, text, max_tokens) for text in (chosen, rejected))
            fits = _length(encode, prompt, max_tokens) + longer + TEMPLATE_TOKENS <= max_tokens
            counts["kept" if fits else "too long"] += 1
            if fits:
                kept.append(row)
                cut += row is not published
    notes = {"prompt cut": cut, "contradict": _contradictions(kept)}
    return kept, counts | {note: n for note, n in notes.items() if n}


def is_judged(rows):
    """Are these judgements of single answers? Nothing else has rows with a rejected answer and no chosen one."""
    return any(row["chosen"] is None and row["rejected"] is not None for row in rows)


def clean_demonstrations(rows, encode, max_tokens, judged=False):
    """Drop the rows that cannot be imitated, and count them by reason. clean_pairs, for prompt and chosen only.

    Args:
        rows: rows as load_rows returns them. Of a pair, the chosen answer is the demonstration. A text
            without a prompt (None) is kept; a blank prompt is not, because something is missing there.
        encode: as in clean_pairs.
        max_tokens: the most tokens that prompt and answer may have together, without the template.
        judged: the rows are judgements, and all of them are wanted, also those with a rejected answer.

    Returns:
        (kept, counts): the rows that are kept, in order, and how many rows are "kept", "too long", "empty" (prompt or
        answer is blank) and "no answer"; where it occurs, "prompt cut" as in clean_pairs.
    """
    kept, counts = [], dict.fromkeys(("kept", "too long", "empty", "no answer"), 0)
    cut = 0
    for published in rows:
        row = _without_prompt(published)
        answer = row["rejected"] if judged and row["chosen"] is None else row["chosen"]
        texts = [text for text in (row["prompt"], answer) if text is not None]
        if answer is None:
            counts["no answer"] += 1
        elif not all(text.strip() for text in texts):
            counts["empty"] += 1
        elif sum(_length(encode, text, max_tokens) for text in texts) > max_tokens:
            counts["too long"] += 1
        else:
            counts["kept"] += 1
            kept.append(row)
            cut += row is not published
    return kept, counts | ({"prompt cut": cut} if cut else {})


def say_counts(source, counts, max_tokens=None, unit="pairs"):
    """Print in one line what clean_pairs or clean_demonstrations dropped, and what is to be known of the rest.

    Args:
        source: the name of what was read.
        counts: the dict that they returned. Rows held out before may be added to it as "held out".
        max_tokens: the limit that they were given.
        unit: what a row of the source is called.

    Example:
        pairs.jsonl: 1000 pairs read, 4 identical, 112 too long for 512 tokens, 884 kept
        twice.jsonl: 24 pairs read, 24 kept; 12 contradict another pair
    """
    words = {
        "held out": "held out for the later chapters",
        "no pair": "without a pair",
        "no answer": "without an answer",
        "tied": "tied",
        "empty": "with an empty text",
        "identical": "identical",
        "too long": "too long" + (f" for {max_tokens} tokens" if max_tokens else ""),
    }
    notes = {
        "contradict": "{} contradict another pair",
        "prompt cut": "the prompt was cut off both answers of {}",
    }
    dropped = "".join(f" {counts[key]} {words[key]}," for key in words if counts.get(key))
    said = "".join(f"; {notes[key].format(counts[key])}" for key in notes if counts.get(key))
    total = sum(n for key, n in counts.items() if key not in notes)
    print(f"{source}: {total} {unit} read,{dropped} {counts['kept']} kept{said}")


def split_pairs(pairs, held_out=0.2, seed=0):
    """Split pairs into a training and a held-out part, so that no prompt is in both.

    The split is by prompt, not by pair. A model that was trained on one pair of a prompt is better on another pair
    of the same prompt, and the held-out accuracy would measure that memory.

    A prompt's side depends only on its text and the seed, unless one side would be empty. So a prompt that is held
    out from the reward model is held out from DPO too, even if the two keep different rows of the file.

    Args:
        pairs: rows with a "prompt".
        held_out: the fraction of prompts to hold out, from 0 to below 1. It is met on average. Each
            side gets at least one prompt; with 0, nothing is held out.
        seed: another seed gives another split.

    Returns:
        (train, held_out): two lists of the same rows, each in the order of `pairs`.

    Raises:
        ValueError: a fraction outside that range, or fewer than two different prompts to split.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be from 0 to below 1, not {held_out}")
    if held_out == 0:
        return list(pairs), []
    place = {}  # prompt -> a pseudo-random number in [0, 1), a function of prompt and seed
    for pair in pairs:
        # Not hash(): Python's hash of a string differs from process to process.
        key = f"{seed}\n{pair['prompt']}".encode()
        place[pair["prompt"]] = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    if len(place) < 2:
        raise ValueError(f"cannot hold out a part of {len(place)} different prompts; give more")
    by_place = sorted(place, key=place.get)
    below = sum(number < held_out for number in place.values())
    # With a handful of prompts, all of them may fall on one side by chance; a mean over nothing would fail later.
    chosen = set(by_place[: min(max(below, 1), len(place) - 1)])
    return (
        [pair for pair in pairs if pair["prompt"] not in chosen],
        [pair for pair in pairs if pair["prompt"] in chosen],
    )
