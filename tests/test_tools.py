"""Tests of tools.py: the calculator under fuzzing and attack, the second writer, the masks, the task."""

import ast
import json
import os
import random
import re
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpt
import tools
from data import calculator, task, tool_task
from data.calculator import BINARY, SHORT, CallError, calculate, show, value
from data.checker import is_right
from sft import IGNORE, sft_loss

REPO = Path(__file__).resolve().parent.parent
REAL = os.environ.get("REAL_DATA_DIR")
TOK = gpt.Tokenizer("task")
OPEN, EQUALS, CLOSE = TOK.encode("<<=>>")


# --- the calculator: values ---


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48+27", "75"), ("0.1+0.2", "0.3"), (".1+.2", "0.3"), ("7-9", "-2"), ("-3*-2", "6"), ("+10", "10"),
        ("(7-2)*3", "15"), ("7/2", "3.5"), ("1/3", "0.333333"), ("2/3", "0.666667"), ("-1/3", "-0.333333"),
        ("1/2000000", "0.000001"), ("-1/2000000", "-0.000001"), ("-.0000004", "0"),
        ("7//2", "3"), ("-7//2", "-4"), ("7%3", "1"), ("6/3", "2"), ("5.", "5"), (" 1 + 1 ", "2"), ("0", "0"),
        ("-0", "0"), ("0.0000001", "0"), ("-0.0000001", "0"), ("1000000*1.5", "1500000"), ("2-2.0", "0"),
        ("999999999999999+1", "1000000000000000"), ("0.1*3-0.3", "0"), ("1.10", "1.1"),
    ],
)  # fmt: skip
def test_values(text, result):
    assert calculate(text) == result


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1/0", "?zero"), ("1//0", "?zero"), ("1%(2-2)", "?zero"), ("1/0.0", "?zero"), ("", "?syntax"),
        ("2**3", "?syntax"), ("1 2", "?syntax"), ("k47", "?syntax"), ("1+", "?syntax"), ("()", "?syntax"),
        ("...", "?syntax"), ("3(4)", "?syntax"), ("007", "?syntax"), ("1.2.3", "?syntax"), ("1;2", "?syntax"),
        ("9" * 16, "?size"), ("1000000000000000+1", "?size"), ("9999999999*9999999999", "?size"),
        ("1+" * 50 + "1", "?size"),
    ],
)  # fmt: skip
def test_errors(text, error):
    with pytest.raises(CallError, match=re.escape(error)):
        calculate(text)


def test_the_fast_path_knows_no_other_language_than_the_slow_one():
    rng = random.Random(0)
    for _ in range(3000):
        left, right = (rng.randrange(10 ** rng.randint(1, 10)) for _ in range(2))
        text = f"{left}{rng.choice('+-*')}{right}"
        assert SHORT.fullmatch(text)
        try:
            slow = show(value(ast.parse(text, mode="eval").body, text))
        except CallError as error:
            slow = str(error)
        assert outcome(text) == slow, text
    assert not any(SHORT.fullmatch(text) for text in ("007+1", "1+07", "1**2", "1--2", "1+2\n", "١+1", ""))


def outcome(text):
    try:
        return calculate(text)
    except CallError as error:
        return str(error)


