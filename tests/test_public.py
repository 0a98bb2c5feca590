"""Tests of data/public.py: every published layout, damaged files, cleaning and splitting."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import pytest

from data import __main__ as look
from data.checker import is_correct
from data.public import (
    HUB,
    clean_demonstrations,
    clean_pairs,
    load_rows,
    model_solutions,
    say_counts,
    split_pairs,
)

REAL = os.environ.get("REAL_DATA_DIR")
real = pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(prompt, chosen=None, rejected=None, answer=None):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": answer}


def messages(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def letters(text):
    return list(text.encode())


# --- the shapes ---


def test_pairs_as_strings(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "chosen": " Hello!\n", "rejected": "What?", "source_index": 3},
        {"prompt": "", "chosen": "", "rejected": ""},
    )
    # Strings are not changed, not even their spaces. Further columns are ignored.
    assert load_rows(path) == [row("Hi", " Hello!\n", "What?"), row("", "", "")]
    assert load_rows(str(path), split="whatever") == load_rows(path)


def test_pairs_as_messages_equal_pairs_as_strings(tmp_path):
    whole = {"chosen": messages("Hi", "Hello!"), "rejected": messages("Hi", "What?")}
    answers = {"chosen": messages("Hello!", first="a"), "rejected": messages("What?", first="a")}
    for record in (
        {"prompt": "Hi", **whole},
        {"prompt": messages("Hi"), **whole},
        whole,
        {"prompt": messages("Hi"), **answers},
        {"prompt": "Hi", **answers},
        {"prompt": messages("Hi"), "chosen": "Hello!", "rejected": "What?"},
    ):
        assert load_rows(write(tmp_path / "a.jsonl", record)) == [row("Hi", "Hello!", "What?")]


def test_dialogues_of_several_turns(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"chosen": messages("a", "b", "c", "good"), "rejected": messages("a", "b", "c", "bad")},
        # The dialogues differ before the last answer, so these are not two answers to one prompt.
        {"chosen": messages("a", "b", "c", "good"), "rejected": messages("a", "x", "c", "bad")},
        {
            "chosen": [{"role": "system", "content": "Be kind."}, *messages("a", "good")],
            "rejected": [{"role": "system", "content": "Be kind."}, *messages("a", "bad")],
        },
    )
    assert load_rows(path) == [
        row("Human: a\n\nAssistant: b\n\nHuman: c", "good", "bad"),
        row("Human: a\n\nAssistant: b\n\nHuman: c"),
        row("System: Be kind.\n\nHuman: a", "good", "bad"),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # Both answers begin with the same words, which are then part of the common prefix.
        ("I'm sorry, no.", "I'm sorry, yes.", ("I'm sorry, no.", "I'm sorry, yes.")),
        ("Yes.", "Yes.", ("Yes.", "Yes.")),
        ("", "Yes.", ("", "Yes.")),
        # One side has further turns.
        ("Yes.\n\nHuman: b\n\nAssistant: c", "Yes.", (None, None)),
        ("No.", "Yes.\n\nAssistant: c", (None, None)),
        ("No.", "Yes.\n\nHuman: why?", (None, None)),
        # A mark opens a turn only at the start of a paragraph.
        ("I am no Human: I", "The Assistant: me", ("I am no Human: I", "The Assistant: me")),
    ],
)
def test_hh_dialogues(tmp_path, chosen, rejected, expected):
    for before in ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"):
        path = write(
            tmp_path / "a.jsonl",
            {
                "chosen": f"{before}\n\nAssistant: {chosen}",
                "rejected": f"{before}\n\nAssistant: {rejected}",
            },
        )
        assert load_rows(path) == [row(before.strip(), *expected)]


def test_hh_dialogues_without_a_common_prompt(tmp_path):
    record = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    assert load_rows(write(tmp_path / "a.jsonl", record)) == [row("")]


@pytest.mark.parametrize("ending", ["Yes.", "Yes.\n\nHuman: b\n\nAssistant: c", "a\nb"])
def test_hh_dialogues_with_the_line_ends_of_windows(tmp_path, ending):
    record = {
        "chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant: {ending}",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant: No.",
    }
    expected = load_rows(write(tmp_path / "a.jsonl", record))
    windows = {side: text.replace("\n", "\r\n") for side, text in record.items()}
    assert load_rows(write(tmp_path / "a.jsonl", windows)) == expected
    # One side may have passed through Windows, and the other not.
    mixed = record | {"rejected": windows["rejected"]}
    assert load_rows(write(tmp_path / "a.jsonl", mixed)) == expected


def test_messages_without_content_are_no_pair(tmp_path):
    """A message that only calls a tool has "content": null. The row is counted, and the others are read."""
    good = {"chosen": messages("Hi", "Hello!"), "rejected": messages("Hi", "What?")}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    left_out = {"role": "assistant", "tool_calls": [{"id": "c1"}]}
    records = []
    for turn in (call, left_out, {"role": "assistant", "content": None}):
        dialogue = [*messages("Hi"), turn, {"role": "tool", "content": "3"}]
        records.append({side: [*dialogue, *messages("3", first="a")] for side in ("chosen", "rejected")})
        records.append(good | {"rejected": [*messages("Hi"), turn]})
    rows = load_rows(write(tmp_path / "a.jsonl", good, *records))
    assert rows == [row("Hi", "Hello!", "What?")] + [row("")] * 6
    assert clean_pairs(rows, letters, 20)[1]["no pair"] == 6
    in_prompt = {"prompt": [*messages("Hi"), call], "chosen": "Hello!", "rejected": "What?"}
    assert load_rows(write(tmp_path / "a.jsonl", in_prompt)) == [row("")]
    # Everything else of the wrong type is an error, beside a null too.
    for turn in (
        {"role": "assistant"},
        {"role": "assistant", "content": 3},
        {"role": "assistant", "content": []},
        {"role": None, "content": None},
        None,
        "Hello!",
    ):
        for dialogue in ([turn], [call, turn]):
            bad = good | {"chosen": [*messages("Hi"), *dialogue]}
            with pytest.raises(ValueError, match="line 2: a message in 'chosen' is not"):
                load_rows(write(tmp_path / "a.jsonl", good, bad))


def test_half_a_character_is_replaced(tmp_path):
    """JSON can hold half an emoji. UTF-8 cannot, so the tokenizer would fail on it."""
    half, whole = '"a \\ud83d b"', '"\\uD83D\\uDE00"'  # whole: the two halves of one emoji
    path = tmp_path / "a.jsonl"
    path.write_text(
        f'{{"prompt": {half}, "chosen": "\\uDC00", "rejected": {whole}}}\n'
        f'{{"prompt": [{{"role": "user", "content": {half}}}], "chosen": "\\\\ud83d", "rejected": "x\\ud83d"}}\n'
    )
    rows = load_rows(path)
    assert rows == [row("a \ufffd b", "\ufffd", "\U0001f600"), row("a \ufffd b", "\\ud83d", "x\ufffd")]
    kept, counts = clean_pairs(rows, letters, 40)
    assert counts["kept"] == 2
    split_pairs([*kept, row("other", "c", "r")])
    for columns in ('"question": "\\ud83d", "answer": "\\ud83d #### 4"', '"chosen": "a", "\\ud83d": 1'):
        path.write_text(f"{{{columns}}}\n")
        try:
            text = repr(load_rows(path))
        except ValueError as error:  # the name of a column is shown to the reader
            text = str(error)
        assert "\ufffd" in text and text.encode()


def test_gsm8k(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
        {"question": "Big?", "answer": "#### 1,000"},
    )
    assert load_rows(path) == [
        row("6 * 7?", "6 * 7 = <<6*7=42>>42\n#### 42", None, "42"),
        row("Big?", "#### 1,000", None, "1,000"),
    ]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("We add them.\n\\boxed{1,042}", "1042"),
        ("#### Step 1\nWe add them: \\boxed{42}", "42"),
        ("So:\n**Answer: 3.5**", "7/2"),
        ("42 eggs", "42"),
        ("City 7", None),
        ("42\nor 43", None),
        ("", None),
    ],
)
def test_gold_answers_without_gsm8ks_mark(tmp_path, answer, gold):
    """What the checker reads in the answer; an answer in words can only be imitated."""
    for columns in (
        ("question", "answer"),
        ("prompt", "solution"),
        ("problem", "ground_truth"),
        ("question", "ground_truth"),
    ):
        rows = load_rows(write(tmp_path / "a.jsonl", dict(zip(columns, ("q", answer)))))
        assert rows == [row("q", str(answer), None, gold)]
        assert gold is None or is_correct(f"#### {gold}", gold)


# --- the layouts of TRL, Alpaca, ShareGPT ---


def sharegpt(*texts):
    return [{"from": ["human", "gpt"][i % 2], "value": text} for i, text in enumerate(texts)]


THREE = "Human: a\n\nAssistant: b\n\nHuman: c"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # TRL, each type as strings and as messages
        ({"text": "Once upon a time"}, row(None, "Once upon a time")),
        ({"messages": messages("Hi", "Hello!")}, row("Hi", "Hello!")),
        ({"messages": messages("a", "b", "c", "d")}, row(THREE, "d")),
        ({"messages": messages("a", "b", "c", "d", "thanks")}, row(THREE, "d")),  # nobody answers the last turn
        ({"messages": messages("a")}, row("a")),
        ({"prompt": "Hi"}, row("Hi")),
        ({"prompt": messages("a", "b", "c")}, row(THREE)),
        ({"prompt": "Hi", "completion": " Hello!"}, row("Hi", "Hello!")),
        ({"prompt": messages("Hi"), "completion": messages("Hello!", first="a")}, row("Hi", "Hello!")),
        ({"prompt": messages("a"), "completion": messages("b", "c", "d", first="a")}, row(THREE, "d")),
        ({"prompt": "Hi", "completion": " Hello!", "label": True}, row("Hi", "Hello!")),
        ({"prompt": "Hi", "completion": " What?", "label": False}, row("Hi", None, "What?")),
        (
            {"prompt": messages("Hi"), "completion": messages("What?", first="a"), "label": False},
            row("Hi", None, "What?"),
        ),
        ({"messages": messages("a", "b", "c", "d"), "label": False}, row(THREE, None, "d")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, row("The sky is", "blue.", "green.")),
        ({"chosen": "2+2? It is 4.", "rejected": "2+2? It may be 5."}, row("2+2?", "It is 4.", "It may be 5.")),
        ({"chosen": "a b\nTL;DR: c", "rejected": "a b\nTL;DR: d"}, row("a b\nTL;DR:", "c", "d")),
        ({"chosen": "Why? Yes.", "rejected": "Why? Yes."}, row("Why?", "Yes.", "Yes.")),
        # Alpaca, Dolly, LLaMA-Factory, rasbt
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, row("Add.\n\n1, 2", "3")),
        ({"instruction": "Add 1 and 2.", "input": "", "output": "3"}, row("Add 1 and 2.", "3")),
        ({"instruction": "Add.", "context": "1, 2", "response": "3", "category": "x"}, row("Add.\n\n1, 2", "3")),
        ({"instruction": "c", "output": "d", "system": "", "history": [["a", "b"]]}, row(THREE, "d")),
        ({"instruction": "a", "output": "d", "system": "Be kind."}, row("System: Be kind.\n\nHuman: a", "d")),
        ({"instruction": "a", "input": "", "output": "d", "kto_tag": False}, row("a", None, "d")),
        ({"instruction": "Q", "input": "x", "output": "y", "chosen": "y", "rejected": "z"}, row("Q\n\nx", "y", "z")),
        # The input belongs to an instruction only.
        ({"prompt": "a", "input": "x", "completion": "b"}, row("a", "b")),
        # ShareGPT
        ({"conversations": sharegpt("a", "b", "c", "d")}, row(THREE, "d")),
        ({"conversations": sharegpt("a", "d"), "system": "Be kind."}, row("System: Be kind.\n\nHuman: a", "d")),
        ({"conversations": messages("a", "d")}, row("a", "d")),
        (
            {
                "conversations": sharegpt("a", "b", "c"),
                "chosen": sharegpt("", "d")[1],
                "rejected": sharegpt("", "e")[1],
            },
            row(THREE, "d", "e"),
        ),
        ({"conversations": sharegpt("a", "d"), "kto_tag": True}, row("a", "d")),
        # others
        ({"question": "Q", "chosen": "y", "rejected": "z"}, row("Q", "y", "z")),
        (
            {"system": "Be kind.", "question": "a", "chosen": "d", "rejected": "e"},
            row("System: Be kind.\n\nHuman: a", "d", "e"),
        ),
        ({"system_prompt": "", "question": "a", "response": "d"}, row("a", "d")),
        # A prompt beside messages that repeat it.
        ({"prompt": "a", "prompt_id": "7", "messages": messages("a", "d")}, row("a", "d")),
    ],
)
def test_usual_layouts(tmp_path, record, expected):
    assert load_rows(write(tmp_path / "a.jsonl", record)) == [expected]
    # The same as a JSON array over several lines, whatever the name of the file.
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text("\ufeff " + json.dumps([record, record], indent=2), encoding="utf-8")
        assert load_rows(tmp_path / name) == [expected] * 2


def test_tool_calls_are_text_in_demonstrations(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*messages("1+1?"), {"role": "assistant", "content": None, "tool_calls": [call, call]}]
    result = {"role": "tool", "content": "2"}
    record = {"messages": [*turns, result, *messages("It is 2.", first="a")], "tools": []}
    prompt = 'Human: 1+1?\n\nAssistant: add({"a": 1})\nadd({"a": 1})\n\nTool: 2'
    assert load_rows(write(tmp_path / "a.jsonl", record)) == [row(prompt, "It is 2.")]
    # No content and no call that can be read: the row is counted and the others are read.
    for calls in (None, [], [{}], 3):
        bad = {"messages": [*turns[:1], turns[1] | {"tool_calls": calls}]}
        assert load_rows(write(tmp_path / "a.jsonl", record, bad))[1:] == [row("")]


def test_ultrafeedback_with_scores(tmp_path):
    def scored(prompt, *scores):
        completions = [{"model": "m", "response": f"answer {i}", "overall_score": s} for i, s in enumerate(scores)]
        return {"source": "x", "instruction": prompt, "models": [], "completions": completions, "correct_answers": []}

    many = [scored(f"q{i}", 6, 8.5, 7, 8.5) for i in range(40)]
    rows = load_rows(write(tmp_path / "a.jsonl", *many, scored("t", 8, 8), scored("n", 3, None), scored("e")))
    assert all(r == row(f"q{i}", "answer 1", r["rejected"]) for i, r in enumerate(rows[:40]))
    # Any of the lower ones, never the other best one, and the same one in every run.
    assert {r["rejected"] for r in rows[:40]} == {"answer 0", "answer 2"}
    assert rows == load_rows(tmp_path / "a.jsonl")
    kept, counts = clean_pairs(rows, letters, 99)
    assert (len(kept), counts["tied"], counts["no pair"], sum(counts.values())) == (40, 1, 2, 43)
    assert clean_demonstrations(rows, letters, 99)[1]["kept"] == 41  # a tie has an answer to imitate


def test_ties_are_counted_aloud(tmp_path, capsys):
    say_counts("x", {"kept": 4, "identical": 0, "too long": 0, "empty": 0, "no pair": 1, "tied": 2})
    assert capsys.readouterr().out == "x: 7 pairs read, 1 without a pair, 2 tied, 4 kept\n"


def test_judgements_are_neither_pairs_nor_all_demonstrations():
    rows = [row("a", "good"), row("b", None, "bad"), row(""), row("c", None, "x" * 90), row(" ", None, "bad")]
    assert clean_pairs(rows, letters, 50)[1]["no pair"] == 5
    assert clean_demonstrations(rows, letters, 50)[0] == rows[:1]
    kept, counts = clean_demonstrations(rows, letters, 50, judged=True)
    assert kept == rows[:2] and counts == {"kept": 2, "too long": 1, "empty": 1, "no answer": 1}


def test_a_text_without_a_prompt_is_no_blank_prompt():
    rows = [row(None, "Once"), row("", "Once"), row(None, " ")]
    assert clean_demonstrations(rows, letters, 50) == (
        rows[:1], {"kept": 1, "too long": 0, "empty": 2, "no answer": 0}
    )  # fmt: skip
    assert clean_pairs(rows, letters, 50)[1]["no pair"] == 3


def test_problems_with_a_gold_number_alone(tmp_path):
    """No solution to imitate. A number may be a JSON number; true is none."""
    path = write(
        tmp_path / "a.jsonl", *({"prompt": "6 * 7?", "answer": answer} for answer in (42, "42", 4.5, "2 #### 4"))
    )
    assert load_rows(path) == [row("6 * 7?", None, None, gold) for gold in ("42", "42", "9/2")] + [
        row("6 * 7?", "2 #### 4", None, "4")
    ]
    assert load_rows(write(tmp_path / "b.jsonl", {"question": "q", "answer": -1})) == [row("q", None, None, "-1")]
    for answer in (True, None, [4]):
        with pytest.raises(ValueError, match="line 1: "):
            load_rows(write(tmp_path / "c.jsonl", {"prompt": "q", "answer": answer}))
    # Pairs stay pairs, whatever other columns they have.
    pair = {"prompt": "q", "answer": 1, "chosen": "a", "rejected": "b"}
    assert load_rows(write(tmp_path / "d.jsonl", pair)) == [row("q", "a", "b")]


def test_pairs_of_model_solutions(tmp_path):
    def says(is_correct, solution):
        return {"is_correct": is_correct, "solution": solution}

    base = {"question": "q", "ground_truth": "work\nA: 4"}
    path = write(
        tmp_path / "a.jsonl",
        # Two correct and two wrong: the two that are closest in length are paired.
        base
        | {"m1": says(True, "A: 4"), "m2": says(False, "long long\nA: 5")}
        | {"m3": says(True, "long, long\nA: 4"), "m4": says(False, "x" * 99 + "\nA: 5")},
        base | {"m1": says(True, "A: 4"), "m2": says(True, "A: 4.0")},
        base | {"m1": says(False, "A: 3")},
        # Equal differences in length: the first of each.
        base | {"m1": says(False, "A: 3"), "m2": says(False, "A: 5"), "m3": says(True, "A: 4")},
    )
    assert load_rows(path) == [
        row("q", "long, long\nA: 4", "long long\nA: 5", "4"),
        row("q", answer="4"),
        row("q", answer="4"),
        row("q", "A: 4", "A: 3", "4"),
    ]


# --- the files ---

PAIR = {"prompt": "Hi \u2028 there", "chosen": "Hello!", "rejected": "What?"}


def test_gzip_blank_lines_and_a_byte_order_mark(tmp_path):
    # U+2028 ends a line for str.splitlines, and \r for text mode; neither ends a line of JSON.
    line = json.dumps(PAIR, ensure_ascii=False)
    text = f'\ufeff{line}\r\n\n{line[:-1]}, \r "x": 1}}\n   \n{line}'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert load_rows(path) == [row(*PAIR.values())] * 3


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lists = {"chosen": messages("a", "b", "c", "good"), "rejected": messages("a", "b", "c", "bad")}
    for records in (
        [PAIR] * 3,
        [lists, lists],
        [{"question": "q", "answer": "#### 4"}],
        [
            {
                "question": "q",
                "ground_truth": "A: 4",
                "m1": {"is_correct": True, "solution": "A: 4"},
            }
            | {"m2": {"is_correct": False, "solution": "A: 5"}}
        ],
    ):
        path = tmp_path / "a[1] *.parquet"  # must not be read as a pattern
        parquet.write_table(pa.Table.from_pylist(records), path)
        assert load_rows(path) == load_rows(write(tmp_path / "a.jsonl", *records))

    parquet.write_table(pa.Table.from_pylist([PAIR, PAIR | {"chosen": None}]), path)
    with pytest.raises(ValueError, match="row 2: field 'chosen' is NoneType"):
        load_rows(path)
    parquet.write_table(pa.Table.from_pylist([{"words": "a"}]), path)
    with pytest.raises(ValueError, match="row 1: unknown columns"):
        load_rows(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read as parquet") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


GOOD = json.dumps(PAIR).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n  \n", "holds no rows"),
        (GOOD + b"\n{'prompt': 1}", "line 2: not JSON"),
        (GOOD + b"\n\n" + GOOD[:-5], "line 3: not JSON"),
        (GOOD + b"\n\xff\xfe", r"line 2: not JSON in UTF-8 \(byte 0xff at position 0\); save it as UTF-8"),
        (GOOD + b'\n{"prompt": "caf\xe9"}', r"line 2: not JSON in UTF-8 \(byte 0xe9 at position 15\); save"),
        (GOOD.decode().encode("utf-16"), r"a\.jsonl(\.gz)? is UTF-16; save it as UTF-8"),
        (GOOD.decode().encode("utf-16-le"), "is UTF-16; save it"),
        ("\ufeff\n".encode("utf-16-be") + GOOD.decode().encode("utf-16-be"), "is UTF-16; save it"),
        (GOOD.decode().encode("utf-32"), "is UTF-32; save it as UTF-8"),
        (GOOD.decode().encode("utf-32-be"), "is UTF-32; save it as UTF-8"),
        (b"\0" * 4096, "line 1: not JSON"),  # as a crash can leave a file
        (GOOD + b"\n" + b"[" * 200000, "line 2: not JSON"),
        (GOOD + b'\n{"prompt": ' + b"9" * 9999 + b"}", "line 2: not JSON"),
        (b"[" + GOOD, "line 1: not JSON"),
        (b"\n[\n" + GOOD + b",\n{'prompt': 1}]", "line 4: not JSON"),
        (b"[" + GOOD + b",\n\n \xff]", r"line 3: not JSON in UTF-8 \(byte 0xff at position 1\); save it as UTF-8"),
        (b"[" * 200000, "line 1: not JSON"),
        (b"[]", "holds no rows"),
        (b"[" + GOOD + b", 3]", "row 2: int, not an object"),
        (b"[" + GOOD + b', {"prompt": "a"}]', "row 2: field 'chosen' is missing"),
        (GOOD + b"\n[" + GOOD + b"]", "line 2: list, not an object"),
        (GOOD + b"\nnull", "line 2: NoneType, not an object"),
        (b"{}", r"line 1: unknown columns \(none\)"),
        (
            b'{"sentence": "a", "label": 1}',
            r"unknown columns \(sentence, label\).*prompt \+ chosen \+ rejected;.*question, instruction.* for prompt",
        ),
        (GOOD + b'\n{"prompt": "a", "chosen": "b"}', "line 2: field 'rejected' is missing"),
        # Without the prompt it would fit another layout.
        (GOOD + b'\n{"chosen": "a", "rejected": "b"}', "line 2: field 'prompt' is missing"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": null}',
            "line 1: field 'rejected' is NoneType",
        ),
        (b'{"prompt": 1, "chosen": "b", "rejected": "c"}', "line 1: field 'prompt' is int"),
        (b'{"prompt": "a", "chosen": [], "rejected": []}', "'chosen' is an empty list"),
        (b'{"prompt": "a", "chosen": ["b"], "rejected": ["c"]}', "message in 'chosen' is not"),
        (b'{"prompt": "a", "chosen": 1, "rejected": 2}', "'chosen' is int, not a list of messages"),
        (
            json.dumps({"chosen": messages("a"), "rejected": messages("a", "b")}).encode(),
            "'chosen' ends in a turn of 'user'",
        ),
        (
            json.dumps({side: messages("b", first="a") for side in ("chosen", "rejected")}).encode(),
            "no field 'prompt'",
        ),
        (b'{"chosen": "a", "rejected": "b"}', "no field 'prompt'"),
        (b'{"chosen": "The sky", "rejected": "There"}', "no field 'prompt'"),  # only a part of a word in common
        (b'{"prompt": "a", "completion": "b", "label": "good"}', "the label is 'good', not true or false"),
        (b'{"prompt": "a", "completion": "b", "label": null}', "the label is 'None', not true or false"),
        (b'{"prompt": "a", "completion": null}', "field 'completion' is NoneType"),
        # A field is called as the file calls it.
        (b'{"instruction": "a", "output": 1}', "field 'output' is int"),
        (b'{"instruction": "a", "input": 2, "output": "c"}', "field 'input' is int"),
        (b'{"instruction": "a", "output": "c", "history": ["b"]}', "'history' is not a list of"),
        (b'{"conversations": [{"from": "gpt"}]}', "a message in 'conversations' is not"),
        (b'{"conversations": "a"}', "field 'conversations' is str, not a list"),
        (b'{"text": 1}', "field 'text' is int"),
        (b'{"instruction": "a", "completions": [{"answer": "b"}]}', "'completions' is not a list of"),
        (
            b'{"instruction": "a", "completions": [{"response": "b", "overall_score": "8"}]}',
            "'overall_score' is not a n",
        ),
        (
            b'{"question": "q", "answer": "#### many"}',
            "line 1: the gold answer 'many' is not a number",
        ),
        (b'{"question": 1, "answer": "#### 1"}', "'question' is int"),
        (
            b'{"question": "q", "ground_truth": "A: x", "m": {"is_correct": true, "solution": "A: 1"}}',
            "gold answer 'x'",
        ),
        (b'{"question": "q", "ground_truth": [4]}', "'ground_truth' is list"),
        (
            b'{"question": "q", "ground_truth": "A: 1", "m": {"is_correct": "no"}}',
            "'m' has no 'is_correct'",
        ),
        (
            b'{"question": "q", "ground_truth": "A: 1", "m": {"is_correct": true}}',
            "'solution' is NoneType",
        ),
    ],
)
def test_malformed_files_are_named_with_line_and_cause(tmp_path, content, message):
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(ValueError, match=message) as caught:
            load_rows(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        # The traceback of the library is not shown.
        assert caught.value.__cause__ is None and (
            caught.value.__context__ is None or caught.value.__suppress_context__
        )


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"\n".join([GOOD] * 50))
    broken = bytes([*whole[:30], *(255 - byte for byte in whole[30:50]), *whole[50:]])
    for content in (GOOD, whole[:-20], broken):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged gzip|not JSON"):
            load_rows(path)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file; give gsm8k"):
        load_rows(tmp_path / "missing.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError):
        load_rows(tmp_path / "folder.jsonl")
    for source in ("gsm9k", "a.csv", "", tmp_path):
        with pytest.raises(ValueError, match="neither a known dataset nor a known file type"):
            load_rows(source)
    for source in HUB:
        with pytest.raises(ValueError, match="no split 'validation'; take one of train"):
            load_rows(source, "validation")


# --- the hub, without a hub ---


@pytest.fixture
def no_network(monkeypatch):
    """Every request of the hub's client fails at once, as on a machine without a network."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise OSError("Name or service not known\nand a long tail")

    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)


