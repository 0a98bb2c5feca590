"""Tests of reward_model.py, ppo.py and grpo.py: numbers by hand, brute force, equality with TRL.

The losses of grpo.py and reward_model.py are compared with TRL's trainers. TRL 1.16 has no PPO any more
(nor its GAE and whitening), so ppo.py stands on numbers worked by hand and on brute force, and its policy
loss on being equal to grpo.py's. And gpt.py's part in the three: the Scorer and everything that reads a
score or a value.
"""

import inspect
import itertools
import json
import math
import random
import re
import statistics
from collections import defaultdict
from types import SimpleNamespace

import numpy
import pytest
import torch
from test_losses import V, random_model, random_pairs, right_padded, trl_trainer

import gpt
import grpo
import ppo
import reward_model
from data import task
from data.checker import is_right, last_answer, miscalculates

LN2 = math.log(2)


def draw(*shape, key="rl", scale=1.0):
    return torch.randn(*shape, generator=gpt.rng(key, shape)) * scale


def random_mask(B, N, key="mask"):
    """Answers of every length from 1 to N: (B, N) bool."""
    lengths = torch.randint(1, N + 1, (B,), generator=gpt.rng(key))
    lengths[0], lengths[-1] = 1, N
    return torch.arange(N) < lengths[:, None]


def random_scorer(seed=0):
    """A reward model with sharp scores, and a zero and a unit of its own."""
    scorer = gpt.Scorer(random_model(seed))
    scorer.mean, scorer.std = 0.7, 1.9
    return scorer.requires_grad_(False)


def close(a, b, bound=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= bound, (a - b).abs().max()


def one_line(error):
    assert isinstance(error.value.code, str) and "\n" not in error.value.code


# --- gpt.Scorer ---


def scores_by_hand(scorer, prompt, completion):
    """Each state alone: no batch, no padding, and nothing behind the token that is read."""
    found = []
    for t in range(len(completion) + 1):
        hidden = scorer.transformer.hidden(torch.tensor([prompt + completion[:t]]))[0, -1]
        raw = sum((h * w).item() for h, w in zip(hidden, scorer.score.weight[0]))
        found.append((raw - scorer.mean) / scorer.std)
    return found


def test_completion_scores_by_brute_force():
    """Column t is the score of prompt and first t tokens. One off, and the score of an answer is read
    before its end token, which is the first place from which the whole answer is in sight."""
    scorer, (prompts, answers, _) = random_scorer(), random_pairs(9, seed=20)
    scores, mask = gpt.completion_scores(scorer, prompts, answers)
    assert scores.shape == mask.shape == (9, max(map(len, answers)) + 1)
    final = gpt.final_scores(scorer, prompts, answers)
    for row, (p, c) in enumerate(zip(prompts, answers)):
        expected = scores_by_hand(scorer, p, c)
        assert mask[row].tolist() == [t <= len(c) for t in range(mask.shape[1])]
        assert scores[row][mask[row]].tolist() == pytest.approx(expected, abs=1e-4)
        assert (scores[row][~mask[row]] == 0).all()
        assert final[row].item() == pytest.approx(expected[-1], abs=1e-4)
    assert scores[mask].std() > 0.3  # equality of nearly equal numbers would be no news


def test_scores_do_not_know_their_neighbours():
    """A long neighbour makes the batch longer, and final_scores cuts into batches: no score may change."""
    scorer, (prompts, answers, _) = random_scorer(1), random_pairs(7, seed=21)
    scores, mask = gpt.completion_scores(scorer, prompts, answers)
    more, more_mask = gpt.completion_scores(scorer, [*prompts, [1] * 8], [*answers, [2] * 16])
    width = mask.shape[1]
    close(more[:7, :width], scores)
    assert torch.equal(more_mask[:7, :width], mask) and not more_mask[:7, width:].any()
    final = gpt.final_scores(scorer, prompts, answers)
    for batch in (1, 3, 7):
        close(gpt.final_scores(scorer, prompts, answers, batch), final)
    order = [4, 0, 6, 2, 1, 5, 3]
    moved = gpt.final_scores(scorer, [prompts[i] for i in order], [answers[i] for i in order])
    close(moved, final[order])


def test_scores_have_a_gradient():
    """evaluate() and learned_reward() switch it off; the reward model learns through the same function."""
    scorer, (prompts, answers, _) = random_scorer().requires_grad_(), random_pairs(3, seed=22)
    gpt.final_scores(scorer, prompts, answers).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scorer.parameters())
    assert scorer.score.weight.grad.abs().max() > 0 and scorer.transformer.wte.weight.grad.abs().max() > 0


def test_a_new_scorer_gives_scores_of_size_1():
    """The head's weights have standard deviation 1 / sqrt(width + 1), so that training starts with scores
    of a usual size whatever the width."""
    for width in (32, 256):
        torch.manual_seed(0)
        config = gpt.GPTConfig(vocab_size=V, block_size=24, n_layer=1, n_head=2, n_embd=width)
        scorers = [gpt.Scorer(gpt.GPT(config))]
        scorers += [gpt.Scorer(scorers[0].transformer) for _ in range(300)]
        hidden = scorers[0].transformer.hidden(torch.arange(20)[None])[0, -1]
        scores = torch.stack([(scorer.score.weight[0] * hidden).sum() for scorer in scorers])
        assert 0.8 < scores.std() < 1.2
        assert (scorers[0].mean, scorers[0].std) == (0.0, 1.0)
        assert scorers[0](hidden).item() == pytest.approx(scores[0].item(), abs=1e-5)


def test_transformers_opens_a_saved_scorer(tmp_path):
    """GPT2ForSequenceClassification reads at the last token that is no pad, which is our last token, in a
    batch padded on the right. It knows nothing of our zero and unit: its scores are the raw ones."""
    transformers = pytest.importorskip("transformers")
    scorer, (prompts, answers, _) = random_scorer(2), random_pairs(8, seed=23)
    pad, end = V - 1, V - 2  # as save_model says in config.json, and as the tokenizer has them
    prompts = [[min(i, end - 1) for i in p] for p in prompts]
    answers = [[min(i, end - 1) for i in a] + [end] for a in answers]
    gpt.save_model(scorer, tmp_path / "rm")
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert theirs.config.pad_token_id == pad and theirs.config.num_labels == 1
    ids, _, seen = right_padded(prompts, answers)
    ids = ids.masked_fill(seen == 0, pad)
    with torch.no_grad():
        found = theirs(ids, attention_mask=seen).logits
    assert found.shape == (8, 1)
    raw = gpt.final_scores(scorer, prompts, answers) * scorer.std + scorer.mean
    close(found[:, 0], raw, 1e-4)
    assert raw.std() > 0.3


