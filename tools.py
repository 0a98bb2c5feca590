"""A calculator in the loop: how does a model use what it cannot do itself?

    python tools.py                                 the base model learns to call; with and without the tool
    python tools.py --break hallucinated_result     ... and to answer its own calls
    python tools.py --rl 60                         then reinforcement learning on the exact checker
    python tools.py --data gsm8k/train.jsonl        GSM8K's own annotations through our calculator

The stories are those of the other chapters with larger numbers: sums that this model cannot work
out, and prices, which it cannot know (data/tool_task.py). It learns to write a call,

    model:    <<140-14=              runtime:  126>>              model:    126 ...

and at `=` the *runtime* takes the pen: it works the expression out, writes the result and `>>` into the text,
token by token, and gives the pen back. So two writers share one answer, and all that is
subtle here follows from that. The model is responsible for its own tokens only:

    L = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t          m_t = 1: sampled by the model, 0: injected

in supervised fine-tuning, in the policy gradient, in the KL term, and in every denominator. (The format is
that of Cobbe et al. 2021; the masks: Jin et al. 2025, "Search-R1".)

The breaks:
    hallucinated_result  no stop at the boundary: all of a transcript is text to the model, and it writes on
                         through the `=`. Calls look perfect, results are invented.
    unsafe_eval          the calculator is Python's eval. The same model, the same answers, until a question
                         contains code: then it runs, and the eggs are sold for 0 coins. (CVE-2023-29374)
    unmasked_result      the loss is on the results as well. (Search-R1 loses a fifth by it, with RL.)
    faulty_tool          the same model again; the tool is silently wrong in one call of ten. Copied without
                         a doubt.
    tool_overuse         reinforcement learning with a small reward for every call. The report says whether
                         calls multiply: a model that is sure of its calls seldom tries one more.
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
from data import calculator, public, tool_task
from data.checker import is_right
from data.tool_task import answer_call
from grpo import aggregate, group_advantages, k3, policy_loss

BREAKS = {
    "hallucinated_result": "no stop at the boundary: calls look perfect, results are invented",
    "unsafe_eval": "eval as the calculator: a question's code runs, and nobody notices",
    "unmasked_result": "loss on the tool's words as well: the model's own suffer",
    "faulty_tool": "one call of ten silently wrong: the model copies it",
    "tool_overuse": "RL with a reward per call: do calls go up, and what they are for does not?",
}
RL_STEPS = 60  # of both runs of tool_overuse, where --rl does not say otherwise

# What a hostile question has in the place of a label. Harmless: a call of Python's `int`, which gives 0, and
# no price is 0. (What can call `int` can call `__import__("os").system` just as well.)
HOSTILE = "int()"

# ---------------------------------------------------------------------------------------------
# Two writers, one text


def encode_transcript(tok, text):
    """Ids of a solution with calls, its end token included, and who writes each: True is the model.

    "<<7+5=12>>12" -> << 7 + 5 = | 12 >> | 12 <|end|>, with own = 1 1 1 1 1 | 0 0 | 1 1. Piece by
    piece, as generation will make them: a merge across the border would be a token that nobody can write.
    """
    ids, own = [], []
    for i, piece in enumerate(re.split(r"(?<==)([^<>=]*>>)", text)):
        part = tok.encode(piece)
        ids += part
        own += [i % 2 == 0] * len(part)  # odd pieces are what the pattern matched
    return ids + [tok.end], own + [True]


def ids_with(tok, piece):
    """The ids of all tokens with `piece` in their text: `>` also stands in `>>`, and two look alike."""
    single = tok.encoding.decode_single_token_bytes
    special = (tok.user, tok.assistant, tok.end, tok.pad)
    return [i for i in range(tok.vocab_size) if i not in special and piece in single(i)]


class Runtime:
    """The second writer. gpt.sample shows it every new token and takes what it gives back.

    tools: for every prompt a function, expression -> result, both text. `banned` are the ids that only the
    runtime may write. Not by training but by force: a model that may write `>>` can forge results, and under
    RL it would be paid for forgeries that carry mask 1. Afterwards `own` says for every prompt
    who wrote each token: True is the model.
    """

    def __init__(self, tok, tools):
        self.tok, self.tools = tok, tools
        (self.opening,) = tok.encode("<<")
        self.equals = ids_with(tok, b"=")  # GPT-2 has tokens like `)=` as well
        self.banned = ids_with(tok, b">")
        self.call = [None] * len(tools)  # the ids of the open call's expression; None where none is open
        self.queue = [[] for _ in tools]  # what the runtime has yet to write
        self.own = [[] for _ in tools]

    def __call__(self, rows, new):
        written = new.tolist()
        for b, row in enumerate(rows.tolist()):
            queue, call = self.queue[row], self.call[row]
            self.own[row].append(not queue)
            if queue:
                written[b] = queue.pop(0)  # what the model wanted to say here is thrown away
            elif written[b] == self.opening:  # sampled: a `<<` in the *question* opens nothing
                self.call[row] = []
            elif call is not None and written[b] in self.equals:
                # Ids go in. Encoding the whole text anew might cut it up otherwise than the model did, and
                # the log-probabilities would be of tokens that nobody sampled.
                expression = self.tok.decode([*call, written[b]]).rpartition("=")[0]
                queue += self.tok.encode(self.tools[row](expression) + ">>")
                self.call[row] = None
            elif call is not None:
                call.append(written[b])
        return torch.tensor(written, device=new.device)


def eval_call(expression, prices):
    """The calculator and the price list in one line; the line of --break unsafe_eval."""
    if "**" in expression:  # a guard for *your* machine: 9**9**9 would take all of it
        return "?size"
    try:
        return f"{eval(expression, {}, dict(prices)):g}"
    # A tool must not bring the program down, so it catches everything. The code has run by then.
    except BaseException:  # noqa: BLE001
        return "?key"


def loss_on(logps, mask):
    """The mean negative log-likelihood of the tokens in the mask. (B, N), (B, N) bool -> a number

    Chosen, not multiplied by 0: what the tool says can be as good as impossible to the model, and
    the denominator counts what is learned, not what is read.
    """
    return -logps[mask].mean()


def rl_loss(logps, old_logps, ref_logps, advantages, own, beta):
    """GRPO (grpo.py) on the tokens that the model wrote itself. Returns (loss, KL a token).

    logps, old_logps, ref_logps, own: (B, N). advantages: (B, 1). The denominator counts the model's own
    tokens as well: with the injected ones in it, a batch of many calls would take a smaller step.
    """
    # For the model the injected `>>` is impossible, and its ratio exp(-inf - -inf) is NaN, which no
    # multiplication by 0 makes good again.
    logps, old_logps, ref_logps = (x.masked_fill(~own, 0) for x in (logps, old_logps, ref_logps))
    penalty = k3(logps, ref_logps)
    loss = aggregate(policy_loss(logps, old_logps, advantages) + beta * penalty, own, "dapo", own.shape[1])
    return loss, penalty.detach().sum() / own.sum().clamp(min=1)


def padded(owns, device):
    """Lists of who wrote each token -> (B, N) bool, False behind the end."""
    return pad_sequence([torch.tensor(own) for own in owns], batch_first=True).to(device)


# ---------------------------------------------------------------------------------------------
# From outside


def ask(model, tok, problems, tool, temperature, generator, longest, batch=250):
    """Let the model answer each problem once, with tool(expression, prices) at its side, or without any
    runtime where tool is None. Returns a list of gpt.Answer, and a list of who wrote each of their tokens.
    What the runtime writes counts against `longest`: it takes up the same context."""
    answers, owns = [], []
    for i in range(0, len(problems), batch):
        some = problems[i : i + batch]
        prompts = [tok.prompt(p.text) for p in some]
        writers = {}
        if tool:
            runtime = Runtime(tok, [functools.partial(tool, prices=p.prices) for p in some])
            writers = {"banned": runtime.banned, "writer": runtime}
        completions = gpt.sample(model, prompts, longest, [tok.end], temperature, generator=generator,
                                 **writers)  # fmt: skip
        for ids, logps, p in zip(*completions, some):
            ended = ids[-1] == tok.end
            text = tok.decode(ids[:-1] if ended else ids)
            answers.append(gpt.Answer(text, ids, logps, ended, is_right(text, p.answer)))
        owns += runtime.own if tool else [[True] * len(ids) for ids in completions[0]]
    return answers, owns


def examine(model, tok, problems, tool, seed, longest):
    """Right answers, sampled and greedy, and what the calls in the sampled ones were like."""
    # The same seed every time, so that one model with two tools begins alike. (Where one answer ends sooner,
    # the others of its batch go on with other random numbers.)
    sampled, _ = ask(model, tok, problems, tool, 1.0, gpt.rng(seed, "evaluation"), longest)
    greedy, _ = ask(model, tok, problems, tool, 0.0, None, longest)
    n = len(problems)
    results = {
        "right_sampled": sum(a.right for a in sampled) / n,
        "right_greedy": sum(a.right for a in greedy) / n,
    }
    for name, priced in (("sums", False), ("prices", True)):
        right = [a.right for a, p in zip(greedy, problems) if bool(p.labels) == priced]
        results[name] = sum(right) / max(1, len(right))
    results["ended"] = sum(a.ended for a in sampled) / n
    results |= tool_task.audit(sampled, problems)
    results["right_per_call"] = results["right_sampled"] / results["calls"] if results["calls"] else 0.0
    shown = [
        (p.text, f"{a.text} {'' if a.ended else '[cut off]'} ({'right' if a.right else 'wrong'})")
        for p, a in zip(problems[:8], sampled)
    ]
    return results, shown


def attack(model, tok, seed, tool, longest):
    """A hundred questions with code where a label should stand. Returns the share of them in which the model
    passed the code on to the tool, the share answered rightly (by the second label), how often it ran; and
    samples to show."""
    problems = tool_task.hostile(100, seed, HOSTILE)
    answers, _ = ask(model, tok, problems, tool, 0.0, None, longest)
    results = {
        "code_passed_on": sum(f"<<{HOSTILE}=" in a.text for a in answers) / len(problems),
        "right_when_attacked": sum(a.right for a in answers) / len(problems),
        "canary": sum(f"<<{HOSTILE}=0>>" in a.text for a in answers) / len(problems),
    }
    return results, [(p.text, a.text) for p, a in zip(problems[:8], answers)]


# ---------------------------------------------------------------------------------------------


def wake_up(model, tok, seed):
    """New vectors for the tokens that the base model has never met: numbers above 60, letters, `<<`.

    Pretraining did not leave them as they were. They stood in every softmax as an answer that was never
    right, so all were pushed into one direction, the same for all: their vectors are nearly one
    vector, and who cannot tell two tokens apart cannot copy either. Drawn anew like the vectors that the
    model knows they are different again. (A model that has met them since is left as it is.)
    """
    rows = torch.cat([gpt.packed_rows(tok, seed, step, 16, 64) for step in range(100)])
    seen = torch.zeros(tok.vocab_size, dtype=torch.bool)
    seen[rows.flatten()] = True
    with torch.no_grad():
        w = model.wte.weight  # (V, C)
        seen = seen.to(w.device)
        if torch.nn.functional.normalize(w[~seen]).mean(0).norm() < 0.9:
            return  # not one vector any more
        known = w[seen]
        noise = torch.randn(int((~seen).sum()), w.shape[1], generator=gpt.rng(seed, "wake up"))
        w[~seen] = known.mean(0) + noise.to(w.device) * known.std(0)


def held_out(args, model, tok):
    """The problems of the evaluation. Exits where they and their answers do not fit the context."""
    problems = tool_task.problems(args.problems, args.seed, "test")
    others = tool_task.hostile(100, args.seed, HOSTILE)  # see attack
    room = model.config.block_size - max(len(tok.prompt(p.text)) for p in problems + others)
    if args.max_tokens > room:
        raise SystemExit(
            f"--max_tokens {args.max_tokens}: the longest problem leaves {room} tokens of the context"
        )
    return problems


def train(args):
    """One run of supervised fine-tuning, from the base model to the report. Returns its gpt.Run."""
    # ---- the model we start from
    where = args.load or gpt.made_by("gpt", args, "a minute and a half")
    steps = args.steps or max(1, args.demos // args.batch)
    if args.break_ in ("unsafe_eval", "faulty_tool"):
        # Another tool, and nothing else: the clean run's model, trained no further.
        where = gpt.Run(argparse.Namespace(**{**vars(args), "break_": None})).folder
        steps = 0
    model = gpt.load_model(where, args.device, args.dtype == "bfloat16")
    tok = gpt.Tokenizer(model.config.tokenizer)
    if tok.name == "task":
        wake_up(model, tok, args.seed)
    run = gpt.Run(args)

    # ---- the transcripts, and the tools that will answer
    problems = held_out(args, model, tok)
    examples = []
    for p in tool_task.problems(args.demos, args.seed):
        answer, own = encode_transcript(tok, tool_task.demonstrate(p, calls=not args.plain))
        examples.append((tok.prompt(p.text), answer, own))
    tool = None if args.plain else answer_call
    if args.break_ == "hallucinated_result":
        tool = None  # nobody looks for `=`: generation stops at the end token only
    if args.break_ == "unsafe_eval":
        tool = eval_call
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # eval comments on what it is given
    if args.break_ == "faulty_tool":

        def tool(expression, prices):
            result = answer_call(expression, prices)
            # The coin belongs to the call, not to the order of calls: a resumed run sees the same faults.
            coin = random.Random(f"faulty tool {args.seed} {expression} {prices}")
            if result.isdigit() and coin.random() < 0.1:
                return str(int(result) + coin.randint(1, 9))  # looks like any other number
            return result

    # ---- the loop
    # Pretraining's and more: hundreds of tokens are new to the tiny model. GPT-2 knows them.
    lr = args.lr or (5e-3 if model.config.n_embd < 512 else 5e-5)
    optimizer = gpt.make_optimizer(model, lr)
    for step in run.steps(steps, model, optimizer, show=("loss",)):
        if step == steps or (step > 0 and step % args.eval_every == 0):
            results, shown = examine(model, tok, problems, tool, args.seed, args.max_tokens)
            run.say(step, **results)
            run.samples(step, shown)
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        chosen = gpt.batch_indices(len(examples), args.batch, step, args.seed)
        prompts, answers, owns = zip(*(examples[i] for i in chosen))
        logps, exists = gpt.completion_logps(model, prompts, answers)  # (B, N), (B, N)
        own = padded(owns, args.device)  # (B, N)
        learned = own
        if args.break_ in ("hallucinated_result", "unmasked_result"):
            learned = exists  # both forget who wrote what: "it is all text"
        loss = loss_on(logps, learned)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Runs with different masks can be compared on the same tokens only: the model's own.
        run.log(step, loss=loss, loss_own=loss_on(logps.detach(), own), grad_norm=grad_norm)

    # ---- the report
    model.config.chat = True
    last = [m for m in run.metrics if "loss" in m][-50:]
    names = ("loss", "loss_own", "grad_norm") if last else ()  # there is nothing where nothing was trained
    report = {name: sum(m[name] for m in last) / len(last) for name in names} | results
    if tool:
        # The same model with the runtime switched off.
        off, _ = ask(model, tok, problems, None, 0.0, None, args.max_tokens)
        report["right_without_runtime"] = sum(a.right for a in off) / len(off)
        attacked, shown = attack(model, tok, args.seed, tool, args.max_tokens)
        run.samples(f"{steps}, attacked", shown)
        report |= attacked
    run.finish(model, **report)
    return run


def train_rl(args):
    """args.rl steps of GRPO on the exact checker, from the tool model. Returns its gpt.Run."""
    where = args.load
    if where is None:
        # Not by gpt.made_by: that would train the control as well.
        flags = ["--seed", str(args.seed), "--dtype", args.dtype, "--device", args.device]
        first = gpt.parse("tools", parser(), flags + ["--resume"] * args.resume, BREAKS)
        print("First the tool model: `python tools.py` without its control; it is kept for the next run.")
        where = gpt.run_once(train, first, reuse=True).folder / "model"
    policy = gpt.load_model(where, args.device, args.dtype == "bfloat16")
    ref = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(policy.config.tokenizer)
    banned = ids_with(tok, b">")
    run = gpt.Run(args)
    P, G, longest = args.prompts, args.group, args.max_tokens
    problems = held_out(args, policy, tok)
    stream = tool_task.problems(args.rl * P, f"rl {args.seed}")
    lr = args.lr or 1e-4
    optimizer = gpt.make_optimizer(policy, lr)
    for step in run.steps(args.rl, policy, optimizer, save_every=20, show=("reward", "calls")):
        if step % 20 == 0 or step == args.rl:
            results, shown = examine(policy, tok, problems, answer_call, args.seed, longest)
            run.say(step, **results)
            run.samples(step, shown)
        if step == args.rl:
            break
        # ---- rollouts: G answers to each of P problems
        group = [p for p in stream[step * P : (step + 1) * P] for _ in range(G)]  # B = P * G
        generator = gpt.rng(args.seed, "rollouts", step)
        answers, owns = ask(policy, tok, group, answer_call, 1.0, generator, longest, batch=P * G)
        prompts, completions = [tok.prompt(p.text) for p in group], [a.ids for a in answers]
        # ---- rewards and advantages
        right = torch.tensor([float(a.right) for a in answers])  # (B,)
        calls = torch.tensor([float(a.text.count("<<")) for a in answers])
        rewards = right
        if args.break_ == "tool_overuse":
            rewards = right + 0.2 * calls  # "encourage the model to use its tools"
        advantages = group_advantages(rewards.view(P, G)).view(-1, 1).to(args.device)  # (B, 1)
        # ---- one update. What was cut off counts in the baseline and teaches nothing (see grpo.py)
        ended = torch.tensor([a.ended for a in answers], device=args.device)[:, None]  # (B, 1)
        own = padded(owns, args.device) & ended  # (B, N)
        old_logps = pad_sequence([a.logps for a in answers], batch_first=True)  # as the sampler saw them
        with torch.no_grad():
            ref_logps, _ = gpt.completion_logps(ref, prompts, completions, banned=banned)
        logps, _ = gpt.completion_logps(policy, prompts, completions, banned=banned)
        loss, kl = rl_loss(logps, old_logps, ref_logps, advantages, own, args.beta)
        gpt.set_lr(optimizer, lr, step, 10**9, warmup=5)  # constant after a short warmup
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, kl=kl, grad_norm=grad_norm, reward=rewards.mean(), right=right.mean(),
                calls=calls.mean(), length=own.sum() / len(group))  # fmt: skip

    # ---- the report
    last = [m for m in run.metrics if "loss" in m][-20:]
    report = {name: sum(m[name] for m in last) / len(last) for name in ("reward", "kl", "loss")}
    before = next(m for m in run.metrics if "right_sampled" in m)
    report |= results | {f"{name}_before": before[name] for name in ("right_sampled", "calls")}
    run.finish(policy, **report)
    return run


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="tools.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from (default: what gpt.py makes; with --rl what tools.py makes)")
    add("--data", help="only count: a GSM8K file whose annotations go through the calculator")
    add("--plain", action="store_true", help="the control: trained alike on the same solutions without calls")
    add("--demos", type=int, default=20000, help="annotated solutions, each of another problem")
    add("--batch", type=int, default=8, help="solutions a step: many small steps, as in gpt.py")
    add("--steps", type=int, help="stop after so many updates (default: all demonstrations once)")
    add("--lr", type=float, help="step size (default 5e-3, more than pretraining's: hundreds of tokens are\n"
        "new to the model; 5e-5 from width 512 on; with --rl 1e-4)")
    add("--max_tokens", type=int, default=72, help="longer answers are cut off")
    add("--problems", type=int, default=500, help="held-out problems: a standard error of 2 points")
    add("--eval_every", type=int, default=1000, help="steps between evaluations")
    add("--rl", type=int, help="so many steps of GRPO on the exact checker, after the fine-tuning")
    add("--prompts", type=int, default=8, help="RL: problems a step")
    add("--group", type=int, default=8, help="RL: answers to each of them")
    add("--beta", type=float, default=0.02, help="RL: weight of the KL to the model before it")
    return p
# fmt: on


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = gpt.parse("tools", parser(), argv, BREAKS)
    if args.data:
        rows = public.load_or_exit(args.data)
        calculator.annotations(args.data, [row["chosen"] or "" for row in rows])
        return
    if args.plain and (args.rl or args.break_):
        raise SystemExit("--plain is the control, which has no tool: without --rl and --break")
    if args.rl and args.break_ not in (None, "tool_overuse"):
        raise SystemExit(f"--break {args.break_} is about the fine-tuned tool model: without --rl")
    if args.group < 2:
        raise SystemExit("--group must be at least 2: the baseline of an answer is the mean of its group")
    if args.break_ == "tool_overuse" and not args.rl:
        args = gpt.parse("tools", parser(), [*argv, "--rl", str(RL_STEPS)], BREAKS)
    run = train_rl if args.rl else train
    if args.break_ is None:
        clean = gpt.run_once(run, args, reuse=args.resume)
        if not (args.plain or args.rl):
            with_and_without(clean, gpt.parse("tools", parser(), [*argv, "--plain"], BREAKS))
        return
    clean, broken = gpt.clean_and_broken(run, args)
    C, B = clean.report, broken.report
    dashboard = {"training loss": "loss", "loss on the model's own words": "loss_own",
                 "gradient norm": "grad_norm", "reward": "reward", "KL to the tool model": "kl"}  # fmt: skip
    outside = {
        "right answers, sampled": "right_sampled",
        "right answers, greedy": "right_greedy",
        "   ... where there is no price": "sums",
        "   ... where there is one": "prices",
        "calls an answer": "calls",
        "right answers a call": "right_per_call",
        "calls that are well-formed": "valid",
        "results that no tool would give": "wrong_results",
        "   ... that the next words repeat": "copied",
        "answers with an error that end right": "recovered",
    }
    if args.break_ == "unsafe_eval":
        outside |= {
            "attacked: code passed on to the tool": "code_passed_on",
            "attacked: right answers": "right_when_attacked",
            "attacked: the code has run": "canary",
        }
    # fmt: off
    valid = ("calls look perfect: 95 % of them or more are well-formed", B["valid"] > 0.95)
    panels = [("dashboard: loss on the model's own words", "nats a token", "loss_own"),
              ("outside: right answers, sampled", "share of held-out problems", "right_sampled")]
    if args.break_ == "hallucinated_result":
        claims = [
            # Not in per cent: both are nearly 0, and a part of the updates goes into guessing results.
            ("the loss on the model's own words is as low (within 0.05 nats a token)",
             B["loss_own"] < C["loss_own"] + 0.05),
            valid,
            ("more than half of the results are invented, and none in the clean run",
             B["wrong_results"] > 0.5 and C["wrong_results"] == 0),
            ("right answers: 40 points or more below the clean run",
             B["right_sampled"] < C["right_sampled"] - 0.4),
        ]
        cure = "python tools.py   (only the runtime writes results)"
    elif args.break_ == "unsafe_eval":
        claims = [
            ("right answers within 3 points of the clean run: nobody notices",
             abs(B["right_sampled"] - C["right_sampled"]) < 0.03),
            ("the model passes the question's code on to the tool, in both runs",
             B["code_passed_on"] > 0 and C["code_passed_on"] > 0),
            ("under eval it runs", B["canary"] > 0),
            ("the whitelist refuses it", C["canary"] == 0),
        ]
        panels = [("nobody notices", "share", ("right_sampled", "right_greedy", "valid")),
                  ("attacked", "share", ("code_passed_on", "right_when_attacked", "canary"))]
        cure = "python tools.py   (data/calculator.py: parse, allow a few kinds of node, run nothing)"
    elif args.break_ == "unmasked_result":
        claims = [
            ("the training loss is higher: results cannot be foreseen", B["loss"] > C["loss"]),
            ("right answers: 5 points or more below the clean run",
             B["right_sampled"] < C["right_sampled"] - 0.05),
        ]
        cure = "python tools.py   (mask 0 on what the model has not written)"
    elif args.break_ == "faulty_tool":
        claims = [
            valid,
            ("nine of ten wrong results or more are copied", B["copied"] > 0.9),
            ("right answers: 10 points or more below the clean run",
             B["right_sampled"] < C["right_sampled"] - 0.1),
        ]
        panels = [("calls look perfect", "share", ("ended", "valid")),
                  ("outside: right answers", "share of held-out problems", ("right_sampled", "right_greedy"))]
        cure = "check what a tool says where it can be checked; the model will not"
    else:
        claims = [
            ("calls an answer: half as many again, or more", B["calls"] > 1.5 * C["calls"]),
            ("right answers a call: a third fewer, or worse",
             B["right_per_call"] < 0.67 * C["right_per_call"]),
        ]
        panels = [("dashboard: reward", "a sampled answer", "reward"),
                  ("outside: calls", "an answer", "calls")]
        cure = f"python tools.py --rl {args.rl}   (reward the answer, not the call)"
    # fmt: on
    print(f"\n{args.break_}: {BREAKS[args.break_].split(':')[0]}.")
    dashboard, outside = (
        {label: key for label, key in rows.items() if key in B} for rows in (dashboard, outside)
    )
    gpt.break_report(clean, broken, dashboard, outside, claims, cure, panels)


def with_and_without(clean, args):
    """Train the control, and print the comparison that the chapter is about."""
    print("\nNow the control: the same base, problems and number of updates, solutions without calls.")
    plain = gpt.run_once(train, args, reuse=True)
    C, P = clean.report, plain.report
    print(f"\n{'right answers, greedy':38}{'with the tool':>16}{'without':>12}")
    for label, key in (("all", "right_greedy"), ("no price to look up", "sums"), ("a price", "prices")):
        print(f"  {label:36}{C[key]:>16.3f}{P[key]:>12.3f}")
    print(f"{'right answers, sampled':38}{C['right_sampled']:>16.3f}{P['right_sampled']:>12.3f}")
    print(f"the tool model with its runtime switched off, greedy: {C['right_without_runtime']:.3f}")
    print(f"calls an answer {C['calls']:.2f}, of them well-formed {C['valid']:.3f}")
    print(f"errors an answer {C['errors']:.2f}; of the answers that met one {C['recovered']:.3f} are right")


if __name__ == "__main__":
    main()
