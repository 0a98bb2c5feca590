"""gpt.py: the transformer, and everything that all chapters share.

    python gpt.py                               train the base model of the embedded task
    python gpt.py --load runs/base --prompt "Leo has 7 eggs. "      talk to any checkpoint

A base model does one thing: it continues text. It is trained on running text alone,

    L = - mean_t  log p(x_t | x_<t)                                (every token is a target)

and question-and-answer is just one kind of text to it. What the later chapters add (format, then
judgement) they add to this model.

What is in this file, in reading order:

    1. GPT             GPT-2's architecture exactly, so that GPT-2's weights load into it
    2. Tokenizer       tiktoken, with four special tokens for a chat
    3. sample          batched generation with a key-value cache
    4. completion_logps   log-probabilities of answers: what every algorithm here is made of; and the
                          same for a model that gives scores instead of tokens
    5. save, load      checkpoints in the layout of Hugging Face's GPT-2
    6. Run             the run record: metrics, samples, Ctrl-C, --resume
    7. break_report    the clean and the broken run side by side
    8. main            pretraining

Left out: dropout (nothing here trains long enough to need it, and log-probabilities taken
with dropout on are wrong), distributed training, weight decay groups, compilation.
"""

import argparse
import base64
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data.checker import is_right

# ---------------------------------------------------------------------------------------------
# 1. The transformer
#
# Shapes: B sequences, T tokens, C channels, H heads, D = C/H channels a head, V tokens in the
# vocabulary, S = tokens attended to (cached ones and new ones).


@dataclass
class GPTConfig:
    vocab_size: int = 597
    block_size: int = 128  # the longest sequence: learned positions end here
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    tokenizer: str = "task"  # which text the ids stand for: "task" or "gpt2"
    chat: bool = False  # trained on conversations (sft.py and later), not on running text


class Cache:
    """Keys and values of the tokens already read, so that generation computes each token once."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (L, B, H, S_max, D)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens in the cache

    def extend(self, layer, k, v):
        """Append (B, H, T, D) of one layer; return all keys and values so far, (B, H, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Go on with these rows: a mask that drops some, or indices that repeat some."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, layer):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, T, C) -> (B, H, T, D)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # `is_causal` is the fast path, but it aligns the triangle to the upper left corner: with one
        # query and five cached keys it would attend to the first key only. It is right only where
        # queries and keys are the same tokens; otherwise `mask` says who sees whom.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 uses the tanh form


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, layer):
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, tied input and output embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.bfloat16 = False  # compute in bfloat16 (autocast); weights stay float32
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # Each block adds twice to the residual stream: scale so that the sum stays near 1.
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def hidden(self, ids, valid=None, cache=None, positions=None, mask=None):
        """Final hidden states (B, T, C) of token ids (B, T).

        valid: (B, S) bool, False at padding; needed only when padding stands on the *left* (pads on the
        right are never seen by real tokens: they lie in the future). With a cache, S counts the
        cached tokens too. positions (B, T) and mask (B, 1, T, S), True where a query may look, come
        together, for rows that are not plain sequences (see pack). Raises ValueError when the
        context is exceeded.
        """
        B, T = ids.shape
        past = cache.length if cache is not None else 0
        S = past + T
        longest = S if positions is None else int(positions.max()) + 1
        if longest > self.config.block_size:
            # With absolute positions a full cache cannot slide: every cached key holds its position.
            raise ValueError(f"{longest} tokens do not fit the context of {self.config.block_size}")
        if positions is None and valid is None and past == 0:
            positions = torch.arange(T, device=ids.device)
        elif positions is None:
            if valid is None:
                valid = torch.ones(B, S, dtype=torch.bool, device=ids.device)
            # Position = number of real tokens before this one. Counting pads would shift a padded
            # prompt to positions it was not trained on.
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
            query = torch.arange(past, S, device=ids.device)[:, None]  # (T, 1)
            key = torch.arange(S, device=ids.device)  # (S,)
            mask = (key <= query) & valid[:, None, :]  # (B, T, S)
            # A pad must see something, or its softmax is 0/0 and the NaN spreads: itself.
            mask = (mask | (key == query))[:, None]  # (B, 1, T, S), the same for all heads
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
            for layer, block in enumerate(self.h):
                x = block(x, mask, cache, layer)
            if cache is not None:
                cache.length = S
            return self.ln_f(x)

    def head(self, hidden):
        """Logits (..., V) from hidden states (..., C): a dot product with every token's embedding."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bfloat16):
            return F.linear(hidden, self.wte.weight)

    def forward(self, ids, valid=None, cache=None):
        """Logits (B, T, V): row t holds the prediction for token t+1."""
        return self.head(self.hidden(ids, valid, cache))


class Scorer(nn.Module):
    """A transformer that gives a number where a language model gives a token: reward model, verifier.

    The output layer is one dot product with a final hidden state. Where its zero lies is
    arbitrary, so scores are reported as (raw - mean) / std, with mean and std set once, after training.
    """

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.score = nn.Linear(transformer.config.n_embd, 1, bias=False)
        # Final hidden states have unit-sized entries: scores then start with a spread of about 1.
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(transformer.config.n_embd + 1))
        self.mean, self.std = 0.0, 1.0

    def forward(self, hidden):
        raw = self.score(hidden.float())[..., 0]  # (..., C) -> (...), float32
        return (raw - self.mean) / self.std


# ---------------------------------------------------------------------------------------------
# 2. The tokenizer


class Tokenizer:
    """tiktoken, and four special tokens that turn a text model into a chat model.

    A conversation is the ids   <|user|> question <|assistant|> answer <|end|>
    and padding is <|pad|>, a token of its own: where pad = end, masking the padding masks the end
    as well, and the model never learns to stop (see sft.py --break eos_masked).
    """

    SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]

    def __init__(self, name):
        self.name = name
        if name == "task":
            from data.make_vocab import PATH, PATTERN

            # Not tiktoken's own file loader: it caches by path and would not see a remade file.
            lines = PATH.read_text().splitlines()
            ranks = {base64.b64decode(t): int(r) for t, r in map(str.split, lines)}
        elif name == "gpt2":
            try:
                gpt2 = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests' many errors: all mean that there is no file
                sys.exit(
                    "GPT-2's vocabulary is not on this machine and could not be downloaded "
                    f"({type(error).__name__}). Run once with a network, or set TIKTOKEN_CACHE_DIR "
                    "to a folder that holds tiktoken's two gpt2 files."
                )
            PATTERN, ranks = gpt2._pat_str, gpt2._mergeable_ranks
        else:
            raise ValueError(f"no tokenizer {name!r}: task or gpt2")
        # GPT-2's own special token <|endoftext|> has the id after its ranks; ours follow it.
        first = len(ranks) + (name == "gpt2")
        special = {token: first + i for i, token in enumerate(self.SPECIAL)}
        self.user, self.assistant, self.end, self.pad = special.values()
        self.vocab_size = first + len(special)
        if name == "gpt2":
            special["<|endoftext|>"] = len(ranks)
        self.encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text):
        """Ids of plain text. "<|end|>" inside a text stays eight characters: nobody who writes
        the text can close the answer or open a turn."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(list(ids))

    def prompt(self, question):
        """Ids up to where the answer begins."""
        return [self.user, *self.encode(question), self.assistant]

    def answer(self, text):
        """Ids of an answer, its end token included. Question and answer are encoded apart: encoded
        together, a merge across the border would give ids that generation never produces."""
        return [*self.encode(text), self.end]


