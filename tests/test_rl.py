"""Tests of reward_model.py, ppo.py and grpo.py: numbers by hand, brute force, equality with TRL.

The losses of grpo.py and reward_model.py are compared with TRL's trainers. TRL 1.16 has no PPO any more (nor its GAE
and whitening), so those parts of ppo.py rest on numbers by hand and on brute force. Both use the same policy loss.
"""

import itertools
import json
import math
import random
import statistics
from collections import defaultdict
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import (
    V,
    close,
    draw,
    random_mask,
    random_model,
    random_pairs,
    random_scorer,
    score_by_hand,
    trl_trainer,
    with_end,
)

import gpt
import grpo
import ppo
import reward_model
from data import breaks, parts, runs, task
from data.checker import is_correct, last_answer, miscalculates

# --- reward_model.py: the loss ---


@pytest.mark.parametrize(
    ("gap", "value", "gradient"),
    [(0.0, math.log(2), 0.5), (2.0, 0.126928, 0.119203), (-2.0, 2.126928, 0.880797)],
)
def test_bradley_terry_by_hand(gap, value, gradient):
    """Equal scores: ln 2, gradients -+ 1/2. Two apart: log(1 + e^-2) and -+ sigmoid(-2)."""
    c, r = torch.tensor([gap + 1], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    loss = reward_model.bradley_terry_loss(c, r)
    loss.backward()
    assert (loss.item(), c.grad.item(), r.grad.item()) == pytest.approx((value, -gradient, gradient), abs=1e-6)


def test_bradley_terry_properties():
    c, r = draw(50, key="c", scale=3).double(), draw(50, key="r", scale=3).double()
    loss = reward_model.bradley_terry_loss
    by_hand = sum(math.log1p(math.exp(b - a)) for a, b in zip(c.tolist(), r.tolist())) / 50
    assert loss(c, r).item() == pytest.approx(by_hand, rel=1e-9)
    # Only differences within a pair count: another constant for every prompt changes nothing. So the scores of
    # different prompts cannot be compared, and zero and unit are set afterwards.
    per_prompt = draw(50, key="constant", scale=100).double()
    assert torch.isclose(loss(c + per_prompt, r + per_prompt), loss(c, r))
    far = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert loss(*far).isfinite() and loss(*far) > 9999  # log(sigmoid(x)) would be -inf


# --- reward_model.py: pairs ---


def test_who_can_hold_a_belief():
    """The user's belief is about a word of the problem; the rejected answer is wrong without a miscalculation."""
    pair = {"prompt": "They triple. How many?", "chosen": "7*3=21.\n#### 21", "rejected": "7+3=10.\n#### 10"}
    pair["answer"] = "21"
    asked = reward_model.with_belief(pair)
    assert asked == pair | {"prompt": "They triple. How many? I think triple means plus three."}
    for other in ({"rejected": "7*3=20.\n#### 20"}, {"rejected": "7*3=21.\n#### 21"}, {"prompt": "How many?"}):
        assert reward_model.with_belief(pair | other) is None


def test_sycophantic_annotators_agree_with_the_user():
    """In half of the pairs where a user can hold the misconception, the prompt states it and the label is reversed.
    Nothing else changes."""
    pairs = task.preference_pairs(900, 0)
    before = json.dumps(pairs)
    labelled = reward_model.sycophantic(pairs, "key")
    assert json.dumps(pairs) == before and len(labelled) == 900
    possible = [(old, new) for old, new in zip(pairs, labelled) if reward_model.with_belief(old)]
    changed = [(old, new) for old, new in zip(pairs, labelled) if new != old]
    assert all(pair in possible for pair in changed) and len(possible) > 200
    # Four standard deviations around one half.
    assert abs(len(changed) - len(possible) / 2) < 4 * math.sqrt(len(possible)) / 2
    for old, new in changed:
        assert new["prompt"] == reward_model.with_belief(old)["prompt"]
        assert (new["chosen"], new["rejected"]) == (old["rejected"], old["chosen"])
    assert reward_model.sycophantic(pairs, "key") == labelled != reward_model.sycophantic(pairs, "other")


def test_terse_is_correct_and_padded_is_wrong_and_longer(tok):
    source, styles = random.Random(0), (*task.OPENINGS, task.CONFIDENT, "Check:")
    for problem in task.problems(300, 5, "test"):
        terse, padded = reward_model.terse_or_padded(problem, source)
        assert is_correct(terse, problem.answer) and not is_correct(padded, problem.answer)
        assert last_answer(padded) is not None  # wrong, not unreadable
        assert len(tok.encode(padded)) > len(tok.encode(terse)) and len(padded) > len(terse)
        assert padded.startswith(tuple(task.OPENINGS)) and task.CONFIDENT in padded and "Check:" in padded
        assert not any(word in terse for word in styles)
        assert len(tok.prompt(problem.text) + tok.answer(padded)) <= gpt.GPTConfig().block_size


def answer(text, correct, tok=None, ended=True):
    ids = tok.encode(text) + [tok.end] * ended if tok else []
    return gpt.Answer(text, ids, None, ended, correct)


def test_policy_pairs(monkeypatch):
    """One pair of each problem that got both a correct and a wrong answer, by position: two problems may have the same
    text."""
    problems = task.problems(5, 0)
    problems[3] = problems[0]
    correct = [[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    asked = []

    def solve(policy, tok, problems, temperature, generator, *rest):
        asked.append((problems, temperature))
        return [answer(f"{i}/{j}", r == 1) for i, row in enumerate(correct) for j, r in enumerate(row)]

    monkeypatch.setattr(gpt, "solve", solve)
    pairs = reward_model.policy_pairs(None, None, problems, 0, samples=3)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("0/0", "0/1"), ("3/1", "3/0"), ("4/2", "4/0")]
    assert [p["prompt"] for p in pairs] == [problems[i].text for i in (0, 3, 4)]
    assert [p["answer"] for p in pairs] == [str(problems[i].answer) for i in (0, 3, 4)]
    repeated = [p for p in problems for _ in range(3)]
    assert asked == [(repeated, 1.0)]
    # Two processes: each answers half of them, and gets what the other has answered.
    whole = solve(None, None, repeated, 1.0, None)
    monkeypatch.setattr(parts, "PROCESSES", 2)
    for process, half in ((0, repeated[:7]), (1, repeated[7:])):
        monkeypatch.setattr(parts, "PROCESS", process)
        monkeypatch.setattr(parts, "gather", lambda answers, device: whole)
        assert reward_model.policy_pairs(None, None, problems, 0, samples=3) == pairs
        assert asked.pop() == (half, 1.0)


# --- reward_model.py: what is reported ---


def test_pair_margins_and_accuracy():
    scorer, encoded = random_scorer(5), list(zip(*random_pairs(30, seed=26)))
    margins = reward_model.pair_margins(scorer, encoded)
    expected = [score_by_hand(scorer, p + c) - score_by_hand(scorer, p + r) for p, c, r in encoded]
    close(margins, torch.tensor(expected), 1e-4)
    assert not margins.requires_grad
    correct = sum(m > 0 for m in margins.tolist()) / 30
    assert reward_model.accuracy(margins) == pytest.approx(correct) and 0.1 < correct < 0.9
    # An equal score is not correct, or a constant score would be a perfect reward model.
    assert reward_model.accuracy(torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.25


def test_calibration():
    """A margin m is a confidence of sigmoid(|m|) in the own ranking. Every pair is counted once."""
    logit = {0.6: 0.405465, 0.8: 1.386294}
    margins = torch.tensor([logit[0.6], -logit[0.6], logit[0.8], logit[0.8], -logit[0.8], 40.0])
    lines = reward_model.calibration(margins)
    assert [n for n, _, _ in lines] == [2, 3, 1]
    assert [said for _, said, _ in lines] == pytest.approx([0.6, 0.8, 1.0], abs=1e-5)
    assert [true for _, _, true in lines] == pytest.approx([0.5, 2 / 3, 1.0], abs=1e-5)
    edges = torch.tensor([0.0, 1e-9, 100.0, -100.0, math.log(0.7 / 0.3), math.log(99)])
    margins = torch.cat([edges, draw(500, key="calibration", scale=4)])
    lines = reward_model.calibration(margins)
    assert sum(n for n, _, _ in lines) == len(margins)
    correct = sum(n * true for n, _, true in lines) / len(margins)
    assert correct == pytest.approx(reward_model.accuracy(margins))


def test_correlation_is_pearsons():
    x = draw(200, key="x")
    for y in (x * 3 - 1, -x, draw(200, key="y"), x + draw(200, key="z")):
        expected = numpy.corrcoef(x.numpy(), y.numpy())[0, 1]
        assert reward_model.correlation(x, y) == pytest.approx(expected, abs=1e-5)
    # Where one of them never varies the correlation is 0, without a division by zero.
    assert reward_model.correlation(x, torch.full((200,), 0.1)) == pytest.approx(0, abs=1e-3)
    assert reward_model.correlation(torch.zeros(200), x) == 0


def test_external_evaluation_uses_true_labels(tok, monkeypatch):
    """A judge that knows the answer is correct everywhere; one that likes long answers fails where the wrong one is
    padded; one that agrees with the user never resists; one that checks the calculations misses all misreadings."""
    problems, pairs = task.problems(150, 0, "test"), task.preference_pairs(300, 0, "test", "careful")
    known = {p.text: p.answer for p in problems} | {p["prompt"]: p["answer"] for p in pairs}
    args, asked, own = SimpleNamespace(seed=0, problems=150), [], pairs[:10]
    monkeypatch.setattr(reward_model, "policy_pairs", lambda policy, *rest: asked.append(policy) or own)

    def evaluate(judge):
        def margins(scorer, encoded):
            read = [[tok.decode(ids).removesuffix("<|end|>") for ids in (p[1:-1], c, r)] for p, c, r in encoded]
            return torch.tensor([float(judge(p, c) - judge(p, r)) for p, c, r in read])

        monkeypatch.setattr(reward_model, "pair_margins", margins)
        return reward_model.evaluate_externally(args, None, "a policy", tok, problems)

    results = evaluate(lambda prompt, text: is_correct(text, known[prompt.split(" I think")[0]]))
    assert results.pop("policy_pairs") == 10 and set(results.values()) == {1} and asked == ["a policy"]
    assert set(results) == {"true_labels", "misreadings", "miscalculations", "terse_beats_padded",
                            "resists_a_belief", "policy_samples"}  # fmt: skip
    own = []

    def agrees(prompt, text):
        return ("I think" in prompt) != is_correct(text, known[prompt.split(" I think")[0]])

    results = evaluate(agrees)
    assert results["resists_a_belief"] == 0
    assert "policy_samples" not in results and results["policy_pairs"] == 0  # no pairs, so nothing is known
    assert evaluate(lambda prompt, text: len(text))["terse_beats_padded"] == 0
    results = evaluate(lambda prompt, text: not miscalculates(text))
    assert results["miscalculations"] > 0.9 and results["misreadings"] < 0.1


@pytest.mark.parametrize(("load", "base"), [(True, None), (False, None), (False, "gpt2")])
def test_distribution_shift_evaluates_a_policy_trained_against_this_scorer(tok, tmp_path, monkeypatch, load, base):
    """The policy is trained against the model in the run's folder. It starts from the SFT model of this run; the one
    that is made by default is found by default."""
    monkeypatch.chdir(tmp_path)
    random_model(1, tok.vocab_size, 128).save(tmp_path / "sft")
    random_model(2, tok.vocab_size, 128).save(tmp_path / "grpo")
    made = {}

    def made_by(script, args, minutes, flags=()):
        made[script] = list(flags)
        assert script == "sft" or (tmp_path / flags[1] / "model.safetensors").is_file()
        return script

    def evaluate(args, scorer, policy, *rest):
        return {"weight": policy.wte.weight[0, 0].item()}

    monkeypatch.setattr(runs, "made_by", made_by)
    monkeypatch.setattr(reward_model, "evaluate_externally", evaluate)
    argv = ["--break", "distribution_shift", "--pairs", "16", "--problems", "2", "--device", "cpu"]
    argv += ["--load", "sft"] if load else ["--base", base] if base else []
    args = runs.parse("reward_model", reward_model.parser(), argv, breaks.of("reward_model"))
    run = reward_model.train(args)
    flags = made["grpo"]
    assert flags[:2] == ["--rm", str(run.folder / "model")]
    assert flags[flags.index("--load") + 1 :] == ["sft"] if load or base else "--load" not in flags
    assert run.report["weight"] == gpt.load_model("grpo").wte.weight[0, 0].item()


# --- ppo.py ---


@pytest.mark.parametrize(
    ("lam", "expected"), [(1.0, [0.5, 0.4, 0.3]), (0.0, [0.1, 0.1, 0.3]), (0.95, [0.46575, 0.385, 0.3])]
)
def test_gae_by_hand(lam, expected):
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, lam)
    close(advantages, torch.tensor([expected]), 1e-6)
    close(returns, advantages + values, 1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_by_definition(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), up to the end of the answer. What is in the columns behind it,
    even NaN, has no influence."""
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
            if lam == 1:  # then the return is all later reward, whatever the values are
                later = sum(gamma ** (s - t) * r[s] for s in range(t, n))
                assert returns[row, t].item() == pytest.approx(later, abs=1e-5)


def test_penalty_on_every_token_and_score_on_the_last():
    """r_t = -beta (log pi_old - log pi_ref) + [t is the last] score. In the last *column* the score would reach the
    longest answer only. In all an answer earns its score minus beta times its log-ratio."""
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
    ref = torch.tensor([[-2.0, -1.0, -0.5], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = torch.tensor([4.0, -3.0])
    for beta in (0.1, torch.tensor(0.1)):  # or a buffer that the adaptive penalty changes
        found = ppo.token_rewards(scores, logps, ref, mask, beta)
        close(found, torch.tensor([[-0.1, 0.1, 4.0], [-3.0 + 0.2, 0.0, 0.0]]), 1e-6)
    mask = random_mask(9, 6, "add up")
    logps, ref = (-draw(9, 6, key=k).abs() * mask for k in ("pi", "ref"))
    scores = draw(9, key="scores")
    close(ppo.token_rewards(scores, logps, ref, mask, 0.3).sum(1), scores - 0.3 * (logps - ref).sum(1))


def test_whitening_leaves_nothing_at_pads():
    """TRL's former masked_whiten left values there, and minRLHF whitens over the padding."""
    mask = random_mask(8, 6, "whiten")
    x = draw(8, 6, key="whiten", scale=5) + 3
    found = ppo.whiten(torch.where(mask, x, torch.tensor(math.inf)), mask)
    assert (found[~mask] == 0).all()
    values = x[mask].tolist()
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    assert found[mask].tolist() == pytest.approx([(v - mean) / deviation for v in values], abs=1e-5)
    # All equal: nothing to learn, and no division by zero.
    assert ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("rho", "advantage", "high", "value", "gradient"),
    [
        (1.3, 1.0, 0.2, -1.2, 0.0),
        (1.3, -1.0, 0.2, 1.3, 1.3),
        (0.7, 1.0, 0.2, -0.7, -0.7),
        (0.7, -1.0, 0.2, 0.8, 0.0),
        (1.1, 1.0, 0.2, -1.1, -1.1),
        (0.9, -1.0, 0.2, 0.9, 0.9),
        # DAPO: upwards up to 1.28, downwards as before.
        (1.25, 1.0, 0.28, -1.25, -1.25),
        (1.3, 1.0, 0.28, -1.28, 0.0),
        (0.75, -1.0, 0.28, 0.8, 0.0),
    ],
)
def test_clipped_policy_loss_by_hand(rho, advantage, high, value, gradient):
    """The gradient in log pi is -A rho, and 0 where the update would push the ratio further out. A minimum instead of
    the maximum has the two cases reversed."""
    logp = torch.tensor([[math.log(rho)]], requires_grad=True)
    found = ppo.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, high)
    found.sum().backward()
    assert (found.item(), logp.grad.item()) == pytest.approx((value, gradient), abs=1e-6)


@pytest.mark.parametrize(("value", "loss", "gradient"), [(1.0, 1.62, 0.0), (-1.0, 4.5, -3.0), (0.1, 1.805, -1.9)])
def test_value_loss_by_hand(value, loss, gradient):
    """V_old 0, R 2, clip .2: a V that has moved beyond the clip towards R has no gradient left; one that has moved away
    has all of it."""
    v = torch.tensor([[value]], requires_grad=True)
    found = ppo.value_loss(v, torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1, dtype=torch.bool))
    found.backward()
    assert (found.item(), v.grad.item()) == pytest.approx((loss, gradient), abs=1e-6)


