"""Tests of sft.py's and dpo.py's pure functions: numbers by hand, properties, equality with TRL."""

import inspect
import itertools
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dpo
import gpt
from sft import IGNORE, collate, pass_at_k, sft_loss

LN2 = math.log(2)
V = 40


def random_model(seed=0, scale=0.3):
    """A random GPT with sharp predictions: as initialised it predicts uniformly, and hides errors."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab_size=V, block_size=24, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0, scale)
    return model


def random_pairs(n, seed=0):
    """Prompts, chosen, rejected: random ids of different lengths."""
    rng = random.Random(seed)

    def some(longest):
        return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(n)]

    return some(8), some(9), some(9)


# --- sft.py ---


def test_uniform_logits_give_ln_v():
    labels = torch.tensor([[IGNORE, 3, 1, 6], [IGNORE, IGNORE, IGNORE, 0]])
    total, n = sft_loss(torch.zeros(2, 4, 7), labels)
    assert n == 4 and abs(total.item() / 4 - math.log(7)) < 1e-6
    total, n = sft_loss(torch.zeros(2, 4, 7).bfloat16(), labels)
    assert total.dtype == torch.float32  # the sum of many tokens in bfloat16 stops growing


def test_sft_loss_by_brute_force():
    """Shifted once: the logits at t are about the label at t + 1."""
    logits = torch.randn(3, 6, 7, generator=gpt.rng("sft"))
    labels = torch.randint(7, (3, 6), generator=gpt.rng("labels"))
    labels[0, :3] = labels[1, 4:] = labels[2] = IGNORE
    total = 0.0
    for row, t in itertools.product(range(3), range(5)):
        label = labels[row, t + 1]
        if label != IGNORE:
            total -= logits[row, t].double().log_softmax(-1)[label].item()
    found, n = sft_loss(logits, labels)
    assert n == 5 - 2 + 3 and abs(found.item() - total) < 1e-4


def test_the_prompt_is_given_and_not_learned():
    """Labels of the prompt are IGNORE, so no logit that predicts a prompt token gets a gradient; and the
    one that predicts the end token does: without it the model never stops."""
    ids, labels = collate([([1, 2, 3], [4, 5, 6]), ([1, 2], [7, 6])], pad=0)
    assert labels.tolist() == [[IGNORE] * 3 + [4, 5, 6], [IGNORE] * 2 + [7, 6] + [IGNORE] * 2]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 7, 6, 0, 0]]
    logits = torch.randn(2, 6, 8, generator=gpt.rng(0)).requires_grad_()
    sft_loss(logits, labels)[0].backward()
    touched = logits.grad.abs().sum(-1) > 0
    # The last prompt token predicts the first of the answer; the last of the answer predicts 6, the end.
    assert touched.tolist() == [
        [False, False, True, True, True, False],
        [False, True, True, False, False, False],
    ]


def test_another_prompt_label_leaves_the_loss_unchanged():
    """A prompt token's id reaches the loss as an input only, never as a target."""
    examples = [([1, 2, 3], [4, 5, 6]), ([1, 2], [7, 6])]
    changed = [([1, 7, 5], [4, 5, 6]), ([3, 0], [7, 6])]
    logits = torch.randn(2, 6, 8, generator=gpt.rng(1))
    (_, one), (_, two) = collate(examples, 9), collate(changed, 9)
    assert sft_loss(logits, one)[0] == sft_loss(logits, two)[0]


def test_micro_batches_equal_the_full_batch():
    """Nine answers of different lengths. Divided by the tokens of the whole step, one at a time gives the
    gradient of all at once; a mean of means does not."""
    model, (prompts, answers, _) = random_model(), random_pairs(9, seed=1)
    ids, labels = collate(list(zip(prompts, answers)), V - 1)
    supervised = sum(map(len, answers))

    def gradients(size, mean_of_means=False):
        model.zero_grad()
        for rows in torch.arange(9).split(size):
            total, n = sft_loss(model(ids[rows]), labels[rows])
            loss = total / n * len(rows) / 9 if mean_of_means else total / supervised
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    full = gradients(9)
    scale = full.abs().max()
    for size in (1, 4):
        assert (gradients(size) - full).abs().max() < 1e-5 * scale
    assert (gradients(1, mean_of_means=True) - full).abs().max() > 1e-2 * scale


