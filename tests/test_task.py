"""Tests of data/task.py: the world that every chapter measures itself against."""

import itertools
import math
import random
import re
from collections import Counter

import pytest

from data import task
from data.checker import is_right, last_answer

N = 3000  # demonstrations where a rate is tested; all bounds are four standard deviations


@pytest.fixture(scope="module")
def demos():
    return task.demonstrations(N, seed=11)


def deviation(rate, n):
    """Four standard deviations of the share of successes among n draws."""
    return 4 * math.sqrt(rate * (1 - rate) / n)


def read(text):
    """(start, [(kind, number)], question asked) from the English text alone.

    Written apart from task.py and from its templates, on purpose: the text must say what the
    numbers beside it claim.
    """
    sentences = re.findall(r"[^.?]+[.?]", text)
    first = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", sentences.pop(0).strip())
    name, start, items = first[1], int(first[2]), first[3]
    asked = f"How many {items} does {name} have?"
    has_question = sentences[-1].strip() == asked
    events = []
    for sentence in sentences[: -1 if has_question else None]:
        sentence = sentence.strip()
        number = [int(n) for n in re.findall(r"\d+", sentence)]
        if "double" in sentence or "triple" in sentence:
            assert items in sentence and not number
            events.append(("double" if "double" in sentence else "triple", 0))
            continue
        assert sentence.startswith(name + " ")
        if "half" in sentence:
            friend = re.fullmatch(rf"{name} gives half to (\w+)\.", sentence)[1]
            assert friend != name and not number
            events.append(("half", 0))
        elif re.search(r"\b(buys|finds)\b", sentence):
            events.append(("gain", *number))
        else:
            assert re.search(r"\b(sells|loses)\b", sentence), sentence
            events.append(("lose", *number))
    return start, events, has_question


def work_out(start, events, triple=lambda x: 3 * x, half=lambda x: x / 2):
    """The answer, and every number on the way."""
    values = [start]
    for kind, number in events:
        x = values[-1]
        values.append(
            {
                "gain": x + number,
                "lose": x - number,
                "double": 2 * x,
                "triple": triple(x),
                "half": half(x),
            }[kind]
        )
    return values


def numbers_of(text):
    start, events, _ = read(text)
    return start, tuple(events)


# --- problems ---


def test_every_answer_follows_from_the_text():
    """Worked out here from the English alone; whole numbers from 1 to 60 on the way, so that each is one
    token and no half is a fraction."""
    for seed, split in itertools.product(range(4), ("train", "valid", "test")):
        for problem in task.problems(150, seed, split):
            start, events, asked = read(problem.text)
            assert asked and (start, tuple(events)) == (problem.start, problem.events)
            values = work_out(start, events)
            assert values[-1] == problem.answer
            assert all(v == int(v) and 1 <= v <= 60 for v in values)
            assert 2 <= len(events) <= 3
            # Whoever misreads gets a whole number in range as well, and a wrong one.
            kinds = {kind for kind, _ in events}
            for misread in ({"triple"}, {"half"}, {"triple", "half"}):
                wrong = work_out(
                    start,
                    events,
                    triple=(lambda x: x + 3) if "triple" in misread else (lambda x: 3 * x),
                    half=(lambda x: x - 2) if "half" in misread else (lambda x: x / 2),
                )
                assert all(v == int(v) and 1 <= v <= 60 for v in wrong)
                assert (wrong[-1] != problem.answer) == bool(kinds & misread)


def test_splits_share_no_numbers():
    """By numbers and not by text: Leo's problem with Mia's name in it is the same problem. For many seeds,
    since training with one seed and testing with another must not meet either."""
    seen = {"train": set(), "valid": set(), "test": set()}
    for seed, split in itertools.product(range(12), seen):
        seen[split] |= {numbers_of(p.text) for p in task.problems(150, seed, split)}
        seen[split] |= {numbers_of(p["prompt"]) for p in task.preference_pairs(40, seed, split)}
        seen[split] |= {numbers_of(p.text) for p, _ in task.demonstrations(40, seed, split)}
    for one, two in itertools.combinations(seen.values(), 2):
        assert not one & two
    assert all(len(numbers) > 1000 for numbers in seen.values())


