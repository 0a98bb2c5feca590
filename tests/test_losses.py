"""Tests of the functions of sft.py and dpo.py: numbers by hand, properties, equality with TRL."""

import inspect
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTEXT, V, close, draw, ragged, random_model, random_pairs, randomize, right_padded, trl_trainer

import dpo
import gpt
from data import lessons
from data.runs import rng
from sft import IGNORE, collate, pass_at_k, sft_loss

LN2 = math.log(2)

# --- sft.py ---


class Given:
    """A model whose logits are given: (B, T, V)."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, ids):
        return self.logits

    def head(self, hidden):
        return hidden


def loss_from(logits, labels):
    return sft_loss(Given(logits), None, labels)


def test_uniform_logits_give_ln_v():
    labels = torch.tensor([[IGNORE, 3, 1, 6], [IGNORE, IGNORE, IGNORE, 0]])
    total, n = loss_from(torch.zeros(2, 4, 7), labels)
    assert n == 4 and abs(total.item() / 4 - math.log(7)) < 1e-6
    total, n = loss_from(torch.zeros(2, 4, 7).bfloat16(), labels)
    assert total.dtype == torch.float32  # a sum of many tokens in bfloat16 stops growing


def test_sft_loss_by_brute_force():
    """Shifted once: the logits at t predict the label at t + 1."""
    logits = torch.randn(3, 6, 7, generator=rng("sft"))
    labels = torch.randint(7, (3, 6), generator=rng("labels"))
    labels[0, :3] = labels[1, 4:] = labels[2] = IGNORE
    total = 0.0
    for row, t in itertools.product(range(3), range(5)):
        label = labels[row, t + 1]
        if label != IGNORE:
            total -= logits[row, t].double().log_softmax(-1)[label].item()
    found, n = loss_from(logits, labels)
    assert n == 5 - 2 + 3 and abs(found.item() - total) < 1e-4


def test_only_the_answer_and_its_end_are_learned():
    """No logit that predicts a prompt token gets a gradient; the one that predicts the end token does. The prompt's
    ids are never targets: with another prompt the labels are the same."""
    ids, labels = collate([([1, 2, 3], [4, 5, 6]), ([1, 2], [7, 6])], pad=0)
    assert labels.tolist() == [[IGNORE] * 3 + [4, 5, 6], [IGNORE] * 2 + [7, 6] + [IGNORE] * 2]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 7, 6, 0, 0]]
    assert torch.equal(collate([([1, 7, 5], [4, 5, 6]), ([3, 1], [7, 6])], pad=0)[1], labels)
    logits = torch.randn(2, 6, 8, generator=rng(0)).requires_grad_()
    loss_from(logits, labels)[0].backward()
    touched = (logits.grad.abs().sum(-1) > 0).int()
    # The last prompt token predicts the first of the answer; the last but one of the answer predicts 6, the end.
    assert touched.tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]


def test_logits_only_where_there_is_a_loss(monkeypatch):
    """The logits are the largest tensor: no prompt token and no padding reaches the output layer."""
    model = random_model(3)
    ids, labels = collate([([1, 2, 3], [4, 5, 6]), ([1], [7, 6]), ([8, 9], [6])], pad=0)
    rows, head = [], model.head
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(hidden.shape[:-1].numel()) or head(hidden))
    total, n = sft_loss(model, ids, labels)
    assert rows == [n.item()] == [3 + 2 + 1]
    everywhere = model(ids)[:, :-1].flatten(0, 1)
    close(total, F.cross_entropy(everywhere, labels[:, 1:].flatten(), reduction="sum"), 1e-4)


def test_a_fully_masked_row_contributes_nothing():
    """0/0 is NaN, and one empty answer would end the run."""
    ids, labels = collate([([1, 2, 3], []), ([1], [2, 3])], pad=0)
    logits = torch.randn(2, 3, 5, generator=rng(2)).requires_grad_()
    total, n = loss_from(logits, labels)
    assert n == 2 and total == loss_from(logits[1:], labels[1:])[0]
    total.backward()
    assert logits.grad.isfinite().all() and (logits.grad[0] == 0).all()
    total, n = loss_from(logits[:1], labels[:1])
    assert (total.item(), n.item()) == (0.0, 0)


def test_pad_equal_to_end_masks_the_end(tok):
    """The break `eos_masked` (transformers issue 23530). With a pad token of its own every end is supervised."""
    examples = [(tok.prompt("Leo has 7 eggs."), tok.answer("7+5=12.\n#### 12")),
                (tok.prompt("Leo has 7 eggs. Leo finds 5."), tok.answer("#### 9"))]  # fmt: skip
    for pad, learned in ((tok.pad, slice(None)), (tok.end, slice(-1))):
        _, labels = collate(examples, pad)
        assert [row[row != IGNORE].tolist() for row in labels] == [answer[learned] for _, answer in examples]


def test_pass_at_k():
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for c in range(n + 1) if k <= n else ():
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(64, 0, 64) == 0 and pass_at_k(64, 1, 64) == 1
    assert pass_at_k(10000, 3, 100) == pytest.approx(1 - 0.99**3, abs=1e-3)  # no overflow


# --- dpo.py: numbers by hand ---

PAIR_LOSSES = [dpo.dpo_loss, dpo.cdpo_loss, dpo.robust_loss, dpo.ipo_loss]
REFERENCE_LOSSES = [*PAIR_LOSSES, dpo.kto_loss]
ALL_LOSSES = [*REFERENCE_LOSSES, dpo.simpo_loss, dpo.orpo_loss]


def call(loss, pc, pr, rc, rr, kl=0.0, **named):
    """Call any of the losses with as many of the arguments as it takes."""
    takes = inspect.signature(loss).parameters
    reference = (rc, rr) if "ref_chosen_logps" in takes else ()
    extra = (torch.tensor(kl),) if "kl" in takes else ()
    return loss(pc, pr, *reference, *extra, **named)


def gradients(loss, pc, pr, rc, rr, **named):
    pc, pr = pc.clone().requires_grad_(), pr.clone().requires_grad_()
    call(loss, pc, pr, rc, rr, **named).backward()
    return pc.grad, pr.grad


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# The derivative of the log odds in log p is 1 / (1 - p), here with p = e^-3; the sigmoid contributes one half.
ORPO_RATIO = 0.1 * 0.5 / (1 - math.exp(-3))


@pytest.mark.parametrize(
    ("loss", "value", "chosen", "rejected"),
    [
        (dpo.dpo_loss, LN2, -0.05, 0.05),
        (dpo.cdpo_loss, LN2, -0.04, 0.04),
        (dpo.robust_loss, LN2, -0.0625, 0.0625),
        (dpo.ipo_loss, 25.0, -10.0, 10.0),
        # The gradient of one answer's own loss is -+.025. Of a pair, each answer has half the weight in the mean.
        (dpo.kto_loss, 0.5, -0.0125, 0.0125),
        (dpo.simpo_loss, 0.9741, -2 * sigmoid(0.5), 2 * sigmoid(0.5)),  # -log sigmoid(-.5)
        (dpo.orpo_loss, 3 + 0.0693, -1 - ORPO_RATIO, ORPO_RATIO),  # 3, the negative log-likelihood, + .1 ln 2
    ],
)
def test_losses_by_hand(loss, value, chosen, rejected):
    """At policy = reference and equal log-probabilities, beta .1 (SimPO: 2): the first line of every log."""
    here = torch.tensor([-3.0])
    assert call(loss, here, here, here, here).item() == pytest.approx(value, abs=5e-5)
    found = gradients(loss, here, here, here, here)
    assert [g.item() for g in found] == pytest.approx([chosen, rejected], abs=1e-6)


def test_kto_by_hand():
    """1 - sigmoid(beta (h - z0)) for the chosen answer, 1 - sigmoid(beta (z0 - h)) for the rejected one."""
    pc, pr, rc, rr, kl = (torch.tensor(x) for x in ([-4.0], [-9.0], [-6.0], [-5.0], 3.0))
    by_hand = ((1 - sigmoid(0.1 * (2 - 3))) + (1 - sigmoid(0.1 * (3 - -4)))) / 2
    assert dpo.kto_loss(pc, pr, rc, rr, kl).item() == pytest.approx(by_hand)


def test_arguments_of_dpo_loss():
    """A documented interface: log-probabilities by these names, beta .1."""
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    logps = {name: torch.tensor([x]) for name, x in zip(names, (-2.0, -7.0, -3.0, -5.0))}
    assert dpo.dpo_loss(**logps).item() == pytest.approx(-math.log(sigmoid(0.1 * 3)))


def test_cdpo_has_its_minimum_at_a_finite_margin():
    """beta h = log((1 - noise) / noise): h = ln 9 / .1 = 21.97. DPO falls for ever."""
    h, zero = torch.linspace(0, 60, 6001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    losses = torch.stack([dpo.cdpo_loss(x[None], zero, zero, zero) for x in h])
    assert h[losses.argmin()].item() == pytest.approx(21.97, abs=0.01)
    losses = torch.stack([dpo.dpo_loss(x[None], zero, zero, zero) for x in h[::100]])
    assert (losses.diff() < 0).all()


def test_robust_dpo_is_unbiased():
    """Over labels of which the fraction `noise` is swapped, its mean is DPO on the clean ones; that of conservative
    DPO is not."""
    pc, pr, rc, rr = (draw(50, key=i, scale=9).double() for i in range(4))
    clean = dpo.dpo_loss(pc, pr, rc, rr)
    for loss, unbiased in ((dpo.robust_loss, True), (dpo.cdpo_loss, False)):
        noisy = 0.8 * loss(pc, pr, rc, rr, noise=0.2) + 0.2 * loss(pr, pc, rr, rc, noise=0.2)
        assert (abs(noisy - clean) < 1e-9) == unbiased
    assert dpo.robust_loss(pc, pr, rc, rr, noise=0) == dpo.cdpo_loss(pc, pr, rc, rr, noise=0)


# --- dpo.py: properties ---


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
def test_swapping_the_labels_flips_the_gradient_at_the_reference(loss):
    """Why swapped labels cannot be seen in training: the first step is as long, in the opposite direction."""
    one, two = torch.tensor([-3.0, -40.0]), torch.tensor([-7.0, -12.0])
    correct, swapped = gradients(loss, one, two, one, two), gradients(loss, two, one, two, one)
    close(correct[0], -swapped[1])
    close(correct[1], -swapped[0])
    assert (correct[0] < 0).all() and (correct[1] > 0).all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_better_ranking_costs_less(loss):
    """Up with the chosen or down with the rejected answer: the loss falls. (IPO: short of its target.)"""
    pc, pr, rc, rr = (torch.tensor([x]) for x in (-2.0, -2.5, -2.2, -2.4))
    here = call(loss, pc, pr, rc, rr)
    assert call(loss, pc + 0.5, pr, rc, rr) < here and call(loss, pc, pr - 0.5, rc, rr) < here


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_only_differences_count(loss):
    """Adding a constant to both log-probabilities of a pair changes nothing, so the chosen answer may become less
    likely while the loss falls. All numbers are exact in binary, hence no tolerance."""
    pc, pr, rc, rr = (torch.tensor(x) for x in ([-4.0, -8.5], [-6.25, -2.0], [-5.5, -9.0], [-5.0, -1.0]))
    moved = torch.tensor([-16.0, 0.0])  # of one pair only
    assert torch.equal(loss(pc + moved, pr + moved, rc, rr), loss(pc, pr, rc, rr))
    assert torch.equal(loss(pc, pr, rc + moved, rr + moved), loss(pc, pr, rc, rr))
    # KTO judges each answer alone, so there it does matter.
    kl = torch.tensor(0.0)
    assert dpo.kto_loss(pc + moved, pr + moved, rc, rr, kl) != dpo.kto_loss(pc, pr, rc, rr, kl)


def test_beta_scales_the_margin():
    pc, pr, rc, rr = (draw(9, key=i, scale=5).double() for i in range(4))
    for loss in (dpo.dpo_loss, dpo.cdpo_loss, dpo.robust_loss, dpo.kto_loss):
        scaled = (2.5 * x for x in (pc, pr, rc, rr))
        assert torch.isclose(call(loss, pc, pr, rc, rr, kl=2.0, beta=0.25), call(loss, *scaled, kl=5.0, beta=0.1))
    # IPO: beta sets the target, 1 / (2 beta). There the loss is 0.
    zero = torch.zeros(1)
    assert dpo.ipo_loss(zero + 1 / (2 * 0.25), zero, zero, zero, beta=0.25) == 0
    # SimPO: the target margin is not scaled by beta.
    assert dpo.simpo_loss(zero + 0.25, zero, beta=2.0, gamma=0.5).item() == pytest.approx(LN2)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_loss_is_the_mean_over_pairs(loss):
    """The batch size does not scale the gradient."""
    columns = [-torch.rand(7, generator=rng("mean", i)) - 0.1 for i in range(4)]
    alone = torch.stack([call(loss, *(c[i : i + 1] for c in columns), kl=0.3) for i in range(7)])
    assert torch.isclose(call(loss, *columns, kl=0.3), alone.mean())


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logps_give_no_nan(loss, dtype):
    """log(sigmoid(x)) is -inf from -104 on in float32, log(1 - e^x) is -inf at 0: a long answer, or one that the model
    is certain of, would end the run."""
    values = [-1e4, -88.0, -1.0, -1e-3, -1e-8, 0.0]
    grid = torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype).unbind(1)
    assert call(loss, *grid).isfinite()
    for gradient in gradients(loss, *grid):
        assert gradient.isfinite().all()
    worst = [torch.tensor([x], dtype=dtype) for x in (-1e4, 0.0, 0.0, -1e4)]
    assert loss is dpo.kto_loss or call(loss, *worst) > 100  # not saturated either
    if loss is dpo.dpo_loss:
        assert [g.item() for g in gradients(loss, *worst)] == pytest.approx([-0.1, 0.1])


def test_orpo_is_accurate_near_both_ends():
    """log(1 - e^x) in float32 by the obvious formula has lost half of its digits at x = -1e-4, and is -inf at -1e-8.
    Against float64 here."""
    xs = [-1e-5, -1e-4, -1e-3, -0.1, -0.69, -0.6931471, -0.6932, -0.7, -1.0, -5.0, -17.0, -40.0, -90.0]
    for x, y in itertools.product(xs, repeat=2):
        x, y = (torch.tensor([z], dtype=torch.float32).item() for z in (x, y))

        def logit(z):
            return z - (math.log(-math.expm1(z)) if z > -0.7 else math.log1p(-math.exp(z)))

        log_odds = logit(x) - logit(y)
        ratio = math.log1p(math.exp(-abs(log_odds))) + max(-log_odds, 0)  # -log sigmoid
        found = dpo.orpo_loss(torch.tensor([x]), torch.tensor([y]), beta=1.0).item()
        assert found == pytest.approx(-x + ratio, rel=1e-5, abs=1e-6)
    naive = torch.log(1 - torch.exp(torch.tensor(-1e-4)))
    assert abs(naive.item() - math.log(-math.expm1(-1e-4))) > 1e-4  # the trap is real


# --- dpo.py: log-probabilities of pairs ---


def test_pair_logps_by_brute_force():
    """Sums, with the end token, chosen before rejected. The other side of a pair, in the same row, changes nothing."""
    model, (prompts, chosen, rejected) = random_model(), random_pairs(7)
    others = ragged(7, 8, "others")  # the prompts of the rejected answers, if these are judgements of single answers
    for both, more in ((prompts * 2, ()), (prompts + others, (others,))):
        logps, lengths = dpo.pair_logps(model, prompts, chosen, rejected, *more)
        assert lengths.tolist() == [*map(len, chosen), *map(len, rejected)]
        expected = []
        for p, a in zip(both, chosen + rejected):
            log_probs = model(torch.tensor([p + a]))[0].log_softmax(-1)
            expected.append(sum(log_probs[len(p) - 1 + t, token].item() for t, token in enumerate(a)))
        close(logps, torch.tensor(expected), 1e-4)


def test_reference_logps_and_accuracy():
    """(2B,) is all chosen, then all rejected: read as (B, 2) it would mix up the pairs."""
    model, ref, encoded = random_model(2), random_model(3), list(zip(*random_pairs(20, seed=2)))
    one, other = (torch.stack([dpo.pair_logps(m, [p], [c], [r])[0] for p, c, r in encoded]) for m in (model, ref))
    for batch in (1, 6, 50):
        close(dpo.all_pair_logps(ref, encoded, batch), other)  # (N, 2)
    expected = sum(c > r for c, r in (one - other).tolist()) / 20
    assert dpo.pair_accuracy(model, encoded, other, 6) == pytest.approx(expected) and 0.2 < expected < 0.8
    flipped = [(p, r, c) for p, c, r in encoded]
    assert dpo.pair_accuracy(model, flipped, other.flip(1), 6) == pytest.approx(1 - expected)
    # At the start policy = reference: all margins are exactly 0, and no pair is ranked.
    assert dpo.pair_accuracy(ref, encoded, dpo.all_pair_logps(ref, encoded, 6), 6) == 0.5  # only ties


@pytest.mark.parametrize("seeds", [(2, 3), (3, 2)])
def test_kto_kl(seeds):
    """Each prompt with its neighbor's answer, clamped at 0 (in one of the two orders), cut to the context."""
    policy, ref = map(random_model, seeds)
    prompts, answers, _ = random_pairs(8, seed=10)
    prompts[3], answers[4] = [1] * 20, [2] * 9  # together longer than the context
    h = 0.0
    for p, a in zip(prompts, answers[1:] + answers[:1]):
        pair = [p], [a[: CONTEXT - len(p)]]
        h += sum(s * gpt.completion_logps(m, *pair)[0].sum().item() for s, m in ((1, policy), (-1, ref))) / 8
    found = dpo.kto_kl(policy, ref, prompts, answers)
    assert found.item() == pytest.approx(max(h, 0), rel=1e-4) and abs(h) > 0.1


