"""The transformer, and what every chapter does with it: sample, score, evaluate, save.

    python gpt.py                               train the base model of the embedded task
    python gpt.py --load runs/base --prompt "Leo has 7 eggs."      talk to any checkpoint

A base model continues text. It is trained on running text,

    L = - mean_t  log p(x_t | x_<t)                                (every token is a target)

and a question with its answer is one kind of text to it. The later scripts (chapters) start from this model and teach
it a format (sft.py), then preferences (dpo.py, or reward_model.py with ppo.py or grpo.py).

What is in this file, in reading order:

    1. GPT               GPT-2's architecture exactly, so that GPT-2's weights load into it; and what Llama, Qwen
                         and SmolLM do differently today, one place for each difference
    2. Tokenizer         tiktoken, with four special tokens for a chat, or a published model's chat template
    3. sample            generation in batches with a key-value cache
    4. completion_logps  log-probabilities of answers: what every algorithm here is made of; and
                         completion_scores, the same for a model with one number as its output
    5. solve, examine    a model's answers to held-out problems, checked
    6. load_model        checkpoints in Hugging Face's layout
    7. train             pretraining

Left out: dropout (nothing here trains long enough to need it, and log-probabilities computed with dropout are
random), pretraining in several processes, compilation.
"""

import argparse
import math
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import checkpoints, lessons, report, runs, task, vocabularies
from data.checker import is_correct
from data.runs import rng

# ---------------------------------------------------------------------------------------------
# 1. The transformer
#
# Shapes: B sequences, T tokens, C channels, H heads, D = C/H channels per head, V tokens in the vocabulary, S =
# tokens attended to (cached ones and new ones).
#
# GPT-2 is from 2019. The models of today (Llama, Qwen, SmolLM) are the same transformer with five differences:
#
#                      GPT-2                             today                                         where
#     normalization    LayerNorm                         RMSNorm: no mean, no bias                     RMSNorm, norm
#     positions        a learned vector, added to x      queries and keys are rotated                  Rotary, rotate
#     MLP              GELU                              SwiGLU: one half is a gate for the other      MLP
#     keys and values  one head for each query head      one head for several query heads (GQA)        Attention
#     biases           everywhere                        none; Qwen2: in q, k, v; Qwen3: none, but     Attention
#                                                        q and k are normalized


@dataclass
class GPTConfig:
    vocab_size: int = 597
    block_size: int = 128  # the longest sequence: there are no learned positions beyond it
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    tokenizer: str = "task"  # which vocabulary the ids belong to: "task", "gpt2" or the folder of a published one
    chat: bool = False  # trained on conversations (sft.py and later), not on running text
    end: int | None = None  # id of the end token, for `transformers` (default: that of our tokens, vocab_size - 2)
    pad: int | None = None  # id of the padding token (default: vocab_size - 1)
    # What differs between GPT-2 and the models of today. The defaults are GPT-2's.
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-5
    rope: dict | None = None  # settings of rotary positions, as in Hugging Face's files; None: learned positions
    mlp: str = "gelu"  # or "swiglu"
    n_inner: int | None = None  # width inside the MLP (default: 4 n_embd)
    n_kv_head: int | None = None  # heads of keys and values (default: n_head)
    head_dim: int | None = None  # channels per head (default: n_embd / n_head)
    biases: str = "all"  # of linear layers: "all", "qkv" or "none"
    qk_norm: bool = False
    tied: bool = True  # the output layer is the embedding

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head


