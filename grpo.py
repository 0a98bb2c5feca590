"""GRPO: how is a policy optimized against a reward if the only baseline is its own other answers?

    python grpo.py                                the short run: 10 steps against a learned reward model
    python grpo.py --break reward_hacking         the same run, continued to step 300
    python grpo.py --break no_kl                  without the KL penalty, 150 steps with and without it
    python grpo.py --reward checker --beta 0 --max_steps 500      a true reward needs no KL penalty
    python grpo.py --data gsm8k --base gpt2       real problems, and the exact checker as the reward

For every prompt the policy samples a group of G answers. Each gets a reward, and its advantage is how much better
the reward is than the group's mean (Shao et al. 2024, section 4.1.2):

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

There is no value function: the group's mean is the baseline. Every token of an answer gets the answer's advantage.
The rest is PPO's clipped objective (ppo.py), and a KL penalty that keeps the policy near the SFT model:

    rho = pi(y_t) / pi_old(y_t)
    L   = - mean_t [ min(rho A, clip(rho, 1-eps, 1+eps) A) - beta k3_t ]        k3 = e^d - 1 - d,
                                                                        d = log pi_ref(y_t) - log pi(y_t)

The reward is a model of the annotators' preferences (reward_model.py). As the policy changes, its samples leave the
reward model's training distribution, and there a high score no longer means a correct answer. The policy moves to
those answers: at first the answers get better, then the score keeps rising while they get worse. (Gao, Schulman and
Hilton 2022; Stiennon et al. 2020, figure 5)

    reward_hacking  A small beta, and max_steps x 30. The reward keeps rising; accuracy rises, peaks and falls, and the
                    answers become longer, more confident and more formulaic. (With the default beta it does not fall
                    in the clean run of no_kl.)
    no_kl           beta = 0. The KL is larger, the reward is higher, and the accuracy is lower.
    k1_kl_loss      The KL penalty as the mean of log pi - log pi_ref, an unbiased estimate of the KL divergence. In
                    the *reward* that works. A *loss* is differentiated, and the expected gradient of this one is zero
                    (k3's is that of KL(pi_ref || pi)), so it penalizes nothing.
    shared_ref      The reference is the policy itself, `ref = policy`. The logged KL is 0, and the policy moves as
                    without a penalty. (minimind issue 674)

How to read the log: a GRPO loss near 0 is expected, because at the first update of a batch rho is 1 and the
advantages of a group sum to 0 (what is left comes from answers of different lengths, and from the KL penalty).
Watch `reward`. `kl` is the mean over answers of log pi - log pi_ref; it is an estimate from one batch and can be
below 0. `accuracy` and `test_accuracy` come from the exact checker, which is not used in training (unless it is the
reward).
"""

import argparse

import torch

import gpt
from data import breaks, lessons, parts, report, runs
from ppo import policy_loss
from reward_model import make_reward

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions


def group_advantages(rewards, scale=True):
    """Advantage of each answer within its group: rewards (P, G) of P prompts -> (P, G).

    [1, 0, 0, 0] -> [1.4997, -.4999, -.4999, -.4999]: the standard deviation is the unbiased one. scale=False leaves
    the division out (Dr. GRPO, Liu et al. 2025): the division gives more weight to prompts where nearly all answers
    are correct, or nearly none.
    """
    # Twelve rewards of .1 differ from their computed mean by a rounding error, and an epsilon of 1e-8 would turn that
    # into an advantage of -.58. Measured from the group's first reward, equal rewards give exactly 0.
    rewards = rewards - rewards[:, :1]
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def k3(logps, ref_logps):
    """Schulman's estimator of KL(pi || pi_ref) per token, never negative. (B, N) -> (B, N)

    expm1, because e^d - 1 loses all digits near d = 0, where training starts. The sign of d matters: with d reversed,
    the mean is no longer the KL.
    """
    d = ref_logps - logps
    return torch.expm1(d) - d


