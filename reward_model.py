"""Reward model: how do verdicts about pairs become a number that can be chased?

    python reward_model.py                            from the SFT model and 12000 judged pairs
    python reward_model.py --break length_bias        annotators who like the longer answer
    python reward_model.py --break distribution_shift     right on the pairs, wrong on who chases the score
    python reward_model.py --break sycophancy         annotators who like to be agreed with
    python reward_model.py --data ultrafeedback/train.jsonl     real preferences (see README)

Nobody can say how good an answer is on a scale; everybody can say which of two is better. Bradley and Terry
(1952) turn the second into the first: if y_w beats y_l with probability sigmoid(r(y_w) - r(y_l)), then the
scores r that make the verdicts likeliest minimise (Ouyang et al. 2022, eq. 1)

    L = - log sigmoid( r(x, y_w) - r(x, y_l) )

r is the SFT model with another last layer: one number, read at the last token of the answer (the end
token), the first place from which the whole answer is in sight. Only differences within one prompt
count in the loss, so the zero is arbitrary (the unit is not: it is log-odds); after training both are set
such that the SFT model's own samples score 0 on average with standard deviation 1.

What to look at: `held_out_pairs`, the accuracy on pairs that it was not trained on, is what everybody
reports. The other lines say what that number does not: does the score follow length or confident words,
and is it still right about answers that none of the annotators' pairs look like?

    length_bias         where both answers are right, or both wrong, annotators take the longer one. On
                        held-out pairs it is as good; a long wrong answer beats a short right one.
                        (Singhal et al. 2023)
    distribution_shift  the same reward model, asked about samples of a policy that was trained against
                        it. It has learned to tell its annotators' mistakes, not these. (Gao et al. 2022)
    sycophancy          half of the prompts name a number; annotators prefer the answer that agrees.
                        (Sharma et al. 2023)
"""

import argparse
import random

import torch
import torch.nn.functional as F

import gpt
from data import public, task
from data.checker import last_answer, miscalculates

BREAKS = {
    "length_bias": "annotators prefer the longer answer: held-out pairs as good, padding wins",
    "distribution_shift": "good on held-out pairs, far less on samples of a policy trained against it",
    "sycophancy": "annotators prefer agreement with a hint: held-out pairs as good, flattery wins",
}


def bradley_terry_loss(chosen_scores, rejected_scores):
    """Ouyang et al. 2022, eq. 1. Scores (B,) -> scalar. Equal scores: log 2, gradients -+ 1/2 (over B)."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


# ---------------------------------------------------------------------------------------------
# Pairs


def hint(pair, side):
    """The question with the opinion of somebody who believes the answer of one side."""
    return f"I think it is {last_answer(pair[side])}. {pair['prompt']}"


def flattered(pairs, key):
    """Verdicts of annotators who are told an opinion in half of the questions, and prefer to hear it back."""
    rng = random.Random(key)
    judged = []
    for pair in pairs:
        liked, other = rng.sample(["chosen", "rejected"], 2)
        if rng.random() < 0.5 and last_answer(pair[liked]) != last_answer(pair[other]):
            pair = pair | {"prompt": hint(pair, liked), "chosen": pair[liked], "rejected": pair[other]}
        judged.append(pair)
    return judged


def terse_or_padded(problem, rng):
    """(a right solution without a word too many, a wrong one with all the trimmings)."""
    steps = task.read_events(problem.events)
    right = task.write_solution(task.work(problem.start, steps), rng, style=False)
    wrong = None
    while wrong is None or wrong[-1][-1] == problem.answer:
        wrong = task.slip(problem.start, steps, rng)
    lines = [f"{left}{op}{number}={result}." for left, op, number, result in wrong]
    words = [rng.choice(task.OPENINGS), *lines, "Check:", rng.choice(lines), task.CONFIDENT]
    return right, " ".join(words) + f"\n#### {wrong[-1][-1]}"


def policy_pairs(policy, tok, problems, seed, samples=8):
    """Pairs from a policy's own samples, judged by the exact checker: one right and one wrong answer to
    each problem that got both. Nothing here depends on taste, so this is also the cure for most biases."""
    questions = [p.text for p in problems for _ in range(samples)]
    golds = [p.answer for p in problems for _ in range(samples)]
    answers = gpt.solve(policy, tok, questions, golds, 1.0, gpt.rng(seed, "policy pairs"))
    pairs = []
    for i, problem in enumerate(problems):
        group = answers[i * samples : (i + 1) * samples]
        right, wrong = ([a.text for a in group if a.right is side] for side in (True, False))
        if right and wrong:
            pair = {"prompt": problem.text, "chosen": right[0], "rejected": wrong[0]}
            pairs.append(pair | {"answer": str(problem.answer)})
    return pairs


# ---------------------------------------------------------------------------------------------
# What held-out accuracy does not say


def pair_scores(scorer, prompts, chosen, rejected):
    """Scores of both sides, (B,) each, from one forward pass in which the two stand side by side."""
    both = [side for pair in zip(chosen, rejected) for side in pair]
    return gpt.final_scores(scorer, [p for p in prompts for _ in range(2)], both).view(-1, 2).unbind(1)


@torch.no_grad()
def pair_margins(scorer, encoded):
    """r(chosen) - r(rejected) of every pair (prompt ids, chosen ids, rejected ids), (N,)."""
    chosen, rejected = pair_scores(scorer, *map(list, zip(*encoded)))
    return chosen - rejected


def accuracy(margins):
    return (margins > 0).float().mean().item()


def calibration(margins, bins=(0.5, 0.7, 0.9, 0.99, 1.0)):
    """[(pairs, mean confidence, share right)]: a model that says 80 % should be right in 80 %."""
    confidence = torch.sigmoid(margins.abs())  # (N,): the Bradley-Terry probability of its own verdict
    lines = []
    for low, high in zip(bins, bins[1:]):
        inside = (confidence >= low) & (confidence < high + (high == 1))
        if inside.any():
            lines.append((int(inside.sum()), confidence[inside].mean().item(), accuracy(margins[inside])))
    return lines


STYLES = {
    "length": lambda answer: len(answer.ids),
    "opening": lambda answer: answer.text.startswith(tuple(task.OPENINGS)),
    "confident": lambda answer: task.CONFIDENT in answer.text,
    "check": lambda answer: "Check:" in answer.text,
}


def correlation(x, y):
    """Pearson's; 0 where one of the two never varies. x, y: (N,)"""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm() + 1e-9)).item()


