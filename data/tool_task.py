"""The tool task: the same stories with numbers that are too large to calculate without a tool, and prices.

    Leo has 140 eggs. Leo sells 14. Leo sells the eggs #pu()/ra. How many coins does Leo have?

    <<140-14=126>>126
    <<pu()=?key>>
    <<ra=12>>12
    <<126*12=1512>>1512
    #### 1512

`<<` opens a call and `=` asks for the result, as in GSM8K's calculator annotations. What follows up to `>>` is
written by the tool: by a calculator (data/calculator.py), or, if the expression is a label or contains letters, by
the problem's own price list. The story does not tell the prices, so they can only be looked up. What is sold has two
labels, a new one and an old one. The list always knows the old label, and the new one in one sale of three. (In
another third of the sales the new label ends in brackets, like `pu()`; none of those is known.) For an unknown label
the list answers `?key`, and the old label has to be asked for.

All solutions here are correct. Only the numbers are hard, and the tools provide them.
"""

import builtins
import keyword
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

from data import task
from data.calculator import CallError, calculate

START, OPERAND = (60, 199), (11, 99)
PRICED = 2 / 3  # of the problems end with a sale for a price: copying labels is the hardest part to learn
CHECKED = 0.2  # of last calls are made again, and of these again, twice at most
# A label is two of these, one token each.
PIECES = ["a", "in", "o", "p", "r", "s", "t", "u"]
CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")  # expression, result


@dataclass(frozen=True)
class Problem:
    """labels: the item's two labels, () if nothing is sold for a price. prices: the price list, {label: price}."""

    text: str
    start: int
    events: tuple
    labels: tuple
    prices: dict
    answer: int


def work(start, steps):
    """[(left, op, number, result), ...], or None if a result is not a whole positive number."""
    worked = []
    for op, number in steps:
        result = calculate(f"{start}{op}{number}")
        if not result.isdigit() or result == "0":  # "320.5" eggs, or "-7"
            return None
        worked.append((start, op, number, int(result)))
        start = int(result)
    return worked


def make_problem(rng):
    """One random problem, with or without a sale at its end."""
    while True:
        priced = rng.random() < PRICED
        start = rng.randint(*START)
        events = []
        # If nothing happens before the sale, a label is the first thing to write: that is easy and learned first.
        for _ in range(rng.choice([0, 1] if priced else [2, 3])):
            kind = rng.choice(["gain", "gain", "lose", "lose", "double", "triple", "half"])
            events.append((kind, rng.randint(*OPERAND) if kind in ("gain", "lose") else 0))
        worked = work(start, task.read_events(events))
        if worked is None:
            continue
        answer, labels, prices = worked[-1][-1] if worked else start, (), {}
        story = task.tell(start, events, rng, ask=False)
        name, _, _, items = story.split(".")[0].split()
        if priced:
            if items == "coins":  # the price is paid in coins
                continue
            # The two labels have no piece in common: then the piece that comes next is determined by the one before
            # it.
            a, b, c, d = rng.sample(PIECES, 4)
            first, second = a + b, c + d
            taken = any(hasattr(builtins, word) or keyword.iskeyword(word) for word in (first, second))
            if taken:  # no label is the name of Python code
                continue
            prices = {second: rng.randint(2, 40)}
            luck = rng.random()
            if luck < 1 / 3:
                prices[first] = rng.randint(2, 40)
            elif luck < 2 / 3:
                first += "()"
            labels = first, second
            answer *= prices.get(first, prices[second])
            story += f" {name} sells the {items} #{first}/{second}."
            items = "coins"
        text = f"{story} How many {items} does {name} have?"
        return Problem(text, start, tuple(events), labels, prices, answer)


def problems(n, seed=0, split="train"):
    """n problems of one split, as in data/task.py: the numbers of the story decide which."""
    rng = random.Random(f"tool problems {split} {seed}")
    found = []
    while len(found) < n:
        problem = make_problem(rng)
        if task.split_of(problem) == split:
            found.append(problem)
    return found