def test_a_fully_masked_row_contributes_nothing():
    """0/0 is NaN, and one empty answer would end the run."""
    ids, labels = collate([([1, 2, 3], []), ([1], [2, 3])], pad=0)
    logits = torch.randn(2, 3, 5, generator=gpt.rng(2)).requires_grad_()
    total, n = sft_loss(logits, labels)
    assert n == 2 and total == sft_loss(logits[1:], labels[1:])[0]
    total.backward()
    assert logits.grad.isfinite().all() and (logits.grad[0] == 0).all()
    total, n = sft_loss(logits[:1], labels[:1])
    assert (total.item(), n.item()) == (0.0, 0)


def test_pad_equal_to_end_masks_the_end():
    """The break `eos_masked` (transformers 23530): one innocent line, and nothing looks wrong. With a
    pad token of its own every answer's end is supervised."""
    tok = gpt.Tokenizer("task")
    examples = [
        (tok.prompt("Leo has 7 eggs."), tok.answer("7+5=12.\n#### 12")),
        (tok.prompt("Leo has 7 eggs. Leo finds 5."), tok.answer("#### 9")),
    ]
    _, good = collate(examples, tok.pad)
    assert [row[row != IGNORE].tolist() for row in good] == [answer for _, answer in examples]
    ids, bad = collate(examples, tok.end)
    assert [row[row != IGNORE].tolist() for row in bad] == [answer[:-1] for _, answer in examples]
    assert (ids == tok.end).any() and not (bad == tok.end).any()


def test_pass_at_k():
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for c in range(n + 1) if k <= n else ():
            right = [i < c for i in range(n)]
            draws = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(64, 0, 64) == 0 and pass_at_k(64, 1, 64) == 1
    assert pass_at_k(10000, 3, 100) == pytest.approx(1 - 0.99**3, abs=1e-3)  # no overflow


# --- dpo.py: numbers by hand, at policy = reference and beta = .1 ---


def at_reference(loss, *extra, value=-3.0, **named):
    """Loss and gradients (chosen, rejected) of one pair, policy = reference."""
    pc, pr = (torch.tensor([value], requires_grad=True) for _ in range(2))
    reference = (pc.detach(), pr.detach()) if "ref_chosen_logps" in parameters(loss) else ()
    result = loss(pc, pr, *reference, *extra, **named)
    result.backward()
    return result.item(), pc.grad.item(), pr.grad.item()


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (dpo.dpo_loss, LN2, 0.05),
        (dpo.cdpo_loss, LN2, 0.04),
        (dpo.robust_loss, LN2, 0.0625),
        (dpo.ipo_loss, 25.0, 10.0),
    ],
)
def test_pair_losses_at_the_reference(loss, value, gradient):
    """The first line of every log. A loss that does not start here has its reference wrong."""
    found, chosen, rejected = at_reference(loss)
    assert found == pytest.approx(value, abs=1e-5)
    assert chosen == pytest.approx(-gradient, abs=1e-6)
    assert rejected == pytest.approx(gradient, abs=1e-6)


def test_kto_at_the_reference():
    """Each answer counts for itself: of a pair's two answers each has half the weight in the mean, so the
    gradient of an answer's own loss, -+.025, is twice what arrives here."""
    found, chosen, rejected = at_reference(dpo.kto_loss, torch.tensor(0.0))
    assert found == pytest.approx(0.5)
    assert 2 * chosen == pytest.approx(-0.025) and 2 * rejected == pytest.approx(0.025)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    """1 - sigmoid(beta (h - z0)) for desirable answers, 1 - sigmoid(beta (z0 - h)) for undesirable."""
    pc, pr, rc, rr, kl = (torch.tensor(x) for x in ([-4.0], [-9.0], [-6.0], [-5.0], 3.0))
    by_hand = ((1 - sigmoid(0.1 * (2 - 3))) + (1 - sigmoid(0.1 * (3 - -4)))) / 2
    assert dpo.kto_loss(pc, pr, rc, rr, kl).item() == pytest.approx(by_hand)