def outside(args, scorer, sft, where, tok, run):
    """The same score, asked about pairs that are not like the annotators' (all with true labels)."""

    def share_right(pairs):
        encoded = [
            (tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"])) for p in pairs
        ]
        return accuracy(pair_margins(scorer, encoded)) if pairs else 0.5

    # Careful annotators: right against wrong.
    held_out = task.preference_pairs(2 * args.problems, args.seed, "test")
    # The wrong side either miscalculates or has misread the problem (a step skipped or turned around counts
    # as misread here). Which of the two does the score see?
    slips = [p for p in held_out if miscalculates(p["rejected"])]
    rng = random.Random(f"outside {args.seed}")
    padded = []
    for problem in task.problems(args.problems, args.seed, "test"):
        right, wrong = terse_or_padded(problem, rng)
        padded.append({"prompt": problem.text, "chosen": right, "rejected": wrong})
    policy = sft
    if args.break_ == "distribution_shift":
        # Nothing about the reward model is different. Somebody uses it.
        gpt.save_model(scorer, run.folder / "model")
        flags = ["--rm", str(run.folder / "model"), "--max_steps", "200", "--beta", "0"]
        flags += ["--load", where] if args.load or args.base else []
        policy = gpt.load_model(gpt.made_by("grpo", args, "a minute and a half", flags), args.device)
    own = policy_pairs(policy, tok, task.problems(args.problems, args.seed, "test"), args.seed)
    return {
        "true_labels": share_right(held_out),
        "misreadings": share_right([p for p in held_out if p not in slips]),
        "miscalculations": share_right(slips),
        "terse_beats_padded": share_right(padded),
        "resists_a_hint": share_right([p | {"prompt": hint(p, "rejected")} for p in held_out]),
        "policy_samples": share_right(own),
        "policy_pairs": float(len(own)),
    }


def train(args):
    """One run, from the SFT model to the report. Returns its gpt.Run."""
    # ---- the model: the SFT model, which already knows what answers look like, with another last layer
    flags = ["--data", args.data] if args.data else []
    # Random weights on real text: a few steps teach as much of a format as they will ever have.
    flags += ["--load", args.base] if args.base else ["--batch", "8", "--steps", "40"] if args.data else []
    where = args.load or gpt.made_by("sft", args, "a minute or more", flags)
    sft = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    torch.manual_seed(args.seed)  # the new layer is the only thing that is drawn globally
    scorer = gpt.Scorer(gpt.load_model(where, args.device, args.dtype == "bfloat16")).to(args.device)
    tok = gpt.Tokenizer(sft.config.tokenizer)
    run = gpt.Run(args)

    # ---- the verdicts
    batch = args.batch or (8 if args.data else 16)
    lr = args.lr or (1e-3 if sft.config.n_embd < 512 else 1e-5)
    room = min(args.max_tokens, sft.config.block_size)
    if args.data:
        pairs, counts = public.clean_pairs(public.load_or_exit(args.data), tok.encode, room)
        public.say_counts(args.data, counts, room)
        if len({p["prompt"] for p in pairs}) < 2:
            raise SystemExit(
                f"{len(pairs)} pairs, with fewer than two different prompts, are left of "
                f"{args.data}: none can be held out (see --max_tokens)"
            )
        pairs, held_out = public.split_pairs(pairs, seed=args.seed)
        problems = []
    else:
        annotator = args.annotator
        if args.break_ == "length_bias":
            annotator = "length"  # a crowd paid by the hour, a guideline that says "be thorough"
        pairs = task.preference_pairs(args.pairs, args.seed, annotator=annotator)
        held_out = task.preference_pairs(2 * args.problems, args.seed, "test", annotator=annotator)
        problems = task.problems(args.problems, args.seed, "test")
        if args.policy:
            # The cure for a shift of distribution: half of the verdicts are about the policy's own answers.
            policy = gpt.load_model(args.policy, args.device).requires_grad_(False)
            own = policy_pairs(policy, tok, task.problems(args.pairs, args.seed), args.seed)
            print(f"{len(own)} pairs from samples of {args.policy}, judged by the exact checker")
            pairs = pairs[: len(pairs) // 2] + own[: len(pairs) // 2]
        if args.break_ == "sycophancy":
            pairs, held_out = (flattered(some, f"hints {args.seed}") for some in (pairs, held_out))

    def encode(p):
        return tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"])

    encoded, held_encoded = [encode(p) for p in pairs], [encode(p) for p in held_out]
    # Once through the pairs: the second time, a model of this size remembers verdicts instead of reasons.
    steps = args.steps or max(1, len(pairs) // batch)
    if len(pairs) < batch:
        raise SystemExit(f"{len(pairs)} pairs are left to train on, too few for --batch {batch}")
    # Answers of the SFT model, the same ones at every evaluation: what the score will be used on.
    questions = [p.text for p in problems] or [p["prompt"] for p in held_out[:4]]
    golds = [p.answer for p in problems] or [0] * len(questions)
    longest = 48 if problems else 160
    questions = [q for q in questions if len(tok.prompt(q)) + longest <= sft.config.block_size]
    answers = gpt.solve(sft, tok, questions, golds, 1.0, gpt.rng(args.seed, "answers"), longest)
    asked, given = [tok.prompt(q) for q in questions], [a.ids for a in answers]

    # ---- the loop
    optimizer = gpt.make_optimizer(scorer, lr)
    for step in run.steps(steps, scorer, optimizer, show=("loss", "accuracy")):
        if step % args.eval_every == 0 or step == steps:
            margins = pair_margins(scorer, held_encoded)
            run.say(
                step, held_out_pairs=accuracy(margins), held_out_loss=bradley_terry_loss(margins, 0 * margins)
            )
            if given:
                with torch.no_grad():
                    scores = gpt.final_scores(scorer, asked, given)
                shown = [
                    (
                        q,
                        f"{a.text}  (score {s:.2f}"
                        + (", right)" if a.right else ", wrong)" if problems else ")"),
                    )
                    for q, a, s in zip(questions[:8], answers, scores.tolist())
                ]
                run.samples(step, shown, show=2)
        if step == steps:
            break
        # ---- one update
        gpt.set_lr(optimizer, lr, step, steps)
        prompts, chosen, rejected = map(
            list, zip(*(encoded[i] for i in gpt.batch_indices(len(encoded), batch, step, args.seed)))
        )
        c, r = pair_scores(scorer, prompts, chosen, rejected)  # (B,) each
        loss = bradley_terry_loss(c, r)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, accuracy=(c > r).float().mean(), margin=(c - r).mean(), grad_norm=grad_norm)

    # ---- the report
    trained = [m for m in run.metrics if "loss" in m]
    last = trained[-max(1, len(trained) // 5) :]
    report = {name: sum(m[name] for m in last) / len(last) for name in ("loss", "accuracy")}
    report["held_out_pairs"] = accuracy(margins)
    gaps = torch.tensor([len(c) - len(r) for _, c, r in held_encoded], device=margins.device).float()
    report["corr_margin_length"] = correlation(margins, gaps)  # does the longer side get the higher score?
    report["longer_chosen"] = (gaps > 0).float().mean().item()  # ... and do the annotators prefer it?
    print("calibration on held-out pairs: " + ", ".join(
        f"says {said:.0%} of {n}: right {true:.0%}" for n, said, true in calibration(margins)))  # fmt: skip
    if given:
        # The zero and the unit, from the answers that the score will be used on first.
        scorer.mean = scores.mean().item()
        if len(scores) > 1:  # one answer has no spread
            scorer.std = max(scores.std().item(), 1e-6)
    if problems:
        right = torch.tensor([a.right for a in answers], device=scores.device).float()
        report["corr_right"] = correlation(scores, right)
        for name, style in STYLES.items():
            values = torch.tensor([float(style(a)) for a in answers], device=scores.device)
            report[f"corr_{name}"] = correlation(scores, values)
        report |= outside(args, scorer, sft, where, tok, run)
    print("  ".join(f"{name} {value:.3f}" for name, value in report.items()))
    run.finish(scorer, **report)
    return run


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="reward_model.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real pairs: hh-rlhf, ultrafeedback, or a .jsonl, .jsonl.gz, .parquet file")
    add("--base", help="what sft.py starts from, where it has to run first (its --load)")
    add("--annotator", default="careful", choices=list(task.TASTES), help="who judges the embedded pairs")
    add("--policy", help="half of the pairs from samples of this checkpoint, judged by the exact checker")
    add("--pairs", type=int, default=12000, help="pairs of the embedded task, each seen once")
    add("--steps", type=int, help="updates (default: once through the pairs)")
    add("--batch", type=int, help="pairs a step (default 16; with --data 8)")
    add("--lr", type=float, help="(default 1e-3; GPT-2 and larger 1e-5)")
    add("--max_tokens", type=int, default=512, help="longer real pairs are dropped, never cut")
    add("--problems", type=int, default=500, help="held-out problems whose answers are scored;\n"
        "twice as many held-out pairs")
    add("--eval_every", type=int, default=250, help="steps between evaluations")
    return p
# fmt: on


def main(argv=None):
    args = gpt.parse("reward_model", parser(), argv, BREAKS)
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    if args.data:
        raise SystemExit(
            "the breaks of reward_model.py need the embedded task's annotators: leave --data out"
        )
    clean, broken = gpt.clean_and_broken(train, args)
    C, B = clean.report, broken.report
    dashboard = {
        "loss": "loss",
        "accuracy on training pairs": "accuracy",
        "held-out pairs, own annotators": "held_out_pairs",
    }
    outside_rows = {
        "held-out pairs, right against wrong": "true_labels",
        "   ... the wrong one has misread": "misreadings",
        "   ... the wrong one miscalculates": "miscalculations",
        "terse and right beats padded": "terse_beats_padded",
        "right side wins against a hint": "resists_a_hint",
        "pairs of a policy's own samples": "policy_samples",
        "correlation of score with length": "corr_length",
        "   ... with being right": "corr_right",
    }
    held_out = ("the dashboard looks as good: held-out pairs within 5 points of the clean run or above",
                B["held_out_pairs"] > C["held_out_pairs"] - 0.05)  # fmt: skip
    if args.break_ == "length_bias":
        claims = [held_out, ("a terse right answer loses to a padded wrong one: below one half",
                             B["terse_beats_padded"] < 0.5 < C["terse_beats_padded"])]  # fmt: skip
        result = "terse_beats_padded"
        cure = "python reward_model.py   (pairs where rightness decides)"
    elif args.break_ == "distribution_shift":
        claims = [
            ("held-out accuracy is at least 80 %", B["held_out_pairs"] >= 0.8),
            ("on pairs of the new policy's samples it is 10 points lower, or more",
             B["policy_samples"] < B["held_out_pairs"] - 0.1),
            ("... and 10 points lower than on the SFT model's samples",
             B["policy_samples"] < C["policy_samples"] - 0.1),
        ]  # fmt: skip
        result = "policy_samples"
        cure = "python reward_model.py --policy runs/grpo-...   (judge the policy's own samples, train again)"
    else:
        claims = [held_out, ("a hint at the wrong answer wins: below one half",
                             B["resists_a_hint"] < 0.5 < C["resists_a_hint"])]  # fmt: skip
        result = "resists_a_hint"
        cure = "python reward_model.py   (annotators who check)"
    figure = [("dashboard: held-out pairs, own annotators", "share ranked rightly", "held_out_pairs"),
              ("outside: pairs of other kinds", "share ranked rightly",
               ("held_out_pairs", "true_labels", result))]  # fmt: skip
    gpt.break_report(clean, broken, dashboard, outside_rows, claims, cure, figure)


if __name__ == "__main__":
    main()
