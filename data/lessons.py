"""What a script learns from and is tested on, wherever it comes from: the embedded task, a file, or the hub.

    running_text(tok, seed, step, ...)         for gpt.py
    demonstrations(args, tok, room, n)         for sft.py
    preferences(args, tok, context, n)         for dpo.py and reward_model.py
    problems(args, tok, context, n)            for ppo.py, grpo.py, reasoning.py, tools.py and reward_model.py
    transcripts(args, tok, context)            for tools.py

All but the first return the same thing, Lessons, so a script does not know where its rows came from. `args` needs
.data (None for the embedded task), .seed, .problems and .max_tokens. Exits with one line if the source cannot be read
or nothing is left of it.
"""

import hashlib
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace

import torch

from data import calculator, public, runs, task, tool_task
from data.checker import last_answer

REAL_ANSWER = 160  # tokens that an answer to a real prompt may take
REAL_SOLUTION = 256  # ... and a worked solution: nearly all of GSM8K's fit
HELD_OUT = 500  # pairs of a source that are evaluated, at most: a standard error of 2 points


@dataclass
class Lessons:
    # Rows: {"prompt", "chosen"} of demonstrations, and "rejected" of preferences. Of problems(): problems.
    train: list
    held_out: list = field(default_factory=list)  # pairs of prompts that are not trained on, with the source's labels
    problems: list = field(default_factory=list)  # held-out problems with .text and .answer
    checked: bool = True  # False: .answer is no gold answer, the outputs can only be read
    longest: int = 48  # tokens that an answer to one of the problems may take
    styles: dict = field(default_factory=dict)  # of the embedded task: what its answers are looked at for
    checks: list = field(default_factory=list)  # further held-out problems


@dataclass(frozen=True)
class Problem:
    """A problem of a source. To the scripts it is like one of data/task.py or data/tool_task.py (without a sale)."""

    text: str
    answer: Fraction
    solution: str | None = None
    labels: tuple = ()
    prices: dict = field(default_factory=dict)


def running_text(tok, seed, step, batch, length):
    """Ids (batch, length) for one step of pretraining. Every row starts with a text and ends in the middle of one.

    The stream of texts is endless and hardly any text occurs twice, so the training loss is a held-out loss too.
    """
    rows, row = [], []
    for text in tool_task.corpus(f"{seed} step {step}"):
        row += tok.encode(text + "\n\n")
        if len(row) >= length:
            rows.append(row[:length])
            row = []
        if len(rows) == batch:
            return torch.tensor(rows)


def fingerprint(tok):
    """Of the pretraining text and its vocabulary: a changed task or tokenizer gives another one."""
    texts = itertools.islice(tool_task.corpus("fingerprint"), 2000)
    return hashlib.sha256(repr([tok.encode(text) for text in texts]).encode()).hexdigest()[:16]


def encoder(tok):
    """tok.encode for the functions that clean rows. Of a dialogue, as many ids as its turns add to an empty prompt."""
    empty = len(tok.prompt(""))
    return lambda text: tok.prompt(text)[empty:] if isinstance(text, public.Dialogue) else tok.encode(text)


def pair_room(tok, context):
    """The limit for clean_pairs, which allows four tokens for the chat template: a published one can be longer."""
    template = len(tok.prompt("")) + len(tok.answer(""))
    return context - max(0, template - public.TEMPLATE_TOKENS)


def clean(rows, tok, room):
    """The pairs or judgements among the rows that fit `room` tokens, and the counts of the others."""
    if public.is_judged(rows):
        return public.clean_demonstrations(rows, encoder(tok), room - public.TEMPLATE_TOKENS, judged=True)
    return public.clean_pairs(rows, encoder(tok), room)


def good_and_bad(judged):
    """Judgements of single answers, by their label."""
    return [row for row in judged if row["chosen"] is not None], [row for row in judged if row["chosen"] is None]


def split(rows, seed):
    """public.split_pairs. Of judgements, the good and the bad ones are split apart, so that both sides have both."""
    kinds = good_and_bad(rows) if public.is_judged(rows) else [rows]
    prompts = {row["prompt"] for kind in kinds for row in public.split_pairs(kind, seed=seed)[1]}
    if any(all(row["prompt"] in prompts for row in kind) for kind in kinds):
        raise ValueError("no prompt of one kind is left to train on")
    return [row for row in rows if row["prompt"] not in prompts], [row for row in rows if row["prompt"] in prompts]


def split_problems(args, rows):
    """(training rows, held-out rows) of those with a question and a gold answer."""
    rows = [row for row in rows if row["answer"] is not None and row["prompt"].strip()]
    if len({row["prompt"] for row in rows}) < 2:  # none can be held out
        return rows, []
    if args.data in public.HUB:  # published with a test split
        return rows, public.load_or_exit(args.data, "test")
    return public.split_pairs(rows, seed=args.seed)


def held_out_prompts(args, tok, context, rows):
    """The prompts that the later chapters hold out with this seed and a context of that size."""
    return held_out_pairs(args, tok, context, rows) | {row["prompt"] for row in split_problems(args, rows)[1]}


