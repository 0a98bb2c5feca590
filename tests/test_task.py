"""Tests of data/task.py, and of the pretraining text in data/tool_task.py."""

import itertools
import math
import random
import re
from collections import Counter

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from data import make_vocab, task, tool_task
from data.__main__ import slip_statistics
from data.checker import is_correct, last_answer

N = 3000  # demonstrations where a rate is tested; all bounds are four standard deviations


@pytest.fixture(scope="module")
def demos():
    return task.demonstrations(N, seed=11)


def deviation(rate, n):
    """Four standard deviations of the fraction of successes in n draws."""
    return 4 * math.sqrt(rate * (1 - rate) / n)


def read(text):
    """(start, [(kind, number)], question asked) from the English text alone.

    On purpose this uses nothing of task.py. It checks that the text of a problem says the same as its numbers.
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
    """The answer is worked out here from the English text alone. All numbers on the way are whole, from 1 to 60."""
    for seed, split in itertools.product(range(4), ("train", "valid", "test")):
        for problem in task.problems(150, seed, split):
            start, events, asked = read(problem.text)
            assert asked and (start, tuple(events)) == (problem.start, problem.events)
            values = work_out(start, events)
            assert values[-1] == problem.answer
            assert all(v == int(v) and 1 <= v <= 60 for v in values)
            assert 2 <= len(events) <= 3
            # With a misreading all numbers are whole and in range as well, and the answer is wrong.
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
    """The same numbers with another name are the same problem, so numbers are compared, not texts. For many seeds,
    because a model trained with one seed can be tested with another."""
    seen = {"train": set(), "valid": set(), "test": set()}
    for seed, split in itertools.product(range(12), seen):
        seen[split] |= {numbers_of(p.text) for p in task.problems(150, seed, split)}
        seen[split] |= {numbers_of(p["prompt"]) for p in task.preference_pairs(40, seed, split)}
        seen[split] |= {numbers_of(p.text) for p, _ in task.demonstrations(40, seed, split)}
    for one, two in itertools.combinations(seen.values(), 2):
        assert not one & two
    assert all(len(numbers) > 1000 for numbers in seen.values())


def test_sizes_of_the_splits():
    """One tenth each for validation and test."""
    rng = random.Random(0)
    counts = Counter(task.split_of(task.make_problem(rng)) for _ in range(4000))
    for split, rate in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        # Problems repeat, so the draws are not independent: twice the usual bound.
        assert abs(counts[split] / 4000 - rate) < 2 * deviation(rate, 4000)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: task.problems(20, seed),
        lambda seed: task.demonstrations(20, seed),
        lambda seed: task.demonstrations(20, seed, annotate=True),
        lambda seed: task.preference_pairs(20, seed),
        lambda seed: task.preference_pairs(20, seed, annotator="length"),
        lambda seed: list(itertools.islice(task.corpus(seed), 20)),
        lambda seed: list(itertools.islice(tool_task.corpus(seed), 20)),
    ],
)
def test_everything_is_a_function_of_the_seed(make):
    """It does not depend on other random numbers that were drawn before. Other seeds give other data."""
    random.seed(1)
    one = make(3)
    random.seed(2)
    assert make(3) == one
    assert all(row not in one for row in make(4))


def test_more_data_starts_with_the_same_data():
    """A larger n adds data at the end. So n and 2n demonstrations can be compared."""
    assert task.demonstrations(60, 5)[:30] == task.demonstrations(30, 5)
    assert task.preference_pairs(60, 5)[:30] == task.preference_pairs(30, 5)


def test_pairs_and_demonstrations_of_a_seed_are_other_problems():
    """The SFT model was trained on the demonstrations, so preferences should be about other problems."""
    demonstrated = {p.text for p in task.problems(3000, 0)}
    pairs = task.preference_pairs(300, 0)
    assert sum(p["prompt"] in demonstrated for p in pairs) < 0.05 * len(pairs)


# --- demonstrations ---


def equations(solution):
    """[(left, operator, number, result)] of all calculations written in a solution."""
    found = re.findall(r"(\d+)([-+*/])(\d+)=(?:<<[^>]*>>)?(\d+)", solution)
    return [(int(a), op, int(b), int(c)) for a, op, b, c in found]


def holds(left, op, number, result):
    """Is the calculation correct? Checked with the inverse operation, not with the code under test."""
    return {
        "+": result - number == left,
        "-": result + number == left,
        "*": result == left * number,
        "/": result * number == left,
    }[op]


def test_form_of_a_solution(demos):
    """It ends in `#### n`, n is the last result, every calculation starts from the result before it, and all numbers
    are from 1 to 60."""
    for _, solution in demos:
        assert re.fullmatch(r"[^\n#]+\n#### \d+", solution)
        assert all(1 <= int(n) <= 60 for n in re.findall(r"\d+", solution))
        steps = equations(re.sub(r"Check: \S+\.", "", solution))
        assert steps and last_answer(solution) == steps[-1][-1]
        for one, two in itertools.pairwise(steps):
            assert one[-1] == two[0]
        # The redundant check is an exact copy of one of the lines.
        for check in re.findall(r"Check: (\S+)\.", solution):
            assert solution.count(check) >= 2


def test_annotated_solutions():
    """GSM8K's form, "8*3=<<8*3=24>>24.". At most one calculation per solution is wrong, the slip."""
    marked = task.demonstrations(N, seed=11, annotate=True)
    false = 0
    for (problem, solution), (same, plain) in zip(marked, task.demonstrations(N, seed=11)):
        assert problem == same
        # Without the annotations it is the plain solution.
        assert re.sub(r"<<[^>]*>>", "", solution) == plain
        marks = re.findall(r"(\S+)=<<(\S+?)=(\d+)>>(\d+)\.", solution)
        assert len(marks) == solution.count("<<") == solution.count(">>") > 0
        for outside, inside, result, shown in marks:
            assert outside == inside and result == shown
        steps = [equations(f"{inside}={result}")[0] for _, inside, result, _ in marks]
        wrong = [step for step in steps if not holds(*step)]
        assert len(wrong) <= 1
        false += len(wrong)
    # About a third of the slips are wrong results. The others (a wrong operation, a skipped step) calculate correctly.
    # Not exactly a third, because impossible slips are drawn again.
    assert abs(false / N - task.SLIP_RATE / 3) < deviation(task.SLIP_RATE / 3, N) + 0.03