# ---------------------------------------------------------------------------------------------
# 3. Sampling


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set all but the top_k tokens, or all outside the top_p of probability, to -inf. (B, V)"""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # Drop a token when those *before* it already make up top_p: the first always stays.
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return logits


def draw_tokens(probs, generator=None):
    """Draw one index a row with the given probabilities. (B, V) -> (B,)

    By inverting the cumulative sum, which takes one random number a row. torch.multinomial takes V, and
    on a CPU that was a fifth of the time of sampling. In float64: in float32 the sum's rounding
    errors reach the size of rare tokens' probabilities.
    """
    cdf = probs.double().cumsum(-1) if probs.device.type != "mps" else probs.cumsum(-1)
    # Drawn on the CPU, where the generator lives: the same seed, the same text on any device.
    u = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64).to(cdf)
    # The first index whose cumulative sum exceeds u: one of probability 0 never does so first.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, max_new_tokens, stop, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           banned=(), writer=None):  # fmt: skip
    """Continue every prompt until a stop token or max_new_tokens.

    prompts: list of lists of ids, of any lengths. stop: the ids that end a completion; the stop token
    is part of it (a completion without one was cut off). temperature 0 is greedy.
    Returns two lists, one entry a prompt: the sampled ids, and their log-probabilities (a float32
    tensor each) *under the distribution sampled from*: after temperature, top_k and top_p, without the
    ids in `banned`. writer(rows, new) -> ids may put other tokens in the place of the new ones: rows (b,) are
    indices into prompts, new (b,) what was sampled for them. It is how a tool speaks (see tools.py).
    Raises ValueError where prompt and completion cannot fit the context.
    """
    B, N, device = len(prompts), max_new_tokens, model.wte.weight.device
    P = max(map(len, prompts))
    if P + N > model.config.block_size:
        raise ValueError(
            f"a prompt of {P} tokens and {N} new ones do not fit the context of {model.config.block_size}"
        )
    # Many answers to one question: it is read once, and what was read is copied.
    different = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: row for row, prompt in enumerate(different)}
    copies = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    # Pad on the left: all rows then end at the same column, where the next token goes.
    ids = torch.zeros(len(different), P, dtype=torch.long)
    valid = torch.zeros(len(different), P + N, dtype=torch.bool)
    for row, prompt in enumerate(different):
        ids[row, P - len(prompt) :] = torch.tensor(prompt)
        valid[row, P - len(prompt) :] = True
    ids, valid = ids.to(device), valid.to(device)
    dtype = torch.bfloat16 if model.bfloat16 else torch.float32
    cache = Cache(model.config, len(different), P + N, device, dtype)
    stop = torch.tensor(list(stop), device=device)

    tokens = torch.full((B, N), -1, device=device)  # (B, N); -1 after the end
    logps = torch.zeros(B, N, device=device)
    rows = torch.arange(B, device=device)  # which prompt each row of the batch belongs to
    alive = torch.ones(B, dtype=torch.bool, device=device)
    # Once around the whole loop: autocast keeps its bfloat16 copies of the weights until it is left.
    with torch.autocast(device.type, torch.bfloat16, enabled=model.bfloat16):
        hidden = model.hidden(ids, valid[:, :P], cache)[:, -1]  # (B, C)
        if not torch.isfinite(hidden).all():
            sys.exit("The model's outputs are not finite: its training blew up. Try a smaller --lr.")
        cache.keep(copies)
        hidden, valid = hidden[copies], valid[copies]
        for t in range(N):
            logits = model.head(hidden).float()  # (b, V)
            if banned:
                logits[:, banned] = -math.inf
            if temperature == 0:
                logp = logits.log_softmax(-1)
                new = logits.argmax(-1)  # (b,)
            else:
                logp = filter_logits(logits / temperature, top_k, top_p).log_softmax(-1)
                new = draw_tokens(logp.exp(), generator)
            if writer is not None:  # rows that have ended are still in the batch: not asked about
                new[alive] = writer(rows[alive], new[alive])
            tokens[rows[alive], t] = new[alive]
            logps[rows[alive], t] = logp.gather(1, new[:, None])[alive, 0]
            alive &= ~torch.isin(new, stop)
            left = int(alive.sum())
            if left == 0 or t == N - 1:
                break
            # Finished rows leave the batch. Copying the cache costs about as much as a step, so not
            # at every single one.
            if left <= 0.75 * len(alive):
                cache.keep(alive)
                rows, valid, new = rows[alive], valid[alive], new[alive]
                alive = alive[alive]
            hidden = model.hidden(new[:, None], valid[:, : cache.length + 1], cache)[:, -1]
    lengths = (tokens >= 0).sum(1).tolist()
    return (
        [row[:n].tolist() for row, n in zip(tokens, lengths)],
        [row[:n] for row, n in zip(logps, lengths)],
    )


@dataclass
class Answer:
    text: str  # without the end token
    ids: list  # with it
    logps: torch.Tensor  # of the ids, under the distribution sampled from
    ended: bool  # False: cut off at max_new_tokens
    right: bool  # by the exact checker


def solve(model, tok, questions, golds, temperature, generator, max_new_tokens=48, batch=250):
    """Let a chat model answer each question once; returns a list of Answer. golds: right answers."""
    prompts = [tok.prompt(question) for question in questions]
    answers = []
    for i in range(0, len(prompts), batch):
        completions = sample(model, prompts[i : i + batch], max_new_tokens, [tok.end],
                             temperature=temperature, generator=generator)  # fmt: skip
        for ids, logps, gold in zip(*completions, golds[i : i + batch]):
            ended = ids[-1] == tok.end
            text = tok.decode(ids[:-1] if ended else ids)
            answers.append(Answer(text, ids, logps, ended, is_right(text, gold)))
    return answers


def examine(model, tok, problems, seed, step, max_new_tokens=48):
    """How a chat model does on held-out problems, from outside: by the exact checker.

    problems: anything with .text and .answer. Returns (results, sampled answers, samples to show):
    shares of right answers at temperature 1 and greedily, the share that ends by itself, the mean length
    in tokens.
    """
    questions, golds = [p.text for p in problems], [p.answer for p in problems]
    generator = rng(seed, "evaluation", step)
    sampled = solve(model, tok, questions, golds, 1.0, generator, max_new_tokens)
    greedy = solve(model, tok, questions, golds, 0.0, generator, max_new_tokens)
    n = len(problems)
    results = {
        "right_sampled": sum(a.right for a in sampled) / n,
        "right_greedy": sum(a.right for a in greedy) / n,
        "ended": sum(a.ended for a in sampled) / n,
        "length": sum(len(a.ids) for a in sampled) / n,
    }
    shown = [
        (p.text, f"{a.text} {'' if a.ended else '[cut off]'} ({'right' if a.right else 'wrong'})")
        for p, a in zip(problems[:8], sampled)
    ]
    return results, sampled, shown


# ---------------------------------------------------------------------------------------------
# 4. Log-probabilities of completions


def completion_logps(model, prompts, completions, temperature=1.0, value_head=None, banned=()):
    """log p(completion token | prompt, tokens before) for every token of every completion.

    prompts, completions: lists of lists of ids. Returns (logps, mask), both (B, N) with N the longest
    completion: float32 log-probabilities, 0 where mask is False. Sum over dim 1 for the
    log-probability of the whole completion. `temperature` and `banned` must be those of the sampling
    whenever the two are compared, or the ratio is not 1 where policy and sampler are the same.
    With a value_head (C -> 1) the result is (logps, mask, values): values (B, N) are read from the same
    hidden states as the log-probabilities, those of the text *before* each token.
    """
    ids, positions, sees, states, mask = pack(prompts, completions, model.wte.weight.device)
    hidden = model.hidden(ids, positions=positions, mask=sees)
    # The token at position t is predicted at t-1, the first of the answer by the last of the prompt. This
    # is the only shift; a second one would score the wrong tokens.
    hidden = hidden.flatten(0, 1)[states[:, :-1][mask]]  # (M, C), M completion tokens in all
    targets = ids.flatten()[states[:, 1:][mask]]  # (M,)
    # In float32: bfloat16 has eight bits of precision, and a log-probability errs by .05 in it.
    logits = model.head(hidden).float() / temperature  # (M, V): only where it is needed
    if banned:
        logits[:, banned] = -math.inf
    token_logps = -F.cross_entropy(logits, targets, reduction="none")  # (M,)
    # Assignment, not multiplication by the mask: -inf * 0 is NaN.
    zeros = torch.zeros(mask.shape, device=mask.device)
    logps = zeros.masked_scatter(mask, token_logps)
    if value_head is None:
        return logps, mask
    return logps, mask, zeros.masked_scatter(mask, value_head(hidden.float())[:, 0])


def completion_scores(scorer, prompts, completions):
    """Scores of every state that an answer goes through: before its first token, after it, and so on.

    Returns (scores, mask), both (B, N+1): column t is the score of prompt and first t tokens, so
    column len(completion) is that of the whole answer, its end token included. 0 where mask is False.
    """
    ids, positions, sees, states, mask = pack(prompts, completions, scorer.score.weight.device)
    hidden = scorer.transformer.hidden(ids, positions=positions, mask=sees).flatten(0, 1)
    mask = F.pad(mask, (1, 0), value=True)  # (B, N+1): the state before the first token exists as well
    scores = scorer(hidden[states[mask]])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, scores), mask


def final_scores(scorer, prompts, completions, batch=250):
    """Scores (B,) of complete answers, read at their last token (the end token, where there is one)."""
    found = []
    for i in range(0, len(prompts), batch):
        scores, mask = completion_scores(scorer, prompts[i : i + batch], completions[i : i + batch])
        found.append(scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0])
    return torch.cat(found)


def pack(prompts, completions, device):
    """Rows for one forward pass. Neighbours with the same prompt share a row; it is computed once:

        ids        p p p a a a b b      two answers, a and b, to the prompt p
        positions  0 1 2 3 4 5 3 4      each answer stands right behind the prompt,
        segments   0 0 0 1 1 1 2 2      and sees the prompt (segment 0) and itself, not its neighbour

    Returns ids and positions (R, L), mask (R, 1, L, L) or None where all rows are plain sequences, then for
    the B completions: states (B, N+1), where in ids.flatten() the text ends that has t answer tokens,
    and exists (B, N), which of the tokens there are.
    """
    B, N = len(prompts), max(map(len, completions))
    rows, last = [], None  # of (ids, positions, segments)
    starts = []  # of each completion: its row, the place of its first token
    for prompt, completion in zip(prompts, completions):
        # At most eight a row: attention costs the square of a row's length.
        if prompt != last or rows[-1][2][-1] == 8:
            last = prompt
            rows.append((list(prompt), list(range(len(prompt))), [0] * len(prompt)))
        ids, positions, segments = rows[-1]
        starts.append((len(rows) - 1, len(ids)))
        segments.extend([segments[-1] + 1] * len(completion))
        positions.extend(range(len(prompt), len(prompt) + len(completion)))
        ids.extend(completion)
    L = max(len(ids) for ids, _, _ in rows)
    # Padding on the right: in the future of all real tokens, so its id and position are free.
    ids, positions, segments = (
        torch.tensor([row[i] + [0] * (L - len(row[i])) for row in rows], device=device) for i in range(3)
    )
    states = torch.zeros(B, N + 1, dtype=torch.long)
    exists = torch.zeros(B, N, dtype=torch.bool)
    for b, ((row, start), prompt, completion) in enumerate(zip(starts, prompts, completions)):
        states[b] = row * L + torch.arange(start - 1, start + N)
        states[b, 0] = row * L + len(prompt) - 1  # nothing answered yet: the end of the prompt
        exists[b, : len(completion)] = True
    mask = None
    if len(rows) < B:
        mask = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (R, L, L)
        mask = mask.tril()[:, None]  # (R, 1, L, L): and nobody sees the future
    return ids, positions, mask, states.to(device), exists.to(device)


# ---------------------------------------------------------------------------------------------
# 5. Checkpoints, in the layout of Hugging Face's GPT-2

# Their linear layers are stored transposed (Conv1D), ours are not.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


READ = {}  # the model files that this process has read, {path: checksum}: see Run.finished


def checksum(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def write_atomically(path, write):
    """Call write(temporary path), then rename: whoever reads `path` finds the old file or the new
    one, never half of one, whenever the power goes."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_model(model, folder):
    """Write folder/model.safetensors and folder/config.json; `transformers` opens the folder, as
    GPT2LMHeadModel or, where it is a Scorer, as GPT2ForSequenceClassification."""
    scorer, model = (model, model.transformer) if isinstance(model, Scorer) else (None, model)
    c = model.config
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
        "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tokenizer": c.tokenizer,
        "chat": c.chat, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": None, "eos_token_id": c.vocab_size - 2, "pad_token_id": c.vocab_size - 1,
    }  # fmt: skip
    weights = {
        "transformer." + name: (w.t() if name.endswith(TRANSPOSED) else w).detach().contiguous()
        for name, w in model.state_dict().items()
    }
    if scorer:
        config |= {"architectures": ["GPT2ForSequenceClassification"], "num_labels": 1,
                   "score_mean": scorer.mean, "score_std": scorer.std}  # fmt: skip
        weights["score.weight"] = scorer.score.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(text))
    metadata = {"format": "pt"}
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path, metadata))


