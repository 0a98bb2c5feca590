"""reasoning.py: hand values, brute force and properties of the verifier's loss and of every way to choose."""

import json
import math
import os
import random
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
import torch

import gpt
import reasoning
from data import task

REAL = os.environ.get("REAL_DATA_DIR")


@pytest.fixture(scope="module")
def tok():
    return gpt.Tokenizer("task")


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    config = gpt.GPTConfig(tok.vocab_size, n_layer=2, n_head=2, n_embd=32, chat=True)
    model = gpt.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform: the likeliest token is not a matter of rounding
    return model.requires_grad_(False)


# --- the verifier ---


def test_verifier_loss_by_hand():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    right = torch.tensor([True, False])
    sigma = [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2)), 0.5, 1 - 1 / (1 + math.exp(1))]
    expected = -sum(map(math.log, sigma)) / 5
    assert reasoning.verifier_loss(scores, mask, right).item() == pytest.approx(expected, abs=1e-6)
    zero = reasoning.verifier_loss(torch.zeros(2, 3), mask, right)
    assert zero.item() == pytest.approx(math.log(2), abs=1e-6)


def test_verifier_loss_pushes_right_up_and_wrong_down_and_leaves_padding_alone():
    scores = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    reasoning.verifier_loss(scores, mask, torch.tensor([True, False])).backward()
    # Half a nat a state, over six states; descending the gradient raises row 0 and lowers row 1.
    expected = torch.tensor([[-1 / 12] * 2 + [0] * 2, [1 / 12] * 4])
    torch.testing.assert_close(scores.grad, expected)


def test_last_only_is_the_state_after_the_end_token():
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True] + [False] * 4])
    assert reasoning.last_only(mask).nonzero().tolist() == [[0, 2], [1, 4], [2, 0]]


def test_quality_by_hand():
    scores = torch.tensor([2.0, 1.0, -1.0, 3.0, -2.0])
    right = torch.tensor([True, True, True, False, False])
    found = reasoning.quality(scores, right)
    assert found == pytest.approx(
        {"held_out": 3 / 5, "sensitivity": 2 / 3, "specificity": 1 / 2, "precision": 2 / 3, "fooled": 1 / 5}
    )


def test_nine_times_in_ten_is_not_much_where_right_answers_are_rare():
    assert reasoning.precision_at(0.05, 0.9, 0.9) == pytest.approx(0.3214, abs=1e-4)
    assert reasoning.precision_at(0.5, 0.9, 0.9) == pytest.approx(0.9)
    assert reasoning.precision_at(0.0, 0.9, 1.0) == 0  # nothing accepted: no 0/0
    # The same number by counting, on random verdicts.
    generator = gpt.rng(0)
    scores, right = torch.randn(5000, generator=generator), torch.rand(5000, generator=generator) < 0.2
    q = reasoning.quality(scores, right)
    base = right.float().mean().item()
    counted = reasoning.precision_at(base, q["sensitivity"], q["specificity"])
    assert counted == pytest.approx(q["precision"], abs=1e-6)


# --- ways to choose ---


def test_majority():
    assert reasoning.majority([3, 5, None, 5]) == 5
    assert reasoning.majority([7, 3, 3, 7]) == 7  # a tie: the earliest
    assert reasoning.majority([None, None, None, 2]) == 2  # failures have no vote
    assert reasoning.majority([None, None]) is None and reasoning.majority([]) is None
    assert reasoning.majority([Fraction(18), 3, 18]) == 18  # numbers, not spellings
    assert reasoning.majority([1, 1, 2], weights=[0.2, 0.2, 0.5]) == 2


def test_the_top_one_is_best_of_n_and_the_top_n_is_the_vote():
    rng = random.Random(0)
    for _ in range(300):
        answers = [rng.choice([None, 1, 2, 3]) for _ in range(9)]
        scores = [rng.random() for _ in answers]
        best = answers[reasoning.best_of(scores)]
        assert reasoning.vote_of_top(answers, scores, 1) == best
        counts = Counter(a for a in answers if a is not None).most_common()
        if len(counts) == 1 or counts[0][1] > counts[1][1]:  # no tie
            assert reasoning.vote_of_top(answers, scores, 9) == reasoning.majority(answers) == counts[0][0]
    assert [reasoning.top(n) for n in (1, 2, 4, 7, 8, 256)] == [1, 1, 1, 1, 2, 64]