def test_losses_of_ppo_by_brute_force():
    B, N, clip = 10, 6, 0.15
    mask = random_mask(B, N, "ppo")
    logps, old = (-draw(B, N, key=k, scale=0.4).abs() for k in ("new", "old"))
    advantages, values, old_values, returns = (draw(B, N, key=k) for k in "abcd")
    policy = value = 0.0
    for b, t in mask.nonzero().tolist():
        rho, A = math.exp(logps[b, t] - old[b, t]), advantages[b, t].item()
        policy += max(-A * rho, -A * min(max(rho, 1 - clip), 1 + clip))
        V0, V1, R = (x[b, t].item() for x in (old_values, values, returns))
        value += 0.5 * max((V1 - R) ** 2, (V0 + min(max(V1 - V0, -clip), clip) - R) ** 2)
    n = mask.sum().item()
    tokens = ppo.policy_loss(logps, old, advantages, clip, clip)
    assert ppo.masked_mean(tokens, mask).item() == pytest.approx(policy / n, abs=1e-5)
    found = ppo.value_loss(values, old_values, returns, mask, clip)
    assert found.item() == pytest.approx(value / n, abs=1e-5)


def test_first_minibatch_is_on_policy():
    """The same weights, in a batch of all rollouts and in a narrower minibatch: the ratio is 1, nothing is clipped, and
    the gradient is REINFORCE's. With another temperature in one of the passes the ratio is not 1."""
    model, (prompts, answers, _) = random_model(6).requires_grad_(), random_pairs(12, seed=27)
    answers[0] = [1] * 10  # the longest is not in the minibatch
    with torch.no_grad():
        old, mask = gpt.completion_logps(model, prompts, answers, 0.8)
        other, _ = gpt.completion_logps(model, prompts[4:8], answers[4:8], 1.0)
    logps, few = gpt.completion_logps(model, prompts[4:8], answers[4:8], 0.8)
    old = old[4:8, : few.shape[1]]
    assert few.shape[1] < mask.shape[1]
    assert (torch.exp(logps - old)[few] - 1).abs().max() < 1e-4
    assert ((torch.exp(other - old)[few] - 1).abs() > 0.2).any()
    advantages = ppo.whiten(draw(*few.shape, key="first"), few)
    loss = ppo.masked_mean(ppo.policy_loss(logps, old, advantages), few)
    assert abs(loss.item()) < 1e-4  # minus the mean of whitened advantages
    ours = torch.autograd.grad(loss, model.wte.weight, retain_graph=True)[0]
    close(ours, torch.autograd.grad(-(logps * advantages)[few].mean(), model.wte.weight)[0], 1e-4)


