"""Reasoning at test time: what do more samples per problem buy, and how is one of them selected?

    python reasoning.py                                 a verifier, and every way to select among N answers
    python reasoning.py --break overoptimize_verifier   the answer with the highest score, N up to 256
    python reasoning.py --break no_cot                  a model that was taught answers without their working
    python reasoning.py --break self_correct            the model revises its answers, and every revision is accepted
    python reasoning.py --data gsm8k --base gpt2        the same on real problems
    python reasoning.py --data example_model_solutions.jsonl    four published systems on GSM8K

The model is fixed. It answers the same problem N times, and one answer is selected:

    majority vote     the answer that most of the N samples give (Wang et al. 2022). It needs no other model. Random
                      slips differ from sample to sample, so the vote removes them. A misconception that most
                      demonstrators share is repeated, so the vote keeps it.
    best of N         the answer with the highest score of a *verifier*: the same transformer with one number as its
                      output, trained to tell correct solutions from wrong ones (Cobbe et al. 2021). It was trained on
                      correctness itself, so it can remove both kinds of error.
    vote of the top   majority among the quarter with the highest scores (Cobbe et al. 2021, section 5.1)
    weighted vote     a vote in which each answer's weight is the verifier's probability (Li et al. 2022)
    oracle            is any of the N correct? pass@N: no way of selecting can do better.

    L = - mean_t [ z log sigmoid(v_t) + (1-z) log sigmoid(-v_t) ]    z = 1 if the solution is correct, else 0

v_t is the score after token t. With the loss on every token (`--level token`), one solution gives one training
example per prefix. Selection uses the last score, at the end token, because only that score depends on
the whole solution. (`--level solution` trains on that one alone.)

What to look at: `verifier_accuracy`, the verifier's accuracy, is the number that is usually reported. Best of N
depends on another one: how often a *wrong* answer gets a high score. Let h be the fraction of all samples that are
wrong and accepted. From about N = 1/h on, there is usually one among the N. That alone would limit best of N to the
verifier's precision. It falls below that, because the highest scores go to errors that the verifier cannot detect.

    overoptimize_verifier  Take the answer with the highest score. The score rises with every doubling of N; accuracy
                           rises, peaks, and falls below the majority vote. (Cobbe et al. 2021, section 5.1)
    no_cot                 Fine-tuned on the final answers alone. The loss converges; accuracy collapses, and a vote
                           does not restore it. (Cobbe et al. 2021, section 4.1)
    self_correct           The model revises its greedy answer from the token it found least likely, three times, and
                           the revision is always accepted. More answers are spoiled than repaired. (Huang et al. 2023)
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import gpt
from data import breaks, lessons, parts, public, report, runs
from data.checker import last_answer, miscalculates
from sft import pass_at_k

# ---------------------------------------------------------------------------------------------
# The algorithm: the verifier


def verifier_loss(scores, mask, correct):
    """Cross-entropy of "this solution will be correct", mean over the prefixes where mask is True.

    scores, mask: (B, N+1), before the answer's first token and after each of its N tokens. correct: (B,) bool. A
    score of 0 everywhere gives log 2.
    """
    targets = correct.float()[:, None].expand_as(scores)  # (B,) -> (B, N+1): every prefix gets the final outcome
    return F.binary_cross_entropy_with_logits(scores[mask], targets[mask])


def last_only(mask):
    """Of a mask (B, N+1) only the last True of each row: the end of the answer."""
    return F.one_hot(mask.sum(1) - 1, mask.shape[1]).bool()


def quality(scores, correct):
    """How good a verifier is that accepts scores above 0. scores: (M,); correct: (M,) bool.

    sensitivity: fraction of the correct answers that are accepted. specificity: fraction of the wrong ones that are
    refused. precision: fraction of the accepted ones that are correct; it depends on how many are correct at all.
    """
    accepted = scores > 0

    def fraction(of, among):
        return (of & among).sum().item() / max(1, among.sum().item())

    return {
        "verifier_accuracy": (accepted == correct).float().mean().item(),
        "sensitivity": fraction(accepted, correct),
        "specificity": fraction(~accepted, ~correct),
        "precision": fraction(correct, accepted),
        "fooled": (accepted & ~correct).float().mean().item(),  # h, a fraction of *all* samples
    }


def pairs_ranked(groups, correct):
    """Of all pairs of a correct and a wrong solution to the same problem, the fraction in which the correct one has
    the higher score. groups, correct: per problem, the scores of its solutions and whether they are correct."""
    won = [
        right > wrong
        for scores, marks in zip(groups, correct)
        for right, is_right in zip(scores, marks)
        for wrong, is_other in zip(scores, marks)
        if is_right and not is_other
    ]
    return sum(won) / max(1, len(won))


def precision_at(base, sensitivity, specificity):
    """Bayes' rule: the precision of the same verifier if a fraction `base` of the answers is correct.
    precision_at(.05, .9, .9) = .32: the verifier is correct in 90 %, yet two of three accepted answers are wrong."""
    accepted_correct, accepted_wrong = base * sensitivity, (1 - base) * (1 - specificity)
    return accepted_correct / max(accepted_correct + accepted_wrong, 1e-9)


# ---------------------------------------------------------------------------------------------
# The algorithm: ways to select. answers: the N final answers to one problem, numbers or None (unreadable: never
# correct, and without a vote). scores: the verifier's, one per answer.


def majority(answers, weights=None):
    """The answer with the most votes; the earliest wins a tie. Answers are compared as numbers, so "18" and "18.0"
    are votes for the same answer. [3, 5, None, 5] -> 5; without any readable answer -> None."""
    votes = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + (1 if weights is None else weights[i])
    return max(votes, key=votes.get, default=None)  # a dict keeps its order, and max returns the first of equals


def best_of(scores):
    """The index of the highest score."""
    return max(range(len(scores)), key=scores.__getitem__)


def vote_of_top(answers, scores, k):
    """Majority among the k answers with the highest scores. k = 1 is best of N, k = N the plain vote (ties apart)."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return majority([answers[i] for i in order[:k]])


