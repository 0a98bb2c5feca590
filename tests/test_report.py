"""Tests of data/breaks.py and data/report.py: claims, the catalogue against the scripts, tables, figures; and of which
file imports which."""

import ast
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpo
import gpt
import grpo
import ppo
import reasoning
import reward_model
import sft
import tools
from data import breaks, report, runs, task
from data.breaks import METRICS, broken, clean, fall

HERE = Path(gpt.__file__).parent
SCRIPTS = {m.__name__: m for m in (gpt, sft, reward_model, ppo, grpo, dpo, reasoning, tools)}
ALL = [pytest.param(b, id=f"{b.script}-{b.name}") for b in breaks.BREAKS]


def tree(file):
    return ast.parse((HERE / file).read_text(encoding="utf-8"))


# --- claims ---

REPORTS = {"clean": {"kl": 2.0, "ended": 0.9}, "broken": {"kl": 3.5, "ended": 0.25}}


@pytest.mark.parametrize(
    ("claim", "text", "holds"),
    [
        (broken("kl") > 1.5 * clean("kl"), "KL (broken 3.500) > 1.5 * KL (clean 2.000)", True),
        (broken("kl") > 2 * clean("kl"), "KL (broken 3.500) > 2 * KL (clean 2.000)", False),
        (broken("kl") < clean("kl") - 0.1, "KL (broken 3.500) < KL (clean 2.000) - 0.1", False),
        (broken("ended") < clean("ended") - 0.1, "ended (broken 0.250) < ended (clean 0.900) - 0.1", True),
        (broken("kl") < clean("kl") + 1.5, "KL (broken 3.500) < KL (clean 2.000) + 1.5", False),  # equal
        (broken("kl") > clean("kl") + 1.5, "KL (broken 3.500) > KL (clean 2.000) + 1.5", False),
        (fall("ended") > 0.6, "ended (clean minus broken 0.650) > 0.6", True),
        (fall("kl") > fall("ended"), "KL (clean minus broken -1.500) > ended (clean minus broken 0.650)", False),
        (0.5 < clean("ended"), "ended (clean 0.900) > 0.5", True),
        (clean("ended") * 0.5 + 0.1 < 0.5, "0.5 * ended (clean 0.900) + 0.1 < 0.5", False),  # .55
        ((clean("kl") + 1) * 2 > 5.9, "2 * KL (clean 2.000) + 2 > 5.9", True),
    ],
)
def test_a_claims_sentence_and_its_truth(claim, text, holds, monkeypatch):
    """Both are from the same comparison of the same measured numbers."""
    monkeypatch.setitem(METRICS, "kl", "KL")
    monkeypatch.setitem(METRICS, "ended", "ended")
    assert claim.text(REPORTS) == text and claim.holds(REPORTS) is holds
    assert claim.text() == re.sub(r" -?\d+\.\d{3}\)", ")", text)  # in the catalogue: without measured numbers


# --- the catalogue ---


def broken_in(script):
    """The names that the script compares args.break_ with."""
    names = set()
    for node in ast.walk(tree(f"{script}.py")):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "args.break_":
            names |= {c.value for c in ast.walk(node.comparators[0]) if isinstance(c, ast.Constant)}
    return names - {None}


@pytest.mark.parametrize("script", SCRIPTS)
def test_catalogue_and_script_have_the_same_breaks(script):
    """Each entry is implemented at `args.break_ == "NAME"`, and each such name has an entry. --help lists them."""
    names = [b.name for b in breaks.of(script)]
    assert broken_in(script) == set(names) and len(set(names)) == len(names)
    assert all(breaks.entry(script, name) in breaks.of(script) for name in names)


def test_every_entry_belongs_to_a_script():
    assert {b.script for b in breaks.BREAKS} == set(SCRIPTS) - {"gpt"}


@pytest.mark.parametrize("entry", ALL)
def test_every_metric_of_an_entry_has_a_name(entry):
    used = {m for claim in entry.claims + entry.task_claims for m in claim.metrics}
    used |= {*entry.dashboard, *entry.external}
    used |= {m for panel in entry.panels if panel.bars or len(panel.metrics) > 1 for m in panel.metrics}
    assert used <= set(METRICS)
    assert not set(entry.dashboard) & set(entry.external)
    assert len(entry.panels) >= 2 and entry.claims