def test_sizes_of_the_splits():
    """A tenth each for validation and test."""
    rng = random.Random(0)
    counts = Counter(task.split_of(task.make_problem(rng)) for _ in range(4000))
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        # Problems repeat, so the draws are not independent: twice the usual bound.
        assert abs(counts[split] / 4000 - share) < 2 * deviation(share, 4000)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: task.problems(20, seed),
        lambda seed: task.demonstrations(20, seed),
        lambda seed: task.demonstrations(20, seed, annotate=True),
        lambda seed: task.preference_pairs(20, seed),
        lambda seed: task.preference_pairs(20, seed, annotator="length"),
        lambda seed: list(itertools.islice(task.corpus(seed), 20)),
    ],
)
def test_everything_is_a_function_of_the_seed(make):
    """Whatever else drew random numbers before. And no two seeds share their data."""
    random.seed(1)
    one = make(3)
    random.seed(2)
    assert make(3) == one
    assert all(row not in one for row in make(4))


def test_more_data_starts_with_the_same_data():
    """A learning curve over --demos compares n with 2n: the first n must stay."""
    assert task.demonstrations(60, 5)[:30] == task.demonstrations(30, 5)
    assert task.preference_pairs(60, 5)[:30] == task.preference_pairs(30, 5)


def test_pairs_and_demonstrations_of_a_seed_are_other_problems():
    """The SFT model has learned its demonstrations by heart a little: preferences come from elsewhere."""
    shown = {p.text for p in task.problems(3000, 0)}
    pairs = task.preference_pairs(300, 0)
    assert sum(p["prompt"] in shown for p in pairs) < 0.05 * len(pairs)


# --- demonstrations ---


def equations(solution):
    """[(left, operator, number, result)] of all calculations written in a solution."""
    found = re.findall(r"(\d+)([-+*/])(\d+)=(?:<<[^>]*>>)?(\d+)", solution)
    return [(int(a), op, int(b), int(c)) for a, op, b, c in found]


def holds(left, op, number, result):
    """Checked by the inverse operation, not by the code under test."""
    return {
        "+": result - number == left,
        "-": result + number == left,
        "*": result == left * number,
        "/": result * number == left,
    }[op]


def test_form_of_a_solution(demos):
    """It ends in `#### n`, n is the last result, every calculation goes on from the last one, and all
    numbers are single tokens."""
    for _, solution in demos:
        assert re.fullmatch(r"[^\n#]+\n#### \d+", solution)
        assert all(1 <= int(n) <= 60 for n in re.findall(r"\d+", solution))
        steps = equations(re.sub(r"Check: \S+\.", "", solution))
        assert steps and last_answer(solution) == steps[-1][-1]
        for one, two in itertools.pairwise(steps):
            assert one[-1] == two[0]
        # The redundant check repeats one of the lines word for word, a slip included.
        for check in re.findall(r"Check: (\S+)\.", solution):
            assert solution.count(check) >= 2


def test_annotated_solutions():
    """GSM8K's form, "8*3=<<8*3=24>>24.": what the calculator chapter parses. All calculations hold but for
    slips, at most one a solution."""
    marked = task.demonstrations(N, seed=11, annotate=True)
    false = 0
    for (problem, solution), (same, plain) in zip(marked, task.demonstrations(N, seed=11)):
        assert problem == same
        # Nothing else changes: without its marks it is the plain solution.
        assert re.sub(r"<<[^>]*>>", "", solution) == plain
        marks = re.findall(r"(\S+)=<<(\S+?)=(\d+)>>(\d+)\.", solution)
        assert len(marks) == solution.count("<<") == solution.count(">>") > 0
        for outside, inside, result, shown in marks:
            assert outside == inside and result == shown
        steps = [equations(f"{inside}={result}")[0] for _, inside, result, _ in marks]
        wrong = [step for step in steps if not holds(*step)]
        assert len(wrong) <= 1
        false += len(wrong)
    # Half of the slips are wrong results; the others (a wrong operation, a skipped step) calculate
    # correctly, and impossible ones are drawn again, which shifts the half a little.
    assert abs(false / N - task.SLIP_RATE / 2) < deviation(task.SLIP_RATE / 2, N) + 0.03


