"""Tests of data/public.py: every published layout, damaged files, cleaning and splitting."""

import gzip
import json
import os
import random
import time
import types
from fractions import Fraction
from pathlib import Path

import pytest

from data.public import HUB, clean_pairs, load_rows, model_solutions, say_counts, split_pairs

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
    parquet.write_table(pa.Table.from_pylist([{"text": "a"}]), path)
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
        (GOOD + b"\n\xff\xfe", "line 2: not JSON"),
        (GOOD + b"\n" + b"[" * 200000, "line 2: not JSON"),
        (GOOD + b'\n{"prompt": ' + b"9" * 9999 + b"}", "line 2: not JSON"),
        (b"[" + GOOD + b"]", "line 1: list, not an object"),
        (GOOD + b"\nnull", "line 2: NoneType, not an object"),
        (b"{}", r"line 1: unknown columns \(none\)"),
        (
            b'{"text": "a", "label": 1}',
            r"unknown columns \(text, label\).*prompt \+ chosen \+ rejec",
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
        (
            b'{"question": "q", "answer": "no mark"}',
            "line 1: the gold answer 'no mark' is not a num",
        ),
        (
            b'{"question": "q", "answer": "#### many"}',
            "line 1: the gold answer 'many' is not a number",
        ),
        (b'{"question": 1, "answer": "#### 1"}', "'question' is int"),
        (b'{"question": "q", "ground_truth": "A: x"}', "gold answer 'x'"),
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
        with pytest.raises(ValueError, match="no split 'validation'; take one of train, test"):
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
        for split in ("train", "test"):
            assert load_rows(source, split) == [row(*PAIR.values())]
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("Anthropic/hh-rlhf", None, "train"),
        ("Anthropic/hh-rlhf", None, "test"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "test_prefs"),
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
    assert sum(counts.values()) == len(rows) and counts["kept"] == len(kept)
    assert all(n > 0 for n in counts.values())
    good = []
    for r in rows:
        t = [r["prompt"], r["chosen"], r["rejected"]]
        usable = all(x and x.strip() for x in t) and t[1] != t[2]
        if usable and max(len(t[0] + t[1]), len(t[0] + t[2])) <= 6:
            good.append(r)
    assert kept == good


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
    pair, other = row("a", "c", "r"), row("\ud83d", "c", "r")
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