def load_model(where, device="cpu", bfloat16=False, scorer=False):
    """A model from a folder, or by name from the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl).

    scorer: a reward model will do as well (its transformer alone). GPT-2 comes with 50257 tokens; four rows
    are added for the chat tokens. Exits with one line that says what is missing and the way out where
    nothing can be loaded.
    """
    files = ("config.json", "model.safetensors")
    if (Path(where) / "report.json").is_file():
        where = str(Path(where) / "model")  # the folder of a run: its model is meant
    if where in HUB and not Path(where).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            paths = [Path(hf_hub_download(HUB[where], name)) for name in files]
        except Exception as error:  # a dozen kinds, all of them "no network and not in the cache"
            sys.exit(
                f"{where} could not be downloaded ({type(error).__name__}). Give --load a folder with "
                "config.json and model.safetensors, or train from scratch (see --help)."
            )
    else:
        paths = [Path(where) / name for name in files]
        for path in paths:
            if not path.is_file():
                sys.exit(f"no model in {where}: {path.name} is missing. Known names: {', '.join(HUB)}")
    try:
        c = json.loads(paths[0].read_text())
        config = GPTConfig(
            vocab_size=c["vocab_size"], block_size=c["n_positions"], n_layer=c["n_layer"],
            n_head=c["n_head"], n_embd=c["n_embd"], tokenizer=c.get("tokenizer", "gpt2"),
            chat=c.get("chat", False),
        )  # fmt: skip
        loaded = load_file(paths[1])
        if "score.weight" in loaded and not scorer:
            sys.exit(f"{where} is a reward model or a verifier: it gives scores and cannot write")
        model = GPT(config)
        weights = {}
        for name in model.state_dict():
            # Published GPT-2 files lack the prefix; files written by `transformers` have it.
            w = loaded["transformer." + name if "transformer." + name in loaded else name]
            weights[name] = w.t() if name.endswith(TRANSPOSED) else w
        model.load_state_dict(weights)
        READ[str(paths[1])] = checksum(paths[1])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        sys.exit(f"{where} is not a GPT-2 checkpoint that can be read: {type(error).__name__}: {cause}")
    if config.vocab_size == 50257:
        # The mean of the old rows: a new token that starts with an average logit disturbs nothing.
        extra = model.wte.weight.detach().mean(0, keepdim=True).repeat(len(Tokenizer.SPECIAL), 1)
        model.wte = nn.Embedding.from_pretrained(torch.cat([model.wte.weight.detach(), extra]), False)
        config.vocab_size += len(extra)
    model.bfloat16 = bfloat16
    return model.to(device)


