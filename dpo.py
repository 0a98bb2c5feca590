"""Direct preference optimization: how do two solutions and a verdict become a better model?

    python dpo.py                                       the SFT model learns from preferences
    python dpo.py --break flip_labels                   ... from the same ones, chosen and rejected swapped
    python dpo.py --loss ipo                            or cdpo, robust, kto, orpo, simpo
    python dpo.py --data ultrafeedback/train.jsonl      real preferences (see README)

Reinforcement learning from preferences fits a reward model r and then maximises r - beta KL(pi || ref).
The optimum of that is known in closed form, pi(y|x) ~ ref(y|x) exp(r(x,y) / beta). Solved for r and put
into the Bradley-Terry likelihood of the verdicts, the reward model drops out (Rafailov et al. 2023, eq. 7):

    L = - log sigmoid( beta [ log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x) ] )

One classification loss: y_w is the chosen answer, y_l the rejected, ref the frozen SFT model, and
beta log pi/ref the *implicit reward*. Nothing in it knows what "good" means, as the breaks show:

    flip_labels              chosen and rejected swapped in every pair. Loss, gradient norm, margin and
                             accuracy on its own labels look as good as in the clean run. The answers are
                             wrong.
    likelihood_displacement  the rejected answer is the chosen one with its first result off by one, and the
                             leash is as weak as in low_beta. The chosen answer itself becomes less likely.
                             (Razin et al. 2024; Pal et al. 2024: worst at low edit distance)
    label_noise              30 % of the labels swapped. This one the dashboard does show: the loss stays
                             high.
    low_beta                 a weak leash: pairs are ranked nearly as well, while the model drifts
                             away and its answers get worse. (Rafailov et al. 2024)

How to read the log. The loss starts at log 2 = .693 exactly: policy and reference are the same model.
`margin` is the mean difference of implicit rewards. Falling chosen rewards are normal and no bug: the loss
knows differences only, and lowering both sides is one way to widen them. What matters
is the outside evaluation: answers checked on held-out problems, every few steps.
"""

import argparse
import random
import re

import torch
import torch.nn.functional as F

import gpt
from data import public, task

BREAKS = {
    "flip_labels": "chosen and rejected swapped: the same dashboard, wrong answers",
    "likelihood_displacement": "answers one number apart: margin up, chosen answers less likely",
    "label_noise": "30 % of the labels swapped: the loss shows it",
    "low_beta": "beta / 10: pairs ranked nearly as well, answers worse",
}

# ---------------------------------------------------------------------------------------------
# The losses: pure functions of log-probabilities. All arguments are tensors (B,), in nats; the result is a
# scalar. Where nothing else is said, a log-probability is the *sum* over the tokens of an
# answer, end token included. A mean would be another loss: it forgets how long the answers are.


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Rafailov et al. 2023, eq. 7. At policy = reference: log 2, gradients -+ beta/2."""
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    # logsigmoid, not log(sigmoid()): the latter is -inf from -104 on in float32.
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()


def cdpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    noise=0.1,
):
    """Conservative DPO (Mitchell 2023): the label is right with probability 1 - noise. The minimum lies at
    the finite margin log((1-noise)/noise), so confidence stops growing there."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return (-(1 - noise) * F.logsigmoid(beta * h) - noise * F.logsigmoid(-beta * h)).mean()