class Cache:
    """Keys and values of the tokens read so far, so that generation computes each token once."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_dim)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))  # (L, B, H, S_max, D)
        self.length = 0  # tokens in the cache

    def extend(self, layer, k, v):
        """Append (B, H, T, D) of one layer; return all keys and values so far, (B, H, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Keep these rows only: a mask that drops some, or indices that repeat some."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension. LayerNorm also subtracts the mean and adds a bias;
    a transformer learns as well without both (Zhang and Sennrich 2019)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        # In float32: the mean of squares loses too much in bfloat16.
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def norm(config):
    return (nn.LayerNorm if config.norm == "layer" else RMSNorm)(config.n_embd, config.norm_eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): queries and keys are rotated by an angle that grows with the position.

    The D channels of a head are D/2 pairs, and pair i turns by theta^(-2i/D) radians per position: the first pair
    fast, the last one slowly. A query at position m and a key at position n are then rotated against each other by
    an angle that depends on m - n only. So attention sees distances between tokens, not their places.
    """

    def __init__(self, config):
        super().__init__()
        D, rope = config.head_dim, config.rope
        speed = 1 / rope["rope_theta"] ** (torch.arange(0, D, 2).float() / D)  # (D/2,), radians per position
        if rope["rope_type"] == "linear":  # a context `factor` times as long: all pairs turn more slowly
            speed = speed / rope["factor"]
        elif rope["rope_type"] == "llama3":
            # Only the slow pairs, which made less than low_freq_factor turns in the shorter context. Those that made
            # more than high_freq_factor turns stay as they are. Between the two, the pairs get a mixture.
            turns = rope["original_max_position_embeddings"] * speed / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            fast = ((turns - low) / (high - low)).clamp(0, 1)
            speed = fast * speed + (1 - fast) * speed / rope["factor"]
        self.register_buffer("speed", speed, persistent=False)  # follows the model to its device, is not saved

    def forward(self, positions):
        """Cosines and sines for positions (T,) or (B, T): (1, T, D/2) or (B, 1, T, D/2), the same for all heads."""
        angle = positions[..., None].float() * self.speed
        return angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3)


def rotate(x, rotation):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D), in float32."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        # Fewer heads of keys and values make the cache smaller; each serves n_head / n_kv_head heads of queries.
        self.widths = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.biases != "none")
        self.c_proj = nn.Linear(self.widths[0], config.n_embd, bias=config.biases == "all")
        # Queries and keys of length sqrt(D), times learned weights: attention scores cannot grow without bound.
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def forward(self, x, mask, cache, layer, rotation):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split(self.widths, dim=2)
        # (B, T, H D) -> (B, H, T, D); k and v have n_kv_head heads
        q, k, v = (z.view(B, T, -1, self.head_dim).transpose(1, 2) for z in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # `is_causal` is the fast path, but it assumes that query i is token i: a new query behind five cached
        # tokens would attend to the first one only. So it is used only where queries and keys are the same tokens.
        # Everywhere else `mask` says which keys each query attends to.
        grouped = self.widths[0] != self.widths[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


def swiglu(x):
    """(..., 2 N) -> (..., N): one half of the channels says how much of the other half passes (Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        width = config.n_inner * (2 if self.gated else 1)
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.biases == "all")
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.biases == "all")

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(swiglu(x) if self.gated else F.gelu(x, approximate="tanh"))  # GPT-2 uses the tanh form


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, layer, rotation):
        x = x + self.attn(self.ln_1(x), mask, cache, layer, rotation)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), or one of its descendants, as the config says."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.rope is None else None
        self.rotary = Rotary(config) if config.rope is not None else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.bfloat16 = False  # compute in bfloat16 (autocast); the weights stay float32
        self.tokenizer_files = {}  # {name: bytes}: a published tokenizer, which is saved along with the model
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name == "wte.weight":
                # GPT-2 has std .02 here too, at a width of 768 and more. At width 128 the embeddings of rare tokens
                # would be so alike that the model does not learn to copy them. Here each starts with a length of
                # about 1. (With tied embeddings a token then predicts itself at first; a few updates undo that.)
                nn.init.normal_(p, std=1 / math.sqrt(config.n_embd))
            elif p.dim() == 2:
                # Each block adds to x twice. This scale keeps x from growing with the number of layers.
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def hidden(self, ids, valid=None, cache=None, positions=None, mask=None):
        """Final hidden states (B, T, C) of token ids (B, T).

        valid: (B, S) bool, False at padding. Needed only if the padding is on the *left*: padding on the right
        comes after all real tokens, which never attend to it. With a cache, S counts the cached tokens too.
        positions (B, T) may be given (see pack); for rows that are not plain sequences also mask (B, 1, T, S), True
        where a query may attend. Raises ValueError if the context is exceeded.
        """
        B, T = ids.shape
        past = cache.length if cache is not None else 0
        S = past + T
        longest = S if positions is None else int(positions.max()) + 1
        if longest > self.config.block_size:
            # There are no positions beyond, and old tokens cannot be dropped from a cache: their keys contain
            # theirs.
            raise ValueError(f"{longest} tokens do not fit the context of {self.config.block_size}")
        if positions is None and valid is None and past == 0:
            positions = torch.arange(T, device=ids.device)
        elif positions is None:
            if valid is None:
                valid = torch.ones(B, S, dtype=torch.bool, device=ids.device)
            # The position is the number of real tokens before this one. If padding counted, a padded prompt would
            # be read at positions that it was not trained at.
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
            query = torch.arange(past, S, device=ids.device)[:, None]  # (T, 1)
            key = torch.arange(S, device=ids.device)  # (S,)
            mask = (key <= query) & valid[:, None, :]  # (B, T, S)
            # A padding token attends to itself: a softmax over nothing would be 0/0.
            mask = (mask | (key == query))[:, None]  # (B, 1, T, S), the same for all heads
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            x, rotation = self.wte(ids), None  # (B, T, C)
            if self.rotary is None:
                x = x + self.wpe(positions)
            else:
                rotation = self.rotary(positions)
            for layer, block in enumerate(self.h):
                x = block(x, mask, cache, layer, rotation)
            if cache is not None:
                cache.length = S
            return self.ln_f(x)

    def head(self, hidden):
        """Logits (..., V) from hidden states (..., C): a dot product with every token's embedding."""
        output = self.wte if self.lm_head is None else self.lm_head  # larger models have a second embedding for this
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bfloat16):
            return F.linear(hidden, output.weight)

    def forward(self, ids, valid=None, cache=None):
        """Logits (B, T, V). The logits at position t predict token t+1."""
        return self.head(self.hidden(ids, valid, cache))

    def save(self, folder, scorer=None):
        """Write config.json, model.safetensors and a published tokenizer's files: `transformers` opens the folder."""
        config, weights = checkpoints.to_hugging_face(self.config, self.state_dict(), scorer is not None)
        if scorer:
            config |= {"num_labels": 1, "score_mean": scorer.mean, "score_std": scorer.std}
            weights["score.weight"] = scorer.score.weight.detach()
        checkpoints.write(folder, config, weights, self.tokenizer_files)


