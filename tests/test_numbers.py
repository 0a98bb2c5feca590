"""Every result that the texts state is in data/results/, and the tables and figures there are made from nothing else.

A number with a decimal point or a percentage in README.md, in a docstring, or in what is written by hand above the log
of data/results/README.md is a result, an example or a setting. Results are listed in STATED with the value that they
must round to, the others in NO_RESULTS. Whoever states a new one adds it here.
"""

import ast
import json
import re
import shutil
from pathlib import Path

import measure
import pytest
from measure import REPO, RESULTS

DPO_OPINIONS = "dpo-flip_labels-load=smollm2-data=ultrafeedback-train_jsonl-batch=4-dtype=bfloat16"
SMOLLM2 = "load=120-problems=200-dtype=bfloat16-6f409923"  # after SFT on the built-in task
DPO_SMOLLM2 = f"dpo-flip_labels-{SMOLLM2}-batch=8-problems=200-dtype=bfloat16"
TOOLS_SMOLLM2 = "tools-hallucinated_result-load=smollm2-steps=120-max_tokens=96-problems=200-dtype=bfloat16"
VERIFIER_SMOLLM2 = f"reasoning-{SMOLLM2}-n=64-problems=50-train_problems=240-lr=5e-05-dtype=bfloat16"
GRPO_SMOLLM2 = f"grpo-{SMOLLM2}-reward=checker-max_steps=40-lr=1e-05-beta=0_1-problems=100-dtype=bfloat16"
LENGTH_SMOLLM2 = f"reward_model-length_bias-{SMOLLM2}-annotator=careful-pairs=800-lr=5e-05-problems=200-dtype=bfloat16"
SFT_GSM8K = "sft-load=smollm2-data=gsm8k-train_jsonl-batch=8-steps=150-dtype=bfloat16"
PPO_GSM8K, GRPO_GSM8K = (f"{script}-load=atch=8-steps=150-dtype=bfloat16-2e826780-data=gsm8k-train_jsonl-dtype=bfloat16"
                         for script in ("ppo", "grpo"))  # fmt: skip
TOOLS_GSM8K = [
    f"tools-load=smollm2-data=gsm8k-train_jsonl-{plain}steps=100-dtype=bfloat16" for plain in ("", "plain=True-")
]
VERIFIER_GSM8K = ("reasoning-load=atch=8-steps=150-dtype=bfloat16-2e826780-data=gsm8k-train_jsonl-problems=16-"
                  "train_problems=16-dtype=bfloat16")  # fmt: skip
VALUE_FUNCTION = [
    f"ppo-max_steps=100{flags}-seed={seed}" for flags in ("", "-value_coefficient=0_0") for seed in (211, 212)
]


def of(name, *keys, label=None):
    """Values of a result: of both its runs, or of one."""
    reports = json.loads((RESULTS / f"{name}.json").read_text())["reports"]
    return [report[key] for run, report in reports.items() for key in keys if label in (None, run)]


def frontier(reward, beta):
    """Accuracy at the end in frontier.py's table, a mean over its seeds."""
    rows = json.loads((RESULTS / "frontier.json").read_text())["rows"]
    return [float(row[-1].split()[0]) for row in rows if row[:2] == [reward, beta]]


