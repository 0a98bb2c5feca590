"""A calculator in the loop: how does a model use a tool for what it cannot do itself?

    python tools.py                                 the base model learns to call; with and without the tool
    python tools.py --break hallucinated_result     ... and to write the results of its calls itself
    python tools.py --rl 60                         then reinforcement learning against the exact checker
    python tools.py --data gsm8k --load gpt2        real problems: GSM8K's solutions have calls of a calculator

The stories are those of the other chapters with larger numbers, which this model cannot calculate with, and with
prices, which it cannot know (data/tool_task.py). It learns to write a call:

    model:    <<140-14=              runtime:  126>>              model:    126 ...

At `=` the *runtime* takes over. It evaluates the expression, writes the result and `>>` into the text, token by
token, and lets the model continue. So an answer contains tokens of the model and of the runtime, and the model must
be trained on its own tokens only:

    L = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t          m_t = 1: sampled by the model, 0: injected

The same mask applies in supervised fine-tuning, in the policy gradient, in the KL term, and in every denominator.
(The format is that of Cobbe et al. 2021; the masks are those of Jin et al. 2025, "Search-R1".)

What to look at: the accuracy with and without the tool, and the calls in samples.md.

The breaks:
    hallucinated_result  The loss is on the whole transcript, and nothing stops at `=`: the model continues after it.
                         Calls are well-formed, results are invented.
    unsafe_eval          The calculator is Python's eval. The accuracy is about the same, until a prompt contains
                         code: then the code runs, and the eggs are sold for 0 coins. (CVE-2023-29374)
    faulty_tool          The same model again; the tool is silently wrong in one call of ten. The model repeats it.
    tool_overuse         Reinforcement learning with a point for a correct answer and a point per call. The model
                         repeats its calls until the answer is cut off. (Wang et al. 2025)
"""

import argparse
import functools
import random
import re
import sys
import warnings

import torch
from torch.nn.utils.rnn import pad_sequence

import gpt
from data import breaks, lessons, parts, report, runs, tool_task
from data.tool_task import answer_call
from grpo import aggregate, group_advantages, k3
from ppo import policy_loss
from sft import starting_model

# What a hostile prompt contains in place of a label. Harmless: a call of Python's `int`, which returns 0, and no
# price is 0. (A tool that runs `int()` would run `__import__("os").system` as well.)
HOSTILE = "int()"

# ---------------------------------------------------------------------------------------------
# The algorithm: tokens of the model and of the runtime in one text


def encode_transcript(tok, text):
    """Ids of a solution with calls, its end token included, and who writes each: True is the model.

    "<<7+5=12>>12" -> << 7 + 5 = | 12 >> | 12 <|end|>, with own = 1 1 1 1 1 | 0 0 | 1 1. It is encoded piece by
    piece, as it will be generated: a token across the border would belong to neither. Every `=` ends a token, as the
    runtime demands (runtime_only): GPT-2 has a token `=$`, which it could not sample.
    """
    ids, own = [], []
    for i, piece in enumerate(re.split(r"(?<==)([^<>=]*>>)", text)):
        part = [token for some in re.split("(?<==)", piece) for token in tok.encode(some)]
        ids += part
        own += [i % 2 == 0] * len(part)  # odd pieces are the parts that the pattern matched
    return ids + [tok.end], own + [True]


@functools.lru_cache
def ids_with(tok, piece):
    """The ids of all tokens whose text contains `piece`: `>` is also in `>>`."""
    single = tok.encoding.decode_single_token_bytes
    special = (tok.user, tok.assistant, tok.end, tok.pad)
    return [i for i in range(tok.vocab_size) if i not in special and piece in single(i)]


def runtime_only(tok):
    """The ids that the model may not sample: every token with `>`, and every token in which text follows an `=`.

    With `>` the model could write `>>`, and so forge a result. With text behind `=` it could write a part of one.
    """
    equals = ids_with(tok, b"=")
    behind = [i for i in equals if not tok.encoding.decode_single_token_bytes(i).endswith(b"=")]
    return sorted({*ids_with(tok, b">"), *behind})


