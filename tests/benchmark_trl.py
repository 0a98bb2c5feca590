"""How fast is one training step compared with TRL's trainers? Prints tables, kept in data/results/; it is not a test.

    python tests/benchmark_trl.py               a few minutes, on two cores
    python tests/benchmark_trl.py --quick       fewer steps
    python tests/benchmark_trl.py grpo sft      some of the rows
    python tests/benchmark_trl.py --load DIR    a published model instead of the tiny one, with a quarter of the batch

Compares, in one process, one update of our scripts with one update of TRL's trainer for the same method. Both have the
tiny model of the embedded task with the same weights (model.save writes them, `transformers` reads them), the same
problems, pairs and demonstrations in batches of the same size, float32, the AdamW of gpt.make_optimizer, and gradients
clipped at 1. Neither has dropout, gradient checkpointing, logging, checkpoints or worker processes. TRL is given token
ids where it takes them (SFTTrainer, RewardTrainer). DPOTrainer tokenizes before the first step.

    grpo            8 prompts x 8 answers of exactly 48 tokens: sampling, rewards by the exact checker, one update with
                    log-probabilities under policy and reference. TRL samples with transformers' generate. Neither
                    stops at the end token, so that all answers have the same length.
    dpo             32 pairs; both have computed the reference's log-probabilities before
    sft             32 demonstrations, loss on the answers
    reward_model    32 pairs

Before the measurement both compute the loss of one batch, and it must be the same number.

TRL's own train() runs, and a callback at the end of each of its steps makes one of ours, so other work on the machine
slows both. Their time is from the end of our step to the end of their next one: batch, loss, update, and what a Trainer
does around them. Our time is everything between two steps of the script, without the line in metrics.jsonl. The table
shows steps per second (median), and the median of the ratio within a turn. The GB are what two steps of one side add to
a new process that has loaded the models: gradients, AdamW's state, activations. The second table shows where our time
goes: the fractions that the parts of our steps take, and the fraction that is spent in matrix products (by the
profiler). TRL needs the same products, so they limit the ratio.

There is no row for PPO, because TRL 1.16 has no PPOTrainer any more. Its sampling and update are those of the grpo row.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: all weights are random
os.environ["TQDM_DISABLE"] = "1"  # TRL's and datasets' progress bars would cut up the table
# For the processes that measure memory: with glibc, what is freed goes back at once and does not hide what a step adds.
os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from measure import keep_table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

import dpo
import gpt
import grpo
import reward_model
import sft
from data import lessons, task
from data.checker import is_correct
from data.runs import batch_indices, rng

FORMAT = "{:18}{:>10}{:>10}{:>24}{:>8}{:>12}{:>12}"
TOK = gpt.Tokenizer("task")
PROMPTS, GROUP, NEW = 8, 8, 48  # grpo
BATCH = 32  # all others
LR, BETA, WARMUP = 1e-5, 0.05, 2  # steps of warmup are not measured
SAME = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
    "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1, "max_grad_norm": 1.0,
}  # fmt: skip


def theirs_tokenizer():
    """Our ids as words: the text "593 17 4" is the ids [593, 17, 4]. So both sides see the same ids."""
    vocabulary = {str(i): i for i in range(TOK.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", eos_token=str(TOK.end), pad_token=str(TOK.pad)
    )


def words(ids):
    return " ".join(map(str, ids))


PARTS = ("sampling", "reference", "loss", "backward", "clipping and AdamW")


class Clock:
    """Seconds per part of our steps: clock(name) adds the time since the last call to that part."""

    def __init__(self):
        self.seconds, self.since = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def __call__(self, part=None):
        now = time.perf_counter()
        if part:
            self.seconds[part] += now - self.since
        self.since = now


clock = Clock()


def update(model, optimizer, loss):
    clock("loss")
    optimizer.zero_grad()
    loss.backward()
    clock("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    clock("clipping and AdamW")


# ---------------------------------------------------------------------------------------------
# The rows: each returns (TRL's trainer, our step(i), our loss of the first BATCH examples or None)


def settings(config, model, steps, batch, **more):
    """What each trainer of TRL is given: its configuration, and our optimizer at a constant step size."""
    optimizer = gpt.make_optimizer(model, LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = config(tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=batch, **SAME, **more)
    return {"args": args, "optimizers": (optimizer, schedule), "processing_class": theirs_tokenizer()}


def grpo_row(folder, steps):
    problems = task.problems(PROMPTS * 40, 0)

    def reward(completions, completion_ids, answer, **rest):
        assert all(len(ids) == NEW for ids in completion_ids) and len(completions) == PROMPTS * GROUP
        return [float(is_correct(TOK.decode(map(int, c.split())), a)) for c, a in zip(completions, answer)]

    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"prompt": words(TOK.prompt(p.text)), "answer": p.answer} for p in problems]
    trainer = trl.GRPOTrainer(
        model, reward, train_dataset=Dataset.from_list(rows),
        **settings(trl.GRPOConfig, model, steps, PROMPTS * GROUP, num_generations=GROUP, beta=BETA,
                   max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, loss_type="dapo",
                   temperature=1.0, use_vllm=False),
    )  # fmt: skip

    # As in grpo.train
    policy, ref = gpt.load_model(folder), gpt.load_model(folder).requires_grad_(False)
    optimizer = gpt.make_optimizer(policy, LR)

    def step(i):
        group = [problems[j] for j in batch_indices(len(problems), PROMPTS, i, 0) for _ in range(GROUP)]
        prompts = [TOK.prompt(p.text) for p in group]
        completions, old_logps = gpt.sample(policy, prompts, NEW, [], generator=rng(0, "rollouts", i))
        assert all(len(ids) == NEW for ids in completions)
        answers = [gpt.read_answer(TOK, *answer, p.answer) for *answer, p in zip(completions, old_logps, group)]
        old_logps = torch.stack(old_logps)
        rewards = reward_model.checker_reward(group, answers)
        advantages = grpo.group_advantages(rewards.view(PROMPTS, GROUP)).view(-1, 1)
        clock("sampling")
        with torch.no_grad():
            ref_logps, _ = gpt.completion_logps(ref, prompts, completions)
        clock("reference")
        logps, mask = gpt.completion_logps(policy, prompts, completions)
        losses = grpo.policy_loss(logps, old_logps, advantages) + BETA * grpo.k3(logps, ref_logps)
        update(policy, optimizer, grpo.aggregate(losses, mask, "dapo", NEW))

    return trainer, step, None


def sft_row(folder, steps):
    examples = [(TOK.prompt(p.text), TOK.answer(text)) for p, text in task.demonstrations(BATCH * 20, 0)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": p + a, "labels": [sft.IGNORE] * len(p) + a} for p, a in examples]
    trainer = trl.SFTTrainer(
        model, train_dataset=Dataset.from_list(rows), **settings(trl.SFTConfig, model, steps, BATCH)
    )
    ours = gpt.load_model(folder)
    optimizer = gpt.make_optimizer(ours, LR)

    def loss_of(chosen):
        ids, labels = sft.collate([examples[j] for j in chosen], TOK.pad)
        total, n = sft.sft_loss(ours, ids, labels)
        return total / n

    def step(i):
        update(ours, optimizer, loss_of(batch_indices(len(examples), BATCH, i, 0)))

    return trainer, step, loss_of


def pairs():
    return lessons.encode_pairs(TOK, task.preference_pairs(BATCH * 20, 0))


def dpo_row(folder, steps):
    encoded = pairs()
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in encoded]
    more = {"beta": 0.1, "precompute_ref_log_probs": True}
    trainer = trl.DPOTrainer(
        model, train_dataset=Dataset.from_list(rows), **settings(trl.DPOConfig, model, steps, BATCH, **more)
    )
    policy, ref = gpt.load_model(folder), gpt.load_model(folder).requires_grad_(False)
    optimizer = gpt.make_optimizer(policy, LR)
    ref_logps = dpo.all_pair_logps(ref, encoded, BATCH)

    def loss_of(chosen):
        logps, _ = dpo.pair_logps(policy, *map(list, zip(*(encoded[j] for j in chosen))))
        return dpo.dpo_loss(*logps.split(BATCH), *ref_logps[chosen].unbind(1), 0.1)

    def step(i):
        update(policy, optimizer, loss_of(batch_indices(len(encoded), BATCH, i, 0)))

    return trainer, step, loss_of


def reward_model_row(folder, steps):
    encoded = pairs()
    folder = Path(folder) / "scorer"
    gpt.Scorer(gpt.load_model(folder.parent)).save(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in encoded]
    trainer = trl.RewardTrainer(
        model, train_dataset=Dataset.from_list(rows), **settings(trl.RewardConfig, model, steps, BATCH)
    )
    scorer = gpt.load_scorer(folder)
    optimizer = gpt.make_optimizer(scorer, LR)

    def loss_of(chosen):
        prompts, better, worse = map(list, zip(*(encoded[j] for j in chosen)))
        return reward_model.bradley_terry_loss(*reward_model.pair_scores(scorer, prompts, better, worse))

    def step(i):
        update(scorer, optimizer, loss_of(batch_indices(len(encoded), BATCH, i, 0)))

    return trainer, step, loss_of


# ---------------------------------------------------------------------------------------------


class Turns(TrainerCallback):
    """Makes one of our steps after each of theirs, and records the seconds of both."""

    def __init__(self, step):
        self.step, self.ours, self.theirs = step, [], []

    def on_train_begin(self, args, state, control, **rest):
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, **rest):
        ended = time.perf_counter()
        if len(self.ours) == WARMUP:
            clock.seconds = dict.fromkeys(PARTS, 0.0)
        clock()
        self.step(len(self.ours))
        self.theirs.append(ended - self.since)
        self.since = time.perf_counter()
        self.ours.append(self.since - ended)


def matrix_products(step):
    """The fraction of the time of three of our steps that is spent in matrix products."""
    with torch.profiler.profile() as profile:
        for i in range(3):
            step(i)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm")) / sum(times.values())


def memory_of(name, side, folder, load):
    """GB that two steps of one side add to this process, which must be a new one. The most is looked up every 5 ms."""
    prepare(load)
    trainer, step, _ = ROWS[name](folder, 2)
    trainer.remove_callback(PrinterCallback)
    process, ended = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if side == "TRL":
        trainer.train()
    else:
        step(0)
        step(1)
    ended.set()
    watcher.join()
    return (most - before) / 1e9


def compare(name, row, folder, steps, load):
    """Check that both sides compute the same loss, and let them take turns. Prints and returns a row of each table."""
    memory = []
    for side in ("here", "TRL"):  # before this process loads anything, so that there is room
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory.append(pool.submit(memory_of, name, side, folder, load).result())
    trainer, step, loss_of = row(folder, steps + WARMUP)
    trainer.remove_callback(PrinterCallback)
    if loss_of:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
        with torch.no_grad():
            losses = [trainer.compute_loss(trainer.model, batch).item(), loss_of(list(range(BATCH))).item()]
        assert abs(losses[0] - losses[1]) < 1e-3, losses
    turns = Turns(step)
    trainer.add_callback(turns)
    trainer.train()
    ours, theirs = turns.ours[WARMUP:], turns.theirs[WARMUP:]
    ratios = [b / a for a, b in zip(ours, theirs)]
    speeds = [1 / statistics.median(seconds) for seconds in (ours, theirs)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    cells = [name, *(f"{speed:.2f}" for speed in speeds), ratio, len(ratios), *(f"{size:.2f}" for size in memory)]
    print(FORMAT.format(*cells), flush=True)
    whole = sum(clock.seconds.values())
    return cells, [
        name,
        *(f"{seconds / whole:.0%}" for seconds in clock.seconds.values()),
        f"{matrix_products(step):.0%}",
    ]


ROWS = {"grpo": grpo_row, "dpo": dpo_row, "sft": sft_row, "reward_model": reward_model_row}


def prepare(load):
    """Settings of this process, and its sizes: of the tiny model, or of the published one in the folder `load`. Returns
    the model."""
    global TOK, PROMPTS, BATCH
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if not load:
        return gpt.GPT(gpt.GPTConfig(TOK.vocab_size))
    TOK, PROMPTS, BATCH = gpt.Tokenizer(load), PROMPTS // 4, BATCH // 4
    return gpt.load_model(load)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of GRPO; the other rows, whose "
                        "steps are shorter, make three times as many")  # fmt: skip
    parser.add_argument("--load", metavar="DIR", help="the folder of a published model")
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    args = parser.parse_args()
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"no row {name!r}: {', '.join(ROWS)}")
    steps = max(1, args.steps // 4) if args.quick else args.steps
    model = prepare(args.load)
    begun = time.time()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} before the start; "
          "\n")  # fmt: skip
    columns = ["steps per second", "here", "TRL", "ratio (range)", "steps", "GB here", "GB TRL"]
    print(FORMAT.format(*columns))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        del model
        rows = [compare(name, ROWS[name], folder, steps if name == "grpo" else 3 * steps, args.load)
                for name in args.rows or ROWS]  # fmt: skip
    speeds, parts = (list(table) for table in zip(*rows))
    print("\nWhere our time goes:\n")
    names = ["", *PARTS, "matrix products"]
    for cells in (names, *parts):
        print("{:18}{:>10}{:>11}{:>8}{:>10}{:>20}{:>17}".format(*cells))
    if not args.rows:
        versions = f"transformers {transformers.__version__}, TRL {trl.__version__}."
        name, of = ("speed_trl", "") if not args.load else (f"speed_trl_{Path(args.load).name}", f", {args.load}")
        keep_table(name, f"Speed beside TRL{of}", columns, speeds, versions)
        keep_table(f"{name}_parts", f"Where the time of our steps goes{of}", names, parts)
    print(f"\n{time.time() - begun:.0f} s; load {os.getloadavg()[0]:.1f} at the end. Other work on these cores "
          "slows both sides and makes the ratio less certain.")  # fmt: skip


if __name__ == "__main__":
    main()