def random_tree(rng, depth):
    """A random expression and its value: a Fraction, or an error's name."""
    if depth == 0 or rng.random() < 0.2:
        text = rng.choice(
            [str(rng.randrange(1000)), f"{rng.randrange(100)}.{rng.randrange(100):02}", ".5", "3."]
        )
        return text, Fraction(text)
    if rng.random() < 0.15:
        text, number = random_tree(rng, depth - 1)
        return f"-({text})", number if isinstance(number, str) else -number
    (left, a), (right, b) = random_tree(rng, depth - 1), random_tree(rng, depth - 1)
    op = rng.choice(["+", "-", "*", "/", "//", "%"])
    text = f"({left}){op}({right})"
    if isinstance(a, str) or isinstance(b, str):
        return text, a if isinstance(a, str) else b  # the left side is worked out first
    if b == 0 and op in ("/", "//", "%"):
        return text, "?zero"
    result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b,
              "//": lambda: Fraction(a // b), "%": lambda: a % b}[op]()  # fmt: skip
    return text, "?size" if abs(result) > calculator.LARGEST else result


def test_random_expressions_against_exact_fractions():
    rng, checked = random.Random(1), 0
    for _ in range(4000):
        text, expected = random_tree(rng, 3)
        if len(text) > calculator.LONGEST:
            continue
        found = outcome(text)
        if isinstance(expected, str):
            assert found == expected, text
        elif expected.denominator == 1:
            assert found == str(expected), text
        else:
            assert abs(Fraction(found) - expected) <= Fraction(1, 2 * 10**6), text
        checked += 1
    assert checked > 2000


# --- the calculator: attacks ---

ATTACKS = [
    "2**9**9",
    "9**9**9**9",
    "9" * 100,
    "9" * 100_000,
    "1" + "0" * 5000 + "*2",
    "9*" * 50_000 + "9",
    "+".join(["1"] * 50_000),
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 50 + "1" + ")" * 49,
    "(" * 100,
    "-" * 100,
    "-" * 99 + "1",
    "-" * 10_000 + "1",
    "~1",
    "1<<9",
    "1<<99999999999",
    "1 if 1 else 2",
    "1/0",
    "0/0",
    "1%0",
    "__import__('os')",
    "__import__('os').system('touch hacked')",
    "open('x','w')",
    "open('hacked','w').write('1')",
    "exec('import os')",
    "(lambda:0)()",
    "(lambda: (yield))()",
    "[x for x in range(10**9)]",
    "f'{1+1}'",
    'f"{open}"',
    "(x:=1)",
    "().__class__.__bases__[0].__subclasses__()",
    "1 .__class__",
    "(1).real",
    "1_000",
    "1__0",
    "0x10",
    "0b1",
    "1e5",
    "1e999",
    "1j",
    "1.e9",
    "١+١",
    "²",
    "１+１",
    "1\u00b2",
    "1\x00",
    "\x001",
    "1\n+1",
    "1\n",
    "1;1",
    "1\t+1",
    "1\\\n+1",
    "#",
    "1#2",
    "True",
    "None",
    "Ellipsis",
    "...",
    ". . .",
    "1,2",
    "(1,)",
    "*1",
    "**1",
    "{}",
    "[]",
    "{1:2}",
    "@",
    "1@2",
    "a",
    "a.b",
    "a[0]",
    "'a'*10**9",
    "print(1)",
    "exit()",
    "input()",
    "breakpoint()",
    "\ud800",
    "1" + "\u200b" + "2",
    "await 1",
    "not 1",
    "1 and 2",
    "1<2",
    "1==1",
    "1|2",
    "1^2",
    "5%",
    "%5",
    "()()",
    "1()",
    "(1)(2)",
    "1." * 50,
    "." * 100,
    "%" * 100,
    "/" * 100,
    "1//" * 33,
    "1%" * 50,
    "(1)" * 33,
    "( " * 50,
    " " * 100,
    " " * 100_000,
]


def limited(text):
    """calculate(text) or its error; fails where that takes 50 ms of the processor."""
    begun = time.process_time()
    found = outcome(text)
    assert time.process_time() - begun < 0.05, f"{text[:60]!r} is slow"
    return found


def test_known_attacks(tmp_path, monkeypatch):
    """None is run: an error or a plain number comes out, at once, in little memory; nothing has changed."""
    monkeypatch.chdir(tmp_path)
    limited("1.5*(2+3)")  # what is imported or compiled at the first call belongs to no attack
    before = dict(os.environ), set(sys.modules), sys.getrecursionlimit()
    for text in ATTACKS:
        found = limited(text)
        assert re.fullmatch(r"\?(syntax|size|zero)|-?\d+(\.\d{1,6})?", found), (text[:60], found)
    accepted = [text for text in ATTACKS if not outcome(text).startswith("?")]
    assert all(set(text) <= set("0123456789.+-*/%() ") for text in accepted)
    assert (dict(os.environ), set(sys.modules), sys.getrecursionlimit()) == before
    assert not list(tmp_path.iterdir())
    tracemalloc.start()  # by itself: it makes everything several times slower
    for text in ATTACKS:
        outcome(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, peak


@pytest.mark.filterwarnings("error")  # the parser must not comment on what it is given, either
def test_fuzz(tmp_path, monkeypatch):
    """10^5 inputs: pieces of the grammar in any order, mutated calls, and random bytes."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(2)
    pieces = [
        *"0123456789",
        *"+-*/%()",
        ".",
        " ",
        "//",
        "**",
        "99999999",
        "0.",
        ".5",
        "()",
        "--",
        "1e9",
        "_",
        "a",
        "'",
    ]
    for i in range(100_000):
        if i % 4 == 0:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 30)))
        elif i % 4 == 1:  # only what passes the first wall: the parser's own corners
            text = "".join(rng.choice("0123456789.+-*/%() ") for _ in range(rng.randint(0, 100)))
        elif i % 4 == 2:
            text = f"({rng.randrange(999)}+{rng.randrange(99)})*{rng.randrange(99)}/{rng.randrange(9)}"
            at = rng.randrange(len(text))
            text = (
                text[:at] + rng.choice(["", chr(rng.randrange(0x11000)), rng.choice(pieces)]) + text[at + 1 :]
            )
        else:
            text = rng.randbytes(rng.randint(0, 60)).decode("latin-1" if i % 8 == 3 else "utf-8", "replace")
        found = limited(text)
        assert found[0] == "?" or (len(found) < 26 and Fraction(found) is not None), text
    assert not list(tmp_path.iterdir())


def test_rate():
    """100,000 calls a second on what is really called: the task's calls, in the share they have there."""
    texts = [f"{a}{op}{b}" for p in tool_task.problems(300, 9) for a, op, b, _ in work(p)] * 20
    begun = time.process_time()
    for text in texts:
        calculate(text)
    assert len(texts) / (time.process_time() - begun) > 100_000


def work(p):
    return tool_task.work(p.start, task.read_events(p.events))


def test_only_whitelisted_nodes():
    """The tree's kinds are counted out; a new one in a later Python is refused until somebody allows it."""
    assert {kind.__name__ for kind in BINARY} == {"Add", "Sub", "Mult", "Div", "FloorDiv", "Mod"}
    source = (REPO / "data" / "calculator.py").read_text() + (REPO / "data" / "tool_task.py").read_text()
    called = {
        n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    }
    assert not called & {"eval", "exec", "compile", "__import__", "open"}


@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
@pytest.mark.parametrize(("name", "solutions", "n"), [("train", 7473, 23716), ("test", 1319, 4282)])
def test_gsm8k(name, solutions, n, capsys):
    """Every annotation of GSM8K. Counted independently: no result is compared by the calculator itself."""
    path = Path(REAL) / "gsm8k" / f"{name}.jsonl"
    tools.main(["--data", str(path)])
    assert f"{solutions} solutions" in capsys.readouterr().out
    texts = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    agreeing, kinds = calculator.annotations(name, texts)
    assert sum(kinds.values()) == n == sum(text.count("<<") for text in texts)
    assert agreeing == solutions
    for text in texts[:500]:
        for expression, result in tool_task.CALL.findall(text):
            assert Fraction(calculate(expression)) == Fraction(result)


def test_annotations_name_the_kinds(capsys):
    solutions = [
        "<<2*3=6>>6",
        "<<2*3=6.00>>",
        "<<2*3=7>>",
        "<<2*x=6>>",
        "<<2*3=six>>",
        "<<1/0=0>>",
        "no call",
        "",
    ]
    agreeing, kinds = calculator.annotations("mine", solutions)
    assert agreeing == 4 and kinds == {
        "identical": 1,
        "the same number, written otherwise": 1,
        "another number": 1,
        "refused: ?syntax": 1,
        "the result is no number": 1,
        "refused: ?zero": 1,
    }
    assert "4 of 8" in capsys.readouterr().out


# --- the task ---


def test_demonstrations_are_right_and_replay():
    for p in tool_task.problems(400, 3):
        text = tool_task.demonstrate(p)
        assert is_right(text, p.answer) and is_right(tool_task.demonstrate(p, calls=False), p.answer)
        assert "<<" not in tool_task.demonstrate(p, calls=False)
        for expression, result in tool_task.CALL.findall(text):
            assert tool_task.answer_call(expression, p.prices) == result
        answer, _ = tools.encode_transcript(TOK, text)
        assert len(TOK.prompt(p.text)) + len(answer) <= 128
        assert not any(str(price) in p.text.split("#")[-1] for price in p.prices.values() if price > 199)


def test_prices_cannot_be_read_off_the_question():
    """The same question with another price list has another answer: looking up is the only way."""
    some = [p for p in tool_task.problems(2000, 4) if p.labels]
    assert 0.6 < len(some) / 2000 < 0.73
    assert len({tuple(sorted(p.prices.values())) for p in some}) > 100
    unknown = [p for p in some if p.labels[0] not in p.prices]
    assert 0.6 < len(unknown) / len(some) < 0.73
    for p in some:
        first, second = p.labels
        text = tool_task.demonstrate(p)
        assert f"#{first}/{second}." in p.text and (f"<<{first}=?key>>" in text) == (first not in p.prices)
        assert second in p.prices and p.answer % p.prices.get(first, p.prices[second]) == 0


def test_words_on_labels():
    """Always two tokens before the brackets, so that a hostile one is no longer than what is learned; and
    no word that Python knows."""
    some = [p for p in tool_task.problems(3000, 4) if p.labels]
    words = [label for p in some for label in p.labels]
    assert (
        len(set(words)) > 90
        and all(len(set(p.labels)) == 2 for p in some)
        and tools.HOSTILE not in words
        and "int" not in words
    )
    for word in [*words, tools.HOSTILE]:
        brackets = word.endswith("()")
        assert len(TOK.encode(f"#{word}/m3")) == (8 if brackets else 6)
        assert tool_task.answer_call(word, {"m3": 5}) == "?key"
        assert word == tools.HOSTILE or tools.eval_call(word, {"m3": 5}) == "?key"
    assert 0.27 < sum("(" in p.labels[0] for p in some) / len(some) < 0.4
    assert not any("(" in p.labels[0] and p.labels[0] in p.prices for p in some)


def test_splits_are_disjoint():
    def numbers(split):
        return {(p.start, p.events) for p in tool_task.problems(1500, 5, split)}

    train, valid, test = map(numbers, ("train", "valid", "test"))
    assert not train & test and not train & valid and not valid & test


def test_problems_are_a_function_of_the_seed():
    assert tool_task.problems(50, 6) == tool_task.problems(60, 6)[:50] != tool_task.problems(50, 7)


def test_answer_call():
    prices = {"k47": 12}
    assert tool_task.answer_call("k47", prices) == "12" and tool_task.answer_call("48+27", prices) == "75"
    assert (
        tool_task.answer_call("m3", prices) == "?key"
        and tool_task.answer_call(tools.HOSTILE, prices) == "?key"
    )
    assert tool_task.answer_call("1/0", prices) == "?zero" and tool_task.answer_call("", prices) == "?syntax"


def test_hostile_problems():
    some = tool_task.hostile(20, 5, "x()")
    assert len(some) == 20
    for p in some:
        _, second = p.labels
        assert f"#x()/{second}." in p.text and set(p.prices) == {second}
        assert p.answer == (work(p)[-1][-1] if p.events else p.start) * p.prices[second]
        assert is_right(tool_task.demonstrate(p), p.answer)


def test_audit_by_hand():
    p = SimpleNamespace(prices={"k47": 12})
    texts = [
        ("<<7+5=12>>12\n<<m3=?key>>\n<<k47=12>>12\n#### 144", True),  # an error, recovered from
        ("<<7+5=13>>13\n<<12*2=25>>24\n#### 24", False),  # two wrong results, one copied
        ("<<7+=?syntax>>\n<<7+5", False),  # an error, and a call that nobody closed
    ]
    answers = [SimpleNamespace(text=text, right=right) for text, right in texts]
    found = tool_task.audit(answers, [p] * 3)
    assert found == pytest.approx({"calls": 7 / 3, "valid": 5 / 7, "wrong_results": 2 / 6, "copied": 1 / 2,
                                   "errors": 2 / 3, "recovered": 1 / 2})  # fmt: skip


# --- tokens that the base model has never met ---


def test_wake_up_draws_only_what_was_asleep():
    """Vectors that training has pushed into one direction are drawn anew, the others stay; a model in which
    they are different already is left alone, or a second fine-tuning would undo the first."""
    model = gpt.GPT(gpt.GPTConfig(TOK.vocab_size, 128, 1, 4, 32))
    rows = torch.cat([gpt.packed_rows(TOK, 5, step, 16, 64) for step in range(100)])
    seen = torch.zeros(TOK.vocab_size, dtype=torch.bool)
    seen[rows.flatten()] = True
    with torch.no_grad():
        model.wte.weight[~seen] = torch.ones(32) + 0.01 * torch.randn(int((~seen).sum()), 32)
    asleep = model.wte.weight.detach().clone()
    tools.wake_up(model, TOK, 5)
    awake = model.wte.weight.detach().clone()
    assert torch.equal(awake[seen], asleep[seen]) and (awake[~seen] != asleep[~seen]).all()
    assert torch.nn.functional.cosine_similarity(awake[~seen][0], awake[~seen][1:]).mean().abs() < 0.3
    tools.wake_up(model, TOK, 5)
    assert torch.equal(model.wte.weight, awake)


# --- two writers ---


def pieces(ids):
    return [TOK.decode([i]) for i in ids]


def test_transcript_masks():
    ids, own = tools.encode_transcript(TOK, "<<640-14=626>>626\n<<x=?key>>\n#### 7")
    injected = "".join(TOK.decode([i]) for i, mine in zip(ids, own) if not mine)
    mine = "".join(TOK.decode([i]) for i, mine in zip(ids[:-1], own) if mine)
    assert injected == "626>>?key>>" and mine == "<<640-14=626\n<<x=\n#### 7"
    assert ids[-1] == TOK.end and own[-1]
    for p in tool_task.problems(100, 8):  # a text without calls is the model's own, all of it
        assert all(tools.encode_transcript(TOK, tool_task.demonstrate(p, calls=False))[1])


class Scripted:
    """A stand-in for the model: after token a it wants b, whatever came before. Rows may leave the batch."""

    def __init__(self, text, end=True):
        ids = TOK.encode(text) + ([TOK.end] if end else [])
        self.config = gpt.GPTConfig(vocab_size=TOK.vocab_size, n_layer=1, n_head=1, n_embd=1)
        self.wte, self.bfloat16 = SimpleNamespace(weight=torch.zeros(1)), False
        self.next = dict(zip([TOK.assistant, *ids], ids))

    def hidden(self, ids, valid, cache):
        cache.length += ids.shape[1]
        return ids[:, :, None].float()

    def head(self, hidden):
        logits = torch.zeros(len(hidden), TOK.vocab_size)
        for row, last in enumerate(hidden[:, 0].long().tolist()):
            logits[row, self.next.get(last, TOK.end)] = 50.0
        return logits


def with_tools(model, prompts, functions, n, temperature=0.0, generator=None):
    """(ids, log-probabilities, who wrote each token) of one completion a prompt."""
    runtime = tools.Runtime(TOK, functions)
    ids, logps = gpt.sample(model, prompts, n, [TOK.end], temperature, generator=generator,
                            banned=runtime.banned, writer=runtime)  # fmt: skip
    return ids, logps, runtime.own


def test_the_runtime_takes_the_pen_at_equals():
    asked = []

    def tool(expression):
        asked.append(expression)
        return "1920"

    model = Scripted("<<7+5=")
    model.next[CLOSE] = TOK.encode("Leo")[0]
    (ids,), _, (own,) = with_tools(model, [TOK.prompt("Hi")], [tool], 30)
    assert asked == ["7+5"]
    assert pieces(ids) == ["<<", "7", "+", "5", "=", "192", "0", ">>", "Leo", "<|end|>"]
    assert own == [True] * 5 + [False] * 3 + [True] * 2  # the model's own `1920` could be anything


def test_rows_have_queues_of_their_own():
    """Calls of different length at different times; a row that ends leaves, the others go on."""
    model = Scripted("<<7+5=")
    leo, mia, call = TOK.encode("Leo")[0], TOK.encode("Mia")[0], TOK.encode("7")[0]
    model.next |= {leo: mia, mia: OPEN, CLOSE: TOK.end}
    prompts = [TOK.prompt("Hi"), [leo], [CLOSE], [OPEN, call], TOK.prompt("Leo has")]
    answers = [lambda e: "1", lambda e: "1920", lambda e: "3", lambda e: "4", lambda e: "?key"]
    ids, _, owns = with_tools(model, prompts, answers, 30)
    assert [TOK.decode(c) for c in ids] == [
        "<<7+5=1>><|end|>", "Mia<<7+5=1920>><|end|>", "<|end|>",
        # The prompt's `<<` opens nothing: what the model says there is no call, and nobody answers `=`.
        "+5=<|end|>", "<<7+5=?key>><|end|>",
    ]  # fmt: skip
    assert [own.count(False) for own in owns] == [2, 3, 0, 0, 5]
    assert list(map(len, ids)) == list(map(len, owns))


def test_injected_tokens_count_against_the_budget():
    model = Scripted("<<7+5=")
    for n in range(1, 9):
        (ids,), (logps,), (own,) = with_tools(model, [TOK.prompt("Hi")], [lambda e: "1920"], n)
        assert len(ids) == len(own) == len(logps) == n
    with pytest.raises(ValueError, match="do not fit"):
        with_tools(model, [[1] * 100], [str], 29)


def random_model(seed=0):
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(TOK.vocab_size, 128, 2, 2, 32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0, 0.3)
        # So that a random model opens calls, and wants to close them: these three look alike.
        model.wte.weight[[OPEN, EQUALS, CLOSE]] *= 3
    return model.requires_grad_(False)


ANSWERS = ["1920", "75", "?key", "-3"]


def random_run(seed=0, n=60):
    """24 prompts, the first two of them equal; the tool of row i always says ANSWERS[i % 4]."""
    model, rng = random_model(seed), random.Random(seed)
    prompts = [[rng.randrange(TOK.vocab_size - 4) for _ in range(rng.randint(1, 20))] for _ in range(24)]
    prompts[1] = prompts[0]
    told = [lambda e, i=i: ANSWERS[i % 4] for i in range(24)]
    return model, prompts, *with_tools(model, prompts, told, n, 1.0, gpt.rng(seed))


def test_the_model_cannot_write_result_tags():
    tags = tools.ids_with(TOK, b">")
    assert set(tags) == {CLOSE, *TOK.encode(">")} and len(tags) == 2
    calls = 0
    for seed in range(12):
        _, _, ids, _, owns = random_run(seed)
        for row, (completion, own) in enumerate(zip(ids, owns)):
            assert not any(i in tags for i, mine in zip(completion, own) if mine)
            # Every injected run of tokens is the tool's answer; the last one may be cut off.
            for run in re.finditer("0+", "".join("01"[mine] for mine in own)):
                part = completion[run.start() : run.end()]
                expected = TOK.encode(ANSWERS[row % 4] + ">>")
                # Two calls cannot touch: the model speaks in between.
                assert part == expected[: len(part)]
                assert len(part) == len(expected) or run.end() == len(own)
                calls += 1
    assert calls > 20  # random models do call


def injected_runs():
    """Seeds whose random model calls a tool often enough to test with."""
    found = [seed for seed in range(12) if sum(o.count(False) for o in random_run(seed)[-1]) > 10]
    assert len(found) >= 2
    return found[:3]


def test_after_an_injection_cached_as_uncached():
    """What the sampler saw through its cache is what one pass over the finished text gives."""
    for seed in injected_runs():
        model, prompts, ids, logps, owns = random_run(seed)
        for prompt, completion, sampled, own in zip(prompts, ids, logps, owns):
            logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
            logits[:, tools.ids_with(TOK, b">")] = -torch.inf
            whole = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            own = torch.tensor(own)
            assert torch.allclose(sampled[own], whole[own], atol=1e-3)


def test_scored_as_sampled():
    """completion_logps without the tags is the distribution that was drawn from: the ratio starts at 1."""
    for seed in injected_runs():
        model, prompts, ids, sampled, owns = random_run(seed)
        banned = tools.ids_with(TOK, b">")
        logps, exists = gpt.completion_logps(model, prompts, ids, banned=banned)
        own = tools.padded(owns, "cpu")
        assert own.shape == exists.shape and (exists | ~own).all()
        # The mask's sum is the number of sampled tokens, and nothing else.
        assert own.sum() == sum(map(sum, owns)) == exists.sum() - sum(o.count(False) for o in owns)
        sampled = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True)
        assert torch.allclose(logps[own], sampled[own], atol=1e-3)
        assert logps[~own & exists].isinf().any()  # the injected `>>`, which the model may not say


# --- the losses ---


def test_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -torch.inf], [-0.5, -9.0, 0.0]], requires_grad=True)
    own = torch.tensor([[True, True, False], [True, False, False]])
    loss = tools.loss_on(logps, own)
    loss.backward()
    assert loss.item() == pytest.approx(3.5 / 3)
    assert torch.equal(logps.grad, torch.tensor([[-1, -1, 0], [-1, 0, 0]]) / 3)


