"""Tests of data/lessons.py: the same kind of material from the embedded task and from a file."""

import itertools
import json
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers import exits

from data import lessons, public, task, tool_task
from data.checker import is_correct


def options(data=None, seed=0, problems=None, max_tokens=512, **more):
    return SimpleNamespace(data=data, seed=seed, problems=problems, max_tokens=max_tokens, **more)


@pytest.fixture
def write(tmp_path):
    """write(rows) -> the name of a file with these rows."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def pair(i, words=1, **more):
    return {"prompt": f"Leo has {i} eggs.", "chosen": "9+5=14. " * words, "rejected": "9+5=15. " * words, **more}


def solved(i):
    """A row of GSM8K's published model solutions, which has a gold answer."""
    solutions = {name: {"solution": f"A: {i + wrong}", "is_correct": not wrong} for name, wrong in (("a", 0), ("b", 1))}
    return {"question": f"Leo has {i} eggs.", "ground_truth": f"A: {i}", **solutions}


# --- running text ---


def test_running_text_is_a_function_of_seed_and_step(tok):
    rows = lessons.running_text(tok, 0, 3, 4, 33)
    assert rows.shape == (4, 33) and torch.equal(rows, lessons.running_text(tok, 0, 3, 4, 33))
    for other in (lessons.running_text(tok, 0, 4, 4, 33), lessons.running_text(tok, 1, 3, 4, 33)):
        assert not (rows == other).all(1).any()


@pytest.mark.parametrize("length", [9, 65])
def test_every_row_of_running_text_starts_with_a_text(tok, length):
    """A row holds consecutive texts of the corpus, cut at its end, and no text is in two rows."""
    texts = [text + "\n\n" for text in itertools.islice(tool_task.corpus("0 step 7"), 300)]
    start = 0
    for row in lessons.running_text(tok, 0, 7, 16, length):
        row = tok.decode(row.tolist())
        end = start + 1
        while len("".join(texts[start:end])) < len(row):
            end += 1
        assert "".join(texts[start:end]).startswith(row)
        start = end


# --- demonstrations ---


def test_demonstrations_of_the_task_and_of_a_file(tok, write, capsys):
    args = options(problems=20)
    embedded = lessons.demonstrations(args, tok, 128, 50)
    assert not capsys.readouterr().out  # nothing was left out
    demonstrations = [{"question": f"Leo has {i} eggs.", "answer": f"#### {i}"} for i in range(60)]
    of_file = lessons.demonstrations(options(write(demonstrations), problems=20), tok, 128, 50)
    printed = capsys.readouterr().out
    assert printed.endswith("rows.jsonl: 60 rows read, 14 held out for the later chapters, 46 kept\n")
    assert (len(embedded.train), len(of_file.train)) == (50, 46)  # n counts for the task; a file is used as a whole
    for row in embedded.train + of_file.train:
        assert type(row["prompt"]) is type(row["chosen"]) is str
    # Only the task has problems with answers to be tested on; they are of another split than the demonstrations.
    assert embedded.checked and embedded.problems == task.problems(20, 0, "test")
    assert not of_file.checked and of_file.problems == []
    demonstrated = [p for p, _ in task.demonstrations(50, 0)]
    assert [row["prompt"] for row in embedded.train] == [p.text for p in demonstrated]
    assert {task.split_of(p) for p in demonstrated} == {"train"}
    assert embedded == lessons.demonstrations(args, tok, 128, 50)
    assert embedded != lessons.demonstrations(options(problems=20, seed=1), tok, 128, 50)


def test_demonstrations_that_do_not_fit_are_counted(tok, write, capsys):
    short, long = ({"question": "Leo has 9 eggs.", "answer": "9+5=14. " * i + "#### 14"} for i in (1, 9))
    size = len(tok.prompt(long["question"])) + len(tok.answer(long["answer"]))
    file = options(write([short, long]))
    assert len(lessons.demonstrations(file, tok, size, None).train) == 2
    found = lessons.demonstrations(file, tok, size - 1, None)
    assert [row["chosen"] for row in found.train] == [short["answer"]]
    assert f"2 rows read, 1 too long for {size - 1} tokens, 1 kept" in capsys.readouterr().out
    for source in (file, options(problems=5)):
        exits(lessons.demonstrations, source, tok, 5, 10, match="no demonstration that fits")


