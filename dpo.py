"""Direct preference optimization: how do two solutions and a verdict become a better model?

    python dpo.py                                       the SFT model learns from preferences
    python dpo.py --break flip_labels                   ... from the same ones, chosen and rejected swapped
    python dpo.py --loss ipo                            also cdpo, robust, kto, orpo, simpo
    python dpo.py --data ultrafeedback/train.jsonl      real preferences (see README)

Reinforcement learning from preferences fits a reward model r and then maximises r - beta KL(pi || ref).
The optimum of that is known in closed form, pi(y|x) ~ ref(y|x) exp(r(x,y) / beta). Solved for r and put
into the Bradley-Terry likelihood of the verdicts, the reward model drops out (Rafailov et al. 2023, eq. 7):

    L = - log sigmoid( beta [ log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x) ] )

One classification loss: y_w is the chosen answer, y_l the rejected, ref the frozen SFT model, and
beta log pi/ref the *implicit reward*. Nothing in it knows what "good" means. That is the lesson of the breaks:

    flip_labels              chosen and rejected swapped in every pair. Loss, gradient norm, margin and accuracy
                             on its own labels look like those of the clean run. The answers are wrong.
    likelihood_displacement  the rejected answer is the chosen one with a digit changed. The margin grows,
                             and the chosen answer itself becomes less likely. (Razin et al. 2024, Pal et al. 2024)
    label_noise              a share of the labels swapped. This one the dashboard does show: the loss stays high.
    low_beta                 a weak leash: the implicit accuracy rises on, while the model drifts away.
                             (Rafailov et al. 2024)

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
    "likelihood_displacement": "answers one digit apart: margin up, chosen answer less likely",
    "label_noise": "30 % of the labels swapped: the loss shows it",
    "low_beta": "beta / 10: accuracy on pairs rises on, the answers get worse",
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


def cdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
              beta=0.1, noise=0.1):
    """Conservative DPO (Mitchell 2023): the label is right with probability 1 - noise. The minimum lies at the
    finite margin log((1-noise)/noise), so confidence stops growing there."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return (-(1 - noise) * F.logsigmoid(beta * h) - noise * F.logsigmoid(-beta * h)).mean()


def robust_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                beta=0.1, noise=0.1):
    """Robust DPO (Chowdhury et al. 2024, eq. 13): unbiased. Its mean over noisy labels is DPO on clean ones."""
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
    """SimPO (Meng et al. 2024, eq. 6): no reference. Takes *mean* log-probabilities a token, so that length does
    not count; gamma is the margin that the chosen answer must win by."""
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
DEFAULT_BETA = {"simpo": 2.0, "ipo": 0.1}  # of the others: 0.1

# ---------------------------------------------------------------------------------------------


def pair_logps(model, prompts, chosen, rejected):
    """Summed log-probabilities (2B,) of chosen, then rejected, and their lengths in tokens (2B,).

    One forward pass for both sides: they share the padding, the kernels and the rounding.
    """
    logps, mask = gpt.completion_logps(model, prompts + prompts, chosen + rejected)
    return logps.sum(1), mask.sum(1)