def test_losses_without_a_reference_at_equal_logps():
    """SimPO with gamma .5: -log sigmoid(-.5) = .9741. ORPO's ratio term: .1 ln 2 = .0693."""
    simpo, chosen, rejected = at_reference(dpo.simpo_loss)
    assert simpo == pytest.approx(0.9741, abs=5e-5)
    # d/dx -log sigmoid(2 x - .5) at 0 is -2 sigmoid(.5)
    assert chosen == pytest.approx(-2 * sigmoid(0.5)) and rejected == pytest.approx(-chosen)
    orpo, chosen, rejected = at_reference(dpo.orpo_loss, value=-2.0)
    assert orpo - 2 == pytest.approx(0.0693, abs=5e-5)  # 2: the negative log-likelihood
    # d log odds / d log p = 1 / (1 - p), and half of it from the sigmoid
    ratio = 0.1 * 0.5 / (1 - math.exp(-2))
    assert chosen == pytest.approx(-1 - ratio) and rejected == pytest.approx(ratio)


def test_signature_of_dpo_loss():
    """Readers, the README and other chapters call it by these names."""
    assert str(inspect.signature(dpo.dpo_loss)) == (
        "(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1)"
    )


def test_cdpo_has_its_minimum_at_a_finite_margin():
    """beta h = log((1 - noise) / noise): h = ln 9 / .1 = 21.97. DPO falls for ever."""
    h = torch.linspace(0, 60, 60001, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    losses = torch.stack([dpo.cdpo_loss(x[None], zero, zero, zero) for x in h[::10]])
    assert h[::10][losses.argmin()].item() == pytest.approx(21.97, abs=0.01)
    losses = torch.stack([dpo.dpo_loss(x[None], zero, zero, zero) for x in h[::1000]])
    assert (losses.diff() < 0).all()


def test_robust_dpo_is_unbiased():
    """Over labels of which a share `noise` is swapped, its mean is DPO on the clean ones; conservative DPO's
    is not."""
    pc, pr, rc, rr = (torch.randn(50, generator=gpt.rng("robust", i)).double() * 9 for i in range(4))
    clean = dpo.dpo_loss(pc, pr, rc, rr)
    for loss, unbiased in ((dpo.robust_loss, True), (dpo.cdpo_loss, False)):
        noisy = 0.8 * loss(pc, pr, rc, rr, noise=0.2) + 0.2 * loss(pr, pc, rr, rc, noise=0.2)
        assert (abs(noisy - clean) < 1e-9) == unbiased
    assert dpo.robust_loss(pc, pr, rc, rr, noise=0) == dpo.cdpo_loss(pc, pr, rc, rr, noise=0)


# --- dpo.py: properties ---

REFERENCE_LOSSES = [dpo.dpo_loss, dpo.cdpo_loss, dpo.robust_loss, dpo.ipo_loss, dpo.kto_loss]
PAIR_LOSSES = REFERENCE_LOSSES[:4]
ALL_LOSSES = [*REFERENCE_LOSSES, dpo.simpo_loss, dpo.orpo_loss]


def call(loss, pc, pr, rc, rr, kl=0.0, **named):
    """Call any of the losses with as many of the arguments as it takes."""
    reference = (rc, rr) if "ref_chosen_logps" in parameters(loss) else ()
    extra = (torch.tensor(kl),) if "kl" in parameters(loss) else ()
    return loss(pc, pr, *reference, *extra, **named)


def gradients(loss, pc, pr, rc, rr, **named):
    pc, pr = pc.clone().requires_grad_(), pr.clone().requires_grad_()
    call(loss, pc, pr, rc, rr, **named).backward()
    return pc.grad, pr.grad


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
def test_swapping_the_labels_flips_the_gradient_at_the_reference(loss):
    """Why flipped labels cannot be seen on the dashboard: the first step is as long, in the opposite
    direction."""
    one, two = torch.tensor([-3.0, -40.0]), torch.tensor([-7.0, -12.0])
    right, wrong = gradients(loss, one, two, one, two), gradients(loss, two, one, two, one)
    assert torch.allclose(right[0], -wrong[1]) and torch.allclose(right[1], -wrong[0])
    assert (right[0] < 0).all() and (right[1] > 0).all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_better_ranking_costs_less(loss):
    """Up with the chosen or down with the rejected answer: the loss falls. (IPO: short of
    its target.)"""
    pc, pr, rc, rr = (torch.tensor([x]) for x in (-2.0, -2.5, -2.2, -2.4))
    here = call(loss, pc, pr, rc, rr)
    assert call(loss, pc + 0.5, pr, rc, rr) < here and call(loss, pc, pr - 0.5, rc, rr) < here


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_only_differences_count(loss):
    """Adding a constant to both log-probabilities of a pair changes nothing: why the chosen answer may
    become less likely while the loss falls. All numbers are exact in binary, hence no tolerance."""
    pc, pr, rc, rr = (torch.tensor(x) for x in ([-4.0, -8.5], [-6.25, -2.0], [-5.5, -9.0], [-5.0, -1.0]))
    moved = torch.tensor([-16.0, 0.0])  # of one pair only
    assert torch.equal(loss(pc + moved, pr + moved, rc, rr), loss(pc, pr, rc, rr))
    assert torch.equal(loss(pc, pr, rc + moved, rr + moved), loss(pc, pr, rc, rr))
    # KTO judges each answer alone, and does notice.
    kl = torch.tensor(0.0)
    assert dpo.kto_loss(pc + moved, pr + moved, rc, rr, kl) != dpo.kto_loss(pc, pr, rc, rr, kl)


def test_beta_scales_the_margin():
    pc, pr, rc, rr = (torch.randn(9, generator=gpt.rng("beta", i)).double() * 5 for i in range(4))
    for loss in (dpo.dpo_loss, dpo.cdpo_loss, dpo.robust_loss):
        scaled = (2.5 * x for x in (pc, pr, rc, rr))
        assert torch.isclose(loss(pc, pr, rc, rr, beta=0.25), loss(*scaled, beta=0.1))
        # Twice the beta, twice the gradient at the reference.
        one, two = (gradients(loss, pc, pr, pc, pr, beta=beta)[0] for beta in (0.1, 0.2))
        assert torch.allclose(2 * one, two)
    # IPO: beta sets the target, 1 / (2 beta). There the loss is 0.
    target = torch.tensor([1 / (2 * 0.25)])
    zero = torch.zeros(1)
    assert dpo.ipo_loss(target, zero, zero, zero, beta=0.25) == 0
    # SimPO: the target margin is not scaled by beta.
    assert dpo.simpo_loss(zero + 0.25, zero, beta=2.0, gamma=0.5).item() == pytest.approx(LN2)
    kl = torch.tensor(2.0)
    scaled = (2.5 * x for x in (pc, pr, rc, rr, kl))
    assert torch.isclose(dpo.kto_loss(pc, pr, rc, rr, kl, beta=0.25), dpo.kto_loss(*scaled))


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_loss_is_the_mean_over_pairs(loss):
    """The size of the batch must not scale the gradient."""
    columns = [-torch.rand(7, generator=gpt.rng("mean", i)) - 0.1 for i in range(4)]
    alone = torch.stack([call(loss, *(c[i : i + 1] for c in columns), kl=0.3) for i in range(7)])
    assert torch.isclose(call(loss, *columns, kl=0.3), alone.mean())


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logps_give_no_nan(loss, dtype):
    """log(sigmoid(x)) is -inf from -104 on in float32, log(1 - e^x) is -inf at 0: a long answer, or one that
    the model is certain of, would end the run."""
    values = [-1e4, -88.0, -1.0, -1e-3, -1e-8, 0.0]
    grid = torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype).unbind(1)
    assert call(loss, *grid).isfinite()
    for gradient in gradients(loss, *grid):
        assert gradient.isfinite().all()
    worst = call(loss, *(torch.tensor([x], dtype=dtype) for x in (-1e4, 0.0, 0.0, -1e4)))
    assert loss is dpo.kto_loss or worst > 100  # not saturated either: there is still a gradient
    for gradient in gradients(dpo.dpo_loss, *(torch.tensor([x]) for x in (-1e4, 0.0, 0.0, -1e4))):
        assert gradient.abs().item() == pytest.approx(0.1)


