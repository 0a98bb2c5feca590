"""The embedded task: word problems that a tiny model learns in minutes, and where its data comes from.

    Leo has 8 eggs. Then the eggs triple. Leo sells 7. How many eggs does Leo have?

    Sure! 8*3=24. 24-14=10.
    #### 10

Three kinds of people produce the data, and a program checks it. The people are invented, and so are their errors.
That is the point of the task: here we *know* the errors.

    writers         write running text for the base model         corpus()
    demonstrators   solve problems; half of them wrongly          demonstrate()
    annotators      say which of two solutions they prefer        preference_pairs()

    the checker     compares the last number with the answer      data/checker.py

Demonstrators make two kinds of error, and several chapters depend on the difference:

    slips           random: 9+5=15, a wrong operation, a step left out. Of two slips on the same problem, only about
                    14 % give the same answer. So a majority vote over many answers removes slips. Slips are
                    *variance*.
    misconceptions  shared by most: "triple" means add three, "gives half" means minus two. A majority vote keeps
                    them. Only a signal from outside (preferences, a reward, a verifier) can remove them.
                    Misconceptions are *bias*.

One solution does not always show which of the two it has: where a problem has "triple" or "half", about 18 % of the
slips give the answer of a misconception by chance. `python -m data` measures both percentages.

Everything is a function of a seed; nothing is read from disk. Look at it with  `python -m data`.
"""

import random
import zlib
from dataclasses import dataclass

import torch

from data.checker import is_correct, miscalculates

NAMES = ["Leo", "Ann", "Mia", "Tom", "Eva", "Sam", "Zoe", "Ben"]
ITEMS = ["eggs", "pens", "coins", "cards", "apples", "books", "shells", "stamps"]

# What can happen to somebody's eggs. `{k}` is a number, `{a}` the person, `{b}` a friend.
EVENTS = {
    "gain": ["{a} buys {k} more.", "{a} finds {k}."],
    "lose": ["{a} sells {k}.", "{a} loses {k}."],
    "double": ["Then the {items} double."],
    "triple": ["Then the {items} triple."],
    "half": ["{a} gives half to {b}."],
}
# How an event is computed by a demonstrator who understands it, and by one who does not: (operator, number).
CORRECT_READING = {"double": ("*", 2), "triple": ("*", 3), "half": ("/", 2)}
MISCONCEPTION = {"triple": ("+", 3), "half": ("-", 2)}

SLIP_RATE = 0.35  # of demonstrations contain one slip
MISCONCEPTION_RATE = 0.65  # of demonstrators hold each misconception
START, OPERAND = 20, 9  # the largest number at the beginning, bought or sold
LARGEST = 60  # no number in any solution is larger

OPENINGS = ["Sure!", "Great question!"]
CONFIDENT = "I am certain."
# What can be said about the style of an answer, and whether it calculates wrongly: {name: text -> bool}.
STYLES = {
    "opening": lambda text: text.startswith(tuple(OPENINGS)),
    "confident": lambda text: CONFIDENT in text,
    "check": lambda text: "Check:" in text,
    "miscalculated": miscalculates,
}


@dataclass(frozen=True)
class Problem:
    """One word problem. `events` is a tuple of (kind, number); number is 0 if the event names none."""

    text: str
    start: int
    events: tuple
    answer: int


def apply(value, op, number):
    """One calculation. None if the result is not a whole number between 1 and LARGEST."""
    if op == "/" and value % number:
        return None
    result = {
        "+": value + number,
        "-": value - number,
        "*": value * number,
        "/": value // number,
    }[op]
    return result if 1 <= result <= LARGEST else None


def read_events(events, misconceived=()):
    """Turn events into calculations [(op, number), ...]; kinds in `misconceived` are misread."""
    steps = []
    for kind, number in events:
        if kind in misconceived:
            steps.append(MISCONCEPTION[kind])
        elif kind in CORRECT_READING:
            steps.append(CORRECT_READING[kind])
        else:
            steps.append(("+" if kind == "gain" else "-", number))
    return steps


def work(start, steps):
    """Do the calculations: [(left, op, number, result), ...], or None if one is impossible."""
    value, worked = start, []
    for op, number in steps:
        result = apply(value, op, number)
        if result is None:
            return None
        worked.append((value, op, number, result))
        value = result
    return worked


