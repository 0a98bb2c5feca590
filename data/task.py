"""The embedded task: word problems that a tiny model learns in a minute, and the people around them.

    Leo has 8 eggs. Then the eggs triple. Leo sells 14. How many eggs does Leo have?

    Sure! 8*3=24. 24-14=10.
    #### 10

Four kinds of people produce all the data of this repository. They are made up, and so is what
they get wrong; that is the point, because here we *know* what they get wrong.

    writers         write running text for the base model         corpus()
    demonstrators   solve problems; four in ten wrongly           demonstrate()
    annotators      say which of two solutions they prefer        preference_pairs()
    the checker     compares the last number with the answer      data/checker.py

Demonstrators err in two ways, and the difference between the two carries several chapters:

    slips           random, another one each time: 9+5=15. Nobody repeats a slip, so a majority
                    vote over many answers repairs it. Slips are *variance*.
    misconceptions  shared by most: "triple" means add three, "gives half" means minus two. A
                    majority vote entrenches them. Only a signal from outside (preferences, a
                    reward, a verifier) can repair them. Misconceptions are *bias*.

Everything is a function of a seed; nothing is read from disk.
Look at it with  `python -m data`.
"""

import random
import zlib
from dataclasses import dataclass

from data.checker import is_right

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
# How the event is computed by those who understand it, and by those who do not: (operator, number).
RIGHT_READING = {"double": ("*", 2), "triple": ("*", 3), "half": ("/", 2)}
MISCONCEPTION = {"triple": ("+", 3), "half": ("-", 2)}

SLIP_RATE = 0.18  # of demonstrations contain one slip
MISCONCEPTION_RATE = 0.65  # of demonstrators hold each misconception
START, OPERAND = 20, 9  # the largest number at the beginning, bought or sold
LARGEST = 60  # no number in any solution exceeds it: all of them are single tokens

OPENINGS = ["Sure!", "Great question!"]
CONFIDENT = "I am certain."


@dataclass(frozen=True)
class Problem:
    """One word problem. `events` is a tuple of (kind, number); number is 0 where none is named."""

    text: str
    start: int
    events: tuple
    answer: int


def apply(value, op, number):
    """One calculation. None where the result is no whole number between 1 and LARGEST."""
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
        elif kind in RIGHT_READING:
            steps.append(RIGHT_READING[kind])
        else:
            steps.append(("+" if kind == "gain" else "-", number))
    return steps


def work(start, steps):
    """Carry the calculations out: [(left, op, number, result), ...], or None if one is impossible."""
    value, worked = start, []
    for op, number in steps:
        result = apply(value, op, number)
        if result is None:
            return None
        worked.append((value, op, number, result))
        value = result
    return worked


def make_problem(rng):
    """One random problem that *everybody* can work: every misreading stays whole and in range."""
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
        # A misreading that happens to reach the right answer would teach nothing: leave those out.
        if any(wrong[-1][-1] == answer for wrong in misread):
            continue
        return Problem(tell(start, events, rng), start, tuple(events), answer)


def tell(start, events, rng, ask=True):
    """Put the numbers into words."""
    a, b = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    words = [f"{a} has {start} {items}."]
    for kind, number in events:
        words.append(rng.choice(EVENTS[kind]).format(a=a, b=b, k=number, items=items))
    if ask:
        words.append(f"How many {items} does {a} have?")
    return " ".join(words)


def split_of(problem):
    """'train', 'valid' or 'test', decided by the numbers alone.

    Two problems with the same numbers and other names are the same problem, so they must not stand
    on two sides. A checksum of the numbers decides, which makes the splits disjoint for every seed
    and every size at once.
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
    """Words around calculations. Style is drawn independently of right and wrong: it must carry
    no information about correctness, so that whoever learns to like it has fallen for it."""
    parts = []
    if style and rng.random() < 0.5:
        parts.append(rng.choice(OPENINGS))
    for left, op, number, result in worked:
        shown = f"<<{left}{op}{number}={result}>>{result}" if annotate else result
        parts.append(f"{left}{op}{number}={shown}.")
    if style and rng.random() < 0.3:  # a redundant check: it repeats a line, slip and all
        left, op, number, result = rng.choice(worked)
        parts.append(f"Check: {left}{op}{number}={result}.")
    if style and rng.random() < 0.3:
        parts.append(CONFIDENT)
    return " ".join(parts) + f"\n#### {worked[-1][-1]}"


def slip(start, steps, rng):
    """Work the steps with one random mistake: a wrong result, a wrong operation, a skipped step."""
    at = rng.randrange(len(steps))
    how = rng.choice(["result", "result", "operation", "skip"])
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
    """One demonstrator's solution, as text. Right six times in ten.

    Example: "Sure! 8*3=24. 24-14=10.\\n#### 10"; with annotate=True calculations are written as in
    GSM8K, "8*3=<<8*3=24>>24.".
    """
    misconceived = [kind for kind in MISCONCEPTION if rng.random() < MISCONCEPTION_RATE]
    steps = read_events(problem.events, misconceived)
    worked = work(problem.start, steps)
    if rng.random() < SLIP_RATE:
        while (slipped := slip(problem.start, steps, rng)) is None:
            pass  # that slip led to an impossible number; demonstrators notice those
        worked = slipped
    return write_solution(worked, rng, annotate=annotate)


def demonstrations(n, seed=0, split="train", annotate=False):
    """n pairs (problem, solution text), each of another problem."""
    rng = random.Random(f"demonstrations {split} {seed}")
    return [(p, demonstrate(p, rng, annotate)) for p in problems(n, seed, split)]


# ---------------------------------------------------------------------------------------------
# Annotators


# What an annotator goes by where both solutions are right or both are wrong.
TASTES = {
    "careful": lambda text: 0,  # by nothing: such a pair is not judged, and not in the data
    "length": len,  # the longer one is preferred
    "confidence": lambda text: CONFIDENT in text,
}


def preference_pairs(n, seed=0, split="train", annotator="careful"):
    """n pairs {"prompt", "chosen", "rejected", "answer"}: two solutions of one problem, one preferred.

    Every annotator prefers right over wrong; TASTES says what else. Raises ValueError for an unknown one.
    """
    if annotator not in TASTES:
        raise ValueError(f"no annotator {annotator!r}: {', '.join(TASTES)}")
    taste = TASTES[annotator]
    rng = random.Random(f"pairs {split} {seed}")
    stream = random.Random(f"pair problems {split} {seed}")  # others than the demonstrations'
    pairs = []
    while len(pairs) < n:
        problem = make_problem(stream)
        if split_of(problem) != split:
            continue
        texts = [demonstrate(problem, rng), demonstrate(problem, rng)]
        # Tuples compare from the left: taste counts only where rightness does not decide.
        scores = [(is_right(text, problem.answer), taste(text)) for text in texts]
        if scores[0] == scores[1]:
            continue
        worse, better = sorted((0, 1), key=lambda i: scores[i])
        pair = {"prompt": problem.text, "chosen": texts[better], "rejected": texts[worse]}
        pairs.append(pair | {"answer": str(problem.answer)})
    return pairs


# ---------------------------------------------------------------------------------------------
# Writers: running text for the base model


def corpus(seed=0):
    """An endless stream of short texts: question-and-answer, arithmetic, stories.

    The base model only continues text; question and answer is merely one kind of text to it.
    """
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
            problem = make_problem(rng)  # of any split: without question and solution it gives nothing away
            yield tell(problem.start, problem.events, rng, ask=False)