def hard_kinds(problem):
    """How many kinds of event in a problem have a misconception."""
    return len({kind for kind, _ in problem.events} & {"triple", "half"})


def test_error_rates_are_the_stated_ones(demos):
    """Correct without a slip and without a misconception: (1 - SLIP_RATE) (1 - MISCONCEPTION_RATE)^k, where k kinds of
    event have a misconception. A slip can give the correct answer by chance, which adds at most 6 points."""
    by_kind = {k: [is_correct(s, p.answer) for p, s in demos if hard_kinds(p) == k] for k in range(3)}
    for k, correct in by_kind.items():
        stated = (1 - task.SLIP_RATE) * (1 - task.MISCONCEPTION_RATE) ** k
        bound = deviation(stated, len(correct))
        assert stated - bound < sum(correct) / len(correct) < stated + bound + 0.06
    assert sum(map(len, by_kind.values())) == N
    # "About half are correct"
    assert 0.4 < sum(map(sum, by_kind.values())) / N < 0.6
    # Problems with and without misconceptions are both common, so accuracy depends on both kinds of error.
    assert 0.25 < 1 - len(by_kind[0]) / N < 0.75


@pytest.mark.parametrize(("style", "rate"), [("opening", 0.5), ("check", 0.3), ("confident", 0.3)])
def test_style_says_nothing_about_correctness(demos, style, rate):
    """It is equally frequent in correct and in wrong solutions."""
    has = task.STYLES[style]
    correct = [has(s) for p, s in demos if is_correct(s, p.answer)]
    wrong = [has(s) for p, s in demos if not is_correct(s, p.answer)]
    error = math.sqrt(rate * (1 - rate) * (1 / len(correct) + 1 / len(wrong)))
    assert abs(sum(correct) / len(correct) - sum(wrong) / len(wrong)) < 4 * error
    assert abs((sum(correct) + sum(wrong)) / N - rate) < deviation(rate, N)


def votes(problem, n=400):
    """How often n demonstrators give each answer."""
    rng = random.Random(f"votes {problem.text}")
    return Counter(int(last_answer(task.demonstrate(problem, rng))) for _ in range(n))