class Scorer(nn.Module):
    """A transformer whose output is one number instead of a token: reward model, verifier.

    The output layer is one dot product with a final hidden state. Only differences of scores have a meaning, so
    they are reported as (raw - mean) / std, with mean and std set once, after training.
    """

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.score = nn.Linear(transformer.config.n_embd, 1, bias=False)
        # Final hidden states have entries of size 1, so scores start with a standard deviation of about 1.
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(transformer.config.n_embd + 1))
        self.mean, self.std = 0.0, 1.0

    def forward(self, hidden):
        raw = self.score(hidden.float())[..., 0]  # (..., C) -> (...), float32
        return (raw - self.mean) / self.std

    def save(self, folder):
        """As GPT.save; `transformers` opens it as a model for sequence classification with one label."""
        self.transformer.save(folder, scorer=self)


def make_optimizer(model, lr):
    # beta2 .99 instead of .999: with .999 the second moment averages over 1000 steps, longer than most runs here.
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def set_lr(optimizer, lr, step, steps, warmup=20):
    """Linear warmup over the first 20 steps, times a linear decay to zero over all steps. Small last steps average
    out the noise of the large ones."""
    factor = min(1.0, (step + 1) / warmup) * max(0.0, 1 - step / steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


# ---------------------------------------------------------------------------------------------
# 2. The tokenizer


class Tokenizer:
    """tiktoken, and four special tokens that turn a text model into a chat model.

    A conversation is the ids   <|user|> question <|assistant|> answer <|end|>
    Padding is <|pad|>, a token of its own (sft.py finds padding by its id). If padding and end token were the same,
    masking the padding would mask the end too, and the model would never learn to stop (see sft.py --break eos_masked).

    A published chat model brings special tokens and a template of its own (see vocabularies.Template), and answers
    well only if it is asked in that form. Then it gets no tokens of ours.
    """

    SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]

    def __init__(self, name):
        """name: "task", "gpt2", or the folder of a published model."""
        self.name = name
        known = vocabularies.load(name)
        self.template, self.nfc, self.start = known.template, known.nfc, list(known.start)
        self.vocab_size, special = known.size, known.special
        self.user = self.assistant = None
        if self.template is None:
            ours = {token: known.size + i for i, token in enumerate(self.SPECIAL)}
            self.user, self.assistant, self.end, self.pad = ours.values()
            self.vocab_size, special = known.size + len(ours), special | ours
        else:
            self.end, self.pad = self.template.end, self.template.pad
        # Bytes that a vocabulary lacks have ids behind the last one.
        self.incomplete = max(known.ranks.values()) >= self.vocab_size
        self.ids = known.pattern, known.ranks, special, self.nfc  # two tokenizers with equal .ids give equal ids
        self.encoding = tiktoken.Encoding(
            name, pat_str=known.pattern, mergeable_ranks=known.ranks, special_tokens=special
        )

    def encode(self, text):
        """Ids of plain text. "<|end|>" inside a text is encoded as ordinary characters, so a text can neither end
        an answer nor open a turn."""
        ids = self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        return [i for i in ids if i < self.vocab_size] if self.incomplete else ids

    def decode(self, ids):
        return self.encoding.decode(list(ids))

    def prompt(self, question):
        """Ids up to where the answer begins. question: a string, or a public.Dialogue of several turns."""
        if self.template is None:
            return [*self.start, self.user, *self.encode(question), self.assistant]
        try:
            pieces = self.template.pieces(question)
        except Exception as error:  # the template is a program: it may refuse a question, or fail at it
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            sys.exit(f"the chat template of {self.name} refuses the prompt {question[:60]!r}: {cause}")
        return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else self.encode(piece))]

    def answer(self, text):
        """Ids of an answer with its end token. Question and answer are encoded apart: encoded together, a token
        could cross the border, and generation never produces such ids."""
        return [*self.encode(text), self.end]


