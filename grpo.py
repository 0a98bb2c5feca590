"""GRPO: how does a model chase a reward, when the only baseline is its own other answers?

    python grpo.py                                the short run: 10 steps against a learned reward model
    python grpo.py --break reward_hacking         the same run carried on for 1000 steps
    python grpo.py --break no_kl                  ... without the leash, 250 steps with and without
    python grpo.py --reward checker --max_steps 1000      what a true reward does in as many steps

For every prompt the policy writes G answers; each is scored, and its advantage is how much better it is than
its siblings (Shao et al. 2024, section 4.1.2):

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

No value function: the group is the baseline. Every token of an answer gets the answer's advantage. Then
PPO's clipped objective, and a penalty that holds the policy near the SFT model it started from:

    rho = pi(y_t) / pi_old(y_t)
    L   = - mean_t [ min(rho A, clip(rho, 1-eps, 1+eps) A) - beta k3_t ]        k3 = e^d - 1 - d,
                                                                        d = log pi_ref(y_t) - log pi(y_t)

The reward is a model of somebody's verdicts (reward_model.py). Where the policy moves, the reward model has
never been, and there the score is whatever it happens to be. The policy finds those places: that is what
optimization does. At first the answers get better, then the score goes on rising and they get
worse. (Gao, Schulman and Hilton 2022; Stiennon et al. 2020, figure 5)

    reward_hacking  max_steps x 100, and nothing else. The reward climbs on; right answers rise, peak, fall.
    no_kl           beta = 0. Farther from the reference, a higher reward, fewer right answers.
    format_reward   a bonus for every calculation shown, on top of the exact checker. It is easier to earn
                    than a right answer, and bought with right answers (few of them here: see README).
    k1_kl_loss      the leash as the mean of log pi - log pi_ref, an unbiased estimate of the KL divergence.
                    As a *reward* that works. A *loss* is differentiated, and the expected gradient of
                    this one is zero (k3's is that of KL(pi_ref || pi)): no leash at all.
    temperature_mismatch  sampled at temperature 0.6, scored at 1: the ratio is not 1 at the first update, and
                    the policy that is trained is not the one that writes.
    length_norm     the mean over each answer's own tokens: a token of a long answer weighs less, so a long
                    wrong answer is let off lightly. (Liu et al. 2025, section 3.1)

How to read the log. A GRPO loss near 0 is expected: at the first update of a batch rho is 1 and the
advantages of a group sum to 0 (what is left comes from answers of different lengths). Watch the reward.
`kl` is the mean over answers of log pi - log pi_ref, an estimate: over one batch it can come out below 0,
and that is not a bug. `gold` is the share of right answers by the exact checker, which the training never
sees (unless it is the reward).
"""

import argparse
import functools
import sys

import torch

import gpt
from data import task
from data.checker import miscalculates

BREAKS = {
    "reward_hacking": "max_steps x 100: the reward climbs on, right answers rise, peak and fall",
    "no_kl": "beta 0: farther away, a higher reward, fewer right answers",
    "format_reward": "a bonus for showing work beside the exact checker: easier to earn than rightness",
    "k1_kl_loss": "k1 instead of k3 as the loss: a leash whose expected gradient is zero",
    "temperature_mismatch": "sampled at 0.6, scored at 1: the ratio is not 1 at the first step",
    "length_norm": "1/length in the loss: long wrong answers are let off lightly, and lengthen",
}
BREAK_STEPS = 250  # of both runs, for all breaks but reward_hacking: time for the mistake to show

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions


def group_advantages(rewards, scale=True):
    """Advantage of each answer within its group: (P, G) rewards of P prompts -> (P, G).

    [1, 0, 0, 0] -> [1.4997, -.4999, -.4999, -.4999]: the standard deviation is the unbiased one.
    scale=False leaves the division out (Dr. GRPO, Liu et al. 2025): dividing weighs prompts up
    where nearly all answers are right, or nearly none.
    """
    # Twelve rewards of .1 differ from their mean by a rounding error, of which an epsilon of 1e-8 makes an
    # advantage of -.58. Measured from one of the group first, equal rewards give exactly 0.
    rewards = rewards - rewards[:, :1]
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) for every token. (B, N), (B, N), (B, 1) -> (B, N)

    At rho = 1 its gradient is REINFORCE's. Beyond the clip it is 0, but only in the direction that made rho
    leave: the maximum of two losses is the pessimistic one. clip_high > clip_low lets unlikely tokens rise
    farther (DAPO, Yu et al. 2025, section 3.1).
    """
    ratio = torch.exp(logps - old_logps)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def k3(logps, ref_logps):
    """Schulman's estimator of KL(pi || pi_ref) per token, never negative. (B, N) -> (B, N)

    expm1, because e^d - 1 loses all digits near d = 0, where training starts. The sign of d matters: with
    d reversed its mean is no longer the KL.
    """
    d = ref_logps - logps
    return torch.expm1(d) - d


def aggregate(token_losses, mask, how, longest):
    """From a loss per token (B, N) to one number; mask (B, N) bool says which tokens there are.

    grpo     mean over the tokens of each answer, then over answers: a token of a long answer weighs less,
             so long wrong answers get off lightly
    dapo     mean over all tokens: each token weighs the same
    dr_grpo  sum over all tokens / (B * longest): the same weight whatever else is in the batch
    """
    token_losses = token_losses.masked_fill(~mask, 0.0)
    if how == "grpo":
        return (token_losses.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if how == "dapo":
        return token_losses.sum() / mask.sum().clamp(min=1)
    return token_losses.sum() / (len(token_losses) * longest)


# ---------------------------------------------------------------------------------------------
# Rewards: from a list of problems and a list of gpt.Answer to a tensor (B,)

CUT_OFF = -3.0  # the learned reward of an answer without an end: three standard deviations below the mean


@torch.no_grad()
def learned_reward(scorer, tok, problems, answers):
    """The reward model's score, read at the end token. An answer that was cut off has none: whatever the
    model says of an unfinished one is a guess, and the policy would find the flattering guesses."""
    prompts = [tok.prompt(p.text) for p in problems]
    scores = gpt.final_scores(scorer, prompts, [a.ids for a in answers])
    ended = torch.tensor([a.ended for a in answers], device=scores.device)
    return torch.where(ended, scores, CUT_OFF)


def checker_reward(problems, answers):
    """1 for a right answer and 0 for a wrong one: the truth, which real tasks rarely have."""
    return torch.tensor([float(a.right) for a in answers])


def my_reward(problems, answers):
    """`--reward mine`. Yours: change it and see what it makes of the model. This one pays for right answers,
    and a little for brevity."""
    return torch.tensor([a.right - 0.01 * len(a.ids) for a in answers])


# ---------------------------------------------------------------------------------------------
# The evaluation, from outside: the same held-out problems every time, one answer to each


@torch.no_grad()
def evaluate(policy, ref, reward, tok, problems, seed, step, longest):
    """Gold accuracy, reward and KL of the policy on the same sampled answers. Returns (results, answers).

    gold_a and gold_b are the two halves of the problems: a peak that is chosen on one half and
    measured on the other is not a peak of luck.
    """
    questions, golds = [p.text for p in problems], [p.answer for p in problems]
    answers = gpt.solve(policy, tok, questions, golds, 1.0, gpt.rng(seed, "evaluation", step), longest)
    prompts, completions = [tok.prompt(q) for q in questions], [a.ids for a in answers]
    kl = 0.0
    for i in range(0, len(prompts), 250):
        some = prompts[i : i + 250], completions[i : i + 250]
        kl += (gpt.completion_logps(policy, *some)[0] - gpt.completion_logps(ref, *some)[0]).sum().item()
    right = torch.tensor([float(a.right) for a in answers])
    n = len(answers)
    lengths = {side: [len(a.ids) for a in answers if a.right is side] for side in (True, False)}
    results = {
        "test_gold": right.mean().item(),
        "test_reward": reward(problems, answers).mean().item(),
        "test_kl": kl / n,
        "test_sqrt_kl": max(kl / n, 0) ** 0.5,
        "test_length": sum(len(a.ids) for a in answers) / n,
        "length_right": sum(lengths[True]) / max(1, len(lengths[True])),
        "length_wrong": sum(lengths[False]) / max(1, len(lengths[False])),
        "test_ended": sum(a.ended for a in answers) / n,
        "gold_a": right[::2].mean().item(),
        "gold_b": right[1::2].mean().item(),
        "miscalculated": sum(miscalculates(a.text) for a in answers) / n,
        "distinct": len({a.text for a in answers}) / n,
        "opening": sum(a.text.startswith(tuple(task.OPENINGS)) for a in answers) / n,
        "confident": sum(task.CONFIDENT in a.text for a in answers) / n,
        "check": sum("Check:" in a.text for a in answers) / n,
    }
    return results, answers


def start_peak_end(metrics):
    """The three evaluations that tell the story, as flat results. The peak is the best evaluation on one
    half of the problems (gold_a); whether it was one is to be read off the other half (gold_b)."""
    evaluations = [m for m in metrics if "test_gold" in m]
    peak = max(evaluations, key=lambda m: m["gold_a"])
    results = {"peak_step": peak["step"]}
    for name, m in (("start", evaluations[0]), ("peak", peak), ("end", evaluations[-1])):
        results |= {f"{name}_{key.removeprefix('test_')}": m[key] for key in m if key != "step"}
    return results


def draw_chase(path, runs):
    """The picture of the chapter: what is chased and what is wanted, against steps and against sqrt(KL)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = runs[-1]
    evaluations = [m for m in run.metrics if "test_gold" in m]
    peak = run.report["peak_step"]
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for ax, x, label in zip(
        axes, ("step", "test_sqrt_kl"), ("step", "distance: sqrt of KL to the SFT model")
    ):
        reward = ax.twinx()
        xs = [m[x] for m in evaluations]
        ax.plot(xs, [m["test_gold"] for m in evaluations], color="tab:blue", linewidth=2)
        reward.plot(xs, [m["test_reward"] for m in evaluations], "--", color="tab:red", linewidth=2)
        at = next(m for m in evaluations if m["step"] == peak)
        ax.plot(at[x], at["test_gold"], "*", color="tab:blue", markersize=16)
        ax.set(xlabel=label, ylim=(0, 1))
        ax.set_ylabel("right answers (gold, solid)", color="tab:blue")
        reward.set_ylabel("reward (learned, dashed)", color="tab:red")
        ax.grid(alpha=0.3)
    axes[0].set_title(f"the reward climbs; right answers peak at step {peak}")
    axes[1].set_title("the same against the distance travelled")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def train(args):
    """One run, from the SFT model to the report. Returns its gpt.Run."""
    max_steps = args.max_steps
    if args.break_ == "reward_hacking":
        max_steps *= 100  # "it was still improving when we stopped"
    # ---- the policy, and the same model frozen: the reference that the leash is tied to
    where = args.load or gpt.made_by("sft", args, "two minutes")
    policy = gpt.load_model(where, args.device, args.dtype == "bfloat16")
    ref = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(policy.config.tokenizer)
    reward = {"checker": checker_reward, "mine": my_reward}.get(args.reward)
    if args.reward == "learned":
        scorer = gpt.load_scorer(args.rm or gpt.made_by("reward_model", args, "a minute"), args.device)
        if scorer.transformer.config.tokenizer != tok.name:
            raise SystemExit("policy and reward model must share a tokenizer: one reads what the other wrote")
        reward = functools.partial(learned_reward, scorer.requires_grad_(False), tok)
    if args.break_ == "format_reward":
        # "Show your work": a tenth of a point for every calculation, with no upper bound.
        truth = reward

        def reward(problems, answers):
            return truth(problems, answers) + 0.1 * torch.tensor([a.text.count("=") for a in answers])

    run = gpt.Run(args)
    P, G, longest = args.prompts, args.group, args.max_tokens
    problems = task.problems(max_steps * P, args.seed, "train")
    held_out = task.problems(args.problems, args.seed, "test")
    room = policy.config.block_size - max(len(tok.prompt(p.text)) for p in problems + held_out)
    if longest > room:
        raise SystemExit(f"--max_tokens {longest}: the longest problem leaves {room} tokens of the context")
    beta = 0.0 if args.break_ == "no_kl" else args.beta
    clip_high = args.clip if args.clip_high is None else args.clip_high
    averaged = args.loss
    if args.break_ == "length_norm":
        averaged = "grpo"  # "every answer counts the same": as in the paper that named the algorithm
    temperature = sampled_at = args.temperature
    if args.break_ == "temperature_mismatch":
        sampled_at = 0.6  # "sharper samples are better samples"; the scoring pass does not hear of it

    # ---- the loop
    optimizer = gpt.make_optimizer(policy, args.lr)
    show = ("reward", "gold", "kl", "length")  # of the batch; the held-out problems are in "test_gold" & co.
    for step in run.steps(max_steps, policy, optimizer, save_every=25, show=show):
        # Often at first, where things happen fast.
        if step % (25 if step < 300 else 100) == 0 or step == max_steps:
            results, answers = evaluate(policy, ref, reward, tok, held_out, args.seed, step, longest)
            run.say(step, **results)
            shown = [f"{a.text} ({'right' if a.right else 'wrong'})" for a in answers[:8]]
            run.samples(step, [(p.text, text) for p, text in zip(held_out, shown)])
        if step == max_steps:
            break
        # ---- rollouts: G answers to each of P prompts
        group = [p for p in problems[step * P : (step + 1) * P] for _ in range(G)]  # B = P * G
        questions, golds = [p.text for p in group], [p.answer for p in group]
        generator = gpt.rng(args.seed, "rollouts", step)
        answers = gpt.solve(policy, tok, questions, golds, sampled_at, generator, longest, batch=P * G)
        prompts, completions = [tok.prompt(q) for q in questions], [a.ids for a in answers]
        # pi_old: what the tokens were really drawn from, as the sampler saw it.
        old_logps = torch.nn.utils.rnn.pad_sequence([a.logps for a in answers], batch_first=True)  # (B, N)
        # ---- rewards and advantages
        rewards = reward(group, answers).to(args.device)  # (B,)
        # Answers stand in the order of their prompts: the group is a row, by index. Grouped by the
        # prompt's text, two equal prompts of a batch would become one group of 2G.
        advantages = group_advantages(rewards.view(P, G), args.loss != "dr_grpo").view(-1, 1)  # (B, 1)
        # An answer that was cut off counts in its group's baseline and teaches nothing itself: nobody knows
        # how it would have ended. (DAPO, section 3.4)
        ended = torch.tensor([a.ended for a in answers], device=args.device)[:, None]  # (B, 1)
        with torch.no_grad():
            ref_logps, _ = gpt.completion_logps(ref, prompts, completions, temperature)  # (B, N)
        # ---- updates: one per batch of rollouts is on-policy; with more the ratio leaves 1 and may clip
        for _ in range(args.epochs):
            logps, mask = gpt.completion_logps(policy, prompts, completions, temperature)  # (B, N)
            losses = policy_loss(logps, old_logps, advantages, args.clip, clip_high)
            penalty = k3(logps, ref_logps)
            if args.break_ == "k1_kl_loss":
                penalty = logps - ref_logps  # "KL is the mean of log pi - log pi_ref", and so it is
            loss = aggregate(losses + beta * penalty, mask & ended, averaged, longest)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        # ---- the dashboard
        with torch.no_grad():
            ratio = torch.exp(logps - old_logps)[mask]  # (M,), before this step's last update
            run.log(
                step,
                reward=rewards.mean(),
                gold=sum(a.right for a in answers) / len(answers),
                kl=(logps - ref_logps).sum(1).mean(),
                entropy=-old_logps[mask].mean(),  # an estimate, from the sampled tokens alone
                loss=loss,
                grad_norm=grad_norm,
                ratio_error=(ratio - 1).abs().mean(),
                clip_fraction=((ratio < 1 - args.clip) | (ratio > 1 + clip_high)).float().mean(),
                equal_groups=(rewards.view(P, G).amax(1) == rewards.view(P, G).amin(1)).float().mean(),
                length=mask.sum(1).float().mean(),
                ended=ended.float().mean(),
            )

    # ---- the report
    report = {"batch_reward": run.metrics[-2]["reward"]}
    report |= {name.removeprefix("test_"): value for name, value in results.items()}
    report |= start_peak_end(run.metrics)
    run.beside({"start": 0, "peak": report["peak_step"], "end": max_steps})
    run.finish(policy, **report)
    return run


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="grpo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--reward", default="learned", choices=["learned", "checker", "mine"],
        help="a reward model, the exact checker, or the function my_reward in this file")
    add("--rm", help="the reward model's folder (default: what reward_model.py makes)")
    add("--max_steps", type=int, default=10, help="batches of rollouts; constant step size, so that a\n"
        "longer run begins as the shorter one does (breaks: 250, both runs)")
    add("--loss", default="dapo", choices=["grpo", "dapo", "dr_grpo"], help="how token losses are averaged")
    add("--prompts", type=int, default=8, help="prompts a step")
    add("--group", type=int, default=8, help="answers a prompt: the baseline is their mean")
    add("--epochs", type=int, default=1, help="updates on each batch of rollouts")
    add("--lr", type=float, default=3e-5, help="so small that the peak can be seen: see README")
    add("--beta", type=float, default=0.3, help="weight of the KL penalty, 0 for none. Large models take\n"
        "0 to 0.04; steps as large as these need a stronger leash")
    add("--clip", type=float, default=0.2, help="how far the ratio may leave 1")
    add("--clip_high", type=float, help="... upwards (DAPO: 0.28; default: as --clip)")
    add("--temperature", type=float, default=1.0, help="of sampling *and* of scoring")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points")
    return p