def test_hub_out_of_reach_fails_fast_and_says_what_to_do(no_network, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # no cached copy either
    start = time.perf_counter()
    for source, (name, _, _) in HUB.items():
        with pytest.raises(ConnectionError, match="pass the file's path") as caught:
            load_rows(source)
        assert name in str(caught.value) and "Name or service not known" in str(caught.value)
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert time.perf_counter() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is False or os.environ.get("HF_HUB_OFFLINE")


def test_hub_names_and_splits(monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return [PAIR]

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *args, **kwargs: types.SimpleNamespace())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in HUB:
        for split in HUB[source][2]:
            assert load_rows(source, split) == [row(*PAIR.values())]
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("Anthropic/hh-rlhf", None, "train"),
        ("Anthropic/hh-rlhf", None, "test"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "test_prefs"),
        ("openbmb/UltraFeedback", None, "train"),
    ]


# --- cleaning and splitting ---


def test_clean_pairs_counts_every_row_once():
    rows = [
        row("Hi", "Hello", "What?"),
        row("Hi", "Same", "Same"),
        row("Hi", "x" * 50, "y"),
        row("Hi", "y", "x" * 50),
        row("x" * 50, "y", "z"),
        row("Hi", " \n", "y"),
        row("", "y", "z"),
        row("Hi", "", ""),  # counted as empty only, not as identical too
        row("Hi", "worked solution", None, "4"),
        row("Hi"),
    ]
    kept, counts = clean_pairs(rows, letters, 20)
    assert kept == rows[:1] and kept[0] is rows[0]
    assert counts == {"kept": 1, "identical": 1, "too long": 3, "empty": 3, "no pair": 2}
    assert clean_pairs([], letters, 20) == ([], dict.fromkeys(counts, 0))


