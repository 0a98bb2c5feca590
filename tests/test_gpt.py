"""Tests of gpt.py: the model against itself, brute force and `transformers`; sampling; tokens; checkpoints."""

import argparse
import base64
import json
import math
import os
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from helpers import (
    CONTEXT,
    V,
    close,
    draw,
    exits,
    ragged,
    random_ids,
    random_model,
    random_pairs,
    random_scorer,
    randomize,
    right_padded,
    score_by_hand,
    with_end,
)
from safetensors.torch import load_file, save_file

import gpt
from data import checkpoints, lessons, make_vocab, runs, task
from data.runs import rng

REAL = os.environ.get("REAL_DATA_DIR")
pytestmark = pytest.mark.usefixtures("tiny_vocabulary")


def new_cache(model, batch, length=CONTEXT):
    return gpt.Cache(model.config, batch, length, "cpu", torch.float32)


# --- the transformer ---


def test_torchs_causal_flag_is_wrong_for_cached_decoding():
    """Why gpt.py builds a mask: `is_causal` aligns to the upper left corner, so one new query with five keys attends
    to the first key only. If torch changes this, a comment in gpt.py is out of date."""
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), v[:, :, :1])
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(1, 5, dtype=torch.bool))
    assert (seen - v[:, :, :1]).abs().max() > 0.1


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 7], [1, 10, 1], [4, 1, 1, 6]])
def test_cached_equals_uncached(chunks):
    """Token by token, all at once, and in pieces: a later chunk attends to the whole past, not to its own future."""
    model, ids = random_model(), random_ids(3, 12)
    cache, start, parts = new_cache(model, 3), 0, []
    for size in chunks:
        parts.append(model(ids[:, start : start + size], cache=cache))
        start += size
        assert cache.length == start
    close(torch.cat(parts, 1), model(ids))


@pytest.mark.parametrize("chunks", [[1] * 6, [3, 3], [1, 4, 1]])
def test_left_padding_changes_nothing(chunks):
    """Cached and uncached, padded rows equal the row alone. The pads have random ids, so attending to one would show,
    and a position that counts the pads would too."""
    model, prompts = random_model(), ragged(6)
    P = max(map(len, prompts))
    ids, valid = random_ids(6, P, seed=99), torch.zeros(6, P + 6, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, P - len(prompt) :], valid[row, P - len(prompt) :] = torch.tensor(prompt), True
    new = random_ids(6, 6, seed=5)
    cache, start = new_cache(model, 6), P
    parts = [model(ids, valid[:, :P], cache)]
    for size in chunks:
        parts.append(model(new[:, start - P : start - P + size], valid[:, : start + size], cache))
        start += size
    cached, uncached, blind = torch.cat(parts, 1), model(torch.cat([ids, new], 1), valid), model(ids)
    assert uncached.isfinite().all()  # a pad with nothing to attend to would spread NaN
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([torch.tensor(prompt), new[row]])[None])[0]
        close(cached[row, P - len(prompt) :], alone)
        close(uncached[row, P - len(prompt) :], alone)
        # The test can fail: without `valid` the padded rows differ.
        assert len(prompt) == P or (blind[row, -1] - alone[len(prompt) - 1]).abs().max() > 0.1


def test_cache_keep():
    """Rows that stay in the batch keep their own keys."""
    model, ids = random_model(), random_ids(6, 10)
    for rows in (torch.tensor([True, False, False, True, True, False]), torch.tensor([5, 0, 3])):
        cache = new_cache(model, 6)
        model(ids[:, :7], cache=cache)
        cache.keep(rows)
        assert cache.k.shape[1] == cache.v.shape[1] == 3
        close(model(ids[rows, 7:], cache=cache), model(ids[rows])[:, 7:])


def test_causal():
    """Changing token t changes the logits from t on, and none before it, to the bit."""
    model, ids = random_model(), random_ids(1, 12)
    before = model(ids)
    for t in range(12):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-3


def test_context_is_a_limit():
    model = random_model()
    assert model(random_ids(1, CONTEXT)).shape == (1, CONTEXT, V)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens"):
        model(random_ids(1, CONTEXT + 1))
    # A full cache cannot slide: its keys contain absolute positions.
    cache = new_cache(model, 1, CONTEXT + 1)
    model(random_ids(1, CONTEXT), cache=cache)
    with pytest.raises(ValueError, match="context"):
        model(random_ids(1, 1), cache=cache)