def held_out_pairs(args, tok, context, rows):
    """The prompts of pairs that dpo.py and reward_model.py hold out."""
    judged = public.is_judged(rows)
    pairs = [row for row in rows if row["rejected"] is not None or (judged and row["chosen"] is not None)]
    kept = clean(pairs, tok, pair_room(tok, context))[0]

    def held_out(some):
        try:
            return {row["prompt"] for row in split(some, args.seed)[1]}
        except ValueError:  # too few prompts: they refuse such a file
            return set()

    # held_out(kept) is the split in `preferences`. The pairs that are left out there are split too: a run with another
    # tokenizer or a larger context may use them.
    used = held_out(kept)
    return used and used | (held_out(pairs) - {row["prompt"] for row in kept})


def demonstrations(args, tok, room, n):
    """Demonstrations that fit a context of `room` tokens: n of the embedded task, or all of a source.

    If the source holds pairs, their chosen answers are the demonstrations. Only the training side of the split in
    `preferences` and `problems` is used. SFT on a held-out pair would raise the held-out results of the DPO run that
    follows.
    """
    if args.data:
        rows = public.load_or_exit(args.data)
        held_out = held_out_prompts(args, tok, room, rows)
        free = [row for row in rows if row["prompt"] not in held_out]
        template = len(tok.prompt("")) + len(tok.answer(""))  # tokens
        kept, counts = public.clean_demonstrations(free, encoder(tok), room - template)
        public.say_counts(args.data, counts | {"held out": len(rows) - len(free)}, room, "rows")
        if not kept:
            raise SystemExit(f"{args.data} holds no demonstration that fits the context of {room} tokens")
        return Lessons(kept, checked=False, longest=REAL_ANSWER)
    rows = [{"prompt": p.text, "chosen": solution} for p, solution in task.demonstrations(n, args.seed)]
    lessons = Lessons(rows, problems=task.problems(args.problems, args.seed, "test"))
    lessons.train = [r for r in rows if len(tok.prompt(r["prompt"])) + len(tok.answer(r["chosen"])) <= room]
    if len(lessons.train) < len(rows):
        print(f"{len(rows) - len(lessons.train)} of {len(rows)} demonstrations are longer than the context of "
              f"{room} tokens and are left out")  # fmt: skip
    if not lessons.train:
        raise SystemExit(f"the embedded task holds no demonstration that fits the context of {room} tokens")
    return lessons


def matched(rows, seed):
    """Judgements -> pairs of a good answer and a bad one, each to its own prompt ("rejected_prompt").

    --loss kto compares no answer with another one, so it does not matter which two are put together. There are as
    many pairs as answers of the commoner kind, and answers of the rarer kind are in several pairs. So both kinds have
    the same weight, however rare one of them is. (Ethayarajh et al. 2024 weight the losses instead.)
    """
    good, bad = good_and_bad(rows)
    for kind in (good, bad):
        random.Random(seed).shuffle(kind)
    return [
        good[i % len(good)]
        | {"rejected_prompt": bad[i % len(bad)]["prompt"], "rejected": bad[i % len(bad)]["rejected"]}
        for i in range(max(len(good), len(bad)))
    ]


def preferences(args, tok, context, n=None, held_out=200, annotator="human", unpaired=False):
    """Preference pairs: n of the embedded task, or at most n of a source (None: all).

    unpaired: a source may also hold judgements of single answers, see `matched`.

    The held-out pairs keep the labels of the source; the breaks of dpo.py change only the training pairs. Where a
    source has gold answers (GSM8K), its problems are checked; elsewhere four held-out prompts are answered so that
    the outputs can be read.
    """
    if not args.data:
        return Lessons(
            task.preference_pairs(n, args.seed, annotator=annotator),
            task.preference_pairs(held_out, args.seed, "test", annotator=annotator),
            task.problems(args.problems or 500, args.seed, "test"),
        )
    room = min(args.max_tokens, pair_room(tok, context))
    rows = public.load_or_exit(args.data)
    judged = public.is_judged(rows)
    if judged and not unpaired:
        raise SystemExit(
            f"{args.data} holds judgements of single answers, not pairs: only dpo.py --loss kto takes them"
        )
    pairs, counts = clean(rows, tok, room)
    public.say_counts(args.data, counts, room, "answers" if judged else "pairs")
    try:
        train, held_out = split(pairs, args.seed)
    except ValueError:
        raise SystemExit(
            f"{len(pairs)} {'answers' if judged else 'pairs'}, with fewer than two different prompts"
            f"{' of good or of bad ones' if judged else ''}, are left of {args.data}: none can be held out "
            "(see --max_tokens)"
        ) from None
    if judged:
        train, held_out = matched(train, args.seed), matched(held_out, args.seed)
    if n is not None:  # a random part of the file
        random.Random(args.seed).shuffle(train)
        train = train[:n]
    if len(held_out) > HELD_OUT:
        held_out = random.Random(args.seed).sample(held_out, HELD_OUT)
    checked = held_out[0]["answer"] is not None
    problems = [
        SimpleNamespace(text=p["prompt"], answer=p["answer"] or 0)
        for p in held_out
        if len(tok.prompt(p["prompt"])) + REAL_ANSWER <= context
    ][: (args.problems or 50) if checked else 4]
    return Lessons(train, held_out, problems, checked, REAL_ANSWER)


