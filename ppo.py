"""PPO: how does a model chase a reward, token by token, without falling over?

    python ppo.py                             the short run: 10 batches against a learned reward model
    python ppo.py --break reward_hacking      the same run carried on for 1000
    python ppo.py --break no_kl               ... without the leash, 200 with and without
    python ppo.py --break sign_flip           ... with the reward's sign lost in a refactor

Writing an answer is a game of N moves, one a token. Three models take part, and all start as the SFT model:
pi, the policy, is trained; pi_old is pi as it was when it wrote the answers; pi_ref, the reference, never
changes. The reward comes at the end, from the reward model; on the way every token pays for leaving the
reference (Ouyang et al. 2022, section 3.5; Ziegler et al. 2019)

    r_t = - beta (log pi_old(y_t) - log pi_ref(y_t))  +  [t is the last token] * score(y)

Which of the N tokens earned it? A value function V_t, read before token t, says what reward is still to come,
and the advantage of token t is how much better things went than that (Schulman et al. 2015, GAE)

    delta_t = r_t + gamma V_{t+1} - V_t           A_t = delta_t + gamma lambda A_{t+1}

The policy takes a step towards what went well, but not farther than the samples can be trusted, since they
came from the policy before the step (Schulman et al. 2017, eq. 7 and 9; the clipped value loss is that of
their code). R_t = A_t + V_t is what V should have said, V_clip is V held near what it said at sampling:

    rho_t = pi(y_t) / pi_old(y_t)
    L = mean_t max(-rho A, -clip(rho, 1-eps, 1+eps) A)  +  c_v mean_t 1/2 max((V-R)^2, (V_clip-R)^2)

The value function here is a fresh layer on the policy's own transformer: one forward pass gives both, which
halves the time. It starts at zero, so that no advantage of the first batch is an invention of random
weights. (InstructGPT's was a second transformer, a copy of the reward model.)

    reward_hacking  max_steps x 100, and nothing else. The reward climbs on; right answers rise, peak, fall.
    no_kl           beta = 0. Farther from the reference, a higher reward, fewer right answers.
    sign_flip       the reward model gives costs since a refactor, and the minus sign on this side is lost.
                    The curve that is plotted climbs; the answers stay fluent, and are as wrong as the
                    leash allows. (Ziegler et al. 2019, section 4.4: their bug, too, left the leash in force.
                    Where that is turned around as well nothing is fluent: README, the log.)

How to read the log. `reward` is the score alone, `kl` the mean over answers of log pi - log pi_ref (an
estimate: over one batch it can come out below 0, and that is not a bug). `explained_variance` near 1: the
value function foresees the reward; below 0: worse than a constant. `clip_fraction` counts tokens whose ratio
left the trusted range; with `approx_kl` above .05 the steps are too large. `gold` is the share of right
answers by the exact checker, which the training never sees.
"""

import argparse
import functools
import sys

import torch
import torch.nn as nn

import gpt
from data import task
from data.checker import miscalculates

BREAKS = {
    "reward_hacking": "max_steps x 100: the reward climbs on, right answers rise, peak and fall",
    "no_kl": "beta 0: farther away, a higher reward, fewer right answers",
    "sign_flip": "a lost minus sign: the plotted curve climbs, the answers are wrong",
}
BREAK_STEPS = 200  # of both runs, for all breaks but reward_hacking: time for the mistake to show

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions. Everything is (B, N), a number a token; mask says which tokens there are.