def test_saved_scorer_comes_back(tmp_path):
    """With its zero and its unit: a reward model without them is another reward."""
    scorer, (prompts, answers, _) = random_scorer(3), random_pairs(5, seed=24)
    gpt.save_model(scorer, tmp_path / "model")
    again = gpt.load_scorer(str(tmp_path / "model"))
    assert (again.mean, again.std) == (0.7, 1.9) and isinstance(again, gpt.Scorer)
    scores = gpt.final_scores(scorer, prompts, answers)
    assert torch.equal(gpt.final_scores(again, prompts, answers), scores)
    # The folder of a run: its model is meant.
    (tmp_path / "report.json").write_text("{}")
    again = gpt.load_scorer(str(tmp_path))
    assert torch.equal(gpt.final_scores(again, prompts, answers), scores)
    # It is no language model any more, although there is one inside.
    with pytest.raises(SystemExit, match="cannot write"):
        gpt.load_model(str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_load_scorer_of_something_else_is_one_line(tmp_path):
    gpt.save_model(random_model(), tmp_path / "language")
    gpt.save_model(random_scorer(), tmp_path / "broken")
    weights = (tmp_path / "broken" / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for folder, words in (
        ("language", "is a language model: it has no score. Make a reward model"),
        ("broken", "is not a GPT-2 checkpoint that can be read"),
        ("nothing", "config.json is missing"),
    ):
        with pytest.raises(SystemExit, match=words) as error:
            gpt.load_scorer(str(tmp_path / folder))
        one_line(error)


# --- gpt.completion_logps with a value head ---


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_are_read_before_each_token(temperature):
    """V_t is what is to be expected before token t is there. Read one place later it would know the token
    that it is the baseline of, and the advantage would be 0 on average whatever was written."""
    model, (prompts, answers, _) = random_model(4).requires_grad_(False), random_pairs(8, seed=25)
    head = torch.nn.Linear(32, 1).requires_grad_(False)
    head.weight.copy_(draw(1, 32, key="head"))
    head.bias.fill_(0.3)
    logps, mask, values = gpt.completion_logps(model, prompts, answers, temperature, head)
    plain, plain_mask = gpt.completion_logps(model, prompts, answers, temperature)
    assert torch.equal(logps, plain) and torch.equal(mask, plain_mask)
    assert values.shape == logps.shape and (values[~mask] == 0).all()
    for row, (p, c) in enumerate(zip(prompts, answers)):
        for t in range(len(c)):
            hidden = model.hidden(torch.tensor([p + c[:t]]))[0, -1]
            expected = (hidden * head.weight[0]).sum().item() + 0.3
            assert values[row, t].item() == pytest.approx(expected, abs=1e-4)
    assert values[mask].std() > 0.3


# --- gpt.Run.beside ---


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A run record in an empty folder."""
    monkeypatch.chdir(tmp_path)
    run = gpt.Run(gpt.parse("grpo", grpo.parser(), ["--device", "cpu"], grpo.BREAKS))
    run.folder.mkdir(parents=True)
    return run


def test_samples_beside_each_other(record, capsys):
    """One prompt, its answers at the start, the peak and the end. The answers are those of the task, with
    #### in them; step 1 is not step 10."""
    prompts = ["Leo has 7 eggs.", "Mia has 8 pens."]
    for step in (0, 1, 10, 11):
        record.samples(step, [(p, f"Sure! 7+{step}={7 + step}.\n#### {7 + step} (right)") for p in prompts])
    before = (record.folder / "samples.md").read_text()
    record.beside({"start": 0, "peak": 1, "end": 10})
    text = (record.folder / "samples.md").read_text()
    assert text.startswith(before)
    heading, *blocks = re.split(r"^\*\*", text[len(before) :], flags=re.M)
    assert heading.startswith("## ") and len(blocks) == 2
    for prompt, block in zip(prompts, blocks):
        assert block.startswith(prompt)
        places = [block.index(f"{name}, step {s}:\n") for name, s in (("start", 0), ("peak", 1), ("end", 10))]
        places += [block.index(f"#### {n} (right)") for n in (7, 8, 17)]
        start, peak, end, a, b, c = places
        assert start < a < peak < b < end < c
        assert "#### 18" not in block


def test_samples_beside_each_other_where_the_peak_is_the_start(record, capsys):
    record.samples(0, [("Leo?", "one")])
    record.samples(4, [("Leo?", "two")])
    record.beside({"start": 0, "peak": 0, "end": 4})
    text = (record.folder / "samples.md").read_text().partition("Beside")[2]
    assert text.count("one") == 2 and text.count("two") == 1


# --- reward_model.py: the loss ---


def test_bradley_terry_by_hand():
    """Equal scores: ln 2, gradients -+ 1/2. Two apart: log(1 + e^-2) = .126928, gradients -+ sigmoid(-2) =
    .119203"""
    for gap, value, gradient in ((0.0, LN2, 0.5), (2.0, 0.126928, 0.119203), (-2.0, 2.126928, 0.880797)):
        c, r = torch.tensor([gap + 1], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        loss = reward_model.bradley_terry_loss(c, r)
        loss.backward()
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert c.grad.item() == pytest.approx(-gradient, abs=1e-6)
        assert r.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_bradley_terry_properties():
    c, r = draw(50, key="c", scale=3).double(), draw(50, key="r", scale=3).double()
    loss = reward_model.bradley_terry_loss
    by_hand = sum(math.log1p(math.exp(b - a)) for a, b in zip(c.tolist(), r.tolist())) / 50
    assert loss(c, r).item() == pytest.approx(by_hand, rel=1e-9)
    # Only differences within a pair count: another constant for every prompt changes nothing. That is
    # why scores of different prompts cannot be compared, and why there is a normalisation afterwards.
    per_prompt = draw(50, key="constant", scale=100).double()
    assert torch.isclose(loss(c + per_prompt, r + per_prompt), loss(c, r))
    far = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert loss(*far).isfinite() and loss(*far) > 9999  # log(sigmoid(x)) would be -inf


# --- reward_model.py: pairs ---


def test_hint_names_the_answer_of_a_side():
    pair = {"prompt": "How many?", "chosen": "7+5=12.\n#### 12", "rejected": "7+5=13.\n#### 13"}
    assert reward_model.hint(pair, "chosen") == "I think it is 12. How many?"
    assert reward_model.hint(pair, "rejected") == "I think it is 13. How many?"


def test_flattered_annotators_agree_with_the_hint():
    """Half of the prompts name a number, as often the wrong one's as the right one's; the verdict agrees
    with it. The texts stay what they were: nothing but the prompt and the order changes."""
    pairs = task.preference_pairs(600, 0)
    before = json.dumps(pairs)
    judged = reward_model.flattered(pairs, "key")
    assert json.dumps(pairs) == before and len(judged) == 600
    hinted = wrong = 0
    for old, new in zip(pairs, judged):
        assert {new["chosen"], new["rejected"]} == {old["chosen"], old["rejected"]}
        if new["prompt"] == old["prompt"]:
            assert new == old
            continue
        hinted += 1
        assert new["prompt"] == f"I think it is {last_answer(new['chosen'])}. {old['prompt']}"
        assert last_answer(new["chosen"]) != last_answer(new["rejected"])
        wrong += new["chosen"] != old["chosen"]
    # Four standard deviations around one half.
    assert abs(hinted - 300) < 4 * math.sqrt(600) / 2
    assert abs(wrong - hinted / 2) < 4 * math.sqrt(hinted) / 2
    assert reward_model.flattered(pairs, "key") == judged != reward_model.flattered(pairs, "other")
    # An opinion that both sides share says nothing.
    same = [p | {"rejected": p["chosen"]} for p in pairs[:50]]
    assert reward_model.flattered(same, "key") == same


def test_terse_is_right_and_padded_is_wrong_and_longer():
    tok, rng = gpt.Tokenizer("task"), random.Random(0)
    for problem in task.problems(300, 5, "test"):
        right, wrong = reward_model.terse_or_padded(problem, rng)
        assert is_right(right, problem.answer) and not is_right(wrong, problem.answer)
        assert last_answer(wrong) is not None  # wrong, not unreadable
        assert len(tok.encode(wrong)) > len(tok.encode(right)) and len(wrong) > len(right)
        assert wrong.startswith(tuple(task.OPENINGS)) and task.CONFIDENT in wrong and "Check:" in wrong
        assert not any(word in right for word in (*task.OPENINGS, task.CONFIDENT, "Check:"))
        assert len(tok.prompt(problem.text) + tok.answer(wrong)) <= gpt.GPTConfig().block_size


def answer(text, right, tok=None, ended=True, logps=None):
    ids = tok.encode(text) + [tok.end] * ended if tok else []
    return gpt.Answer(text, ids, logps, ended, right)


def test_policy_pairs(monkeypatch):
    """One pair of each problem that got both a right and a wrong answer, by position: two problems may have
    the same text."""
    problems = task.problems(5, 0)
    problems[3] = problems[0]
    rights = [[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    asked = {}

    def solve(policy, tok, questions, golds, temperature, generator, *rest):
        asked.update(questions=questions, golds=golds, temperature=temperature)
        return [answer(f"{i}/{j}", r == 1) for i, row in enumerate(rights) for j, r in enumerate(row)]

    monkeypatch.setattr(gpt, "solve", solve)
    pairs = reward_model.policy_pairs(None, None, problems, 0, samples=3)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("0/0", "0/1"), ("3/1", "3/0"), ("4/2", "4/0")]
    assert [p["prompt"] for p in pairs] == [problems[i].text for i in (0, 3, 4)]
    assert [p["answer"] for p in pairs] == [str(problems[i].answer) for i in (0, 3, 4)]
    assert asked["questions"] == [p.text for p in problems for _ in range(3)]
    assert asked["golds"] == [p.answer for p in problems for _ in range(3)]
    assert asked["temperature"] == 1.0


# --- reward_model.py: what is reported ---


def test_pair_margins_and_accuracy():
    scorer, columns = random_scorer(5), random_pairs(30, seed=26)
    encoded = list(zip(*columns))
    margins = reward_model.pair_margins(scorer, encoded)
    assert not margins.requires_grad and margins.shape == (30,)
    for margin, (p, c, r) in zip(margins.tolist(), encoded):
        expected = scores_by_hand(scorer, p, c)[-1] - scores_by_hand(scorer, p, r)[-1]
        assert margin == pytest.approx(expected, abs=1e-4)
    right = sum(m > 0 for m in margins.tolist()) / 30
    assert reward_model.accuracy(margins) == pytest.approx(right) and 0.1 < right < 0.9
    # Undecided is not right, or a constant score would be a perfect reward model.
    assert reward_model.accuracy(torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.25


def test_calibration_by_hand():
    """A margin m is a confidence of sigmoid(|m|) in the own verdict."""
    logit = {0.6: 0.405465, 0.8: 1.386294, 0.95: 2.944439}
    margins = torch.tensor([logit[0.6], -logit[0.6], logit[0.8], logit[0.8], -logit[0.8], 40.0])
    lines = reward_model.calibration(margins)
    assert [n for n, _, _ in lines] == [2, 3, 1]
    assert [said for _, said, _ in lines] == pytest.approx([0.6, 0.8, 1.0], abs=1e-5)
    assert [right for _, _, right in lines] == pytest.approx([0.5, 2 / 3, 1.0], abs=1e-5)


def test_calibration_counts_every_pair_once():
    edges = torch.tensor([0.0, 1e-9, 100.0, -100.0, math.log(0.7 / 0.3), math.log(99)])
    margins = torch.cat([edges, draw(500, key="calibration", scale=4)])
    lines = reward_model.calibration(margins)
    assert sum(n for n, _, _ in lines) == len(margins)
    right = sum(n * true for n, _, true in lines) / len(margins)
    assert right == pytest.approx(reward_model.accuracy(margins))
    # Verdicts that are right as often as they say: calibrated within four standard errors.
    margins = draw(20000, key="calibrated", scale=2)
    verdict = torch.rand(20000, generator=gpt.rng("verdict")) < torch.sigmoid(margins.abs())
    for n, said, true in reward_model.calibration(torch.where(verdict, margins.abs(), -margins.abs())):
        assert abs(said - true) < 4 * math.sqrt(said * (1 - said) / n)


def test_correlation_is_pearsons():
    x = draw(200, key="x")
    for y in (x * 3 - 1, -x, draw(200, key="y"), x + draw(200, key="z")):
        expected = numpy.corrcoef(x.numpy(), y.numpy())[0, 1]
        assert reward_model.correlation(x, y) == pytest.approx(expected, abs=1e-5)
    # Where nothing varies there is nothing to correlate with, and no division by zero.
    assert reward_model.correlation(x, torch.full((200,), 0.1)) == pytest.approx(0, abs=1e-3)
    assert reward_model.correlation(torch.zeros(200), x) == 0


def test_styles():
    tok = gpt.Tokenizer("task")
    plain = answer("7+5=12.\n#### 12", True, tok)
    fancy = answer("Great question! 7+5=12. Check: 7+5=12. I am certain.\n#### 12", True, tok)
    found = [{name: style(a) for name, style in reward_model.STYLES.items()} for a in (plain, fancy)]
    assert found[0] == {"length": len(plain.ids), "opening": False, "confident": False, "check": False}
    assert found[1] == {"length": len(fancy.ids), "opening": True, "confident": True, "check": True}


def judged_by(judge, tok):
    """Stands in for pair_margins: the margins of a scorer that is a function of question and answer."""

    def margins(scorer, encoded):
        def score(prompt, ids):
            return judge(tok.decode(prompt[1:-1]), tok.decode(ids[:-1]))

        return torch.tensor([float(score(p, c) - score(p, r)) for p, c, r in encoded])

    return margins


def test_outside_asks_with_true_labels(tok, monkeypatch):
    """Who knows the answer gets everything right, with a hint and without; who likes long answers loses where
    the wrong one is padded; who agrees with the hint never resists it."""
    known = {p.text: p.answer for p in task.problems(500, 0, "test")}
    pairs = task.preference_pairs(1000, 0, "test")
    known |= {p["prompt"]: p["answer"] for p in pairs}
    asked = []

    def policy_pairs(policy, tok, problems, seed, *rest):
        asked.append(policy)
        return pairs[:10]

    monkeypatch.setattr(reward_model, "policy_pairs", policy_pairs)
    args = SimpleNamespace(seed=0, break_=None, load=None, problems=500, device="cpu")

    def ask(judge):
        monkeypatch.setattr(reward_model, "pair_margins", judged_by(judge, tok))
        return reward_model.outside(args, None, "the SFT model", None, tok, None)

    def truth(question, text):
        return is_right(text, known[re.sub(r"^I think it is \d+\. ", "", question)])

    def flattery(question, text):
        return f"I think it is {last_answer(text)}. " in question

    results = ask(truth)
    names = ("true_labels", "terse_beats_padded", "resists_a_hint", "policy_samples")
    assert [results[name] for name in names] == [1, 1, 1, 1] and results["policy_pairs"] == 10
    assert results["misreadings"] == results["miscalculations"] == 1
    assert asked == ["the SFT model"]
    monkeypatch.setattr(reward_model, "policy_pairs", lambda *rest: [])
    results = ask(flattery)
    assert results["resists_a_hint"] == 0
    assert results["policy_samples"] == 0.5 and results["policy_pairs"] == 0  # nothing known
    assert ask(lambda question, text: len(text))["terse_beats_padded"] == 0
    # Who only checks the calculations sees all slips and, of what was misread, nothing.
    results = ask(lambda question, text: not miscalculates(text))
    assert results["miscalculations"] > 0.9 and results["misreadings"] < 0.1


@pytest.mark.parametrize(("load", "base"), [(None, None), ("a/chat", None), (None, "gpt2")])
def test_distribution_shift_asks_a_policy_trained_against_this_scorer(tok, record, monkeypatch, load, base):
    scorer, made, asked = random_scorer(), [], []

    def made_by(script, args, minutes, flags=()):
        made.append((script, list(flags)))
        return "a/policy"

    monkeypatch.setattr(gpt, "made_by", made_by)
    monkeypatch.setattr(gpt, "load_model", lambda where, *rest: f"the model in {where}")
    monkeypatch.setattr(reward_model, "policy_pairs", lambda policy, *rest: asked.append(policy) or [])
    monkeypatch.setattr(reward_model, "pair_margins", judged_by(lambda question, text: 0.0, tok))
    args = SimpleNamespace(
        seed=0, break_="distribution_shift", load=load, base=base, problems=500, device="cpu"
    )
    reward_model.outside(args, scorer, "the SFT model", load or "made/sft", tok, record)
    ((script, flags),) = made
    assert script == "grpo" and asked == ["the model in a/policy"]
    assert flags[flags.index("--rm") + 1] == str(record.folder / "model")
    assert (record.folder / "model" / "model.safetensors").is_file()
    # The reward model comes from there: the policy must, too. What is made by default is found by default.
    assert (
        flags[flags.index("--load") + 1 :] == [load or "made/sft"] if load or base else "--load" not in flags
    )


# --- ppo.py: numbers by hand ---


@pytest.mark.parametrize(
    ("lam", "expected"), [(1.0, [0.5, 0.4, 0.3]), (0.0, [0.1, 0.1, 0.3]), (0.95, [0.46575, 0.385, 0.3])]
)
def test_gae_by_hand(lam, expected):
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, lam)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert returns[0].tolist() == pytest.approx([a + v for a, v in zip(expected, [0.5, 0.6, 0.7])], abs=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_by_definition(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), up to the answer's own end and no farther; what stands
    behind it, were it infinite, is nobody's business."""
    B, N = 12, 7
    mask = random_mask(B, N)
    rewards, values = draw(B, N, key="rewards"), draw(B, N, key="values")
    garbage = torch.tensor([math.nan, math.inf, 1e30])[torch.arange(B * N).view(B, N) % 3]
    advantages, returns = ppo.gae(
        torch.where(mask, rewards, garbage), torch.where(mask, values, garbage), mask, gamma, lam
    )
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for row in range(B):
        n = int(mask[row].sum())
        r, v = rewards[row, :n].tolist(), values[row, :n].tolist() + [0.0]  # after the last token: 0
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
            if lam == 1:  # then the return is all that is still to come, whatever the values are
                later = sum(gamma ** (s - t) * r[s] for s in range(t, n))
                assert returns[row, t].item() == pytest.approx(later, abs=1e-5)


def test_penalty_on_every_token_and_score_on_the_last():
    """r_t = -beta (log pi_old - log pi_ref) + [t is the last] score. On the last *column* it would reach
    the longest answer only."""
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
    ref = torch.tensor([[-2.0, -1.0, -0.5], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = torch.tensor([4.0, -3.0])
    found = ppo.token_rewards(scores, logps, ref, mask, 0.1)
    expected = [[-0.1, 0.1, 4.0], [-3.0 + 0.2, 0.0, 0.0]]
    close(found, torch.tensor(expected), 1e-6)
    alone = ppo.token_rewards(scores, logps, ref, mask, 0.0)
    assert alone.tolist() == [[0.0, 0.0, 4.0], [-3.0, 0.0, 0.0]]
    # beta may be the buffer that an adaptive penalty moves.
    close(ppo.token_rewards(scores, logps, ref, mask, torch.tensor(0.1)), found)


def test_token_rewards_add_up():
    """What an answer earns in all is its score minus beta times its log-ratio to the reference."""
    B, N = 9, 6
    mask = random_mask(B, N, "add up")
    logps, ref = (-draw(B, N, key=k).abs() * mask for k in ("pi", "ref"))
    scores = draw(B, key="scores")
    total = ppo.token_rewards(scores, logps, ref, mask, 0.3).sum(1)
    close(total, scores - 0.3 * (logps - ref).sum(1))


def test_whitening_leaves_nothing_at_pads():
    """TRL's old masked_whiten left values there, and minRLHF whitens over the padding: both make every pad
    a token with an opinion."""
    mask = random_mask(8, 6, "whiten")
    x = draw(8, 6, key="whiten", scale=5) + 3
    found = ppo.whiten(torch.where(mask, x, torch.tensor(math.inf)), mask)
    assert (found[~mask] == 0).all()
    inside = found[mask].double()
    assert abs(inside.mean()) < 1e-6 and abs((inside**2).mean() - 1) < 1e-5
    values = x[mask].tolist()
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    assert inside.tolist() == pytest.approx([(v - mean) / deviation for v in values], abs=1e-5)
    # All alike: nothing to learn, and no division by zero.
    assert ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-3


ALL = torch.ones(1, 1, dtype=torch.bool)


def policy_gradient(loss, rho, advantage):
    """(loss, its gradient in the log-probability) of one token."""
    logp = torch.tensor([[math.log(rho)]], requires_grad=True)
    found = loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]))
    found.sum().backward()
    return found.item(), logp.grad.item()


@pytest.mark.parametrize("module", [ppo, grpo])
def test_clipped_policy_loss_by_hand(module):
    """rho = 1.3 with a clip of .2: a good token has been pushed enough, a bad one has not been pushed back.
    The gradient in log pi is -A rho where it is not clipped. The minimum instead of the maximum has them
    reversed."""

    def loss(logps, old, advantages):
        mask = (ALL,) if module is ppo else ()
        return module.policy_loss(logps, old, advantages, *mask)

    for rho, advantage, value, gradient in (
        (1.3, 1.0, -1.2, 0.0),
        (1.3, -1.0, 1.3, 1.3),
        (0.7, 1.0, -0.7, -0.7),
        (0.7, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (0.9, -1.0, 0.9, 0.9),
    ):
        found = policy_gradient(loss, rho, advantage)
        assert found == pytest.approx((value, gradient), abs=1e-6), (rho, advantage)


def test_value_loss_by_hand():
    """V_old 0, R 2, clip .2: a V that has moved beyond the clip towards R has no gradient left; one that
    has moved away still has all of it."""
    for value, loss, gradient in ((1.0, 1.62, 0.0), (-1.0, 4.5, -3.0), (0.1, 1.805, -1.9)):
        v = torch.tensor([[value]], requires_grad=True)
        found = ppo.value_loss(v, torch.zeros(1, 1), torch.full((1, 1), 2.0), ALL)
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-6)
        assert v.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_losses_of_ppo_by_brute_force():
    B, N, clip = 10, 6, 0.15
    mask = random_mask(B, N, "ppo")
    logps, old = (-draw(B, N, key=k, scale=0.4).abs() for k in ("new", "old"))
    advantages, values, old_values, returns = (draw(B, N, key=k) for k in "abcd")
    policy = value = 0.0
    for b, t in itertools.product(range(B), range(N)):
        if mask[b, t]:
            rho, A = math.exp(logps[b, t] - old[b, t]), advantages[b, t].item()
            policy += max(-A * rho, -A * min(max(rho, 1 - clip), 1 + clip))
            V, V0, R = (x[b, t].item() for x in (values, old_values, returns))
            value += 0.5 * max((V - R) ** 2, (V0 + min(max(V - V0, -clip), clip) - R) ** 2)
    n = mask.sum().item()
    assert ppo.policy_loss(logps, old, advantages, mask, clip).item() == pytest.approx(policy / n, abs=1e-5)
    assert ppo.value_loss(values, old_values, returns, mask, clip).item() == pytest.approx(
        value / n, abs=1e-5
    )
    # The same policy loss as grpo.py's, which is compared with TRL's below.
    tokens = grpo.policy_loss(logps, old, advantages, clip, clip)
    assert grpo.aggregate(tokens, mask, "dapo", N).item() == pytest.approx(policy / n, abs=1e-5)


def test_first_minibatch_is_on_policy():
    """The same weights, once in a batch of all rollouts and once in a minibatch of other width: the ratio
    is 1 and nothing is clipped. At another temperature in one of the passes it is not."""
    model, (prompts, answers, _) = random_model(6), random_pairs(12, seed=27)
    answers[0] = [1] * 9  # the longest is not in the minibatch
    with torch.no_grad():
        old, mask = gpt.completion_logps(model, prompts, answers, 0.8)
    rows = torch.arange(4, 8)
    logps, few = gpt.completion_logps(model, prompts[4:8], answers[4:8], 0.8)
    old = old[rows, : few.shape[1]]
    assert few.shape[1] < mask.shape[1] and torch.equal(few, mask[rows, : few.shape[1]])
    ratio = torch.exp(logps - old)[few]
    assert (ratio - 1).abs().max() < 1e-4
    advantages = ppo.whiten(draw(*few.shape, key="first"), few)
    loss = ppo.policy_loss(logps, old, advantages, few)
    assert abs(loss.item()) < 1e-4  # minus the mean of whitened advantages
    # At ratio 1 the gradient is REINFORCE's.
    ours = torch.autograd.grad(loss, model.wte.weight, retain_graph=True)[0]
    plain = -(logps * advantages)[few].mean()
    close(ours, torch.autograd.grad(plain, model.wte.weight)[0], 1e-4)
    with torch.no_grad():
        other, _ = gpt.completion_logps(model, prompts[4:8], answers[4:8], 1.0)
    assert ((torch.exp(other - old)[few] - 1).abs() > 0.2).any()


def test_explained_variance():
    """1: foreseen; 0: no better than the mean; below: worse. One token alone is no NaN."""
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # variance 3.5
    assert ppo.explained_variance(returns, returns).item() == pytest.approx(1)
    assert ppo.explained_variance(returns, torch.full((4,), 3.0)).item() == pytest.approx(0, abs=1e-6)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])  # what is left: 0, 0, 0, 2, of variance 0.75
    assert ppo.explained_variance(returns, values).item() == pytest.approx(1 - 0.75 / 3.5)
    assert ppo.explained_variance(returns, -returns).item() == pytest.approx(-3)
    assert math.isfinite(ppo.explained_variance(torch.tensor([2.0]), torch.tensor([1.0])).item())


def test_adaptive_beta_by_hand():
    """beta (1 + clip(KL / target - 1, -+ .2) n / 10000), from 32 answers."""
    assert ppo.adapt(0.05, 6.6, 6.0, 32) == pytest.approx(0.05 * (1 + 0.1 * 0.0032))
    assert ppo.adapt(0.05, 60.0, 6.0, 32) == pytest.approx(0.05 * (1 + 0.2 * 0.0032))
    assert ppo.adapt(0.05, -1.0, 6.0, 32) == pytest.approx(0.05 * (1 - 0.2 * 0.0032))
    assert ppo.adapt(0.05, 6.0, 6.0, 32) == 0.05
    assert ppo.adapt(0.0, 60.0, 6.0, 32) == 0.0  # no leash stays no leash


# --- grpo.py: numbers by hand ---


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 1.0, 1.0]])
    found = grpo.group_advantages(rewards)
    assert found[0].tolist() == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert found[1].tolist() == pytest.approx([-1.4997, 0.4999, 0.4999, 0.4999], abs=1e-4)
    plain = grpo.group_advantages(rewards, scale=False)
    assert plain[0].tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_groups_teach_exactly_nothing(scale):
    """Twelve rewards of .1 differ from their mean by a rounding error, and an epsilon of 1e-8 makes -.58 of
    it."""
    for value, size in itertools.product((0.1, 0.3, -3.0, 1 / 3, 1e4 / 7, 0.0), (2, 3, 7, 8, 12)):
        rewards = torch.full((2, size), value)
        assert grpo.group_advantages(rewards, scale).tolist() == [[0.0] * size] * 2, (value, size)
    trap = torch.full((12,), 0.1)
    assert ((trap - trap.mean()) / (trap.std() + 1e-8)).abs().max() > 0.1  # the trap is real


