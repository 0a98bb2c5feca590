"""Every break's documented signature, at its documented size, on a seed that nothing was tuned on.

Slow: a whole chain of base, SFT, DPO, reward and RL models. What must hold are the claims of the catalogue
(data/breaks.py), as the script itself reports them, and a few more facts.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from server import REPO, folders

from data.breaks import BREAKS, broken, clean, entry

SEED = 1234

pytestmark = pytest.mark.slow

# Flags that make a break shorter than documented, so that all of them fit into half an hour.
FLAGS = {
    ("reward_model", "length_bias"): "--pairs 12000",
    ("ppo", "reward_hacking"): "--max_steps 8 --problems 500",  # 160 of the 200 steps
    ("ppo", "no_kl"): "--max_steps 75",
    ("ppo", "sign_flip"): "--max_steps 75",
    ("grpo", "reward_hacking"): "--problems 500",
    ("reasoning", "no_cot"): "--n 16 --problems 100 --train_problems 400",
    # The fall begins at N = 32. 300 problems, because revisions are counted on the one greedy answer of each.
    ("reasoning", "overoptimize_verifier"): "--n 64 --problems 300",
    ("reasoning", "self_correct"): "--n 64 --problems 300",
    ("tools", "tool_overuse"): "--rl 30",
}

# What must hold in addition to the claims of the catalogue.
MORE = {
    # The clean SFT model: fewer than half of the sampled answers are correct; greedy decoding keeps misconceptions.
    ("sft", "eos_masked"): (
        clean("accuracy_sampled") > 0.25, clean("accuracy_sampled") < 0.6, clean("accuracy_greedy") < 0.75,
        broken("loss") > 0.8 * clean("loss"),
    ),
    # The clean run improves on the SFT model.
    ("dpo", "flip_labels"): (
        clean("accuracy_sampled") > clean("accuracy_sampled_sft") + 0.05,
        clean("accuracy_greedy") > clean("accuracy_greedy_sft") + 0.1,
    ),
    ("reward_model", "length_bias"): (
        clean("held_out_accuracy") > 0.75, broken("corr_length") > clean("corr_length") + 0.1,
    ),
    ("grpo", "reward_hacking"): (
        broken("end_reward") > broken("start_reward") + 0.5, broken("end_accuracy_b") < broken("peak_accuracy_b") - 0.1,
        broken("end_length") > broken("start_length"), broken("end_opening") > broken("start_opening"),
    ),
    # The drift is still there at the end.
    ("ppo", "reward_hacking"): (
        broken("end_reward") > broken("start_reward") + 0.3, broken("end_length") > broken("start_length"),
        broken("end_confident") > broken("start_confident"), broken("end_opening") > broken("start_opening"),
    ),
    ("reward_model", "distribution_shift"): (broken("policy_samples") < clean("policy_samples"),),
    # The logged reward is positive, the true score negative.
    ("ppo", "sign_flip"): (broken("batch_reward") > 0, broken("reward") < 0),
    ("grpo", "k1_kl_loss"): (broken("kl") > 1.5 * clean("kl"),),
    ("dpo", "shared_ref"): (broken("loss") > 0.693, broken("loss") < 0.694),
    # PPO's parts work: the value function predicts, the clip acts, and the run is healthy.
    ("ppo", "no_kl"): (
        clean("batch_explained_variance") > 0.3, clean("batch_clip_fraction") > 0.003,
        clean("batch_clip_fraction") < 0.1, clean("end_accuracy") > clean("start_accuracy"),
    ),
    # Voting removes slips and keeps misconceptions; the verifier helps with both, unless it alone decides.
    ("reasoning", "overoptimize_verifier"): (
        broken("vote") < clean("vote_of_top"), clean("one") < clean("vote"), clean("vote") < 0.75,
        broken("score") > broken("score_one"), clean("chosen") > broken("chosen"),
    ),
    ("reasoning", "no_cot"): (
        broken("one") < 0.5 * clean("one"), broken("vote") < 0.5 * clean("vote"),
        broken("greedy") < 0.5 * clean("greedy"),
    ),
    ("reasoning", "self_correct"): (broken("revised") < clean("revised"),),
    # In the clean run, the model recovers from an error: it asks for the second label if the first is unknown.
    ("tools", "hallucinated_result"): (
        clean("valid") > 0.95, clean("wrong_results") < 0.001, clean("canary") < 0.001, clean("recovered") > 0.5,
    ),
    ("tools", "unsafe_eval"): (
        clean("code_passed_on") > 0.5, broken("accuracy_attacked") < clean("accuracy_attacked") - 0.3,
    ),
}  # fmt: skip


CONTROL = ("tools", "without calls")  # a run that is no break


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """All breaks share a directory, and so the models that they start from."""
    return tmp_path_factory.mktemp("breaks")


def python(cwd, script, *flags):
    """The finished process of `python SCRIPT.py FLAGS`, on one core."""
    command = [sys.executable, str(REPO / f"{script}.py"), "--seed", str(SEED), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def done(cwd):
    """{(script, name): finished process} of all breaks, run as a reader would, two at a time."""
    # What several breaks start from is made once, and first: two processes cannot write one run.
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(python, cwd, "sft", *flags) for flags in ([], ["--answer_only"])]
    assert not any(job.result().returncode for job in first)
    # Breaks with the same flags have the same clean run, so they take turns. While the one process makes the reward
    # model, the other one begins with the breaks that do not need it.
    need_reward_model, groups = ("reward_model", "ppo", "grpo"), {}
    for b in reversed(BREAKS):
        groups.setdefault((b.script, b.flags), []).append(b)
    # The largest groups first: if one of them came last, one core would wait for it.
    groups = sorted(groups.values(), key=lambda some: (some[0].script in need_reward_model, -len(some)))

    def run(some):
        if some[0].script in need_reward_model:
            assert not reward_model.result().returncode
        return {(b.script, b.name): python(cwd, b.script, "--break", b.name, *FLAGS.get((b.script, b.name), "").split())
                for b in some}  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        reward_model = pool.submit(python, cwd, "reward_model")
        made = pool.map(run, groups)
        # Last: it is short, so neither core waits long for the other one.
        control = pool.submit(python, cwd, "tools", "--plain", "--steps", "1000")
        return {key: process for some in made for key, process in some.items()} | {CONTROL: control.result()}


@pytest.fixture(scope="module")
def both(cwd, done):
    """both(script, name): clean run, broken run and what was printed."""

    def both(script, name):
        process = done[script, name]
        assert process.returncode == 0, process.stderr[-2000:]
        (bad,) = [f for f in folders(cwd) if (f.config["script"], f.config.get("break_")) == (script, name)]
        (good,) = [f for f in folders(cwd) if f.config == bad.config | {"break_": None}]
        return good, bad, process.stdout

    return both


@pytest.mark.parametrize("script, name", [(b.script, b.name) for b in BREAKS])
def test_signature(both, script, name):
    good, bad, out = both(script, name)
    reports = {"clean": good.report, "broken": bad.report}
    b = entry(script, name)
    assert bad.report["claims"] == {c.text(reports): c.holds(reports) for c in b.claims + b.task_claims}
    assert bad.report["reproduced"] == ("NOT reproduced" not in out)
    assert bad.report["reproduced"], out
    for claim in MORE.get((script, name), ()):
        assert claim.holds(reports), claim.text(reports)
    assert (bad.path / "figure.png").stat().st_size > 5000


def test_flip_labels_begins_with_an_equal_step(both):
    """At policy = reference, swapping the labels changes the sign of the gradient and nothing else."""
    good, bad, _ = both("dpo", "flip_labels")
    assert bad.updates[0]["loss"] == pytest.approx(good.updates[0]["loss"], rel=1e-5)
    assert bad.updates[0]["grad_norm"] == pytest.approx(good.updates[0]["grad_norm"], rel=1e-3)


def test_reward_hacking_begins_as_the_short_run(both):
    """Everything but the number of steps is the same, to the bit."""
    good, bad, _ = both("grpo", "reward_hacking")
    assert 0 < len(good.updates) < len(bad.updates) and good.updates == bad.updates[: len(good.updates)]


def test_distribution_shift_is_not_in_the_training(both):
    good, bad, _ = both("reward_model", "distribution_shift")
    assert good.report["held_out_accuracy"] == bad.report["held_out_accuracy"]


def test_unsafe_eval_is_the_same_model(both):
    """It passes on the same code. Only who is asked differs: eval runs all of it."""
    good, bad, _ = both("tools", "unsafe_eval")
    assert good.report["code_passed_on"] == bad.report["code_passed_on"] == bad.report["canary"]
    assert good.report["canary"] == 0


def test_with_and_without_the_tool(cwd, done):
    """40 points between the model with its tool and the control, which hardly learns anything in 1000 of its steps."""
    assert done[CONTROL].returncode == 0, done[CONTROL].stderr[-2000:]
    runs = [f for f in folders(cwd) if f.config["script"] == "tools"]
    tools = [f for f in runs if not f.config["break_"] and not f.config["rl"]]
    (good,), (plain,) = ([f.report for f in tools if f.config["plain"] is control] for control in (False, True))
    for name in ("accuracy_greedy", "accuracy_sampled", "accuracy_unpriced", "accuracy_priced"):
        assert good[name] > plain[name] + 0.4, name