def test_clean_pairs_at_the_limit():
    rows = [row("1234", "123", "12345")]
    assert clean_pairs(rows, letters, 4 + 5 + 4)[1]["kept"] == 1
    assert clean_pairs(rows, letters, 4 + 5 + 3)[1]["too long"] == 1

    # The longer answer is the one with more tokens. This encoder makes four tokens of "x", one of other letters.
    def tokens(text):
        return list(text.replace("x", "four"))

    assert clean_pairs([row("a", "bcd", "xx")], tokens, 12)[1]["too long"] == 1
    assert clean_pairs([row("a", "bcd", "xx")], tokens, 13)[1]["kept"] == 1


def test_clean_pairs_against_brute_force():
    rng = random.Random(0)
    texts = [None, "", " ", "a", "bb", "ccc", "dddddd"]
    rows = [row(rng.choice(texts[1:]), rng.choice(texts), rng.choice(texts)) for _ in range(2000)]
    kept, counts = clean_pairs(rows, letters, 10)
    reasons = [n for reason, n in counts.items() if reason != "contradict"]
    assert sum(reasons) == len(rows) and counts["kept"] == len(kept)
    assert all(n > 0 for n in reasons)
    good = []
    for r in rows:
        t = [r["prompt"], r["chosen"], r["rejected"]]
        usable = all(x and x.strip() for x in t) and t[1] != t[2]
        if usable and max(len(t[0] + t[1]), len(t[0] + t[2])) <= 6:
            good.append(r)
    assert kept == good