def test_embedding_is_tied_and_starts_with_length_1():
    """One matrix is both input and output embedding."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(vocab_size=598))
    assert sum(p.shape[0] == 598 for p in model.parameters()) == 1
    lengths = model.wte.weight.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.02) and lengths.std().item() < 0.1
    ids = random_ids(8, 65, vocab_size=598)
    assert (model(ids).argmax(-1) == ids).float().mean() > 0.9  # so at first a token predicts itself


def test_a_new_scorer_gives_scores_of_size_1():
    """The weights have standard deviation 1 / sqrt(width + 1), so the first scores have the same size at any width."""
    for width in (32, 256):
        torch.manual_seed(0)
        config = gpt.GPTConfig(vocab_size=V, block_size=24, n_layer=1, n_head=2, n_embd=width)
        scorers = [gpt.Scorer(gpt.GPT(config))]
        scorers += [gpt.Scorer(scorers[0].transformer) for _ in range(300)]
        hidden = scorers[0].transformer.hidden(torch.arange(20)[None])[0, -1]
        scores = torch.stack([scorer(hidden) for scorer in scorers])
        assert 0.8 < scores.std() < 1.2


@pytest.mark.parametrize("steps", [1, 5, 20, 21, 400])
def test_learning_rate(steps):
    """Above 0 before the end (else a step is wasted), never above --lr, 0 at the end; also where a run is shorter than
    its warmup."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    (group,), rates = optimizer.param_groups, []
    for step in range(steps + 2):
        gpt.set_lr(optimizer, 0.5, step, steps)
        rates.append(group["lr"])
    assert all(0 < rate <= 0.5 for rate in rates[:steps]) and rates[steps:] == [0, 0]
    assert rates[0] == pytest.approx(0.5 / 20)
    if steps == 400:
        top = rates.index(max(rates))
        assert top in (18, 19, 20) and max(rates) > 0.47
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[200] == pytest.approx(0.25)
    gpt.set_lr(optimizer, 0.5, 0, steps, warmup=1)
    assert group["lr"] == 0.5


# --- sampling ---


def greedy_by_hand(model, prompt, n, stop=()):
    """Greedy decoding without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def test_greedy_rows_end_at_different_times():
    """Finished rows leave the batch; each of the others must go on with its own keys, positions and output row. The
    stop token is part of the completion."""
    model, prompts = random_model(1), ragged(30, seed=1)
    free = [greedy_by_hand(model, prompt, 14) for prompt in prompts]
    assert gpt.sample(model, prompts, 14, [V], temperature=0)[0] == free
    stop = random.Random(3).sample(sorted({i for ids in free for i in ids}), 3)
    expected = [greedy_by_hand(model, prompt, 14, stop) for prompt in prompts]
    assert len({len(ids) for ids in expected}) >= 6  # or this tests nothing
    assert any(ids[-1] not in stop for ids in expected)  # at least one is cut off
    found, logps = gpt.sample(model, prompts, 14, stop, temperature=0)
    assert found == expected
    scored, mask = gpt.completion_logps(model, prompts, found)
    for row, logp in enumerate(logps):
        close(logp, scored[row][mask[row]])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_logps_equal_completion_logps(temperature):
    """The ratio of policy and sampler is 1 if they are the same model. It is not if sampling and scoring use different
    temperatures, as in some public code."""
    model, prompts = random_model(2), ragged(20, seed=2)
    ids, logps = gpt.sample(model, prompts, 10, [3, 4, 5], temperature, generator=rng("logps", temperature))
    assert len({len(c) for c in ids}) > 3
    scored, mask = gpt.completion_logps(model, prompts, ids, temperature)
    for row, (completion, logp) in enumerate(zip(ids, logps)):
        assert logp.dtype == torch.float32
        assert not {3, 4, 5} & set(completion[:-1])  # a stop token occurs at the end only
        assert completion[-1] in (3, 4, 5) or len(completion) == 10
        close(logp, scored[row][mask[row]])
    other, _ = gpt.completion_logps(model, prompts, ids, 1.2)
    assert (other - scored).abs().max() > 0.05


def test_banned_tokens():
    """They are never sampled, and both log-probabilities are those of the renormalized distribution."""
    model, prompts, banned = random_model(2), ragged(20, seed=3), list(range(0, V, 2))
    ids, logps = gpt.sample(model, prompts, 8, [3], banned=banned, generator=rng("banned"))
    assert all(i % 2 for c in ids for i in c)
    scored, mask = gpt.completion_logps(model, prompts, ids, banned=banned)
    close(torch.cat(logps), scored[mask])
    assert (scored - gpt.completion_logps(model, prompts, ids)[0]).max() > 0.1


def by_hand(logits, top_k, top_p):
    """{token: probability} after top-k, then top-p, in plain Python."""
    probs = dict(enumerate(logits.double().softmax(-1).tolist()))
    order = sorted(probs, key=probs.get, reverse=True)
    order = order[:top_k] if top_k else order
    total = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += probs[i] / total
    return {i: probs[i] / sum(probs[j] for j in kept) for i in kept}


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5, 0.01])
def test_filter_logits_by_brute_force(top_k, top_p):
    """The likeliest token always stays, however small top_p is; k above the vocabulary size is no error."""
    logits = torch.randn(50, 11, generator=rng("filter logits")) * 3
    probs = gpt.filter_logits(logits, top_k, top_p).softmax(-1)
    for row, p in zip(logits, probs):
        expected = by_hand(row, top_k, top_p)
        assert {i: p[i].item() for i in p.nonzero()[:, 0].tolist()} == pytest.approx(expected, abs=1e-5)
    assert (top_k, top_p) != (0, 1.0) or torch.equal(gpt.filter_logits(logits), logits)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (6, 0.8)])
def test_sampled_logps_with_filters(top_k, top_p):
    """With top-k and top-p the returned log-probabilities are of the filtered, renormalized distribution."""
    model, prompt, T = random_model(3), [7, 1, 12], 1.3
    ids, logps = gpt.sample(model, [prompt] * 200, 1, [V], T, top_k, top_p, rng("filter"))
    kept = by_hand(model(torch.tensor([prompt]))[0, -1] / T, top_k, top_p)
    assert {c[0] for c in ids} <= set(kept) and len(kept) < 25
    assert len({c[0] for c in ids}) > 1
    for completion, logp in zip(ids, logps):
        assert abs(logp.item() - math.log(kept[completion[0]])) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature):
    """20000 samples of one token. For counts n_i with expectation e_i, sum (n_i - e_i)^2 / e_i has mean df and
    variance 2 df; the bound is five standard deviations. A temperature 20 % off lies far outside."""
    model, prompt, n = random_model(4), [5, 6, 7], 20000
    ids, _ = gpt.sample(model, [prompt] * n, 1, [V], temperature, generator=rng("chi"))
    counts = torch.bincount(torch.tensor(ids)[:, 0], minlength=V).double()
    logits = model(torch.tensor([prompt]))[0, -1].double()

    def chi_square(T):
        expected = n * (logits / T).softmax(-1)
        common = expected >= 5  # rare tokens are pooled, because the approximation needs large counts
        e = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
        c = torch.cat([counts[common], counts[~common].sum()[None]])
        return ((c - e) ** 2 / e).sum().item(), len(e) - 1

    statistic, df = chi_square(temperature)
    assert df >= 8 and statistic < df + 5 * math.sqrt(2 * df)
    wrong, df = chi_square(temperature * 1.2)
    assert wrong > df + 20 * math.sqrt(2 * df)


def test_draw_tokens_at_the_edges(monkeypatch):
    """Tokens of probability 0 are never drawn, not even by the smallest and the largest random number, or by one that
    falls on a border."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for u, token in ((0.0, 1), (0.5 - 2**-53, 1), (0.5, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *a, u=u, **k: torch.tensor([[u]], dtype=torch.float64))
        assert gpt.draw_tokens(probs).item() == token


