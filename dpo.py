"""Direct preference optimization: how do labelled pairs of answers become a better model?

    python dpo.py                                       the SFT model learns from preferences
    python dpo.py --break flip_labels                   ... from the same pairs, chosen and rejected swapped
    python dpo.py --loss ipo                            or cdpo, robust, kto, orpo, simpo
    python dpo.py --data ultrafeedback/train.jsonl      real preferences
    python dpo.py --data judged.jsonl --loss kto        single answers, each with a label: good or bad

The SFT model is a base model that was fine-tuned on demonstrations (sft.py). A copy of it, pi, is trained here; it
is called the *policy*. Another copy, ref, stays frozen; it is the *reference model*. Reinforcement learning from
preferences fits a reward model r and then maximizes r - beta KL(pi || ref), where KL(pi || ref) measures how far pi
has moved from ref. The optimum is known: pi(y|x) is proportional to ref(y|x) exp(r(x,y) / beta). Solved for r,

    r(x,y) = beta log( pi(y|x) / ref(y|x) )  +  a constant that depends on x only

In the Bradley-Terry model of preferences, y_w is preferred to y_l with probability sigmoid(r(x,y_w) - r(x,y_l)).
The constant cancels in the difference, so no reward model is needed. The loss of one pair, with y_w the chosen and
y_l the rejected answer, is (Rafailov et al. 2023, eq. 7)

    L = - log sigmoid( beta [ log( pi(y_w|x) / ref(y_w|x) ) - log( pi(y_l|x) / ref(y_l|x) ) ] )

This is a classification loss. beta log( pi(y|x) / ref(y|x) ) is called the *implicit reward* of an answer, and the
difference of the two implicit rewards is the *margin*. The loss knows which answer was labelled as chosen, and not
whether it is good. `--break NAME` trains with a deliberate mistake beside the clean run, the run without it:

    flip_labels              Chosen and rejected are swapped in every pair. Loss, margin, and accuracy measured with the
                             swapped labels look as good as in the clean run. The answers are wrong.
    label_noise              30 % of the labels are swapped. The loss stays high, so the mistake can be seen in the log.
    low_beta                 beta / 10. Most pairs are still ranked right, but the model moves far
                             from the reference, and its answers get worse. (Rafailov et al. 2024)
    likelihood_displacement  beta / 10, and the rejected answer is the chosen one with the first number after "="
                             changed by one. The pairs are ranked perfectly, and the chosen answers do not become
                             likelier: the two share nearly all of their tokens. (Razin et al. 2024; Pal et al. 2024)
    shared_ref               The reference is the policy itself, `ref = policy`. The loss stays at log 2 = .693 and the
                             margin at 0, while the policy moves away from the SFT model. (minimind issue 674)

How to read the log:
- `loss` starts at log 2 = .693 with --loss dpo, cdpo and robust, because policy and reference have the same weights.
- `reward_chosen`, `reward_rejected`, `margin`: means over the batch. Both rewards may fall, since the loss depends
  only on their difference. That is a problem only if `accuracy_sampled` falls too.
- `pair_accuracy`: the fraction of the batch in which the chosen answer has the higher implicit reward, by the labels
  that are trained on. At step 0 it is rounding noise, because all margins are 0.
- `held_out_accuracy`: the same on pairs that are not trained on, with true labels. .5 is chance, also at step 0, where
  all margins are 0 (a tie counts half). A value near 0 means that the labels are swapped.
- With judgements of single answers (--loss kto), margin and accuracies compare a good answer with a bad one to another
  prompt.
- `grad_norm`: the gradient norm before it is clipped at 1. `logp_chosen`, `logp_rejected`: mean log-probabilities in
  nats (natural logarithm).
- `accuracy_sampled`, `accuracy_greedy`: the fraction of correct answers to held-out problems, sampled at temperature 1
  and decoded greedily. This is the external evaluation, and what matters. `kl`: KL(pi || ref) of the sampled answers.
- Before training, the script prints how often the reference gives the chosen answer the higher log-probability. On the
  built-in task it does so in most pairs, so swapped labels can be seen there. On real preferences it says little.
"""

import argparse
import random
import re

import torch
import torch.nn.functional as F

import gpt
from data import breaks, lessons, parts, report, runs, task

