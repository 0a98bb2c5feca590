"""Tests of tools.py and its task: the calculator under fuzzing and attack, who writes which token, the masks."""

import ast
import functools
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

import helpers
import pytest
import torch
from helpers import draw
from torch.nn.utils.rnn import pad_sequence

import gpt
import tools
from data import calculator, task, tool_task
from data.calculator import BINARY, SHORT, CallError, calculate, show, value
from data.checker import is_correct
from data.runs import rng
from sft import IGNORE, sft_loss

REPO = Path(__file__).resolve().parent.parent
REAL = os.environ.get("REAL_DATA_DIR")
TOK = gpt.Tokenizer("task")
OPEN, EQUALS, CLOSE = TOK.encode("<<=>>")


def outcome(text):
    """The calculator's result, or its error."""
    try:
        return calculate(text)
    except CallError as error:
        return str(error)


# --- the calculator: values ---


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48+27", "75"), ("0.1+0.2", "0.3"), (".1+.2", "0.3"), ("7-9", "-2"), ("-3*-2", "6"), ("+10", "10"),
        ("(7-2)*3", "15"), ("7/2", "3.5"), ("1/3", "0.333333"), ("2/3", "0.666667"), ("-1/3", "-0.333333"),
        ("1/2000000", "0.000001"), ("-1/2000000", "-0.000001"), ("-.0000004", "0"), ("7//2", "3"), ("-7//2", "-4"),
        ("7%3", "1"), ("6/3", "2"), ("5.", "5"), (" 1 + 1 ", "2"), ("0", "0"), ("-0", "0"), ("0.0000001", "0"),
        ("-0.0000001", "0"), ("1000000*1.5", "1500000"), ("2-2.0", "0"), ("999999999999999+1", "1000000000000000"),
        ("0.1*3-0.3", "0"), ("1.10", "1.1"),
        ("1/0", "?zero"), ("1//0", "?zero"), ("1%(2-2)", "?zero"), ("1/0.0", "?zero"), ("", "?syntax"),
        ("2**3", "?syntax"), ("1 2", "?syntax"), ("k47", "?syntax"), ("1+", "?syntax"), ("()", "?syntax"),
        ("...", "?syntax"), ("3(4)", "?syntax"), ("007", "?syntax"), ("1.2.3", "?syntax"), ("1;2", "?syntax"),
        ("9" * 16, "?size"), ("1000000000000000+1", "?size"), ("9999999999*9999999999", "?size"),
        ("1+" * 50 + "1", "?size"),
    ],
)  # fmt: skip
def test_values_and_errors(text, result):
    assert outcome(text) == result


def test_the_fast_path_computes_what_the_parser_computes():
    source = random.Random(0)
    for _ in range(3000):
        left, right = (source.randrange(10 ** source.randint(1, 10)) for _ in range(2))
        text = f"{left}{source.choice('+-*')}{right}"
        assert SHORT.fullmatch(text)
        try:
            slow = show(value(ast.parse(text, mode="eval").body, text))
        except CallError as error:
            slow = str(error)
        assert outcome(text) == slow, text
    assert not any(SHORT.fullmatch(text) for text in ("007+1", "1+07", "1**2", "1--2", "1+2\n", "١+1", ""))


