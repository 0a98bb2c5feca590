"""Supervised fine-tuning: how does a model that continues text become one that answers?

    python sft.py                              the base model learns to answer and to stop
    python sft.py --break eos_masked           ... and one that never stops
    python sft.py --break too_many_epochs      ... and one that knows a single answer to everything
    python sft.py --data FILE                  on the chosen answers of real data (see README)

The model is shown conversations  <|user|> x <|assistant|> y <|end|>  and trained on the answer alone:

    L = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t        m_t = 1 on the answer and its end token

(Ouyang et al. 2022, section 3.5; Radford et al. 2018 for the pretraining loss it continues.)

What comes out is a *format* and not yet judgement: the demonstrators err in four of ten solutions, and the
loss asks the model to be like them. Sampled at temperature 1 it has their mistakes, and a few of its own.
Decoded greedily it is right on nearly everything that most of them understand, because random slips are
never the likeliest continuation, and wrong on what most of them misunderstand.

The breaks:
    eos_masked       Padding and end token share an id, so masking the padding masks the end token as
                     well. The loss looks the same; the model never stops. (transformers issue 23530)
    too_many_epochs  The same few demonstrations again and again. The training loss goes on falling. One
                     answer a question gets a little worse; what is lost is the variety: far fewer questions
                     find a right one among 64 answers. (Cobbe et al. 2021, section 4.1)
"""

import argparse

import torch
import torch.nn.functional as F

import gpt
from data import public, task

BREAKS = {
    "eos_masked": "pad = end token: its label is masked, and the model never stops",
    "too_many_epochs": "few demonstrations, many epochs: the loss falls, and pass@64 falls far",
}

IGNORE = -100  # the label that means "no loss here"; cross_entropy's own default


def sft_loss(logits, labels):
    """Summed negative log-likelihood of the supervised tokens, and their number.

    logits: (B, T, V), row t predicting token t+1. labels: (B, T), the ids themselves where a token is
    supervised and -100 elsewhere. Returns (sum in nats, number of tokens). The caller divides the sum of
    all micro-batches by the tokens of all: a mean of means would weigh a token by
    the company it came in, and the size of the micro-batch would change the objective.
    """
    # Shift once: the logits at t are about the label at t+1. In float32, also under autocast.
    logits, targets = logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, (targets != IGNORE).sum()


def collate(examples, pad):
    """[(prompt ids, answer ids)] -> ids (B, T) padded on the right, labels (B, T)."""
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORE)  # the prompt is given, not learned
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) :] = ids[row, len(prompt) :]
    # Padding is recognised by its id, as most libraries do. That is safe only while no real token
    # has the same id.
    labels[labels == pad] = IGNORE
    return ids, labels


def pass_at_k(n, c, k):
    """Chance that at least one of k answers is right, estimated without bias from n answers of which c
    are: 1 - C(n-c, k) / C(n, k). (Chen et al. 2021.) pass_at_k(5, 2, 2) = 0.7"""
    miss = 1.0
    for i in range(k):  # the product form needs no huge binomials
        miss *= max(0, n - c - i) / (n - i)
    return 1 - miss