def test_sampling_is_a_function_of_the_seed():
    model, prompts = random_model(), ragged(5)
    one, two, other = (gpt.sample(model, prompts, 8, [0], generator=rng(seed))[0] for seed in (1, 1, 2))
    assert one == two != other


def test_what_does_not_fit_the_context(tok):
    model = random_model()
    assert len(gpt.sample(model, [[1] * 10], CONTEXT - 10, [V])[0][0]) == CONTEXT - 10
    with pytest.raises(ValueError, match="a prompt of 10 tokens and 15 new ones"):
        gpt.sample(model, [[1], [1] * 10], CONTEXT - 9, [V])
    problems = [SimpleNamespace(text=text) for text in ("Leo", "Leo has 7 eggs.", "eggs")]
    room = CONTEXT - len(tok.prompt("Leo has 7 eggs."))
    gpt.check_room(model, tok, problems, room)
    exits(gpt.check_room, model, tok, problems, room + 1, match=f"leaves {room} tokens")


def constant_model(tok, favorite):
    """A model that answers everything with one token, again and again."""
    model = random_model(0, tok.vocab_size, 64)
    model.ln_f.weight.zero_()
    model.ln_f.bias.copy_(model.wte.weight[favorite] * 100)
    return model


def test_solve_cuts_off_the_end_token_only(tok):
    """The checker reads the text without <|end|>; an answer that was cut off keeps its last token."""
    problems = [SimpleNamespace(text=text, answer=a) for text, a in (("Leo has 7 eggs.", 7), ("Ann?", 777777))]
    for favorite, n, ended in ((tok.end, 1, True), (tok.encode("7")[0], 6, False)):
        answers = gpt.solve(constant_model(tok, favorite), tok, problems, 0, None, max_new_tokens=6, batch=1)
        for answer in answers:
            assert (answer.ids, answer.ended) == ([favorite] * n, ended) and len(answer.logps) == n
            assert answer.text == ("" if ended else "7" * 6)
        assert not answers[0].correct


def test_examine_by_hand(tok, monkeypatch):
    """Accuracy of both ways of decoding; the rest is of the sampled answers."""
    problems = task.problems(4, 0, "test")

    def solve(model, tok, problems, temperature, generator, max_new_tokens):
        texts = [f"#### {p.answer + (i >= (2 if temperature else 3))}" for i, p in enumerate(problems)]
        ids = [tok.encode(text) + [tok.end] * (i != 0) for i, text in enumerate(texts)]
        return [gpt.read_answer(tok, row, None, p.answer) for row, p in zip(ids, problems)]

    monkeypatch.setattr(gpt, "solve", solve)
    results, answers = gpt.examine(None, tok, problems, 0, 5)
    length = sum(len(a.ids) for a in answers) / 4
    assert results == {"accuracy_sampled": 0.5, "accuracy_greedy": 0.75, "ended": 0.75, "length": length}
    shown = gpt.shown(problems, answers)
    assert [prompt for prompt, _ in shown] == [p.text for p in problems]
    assert ["(correct)" in text for _, text in shown] == [True, True, False, False]
    assert ["cut off" in text for _, text in shown] == [True, False, False, False]
    assert shown[2][1] == f"#### {problems[2].answer + 1} (wrong, {problems[2].answer} is correct)"
    scored = gpt.shown(problems, answers, scores=torch.tensor([0.5, -1, 2, 0.123]))
    assert scored[3][1] == f"{shown[3][1]} score 0.12, {len(answers[3].ids)} tokens"


# --- log-probabilities and scores of given answers ---