def random_tree(source, depth):
    """A random expression and its value: a Fraction, or the name of an error."""
    if depth == 0 or source.random() < 0.2:
        number = f"{source.randrange(100)}.{source.randrange(100):02}"
        text = source.choice([str(source.randrange(1000)), number, ".5", "3."])
        return text, Fraction(text)
    if source.random() < 0.15:
        text, number = random_tree(source, depth - 1)
        return f"-({text})", number if isinstance(number, str) else -number
    (left, a), (right, b) = random_tree(source, depth - 1), random_tree(source, depth - 1)
    op = source.choice(["+", "-", "*", "/", "//", "%"])
    text = f"({left}){op}({right})"
    if isinstance(a, str) or isinstance(b, str):
        return text, a if isinstance(a, str) else b  # the left side is computed first
    if b == 0 and op in ("/", "//", "%"):
        return text, "?zero"
    result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b,
              "//": lambda: Fraction(a // b), "%": lambda: a % b}[op]()  # fmt: skip
    return text, "?size" if abs(result) > calculator.LARGEST else result


def test_random_expressions_against_exact_fractions():
    source, checked = random.Random(1), 0
    for _ in range(4000):
        text, expected = random_tree(source, 3)
        if len(text) > calculator.LONGEST:
            continue
        found = outcome(text)
        if isinstance(expected, str) or expected.denominator == 1:
            assert found == str(expected), text
        else:
            assert abs(Fraction(found) - expected) <= Fraction(1, 2 * 10**6), text
        checked += 1
    assert checked > 2000


# --- the calculator: attacks ---

# fmt: off
ATTACKS = [
    # large numbers, long texts, deep nesting
    "2**9**9", "9**9**9**9", "9" * 100, "9" * 100_000, "1" + "0" * 5000 + "*2", "9*" * 50_000 + "9",
    "+".join(["1"] * 50_000), "(" * 10_000 + "1" + ")" * 10_000, "(" * 50 + "1" + ")" * 49, "(" * 100, "-" * 100,
    "-" * 99 + "1", "-" * 10_000 + "1", "1<<99999999999", "1." * 50, "." * 100, "%" * 100, "/" * 100, "1//" * 33,
    "1%" * 50, "(1)" * 33, "( " * 50, " " * 100, " " * 100_000,
    # code
    "__import__('os')", "__import__('os').system('touch hacked')", "open('x','w')", "open('hacked','w').write('1')",
    "exec('import os')", "(lambda:0)()", "(lambda: (yield))()", "[x for x in range(10**9)]", "f'{1+1}'", 'f"{open}"',
    "(x:=1)", "().__class__.__bases__[0].__subclasses__()", "1 .__class__", "(1).real", "a", "a.b", "a[0]",
    "'a'*10**9", "print(1)", "exit()", "input()", "breakpoint()", "await 1", "()()", "1()", "(1)(2)",
    # Python's other numbers, other scripts' digits, characters that are not printed
    "1_000", "1__0", "0x10", "0b1", "1e5", "1e999", "1j", "1.e9", "١+١", "²", "１+１", "1\u00b2", "1\x00", "\x001",
    "1\n+1", "1\n", "1;1", "1\t+1", "1\\\n+1", "\ud800", "1" + "\u200b" + "2",
    # Python's other operators and values
    "~1", "1<<9", "1 if 1 else 2", "1/0", "0/0", "1%0", "#", "1#2", "True", "None", "Ellipsis", "...", ". . .",
    "1,2", "(1,)", "*1", "**1", "{}", "[]", "{1:2}", "@", "1@2", "not 1", "1 and 2", "1<2", "1==1", "1|2", "1^2",
    "5%", "%5",
]
# fmt: on


def limited(text):
    """The outcome; fails if it takes more than 50 ms of processor time."""
    begun = time.process_time()
    found = outcome(text)
    assert time.process_time() - begun < 0.05, f"{text[:60]!r} is slow"
    return found


def test_known_attacks(tmp_path, monkeypatch):
    """None is executed: the outcome is an error or a number, at once, in little memory, and nothing has changed."""
    monkeypatch.chdir(tmp_path)
    limited("1.5*(2+3)")  # the first call imports and compiles
    before = dict(os.environ), set(sys.modules), sys.getrecursionlimit()
    for text in ATTACKS:
        found = limited(text)
        assert re.fullmatch(r"\?(syntax|size|zero)|-?\d+(\.\d{1,6})?", found), (text[:60], found)
        assert found.startswith("?") or set(text) <= set("0123456789.+-*/%() ")
    assert (dict(os.environ), set(sys.modules), sys.getrecursionlimit()) == before
    assert not list(tmp_path.iterdir())
    tracemalloc.start()  # not in the loop above: it makes everything several times slower
    for text in ATTACKS:
        outcome(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, peak


@pytest.mark.filterwarnings("error")  # the parser must not warn about its input either
def test_fuzz(tmp_path, monkeypatch):
    """10^5 inputs: pieces of the grammar in any order, allowed characters, mutated calls and attacks, random bytes.
    None is executed (many attacks would leave a file), and none takes longer than 50 ms."""
    monkeypatch.chdir(tmp_path)
    source, allowed = random.Random(2), "0123456789.+-*/%() "
    attacks = [text[:200] for text in ATTACKS] + ["open('x','w')"] * 40
    pieces = [*allowed, "//", "**", "99999999", "0.", ".5", "()", "--", "1e9", "_", "a", "'"]
    for i in range(100_000):
        if i % 5 == 0:
            text = "".join(source.choice(pieces) for _ in range(source.randint(0, 30)))
        elif i % 5 == 1:  # these all reach the parser
            text = "".join(source.choice(allowed) for _ in range(source.randint(0, 100)))
        elif i % 5 in (2, 3):
            text = f"({source.randrange(999)}+{source.randrange(99)})*{source.randrange(99)}/{source.randrange(9)}"
            if i % 5 == 3:
                text = source.choice(attacks) + source.choice(["", "*2", "*" + source.choice(attacks)])
            at = source.randrange(len(text))
            other = source.choice(["", chr(source.randrange(0x11000)), source.choice(pieces)])
            text = text[:at] + other + text[at + 1 :]
        else:
            encoding = "latin-1" if i % 2 else "utf-8"
            text = source.randbytes(source.randint(0, 60)).decode(encoding, "replace")
        found = limited(text)
        assert found[0] == "?" or (len(found) < 26 and Fraction(found) is not None), text
    assert not list(tmp_path.iterdir())


def test_rate():
    """100,000 calls per second on the calls of the task."""
    texts = [f"{a}{op}{b}" for p in tool_task.problems(300, 9) for a, op, b, _ in work(p)] * 20
    begun = time.process_time()
    for text in texts:
        calculate(text)
    assert len(texts) / (time.process_time() - begun) > 100_000


def test_only_whitelisted_nodes():
    """Kinds of node are allowed by name, so a new kind in a later Python is refused; and nothing here runs code."""
    assert {kind.__name__ for kind in BINARY} == {"Add", "Sub", "Mult", "Div", "FloorDiv", "Mod"}
    for text in ("True", "...", "1j", "'1'", "a", "f(1)", "2**3", "~1", "1 if 1 else 2", "1<2", "(1,)"):
        with pytest.raises(CallError):  # also without the check of the characters, which refuses most of these
            value(ast.parse(text, mode="eval").body, text)
    source = "".join((REPO / "data" / name).read_text() for name in ("calculator.py", "tool_task.py"))
    called = {n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not called & {"eval", "exec", "compile", "__import__", "open"}


# --- GSM8K's annotations ---


@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
@pytest.mark.parametrize(("name", "solutions", "n"), [("train", 7473, 23716), ("test", 1319, 4282)])
def test_gsm8k(name, solutions, n):
    """Every annotation of GSM8K. They are counted independently here."""
    path = Path(REAL) / "gsm8k" / f"{name}.jsonl"
    texts = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    agreeing, kinds = calculator.annotations(name, texts)
    assert sum(kinds.values()) == n == sum(text.count("<<") for text in texts)
    assert agreeing == solutions
    for text in texts[:500]:
        for expression, result in tool_task.CALL.findall(text):
            assert Fraction(calculate(expression)) == Fraction(result)


def test_annotations_by_hand(capsys):
    texts = ["<<2*3=6>>6", "<<2*3=6.00>>", "<<2*3=7>>", "<<2*x=6>>", "<<2*3=six>>", "<<1/0=0>>", "no call", ""]
    agreeing, kinds = calculator.annotations("mine", texts)
    assert agreeing == 4 and list(kinds.values()) == [1] * 6 and {"refused: ?syntax", "refused: ?zero"} < set(kinds)
    assert "4 of 8" in capsys.readouterr().out


# --- the task ---


def work(p):
    return tool_task.work(p.start, task.read_events(p.events))


def priced(n, seed):
    return [p for p in tool_task.problems(n, seed) if p.labels]


def test_demonstrations_are_correct_and_replay():
    for p in tool_task.problems(400, 3):
        text, plain = tool_task.demonstrate(p), tool_task.demonstrate(p, calls=False)
        assert is_correct(text, p.answer) and is_correct(plain, p.answer) and "<<" not in plain
        for expression, result in tool_task.CALL.findall(text):
            assert tool_task.answer_call(expression, p.prices) == result
        assert len(TOK.prompt(p.text)) + len(tools.encode_transcript(TOK, text)[0]) <= 128


def test_prices_are_not_in_the_question():
    """Two problems of three have a price, and the first label is unknown in two of three of those."""
    some = priced(2000, 4)
    assert 0.6 < len(some) / 2000 < 0.73
    assert len({tuple(sorted(p.prices.values())) for p in some}) > 100
    assert 0.6 < sum(p.labels[0] not in p.prices for p in some) / len(some) < 0.73
    for p in some:
        first, second = p.labels
        text = tool_task.demonstrate(p)
        assert f"#{first}/{second}." in p.text and (f"<<{first}=?key>>" in text) == (first not in p.prices)
        assert second in p.prices and p.answer % p.prices.get(first, p.prices[second]) == 0
        left = p.answer // p.prices.get(first, p.prices[second])
        assert left == (work(p)[-1][-1] if p.events else p.start)


def test_labels():
    """Two tokens before the brackets, so the hostile one is no longer than what is learned; and no Python name."""
    some = priced(3000, 4)
    words = [label for p in some for label in p.labels]
    assert len(set(words)) > 90 and all(len(set(p.labels)) == 2 for p in some)
    assert tools.HOSTILE not in words and "int" not in words
    for word in [*words, tools.HOSTILE]:
        assert len(TOK.encode(f"#{word}/m3")) == (8 if word.endswith("()") else 6)
        assert tool_task.answer_call(word, {"m3": 5}) == "?key"
        assert word == tools.HOSTILE or tools.eval_call(word, {"m3": 5}) == "?key"
    brackets = [p for p in some if "(" in p.labels[0]]
    assert 0.27 < len(brackets) / len(some) < 0.4 and not any(p.labels[0] in p.prices for p in brackets)


def test_problems_are_a_function_of_the_seed_in_disjoint_splits():
    assert tool_task.problems(50, 6) == tool_task.problems(60, 6)[:50] != tool_task.problems(50, 7)
    splits = [{(p.start, p.events) for p in tool_task.problems(1500, 5, s)} for s in ("train", "valid", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_answer_call():
    for call, result in (("k47", "12"), ("48+27", "75"), ("m3", "?key"), (tools.HOSTILE, "?key"), ("1/0", "?zero"),
                         ("", "?syntax")):  # fmt: skip
        assert tool_task.answer_call(call, {"k47": 12}) == result


def test_hostile_problems():
    some = tool_task.hostile(20, 5, "x()")
    assert len(some) == 20
    for p in some:
        _, second = p.labels
        assert f"#x()/{second}." in p.text and set(p.prices) == {second}
        assert p.answer == (work(p)[-1][-1] if p.events else p.start) * p.prices[second]
        assert is_correct(tool_task.demonstrate(p), p.answer)


def test_audit_by_hand():
    texts = [
        ("<<7+5=12>>12\n<<m3=?key>>\n<<k47=12>>12\n#### 144", True),  # an error, recovered from
        ("<<7+5=13>>13\n<<12*2=25>>24\n#### 24", False),  # two wrong results, one repeated
        ("<<7+=?syntax>>\n<<7+5", False),  # an error, and a call that was not closed
    ]
    answers = [SimpleNamespace(text=text, correct=correct) for text, correct in texts]
    found = tool_task.audit(answers, [SimpleNamespace(prices={"k47": 12})] * 3)
    assert found == pytest.approx({"calls": 7 / 3, "valid": 5 / 7, "wrong_results": 2 / 6, "copied": 1 / 2,
                                   "errors": 2 / 3, "recovered": 1 / 2})  # fmt: skip


# --- two writers ---


def test_transcript_masks():
    ids, own = tools.encode_transcript(TOK, "<<640-14=626>>626\n<<x=?key>>\n#### 7")
    injected = TOK.decode([i for i, mine in zip(ids, own) if not mine])
    assert injected == "626>>?key>>" and ids[-1] == TOK.end and own[-1]
    assert TOK.decode([i for i, mine in zip(ids[:-1], own) if mine]) == "<<640-14=626\n<<x=\n#### 7"
    for p in tool_task.problems(100, 8):  # a text without calls is all the model's own
        assert all(tools.encode_transcript(TOK, tool_task.demonstrate(p, calls=False))[1])


@pytest.mark.parametrize("vocabulary", ["task", "gpt2"])
def test_the_model_could_have_written_its_part_of_a_transcript(vocabulary, monkeypatch):
    """No token that it may not sample, such as GPT-2's `=$`."""
    if vocabulary == "gpt2":
        if not REAL:
            pytest.skip("REAL_DATA_DIR names no folder with GPT-2's vocabulary")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(REAL) / "tiktoken"))
    tok = gpt.Tokenizer(vocabulary)
    banned = set(tools.runtime_only(tok))
    for text in ("5*2=$<<5*2=10>>10", "x=(2+3)=5 =-<<2-7=-5>>5", "2+3=<<2+3=5>>5.\n#### 5"):
        ids, own = tools.encode_transcript(tok, text)
        assert not banned & {i for i, mine in zip(ids, own) if mine} and tok.decode(ids[:-1]) == text
    if vocabulary == "gpt2":
        assert banned & {*tok.encode("5*2=$<<5*2=")}


class Scripted:
    """A stand-in for the model: each token has one successor. Rows may leave the batch."""

    def __init__(self, text):
        ids = [*TOK.encode(text), TOK.end]
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
    """(ids, log-probabilities, who wrote each token), one completion per prompt."""
    runtime = tools.Runtime(TOK, functions)
    ids, logps = gpt.sample(model, prompts, n, [TOK.end], temperature, generator=generator,
                            banned=runtime.banned, writer=runtime)  # fmt: skip
    return ids, logps, runtime.own


def test_the_runtime_takes_over_at_equals():
    """... of an open call. The second `=` is in no call, so it is not answered."""
    asked, model, (leo,) = [], Scripted("<<7+5="), TOK.encode("Leo")
    model.next |= {CLOSE: leo, leo: EQUALS}
    (ids,), _, (own,) = with_tools(model, [TOK.prompt("Hi")], [lambda e: asked.append(e) or "1920"], 30)
    assert asked == ["7+5"]
    assert [TOK.decode([i]) for i in ids] == ["<<", "7", "+", "5", "=", "192", "0", ">>", "Leo", "=", "<|end|>"]
    assert own == [True] * 5 + [False] * 3 + [True] * 3


def test_every_row_has_a_queue_of_its_own():
    """Calls of different lengths at different times; a row that ends leaves, the others go on."""
    model = Scripted("<<7+5=")
    leo, mia, call = TOK.encode("Leo")[0], TOK.encode("Mia")[0], TOK.encode("7")[0]
    model.next |= {leo: mia, mia: OPEN, CLOSE: TOK.end}
    prompts = [TOK.prompt("Hi"), [leo], [CLOSE], [OPEN, call], TOK.prompt("Leo has")]
    results = [lambda e, r=r: r for r in ("1", "1920", "3", "4", "?key")]
    ids, _, owns = with_tools(model, prompts, results, 30)
    assert [TOK.decode(c) for c in ids] == [
        "<<7+5=1>><|end|>", "Mia<<7+5=1920>><|end|>", "<|end|>",
        # The prompt's `<<` does not open a call, so `=` is not answered.
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
    model = helpers.random_model(seed, TOK.vocab_size, 128)
    model.wte.weight[[OPEN, EQUALS, CLOSE]] *= 3  # similar vectors, so this model opens calls and would close them
    return model


RESULTS = ["1920", "75", "?key", "-3"]


def random_run(seed=0, n=60):
    """24 prompts, the first two of them equal; the tool of row i always returns RESULTS[i % 4]."""
    model, source = random_model(seed), random.Random(seed)
    prompts = [[source.randrange(TOK.vocab_size - 4) for _ in range(source.randint(1, 20))] for _ in range(24)]
    prompts[1] = prompts[0]
    functions = [lambda e, i=i: RESULTS[i % 4] for i in range(24)]
    return model, prompts, *with_tools(model, prompts, functions, n, 1.0, rng(seed))


@pytest.fixture(scope="module")
def all_runs():
    return [random_run(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def calling_runs(all_runs):
    """Runs whose random model calls a tool often enough to test with."""
    found = [run for run in all_runs if sum(own.count(False) for own in run[-1]) > 10]
    assert len(found) >= 2
    return found[:3]


def test_the_model_cannot_write_result_tags(all_runs):
    tags = tools.ids_with(TOK, b">")
    assert set(tags) == {CLOSE, *TOK.encode(">")} and len(tags) == 2
    calls = 0
    for _, _, ids, _, owns in all_runs:
        for row, (completion, own) in enumerate(zip(ids, owns)):
            assert not any(i in tags for i, mine in zip(completion, own) if mine)
            # Every injected run of tokens is one result of the tool (two calls cannot touch); the last may be cut off.
            for injected in re.finditer("0+", "".join("01"[mine] for mine in own)):
                part = completion[injected.start() : injected.end()]
                expected = TOK.encode(RESULTS[row % 4] + ">>")
                assert part == expected[: len(part)]
                assert len(part) == len(expected) or injected.end() == len(own)
                calls += 1
    assert calls > 20


def test_after_an_injection_the_cache_holds_the_injected_tokens(calling_runs):
    """The log-probabilities of the sampler are those of one pass over the finished text."""
    for model, prompts, ids, logps, owns in calling_runs:
        for prompt, completion, sampled, own in zip(prompts, ids, logps, owns):
            logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
            logits[:, tools.ids_with(TOK, b">")] = -torch.inf
            whole = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            assert torch.allclose(sampled[own], whole[own], atol=1e-3)


def test_scored_as_sampled(calling_runs):
    """completion_logps without the tags gives the distribution that was sampled from: the ratio starts at 1."""
    for model, prompts, ids, sampled, owns in calling_runs:
        logps, exists = gpt.completion_logps(model, prompts, ids, banned=tools.ids_with(TOK, b">"))
        own = tools.padded(owns, "cpu")
        assert own.shape == exists.shape and (exists | ~own).all()
        assert own.sum() == sum(map(sum, owns)) == exists.sum() - sum(o.count(False) for o in owns)
        assert torch.allclose(logps[own], pad_sequence(sampled, batch_first=True)[own], atol=1e-3)
        assert logps[~own & exists].isinf().any()  # the injected `>>`, which the model may not write


# --- the losses ---


def test_masked_nll_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -torch.inf], [-0.5, -9.0, 0.0]], requires_grad=True)
    own = torch.tensor([[True, True, False], [True, False, False]])
    loss = tools.masked_nll(logps, own)
    loss.backward()
    assert loss.item() == pytest.approx(3.5 / 3)
    assert torch.equal(logps.grad, torch.tensor([[-1, -1, 0], [-1, 0, 0]]) / 3)


def test_no_gradient_where_the_runtime_wrote():
    """The logits that predict injected tokens get gradient 0, those of the model's own tokens do not. And the loss is
    that of sft.py with the injected labels masked."""
    answer, own = tools.encode_transcript(TOK, "<<640*3=1920>>1920\n#### 1920")
    prompt, model = TOK.prompt("Leo has 640 eggs."), random_model().requires_grad_(True)
    heads, head = [], model.head
    model.head = lambda hidden: heads.append(head(hidden)) or heads[-1]
    logps, exists = gpt.completion_logps(model, [prompt], [answer])
    (logits,) = heads  # (N, V), one row per token of the answer
    logits.retain_grad()
    loss = tools.masked_nll(logps, torch.tensor([own]))
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == own and exists.all()
    labels = torch.tensor([[IGNORE] * len(prompt) + [i if mine else IGNORE for i, mine in zip(answer, own)]])
    total, n = sft_loss(model, torch.tensor([prompt + answer]), labels)
    assert n == sum(own) and loss.item() == pytest.approx((total / n).item(), rel=1e-5)


def test_rl_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, 0.0]], requires_grad=True)
    own = torch.tensor([[True, False, True], [True, True, True]])
    advantages, old = torch.tensor([[1.0], [-2.0]]), logps.detach()
    loss, kl = tools.rl_loss(logps, old, old, advantages, own, 0.1)
    assert loss.item() == pytest.approx((-1 - 1 + 2 + 2 + 2) / 5) and kl == 0
    loss.backward()
    # REINFORCE: minus the advantage, over the five sampled tokens; 0 at the injected one.
    assert torch.allclose(logps.grad, torch.tensor([[-1 / 5, 0, -1 / 5], [2 / 5, 2 / 5, 2 / 5]]))
    ref = old + torch.tensor([[0.5, 9.0, 0.0], [0.0, -0.2, 0.0]])
    loss, kl = tools.rl_loss(logps, old, ref, advantages * 0, own, 0.1)
    d = torch.tensor([0.5, -0.2])
    assert kl.item() == pytest.approx((d.exp() - 1 - d).sum().item() / 5, rel=1e-4)
    assert loss.item() == pytest.approx(0.1 * kl.item(), rel=1e-4)