@pytest.mark.parametrize("entry", ALL)
def test_flags_and_cures_are_valid_commands(entry):
    """The flags of an entry apply to both runs, and what the user gives wins. A cure may name another script."""

    def parse(script, *argv):
        return runs.parse(script, SCRIPTS[script].parser(), ["--device", "cpu", *argv], breaks.of(script))

    args = parse(entry.script, "--break", entry.name)
    assert args.break_ == entry.name
    for flag, value in zip(entry.flags[::2], entry.flags[1::2]):
        assert str(getattr(args, flag[2:])) == value
    assert parse(entry.script, "--break", entry.name, *entry.flags, "--seed", "7").seed == 7
    if "--max_steps" in entry.flags:
        assert parse(entry.script, "--break", entry.name, "--max_steps", "3").max_steps == 3
    for script, flags in re.findall(r"python (\w+)\.py([^(;]*)", entry.cure):
        parse(script, *shlex.split(flags.replace(" N", " 5")))


# --- which file imports which ---


def imported(file):
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_run_one_way():
    """data/ imports no model, gpt.py no script, and no two scripts import each other, not even through others."""
    for file in HERE.glob("data/*.py"):
        assert not imported(f"data/{file.name}") & set(SCRIPTS), file.name
    before = set()
    graph = {script: imported(f"{script}.py") & set(SCRIPTS) for script in SCRIPTS}
    assert graph["gpt"] == set()
    while graph:
        free = {script for script, needs in graph.items() if needs <= before}
        assert free, f"a circle: {graph}"
        before |= free
        graph = {script: needs for script, needs in graph.items() if script not in free}


# --- results ---


def test_describe_by_hand():
    """Halves A and B are the answers at even and at odd places."""
    texts = ["7+5=12.\n#### 12", "Sure! 7+5=13. Check: 7+5=13. I am certain.\n#### 13", "#### 4", "#### 4", "5", "6"]
    answers = [
        SimpleNamespace(text=text, ids=[1] * n, ended=n != 9, correct=n % 2 == 0)
        for text, n in zip(texts, (2, 3, 4, 9, 5, 6))
    ]
    assert task.describe(answers) == pytest.approx(
        {
            "accuracy": 3 / 6, "accuracy_a": 2 / 3, "accuracy_b": 1 / 3, "ended": 5 / 6, "length": 29 / 6,
            "distinct": 5 / 6,
            "opening": 1 / 6, "confident": 1 / 6, "check": 1 / 6, "miscalculated": 1 / 6,
        }
    )  # fmt: skip


def evaluation(step, a, b, **more):
    accuracies = {"test_accuracy": (a + b) / 2, "test_accuracy_a": a, "test_accuracy_b": b}
    return {"step": step, **accuracies, **{f"test_{name}": value for name, value in more.items()}}


def test_peak_is_chosen_on_one_half_and_measured_on_the_other():
    """The maximum of noisy numbers is too high, by the noise. On the other half of the problems it is not."""
    metrics = [
        evaluation(0, 0.5, 0.5, reward=0.0, kl=0.0),
        *({"step": s, "loss": 1.0, "reward": float(s)} for s in range(30)),
        evaluation(25, 0.6, 0.9, reward=1.0, kl=2.0),
        evaluation(50, 0.8, 0.55, reward=2.0, kl=4.0),  # the peak of half A, not of B, nor of all
        evaluation(100, 0.8, 0.95, reward=3.0, kl=6.0),  # as high, but later
        evaluation(150, 0.5, 0.6, reward=3.5, kl=7.0),  # halfway down: half A has .8 and .2, so at most .5
        evaluation(175, 0.3, 0.2, reward=3.7, kl=8.0),
        evaluation(200, 0.2, 0.3, reward=4.0, kl=9.0),
    ]
    found = runs.Run.start_peak_end(SimpleNamespace(metrics=metrics))
    expected = {"peak_step": 50, "halfway_step": 150, "first_reward": 4.5, "batch_reward": 24.5}
    # Half A chooses step 50, where B has .55; half B chooses step 100, where A has .8.
    expected |= {"rise": 0.675 - 0.5, "fall": 0.675 - 0.25}
    for prefix, values in (
        ("start_", (0.5, 0.5, 0.5, 0, 0)),
        ("peak_", (0.675, 0.8, 0.55, 2, 4)),
        ("halfway_", (0.55, 0.5, 0.6, 3.5, 7)),
        ("end_", (0.25, 0.2, 0.3, 4, 9)),
        ("", (0.25, 0.2, 0.3, 4, 9)),
    ):
        names = ("accuracy", "accuracy_a", "accuracy_b", "reward", "kl")
        expected |= {prefix + name: value for name, value in zip(names, values)}
    assert found == pytest.approx(expected)
    alone = runs.Run.start_peak_end(SimpleNamespace(metrics=metrics[:2]))  # one evaluation is all of them
    assert alone["peak_step"] == alone["halfway_step"] == 0
    assert alone["start_accuracy"] == alone["peak_accuracy"] == alone["end_accuracy"] == 0.5