def test_demonstrations_that_cannot_be_imitated_are_counted(tok, write, capsys):
    good = {"question": "Leo has 1 eggs.", "answer": "#### 1"}
    file = options(write([good, good | {"question": " \n"}, good | {"question": ""}]))
    found = lessons.demonstrations(file, tok, 128, None)
    assert [(row["prompt"], row["chosen"]) for row in found.train] == [("Leo has 1 eggs.", "#### 1")]
    assert "3 rows read, 2 with an empty text, 1 kept" in capsys.readouterr().out
    # Two rows with one prompt: nothing can be held out.
    found = lessons.demonstrations(options(write([pair(7) | {"chosen": " "}, pair(7)])), tok, 128, None)
    assert [row["chosen"] for row in found.train] == [pair(7)["chosen"]]
    assert "2 rows read, 1 with an empty text, 1 kept" in capsys.readouterr().out
    # The models of the second row were all correct, so it has no pair and no answer.
    unpaired = solved(1) | {"b": {"solution": "A: 1", "is_correct": True}}
    found = lessons.demonstrations(options(write([solved(1), unpaired])), tok, 128, None)
    assert [row["prompt"] for row in found.train] == ["Leo has 1 eggs."]
    assert "2 rows read, 1 without an answer, 1 kept" in capsys.readouterr().out
    exits(lessons.demonstrations, options(write([unpaired])), tok, 128, None, match="no demonstration that fits")


def test_far_too_long_demonstrations_are_not_encoded(write, capsys):
    """tiktoken panics on some texts of a million characters."""
    longest = 0

    def encode(text):
        nonlocal longest
        longest = max(longest, len(text))
        return list(text.encode())

    tok = SimpleNamespace(
        encode=encode, prompt=lambda text: [0, *encode(text), 1], answer=lambda text: [*encode(text), 2]
    )
    huge = "a" + " " * 10**6 + "b"
    rows = [pair(i) | {field: huge} for i in range(40) for field in ("prompt", "chosen", "rejected")]
    lessons.demonstrations(options(write([*rows, pair(41), pair(42)])), tok, 128, None)
    assert " too long for 128 tokens, " in capsys.readouterr().out
    assert 0 < longest <= 20 * 128 + 1000
    lessons.preferences(options(write([*rows, pair(41), pair(42)])), tok, 128)
    assert longest <= 20 * 128 + 1000


@pytest.mark.parametrize("n", [2, 3, 5, 60])
def test_what_dpo_holds_out_is_held_out_from_sft(tok, write, capsys, n):
    """The same seed gives the same split, in files of a few prompts too, and with rows that only one side can use."""
    for seed in range(20):
        rows = [pair(i, words) for i in range(n) for words in (1, 2)]
        rows += [pair(100 + i, 1 + i % 30) | {"rejected": pair(0)["chosen"]} for i in range(n)]  # some are identical
        args = options(write(rows), seed)
        room = 48  # some are too long
        sft = lessons.demonstrations(args, tok, room, None)
        printed = capsys.readouterr().out
        dpo = lessons.preferences(args, tok, room)
        assert sft.train and sft.held_out == []
        held_out, trained = ({r["prompt"] for r in part} for part in (dpo.held_out, sft.train))
        assert held_out and not held_out & trained
        assert {r["prompt"] for r in dpo.train} <= trained  # nothing more is held out
        assert " held out for the later chapters," in printed and f": {3 * n} rows read" in printed
        if n == 60:  # a pair that is too long in this context, or identical, is on the same side as in any other
            assert not {r["prompt"] for r in public.split_pairs(rows, seed=seed)[1]} & trained
    # A smaller limit of dpo.py keeps fewer pairs, and none of them changes its side.
    if n == 60:
        args.max_tokens = 24
        assert not {r["prompt"] for r in lessons.preferences(args, tok, room).held_out} & trained


def test_sft_has_what_dpo_trains_on_if_all_usable_prompts_would_be_held_out(tok, write):
    """Both usable prompts are below the limit of the split, and the others cannot be used by dpo.py."""
    usable = [pair(0) | {"prompt": f"prompt {i}"} for i in (1, 9)]
    blank = [pair(0) | {"prompt": f"prompt {i}", "rejected": " "} for i in range(20) if i not in (1, 9)]
    file = options(write(usable + blank))
    dpo = lessons.preferences(file, tok, 128)
    assert all(row in public.split_pairs(usable + blank)[1] for row in usable)
    trained = [row["prompt"] for row in lessons.demonstrations(file, tok, 128, None).train]
    assert dpo.train[0]["prompt"] in trained and dpo.held_out[0]["prompt"] not in trained