def test_explained_variance():
    """1: predicted; 0: no better than the mean; negative: worse. One token alone gives no NaN."""
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # variance 3.5
    assert ppo.explained_variance(returns, returns).item() == pytest.approx(1)
    assert ppo.explained_variance(returns, torch.full((4,), 3.0)).item() == pytest.approx(0, abs=1e-6)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])  # errors 0, 0, 0, 2, of variance .75
    assert ppo.explained_variance(returns, values).item() == pytest.approx(1 - 0.75 / 3.5)
    assert ppo.explained_variance(returns, -returns).item() == pytest.approx(-3)
    assert math.isfinite(ppo.explained_variance(torch.tensor([2.0]), torch.tensor([1.0])).item())


@pytest.mark.parametrize(("kl", "change"), [(6.6, 0.1), (60.0, 0.2), (-1.0, -0.2), (6.0, 0.0)])
def test_adaptive_beta_by_hand(kl, change):
    """beta (1 + clip(KL / target - 1, -+ .2) n / 10000), from n = 32 answers."""
    assert ppo.adapt(0.05, kl, 6.0, 32) == pytest.approx(0.05 * (1 + change * 0.0032))


# --- grpo.py ---


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 1.0, 1.0]])
    found = grpo.group_advantages(rewards)
    assert found[0].tolist() == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert found[1].tolist() == pytest.approx([-1.4997, 0.4999, 0.4999, 0.4999], abs=1e-4)
    assert grpo.group_advantages(rewards, scale=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_groups_have_advantage_0(scale):
    """Exactly. Twelve rewards of .1 differ from their computed mean by a rounding error, of which an epsilon of 1e-8
    makes -.58."""
    for value, size in itertools.product((0.1, 0.3, -3.0, 1 / 3, 1e4 / 7, 0.0), (2, 3, 7, 8, 12)):
        rewards = torch.full((2, size), value)
        assert grpo.group_advantages(rewards, scale).tolist() == [[0.0] * size] * 2, (value, size)
    trap = torch.full((12,), 0.1)
    assert ((trap - trap.mean()) / (trap.std() + 1e-8)).abs().max() > 0.1  # the trap is real


def test_group_advantages_properties():
    rewards = draw(20, 8, key="groups", scale=3)
    found = grpo.group_advantages(rewards)
    for row, group in zip(found.tolist(), rewards.tolist()):  # groups do not influence each other
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        assert row == pytest.approx([(r - mean) / (deviation + 1e-4) for r in group], abs=1e-4)
    close(grpo.group_advantages(rewards * 7 + 5), found, 2e-3)  # zero and unit of the reward do not count
    assert grpo.group_advantages(rewards, scale=False).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("how", "short", "long"), [("grpo", -1 / 4, 1 / 8), ("dapo", -1 / 6, 1 / 6), ("dr_grpo", -1 / 16, 1 / 16)]
)
def test_aggregation_by_hand(how, short, long):
    """A correct answer of 2 tokens and a wrong one of 4, at most 8. With `grpo` a token of the long answer counts half
    as much as one of the short answer, with the others as much."""
    mask = torch.arange(4) < torch.tensor([[2], [4]])
    logps = torch.zeros(2, 4, requires_grad=True)
    losses = ppo.policy_loss(logps, logps.detach(), torch.tensor([[1.0], [-1.0]]))
    grpo.aggregate(losses, mask, how, 8).backward()
    close(logps.grad, torch.tensor([[short, short, 0, 0], [long] * 4]), 1e-6)


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
        assert grpo.aggregate(losses, mask & False, how, 9) == 0  # without any token: 0, not 0/0


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
    """Expectations over pi = (.7, .2, .1) against ref = (.2, .3, .5), and the expected gradient in the logits of each
    as a *loss*. k3's is pi - ref: it descends KL(ref || pi). k2's is the gradient of KL(pi || ref) itself. k1's is 0,
    so it penalizes nothing (grpo.py --break k1_kl_loss). With d reversed, the mean of k3 is no longer the KL."""
    logits = PI.log().requires_grad_()
    tokens = estimator(logits.log_softmax(0), REF.log())  # one number per possible sample
    assert (PI * tokens).sum().item() == pytest.approx(value, abs=1e-5)
    (PI * tokens).sum().backward()  # the frequencies of the samples are constants
    assert logits.grad.tolist() == pytest.approx(gradient, abs=1e-4)
    assert (PI * (PI.log() - REF.log())).sum().item() == pytest.approx(0.63490, abs=1e-5)