# fmt: on


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = gpt.parse("grpo", parser(), argv, BREAKS)
    if args.group < 2:
        raise SystemExit("--group must be at least 2: the baseline of an answer is the mean of its group")
    if args.problems < 2:
        raise SystemExit("--problems must be at least 2: the peak is chosen on one half of them")
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    if args.break_ != "reward_hacking" and args.max_steps == 10:
        argv = [*argv, "--max_steps", str(BREAK_STEPS)]
    if args.break_ in ("format_reward", "length_norm") and args.reward == "learned":
        argv = [*argv, "--reward", "checker"]  # what is broken here is broken with a true reward as well
    if (args.break_ == "no_kl" and not args.beta) or (args.break_ == "length_norm" and args.loss == "grpo"):
        raise SystemExit(f"--break {args.break_}: with these flags the clean run is broken already")
    args = gpt.parse("grpo", parser(), argv, BREAKS)
    clean, broken = gpt.clean_and_broken(train, args)
    C, B = clean.report, broken.report
    dashboard = {
        "reward, last batch": "batch_reward",
        "reward on held-out problems": "reward",
        "KL to the SFT model (nats)": "kl",
        "length in tokens": "length",
        "answers that end": "ended",
    }
    outside = {
        "right answers at the start": "start_gold",
        "   ... at the end": "end_gold",
        "step of the peak (chosen on one half)": "peak_step",
        "right, other half: at the start": "start_gold_b",
        "   ... at the peak": "peak_gold_b",
        "   ... at the end, other half": "end_gold_b",
        "reward at the start": "start_reward",
        "   ... at the peak ": "peak_reward",
        "   ... at the end ": "end_reward",
        "answers that miscalculate, at the start": "start_miscalculated",
        "   ... at the peak  ": "peak_miscalculated",
        "   ... at the end  ": "end_miscalculated",
        "different answers": "distinct",
        "tokens of a right answer, at the end": "length_right",
        "tokens of a wrong answer, at the end": "length_wrong",
    }
    panels = [
        ("dashboard: reward", "held-out problems", "test_reward"),
        ("outside: right answers", "share of held-out problems", "test_gold"),
        ("the same, against the distance", "share of held-out problems", "test_gold", "test_sqrt_kl"),
    ]
    if args.break_ == "reward_hacking":
        claims = [
            ("right answers rise by 5 points or more to their peak",
             B["peak_gold_b"] >= B["start_gold_b"] + 0.05),
            ("... and end 10 points or more below it (other problems than chose the peak)",
             B["end_gold_b"] <= B["peak_gold_b"] - 0.1),
            ("the reward at the end is above the reward at the peak", B["end_reward"] > B["peak_reward"]),
        ]  # fmt: skip
        panels = draw_chase
        cure = "python grpo.py --max_steps N   (N the step of the peak; a larger --beta gets there slower)"
    elif args.break_ == "format_reward":
        claims = [
            ("the total reward ends above the clean run's", B["batch_reward"] > C["batch_reward"]),
            ("right answers: 10 points or more below the clean run's", B["end_gold"] < C["end_gold"] - 0.1),
        ]
        cure = "python grpo.py --reward checker   (pay for what you want, not for what it looks like)"
    elif args.break_ == "temperature_mismatch":
        first = [next(m for m in run.metrics if "ratio_error" in m)["ratio_error"] for run in (clean, broken)]
        claims = [
            ("clean: at the first update policy and sampler agree to 1 in 1000", first[0] < 1e-3),
            (f"broken: they differ at once, the ratio is off by {first[1]:.2f} on average", first[1] > 0.01),
            ("fewer right answers at the end than in the clean run", B["end_gold"] < C["end_gold"]),
        ]
        panels[0] = ("dashboard: |ratio - 1|", "mean over tokens", "ratio_error")
        cure = "python grpo.py   (one temperature for sampling and scoring)"
    elif args.break_ == "length_norm":
        claims = [
            ("wrong answers end 5 % longer than in the clean run, or more",
             B["length_wrong"] > 1.05 * C["length_wrong"]),
            ("right answers do not", B["length_right"] < 1.05 * C["length_right"]),
        ]  # fmt: skip
        panels[0] = ("outside: wrong answers", "tokens", "length_wrong")
        cure = "python grpo.py --loss dapo   (the default: a token is a token; or --loss dr_grpo)"
    else:
        claims = [
            ("farther from the reference: KL at least 1.5 times", B["kl"] > 1.5 * C["kl"]),
            # The mean of 500 scores of spread 1 errs by .045, the difference of two such means by .063.
            ("the reward is no lower (0.1 is within the error)", B["reward"] >= C["reward"] - 0.1),
            (
                "right answers: 10 points or more below, after as many steps",
                B["end_gold"] < C["end_gold"] - 0.1,
            ),
        ]
        cure = "python grpo.py   (and stop early: the leash slows the walk, see README)"
    gpt.break_report(clean, broken, dashboard, outside, claims, cure, panels)


if __name__ == "__main__":
    main()