@pytest.mark.parametrize(
    ("prompt", "before", "cut"),
    [
        ("\n\nHuman: What is 2+2?\n\nAssistant:", "\n\nHuman: What is 2+2?\n\nAssistant: ", True),
        ("What is 2+2?", "What is 2+2? ", True),
        ("What is 2+2? ", "What is 2+2?\n", True),
        ("Complete this sentence: inter", "Complete this sentence: inter", True),  # long
        ("\u4eca\u65e5\u306e\u5929\u6c17\u306f" * 4, "\u4eca\u65e5\u306e\u5929\u6c17\u306f" * 4, True),
        # Short texts that an answer can begin with by chance.
        ("Hi", "Hi ", False),
        ("Hi", "Hi\n", False),
        ("Thank you!", "Thank you! ", False),
        ("Good morning, Sam", "Good morning, Sam! ", False),
        ("What is a", "What is an ", False),
        ("", "", False),
        (" ", " ", False),
    ],
)
def test_a_prompt_that_is_repeated_in_both_answers_is_cut_off(capsys, prompt, before, cut):
    published = row(prompt, before + "It is 4.", before + "Who knows.\nNot I.")
    whole = dict(published)
    expected = row(prompt, "It is 4.", "Who knows.\nNot I.") if cut else published
    for clean in (clean_pairs, clean_demonstrations):
        kept, counts = clean([published], letters, 999)
        assert kept == ([expected] if prompt.strip() else [])
        assert counts.get("prompt cut", 0) == cut and published == whole
        say_counts("x", counts)
        assert ("kept; the prompt was cut off both answers of 1\n" in capsys.readouterr().out) == cut
        # One answer alone may quote the question.
        one = published | {"rejected": "Who knows."}
        assert clean([one], letters, 999)[0] == ([one] if prompt.strip() else [])


