"""Reasoning at test time: what does a second try buy, and what a two hundred and fifty-sixth?

    python reasoning.py                                 a verifier, and every way to choose among N answers
    python reasoning.py --break overoptimize_verifier   the answer with the highest score, N up to 256
    python reasoning.py --break no_cot                  a model that was taught answers without their working
    python reasoning.py --break self_correct            the model is the judge of its own corrections
    python reasoning.py --data example_model_solutions.jsonl    four published models on GSM8K (see README)

Nothing about the model is changed any more. It answers the same question N times, and somebody chooses:

    majority vote     the answer that most of the N give (Wang et al. 2022). Needs nobody else. Slips
                      scatter, so the vote repairs them; a misconception gathers, so the vote entrenches it.
    best of N         the answer that a *verifier* scores highest. The verifier is the same transformer with
                      one number as its output, trained to tell right solutions from wrong ones (Cobbe et al.
                      2021). It has seen the truth, so it can repair both.
    vote of the top   majority among the quarter that the verifier likes best (Cobbe et al. 2021, sec. 5.1)
    weighted vote     a vote in which each answer weighs what the verifier gives it (Li et al. 2022)
    oracle            is there a right one among the N at all? pass@N: no way of choosing can do better.

    L = - mean_t [ z log sigmoid(v_t) + (1-z) log sigmoid(-v_t) ]    z = 1: the solution turned out right

v_t is the score after token t. The loss is on every token (`--level token`): one solution teaches as often as
it has tokens, and the verifier learns to say early that something went wrong. The score that chooses is
the last one, at the end token: only there is the whole solution in sight. (`--level solution` trains
on that one alone.)

What to look at: `held_out`, the verifier's accuracy, is what gets reported. Best of N lives on something
else: how often a *wrong* answer gets a high score. If a share h of all samples fools the verifier (wrong, and
accepted), one of them is usually there from about N = 1/h on. That alone would hold best of N where it is, at
the verifier's precision. It falls, because the very highest scores are those of wrong answers: nothing is as
much to the verifier's taste as what errs where the verifier is blind.

    overoptimize_verifier  take the highest score, and many samples: its score rises with every doubling of
                           N, right answers rise, peak, and fall below the plain vote.
    no_cot                 fine-tuned on the final answers alone. The loss converges; right answers collapse,
                           and no number of samples or votes brings them back. (Cobbe et al. 2021, sec. 4.1)
    self_correct           the model finds the weakest spot of its own answer and writes on from there, better
                           by its own judgement. Counted: how many it repairs, how many it spoils.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gpt
import sft
from data import public, task
from data.checker import is_right, last_answer, miscalculates

BREAKS = {
    "overoptimize_verifier": "the highest score of N: the score rises with N, right answers peak and fall",
    "no_cot": "answers without working: the loss converges, right answers collapse",
    "self_correct": "the model judges its own corrections: some repaired, some spoiled",
}

# ---------------------------------------------------------------------------------------------
# The verifier


def verifier_loss(scores, mask, right):
    """Cross-entropy of "this will turn out right", mean over the states where mask is True.

    scores, mask: (B, N+1): before the answer's first token, and after each of its N. right: (B,) bool.
    A score of 0 everywhere gives log 2.
    """
    targets = right.float()[:, None].expand_as(scores)  # (B,) -> (B, N+1): the outcome, known in hindsight
    return F.binary_cross_entropy_with_logits(scores[mask], targets[mask])


def last_only(mask):
    """Of a mask (B, N+1) only the last state of each row: the end of the answer."""
    return F.one_hot(mask.sum(1) - 1, mask.shape[1]).bool()


def quality(scores, right):
    """What a verifier's verdicts (score > 0: "right") are worth. scores: (M,); right: (M,) bool.

    sensitivity: of the right ones, accepted. specificity: of the wrong ones, refused. precision: of the
    accepted ones, right; that one depends on how many right ones there were to begin with.
    """
    accepted = scores > 0

    def share(of, among):
        return (of & among).sum().item() / max(1, among.sum().item())

    return {
        "held_out": (accepted == right).float().mean().item(),
        "sensitivity": share(accepted, right),
        "specificity": share(~accepted, ~right),
        "precision": share(right, accepted),
        "fooled": (accepted & ~right).float().mean().item(),  # h, a share of *all* samples
    }


def precision_at(base, sensitivity, specificity):
    """Bayes: the precision of the same verifier where a share `base` of the answers is right.
    precision_at(.05, .9, .9) = .32: nine verdicts in ten are right, two of three accepted answers wrong."""
    accepted_right, accepted_wrong = base * sensitivity, (1 - base) * (1 - specificity)
    return accepted_right / max(accepted_right + accepted_wrong, 1e-9)


# ---------------------------------------------------------------------------------------------
# Ways to choose. answers: the N final answers to one question, numbers or None (unreadable, which is never
# right and has no vote). scores: the verifier's, one for each.


def majority(answers, weights=None):
    """The answer with the most votes; the earliest wins a tie. Answers are compared as numbers, so "18" and
    "18.0" vote for the same. [3, 5, None, 5] -> 5; no readable answer at all -> None."""
    votes = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + (1 if weights is None else weights[i])
    return max(votes, key=votes.get, default=None)  # a dict keeps its order: max finds the first of equals


def best_of(scores):
    """Where the highest score stands."""
    return max(range(len(scores)), key=scores.__getitem__)


def vote_of_top(answers, scores, k):
    """Majority among the k answers with the highest scores. k = 1 is best of N, k = N the plain vote."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return majority([answers[i] for i in order[:k]])