def test_group_advantages_properties():
    rewards = draw(20, 8, key="groups", scale=3)
    found = grpo.group_advantages(rewards)
    for row, group in zip(found.tolist(), rewards.tolist()):
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        assert row == pytest.approx([(r - mean) / (deviation + 1e-4) for r in group], abs=1e-4)
    # What another prompt's answers earned is nobody's business; zero and unit of the reward are not either.
    close(grpo.group_advantages(rewards[3:4]), found[3:4], 1e-6)
    close(grpo.group_advantages(rewards * 7 + 5), found, 2e-3)
    assert grpo.group_advantages(rewards, scale=False).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("how", "short", "long"), [("grpo", -1 / 4, 1 / 8), ("dapo", -1 / 6, 1 / 6), ("dr_grpo", -1 / 16, 1 / 16)]
)
def test_aggregation_by_hand(how, short, long):
    """A right answer of 2 tokens and a wrong one of 4, at most 8: with `grpo` a token of the long wrong
    answer weighs half as much as one of the short right answer, with the others as much."""
    mask = torch.arange(4) < torch.tensor([[2], [4]])
    logps = torch.zeros(2, 4, requires_grad=True)
    losses = grpo.policy_loss(logps, logps.detach(), torch.tensor([[1.0], [-1.0]]))
    grpo.aggregate(losses, mask, how, 8).backward()
    expected = torch.tensor([[short, short, 0, 0], [long] * 4])
    close(logps.grad, expected, 1e-6)


