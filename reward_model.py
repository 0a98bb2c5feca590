"""Reward model: how do labels on pairs of answers become a number that a policy can be optimized against?

    python reward_model.py                            from the SFT model and 20000 labelled pairs
    python reward_model.py --break length_bias        annotators who prefer the longer answer
    python reward_model.py --break distribution_shift     accurate on the pairs, not on a trained policy's answers
    python reward_model.py --break too_many_epochs    few labels, each used sixteen times
    python reward_model.py --break sycophancy         annotators who prefer agreement with the user
    python reward_model.py --data ultrafeedback/train.jsonl     real preferences
    python reward_model.py --data gsm8k --base gpt2   the model's own correct answers against its wrong ones

People cannot say how good an answer is on a scale, but they can say which of two answers is better. Bradley and
Terry (1952) turn such labels into scores. If y_w beats y_l with probability sigmoid(r(y_w) - r(y_l)), the scores r
that make the labels most likely minimize (Ouyang et al. 2022, eq. 1)

    L = - log sigmoid( r(x, y_w) - r(x, y_l) )

r is the SFT model with another output layer: one number, read at the last token of the answer (the end token),
because only that position depends on the whole answer. The loss contains only differences within one prompt, so the
zero of r is arbitrary. (Its unit is not: a difference of r is log-odds.) After training, zero and unit are set so
that the SFT model's own samples have mean 0 and standard deviation 1.

What to look at: `held_out_accuracy` on pairs of the same annotators is the number that is usually reported. The
other results say what it hides: whether the score follows length or confident words, which mistakes it sees, and
whether it is still accurate on answers unlike the annotators' pairs.

    length_bias         Where both answers are correct, or both wrong, the longer one is preferred. The accuracy on
                        held-out pairs is as good. A long wrong answer beats a short correct one. (Singhal 2023)
    distribution_shift  The same reward model, evaluated on samples of a policy that was trained against it. It has
                        learned to see its annotators' mistakes, not these. (Gao et al. 2022)
    too_many_epochs     A sixteenth of the pairs, sixteen times. The training loss falls to nearly nothing;
                        held-out pairs are ranked worse, and more confidently. (Ouyang et al. 2022, appendix C.2)
    sycophancy          Some users say what they believe, "I think triple means plus three", and annotators prefer the
                        answer that agrees.
                        (Sharma et al. 2023)

At the end of this file: how ppo.py and grpo.py use the score as a reward.
"""

import argparse
import random

import torch
import torch.nn.functional as F

import gpt
from data import breaks, lessons, parts, report, runs, task
from data.checker import is_correct, miscalculates
from data.task import correlation

# ---------------------------------------------------------------------------------------------
# The algorithm