def test_one_prompt_cannot_be_split_and_is_trained_on(tok, write):
    """dpo.py refuses such a file, so nothing is held out from it."""
    assert len(lessons.demonstrations(options(write([pair(1), pair(1, 2)])), tok, 128, None).train) == 2
    # Three prompts, of which one has a usable pair.
    unusable = [pair(2) | {"chosen": " "}, pair(3) | {"prompt": ""}, pair(4) | {"rejected": ""}]
    for seed in range(10):
        found = lessons.demonstrations(options(write([pair(1), *unusable]), seed), tok, 128, None)
        assert [row["prompt"] for row in found.train] == ["Leo has 1 eggs.", "Leo has 4 eggs."]


# --- preferences ---


def test_preferences_of_the_task_and_of_a_file(tok, write):
    args = options(problems=20)
    embedded = lessons.preferences(args, tok, 512, 50, held_out=30)
    of_file = lessons.preferences(options(write([pair(i) for i in range(90)])), tok, 512, 50)
    assert [len(x) for x in (embedded.train, embedded.held_out, embedded.problems)] == [50, 30, 20]
    assert len(of_file.train) == 50
    for found in (embedded, of_file):
        rows = found.train + found.held_out
        assert all(row.keys() == {"prompt", "chosen", "rejected", "answer"} for row in rows)
        assert not {r["prompt"] for r in found.train} & {r["prompt"] for r in found.held_out}
        assert all(type(p.text) is str for p in found.problems)
        for prompt, chosen, rejected in lessons.encode_pairs(tok, rows):
            assert (prompt[0], prompt[-1]) == (tok.user, tok.assistant) and chosen[-1] == rejected[-1] == tok.end
    assert embedded.problems == task.problems(20, 0, "test")
    assert embedded == lessons.preferences(args, tok, 512, 50, held_out=30)
    assert embedded != lessons.preferences(options(problems=20, seed=1), tok, 512, 50, held_out=30)


def test_annotators(tok):
    """Careful ones label only correct against wrong; for the others length decides where correctness does not."""
    for annotator in ("careful", "length"):
        train = lessons.preferences(options(), tok, 512, 200, 1, annotator).train
        marks = [(is_correct(r["chosen"], r["answer"]), is_correct(r["rejected"], r["answer"])) for r in train]
        equal = [row for row, (better, worse) in zip(train, marks) if better == worse]
        assert (False, True) not in marks and bool(equal) == (annotator == "length")
        assert all(len(row["chosen"]) > len(row["rejected"]) for row in equal)


def test_of_a_large_source_a_random_part_is_held_out(write, tok, monkeypatch):
    """The prompts that are held out and not evaluated are not trained on either."""
    file = write([pair(i) for i in range(300)])
    whole = lessons.preferences(options(file), tok, 512)
    monkeypatch.setattr(lessons, "HELD_OUT", 10)
    part = lessons.preferences(options(file), tok, 512)
    assert len(whole.held_out) > 10 == len(part.held_out) and all(row in whole.held_out for row in part.held_out)
    assert part.held_out != whole.held_out[:10] and part.train == whole.train
    assert part.held_out == lessons.preferences(options(file), tok, 512).held_out
    assert part.held_out != lessons.preferences(options(file, seed=1), tok, 512).held_out


def test_n_limits_the_pairs_of_a_file_and_not_the_split(tok, write):
    """A random part of the file, a function of the seed. The held-out pairs are the same for every n."""
    file = write([pair(i) for i in range(60)])
    whole = lessons.preferences(options(file), tok, 512)
    part = lessons.preferences(options(file), tok, 512, 10)
    assert len(whole.train) + len(whole.held_out) == 60 and len(part.train) == 10 and part.held_out == whole.held_out
    assert all(row in whole.train for row in part.train) and part.train != whole.train[:10]
    assert part == lessons.preferences(options(file), tok, 512, 10)
    assert part.train != lessons.preferences(options(file, seed=1), tok, 512, 10).train


