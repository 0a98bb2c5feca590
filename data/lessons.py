"""What a script learns from and is tested on, wherever it comes from: the embedded task, a file, or the hub.

    running_text(tok, seed, step, ...)         for gpt.py
    demonstrations(args, tok, room, n)         for sft.py
    preferences(args, tok, context, n)         for dpo.py and reward_model.py

The last two return the same thing, Lessons, so a script does not know where its rows came from. `args` needs .data
(None for the embedded task), .seed, .problems and, for preferences, .max_tokens. Exits with one line if the source
cannot be read or nothing is left of it.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from data import public, task, tool_task

REAL_ANSWER = 160  # tokens that an answer to a real prompt may take


@dataclass
class Lessons:
    train: list  # rows: {"prompt", "chosen"} of demonstrations, and "rejected" of preferences
    held_out: list = field(default_factory=list)  # pairs of prompts that are not trained on, with the source's labels
    problems: list = field(default_factory=list)  # held-out problems with .text and .answer
    checked: bool = True  # False: .answer is no gold answer, the outputs can only be read
    longest: int = 48  # tokens that an answer to one of the problems may take


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


def pair_room(tok, context):
    """The limit for clean_pairs, which allows four tokens for the chat template: a published one can be longer."""
    template = len(tok.prompt("")) + len(tok.answer(""))
    return context - max(0, template - public.TEMPLATE_TOKENS)


def clean(rows, tok, room):
    """The pairs or judgements among the rows that fit `room` tokens, and the counts of the others."""
    if public.is_judged(rows):
        return public.clean_demonstrations(rows, tok.encode, room - public.TEMPLATE_TOKENS, judged=True)
    return public.clean_pairs(rows, tok.encode, room)


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


def held_out_prompts(args, tok, context, rows):
    """The prompts of pairs that dpo.py and reward_model.py hold out with this seed and a context of that size."""
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

    If the source holds pairs, their chosen answers are the demonstrations, and only the training side of the split in
    `preferences` is used. SFT on a held-out pair would raise the held-out results of the DPO run that follows.
    """
    if args.data:
        rows = public.load_or_exit(args.data)
        held_out = held_out_prompts(args, tok, room, rows)
        free = [row for row in rows if row["prompt"] not in held_out]
        template = len(tok.prompt("")) + len(tok.answer(""))  # tokens
        kept, counts = public.clean_demonstrations(free, tok.encode, room - template)
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
    checked = held_out[0]["answer"] is not None
    problems = [
        SimpleNamespace(text=p["prompt"], answer=p["answer"] or 0)
        for p in held_out
        if len(tok.prompt(p["prompt"])) + REAL_ANSWER <= context
    ][: (args.problems or 50) if checked else 4]
    return Lessons(train, held_out, problems, checked, REAL_ANSWER)


def encode_pairs(tok, pairs):
    """[(prompt ids, chosen ids, rejected ids)]. For judgements, also the ids of the rejected answer's prompt."""
    return [
        (tok.prompt(p["prompt"]), tok.answer(p["chosen"]), tok.answer(p["rejected"]))
        + ((tok.prompt(p["rejected_prompt"]),) if "rejected_prompt" in p else ())
        for p in pairs
    ]
