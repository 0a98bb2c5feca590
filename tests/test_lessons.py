"""Tests of data/lessons.py: the same kind of material from the embedded task and from a file."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import exits

from data import lessons, public, task, tool_task
from data.checker import is_correct


def options(data=None, seed=0, problems=None, max_tokens=512):
    return SimpleNamespace(data=data, seed=seed, problems=problems, max_tokens=max_tokens)


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
    of_file = lessons.demonstrations(options(write([pair(i) for i in range(60)]), problems=20), tok, 128, 50)
    assert (len(embedded.train), len(of_file.train)) == (50, 60)  # n counts for the task; a file is used as a whole
    for row in embedded.train + of_file.train:
        assert type(row["prompt"]) is type(row["chosen"]) is str
    assert not capsys.readouterr().out  # nothing was left out
    # Only the task has problems with answers to be tested on; they are of another split than the demonstrations.
    assert embedded.checked and embedded.problems == task.problems(20, 0, "test")
    assert not of_file.checked and of_file.problems == []
    demonstrated = [p for p, _ in task.demonstrations(50, 0)]
    assert [row["prompt"] for row in embedded.train] == [p.text for p in demonstrated]
    assert {task.split_of(p) for p in demonstrated} == {"train"}
    assert embedded == lessons.demonstrations(args, tok, 128, 50)
    assert embedded != lessons.demonstrations(options(problems=20, seed=1), tok, 128, 50)


def test_demonstrations_that_do_not_fit_are_counted(tok, write, capsys):
    short, long = pair(1), pair(2, 9)
    size = len(tok.prompt(long["prompt"])) + len(tok.answer(long["chosen"]))
    file = options(write([short, long]))
    assert len(lessons.demonstrations(file, tok, size, None).train) == 2
    found = lessons.demonstrations(file, tok, size - 1, None)
    assert [row["prompt"] for row in found.train] == [short["prompt"]]
    assert "1 of 2" in capsys.readouterr().out
    for source in (file, options(problems=5)):
        exits(lessons.demonstrations, source, tok, 5, 10, match="no demonstration that fits")


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