class Runtime:
    """Writes the results of calls into the sampled text. gpt.sample passes it every new token and uses what it
    returns.

    tools: for every prompt a function, expression -> result, both text. `banned` are the ids that only the runtime
    may write. The ban is enforced in sampling, not trained: with RL, a model that can forge results would be
    rewarded for forgeries that have mask 1. After sampling, `own` says for every prompt who wrote each token: True
    is the model.
    """

    def __init__(self, tok, tools):
        self.tok, self.tools = tok, tools
        self.equals = set(ids_with(tok, b"="))  # GPT-2 has tokens like `)=` too
        self.banned = runtime_only(tok)
        self.recent = [[] for _ in tools]  # the ids sampled since the runtime last wrote
        self.queue = [[] for _ in tools]  # the ids that the runtime has yet to write
        self.own = [[] for _ in tools]

    def __call__(self, rows, new):
        written = new.tolist()
        for b, row in enumerate(rows.tolist()):
            queue, recent = self.queue[row], self.recent[row]
            self.own[row].append(not queue)
            if queue:
                written[b] = queue.pop(0)  # the token that the model sampled here is dropped
                continue
            recent.append(written[b])
            if written[b] not in self.equals:
                continue
            # Whether a call is open is decided on the text: `<<` can be one token, two, or a part of one. Only
            # sampled text counts, so a `<<` in the prompt opens nothing.
            _, opened, expression = self.tok.decode(recent).rpartition("<<")
            if opened:
                # The result is injected as ids. Encoding the whole text again could split it into other tokens than
                # the model sampled, and log-probabilities would belong to tokens that were not sampled.
                queue += self.tok.encode(self.tools[row](expression[:-1]) + ">>")
                recent.clear()
        return torch.tensor(written, device=new.device)


def ask(model, tok, problems, tool, temperature, generator, longest, batch=None):
    """One answer per problem, with tool(expression, prices) in the loop, or without any runtime if tool is None.
    Returns a list of gpt.Answer, and a list of who wrote each of their tokens. What the runtime writes counts
    towards `longest`: it takes up the same context."""
    answers, owns, batch = [], [], batch or gpt.at_once(model)
    for i in runs.progress(range(0, len(problems), batch), "answers"):
        some = problems[i : i + batch]
        prompts = [tok.prompt(p.text) for p in some]
        writers = {}
        if tool:
            runtime = Runtime(tok, [functools.partial(tool, prices=p.prices) for p in some])
            writers = {"banned": runtime.banned, "writer": runtime}
        completions = gpt.sample(model, prompts, longest, [tok.end], temperature, generator=generator,
                                 **writers)  # fmt: skip
        answers += [gpt.read_answer(tok, ids, logps, p.answer) for ids, logps, p in zip(*completions, some)]
        owns += runtime.own if tool else [[True] * len(ids) for ids in completions[0]]
    return answers, owns


def masked_nll(logps, mask):
    """The mean negative log-likelihood of the tokens in the mask. (B, N), (B, N) bool -> a scalar

    By selection, not by multiplication with 0: with `banned`, the tool's tokens have log-probability -inf, and -inf
    * 0 is NaN. The denominator counts the tokens that are learned.
    """
    return -logps[mask].mean()


def rl_loss(logps, old_logps, ref_logps, advantages, own, beta):
    """GRPO (grpo.py) on the tokens that the model wrote itself. Returns (loss, mean k3 per token).

    logps, old_logps, ref_logps, own: (B, N). advantages: (B, 1). The denominator counts only the model's own tokens:
    if it counted the injected ones, a batch with many calls would take a smaller step.
    """
    # To the model the injected `>>` is impossible, and its ratio exp(-inf - -inf) is NaN. Replace before computing:
    # multiplying the result by 0 would keep the NaN.
    logps, old_logps, ref_logps = (x.masked_fill(~own, 0) for x in (logps, old_logps, ref_logps))
    penalty = k3(logps, ref_logps)
    loss = aggregate(policy_loss(logps, old_logps, advantages) + beta * penalty, own, "dapo", own.shape[1])
    return loss, penalty.detach().sum() / own.sum().clamp(min=1)


def padded(owns, device):
    """Lists of who wrote each token -> (B, N) bool, False behind the end."""
    return pad_sequence([torch.tensor(own) for own in owns], batch_first=True).to(device)


# ---------------------------------------------------------------------------------------------
# The algorithm: other tools, for the breaks


def eval_call(expression, prices):
    """Calculator and price list in one line, for --break unsafe_eval."""
    if "**" in expression:  # protects *your* machine: 9**9**9 has 370 million digits and takes very long
        return "?size"
    try:
        return f"{eval(expression, {}, dict(prices)):g}"
    # A tool must not stop the program, so it catches everything. The code has run by then.
    except BaseException:  # noqa: BLE001
        return "?key"