# --- table, verdict, figure: on made-up runs ---


class MadeUp:
    """A finished run in which every metric exists."""

    def __init__(self, folder, label, shift=0.0):
        self.label, self.folder = label, folder
        folder.mkdir()
        self.report = {name: 0.1 + shift for name in METRICS} | {"peak_step": 50}
        logged = {name for b in breaks.BREAKS for panel in b.panels for name in (*panel.metrics, panel.right) if name}
        self.metrics = [
            {"step": s, "n": 2 ** (s // 10), "test_sqrt_kl": s / 7} | {name: shift + s / 100 for name in logged}
            for s in range(0, 100, 10)
        ]

    def write_report(self, report):
        self.report = report


@pytest.fixture
def both(tmp_path):
    return MadeUp(tmp_path / "clean", "clean"), MadeUp(tmp_path / "broken", "broken", 0.5)


@pytest.mark.parametrize("entry", ALL)
def test_compare(both, entry, capsys):
    """Table, one line per claim, a verdict that agrees with all of them, and a figure, for every entry."""
    _, run = both
    report.compare(*both, entry, embedded=True)
    printed = capsys.readouterr().out
    reports = {"clean": both[0].report, "broken": run.report}
    assert list(run.report["claims"].values()) == [c.holds(reports) for c in entry.claims + entry.task_claims]
    assert run.report["reproduced"] is all(run.report["claims"].values())
    assert ("NOT reproduced" in printed) is not run.report["reproduced"]
    for claim, holds in run.report["claims"].items():
        assert f"[{'x' if holds else ' '}] {claim}\n" in printed
    png = (run.folder / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000
    report.compare(*both, entry, embedded=False)
    assert len(run.report["claims"]) == len(entry.claims)


def test_figures_of_clean_runs(both, tmp_path):
    run = both[0]
    run.metrics = [m | dict.fromkeys(METRICS, 0.5) | {"n": m["n"], "step": m["step"]} for m in run.metrics]
    for panels in report.FIGURES.values():
        report.draw(tmp_path / "figure.png", [run], panels)
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_table_leaves_out_what_a_run_does_not_have(both):
    """Real data without gold answers has no accuracy."""
    entry = breaks.entry("dpo", "low_beta")
    reports = {run.label: dict(run.report) for run in both}
    whole = report.table(reports, entry).splitlines()
    assert len(whole) == 3 + len(entry.dashboard) + len(entry.external)
    (line,) = [line for line in whole if METRICS["accuracy_sampled"] + " " in line and "SFT" not in line]
    assert line.split()[-2:] == ["0.100", "0.600"]
    del reports["broken"]["accuracy_sampled"], reports["clean"]["kl"]
    missing = set(whole) - set(report.table(reports, entry).splitlines())
    assert missing == {line, *(w for w in whole if METRICS["kl"] in w)}


def test_running_mean():
    """Only long curves are smoothed, each value over itself and the ones before."""
    short, long = list(range(60)), [float(i % 2) for i in range(90)]
    assert report.running_mean(short) == short
    assert report.running_mean(long)[10:] == pytest.approx([0.5] * 80)