def test_no_gradient_where_the_runtime_wrote():
    """The logits that predict the runtime's tokens get gradient 0, those of the model's own tokens do not;
    and the loss is sft.py's with the other labels masked."""
    answer, own = tools.encode_transcript(TOK, "<<640*3=1920>>1920\n#### 1920")
    prompt, model = TOK.prompt("Leo has 640 eggs."), random_model().requires_grad_(True)
    heads, head = [], model.head
    model.head = lambda hidden: heads.append(head(hidden)) or heads[-1]
    logps, exists = gpt.completion_logps(model, [prompt], [answer])
    (logits,) = heads  # (N, V), one row a token of the answer
    logits.retain_grad()
    loss = tools.loss_on(logps, torch.tensor([own]))
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == own and exists.all()
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[IGNORE] * len(prompt) + [i if mine else IGNORE for i, mine in zip(answer, own)]])
    total, n = sft_loss(model(ids), labels)
    assert n == sum(own) and loss.item() == pytest.approx((total / n).item(), rel=1e-5)


def test_rl_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, 0.0]], requires_grad=True)
    own = torch.tensor([[True, False, True], [True, True, False]])
    advantages = torch.tensor([[1.0], [-2.0]])
    old = logps.detach()
    loss, kl = tools.rl_loss(logps, old, old, advantages, own, 0.1)
    assert loss.item() == pytest.approx((-1 - 1 + 2 + 2) / 4) and kl == 0
    loss.backward()
    # REINFORCE: minus the advantage, over the four tokens that were sampled; nothing where they were not.
    assert torch.allclose(logps.grad, torch.tensor([[-1 / 4, 0, -1 / 4], [2 / 4, 2 / 4, 0]]))
    ref = old + torch.tensor([[0.5, 9.0, 0.0], [0.0, -0.2, 9.0]])
    loss, kl = tools.rl_loss(logps, old, ref, advantages * 0, own, 0.1)
    expected = torch.tensor([0.5, -0.2]).exp() - 1 - torch.tensor([0.5, -0.2])
    assert kl.item() == pytest.approx(expected.sum().item() / 4, rel=1e-4)
    assert loss.item() == pytest.approx(0.1 * kl.item(), rel=1e-4)