# ---------------------------------------------------------------------------------------------
# 3. Sampling


def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the top_k tokens, then of these the most likely ones that together reach probability top_p; set the others
    to -inf. (B, V) -> (B, V)"""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # Drop a token if the tokens *before* it already reach top_p: the first one always stays.
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return logits


def draw_tokens(probs, generator=None):
    """Draw one index per row with the given probabilities. (B, V) -> (B,)

    Inverts the cumulative sum with one random number per row. torch.multinomial draws V numbers per row, which took
    a fifth of the sampling time on a CPU. In float64, if the device has it: in float32 the rounding errors of the
    sum are as large as the probabilities of rare tokens.
    """
    cdf = probs.double().cumsum(-1) if probs.device.type != "mps" else probs.cumsum(-1)
    # Drawn on the CPU: a seed gives the same random numbers on every device.
    u = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64).to(cdf)
    # The first index whose cumulative sum exceeds u. A token of probability 0 is never drawn.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, max_new_tokens, stop, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           banned=(), writer=None):  # fmt: skip
    """Continue every prompt until a stop token or max_new_tokens.

    prompts: list of lists of ids, of any lengths. stop: the ids that end a completion. The stop token is part of
    the completion; a completion without one was cut off. temperature 0 is greedy decoding. banned: ids that are
    never sampled. writer(rows, new) -> ids may replace the new tokens: rows (b,) are indices into prompts, new (b,)
    the tokens sampled for them. tools.py inserts the results of a tool with it.

    Returns two lists with one entry per prompt: the ids, and their log-probabilities (a float32 tensor) under the
    distribution that they were sampled from, after temperature, top_k, top_p and banned. (Greedy: under that of
    temperature 1.) Raises ValueError if prompt and completion do not fit the context.
    """
    B, N, device = len(prompts), max_new_tokens, model.wte.weight.device
    P = max(map(len, prompts))
    if P + N > model.config.block_size:
        raise ValueError(f"a prompt of {P} tokens and {N} new ones do not fit the context of {model.config.block_size}")
    # With many answers to one question, the question is computed once and its cache is copied.
    different = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: row for row, prompt in enumerate(different)}
    copies = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    # Pad on the left: then all rows end at the same column, where the next token goes.
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
    rows = torch.arange(B, device=device)  # the prompt that each row of the batch belongs to
    alive = torch.ones(B, dtype=torch.bool, device=device)
    # Autocast around the whole loop: it keeps its bfloat16 copies of the weights until the with-block ends.
    with torch.autocast(device.type, torch.bfloat16, enabled=model.bfloat16):
        hidden = model.hidden(ids, valid[:, :P], cache)[:, -1]  # (B, C)
        if not torch.isfinite(hidden).all():
            sys.exit("The model's outputs are not finite: its training diverged. Try a smaller --lr.")
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
            if writer is not None:  # it sees unfinished rows only
                new[alive] = writer(rows[alive], new[alive])
            tokens[rows[alive], t] = new[alive]
            logps[rows[alive], t] = logp.gather(1, new[:, None])[alive, 0]
            alive &= ~torch.isin(new, stop)
            left = int(alive.sum())
            if left == 0 or t == N - 1:
                break
            # Finished rows leave the batch. Not at every step: copying the cache costs about as much as a step.
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


# ---------------------------------------------------------------------------------------------
# 4. Log-probabilities and scores of given completions

# Logits computed at a time, half a GB. They are the largest tensor of a model with a large vocabulary: a token has 0.6
# MB of them in Qwen's.
LOGITS = 2**27


def completion_logps(model, prompts, completions, temperature=1.0, value_head=None, banned=()):
    """log p(completion token | prompt, tokens before) for every token of every completion.

    prompts, completions: lists of lists of ids. Returns (logps, mask), both (B, N), with N the length of the
    longest completion: float32 log-probabilities, 0 where mask is False. The sum over dim 1 is the log-probability
    of the whole completion. If they are compared with log-probabilities from sampling, `temperature` and `banned`
    must be the same as there; otherwise two equal models give different numbers. With a value_head (C -> 1) returns
    (logps, mask, values): values (B, N) are computed from the same hidden states: the value of a token from the
    state just before it.
    """
    ids, positions, attends, states, mask = pack(prompts, completions, model.wte.weight)
    hidden = model.hidden(ids, positions=positions, mask=attends)
    # Each token is predicted by the state of the token that it follows; the first answer token by the last state
    # of the prompt. `states` contains this shift: do not shift again.
    hidden = hidden.flatten(0, 1)[states[:, :-1][mask]]  # (M, C), M completion tokens in all
    targets = ids.flatten()[states[:, 1:][mask]]  # (M,)
    # Logits only for the completions' tokens, and not for too many at a time.
    some, token_logps = max(1, LOGITS // len(model.wte.weight)), []
    for part, wanted in zip(hidden.split(some), targets.split(some)):  # (m, C), (m,)
        # The softmax in float32: in bfloat16, with eight bits of precision, log-probabilities would be off by about
        # .05.
        logits = model.head(part).float() / temperature  # (m, V)
        if banned:
            logits[:, banned] = -math.inf
        token_logps.append(-F.cross_entropy(logits, wanted, reduction="none"))
    token_logps = torch.cat(token_logps)  # (M,)
    # Assignment, not multiplication by the mask: -inf * 0 is NaN.
    zeros = torch.zeros(mask.shape, device=mask.device)
    logps = zeros.masked_scatter(mask, token_logps)
    if value_head is None:
        return logps, mask
    return logps, mask, zeros.masked_scatter(mask, value_head(hidden.float())[:, 0])


def completion_scores(scorer, prompts, completions):
    """A scorer's scores of every prefix of every answer.

    Returns (scores, mask), both (B, N+1). Column t is the score of the prompt and the first t answer tokens, so
    column len(completion) is the score of the whole answer with its end token. 0 where mask is False.
    """
    ids, positions, attends, states, mask = pack(prompts, completions, scorer.score.weight)
    hidden = scorer.transformer.hidden(ids, positions=positions, mask=attends).flatten(0, 1)
    mask = F.pad(mask, (1, 0), value=True)  # (B, N+1): the prefix without any answer token exists too
    scores = scorer(hidden[states[mask]])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, scores), mask


def final_scores(scorer, prompts, completions, batch=None):
    """Scores (B,) of complete answers, read at the last token (the end token, if there is one)."""
    found, batch = [], batch or at_once(scorer.transformer)
    for i in runs.progress(range(0, len(prompts), batch), "scores"):
        scores, mask = completion_scores(scorer, prompts[i : i + batch], completions[i : i + batch])
        found.append(scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0])
    return torch.cat(found)


@torch.no_grad()
def mean_kl(policy, ref, prompts, completions, batch=None):
    """KL(policy || ref) in nats per answer: the mean of log pi - log pi_ref over the policy's own samples. An
    estimate; over few samples it can be below 0."""
    total, batch = 0.0, batch or at_once(policy)
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch], completions[i : i + batch]
        total += (completion_logps(policy, *some)[0] - completion_logps(ref, *some)[0]).sum().item()
    return total / len(prompts)


def pack(prompts, completions, weight):
    """Rows for one forward pass. Adjacent answers to the same prompt share a row, so the prompt is computed once:

        ids        p p p a a a b b      two answers, a and b, to the prompt p
        positions  0 1 2 3 4 5 3 4      each answer has the positions right behind the prompt,
        segments   0 0 0 1 1 1 2 2      and attends to the prompt (segment 0) and itself, not to the other answer

    Returns, for R rows of at most L tokens: ids and positions (R, L), and attends (R, 1, L, L), or None if all rows
    are plain sequences. Then, for the B completions: states (B, N+1), where states[b, t] is the index into
    ids.flatten() of the token read last when the prompt and the first t answer tokens have been read (entries
    behind the end of an answer mean nothing); and exists (B, N), True where there is an answer token. weight is one of
    the model's: its last dimension is the width, and its device that of the rows.
    """
    B, N, device = len(prompts), max(map(len, completions)), weight.device
    rows, last = [], None  # of (ids, positions, segments)
    starts = []  # for each completion: its row, and the place of its first token in it
    for prompt, completion in zip(prompts, completions):
        # Two answers always share a row. More do only while it is short: the cost of attention grows with the square
        # of the row's length, and in a row of twice the model's width it is already a large part of the whole cost.
        full = 2 * max(weight.shape[-1], len(prompt))
        if prompt != last or (rows[-1][2][-1] >= 2 and len(rows[-1][0]) + len(completion) > full):
            last = prompt
            rows.append((list(prompt), list(range(len(prompt))), [0] * len(prompt)))
        ids, positions, segments = rows[-1]
        starts.append((len(rows) - 1, len(ids)))
        segments.extend([segments[-1] + 1] * len(completion))
        positions.extend(range(len(prompt), len(prompt) + len(completion)))
        ids.extend(completion)
    L = max(len(ids) for ids, _, _ in rows)
    # Padding on the right: no real token attends to later ones, so its id, position and segment do not matter.
    ids, positions, segments = (
        torch.tensor([row[i] + [0] * (L - len(row[i])) for row in rows], device=device) for i in range(3)
    )
    states = torch.zeros(B, N + 1, dtype=torch.long)
    exists = torch.zeros(B, N, dtype=torch.bool)
    for b, ((row, start), prompt, completion) in enumerate(zip(starts, prompts, completions)):
        states[b] = row * L + torch.arange(start - 1, start + N)
        states[b, 0] = row * L + len(prompt) - 1  # before the first answer token: the end of the prompt
        exists[b, : len(completion)] = True
    attends = None
    if len(rows) < B:
        attends = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (R, query, key)
        attends = attends.tril()[:, None]  # (R, 1, L, L): and no token attends to later ones
    return ids, positions, attends, states.to(device), exists.to(device)


# ---------------------------------------------------------------------------------------------
# 5. Evaluation: answers to held-out problems, checked


@dataclass
class Answer:
    text: str  # without the end token
    ids: list  # with the end token
    logps: torch.Tensor  # of the ids, under the distribution that they were sampled from
    ended: bool  # False: cut off at max_new_tokens
    correct: bool  # by the exact checker


def read_answer(tok, ids, logps, gold):
    """An Answer from sampled ids."""
    ended = ids[-1] == tok.end
    text = tok.decode(ids[:-1] if ended else ids)
    return Answer(text, ids, logps, ended, is_correct(text, gold))


def at_once(model, small=250):
    """Answers per batch where there is no gradient. A published model's cache and logits take 50 MB per answer."""
    return small if model.config.n_embd < 512 else 64