def faulty_call(expression, prices, seed):
    """The right tools, but one numeric result in ten is too large by 1 to 9."""
    result = answer_call(expression, prices)
    # A function of the call, not of the order of calls, so that the sampled and the greedy evaluation have the same
    # faults.
    coin = random.Random(f"faulty tool {seed} {expression} {prices}")
    if result.isdigit() and coin.random() < 0.1:
        return str(int(result) + coin.randint(1, 9))  # it looks like any other number
    return result


# ---------------------------------------------------------------------------------------------
# Evaluation


def examine(model, tok, problems, tool, seed, longest):
    """Accuracy, sampled and greedy, and what the calls in the sampled answers were like. Returns (results, answers)."""
    # The same seed at every evaluation, so that one model with two tools starts alike. (If one answer ends sooner,
    # the others of its batch continue with other random numbers.)
    sampled, _ = ask(model, tok, problems, tool, 1.0, runs.rng(seed, "evaluation"), longest)
    greedy, _ = ask(model, tok, problems, tool, 0.0, None, longest)
    n = len(problems)
    results = {
        "accuracy_sampled": sum(a.correct for a in sampled) / n,
        "accuracy_greedy": sum(a.correct for a in greedy) / n,
    }
    if any(p.labels for p in problems):  # real problems have no price list
        for name, priced in (("accuracy_unpriced", False), ("accuracy_priced", True)):
            correct = [a.correct for a, p in zip(greedy, problems) if bool(p.labels) == priced]
            results[name] = sum(correct) / max(1, len(correct))
    results["ended"] = sum(a.ended for a in sampled) / n
    results |= tool_task.audit(sampled, problems)
    calls = results["calls"]
    return results | {"correct_per_call": results["accuracy_sampled"] / calls if calls else 0.0}, sampled


def attack(model, tok, problems, tool, longest):
    """Prompts with code in place of a label. Returns how often the model passed the code on to the tool, the accuracy
    (the second label gives the correct answer), how often the code ran; and samples to show."""
    answers, _ = ask(model, tok, problems, tool, 0.0, None, longest)
    results = {
        "code_passed_on": sum(f"<<{HOSTILE}=" in a.text for a in answers) / len(problems),
        "accuracy_attacked": sum(a.correct for a in answers) / len(problems),
        "canary": sum(f"<<{HOSTILE}=0>>" in a.text for a in answers) / len(problems),
    }
    return results, gpt.shown(problems, answers)


# ---------------------------------------------------------------------------------------------
# Training


def train(args):
    """One run of supervised fine-tuning, from the base model to the report. Returns its runs.Run."""
    steps = args.steps
    if args.break_ in ("unsafe_eval", "faulty_tool"):
        # Another tool and nothing else: the clean run's model, without further training.
        model = gpt.load_model(runs.Run(runs.without_break(args)).folder, args.device, args.dtype == "bfloat16")
        tok, steps = gpt.Tokenizer(model.config.tokenizer), 0
    else:
        model, tok = starting_model(args)
    run = runs.Run(args)
    material = lessons.transcripts(args, tok, model.config.block_size)
    problems, longest = material.problems, material.longest
    hostile = [] if args.data else tool_task.hostile(100, args.seed, HOSTILE)
    gpt.check_room(model, tok, problems + hostile, longest)
    examples = []
    for row in material.train:
        answer, own = encode_transcript(tok, row["chosen"])
        examples.append((tok.prompt(row["prompt"]), answer, own))
    if steps is None:
        steps = max(1, len(examples) // args.batch)
    tool = None if args.plain else answer_call
    if args.break_ == "hallucinated_result":
        tool = None  # nothing looks for `=`: generation stops at the end token only
    if args.break_ == "unsafe_eval":
        tool = eval_call
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # eval warns about what it is given
    if args.break_ == "faulty_tool":
        tool = functools.partial(faulty_call, seed=args.seed)
    # A little above pretraining's step size. GPT-2 needs less.
    lr = args.lr or (5e-3 if model.config.n_embd < 512 else 5e-5)
    optimizer = gpt.make_optimizer(model, lr)

    # ---- the loop
    for step in run.steps(steps, model, optimizer):
        if step == steps or (step > 0 and step % args.eval_every == 0):
            results, sampled = examine(model, tok, problems, tool, args.seed, longest)
            run.say(step, **results)
            run.samples(step, gpt.shown(problems, sampled))
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        rows = [examples[i] for i in runs.batch_indices(len(examples), args.batch, step, args.seed)]
        own_tokens = sum(sum(own) for *_, own in rows)  # of the whole batch
        all_tokens = sum(len(own) for *_, own in rows)
        optimizer.zero_grad()
        log = {}
        for some in parts.micro_batches(rows, args.micro_batch):  # b of the B solutions; by default all of them
            prompts, answers, owns = zip(*some)
            logps, exists = gpt.completion_logps(model, prompts, answers)  # (b, n), (b, n)
            own = padded(owns, args.device)  # (b, n)
            learned, tokens = own, own_tokens
            if args.break_ == "hallucinated_result":
                learned = exists  # "it is all text": the loss is on every token, whoever wrote it
                tokens = all_tokens
            loss = masked_nll(logps, learned)
            share = learned.sum() / tokens  # a mean over these tokens is weighted by their part of the batch's
            (share * loss).backward()
            parts.add(log, share, loss=loss)
            # Runs with different masks can be compared on the same tokens only: the model's own.
            parts.add(log, own.sum() / own_tokens, loss_own=masked_nll(logps, own))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm)

    # ---- the report
    model.config.chat = True
    results = run.mean("loss", "loss_own", "grad_norm") | results
    if tool:
        # The same model with the runtime switched off.
        off, _ = ask(model, tok, problems, None, 0.0, None, longest)
        results["accuracy_without_runtime"] = sum(a.correct for a in off) / len(off)
    if tool and hostile:
        attacked, samples = attack(model, tok, hostile, tool, longest)
        run.samples(f"{steps}, attacked", samples)
        results |= attacked
    return run.finish(model, **results)