def judged(prompt, good, text="a"):
    return {"prompt": prompt, "answer": None} | dict(
        zip(("chosen", "rejected"), (text, None) if good else (None, text))
    )


def test_judgements_are_split_by_prompt_and_both_sides_have_both_labels():
    rng = random.Random(0)
    for n in (2, 3, 8, 40):
        rows = [judged(f"prompt {rng.randrange(3 * n)}", i % 4 == 0, f"{i}") for i in range(4 * n)]
        for seed in range(10):
            train, held_out = lessons.split(rows, seed)
            assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
            assert all(map(all, map(lessons.good_and_bad, (train, held_out))))
            assert len(train) + len(held_out) == len(rows)
    for rows in (
        [judged("p", True), judged("q", True), judged("r", False)],  # one prompt of bad answers
        # One of these two kinds would lose both of its prompts to the held-out side.
        [judged("prompt 1", True), judged("prompt 2", True), judged("prompt 2", False), judged("prompt 3", False)],
    ):
        for seed in range(20):
            try:
                assert all(lessons.good_and_bad(lessons.split(rows, seed)[0]))
            except ValueError as error:
                assert "prompt" in str(error)


def test_training_pairs_are_shown_as_they_are_labelled():
    pair = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    assert dpo.to_read([pair] * 9) == [("a?", "chosen:\nyes\n\nrejected:\nno")] * 4
    assert dpo.to_read([dpo.swap(pair)]) == [("a?", "chosen:\nno\n\nrejected:\nyes")]
    assert dpo.to_read([pair | {"rejected_prompt": "b?"}]) == [("a?", "chosen:\nyes\n\nrejected (of: b?):\nno")]