def test_an_answer_that_is_only_the_prompt_is_empty():
    rows = [row("What is 2 plus 2?", "What is 2 plus 2?", "What is 2 plus 2? 5")]
    assert clean_pairs(rows, letters, 99) == (
        [],
        dict.fromkeys(("kept", "identical", "too long", "no pair"), 0) | {"empty": 1},
    )


def test_contradictions_are_counted_and_kept(capsys):
    better, worse = row("q", "a", "b"), row("q", "b", "a")
    for rows, expected in (
        ([better, worse], 1),
        ([worse, better, worse], 1),
        ([better, worse] * 3, 3),
        ([better, better], 0),
        ([better, row("p", "b", "a"), row("q", "b", "c"), row("q", "c", "a")], 0),  # other prompts, other answers
        ([better, row("q", "b" * 99, "a" * 99), row("q", "a" * 99, "b" * 99)], 0),  # too long: not trained on
    ):
        kept, counts = clean_pairs(rows, letters, 20)
        assert counts.get("contradict", 0) == expected
        assert kept == [r for r in rows if len(r["chosen"]) < 99]
        say_counts("x", counts)
        assert (f"kept; {expected} contradict another pair\n" in capsys.readouterr().out) == bool(expected)


def limited(limit):
    def encode(text):
        if len(text) > limit:
            raise AssertionError(f"a text of {len(text)} characters reached the tokenizer")
        return letters(text)

    return encode