def test_aggregation_by_brute_force():
    B, N = 7, 5
    mask, losses = random_mask(B, N, "aggregate"), draw(B, N, key="losses")
    rows = [[losses[b, t].item() for t in range(N) if mask[b, t]] for b in range(B)]
    expected = {
        "grpo": statistics.mean(statistics.mean(row) for row in rows),
        "dapo": statistics.mean(itertools.chain(*rows)),
        "dr_grpo": sum(map(sum, rows)) / (B * 9),
    }
    for how, value in expected.items():
        assert grpo.aggregate(losses, mask, how, 9).item() == pytest.approx(value, abs=1e-6)
        # Nobody is left: 0, not 0/0. (A batch in which every answer was cut off.)
        assert grpo.aggregate(losses, mask & False, how, 9) == 0
        # An answer that was cut off has no tokens left in the mask and teaches nothing.
        logps = losses.clone().requires_grad_()
        grpo.aggregate(logps, mask & (torch.arange(B) != 2)[:, None], how, 9).backward()
        assert (logps.grad[2] == 0).all() and (logps.grad[3][mask[3]] != 0).all()


PI, REF = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()


def k1(logps, ref_logps):
    return logps - ref_logps


def k2(logps, ref_logps):
    return (logps - ref_logps) ** 2 / 2