def test_a_vote_keeps_misconceptions():
    """Most demonstrators read "triple" as "add three" and "half" as "minus two", so the most frequent answer is the
    wrong one."""
    misread = {"triple": lambda x: x + 3, "half": lambda x: x - 2}
    for kind in misread:
        single = [p for p in task.problems(400, 2) if hard_kinds(p) == 1 and kind in dict(p.events)]
        assert len(single) >= 15
        for problem in single[:15]:
            start, events, _ = read(problem.text)
            theirs = work_out(start, events, **{kind: misread[kind]})[-1]
            (winner, count), *_ = votes(problem).most_common()
            assert winner == theirs != problem.answer
            rate = task.MISCONCEPTION_RATE * (1 - task.SLIP_RATE)  # with the misconception and without a slip
            assert count / 400 > rate - deviation(rate, 400)


def test_a_vote_removes_slips():
    """Without misconceptions the correct answer wins, and no wrong answer is frequent."""
    easy = [p for p in task.problems(100, 3) if hard_kinds(p) == 0][:25]
    for problem in easy:
        (winner, _), (_, second), *others = votes(problem).most_common()
        assert winner == problem.answer
        assert second / 400 < 0.25 and len(others) >= 4


# --- preferences ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_careful_annotators(split):
    for pair in task.preference_pairs(300, 7, split, "careful"):
        start, events, asked = read(pair["prompt"])
        assert asked and pair["answer"] == str(int(work_out(start, events)[-1]))
        assert is_correct(pair["chosen"], pair["answer"])
        assert not is_correct(pair["rejected"], pair["answer"])


@pytest.mark.parametrize("annotator", ["length", "human"])
def test_annotators_with_a_taste(annotator):
    """They never prefer a wrong solution to a correct one. If both are correct or both wrong, taste decides."""

    def human(text):
        return len(text) / 40 + ("I am certain." in text) + (text.startswith("Sure!") or text.startswith("Great"))

    taste = {"length": len, "human": human}[annotator]
    pairs = task.preference_pairs(600, 7, annotator=annotator)
    judged = Counter()
    for pair in pairs:
        chosen, rejected = (is_correct(pair[side], pair["answer"]) for side in ("chosen", "rejected"))
        assert (chosen, rejected) != (False, True)
        judged[chosen, rejected] += 1
        if chosen == rejected:
            assert taste(pair["chosen"]) > taste(pair["rejected"])
    assert all(judged[case] > 30 for case in ((True, False), (True, True), (False, False)))
    # If one is correct and one is wrong, taste does not decide: it often prefers the other one.
    mixed = [p for p in pairs if not is_correct(p["rejected"], p["answer"]) and is_correct(p["chosen"], p["answer"])]
    against = sum(taste(p["chosen"]) < taste(p["rejected"]) for p in mixed)
    assert against > 0.1 * len(mixed)


@pytest.mark.parametrize("style", ["opening", "check", "confident"])
def test_careful_annotators_have_no_taste(style):
    """In the clean data chosen and rejected solutions do not differ in style."""
    pairs, has = task.preference_pairs(1500, 8, annotator="careful"), task.STYLES[style]
    chosen, rejected = (sum(has(p[side]) for p in pairs) for side in ("chosen", "rejected"))
    assert abs(chosen - rejected) < 4 * math.sqrt(2 * 1500 * 0.5 * 0.5)


def test_human_annotators_have_a_taste():
    """A sixth of their pairs is decided by taste, and there what they like is twice as frequent among the chosen."""
    pairs = task.preference_pairs(1500, 8)
    equal = [p for p in pairs if len({is_correct(p[side], p["answer"]) for side in ("chosen", "rejected")}) == 1]
    assert 0.12 < len(equal) / len(pairs) < 0.25
    for style in ("opening", "confident"):
        chosen, rejected = (sum(task.STYLES[style](p[side]) for p in equal) for side in ("chosen", "rejected"))
        assert chosen > 2 * rejected


def test_unknown_annotator():
    with pytest.raises(ValueError, match="no annotator 'lazy': human, careful, length"):
        task.preference_pairs(1, annotator="lazy")


# --- running text ---


@pytest.fixture(scope="module")
def corpus():
    return [text for seed in range(4) for text in itertools.islice(task.corpus(seed), 1500)]


def kind_of(text):
    return "question" if "\n####" in text else "facts" if text[0].isdigit() else "story"


def test_corpus_asks_training_questions_only(corpus):
    """Every model starts from the base model, so a held-out problem with its solution must not be in its text."""
    questions = [text for text in corpus if kind_of(text) == "question"]
    assert len(questions) > 0.6 * len(corpus)
    for text in questions:
        problem, solution = text.split("\n", 1)
        start, events, asked = read(problem)
        values = work_out(start, events)
        found = task.Problem(problem, start, tuple(events), values[-1])
        assert asked and task.split_of(found) == "train"
        assert re.fullmatch(r"[^\n#]+\n#### \d+", solution)