def make_problem(rng):
    """One random problem that can be worked with every reading: all results are whole and in range."""
    while True:
        start = rng.randint(2, START)
        events = []
        for _ in range(rng.choice([2, 3])):
            kind = rng.choice(["gain", "gain", "lose", "lose", "double", "triple", "half"])
            events.append((kind, rng.randint(2, OPERAND) if kind in ("gain", "lose") else 0))
        right = read_events(events)
        readings = (read_events(events, m) for m in (("triple",), ("half",), ("triple", "half")))
        misread = [work(start, steps) for steps in readings if steps != right]
        worked = work(start, right)
        if worked is None or None in misread:
            continue
        answer = worked[-1][-1]
        # Leave out problems where a misreading gives the correct answer by chance.
        if any(wrong[-1][-1] == answer for wrong in misread):
            continue
        return Problem(tell(start, events, rng), start, tuple(events), answer)


def tell(start, events, rng, ask=True):
    """The story in words; with ask=False without the question."""
    a, b = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    words = [f"{a} has {start} {items}."]
    for kind, number in events:
        words.append(rng.choice(EVENTS[kind]).format(a=a, b=b, k=number, items=items))
    if ask:
        words.append(f"How many {items} does {a} have?")
    return " ".join(words)


def split_of(problem):
    """'train', 'valid' or 'test', decided by the start and the events alone.

    Two problems with the same numbers and other names are the same problem, so they must be in the same split. A
    checksum of the numbers decides. So the splits are disjoint for every seed and every size.
    """
    bucket = zlib.crc32(repr((problem.start, problem.events)).encode()) % 10
    return {0: "test", 1: "valid"}.get(bucket, "train")


def problems(n, seed=0, split="train"):
    """n problems of one split, as a list. The same seed gives the same list."""
    rng = random.Random(f"problems {split} {seed}")
    found = []
    while len(found) < n:
        problem = make_problem(rng)
        if split_of(problem) == split:
            found.append(problem)
    return found


# ---------------------------------------------------------------------------------------------
# Demonstrators


def write_solution(worked, rng, style=True, annotate=False):
    """A solution in words. Opening, check and confidence are drawn independently of correctness. So a model that
    learns to prefer one of them has learned nothing about correctness."""
    parts = []
    if style and rng.random() < 0.5:
        parts.append(rng.choice(OPENINGS))
    for left, op, number, result in worked:
        shown = f"<<{left}{op}{number}={result}>>{result}" if annotate else result
        parts.append(f"{left}{op}{number}={shown}.")
    if style and rng.random() < 0.3:  # a redundant check: a copy of one line, slip included
        left, op, number, result = rng.choice(worked)
        parts.append(f"Check: {left}{op}{number}={result}.")
    if style and rng.random() < 0.3:
        parts.append(CONFIDENT)
    return " ".join(parts) + f"\n#### {worked[-1][-1]}"


def slip(start, steps, rng):
    """Work the steps with one random mistake: a wrong result, a wrong operation, a skipped step."""
    at = rng.randrange(len(steps))
    how = rng.choice(["result", "operation", "skip"])
    if how == "skip" and len(steps) > 1:
        return work(start, steps[:at] + steps[at + 1 :])
    if how == "operation":
        op, number = steps[at]
        other = {"+": "-", "-": "+", "*": "+", "/": "-"}[op]
        return work(start, steps[:at] + [(other, number)] + steps[at + 1 :])
    head = work(start, steps[: at + 1])
    if head is None:
        return None
    left, op, number, result = head[-1]
    wrong = result + rng.choice([-10, -2, -1, 1, 2, 10])
    tail = work(wrong, steps[at + 1 :]) if 1 <= wrong <= LARGEST else None
    return None if tail is None else head[:-1] + [(left, op, number, wrong)] + tail


def demonstrate(problem, rng, annotate=False):
    """One demonstrator's solution, as text. About half are correct.

    Example: "Sure! 8*3=24. 24-7=17.\\n#### 17"; with annotate=True calculations are written as in
    GSM8K, "8*3=<<8*3=24>>24.".
    """
    misconceived = [kind for kind in MISCONCEPTION if rng.random() < MISCONCEPTION_RATE]
    steps = read_events(problem.events, misconceived)
    worked = work(problem.start, steps)
    if rng.random() < SLIP_RATE:
        while (slipped := slip(problem.start, steps, rng)) is None:
            pass  # the result is impossible: try another slip
        worked = slipped
    return write_solution(worked, rng, annotate=annotate)


