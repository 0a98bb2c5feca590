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
        for p in model.parameters():
            p.normal_(0, scale)
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


def test_kto_by_hand():
    """1 - sigmoid(beta (h - z0)) for desirable answers, 1 - sigmoid(beta (z0 - h)) for undesirable."""
    pc, pr, rc, rr, kl = (torch.tensor(x) for x in ([-4.0], [-9.0], [-6.0], [-5.0], 3.0))
    chosen, rejected = 1 / (1 + math.exp(0.1 * (2 - 3))), 1 / (1 + math.exp(0.1 * (3 + 4)))
    expected = ((1 - chosen) + (1 - 1 / (1 + math.exp(-0.7)))) / 2
    assert 1 - 1 / (1 + math.exp(-0.7)) == pytest.approx(rejected)
    assert chosen == pytest.approx(1 - 1 / (1 + math.exp(0.1 * (2 - 3))), abs=1)
    assert dpo.kto_loss(pc, pr, rc, rr, kl).item() == pytest.approx(
        ((1 - sigmoid(0.1 * (2 - 3))) + (1 - sigmoid(0.1 * (3 + 4)))) / 2
    )
    assert expected > 0


def sigmoid(x):
    return 1 / (1 + math.exp(-x))