def solve(model, tok, problems, temperature, generator, max_new_tokens=48, batch=None):
    """One answer of a chat model per problem (objects with .text and .answer): a list of Answer."""
    prompts = [tok.prompt(p.text) for p in problems]
    answers, batch = [], batch or at_once(model)
    for i in runs.progress(range(0, len(prompts), batch), "answers"):
        completions = sample(model, prompts[i : i + batch], max_new_tokens, [tok.end],
                             temperature=temperature, generator=generator)  # fmt: skip
        for ids, logps, p in zip(*completions, problems[i : i + batch]):
            answers.append(read_answer(tok, ids, logps, p.answer))
    return answers


def shown(problems, answers, checked=True, scores=None):
    """(prompt, output) pairs for Run.samples: the first eight answers, whether they are correct (if checked), and their
    scores: a wrong answer may have a high one. The page of a run (data/page.py) reads what is written here."""
    found = []
    for i, (p, a) in enumerate(zip(problems[:8], answers)):
        mark = (" (correct)" if a.correct else f" (wrong, {p.answer} is correct)") if checked else ""
        score = "" if scores is None else f" score {scores[i]:.2f}, {len(a.ids)} tokens"
        found.append((p.text, a.text + ("" if a.ended else " [cut off]") + mark + score))
    return found