def top(n):
    return max(1, n // 4)  # how many the verifier admits to the vote


def choose_among(n, golds, answers, scores, lengths):
    """What each way of choosing achieves with n answers. All arguments but n: a list a problem, of N >= n.

    The N answers are cut into N // n blocks, and each block is one trial: with n = 1 that is the mean over
    all answers, with n = N a single trial a problem. Returns shares of right choices.
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
    right = [sum(a == gold for a in said) for gold, said in zip(golds, answers)]
    results["oracle"] = sum(sft.pass_at_k(len(answers[0]), c, n) for c in right) / len(golds)
    # A peak that is chosen on one half of the problems and measured on the other is no peak of luck.
    for half, some in (("best_a", best[::2]), ("best_b", best[1::2])):
        results[half] = sum(some) / max(1, len(some))
    return results


# ---------------------------------------------------------------------------------------------
# Sampling and scoring


def answer_often(model, tok, problems, n, longest, *key):
    """n answers to each problem: a list a problem, of gpt.Answer."""
    found = []
    some = max(1, 512 // n)  # problems at once: large batches are what a CPU likes as well
    for i in tqdm(range(0, len(problems), some), desc=f"{n} answers a problem", leave=False):
        questions = [p.text for p in problems[i : i + some] for _ in range(n)]
        golds = [p.answer for p in problems[i : i + some] for _ in range(n)]
        answers = gpt.solve(model, tok, questions, golds, 1.0, gpt.rng(*key, i), longest, batch=some * n)
        found += [answers[j : j + n] for j in range(0, len(answers), n)]
    return found


@torch.no_grad()
def score_all(scorer, tok, problems, groups):
    """The verifier's scores of all answers: a list a problem, of floats. Equal texts are read once."""
    found = []
    for problem, group in zip(tqdm(problems, desc="scoring", leave=False), groups):
        different = list(dict.fromkeys(tuple(a.ids) for a in group))
        prompts = [tok.prompt(problem.text)] * len(different)
        # The ids that were generated. The text encoded anew can be other tokens, and another score.
        scores = gpt.final_scores(scorer, prompts, [list(ids) for ids in different]).tolist()
        of = dict(zip(different, scores))
        found.append([of[tuple(a.ids)] for a in group])
    return found


@torch.no_grad()
def revise(model, tok, problems, drafts, longest):
    """Every draft, written on greedily from the token that the model found least likely when it sampled it.

    A slip is a token that nobody would have bet on, so this finds slips. So is a right reading that
    most demonstrators do not share. Returns a list of gpt.Answer.
    """
    prompts, kept = [], []
    for problem, draft in zip(problems, drafts):
        kept.append(draft.ids[: int(draft.logps.argmin())])
        prompts.append(tok.prompt(problem.text) + kept[-1])
    revisions = []
    for i in range(0, len(prompts), 250):
        some = prompts[i : i + 250]
        room = min(longest, model.config.block_size - max(map(len, some)))
        for j, (ids, logps) in enumerate(zip(*gpt.sample(model, some, room, [tok.end], temperature=0.0)), i):
            ids = kept[j] + ids
            ended = ids[-1] == tok.end
            text = tok.decode(ids[:-1] if ended else ids)
            logps = torch.cat([drafts[j].logps[: len(kept[j])], logps])
            revisions.append(gpt.Answer(text, ids, logps, ended, is_right(text, problems[j].answer)))
    return revisions


# ---------------------------------------------------------------------------------------------


def train(args):
    """One run: the verifier from the SFT model, then all ways of choosing. Returns its gpt.Run."""
    # ---- who answers
    flags = ["--answer_only"] if args.break_ == "no_cot" else []
    where = args.load or gpt.made_by("sft", args, "two minutes", flags)
    model = gpt.load_model(where, args.device, args.dtype == "bfloat16").requires_grad_(False)
    tok = gpt.Tokenizer(model.config.tokenizer)
    torch.manual_seed(args.seed)  # the verifier's new layer is the only thing that is drawn globally
    scorer = gpt.Scorer(gpt.load_model(where, args.device, args.dtype == "bfloat16")).to(args.device)
    steps, samples = args.train_problems // args.batch, args.samples
    if args.break_ in ("overoptimize_verifier", "self_correct"):
        # The clean run's verifier: what is broken is the use of its verdicts, so nothing else may differ.
        clean = gpt.Run(argparse.Namespace(**{**vars(args), "break_": None}))
        scorer, steps = gpt.load_scorer(str(clean.folder), args.device, args.dtype == "bfloat16"), 0
    run = gpt.Run(args)

    # ---- the problems: to learn from, to check the verifier on, to be answered in the end
    lessons = task.problems(steps * args.batch, f"verifier {args.seed}")  # others than the demonstrations'
    checks = task.problems(max(1, args.problems // 2), args.seed, "valid")
    problems = task.problems(args.problems, args.seed, "test")
    longest = args.max_tokens
    room = model.config.block_size - max(len(tok.prompt(p.text)) for p in lessons + checks + problems)
    if longest > room:
        raise SystemExit(f"--max_tokens {longest}: the longest problem leaves {room} tokens of the context")
    # What the verifier learns from are the model's own solutions: it will be asked about such.
    solved = answer_often(model, tok, lessons, samples, longest, args.seed, "lessons")
    checked = answer_often(model, tok, checks, 8, longest, args.seed, "checks")
    turned_out = torch.tensor([a.right for group in checked for a in group])

    # ---- the loop: the verifier
    lr = args.lr or (1e-3 if model.config.n_embd < 512 else 1e-5)
    optimizer = gpt.make_optimizer(scorer, lr)
    for step in run.steps(steps, scorer, optimizer):
        if step % args.eval_every == 0 or step == steps:
            verdicts = score_all(scorer, tok, checks, checked)
            found = quality(torch.tensor([s for group in verdicts for s in group]), turned_out)
            run.say(step, **found)
            run.samples(step, [
                (p.text, f"{a.text} (verifier: {'right' if s > 0 else 'wrong'}, score {s:+.1f}; "
                         f"it is {'right' if a.right else 'wrong'})")
                for p, group, some in zip(checks[:8], checked, verdicts) for a, s in [(group[0], some[0])]
            ])  # fmt: skip
        if step == steps:
            break
        # ---- one update: all solutions of a few problems, so that right and wrong stand side by side
        gpt.set_lr(optimizer, lr, step, steps)
        chosen = gpt.batch_indices(len(lessons), args.batch, step, args.seed)
        prompts = [tok.prompt(lessons[i].text) for i in chosen for _ in range(samples)]
        answers = [a for i in chosen for a in solved[i]]
        scores, mask = gpt.completion_scores(scorer, prompts, [a.ids for a in answers])  # (B, N+1)
        if args.level == "solution":
            mask = last_only(mask)
        loss = verifier_loss(scores, mask, torch.tensor([a.right for a in answers], device=scores.device))
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss, grad_norm=grad_norm)

    # ---- N answers to every held-out problem, and every way to choose
    golds = [p.answer for p in problems]
    greedy = gpt.solve(model, tok, [p.text for p in problems], golds, 0.0, None, longest)
    groups = answer_often(model, tok, problems, args.n, longest, args.seed, "answers")
    scores = score_all(scorer, tok, problems, groups)
    said = [[last_answer(a.text) for a in group] for group in groups]
    lengths = [[len(a.ids) for a in group] for group in groups]
    print("\n    N    vote  vote of top  weighted vote  best of N  oracle   score  tokens")
    for n in [2**i for i in range(args.n.bit_length())]:
        m = choose_among(n, golds, said, scores, lengths)
        run.log(steps, n=n, **m)
        print(f"{n:5}{m['vote']:8.3f}{m['vote_of_top']:13.3f}{m['weighted_vote']:15.3f}{m['best_of_n']:11.3f}"
              f"{m['oracle']:8.3f}{m['score']:8.2f}{m['tokens']:8.0f}")  # fmt: skip

    # ---- the model revises its first answer; somebody decides whether the revision is the better one
    drafts = [group[0] for group in groups]
    revisions = revise(model, tok, problems, drafts, longest)
    before = [some[0] for some in scores]
    after = [some[0] for some in score_all(scorer, tok, problems, [[a] for a in revisions])]
    if args.break_ == "self_correct":
        # "It knows best what it meant": the likelier of the two, by the model's own mean log-probability.
        before, after = ([a.logps.mean().item() for a in some] for some in (drafts, revisions))
    final = [r if new > old else d for d, r, old, new in zip(drafts, revisions, before, after)]

    # ---- the report
    curves = [m for m in run.metrics if "n" in m]
    one, all_n, peak = curves[0], curves[-1], max(curves, key=lambda m: m["best_a"])
    report = fine_tuning_loss(where) | found
    report |= {"greedy": sum(a.right for a in greedy) / len(golds), "one": one["vote"]}
    report |= {name: all_n[name] for name in ("vote", "vote_of_top", "weighted_vote", "best_of_n", "oracle")}
    # Who has the last word: a vote among the quarter with the highest scores, or the highest score alone?
    report["chosen"] = all_n["best_of_n" if args.break_ == "overoptimize_verifier" else "vote_of_top"]
    report |= {"score_one": one["score"], "score": all_n["score"], "onset": 1 / max(found["fooled"], 1e-3)}
    report |= {
        "peak_n": peak["n"],
        "start_b": one["best_b"],
        "peak_b": peak["best_b"],
        "end_b": all_n["best_b"],
    }
    winners = [group[best_of(some)] for group, some in zip(groups, scores)]
    for name, some in (("wrong", sum(groups, [])), ("fakes", winners)):
        wrong = [a for a in some if not a.right]
        report[f"{name}_miscalculated"] = sum(miscalculates(a.text) for a in wrong) / max(1, len(wrong))
    flips = Counter((d.right, f.right) for d, f in zip(drafts, final))
    report |= {
        "draft": sum(a.right for a in drafts) / len(golds),
        "revised": sum(a.right for a in final) / len(golds),
        "repaired": flips[False, True] / len(golds),
        "spoiled": flips[True, False] / len(golds),
        "rewritten": sum(f is r for f, r in zip(final, revisions)) / len(golds),
    }
    rare = precision_at(0.05, found["sensitivity"], found["specificity"])
    r = {name: f"{value:.1%}" for name, value in report.items()}
    verdicts = "It accepts none of them."
    if report["sensitivity"] or report["fooled"]:
        verdicts = (
            f"Of those that it accepts {r['precision']} are\n"
            f"right; if only 5 % of all were, {rare:.1%} would be. It is fooled by a share h = "
            f"{report['fooled']:.3f} of all samples\n(wrong, and accepted), and 1/h = {report['onset']:.0f}."
        )
    print(
        f"\nThe verifier is right about {r['held_out']} of held-out solutions. {verdicts}\n"
        f"Best of N is best at N = {peak['n']} (on one half of the problems).\n"
        f"Of the wrong answers {r['wrong_miscalculated']} miscalculate, of the wrong ones with the highest "
        f"score {r['fakes_miscalculated']}.\n"
        f"Revising its first answer: {r['rewritten']} rewritten, {r['repaired']} of all repaired, "
        f"{r['spoiled']} spoiled."
    )
    run.samples(f"{steps}, chosen among {args.n}", [
        (p.text, f"highest score ({max(some):+.1f}, {'right' if w.right else 'wrong'}): {w.text}\n\n"
                 f"majority vote: {majority(a)}   vote of the top: {vote_of_top(a, some, top(args.n))}   "
                 f"right answer: {p.answer}")
        for p, w, some, a in zip(problems[:12], winners, scores, said)
    ])  # fmt: skip
    draw_choices(run.folder / "figure.png", curves, report)
    run.finish(scorer, **report)
    return run


def fine_tuning_loss(where):
    """The loss of the run that made the model, where there is one: of its last fifth, and the one before."""
    path = Path(where).parent / "metrics.jsonl"
    if not path.is_file():
        return {}
    losses = [m["loss"] for m in map(json.loads, path.read_text().splitlines()) if "loss" in m]
    fifth = max(1, len(losses) // 5)
    return {
        "sft_loss": sum(losses[-fifth:]) / fifth,
        "sft_loss_before": sum(losses[-2 * fifth : -fifth]) / max(1, len(losses[-2 * fifth : -fifth])),
    }


# ---------------------------------------------------------------------------------------------
# Figures

CURVES = {  # metric: name, colour, line
    "oracle": ("oracle (pass@N)", "0.6", ":"),
    "weighted_vote": ("weighted vote", "tab:green", "-"),
    "vote_of_top": ("vote of the verifier's top quarter", "tab:blue", "-"),
    "vote": ("majority vote", "tab:orange", "-"),
    "best_of_n": ("best of N (highest score)", "tab:red", "--"),
}


def figure(path, draw):
    """Two panels, drawn by draw(left, right)."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file: works without a screen
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    draw(*axes)
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def log_axis(ax, sizes):
    """N doubles from tick to tick."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes[::2], [str(n) for n in sizes[::2]])


def draw_choices(path, curves, report):
    """All ways to choose, against N and against the tokens that they cost."""
    sizes = [m["n"] for m in curves]

    def draw(left, right):
        for metric, (name, color, line) in CURVES.items():
            values = [m[metric] for m in curves]
            left.plot(sizes, values, line, color=color, linewidth=2, label=name)
            # Who asks the verifier has every answer read once more.
            cost = 1 if metric in ("vote", "oracle") else 2
            right.plot([cost * m["tokens"] for m in curves], values, line, color=color, linewidth=2)
        left.axhline(report["greedy"], color="0.3", linewidth=0.8, label="one greedy answer")
        if report["onset"] <= sizes[-1]:
            left.axvline(report["onset"], color="tab:red", linewidth=0.8, linestyle=":")
            left.text(report["onset"], 1.03, "1/h", color="tab:red", ha="center")
        left.set(xlabel="N answers", ylabel="right answers", ylim=(0, 1.1))
        left.set_title("the same answers, chosen in different ways")
        right.set(title="against what it costs", xlabel="tokens written and read a problem", ylim=(0, 1.1))
        right.set_xscale("log")
        log_axis(left, sizes)
        left.legend(fontsize=7)

    figure(path, draw)


def draw_verifier(path, runs):
    """overoptimize_verifier: what the chooser sees, and what becomes of it."""
    curves = [m for m in runs[-1].metrics if "n" in m]
    sizes = [m["n"] for m in curves]

    def draw(left, right):
        left.plot(sizes, [m["score"] for m in curves], "--", color="tab:red", linewidth=2)
        left.set(title="dashboard: the highest score", xlabel="N answers", ylabel="the verifier's score")
        for metric in ("vote_of_top", "vote", "best_of_n"):
            name, color, line = CURVES[metric]
            right.plot(sizes, [m[metric] for m in curves], line, color=color, linewidth=2, label=name)
        right.set(title="outside: right answers", xlabel="N answers", ylim=(0, 1))
        for ax in (left, right):
            log_axis(ax, sizes)
        right.legend(fontsize=8)

    figure(path, draw)


def draw_no_cot(path, runs):
    """no_cot: two losses that converge, and what the models can do with N answers."""

    def draw(left, right):
        for run, color in zip(runs, ("tab:blue", "tab:red")):
            flags = [f"--{key}={run.config[key]}" for key in ("seed", "dtype")]
            flags += [] if run.label == "clean" else ["--answer_only"]
            made = gpt.Run(gpt.parse("sft", sft.parser(), flags))
            losses = [m["loss"] for m in made.metrics if "loss" in m]
            width = max(1, len(losses) // 30)
            means = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1, width)]
            left.plot(range(0, width * len(means), width), means, color=color, label=run.label)
            curves = [m for m in run.metrics if "n" in m]
            sizes = [m["n"] for m in curves]
            for metric, line in (("vote_of_top", "-"), ("vote", "--"), ("oracle", ":")):
                name = f"{run.label}: {CURVES[metric][0]}"
                right.plot(sizes, [m[metric] for m in curves], line, color=color, label=name)
        left.set(
            title="dashboard: the fine-tuning loss", xlabel="step", ylabel="nats a token", ylim=(0, None)
        )
        right.set(title="outside: right answers", xlabel="N answers", ylim=(0, 1.02))
        log_axis(right, sizes)
        left.legend()
        right.legend(fontsize=6, loc=(0.47, 0.22))  # where no line passes

    figure(path, draw)


# ---------------------------------------------------------------------------------------------
# Real data


def published(path):
    """GSM8K's published model solutions: vote, oracle and the best single one of the models in the file."""
    rows, file = [], Path(path).expanduser()
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise SystemExit(f"{path}: published solutions are a local .jsonl or .jsonl.gz file")
    public.load_or_exit(str(file))  # says in one line what is wrong with a file, and where
    for number, row in public.lines(file):
        entries = {name: entry for name, entry in row.items() if isinstance(entry, dict)}
        gold = last_answer(row.get("ground_truth", ""))
        if entries and gold is not None:
            if rows and entries.keys() != rows[0][1].keys():
                raise SystemExit(f"{path}, line {number}: other models than in the lines before")
            rows.append((gold, {name: last_answer(e["solution"]) for name, e in entries.items()}, entries))
    if not rows:
        raise SystemExit(f"{path} holds no published solutions: each line needs ground_truth and, for every "
                         "model, an object with solution and is_correct")  # fmt: skip
    models = list(rows[0][1])
    print(f"{path}: {len(rows)} problems, {len(models)} models")
    marked = [(a == gold, e[name]["is_correct"]) for gold, said, e in rows for name, a in said.items()]
    print(f"the checker agrees with {sum(x is y for x, y in marked)} of {len(marked)} published marks")
    for name in models:
        print(f"  {name:24}{sum(said[name] == gold for gold, said, _ in rows) / len(rows):8.1%}")
    vote = sum(majority(list(said.values())) == gold for gold, said, _ in rows) / len(rows)
    oracle = sum(gold in said.values() for gold, said, _ in rows) / len(rows)
    print(f"  {'majority vote':24}{vote:8.1%}   (a tie goes to the first in the file)")
    print(f"  {'oracle':24}{oracle:8.1%}   (any of them right)")


# fmt: off
def parser():
    p = argparse.ArgumentParser(prog="reasoning.py", description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--load", help="who answers: a folder or gpt2, ... (default: what sft.py makes)")
    add("--data", help="only count: a file of published model solutions to GSM8K")
    add("--n", type=int, default=256, help="answers to each problem")
    add("--problems", type=int, default=250, help="held-out problems: a standard error of 3 points at most,\n"
        "and less where N is small, since all answers count")
    add("--level", default="token", choices=["token", "solution"], help="where the verifier has a loss:\n"
        "at every token, or at the end of the solution only")
    add("--train_problems", type=int, default=4000, help="problems that the verifier learns from")
    add("--samples", type=int, default=8, help="... and the model's solutions to each")
    add("--batch", type=int, default=4, help="problems an update, with all their solutions")
    add("--lr", type=float, help="step size of the verifier (default 1e-3; 1e-5 from width 512 on)")
    add("--eval_every", type=int, default=250, help="steps between evaluations of the verifier")
    add("--max_tokens", type=int, default=48, help="longer answers are cut off")
    return p
# fmt: on


def main(argv=None):
    args = gpt.parse("reasoning", parser(), argv, BREAKS)
    if args.data:
        published(args.data)
        return
    if args.n & (args.n - 1):
        raise SystemExit(f"--n {args.n}: N doubles from 1 on, so it must be 2, 4, 8, 16, ...")
    if args.train_problems < args.batch:
        raise SystemExit(f"--train_problems {args.train_problems} are too few for --batch {args.batch}")
    if args.break_ is None:
        gpt.run_once(train, args, reuse=args.resume)
        return
    if args.break_ == "no_cot" and args.load:
        raise SystemExit("--break no_cot fine-tunes a model of its own: leave --load out")
    clean, broken = gpt.clean_and_broken(train, args)
    C, B = clean.report, broken.report
    dashboard = {
        "loss of the fine-tuning": "sft_loss",
        "verifier: held-out solutions": "held_out",
        "   ... its score of one answer": "score_one",
        f"   ... of the best of {args.n}": "score",
    }
    outside = {
        "right answers, one sample": "one",
        "   ... greedy": "greedy",
        f"   ... majority vote of {args.n}": "vote",
        "   ... as chosen here": "chosen",
        f"   ... best of {args.n}": "best_of_n",
        "   ... best of N, at its peak": "peak_b",
        "N of that peak": "peak_n",
        f"a right one among the {args.n}": "oracle",
        "verifier: right ones it accepts": "sensitivity",
        "   ... accepted ones that are right": "precision",
        "   ... h, all that are wrong and accepted": "fooled",
    }
    if args.break_ == "self_correct":
        dashboard = {"verifier: held-out solutions": "held_out"}
        outside = {
            "right, the first answer": "draft",
            "   ... revised": "revised",
            "   ... greedy": "greedy",
            "revisions that were preferred": "rewritten",
            "   ... from wrong to right": "repaired",
            "   ... from right to wrong": "spoiled",
        }
    if args.break_ == "overoptimize_verifier":
        curves = [m for m in broken.metrics if "n" in m]
        claims = [
            ("the verifier is right about 80 % of held-out solutions or more", B["held_out"] >= 0.8),
            ("its score of the best answer rises with every doubling of N",
             all(a["score"] < b["score"] for a, b in zip(curves, curves[1:]))),
            ("right answers rise by 5 points or more to a peak (other problems than chose the peak)",
             B["peak_b"] >= B["start_b"] + 0.05),
            ("... and end 10 points or more below it", B["end_b"] <= B["peak_b"] - 0.1),
            ("... and below the majority vote, which asks no verifier", B["best_of_n"] < B["vote"]),
            ("clean: the vote of the top quarter, same scores, is 10 points or more above",
             C["chosen"] >= B["chosen"] + 0.1),
        ]  # fmt: skip
        panels = draw_verifier
        cure = "python reasoning.py   (let the verifier's favourites vote)"
    elif args.break_ == "no_cot":
        claims = [
            ("the fine-tuning loss has converged in both: within 5 % of the fifth before",
             all(r["sft_loss"] > 0.95 * r["sft_loss_before"] for r in (C, B))),
            ("right answers, one sample: less than half of the clean run's", B["one"] < 0.5 * C["one"]),
            ("... and so by majority vote and greedily",
             B["vote"] < 0.5 * C["vote"] and B["greedy"] < 0.5 * C["greedy"]),
        ]  # fmt: skip
        panels = draw_no_cot
        cure = "python reasoning.py   (demonstrations that show their working)"
    else:
        claims = [
            ("more answers are spoiled than repaired", B["spoiled"] > B["repaired"]),
            ("more are spoiled than with the verifier as the judge", B["spoiled"] > C["spoiled"]),
            ("fewer right answers than with the verifier as the judge", B["revised"] < C["revised"]),
        ]
        panels = [
            ("the first answer, revised", "share of held-out problems", ("repaired", "spoiled")),
            ("outside: right answers", "share of held-out problems", ("draft", "revised", "greedy")),
        ]
        cure = "python reasoning.py   (a judge that knows something the model does not)"
    print(f"\n{args.break_}: {BREAKS[args.break_].split(':')[0]}.")
    gpt.break_report(clean, broken, dashboard, outside, claims, cure, panels)


if __name__ == "__main__":
    main()