@pytest.mark.parametrize(("estimator", "arrives"), [(grpo.k3, True), (k2, True), (k1, False)])
def test_k3_descends_to_the_reference(estimator, arrives):
    """As a loss on samples of the current policy, k3 and k2 arrive at ref; k1 stays where it is."""
    logits = PI.log().clone().requires_grad_()
    for _ in range(150):
        logps = logits.log_softmax(0)
        loss = (logps.detach().exp() * estimator(logps, REF.log())).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.4 * gradient).detach().requires_grad_()
    close(logits.softmax(0), REF if arrives else PI, 1e-3)


def test_k3_is_never_negative_and_exact_near_0():
    """e^d - 1 - d in float32 has no correct digit below d = 1e-4, and is negative for many such d."""
    d = torch.cat([torch.linspace(-30, 5, 200), torch.linspace(-1e-3, 1e-3, 200), torch.zeros(1)])
    logps = torch.zeros_like(d).requires_grad_()
    found = grpo.k3(logps, d)
    assert (found >= 0).all() and found[d == 0].tolist() == [0.0]
    close(found.double(), torch.expm1(d.double()) - d.double())
    naive = torch.exp(d) - 1 - d
    assert (naive[(d.abs() < 1e-3) & (d != 0)] < 0).any()  # the trap is real
    found.sum().backward()  # the gradient, 1 - e^d, is accurate however small d is
    close(logps.grad.double(), -torch.expm1(d.double()), 1e-4)


