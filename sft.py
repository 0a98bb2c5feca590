"""Supervised fine-tuning: how does a model that continues text become one that answers?

    python sft.py                              the base model learns to answer and to stop
    python sft.py --break eos_masked           ... but never stops
    python sft.py --break too_many_epochs      ... but its samples are hardly diverse
    python sft.py --break left_pad             ... and is asked in another way than it was trained
    python sft.py --data FILE                  on the answers of real data (of pairs: the chosen answers), without the
                                               prompts that the later chapters hold out

The model is shown conversations  <|user|> x <|assistant|> y <|end|>  and trained on the answer alone:

    L = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t        m_t = 1 on the answer and its end token, else 0

(The likelihood of Radford et al. 2018, section 3.2, on demonstrations as in Ouyang et al. 2022. Masking the prompt is
common practice.)

The model learns the *format*. It does not learn which answers are correct: about half of the demonstrations are
wrong, and the model is trained on all of them. Sampled at temperature 1, it makes the demonstrators' mistakes. Decoded
greedily, it makes hardly any random slips, because a slip is seldom the most likely continuation. It still makes
the mistakes that most demonstrators make.

What to look at: `accuracy_sampled` against `accuracy_greedy`, and the samples before and after.

The breaks:
    eos_masked       Padding and end token share an id, so masking the padding masks the end token too. The loss
                     looks the same; the model never stops. (transformers issue 23530)
    too_many_epochs  The same few demonstrations again and again. The training loss goes on falling. pass@1 falls,
                     and pass@64 falls further: among 64 samples there is far less often a correct one. (Cobbe et
                     al. 2021, section 4.1)
    contaminated     The held-out problems are among the demonstrations, with their answers. They are answered better
                     than fresh problems (`accuracy_fresh`). Both runs learn answers without working (--answer_only),
                     so that only memory can help. (arXiv 2507.10532)
    left_pad         The clean run's model. Prompts are padded on the left to equal length, and the model is not told
                     which tokens are padding. Most answers are wrong. (TRL issue 469)
    template_mismatch  The clean run's model, asked with the template of another one: "user: ... assistant: " in place
                     of the special tokens. (open-r1 issue 462)
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import gpt
from data import breaks, lessons, parts, report, runs, task

# ---------------------------------------------------------------------------------------------
# The algorithm

IGNORE = -100  # the label that means "no loss here"


def sft_loss(model, ids, labels):
    """Summed negative log-likelihood of the supervised tokens, and their number.

    ids: (B, T). labels: (B, T), the ids themselves where a token is supervised and -100 elsewhere. Returns (sum in
    nats, number of tokens). The caller divides by the tokens of the whole batch, of which this may be a micro-batch
    (see parts.micro_batches).
    """
    # Shift once: the state at t predicts the label at t+1.
    hidden, targets = model.hidden(ids)[:, :-1], labels[:, 1:]  # (B, T-1, C), (B, T-1)
    supervised = targets != IGNORE
    # Logits only where there is a loss, M tokens. They are the largest tensor of a model with a large vocabulary. In
    # float32, also under autocast.
    logits = model.head(hidden[supervised]).float()  # (M, V)
    return F.cross_entropy(logits, targets[supervised], reduction="sum"), supervised.sum()


def collate(examples, pad):
    """[(prompt ids, answer ids)] -> ids (B, T) padded on the right, labels (B, T)."""
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORE)  # the prompt is given, not learned
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    # Padding is recognized by its id, as in most libraries. That is safe only if no real token has the same id.
    labels[labels == pad] = IGNORE
    return ids, labels


def pass_at_k(n, c, k):
    """Probability that at least one of k answers is correct, estimated without bias from n answers of which c are
    correct: 1 - C(n-c, k) / C(n, k). (Chen et al. 2021.) pass_at_k(5, 2, 2) = 0.7"""
    miss = 1.0
    for i in range(k):  # the product form needs no large binomials
        miss *= max(0, n - c - i) / (n - i)
    return 1 - miss


def measure_pass_at_k(model, tok, problems, seed, k=64):
    """pass@1, pass@8 and pass@64, from 64 samples for each problem."""
    repeated = [p for p in problems for _ in range(k)]
    answers = gpt.solve(model, tok, repeated, 1.0, runs.rng(seed, "pass@k"))
    correct = [sum(a.correct for a in answers[i : i + k]) for i in range(0, len(answers), k)]
    return {f"pass@{n}": sum(pass_at_k(k, c, n) for c in correct) / len(problems) for n in (1, 8, 64)}


# ---------------------------------------------------------------------------------------------
# Mistakes outside the loss: in the data, and in how questions are put to the model


def leaked(problems, copies=10):
    """The held-out problems with their correct answers, each several times: a page with the test and its key, which
    was crawled again and again."""
    return [{"prompt": p.text, "chosen": f"#### {p.answer}"} for p in problems * copies]


ASKED_WRONGLY = ("left_pad", "template_mismatch")


def asking(args, tok, problems):
    """The tokenizer whose prompts the evaluation uses: tok itself, unless a break asks in another way."""
    asked = copy.copy(tok)
    if args.break_ == "left_pad":
        # "All prompts of a batch must have the same length." Nobody tells the model which tokens are padding: it reads
        # them, and the question stands at other positions than in training. Only the longest prompt is unchanged.
        longest = max(len(tok.prompt(p.text)) for p in problems)
        asked.prompt = lambda question: [tok.pad] * (longest - len(tok.prompt(question))) + tok.prompt(question)
    if args.break_ == "template_mismatch":
        # The template of another model: roles in words, where this one was trained with special tokens.
        asked.prompt = lambda question: tok.encode(f"user: {question}\nassistant: ")
    return asked


# ---------------------------------------------------------------------------------------------
# Training


def starting_model(args):
    """(model, tokenizer): the base model of the embedded task, or what --load names."""
    if args.load == "scratch" or (args.data and not args.load):
        # Real data without GPT-2's weights: random weights on GPT-2's tokens. Such a model learns something
        # about the answers but does not write readable text; --load gpt2 does.
        tok = gpt.Tokenizer("gpt2")
        torch.manual_seed(args.seed)
        model = gpt.GPT(gpt.GPTConfig(tok.vocab_size, block_size=512, tokenizer="gpt2")).to(args.device)
        model.bfloat16 = args.dtype == "bfloat16"
        return model, tok
    if args.break_ in ASKED_WRONGLY:
        base = runs.Run(runs.without_break(args)).folder  # the clean run's model, without further training
    else:
        base = args.load or gpt.base_model(args)
    model = gpt.load_model(base, args.device, args.dtype == "bfloat16")
    return model, gpt.Tokenizer(model.config.tokenizer)


def train(args):
    """One run, from the base model to the report. Returns its runs.Run."""
    model, tok = starting_model(args)
    run = runs.Run(args)
    if args.break_ == "too_many_epochs":
        # The same number of updates on a hundredth of the data.
        args.demos, args.epochs = max(1, args.demos // 100), args.epochs * 100
    material = lessons.demonstrations(args, tok, model.config.block_size, args.demos)
    problems = material.problems
    if args.break_ == "contaminated":
        some = leaked(problems)[: len(material.train)]
        material.train[: len(some)] = some  # as many demonstrations as before
    texts = [row["chosen"] for row in material.train]
    if args.answer_only:  # leave the working out: see reasoning.py --break no_cot
        texts = [text[text.rindex("####") :] for text in texts]
    # A text without a prompt is learned from its first token on, as in pretraining.
    prompts = [tok.start if row["prompt"] is None else tok.prompt(row["prompt"]) for row in material.train]
    examples = [(prompt, tok.answer(text)) for prompt, text in zip(prompts, texts)]
    # With GPT-2's vocabulary the logits of one token take 200 kB: few rows at a time.
    micro_batch = args.micro_batch or (4 if args.data else args.batch)
    pad = tok.pad
    if args.break_ == "eos_masked":
        pad = tok.end  # "the tokenizer has no padding token, so use the end token"
    lr = args.lr or (1.5e-3 if model.config.n_embd < 512 else 5e-5)
    optimizer = gpt.make_optimizer(model, lr)
    steps = args.steps or max(1, len(examples) * args.epochs // args.batch)
    asked = asking(args, tok, problems)
    if args.break_ in ASKED_WRONGLY:
        steps = 0
    elif problems:
        ids = [tok.encode(problems[0].text + "\n")]
        out, _ = gpt.sample(model, ids, 40, [tok.end], generator=runs.rng(args.seed))
        print(f"before: the base model continues text\n    {problems[0].text}\n    ... {tok.decode(out[0])!r}")

    # ---- the loop
    results = {}
    for step in run.steps(steps, model, optimizer):
        if problems and (step == steps or step > 0 and step % args.eval_every == 0):
            results, answers = gpt.examine(model, asked, problems, args.seed, step)
            run.say(step, **results)
            run.samples(step, gpt.shown(problems, answers))
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        chosen = [examples[i] for i in runs.batch_indices(len(examples), args.batch, step, args.seed)]
        _, labels = collate(chosen, pad)  # (B, T)
        supervised = (labels[:, 1:] != IGNORE).sum().item()  # of the whole batch, not of a micro-batch
        optimizer.zero_grad()
        log = {}
        for some in parts.micro_batches(chosen, micro_batch):
            ids, labels = collate(some, pad)  # (b, t): no longer than the longest of these
            total, _ = sft_loss(model, ids.to(args.device), labels.to(args.device))
            loss = total / supervised
            loss.backward()  # gradients add up over the micro-batches
            parts.add(log, 1, loss=loss)
        parts.add_up(model, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm)

    # ---- the report
    model.config.chat = True
    trained = runs.Run(runs.without_break(args)) if args.break_ in ASKED_WRONGLY else run
    results |= trained.mean("loss")
    if problems:
        results |= measure_pass_at_k(model, asked, problems[: max(1, args.problems // 5)], args.seed)
        fresh = task.problems(args.problems, f"fresh {args.seed}", "test")
        results["accuracy_fresh"] = sum(a.correct for a in gpt.solve(model, asked, fresh, 0.0, None)) / len(fresh)
        print("  ".join(f"{name} {value:.3f}" for name, value in results.items()))
    return run.finish(model, **results)


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="sft.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from: a folder, gpt2, gpt2-medium, ..., or scratch: random\n"
        "weights on GPT-2's tokens (default: runs/base; with --data scratch)")
    add("--data", help="real data: gsm8k, hh-rlhf, ultrafeedback, or a .jsonl, .jsonl.gz, .json or .parquet\n"
        "file")
    add("--demos", type=int, default=6400, help="demonstrations of the embedded task")
    add("--answer_only", action="store_true", help="leave the working out: learn the final answers alone")
    add("--epochs", type=int, default=1, help="passes over the demonstrations (see too_many_epochs)")
    add("--batch", type=int, default=32, help="demonstrations per step")
    add("--micro_batch", type=int, help="demonstrations per forward pass: less memory, the same gradient\n"
        "(default: all of the batch; with --data 4)")
    add("--steps", type=int, help="stop after so many updates (default: all epochs)")
    add("--lr", type=float, help="smaller than in pretraining (default 1.5e-3; GPT-2 and larger 5e-5)")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points")
    add("--eval_every", type=int, default=100, help="steps between evaluations")
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("sft", parser(), argv, breaks.of("sft"))
    if args.break_ and args.data:
        raise SystemExit("the breaks of sft.py need the embedded task's checker: leave --data out")
    if args.answer_only and args.data:
        raise SystemExit("--answer_only cuts the embedded task's solutions at ####: leave --data out")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