class Constant:
    """Stands in for a GPT: the same logits everywhere."""

    bfloat16 = False

    def __init__(self, logits):
        self.logits = torch.tensor(logits)
        self.wte = torch.nn.Embedding(len(logits), 1)

    def hidden(self, ids, **_):
        return self.logits.expand(*ids.shape, -1)

    def head(self, hidden):
        return hidden


def test_numbers_by_hand():
    """Logits [2, 1, 0, -1]: log p of the first is -.4402 at T = 1 and -.2707 at T = .7."""
    for temperature, expected in ((1.0, -0.4402), (0.7, -0.2707)):
        logps, mask = gpt.completion_logps(Constant([2.0, 1.0, 0.0, -1.0]), [[1]], [[0]], temperature)
        assert abs(logps.item() - expected) < 5e-5 and mask.tolist() == [[True]]


def test_completion_logps_by_brute_force():
    """One token at a time, without batch or padding. A second shift, or none, would score other tokens."""
    model, prompts, completions = random_model(5), ragged(9, seed=5), ragged(9, seed=6)
    for temperature in (1.0, 0.7):
        logps, mask = gpt.completion_logps(model, prompts, completions, temperature)
        assert logps.shape == mask.shape == (9, max(map(len, completions)))
        for row, (p, c) in enumerate(zip(prompts, completions)):
            assert mask[row].tolist() == [t < len(c) for t in range(mask.shape[1])]
            assert (logps[row, len(c) :] == 0).all()
            for t, token in enumerate(c):
                logits = model(torch.tensor([p + c[:t]]))[0, -1].double() / temperature
                expected = logits[token].item() - math.log(sum(math.exp(z) for z in logits))
                assert abs(logps[row, t].item() - expected) < 1e-5


def test_logits_only_where_they_are_needed(monkeypatch):
    """For each completion token once, and a few at a time; that changes neither values nor gradients."""
    model, prompts, completions = random_model(5).requires_grad_(), ragged(9, seed=5), ragged(9, seed=6)
    sizes, head = [], model.head
    monkeypatch.setattr(model, "head", lambda hidden: sizes.append(len(hidden)) or head(hidden))

    def run():
        model.zero_grad()
        logps, _ = gpt.completion_logps(model, prompts, completions, 0.7, banned=[V - 1])
        logps[logps.isfinite()].sum().backward()
        return logps.detach(), model.wte.weight.grad.clone()

    logps, grads = run()
    assert sizes == [sum(map(len, completions))]
    sizes.clear()
    monkeypatch.setattr(gpt, "LOGITS", 3 * V + 1)
    again, few = run()
    assert sum(sizes) == sum(map(len, completions)) and max(sizes) == 3
    assert torch.equal(logps.isfinite(), again.isfinite())
    close(again.nan_to_num(), logps.nan_to_num())
    close(few, grads, 1e-5 * grads.abs().max())


def test_impossible_tokens_do_not_become_nan_where_masked():
    """Assignment, not multiplication: 0 * -inf is NaN, and one such token would make the batch's loss NaN."""
    logps, _ = gpt.completion_logps(Constant([0.0, -math.inf, 1.0]), [[2], [2]], [[0], [0, 1]])
    assert logps[0].isfinite().all() and logps[1, 1] == -math.inf