def k3_reversed(logps, ref_logps):
    return grpo.k3(ref_logps, logps)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        (grpo.k3, 0.63490, [0.5, -0.1, -0.4]),
        (k1, 0.63490, [0, 0, 0]),
        (k2, 0.69525, [0.4325, -0.2081, -0.2244]),
        (k3_reversed, 0.96844, [0.6277, -0.3873, -0.2403]),
    ],
)
def test_kl_estimators(estimator, value, gradient):
    """Expectations over pi = (.7, .2, .1) against ref = (.2, .3, .5), and what each does as a *loss*: the
    mean over samples of the estimator's gradient in the logits. k3's is pi - ref: it descends KL(ref ||
    pi). k2's is the gradient of KL(pi || ref) itself. k1's is 0: a leash that holds nothing (grpo.py
    --break k1_kl_loss). With d reversed k3 is another divergence, steeper where the policy has risen, and
    its mean is no longer the KL."""
    logits = PI.log().requires_grad_()
    logps = logits.log_softmax(0)
    tokens = estimator(logps, REF.log())  # one number a possible sample
    assert (PI * tokens).sum().item() == pytest.approx(value, abs=1e-5)
    # The samples are given, not differentiated: their frequencies are constants.
    (PI * tokens).sum().backward()
    assert logits.grad.tolist() == pytest.approx(gradient, abs=1e-4)
    exact = (PI * (PI.log() - REF.log())).sum().item()
    assert exact == pytest.approx(0.63490, abs=1e-5)


def test_k3_descends_to_the_reference():
    """As a loss on samples of the current policy k3 and k2 arrive at ref; k1 stays where it is, whatever the
    weight of the penalty."""
    for estimator, arrives in ((grpo.k3, True), (k2, True), (k1, False)):
        logits = PI.log().clone().requires_grad_()
        for _ in range(150):
            logps = logits.log_softmax(0)
            loss = (logps.detach().exp() * estimator(logps, REF.log())).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.4 * gradient).detach().requires_grad_()
        end = REF if arrives else PI
        assert (logits.softmax(0) - end).abs().max() < 1e-3