def test_orpo_is_accurate_near_both_ends():
    """log(1 - e^x) in float32 by the obvious formula has lost half of its digits at x = -1e-4, and is
    -inf at -1e-8. Against float64 here."""
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


def test_pair_logps_one_forward_equals_two():
    """The two sides share one padded batch; what stands beside an answer must not change it. Sums, with
    the end token, and chosen before rejected."""
    model, (prompts, chosen, rejected) = random_model().requires_grad_(False), random_pairs(7)
    logps, lengths = dpo.pair_logps(model, prompts, chosen, rejected)
    assert logps.shape == lengths.shape == (14,)
    assert lengths.tolist() == [*map(len, chosen), *map(len, rejected)]
    for side, answers in zip(logps.split(7), (chosen, rejected)):
        assert (side - gpt.completion_logps(model, prompts, answers)[0].sum(1)).abs().max() < 1e-5
        for i in range(7):
            ids = torch.tensor([prompts[i] + answers[i]])
            log_probs = model(ids)[0].log_softmax(-1)
            start = len(prompts[i])
            total = sum(log_probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
            assert abs(side[i].item() - total) < 1e-4


def test_reference_logps_are_in_the_order_of_the_pairs():
    """(2B,) is chosen first, then rejected: read as (B, 2) it would mix the pairs up, silently."""
    model, columns = random_model(1).requires_grad_(False), random_pairs(7, seed=1)
    encoded = list(zip(*columns))
    expected = torch.stack([dpo.pair_logps(model, [p], [c], [r])[0] for p, c, r in encoded])  # (N, 2)
    for batch in (1, 3, 7, 50):
        found = dpo.reference_logps(model, encoded, batch)
        assert found.shape == (7, 2) and (found - expected).abs().max() < 1e-5
        assert not found.requires_grad


def test_pair_accuracy():
    model, ref = random_model(2), random_model(3)
    encoded = list(zip(*random_pairs(20, seed=2)))
    ref_logps = dpo.reference_logps(ref, encoded, 6)
    moved = dpo.reference_logps(model, encoded, 6) - ref_logps
    expected = sum(c > r for c, r in moved.tolist()) / 20
    assert dpo.pair_accuracy(model, encoded, ref_logps, 6) == pytest.approx(expected)
    assert 0.2 < expected < 0.8
    flipped = [(p, r, c) for p, c, r in encoded]
    flipped_accuracy = dpo.pair_accuracy(model, flipped, ref_logps.flip(1), 6)
    assert flipped_accuracy == pytest.approx(1 - expected)


def test_slip_once_changes_one_number():
    """A cheap negative differs from the chosen answer in one token, and is not right by accident."""
    slips = random.Random(0)
    seen = {dpo.slip_once("8*3=24. 24-4=20.\n#### 20", slips) for _ in range(30)}
    assert seen == {"8*3=25. 24-4=20.\n#### 20", "8*3=23. 24-4=20.\n#### 20"}


def test_slip_once_changes_a_result_of_1():
    """An identical pair has the margin 0 and the gradient 0 for ever."""
    slips = random.Random(0)
    assert {dpo.slip_once("9-8=1.", slips) for _ in range(30)} <= {"9-8=2.", "9-8=0."}


def test_sampled_kl_is_zero_for_identical_models():
    model, same = random_model(4), random_model(4)
    prompts, completions, _ = random_pairs(12, seed=4)
    assert dpo.sampled_kl(model, same, prompts, completions, batch=5) == 0


def test_sampled_kl_equals_the_exact_one():
    """One-token answers, where the sum over all of them is possible. Bound: four standard errors of the
    estimate. The reverse divergence lies far outside: whoever swaps the models would see that one."""
    policy, ref, prompt, n = random_model(7), random_model(8), [1, 2, 3], 4000
    log_p, log_q = (m(torch.tensor([prompt]))[0, -1].detach().double().log_softmax(-1) for m in (policy, ref))
    p, h = log_p.exp(), log_p - log_q
    exact, reverse = (p * h).sum().item(), (log_q.exp() * -h).sum().item()
    error = math.sqrt((p * (h - exact) ** 2).sum().item() / n)
    answers, _ = gpt.sample(policy, [prompt] * n, 1, [V], generator=gpt.rng("kl"))
    estimate = dpo.sampled_kl(policy, ref, [prompt] * n, answers)
    assert abs(estimate - exact) < 4 * error
    assert abs(reverse - exact) > 20 * error


def test_sampled_kl_sums_over_the_answer():
    """Nats an answer, not a token: otherwise long answers look closer to the reference than they are."""
    policy, ref = random_model(7).requires_grad_(False), random_model(8).requires_grad_(False)
    prompts, completions, _ = random_pairs(12, seed=7)
    total = 0.0
    for p, c in zip(prompts, completions):
        total += dpo.pair_logps(policy, [p], [c], [c])[0][0].item()
        total -= dpo.pair_logps(ref, [p], [c], [c])[0][0].item()
    assert dpo.sampled_kl(policy, ref, prompts, completions, batch=5) == pytest.approx(total / 12)


# --- equality with TRL ---
#
# TRL computes most of these losses inside its trainers' `_compute_loss`. That method is called here as
# it stands, on a stand-in for the trainer that holds the few attributes it reads.


def trl_trainer(**attributes):
    def same(x):
        return x

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    return SimpleNamespace(
        **{
            "model": SimpleNamespace(training=False),
            "accelerator": accelerator,
            "aux_loss_enabled": False,
            "ld_alpha": None,
            "precompute_ref_logps": True,
            "f_divergence_type": "reverse_kl",
            "loss_weights": [1.0],
            "label_smoothing": 0.0,
            "use_weighting": False,
            "_metrics": {"eval": defaultdict(list)},
            "_total_train_tokens": 0,
            **attributes,
        }
    )


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


OURS_AND_TRLS = [
    (dpo.dpo_loss, "sigmoid", {}),
    (dpo.robust_loss, "robust", {"noise": 0.1}),
    (dpo.robust_loss, "robust", {"noise": 0.3}),
    (dpo.ipo_loss, "ipo", {}),
]


def random_token_logps(B, T, scale):
    """Token log-probabilities (2B, T), 0 outside of the answers; their mask (2B, T + 1)."""
    lengths = torch.randint(1, T + 1, (2 * B,), generator=gpt.rng("lengths"))
    inside = torch.arange(T) < lengths[:, None]
    logps = -torch.rand(2 * B, T, generator=gpt.rng("policy")) * scale * inside
    mask = F.pad(inside.long(), (1, 0))
    return logps.requires_grad_(), mask, lengths


@pytest.mark.parametrize(("loss", "loss_type", "noise"), OURS_AND_TRLS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_equal_to_trls_dpo_trainer(loss, loss_type, noise, beta, scale):
    """Loss and gradients on the same random log-probabilities."""
    logps, mask, lengths = random_token_logps(16, 8, scale)
    ref_logps = -torch.rand(32, generator=gpt.rng("reference")) * scale * lengths
    theirs = trl_dpo_loss(logps, ref_logps, mask, loss_type, beta, **noise)
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    per_token = lengths if loss_type == "ipo" else 1  # the caller's part, in dpo.train
    ours = loss(*(logps.sum(1) / per_token).chunk(2), *(ref_logps / per_token).chunk(2), beta, **noise)
    (gradient,) = torch.autograd.grad(ours, logps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient * (logps < 0), their_gradient * (logps < 0))


def test_trls_sigmoid_ignores_label_smoothing():
    """Why there is cdpo_loss here: in TRL's DPOTrainer the flag changes `robust` but not `sigmoid`. The same
    formula lives in its CPOTrainer, which is given log-ratios to policy and reference below."""
    logps, mask, _ = random_token_logps(16, 8, 3.0)
    ref_logps = torch.zeros(32)
    plain, smooth = (trl_dpo_loss(logps, ref_logps, mask, "sigmoid", 0.1, n) for n in (0.0, 0.3))
    assert plain == smooth
    cpo = pytest.importorskip("trl.experimental.cpo")
    pc, pr, rc, rr = (torch.randn(16, generator=gpt.rng("cdpo", i)) * 9 for i in range(4))
    trainer = trl_trainer(alpha=0.0, loss_type="sigmoid", beta=0.1, label_smoothing=0.3)
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, pc - rc, pr - rr)
    torch.testing.assert_close(dpo.cdpo_loss(pc, pr, rc, rr, 0.1, 0.3), theirs.mean())


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (10.0, 3.0), (2.5, 0.0)])
def test_equal_to_trls_simpo(beta, gamma):
    cpo = pytest.importorskip("trl.experimental.cpo")
    pc, pr = (-torch.rand(64, generator=gpt.rng("simpo", i)) * 9 for i in range(2))
    trainer = trl_trainer(alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=0.0)
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, pc, pr)
    torch.testing.assert_close(dpo.simpo_loss(pc, pr, beta, gamma), theirs.mean())