def change_a_digit(text, rng):
    """Replace one digit of the text by another one."""
    at = rng.choice([m.start() for m in re.finditer(r"\d", text)] or [0])
    return text[:at] + rng.choice([d for d in "0123456789" if d != text[at]]) + text[at + 1 :]


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
    flags = []
    if args.data:
        flags = ["--data", args.data] + (["--load", args.base] if args.base else [])
    where = args.load or gpt.made_by("sft", args, "a minute", flags)
    policy = gpt.load_model(where, args.device, args.dtype == "bfloat16")
    ref = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(policy.config.tokenizer)
    run = gpt.Run(args)

    # ---- the preferences: training pairs, held-out pairs with true labels, held-out problems
    steps, batch = args.steps, args.batch
    if args.data:
        pairs, counts = public.clean_pairs(public.load_rows(args.data), tok.encode, args.max_tokens)
        public.say_counts(args.data, counts, args.max_tokens)
        pairs, held_out = public.split_pairs(pairs, seed=args.seed)
        problems = []
    else:
        pairs = task.preference_pairs(steps * batch, args.seed)
        held_out = task.preference_pairs(200, args.seed, "test")
        problems = task.problems(args.problems, args.seed, "test")
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
        # Cheap negatives: corrupt the good answer a little. All labels are right.
        digits = random.Random(f"digits {args.seed}")
        pairs = [p | {"rejected": change_a_digit(p["chosen"], digits)} for p in pairs]
    if args.break_ == "low_beta":
        args.beta = (args.beta or 0.1) / 10
    beta = args.beta or DEFAULT_BETA.get(args.loss, 0.1)

    def encode(p):
        return tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"])

    encoded, held_encoded = [encode(p) for p in pairs], [encode(p) for p in held_out]
    if len(encoded) < batch:
        raise SystemExit(f"{len(encoded)} pairs are left to train on, fewer than --batch {batch}")
    # The reference never changes: its log-probabilities are computed once, not at every visit.
    ref_logps = reference_logps(ref, encoded, batch)  # (N, 2)
    held_ref_logps = reference_logps(ref, held_encoded, batch)

    # ---- the loop
    optimizer = gpt.make_optimizer(policy, args.lr)
    for step in run.steps(steps, policy, optimizer, save_every=25, show=("loss", "margin", "accuracy")):
        if step % args.eval_every == 0 or step == steps:
            results = {"held_out_pairs": pair_accuracy(policy, held_encoded, held_ref_logps, batch)}
            if problems:
                more, answers, shown = gpt.examine(policy, tok, problems, args.seed, step)
                questions = [tok.prompt(p.text) for p in problems]
                results |= more | {"kl": sampled_kl(policy, ref, questions, [a.ids for a in answers])}
                run.samples(step, shown)
            run.say(step, **results)
        if step == steps:
            break
        # ---- one update
        gpt.set_lr(optimizer, args.lr, step, steps)
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
    last = trained[-max(1, len(trained) // 5) :]  # the last fifth: one batch is noise
    report = {name: sum(m[name] for m in last) / len(last) for name in metrics}
    evaluations = [m for m in run.metrics if "held_out_pairs" in m]
    report["ref_logp_chosen"] = ref_logps[:, 0].mean().item()
    report |= results
    for name in ("right_sampled", "right_greedy"):
        if problems:
            report[f"{name}_sft"] = evaluations[0][name]
            report[f"{name}_peak"] = max(m[name] for m in evaluations)
    run.finish(policy, **report)
    return run


def parser():
    p = argparse.ArgumentParser(prog="dpo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real pairs: hh-rlhf, ultrafeedback, or a .jsonl, .jsonl.gz, .parquet file")
    add("--base", help="with --data: what sft.py starts from (its --load); default: random weights")
    add("--loss", default="dpo", help="which loss", choices=["dpo", "cdpo", "robust", "ipo", "kto", "orpo", "simpo"])
    add("--beta", type=float, help="strength of the leash to the reference (default 0.1; simpo 2)")
    add("--noise", type=float, default=0.1, help="share of wrong labels that cdpo and robust assume")
    add("--nll", type=float, default=0.0, help="weight of an SFT loss on the chosen answers beside the loss")
    add("--steps", type=int, default=100, help="updates; one pass over the pairs of the embedded task")
    add("--batch", type=int, default=32, help="pairs a step")
    add("--lr", type=float, default=5e-5, help="small: DPO moves far on little (for GPT-2 take 5e-6)")
    add("--max_tokens", type=int, default=512, help="longer pairs of real data are dropped, never cut")
    add("--problems", type=int, default=500, help="held-out problems: 500 give a standard error of 2 points")
    add("--eval_every", type=int, default=25, help="steps between evaluations")
    return p


def main(argv=None):
    args = gpt.parse("dpo", parser(), argv, BREAKS)
    if args.break_ is None:
        train(args)
        return
    clean, broken = gpt.clean_and_broken(train, args)


if __name__ == "__main__":
    main()