def ratios(name, *rows):
    """How many times as many steps as TRL a table of benchmark_trl.py gives, medians."""
    table = {row[0]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
    return [float(table[row][3].split()[0]) for row in rows]


def memory(*scripts):
    """GB that memory.py measured."""
    table = dict(row[:2] for row in json.loads((RESULTS / "memory.json").read_text())["rows"])
    return [float(table[script]) for script in scripts]


STATED = {  # file: the values of all results in it, percentages as fractions
    "README.md": lambda: [
        *frontier("learned", "1"), *frontier("learned", "0"), *frontier("checker", "1"), *frontier("checker", "0"),
        *of(DPO_OPINIONS, "loss", "margin", "held_out_accuracy", "ref_accuracy", "peak_gb"),
        *of(DPO_SMOLLM2, "accuracy_sampled_sft", label="clean"),
        *of(DPO_SMOLLM2, "accuracy_sampled", label="broken"),
        *of(GRPO_SMOLLM2, "start_accuracy", "end_accuracy"),
        *of(LENGTH_SMOLLM2, "held_out_accuracy", "terse_beats_padded"),
        *of(TOOLS_SMOLLM2, "accuracy_sampled"), *of(VERIFIER_SMOLLM2, "one", "best_of_n"),
    ],
    "data/README.md": lambda: [*memory("sft", "dpo"), 0.5],  # and the billions of parameters
    "data/results/README.md": lambda: [
        *of(DPO_OPINIONS, "loss", "margin", "held_out_accuracy", "ref_accuracy", "peak_gb"),
        *of(DPO_SMOLLM2, "ref_accuracy"),
        *of(SFT_GSM8K, "peak_gb"), *of(GRPO_GSM8K, "peak_gb"), *of(TOOLS_GSM8K[0], "valid"),
        *of(VERIFIER_GSM8K, "peak_gb"),
        *of(GRPO_SMOLLM2, "start_accuracy", "end_accuracy", "end_kl", "peak_gb"), 0.1,  # and its beta
        *of(LENGTH_SMOLLM2, "held_out_accuracy", "terse_beats_padded"),
        *(value for name in TOOLS_GSM8K for value in of(name, "accuracy_greedy")),
        *of(PPO_GSM8K, "peak_gb", "start_ended", "end_ended", "end_kl"),
        *of(VERIFIER_SMOLLM2, "verifier_accuracy", "verifier_pairs", "one", "best_of_n", "vote", "oracle"),
        *ratios("speed_trl_smollm2", "dpo", "grpo", "reward_model", "sft"), 1.5,  # and what was aimed at
    ],
    "ppo.py": lambda: [
        value for name in VALUE_FUNCTION for value in of(name, "end_reward", "end_kl", "end_accuracy", label="clean")
    ],
}  # fmt: skip
# Held by a test of their own, which counts them: test_task.py (of slips), test_public.py (of GSM8K's pairs).
COUNTED = {"data/__main__.py": "14% 18%", "data/task.py": "14% 18%", "data/public.py": "53%",
           "data/results/README.md": "14% 18% 53% 47.9% 14.4% 17.6%"}  # fmt: skip
NO_RESULTS = {  # sections of papers, versions, millions of parameters, settings, examples by hand
    "README.md": "3.10 0.7 .50",
    "data/breaks.py": "1.5 35.680 1.990",
    "data/calculator.py": "0.1 0.2 0.3 0.5 1.666667",
    "data/checker.py": "18.0 18.00 000.50 072.0",
    "data/lessons.py": ".5 2.5 2.50",
    "dpo.py": "30% .693 .5",
    "grpo.py": "1.4997 .4999",
    "ppo.py": "3.5 4.4 .05 .5 .6 .7 .4 .3 .1 .95 .46575 .385 1.3 .2 3.1 2.2 0.1",
    "reasoning.py": "5.1 4.1 .05 .9 .32 90% 18.0",
    "reward_model.py": "80%",
    "sft.py": "3.2 4.1 2507.10532 0.7",
}
FILES = [*sorted(f"{path.relative_to(REPO)}" for glob in ("*.py", "data/*.py") for path in REPO.glob(glob)),
         "README.md", "data/README.md", "data/results/README.md"]  # fmt: skip


def prose(name):
    """What the test reads of a file: docstrings; of README files what no program writes, without code."""
    text = (REPO / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        return "\n".join(filter(None, found))
    text = re.sub(f"<!-- Written by .*?{re.escape(measure.END)}", "", text, flags=re.DOTALL)
    text = text.partition("## What was tried")[0]  # trials with changed code, which no command repeats
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)


def numbers(text):
    """The numbers with a point and the percentages, these as 14%."""
    found = re.findall(r"(?<![\w.])(\d*\.\d+|\d+(?= ?(?:%|percent)))(?![\d.]*\w)( ?%| percent)?", text)
    return {number + ("%" if percent else "") for number, percent in found}


def test_numbers():
    text = "fell to .49, 0.05 (13.7 GB), 91.3 % or 91 percent, 22%; not 12, v1.2.3, 2e.4"
    assert numbers(text) == {".49", "0.05", "13.7", "91.3%", "91%", "22%"}


def rounded(stated, value):
    """Whether the value, rounded to as many digits, is what is stated."""
    digits = len(stated.rstrip("%").partition(".")[2])
    return abs(float(stated.rstrip("%")) - value * (100 if "%" in stated else 1)) <= 0.5000001 * 10**-digits


@pytest.mark.parametrize("name", FILES)
def test_every_number_is_a_result_or_listed(name):
    said, values = numbers(prose(name)), STATED.get(name, list)()
    listed = {*NO_RESULTS.get(name, "").split(), *COUNTED.get(name, "").split()}
    results = said - listed
    assert [s for s in results if not any(rounded(s, v) for v in values)] == [], "numbers that no result rounds to"
    assert [v for v in values if not any(rounded(s, v) for s in said)] == [], "listed, but the text does not say them"
    assert listed <= said, "listed, but the text does not have them"


def test_the_tables_are_written_from_the_results(tmp_path, monkeypatch):
    """--tables, run again on data/results/, changes nothing, and draws every figure of README."""
    figures = tmp_path / "data" / "figures"
    figures.mkdir(parents=True)
    shutil.copytree(RESULTS, tmp_path / "data" / "results")
    shutil.copy(REPO / "README.md", tmp_path)
    monkeypatch.setattr(measure, "REPO", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "data" / "results")
    measure.write_tables()
    for name in ("README.md", "data/results/README.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (REPO / name).read_text(encoding="utf-8"), name
    named = re.findall(r"\]\((data/figures/[^)]*)\)", (REPO / "README.md").read_text(encoding="utf-8"))
    assert named and {Path(name).name for name in named} == {path.name for path in figures.iterdir()}
