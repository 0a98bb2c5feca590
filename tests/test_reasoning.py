"""Tests of reasoning.py: the verifier's loss and every way of selecting, by hand, by brute force and by property."""

import itertools
import json
import math
import os
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import exits, random_model

import gpt
import reasoning
from data import task
from data.runs import rng

REAL = os.environ.get("REAL_DATA_DIR")


@pytest.fixture(scope="module")
def model(tok):
    return random_model(vocab_size=tok.vocab_size, block_size=128)


# --- the verifier ---


def test_verifier_loss_by_hand():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    correct = torch.tensor([True, False])
    loss = reasoning.verifier_loss(scores, mask, correct)
    sigma = [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2)), 0.5, 1 - 1 / (1 + math.exp(1))]
    assert loss.item() == pytest.approx(-sum(map(math.log, sigma)) / 5, abs=1e-6)
    loss.backward()  # descending raises the scores of correct answers, lowers the others, and leaves padding alone
    assert (scores.grad.sign() == torch.tensor([[-1, -1, -1], [1, 1, 0]])).all()
    zero = reasoning.verifier_loss(torch.zeros(2, 3), mask, correct)
    assert zero.item() == pytest.approx(math.log(2), abs=1e-6)


def test_last_only_is_the_state_after_the_end_token():
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True] + [False] * 4])
    assert reasoning.last_only(mask).nonzero().tolist() == [[0, 2], [1, 4], [2, 0]]


def test_quality_by_hand():
    scores = torch.tensor([2.0, 1.0, -1.0, 3.0, -2.0])
    found = reasoning.quality(scores, torch.tensor([True, True, True, False, False]))
    assert list(found.values()) == pytest.approx([3 / 5, 2 / 3, 1 / 2, 2 / 3, 1 / 5])
    assert list(found) == ["verifier_accuracy", "sensitivity", "specificity", "precision", "fooled"]


def test_precision_by_bayes_rule():
    assert reasoning.precision_at(0.05, 0.9, 0.9) == pytest.approx(0.3214, abs=1e-4)
    assert reasoning.precision_at(0.0, 0.9, 1.0) == 0  # nothing accepted: no 0/0
    # The same number by counting, on random scores.
    scores, correct = torch.randn(5000, generator=rng(0)), torch.rand(5000, generator=rng(1)) < 0.2
    q = reasoning.quality(scores, correct)
    counted = reasoning.precision_at(correct.float().mean().item(), q["sensitivity"], q["specificity"])
    assert counted == pytest.approx(q["precision"], abs=1e-6)


# --- ways of selecting ---


def test_majority():
    assert reasoning.majority([3, 5, None, 5]) == 5
    assert reasoning.majority([7, 3, 3, 7]) == 7  # a tie: the earliest
    assert reasoning.majority([None, None, None, 2]) == 2  # unreadable answers have no vote
    assert reasoning.majority([None, None]) is None and reasoning.majority([]) is None
    assert reasoning.majority([Fraction(18), 3, 18]) == 18  # compared as numbers
    assert reasoning.majority([1, 1, 2], weights=[0.2, 0.2, 0.5]) == 2


def test_the_top_one_is_best_of_n_and_the_top_n_is_the_vote():
    source = random.Random(0)
    for _ in range(300):
        answers = [source.choice([None, 1, 2, 3]) for _ in range(9)]
        scores = [source.random() for _ in answers]
        assert reasoning.vote_of_top(answers, scores, 1) == answers[reasoning.best_of(scores)]
        counts = Counter(a for a in answers if a is not None).most_common()
        if len(counts) == 1 or counts[0][1] > counts[1][1]:  # no tie
            assert reasoning.vote_of_top(answers, scores, 9) == reasoning.majority(answers) == counts[0][0]
    assert [reasoning.top(n) for n in (1, 2, 4, 7, 8, 256)] == [1, 1, 1, 1, 2, 64]