# ---------------------------------------------------------------------------------------------
# The losses: pure functions of log-probabilities. All arguments are tensors (B,) in nats; the result is a scalar.
# Unless said otherwise, a log-probability is the *sum* over the tokens of an answer with its end token. With the
# mean per token the loss is another one, in which length does not count.


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Rafailov et al. 2023, eq. 7. At policy = reference the loss is log 2. For one pair the gradient is -beta/2 in
    the chosen log-probability and +beta/2 in the rejected one."""
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    # logsigmoid, not log(sigmoid()): the latter is -inf for very negative margins.
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()


def cdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
              noise=0.1):  # fmt: skip
    """Conservative DPO (Mitchell 2023): a label is correct with probability 1 - noise. The loss is smallest at the
    margin log((1-noise)/noise); beyond it the loss rises again."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return (-(1 - noise) * F.logsigmoid(beta * h) - noise * F.logsigmoid(-beta * h)).mean()


def robust_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
                noise=0.1):  # fmt: skip
    """Robust DPO (Chowdhury et al. 2024). If `noise` is the true fraction of wrong labels, its expectation over noisy
    labels is the DPO loss on clean labels."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return (((1 - noise) * right - noise * wrong) / (1 - 2 * noise)).mean()


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO (Azar et al. 2023, eq. 17): pulls h, the difference of the log-ratios without beta, to 1/(2 beta) instead
    of to infinity. Takes *mean* log-probabilities per token (as the paper's authors confirmed to the library TRL,
    issue 1677)."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return ((h - 1 / (2 * beta)) ** 2).mean()


def kto_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, kl, beta=0.1):
    """KTO (Ethayarajh et al. 2024, eq. 8): each answer is compared with a reference point instead of with the other
    answer. kl: the reference point z0 >= 0, a scalar without gradient, an estimate of KL(policy || ref).

    So nothing here needs pairs: "chosen" are the answers that were judged good, and "rejected" the bad ones, to the
    same prompts or to others."""
    chosen = 1 - torch.sigmoid(beta * (policy_chosen_logps - ref_chosen_logps - kl))
    rejected = 1 - torch.sigmoid(beta * (kl - (policy_rejected_logps - ref_rejected_logps)))
    return torch.cat([chosen, rejected]).mean()


def simpo_loss(policy_chosen_logps, policy_rejected_logps, beta=2.0, gamma=0.5):
    """SimPO (Meng et al. 2024, eq. 6): no reference. Takes *mean* log-probabilities per token, so that length does
    not count. gamma is the margin by which the chosen answer should win."""
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma).mean()


def orpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1):
    """ORPO (Hong et al. 2024, eq. 6-7): no reference; SFT on the chosen answer, plus -beta log sigmoid of
    the log odds ratio. Takes *mean*
    log-probabilities per token."""

    def log1mexp(x):  # log(1 - e^x) for x < 0, accurate near both ends (Maechler 2012)
        x = x.clamp(max=-1e-6)
        return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    log_odds = (policy_chosen_logps - policy_rejected_logps) - (
        log1mexp(policy_chosen_logps) - log1mexp(policy_rejected_logps)
    )
    return (-policy_chosen_logps - beta * F.logsigmoid(log_odds)).mean()


PER_TOKEN = ("ipo", "simpo", "orpo")  # these take means per token, the others sums
# beta is the weight of the KL penalty (in simpo a scale, in orpo the weight of the odds-ratio term). 0.1 is usual
# for a large model and long answers. The tiny model is trained with a larger learning rate and would move too far
# from the reference: see --break low_beta.
REAL_BETA = dict.fromkeys(("dpo", "cdpo", "robust", "ipo", "kto", "orpo"), 0.1) | {"simpo": 2.0}
BETA = dict.fromkeys(("dpo", "cdpo", "robust", "kto", "orpo"), 0.5) | {"ipo": 0.1, "simpo": 2.0}


def preference_loss(args, beta, logps, ref_logps, lengths, kl):
    """The loss named by --loss: a scalar. logps, ref_logps, lengths: (2B,), all chosen, then all rejected. kl:
    see kto_loss."""
    if args.loss in PER_TOKEN:
        logps, ref_logps = logps / lengths, ref_logps / lengths
    pc, pr = logps.chunk(2)  # policy, chosen and rejected: (B,) each
    rc, rr = ref_logps.chunk(2)
    if args.loss == "cdpo":
        return cdpo_loss(pc, pr, rc, rr, beta, args.noise)
    if args.loss == "robust":
        return robust_loss(pc, pr, rc, rr, beta, args.noise)
    if args.loss == "ipo":
        return ipo_loss(pc, pr, rc, rr, beta)
    if args.loss == "kto":
        return kto_loss(pc, pr, rc, rr, kl, beta)
    if args.loss == "simpo":
        return simpo_loss(pc, pr, beta)
    if args.loss == "orpo":
        return orpo_loss(pc, pr, beta)
    return dpo_loss(pc, pr, rc, rr, beta)


# ---------------------------------------------------------------------------------------------
# Log-probabilities of pairs


def pair_logps(model, prompts, chosen, rejected, rejected_prompts=None):
    """Summed log-probabilities (2B,), all chosen, then all rejected, and their lengths in tokens (2B,).

    One forward pass for both sides. The two answers of a pair share one row, so their prompt is computed once. Only
    judgements of single answers have rejected_prompts: there the two sides answer different prompts.
    """
    both = [side for pair in zip(chosen, rejected) for side in pair]
    asked = [prompt for pair in zip(prompts, rejected_prompts or prompts) for prompt in pair]
    logps, mask = gpt.completion_logps(model, asked, both)
    # (2B, N): chosen, rejected, chosen, ... -> (2B,): all chosen, then all rejected
    return tuple(x.sum(1).view(-1, 2).t().flatten() for x in (logps, mask))


@torch.no_grad()
def all_pair_logps(model, encoded, batch):
    """(P, 2) log-probabilities of chosen and rejected of all P pairs, encoded by lessons.encode_pairs."""
    rows = []
    for i in runs.progress(range(0, len(encoded), batch), "log-probabilities of pairs"):
        logps, _ = pair_logps(model, *map(list, zip(*encoded[i : i + batch])))
        rows.append(logps.view(2, -1).t())  # (2B,) -> (B, 2)
    return torch.cat(rows)


@torch.no_grad()
def pair_accuracy(model, encoded, ref_logps, batch):
    """Fraction of pairs in which the chosen answer has the higher implicit reward. A tie counts half."""
    h = all_pair_logps(model, encoded, batch) - ref_logps  # (P, 2): log pi/ref
    return (1 + (h[:, 0] - h[:, 1]).sign().mean().item()) / 2


@torch.no_grad()
def kto_kl(policy, ref, prompts, answers):
    """KTO's kl: the mean of log pi/ref on answers that do not belong to the prompt (each prompt with its
    neighbour's answer), so that it measures a general shift and not what the pair teaches. A scalar >= 0."""
    others = answers[1:] + answers[:1]
    # A long prompt with a neighbour's long answer may not fit the context: cut the answer, this is an estimate.
    others = [a[: policy.config.block_size - len(p)] for p, a in zip(prompts, others)]
    logps = [gpt.completion_logps(model, prompts, others)[0].sum(1) for model in (policy, ref)]
    return (logps[0] - logps[1]).mean().clamp(min=0)