def test_bfloat16_keeps_the_softmax_in_float32():
    """bfloat16 has eight bits: a log-softmax in it errs by .05, and the probabilities do not sum to 1."""
    model = random_model(7)
    exact, _ = gpt.completion_logps(model, [[1, 2, 3]] * V, [[i] for i in range(V)])
    model.bfloat16 = True
    assert model(random_ids(1, 4)).dtype == torch.bfloat16
    logps, _ = gpt.completion_logps(model, [[1, 2, 3]] * V, [[i] for i in range(V)])
    assert logps.dtype == torch.float32
    assert abs(logps.double().exp().sum().item() - 1) < 1e-5
    assert 0 < (logps - exact).abs().max() < 0.5  # the model itself did compute in bfloat16
    logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    assert abs(logits.log_softmax(-1).double().exp().sum().item() - 1) > 1e-4  # the trap is real
    ids, sampled = gpt.sample(model, [[1, 2, 3]] * 4, 1, [V], generator=rng(0))
    for (token,), logp in zip(ids, sampled):
        assert logp.dtype == torch.float32
        close(logp, logps[token], 0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_are_read_before_each_token(temperature):
    """V_t is computed from the text before token t. One place later the baseline would know the token that it is the
    baseline of, and the advantage would be 0 on average whatever the token is."""
    model, (prompts, answers, _) = random_model(4), random_pairs(8, seed=25)
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


def test_scores_by_brute_force():
    """Column t is the score of the prompt and the first t tokens; a final score is read after the end token. Batches,
    padding and neighbors change nothing."""
    scorer, (prompts, answers, _) = random_scorer(), random_pairs(9, seed=20)
    scores, mask = gpt.completion_scores(scorer, prompts, answers)
    assert scores.shape == mask.shape == (9, max(map(len, answers)) + 1)
    finals = [gpt.final_scores(scorer, prompts, answers, batch) for batch in (1, 4, 250)]
    for row, (p, c) in enumerate(zip(prompts, answers)):
        expected = [score_by_hand(scorer, p + c[:t]) for t in range(len(c) + 1)]
        assert mask[row].tolist() == [t <= len(c) for t in range(mask.shape[1])]
        assert scores[row][mask[row]].tolist() == pytest.approx(expected, abs=1e-4)
        assert (scores[row][~mask[row]] == 0).all()
        for final in finals:
            assert final[row].item() == pytest.approx(expected[-1], abs=1e-4)
    assert scores[mask].std() > 0.3  # else equality would mean little


def test_mean_kl_equals_the_exact_one():
    """One-token answers, where the sum over all of them is possible. The bound is four standard errors of the
    estimate; the reverse divergence lies far outside."""
    policy, ref, prompt, n = random_model(7), random_model(8), [1, 2, 3], 4000
    log_p, log_q = (m(torch.tensor([prompt]))[0, -1].double().log_softmax(-1) for m in (policy, ref))
    p, h = log_p.exp(), log_p - log_q
    exact, reverse = (p * h).sum().item(), (log_q.exp() * -h).sum().item()
    error = math.sqrt((p * (h - exact) ** 2).sum().item() / n)
    answers, _ = gpt.sample(policy, [prompt] * n, 1, [V], generator=rng("kl"))
    estimate = gpt.mean_kl(policy, ref, [prompt] * n, answers)
    assert abs(estimate - exact) < 4 * error and abs(reverse - exact) > 20 * error
    assert gpt.mean_kl(policy, policy, [prompt] * n, answers) == 0


def test_mean_kl_sums_over_the_answer():
    """Nats per answer, not per token: else long answers would look closer to the reference than they are."""
    policy, ref = random_model(7), random_model(8)
    prompts, completions, _ = random_pairs(12, seed=7)
    each = [(m(torch.tensor([p + c]))[0].log_softmax(-1)[range(len(p) - 1, len(p + c) - 1), c].sum().item())
            for m in (policy, ref) for p, c in zip(prompts, completions)]  # fmt: skip
    expected = (sum(each[:12]) - sum(each[12:])) / 12
    assert gpt.mean_kl(policy, ref, prompts, completions, batch=5) == pytest.approx(expected, rel=1e-4)


def test_packed_answers_equal_answers_alone():
    """Neighbors with equal prompts share a row. Nothing leaks from one answer into the next, also not in the gradient,
    and a prompt that comes back later starts a new row."""
    model, source = random_model().requires_grad_(), random.Random(0)

    def ids(n):
        return [source.randrange(V) for _ in range(n)]

    one, two, three = ids(5), ids(9), ids(1)
    prompts = [one] * 11 + [two] * 3 + [one] + [three] * 2
    completions = [ids(source.randrange(1, 13)) for _ in prompts]

    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    together, mask = gpt.completion_logps(model, prompts, completions)
    alone = [gpt.completion_logps(model, [p], [c])[0][0] for p, c in zip(prompts, completions)]
    assert mask.sum(1).tolist() == [len(c) for c in completions]
    close(together[mask], torch.cat(alone))
    weights = torch.arange(len(alone)) + 1.0
    found = gradients((together.sum(1) * weights).sum())
    expected = gradients(sum(w * logps.sum() for w, logps in zip(weights, alone)))
    close(found, expected, 1e-4 * expected.abs().max())


def test_pack_by_hand():
    weight = torch.zeros(1, 32)
    ids, positions, mask, states, exists = gpt.pack([[7, 8], [7, 8], [9]], [[1], [2, 3], [4]], weight)
    assert ids.tolist() == [[7, 8, 1, 2, 3], [9, 4, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # the second answer attends to the prompt, not to the first answer
        [1, 1, 0, 1, 1],
    ]
    assert states[exists.new_tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])].tolist() == [1, 2, 1, 3, 4, 5, 6]
    assert exists.tolist() == [[True, False], [True, True], [True, False]]
    assert gpt.pack([[7], [8]], [[1], [2]], weight)[2] is None  # plain rows take the fast path


@pytest.mark.parametrize(
    "prompt, answer, rows", [(10, 18, [3, 2]), (10, 19, [2, 2, 1]), (40, 5, [5]), (2, 60, [2, 2, 1])]
)
def test_how_many_answers_share_a_row(prompt, answer, rows):
    """Width 32: rows of 64 tokens, or of twice the prompt, and of two answers at least."""
    ids, _, _, _, _ = gpt.pack([[1] * prompt] * 5, [[2] * answer] * 5, torch.zeros(1, 32))
    assert (ids == 2).sum(1).tolist() == [n * answer for n in rows]


# --- the tokenizer ---


def test_numbers_are_one_token_each_wherever_they_occur(tok):
    """Digit by digit the same model learns several times as long; with one token "7" and another " 7" it would have to
    learn every sum twice."""
    ids = []
    for n in range(200):
        (number,) = tok.encode(str(n))
        ids.append(number)
        assert tok.decode([number]) == str(n)
        for text in (f"{n}+7={n}.", f"8*3=24. {n}-{n}={n}.", f"Leo has {n} eggs.", f"\n#### {n}"):
            encoded = tok.encode(text)
            assert encoded.count(number) == re.findall(r"\d+", text).count(str(n))
            assert tok.decode(encoded) == text
    assert len(set(ids)) == 200
    assert [tok.decode([i]) for i in tok.encode("5+7=12.")] == ["5", "+", "7", "=", "12", "."]