def hostile(n, seed, code):
    """n held-out problems with code in place of the first label. The second label is on the price list."""
    found = []
    for p in problems(4 * n, seed, "valid"):
        if p.labels:
            first, second = p.labels
            text = p.text.replace(f"#{first}/", f"#{code}/")
            answer = p.answer // p.prices.get(first, p.prices[second]) * p.prices[second]
            prices = {second: p.prices[second]}
            found.append(replace(p, text=text, labels=(code, second), prices=prices, answer=answer))
    return found[:n]


def answer_call(expression, prices):
    """The result of one call, as text: a number, or an error that begins with `?`."""
    try:
        if expression in prices:
            return str(prices[expression])
        if re.search("[A-Za-z]", expression):
            raise CallError("?key")
        return calculate(expression)
    except CallError as error:
        return str(error)


def demonstrate(problem, calls=True):
    """The correct solution, as text. calls=False: the same without calls, "140-14=126" and "ra=12".

    Some demonstrators check the last calculation: they make its call again.
    """
    lines = []

    def say(expression):
        result = answer_call(expression, problem.prices)
        if calls:
            lines.append(f"<<{expression}={result}>>{result if result.isdigit() else ''}")
        elif result.isdigit():
            lines.append(f"{expression}={result}")
        return result

    left = problem.start
    for before, op, number, result in work(problem.start, task.read_events(problem.events)):
        say(f"{before}{op}{number}")
        left = result
    for label in problem.labels:
        price = say(label)
        if price != "?key":
            say(f"{left}*{price}")
            break
    coin = random.Random(f"checks {problem.text}")
    for _ in range(2):
        if coin.random() > CHECKED:
            break
        lines.append(lines[-1])
    return "\n".join(lines) + f"\n#### {problem.answer}"


def audit(answers, problems):
    """Compare the calls in answers (.text, .correct) with what the true tools return. Returns fractions and counts."""
    n = Counter()
    for answer, problem in zip(answers, problems):
        n["opened"] += answer.text.count("<<")
        errors = 0
        for call in CALL.finditer(answer.text):
            expression, result = call.groups()
            truth = answer_call(expression, problem.prices)
            n["closed"] += 1
            # "?key" is the result of a well-formed call with an unknown label.
            n["valid"] += truth == "?key" or not truth.startswith("?")
            errors += result.startswith("?")
            n["wrong"] += result != truth
            # A wrong result counts as copied if the text that follows repeats it.
            n["copied"] += result != truth and answer.text[call.end() :].split("\n")[0] == result
        n["errors"] += errors
        n["with errors"] += errors > 0
        n["recovered"] += errors > 0 and answer.correct
    return {
        "calls": n["opened"] / len(answers),  # per answer
        "valid": n["valid"] / max(1, n["opened"]),
        "wrong_results": n["wrong"] / max(1, n["closed"]),
        "copied": n["copied"] / max(1, n["wrong"]),
        "errors": n["errors"] / len(answers),  # per answer
        "recovered": n["recovered"] / max(1, n["with errors"]),
    }


# ---------------------------------------------------------------------------------------------
# Pretraining text

# How often a text of the embedded task gets a text of this task before it. (Of the transcripts only those of the
# training split are used, four in five.)
TRANSCRIPTS, COPIES = 0.05, 0.1


def corpus(seed):
    """An endless stream of texts for the base model: those of data/task.py, and some with the tokens of this task.

    Without the latter, the base model would never have seen numbers above 60, the letters of labels, `<<` or `>>`.
    They are of two kinds: transcripts are solved problems of the training split; copies are four words made of label
    pieces, each copied into a call, "#pu()/<<pu()=". Copying takes thousands of examples to learn.
    """
    rng = random.Random(f"tool corpus {seed}")
    for text in task.corpus(seed):
        kind = rng.random()
        if kind < TRANSCRIPTS:
            problem = make_problem(rng)
            if task.split_of(problem) == "train":
                yield problem.text + "\n" + demonstrate(problem)
        elif kind < TRANSCRIPTS + COPIES:
            words = ["".join(rng.sample(PIECES, rng.randint(2, 6))) + rng.choice(["", "", "()"]) for _ in range(4)]
            yield "\n".join(f"#{word}/<<{word}=" for word in words)
        yield text
