"""Small random models and data, shared by the tests."""

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import gpt
from data.runs import rng

V, CONTEXT = 40, 24  # vocabulary and context of the small random models


def random_model(seed=0, vocab_size=V, block_size=CONTEXT, scale=0.3):
    """A random, frozen GPT with sharp predictions and biases that are not 0.

    A freshly initialized GPT predicts nearly uniformly and ignores positions, so a wrong position, mask or bias would
    stay below any tolerance.
    """
    torch.manual_seed(seed)
    config = gpt.GPTConfig(vocab_size, block_size, n_layer=2, n_head=2, n_embd=32)
    return randomize(gpt.GPT(config), scale)


def randomize(model, scale=0.3):
    """Random weights for a GPT-2, ours or that of transformers."""
    for name, p in model.requires_grad_(False).named_parameters():
        p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0, scale)
    return model


def random_scorer(seed=0):
    """A reward model with sharp scores, whose zero and unit are not 0 and 1."""
    scorer = gpt.Scorer(random_model(seed))
    scorer.mean, scorer.std = 0.7, 1.9
    return scorer.requires_grad_(False)


def random_ids(*shape, seed=0, vocab_size=V):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def ragged(count, longest=9, seed=0):
    """`count` lists of random ids, of different lengths."""
    source = random.Random(seed)
    return [[source.randrange(V) for _ in range(source.randint(1, longest))] for _ in range(count)]


def random_pairs(n, seed=0):
    """Prompts, chosen answers, rejected answers."""
    return ragged(n, 8, f"prompts {seed}"), ragged(n, 9, f"chosen {seed}"), ragged(n, 9, f"rejected {seed}")


def with_end(prompts, *answers):
    """The same ids without the last two of the vocabulary, and each answer with an end token (V - 2)."""
    prompts = [[min(i, V - 3) for i in p] for p in prompts]
    return prompts, *([[min(i, V - 3) for i in a] + [V - 2] for a in side] for side in answers)


def right_padded(prompts, answers):
    """Ids, completion mask and attention mask (B, T), as TRL's collators make them."""
    T = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids, mask, seen = (torch.zeros(len(prompts), T, dtype=torch.long) for _ in range(3))
    for row, (p, a) in enumerate(zip(prompts, answers)):
        ids[row, : len(p + a)] = torch.tensor(p + a)
        mask[row, len(p) : len(p + a)] = 1
        seen[row, : len(p + a)] = 1
    return ids, mask, seen


def draw(*shape, key="draw", scale=1.0):
    return torch.randn(*shape, generator=rng(key, shape)) * scale


def random_mask(B, N, key="mask"):
    """Answers of every length from 1 to N: (B, N) bool."""
    lengths = torch.randint(1, N + 1, (B,), generator=rng(key))
    lengths[0], lengths[-1] = 1, N
    return torch.arange(N) < lengths[:, None]


def close(a, b, bound=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= bound, (a - b).abs().max()


def exits(function, *args, match):
    """The call ends the program with a message of one line."""
    with pytest.raises(SystemExit, match=match) as error:
        function(*args)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code


def trl_trainer(**attributes):
    """A stand-in for one of TRL's trainers. TRL computes most losses in its trainers' `_compute_loss`; that method is
    called as it is, on this object, which holds the few attributes that the method reads."""

    def same(x):
        return x

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], label_smoothing=0.0,
        use_weighting=False, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def score_by_hand(scorer, ids):
    """The score of one text, without batch or padding, read at its last token."""
    hidden = scorer.transformer.hidden(torch.tensor([ids]))[0, -1]
    raw = sum((h * w).item() for h, w in zip(hidden, scorer.score.weight[0]))
    return (raw - scorer.mean) / scorer.std