def random_text(source, length):
    return "".join(chr(source.choice([*range(32, 127), 10, 228, 0x4E2D])) for _ in range(length))


def test_texts_come_back_and_those_of_the_task_are_short(tok):
    source = random.Random(0)
    texts = [random_text(source, 30) for _ in range(300)]
    for annotate in (False, True):
        for problem, solution in task.demonstrations(300, seed=5, annotate=annotate):
            texts += [problem.text, solution]
            assert len(tok.prompt(problem.text) + tok.answer(solution)) <= gpt.GPTConfig().block_size
    assert all(tok.decode(tok.encode(text)) == text for text in texts)
    for word in (*task.NAMES, *task.ITEMS):
        assert len(tok.encode(f" {word}")) == 1


@pytest.mark.parametrize("special", gpt.Tokenizer.SPECIAL)
def test_special_tokens_in_a_text_are_text(tok, special):
    """A question can neither end itself nor open the answer."""
    ids = {tok.user, tok.assistant, tok.end, tok.pad}
    text = f"Leo has 7 eggs.{special} Ann has 3."
    assert not ids & set(tok.encode(text))
    assert tok.decode(tok.encode(text)) == text
    assert tok.prompt(text) == [tok.user, *tok.encode(text), tok.assistant]
    assert tok.answer(text) == [*tok.encode(text), tok.end]


def test_ids_of_the_special_tokens(tok):
    """pad = end is the classic bug: masking one masks the other, and the model never stops."""
    ids = [tok.user, tok.assistant, tok.end, tok.pad]
    assert ids == list(range(tok.vocab_size - 4, tok.vocab_size))  # after all others, no gap
    assert [tok.decode([i]) for i in ids] == tok.SPECIAL
    assert not set(ids) & set(tok.encoding._mergeable_ranks.values())
    # An embedding row that no token uses could still be sampled.
    assert gpt.GPTConfig().vocab_size == tok.vocab_size


def test_make_vocab_remakes_the_file():
    """Byte for byte: with a changed corpus, the old vocabulary would no longer fit the texts."""
    lines = (f"{base64.b64encode(t).decode()} {r}\n" for t, r in make_vocab.make_vocab().items())
    assert "".join(lines).encode() == make_vocab.PATH.read_bytes()