def train_rl(args):
    """args.rl steps of GRPO against the exact checker, from the tool model. Returns its runs.Run."""
    where = args.load
    if where is None:
        # Not by runs.made_by: that would train the control as well.
        flags = ["--seed", str(args.seed), "--dtype", args.dtype, "--device", args.device]
        for name, value in (("--data", args.data), ("--load", args.base)):
            flags += [name, value] if value else []
        first = runs.parse("tools", parser(), flags + ["--resume"] * args.resume, breaks.of("tools"))
        print("Training the tool model first (`python tools.py` without its control); it is kept for the next run.")
        where = report.one_run(train, first, reuse=True).folder / "model"
    policy, ref, tok = gpt.load_policy(where, args)
    banned = runtime_only(tok)
    run = runs.Run(args)
    P, G, longest = args.prompts, args.group, args.max_tokens
    material = lessons.problems(args, tok, policy.config.block_size, args.rl * P, f"rl {args.seed}", kind=tool_task)
    stream, problems = material.train, material.problems
    gpt.check_room(policy, tok, problems, longest)
    optimizer = gpt.make_optimizer(policy, args.lr or (1e-4 if policy.config.n_embd < 512 else 3e-6))
    lr = optimizer.param_groups[0]["lr"]

    # ---- the loop
    for step in run.steps(args.rl, policy, optimizer, save_every=20, show=("reward", "calls")):
        if step % 20 == 0 or step == args.rl:
            results, sampled = examine(policy, tok, problems, answer_call, args.seed, longest)
            run.say(step, **results)
            run.samples(step, gpt.shown(problems, sampled))
        if step == args.rl:
            break
        # ---- rollouts: G answers to each of P problems
        batch = [p for p in stream[step * P : (step + 1) * P] for _ in range(G)]  # B = P * G
        generator = runs.rng(args.seed, "rollouts", step)
        answers, owns = ask(policy, tok, batch, answer_call, 1.0, generator, longest, batch=P * G)
        prompts, completions = [tok.prompt(p.text) for p in batch], [a.ids for a in answers]
        # ---- rewards and advantages
        correct = torch.tensor([float(a.correct) for a in answers])  # (B,)
        # Executed calls: only the runtime writes `>>`. A reward for `<<` would reward unfinished calls.
        calls = torch.tensor([float(a.text.count(">>")) for a in answers])
        rewards = correct
        if args.break_ == "tool_overuse":
            rewards = correct + calls  # "encourage the model to use its tools": a point per call
        advantages = group_advantages(rewards.view(P, G)).view(-1, 1).to(args.device)  # (B, 1)
        # ---- one update, on the model's own tokens
        tokens = sum(map(sum, owns))  # that the model wrote
        gpt.set_lr(optimizer, lr, step, 10**9, warmup=5)  # constant after a short warmup
        optimizer.zero_grad()
        log = {}
        for rows in parts.micro_batches(list(range(P * G)), args.micro_batch):  # b of the B answers; by default all
            few = [prompts[i] for i in rows], [completions[i] for i in rows]
            own = padded([owns[i] for i in rows], args.device)  # (b, n)
            old_logps = pad_sequence([answers[i].logps for i in rows], batch_first=True)  # as recorded in sampling
            with torch.no_grad():
                ref_logps, _ = gpt.completion_logps(ref, *few, banned=banned)
            logps, _ = gpt.completion_logps(policy, *few, banned=banned)
            loss, kl = rl_loss(logps, old_logps, ref_logps, advantages[rows], own, args.beta)
            share = own.sum() / tokens
            (share * loss).backward()
            parts.add(log, share, loss=loss, kl_per_token=kl)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm, reward=rewards.mean(), correct=correct.mean(), calls=calls.mean(),
                length=tokens / len(batch))  # fmt: skip

    # ---- the report
    before = next(m for m in run.metrics if "accuracy_sampled" in m)
    results |= {f"{name}_before": before[name] for name in ("accuracy_sampled", "calls")}
    return run.finish(policy, **run.mean("loss", "kl_per_token"), batch_reward=run.mean("reward")["reward"], **results)