def train(args):
    """One run, from the base model to the report. Returns its gpt.Run."""
    # ---- the model we start from
    if args.load == "scratch" or (args.data and not args.load):
        # Real data without GPT-2's weights: random weights on GPT-2's tokens. It learns something about
        # answers, not to speak; --load gpt2 does.
        tok = gpt.Tokenizer("gpt2")
        torch.manual_seed(args.seed)
        config = gpt.GPTConfig(tok.vocab_size, block_size=512, tokenizer="gpt2")
        model = gpt.GPT(config).to(args.device)
        model.bfloat16 = args.dtype == "bfloat16"
    else:
        base = args.load or gpt.made_by("gpt", args, "a minute and a half")
        model = gpt.load_model(base, args.device, args.dtype == "bfloat16")
        tok = gpt.Tokenizer(model.config.tokenizer)
    run = gpt.Run(args)

    # ---- the demonstrations
    if args.break_ == "too_many_epochs":
        # The same number of updates on a fiftieth of the data. Who has few demonstrations and a loss
        # that still falls does this without noticing.
        args.demos, args.epochs = max(1, args.demos // 50), args.epochs * 50
    if args.data:
        rows = [r for r in public.load_or_exit(args.data) if r["chosen"]]
        texts = [(r["prompt"], r["chosen"]) for r in rows]
        problems = []
    else:
        texts = [(p.text, solution) for p, solution in task.demonstrations(args.demos, args.seed)]
        if args.answer_only:
            # Shorter, cheaper, and it is the number that counts: reasoning.py --break no_cot.
            texts = [(question, text[text.rindex("####") :]) for question, text in texts]
        problems = task.problems(args.problems, args.seed, "test")
    examples = [(tok.prompt(question), tok.answer(text)) for question, text in texts]
    room = model.config.block_size
    fitting = [e for e in examples if len(e[0]) + len(e[1]) <= room]
    if len(fitting) < len(examples):
        print(f"{len(examples) - len(fitting)} of {len(examples)} demonstrations are longer than the "
              f"context of {room} tokens and are left out")  # fmt: skip
    examples = fitting
    if not examples:
        source = args.data or "the embedded task"
        raise SystemExit(f"{source} holds no demonstration that fits the context of {room} tokens")
    # GPT-2's vocabulary makes a row of logits per token of 200 kB: few rows at a time.
    micro_batch = args.micro_batch or (4 if args.data else args.batch)
    pad = tok.pad
    if args.break_ == "eos_masked":
        pad = tok.end  # "the tokenizer has no pad token, so use the end token": one innocent line

    # ---- the loop
    lr = args.lr or (1.5e-3 if model.config.n_embd < 512 else 5e-5)
    optimizer = gpt.make_optimizer(model, lr)
    steps = args.steps or max(1, len(examples) * args.epochs // args.batch)
    if not args.data:
        prompt = problems[0].text
        ids, _ = gpt.sample(model, [tok.encode(prompt + "\n")], 40, [tok.end], generator=gpt.rng(args.seed))
        print(f"before: the base model continues text\n    {prompt}\n    ... {tok.decode(ids[0])!r}")
    for step in run.steps(steps, model, optimizer, show=("loss",)):
        if problems and (step % args.eval_every == 0 or step == steps) and step > 0:
            results, _, shown = gpt.examine(model, tok, problems, args.seed, step)
            run.say(step, **results)
            run.samples(step, shown)
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        chosen = [examples[i] for i in gpt.batch_indices(len(examples), args.batch, step, args.seed)]
        ids, labels = collate(chosen, pad)
        supervised = (labels[:, 1:] != IGNORE).sum()  # over the whole step, not the micro-batch
        optimizer.zero_grad()
        loss = 0.0
        for rows in torch.arange(len(chosen)).split(micro_batch):
            total, _ = sft_loss(model(ids[rows].to(args.device)), labels[rows].to(args.device))
            (total / supervised).backward()  # gradients add up over micro-batches
            loss += (total / supervised).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, grad_norm=grad_norm)

    # ---- the report
    model.config.chat = True
    last = [m["loss"] for m in run.metrics if "loss" in m][-20:]
    report = {"loss": sum(last) / len(last)}
    if problems:
        report |= results
        # Many answers to a few questions: is there a right one among them?
        few, k = problems[: max(1, args.problems // 5)], 64
        generator = gpt.rng(args.seed, "pass@k")
        questions = [p.text for p in few for _ in range(k)]
        golds = [p.answer for p in few for _ in range(k)]
        answers = gpt.solve(model, tok, questions, golds, 1.0, generator)
        right = [sum(a.right for a in answers[i : i + k]) for i in range(0, len(answers), k)]
        for n in (1, 8, 64):
            report[f"pass@{n}"] = sum(pass_at_k(k, c, n) for c in right) / len(few)
        print("  ".join(f"{name} {value:.3f}" for name, value in report.items()))
    run.finish(model, **report)
    return run


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="sft.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from: a folder, gpt2, gpt2-medium, ..., or scratch: random\n"
        "weights on GPT-2's tokens (default: runs/base; with --data scratch)")
    add("--data", help="real data: gsm8k, hh-rlhf, ultrafeedback, or a .jsonl, .jsonl.gz, .parquet file")
    add("--demos", type=int, default=20000, help="demonstrations of the embedded task")
    add("--answer_only", action="store_true", help="leave the working out: learn the final answers alone")
    add("--epochs", type=int, default=1, help="more than a few cost variety (see too_many_epochs)")
    add("--batch", type=int, default=32, help="demonstrations a step")
    add("--micro_batch", type=int, help="of which so many at once, where memory is short (default:\n"
        "all; with --data 4)")
    add("--steps", type=int, help="stop after so many updates (default: all epochs)")
    add("--lr", type=float, help="below pretraining's (default 1.5e-3; GPT-2 and larger 5e-5)")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points")
    add("--eval_every", type=int, default=250, help="steps between evaluations")
    return p
# fmt: on


def main(argv=None):
    args = gpt.parse("sft", parser(), argv, BREAKS)
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    clean, broken = gpt.clean_and_broken(train, args)
    C, B = clean.report, broken.report
    outside = {"right, sampled": "right_sampled", "right, greedy": "right_greedy",
               "answers that end": "ended", "length in tokens": "length",
               "pass@1": "pass@1", "pass@8": "pass@8", "pass@64": "pass@64"}  # fmt: skip
    if args.break_ == "eos_masked":
        claims = [
            (
                "the loss on the answers looks the same (within 20 %)",
                abs(B["loss"] / C["loss"] - 1) < 0.2,
            ),
            ("clean: more than 95 % of the answers end", C["ended"] > 0.95),
            ("broken: fewer than 5 % do", B["ended"] < 0.05),
        ]
        figure = [("dashboard: the training loss", "nats a token", "loss"),
                  ("outside: does it stop?", "share of answers that end", "ended")]  # fmt: skip
        cure = "python sft.py   (a pad token of its own)"
    else:
        claims = [
            ("the training loss ends lower", B["loss"] < C["loss"]),
            ("variety is lost: pass@64 at least 10 points lower", B["pass@64"] < C["pass@64"] - 0.1),
            (
                "one answer shows less of it: pass@1 falls by less than pass@64",
                C["pass@1"] - B["pass@1"] < C["pass@64"] - B["pass@64"],
            ),
        ]
        figure = [
            ("dashboard: the training loss", "nats a token", "loss"),
            ("outside: is one of k answers right?", "share of problems", ("pass@1", "pass@8", "pass@64")),
        ]
        cure = "python sft.py   (fresh demonstrations, one epoch)"
    gpt.break_report(clean, broken, {"loss on the answers": "loss"}, outside, claims, cure, figure)


if __name__ == "__main__":
    main()