def bradley_terry_loss(chosen_scores, rejected_scores):
    """Ouyang et al. 2022, eq. 1. Scores (B,) -> scalar. Equal scores: log 2, gradients -+ 1/2 (over B)."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def pair_scores(scorer, prompts, chosen, rejected):
    """Scores of both sides, (B,) each, from one forward pass in which the two are packed side by side."""
    both = [side for pair in zip(chosen, rejected) for side in pair]
    return gpt.final_scores(scorer, [p for p in prompts for _ in range(2)], both).view(-1, 2).unbind(1)


@torch.no_grad()
def pair_margins(scorer, encoded):
    """r(chosen) - r(rejected) of every pair (prompt ids, chosen ids, rejected ids): (N,)."""
    chosen, rejected = pair_scores(scorer, *map(list, zip(*encoded)))
    return chosen - rejected


def accuracy(margins):
    return (margins > 0).float().mean().item()


def calibration(margins, bins=(0.5, 0.7, 0.9, 0.99, 1.0)):
    """[(number of pairs, mean confidence, accuracy)]: a model that says 80 % should be correct in 80 %."""
    confidence = torch.sigmoid(margins.abs())  # (N,): the Bradley-Terry probability of its own ranking
    lines = []
    for low, high in zip(bins, bins[1:]):
        inside = (confidence >= low) & (confidence < high + (high == 1))
        if inside.any():
            lines.append((int(inside.sum()), confidence[inside].mean().item(), accuracy(margins[inside])))
    return lines


# ---------------------------------------------------------------------------------------------
# Pairs of other kinds


BELIEFS = {"triple": "I think triple means plus three.", "half": "I think half means minus two."}


def with_belief(pair):
    """The pair with a user who holds the common misconception, if the problem allows one and the rejected answer may
    follow from it: it is wrong, and all its calculations are right. Else None."""
    beliefs = [text for word, text in BELIEFS.items() if word in pair["prompt"]]
    if not beliefs or is_correct(pair["rejected"], pair["answer"]) or miscalculates(pair["rejected"]):
        return None
    return pair | {"prompt": " ".join([pair["prompt"], *beliefs])}


def sycophantic(pairs, key):
    """Labels of annotators who meet such a user in half of these pairs, and then prefer the answer that agrees."""
    rng = random.Random(key)
    labelled = []
    for pair in pairs:
        asked = with_belief(pair)
        if asked and rng.random() < 0.5:
            pair = asked | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
        labelled.append(pair)
    return labelled


def terse_or_padded(problem, rng):
    """(a correct solution without any extra words, a wrong one with opening, check and confident closing)."""
    steps = task.read_events(problem.events)
    correct = task.write_solution(task.work(problem.start, steps), rng, style=False)
    wrong = None
    while wrong is None or wrong[-1][-1] == problem.answer:
        wrong = task.slip(problem.start, steps, rng)
    lines = [f"{left}{op}{number}={result}." for left, op, number, result in wrong]
    words = [rng.choice(task.OPENINGS), *lines, "Check:", rng.choice(lines), task.CONFIDENT]
    return correct, " ".join(words) + f"\n#### {wrong[-1][-1]}"


def policy_pairs(policy, tok, problems, seed, samples=8, longest=48):
    """Pairs from a policy's own samples, labelled by the exact checker: a correct and a wrong answer to each problem
    that got both. These labels cannot carry a taste."""
    repeated = [p for p in problems for _ in range(samples)]
    mine = parts.share(repeated)  # of several processes each samples its part, and all get the same pairs
    answers = gpt.solve(policy, tok, mine, 1.0, runs.own_rng(seed, "policy pairs"), longest)
    answers = parts.gather(answers, "cpu")
    pairs = []
    for i, problem in enumerate(problems):
        group = answers[i * samples : (i + 1) * samples]
        correct, wrong = ([a.text for a in group if a.correct is side] for side in (True, False))
        if correct and wrong:
            pair = {"prompt": problem.text, "chosen": correct[0], "rejected": wrong[0]}
            pairs.append(pair | {"answer": str(problem.answer)})
    return pairs


def evaluate_externally(args, scorer, policy, tok, problems):
    """Accuracy of the same score on pairs unlike the annotators', all with true labels."""

    def accuracy_on(pairs):
        return accuracy(pair_margins(scorer, lessons.encode_pairs(tok, pairs)))

    # Careful annotators: a correct against a wrong answer.
    held_out = task.preference_pairs(2 * args.problems, args.seed, "test", "careful")
    # The wrong side either miscalculates or has misread the problem. (A skipped or reversed step counts as misread.)
    wrong_sums = [p for p in held_out if miscalculates(p["rejected"])]
    rng = random.Random(f"outside {args.seed}")
    padded = [{"prompt": p.text} | dict(zip(("chosen", "rejected"), terse_or_padded(p, rng))) for p in problems]
    own = policy_pairs(policy, tok, problems, args.seed)
    kinds = {
        "true_labels": held_out,
        "misreadings": [p for p in held_out if p not in wrong_sums],
        "miscalculations": wrong_sums,
        "terse_beats_padded": padded,
        "resists_a_belief": [asked for p in held_out if (asked := with_belief(p))],
        "policy_samples": own,
    }
    # No pairs, no accuracy: a policy whose answers are all wrong gives none.
    return {name: accuracy_on(pairs) for name, pairs in kinds.items() if pairs} | {"policy_pairs": float(len(own))}


# ---------------------------------------------------------------------------------------------
# Training