def test_judgements_of_the_rarer_kind_are_repeated():
    rows = [judged(f"good {i}", True, f"yes {i}") for i in range(3)] + [
        judged(f"bad {i}", False, f"no {i}") for i in range(8)
    ]
    pairs = lessons.matched(rows, 0)
    assert len(pairs) == 8 and pairs == lessons.matched(rows, 0) != lessons.matched(rows, 1)
    for pair in pairs:  # every answer keeps its prompt, also with the opposite label
        swapped = dpo.swap(pair)
        assert pair["prompt"] == pair["chosen"].replace("yes", "good") == swapped["rejected_prompt"]
        assert pair["rejected_prompt"] == pair["rejected"].replace("no", "bad") == swapped["prompt"]
        assert (swapped["chosen"], swapped["rejected"]) == (pair["rejected"], pair["chosen"])
    assert len({pair["rejected"] for pair in pairs}) == 8
    counts = [sum(pair["chosen"] == f"yes {i}" for pair in pairs) for i in range(3)]
    assert sorted(counts) == [2, 3, 3]


def test_what_kto_holds_out_is_held_out_from_sft(tok, tmp_path):
    rows = [{"prompt": f"Leo has {i} eggs.", "completion": "9+5=14.", "label": i % 3 > 0} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(5):
        args = SimpleNamespace(data=str(tmp_path / "a.jsonl"), seed=seed, problems=None, max_tokens=512)
        kto = lessons.preferences(args, tok, 128, 1000, unpaired=True)
        held_out = {row[prompt] for row in kto.held_out for prompt in ("prompt", "rejected_prompt")}
        trained = {row[prompt] for row in kto.train for prompt in ("prompt", "rejected_prompt")}
        assert len(held_out) + len(trained) == 60 and not held_out & trained
        sft = lessons.demonstrations(args, tok, 128, None).train
        assert {row["prompt"] for row in sft} == {p for p in trained if int(p.split()[2]) % 3 > 0}  # the good ones
        (prompt, chosen, rejected, other), *_ = lessons.encode_pairs(tok, kto.train)
        assert prompt != other and prompt[-1] == other[-1] == tok.assistant and chosen[-1] == rejected[-1] == tok.end


def test_a_text_without_a_prompt_is_learned_from_its_first_token_on():
    """Nothing predicts the first token of a row, so it has no loss; with a prompt, all of the answer has."""
    ids, labels = collate([([], [5, 6, 7]), ([3], [5, 6])], pad=9)
    _, n = loss_from(torch.zeros(2, 3, 10), labels)
    assert n == 2 + 2 and labels[:, 1:].tolist() == [[6, 7], [5, 6]]


def test_slip_once_changes_one_number():
    """The rejected answer differs in one token, and is not correct by accident; equal pairs would have gradient 0."""
    for text, slipped in (
        ("8*3=24. 24-4=20.\n#### 20", {"8*3=25. 24-4=20.\n#### 20", "8*3=23. 24-4=20.\n#### 20"}),
        ("9-8=1.", {"9-8=2."}),
        ("#### 7", {None}),
    ):
        slips = random.Random(0)
        assert {dpo.slip_once(text, slips) for _ in range(30)} == slipped


# --- equality with TRL ---


def trl_dpo_loss(logps, ref_logps, mask, loss_type, beta, noise=0.0, model=None, ids=None):
    """TRL's DPOTrainer on token log-probabilities (2B, T), or on a model of transformers and ids."""
    trl = pytest.importorskip("trl")

    def given(input_ids, **kwargs):
        nothing = torch.zeros(logps.shape)
        return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    trainer = trl_trainer(beta=beta, label_smoothing=noise, loss_types=[loss_type])
    inputs = {
        # One position more than log-probabilities: nothing predicts the first token.
        "input_ids": torch.zeros(mask.shape, dtype=torch.long) if ids is None else ids,
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": ref_logps.chunk(2)[0],
        "ref_rejected_logps": ref_logps.chunk(2)[1],
    }
    return trl.DPOTrainer._compute_loss(trainer, model or given, inputs, False)


def our_loss(name, beta, logps, ref_logps, lengths, moved=None, noise=0.0):
    """As in dpo.train: (2B,) log-probabilities, of which some losses take the mean per token."""
    return dpo.preference_loss(SimpleNamespace(loss=name, noise=noise), beta, logps, ref_logps, lengths, moved)


# --loss, TRL's loss_type, noise
OURS_AND_TRLS = [("dpo", "sigmoid", 0.0), ("robust", "robust", 0.1), ("robust", "robust", 0.3), ("ipo", "ipo", 0.0)]


def random_token_logps(B, T, scale):
    """Token log-probabilities (2B, T), 0 outside of the answers; their mask (2B, T + 1); their lengths."""
    lengths = torch.randint(1, T + 1, (2 * B,), generator=rng("lengths"))
    inside = torch.arange(T) < lengths[:, None]
    logps = -torch.rand(2 * B, T, generator=rng("policy")) * scale * inside
    return logps.requires_grad_(), F.pad(inside.long(), (1, 0)), lengths


@pytest.mark.parametrize(("name", "loss_type", "noise"), OURS_AND_TRLS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_equal_to_trls_dpo_trainer(name, loss_type, noise, beta, scale):
    """Loss and gradients on the same random log-probabilities."""
    logps, mask, lengths = random_token_logps(16, 8, scale)
    ref_logps = -torch.rand(32, generator=rng("reference")) * scale * lengths
    theirs = trl_dpo_loss(logps, ref_logps, mask, loss_type, beta, noise)
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    ours = our_loss(name, beta, logps.sum(1), ref_logps, lengths, noise=noise)
    (gradient,) = torch.autograd.grad(ours, logps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient * (logps < 0), their_gradient * (logps < 0))


def test_trls_sigmoid_ignores_label_smoothing():
    """Why dpo.py has cdpo_loss: in TRL's DPOTrainer the flag changes `robust` but not `sigmoid`. The formula is in its
    CPOTrainer, which gets the log-ratios of policy and reference here."""
    logps, mask, _ = random_token_logps(16, 8, 3.0)
    plain, smooth = (trl_dpo_loss(logps, torch.zeros(32), mask, "sigmoid", 0.1, n) for n in (0.0, 0.3))
    assert plain == smooth
    cpo = pytest.importorskip("trl.experimental.cpo")
    pc, pr, rc, rr = (draw(16, key=i, scale=9) for i in range(4))
    trainer = trl_trainer(alpha=0.0, loss_type="sigmoid", beta=0.1, label_smoothing=0.3)
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, pc - rc, pr - rr)
    torch.testing.assert_close(dpo.cdpo_loss(pc, pr, rc, rr, 0.1, 0.3), theirs.mean())


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (10.0, 3.0), (2.5, 0.0)])
def test_equal_to_trls_simpo(beta, gamma):
    cpo = pytest.importorskip("trl.experimental.cpo")
    pc, pr = (-torch.rand(64, generator=rng("simpo", i)) * 9 for i in range(2))
    trainer = trl_trainer(alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=gamma)
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, pc, pr)
    torch.testing.assert_close(dpo.simpo_loss(pc, pr, beta, gamma), theirs.mean())