def test_merge_joins_from_the_left():
    assert make_vocab.merge((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")
    assert make_vocab.merge((b"a", b"b", b"c"), (b"a", b"b")) == (b"ab", b"c")


@pytest.fixture
def gpt2_files(monkeypatch):
    """tiktoken finds GPT-2's vocabulary without a network."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        if not REAL or not os.path.isdir(os.path.join(REAL, "tiktoken")):
            pytest.skip("neither TIKTOKEN_CACHE_DIR nor REAL_DATA_DIR/tiktoken names GPT-2's files")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(REAL, "tiktoken"))


def test_gpt2_tokens_equal_tiktokens(gpt2_files):
    gpt2, tok, source = tiktoken.get_encoding("gpt2"), gpt.Tokenizer("gpt2"), random.Random(0)
    assert tok.encode("Hello world") == [15496, 995]
    for text in (random_text(source, 60) for _ in range(200)):
        assert tok.encode(text) == gpt2.encode_ordinary(text)
        assert tok.decode(tok.encode(text)) == text
    # Ours follow GPT-2's own special token, so the published embedding keeps its rows.
    assert [tok.user, tok.assistant, tok.end, tok.pad] == [50257, 50258, 50259, 50260]
    assert tok.decode([50256]) == "<|endoftext|>" and tok.vocab_size == 50261
    assert 50256 not in tok.encode("<|endoftext|>")


def no_network(*args, **kwargs):
    raise ConnectionError("a\nlong\nstory")


def test_missing_gpt2_vocabulary(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    exits(gpt.Tokenizer, "gpt2", match="TIKTOKEN_CACHE_DIR")
    with pytest.raises(ValueError, match="no tokenizer"):
        gpt.Tokenizer("gpt3")


# --- checkpoints ---


def hugging_face(vocab_size=V):
    """A random GPT-2 of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(8)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=CONTEXT, n_layer=2, n_head=2, n_embd=32)
    return randomize(transformers.GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("published", [False, True])
def test_opens_what_transformers_saved(tmp_path, published):
    """GPT-2's own file has no "transformer." in its names, and has its causal masks among the weights."""
    theirs, ids = hugging_face(), random_ids(3, CONTEXT)
    theirs.save_pretrained(tmp_path)
    if published:
        weights = load_file(tmp_path / "model.safetensors")
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        assert "wte.weight" in weights and "h.0.attn.c_attn.weight" in weights
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for layer in range(2)}
        save_file(weights | masks, tmp_path / "model.safetensors")
    ours = gpt.load_model(str(tmp_path))
    close(ours(ids), theirs(ids).logits, 1e-4)
    assert theirs(ids).logits.std() > 1  # else equality would mean little
    assert ours.config.tokenizer == "gpt2" and not ours.config.chat


def test_transformers_opens_what_we_saved(tmp_path, tok):
    transformers = pytest.importorskip("transformers")
    ours, ids = random_model(9), random_ids(3, CONTEXT)
    ours.save(tmp_path / "model")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    close(ours(ids), theirs(ids).logits.detach(), 1e-4)
    # Its generate() stops where our sample() does: the end and pad tokens are those of the tokenizer.
    assert theirs.config.eos_token_id - V == tok.end - tok.vocab_size
    assert theirs.config.pad_token_id - V == tok.pad - tok.vocab_size


def test_transformers_opens_a_saved_scorer(tmp_path):
    """GPT2ForSequenceClassification reads at the last token that is no pad. It ignores our zero and unit: its scores
    are the raw ones."""
    transformers = pytest.importorskip("transformers")
    scorer, (prompts, answers, _) = random_scorer(2), random_pairs(8, seed=23)
    prompts, answers = with_end(prompts, answers)
    scorer.save(tmp_path)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.pad_token_id == V - 1 and theirs.config.num_labels == 1
    ids, _, seen = right_padded(prompts, answers)
    found = theirs(ids.masked_fill(seen == 0, V - 1), attention_mask=seen).logits.detach()
    raw = gpt.final_scores(scorer, prompts, answers) * scorer.std + scorer.mean
    close(found[:, 0], raw, 1e-4)
    assert raw.std() > 0.3


def test_save_and_load_is_exact(tmp_path):
    model, ids = random_model(10), random_ids(2, 9)
    model.config.chat, model.config.tokenizer = True, "task"
    model.save(tmp_path / "a" / "b")
    again = gpt.load_model(str(tmp_path / "a" / "b"))
    assert torch.equal(again(ids), model(ids)) and again.config == model.config
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    args = SimpleNamespace(device="cpu", dtype="float32")
    policy, ref, tok = gpt.load_policy(str(tmp_path / "a" / "b"), args)
    assert torch.equal(policy(ids), ref(ids)) and tok.name == "task"
    assert {p.requires_grad for p in policy.parameters()} == {True}
    assert {p.requires_grad for p in ref.parameters()} == {False}


def test_bfloat16_of_a_loaded_model(tmp_path):
    """Every way to load a checkpoint hands on --dtype: the products are in bfloat16, the weights stay float32."""
    random_model().save(tmp_path / "model")
    random_scorer().save(tmp_path / "scorer")
    ids = random_ids(2, 8)
    exact = gpt.load_model(str(tmp_path / "model"))(ids)
    assert exact.dtype == torch.float32
    args = argparse.Namespace(device="cpu", dtype="bfloat16")
    scorer = gpt.load_scorer(str(tmp_path / "scorer"), bfloat16=True)
    loaded = [
        gpt.load_model(str(tmp_path / "model"), bfloat16=True),
        *gpt.load_policy(str(tmp_path / "model"), args)[:2],
    ]
    for model in (*loaded, scorer.transformer):
        seen = []
        model.h[0].mlp.c_fc.register_forward_hook(lambda layer, x, y, seen=seen: seen.append(y.dtype))
        assert model(ids).dtype == torch.bfloat16 and seen == [torch.bfloat16]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    for model in loaded:
        assert 0 < (model(ids).float() - exact).abs().mean() < 0.05 * exact.std()


def test_saved_scorer_comes_back(tmp_path):
    """With its zero and its unit, from its own folder and from that of a run."""
    scorer, (prompts, answers, _) = random_scorer(3), random_pairs(5, seed=24)
    scorer.save(tmp_path / "model")
    (tmp_path / "report.json").write_text("{}")
    for folder in (tmp_path / "model", tmp_path):
        again = gpt.load_scorer(str(folder))
        assert (again.mean, again.std) == (0.7, 1.9)
        assert torch.equal(*(gpt.final_scores(s, prompts, answers) for s in (again, scorer)))
    # It is no language model any more, although it contains one.
    exits(gpt.load_model, str(tmp_path), match="cannot generate")
    random_model().save(tmp_path / "language")
    exits(gpt.load_scorer, str(tmp_path / "language"), match="language model")


def test_gpt2s_vocabulary_gets_four_rows(tmp_path):
    """The chat tokens are new to GPT-2. Old logits stay as they are, and the new rows are trained too."""
    theirs = hugging_face(50257)
    theirs.save_pretrained(tmp_path)
    model, ids = gpt.load_model(str(tmp_path)), random_ids(2, 8, vocab_size=50257)
    logits = model(ids)
    assert logits.shape == (2, 8, 50261) and model.config.vocab_size == 50261
    close(logits[..., :50257], theirs(ids).logits, 1e-4)
    # The logit of a new token is the mean of the old ones.
    close(logits[..., 50257:], logits[..., :50257].mean(-1, keepdim=True).expand(2, 8, 4), 1e-3)
    assert model.wte.weight.requires_grad
    model.save(tmp_path / "chat")  # and it is not extended once more
    assert gpt.load_model(str(tmp_path / "chat")).wte.weight.shape == (50261, 32)


def test_no_model(tmp_path, monkeypatch):
    exits(gpt.load_model, str(tmp_path / "nothing"), match="config.json is missing")
    random_model().save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    exits(gpt.load_scorer, str(tmp_path), match="model.safetensors is missing")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", no_network)
    monkeypatch.chdir(tmp_path)  # where no folder is called gpt2
    for name in ("gpt2", "someone/some-model"):
        exits(gpt.load_model, name, match=f"no model in {name}: .* not be downloaded .ConnectionError")


NOT_GPT2 = ["{", "{}", "[]", "null", {"n_embd": None}, {"n_layer": 3}, {"n_positions": 12}]


@pytest.mark.parametrize("config", NOT_GPT2)
def test_a_config_that_does_not_fit(tmp_path, config):
    """No JSON, no object, a value missing or of another type, layers missing, weights of another size."""
    random_model().save(tmp_path)
    if isinstance(config, dict):
        config = json.dumps(json.loads((tmp_path / "config.json").read_text()) | config)
    (tmp_path / "config.json").write_text(config)
    exits(gpt.load_model, str(tmp_path), match="is not a checkpoint that can be read")


@pytest.mark.parametrize("length", [0, 4, 100, 5000])
def test_half_a_download(tmp_path, length):
    random_model().save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    assert length < len(whole)
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    for load in (gpt.load_model, gpt.load_scorer):
        exits(load, str(tmp_path), match="is not a checkpoint that can be read")


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-2},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40},
        {"tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_a_checkpoint_gives_the_same_logits_as_in_transformers_or_is_refused(tmp_path, setting):
    """Nothing that changes the logits is ignored silently. The refusal names the setting."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **setting)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    if setting.get("activation_function") in ("relu", "gelu") or any(name.startswith("scale_attn") for name in setting):
        exits(gpt.load_model, str(tmp_path), match=f"{[*setting][0]} .* not supported")
    else:
        ids = random_ids(2, 8)
        close(gpt.load_model(str(tmp_path))(ids), theirs(ids).logits, 1e-4)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json"])
def test_files_that_are_no_model_are_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match=name):
        gpt.load_model(str(tmp_path))


def test_weights_in_several_files(tmp_path):
    """With an index, as transformers writes them. A missing part is named."""
    theirs, ids = hugging_face(), random_ids(2, 8)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    (tmp_path / "pytorch_model.bin").touch()  # a clone of a repository on the hub may have both
    close(gpt.load_model(str(tmp_path))(ids), theirs(ids).logits, 1e-4)
    parts[0].unlink()
    exits(gpt.load_model, str(tmp_path), match=parts[0].name)


def test_only_the_vocabulary_of_the_tokenizer_is_accepted(tmp_path, tok):
    """Too many rows: ids without a text could be sampled. Too few: a token of a prompt has no row."""
    model, sizes = random_model(vocab_size=tok.vocab_size), [tok.vocab_size - 1, tok.vocab_size + 1, 50257, None]
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert gpt.load_model(str(tmp_path)).config.vocab_size == tok.vocab_size
    for change in [*({"vocab_size": size} for size in sizes), {"tokenizer": "gpt2"}, {"tokenizer": "other"}]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        exits(gpt.load_model, str(tmp_path), match="(vocab_size|tokenizer) .* is not supported, only")


@pytest.mark.parametrize("size", [256, 21128, 50256, 50258, 50261, 50304])
def test_a_file_that_names_no_tokenizer_has_gpt2s_vocabulary(tmp_path, size):
    """With 50261 rows, the last four are not our chat tokens."""
    hugging_face(size).save_pretrained(tmp_path)
    exits(gpt.load_model, str(tmp_path), match=f"vocab_size {size} .*is not supported, only .*50257")


@pytest.mark.parametrize("vocabulary", ["task", "gpt2"])
def test_every_id_of_an_accepted_vocabulary_has_a_text(vocabulary, request):
    """So nothing that is sampled is without one."""
    if vocabulary == "gpt2":
        request.getfixturevalue("gpt2_files")
    tok = gpt.Tokenizer(vocabulary)
    assert tok.vocab_size in checkpoints.VOCABULARIES[vocabulary]
    assert all(tok.decode([i]) for i in range(tok.vocab_size))


def test_a_missing_tensor_is_named(tmp_path):
    random_model().save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("transformer.wte.weight", "transformer.ln_f.bias"):
        save_file({n: w for n, w in weights.items() if n != name}, tmp_path / "model.safetensors")
        exits(gpt.load_model, str(tmp_path), match=f"{name.removeprefix('transformer.')}' is missing")


# --- the base model that comes with the repository ---


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """base(): which base model a script starts from; config: what data/base says of how it was made."""
    config = json.loads((gpt.SHIPPED / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "shipped"
    shutil.copytree(gpt.SHIPPED, folder)
    monkeypatch.setattr(gpt, "SHIPPED", folder)
    monkeypatch.setattr(runs, "made_by", lambda *_: "made anew")
    monkeypatch.chdir(tmp_path)

    def base():
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return gpt.base_model(argparse.Namespace(seed=7, dtype="float32"))

    return SimpleNamespace(base=base, made=config["made"], folder=folder)


def test_the_base_model_in_the_repository_is_that_of_today(shipped):
    """It was made by the task, vocabulary, model and defaults of this commit."""
    assert shipped.base() == str(shipped.folder)


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "0"), ("loss", 0.5), ("flags", {"n_layer": 4})])
def test_another_base_model_is_not_used(shipped, name, value):
    shipped.made[name] = value
    assert shipped.base() == "made anew"


def test_a_changed_task_makes_another_fingerprint(tok, monkeypatch):
    before = lessons.fingerprint(tok)
    assert lessons.fingerprint(tok) == before
    monkeypatch.setattr(task, "SLIP_RATE", task.SLIP_RATE + 0.01)
    assert lessons.fingerprint(tok) != before