def token_rewards(scores, logps, ref_logps, mask, beta):
    """The penalty on every token, the score (B,) on the last one: (B, N). pi_old = the sampler's logps."""
    rewards = -beta * (logps - ref_logps)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1): the end token's place
    return rewards.scatter_add(1, last, scores[:, None]).masked_fill(~mask, 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16). Returns (advantages, returns), (B, N).

    values[t] is V *before* token t; after the last token it is 0, since the game is over. With lam 1 the
    advantage is all that came later minus V; with lam 0 one step of it, with V for the rest.
    r = [0, 0, 1], V = [.5, .6, .7]:  lam 1 -> [.5, .4, .3];  lam 0 -> [.1, .1, .3];
    lam .95 -> [.46575, .385, .3]
    """
    values, rewards = values.masked_fill(~mask, 0.0), rewards.masked_fill(~mask, 0.0)
    advantages, later, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        # Behind an answer's end everything is 0, and stays so: the recursion starts at its last token.
        later = (delta + gamma * lam * later) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = later
    # The target of the value function: before whitening, which would take its unit away.
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def masked_mean(x, mask):
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """Mean 0 and variance 1 over the tokens there are, and 0 elsewhere: whitened pads would be noise."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(logps, old_logps, advantages, mask, clip=0.2):
    """Schulman et al. 2017, eq. 7, as a loss: a scalar. At rho = 1 its gradient is REINFORCE's.

    The maximum of two losses: pessimistic. With rho = 1.3 and clip .2 a good token (A = 1) has no gradient
    left, a bad one (A = -1) still has all of it. A minimum here would learn from exactly the wrong ones.
    """
    ratio = torch.exp(logps - old_logps)
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)
    return masked_mean(losses, mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, with the value held within +- clip of where it was at sampling: a scalar."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return masked_mean(0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def explained_variance(returns, values):
    """(M,), (M,) -> scalar. 1: the values foresaw the returns; 0: no better than a constant; < 0: worse."""
    # Of the population, not of a sample: a batch of one token has no sample variance, and NaN stops the run.
    return 1 - (returns - values).var(unbiased=False) / (returns.var(unbiased=False) + 1e-8)


def adapt(beta, kl, target, answers):
    """Ziegler et al. 2019, section 2.2: a stronger leash where the policy is farther away than wanted, by at
    most 20 % in 10000 answers. kl and target: nats an answer."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * answers / 10000)


# ---------------------------------------------------------------------------------------------
# The reward: from a list of problems and a list of gpt.Answer to a tensor (B,)

CUT_OFF = -3.0  # the learned reward of an answer without an end: three standard deviations below the mean


@torch.no_grad()
def learned_reward(scorer, tok, problems, answers):
    """The reward model's score, read at the end token. An answer that was cut off has none: whatever the
    model says of an unfinished one is a guess, and the policy would find the flattering guesses."""
    prompts = [tok.prompt(p.text) for p in problems]
    scores = gpt.final_scores(scorer, prompts, [a.ids for a in answers])
    ended = torch.tensor([a.ended for a in answers], device=scores.device)
    return torch.where(ended, scores, CUT_OFF)


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
    scorer = gpt.load_scorer(args.rm or gpt.made_by("reward_model", args, "a minute"), args.device)
    if scorer.transformer.config.tokenizer != tok.name:
        raise SystemExit("policy and reward model must share a tokenizer: one reads what the other wrote")
    reward = functools.partial(learned_reward, scorer.requires_grad_(False), tok)
    # Policy, value head and beta in one module: one optimizer, one checkpoint.
    agent = nn.ModuleDict({"policy": policy, "value": nn.Linear(policy.config.n_embd, 1)}).to(args.device)
    nn.init.zeros_(agent.value.weight)
    nn.init.zeros_(agent.value.bias)
    beta = 0.0 if args.break_ == "no_kl" else args.beta
    agent.register_buffer("beta", torch.tensor(beta, device=args.device))
    run = gpt.Run(args)
    P, B, longest = args.prompts, args.prompts * args.answers, args.max_tokens
    problems = task.problems(max_steps * P, args.seed, "train")
    held_out = task.problems(args.problems, args.seed, "test")
    room = policy.config.block_size - max(len(tok.prompt(p.text)) for p in problems + held_out)
    if longest > room:
        raise SystemExit(f"--max_tokens {longest}: the longest problem leaves {room} tokens of the context")

    # ---- the loop
    optimizer = gpt.make_optimizer(policy, args.lr)
    # The value head is new: it has everything to learn, and may take larger steps than the policy.
    optimizer.add_param_group({"params": list(agent.value.parameters()), "lr": 1e-3})
    show = ("reward", "gold", "kl", "length")  # of the batch; the held-out problems are in "test_gold" & co.
    for step in run.steps(max_steps, agent, optimizer, save_every=25, show=show):
        # Often at first, where things happen fast.
        if step % (25 if step < 300 else 100) == 0 or step == max_steps:
            results, answers = evaluate(policy, ref, reward, tok, held_out, args.seed, step, longest)
            run.say(step, **results)
            shown = [f"{a.text} ({'right' if a.right else 'wrong'})" for a in answers[:8]]
            run.samples(step, [(p.text, text) for p, text in zip(held_out, shown)])
        if step == max_steps:
            break
        # ---- rollouts: some answers to each of P prompts, B in all
        batch = [p for p in problems[step * P : (step + 1) * P] for _ in range(args.answers)]
        questions, golds = [p.text for p in batch], [p.answer for p in batch]
        generator = gpt.rng(args.seed, "rollouts", step)
        answers = gpt.solve(policy, tok, questions, golds, args.temperature, generator, longest, batch=B)
        prompts, completions = [tok.prompt(q) for q in questions], [a.ids for a in answers]
        # ---- what the rollouts are worth: fixed for all updates on them
        with torch.no_grad():
            # Every pass divides by the temperature sampled at: pi_old, pi and pi_ref are then the same
            # kind of thing, and the ratio is 1 where nothing was learned yet.
            old_logps, mask, old_values = gpt.completion_logps(
                policy, prompts, completions, args.temperature, agent.value
            )  # (B, N) each
            ref_logps, _ = gpt.completion_logps(ref, prompts, completions, args.temperature)
            scores = reward(batch, answers)  # (B,)
            if args.break_ == "sign_flip":
                # "The reward model gives costs now", and nobody told the loop, which maximises. The leash
                # and the price of an answer without an end are of this file, and still hold.
                ended = torch.tensor([a.ended for a in answers], device=scores.device)
                scores = torch.where(ended, -scores, scores)
            rewards = token_rewards(scores, old_logps, ref_logps, mask, agent.beta)
            advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
            advantages = whiten(advantages, mask)
            kl = (old_logps - ref_logps).sum(1).mean()
        # ---- several epochs of minibatches over the same rollouts
        clipped, approx_kl = [], []
        for epoch in range(args.epochs):
            order = torch.randperm(B, generator=gpt.rng(args.seed, "minibatches", step, epoch))
            for rows in order.split(args.minibatch):
                rows = rows.sort().values  # answers to the same prompt side by side: it is computed once
                few = [prompts[i] for i in rows], [completions[i] for i in rows]
                logps, m, values = gpt.completion_logps(policy, *few, args.temperature, agent.value)
                # The longest answer of the minibatch may be shorter than that of the batch: cut the columns.
                old, old_v, adv, ret = (
                    x[rows.to(x.device), : m.shape[1]] for x in (old_logps, old_values, advantages, returns)
                )
                pg_loss = policy_loss(logps, old, adv, m, args.clip)
                v_loss = value_loss(values, old_v, ret, m, args.clip)
                loss = pg_loss + args.value_coefficient * v_loss
                optimizer.zero_grad()
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    ratio = torch.exp(logps - old)[m]  # (M,)
                    clipped.append(((ratio - 1).abs() > args.clip).float().mean())
                    approx_kl.append((ratio - 1 - ratio.log()).mean())  # k3 of pi_old against pi
        # ---- the dashboard
        if args.target_kl:
            agent.beta.fill_(adapt(agent.beta.item(), kl.item(), args.target_kl, B))
        run.log(
            step,
            reward=scores.mean(),
            gold=sum(a.right for a in answers) / B,
            kl=kl,
            entropy=-old_logps[mask].mean(),  # an estimate, from the sampled tokens alone
            policy_loss=pg_loss,
            value_loss=v_loss,
            grad_norm=grad_norm,
            clip_fraction=sum(clipped) / len(clipped),
            approx_kl=sum(approx_kl) / len(approx_kl),
            explained_variance=explained_variance(returns[mask], old_values[mask]),
            length=mask.sum(1).float().mean(),
            unfinished=1 - sum(a.ended for a in answers) / B,
            beta=agent.beta.clone(),
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
    p = argparse.ArgumentParser(prog="ppo.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="policy and reference: a folder or gpt2, ... (default: what sft.py makes)")
    add("--rm", help="the reward model's folder (default: what reward_model.py makes)")
    add("--max_steps", type=int, default=10, help="batches of rollouts; constant step size, so that a\n"
        "longer run begins as the shorter one does (breaks: 200, both runs)")
    add("--prompts", type=int, default=8, help="prompts a step")
    add("--answers", type=int, default=4, help="answers a prompt: PPO needs only one, but the prompt's\n"
        "share of the computation is paid once")
    add("--minibatch", type=int, default=16, help="answers an update")
    add("--epochs", type=int, default=2, help="passes over each batch of rollouts (4 are usual, and slow)")
    add("--lr", type=float, default=3e-5, help="so small that the peak can be seen: see README")
    add("--beta", type=float, default=0.03, help="weight of the KL penalty, 0 for none")
    add("--target_kl", type=float, default=0.0, help="adapt beta to stay this far from the reference, in\n"
        "nats an answer (0: beta stays as it is)")
    add("--clip", type=float, default=0.2, help="how far ratio and value may leave their old place")
    add("--gamma", type=float, default=1.0, help="discount: answers are short, the end counts in full")
    add("--lam", type=float, default=0.95, help="GAE: 1 trusts what came later, 0 the value function")
    add("--value_coefficient", type=float, default=0.1, help="weight of the value loss: it pulls on the\n"
        "transformer that the policy needs as well")
    add("--temperature", type=float, default=1.0, help="of sampling *and* of scoring")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points")
    return p
# fmt: on


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = gpt.parse("ppo", parser(), argv, BREAKS)
    if args.problems < 2:
        raise SystemExit("--problems must be at least 2: the peak is chosen on one half of them")
    if args.target_kl and not args.beta:
        raise SystemExit("--target_kl changes --beta by a factor: with --beta 0 it stays 0")
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    if args.break_ == "no_kl" and not args.beta:
        raise SystemExit("--break no_kl: with these flags the clean run is broken already")
    if args.break_ != "reward_hacking" and args.max_steps == 10:
        argv = [*argv, "--max_steps", str(BREAK_STEPS)]
    args = gpt.parse("ppo", parser(), argv, BREAKS)
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
        cure = "python ppo.py --max_steps N   (N the step of the peak; a larger --beta gets there slower)"
    elif args.break_ == "no_kl":
        claims = [
            ("farther from the reference: KL at least 1.5 times", B["kl"] > 1.5 * C["kl"]),
            # The mean of 500 scores of spread 1 errs by .045, the difference of two such means by .063.
            ("the reward is no lower (0.1 is within the error)", B["reward"] >= C["reward"] - 0.1),
            (
                "right answers: 10 points or more below, after as many steps",
                B["end_gold"] < C["end_gold"] - 0.1,
            ),
        ]
        cure = "python ppo.py   (and stop early: the leash slows the walk, see README)"
    else:
        claims = [
            (
                "the plotted reward climbs",
                B["batch_reward"] > [m for m in broken.metrics if "reward" in m][0]["reward"],
            ),
            ("the answers still end, more than 95 % of them", B["ended"] > 0.95),
            ("right answers: 10 points or more below the start", B["end_gold"] < B["start_gold"] - 0.1),
        ]
        panels[0] = ("dashboard: reward as logged", "mean of a batch", "reward")
        # Who logs costs as rewards has no true score on the dashboard.
        outside = {"true score on held-out problems": dashboard.pop("reward on held-out problems")} | outside
        cure = "python ppo.py   (read ten samples before reading the curve)"
    gpt.break_report(clean, broken, dashboard, outside, claims, cure, panels)


if __name__ == "__main__":
    main()