def load_scorer(where, device="cpu", bfloat16=False):
    """A reward model or verifier from the folder of a run or of a model. Exits where it is none."""
    scorer = Scorer(load_model(where, device, bfloat16, scorer=True)).to(device)
    folder = Path(where) / "model" if (Path(where) / "report.json").is_file() else Path(where)
    weights, config = (folder / name for name in ("model.safetensors", "config.json"))
    if not weights.is_file() or "score.weight" not in (tensors := load_file(weights)):
        sys.exit(f"{where} is a language model: it has no score. Make a reward model with reward_model.py")
    if tensors["score.weight"].shape != scorer.score.weight.shape:
        sys.exit(f"{where} gives {len(tensors['score.weight'])} scores an answer: a reward model gives one")
    scorer.load_state_dict({"score.weight": tensors["score.weight"]}, strict=False)
    config = json.loads(config.read_text())
    scorer.mean, scorer.std = config.get("score_mean", 0.0), config.get("score_std", 1.0)
    return scorer


# ---------------------------------------------------------------------------------------------
# 6. The run record
#
# Every random choice of a run is a function of (seed, what for, step), never of what was drawn
# before. That is why --resume needs no random state to end in the same numbers to the bit.


def rng(*key):
    """A torch generator seeded by anything: rng(seed, "sampling", step)."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(62))


@functools.lru_cache(maxsize=4)
def shuffled(n, *key):
    return torch.randperm(n, generator=rng(*key)).tolist()


def batch_indices(n, batch, step, seed):
    """Indices of the examples of one step: every epoch visits each of n once, in an order of its own."""
    wanted = range(step * batch, (step + 1) * batch)
    return [shuffled(n, seed, "epoch", i // n)[i % n] for i in wanted]


def set_lr(optimizer, lr, step, steps, warmup=20):
    """Linear warmup, then linear decay to zero: the last steps average out the noise of the first."""
    factor = min(1.0, (step + 1) / warmup) * max(0.0, 1 - step / steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def make_optimizer(model, lr):
    # beta2 .95 instead of .999: runs of a few hundred steps are over before .999 has warmed up.
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


# Flags that do not change what a run computes, and so do not belong into its name.
UNNAMED = ("resume", "device", "break_")


def parse(script, parser, argv, breaks=None):
    """Add the flags that every script has, and parse. breaks: {name: one line on what it shows}.

    The result also knows the script's name, and in `suffix` every flag that is not at its default:
    a run's folder is named by them, so no run ever overwrites one with other settings.
    """
    add = parser.add_argument
    parser.formatter_class = argparse.RawTextHelpFormatter  # keeps the lines of --break
    if breaks:
        lines = "".join(f"\n  {name:24}{line}" for name, line in breaks.items()).replace("%", "%%")
        add("--break", dest="break_", choices=breaks, metavar="NAME",
            help="train a documented failure beside the clean run; NAME is one of" + lines)  # fmt: skip
    add("--seed", type=int, default=0, help="seed of this run and of what it needs first")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"],
        help="bfloat16 computes in autocast: pays off at GPT-2's size, not at the tiny model's")  # fmt: skip
    add("--resume", action="store_true", help="go on with the interrupted run of the same flags")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "top_k" else 1) and name != "seed":
            parser.error(f"--{name} must be at least 1, not {value}")
        # A policy's log-probabilities are divided by the temperature; only talking can be greedy.
        positive = ("lr", "top_p") + ("temperature",) * (script != "gpt")
        if name in positive and value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, not {value}")
        if type(value) is float and value < 0:
            parser.error(f"--{name} must not be negative, it is {value}")
        if name in ("gamma", "lam") and value > 1:
            parser.error(f"--{name} must be at most 1, not {value}")
        if name == "noise" and value >= 0.5:
            parser.error(f"--noise {value}: labels that are wrong half of the time say nothing")
    if args.device is None:
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        args.device = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}")
    args.suffix = ""
    for name, value in vars(args).items():
        if name not in (*UNNAMED, "suffix") and value != parser.get_default(name):
            # Of a path the last two parts, without what a file name cannot hold.
            short = "-".join(Path(str(value)).parts[-2:]).replace(".", "_")[-40:]
            args.suffix += f"-{name}={short}"
    args.script = script
    return args


def peak_memory():
    """The most memory that this process has held so far, in GB (of the GPU where there is one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Run:
    """The record of one run: the folder runs/SCRIPT[-BREAK][-FLAG=VALUE ...] with

    config.json           all flags
    metrics.jsonl         one line per logged step
    samples.md            real outputs, at every evaluation
    resume.safetensors    weights, optimizer and step, while the run is going on
    model/                the result: config.json and model.safetensors
    report.json           the results; it exists when, and only when, the run has finished
    figure.png            of a break
    """

    def __init__(self, args):
        self.label = getattr(args, "break_", None) or "clean"
        name = "base" if args.script == "gpt" else args.script
        name += "" if self.label == "clean" else f"-{self.label}"
        self.folder = Path("runs") / (name + args.suffix)
        self.resume = args.resume
        # The code is part of the settings: who changes a line and runs a break again must not be
        # shown the clean run of the old line.
        here = Path(__file__).parent
        script = here / f"{args.script}.py"
        # What the script imports from its neighbours counts as well: tools.py has its loss from grpo.py.
        names = re.findall(r"^(?:import|from) (\w+)", script.read_text(), re.MULTILINE)
        imported = [here / f"{name}.py" for name in sorted({"gpt", *names} - {args.script})]
        files = [script, *(file for file in imported if file.is_file()), *sorted(here.glob("data/*.py"))]
        code = b"".join(file.read_bytes() for file in files)
        left_out = ("resume", "device", "suffix")
        self.config = {k: v for k, v in vars(args).items() if k not in left_out}
        self.config["code"] = hashlib.sha256(code).hexdigest()[:12]
        self.bar = None

    @property
    def report(self):
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def metrics(self):
        """All logged lines, as a list of dicts."""
        with open(self.folder / "metrics.jsonl") as file:
            return [json.loads(line) for line in file]

    def finished(self):
        """True if this very run is on disk: same flags, same code, and from models that are still the same.
        Who trains the reward model anew must not be shown what chased the old one."""
        if self.report is None or self.report["config"] != self.config:
            return False
        models = self.report["models"].items()
        return all(Path(path).is_file() and checksum(path) == known for path, known in models)

    def steps(self, total, model, optimizer, save_every=50, show=("loss",)):
        """Yield 0, 1, ..., total, with everything around a training loop that is not training.

        At step s the model has been updated s times. The loop evaluates, leaves at s == total, updates
        and logs. Around that: the progress bar, with the metrics named in `show`; a checkpoint every
        save_every steps; Ctrl-C, which saves between two steps and exits; the start from the
        checkpoint with --resume.
        """
        self.show, self.started = show, time.time()
        start, self.seconds = 0, 0.0
        state = self.folder / "resume.safetensors"
        if self.resume and state.is_file():
            start = self._load(state, model, optimizer)
        else:
            if self.resume:
                print(f"{self.folder}: nothing to resume, starting at step 0")
            self._refuse_to_overwrite()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / "config.json").write_text(json.dumps(self.config, indent=2))
            (self.folder / "metrics.jsonl").touch()
            (self.folder / "samples.md").touch()
        self.interrupted = interrupted = []

        def on_interrupt(signum, frame):
            if interrupted:  # the second Ctrl-C does not wait for the step to end
                raise KeyboardInterrupt
            interrupted.append(True)
            tqdm.write("Ctrl-C: saving after this step (once more: stop at once)")

        before = signal.signal(signal.SIGINT, on_interrupt)
        self.bar = tqdm(total=total, initial=start, desc=f"{self.config['script']} {self.label}",
                        dynamic_ncols=True, mininterval=0.5)  # fmt: skip
        try:
            for step in range(start, total + 1):
                if interrupted or (step > start and step % save_every == 0):
                    self._save(state, model, optimizer, step)
                if interrupted:
                    command = shlex.join([a for a in sys.argv if a != "--resume"] + ["--resume"])
                    self.bar.close()
                    print(f"Saved at step {step} of {total}. Go on with:  python {command}")
                    sys.exit(130)
                yield step
                self.bar.update(step < total)
        finally:
            self.bar.close()
            signal.signal(signal.SIGINT, before)

    def log(self, step, **metrics):
        """Append one line to metrics.jsonl. Stops the run where a number is not finite."""
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                sys.exit(
                    f"{name} is {value} at step {step}: stopped. Try a smaller --lr"
                    + (" or --dtype float32" if self.config["dtype"] != "float32" else "")
                    + f". What was logged until then is in {self.folder}."
                )
        # No wall-clock time in here: a resumed run must give the same bytes.
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.bar.set_postfix({k: f"{metrics[k]:.3f}" for k in self.show if k in metrics}, refresh=False)

    def say(self, step, **metrics):
        """log() for an evaluation: printed as well."""
        self.log(step, **metrics)
        tqdm.write(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))

    def samples(self, step, pairs, show=1):
        """Append (prompt, output) pairs to samples.md, and print the first `show` of them."""
        with open(self.folder / "samples.md", "a") as file:
            file.write(f"## Step {step}\n\n")
            for prompt, output in pairs:
                file.write(f"**{prompt}**\n\n```\n{output}\n```\n\n")
        for prompt, output in pairs[:show]:
            tqdm.write(f"    {prompt}\n    -> " + output.replace("\n", "\n       "))

    def beside(self, steps):
        """Append to samples.md the outputs of several evaluations, prompt by prompt: {name: step}."""
        path = self.folder / "samples.md"
        text, found = path.read_text(), {}
        for name, step in steps.items():
            section = text.split(f"## Step {step}\n")[1].split("\n## ")[0]  # "####" ends no section
            blocks = re.findall(r"\*\*(.*?)\*\*\n\n```\n(.*?)\n```", section, re.DOTALL)
            for prompt, output in blocks:
                found.setdefault(prompt, []).append(f"{name}, step {step}:\n{output}")
        with open(path, "a") as file:
            file.write("## Beside each other\n\n")
            for prompt, outputs in found.items():
                file.write(f"**{prompt}**\n\n```\n" + "\n\n".join(outputs) + "\n```\n\n")

    def finish(self, model, **results):
        """Save the model, then the report: its existence says that the run is complete."""
        save_model(model, self.folder / "model")
        results["seconds"] = round(self.seconds + time.time() - self.started, 1)
        results["peak_gb"] = peak_memory()
        report = {"config": self.config, "models": READ, **results}
        text = json.dumps(report, indent=2)
        write_atomically(self.folder / "report.json", lambda path: path.write_text(text))
        # The training state, and what kills in the middle of writing it have left behind.
        for rest in (*self.folder.glob("resume.safetensors*"), *self.folder.glob(".tmp*")):
            rest.unlink()
        print(f"{self.folder}: done in {results['seconds']:.0f} s, peak memory {results['peak_gb']:.1f} GB")
        if self.interrupted:  # Ctrl-C during the last evaluation: complete, but nothing follows
            sys.exit(130)
        return report

    def _refuse_to_overwrite(self):
        """Two long paths can end alike: their runs would share a folder's name."""
        path = self.folder / "config.json"
        old = json.loads(path.read_text()) if path.is_file() else {}
        for name in ("load", "data", "base", "rm", "policy"):
            if old.get(name) != self.config.get(name) and old:
                sys.exit(f"{self.folder} holds a run with --{name} {old.get(name)}: move it away first.")

    def _files(self):
        return [self.folder / "metrics.jsonl", self.folder / "samples.md"]

    def _save(self, path, model, optimizer, step):
        """All of the training state in one file, so that one rename makes it valid."""
        tensors = {f"model.{name}": w for name, w in model.state_dict().items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": w for name, w in moments.items()}
        state = {
            "step": step,
            "config": self.config,
            "seconds": self.seconds + time.time() - self.started,
            "sizes": [file.stat().st_size for file in self._files()],
        }
        write_atomically(path, lambda p: save_file(tensors, p, {"state": json.dumps(state)}))

    def _load(self, path, model, optimizer):
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            sys.exit(f"{path} is damaged ({error}): it cannot be resumed. Run without --resume.")
        for name in self.config:
            if state["config"].get(name) != self.config[name]:
                what = "the script has changed" if name == "code" else f"--{name} differs"
                sys.exit(f"{self.folder} cannot be resumed: {what} since. Run without --resume.")
        model.load_state_dict(
            {n.removeprefix("model."): w for n, w in tensors.items() if n.startswith("model.")}
        )
        moments = {}
        for name, w in tensors.items():
            if name.startswith("optimizer."):
                _, i, what = name.split(".")
                moments.setdefault(int(i), {})[what] = w
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # What was logged after the checkpoint will be logged again: cut it off.
        for file, size in zip(self._files(), state["sizes"]):
            os.truncate(file, size)
        self.seconds = state["seconds"]
        print(f"{self.folder}: going on at step {state['step']}")
        return state["step"]


def made_by(script, args, minutes, flags=()):
    """The model folder of an earlier chapter's run; where it is missing, say so and make it.

    The run is that with the same seed (and --dtype), so a seed stands for a whole chain: base, SFT, DPO.
    """
    module = importlib.import_module(script)
    argv = list(flags)
    for name, default in (("seed", 0), ("dtype", "float32")):
        if getattr(args, name) != default:
            argv += [f"--{name}", str(getattr(args, name))]
    run = Run(parse(script, module.parser(), argv))
    if run.report is None:
        print(
            f"{run.folder} is missing. Making it with `{' '.join(['python', script + '.py', *argv])}`, "
            f"about {minutes}; it is kept for the next run.",
            flush=True,
        )
        module.main(argv + ["--device", args.device] + (["--resume"] if args.resume else []))
    elif run.report["config"].get("code") != run.config["code"]:
        # Not made anew unasked: that would take minutes, and may be for a comment.
        print(f"{run.folder} is from before the code changed; move it away to have it made anew")
    return str(run.folder / "model")


# ---------------------------------------------------------------------------------------------
# 7. The clean run and the broken run, side by side


def run_once(train, args, reuse):
    """train(args), or with reuse the run of the same flags and the same code that is on disk."""
    run = Run(args)
    if reuse and run.finished():
        print(f"{run.folder}: already there, finished with the same flags and code")
        return run
    try:
        return train(args)
    except KeyboardInterrupt:  # outside of the loop, or for the second time within a step
        sys.exit("\nStopped at once. What was saved goes on with --resume.")


def clean_and_broken(train, args):
    """Both runs of a break. The clean one is trained only where it is not on disk."""
    clean = run_once(train, argparse.Namespace(**{**vars(args), "break_": None}), reuse=True)
    return clean, run_once(train, args, reuse=args.resume)


def break_report(clean, broken, dashboard, outside, claims, cure, figure):
    """Table, figure, verdict and cure of one break.

    dashboard, outside: {label: key in both reports}: what the training shows, what only an evaluation
    from outside shows. claims: [(sentence, bool)], the documented signature. figure: two panels
    (title, y label, metric in metrics.jsonl, or a tuple of results), or a function (path, runs) that draws
    its own. Returns the broken run's report.
    """
    name, C, B = broken.label, clean.report, broken.report
    lines = [f"{'':38}{'clean':>12}{name:>26}"]
    for heading, rows in (("dashboard", dashboard), ("outside evaluation", outside)):
        lines.append(heading)
        for label, key in rows.items():
            if key not in C:  # real data without gold answers has no share of right ones
                continue
            lines.append(f"  {label:36}{C[key]:>12.3f}{B[key]:>26.3f}")
    print("\n" + "\n".join(lines) + "\n")

    failed = [sentence for sentence, holds in claims if not holds]
    for sentence, holds in claims:
        print(f"  [{'x' if holds else ' '}] {sentence}")
    verdict = "reproduced" if not failed else "NOT reproduced: " + "; ".join(failed)
    print(f"\nThe documented signature of {name}: {verdict}.\nThe cure to try:  {cure}")

    if callable(figure):
        figure(broken.folder / "figure.png", [clean, broken])
    else:
        draw(broken.folder / "figure.png", [clean, broken], figure)
    print(f"Figure: {broken.folder / 'figure.png'}   outputs: {broken.folder / 'samples.md'}")
    B |= {"reproduced": not failed, "claims": {s: bool(h) for s, h in claims}}
    text = json.dumps(B, indent=2)
    write_atomically(broken.folder / "report.json", lambda path: path.write_text(text))
    return B


def draw(path, runs, panels):
    """One row of panels, every run in each. panels: [(title, y label, metric[, metric on the x axis])]."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file: works without a screen
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained")
    for ax, (title, ylabel, metric, *x) in zip(axes, panels):
        x = x[0] if x else "step"
        for run, color, style in zip(runs, ("tab:blue", "tab:red"), ("-", "--")):
            if isinstance(metric, tuple):  # several results of the report, instead of one over time
                report = run.report
                ax.plot(metric, [report[key] for key in metric], "o" + style, color=color, label=run.label)
                continue
            steps, values = zip(*((m[x], m[metric]) for m in run.metrics if metric in m))
            if len(values) > 60:  # a running mean, or the noise of single batches hides the line
                width = len(values) // 30
                windows = (values[max(0, i - width) : i + 1] for i in range(len(values)))
                values = [sum(window) / len(window) for window in windows]
            ax.plot(steps, values, style, color=color, label=run.label, linewidth=2)
        ax.set(title=title, ylabel=ylabel, xlabel="" if isinstance(metric, tuple) else x)
        ax.grid(alpha=0.3)
    axes[0].legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------
# 8. Pretraining


def packed_rows(tok, seed, step, batch, length):
    """Running text for one step, (batch, length): every row starts with a text and ends in mid-text.

    An endless stream: no text is ever seen twice, so the training loss is a held-out loss as well.
    """
    from data.task import corpus

    rows, row = [], []
    for text in corpus(f"{seed} step {step}"):
        row += tok.encode(text + "\n\n")
        if len(row) >= length:
            rows.append(row[:length])
            row = []
        if len(rows) == batch:
            return torch.tensor(rows)


def train(args):
    """Train the base model. Returns its Run."""
    tok = Tokenizer("task")
    torch.manual_seed(args.seed)  # the initial weights are the only thing that is drawn globally
    config = GPTConfig(tok.vocab_size, args.block_size, args.n_layer, args.n_embd // 32, args.n_embd)
    model = GPT(config).to(args.device)
    model.bfloat16 = args.dtype == "bfloat16"
    optimizer = make_optimizer(model, args.lr)
    run = Run(args)
    prompts = ["Leo has 7 eggs. Leo finds 5.", "Mia has 8 pens. Mia sells 2. Then the pens double."]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps")
    for step in run.steps(args.steps, model, optimizer):
        if step % 450 == 0 or step == args.steps:
            generator = rng(args.seed, "samples", step)
            ids, _ = sample(model, [tok.encode(p) for p in prompts], 60, [tok.end], generator=generator)
            run.samples(step, [(p, tok.decode(c)) for p, c in zip(prompts, ids)])
        if step == args.steps:
            break
        # ---- one update
        set_lr(optimizer, args.lr, step, args.steps)
        ids = packed_rows(tok, args.seed, step, args.batch, args.length + 1).to(args.device)
        # The logits of position t predict the token of position t+1: shift once.
        logits = model(ids[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, grad_norm=grad_norm)
    last = run.metrics[-50:]  # a single batch is noise
    run.finish(model, loss=sum(m["loss"] for m in last) / len(last))
    return run


def chat(args):
    """Answer (a chat model) or continue (a base model) one prompt."""
    model = load_model(args.load, args.device, args.dtype == "bfloat16")
    tok = Tokenizer(model.config.tokenizer)
    ids = tok.prompt(args.prompt) if model.config.chat else tok.encode(args.prompt)
    if not args.prompt:
        sys.exit("--prompt is empty: give it a few words to continue")
    room = model.config.block_size - len(ids)
    if room < 1:
        sys.exit(f"the prompt has {len(ids)} tokens; the context of {args.load} ends at "
                 f"{model.config.block_size}")  # fmt: skip
    out, _ = sample(model, [ids], min(args.tokens, room), [tok.end], temperature=args.temperature,
                    top_k=args.top_k, top_p=args.top_p, generator=rng(args.seed))  # fmt: skip
    print(("" if model.config.chat else args.prompt) + tok.decode(out[0]))


# fmt: off
def parser():
    p = argparse.ArgumentParser(
        prog="gpt.py", description="Train the base model, or talk to any checkpoint (--load).")
    add = p.add_argument
    add("--load", help="talk to this checkpoint: a folder, or gpt2, gpt2-medium, ...")
    add("--prompt", default="Leo has 7 eggs.", help="what to say to it")
    add("--tokens", type=int, default=60, help="how many tokens at most it may answer")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_k", type=int, default=0, help="sample from the k likeliest tokens only (0: all)")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up p")
    add("--n_layer", type=int, default=3, help="three learn to copy numbers sooner than two")
    add("--n_embd", type=int, default=128, help="width, a multiple of 32 (the heads' width)")
    add("--block_size", type=int, default=128, help="context; a problem and its answer take 80 at most")
    add("--steps", type=int, default=1800, help="until arithmetic and copying are learned")
    add("--batch", type=int, default=16, help="rows a step: many small steps learn fastest here")
    add("--length", type=int, default=64, help="tokens a row")
    add("--lr", type=float, default=4e-3, help="high, as a model of this size allows")
    return p
# fmt: on


def main(argv=None):
    args = parse("gpt", parser(), argv)
    for name in ("n_embd", "block_size", "length", "tokens", "n_layer"):
        if getattr(args, name) < 1 or (name == "n_embd" and args.n_embd % 32):
            sys.exit(f"--{name} {getattr(args, name)} is not possible (see --help)")
    if args.length > args.block_size:
        sys.exit(f"--length {args.length} does not fit --block_size {args.block_size}")
    if args.load:
        chat(args)
    else:
        run_once(train, args, reuse=args.resume)


if __name__ == "__main__":
    main()