def hard_kinds(problem):
    """How many of the misunderstood kinds of event are in a problem."""
    return len({kind for kind, _ in problem.events} & {"triple", "half"})


def test_error_rates_are_the_stated_ones(demos):
    """Right without slip and misconception: (1 - slips) (1 - misconceptions)^k for k misunderstood kinds of
    event. A slip may hit the right answer by accident: that adds a little, at most 6 points."""
    by_kind = {k: [is_right(s, p.answer) for p, s in demos if hard_kinds(p) == k] for k in range(3)}
    for k, right in by_kind.items():
        stated = (1 - task.SLIP_RATE) * (1 - task.MISCONCEPTION_RATE) ** k
        bound = deviation(stated, len(right))
        assert stated - bound < sum(right) / len(right) < stated + bound + 0.06
    assert sum(len(right) for right in by_kind.values()) == N
    # "Right about half of the time": what sft.py's text, and its lesson, rest on.
    assert 0.4 < sum(map(sum, by_kind.values())) / N < 0.65
    # Both kinds of problem are common, or one half of the lesson would be missing from the metrics.
    assert 0.25 < 1 - len(by_kind[0]) / N < 0.75


STYLES = {
    "opening": lambda text: text.startswith(("Sure!", "Great question!")),
    "check": lambda text: "Check: " in text,
    "certain": lambda text: "I am certain." in text,
}


@pytest.mark.parametrize(("style", "rate"), [("opening", 0.5), ("check", 0.3), ("certain", 0.3)])
def test_style_says_nothing_about_correctness(demos, style, rate):
    """Or whoever learns to like it would be right to. The share among right and among wrong solutions
    differs by no more than chance allows."""
    has = STYLES[style]
    right = [has(s) for p, s in demos if is_right(s, p.answer)]
    wrong = [has(s) for p, s in demos if not is_right(s, p.answer)]
    error = math.sqrt(rate * (1 - rate) * (1 / len(right) + 1 / len(wrong)))
    assert abs(sum(right) / len(right) - sum(wrong) / len(wrong)) < 4 * error
    assert abs((sum(right) + sum(wrong)) / N - rate) < deviation(rate, N)


def votes(problem, n=400):
    """How often n demonstrators give each answer."""
    rng = random.Random(f"votes {problem.text}")
    return Counter(int(last_answer(task.demonstrate(problem, rng))) for _ in range(n))


def test_a_vote_entrenches_misconceptions():
    """Most demonstrators read "triple" as "add three" and "half" as "minus two": the commonest answer is
    theirs. This is why sft.py's greedy decoding is wrong there and why voting cannot repair it."""
    misread = {"triple": lambda x: x + 3, "half": lambda x: x - 2}
    for kind in misread:
        single = [
            p
            for p in task.problems(400, 2)
            if hard_kinds(p) == 1 and kind in {event for event, _ in p.events}
        ][:15]
        assert len(single) == 15
        for problem in single:
            start, events, _ = read(problem.text)
            theirs = work_out(start, events, **{kind: misread[kind]})[-1]
            (winner, count), *_ = votes(problem).most_common()
            assert winner == theirs != problem.answer
            share = task.MISCONCEPTION_RATE * (1 - task.SLIP_RATE)  # of those who hold it, without a slip
            assert share > 0.45 and count / 400 > share - deviation(share, 400)


def test_a_vote_repairs_slips():
    """Where nothing is misunderstood the right answer wins by far, and no wrong one is common: slips
    differ from one another."""
    easy = [p for p in task.problems(100, 3) if hard_kinds(p) == 0][:25]
    for problem in easy:
        (winner, _), (_, second), *others = votes(problem).most_common()
        assert winner == problem.answer
        assert second / 400 < 0.12 and len(others) >= 4