def test_far_too_long_texts_are_not_encoded():
    """tiktoken panics on some texts of a million characters."""
    huge = "a" + " " * 10**6 + "b"
    limit = 20 * 50 + 1000
    rows = [row(huge, "y", "z"), row("Hi", huge, "z"), row("Hi", "y", huge), row("Hi", "y", "z" * (limit + 1))]
    assert clean_pairs([*rows, row("Hi", "y", "z")], limited(limit), 50)[1] == {
        "kept": 1, "identical": 0, "too long": 4, "empty": 0, "no pair": 0
    }  # fmt: skip
    assert clean_demonstrations([*rows, row("Hi", "y", "z")], limited(limit), 50)[1] == {
        "kept": 3, "too long": 2, "empty": 0, "no answer": 0
    }  # fmt: skip
    # A tokenizer with very long tokens: a text up to the limit is measured.
    assert clean_pairs([row("Hi", "y" * limit, "z")], lambda text: [0], 50)[1]["kept"] == 1
    assert clean_pairs([row("Hi", "y" * (limit + 1), "z")], lambda text: [0], 50)[1]["kept"] == 0


def test_clean_demonstrations_counts_every_row_once(capsys):
    rows = [
        row("Hi", "Hello"),
        row("Hi", "Hello", "What?"),
        row("Hi", "x" * 18),
        row("Hi", "x" * 19),
        row("x" * 19, "Hi", "y"),
        row(" ", "Hello"),
        row("Hi", "\n"),
        row("Hi", ""),
        row("Hi"),
        row("", None),
    ]
    kept, counts = clean_demonstrations(rows, letters, 20)
    assert kept == rows[:3] and kept[0] is rows[0]
    assert counts == {"kept": 3, "too long": 2, "empty": 3, "no answer": 2}
    say_counts("x", counts | {"held out": 4}, 20, "rows")
    assert capsys.readouterr().out == (
        "x: 14 rows read, 4 held out for the later chapters, 2 without an answer, "
        "3 with an empty text, 2 too long for 20 tokens, 3 kept\n"
    )