def examine(model, tok, problems, seed, step, max_new_tokens=48):
    """A chat model on held-out problems: accuracy at temperature 1 and greedy, the fraction of answers that end by
    themselves, and tokens per answer. Returns (results, the sampled answers)."""
    sampled = solve(model, tok, problems, 1.0, rng(seed, "evaluation", step), max_new_tokens)
    greedy = solve(model, tok, problems, 0.0, None, max_new_tokens)
    n = len(problems)
    results = {
        "accuracy_sampled": sum(a.correct for a in sampled) / n,
        "accuracy_greedy": sum(a.correct for a in greedy) / n,
        "ended": sum(a.ended for a in sampled) / n,
        "length": sum(len(a.ids) for a in sampled) / n,
    }
    return results, sampled


@torch.no_grad()
def evaluate_policy(policy, ref, reward, tok, problems, seed, step, max_new_tokens, styles=task.STYLES):
    """A policy on held-out problems, the same at every step: what its sampled answers are like (data/task.py), their
    mean reward, and the KL to the reference. All names begin with test_. Returns (results, outputs to show)."""
    answers = solve(policy, tok, problems, 1.0, rng(seed, "evaluation", step), max_new_tokens)
    kl = mean_kl(policy, ref, [tok.prompt(p.text) for p in problems], [a.ids for a in answers])
    rewards = reward(problems, answers)  # (number of answers,)
    results = task.describe(answers, styles) | task.correlations(answers, rewards, styles)
    results |= {"reward": rewards.mean().item(), "kl": kl, "sqrt_kl": max(kl, 0) ** 0.5}
    return {f"test_{name}": value for name, value in results.items()}, shown(problems, answers, scores=rewards)