def slip_once(text, rng):
    """Change the first result by one and nothing else: "8*3=24. 24-4=20." -> "8*3=25. 24-4=20."
    None if there is no result to change."""
    first = re.search(r"=(\d{1,9})", text)
    if first is None:
        return None
    result = int(first[1])
    wrong = result + (rng.choice([-1, 1]) if result > 1 else 1)
    return f"{text[: first.start()]}={wrong}{text[first.end() :]}"


# ---------------------------------------------------------------------------------------------
# Training


def swap(pair):
    """The pair with the opposite label. Each answer keeps its prompt."""
    swapped = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    if "rejected_prompt" in pair:
        swapped |= {"prompt": pair["rejected_prompt"], "rejected_prompt": pair["prompt"]}
    return swapped


def labelled(args, pairs):
    """The training pairs, after the break if there is one: swapped labels, noisy labels, other rejected answers."""
    if args.break_ == "flip_labels":
        # In practice: a file has the columns (better, worse), and the loader reads them in the other order.
        pairs = [swap(p) for p in pairs]
    if args.break_ == "label_noise":
        coin = random.Random(f"noise {args.seed}")
        pairs = [swap(p) if coin.random() < 0.3 else p for p in pairs]
    if args.break_ == "likelihood_displacement":
        # Rejected answers made by a program: the chosen answer with one number changed. Every label is correct.
        slips = random.Random(f"slips {args.seed}")
        pairs = [p | {"rejected": slip_once(p["chosen"], slips)} for p in pairs]
        pairs = [p for p in pairs if p["rejected"] and "rejected_prompt" not in p]
        if not pairs:
            raise SystemExit("--break likelihood_displacement needs pairs with a calculation, such as 2+3=5")
    return pairs