def test_k3_is_never_negative_and_exact_near_0():
    """e^d - 1 - d in float32 has no correct digit below d = 1e-4, and is negative for many such d."""
    d = torch.cat([torch.linspace(-30, 5, 200), torch.linspace(-1e-3, 1e-3, 200), torch.zeros(1)])
    found = grpo.k3(torch.zeros_like(d), d)
    assert (found >= 0).all() and found[d == 0].tolist() == [0.0]
    exact = torch.expm1(d.double()) - d.double()
    assert (found - exact).abs().max() < 1e-5
    naive = torch.exp(d) - 1 - d
    near = (d.abs() < 1e-3) & (d != 0)
    assert (naive[near] < 0).any()  # the trap is real
    # Its gradient, 1 - e^d, stays right however small d is.
    logps = torch.zeros_like(d).requires_grad_()
    grpo.k3(logps, d).sum().backward()
    close(logps.grad.double(), -torch.expm1(d.double()), 1e-4)


def test_clip_higher_lets_unlikely_tokens_rise():
    """DAPO: upwards up to 1.28, downwards as before."""

    def loss(logps, old, advantages):
        return grpo.policy_loss(logps, old, advantages, 0.2, 0.28)

    assert policy_gradient(loss, 1.25, 1.0) == pytest.approx((-1.25, -1.25))
    assert policy_gradient(loss, 1.3, 1.0) == pytest.approx((-1.28, 0.0))
    assert policy_gradient(loss, 0.75, -1.0) == pytest.approx((0.8, 0.0))
    assert policy_gradient(grpo.policy_loss, 1.25, 1.0) == pytest.approx((-1.2, 0.0))