def test_pairs_that_do_not_fit_are_counted(tok, write, capsys):
    same = pair(3) | {"rejected": pair(3)["chosen"]}
    args = options(write([pair(1), pair(2), pair(4, 9), same]))
    args.max_tokens = size = len(tok.encode("Leo has 1 eggs.")) + len(tok.encode("9+5=14. ")) + public.TEMPLATE_TOKENS
    found = lessons.preferences(args, tok, 512)
    assert {row["prompt"] for row in found.train + found.held_out} == {"Leo has 1 eggs.", "Leo has 2 eggs."}
    printed = capsys.readouterr().out
    assert all(f"{n} {what}" in printed for n, what in ((4, "pairs"), (1, "identical"), (1, "too long"), (2, "kept")))
    args.max_tokens = 512
    assert lessons.preferences(args, tok, size).train == found.train  # the context of the model is a limit too
    args.max_tokens = size - 1
    exits(lessons.preferences, args, tok, 512, match="0 pairs")


def test_problems_of_a_file(tok, write):
    """With gold answers all held-out problems, or as many as --problems says; otherwise four prompts to be read. Only
    those that leave room for an answer."""
    for row_of, checked in ((solved, True), (pair, False)):
        file = write([row_of(i) for i in range(60)])
        found = lessons.preferences(options(file), tok, 512)
        assert found.checked == checked
        assert len(found.problems) == (len(found.held_out) if checked else 4)
        assert len(lessons.preferences(options(file, problems=3), tok, 512).problems) == (3 if checked else 4)
        if checked:
            assert all(p.text == f"Leo has {p.answer} eggs." for p in found.problems)
        room = len(tok.prompt(found.problems[0].text)) + lessons.REAL_ANSWER
        assert lessons.preferences(options(file), tok, room).problems
        assert not lessons.preferences(options(file), tok, room - 1).problems


# --- problems with gold numbers ---


def gold(i, **more):
    return {"question": f"Leo has {i} eggs.", "answer": f"{i}+1=<<{i}+1={i + 1}.0>>{i + 1}.\n#### {i + 1}", **more}


def test_problems_of_the_task(tok):
    """Exactly those that the chapters always had."""
    args = options(problems=20, max_tokens=48)
    found = lessons.problems(args, tok, 128, 50)
    assert (found.train, found.problems, found.checks) == (task.problems(50, 0), task.problems(20, 0, "test"), [])
    assert found.longest == 48 and found.styles == task.STYLES
    found = lessons.problems(args, tok, 128, 50, "verifier 0", checks=10)
    assert found.train == task.problems(50, "verifier 0") and found.checks == task.problems(10, 0, "valid")
    found = lessons.problems(args, tok, 128, 50, kind=tool_task)
    assert (found.train, found.problems) == (tool_task.problems(50, 0), tool_task.problems(20, 0, "test"))
    found = lessons.transcripts(options(problems=20, demos=50, plain=False), tok, 128)
    assert [r["chosen"] for r in found.train] == [tool_task.demonstrate(p) for p in tool_task.problems(50, 0)]
    assert found.problems == tool_task.problems(20, 0, "test")


def test_gold_problems_of_a_file(tok, write):
    """Problems have numbers as answers. None is both trained on and held out, in any chapter with the same seed; after
    all have been trained on, they come again in another order."""
    rows = [gold(i) for i in range(60)]
    for seed in range(5):
        args = options(write(rows), seed, problems=9, max_tokens=64)
        sft = {row["prompt"] for row in lessons.demonstrations(args, tok, 128, None).train}
        found = lessons.problems(args, tok, 128, 2 * len(sft))
        epochs = [p.text for p in found.train[: len(sft)]], [p.text for p in found.train[len(sft) :]]
        assert set(epochs[0]) == set(epochs[1]) == sft and epochs[0] != epochs[1]
        assert max(Counter(epochs[0]).values()) == 1
        held_out = {row["question"] for row in rows} - sft
        assert {p.text for p in found.problems} <= held_out and len(found.problems) == min(9, len(held_out))
        for p in found.train + found.problems:
            assert type(p.answer) is Fraction and p.text == f"Leo has {p.answer - 1} eggs." and "<<" in p.solution
        assert not found.styles and found.longest == 64
        assert found == lessons.problems(args, tok, 128, 2 * len(sft))
        # More problems to check with: all different, and both parts shrink if there are too few.
        args.problems = 40
        found = lessons.problems(args, tok, 128, 5, checks=20)
        texts = [p.text for p in found.problems + found.checks]
        assert set(texts) == held_out and len(texts) == len(held_out)
        assert len(found.problems) == len(held_out) * 40 // 60