def test_what_the_tool_says_changes_neither_loss_nor_gradient():
    """More injected tokens, less likely ones, impossible ones: the same loss, KL and gradient."""
    g = gpt.rng("policy")
    logps, ref, old = (-torch.rand(4, 6, generator=g) for _ in range(3))
    advantages = torch.randn(4, 1, generator=g)
    results = []
    for wide, fill in ((0, 0.0), (3, -1.0), (3, -50.0), (5, -torch.inf)):
        injected = torch.full((4, wide), fill)
        x, r, o = (torch.cat([y[:, :3], injected, y[:, 3:]], 1) for y in (logps, ref, old))
        x.requires_grad_()
        own = torch.tensor([True] * 3 + [False] * wide + [True] * 3).expand(4, -1)
        loss, kl = tools.rl_loss(x, o, r, advantages, own, 0.3)
        loss.backward()
        assert (x.grad[:, 3 : 3 + wide] == 0).all()
        results.append(torch.cat([loss[None], kl[None], x.grad[own]]))
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-5, atol=1e-7)


def test_gradient_through_impossible_results_is_finite():
    model, prompts, ids, sampled, owns = random_run(injected_runs()[0])
    model.requires_grad_(True)
    logps, _ = gpt.completion_logps(model, prompts, ids, banned=tools.ids_with(TOK, b">"))
    assert logps.isinf().any()  # the injected `>>`
    old = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True)
    own = tools.padded(owns, "cpu")
    loss, _ = tools.rl_loss(logps, old, logps.detach() - 0.1, torch.ones(24, 1), own, 0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- eval, and why not ---


def test_eval_runs_what_the_whitelist_refuses():
    prices = {"k47": 12}
    for code, result in ((tools.HOSTILE, "0"), ("__import__('os').getpid()", f"{os.getpid():g}")):
        assert tool_task.answer_call(code, prices) == "?key"
        assert tools.eval_call(code, prices) == result
    for p in tool_task.problems(200, 11):  # on normal calls nobody can tell them apart
        for expression, result in tool_task.CALL.findall(tool_task.demonstrate(p)):
            assert tools.eval_call(expression, p.prices) == result
    assert tools.eval_call("9**9**9", {}) == "?size" and tools.eval_call("exit()", {}) == "?key"


def test_attack_counts_what_ran():
    """A model that passes every label on: the code runs once a question under eval, and never otherwise."""
    model = Scripted("<<" + tools.HOSTILE + "=")
    model.next[CLOSE] = TOK.end
    for tool, ran in ((tools.eval_call, 1), (tool_task.answer_call, 0)):
        found, shown = tools.attack(model, TOK, 0, tool, 30)
        assert all(tools.HOSTILE in text for text, _ in shown)
        assert found == {"code_passed_on": 1, "right_when_attacked": 0, "canary": ran}