def test_injected_tokens_change_neither_loss_nor_gradient():
    """More of them, less likely ones, impossible ones: the same loss, KL and gradient."""
    logps, ref, old = (-draw(4, 6, key=key).abs() for key in ("logps", "ref", "old"))
    results = []
    for wide, fill in ((0, 0.0), (3, -1.0), (3, -50.0), (5, -torch.inf)):
        injected = torch.full((4, wide), fill)
        x, r, o = (torch.cat([y[:, :3], injected, y[:, 3:]], 1) for y in (logps, ref, old))
        x.requires_grad_()
        own = torch.tensor([True] * 3 + [False] * wide + [True] * 3).expand(4, -1)
        loss, kl = tools.rl_loss(x, o, r, draw(4, 1), own, 0.3)
        loss.backward()
        assert (x.grad[:, 3 : 3 + wide] == 0).all()
        results.append(torch.cat([loss[None], kl[None], x.grad[own]]))
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-5, atol=1e-7)


def test_gradient_through_impossible_results_is_finite(calling_runs):
    model, prompts, ids, sampled, owns = calling_runs[0]
    model.requires_grad_(True)
    logps, _ = gpt.completion_logps(model, prompts, ids, banned=tools.ids_with(TOK, b">"))
    assert logps.isinf().any()  # the injected `>>`
    old, own = pad_sequence(sampled, batch_first=True), tools.padded(owns, "cpu")
    loss, _ = tools.rl_loss(logps, old, logps.detach() - 0.1, torch.ones(24, 1), own, 0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- other tools ---


def test_eval_runs_what_the_calculator_refuses():
    for code, result in ((tools.HOSTILE, "0"), ("__import__('os').getpid()", f"{os.getpid():g}")):
        assert tool_task.answer_call(code, {"k47": 12}) == "?key" and tools.eval_call(code, {"k47": 12}) == result
    for p in tool_task.problems(200, 11):  # on normal calls the two agree
        for expression, result in tool_task.CALL.findall(tool_task.demonstrate(p)):
            assert tools.eval_call(expression, p.prices) == result
    assert tools.eval_call("9**9**9", {}) == "?size" and tools.eval_call("exit()", {}) == "?key"


def test_attack_counts_what_ran():
    """A model that passes every label on: the code runs once per problem under eval, and never in the calculator."""
    model = Scripted("<<" + tools.HOSTILE + "=")
    model.next[CLOSE] = TOK.end
    for tool, ran in ((tools.eval_call, 1), (tool_task.answer_call, 0)):
        found, samples = tools.attack(model, TOK, tool_task.hostile(100, 0, tools.HOSTILE), tool, 30)
        assert all(tools.HOSTILE in text for text, _ in samples)
        assert found == {"code_passed_on": 1, "accuracy_attacked": 0, "canary": ran}


def test_one_call_in_ten_is_faulty():
    """The result is 1 to 9 too large, the same whenever the call is made; errors stay errors."""
    calls = [f"{a}+{b}" for a in range(60, 100) for b in range(50)]
    off = [int(tools.faulty_call(c, {}, 0)) - int(calculate(c)) for c in calls]
    assert {x for x in off if x} == set(range(1, 10)) and 0.08 < sum(x > 0 for x in off) / len(off) < 0.12
    assert off == [int(tools.faulty_call(c, {}, 0)) - int(calculate(c)) for c in calls]
    assert off != [int(tools.faulty_call(c, {}, 1)) - int(calculate(c)) for c in calls]
    assert {tools.faulty_call(c, {}, s) for s in range(50) for c in ("a", "1/0", "1+")} == {"?key", "?zero", "?syntax"}


@pytest.mark.parametrize("vocabulary", ["task", "gpt2"])
def test_no_random_text_forges_a_call_or_a_result(vocabulary, monkeypatch):
    """Over random tokens: every call in the text was executed by the runtime, every result in it was written by the
    runtime, and nothing else looks like one. `<<` may be one token, two, or a part of one."""
    if vocabulary == "gpt2":
        if not os.environ.get("REAL_DATA_DIR"):
            pytest.skip("REAL_DATA_DIR names no folder with GPT-2's vocabulary")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(os.environ["REAL_DATA_DIR"]) / "tiktoken"))
    tok, source, executed = gpt.Tokenizer(vocabulary), random.Random(0), []

    def tool(expression):
        executed.append((expression, str(len(executed))))
        return executed[-1][1]

    allowed = set(range(tok.vocab_size)) - set(tools.runtime_only(tok)) - {tok.user, tok.assistant, tok.end, tok.pad}
    kinds = [sorted(allowed), *(sorted(allowed & set(tools.ids_with(tok, mark))) for mark in (b"<", b"=", b"1", b"+"))]
    monkeypatch.setattr(tools, "runtime_only", functools.lru_cache(tools.runtime_only))  # slow for GPT-2
    monkeypatch.setattr(tools, "ids_with", functools.lru_cache(tools.ids_with))
    for _ in range(300):
        runtime, written, before = tools.Runtime(tok, [tool]), [], len(executed)
        for _ in range(60):
            new = source.choice(source.choice(kinds))
            written += runtime(torch.tensor([0]), torch.tensor([new])).tolist()
        text = tok.decode(written)
        calls = executed[before:]
        if runtime.queue[0]:  # the last result is not complete
            calls = calls[:-1]
            text = text[: text.rindex("<<")]
        # What stands behind the last `<<` in front of a result is the call.
        found = [part.rpartition("<<")[2] for part in text.split(">>")[:-1]]
        assert found == [f"{expression}={result}" for expression, result in calls]
        own = [i for i, mine in zip(written, runtime.own[0]) if mine]
        assert ">" not in tok.decode(own)
    assert len(executed) > 300