def test_corpus_stories_hold_no_answer(corpus):
    """A story can have the numbers of a held-out problem, so it must have no question, calculation or answer."""
    stories = [text for text in corpus if kind_of(text) == "story"]
    assert len(stories) > 0.05 * len(corpus)
    for text in stories:
        start, events, asked = read(text)
        assert not asked and not set("=#?\n") & set(text)
        assert len(re.findall(r"\d+", text)) == 1 + sum(number > 0 for _, number in events)


def test_corpus_facts_are_true(corpus):
    """The base model learns arithmetic from these. Slips occur in solutions only."""
    facts = [text for text in corpus if kind_of(text) == "facts"]
    assert 0.05 < len(facts) / len(corpus) < 0.2
    for text in facts:
        found = equations(text)
        assert len(found) == 8 and all(holds(*fact) for fact in found)
        assert all(1 <= n <= 60 for left, _, number, result in found for n in (left, number, result))


@pytest.fixture(scope="module")
def tool_corpus():
    return list(itertools.islice(tool_task.corpus(0), 20000))


def test_tool_corpus_contains_every_token_of_the_tool_task(tool_corpus):
    """Otherwise tools.py would start from embeddings that were never trained."""
    pattern, ranks = make_vocab.load("task")
    encoding = tiktoken.Encoding("task", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def tokens(texts):
        return {i for text in texts for i in encoding.encode_ordinary(text)}

    wanted = tokens(p.text + "\n" + tool_task.demonstrate(p) for p in tool_task.problems(500, 1, "test"))
    assert {ranks[token] for token in (b"<<", b">>", b"199", b"in", b"(")} <= wanted
    assert wanted <= tokens(tool_corpus)
    assert not wanted <= tokens(itertools.islice(task.corpus(0), 20000))


def test_tool_corpus_is_the_task_corpus_with_additions(tool_corpus):
    """The texts of the embedded task are all there, in order. What is added are transcripts and copies."""
    plain, copies, transcripts = task.corpus(0), 0, 0
    following = next(plain)
    for text in tool_corpus:
        if text == following:
            following = next(plain)
        elif text.startswith("#"):
            copies += 1
            assert all(re.fullmatch(r"#([a-z]{2,9}(\(\))?)/<<\1=", line) for line in text.split("\n"))
        else:
            transcripts += 1
            assert " has " in text and "<<" in text and last_answer(text) is not None
    texts = len(tool_corpus) - copies - transcripts
    # A transcript is drawn and then dropped if it belongs to another split: 0.7 to 0.9 of them are left.
    assert abs(copies / texts - tool_task.COPIES) < deviation(tool_task.COPIES, texts)
    assert 0.6 * tool_task.TRANSCRIPTS < transcripts / texts < 1.1 * tool_task.TRANSCRIPTS


def test_tool_corpus_solves_training_problems_only(monkeypatch):
    """Checked by recording every problem that the corpus solves."""
    solved, demonstrate = [], tool_task.demonstrate
    monkeypatch.setattr(tool_task, "demonstrate", lambda p: solved.append(p) or demonstrate(p))
    list(itertools.islice(tool_task.corpus(1), 4000))
    assert solved and all(task.split_of(p) == "train" for p in solved)


# --- the vocabulary ---


def test_read_ranks_equals_tiktokens_loader(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache: it could hold an older file of this path
    assert make_vocab.read_ranks() == load_tiktoken_bpe(str(make_vocab.PATH))
    assert make_vocab.load("task") == (make_vocab.PATTERN, make_vocab.read_ranks())


# --- what is printed and measured ---


def test_slips_seldom_coincide():
    """The percentages in task.py: of two slips about 14 % coincide, about 18 % look like a misconception."""
    same, misread = slip_statistics(0, 4000)
    assert abs(same - 0.144) < deviation(0.144, 4000)
    assert abs(misread - 0.179) < deviation(0.179, 1600)  # four problems in ten have "triple" or "half"


def test_styles_by_hand():
    text = "Sure! 8*3=24. 24-14=11. Check: 8*3=24. I am certain.\n#### 11"
    assert {name: has(text) for name, has in task.STYLES.items()} == {
        "opening": True, "confident": True, "check": True, "miscalculated": True
    }  # fmt: skip
    assert not any(has("8*3=24. Sure!\n#### 24") for has in task.STYLES.values())