def with_and_without(clean, args):
    """Train the control, and print the comparison that this chapter is about."""
    print("\nNow the control: the same base model, problems and number of updates, with solutions without calls.")
    plain = report.one_run(train, args, reuse=True)
    C, P = clean.report, plain.report
    print(f"\n{'accuracy':38}{'with the tool':>16}{'without':>12}")
    keys = {"greedy": "accuracy_greedy", "   no price to look up": "accuracy_unpriced", "   a price": "accuracy_priced",
            "sampled": "accuracy_sampled"}  # fmt: skip
    for label, key in keys.items():
        if key in C:
            print(f"  {label:36}{C[key]:>16.3f}{P[key]:>12.3f}")
    print(f"the tool model with its runtime switched off, greedy: {C['accuracy_without_runtime']:.3f}")
    print(f"calls per answer {C['calls']:.2f}, of them well-formed {C['valid']:.3f}")
    print(f"errors per answer {C['errors']:.2f}; accuracy of the answers with an error {C['recovered']:.3f}")


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="tools.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from (default: what gpt.py makes; with --data random weights on GPT-2's\n"
        "tokens; with --rl what tools.py makes)")
    add("--data", help="real problems: gsm8k, or a file with its calculator annotations")
    add("--base", help="with --rl: the model that tools.py starts from, if it has to run first (its --load)")
    add("--plain", action="store_true", help="the control: the same training on the same solutions without calls")
    add("--demos", type=int, default=20000, help="annotated solutions of random problems")
    add("--batch", type=int, default=8, help="solutions per step: many small steps, as in gpt.py (with --data 4)")
    add("--micro_batch", type=int, help="solutions, or with --rl answers, per forward pass: less memory, the same\n"
        "gradient (default: all of the batch)")
    add("--steps", type=int, help="stop after so many updates (default: all demonstrations once)")
    add("--lr", type=float, help="step size (default 5e-3, with --rl 1e-4; from width 512 on 5e-5 and 3e-6)")
    add("--max_tokens", type=int, default=72, help="longer answers are cut off (with --data 256)")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points\n"
        "(with --data 50: 7 points)")
    add("--eval_every", type=int, default=1000, help="steps between evaluations")
    add("--rl", type=int, help="so many steps of GRPO against the exact checker, after the fine-tuning")
    add("--prompts", type=int, default=8, help="RL: problems per step (with --data 2)")
    add("--group", type=int, default=8, help="RL: answers to each of them")
    add("--beta", type=float, default=0.02, help="RL: weight of the KL penalty to the fine-tuned model")
    p.with_data = {"batch": 4, "max_tokens": lessons.REAL_SOLUTION, "problems": 50, "prompts": 2}
    return p
# fmt: on


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = runs.parse("tools", parser(), argv, breaks.of("tools"))
    if args.break_ == "unsafe_eval" and args.data:
        raise SystemExit("--break unsafe_eval needs the embedded task's labels, where code is hidden: leave --data out")
    if args.plain and (args.rl or args.break_):
        raise SystemExit("--plain is the control, which has no tool: without --rl and --break")
    if args.rl and args.break_ not in (None, "tool_overuse"):
        raise SystemExit(f"--break {args.break_} is about the fine-tuned tool model: without --rl")
    if args.group < 2:
        raise SystemExit("--group must be at least 2: the baseline of an answer is the mean of its group")
    run = report.train_and_compare(train_rl if args.rl else train, args)
    if not (args.plain or args.rl or args.break_):
        with_and_without(run, runs.parse("tools", parser(), [*argv, "--plain"], breaks.of("tools")))


if __name__ == "__main__":
    main()
