"""PPO: how is a policy optimized against a reward, token by token, without becoming unstable?

    python ppo.py                             the short run: 10 batches against a learned reward model
    python ppo.py --break reward_hacking      the same run, continued to batch 200
    python ppo.py --break no_kl               without the KL penalty, 100 batches with and without it
    python ppo.py --break sign_flip           the score has the wrong sign
    python ppo.py --data gsm8k --base gpt2    real problems, and the exact checker as the reward

A language model that is trained with reinforcement learning is called a *policy*; an answer that it samples in
training is a *rollout*. Writing an answer is a sequence of N actions, one per token. Three versions of the policy
take part, and all start as the SFT model: pi, the policy, is trained; pi_old is pi at the time when it sampled the
rollouts; pi_ref, the reference model, never changes. The reward model's score comes at the end of an answer. The KL
penalty comes at every token: it costs reward to make a token more likely than the reference does (Ouyang et al.
2022, section 3.5)

    r_t = - beta (log pi_old(y_t) - log pi_ref(y_t))  +  [t is the last token] * score(y)

How much did each token contribute to the reward? A value function V_t, read before token t, predicts the reward
still to come. The advantage of token t is the observed return minus the predicted one (GAE, Schulman et al. 2015)

    delta_t = r_t + gamma V_{t+1} - V_t           A_t = delta_t + gamma lambda A_{t+1}

The policy is updated towards tokens with a positive advantage. The rollouts came from pi_old, so they are
informative only near pi_old; the ratio rho is clipped to that neighbourhood (Schulman et al. 2017, eq. 7 and 9; the
clipped value loss is that of their code). R_t = A_t + V_t is the target of V, and V_clip is V kept near V_old:

    rho_t = pi(y_t) / pi_old(y_t)
    L = mean_t max(-rho A, -clip(rho, 1-eps, 1+eps) A)  +  c_v mean_t 1/2 max((V-R)^2, (V_clip-R)^2)

The value function here is a new layer on the policy's own transformer: one forward pass computes both. It starts at
zero, so that the first advantages do not contain noise from random weights. (InstructGPT's value function is a
second transformer, initialized from the reward model.)

What does the value function buy? `python ppo.py --max_steps 100 --value_coefficient 0` is the same run with V = 0: the
advantage of a token is then the return itself. After 100 steps the reward is .56 and .73 with a value function (seeds
211 and 212), and .37 and .59 without. The KL is larger with it, .62 and .74 against .43 and .53; the accuracy is the
same within the error (.52 and .60 against .52 and .55).

    reward_hacking  A small beta and small steps, and max_steps x 20. The reward keeps rising; accuracy rises, peaks
                    and falls, and the answers become longer, more confident and more formulaic. (With the default
                    beta it does not fall in the clean run of no_kl.)
    no_kl           beta = 0. The KL is larger, the reward is higher, and the accuracy is lower.
    sign_flip       The reward model returns costs since a refactor, and the loop still maximizes. The logged reward
                    rises and the answers stay fluent, but they are wrong. (Ziegler et al. 2019, section 4.4: a
                    flipped sign; "the same bug also flipped the sign of the KL penalty", so the output stayed
                    fluent.)

How to read the log: `reward` is the score alone. `kl` is the mean over answers of log pi - log pi_ref; it is an
estimate from one batch and can be below 0. `explained_variance` is near 1 if the value function predicts the
returns, 0 if it is no better than a constant, and negative if it is worse. `clip_fraction` is the fraction of
tokens whose ratio left 1 +- eps; if `approx_kl` is above .05, the steps are too large. `accuracy` and
`test_accuracy` come from the exact checker, which is not used in training. If the reward falls together with the
accuracy, the run has diverged; that is not reward hacking.
"""

import argparse

import torch
import torch.nn as nn

import gpt
from data import breaks, lessons, parts, report, runs
from reward_model import make_reward

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions. Tensors are (B, N), one number per token; mask is True where there is a token.