def test_equal_to_trls_orpo():
    """The odds ratio is TRL's. The likelihood beside it is the paper's, of the answer; TRL takes the mean
    over all tokens of prompt and answer there, so the two whole losses differ and are not compared."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    pc, pr = (-torch.rand(64, generator=gpt.rng("orpo", i)) * 4 - 1e-3 for i in range(2))
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(trl_trainer(beta=0.3), pc, pr)
    torch.testing.assert_close(dpo.orpo_loss(pc, pr, 0.3), (-pc - theirs).mean())


# --- ... with TRL's whole path, from a model of transformers and ids to the loss ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Policy and reference: random GPT-2s of transformers with TRL's head, and ours from their files."""
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("trl.trainer.utils")
    found = []
    for seed in range(2):
        config = transformers.GPT2Config(vocab_size=V, n_positions=24, n_layer=2, n_head=2, n_embd=32)
        torch.manual_seed(seed)
        theirs = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0, 0.3)
        folder = tmp_path_factory.mktemp("gpt2")
        theirs.save_pretrained(folder)
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        utils.add_fused_lm_head(theirs, outputs=outputs)
        found.append((theirs, gpt.load_model(str(folder)).requires_grad_(False)))
    return found


def right_padded(prompts, answers):
    """Ids, completion mask and attention mask (B, T), as TRL's collators make them."""
    T = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids, mask, seen = (torch.zeros(len(prompts), T, dtype=torch.long) for _ in range(3))
    for row, (p, a) in enumerate(zip(prompts, answers)):
        ids[row, : len(p + a)] = torch.tensor(p + a)
        mask[row, len(p) : len(p + a)] = 1
        seen[row, : len(p + a)] = 1
    return ids, mask, seen


