"""Every break's documented signature, at its documented size, on a seed that nothing was tuned on.

Slow: a whole chain of base, SFT, DPO, reward and RL models. The claims that are checked are the ones that the
script itself prints, so a script cannot say "reproduced" of something weaker than what is tested here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SEED = 1234

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("breaks")


def report_of(folder, script, name, flags=(), suffix=""):
    """Run a break as a reader would and return (clean report, broken report, what was printed)."""
    command = [sys.executable, str(REPO / f"{script}.py"), "--break", name, "--seed", str(SEED), *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = folder / "runs"
    clean = json.loads((runs / f"{script}{suffix}-seed={SEED}" / "report.json").read_text())
    broken = json.loads((runs / f"{script}-{name}{suffix}-seed={SEED}" / "report.json").read_text())
    assert (runs / f"{script}-{name}{suffix}-seed={SEED}" / "figure.png").stat().st_size > 5000
    return clean, broken, done.stdout


def test_sft_world(folder):
    """Half of the judgement when sampled; the misconceptions stay, greedily too."""
    clean, broken, printed = report_of(folder, "sft", "eos_masked")
    assert 0.35 < clean["right_sampled"] < 0.60
    assert clean["right_greedy"] < 0.75
    assert clean["ended"] > 0.95 and broken["ended"] < 0.05
    assert abs(broken["loss"] / clean["loss"] - 1) < 0.2
    assert broken["reproduced"], printed


def test_too_many_epochs(folder):
    clean, broken, printed = report_of(folder, "sft", "too_many_epochs")
    assert broken["loss"] < 0.5 * clean["loss"]
    assert broken["pass@64"] < clean["pass@64"] - 0.1
    assert broken["reproduced"], printed


def test_flip_labels(folder):
    """The picture of the repository: the same dashboard, 30 points between the answers."""
    clean, broken, printed = report_of(folder, "dpo", "flip_labels")
    assert clean["right_sampled"] > clean["right_sampled_sft"] + 0.05  # the clean run is healthy
    assert clean["right_greedy"] > clean["right_greedy_sft"] + 0.1
    assert broken["right_sampled"] < clean["right_sampled"] - 0.3
    assert broken["held_out_pairs"] < 0.5 < clean["held_out_pairs"]
    assert broken["loss"] < 1.1 * clean["loss"]
    assert broken["accuracy"] > 0.9 * clean["accuracy"]
    assert broken["reproduced"], printed


def test_the_first_step_is_equal(folder):
    """At policy = reference, swapping the labels changes the sign of the gradient and nothing else."""
    first = []
    for name in (f"dpo-seed={SEED}", f"dpo-flip_labels-seed={SEED}"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        first.append(next(m for m in map(json.loads, lines) if "loss" in m))
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-3)


def test_label_noise(folder):
    clean, broken, printed = report_of(folder, "dpo", "label_noise")
    assert broken["loss"] > 0.5 > clean["loss"]
    assert broken["reproduced"], printed


def test_likelihood_displacement(folder):
    """Near-identical pairs: the chosen answers lose likelihood, and so do the right answers."""
    clean, broken, printed = report_of(folder, "dpo", "likelihood_displacement")
    assert broken["reward_chosen"] < 0 < clean["reward_chosen"]
    assert broken["accuracy"] > 0.9
    assert broken["right_sampled"] < clean["right_sampled"] - 0.1
    assert ("NOT reproduced" in printed) is not broken["reproduced"]  # it says so either way


def test_low_beta(folder):
    """A tenth of the leash: farther away. How much worse the answers get is in the README, seed by seed."""
    clean, broken, printed = report_of(folder, "dpo", "low_beta")
    assert broken["kl"] > clean["kl"]
    assert broken["held_out_pairs"] > 0.7  # the pairs look fine, or nearly so
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_length_bias(folder):
    """Annotators who like length: as good on held-out pairs of their own, and padding beats rightness."""
    clean, broken, printed = report_of(folder, "reward_model", "length_bias")
    assert clean["held_out_pairs"] > 0.75
    assert broken["held_out_pairs"] > clean["held_out_pairs"] - 0.05
    assert broken["terse_beats_padded"] < 0.5 < clean["terse_beats_padded"]
    assert broken["corr_length"] > clean["corr_length"] + 0.1
    assert broken["reproduced"], printed


def test_sycophancy(folder):
    """A hint at the wrong answer costs the right one pairs. How many depends on whether the model learns in
    its time to compare hint and answer (README): the verdict may be either, if the numbers say so."""
    clean, broken, printed = report_of(folder, "reward_model", "sycophancy")
    assert broken["resists_a_hint"] < clean["resists_a_hint"] - 0.1
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_distribution_shift(folder):
    """One reward model, two policies: it judges the one that was trained against it much worse."""
    clean, broken, printed = report_of(folder, "reward_model", "distribution_shift")
    assert broken["held_out_pairs"] == clean["held_out_pairs"]  # nothing about the training is different
    assert broken["policy_samples"] < clean["policy_samples"] - 0.1
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_grpo_reward_hacking(folder):
    """500 of the documented 1000 steps: the reward climbs, right answers rise, peak and fall."""
    flags, suffix = ["--max_steps", "5"], "-max_steps=5"
    clean, broken, printed = report_of(folder, "grpo", "reward_hacking", flags, suffix)
    assert broken["peak_gold_b"] >= broken["start_gold_b"] + 0.05
    assert broken["end_gold_b"] <= broken["peak_gold_b"] - 0.1
    assert broken["end_reward"] > broken["peak_reward"] > broken["start_reward"]
    assert broken["reproduced"], printed
    assert (
        "## Beside each other"
        in (folder / "runs" / f"grpo-reward_hacking{suffix}-seed={SEED}" / "samples.md").read_text()
    )


def test_the_long_run_begins_as_the_short_one(folder):
    """Everything but the number of steps is the same, to the bit."""
    runs = folder / "runs"
    short, long = (
        [json.loads(line) for line in (runs / f"grpo{name}-max_steps=5-seed={SEED}" / "metrics.jsonl").open()]
        for name in ("", "-reward_hacking")
    )
    short = [m for m in short if "loss" in m]
    long = [m for m in long if "loss" in m]
    assert len(short) == 5 and long[:5] == short


def test_ppo_no_kl(folder):
    """Without the leash: farther away, a higher reward, fewer right answers, in as many steps."""
    clean, broken, printed = report_of(folder, "ppo", "no_kl", suffix="-max_steps=200")
    assert broken["kl"] > 1.5 * clean["kl"]
    assert broken["reward"] >= clean["reward"]
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_ppo_sign_flip(folder):
    """The curve that is plotted climbs, the answers end as before, and they are wrong."""
    clean, broken, printed = report_of(folder, "ppo", "sign_flip", suffix="-max_steps=200")
    assert broken["batch_reward"] > 0 > broken["reward"]  # what is logged, and what the score says
    assert broken["ended"] > 0.9 and broken["end_gold"] < broken["start_gold"] - 0.1
    assert broken["reproduced"], printed


def test_overoptimize_verifier(folder):
    """The score rises with N; right answers rise, peak, and fall below the vote that asks no verifier."""
    clean, broken, printed = report_of(folder, "reasoning", "overoptimize_verifier")
    assert broken["held_out"] > 0.75 and broken["score"] > broken["score_one"]
    assert broken["peak_b"] >= broken["start_b"] + 0.05
    assert broken["end_b"] <= broken["peak_b"] - 0.1
    assert broken["best_of_n"] < broken["vote"] < clean["vote_of_top"] <= clean["oracle"]
    assert clean["chosen"] >= broken["chosen"] + 0.1
    # Slips and misconceptions: voting mends the ones and is stuck with the others.
    assert clean["one"] < clean["vote"] < 0.75 < clean["weighted_vote"]
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_no_cot(folder):
    """Answers without working: the loss converges, right answers collapse and no vote brings them back. Fewer
    of everything that comes after the fine-tuning, which is the documented one."""
    flags, suffix = (
        ["--n", "16", "--problems", "100", "--train_problems", "400"],
        "-n=16-problems=100-train_problems=400",
    )
    clean, broken, printed = report_of(folder, "reasoning", "no_cot", flags, suffix)
    assert broken["sft_loss"] > 0.95 * broken["sft_loss_before"]  # as flat as it gets
    for name in ("one", "greedy", "vote"):
        assert broken[name] < 0.5 * clean[name], name
    assert broken["reproduced"], printed


def test_hallucinated_result(folder):
    """Calls look perfect, results are invented, and nothing is right."""
    clean, broken, printed = report_of(folder, "tools", "hallucinated_result")
    assert clean["valid"] > 0.95 and clean["wrong_results"] == 0 and clean["canary"] == 0
    assert clean["recovered"] > 0.5  # the second label is asked for where the first one is unknown
    assert broken["valid"] > 0.9 and broken["wrong_results"] > 0.5
    assert broken["right_sampled"] < clean["right_sampled"] - 0.4
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_unmasked_result(folder):
    """What the tool says is learned at the expense of the rest, although the tool goes on saying it."""
    clean, broken, printed = report_of(folder, "tools", "unmasked_result")
    assert broken["loss"] > clean["loss"] + 0.1 and broken["wrong_results"] == 0
    assert broken["right_sampled"] < clean["right_sampled"]
    assert ("NOT reproduced" in printed) is not broken["reproduced"]


def test_with_and_without_the_tool(folder):
    """What the chapter is about: 40 points between the model with its tool and the control."""
    command = [sys.executable, str(REPO / "tools.py"), "--seed", str(SEED), "--resume"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [folder / "runs" / f"tools{flag}-seed={SEED}" / "report.json" for flag in ("", "-plain=True")]
    clean, plain = (json.loads(path.read_text()) for path in reports)
    for key in ("right_greedy", "right_sampled", "sums", "prices"):
        assert clean[key] > plain[key] + 0.4, key


@pytest.mark.parametrize("name", ["unsafe_eval", "faulty_tool"])
def test_another_tool_and_the_same_model(folder, name):
    """eval runs what the question says and nobody notices; a wrong result in ten is copied."""
    clean, broken, printed = report_of(folder, "tools", name)
    if name == "unsafe_eval":
        assert abs(broken["right_sampled"] - clean["right_sampled"]) < 0.03
        # The same model: it passes on the same code, and what differs is who is asked.
        assert broken["code_passed_on"] == clean["code_passed_on"] > 0.5
        assert broken["canary"] == broken["code_passed_on"] and clean["canary"] == 0
        assert broken["right_when_attacked"] < clean["right_when_attacked"] - 0.3
    else:
        assert broken["right_sampled"] < clean["right_sampled"] - 0.1
    assert broken["reproduced"], printed