def check_room(model, tok, problems, max_new_tokens):
    """Exit if the longest problem and an answer of max_new_tokens do not fit the context."""
    room = model.config.block_size - max(len(tok.prompt(p.text)) for p in problems)
    if max_new_tokens > room:
        sys.exit(f"--max_tokens {max_new_tokens}: the longest problem leaves {room} tokens of the context")


# ---------------------------------------------------------------------------------------------
# 6. Loading checkpoints, in Hugging Face's layout


def load_model(where, device="cpu", bfloat16=False, scorer=False):
    """A language model from a folder, or by name from the hub: gpt2, gpt2-medium, ..., or OWNER/NAME.

    scorer=True accepts a reward model too, and returns its transformer. A model without a chat template (GPT-2, base
    models) gets four more rows in its embedding, for our chat tokens. If nothing can be loaded, exits with one line
    that says why.
    """
    c, loaded, files = checkpoints.read(where)
    if "score.weight" in loaded and not scorer:
        sys.exit(f"{where} is a reward model or a verifier: it gives scores and cannot generate text")
    try:
        config = GPTConfig(**checkpoints.settings(c))
        model = GPT(config)
        model.load_state_dict(checkpoints.from_hugging_face(config, loaded, model.state_dict()))
    except checkpoints.ERRORS as error:
        checkpoints.unreadable(where, error)
    missing = len(Tokenizer.SPECIAL) if config.vocab_size == 50257 else 0
    if config.tokenizer not in vocabularies.OURS:
        tok = Tokenizer(config.tokenizer)
        missing = max(0, tok.vocab_size - config.vocab_size)
        config.chat = config.chat or tok.template is not None
        config.end, config.pad = tok.end, tok.pad
    if missing:
        for layer in filter(None, (model.wte, model.lm_head)):
            # The new rows are the mean of the old ones: their logits start at the average.
            old = layer.weight.detach()
            layer.weight = nn.Parameter(torch.cat([old, old.mean(0, keepdim=True).repeat(missing, 1)]))
        config.vocab_size += missing
    model.bfloat16, model.tokenizer_files = bfloat16, files
    return model.to(device)


def load_scorer(where, device="cpu", bfloat16=False):
    """A reward model or verifier from the folder of a run or of a model. Exits if it is none."""
    scorer = Scorer(load_model(where, device, bfloat16, scorer=True)).to(device)
    config, weights, _ = checkpoints.read(where)
    weight = weights.get("score.weight")
    if weight is None:
        sys.exit(f"{where} is a language model and gives no scores. Make a reward model: reward_model.py")
    if weight.shape != scorer.score.weight.shape:
        sys.exit(f"{where} gives {len(weight)} scores per answer: a reward model gives one")
    scorer.load_state_dict({"score.weight": weight}, strict=False)
    scorer.mean, scorer.std = config.get("score_mean", 0.0), config.get("score_std", 1.0)
    return scorer


def check_tokenizer(model, tok, what):
    """Exit if a model does not read the ids of this tokenizer. (A published one is known by its folder, and a model
    that was made from it has a copy.)"""
    name, ours = model.config.tokenizer, vocabularies.OURS
    if name != tok.name and (name in ours or tok.name in ours or Tokenizer(name).ids != tok.ids):
        sys.exit(f"{what} need the same tokenizer")


def load_policy(where, args):
    """(policy, reference, tokenizer): the same checkpoint twice, one to be trained and one frozen."""
    policy, ref = (load_model(where, args.device, args.dtype == "bfloat16") for _ in range(2))
    return policy, ref.requires_grad_(False), Tokenizer(policy.config.tokenizer)