@pytest.mark.parametrize(("loss", "loss_type", "noise"), OURS_AND_TRLS)
def test_equal_to_trl_from_ids_to_loss(models, loss, loss_type, noise):
    """TRL's shift, mask and sum against ours: an answer's first token, its end token and its length all
    show in the result."""
    (policy, our_policy), (ref, our_ref) = models
    prompts, chosen, rejected = random_pairs(8, seed=9)
    ids, mask, seen = right_padded(prompts * 2, chosen + rejected)
    labels = ids.masked_fill(mask == 0, -100)
    ref_logps = ref(ids, attention_mask=seen, labels=labels, fused_lm_head=True).log_probs.sum(1)
    theirs = trl_dpo_loss(None, ref_logps, mask, loss_type, 0.1, **noise, model=policy, ids=ids)
    columns = []
    for model in (our_policy, our_ref):
        logps, lengths = dpo.pair_logps(model, prompts, chosen, rejected)
        columns += (logps / (lengths if loss_type in dpo.PER_TOKEN else 1)).split(8)
    torch.testing.assert_close(loss(*columns, 0.1, **noise), theirs, rtol=1e-4, atol=1e-4)


def test_equal_to_trls_kto_trainer(models):
    """With the reference point z0 from mismatched prompts and answers."""
    trl = pytest.importorskip("trl")
    (policy, our_policy), (ref, our_ref) = models
    prompts, chosen, rejected = random_pairs(8, seed=10)
    strangers = chosen[1:] + chosen[:1]
    ids, mask, seen = right_padded(prompts * 2, chosen + rejected)
    kl_ids, kl_mask, kl_seen = right_padded(prompts, strangers)
    inputs = {
        "input_ids": ids,
        "attention_mask": seen,
        "completion_mask": mask,
        "KL_input_ids": kl_ids,
        "KL_attention_mask": kl_seen,
        "KL_completion_mask": kl_mask,
        "label": torch.tensor([True] * 8 + [False] * 8),
    }
    for one, other, our_one, our_other in (
        (policy, ref, our_policy, our_ref),
        (ref, policy, our_ref, our_policy),  # z0 has the other sign: clamped at 0 in one of them
    ):
        trainer = trl_trainer(beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.0)
        trainer.undesirable_weight, trainer.precompute_ref_logps = 1.0, False
        trainer.ref_model, trainer.args = other, SimpleNamespace(gradient_checkpointing_kwargs=None)
        trainer.model = one
        trainer._compute_kl_logps = trl.KTOTrainer._compute_kl_logps.__get__(trainer)
        theirs = trl.KTOTrainer._compute_loss(trainer, one, inputs, False)
        columns, moved = [], []
        for model in (our_one, our_other):
            columns += dpo.pair_logps(model, prompts, chosen, rejected)[0].split(8)
            moved.append(gpt.completion_logps(model, prompts, strangers)[0].sum(1))
        kl = (moved[0] - moved[1]).mean().clamp(min=0)
        assert trainer._metrics["eval"]["kl"][0] == pytest.approx(kl.item(), abs=1e-4)
        ours = dpo.kto_loss(*columns, kl, 0.1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_mean_logps_equal_trls(models):
    """SimPO and ORPO take the mean log-probability a token: over the answer, not over answer and prompt."""
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
    # Which losses do so, by TRL and the papers:
    assert set(dpo.PER_TOKEN) == {"ipo", "simpo", "orpo"}