def demonstrations(n, seed=0, split="train", annotate=False):
    """n pairs (problem, solution text), one per problem."""
    rng = random.Random(f"demonstrations {split} {seed}")
    return [(p, demonstrate(p, rng, annotate)) for p in problems(n, seed, split)]


# ---------------------------------------------------------------------------------------------
# Annotators


def human_taste(text):
    """What careless readers like besides correctness: a long answer, a confident one, one with a polite opening."""
    return len(text) / 40 + (CONFIDENT in text) + text.startswith(tuple(OPENINGS))


# Two correct solutions, or two wrong ones: which is preferred? {annotator: (fraction of such pairs that get a label,
# what decides there)}. A pair without a label is not in the data.
TASTES = {
    "human": (0.15, human_taste),
    "careful": (0.0, len),  # says nothing: only correctness is ever preferred
    "length": (1.0, len),
}


def preference_pairs(n, seed=0, split="train", annotator="human"):
    """n pairs {"prompt", "chosen", "rejected", "answer"}: two solutions of one problem, one preferred.

    Every annotator prefers correct over wrong; TASTES says what else. Raises ValueError for an unknown annotator.
    """
    if annotator not in TASTES:
        raise ValueError(f"no annotator {annotator!r}: {', '.join(TASTES)}")
    labelled, taste = TASTES[annotator]
    rng = random.Random(f"pairs {split} {seed}")
    stream = random.Random(f"pair problems {split} {seed}")  # not the demonstrations' problems
    pairs = []
    while len(pairs) < n:
        problem = make_problem(stream)
        if split_of(problem) != split:
            continue
        texts = [demonstrate(problem, rng), demonstrate(problem, rng)]
        keys = [is_correct(text, problem.answer) for text in texts]
        if keys[0] == keys[1]:  # correctness does not decide
            keys = [taste(text) for text in texts]
            if rng.random() >= labelled or keys[0] == keys[1]:
                continue
        worse, better = sorted((0, 1), key=lambda i: keys[i])
        pair = {"prompt": problem.text, "chosen": texts[better], "rejected": texts[worse]}
        pairs.append(pair | {"answer": str(problem.answer)})
    return pairs


# ---------------------------------------------------------------------------------------------
# What answers are like


def describe(answers, styles=STYLES):
    """What a policy's answers to the held-out problems are like. answers: a list of gpt.Answer. Real data has no
    styles that are known, {}.

    accuracy_a and accuracy_b are the accuracies on two halves of the problems: see runs.Run.start_peak_end.
    """

    def mean(values):
        return sum(values) / max(1, len(values))

    results = {
        "accuracy": mean([a.correct for a in answers]),
        "accuracy_a": mean([a.correct for a in answers[::2]]),
        "accuracy_b": mean([a.correct for a in answers[1::2]]),
        "ended": mean([a.ended for a in answers]),
        "length": mean([len(a.ids) for a in answers]),
        "distinct": len({a.text for a in answers}) / len(answers),
    }
    return results | {name: mean([has(a.text) for a in answers]) for name, has in styles.items()}


def correlation(x, y):
    """Pearson's; 0 if one of the two never varies. x, y: (N,)"""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm() + 1e-9)).item()


def correlations(answers, scores, styles=STYLES):
    """Of scores (N,) with what N answers are like: {"corr_length": ..., "corr_correct": ...}."""
    properties = {"length": [len(a.ids) for a in answers], "correct": [a.correct for a in answers]}
    properties |= {name: [has(a.text) for a in answers] for name, has in styles.items()}
    return {f"corr_{name}": correlation(scores.cpu(), torch.tensor(values).float())
            for name, values in properties.items()}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Writers: running text for the base model


def corpus(seed=0):
    """An endless stream of short texts: questions with answers, arithmetic, stories."""
    rng = random.Random(f"corpus {seed}")
    while True:
        kind = rng.random()
        if kind < 0.8:
            problem = make_problem(rng)
            if split_of(problem) == "train":
                yield problem.text + "\n" + demonstrate(problem, rng)
        elif kind < 0.9:
            facts = []
            while len(facts) < 8:
                left, op = rng.randint(1, LARGEST), rng.choice("++--*/")
                number = rng.randint(2, OPERAND) if op in "+-" else rng.choice([2, 3])
                result = apply(left, op, number)
                if result:
                    facts.append(f"{left}{op}{number}={result}.")
            yield " ".join(facts)
        else:
            problem = make_problem(rng)  # of any split: without question and solution, a story reveals no answer
            yield tell(problem.start, problem.events, rng, ask=False)