def token_rewards(scores, logps, ref_logps, mask, beta):
    """The KL penalty on every token, and the score (B,) on the last one: (B, N). logps are pi_old's."""
    rewards = -beta * (logps - ref_logps)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1): the position of the end token
    return rewards.scatter_add(1, last, scores[:, None]).masked_fill(~mask, 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16). Returns (advantages, returns), (B, N).

    values[t] is V *before* token t. After the last token the value is 0: no reward follows. With lam 1 the advantage
    is all reward that came later minus V; with lam 0 it is one step of reward, and V for the rest.
    r = [0, 0, 1], V = [.5, .6, .7]:  lam 1 -> [.5, .4, .3];  lam 0 -> [.1, .1, .3];
    lam .95 -> [.46575, .385, .3]
    """
    values, rewards = values.masked_fill(~mask, 0.0), rewards.masked_fill(~mask, 0.0)
    advantages, later, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        # Behind the end of an answer rewards and values are 0, so the recursion starts at its last token.
        later = delta + gamma * lam * later
        next_value = values[:, t]
        advantages[:, t] = later
    # The value function's target is computed before whitening, which would change its unit.
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def masked_mean(x, mask):
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """Mean 0 and variance 1 over the tokens in the mask, and 0 elsewhere: whitened padding would be noise."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2):
    """Schulman et al. 2017, eq. 7, as a loss per token. (B, N), (B, N), (B, N) or (B, 1) -> (B, N)

    At rho = 1 its gradient is that of REINFORCE. The maximum of the two losses is the pessimistic one: the gradient
    is 0 only where the update would push the ratio further out. With rho = 1.3 and clip .2, a token with A = 1 has
    no gradient left, and one with A = -1 has all of it. With the minimum, exactly the wrong tokens would have a
    gradient. clip_high > clip_low allows a larger increase of the ratio than decrease, which matters for unlikely
    tokens (DAPO, Yu et al. 2025, section 3.1).
    """
    ratio = torch.exp(logps - old_logps)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, a scalar. No gradient moves a value further than clip from where it was at sampling."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return masked_mean(0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def explained_variance(returns, values):
    """(M,), (M,) -> scalar. 1: the values predict the returns; 0: no better than a constant; < 0: worse."""
    # The population variance: that of one token is 0, while a sample variance would be NaN and stop the run.
    return 1 - (returns - values).var(unbiased=False) / (returns.var(unbiased=False) + 1e-8)


def adapt(beta, kl, target, answers):
    """A larger beta if the policy is farther from the reference than wanted, a smaller one if it is nearer. kl and
    target: nats per answer. The controller of Ziegler et al. 2019, section 2.2, as in their code
    (lm-human-preferences): the relative error, clipped to +-.2, times answers / 10000. (The paper writes a constant
    gain of 0.1 instead.)"""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * answers / 10000)


# ---------------------------------------------------------------------------------------------
# Training


def rollouts(policy, ref, value, reward, tok, problems, args, step, beta):
    """Answers of the policy, and everything about them that stays fixed during the updates on them."""
    generator, mine = runs.own_rng(args.seed, "rollouts", step), parts.share(problems)
    answers = gpt.solve(policy, tok, mine, args.temperature, generator, args.max_tokens, batch=len(problems))
    answers = parts.gather(answers, args.device)
    prompts, completions = [tok.prompt(p.text) for p in problems], [a.ids for a in answers]
    # Every pass divides by the sampling temperature. Then pi_old, pi and pi_ref are distributions of the same kind,
    # and the ratio is 1 before the first update.
    old_logps, mask, old_values = gpt.completion_logps(policy, prompts, completions, args.temperature, value)
    ref_logps, _ = gpt.completion_logps(ref, prompts, completions, args.temperature)  # (B, N), as the others
    scores = reward(problems, answers).to(args.device)  # (B,)
    if args.break_ == "sign_flip":
        # The reward model returns costs now, and this loop still maximizes. The penalty for a cut-off answer is set
        # on this side, so it keeps its sign, and so does the KL penalty.
        ended = torch.tensor([a.ended for a in answers], device=scores.device)
        scores = torch.where(ended, -scores, scores)
    rewards = token_rewards(scores, old_logps, ref_logps, mask, beta)
    advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
    kl = (old_logps - ref_logps).sum(1).mean()
    return answers, prompts, completions, mask, old_logps, old_values, whiten(advantages, mask), returns, scores, kl