def top(n):
    return max(1, n // 4)  # the number of answers with a vote in vote_of_top


def select(n, golds, answers, scores, lengths):
    """The accuracy of each way of selecting among n answers. golds: one gold answer per problem; the other
    arguments: one list of N >= n per problem.

    The N answers are cut into N // n blocks, and each block is one trial: with n = 1 the result is the mean over all
    answers, with n = N there is a single trial per problem.
    """
    hits, trials, best = Counter(), 0, []
    for gold, said, score, length in zip(golds, answers, scores, lengths):
        best.append(0.0)
        blocks = range(0, len(said) - n + 1, n)
        for i in blocks:
            a, s = said[i : i + n], score[i : i + n]
            winner = best_of(s)
            hits["vote"] += majority(a) == gold
            hits["vote_of_top"] += vote_of_top(a, s, top(n)) == gold
            hits["weighted_vote"] += majority(a, [1 / (1 + math.exp(-x)) for x in s]) == gold
            hits["best_of_n"] += a[winner] == gold
            hits["score"] += s[winner]
            hits["tokens"] += sum(length[i : i + n])
            best[-1] += (a[winner] == gold) / len(blocks)
            trials += 1
    results = {name: hits[name] / trials for name in hits}
    correct = [sum(a == gold for a in said) for gold, said in zip(golds, answers)]
    results["oracle"] = sum(pass_at_k(len(answers[0]), c, n) for c in correct) / len(golds)
    # A peak is chosen on half A of the problems and its size is read off half B: a maximum over noise is too high.
    for half, some in (("best_a", best[::2]), ("best_b", best[1::2])):
        results[half] = sum(some) / max(1, len(some))
    return results


def selections(args, run, steps, tok, problems, groups, scores):
    """Log and print the accuracy of every way of selecting, for N = 1, 2, 4, ... Returns those at the largest N."""
    golds = [p.answer for p in problems]
    said = [[last_answer(a.text) for a in group] for group in groups]
    lengths = [[len(a.ids) for a in group] for group in groups]
    curves = []
    print("\n    N    vote  vote of top  weighted vote  best of N  oracle   score  tokens")
    for n in [2**i for i in range(args.n.bit_length())]:
        m = select(n, golds, said, scores, lengths)
        curves.append(m | {"n": n})
        run.log(steps, n=n, **m)
        print(f"{n:5}{m['vote']:8.3f}{m['vote_of_top']:13.3f}{m['weighted_vote']:15.3f}{m['best_of_n']:11.3f}"
              f"{m['oracle']:8.3f}{m['score']:8.2f}{m['tokens']:8.0f}")  # fmt: skip
    one, all_n, peak = curves[0], curves[-1], max(curves, key=lambda m: m["best_a"])
    results = {"one": one["vote"], "score_one": one["score"], "peak_n": peak["n"]}
    results |= {"start_b": one["best_b"], "peak_b": peak["best_b"], "end_b": all_n["best_b"]}
    results |= {name: all_n[name]
                for name in ("vote", "vote_of_top", "weighted_vote", "best_of_n", "oracle", "score")}  # fmt: skip
    rises = [a["score"] < b["score"] for a, b in zip(curves, curves[1:])]
    results["score_rises"] = sum(rises) / max(1, len(rises))
    # Which answer is taken in the end: that of a vote among the quarter with the highest scores ...
    results["chosen"], voters = results["vote_of_top"], top(args.n)
    if args.break_ == "overoptimize_verifier":
        results["chosen"], voters = results["best_of_n"], 1  # ... or simply the one with the highest score
    winners = [group[best_of(some)] for group, some in zip(groups, scores)]
    if not args.data:  # real solutions do not write all their calculations as the embedded task's
        for name, some in (("wrong", sum(groups, [])), ("winners", winners)):
            wrong = [a for a in some if not a.correct]
            results[f"{name}_miscalculated"] = sum(miscalculates(a.text) for a in wrong) / max(1, len(wrong))
    run.samples(f"{steps}, selected among {args.n}", [
        (p.text, f"highest score ({max(some):+.1f}, {'correct' if w.correct else 'wrong'}): {w.text}\n\n"
                 f"majority vote: {majority(a)}   vote of the top: {vote_of_top(a, some, top(args.n))}   "
                 f"correct answer: {p.answer}\ntaken: {took} ({'correct' if took == p.answer else 'wrong'})")
        for p, w, some, a in zip(problems[:12], winners, scores, said) for took in [vote_of_top(a, some, voters)]
    ])  # fmt: skip
    return results


# ---------------------------------------------------------------------------------------------
# The algorithm: sampling, scoring, revising


def answer_often(model, tok, problems, n, longest, *key):
    """n answers to each problem: one list of gpt.Answer per problem."""
    found = []
    some = max(1, gpt.at_once(model, 512) // n)  # problems per batch: large batches are faster on a CPU too
    for i in runs.progress(range(0, len(problems), some), f"{n} answers per problem"):
        repeated = [p for p in problems[i : i + some] for _ in range(n)]
        answers = gpt.solve(model, tok, repeated, 1.0, runs.rng(*key, i), longest, batch=some * n)
        found += [answers[j : j + n] for j in range(0, len(answers), n)]
    return found


@torch.no_grad()
def score_all(scorer, tok, problems, groups):
    """The verifier's scores of all answers: one list of floats per problem. Equal answers are scored once."""
    found = []
    for problem, group in zip(runs.progress(problems, "scores"), groups):
        different = list(dict.fromkeys(tuple(a.ids) for a in group))
        prompts = [tok.prompt(problem.text)] * len(different)
        # The ids that were generated: encoding the text again can give other tokens, and another score.
        scores = gpt.final_scores(scorer, prompts, [list(ids) for ids in different]).tolist()
        of = dict(zip(different, scores))
        found.append([of[tuple(a.ids)] for a in group])
    return found


ROUNDS = 3  # of revision


@torch.no_grad()
def revise(model, tok, problems, drafts, generator, longest):
    """Every draft, written again from the token that the model found least likely. A list of gpt.Answer.

    The least likely token is where a mistake is most probable. But a correct reading that most demonstrators do not
    share is an unlikely token too.
    """
    kept = [draft.ids[: int(draft.logps.argmin())] for draft in drafts]
    prompts = [tok.prompt(problem.text) + ids for problem, ids in zip(problems, kept)]
    revisions = []
    batch = gpt.at_once(model)
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        room = min(longest, model.config.block_size - max(map(len, some)))
        for j, (ids, logps) in enumerate(zip(*gpt.sample(model, some, room, [tok.end], generator=generator)), i):
            logps = torch.cat([drafts[j].logps[: len(kept[j])], logps])
            revisions.append(gpt.read_answer(tok, kept[j] + ids, logps, problems[j].answer))
    return revisions


def revisions(args, model, scorer, tok, problems, drafts):
    """The model revises its greedy answers in several rounds. Returns what became of them."""

    def score(some):
        return [scores[0] for scores in score_all(scorer, tok, problems, [[a] for a in some])]

    answers, kept = drafts, score(drafts)
    for n in range(ROUNDS):
        revised = revise(model, tok, problems, answers, runs.rng(args.seed, "revision", n), args.max_tokens)
        if args.break_ == "self_correct":
            answers = revised  # "review your answer and improve it": the second thought is always accepted
            continue
        new = score(revised)
        answers = [r if after > before else a for a, r, before, after in zip(answers, revised, kept, new)]
        kept = [max(before, after) for before, after in zip(kept, new)]
    flips = Counter((d.correct, a.correct) for d, a in zip(drafts, answers))
    return {
        "draft": sum(a.correct for a in drafts) / len(drafts),
        "revised": sum(a.correct for a in answers) / len(drafts),
        "repaired": flips[False, True] / len(drafts),
        "spoiled": flips[True, False] / len(drafts),
    }


# ---------------------------------------------------------------------------------------------
# Training the verifier, then selecting


def train(args):
    """One run: the verifier from the SFT model, then all ways of selecting. Returns its runs.Run."""
    flags = ["--answer_only"] if args.break_ == "no_cot" else []
    where = args.load or runs.made_by("sft", args, "a minute", flags)
    model = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(model.config.tokenizer)
    torch.manual_seed(args.seed)  # the verifier's new layer is the only thing drawn from the global generator
    scorer = gpt.Scorer(gpt.load_model(where, args.device, args.dtype == "bfloat16")).to(args.device)
    steps, longest = args.train_problems // args.batch, args.max_tokens
    if args.break_ in ("overoptimize_verifier", "self_correct"):
        # The clean run's verifier. The mistake is in how its scores are used, so nothing else may differ.
        clean = runs.Run(runs.without_break(args))
        scorer, steps = gpt.load_scorer(str(clean.folder), args.device, args.dtype == "bfloat16"), 0
    run = runs.Run(args)
    # Problems to train on (drawn independently of the demonstrations'), to test the verifier on, and to answer in
    # the end.
    material = lessons.problems(args, tok, model.config.block_size, steps * args.batch, f"verifier {args.seed}",
                                checks=max(1, args.problems // 2))  # fmt: skip
    exercises, checks, problems = material.train, material.checks, material.problems
    gpt.check_room(model, tok, exercises + checks + problems, longest)
    # The verifier is trained on the model's own solutions, because it will score such solutions.
    solved = answer_often(model, tok, exercises, args.samples, longest, args.seed, "lessons")
    checked = answer_often(model, tok, checks, 8, longest, args.seed, "checks")
    outcomes = torch.tensor([a.correct for group in checked for a in group])
    false_sums = torch.tensor([miscalculates(a.text) for group in checked for a in group])
    optimizer = gpt.make_optimizer(scorer, args.lr or (1e-3 if model.config.n_embd < 512 else 1e-5))
    lr = optimizer.param_groups[0]["lr"]

    # ---- the loop
    for step in run.steps(steps, scorer, optimizer):
        if step % args.eval_every == 0 or step == steps:
            scores = score_all(scorer, tok, checks, checked)
            flat = torch.tensor([s for group in scores for s in group])  # (number of answers,)
            found = quality(flat, outcomes)
            # Accuracy by the kind of mistake: an answer that calculates correctly is wrong if it has misread something.
            accepted_right = ((flat > 0) == outcomes).float()
            found["verifier_readings"] = accepted_right[~false_sums].mean().item()
            found["verifier_sums"] = accepted_right[false_sums].sum().item() / max(1, int(false_sums.sum()))
            found["verifier_pairs"] = pairs_ranked(scores, [[a.correct for a in group] for group in checked])
            run.say(step, **found)
            run.samples(step, gpt.shown(checks, [group[0] for group in checked], scores=[some[0] for some in scores]))
        if step == steps:
            break
        # ---- one update: all solutions of a few problems, so that correct and wrong ones are side by side
        gpt.set_lr(optimizer, lr, step, steps)
        chosen = runs.batch_indices(len(exercises), args.batch, step, args.seed)
        rows = [(tok.prompt(exercises[i].text), a) for i in chosen for a in solved[i]]
        prefixes = len(rows) if args.level == "solution" else sum(len(a.ids) + 1 for _, a in rows)  # with a loss
        optimizer.zero_grad()
        log = {}
        for some in parts.micro_batches(rows, args.micro_batch):  # b of the B solutions; by default all of them
            prompts, answers = zip(*some)
            scores, mask = gpt.completion_scores(scorer, prompts, [a.ids for a in answers])  # (b, n+1)
            if args.level == "solution":
                mask = last_only(mask)
            loss = verifier_loss(scores, mask, torch.tensor([a.correct for a in answers], device=scores.device))
            share = mask.sum() / prefixes  # a mean over these prefixes is weighted by their part of all
            (share * loss).backward()
            parts.add(log, share, loss=loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        run.log(step, **log, grad_norm=grad_norm)

    # ---- the report
    groups = answer_often(model, tok, problems, args.n, longest, args.seed, "answers")
    scores = score_all(scorer, tok, problems, groups)
    results = fine_tuning_loss(where) | found
    results |= selections(args, run, steps, tok, problems, groups, scores)
    greedy = gpt.solve(model, tok, problems, 0.0, None, longest)
    results["greedy"] = sum(a.correct for a in greedy) / len(greedy)
    results |= revisions(args, model, scorer, tok, problems, greedy)
    explain(results, found)
    return run.finish(scorer, **results)


def explain(results, found):
    """Print the verifier's results."""
    percent = {name: f"{value:.1%}" for name, value in results.items()}
    rare = precision_at(0.05, found["sensitivity"], found["specificity"])
    onset = 1 / max(found["fooled"], 1e-3)
    miscalculated = ""
    if "wrong_miscalculated" in percent:
        miscalculated = (
            f"Of all wrong answers {percent['wrong_miscalculated']} miscalculate; of the wrong ones with the highest "
            f"score {percent['winners_miscalculated']}.\n"
        )
    print(
        f"\nThe verifier classifies {percent['verifier_accuracy']} of held-out solutions correctly: "
        f"{percent['verifier_readings']} of those that calculate\ncorrectly, {percent['verifier_sums']} of those that "
        f"miscalculate. Of those that it accepts, {percent['precision']} are\ncorrect; if only 5 % of all solutions "
        f"were, it would be {rare:.1%}. h = {results['fooled']:.3f} of all samples are wrong and accepted;\n"
        f"1/h = {onset:.0f}.\n"
        f"Best of N is best at N = {results['peak_n']} (chosen on one half of the problems).\n"
        f"{miscalculated}{ROUNDS} rounds of revision of the greedy answers: {percent['draft']} correct before, "
        f"{percent['revised']} after; {percent['repaired']} repaired, {percent['spoiled']} spoiled."
    )


def fine_tuning_loss(where):
    """The loss of the run that made the model, if it is on disk: of its last fifth, and of the fifth before."""
    path = (Path(where) if (Path(where) / "report.json").is_file() else Path(where).parent) / "metrics.jsonl"
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8") as file:
        losses = [m["loss"] for m in map(json.loads, file) if "loss" in m]
    fifth = max(1, len(losses) // 5)
    before = losses[-2 * fifth : -fifth]
    return {"sft_loss": sum(losses[-fifth:]) / fifth, "sft_loss_before": sum(before) / max(1, len(before))}


def published(path):
    """GSM8K's published solutions of four systems: accuracy of each, of their vote, and of the oracle."""
    rows = public.model_solutions(path)  # (gold, {model: final answer}, {model: published mark})
    models = list(rows[0][1])
    print(f"{path}: {len(rows)} problems, {len(models)} models")
    marked = [(said[name] == gold, marks[name]) for gold, said, marks in rows for name in said]
    print(f"the checker agrees with {sum(x is y for x, y in marked)} of {len(marked)} published marks")
    for name in models:
        print(f"  {name:24}{sum(said[name] == gold for gold, said, _ in rows) / len(rows):8.1%}")
    vote = sum(majority(list(said.values())) == gold for gold, said, _ in rows) / len(rows)
    oracle = sum(gold in said.values() for gold, said, _ in rows) / len(rows)
    print(f"  {'majority vote':24}{vote:8.1%}   (the first model in the file wins a tie)")
    print(f"  {'oracle':24}{oracle:8.1%}   (any of them correct)")


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="reasoning.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="the model that answers: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="real problems with gold numbers: gsm8k, or a .jsonl, .jsonl.gz, .json or .parquet\n"
        "file. A file of published model solutions to GSM8K is only counted")
    add("--base", help="the model that sft.py starts from, if it has to run first (its --load)")
    add("--n", type=int, default=256, help="answers per problem (with --data 8)")
    add("--problems", type=int, default=250, help="held-out problems: a standard error of 3 points at most, and\n"
        "less if N is small, since all answers count (with --data 50: 7 points at most)")
    add("--level", default="token", choices=["token", "solution"], help="where the verifier has a loss: at every\n"
        "token, or at the end of the solution only")
    add("--train_problems", type=int, default=4000, help="problems that the verifier is trained on\n"
        "(with --data 100)")
    add("--samples", type=int, default=8, help="solutions of the model to each of them")
    add("--batch", type=int, default=4, help="problems per update, with all their solutions")
    add("--micro_batch", type=int, help="solutions per forward pass: less memory, the same gradient (default: all\n"
        "of the batch; with --data 8)")
    add("--lr", type=float, help="step size of the verifier (default 1e-3; from width 512 on 1e-5)")
    add("--eval_every", type=int, default=250, help="steps between evaluations of the verifier")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off (with --data 256)")
    p.with_data = {"n": 8, "problems": 50, "train_problems": 100, "micro_batch": 8, "max_tokens": lessons.REAL_SOLUTION}
    return p
# fmt: on


def main(argv=None):
    args = runs.parse("reasoning", parser(), argv, breaks.of("reasoning"))
    if args.data and public.has_solutions(args.data):
        return published(args.data)
    if args.n & (args.n - 1):
        raise SystemExit(f"--n {args.n}: N doubles from 1 on, so it must be 2, 4, 8, 16, ...")
    if args.train_problems < args.batch:
        raise SystemExit(f"--train_problems {args.train_problems} are too few for --batch {args.batch}")
    if args.break_ == "no_cot" and args.data:
        raise SystemExit("--break no_cot cuts the embedded task's solutions at ####: leave --data out")
    if args.break_ == "no_cot" and args.load:
        raise SystemExit("--break no_cot fine-tunes a model of its own: leave --load out")
    report.train_and_compare(train, args)


if __name__ == "__main__":
    main()