def test_a_published_test_split_is_held_out(tok, monkeypatch):
    splits = {name: [{"prompt": f"{name} {i}", "chosen": f"#### {i}", "rejected": None, "answer": f"{i}"}
                     for i in range(9)] for name in ("train", "test")}  # fmt: skip
    monkeypatch.setattr(public, "load_rows", lambda source, split="train": splits[split])
    args = options("gsm8k", problems=50, max_tokens=64)
    found = lessons.problems(args, tok, 128, 9)
    assert {p.text for p in found.train} == {row["prompt"] for row in splits["train"]}
    assert {p.text for p in found.problems} == {row["prompt"] for row in splits["test"]}
    assert len(lessons.demonstrations(args, tok, 128, None).train) == 9


def test_gold_problems_that_cannot_be_used_are_counted(tok, write, capsys):
    """A question fits if it and the longest answer fit. What has no gold number is no problem."""
    long = gold(1) | {"question": "eggs " * 70}
    unsolved = {"prompt": "Leo has no eggs.", "chosen": "a", "rejected": "b"}
    args = options(write([*(gold(i) for i in range(30)), long, gold(1) | {"question": " "}]), problems=5, max_tokens=64)
    found = lessons.problems(args, tok, 128, 30)
    printed = capsys.readouterr().out
    assert "32 problems read, 1 with an empty text, 1 too long for 62 tokens, 30 kept" in printed
    assert all(len(tok.prompt(p.text)) + 64 <= 128 for p in found.train + found.problems)
    exits(lessons.problems, options(write([unsolved] * 9), problems=5), tok, 128, 9, match="no gold numbers")
    exits(lessons.problems, options(write([gold(1)] * 9), problems=5, max_tokens=9), tok, 128, 9, match="too few")
    exits(lessons.problems, options(write([gold(1), gold(2)]), problems=5, max_tokens=9), tok, 128, 9, "key", 5,
          match="too few")  # fmt: skip
    args.max_tokens = 126
    exits(lessons.problems, args, tok, 128, 9, match="--max_tokens 126 .* 128")


def test_transcripts_are_what_the_runtime_would_write(tok, write, capsys):
    assert lessons.transcript("5*.5=<<5*.5=2.50>>2.5, $<<1+1=2>>2.") == "5*.5=<<5*.5=2.5>>2.5, $<<1+1=2>>2."
    assert lessons.transcript("no calls") == "no calls"
    for wrong in ("<<2*3=7>>7", "<<1+1=2>>, <<2*x=6>>", "<<1/0=0>>", "<<6>>", "<<=>>"):
        assert lessons.transcript(wrong) is None
        assert lessons.transcript(f"a {wrong}", calls=False) in ("a 7", "a , ", "a 0", "a ")
    rows = [gold(i) for i in range(40)]
    rows += [gold(40 + i) | {"answer": "<<2*3=7>>7\n#### 7"} for i in range(10)]
    args = options(write(rows), problems=50, max_tokens=64, plain=False)
    held_out = {p.text for p in lessons.problems(args, tok, 128, 1).problems}
    left = [row["question"] for row in rows if row["question"] not in held_out]
    wrong = sum(row["question"] in left for row in rows[40:])
    capsys.readouterr()
    found = lessons.transcripts(args, tok, 128)
    printed = capsys.readouterr().out
    assert f"{wrong}  another number" in printed and f"{len(left)} solutions read, {wrong} without an answer" in printed
    assert [row["prompt"] for row in found.train] == left[:-wrong]
    for row in found.train:
        n = int(row["prompt"].split()[2])
        assert row["chosen"] == f"{n}+1=<<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"
    args.plain = True
    assert not any("<<" in row["chosen"] for row in lessons.transcripts(args, tok, 128).train)
    numbers = [{"prompt": f"{i}?", "answer": i} for i in range(40)]
    exits(lessons.transcripts, options(write(numbers), problems=5, max_tokens=64, plain=False), tok, 128,
          match="no worked solution")  # fmt: skip