def by_hand(n, golds, answers, scores):
    """choose_among, block by block, written out a second time."""
    rows = []
    for gold, said, score in zip(golds, answers, scores):
        for start in range(0, len(said), n):
            if start + n > len(said):
                break
            block = list(range(start, start + n))
            votes, weights = {}, {}
            for i in block:
                if said[i] is not None:
                    votes[said[i]] = votes.get(said[i], 0) + 1
                    weights[said[i]] = weights.get(said[i], 0) + torch.sigmoid(torch.tensor(score[i])).item()
            best = sorted(block, key=lambda i: (-score[i], i))[0]
            vote = sorted(votes, key=lambda a: (-votes[a], said.index(a, start)))[:1]
            weighted = sorted(weights, key=lambda a: -weights[a])[:1]
            rows.append((said[best] == gold, vote == [gold], weighted == [gold], score[best]))
    return [sum(column) / len(rows) for column in zip(*rows)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_choose_among_by_brute_force(n):
    rng = random.Random(n)
    golds = [rng.choice([1, 2]) for _ in range(20)]
    answers = [[rng.choice([None, 1, 1, 2, 3]) for _ in range(8)] for _ in golds]
    scores = [[rng.gauss(0, 2) for _ in range(8)] for _ in golds]
    lengths = [[rng.randint(3, 9) for _ in range(8)] for _ in golds]
    found = reasoning.choose_among(n, golds, answers, scores, lengths)
    names = ("best_of_n", "vote", "weighted_vote", "score")
    assert [found[name] for name in names] == pytest.approx(by_hand(n, golds, answers, scores))
    assert (found["best_a"] + found["best_b"]) / 2 == pytest.approx(found["best_of_n"])
    # pass@n: over all subsets of n of the 8.
    hits = [any(s) for g, said in zip(golds, answers) for s in combinations([a == g for a in said], n)]
    assert found["oracle"] == pytest.approx(sum(hits) / len(hits))
    if n == 1:
        share = sum(a == g for g, said in zip(golds, answers) for a in said) / 160
        one = ("vote", "vote_of_top", "weighted_vote", "best_of_n", "oracle")
        assert [found[name] for name in one] == pytest.approx([share] * 5)
    for name in ("vote", "vote_of_top", "weighted_vote", "best_of_n"):
        assert found[name] <= 1 and (n < 8 or found[name] <= found["oracle"] + 1e-9)


def test_a_share_h_of_fakes_turns_best_of_n_around_near_one_in_h():
    """Answers that are right (score 0 to 1), wrong (below 0), or fakes (wrong, above 1), in known shares:
    best of n is right if there is a right one and no fake. It peaks near 1/h, then falls to nothing."""
    rng, h, p, n = random.Random(0), 1 / 32, 0.4, 512
    golds = [1] * 60
    kinds = [rng.choices("rwf", [p, 1 - p - h, h], k=n) for _ in golds]
    answers = [[1 if kind == "r" else 2 for kind in row] for row in kinds]
    low = {"r": 0, "w": -1, "f": 1}
    scores = [[low[kind] + rng.random() for kind in row] for row in kinds]
    right = {}
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        found = reasoning.choose_among(size, golds, answers, scores, [[1] * n] * len(golds))
        right[size] = found["best_of_n"]
        expected = (1 - h) ** size - (1 - h - p) ** size
        assert right[size] == pytest.approx(expected, abs=4 * math.sqrt(0.25 * size / (n * len(golds))))
        assert found["tokens"] == size
    assert 1 / h / 8 <= max(right, key=right.get) <= 1 / h
    assert right[512] < right[1] / 4


# --- answers, scores, revisions ---


def test_answers_and_scores_belong_to_their_problems(tok, model, monkeypatch):
    """Scores are those of the generated ids, problem by problem, although equal texts are read once."""
    problems = task.problems(3, 0)
    groups = reasoning.answer_often(model, tok, problems, 5, 12, 0, "test")
    assert [len(group) for group in groups] == [5, 5, 5]
    again = reasoning.answer_often(model, tok, problems, 5, 12, 0, "test")
    assert [[a.ids for a in g] for g in groups] == [[a.ids for a in g] for g in again]
    groups[1][3] = groups[1][0]
    torch.manual_seed(1)
    scorer = gpt.Scorer(model)
    read = []
    scores_of = gpt.completion_scores
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
    revisions = reasoning.revise(model, tok, problems, drafts, 12)
    for problem, draft, revision in zip(problems, drafts, revisions):
        at = int(draft.logps.argmin())
        assert revision.ids[:at] == draft.ids[:at] and len(revision.logps) == len(revision.ids)
        context = torch.tensor([tok.prompt(problem.text) + draft.ids[:at]])
        assert revision.ids[at] == model(context)[0, -1].argmax()
        assert torch.equal(revision.logps[:at], draft.logps[:at])
        assert revision.ended == (revision.ids[-1] == tok.end)


# --- real data ---


def write_solutions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def solution(text, right):
    return {"solution": text, "is_correct": right}


def test_published_by_hand(tmp_path, capsys):
    rows = [
        {"question": "?", "ground_truth": "A: 18", "small": solution("A: 17", False),
         "large": solution("A: 18", True), "other": solution("A: 18.0", True)},
        {"question": "!", "ground_truth": "A: 3", "small": solution("A: 3", True),
         "large": solution("A: 4", False), "other": solution("A: 4", False)},
        {"question": ".", "ground_truth": "A: 5", "small": solution("no idea", False),
         "large": solution("A: 6", False), "other": solution("A: 5", False)},
    ]  # fmt: skip
    reasoning.published(write_solutions(tmp_path / "solutions.jsonl", rows))
    printed = capsys.readouterr().out
    assert "3 problems, 3 models" in printed and "agrees with 8 of 9" in printed
    shares = {
        line.split("  ")[1].strip(): line.split("%")[0].split()[-1] for line in printed.splitlines()[2:]
    }
    assert shares == {"small": "33.3", "large": "33.3", "other": "66.7", "majority vote": "33.3",
                      "oracle": "100.0"}  # fmt: skip


def test_a_file_without_solutions_is_refused_in_one_line(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(SystemExit, match="no published solutions"):
        reasoning.published(write_solutions(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(SystemExit, match="nowhere.jsonl"):
        reasoning.published(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
def test_published_on_the_real_file(capsys):
    """Shares of right answers as published with the data set: 21.7, 39.0, 34.7 and 56.3 %."""
    reasoning.published(str(Path(REAL) / "gsm8k" / "example_model_solutions.jsonl"))
    printed = capsys.readouterr().out
    assert "1319 problems, 4 models" in printed
    for share in ("21.7%", "39.0%", "34.7%", "56.3%"):
        assert share in printed