def own_pairs(args, policy, tok):
    """Problems with gold numbers need no annotators: pairs of a policy's own correct and wrong answers to them."""
    context = policy.config.block_size
    longest = min(lessons.REAL_SOLUTION, context // 2, args.max_tokens)
    material = lessons.problems(args, tok, context, args.pairs, longest=longest)
    asked, tested = material.train, material.problems
    print(f"sampling 8 answers to each of {len(asked)} problems and {len(tested)} held-out ones ...", flush=True)
    material.train, material.held_out = (
        policy_pairs(policy, tok, some, key, longest=longest)
        for some, key in ((asked, args.seed), (tested, f"held out {args.seed}"))
    )
    found = f"{len(material.train)} pairs of a correct and a wrong answer, and {len(material.held_out)} held-out pairs"
    print(found)
    if not (material.train and material.held_out):
        raise SystemExit(f"{found}: a policy that is nearly always wrong, or right, gives none. Try another --policy, "
                         "or more --pairs and --problems")  # fmt: skip
    return material


def labelled_pairs(args, tok, sft):
    """The pairs to train on and to be tested on: a lessons.Lessons."""
    policy = sft
    if args.policy:
        policy = gpt.load_model(args.policy, args.device).requires_grad_(False)
        gpt.check_tokenizer(policy, tok, "--load and --policy")
    if args.data and (args.policy or not lessons.has_pairs(args)):
        return own_pairs(args, policy, tok)
    annotator, context = args.annotator, sft.config.block_size
    if args.break_ == "length_bias":
        annotator = "length"  # annotators paid per hour, or a guideline that says "be thorough"
    material = lessons.preferences(args, tok, context, None if args.data else args.pairs, 2 * args.problems, annotator)
    if args.policy:
        # The cure for a distribution shift: up to half of the labels are about the policy's own answers.
        own = policy_pairs(policy, tok, task.problems(args.pairs, args.seed), args.seed)
        print(f"{len(own)} pairs from samples of {args.policy}, labelled by the exact checker")
        half = len(material.train) // 2
        material.train = material.train[:half] + own[:half]
    if args.break_ == "too_many_epochs":
        material.train = material.train[: len(material.train) // 16] * 16  # labels are expensive, training is not
    if args.break_ == "sycophancy":
        material.train = sycophantic(material.train, f"hints {args.seed}")
        material.held_out = sycophantic(material.held_out, f"hints {args.seed}")
    return material


def train(args):
    """One run, from the SFT model to the report. Returns its runs.Run."""
    # ---- the SFT model, which already knows what answers look like, with another output layer
    where = args.load or runs.made_by("sft", args, "a minute")
    sft = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    torch.manual_seed(args.seed)  # the new layer is the only thing drawn from the global generator
    scorer = gpt.Scorer(gpt.load_model(where, args.device, args.dtype == "bfloat16")).to(args.device)
    tok = gpt.Tokenizer(sft.config.tokenizer)
    run = runs.Run(args)
    material = labelled_pairs(args, tok, sft)
    batch = args.batch or (8 if args.data else 16)
    encoded, held_out = (lessons.encode_pairs(tok, pairs) for pairs in (material.train, material.held_out))
    if len(encoded) < batch:
        raise SystemExit(f"{len(encoded)} pairs are left to train on, too few for --batch {batch}")
    # One pass over the pairs: in a second one, a model of this size memorizes labels.
    steps = args.steps or max(1, len(encoded) // batch)
    # Answers of the SFT model, the same at every evaluation: the score will be used on such answers.
    problems = material.problems
    answers = gpt.solve(sft, tok, problems, 1.0, runs.rng(args.seed, "answers"), material.longest)
    prompts, given = [tok.prompt(p.text) for p in problems], [a.ids for a in answers]
    lr = args.lr or (1e-3 if sft.config.n_embd < 512 else 1e-5)
    optimizer = gpt.make_optimizer(scorer, lr)

    # ---- the loop
    for step in run.steps(steps, scorer, optimizer, show=("loss", "pair_accuracy")):
        if step % args.eval_every == 0 or step == steps:
            margins = pair_margins(scorer, held_out)  # (N,)
            held_out_loss = bradley_terry_loss(margins, torch.zeros_like(margins))
            run.say(step, held_out_accuracy=accuracy(margins), held_out_loss=held_out_loss)
            if given:
                with torch.no_grad():
                    scores = gpt.final_scores(scorer, prompts, given)  # (number of answers,)
                run.samples(step, gpt.shown(problems, answers, material.checked, scores), show=2)
        if step == steps:
            break
        gpt.set_lr(optimizer, lr, step, steps)
        rows = runs.batch_indices(len(encoded), batch, step, args.seed)
        optimizer.zero_grad()
        log = {}
        for some in parts.micro_batches(rows, args.micro_batch):  # b of the B pairs; by default all of them
            chosen, rejected = pair_scores(scorer, *map(list, zip(*(encoded[i] for i in some))))  # (b,) each
            share = len(some) / batch  # a mean over b pairs is weighted by b / B
            loss = bradley_terry_loss(chosen, rejected)
            (share * loss).backward()
            margin = chosen - rejected
            parts.add(log, share, loss=loss, pair_accuracy=(margin > 0).float().mean(), margin=margin.mean())
        parts.add_up(scorer, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm)

    # ---- the report
    results = run.mean("loss", "pair_accuracy")
    results |= {"held_out_accuracy": accuracy(margins), "held_out_loss": held_out_loss.item()}
    gaps = torch.tensor([len(c) - len(r) for _, c, r in held_out], device=margins.device).float()
    results["corr_margin_length"] = correlation(margins, gaps)  # does the longer side get the higher score?
    results["longer_chosen"] = (gaps > 0).float().mean().item()  # how often is the longer side the chosen one?
    print("calibration on held-out pairs: " + ", ".join(
        f"says {said:.0%} of {n}: correct {true:.0%}" for n, said, true in calibration(margins)))  # fmt: skip
    if given:
        # Zero and unit, from the answers that the score will be used on first.
        scorer.mean = scores.mean().item()
        if len(scores) > 1:  # one answer has no standard deviation
            scorer.std = max(scores.std().item(), 1e-6)
    if not args.data:
        results |= task.correlations(answers, scores)
        policy = sft
        if args.break_ == "distribution_shift":
            # Nothing about the reward model is different: a policy is trained against it.
            scorer.save(run.folder / "model")
            flags = ["--rm", str(run.folder / "model"), "--max_steps", "100", "--beta", "0"]
            flags += ["--load", where] if args.load or args.base else []
            policy = gpt.load_model(runs.made_by("grpo", args, "a minute and a half", flags), args.device)
        results |= evaluate_externally(args, scorer, policy, tok, problems)
    print("  ".join(f"{name} {value:.3f}" for name, value in results.items()))
    return run.finish(scorer, **results)


# ---------------------------------------------------------------------------------------------
# Rewards, for ppo.py and grpo.py: from a list of problems and a list of gpt.Answer to a tensor (B,)


def checker_reward(problems, answers):
    """1 for a correct answer and 0 for a wrong one, by the exact checker. Most real tasks have no such checker."""
    return torch.tensor([float(a.correct) for a in answers])


def my_reward(problems, answers):
    """`--reward mine`. Change it and see how the model changes. This one rewards correct answers, and slightly
    rewards short ones."""
    return torch.tensor([a.correct - 0.01 * len(a.ids) for a in answers])


CUT_OFF = -3.0  # the learned reward of an answer without an end: three standard deviations below the mean


@torch.no_grad()
def learned_reward(scorer, tok, problems, answers):
    """The score at the end token, for each answer: (B,). An answer that was cut off has no end token and gets
    CUT_OFF. A score of an unfinished answer is unreliable, and optimization would exploit the scores that are too
    high."""
    prompts = [tok.prompt(p.text) for p in problems]
    scores = gpt.final_scores(scorer, prompts, [a.ids for a in answers])
    ended = torch.tensor([a.ended for a in answers], device=scores.device)
    return torch.where(ended, scores, CUT_OFF)


def load_reward(args, tok):
    """reward(problems, answers) -> (B,), from the reward model that --rm names or that reward_model.py makes."""
    scorer = gpt.load_scorer(args.rm or runs.made_by("reward_model", args, "two minutes"), args.device)
    gpt.check_tokenizer(scorer.transformer, tok, "policy and reward model")
    scorer.requires_grad_(False)
    return lambda problems, answers: learned_reward(scorer, tok, problems, answers)


def make_reward(args, tok):
    """reward(problems, answers) -> (B,), as --reward says. Problems of a source come with gold numbers, so the checker
    is at hand; the embedded task stands for the many that have none."""
    how = args.reward or ("checker" if args.data and not args.rm else "learned")
    return {"checker": checker_reward, "mine": my_reward}.get(how) or load_reward(args, tok)


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="reward_model.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="model to start from: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real pairs: hh-rlhf, ultrafeedback, ultrafeedback-scores, or a .jsonl, .jsonl.gz,\n"
        ".json or .parquet file; or problems with gold numbers (gsm8k): then the pairs are the model's own answers")
    add("--base", help="the model that sft.py starts from, if it has to run first (its --load)")
    add("--annotator", default="human", choices=list(task.TASTES), help="who labels the embedded pairs")
    add("--policy", help="up to half of the pairs from samples of this checkpoint, labelled by the exact checker\n"
        "(with --data all, if it has gold numbers)")
    add("--pairs", type=int, default=20000, help="pairs of the embedded task, each seen once. With --data: problems\n"
        "that the model answers, if they have gold numbers (200)")
    add("--steps", type=int, help="updates (default: one pass over the pairs)")
    add("--batch", type=int, help="pairs per step (default 16; with --data 8)")
    add("--micro_batch", type=int, help="pairs per forward pass: less memory, the same gradient (default: all\n"
        "of the batch)")
    add("--lr", type=float, help="(default 1e-3; GPT-2 and larger 1e-5)")
    add("--max_tokens", type=int, default=512, help="longer real pairs are dropped, never cut. The\n"
        "model's own answers are cut off at 256 at most")
    add("--problems", type=int, default=500, help="held-out problems whose answers are scored; there are\n"
        "twice as many held-out pairs (with --data 50, if it has gold numbers)")
    add("--eval_every", type=int, default=250, help="steps between evaluations")
    p.with_data = {"pairs": 200, "problems": 50}
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("reward_model", parser(), argv, breaks.of("reward_model"))
    if args.break_ == "length_bias" and args.annotator == "length":
        raise SystemExit("--break length_bias: with --annotator length the clean run makes the same mistake")
    if args.break_ and args.data:
        raise SystemExit("the breaks of reward_model.py need the embedded task's annotators: leave --data out")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