def train(args):
    """One run, from the SFT model to the report. Returns its runs.Run."""
    max_steps = args.max_steps
    if args.break_ == "reward_hacking":
        max_steps *= 20  # "it was still improving when we stopped"
    policy, ref, tok = gpt.load_policy(args.load or runs.made_by("sft", args, "a minute"), args)
    # Policy, value head and beta in one module: one optimizer, one checkpoint.
    agent = nn.ModuleDict({"policy": policy, "value": nn.Linear(policy.config.n_embd, 1)}).to(args.device)
    nn.init.zeros_(agent.value.weight)
    nn.init.zeros_(agent.value.bias)
    beta = 0.0 if args.break_ == "no_kl" else args.beta
    agent.register_buffer("beta", torch.tensor(beta, device=args.device))
    B, longest = args.prompts * args.answers, args.max_tokens
    material = lessons.problems(args, tok, policy.config.block_size, max_steps * args.prompts)
    problems, held_out = material.train, material.problems
    gpt.check_room(policy, tok, problems + held_out, longest)
    reward = make_reward(args, tok)  # after the problems: a reward model can take long to make
    run = runs.Run(args)
    optimizer = gpt.make_optimizer(policy, args.lr or (1e-4 if policy.config.n_embd < 512 else 3e-6))
    # The value head starts from nothing, so it may take larger steps than the policy.
    optimizer.add_param_group({"params": list(agent.value.parameters()), "lr": 1e-3})

    # ---- the loop. `reward`, `accuracy`, ... are of the batch; "test_accuracy" etc. of the held-out problems.
    for step in run.steps(max_steps, agent, optimizer, 25, ("reward", "accuracy", "kl", "length")):
        every = 10 if step < 50 else 25 if step < 300 else 100  # at first, changes are fast
        if step % every == 0 or step == max_steps:
            results, outputs = gpt.evaluate_policy(policy, ref, reward, tok, held_out, args.seed, step, longest,
                                                   material.styles)  # fmt: skip
            run.say(step, **results)
            run.samples(step, outputs)
        if step == max_steps:
            break
        # ---- rollouts: some answers to each of the prompts, B in all
        some = problems[step * args.prompts : (step + 1) * args.prompts]
        batch = [p for p in some for _ in range(args.answers)]
        with torch.no_grad():
            answers, prompts, completions, mask, old_logps, old_values, advantages, returns, scores, kl = rollouts(
                policy, ref, agent.value, reward, tok, batch, args, step, agent.beta
            )
        # ---- several epochs of minibatches over the same rollouts
        clipped, approx_kl = [], []
        for epoch in range(args.epochs):
            order = torch.randperm(B, generator=runs.rng(args.seed, "minibatches", step, epoch))
            for rows in order.split(args.minibatch):
                rows = rows.sort().values.tolist()  # answers to the same prompt become neighbours and share its pass
                tokens = mask[rows].sum()  # of the minibatch
                optimizer.zero_grad()
                log = {}
                for some in parts.micro_batches(rows, args.micro_batch):  # by default all of the minibatch
                    few = [prompts[i] for i in some], [completions[i] for i in some]
                    logps, m, values = gpt.completion_logps(policy, *few, args.temperature, agent.value)  # (b, n)
                    # The longest of these answers may be shorter than that of the batch: cut the columns.
                    old, old_v, adv, ret = (x[some, : m.shape[1]] for x in (old_logps, old_values, advantages, returns))
                    pg_loss = masked_mean(policy_loss(logps, old, adv, args.clip, args.clip), m)
                    v_loss = value_loss(values, old_v, ret, m, args.clip)
                    share = m.sum() / tokens  # both losses are means over tokens
                    (share * (pg_loss + args.value_coefficient * v_loss)).backward()
                    with torch.no_grad():
                        ratio = torch.exp(logps - old)[m]  # (M,)
                        out = ((ratio - 1).abs() > args.clip).float().mean()
                        moved = (ratio - 1 - ratio.log()).mean()  # k3 of pi_old against pi
                    parts.add(log, share, policy_loss=pg_loss, value_loss=v_loss, clipped=out, approx_kl=moved)
                parts.add_up(agent, log)
                grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
                optimizer.step()
                clipped.append(log["clipped"])
                approx_kl.append(log["approx_kl"])
        if args.target_kl:
            agent.beta.fill_(adapt(agent.beta.item(), kl.item(), args.target_kl, B))
        run.log(
            step,
            reward=scores.mean(),
            accuracy=sum(a.correct for a in answers) / B,
            kl=kl,
            entropy=-old_logps[mask].mean(),  # an estimate, from the sampled tokens alone
            policy_loss=log["policy_loss"],
            value_loss=log["value_loss"],
            grad_norm=grad_norm,
            clip_fraction=sum(clipped) / len(clipped),
            approx_kl=sum(approx_kl) / len(approx_kl),
            explained_variance=explained_variance(returns[mask], old_values[mask]),
            length=mask.sum(1).float().mean(),
            unfinished=1 - sum(a.ended for a in answers) / B,
            beta=agent.beta.clone(),
        )

    # ---- the report
    results = run.start_peak_end()
    run.side_by_side(start=0, peak=results["peak_step"], end=max_steps)
    return run.finish(policy, **results)


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="ppo.py", description=__doc__.split("\n")[0])
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
    add("--prompts", type=int, default=8, help="prompts per step (with --data 2)")
    add("--answers", type=int, default=4, help="answers sampled per prompt; PPO needs only one, but the\n"
        "prompt is computed once for all of them")
    add("--minibatch", type=int, default=16, help="answers per update (with --data 4)")
    add("--micro_batch", type=int, help="answers per forward pass: less memory, the same gradient (default: all\n"
        "of the minibatch)")
    add("--epochs", type=int, default=4, help="passes over each batch of rollouts")
    add("--lr", type=float, help="step size of the policy, constant (default 1e-4; GPT-2 and larger 3e-6)")
    add("--beta", type=float, default=0.5, help="weight of the KL penalty, 0 for none (with --data 0.05)")
    add("--target_kl", type=float, default=0.0, help="adapt beta to keep this KL to the reference, in nats per\n"
        "answer (0: beta is constant)")
    add("--clip", type=float, default=0.2, help="how far ratio and value may be moved in one batch")
    add("--gamma", type=float, default=1.0, help="discount; answers are short, so the end counts in full")
    add("--lam", type=float, default=0.95, help="GAE: 1 uses the rewards that followed, 0 the value function")
    add("--value_coefficient", type=float, default=1.0, help="weight of the value loss. With 0 the value function\n"
        "stays 0: the returns alone are the advantages")
    add("--temperature", type=float, default=1.0, help="of sampling *and* of scoring")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off (with --data 256)")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points\n"
        "(with --data 50: 7 points)")
    p.with_data = {"prompts": 2, "minibatch": 4, "beta": 0.05, "max_tokens": lessons.REAL_SOLUTION, "problems": 50}
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("ppo", parser(), argv, breaks.of("ppo"))
    if args.problems < 2:
        raise SystemExit("--problems must be at least 2: the peak is chosen on one half of them")
    if args.target_kl and not args.beta:
        raise SystemExit("--target_kl changes --beta by a factor: with --beta 0 it stays 0")
    if args.break_ == "no_kl" and not args.beta:
        raise SystemExit("--break no_kl: with --beta 0 the clean run has no KL penalty either")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