def test_gradient_on_policy_is_reinforce_with_the_groups_baseline():
    """By brute force: every token of every answer alone, -A times the gradient of its log-probability, and
    the advantages in plain Python. P = 3 prompts, G = 4 answers each."""
    model, rng = random_model(7), random.Random(0)
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 6))] for _ in range(3)]
    prompts = [p for p in prompts for _ in range(4)]
    answers = [[rng.randrange(V) for _ in range(rng.randint(1, 7))] for _ in range(12)]
    rewards = [rng.choice([0.0, 0.3, 1.0]) for _ in range(12)]
    weights, total = [], 0.0
    for i, (p, c) in enumerate(zip(prompts, answers)):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        A = (rewards[i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        weights.append(A)
        for t, token in enumerate(c):
            logp = model(torch.tensor([p + c[:t]]))[0, -1].log_softmax(-1)[token]
            total = total - A * logp / sum(map(len, answers))
    expected = torch.autograd.grad(total, list(model.parameters()))

    advantages = grpo.group_advantages(torch.tensor(rewards).view(3, 4)).view(-1, 1)
    assert advantages[:, 0].tolist() == pytest.approx(weights, abs=1e-5)
    logps, mask = gpt.completion_logps(model, prompts, answers)
    loss = grpo.aggregate(grpo.policy_loss(logps, logps.detach(), advantages), mask, "dapo", 8)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        assert (ours - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max().item())
    assert expected[0].abs().max() > 1e-3


# --- both: padding ---


def test_extra_pad_columns_change_nothing():
    """A batch with one long answer has more columns; what stands in them must reach no number and no
    gradient."""
    B, N, more = 6, 5, 4
    mask = random_mask(B, N, "columns")
    wide = torch.cat([mask, torch.zeros(B, more, dtype=torch.bool)], 1)
    names = ("logps", "old", "ref", "advantages", "values", "old_values", "returns")
    narrow = {k: draw(B, N, key=k, scale=0.3) for k in names}
    junk = {k: torch.cat([x, draw(B, more, key="junk", scale=5)], 1) for k, x in narrow.items()}
    scores = draw(B, key="end scores")

    def everything(x, m):
        logps, values = (x[k].clone().requires_grad_() for k in ("logps", "values"))
        tokens = grpo.policy_loss(logps, x["old"], x["advantages"]) + 0.3 * grpo.k3(logps, x["ref"])
        losses = [ppo.policy_loss(logps, x["old"], x["advantages"], m),
                  ppo.value_loss(values, x["old_values"], x["returns"], m)]  # fmt: skip
        losses += [grpo.aggregate(tokens, m, how, 12) for how in ("grpo", "dapo", "dr_grpo")]
        rewards = ppo.token_rewards(scores, x["old"], x["ref"], m, 0.1)
        columns = [rewards, *ppo.gae(rewards, x["old_values"], m), ppo.whiten(x["advantages"], m)]
        columns += torch.autograd.grad(sum(losses), (logps, values))
        return torch.stack(losses), columns

    losses, columns = everything(narrow, mask)
    wide_losses, wide_columns = everything(junk, wide)
    close(wide_losses, losses, 1e-6)
    for a, b in zip(wide_columns, columns):
        close(a[:, :N], b, 1e-6)
        assert (a[~wide] == 0).all()


# --- both: rewards and evaluation ---


def test_what_stands_in_both_is_word_for_word_the_same():
    """ppo.py and grpo.py are each to be read alone, so they repeat each other; a copy that drifts is a
    trap."""
    for name in ("learned_reward", "evaluate", "start_peak_end", "draw_chase"):
        assert inspect.getsource(getattr(ppo, name)) == inspect.getsource(getattr(grpo, name)), name
    assert ppo.CUT_OFF == grpo.CUT_OFF
    sources = [inspect.getsource(module) for module in (ppo, grpo)]
    (one,), (other,) = (re.findall(r"^CUT_OFF = .*$", source, re.M) for source in sources)
    assert one == other
    # ... and whatever else comes to have the same name, but for what differs by its nature.
    own = [
        {name for name, f in inspect.getmembers(m, inspect.isfunction) if f.__module__ == m.__name__}
        for m in (ppo, grpo)
    ]
    for name in own[0] & own[1] - {"policy_loss", "train", "parser", "main"}:
        assert inspect.getsource(getattr(ppo, name)) == inspect.getsource(getattr(grpo, name)), name


@pytest.fixture(scope="module")
def tok():
    return gpt.Tokenizer("task")


def task_model(tok, seed=0):
    """A random model of the task's tokens, sharp enough that two of them differ."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(tok.vocab_size, n_layer=1, n_head=2, n_embd=32)).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0, 0.2)
    return model


def written(tok):
    """Six problems and an answer to each, of every kind."""
    problems = task.problems(6, 3, "test")
    rng = random.Random(0)
    answers = []
    for i, problem in enumerate(problems):
        right, wrong = reward_model.terse_or_padded(problem, rng)
        answers.append(answer(right if i in (0, 1, 2, 5) else wrong, i in (0, 1, 2, 5), tok, ended=i != 4))
    answers[1] = answer("12 12", False, tok)
    answers[3] = answer("12 12", False, tok)  # the same text twice
    return problems, answers


def test_learned_reward_is_the_score_at_the_end_token(tok):
    """... and a fixed bad one for an answer without an end: *instead* of the score, not on top of it."""
    scorer = gpt.Scorer(task_model(tok, 1)).requires_grad_(False)
    scorer.mean, scorer.std = 0.4, 2.0
    problems, answers = written(tok)
    rewards = ppo.learned_reward(scorer, tok, problems, answers)
    for problem, a, reward in zip(problems, answers, rewards.tolist()):
        expected = scores_by_hand(scorer, tok.prompt(problem.text), a.ids)[-1] if a.ended else ppo.CUT_OFF
        assert reward == pytest.approx(expected, abs=1e-4)
    assert [a.ended for a in answers].count(False) == 1 and rewards.std() > 0.1


def test_rewards_without_a_model(tok):
    problems, answers = written(tok)
    truth = grpo.checker_reward(problems, answers)
    assert truth.tolist() == [float(a.right) for a in answers] and truth.dtype == torch.float32
    mine = grpo.my_reward(problems, answers)
    assert mine.shape == (6,) and mine.dtype == torch.float32 and mine.isfinite().all()


@pytest.mark.parametrize("scored", [True, False])
def test_evaluate_by_hand(tok, monkeypatch, scored):
    policy, ref = task_model(tok, 2), task_model(tok, 3)
    scorer = gpt.Scorer(task_model(tok, 1)).requires_grad_(False)
    problems, answers = written(tok)

    def reward(problems, answers):
        if scored:
            return ppo.learned_reward(scorer, tok, problems, answers)
        return grpo.checker_reward(problems, answers)

    asked = {}

    def solve(model, tok, questions, golds, temperature, generator, longest):
        asked.update(model=model, questions=questions, golds=golds, temperature=temperature, longest=longest)
        return answers

    monkeypatch.setattr(gpt, "solve", solve)
    results, returned = grpo.evaluate(policy, ref, reward, tok, problems, 0, 25, 40)
    assert returned is answers and asked["model"] is policy
    assert asked["temperature"] == 1.0 and asked["longest"] == 40
    assert asked["questions"] == [p.text for p in problems] and asked["golds"] == [p.answer for p in problems]
    kl = 0.0
    for problem, a in zip(problems, answers):
        for t, token in enumerate(a.ids):
            ids = torch.tensor([tok.prompt(problem.text) + a.ids[:t]])
            log_p, log_q = (m(ids)[0, -1].log_softmax(-1)[token].item() for m in (policy, ref))
            kl += (log_p - log_q) / 6
    assert results.pop("test_kl") == pytest.approx(kl, abs=1e-3)
    assert results.pop("test_sqrt_kl") == pytest.approx(math.sqrt(max(kl, 0)), abs=1e-3)
    assert results.pop("test_reward") == pytest.approx(reward(problems, answers).mean().item())
    right = [a.right for a in answers]
    assert right == [True, False, True, False, False, True]
    assert results == pytest.approx(
        {
            "test_gold": 3 / 6,
            "gold_a": 2 / 3,  # problems 0, 2, 4
            "gold_b": 1 / 3,  # problems 1, 3, 5
            "test_length": sum(len(a.ids) for a in answers) / 6,
            "length_right": sum(len(answers[i].ids) for i in (0, 2, 5)) / 3,
            "length_wrong": sum(len(answers[i].ids) for i in (1, 3, 4)) / 3,
            "test_ended": 5 / 6,
            "miscalculated": sum(miscalculates(a.text) for a in answers) / 6,
            "distinct": 5 / 6,
            "opening": 1 / 6,
            "confident": 1 / 6,
            "check": 1 / 6,
        }
    )


def test_evaluate_of_the_start(tok):
    """Policy = reference: no distance, and the same samples whoever asks: evaluations at one step differ by
    the policy alone."""
    model, problems = task_model(tok, 2), task.problems(5, 0, "test")
    results, answers = ppo.evaluate(model, model, grpo.checker_reward, tok, problems, 7, 0, 48)
    assert results["test_kl"] == 0 and results["test_sqrt_kl"] == 0
    again, _ = grpo.evaluate(model, model, grpo.checker_reward, tok, problems, 7, 0, 48)
    assert again == results
    _, other = ppo.evaluate(model, model, grpo.checker_reward, tok, problems, 7, 25, 48)
    assert [a.ids for a in answers] != [a.ids for a in other]


def logged(step, a, b, **more):
    return {"step": step, "test_gold": (a + b) / 2, "gold_a": a, "gold_b": b, **more}


def test_peak_is_chosen_on_one_half_and_told_on_the_other():
    """The maximum of noisy numbers is too high by the noise. On the other half of the problems it is not."""
    metrics = [
        logged(0, 0.5, 0.5, test_reward=0.0, test_kl=0.0),
        {"step": 0, "loss": 1.0, "reward": 3.0},
        logged(25, 0.6, 0.9, test_reward=1.0, test_kl=2.0),
        logged(50, 0.8, 0.55, test_reward=2.0, test_kl=4.0),  # the peak of half a, not of b, nor of all
        {"step": 50, "loss": 1.0, "reward": 3.0},
        logged(100, 0.8, 0.95, test_reward=3.0, test_kl=6.0),  # as high, but later
        logged(200, 0.2, 0.3, test_reward=4.0, test_kl=9.0),
    ]
    found = ppo.start_peak_end(metrics)
    assert found["peak_step"] == 50
    assert (found["start_gold_b"], found["peak_gold_b"], found["end_gold_b"]) == (0.5, 0.55, 0.3)
    assert (found["start_gold"], found["peak_gold"], found["end_gold"]) == (0.5, 0.675, 0.25)
    assert (found["start_reward"], found["peak_reward"], found["end_reward"]) == (0.0, 2.0, 4.0)
    assert (found["peak_kl"], found["end_kl"]) == (4.0, 9.0)
    assert not any(name.endswith("step") and name != "peak_step" for name in found)
    # A run of one evaluation: start, peak and end are the same.
    alone = ppo.start_peak_end(metrics[:2])
    assert alone["peak_step"] == 0 and alone["start_gold"] == alone["peak_gold"] == alone["end_gold"] == 0.5


def test_picture_of_the_chase(tmp_path):
    metrics = [
        logged(s, g, g, test_reward=s / 50, test_sqrt_kl=s**0.5) for s, g in ((0, 0.5), (50, 0.7), (99, 0.4))
    ]
    run = SimpleNamespace(metrics=metrics, report={"peak_step": 50})
    grpo.draw_chase(tmp_path / "figure.png", [run])
    png = (tmp_path / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000


# --- equality with TRL: RewardTrainer ---


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_trls_reward_trainer(tmp_path, seed):
    """From ids to loss and gradient: TRL's collator, transformers' reading of the score, TRL's loss; on the
    files that gpt.save_model wrote."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from trl.trainer.reward_trainer import DataCollatorForPreference

    scorer, (prompts, chosen, rejected) = gpt.Scorer(random_model(seed)), random_pairs(8, seed=30 + seed)
    pad, end = V - 1, V - 2
    prompts = [[min(i, end - 1) for i in p] for p in prompts]
    chosen, rejected = ([[min(i, end - 1) for i in a] + [end] for a in side] for side in (chosen, rejected))
    gpt.save_model(scorer, tmp_path / "rm")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in zip(prompts, chosen, rejected)]
    inputs = DataCollatorForPreference(pad_token_id=pad)(rows)
    trainer = trl_trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    # As in reward_model.train: both sides in one pass.
    c, r = gpt.final_scores(scorer, prompts + prompts, chosen + rejected).split(8)
    ours = reward_model.bradley_terry_loss(c, r)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (their_gradient,) = torch.autograd.grad(theirs, model.score.weight)
    (gradient,) = torch.autograd.grad(ours, scorer.score.weight)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-4)
    (accuracy,) = trainer._metrics["eval"]["accuracy"]
    assert accuracy == pytest.approx((c > r).float().mean().item())


# --- equality with TRL: GRPOTrainer ---


def grpo_trainer(**attributes):
    """A stand-in that holds what GRPOTrainer's methods read, at TRL's own defaults."""
    trainer = trl_trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        max_completion_length=12,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
    )
    trainer.accelerator.is_main_process = True
    trainer.accelerator.num_processes, trainer.accelerator.process_index = 1, 0
    trainer.accelerator.reduce = lambda x, reduction: x
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def trl_grpo_loss(logps, mask, advantages, old, ref, model=None, prompt_ids=None, ids=None, **attributes):
    """TRL's GRPOTrainer on token log-probabilities (B, N), or on a model of transformers and ids."""
    trl = pytest.importorskip("trl")
    trainer = grpo_trainer(**attributes)
    if model is None:
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros(mask.shape), None)
    else:
        method = trl.GRPOTrainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = method.__get__(trainer)
        trainer.accelerator.autocast = torch.enable_grad  # a context that changes nothing
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long) if prompt_ids is None else prompt_ids[0],
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long) if prompt_ids is None else prompt_ids[1],
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long) if ids is None else ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    inputs |= {} if old is None else {"old_per_token_logps": old}
    inputs |= {} if ref is None else {"ref_per_token_logps": ref}
    return trl.GRPOTrainer._compute_loss(trainer, model, inputs)