def to_read(pairs):
    """(prompt, both answers with their labels) of the first four pairs: what this run is told is better."""
    found = []
    for p in pairs[:4]:
        other = f" (of: {p['rejected_prompt']})" if "rejected_prompt" in p else ""
        found.append((p["prompt"], f"chosen:\n{p['chosen']}\n\nrejected{other}:\n{p['rejected']}"))
    return found


def evaluate(policy, ref, tok, material, held_out, held_out_ref, batch, seed, step):
    """Accuracy on held-out pairs with true labels and, if there are problems, accuracy and KL of the answers to them.
    Returns (results, samples to show)."""
    results, problems = {"held_out_accuracy": pair_accuracy(policy, held_out, held_out_ref, batch)}, material.problems
    if not problems:
        return results, []
    found, answers = gpt.examine(policy, tok, problems, seed, step, material.longest)
    prompts = [tok.prompt(p.text) for p in problems]
    results["kl"] = gpt.mean_kl(policy, ref, prompts, [a.ids for a in answers])
    if not material.checked:
        return results, [(p.text, a.text) for p, a in zip(problems, answers)]
    return results | found, gpt.shown(problems, answers)


def train(args):
    """One run, from the SFT model to the report. Returns its runs.Run."""
    # ---- policy and reference: the same model twice, one of them frozen
    where = args.load or runs.made_by("sft", args, "a minute")
    policy, ref, tok = gpt.load_policy(where, args)
    run = runs.Run(args)
    # ---- the preferences
    steps, batch = args.steps, args.batch or (8 if args.data else 32)
    material = lessons.preferences(args, tok, policy.config.block_size, steps * batch, annotator=args.annotator,
                                   unpaired=args.loss == "kto")  # fmt: skip
    pairs = labelled(args, material.train)
    beta = args.beta or (REAL_BETA if args.data else BETA)[args.loss]
    if args.break_ in ("low_beta", "likelihood_displacement"):
        beta = beta / 10
    if len(pairs) < batch:
        raise SystemExit(f"{len(pairs)} pairs are left to train on, too few for --batch {batch}")
    encoded, held_out = lessons.encode_pairs(tok, pairs), lessons.encode_pairs(tok, material.held_out)
    # The reference never changes: its log-probabilities are computed once, not at every step.
    ref_logps = all_pair_logps(ref, encoded, batch)  # (P, 2)
    held_out_ref = all_pair_logps(ref, held_out, batch)
    ref_margin = ref_logps[:, 0] - ref_logps[:, 1]  # (P,)
    before = {"ref_margin": ref_margin.mean().item(), "ref_accuracy": (ref_margin > 0).float().mean().item()}
    print(f"before training, the reference gives the chosen answer the higher log-probability in "
          f"{before['ref_accuracy']:.1%} of the pairs; mean difference {before['ref_margin']:+.2f} nats")  # fmt: skip
    # Large models need a smaller learning rate.
    lr = args.lr or (1e-4 if policy.config.n_embd < 512 else 5e-6)
    optimizer = gpt.make_optimizer(policy, lr)

    # ---- the loop
    for step in run.steps(steps, policy, optimizer, save_every=25, show=("loss", "margin", "pair_accuracy")):
        if step % args.eval_every == 0 or step == steps:
            results, samples = evaluate(policy, ref, tok, material, held_out, held_out_ref, batch,
                                        args.seed, step)  # fmt: skip
            if step == 0:
                run.samples("0, training pairs", to_read(pairs))
            if samples:
                run.samples(step, samples)
            run.say(step, **results)
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        rows = runs.batch_indices(len(encoded), batch, step, args.seed)
        prompts, chosen, *_ = map(list, zip(*(encoded[i] for i in rows)))
        kl = kto_kl(policy, ref, prompts, chosen) if args.loss == "kto" else None
        tokens = sum(map(len, chosen))  # of the whole batch
        optimizer.zero_grad()
        log = {}
        for some in parts.micro_batches(rows, args.micro_batch):  # b of the B pairs; by default all of them
            share, b = len(some) / batch, len(some)
            logps, lengths = pair_logps(policy, *map(list, zip(*(encoded[i] for i in some))))  # (2b,)
            ref_rows = ref_logps[some].t().flatten()  # (b, 2) -> (2b,): all chosen, then all rejected
            if args.break_ == "shared_ref":
                # ref = policy: two names for one model, where a copy was meant. So both sides are always equal.
                ref_rows = logps.detach()
            # A mean over b pairs is weighted by b / B. What is divided by tokens needs the tokens of all B pairs.
            loss = share * preference_loss(args, beta, logps, ref_rows, lengths, kl)
            # Optional (--nll): an SFT loss keeps the chosen answers likely, against displacement.
            loss = loss - args.nll * logps[:b].sum() / tokens
            loss.backward()
            # The logged rewards are computed from sums over tokens, also for the losses that use means. Like the
            # loss, they belong to the weights before this update.
            reward_chosen, reward_rejected = (beta * (logps - ref_rows)).detach().split(b)  # (b,) each
            parts.add(log, 1, loss=loss)
            parts.add(
                log,
                share,
                logp_chosen=logps[:b].mean(),
                logp_rejected=logps[b:].mean(),
                reward_chosen=reward_chosen.mean(),
                reward_rejected=reward_rejected.mean(),
                margin=(reward_chosen - reward_rejected).mean(),
                pair_accuracy=(reward_chosen > reward_rejected).float().mean(),
            )
        parts.add_up(policy, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm)

    # ---- the report
    start = next(m for m in run.metrics if "held_out_accuracy" in m)  # the evaluation at step 0: the SFT model
    sft = {f"{name}_sft": start[name] for name in ("accuracy_sampled", "accuracy_greedy") if name in start}
    last = run.mean("loss", "grad_norm", "reward_chosen", "reward_rejected", "margin", "pair_accuracy", "logp_chosen",
                    "logp_rejected")  # fmt: skip
    return run.finish(policy, **last, **before, **results, **sft)


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="dpo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real pairs: hh-rlhf, ultrafeedback, ultrafeedback-scores, or a .jsonl, .jsonl.gz,\n"
        ".json or .parquet file. With --loss kto also judgements of single answers")
    add("--base", help="the model that sft.py starts from, if it has to run first (its --load)")
    add("--annotator", default="careful", choices=list(task.TASTES), help="who labels the built-in pairs. DPO\n"
        "learns the taste of human ones too, and then the greedy accuracy falls again")
    add("--loss", default="dpo", choices=list(BETA), help="which loss: " + ", ".join(BETA))
    add("--beta", type=float, help="weight of the KL penalty (default 0.5; with --data 0.1; ipo 0.1,\n"
        "simpo 2)")
    add("--noise", type=float, default=0.1, help="fraction of wrong labels that cdpo and robust assume")
    add("--nll", type=float, default=0.0, help="weight of an additional SFT loss on the chosen answers")
    add("--steps", type=int, default=100, help="updates; together one pass over the pairs of the built-in task")
    add("--batch", type=int, help="pairs per step (default 32; with --data 8)")
    add("--micro_batch", type=int, help="pairs per forward pass: less memory, the same gradient (default: all\n"
        "of the batch)")
    add("--lr", type=float, help="learning rate (default 1e-4; GPT-2 and larger 5e-6)")
    add("--max_tokens", type=int, default=512, help="longer real pairs are dropped, never cut")
    add("--problems", type=int, help="held-out problems (default 500: a standard error of 2 points;\n"
        "with --data 50, if it has gold answers)")
    add("--eval_every", type=int, default=50, help="steps between evaluations")
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("dpo", parser(), argv, breaks.of("dpo"))
    if args.beta is not None and args.beta <= 0:
        raise SystemExit(f"--beta must be above 0, not {args.beta}")
    if args.loss == "kto" and args.batch == 1:
        raise SystemExit("--loss kto needs --batch 2 or more: its kl is computed on the answers of other pairs")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