def aggregate(token_losses, mask, how, longest, whole=None):
    """From one loss per token (B, N) to a scalar. mask: (B, N) bool, True where there is a token. whole: the mask of
    the whole batch, if this is a micro-batch of it; then the results of all micro-batches add up to that of the batch.

    grpo     mean over the tokens of each answer, then over answers: a token of a long answer counts less, so long
             wrong answers are penalized less per token
    dapo     mean over all tokens: every token counts the same
    dr_grpo  sum over all tokens / (B * longest): a token counts the same in every batch
    """
    whole = mask if whole is None else whole
    token_losses = token_losses.masked_fill(~mask, 0.0)
    if how == "grpo":
        return (token_losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(whole)
    if how == "dapo":
        return token_losses.sum() / whole.sum().clamp(min=1)
    return token_losses.sum() / (len(whole) * longest)


# ---------------------------------------------------------------------------------------------
# Training


def train(args):
    """One run, from the SFT model to the report. Returns its runs.Run."""
    max_steps = args.max_steps
    if args.break_ == "reward_hacking":
        max_steps *= 30  # "it was still improving when we stopped"
    policy, ref, tok = gpt.load_policy(args.load or runs.made_by("sft", args, "a minute"), args)
    P, G, longest = args.prompts, args.group, args.max_tokens
    material = lessons.problems(args, tok, policy.config.block_size, max_steps * P)
    problems, held_out = material.train, material.problems
    gpt.check_room(policy, tok, problems + held_out, longest)
    reward = make_reward(args, tok)  # after the problems: a reward model can take long to make
    run = runs.Run(args)
    beta = 0.0 if args.break_ == "no_kl" else args.beta
    penalized = ref  # the model that the KL penalty pulls to
    if args.break_ == "shared_ref":
        penalized = policy  # ref = policy: two names for one model, where a copy was meant
    clip_high = args.clip if args.clip_high is None else args.clip_high
    optimizer = gpt.make_optimizer(policy, args.lr or (1e-4 if policy.config.n_embd < 512 else 3e-6))

    # ---- the loop. `reward`, `accuracy`, ... are of the batch; "test_accuracy" etc. of the held-out problems.
    for step in run.steps(max_steps, policy, optimizer, 25, ("reward", "accuracy", "kl", "length")):
        every = 10 if step < 50 else 25 if step < 300 else 100  # at first, changes are fast
        if step % every == 0 or step == max_steps:
            results, outputs = gpt.evaluate_policy(policy, ref, reward, tok, held_out, args.seed, step, longest,
                                                   material.styles)  # fmt: skip
            run.say(step, **results)
            run.samples(step, outputs)
        if step == max_steps:
            break
        # ---- rollouts: G answers to each of P prompts
        batch = [p for p in problems[step * P : (step + 1) * P] for _ in range(G)]  # B = P * G
        generator, mine = runs.own_rng(args.seed, "rollouts", step), parts.share(batch)
        answers = gpt.solve(policy, tok, mine, args.temperature, generator, longest, batch=P * G)
        answers = parts.gather(answers, args.device)
        prompts, completions = [tok.prompt(p.text) for p in batch], [a.ids for a in answers]
        # pi_old: the distribution that the tokens were really drawn from, as recorded in sampling.
        old_logps = torch.nn.utils.rnn.pad_sequence([a.logps for a in answers], batch_first=True)  # (B, N)
        # ---- rewards and advantages
        rewards = reward(batch, answers).to(args.device)  # (B,)
        # Answers stand in the order of their prompts, so a group is a row, by index. Grouped by the prompt's text,
        # two equal prompts of a batch would become one group of 2G.
        advantages = group_advantages(rewards.view(P, G), args.loss != "dr_grpo").view(-1, 1)  # (B, 1)
        with torch.no_grad():
            ref_logps, mask = gpt.completion_logps(penalized, prompts, completions, args.temperature)  # (B, N)
        # ---- updates. With one per batch of rollouts, the ratio is 1 and never clipped; with more it moves.
        for _ in range(args.epochs):
            optimizer.zero_grad()
            all_logps, loss = torch.zeros_like(ref_logps), 0.0  # of the batch, to be logged
            for rows in parts.micro_batches(list(range(P * G)), args.micro_batch):  # b answers; by default all
                few = [prompts[i] for i in rows], [completions[i] for i in rows]
                logps, m = gpt.completion_logps(policy, *few, args.temperature)  # (b, n)
                # The longest answer of the micro-batch may be shorter than that of the batch: cut the columns.
                old, reference = (x[rows, : m.shape[1]] for x in (old_logps, ref_logps))
                losses = policy_loss(logps, old, advantages[rows], args.clip, clip_high)
                penalty = k3(logps, reference)
                if args.break_ == "k1_kl_loss":
                    penalty = logps - reference  # its mean is the KL, but the expected gradient of its mean is 0
                # An answer that was cut off is learned from like any other. Leaving it out of the loss, but in the
                # group's mean, can give the worst of the ended answers a positive advantage.
                part = aggregate(losses + beta * penalty, m, args.loss, longest, mask)
                part.backward()
                all_logps[rows, : m.shape[1]] = logps.detach()
                loss += part.detach()
            parts.add_up(policy, {"loss": loss, "logps": all_logps})
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            ratio = torch.exp(all_logps - old_logps)[mask]  # (M,), before the last update of this step
            grouped = rewards.view(P, G)
            run.log(
                step,
                reward=rewards.mean(),
                accuracy=sum(a.correct for a in answers) / len(answers),
                kl=(all_logps - ref_logps).sum(1).mean(),
                entropy=-old_logps[mask].mean(),  # an estimate, from the sampled tokens alone
                loss=loss,
                grad_norm=grad_norm,
                ratio_error=(ratio - 1).abs().mean(),
                clip_fraction=((ratio < 1 - args.clip) | (ratio > 1 + clip_high)).float().mean(),
                equal_groups=(grouped.amax(1) == grouped.amin(1)).float().mean(),
                length=mask.sum(1).float().mean(),
                ended=sum(a.ended for a in answers) / len(answers),
            )

    # ---- the report
    results = run.start_peak_end()
    run.side_by_side(start=0, peak=results["peak_step"], end=max_steps)
    return run.finish(policy, **results)


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="grpo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real problems with gold numbers: gsm8k, or a .jsonl, .jsonl.gz, .json or .parquet\n"
        "file")
    add("--base", help="the model that sft.py starts from, if it has to run first (its --load)")
    add("--reward", choices=["learned", "checker", "mine"],
        help="a reward model, the exact checker, or the function my_reward in reward_model.py\n"
        "(default: learned; with --data and without --rm checker)")
    add("--rm", help="the reward model's folder (default: what reward_model.py makes)")
    add("--max_steps", type=int, default=10, help="batches of rollouts. The step size is constant, so a longer\n"
        "run begins exactly like a shorter one")
    add("--loss", default="dapo", choices=["grpo", "dapo", "dr_grpo"], help="how token losses are averaged")
    add("--prompts", type=int, default=8, help="prompts per step (with --data 2)")
    add("--group", type=int, default=8, help="answers per prompt: their mean reward is the baseline")
    add("--micro_batch", type=int, help="answers per forward pass: less memory, the same gradient (default:\n"
        "prompts x group)")
    add("--epochs", type=int, default=1, help="updates on each batch of rollouts")
    add("--lr", type=float, help="learning rate, constant (default 1e-4; GPT-2 and larger 3e-6)")
    add("--beta", type=float, default=1.0, help="weight of the KL penalty, 0 for none (with --data 0.04: large\n"
        "models take smaller steps, and 0 to 0.04 is usual)")
    add("--clip", type=float, default=0.2, help="how far the ratio may move from 1")
    add("--clip_high", type=float, help="... upwards (DAPO: 0.28; default: as --clip)")
    add("--temperature", type=float, default=1.0, help="of sampling *and* of scoring")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off (with --data 256)")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points\n"
        "(with --data 50: 7 points)")
    p.with_data = {"prompts": 2, "beta": 0.04, "max_tokens": lessons.REAL_SOLUTION, "problems": 50}
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("grpo", parser(), argv, breaks.of("grpo"))
    if args.group < 2:
        raise SystemExit("--group must be at least 2: the baseline of an answer is the mean of its group")
    if args.problems < 2:
        raise SystemExit("--problems must be at least 2: the peak is chosen on one half of them")
    if args.break_ in ("no_kl", "k1_kl_loss", "shared_ref") and not args.beta:
        raise SystemExit(f"--break {args.break_}: with these flags the clean run makes the same mistake")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