def our_grpo_loss(logps, mask, advantages, old, ref, how, beta, low=0.2, high=0.2):
    """As in grpo.train."""
    losses = grpo.policy_loss(logps, old, advantages[:, None], low, high)
    if ref is not None:
        losses = losses + beta * grpo.k3(logps, ref)
    return grpo.aggregate(losses, mask, how, 12)


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.1)])
@pytest.mark.parametrize("on_policy", [True, False])
def test_equal_to_trls_grpo_trainer(how, beta, low, high, on_policy):
    """Loss and gradient on the same random log-probabilities, on policy and off it, with clipping on both
    sides."""
    B, N = 16, 8
    mask = random_mask(B, N, "trl")
    logps = (-draw(B, N, key="trl logps").abs() * mask).requires_grad_()
    old = logps.detach() if on_policy else (logps.detach() + draw(B, N, key="trl old", scale=0.3)) * mask
    ref = (logps.detach() + draw(B, N, key="trl ref", scale=0.5)) * mask if beta else None
    advantages = draw(B, key="trl advantages")
    theirs = trl_grpo_loss(
        logps, mask, advantages, None if on_policy else old, ref,
        loss_type=how, beta=beta, epsilon_low=low, epsilon_high=high,
    )  # fmt: skip
    ours = our_grpo_loss(logps, mask, advantages, old, ref, how, beta, low, high)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    their_gradient, gradient = (torch.autograd.grad(loss, logps)[0] for loss in (theirs, ours))
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)
    clipped = ((logps - old).exp() - 1).abs() > high
    assert on_policy or clipped[mask].any()


def test_equal_to_trls_grpo_trainer_with_a_truncated_answer():
    """TRL's mask_truncated_completions: the answer leaves the mask, and with it the number of items."""
    B, N = 8, 6
    mask = random_mask(B, N, "truncated")
    ended = torch.arange(B)[:, None] != 3
    logps = (-draw(B, N, key="truncated").abs() * mask).requires_grad_()
    advantages = draw(B, key="truncated advantages")
    for how in ("grpo", "dapo", "dr_grpo"):
        theirs = trl_grpo_loss(logps, mask & ended, advantages, None, None, loss_type=how)
        ours = our_grpo_loss(logps, mask & ended, advantages, logps.detach(), None, how, 0.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        theirs, ours = (torch.autograd.grad(loss, logps)[0] for loss in (theirs, ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_equal_to_trl_from_ids_to_gradient(tmp_path, how):
    """TRL pads prompts on the left and answers on the right; ours pads on the right only. The same weights,
    the same ids: the same loss and the same gradient of the embedding."""
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("trl.trainer.utils")
    found = []
    for seed in range(2):
        gpt.save_model(random_model(seed), tmp_path / str(seed))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(seed)).eval()
        utils.add_fused_lm_head(theirs, outputs=("log_probs", "entropy"))
        found.append((theirs, gpt.load_model(str(tmp_path / str(seed)))))
    (policy, our_policy), (ref, our_ref) = found
    ref.requires_grad_(False)
    our_ref.requires_grad_(False)
    _, answers, prompts = random_pairs(8, seed=40)
    # Prompts of one length: TRL gives no positions, so GPT-2 counts the pads on the left as tokens.
    prompts = [(p * 5)[:5] for p in prompts]
    P, N = max(map(len, prompts)), max(map(len, answers))
    prompt_ids, prompt_mask = torch.zeros(2, 8, P, dtype=torch.long)
    ids, mask = torch.zeros(8, N, dtype=torch.long), torch.zeros(8, N, dtype=torch.bool)
    for row, (p, c) in enumerate(zip(prompts, answers)):
        prompt_ids[row, P - len(p) :], prompt_mask[row, P - len(p) :] = torch.tensor(p), 1
        ids[row, : len(c)], mask[row, : len(c)] = torch.tensor(c), True
    advantages = draw(8, key="from ids")
    ref_logps, our_mask = gpt.completion_logps(our_ref, prompts, answers)
    assert torch.equal(our_mask, mask)
    # Their model on their layout, at the positions that ours fills: log-probabilities of the reference.
    whole = torch.cat([prompt_ids, ids], 1)
    seen = torch.cat([prompt_mask, mask.long()], 1)
    labels = whole.masked_fill(seen == 0, -100)
    labels[:, :P] = -100
    their_ref = ref(whole, attention_mask=seen, labels=labels, fused_lm_head=True).log_probs[:, -N:]
    close(their_ref[mask], ref_logps[mask], 1e-4)

    theirs = trl_grpo_loss(
        None, mask, advantages, None, their_ref, model=policy, prompt_ids=(prompt_ids, prompt_mask), ids=ids,
        loss_type=how, beta=0.1,
    )  # fmt: skip
    logps, _ = gpt.completion_logps(our_policy, prompts, answers)
    ours = our_grpo_loss(logps, mask, advantages, logps.detach(), ref_logps, how, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (their_gradient,) = torch.autograd.grad(theirs, policy.transformer.wte.weight)
    (gradient,) = torch.autograd.grad(ours, our_policy.wte.weight)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_and_masks_equal_trls(scale):
    """GRPOTrainer's way from rewards to advantages, with an answer that was cut off: it counts in the
    baseline and is masked in the loss."""
    trl = pytest.importorskip("trl")
    rng, (P, G) = random.Random(1), (5, 4)
    rewards = torch.tensor([rng.choice([0.0, 0.25, 1.0]) for _ in range(P * G)])
    rewards[4:8] = 0.1  # an equal group
    answers = [[rng.randrange(1, V - 2) for _ in range(rng.randint(1, 6))] + [V - 2] for _ in range(P * G)]
    answers[2], answers[13] = [3] * 7, [4] * 7  # cut off
    prompts = [f"{i // G}" for i in range(P * G)]
    prompt_ids = [[1 + i // G] for i in range(P * G)]
    trainer = grpo_trainer(
        environment_factories=None,
        environments=None,
        tools=[],
        _tokenizer=SimpleNamespace(pad_token_id=V - 1),
        pad_to_multiple_of=None,
        mask_truncated_completions=True,
        eos_token_ids=[V - 2],
        num_iterations=1,
        ref_model=None,
        num_generations=G,
        num_generations_eval=G,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group" if scale else "none",
        reward_funcs=[None],
        reward_func_names=["r"],
        reward_weights=torch.ones(1),
        _generate=lambda p: (prompt_ids, answers, None, p, None, {}, None, []),
        _calculate_rewards=lambda *a: rewards[:, None],
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False),
    )
    trainer.args = SimpleNamespace(
        per_device_train_batch_size=P * G, per_device_eval_batch_size=P * G, steps_per_generation=1,
        gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
    )  # fmt: skip
    theirs = trl.GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": p} for p in prompts])
    ours = grpo.group_advantages(rewards.view(P, G), scale).view(-1)
    close(ours, theirs["advantages"], 1e-5)
    assert (ours[4:8] == 0).all()
    ended = torch.tensor([a[-1] == V - 2 for a in answers])[:, None]
    mask = torch.arange(7) < torch.tensor([len(a) for a in answers])[:, None]
    assert torch.equal(theirs["completion_mask"].bool(), mask & ended)
    assert theirs["num_items_in_batch"] == (mask & ended).sum()