# ---------------------------------------------------------------------------------------------
# 7. Pretraining


def train(args):
    """Train the base model. Returns its runs.Run."""
    tok = Tokenizer("task")
    torch.manual_seed(args.seed)  # the initial weights are the only thing drawn from the global generator
    config = GPTConfig(tok.vocab_size, args.block_size, args.n_layer, args.n_embd // 32, args.n_embd)
    model = GPT(config).to(args.device)
    model.bfloat16 = args.dtype == "bfloat16"
    optimizer = make_optimizer(model, args.lr)
    run = runs.Run(args)
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
        ids = lessons.running_text(tok, args.seed, step, args.batch, args.length + 1).to(args.device)
        # The logits of position t predict the token of position t+1: shift once.
        logits = model(ids[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, grad_norm=grad_norm)
    return run.finish(model, **run.mean("loss"))


SHIPPED = Path(__file__).resolve().parent / "data" / "base"  # made by tests/ship_base.py from runs/base


def first_loss(model, tok):
    """The loss on some pretraining text: it changes if the code of the model does, or the weights."""
    ids = lessons.running_text(tok, "first loss", 0, 16, 65).to(model.wte.weight.device)
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten()).item()


def base_model(args):
    """The folder of the base model: the reader's own runs/base, else the one that comes with the repository.

    The latter saves the minutes of pretraining. It is used only while the task, the vocabulary, the model's code and
    the defaults of this file are those that made it; after a change the base model is trained anew.
    """
    today = runs.parse("gpt", parser(), runs.inherited(args))
    config = runs.read_json(SHIPPED / "config.json")
    if config and not runs.Run(today).finished(code=False):
        made, tok = config["made"], Tokenizer("task")
        if (
            all(getattr(today, name) == value for name, value in made["flags"].items())
            and made["fingerprint"] == lessons.fingerprint(tok)
            and abs(first_loss(load_model(str(SHIPPED)), tok) - made["loss"]) < 1e-3
        ):
            print("Starting from data/base, a base model that `python gpt.py` has made.")
            return str(SHIPPED)
    return runs.made_by("gpt", args, "three minutes")


def chat(args):
    """Answer (a chat model) or continue (a base model) one prompt."""
    model = load_model(args.load, args.device, args.dtype == "bfloat16")
    tok = Tokenizer(model.config.tokenizer)
    ids = tok.prompt(args.prompt) if model.config.chat else tok.start + tok.encode(args.prompt)
    if not args.prompt:
        sys.exit("--prompt is empty: give it a few words to continue")
    room = model.config.block_size - len(ids)
    if room < 1:
        sys.exit(f"the prompt has {len(ids)} tokens; the context of {args.load} has {model.config.block_size}")
    out, _ = sample(model, [ids], min(args.tokens, room), [tok.end], temperature=args.temperature,
                    top_k=args.top_k, top_p=args.top_p, generator=rng(args.seed))  # fmt: skip
    print(("" if model.config.chat else args.prompt) + tok.decode(i for i in out[0] if i != tok.end))


# fmt: off
def parser():
    p = argparse.ArgumentParser(
        prog="gpt.py", description="Train the base model, or talk to any checkpoint (--load).")
    add = p.add_argument
    add("--load", help="talk to this checkpoint: a folder, gpt2, gpt2-medium, ..., or OWNER/NAME on the hub")
    add("--prompt", default="Leo has 7 eggs.", help="the text to continue, or the question to answer")
    add("--tokens", type=int, default=60, help="maximum number of new tokens")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy decoding")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens only (0: all)")
    add("--top_p", type=float, default=1.0, help="sample from the most likely tokens that reach probability p")
    add("--n_layer", type=int, default=3, help="three layers learn to copy numbers sooner than two")
    add("--n_embd", type=int, default=128, help="width, a multiple of 32 (the width of a head)")
    add("--block_size", type=int, default=128, help="context; a problem and its answer take at most 80 tokens")
    add("--steps", type=int, default=3600, help="updates: enough to learn arithmetic and copying")
    add("--batch", type=int, default=16, help="rows per step: many small steps learn fastest here")
    add("--length", type=int, default=64, help="tokens per row")
    add("--lr", type=float, default=4e-3, help="learning rate; small models allow a large one")
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("gpt", parser(), argv)
    if args.n_embd % 32:
        sys.exit(f"--n_embd {args.n_embd} is not a multiple of 32, the width of a head")
    if args.length > args.block_size:
        sys.exit(f"--length {args.length} does not fit --block_size {args.block_size}")
    if args.load:
        chat(args)
    else:
        report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