def by_hand(n, golds, answers, scores):
    """reasoning.select, block by block, written a second time."""
    rows = []
    for gold, said, score in zip(golds, answers, scores):
        for start in range(0, len(said) // n * n, n):
            block = range(start, start + n)
            votes, weights = Counter(), Counter()
            for i in block:
                if said[i] is not None:
                    votes[said[i]] += 1
                    weights[said[i]] += torch.sigmoid(torch.tensor(score[i])).item()
            best = min(block, key=lambda i: (-score[i], i))
            vote = sorted(votes, key=lambda a: (-votes[a], said.index(a, start)))[:1]
            weighted = sorted(weights, key=lambda a: -weights[a])[:1]
            rows.append((said[best] == gold, vote == [gold], weighted == [gold], score[best]))
    return [sum(column) / len(rows) for column in zip(*rows)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_select_by_brute_force(n):
    source = random.Random(n)
    golds = [source.choice([1, 2]) for _ in range(20)]
    answers = [[source.choice([None, 1, 1, 2, 3]) for _ in range(8)] for _ in golds]
    scores = [[source.gauss(0, 2) for _ in range(8)] for _ in golds]
    found = reasoning.select(n, golds, answers, scores, [[3] * 8] * 20)
    names = ("best_of_n", "vote", "weighted_vote", "score", "tokens")
    assert [found[name] for name in names] == pytest.approx(by_hand(n, golds, answers, scores) + [3 * n])
    assert (found["best_a"] + found["best_b"]) / 2 == pytest.approx(found["best_of_n"])
    # pass@n: over all subsets of n of the 8.
    hits = [any(s) for g, said in zip(golds, answers) for s in itertools.combinations([a == g for a in said], n)]
    assert found["oracle"] == pytest.approx(sum(hits) / len(hits))
    ways = [found[way] for way in ("vote", "vote_of_top", "weighted_vote", "best_of_n")]
    if n == 1:  # nothing to select from
        assert [*ways, found["oracle"]] == pytest.approx([sum(hits) / len(hits)] * 5)
    assert n < 8 or max(ways) <= found["oracle"] + 1e-9


def test_best_of_n_turns_around_near_one_in_h():
    """Answers that are correct (score 0 to 1), wrong (below 0), or accepted and wrong (above 1), in known fractions.
    Best of n is correct if there is a correct answer and none of the last kind. It peaks near 1/h, then falls."""
    source, h, p, n = random.Random(0), 1 / 32, 0.4, 512
    kinds = [source.choices([(1, 0), (2, -1), (2, 1)], [p, 1 - p - h, h], k=n) for _ in range(60)]
    answers = [[answer for answer, _ in row] for row in kinds]
    scores = [[low + source.random() for _, low in row] for row in kinds]
    correct = {}
    for size in [2**i for i in range(10)]:
        correct[size] = reasoning.select(size, [1] * 60, answers, scores, [[1] * n] * 60)["best_of_n"]
        expected = (1 - h) ** size - (1 - h - p) ** size
        assert correct[size] == pytest.approx(expected, abs=4 * math.sqrt(0.25 * size / (n * 60)))
    assert 1 / h / 8 <= max(correct, key=correct.get) <= 1 / h
    assert correct[512] < correct[1] / 4


# --- answers, scores, revisions ---


def test_answers_and_scores_belong_to_their_problems(tok, model, monkeypatch):
    """Scores are those of the generated ids, problem by problem, although equal answers are scored once."""
    problems = task.problems(3, 0)
    groups = reasoning.answer_often(model, tok, problems, 5, 12, 0, "test")
    assert [len(group) for group in groups] == [5, 5, 5]
    again = reasoning.answer_often(model, tok, problems, 5, 12, 0, "test")
    assert [[a.ids for a in g] for g in groups] == [[a.ids for a in g] for g in again]
    groups[1][3] = groups[1][0]
    torch.manual_seed(1)
    scorer, read, scores_of = gpt.Scorer(model), [], gpt.completion_scores
    monkeypatch.setattr(gpt, "completion_scores", lambda s, p, c: read.extend(c) or scores_of(s, p, c))
    scores = reasoning.score_all(scorer, tok, problems, groups)
    assert len(read) == sum(len({tuple(a.ids) for a in group}) for group in groups) < 15
    for problem, group, some in zip(problems, groups, scores):
        for answer, score in zip(group, some):
            alone, mask = scores_of(scorer, [tok.prompt(problem.text)], [answer.ids])
            assert score == pytest.approx(alone[0, mask.sum() - 1].item(), abs=1e-4)


def test_revisions_start_at_the_least_likely_token(tok, model):
    problems = task.problems(6, 0)
    drafts = [g[0] for g in reasoning.answer_often(model, tok, problems, 1, 12, 0, "drafts")]
    for problem, draft, revision in zip(problems, drafts, reasoning.revise(model, tok, problems, drafts, rng(0), 12)):
        at = int(draft.logps.argmin())
        assert revision.ids[:at] == draft.ids[:at] and len(revision.logps) == len(revision.ids)
        context = torch.tensor([tok.prompt(problem.text) + draft.ids[:at]])
        logps = model(context)[0, -1].log_softmax(-1)
        assert revision.logps[at].item() == pytest.approx(logps[revision.ids[at]].item(), abs=1e-4)
        assert torch.equal(revision.logps[:at], draft.logps[:at])
        assert revision.ended == (revision.ids[-1] == tok.end)


@pytest.mark.parametrize("name", [None, "self_correct"])
def test_who_judges_the_revisions(monkeypatch, name):
    """The verifier's score decides, in every round; under self_correct each revision is accepted."""
    score = {"draft": [0.0, 1.0, 0.0, 1.0], 0: [1.0, 0.0, 1.0, 0.0], 1: [2.0, 2.0, 0.5, 0.0], 2: [0.0, 0.0, 0.0, 3.0]}
    correct = {"draft": [True, False, True, False], 0: [False, True, True, False], 1: [False, True, False, True]}
    correct[2] = [True, False, False, False]
    answers = {n: [SimpleNamespace(correct=c, score=s) for c, s in zip(correct[n], score[n])] for n in score}
    made = iter([answers[0], answers[1], answers[2]])
    monkeypatch.setattr(reasoning, "revise", lambda *_: next(made))
    monkeypatch.setattr(reasoning, "score_all", lambda _, __, ___, groups: [[a.score for a in g] for g in groups])
    args = SimpleNamespace(break_=name, max_tokens=9, seed=0)
    found = reasoning.revisions(args, None, None, None, [], answers["draft"])
    # By score: the second revision, the second, the first, the third. Otherwise the third everywhere.
    revised, repaired, spoiled = (1 / 4, 0, 1 / 4) if name else (2 / 4, 1 / 4, 1 / 4)
    assert found == {"draft": 1 / 2, "revised": revised, "repaired": repaired, "spoiled": spoiled}


def test_pairs_ranked():
    """Three pairs in the first group, all ranked right; none in the second; a tie is not won."""
    scores, correct = [[3, 1, 0, 2], [5, 6], [1, 1]], [[True, False, False, False], [True, True], [True, False]]
    assert reasoning.pairs_ranked(scores, correct) == 3 / 4
    assert reasoning.pairs_ranked([[1, 2]], [[True, False]]) == 0 and reasoning.pairs_ranked([[1]], [[True]]) == 0


def test_fine_tuning_loss_is_read_from_the_run_that_made_the_model(tmp_path):
    assert reasoning.fine_tuning_loss(tmp_path / "model") == {}
    lines = [{"step": s, "loss": float(s)} for s in range(10)] + [{"step": 10, "accuracy_sampled": 0.5}]
    write(tmp_path / "metrics.jsonl", lines)
    assert reasoning.fine_tuning_loss(tmp_path / "model") == {"sft_loss": 8.5, "sft_loss_before": 6.5}


# --- real data ---


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def accuracies(printed):
    """{name: percent} of the printed lines."""
    found = re.findall(r"^ +(\S.*?) +([\d.]+)%", printed, re.MULTILINE)
    return {name: float(percent) for name, percent in found}


def test_published_by_hand(tmp_path, capsys):
    def row(gold, **models):
        marked = {name: {"solution": text, "is_correct": mark} for name, (text, mark) in models.items()}
        return {"question": "?", "ground_truth": gold, **marked}

    rows = [
        row("A: 18", small=("A: 17", False), large=("A: 18", True), other=("A: 18.0", True)),
        row("A: 3", small=("A: 3", True), large=("A: 4", False), other=("A: 4", False)),
        row("A: 5", small=("no idea", False), large=("A: 6", False), other=("A: 5", False)),  # the last mark is wrong
    ]
    reasoning.published(write(tmp_path / "solutions.jsonl", rows))
    printed = capsys.readouterr().out
    assert "3 problems, 3 models" in printed and "8 of 9" in printed
    expected = {"small": 33.3, "large": 33.3, "other": 66.7, "majority vote": 33.3, "oracle": 100.0}
    assert accuracies(printed) == expected


def test_a_file_without_solutions_is_refused_in_one_line(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    exits(reasoning.published, pairs, match="pairs.jsonl")
    exits(reasoning.published, str(tmp_path / "nowhere.jsonl"), match="nowhere.jsonl")


@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
def test_published_on_the_real_file(capsys):
    """The accuracies that were published with the data set."""
    reasoning.published(str(Path(REAL) / "gsm8k" / "example_model_solutions.jsonl"))
    printed = capsys.readouterr().out
    assert "1319 problems, 4 models" in printed and {21.7, 39.0, 34.7, 56.3} <= set(accuracies(printed).values())
