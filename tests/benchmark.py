"""How fast is gpt.py compared with transformers? Prints a table and keeps it in data/results/; it is not a test.

    python tests/benchmark.py               three minutes at most, on two cores
    python tests/benchmark.py --quick       fewer repetitions

Compares, in one process, our code with transformers' GPT2LMHeadModel of the same size:

    training    tokens per second through forward, loss, backward, clipping and one AdamW step. Both have the same
                weights, ids and optimizer (gpt.make_optimizer); all positions are targets. transformers computes
                logits and loss in its own forward(labels=).
    sampling    new tokens per second, at temperature 1, from prompts of one length, without a stop token: gpt.sample
                against generate(do_sample=True). Both use a key-value cache.

First for the tiny model of the embedded task (gpt.GPTConfig), then for GPT-2 124M with random weights (speed does not
depend on them), also under bfloat16 autocast.

The two sides take turns, so other work on the machine slows both. After a first call to warm up, the table shows
medians over the rounds, and the median of the ratio ours / theirs *within* a round. Above 1 ours is faster.

The column "of peak" compares our training step with the hardware. It is the step's floating-point operations per second
as a fraction of those of one large float32 matrix product (2048 x 2048 times itself) on the same cores, measured in the
same rounds. Counted are 6 operations per parameter and token (without position embeddings, which are looked up and not
multiplied), and 12 * layers * width * length per token for attention (as usual the full square, though half of it is
masked). For bfloat16 it is the fraction of the same float32 product, so it can exceed 100 % on processors that have
bfloat16 instructions.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: all weights are random
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import keep_table
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import gpt
from data import checkpoints
from data.runs import rng

TINY = gpt.GPTConfig(vocab_size=gpt.Tokenizer("task").vocab_size)
SMALL = gpt.GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768, tokenizer="gpt2")  # 124M
SIDE = 2048  # of the matrix product
FORMAT = "{:34}{:>10}{:>14}{:>22}{:>9}{:>8}"
LIMIT = 18  # seconds per row, so that everything ends within three minutes, also on a busy machine


def twins(config):
    """Our model and that of transformers, with the same random weights."""
    torch.manual_seed(0)
    ours = gpt.GPT(config)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    weights = theirs.transformer.state_dict()
    for name, w in ours.state_dict().items():
        weights[name].copy_(w.t() if name.endswith(checkpoints.TRANSPOSED) else w)
    return ours, theirs.train()


def train_step(model, optimizer, ids, bfloat16):
    """One update; returns the loss."""
    if isinstance(model, gpt.GPT):
        model.bfloat16 = bfloat16
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def generate(model, prompts, new, bfloat16):
    """Continue every prompt by `new` tokens. Returns the number of new tokens."""
    if isinstance(model, gpt.GPT):
        model.bfloat16 = bfloat16
        out, _ = gpt.sample(model, prompts.tolist(), new, [], generator=rng(0))
        return sum(map(len, out))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
    return out[:, prompts.shape[1] :].numel()


def seconds(work, repeat):
    """Seconds per call, the mean of `repeat` calls."""
    begun = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - begun) / repeat


def compare(name, ours, theirs, tokens, rounds, repeat, flops=None):
    """Run both in turn, for `rounds` rounds or LIMIT seconds. Prints and returns one row.

    ours, theirs: functions that were called before, because a first call is slow. tokens, flops: per call. Each turn
    makes `repeat` calls, because one can be too short for the clock.
    """
    times, ratios, fractions = ([], []), [], []
    matrix, product = torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    begun = time.perf_counter()
    while len(ratios) < 2 or (len(ratios) < rounds and time.perf_counter() - begun < LIMIT):
        both = {}
        # The sides take turns in going first.
        for side in (ours, theirs) if len(ratios) % 2 else (theirs, ours):
            both[side] = seconds(side, repeat)
        for side, measured in zip((ours, theirs), times):
            measured.append(both[side])
        ratios.append(both[theirs] / both[ours])
        if flops:
            # The faster of two: other work on the machine only slows it down.
            fastest = min(seconds(lambda: torch.mm(matrix, matrix, out=product), 1) for _ in range(2))
            fractions.append(flops / both[ours] / (2 * SIDE**3 / fastest))
    our_speed, their_speed = (tokens / statistics.median(measured) for measured in times)
    of_peak = f"{statistics.median(fractions):.0%}" if flops else ""
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    cells = [name, f"{our_speed:,.0f}", f"{their_speed:,.0f}", ratio, of_peak, len(ratios)]
    print(FORMAT.format(*cells), flush=True)
    return cells


def train_flops(config, model, batch, length):
    counted = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    attention = 12 * config.n_layer * config.n_embd * length
    return (6 * counted + attention) * batch * length


def training(name, config, batch, length, bfloat16, rounds, repeat):
    ours, theirs = twins(config)
    ids = torch.randint(config.vocab_size, (batch, length + 1), generator=rng(1))
    optimizers = {model: gpt.make_optimizer(model, 1e-4) for model in (ours, theirs)}
    # Speeds can be compared only if both sides compute the same.
    losses = [train_step(model, optimizers[model], ids, bfloat16) for model in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < (0.05 if bfloat16 else 1e-3), losses
    return compare(
        f"{name} training, {batch} x {length}{', bfloat16' if bfloat16 else ''}",
        lambda: train_step(ours, optimizers[ours], ids, bfloat16),
        lambda: train_step(theirs, optimizers[theirs], ids, bfloat16),
        batch * length, rounds, repeat, train_flops(config, ours, batch, length),
    )  # fmt: skip


def sampling(name, config, batch, prompt, new, bfloat16, rounds):
    ours, theirs = twins(config)
    theirs.eval()
    prompts = torch.randint(config.vocab_size, (batch, prompt), generator=rng(2))
    for model in (ours, theirs):
        assert generate(model, prompts, new, bfloat16) == batch * new
    return compare(
        f"{name} sampling, {batch} x {new}{', bfloat16' if bfloat16 else ''}",
        lambda: generate(ours, prompts, new, bfloat16),
        lambda: generate(theirs, prompts, new, bfloat16),
        batch * new, rounds, 1,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a third of the repetitions")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()

    def rounds(n):
        return max(2, n // 3) if args.quick else n

    begun = time.time()
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} before the start; "
          "\n")  # fmt: skip
    columns = ["tokens per second", "gpt.py", "transformers", "ratio (range)", "of peak", "rounds"]
    print(FORMAT.format(*columns))
    rows = [
        training("tiny", TINY, 32, 64, False, rounds(15), 5),
        training("tiny", TINY, 16, 64, False, rounds(15), 5),
        sampling("tiny", TINY, 64, 30, 56, False, rounds(9)),
    ]
    for bfloat16 in (False, True):
        rows.append(training("124M", SMALL, 2, 256, bfloat16, rounds(5), 1))
        rows.append(sampling("124M", SMALL, 4, 30, 32, bfloat16, rounds(5)))
    keep_table("speed", "Speed beside `transformers`", columns, rows, f"transformers {transformers.__version__}.")
    print(f"\n{time.time() - begun:.0f} s; load {os.getloadavg()[0]:.1f} at the end. Other work on these cores "
          "slows both sides and makes the ratio less certain.")  # fmt: skip


if __name__ == "__main__":
    main()
