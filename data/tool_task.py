"""The tool task: the same stories with numbers that are too large to work out in one's head.

    Leo has 140 eggs. Leo sells 14. Leo sells the eggs #pu()/ra. How many coins does Leo have?

    <<140-14=126>>126
    <<pu()=?key>>
    <<ra=12>>12
    <<126*12=1512>>1512
    #### 1512

`<<` opens a call and `=` asks for the result, as in GSM8K's calculator annotations. What follows up to `>>`
is not the solver's: a calculator says it (data/calculator.py), or, where the call has a letter in it, the
problem's own price list. The story does not tell the prices, so they can only be looked up. A thing has two
labels, a new one and an old one, and the list knows the new one in one problem of three only. (Another third
has brackets behind it, like `pu()`; none of those is known.) Otherwise it answers `?key`, and one has to ask
for the old label.

All solutions here are right. The numbers are the only hard thing, and the calculator is for them.
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
PRICED = 2 / 3  # of the problems end in the shop: labels are the hardest to learn
# A label is two of these, a token each. With four it was a matter of luck whether a model learned to copy
# them in the time there is (README, the log).
PIECES = ["a", "in", "o", "p", "r", "s", "t", "u"]
CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")  # expression, result


@dataclass(frozen=True)
class Problem:
    """labels: the thing's two names in the shop, () where nothing is priced. prices: the list's state."""

    text: str
    start: int
    events: tuple
    labels: tuple
    prices: dict
    answer: int


def work(start, steps):
    """[(left, op, number, result), ...], or None where something would not be a whole positive number."""
    worked = []
    for op, number in steps:
        result = calculate(f"{start}{op}{number}")
        if not result.isdigit() or result == "0":  # "320.5" eggs, or "-7"
            return None
        worked.append((start, op, number, int(result)))
        start = int(result)
    return worked


def make_problem(rng):
    while True:
        priced = rng.random() < PRICED
        start = rng.randint(*START)
        events = []
        # Where nothing happens before the sale, a label is the first thing to write: easy, and learned first.
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
            if items == "coins":  # what the shop pays with
                continue
            first, second = ("".join(rng.sample(PIECES, 2)) for _ in range(2))
            taken = any(hasattr(builtins, word) or keyword.iskeyword(word) for word in (first, second))
            if taken or first == second:  # "int": none is hostile by chance
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
    """n held-out problems with code where the first label stood. The second label is on the list."""
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
    """What the two tools say to one call, as text: a number, or an error with a ? in front."""
    try:
        if expression in prices:
            return str(prices[expression])
        if re.search("[A-Za-z]", expression):
            raise CallError("?key")
        return calculate(expression)
    except CallError as error:
        return str(error)


def demonstrate(problem, calls=True):
    """The right solution, as text. calls=False: the same without tools, "640-14=626" and "pu=12"."""
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
    return "\n".join(lines) + f"\n#### {problem.answer}"


def audit(answers, problems):
    """Read the calls in answers (.text, .right), and ask the true tools about each. Returns shares."""
    n = Counter()
    for answer, problem in zip(answers, problems):
        text, right = answer.text, answer.right
        n["opened"] += text.count("<<")
        errors = 0
        for call in CALL.finditer(text):
            expression, result = call.groups()
            truth = answer_call(expression, problem.prices)
            n["closed"] += 1
            n["valid"] += truth == "?key" or not truth.startswith(
                "?"
            )  # "?key" is the answer to a good question
            errors += result.startswith("?")
            n["wrong"] += result != truth
            # A wrong result is believed where the next words repeat it.
            n["copied"] += result != truth and text[call.end() :].split("\n")[0] == result
        n["errors"] += errors
        n["with errors"] += errors > 0
        n["recovered"] += errors > 0 and right
    return {
        "calls": n["opened"] / len(answers),  # an answer
        "valid": n["valid"] / max(1, n["opened"]),
        "wrong_results": n["wrong"] / max(1, n["closed"]),
        "copied": n["copied"] / max(1, n["wrong"]),
        "errors": n["errors"] / len(answers),  # an answer
        "recovered": n["recovered"] / max(1, n["with errors"]),
    }