def robust_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    noise=0.1,
):
    """Robust DPO (Chowdhury et al. 2024): unbiased. Its mean over noisy labels is DPO on clean ones."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return (((1 - noise) * right - noise * wrong) / (1 - 2 * noise)).mean()


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO (Azar et al. 2023, eq. 17): regress the margin to 1/(2 beta) instead of pushing it to infinity.
    Takes *mean* log-probabilities a token: the paper's authors confirmed that for TRL (trl issue 1677)."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return ((h - 1 / (2 * beta)) ** 2).mean()


def kto_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, kl, beta=0.1):
    """KTO (Ethayarajh et al. 2024, eq. 8): each answer is judged alone, against a reference point. kl: the
    reference point z0 >= 0, a scalar without gradient, an estimate of KL(policy || ref)."""
    chosen = 1 - torch.sigmoid(beta * (policy_chosen_logps - ref_chosen_logps - kl))
    rejected = 1 - torch.sigmoid(beta * (kl - (policy_rejected_logps - ref_rejected_logps)))
    return torch.cat([chosen, rejected]).mean()


def simpo_loss(policy_chosen_logps, policy_rejected_logps, beta=2.0, gamma=0.5):
    """SimPO (Meng et al. 2024, eq. 6): no reference. Takes *mean* log-probabilities a token, so that length
    does not count; gamma is the margin that the chosen answer must win by."""
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma).mean()


def orpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1):
    """ORPO (Hong et al. 2024, eq. 6-7): no reference; SFT on the chosen answer plus a log odds ratio.
    Takes *mean* log-probabilities a token."""

    def log1mexp(x):  # log(1 - e^x) for x < 0, exact near both ends (Maechler 2012)
        x = x.clamp(max=-1e-6)
        return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    log_odds = (policy_chosen_logps - policy_rejected_logps) - (
        log1mexp(policy_chosen_logps) - log1mexp(policy_rejected_logps)
    )
    return (-policy_chosen_logps - beta * F.logsigmoid(log_odds)).mean()


PER_TOKEN = ("ipo", "simpo", "orpo")  # these take means over tokens, the others sums
# The strength of the leash. 0.1 is the usual choice for a large model and long answers. The tiny model moves
# a long way in each of its large steps, and needs a shorter one: see --break low_beta.
REAL_BETA = dict.fromkeys(("dpo", "cdpo", "robust", "ipo", "kto", "orpo"), 0.1) | {"simpo": 2.0}
BETA = dict.fromkeys(("dpo", "cdpo", "robust", "kto", "orpo"), 0.5) | {"ipo": 0.1, "simpo": 2.0}

# ---------------------------------------------------------------------------------------------


def pair_logps(model, prompts, chosen, rejected):
    """Summed log-probabilities (2B,) of chosen, then rejected, and their lengths in tokens (2B,).

    One forward pass for both sides, which stand side by side in it: their prompt is computed once.
    """
    both = [side for pair in zip(chosen, rejected) for side in pair]
    logps, mask = gpt.completion_logps(model, [p for p in prompts for _ in range(2)], both)
    # (2B, N): chosen, rejected, chosen, ... -> (2B,): all chosen, then all rejected
    return tuple(x.sum(1).view(-1, 2).t().flatten() for x in (logps, mask))


def slip_once(text, rng):
    """Change the first result by one and nothing else: "8*3=24. 24-4=20." -> "8*3=25. 24-4=20."
    None where there is no result to change."""
    first = re.search(r"=(\d{1,9})", text)
    if first is None:
        return None
    result = int(first[1])
    wrong = result + (rng.choice([-1, 1]) if result > 1 else 1)
    return f"{text[: first.start()]}={wrong}{text[first.end() :]}"


@torch.no_grad()
def reference_logps(ref, encoded, batch):
    """(N, 2) log-probabilities of chosen and rejected under the frozen model, computed once."""
    rows = []
    for i in range(0, len(encoded), batch):
        logps, _ = pair_logps(ref, *map(list, zip(*encoded[i : i + batch])))
        rows.append(logps.view(2, -1).t())  # (2B,) -> (B, 2)
    return torch.cat(rows)


@torch.no_grad()
def pair_accuracy(model, encoded, ref_logps, batch):
    """Share of pairs whose implicit reward is higher on the chosen side."""
    h = reference_logps(model, encoded, batch) - ref_logps  # (N, 2): log pi/ref
    return (h[:, 0] > h[:, 1]).float().mean().item()


@torch.no_grad()
def sampled_kl(model, ref, prompts, completions, batch=250):
    """KL(policy || reference) per answer in nats: the mean of log pi/ref over the policy's own samples.
    An estimate: over few samples it can come out below 0."""
    total = 0.0
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch], completions[i : i + batch]
        total += (gpt.completion_logps(model, *some)[0] - gpt.completion_logps(ref, *some)[0]).sum().item()
    return total / len(prompts)


def train(args):
    """One run, from the SFT model to the report. Returns its gpt.Run."""
    # ---- policy and reference: the same model twice, one of them frozen
    flags = ["--data", args.data] if args.data else []
    # Random weights on real text: a few steps teach as much of a format as they will ever have.
    flags += ["--load", args.base] if args.base else ["--batch", "8", "--steps", "40"] if args.data else []
    where = args.load or gpt.made_by("sft", args, "a minute or more", flags)
    policy = gpt.load_model(where, args.device, args.dtype == "bfloat16")
    ref = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(policy.config.tokenizer)
    run = gpt.Run(args)

    # ---- the preferences: training pairs, held-out pairs with true labels, held-out problems
    steps, batch = args.steps, args.batch or (8 if args.data else 32)
    # Big models take small steps: the usual size for DPO on GPT-2 and larger is 20 times smaller.
    lr = args.lr or (1e-4 if policy.config.n_embd < 512 else 5e-6)
    room = min(args.max_tokens, policy.config.block_size)
    if args.data:
        pairs, counts = public.clean_pairs(public.load_or_exit(args.data), tok.encode, room)
        public.say_counts(args.data, counts, room)
        if len({p["prompt"] for p in pairs}) < 2:
            raise SystemExit(
                f"{len(pairs)} pairs, with fewer than two different prompts, are left of "
                f"{args.data}: none can be held out (see --max_tokens)"
            )
        pairs, held_out = public.split_pairs(pairs, seed=args.seed)
        random.Random(args.seed).shuffle(pairs)
        pairs = pairs[: steps * batch]  # no reference log-probabilities for pairs never visited
        # Where there are gold answers (GSM8K) they are checked; elsewhere there are outputs to read.
        gold, longest = held_out[0]["answer"] is not None, 160
        problems = [
            argparse.Namespace(text=p["prompt"], answer=p["answer"] or 0)
            for p in held_out
            if len(tok.prompt(p["prompt"])) + longest <= policy.config.block_size
        ][: (args.problems or 50) if gold else 4]
    else:
        pairs = task.preference_pairs(steps * batch, args.seed)
        held_out = task.preference_pairs(200, args.seed, "test")
        gold, longest = True, 48
        problems = task.problems(args.problems or 500, args.seed, "test")
    if args.break_ == "flip_labels":
        # One place where this happens: the file's columns are "better" and "worse", the loader's are
        # the other way round. Nothing crashes.
        pairs = [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    if args.break_ == "label_noise":
        coin = random.Random(f"noise {args.seed}")
        pairs = [
            p | {"chosen": p["rejected"], "rejected": p["chosen"]} if coin.random() < 0.3 else p
            for p in pairs
        ]
    if args.break_ == "likelihood_displacement":
        # Cheap negatives: corrupt the good answer a little. Every label is right.
        slips = random.Random(f"slips {args.seed}")
        pairs = [p | {"rejected": slip_once(p["chosen"], slips)} for p in pairs]
        pairs = [p for p in pairs if p["rejected"]]
    beta = args.beta or (REAL_BETA if args.data else BETA)[args.loss]
    if args.break_ in ("low_beta", "likelihood_displacement"):
        # Displacement needs slack as well: with the full leash the chosen answers lose likelihood, too, but
        # right answers hold (measured, see README). --break low_beta is the control: slack alone.
        beta = beta / 10

    def encode(p):
        return tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"])

    if len(pairs) < batch:
        raise SystemExit(f"{len(pairs)} pairs are left to train on, too few for --batch {batch}")
    encoded, held_encoded = [encode(p) for p in pairs], [encode(p) for p in held_out]
    # The reference never changes: its log-probabilities are computed once, not at every visit.
    ref_logps = reference_logps(ref, encoded, batch)  # (N, 2)
    held_ref_logps = reference_logps(ref, held_encoded, batch)

    # ---- the loop
    optimizer = gpt.make_optimizer(policy, lr)
    for step in run.steps(steps, policy, optimizer, save_every=25, show=("loss", "margin", "accuracy")):
        if step % args.eval_every == 0 or step == steps:
            results = {"held_out_pairs": pair_accuracy(policy, held_encoded, held_ref_logps, batch)}
            if problems:
                found, answers, shown = gpt.examine(policy, tok, problems, args.seed, step, longest)
                questions = [tok.prompt(p.text) for p in problems]
                results["kl"] = sampled_kl(policy, ref, questions, [a.ids for a in answers])
                results |= found if gold else {}
                run.samples(step, shown if gold else [(p.text, a.text) for p, a in zip(problems, answers)])
            run.say(step, **results)
        if step == steps:
            break
        # ---- one update
        gpt.set_lr(optimizer, lr, step, steps)
        chosen_ones = gpt.batch_indices(len(encoded), batch, step, args.seed)
        prompts, chosen, rejected = map(list, zip(*(encoded[i] for i in chosen_ones)))
        logps, lengths = pair_logps(policy, prompts, chosen, rejected)  # (2B,)
        pc, pr = logps.split(batch)  # policy, chosen and rejected: (B,) each
        rc, rr = ref_logps[chosen_ones].unbind(1)
        # What the dashboard shows is always made of sums, whatever the loss takes.
        reward_chosen, reward_rejected = (beta * (pc - rc)).detach(), (beta * (pr - rr)).detach()
        metrics = {"logp_chosen": pc.mean(), "logp_rejected": pr.mean()}
        nll = -(pc.sum() / lengths[:batch].sum())
        if args.loss in PER_TOKEN:
            n_chosen, n_rejected = lengths.split(batch)
            pc, pr, rc, rr = pc / n_chosen, pr / n_rejected, rc / n_chosen, rr / n_rejected
        if args.loss == "dpo":
            loss = dpo_loss(pc, pr, rc, rr, beta)
        elif args.loss == "cdpo":
            loss = cdpo_loss(pc, pr, rc, rr, beta, args.noise)
        elif args.loss == "robust":
            loss = robust_loss(pc, pr, rc, rr, beta, args.noise)
        elif args.loss == "ipo":
            loss = ipo_loss(pc, pr, rc, rr, beta)
        elif args.loss == "kto":
            # The reference point: how far the policy has moved on answers that do not belong to
            # the prompt (each prompt with its neighbour's answer).
            with torch.no_grad():
                strangers = chosen[1:] + chosen[:1]
                # A long prompt with a neighbour's long answer may not fit; its end is not needed here.
                room = policy.config.block_size
                strangers = [c[: room - len(p)] for p, c in zip(prompts, strangers)]
                moved = [gpt.completion_logps(m, prompts, strangers)[0].sum(1) for m in (policy, ref)]
            loss = kto_loss(pc, pr, rc, rr, (moved[0] - moved[1]).mean().clamp(min=0), beta)
        elif args.loss == "simpo":
            loss = simpo_loss(pc, pr, beta)
        elif args.loss == "orpo":
            loss = orpo_loss(pc, pr, beta)
        # The cure for displacement (Pal et al. 2024): hold the chosen answer's likelihood up.
        loss = loss + args.nll * nll
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "reward_chosen": reward_chosen.mean(),
            "reward_rejected": reward_rejected.mean(),
            "margin": (reward_chosen - reward_rejected).mean(),
            "accuracy": (reward_chosen > reward_rejected).float().mean(),
        }
        run.log(step, **metrics)

    # ---- the report
    trained = [m for m in run.metrics if "loss" in m]
    last = trained[-max(1, len(trained) // 5) :]  # the last fifth: a single batch is noise
    report = {name: sum(m[name] for m in last) / len(last) for name in last[0] if name != "step"}
    before = next(m for m in run.metrics if "held_out_pairs" in m)  # the evaluation at step 0
    report |= results | {f"{k}_sft": before[k] for k in ("right_sampled", "right_greedy") if k in before}
    run.finish(policy, **report)
    return run


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="dpo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real pairs: hh-rlhf, ultrafeedback, or a .jsonl, .jsonl.gz, .parquet file")
    add("--base", help="what sft.py starts from, where it has to run first (its --load)")
    add("--loss", default="dpo", choices=list(BETA), help="which loss: " + ", ".join(BETA))
    add("--beta", type=float, help="the leash to the reference (default 0.5; with --data 0.1;\n"
        "ipo 0.1, simpo 2)")
    add("--noise", type=float, default=0.1, help="share of wrong labels that cdpo and robust assume")
    add("--nll", type=float, default=0.0, help="weight of an SFT loss on the chosen answers beside it")
    add("--steps", type=int, default=100, help="updates; together one pass over the embedded pairs")
    add("--batch", type=int, help="pairs a step (default 32; with --data 8)")
    add("--lr", type=float, help="DPO moves far on little (default 1e-4; GPT-2 and larger 5e-6)")
    add("--max_tokens", type=int, default=512, help="longer real pairs are dropped, never cut")
    add("--problems", type=int, help="held-out problems (default 500: a standard error of 2 points;\n"
        "with --data 50, where it has gold answers)")
    add("--eval_every", type=int, default=25, help="steps between evaluations")
    return p
# fmt: on


def main(argv=None):
    args = gpt.parse("dpo", parser(), argv, BREAKS)
    if args.beta is not None and args.beta <= 0:
        raise SystemExit(f"--beta must be above 0, not {args.beta}: without the leash there is no DPO loss")
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    clean, broken = gpt.clean_and_broken(train, args)
    C, B = clean.report, broken.report
    dashboard = {
        "loss": "loss",
        "gradient norm": "grad_norm",
        "margin of implicit rewards": "margin",
        "accuracy on its own labels": "accuracy",
        "implicit reward, chosen": "reward_chosen",
        "implicit reward, rejected": "reward_rejected",
    }
    outside = {
        "held-out pairs, true labels": "held_out_pairs",
        "right answers, sampled": "right_sampled",
        "   (the SFT model's)": "right_sampled_sft",
        "right answers, greedy": "right_greedy",
        "   (the SFT model's)  ": "right_greedy_sft",
        "KL to the SFT model (nats)": "kl",
    }
    # On real data without gold answers, pairs with true labels are the outside evaluation.
    gold = "right_sampled" in C
    result = ("right answers, sampled", "share of held-out problems", "right_sampled")
    pairs = ("held-out pairs with true labels", "share ranked rightly", "held_out_pairs")
    last_panel = ("outside: " + result[0], *result[1:]) if gold else ("outside: " + pairs[0], *pairs[1:])
    own = BREAKS[args.break_].split(":")[0]
    if args.break_ == "flip_labels":
        claims = [
            ("the dashboard raises no alarm: no metric more than 10 % worse than in the clean run",
             B["loss"] < 1.1 * C["loss"] and B["margin"] > 0.9 * C["margin"]
             and B["accuracy"] > 0.9 * C["accuracy"] and B["grad_norm"] < 1.5 * C["grad_norm"]),
            ("pairs with true labels: below one half", B["held_out_pairs"] < 0.5 < C["held_out_pairs"]),
        ]  # fmt: skip
        if gold and not args.data:
            claims += [
                ("right answers: 30 points or more below the clean run",
                 B["right_sampled"] < C["right_sampled"] - 0.3),
                ("... and 10 or more below the SFT model it started from",
                 B["right_sampled"] < B["right_sampled_sft"] - 0.1),
            ]  # fmt: skip
        panel = ("dashboard: the loss", "nats", "loss")
        cure = "read fifty pairs before training on them:  python -m data " + (args.data or "pairs")
    elif args.break_ == "likelihood_displacement":
        claims = [
            (
                "the dashboard looks healthy: accuracy on its own labels above 90 %",
                B["accuracy"] > 0.9,
            ),
            (
                "the chosen answers became less likely than under the reference",
                B["reward_chosen"] < 0,
            ),
        ]
        if gold and not args.data:
            claims += [("right answers: 5 points or more below the SFT model it started from",
                        B["right_sampled"] < B["right_sampled_sft"] - 0.05)]  # fmt: skip
        panel = ("dashboard: implicit reward of the chosen", "nats", "reward_chosen")
        cure = "python dpo.py --break likelihood_displacement --nll 1   (holds the chosen answer up)"
    elif args.break_ == "label_noise":
        claims = [
            ("the dashboard shows it: the loss stays above .5", B["loss"] > 0.5 > C["loss"]),
            ("... and accuracy on its own labels below 80 %", B["accuracy"] < 0.8 < C["accuracy"]),
        ]
        panel = ("dashboard: the loss", "nats", "loss")
        cure = "python dpo.py --break label_noise --loss cdpo --noise 0.3   (or --loss robust)"
    else:
        claims = [
            ("the model drifts farther from the reference: KL at least 1.3 times", B["kl"] > 1.3 * C["kl"]),
            ("held-out pairs within 5 points of the clean run or above",
             B["held_out_pairs"] > C["held_out_pairs"] - 0.05),
        ]  # fmt: skip
        if gold and not args.data:
            claims += [("right answers: 5 points or more below the clean run",
                        B["right_sampled"] < C["right_sampled"] - 0.05)]  # fmt: skip
        panel = ("dashboard: held-out pairs", "share ranked rightly", "held_out_pairs")
        cure = "python dpo.py   (a stronger leash, or fewer steps)"
    print(f"\n{args.break_}: {own}.")
    gpt.break_report(clean, broken, dashboard, outside, claims, cure, [panel, last_panel])


if __name__ == "__main__":
    main()