def test_equal_to_trls_orpo():
    """The odds ratio is TRL's. The likelihood is the paper's, of the answer; TRL takes the mean over prompt and answer
    there, so the two whole losses differ and are not compared."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    pc, pr = (-torch.rand(64, generator=rng("orpo", i)) * 4 - 1e-3 for i in range(2))
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(trl_trainer(beta=0.3), pc, pr)
    torch.testing.assert_close(dpo.orpo_loss(pc, pr, 0.3), (-pc - theirs).mean())


# --- ... through all of TRL's steps, from a model of transformers and ids to the loss ---


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_vocabulary):
    """Policy and reference: random GPT-2s of transformers with TRL's head, and ours from their files."""
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("trl.trainer.utils")
    found = []
    for seed in range(2):
        config = transformers.GPT2Config(vocab_size=V, n_positions=CONTEXT, n_layer=2, n_head=2, n_embd=32)
        torch.manual_seed(seed)
        theirs = randomize(transformers.GPT2LMHeadModel(config).eval())
        folder = tmp_path_factory.mktemp("gpt2")
        theirs.save_pretrained(folder)
        utils.add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        found.append((theirs, gpt.load_model(str(folder)).requires_grad_(False)))
    return found


@pytest.mark.parametrize(("name", "loss_type", "noise"), OURS_AND_TRLS)
def test_equal_to_trl_from_ids_to_loss(models, name, loss_type, noise):
    """TRL's shift, mask and sum against ours: an answer's first token, its end token and its length all count."""
    (policy, our_policy), (ref, our_ref) = models
    prompts, chosen, rejected = random_pairs(8, seed=9)
    ids, mask, seen = right_padded(prompts * 2, chosen + rejected)
    labels = ids.masked_fill(mask == 0, -100)
    ref_logps = ref(ids, attention_mask=seen, labels=labels, fused_lm_head=True).log_probs.sum(1)
    theirs = trl_dpo_loss(None, ref_logps, mask, loss_type, 0.1, noise, model=policy, ids=ids)
    logps, lengths = dpo.pair_logps(our_policy, prompts, chosen, rejected)
    our_ref_logps, _ = dpo.pair_logps(our_ref, prompts, chosen, rejected)
    ours = our_loss(name, 0.1, logps, our_ref_logps, lengths, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_equal_to_trls_kto_trainer(models, order, paired):
    """With the reference point z0 from mismatched prompts and answers. It is clamped at 0 in one of the two orders."""
    trl = pytest.importorskip("trl")
    (policy, our_policy), (ref, our_ref) = (models[i] for i in order)
    prompts, chosen, rejected = random_pairs(8, seed=10)
    others = prompts if paired else ragged(8, 8, "others")  # the prompts of the bad answers
    ids, mask, seen = right_padded(prompts + others, chosen + rejected)
    kl_ids, kl_mask, kl_seen = right_padded(prompts, chosen[1:] + chosen[:1])
    inputs = {
        "input_ids": ids, "attention_mask": seen, "completion_mask": mask,
        "KL_input_ids": kl_ids, "KL_attention_mask": kl_seen, "KL_completion_mask": kl_mask,
        "label": torch.tensor([True] * 8 + [False] * 8),
    }  # fmt: skip
    trainer = trl_trainer(
        beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0, model=policy,
        precompute_ref_logps=False, ref_model=ref, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    trainer._compute_kl_logps = trl.KTOTrainer._compute_kl_logps.__get__(trainer)
    theirs = trl.KTOTrainer._compute_loss(trainer, policy, inputs, False)
    moved = dpo.kto_kl(our_policy, our_ref, prompts, chosen)
    assert trainer._metrics["eval"]["kl"][0] == pytest.approx(moved.item(), abs=1e-4)
    logps, lengths = dpo.pair_logps(our_policy, prompts, chosen, rejected, others)
    ref_logps, _ = dpo.pair_logps(our_ref, prompts, chosen, rejected, others)
    torch.testing.assert_close(our_loss("kto", 0.1, logps, ref_logps, lengths, moved), theirs, rtol=1e-4, atol=1e-4)


def test_mean_logps_equal_trls(models):
    """IPO, SimPO and ORPO take the mean log-probability per token: of the answer, not of answer and prompt."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    theirs, ours = models[0]
    prompts, chosen, rejected = random_pairs(8, seed=11)
    ids, mask, seen = right_padded(prompts * 2, chosen + rejected)
    logits = theirs(ids, attention_mask=seen).logits
    labels = ids.masked_fill(mask == 0, -100)
    logps, lengths = dpo.pair_logps(ours, prompts, chosen, rejected)
    for mean, found in ((False, logps), (True, logps / lengths)):
        expected = cpo.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=mean)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ref_logps = torch.zeros_like(logps)
    for name in ("ipo", "simpo", "orpo"):
        per_token = our_loss(name, 0.1, logps / lengths, ref_logps, torch.ones_like(lengths))
        torch.testing.assert_close(our_loss(name, 0.1, logps, ref_logps, lengths), per_token)