# --- preferences ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_careful_annotators(split):
    for pair in task.preference_pairs(300, 7, split):
        start, events, asked = read(pair["prompt"])
        assert asked and pair["answer"] == str(int(work_out(start, events)[-1]))
        assert is_right(pair["chosen"], pair["answer"])
        assert not is_right(pair["rejected"], pair["answer"])


TASTES = {"length": len, "confidence": lambda text: "I am certain." in text}


@pytest.mark.parametrize("annotator", TASTES)
def test_annotators_with_a_taste(annotator):
    """Never wrong over right: their pairs look like good data. Among equals they have a taste, and a reward
    model learns it."""
    taste, pairs = TASTES[annotator], task.preference_pairs(600, 7, annotator=annotator)
    judged = Counter()
    for pair in pairs:
        chosen, rejected = (is_right(pair[side], pair["answer"]) for side in ("chosen", "rejected"))
        assert (chosen, rejected) != (False, True)
        judged[chosen, rejected] += 1
        if chosen == rejected:
            assert taste(pair["chosen"]) > taste(pair["rejected"])
    assert all(judged[case] > 50 for case in ((True, False), (True, True), (False, False)))
    # Where right meets wrong, taste does not decide: the right one is liked less about half of the time.
    mixed = [
        p for p in pairs if not is_right(p["rejected"], p["answer"]) and is_right(p["chosen"], p["answer"])
    ]
    against = sum(taste(p["chosen"]) < taste(p["rejected"]) for p in mixed)
    assert against > 0.1 * len(mixed)


@pytest.mark.parametrize("style", STYLES)
def test_careful_annotators_have_no_taste(style):
    """In the clean data chosen and rejected do not differ in style."""
    pairs, has = task.preference_pairs(1500, 8), STYLES[style]
    chosen, rejected = (sum(has(p[side]) for p in pairs) for side in ("chosen", "rejected"))
    assert abs(chosen - rejected) < 4 * math.sqrt(2 * 1500 * 0.5 * 0.5)


def test_unknown_annotator():
    with pytest.raises(ValueError, match="no annotator 'lazy': careful, length"):
        task.preference_pairs(1, annotator="lazy")


# --- running text ---


@pytest.fixture(scope="module")
def corpus():
    return [text for seed in range(4) for text in itertools.islice(task.corpus(seed), 1500)]


def kind_of(text):
    return "question" if "\n####" in text else "facts" if text[0].isdigit() else "story"


def test_corpus_asks_training_questions_only(corpus):
    """The base model reads these; a test problem among them, with its solution, would be a leak into every
    chapter."""
    questions = [text for text in corpus if kind_of(text) == "question"]
    assert len(questions) > 0.6 * len(corpus)
    for text in questions:
        problem, solution = text.split("\n", 1)
        start, events, asked = read(problem)
        values = work_out(start, events)
        found = task.Problem(problem, start, tuple(events), values[-1])
        assert asked and task.split_of(found) == "train"
        assert re.fullmatch(r"[^\n#]+\n#### \d+", solution)


def test_corpus_stories_give_nothing_away(corpus):
    """They are not filtered by split: they may tell a test problem's events, so they must hold no question,
    no calculation and no answer."""
    stories = [text for text in corpus if kind_of(text) == "story"]
    assert len(stories) > 0.05 * len(corpus)
    for text in stories:
        start, events, asked = read(text)
        assert not asked and not set("=#?\n") & set(text)
        assert len(re.findall(r"\d+", text)) == 1 + sum(number > 0 for _, number in events)


def test_corpus_facts_are_true(corpus):
    """Arithmetic is learned from these; slips belong to solutions."""
    facts = [text for text in corpus if kind_of(text) == "facts"]
    assert 0.05 < len(facts) / len(corpus) < 0.2
    for text in facts:
        found = equations(text)
        assert len(found) == 8 and all(holds(*fact) for fact in found)
        assert all(1 <= n <= 60 for left, _, number, result in found for n in (left, number, result))