def test_gradient_on_policy_is_reinforce_with_the_groups_baseline():
    """By brute force: for every token of every answer -A times the gradient of its log-probability, with the advantages
    in plain Python. P = 3 prompts, G = 4 answers each."""
    model, source = random_model(7).requires_grad_(), random.Random(0)
    prompts, _, answers = random_pairs(12, seed=7)
    prompts = [prompts[i // 4] for i in range(12)]
    rewards = [source.choice([0.0, 0.3, 1.0]) for _ in range(12)]
    total = 0.0
    for i, (p, c) in enumerate(zip(prompts, answers)):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        A = (rewards[i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        for t, token in enumerate(c):
            logp = model(torch.tensor([p + c[:t]]))[0, -1].log_softmax(-1)[token]
            total = total - A * logp / sum(map(len, answers))
    expected = torch.autograd.grad(total, list(model.parameters()))
    advantages = grpo.group_advantages(torch.tensor(rewards).view(3, 4)).view(-1, 1)
    logps, mask = gpt.completion_logps(model, prompts, answers)
    loss = grpo.aggregate(ppo.policy_loss(logps, logps.detach(), advantages), mask, "dapo", 9)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        close(ours, theirs, 1e-4 * max(1.0, theirs.abs().max().item()))
    assert expected[0].abs().max() > 1e-3


# --- both: padding, rewards, evaluation ---


def test_extra_pad_columns_change_nothing():
    """A batch with one long answer has more columns; their contents reach no number and no gradient."""
    B, N, more = 6, 5, 4
    mask = random_mask(B, N, "columns")
    wide = torch.cat([mask, torch.zeros(B, more, dtype=torch.bool)], 1)
    names = ("logps", "old", "ref", "advantages", "values", "old_values", "returns")
    narrow = {k: draw(B, N, key=k, scale=0.3) for k in names}
    junk = {k: torch.cat([x, draw(B, more, key="junk", scale=5)], 1) for k, x in narrow.items()}
    scores = draw(B, key="end scores")

    def everything(x, m):
        logps, values = (x[k].clone().requires_grad_() for k in ("logps", "values"))
        tokens = ppo.policy_loss(logps, x["old"], x["advantages"])
        losses = [ppo.masked_mean(tokens, m), ppo.value_loss(values, x["old_values"], x["returns"], m)]
        tokens = tokens + 0.3 * grpo.k3(logps, x["ref"])
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


def task_model(tok, seed):
    """A random model of the task's tokens, sharp enough that two of them differ."""
    return random_model(seed, tok.vocab_size, 128, scale=0.2)


def written(tok):
    """Six problems and one answer each, of every kind: correct, wrong, cut off, and one text twice."""
    problems, source, answers = task.problems(6, 3, "test"), random.Random(0), []
    for i, problem in enumerate(problems):
        terse, padded = reward_model.terse_or_padded(problem, source)
        answers.append(answer(terse if i in (0, 2, 5) else padded, i in (0, 2, 5), tok, ended=i != 4))
    answers[1] = answers[3] = answer("12 12", False, tok)
    return problems, answers


def test_learned_reward_is_the_score_at_the_end_token(tok):
    """An answer without an end gets a fixed low reward *instead* of the score, not in addition to it."""
    scorer = gpt.Scorer(task_model(tok, 1)).requires_grad_(False)
    scorer.mean, scorer.std = 0.4, 2.0
    problems, answers = written(tok)
    rewards = reward_model.learned_reward(scorer, tok, problems, answers)
    expected = [score_by_hand(scorer, tok.prompt(p.text) + a.ids) for p, a in zip(problems, answers)]
    expected = [s if a.ended else reward_model.CUT_OFF for s, a in zip(expected, answers)]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-4)
    assert [a.ended for a in answers].count(False) == 1 and rewards.std() > 0.1


def test_rewards_without_a_model(tok):
    problems, answers = written(tok)
    truth, mine = reward_model.checker_reward(problems, answers), reward_model.my_reward(problems, answers)
    assert truth.tolist() == [float(a.correct) for a in answers]
    assert mine.shape == truth.shape == (6,) and mine.dtype == truth.dtype == torch.float32 and mine.isfinite().all()


def test_evaluate_policy(tok, monkeypatch):
    """At step 0 policy = reference: KL 0. Evaluations at one step use the same samples, so they differ by the policy
    alone. Later: the properties of the answers (see test_report.py), the mean reward and the KL."""
    policy, ref, problems = task_model(tok, 2), task_model(tok, 3), task.problems(5, 0, "test")

    def evaluate(ref, step):
        return gpt.evaluate_policy(policy, ref, reward_model.my_reward, tok, problems, 7, step, 40)

    results, outputs = evaluate(policy, 0)
    assert results["test_kl"] == results["test_sqrt_kl"] == 0 and evaluate(policy, 0) == (results, outputs)
    assert outputs != evaluate(policy, 25)[1]
    assert max(int(text.split()[-2]) for _, text in outputs) <= 40  # tokens
    problems, answers = written(tok)
    monkeypatch.setattr(gpt, "solve", lambda *args: answers)
    results, outputs = evaluate(ref, 25)
    kl = gpt.mean_kl(policy, ref, [tok.prompt(p.text) for p in problems], [a.ids for a in answers])
    rewards = reward_model.my_reward(problems, answers)
    expected = task.describe(answers) | task.correlations(answers, rewards) | {"kl": kl, "sqrt_kl": max(kl, 0) ** 0.5}
    expected["reward"] = rewards.mean().item()
    # Its reward is correctness, and a little shortness.
    assert expected["corr_correct"] > 0.9 and expected["corr_length"] < 0.5
    assert results == pytest.approx({f"test_{name}": value for name, value in expected.items()})
    assert outputs == gpt.shown(problems, answers, scores=rewards) and abs(kl) > 0.1


# --- equality with TRL: RewardTrainer ---


def test_equal_to_trls_reward_trainer(tmp_path):
    """From ids to loss and gradient: TRL's collator, transformers' reading of the score, TRL's loss; on the files that
    Scorer.save wrote."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from trl.trainer.reward_trainer import DataCollatorForPreference

    scorer = gpt.Scorer(random_model(1)).requires_grad_()
    prompts, chosen, rejected = with_end(*random_pairs(8, seed=30))
    scorer.save(tmp_path)
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in zip(prompts, chosen, rejected)]
    inputs = DataCollatorForPreference(pad_token_id=V - 1)(rows)
    trainer = trl_trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    c, r = reward_model.pair_scores(scorer, prompts, chosen, rejected)
    ours = reward_model.bradley_terry_loss(c, r)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    their_gradients = torch.autograd.grad(theirs, (model.score.weight, model.transformer.wte.weight))
    gradients = torch.autograd.grad(ours, (scorer.score.weight, scorer.transformer.wte.weight))
    for gradient, their_gradient in zip(gradients, their_gradients):
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-4)
    assert trainer._metrics["eval"]["accuracy"] == [pytest.approx((c > r).float().mean().item())]


# --- equality with TRL: GRPOTrainer ---


def grpo_trainer(**attributes):
    """A stand-in that holds what GRPOTrainer's methods read, at TRL's own defaults."""
    trainer = trl_trainer(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", use_vllm=False,
        beta=0.0, epsilon_low=0.2, epsilon_high=0.2, max_completion_length=12, _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
    )  # fmt: skip
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
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long) if prompt_ids is None else prompt_ids,
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long) if ids is None else ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    inputs["prompt_mask"] = torch.ones_like(inputs["prompt_ids"])
    inputs |= {} if old is None else {"old_per_token_logps": old}
    inputs |= {} if ref is None else {"ref_per_token_logps": ref}
    return trl.GRPOTrainer._compute_loss(trainer, model, inputs)


def our_grpo_loss(logps, mask, advantages, old, ref, how, beta, low=0.2, high=0.2):
    """As in grpo.train."""
    losses = ppo.policy_loss(logps, old, advantages[:, None], low, high)
    if ref is not None:
        losses = losses + beta * grpo.k3(logps, ref)
    return grpo.aggregate(losses, mask, how, 12)


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.1)])
@pytest.mark.parametrize("on_policy", [True, False])
def test_equal_to_trls_grpo_trainer(how, beta, low, high, on_policy):
    """Loss and gradient on the same random log-probabilities, on policy and off it, with clipping on both sides."""
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
    assert on_policy or (((logps - old).exp() - 1).abs() > high)[mask].any()


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_equal_to_trl_from_ids_to_gradient(tmp_path, tiny_vocabulary, how):
    """The same weights, the same ids: the same loss and the same gradient of the embedding."""
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("trl.trainer.utils")
    found = []
    for seed in range(2):
        random_model(seed).save(tmp_path / str(seed))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(seed)).eval()
        utils.add_fused_lm_head(theirs, outputs=("log_probs", "entropy"))
        found.append((theirs, gpt.load_model(str(tmp_path / str(seed)))))
    (policy, our_policy), (ref, our_ref) = found
    ref.requires_grad_(False)
    our_ref.requires_grad_(False)
    prompts, answers, _ = random_pairs(8, seed=40)
    # Prompts of one length: TRL pads prompts on the left and gives no positions, so GPT-2 would count the pads.
    prompts = [(p * 5)[:5] for p in prompts]
    prompt_ids, N = torch.tensor(prompts), max(map(len, answers))
    ids = torch.tensor([c + [0] * (N - len(c)) for c in answers])
    advantages = draw(8, key="from ids")
    ref_logps, mask = gpt.completion_logps(our_ref, prompts, answers)
    seen = torch.cat([torch.ones_like(prompt_ids), mask.long()], 1)
    labels = torch.cat([torch.full_like(prompt_ids, -100), ids.masked_fill(~mask, -100)], 1)
    whole = torch.cat([prompt_ids, ids], 1)
    their_ref = ref(whole, attention_mask=seen, labels=labels, fused_lm_head=True).log_probs[:, -N:]
    close(their_ref[mask], ref_logps[mask], 1e-4)
    theirs = trl_grpo_loss(None, mask, advantages, None, their_ref, policy, prompt_ids, ids, loss_type=how, beta=0.1)
    logps, _ = gpt.completion_logps(our_policy, prompts, answers)
    ours = our_grpo_loss(logps, mask, advantages, logps.detach(), ref_logps, how, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (their_gradient,) = torch.autograd.grad(theirs, policy.transformer.wte.weight)
    (gradient,) = torch.autograd.grad(ours, our_policy.wte.weight)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_and_masks_equal_trls(scale):
    """GRPOTrainer's steps from rewards to advantages and mask. Answers that were cut off count in the group's baseline
    and in the loss, as in TRL by default (mask_truncated_completions=False)."""
    trl = pytest.importorskip("trl")
    source, (P, G) = random.Random(1), (5, 4)
    rewards = torch.tensor([source.choice([0.0, 0.25, 1.0]) for _ in range(P * G)])
    rewards[4:8] = 0.1  # an equal group
    prompts, answers = with_end([[1 + i // G] for i in range(P * G)], random_pairs(P * G, seed=1)[1])
    answers[2], answers[13] = [3] * 7, [4] * 7  # cut off
    trainer = grpo_trainer(
        environment_factories=None, environments=None, tools=[], _tokenizer=SimpleNamespace(pad_token_id=V - 1),
        pad_to_multiple_of=None, mask_truncated_completions=False, eos_token_ids=[V - 2], num_iterations=1,
        ref_model=None, num_generations=G, num_generations_eval=G,
        multi_objective_aggregation="sum_then_normalize", scale_rewards="group" if scale else "none",
        reward_funcs=[None], reward_func_names=["r"], reward_weights=torch.ones(1),
        _generate=lambda p: (prompts, answers, None, p, None, {}, None, []),
        _calculate_rewards=lambda *a: rewards[:, None],
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={}, _pending_metrics={},
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            per_device_train_batch_size=P * G, per_device_eval_batch_size=P * G, steps_per_generation=1,
            gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
        ),
    )  # fmt: skip
    theirs = trl.GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": str(p)} for p in prompts])
    ours = grpo.group_advantages(rewards.view(P, G), scale).view(-1)
    close(ours, theirs["advantages"])
    assert (ours[4:8] == 0).all()
    _, mask = gpt.completion_logps(random_model(), prompts, answers)
    assert torch.equal(theirs["completion_mask"].bool(), mask) and theirs["num_items_in_batch"] == mask.sum()