def problems(args, tok, context, n, key=None, checks=0, longest=None, kind=task):
    """n problems to train on (.train), args.problems held-out ones (.problems), and `checks` other held-out ones.

    Of the embedded task (kind: the module task or tool_task) the training problems are all new; key is another seed
    for them. Of a source the rows with a gold number are used. They come in random order, and again when all have been
    used. From the hub its test split is held out, of a file one prompt in five. If a file is small, there are fewer
    held-out problems than asked for.
    """
    longest = longest or args.max_tokens
    if not args.data:
        return Lessons(
            kind.problems(n, args.seed if key is None else key),
            checks=kind.problems(checks, args.seed, "valid"),
            problems=kind.problems(args.problems, args.seed, "test"),
            longest=longest,
            styles=task.STYLES,
        )
    train, held_out = gold_problems(args, tok, context, longest)
    random.Random(f"held out {args.seed}").shuffle(held_out)
    some = held_out[: args.problems + checks]
    cut = len(some) * args.problems // (args.problems + checks)
    if not (train and cut and cut + bool(checks) <= len(some)):
        raise SystemExit(
            f"{args.data}: {len(train)} problems are left to train on and {len(held_out)} to be tested on, too few "
            f"(answers may take {longest} tokens of a context of {context})"
        )
    train = [train[i] for i in runs.batch_indices(len(train), n, 0, args.seed)]
    return Lessons(train, checks=some[cut:], problems=some[:cut], longest=longest)


def gold_problems(args, tok, context, longest):
    """(training problems, held-out problems) of a source, as far as they leave room for an answer in the context."""
    rows = public.load_or_exit(args.data)
    golds = [row for row in rows if row["answer"] is not None]
    if not golds:
        raise SystemExit(f"{args.data} holds no gold numbers: each row needs question (or prompt) and answer")
    blank = sum(not row["prompt"].strip() for row in golds)
    counts, sides = Counter({"no answer": len(rows) - len(golds), "empty": blank}), []
    room = context - longest - len(tok.prompt(""))
    if room < 1:
        raise SystemExit(f"--max_tokens {longest} leaves no room for a question in the context of {context} tokens")
    for side in split_problems(args, rows):
        # As demonstrations whose text is the gold number: with the question, it must fit beside an answer.
        asked = [row | {"chosen": row["answer"], "solution": row["chosen"]} for row in side]
        kept, found = public.clean_demonstrations(asked, encoder(tok), room)
        counts.update(found)
        sides.append([Problem(r["prompt"], last_answer(f"#### {r['answer']}"), r["solution"]) for r in kept])
    public.say_counts(args.data, counts, room, "problems")
    return sides


def has_pairs(args):
    """Does the source hold any pair of answers?"""
    return any(row["rejected"] is not None for row in public.load_or_exit(args.data))


def transcript(solution, calls=True):
    """A solution with GSM8K's annotations as tools.py generates it: every result as our calculator writes it. None if
    it computes another number. calls=False: without the annotations.

    "He has 5*.5=<<5*.5=2.50>>2.5." -> "He has 5*.5=<<5*.5=2.5>>2.5."
    """
    if not calls:
        return calculator.ANNOTATION.sub("", solution)
    if any(calculator.agreement(call) not in calculator.AGREE for call in calculator.ANNOTATION.findall(solution)):
        return None

    def rewritten(call):
        expression = call[1].rpartition("=")[0]
        return f"<<{expression}={calculator.calculate(expression)}>>"

    return calculator.ANNOTATION.sub(rewritten, solution)


def transcripts(args, tok, context):
    """Solutions with calls (args.plain: without), and held-out problems: args.demos of the tool task, or all of a
    source with annotations."""
    if not args.data:
        material = problems(args, tok, context, args.demos, kind=tool_task)
        rows = [{"prompt": p.text, "chosen": tool_task.demonstrate(p, not args.plain)} for p in material.train]
        return Lessons(rows, problems=material.problems, longest=material.longest)
    material = problems(args, tok, context, 1)
    rows = split_problems(args, public.load_or_exit(args.data))[0]
    calculator.annotations(args.data, [row["chosen"] or "" for row in rows])
    rows = [row | {"chosen": row["chosen"] and transcript(row["chosen"], not args.plain)} for row in rows]
    template = len(tok.prompt("")) + len(tok.answer(""))  # tokens
    kept, counts = public.clean_demonstrations(rows, encoder(tok), context - template)
    public.say_counts(args.data, counts, context, "solutions")
    if not kept:
        raise SystemExit(f"{args.data} holds no worked solution that fits the context of {context} tokens")
    return Lessons(kept, problems=material.problems, longest=material.longest)


def encode_pairs(tok, pairs):
    """[(prompt ids, chosen ids, rejected ids)]. For judgements, also the ids of the rejected answer's prompt."""
    return [
        (tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"]))
        + ((tok.prompt(p["rejected_prompt"]),) if "rejected_prompt" in p else ())
        for p in pairs
    ]