def test_say_counts(capsys):
    counts = {"kept": 884, "identical": 4, "too long": 112, "empty": 0, "no pair": 0}
    say_counts("uf.jsonl", counts, 512)
    say_counts("uf.jsonl", counts)
    say_counts("x", {"kept": 1, "identical": 0, "too long": 0, "empty": 2, "no pair": 3})
    assert capsys.readouterr().out.splitlines() == [
        "uf.jsonl: 1000 pairs read, 4 identical, 112 too long for 512 tokens, 884 kept",
        "uf.jsonl: 1000 pairs read, 4 identical, 112 too long, 884 kept",
        "x: 6 pairs read, 3 without a pair, 2 with an empty text, 1 kept",
    ]


def test_split_pairs_on_random_pairs():
    rng = random.Random(0)
    for n in (2, 3, 10, 100, 3000):
        pairs = [row(str(rng.randrange(max(2, n // 2))), str(i), "r") for i in range(n)]
        pairs += [row("0", "c", "r"), row("1", "c", "r")]
        for seed in range(5):
            train, held = split_pairs(pairs, 0.2, seed)
            assert train and held
            assert not {p["prompt"] for p in train} & {p["prompt"] for p in held}
            # Every pair is in one of the two parts, in the same order.
            parts = {id(p) for p in held}
            assert train == [p for p in pairs if id(p) not in parts]
            assert held == [p for p in pairs if id(p) in parts]
            assert (train, held) == split_pairs(pairs, 0.2, seed)
        if n == 3000:
            assert 0.15 < len(held) / len(pairs) < 0.25
            assert split_pairs(pairs, 0.2, 0) != split_pairs(pairs, 0.2, 1)
    # A larger fraction with the same seed only adds prompts.
    small, large = (split_pairs(pairs, fraction)[1] for fraction in (0.1, 0.4))
    assert {p["prompt"] for p in small} < {p["prompt"] for p in large}


def test_split_is_the_same_in_every_process_and_on_every_subset():
    # These numbers were written down once. With hash() they would differ in every process.
    pairs = [row(f"prompt {i}", "c", "r") for i in range(20)]
    held = {p["prompt"] for p in split_pairs(pairs)[1]}
    assert held == {f"prompt {i}" for i in (1, 9, 10, 13, 18)}
    # A script that dropped some rows holds out the same prompts.
    fewer = pairs[::2]
    assert {p["prompt"] for p in split_pairs(fewer)[1]} == held & {p["prompt"] for p in fewer}


def test_split_pairs_at_the_edges():
    pair, other = row("a", "c", "r"), row("\ufffd", "c", "r")
    assert split_pairs([pair, pair], 0) == ([pair, pair], [])
    assert sorted(map(len, split_pairs([pair, other, pair], 0.999))) == [1, 2]
    assert sorted(map(len, split_pairs([pair, other, pair], 1e-9))) == [1, 2]
    for pairs in ([], [pair], [pair, pair]):
        with pytest.raises(ValueError, match="cannot hold out"):
            split_pairs(pairs)
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="held_out must be"):
            split_pairs([pair, other], fraction)


# --- published model solutions, problem by problem ---


def solved(gold, **models):
    """A row of the published model solutions; models: name=(solution, published mark)."""
    entries = {name: {"solution": text, "is_correct": mark} for name, (text, mark) in models.items()}
    return {"question": "2+3?", "ground_truth": gold, **entries}


def test_model_solutions_by_hand(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        solved("2+3=5\nA: 5", small=("no idea", False), large=("A: 5.0", True)),
        solved("A: 1", small=("A: 1/2", False), large=("A: 1", False)),  # the second mark is wrong, and is kept
    )
    expected = [
        (5, {"small": None, "large": 5}, {"small": False, "large": True}),
        (1, {"small": Fraction(1, 2), "large": 1}, {"small": False, "large": False}),
    ]
    assert model_solutions(path) == model_solutions(str(path)) == expected
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert model_solutions(zipped) == expected


def test_files_without_model_solutions_exit_with_one_line(tmp_path):
    first, other = solved("A: 5", one=("A: 5", True)), solved("A: 5", other=("A: 5", True))
    for path, message in (
        ("gsm8k", "local .jsonl or .jsonl.gz file"),
        (tmp_path / "a.parquet", "local .jsonl or .jsonl.gz file"),
        (tmp_path / "missing.jsonl", "there is no such file"),
        (write(tmp_path / "b.jsonl", first, {}), "line 2: field 'question' is missing"),
        (write(tmp_path / "c.jsonl", first, other), "line 2: other models than in the lines before"),
        (write(tmp_path / "d.jsonl", PAIR), "holds no published solutions: each line needs ground_truth"),
        (write(tmp_path / "e.jsonl", solved("A: 5")), "holds no published solutions"),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            model_solutions(path)
        assert str(path) in caught.value.code and "\n" not in caught.value.code


# --- python -m data ---


def test_look_at_a_file(tmp_path, monkeypatch, capsys):
    """Pairs where a file has them, and otherwise its demonstrations."""

    def show(*records):
        path = write(tmp_path / "a.jsonl", *records)
        monkeypatch.setattr(sys, "argv", ["data", str(path)])
        look.main()
        first, *rest = capsys.readouterr().out.removeprefix(f"{path}: ").splitlines()
        return first, rest

    problems = [{"question": f"{i} + 0?", "answer": f"{i}\n#### {i}"} for i in range(12)]
    first, rest = show(*problems)
    assert first == "12 rows read, 12 kept"
    assert sum(line.startswith("==== row") for line in rest) == 10
    at = rest.index("==== row 1, answer " + rest[1].rpartition(" ")[2])
    number = rest[at].rpartition(" ")[2]
    assert rest[at + 1 : at + 6] == [
        "  prompt:",
        f"    {number} + 0?",
        "  chosen:",
        f"    {number}",
        f"    #### {number}",
    ]
    assert not any("rejected" in line for line in rest)

    number_alone = ["", "==== row 1, answer 5", "  prompt:", "    2+3?", "  chosen:", "    5"]
    assert show({"prompt": "2+3?", "answer": 5}) == ("1 rows read, 1 kept", number_alone)

    first, rest = show(*[PAIR | {"prompt": str(i)} for i in range(3)])
    assert first == "3 pairs read, 3 kept"
    assert [line for line in rest if line.endswith(":") or "====" in line] == [
        line for i in (1, 2, 3) for line in (f"==== pair {i}", "  prompt:", "  chosen:", "  rejected:")
    ]
    assert rest[0].startswith("chosen ") and rest[0].endswith(".0%")
    # Half of these have the longer answer chosen. An empty chosen answer does not make a row a judgement.
    lengths = [("a", "bbb"), ("aaaa", "b"), ("aa", "bb"), ("aaa", "bb"), ("", "b")]
    first, rest = show(*[{"prompt": "p", "chosen": c, "rejected": r} for c, r in lengths])
    assert first == "5 pairs read, 1 with an empty text, 4 kept"
    assert rest[0] == "chosen 2 characters on average, rejected 2; the chosen answer is the longer one in 50.0%"
    # Pairs of which none is left are still pairs.
    assert show(PAIR | {"rejected": ""}) == ("1 pairs read, 1 with an empty text, 0 kept", [])
    assert show(PAIR | {"chosen": "What?"}) == ("1 pairs read, 1 identical, 0 kept", [])
    judged = [{"prompt": str(i), "completion": "x", "label": i == 0} for i in range(3)]
    first, rest = show(*judged)
    assert first == "3 answers read, 3 kept" and "==== answer 1, judged bad" in rest
    assert sum(line.endswith("judged bad") for line in rest) == rest.count("  rejected:") == 2
    assert show({"prompt": "a"}, {"prompt": ""}) == (
        "2 prompts read, 1 with an empty text, 1 kept", ["", "==== prompt 1", "  prompt:", "    a"]
    )  # fmt: skip
    assert show({"text": "a"}) == ("1 rows read, 1 kept", ["", "==== row 1", "  chosen:", "    a"])
    # A file without any answer has none to show.
    no_content = messages("Hi") + [{"role": "assistant", "content": None}]
    assert show({"chosen": no_content, "rejected": no_content}) == ("1 pairs read, 1 without a pair, 0 kept", [])


def test_look_at_a_file_on_a_terminal_that_cannot_show_it(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR | {"prompt": "\U0001f600"})
    done = subprocess.run(
        [sys.executable, "-m", "data", str(path)],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
    )
    assert done.returncode == 0 and b"    ?" in done.stdout and not done.stderr


# --- the real files ---


@real
def test_real_gsm8k():
    for split, count in (("train", 7473), ("test", 1319)):
        rows = load_rows(Path(REAL, "gsm8k", f"{split}.jsonl"))
        assert len(rows) == count
        assert all(r["answer"] and r["chosen"] and r["rejected"] is None for r in rows)


@real
def test_real_pairs_of_model_solutions():
    rows = load_rows(Path(REAL, "gsm8k", "example_model_solutions.jsonl"))
    kept, counts = clean_pairs(rows, letters, 10**9)
    assert counts == {"kept": 731, "identical": 0, "too long": 0, "empty": 0, "no pair": 588}
    # The pair that is closest in length was chosen: the median difference in length of all pairs is 70.
    gaps = sorted(abs(len(r["chosen"]) - len(r["rejected"])) for r in kept)
    assert gaps[len(gaps) // 2] == 28
    longer = sum(len(r["chosen"]) > len(r["rejected"]) for r in kept) / len(kept)
    assert round(longer, 2) == 0.53  # as the docstring of public._solutions says
    train, held = split_pairs(kept)
    assert (len(train), len(held)) == (577, 154)


@real
def test_real_hh():
    path = Path(REAL, "hh-rlhf", "harmless-base-test.jsonl.gz")
    rows = load_rows(path)
    _, counts = clean_pairs(rows, letters, 10**9)
    # In 5 dialogues one side has further turns. 4 chosen answers are blank.
    assert counts == {"kept": 2303, "identical": 0, "too long": 0, "empty": 4, "no pair": 5}
    # Prompt, mark and answer together are the published dialogue, so nothing was lost.
    squeeze = "".join
    lines = gzip.decompress(path.read_bytes()).splitlines()
    for line, r in zip(lines, rows, strict=True):
        if r["chosen"] is not None:
            for side in ("chosen", "rejected"):
                dialogue = f"{r['prompt']} Assistant: {r[side]}"
                assert squeeze(dialogue.split()) == squeeze(json.loads(line)[side].split())


@real
def test_real_ultrafeedback():
    for split, expected in (("train", (994, 4, 2)), ("eval", (199, 1, 0))):
        rows = load_rows(Path(REAL, "ultrafeedback", f"{split}.jsonl"))
        _, counts = clean_pairs(rows, letters, 10**9)
        assert (counts["kept"], counts["identical"], counts["empty"]) == expected
        assert counts["no pair"] == counts["too long"] == 0


@real
def test_real_model_solutions():
    rows = model_solutions(Path(REAL, "gsm8k", "example_model_solutions.jsonl"))
    assert len(rows) == 1319 and {len(said) for _, said, _ in rows} == {4}
    # The published marks agree with the final answers.
    for gold, said, marks in rows:
        assert {name: answer == gold for name, answer in said.items()} == marks
    accuracies = [sum(marks[name] for *_, marks in rows) / len(rows) for name in rows[0][1]]
    assert [round(100 * a, 1) for a in accuracies] == [21.7, 39.0, 34.7, 56.3]
