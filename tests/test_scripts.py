"""The scripts as a reader runs them: end to end, every break, missing models, wrong input. (test_resume.py kills them.)

All at the smallest size: what a break shows at its documented size is in test_breaks.py.
"""

import filecmp
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from server import REPO, RL, SCRIPTS, TINY, check_folder, folders, refused

import gpt
import reward_model
import sft
from data import breaks, report, runs, task

pytest_plugins = ["server"]

REAL = os.environ.get("REAL_DATA_DIR")


def last_shown(text, name):
    """The last number that was printed behind a name: "loss 6.071  accuracy_sampled 0.000" """
    return re.findall(rf"(?<!\S){re.escape(name)} (-?[\d.]+)", text)[-1]


def same_model(one, two):
    return filecmp.cmp(one.weights, two.weights, shallow=False)


# --- end to end ---


def test_base(base):
    check_folder(base.folder, 20)
    losses = [m["loss"] for m in base.folder.updates]
    assert base.folder.report["loss"] == pytest.approx(sum(losses[-4:]) / 4)  # the last fifth
    model = gpt.load_model(str(base.model))
    assert not model.config.chat and model.config.n_layer == 1 and model.config.n_embd == 32
    report = base.folder.report
    assert (
        f"{base.folder.name}: done in {report['seconds']:.0f} s, peak memory {report['peak_gb']:.1f} GB" in base.job.out
    )
    assert 0.1 < report["peak_gb"] < 10  # GB; torch alone takes a quarter of one


def test_same_flags_same_bytes(base, make):
    again = make("gpt").folder
    assert same_model(again, base.folder) and again.samples == base.folder.samples
    assert again.updates == base.folder.updates


# script: (steps of its evaluations, the metrics that it prints last and reports)
EVALUATIONS = {
    "sft": ([2, 4], "accuracy_sampled accuracy_greedy ended length loss pass@1 pass@64"),
    "dpo": ([0, 2, 4], "held_out_accuracy accuracy_sampled accuracy_greedy ended length kl"),
    "reward_model": ([0, 2, 4], "held_out_accuracy loss corr_length corr_correct terse_beats_padded true_labels"),
    "reasoning": ([0, 2, 4], "verifier_accuracy sensitivity precision fooled"),
    "tools": ([2, 4], "accuracy_sampled accuracy_greedy ended"),
}


@pytest.mark.parametrize("script", EVALUATIONS)
def test_end_to_end(script, make):
    """The numbers that are printed last are those of the last evaluation in the log, and those in the report."""
    steps, names = EVALUATIONS[script][0], EVALUATIONS[script][1].split()
    made = make(script, *(["--plain"] if script == "tools" else []))  # with the tool: see test_tools_and_its_control
    check_folder(made.folder, 4)
    evaluations = made.folder.metrics(names[0])
    assert [m["step"] for m in evaluations] == steps and evaluations[-1][names[0]] == made.folder.report[names[0]]
    for name in names:
        assert last_shown(made.job.out, name) == f"{made.folder.report[name]:.3f}", name
    if script in ("reward_model", "reasoning"):
        assert gpt.load_scorer(str(made.folder.path)).score.weight.abs().sum() > 0
    else:
        assert gpt.load_model(str(made.folder.path)).config.chat


def test_sft_shows_the_base_model_first(chat):
    assert "before: the base model continues text" in chat.job.out


def test_sft_on_answers_alone(base, make, tok):
    """The first loss of --answer_only is that of the base model on "#### 29" and the end token."""
    made = make("sft", "--answer_only")
    texts = task.demonstrations(32, 0)
    chosen = [texts[i] for i in runs.batch_indices(32, 8, 0, 0)]
    examples = [(tok.prompt(p.text), tok.answer("####" + text.split("####")[1])) for p, text in chosen]
    assert all(len(answer) <= 4 for _, answer in examples)
    ids, labels = sft.collate(examples, tok.pad)
    total, count = sft.sft_loss(gpt.load_model(str(base.model)), ids, labels)
    assert made.folder.updates[0]["loss"] == pytest.approx((total / count).item(), rel=1e-4)


@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model", "tools"])
def test_a_run_in_bfloat16_is_near_that_in_float32(make, script):
    """The first update on the same examples, with the same weights: it differs, but by rounding only."""
    flags = ["--plain"] if script == "tools" else []
    exact, rounded = (make(script, *flags, *more).folder.updates[0] for more in ([], ["--dtype", "bfloat16"]))
    assert rounded["grad_norm"] != exact["grad_norm"] and rounded["grad_norm"] == pytest.approx(
        exact["grad_norm"], 0.02
    )
    assert rounded["loss"] == pytest.approx(exact["loss"], 0.01)
    if script != "dpo":  # there the loss is log 2 as long as policy and reference are equal
        assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo", "kto", "orpo", "simpo", "dpo --dtype bfloat16"])
def test_every_preference_loss(make, loss):
    made = make("dpo", "--loss", *loss.split())
    check_folder(made.folder, 4)
    # Policy and reference start as the same model.
    assert made.folder.metrics("kl")[0]["kl"] == 0 and made.folder.updates[0]["margin"] == pytest.approx(0, abs=1e-4)
    if loss == "dpo":
        assert made.folder.updates[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_reward_model(scorer, chat, tok):
    assert re.search(r"calibration on held-out pairs: says \d+% of \d+: correct \d+%", scorer.job.out)
    assert scorer.folder.samples.count(" score ") == 3 * 5
    # Zero and unit of the scores are those of the SFT model's answers.
    model, problems = gpt.load_model(str(chat.model)), task.problems(5, 0, "test")
    answers = gpt.solve(model, tok, problems, 1.0, runs.rng(0, "answers"))
    rm = gpt.load_scorer(str(scorer.model))
    scores = gpt.final_scores(rm, [tok.prompt(p.text) for p in problems], [a.ids for a in answers])
    assert abs(scores.mean().item()) < 1e-3 and 0.8 < scores.std().item() < 1.2
    assert rm.std != 1.0


def test_reward_model_from_a_policys_samples(make, chat):
    """The tiny policy is never correct, so there is no pair of its own; that is said, and the others are used."""
    made = make("reward_model", "--policy", chat.model)
    assert re.search(r"\d+ pairs from samples of .*, labelled by the exact checker", made.job.out)
    check_folder(made.folder, 4)


DASHBOARD = {  # metrics of every step
    "ppo": "reward accuracy kl entropy clip_fraction approx_kl explained_variance length unfinished".split(),
    "grpo": "reward accuracy kl entropy clip_fraction loss length ended".split(),
}


@pytest.mark.parametrize("script", RL)
def test_rl_end_to_end(make, brief, script):
    made = make(script)
    check_folder(made.folder, 3)
    assert gpt.load_model(str(made.model)).config.chat
    assert not filecmp.cmp(made.folder.weights, brief.model / "model.safetensors", shallow=False)
    evaluations, report, updates = made.folder.metrics("test_accuracy"), made.folder.report, made.folder.updates
    assert [m["step"] for m in evaluations] == [0, 3]
    for name in ("accuracy", "reward", "kl", "length", "ended"):
        assert report[name] == evaluations[-1][f"test_{name}"] == report[f"end_{name}"]
        assert report[f"start_{name}"] == evaluations[0][f"test_{name}"]
        assert last_shown(made.job.out, f"test_{name}") == f"{report[name]:.3f}"
    assert all(name in m for m in updates for name in DASHBOARD[script])
    assert all(m["grad_norm"] > 0 for m in updates)  # some answers end, so there is something to learn
    # Policy and reference start as the same model.
    assert evaluations[0]["test_kl"] == 0 and updates[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert "## Side by side" in made.folder.samples


@pytest.mark.parametrize("script", RL)
def test_the_first_update_of_a_batch_is_on_policy(make, script):
    """With one update per batch, the ratio is 1 and nothing is clipped, also at a temperature other than 1, which every
    pass must use. (PPO's loss is minus the mean of whitened advantages, so it is 0.)"""
    flags = ["--temperature", "0.7", "--lr", "1e-3"]
    flags += ["--epochs", "1", "--minibatch", "4"] if script == "ppo" else []
    for m in make(script, *flags).folder.updates:
        assert m["clip_fraction"] == 0 and (m["kl"] != 0 or m["step"] == 0)
        off = (m["policy_loss"], m["approx_kl"]) if script == "ppo" else (m["ratio_error"],)
        assert off == pytest.approx([0] * len(off), abs=1e-4)


def test_clip_high_can_be_zero(make):
    """With --clip_high 0 every ratio above 1 is clipped, not only those above 1 + clip."""
    wide, none = (
        make("grpo", "--epochs", "2", "--lr", "1e-3", *more).folder.updates for more in ([], ["--clip_high", "0"])
    )
    assert none[0]["clip_fraction"] > wide[0]["clip_fraction"]


def test_answers_that_are_cut_off(make, chat):
    """Their learned reward is fixed. GRPO learns from them like from any other answer: a batch in which all are cut off
    has a gradient if their rewards differ, and none if their rewards are equal."""
    for script, metric, all_of_them in (("ppo", "unfinished", 1), ("grpo", "ended", 0)):
        updates = make(script, "--load", chat.model, "--max_tokens", "1", "--beta", "0").folder.updates
        cut_off = [m for m in updates if m[metric] == all_of_them]
        assert cut_off and all(m["reward"] == reward_model.CUT_OFF for m in cut_off)
        if script == "grpo":
            assert all(m["loss"] == m["grad_norm"] == 0 for m in cut_off)
    # The exact checker's reward is 0 for all of them.
    made = make("grpo", "--load", chat.model, "--max_tokens", "1", "--beta", "0", "--reward", "checker")
    cut_off = [m for m in made.folder.updates if m["ended"] == 0]
    assert cut_off and all(m["reward"] == m["grad_norm"] == 0 and m["equal_groups"] == 1 for m in cut_off)


@pytest.mark.parametrize(
    "flags",
    [
        "--loss grpo --reward checker",
        "--loss dr_grpo --reward mine --beta 0",
        "--epochs 2 --clip_high 0.28 --dtype bfloat16",
    ],
)
def test_other_ways_of_grpo(run, tiny, tmp_path, brief, flags):
    # Without --rm where no reward model is needed: then none is made either.
    start = [*TINY["grpo"].split(), "--load", brief.model] if "--reward" in flags else tiny("grpo")
    run(tmp_path, "grpo", *start, *flags.split())
    (folder,) = folders(tmp_path)
    check_folder(folder, 3)
    assert folder.report["reward"] == folder.metrics("test_reward")[-1]["test_reward"]
    if "checker" in flags:
        assert folder.report["reward"] == pytest.approx(folder.report["accuracy"])
        assert all(m["reward"] == pytest.approx(m["accuracy"]) for m in folder.updates)


def test_adaptive_beta(make):
    """At first there is no KL at all. Beta falls as fast as it may: by 20 % in 10000 answers, here by 4 of them."""
    flags = "--beta 0.05 --target_kl 0.5 --epochs 3 --dtype bfloat16".split()
    betas = [m["beta"] for m in make("ppo", *flags).folder.updates]
    assert betas[0] == pytest.approx(0.05 * (1 - 0.2 * 4 / 10000), rel=1e-6)
    assert len(set(betas)) == 3


def test_reasoning(make):
    made = make("reasoning")
    curves, report = made.folder.metrics("n"), made.folder.report
    assert [m["n"] for m in curves] == [1, 2, 4]
    # With one answer there is nothing to select. The oracle is never below any way of selecting, and rises with N.
    ways = ("vote", "vote_of_top", "weighted_vote", "best_of_n")
    assert len({round(curves[0][name], 9) for name in (*ways, "oracle")}) == 1
    assert all(curves[-1]["oracle"] >= curves[-1][name] == report[name] for name in ways)
    for a, b in zip(curves, curves[1:]):
        assert a["oracle"] <= b["oracle"] and a["score"] <= b["score"]
        assert a["tokens"] * 2 == pytest.approx(b["tokens"])
    assert report["chosen"] == report["vote_of_top"]
    assert report["draft"] == report["greedy"]
    assert report["revised"] == pytest.approx(report["draft"] + report["repaired"] - report["spoiled"])
    samples = made.folder.samples
    assert samples.count(" tokens") == 3 * 2 and samples.count("highest score (") == 5


def test_the_verifier_learns_at_every_token_or_at_the_end(make):
    """The evaluation at step 0 is the same, the first loss is not."""
    token, solution = (make("reasoning", "--level", level).folder for level in ("token", "solution"))
    assert token.metrics("fooled")[0] == solution.metrics("fooled")[0]
    assert token.updates[0]["loss"] != solution.updates[0]["loss"]


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A file of 60 problems in GSM8K's layout. The answer is 5 or 7, and nothing in a question says which."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    solutions = ("2+3=<<2+3=5>>5.\n#### 5", "3+4=<<3+4=7.0>>7.\n#### 7")
    rows = [{"question": f"Leo has {i} eggs.", "answer": solutions[i * i % 7 < 3]} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def guesser(make, problems):
    """A model that has learned to guess one of the two."""
    return make("sft", "--data", problems, "--steps", "80", "--lr", "1e-2")


ON_DATA = {  # the tiny flags, but answers may be longer
    "ppo": "--max_tokens 40 --rm ''",  # no reward model: then the exact checker
    "grpo": "--max_tokens 40 --rm ''",
    "reasoning": "--max_tokens 40 --problems 4",
    "tools": "--max_tokens 40 --steps 4",
    "reward_model": "--max_tokens 40 --pairs 40",
}


@pytest.mark.parametrize("script", ON_DATA)
def test_every_chapter_on_problems_of_a_file(make, problems, guesser, script):
    flags = ["--data", problems, *shlex.split(ON_DATA[script])]
    made = make(script, *flags, *(["--load", guesser.model] if script != "tools" else []))
    assert "60 problems read, 60 kept" in made.job.out
    for folder in made.folders:
        check_folder(folder, 3 if script in RL else 4)
    report = made.folder.report
    # Some answers are correct and some are wrong, so there is something to learn. What only the embedded task has is
    # left out.
    if script in RL:
        assert 0 < report["start_accuracy"] < 1 and any(m["grad_norm"] > 0 for m in made.folder.updates)
        assert all(m["reward"] == pytest.approx(m["accuracy"]) for m in made.folder.updates)  # the exact checker
        assert (
            not {"start_corr_opening", "confident", "miscalculated"} & report.keys() and "start_corr_length" in report
        )
    if script == "reasoning":
        curves = made.folder.metrics("n")
        assert [m["n"] for m in curves] == [1, 2, 4] and 0 < curves[0]["vote"] < 1
        assert curves[-1]["oracle"] > curves[0]["oracle"] and "wrong_miscalculated" not in report
    if script == "reward_model":
        assert re.search(r"\d+ pairs of a correct and a wrong answer, and \d+ held-out pairs", made.job.out)
        assert not {"true_labels", "corr_correct"} & report.keys() and made.folder.samples.count(" score ") == 3 * 5
    if script == "tools":
        assert "identical" in made.job.out and "with the tool" in made.job.out and "no price" not in made.job.out
        assert len(made.folders) == 2 and not {"canary", "accuracy_priced"} & report.keys()


def test_the_tool_computes_what_a_model_calls_on_real_problems(make, problems):
    """Trained to the end: answers have calls, with their true results."""
    made = make("tools", "--data", problems, "--max_tokens", "40", "--steps", "80", "--lr", "1e-2", "--problems", "8")
    report = max(made.folders, key=lambda folder: not folder.config["plain"]).report
    assert report["calls"] >= 1 and report["valid"] > 0.5 and report["wrong_results"] == 0
    more = make("tools", "--data", problems, "--max_tokens", "40", "--load", made.folders[0].model, "--rl", "2")
    check_folder(more.folder, 2)


def test_the_reward_model_that_ppo_needs_is_made_from_the_same_problems(make, problems, guesser):
    """--reward learned without --rm. (The tiny flags name a reward model; an empty name is none.)"""
    flags = ["--data", problems, "--load", guesser.model, "--max_tokens", "40", "--rm", "", "--reward", "learned"]
    made = make("ppo", *flags)
    assert re.search(r"Making it with `python reward_model.py --load \S+ --data \S+`", made.job.out)
    ppo, scorer = made.folders
    assert scorer.name.startswith("reward_model") and all(m["reward"] != m["accuracy"] for m in ppo.updates)


@pytest.mark.parametrize("script, name", [("grpo", "no_kl"), ("ppo", "sign_flip"), ("reasoning", "self_correct"),
                                          ("tools", "faulty_tool")])  # fmt: skip
def test_breaks_on_problems_of_a_file(make, problems, guesser, script, name):
    load = ["--load", guesser.model] if script != "tools" else []
    more = ["--max_steps", "2"] if script in RL else []
    made = make(script, "--break", name, "--data", problems, *shlex.split(ON_DATA[script]), *load, *more)
    check_break(made.job.out, *made.folders, breaks.entry(script, name))


def test_published_solutions(run, tmp_path):
    row = {"question": "?", "ground_truth": "A: 18", "small": {"solution": "A: 17", "is_correct": False}}
    row |= {"large": {"solution": "A: 18", "is_correct": True}}
    (tmp_path / "solutions.jsonl").write_text(json.dumps(row) + "\n")
    out = run(tmp_path, "reasoning", "--data", "solutions.jsonl").out
    assert "1 problems, 2 models" in out and "agrees with 2 of 2" in out
    assert not (tmp_path / "runs").exists()


def test_tools_and_its_control(make, run, tiny):
    """The run with the tool, then the control; a second time, the control is taken from disk."""
    made = make("tools")
    plain, clean = sorted(made.folders, key=lambda folder: not folder.config["plain"])
    for folder in made.folders:
        check_folder(folder, 4)
    assert clean.report["canary"] == 0 == clean.report["wrong_results"] and "canary" not in plain.report
    assert "with the tool" in made.job.out and "runtime switched off" in made.job.out
    before = plain.stamp()
    assert "already there" in run(made.cwd, "tools", *tiny("tools")).out and plain.stamp() == before


# --- flags ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(run, tmp_path, script):
    """Lists the flags that all scripts have, and each break with its summary in one line."""
    out = run(tmp_path, script, "--help").out
    steps = {"ppo": "--max_steps", "grpo": "--max_steps", "reasoning": "--train_problems"}.get(script, "--steps")
    for flag in (steps, "--seed", "--device", "--dtype", "--resume", "--load", "--lr"):
        assert flag in out
    for entry in breaks.of(script):
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [entry.name]]
        assert entry.summary in line


def test_other_flags_other_folder(run, tiny, tmp_path):
    for flags in ([], ["--beta", "0.5"], ["--seed", "1"]):
        run(tmp_path, "dpo", *tiny("dpo"), *flags)
    names = [folder.name for folder in folders(tmp_path)]
    assert len(names) == 3 and any("seed=1" in n for n in names) and any("beta=0_5" in n for n in names)
    for folder in folders(tmp_path):
        check_folder(folder, 4)  # no later run has written into it


@pytest.mark.parametrize("where", ["model", "run"])
def test_talk_to_a_checkpoint(run, base, chat, tmp_path, where):
    """A base model continues the text, a chat model answers, and a seed gives the same text again. --load takes the
    folder of the model or that of its run."""
    base, chat = (made.folder.path if where == "run" else made.model for made in (base, chat))
    prompt = "Leo has 7 eggs."
    first, again = (run(tmp_path, "gpt", "--load", base, "--prompt", prompt, "--tokens", 8).out for _ in range(2))
    assert first.startswith(prompt) and len(first) > len(prompt) + 1 and again == first
    answer = run(tmp_path, "gpt", "--load", chat, "--prompt", prompt, "--temperature", 0).out
    assert answer.strip() and not answer.startswith(prompt)
    assert not (tmp_path / "runs").exists()


# --- breaks ---

# Flags that a break needs at the tiny size. too_many_epochs takes a fiftieth of the demonstrations.
FLAGS = {("sft", name): "--demos 100 --steps 3" for name in ("eos_masked", "too_many_epochs")}
FLAGS |= {(script, "reward_hacking"): "--max_steps 1" for script in ("ppo", "grpo")}
FLAGS |= {("reward_model", "too_many_epochs"): "--pairs 32", ("tools", "tool_overuse"): "--rl 3 --prompts 2 --group 2"}
FROM_NOTHING = ("distribution_shift", "no_cot")  # these make models of their own: see below


@pytest.fixture(scope="session")
def broken(make):
    """broken(script, name): clean folder and broken folder of a break; made once."""
    made = {}

    def broken(script, name):
        if (script, name) not in made:
            made[script, name] = make(script, "--break", name, *FLAGS.get((script, name), "").split())
        check_break(made[script, name].job.out, *made[script, name].folders, breaks.entry(script, name))
        return made[script, name].folders

    return broken


def check_break(out, clean, broken, entry):
    """A table of what both runs report, claims, a verdict, a figure. (A model this small reproduces little.)"""
    C, B = clean.report, broken.report
    assert clean.config | {"break_": entry.name} == broken.config
    rows = [re.findall(r"(?<!\S)-?\d+\.\d{3}(?!\S)", line) for line in out.splitlines()]
    metrics = [m for m in (*entry.dashboard, *entry.external) if m in C and m in B]
    assert metrics and all([f"{C[m]:.3f}", f"{B[m]:.3f}"] in rows for m in metrics)
    # On real data, claims about what only the exact checker can measure are left out.
    reports, both = {"clean": C, "broken": B}, C.keys() & B.keys()
    claims = [c for c in entry.claims + entry.task_claims * (not C["config"].get("data")) if both >= {*c.metrics}]
    assert claims and B["claims"] == {c.text(reports): c.holds(reports) for c in claims}
    assert all(claim in out for claim in B["claims"])
    assert B["reproduced"] == all(B["claims"].values()) and "reproduced" not in C
    assert ("NOT reproduced" in out) == (not B["reproduced"]) and entry.cure in out
    png = (broken.path / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000


@pytest.mark.parametrize("script, name", [(b.script, b.name) for b in breaks.BREAKS if b.name not in FROM_NOTHING])
def test_every_break(broken, script, name):
    broken(script, name)


@pytest.mark.parametrize("name", ["reward_hacking", "no_kl"])
def test_breaks_with_a_true_reward(make, name):
    """The control: the same break against the exact checker."""
    made = make("grpo", "--break", name, "--reward", "checker", "--max_steps", "1")
    check_break(made.job.out, *made.folders, breaks.entry("grpo", name))


def test_length_bias_is_in_the_labels(broken):
    clean, biased = broken("reward_model", "length_bias")
    assert biased.report["longer_chosen"] > clean.report["longer_chosen"]


@pytest.mark.parametrize("script", RL)
def test_reward_hacking_is_the_short_run_continued(broken, script):
    """Many times as many steps, and not a byte of the first ones differs."""
    short, long = broken(script, "reward_hacking")
    steps = {"ppo": 20, "grpo": 30}[script]
    check_folder(short, 1)
    check_folder(long, steps)
    evaluations = [m["step"] for m in long.metrics("test_accuracy")]
    assert evaluations[0] == 0 and evaluations[-1] == steps and long.report["peak_step"] in evaluations
    rewards = [m["reward"] for m in long.updates]
    assert long.report["first_reward"] == pytest.approx(sum(rewards[:10]) / 10)
    assert long.report["batch_reward"] == pytest.approx(sum(rewards[-10:]) / 10)
    # All but the short run's last line: its evaluation at the end, where the long run has none.
    lines = [(folder.path / "metrics.jsonl").read_text().splitlines() for folder in (short, long)]
    assert lines[1][:2] == lines[0][:-1]


@pytest.mark.parametrize("script, name", [("ppo", "no_kl"), ("grpo", "no_kl"), ("grpo", "k1_kl_loss")])
def test_without_a_kl_penalty_the_first_batch_is_the_same(broken, script, name):
    clean, bad = (folder.updates[0] for folder in broken(script, name))
    assert (clean["reward"], clean["kl"]) == (bad["reward"], bad["kl"])


def test_sign_flip(broken):
    """Scores change their sign; the reward of an answer that was cut off does not."""
    clean, flipped = (folder.updates[0] for folder in broken("ppo", "sign_flip"))
    cut_off = 2 * reward_model.CUT_OFF * clean["unfinished"]
    assert clean["reward"] + flipped["reward"] == pytest.approx(cut_off, abs=1e-5)


def test_a_shared_reference_reports_no_kl(broken):
    """grpo: the logged KL is 0 to the bit. dpo: the loss is log 2 and the margin 0 in every step. The KL to the SFT
    model, which the external evaluation measures, is neither."""
    clean, bad = broken("grpo", "shared_ref")
    assert all(m["kl"] == 0 for m in bad.updates) and bad.report["batch_kl"] == 0
    assert bad.report["kl"] != 0 and any(m["kl"] != 0 for m in clean.updates)
    clean, bad = broken("dpo", "shared_ref")
    assert all(m["loss"] == pytest.approx(math.log(2)) and m["margin"] == 0 for m in bad.updates)
    assert bad.report["kl"] != 0 and clean.updates[-1]["loss"] < 0.693
    # The gradient is not 0. At the first step it is that of the clean run.
    assert bad.updates[0]["grad_norm"] == pytest.approx(clean.updates[0]["grad_norm"], rel=1e-4) != 0


@pytest.mark.parametrize("name", ["left_pad", "template_mismatch"])
def test_asked_in_another_way(broken, name):
    """The clean run's weights, and nothing but the prompts of the evaluation differs."""
    clean, bad = broken("sft", name)
    assert same_model(clean, bad) and not bad.updates


def test_prompts_of_the_breaks(tok):
    problems = task.problems(20, 0, "test")
    padded = sft.asking(SimpleNamespace(break_="left_pad"), tok, problems)
    prompts = [padded.prompt(p.text) for p in problems]
    assert len({len(ids) for ids in prompts}) == 1
    for p, ids in zip(problems, prompts):
        real = tok.prompt(p.text)
        assert ids[-len(real) :] == real and set(ids[: -len(real)]) <= {tok.pad}
    assert min(ids.count(tok.pad) for ids in prompts) == 0  # the longest one
    other = sft.asking(SimpleNamespace(break_="template_mismatch"), tok, problems)
    assert tok.decode(other.prompt("How many?")) == "user: How many?\nassistant: "
    same = sft.asking(SimpleNamespace(break_=None), tok, problems)
    assert same.prompt("How many?") == tok.prompt("How many?")


def test_contaminated_demonstrations(broken):
    """As many demonstrations as in the clean run; those added are the held-out problems with their answers."""
    problems = task.problems(3, 0, "test")
    rows = sft.leaked(problems, copies=2)
    assert len(rows) == 6 and rows[0] == rows[3] == {"prompt": problems[0].text, "chosen": f"#### {problems[0].answer}"}
    clean, bad = broken("sft", "contaminated")
    assert len(clean.updates) == len(bad.updates) and not same_model(clean, bad)


@pytest.mark.parametrize("name", ["overoptimize_verifier", "self_correct"])
def test_the_same_verifier_used_in_another_way(broken, name):
    """Verifier and answers are the clean run's."""
    clean, bad = broken("reasoning", name)
    C, B = clean.report, bad.report
    assert same_model(clean, bad)
    for key in ("verifier_accuracy", "vote", "vote_of_top", "weighted_vote", "best_of_n", "oracle", "score", "peak_n"):
        assert C[key] == pytest.approx(B[key]), key
    if name == "overoptimize_verifier":
        assert C["chosen"] == C["vote_of_top"] and B["chosen"] == B["best_of_n"]
        assert all(C[key] == B[key] for key in ("draft", "revised", "repaired", "spoiled"))


@pytest.mark.parametrize("name", ["unsafe_eval", "faulty_tool"])
def test_another_tool_and_the_same_model(broken, name):
    assert same_model(*broken("tools", name))


def test_both_masks_are_compared_on_the_same_tokens(broken):
    clean, bad = (folder.updates[0] for folder in broken("tools", "hallucinated_result"))
    assert clean["loss"] == clean["loss_own"] == pytest.approx(bad["loss_own"], rel=1e-6)
    assert bad["loss"] != bad["loss_own"]


@pytest.mark.parametrize("name", ["flip_labels", "low_beta"])
def test_break_on_real_data(make, tmp_path, name):
    """On data without gold answers, and with a context that leaves no room for answers to its prompts."""
    pairs = [{"prompt": f"{i} eggs?", "chosen": f"{i}.", "rejected": "No."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = make("dpo", "--break", name, "--data", tmp_path / "pairs.jsonl")
    check_break(made.job.out, *made.folders, breaks.entry("dpo", name))
    assert "Warning" not in made.job.err


@pytest.mark.parametrize("flags", ["", "--break flip_labels"])
def test_kto_on_judgements_of_single_answers(make, tmp_path, flags):
    judged = [{"prompt": f"{i} eggs?", "completion": f"{i}.", "label": i % 3 == 0} for i in range(40)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    made = make("dpo", "--loss", "kto", *flags.split(), "--data", tmp_path / "judged.jsonl")
    assert "40 answers read, 40 kept" in made.job.out
    if flags:
        check_break(made.job.out, *made.folders, breaks.entry("dpo", "flip_labels"))
    else:
        assert len(made.folder.updates) == 4
        assert made.folder.updates[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # policy = reference


# --- what is missing is made ---

# The base model that is made cannot be made tiny by flags of another script, but by other defaults.
CHAIN = """
import sys
sys.path.insert(0, {repo!r})
import gpt, grpo, reasoning, reward_model, sft, tools

def shrink(module, **defaults):
    ours = module.parser
    def tiny_parser():
        parser = ours()
        parser.set_defaults(**defaults)
        return parser
    module.parser = tiny_parser

shrink(gpt, steps=20, n_layer=1, n_embd=32, length=16, batch=2)
shrink(sft, demos=32, batch=8, problems=5, eval_every=2)
shrink(reward_model, pairs=16, steps=4, batch=4, problems=5)
shrink(grpo, prompts=2, group=2, max_tokens=4, problems=5)
shrink(reasoning, n=4, problems=5, train_problems=8, samples=3, batch=2)
shrink(tools, demos=32, batch=8, problems=5, eval_every=2, max_tokens=30, prompts=2, group=2)
{script}.main()
"""


@pytest.fixture
def chain(run, tmp_path):
    """chain(script, *flags): what is printed by a tiny run of a script that starts from nothing but tmp_path/runs.
    edit=(old, new): replace something in CHAIN, as somebody who edits a script would."""

    def chain(script, *flags, edit=("", "")):
        (tmp_path / "chain.py").write_text(CHAIN.replace(*edit).format(repo=str(REPO), script=script))
        return run(tmp_path, "chain", *flags, repo=tmp_path).out

    return chain


def missing(out):
    return [line.split(" is missing")[0] for line in out.splitlines() if " is missing" in line]


def test_missing_base_is_made(chain, tmp_path):
    out = chain("sft")
    assert missing(out) == ["runs/base"] and "`python gpt.py`" in out
    assert gpt.load_model(str(tmp_path / "runs" / "base")).config.n_layer == 1
    path = tmp_path / "runs" / "base" / "report.json"
    report = path.read_bytes()
    # A second run finds it; one of another seed needs its own.
    out = chain("sft", "--lr", "1e-3")
    assert not missing(out) and "ove it away" not in out and path.read_bytes() == report
    out = chain("sft", "--seed", "3")
    assert missing(out) == ["runs/base-seed=3"] and "`python gpt.py --seed 3`" in out
    assert (tmp_path / "runs" / "base-seed=3" / "report.json").is_file()
    # One that was made by other code is used, and the reader is told.
    path.write_bytes(report.replace(json.loads(report)["config"]["code"].encode(), b"another"))
    out = chain("sft", "--lr", "2e-3")
    assert not missing(out) and re.search(r"^runs/base .*code.*ove it away", out, re.M)


def test_missing_reward_model_is_made(chain, tmp_path):
    """grpo.py from nothing. Then reward_model.py's distribution_shift, which uses all that is there, and makes the
    policy that is trained against this reward model."""
    assert missing(chain("grpo", "--max_steps", "2")) == ["runs/sft", "runs/base", "runs/reward_model"]
    assert isinstance(gpt.load_scorer(str(tmp_path / "runs" / "reward_model")), gpt.Scorer)
    assert not missing(chain("grpo", "--max_steps", "2", "--lr", "1e-3"))
    before = {folder.name: folder.stamp() for folder in folders(tmp_path)}
    out = chain("reward_model", "--break", "distribution_shift")
    (line,) = missing(out)
    assert "grpo" in line and "distribution_shift" in line
    now = {folder.name: folder for folder in folders(tmp_path)}
    assert all(now[name].stamp() == stamp for name, stamp in before.items())
    clean, broken = now["reward_model"], now["reward_model-distribution_shift"]
    check_break(out, clean, broken, breaks.entry("reward_model", "distribution_shift"))
    # Nothing about the reward model itself is different.
    assert same_model(clean, broken)
    for name in ("loss", "held_out_accuracy", "terse_beats_padded", "corr_length"):
        assert broken.report[name] == clean.report[name]
    # Run again, the policy is reused. If the reward model has changed, the policy that was trained against the old one
    # is not: it has the same flags, and the reward model has the same folder.
    assert not missing(chain("reward_model", "--break", "distribution_shift"))
    edit = ("pairs=16, steps=4", "pairs=16, steps=5")
    assert missing(chain("reward_model", "--break", "distribution_shift", edit=edit)) == [line]


def test_no_cot_makes_its_own_model(chain, tmp_path):
    """From nothing: a base model and two fine-tuned ones, one of them on answers without their working."""
    out = chain("reasoning", "--break", "no_cot")
    found = {folder.name: folder for folder in folders(tmp_path)}
    assert set(found) == {"base", "sft", "sft-answer_only=True", "reasoning", "reasoning-no_cot"}
    check_break(out, found["reasoning"], found["reasoning-no_cot"], breaks.entry("reasoning", "no_cot"))
    for name, made in (("reasoning", "sft"), ("reasoning-no_cot", "sft-answer_only=True")):
        *_, before, last = found[made].updates
        report = found[name].report
        assert (report["sft_loss_before"], report["sft_loss"]) == (before["loss"], last["loss"])


def test_missing_tool_model_is_made(chain, tmp_path):
    """tools.py --rl from nothing: the base model and the tool model, without a control."""
    assert missing(out := chain("tools", "--rl", "2")) == ["runs/base"] and "without its control" in out
    assert {folder.name for folder in folders(tmp_path)} == {"base", "tools", "tools-rl=2"}
    out = chain("tools", "--break", "tool_overuse", "--rl", "2")
    assert not missing(out) and "The cure to try" in out


def test_a_base_model_that_lost_its_weights_is_made_again(chain, tmp_path):
    weights = tmp_path / "runs" / "base" / "model" / "model.safetensors"
    chain("sft")
    for resume in ([], ["--resume"]):
        before = weights.read_bytes()
        weights.unlink()
        assert missing(chain("sft", "--lr", "1e-3", *resume)) == ["runs/base"]
        assert weights.read_bytes() == before


# --- the system that they run on ---

# One process for several scripts: torch is imported once.
SEVERAL = """
import json, locale, runpy, sys, warnings
print("encoding", locale.getpreferredencoding(False), sys.stdout.encoding)
# In our own files, a text file without encoding= is an error.
ours = r"(__main__|gpt|sft|dpo|data\\..*)$"
warnings.filterwarnings("error", category=EncodingWarning, module=ours)
for sys.argv in json.loads(sys.argv[1]):
    sys.path[0] = sys.argv[0].rsplit("/", 1)[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_cp1252_locale(tmp_path):
    """Windows' default encoding. The samples of an untrained model contain characters that it does not have."""
    locales = tmp_path / "locales"
    locales.mkdir()
    command = ["localedef", "-i", "en_US", "-f", "CP1252", str(locales / "en_US.CP1252")]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no localedef")
    if not (locales / "en_US.CP1252").exists():
        pytest.skip(f"localedef cannot make the locale: {made.stderr[-200:]}")
    env = os.environ | {"LOCPATH": str(locales), "LC_ALL": "en_US.CP1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in env.items() if name != "PYTHONIOENCODING"} | {"CUDA_VISIBLE_DEVICES": ""}
    (pairs := tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} 个鸡蛋?", "chosen": "🥚" * i, "rejected": "не"}, ensure_ascii=False) + "\n"
                for i in range(9)), encoding="utf-8")  # fmt: skip
    base = "runs/base-n_layer=1-n_embd=32-steps=20-batch=2-length=16"
    argvs = [["gpt", *TINY["gpt"].split()],
             ["sft", *TINY["sft"].split(), "--load", base],
             ["dpo", *TINY["dpo"].split(), "--load", base],
             ["dpo", *TINY["dpo"].split(), "--load", base, "--data", str(pairs), "--batch", "2"]]  # fmt: skip
    argvs = [[str(REPO / f"{script}.py"), *flags, "--device", "cpu"] for script, *flags in argvs]
    command = [sys.executable, "-X", "warn_default_encoding", "-c", SEVERAL, json.dumps(argvs)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")[-3000:]
    assert re.match(r"encoding cp1252 cp1252", done.stdout.decode("cp1252"), re.I)
    found = folders(tmp_path)
    assert len(found) == 4
    for folder in found:
        for path in folder.path.rglob("*.*"):
            if path.suffix in (".json", ".jsonl", ".md"):
                path.read_bytes().decode("utf-8")
    assert any("\ufffd" in folder.path.joinpath("samples.md").read_text("utf-8") for folder in found)


@pytest.mark.parametrize(
    "command",
    [
        "-u {gpt} {flags} | head -1",
        "-u {gpt} {flags} 2>&1 | head -1",
        "-u {gpt} --load {base} | true",  # fails in print(), outside of a run
        "{gpt} --load {base} | true",  # fails when the buffer is written, at the end
    ],
)
def test_output_into_head(command, base, tmp_path):
    """A pipe that is closed after one line, or at once: no traceback, and a run that was stopped says so."""
    flags = TINY["gpt"] + " --steps 100 --device cpu"
    paths = {"gpt": shlex.quote(str(REPO / "gpt.py")), "base": shlex.quote(str(base.model))}
    command = f"{shlex.quote(sys.executable)} {command.format(flags=flags, **paths)}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.count("\n") == ("head" in command)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
    if command.endswith("--device cpu | head -1"):
        assert "The output was closed" in done.stderr.splitlines()[-1]


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.path.insert(0, {repo!r})
import gpt
gpt.main()
"""


def test_full_disk(start, run, tmp_path):
    """No file may grow beyond 60 kB: the logs are written, checkpoint and model are not. A limit is not a full disk,
    but the system's answer to each writer is the same kind of error. The earlier model is still there."""
    flags = [*TINY["gpt"].split(), "--steps", "60"]
    run(tmp_path, "gpt", *flags)
    (folder,) = folders(tmp_path)
    weights = folder.weights.read_bytes()
    assert len(weights) > 60_000
    (tmp_path / "full.py").write_text(FULL_DISK.format(size=60_000, repo=str(REPO)))
    job = start(tmp_path, "full", *flags, repo=tmp_path).wait()
    refused(job, f"runs/{folder.name}/resume.safetensors: File too large", "Make room")
    old = folder.path.with_name(folder.name + ".old")
    assert gpt.load_model(str(old)) and (old / "model" / "model.safetensors").read_bytes() == weights
    assert not list(folder.path.glob("*resume*")) and not list(folder.path.glob("*.tmp"))
    run(tmp_path, "gpt", *flags, "--resume")
    assert folder.weights.read_bytes() == weights and not old.exists()


def test_runs_is_a_file(start, tmp_path):
    (tmp_path / "runs").write_text("mine")
    refused(start(tmp_path, "gpt", *TINY["gpt"].split()).wait(), "runs", "Move away")
    assert (tmp_path / "runs").read_text() == "mine"


# --- wrong input ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_impossible_numbers(script, monkeypatch, capsys):
    """A count below 1, a negative number, a word: refused before anything runs, in a line that names the flag."""
    monkeypatch.setattr(report, "train_and_compare", lambda *args: pytest.fail("was not refused"))
    module = importlib.import_module(script)
    for action in module.parser()._actions:
        (flag,) = action.option_strings[:1]
        values = {int: ["0", "-1", "many"], float: ["-0.1", "many"]}.get(action.type, [])
        values += ["0"] * (flag in ("--lr", "--top_p") or (flag == "--temperature" and script != "gpt"))
        for value in values:
            if (flag, value) == ("--top_k", "0"):
                continue  # all tokens
            with pytest.raises(SystemExit) as error:
                module.main(["--device", "cpu", flag, value])
            assert error.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1], (flag, value)


# Scripts, flags, and a word of the message. They are added to the flags of the tiny runs, and win. {base}, {chat} and
# {rm} are the tiny models, {tmp} is a folder with wrong files.
WRONG = [
    # models
    ("gpt sft dpo reward_model ppo grpo reasoning tools", "--load {tmp}/nothing", "nothing"),
    ("gpt sft dpo reward_model grpo tools", "--load gpt2", "gpt2"),
    ("gpt reward_model tools", "--load {tmp}/truncated", "truncated"),
    ("gpt", "--load {tmp}/notjson", "notjson"),
    ("gpt", "--load {tmp}/list", "list"),
    ("sft", "--load {tmp}/wrongshape", "wrongshape"),
    ("grpo reasoning", "--load {rm}", "gives scores"),
    ("reward_model", "--policy {tmp}/nothing", "nothing"),
    ("ppo grpo", "--rm {tmp}/nothing", "nothing"),
    ("ppo grpo", "--rm {chat}", "reward_model.py"),  # a language model
    ("ppo", "--rm gpt2", "gpt2"),
    ("ppo", "--rm {tmp}/truncated_rm", "truncated_rm"),
    ("grpo", "--rm {tmp}/notjson_rm", "notjson_rm"),
    ("ppo", "--rm {tmp}/two_labels_rm", "two_labels_rm"),
    ("ppo grpo", "--rm {tmp}/gpt2_rm", "tokenizer"),  # the same ids are other words
    # values
    ("sft dpo reward_model ppo grpo reasoning tools", "--break nonsense", "nonsense"),
    ("gpt dpo", "--device nonsense", "nonsense"),
    ("sft", "--device cuda", "cuda"),
    ("gpt", "--dtype float16", "--dtype"),
    ("gpt", "--n_embd 33", "--n_embd"),
    ("gpt", "--length 200", "--length"),
    ("dpo", "--loss robust --noise 0.5", "--noise"),
    ("dpo", "--beta 0", "--beta"),
    ("dpo", "--loss ppo", "--loss"),
    ("grpo", "--loss sum", "--loss"),
    ("grpo", "--reward nonsense", "--reward"),
    ("grpo", "--group 1", "--group"),  # the standard deviation of one number is NaN
    ("ppo", "--lam 2", "--lam"),
    ("ppo grpo", "--problems 1", "--problems"),
    ("ppo", "--beta 0 --target_kl 6", "--target_kl"),
    ("reward_model", "--annotator nonsense", "--annotator"),
    ("reward_model", "--pairs 3", "--batch 4"),
    ("reasoning", "--train_problems 1", "--train_problems"),
    ("reasoning", "--level word", "--level"),
    ("reasoning", "--n 12", "--n"),
    ("tools", "--rl 3 --group 1", "--group"),
    ("tools", "--rl 3 --plain", "--plain"),
    # texts that do not fit
    ("gpt", "--load {base} --prompt ''", "--prompt"),
    ("gpt", "--load {chat} --prompt ''", "--prompt"),
    ("gpt", f"--load {{base}} --prompt '{'eggs ' * 200}'", "context"),
    ("gpt", f"--load {{chat}} --prompt '{'eggs ' * 200}'", "context"),
    ("ppo grpo", "--max_tokens 200", "context"),
    ("reasoning tools", "--max_tokens 100", "context"),
    # breaks that would compare nothing, or not what they say
    ("ppo grpo", "--beta 0 --break no_kl", "no_kl"),
    ("grpo", "--beta 0 --break shared_ref", "shared_ref"),
    ("reasoning", "--break no_cot", "no_cot"),
    ("reward_model", "--break length_bias --data {tmp}/good.jsonl", "--data"),
    ("sft", "--break eos_masked --data {tmp}/good.jsonl", "--data"),
    ("tools", "--break faulty_tool --plain", "--plain"),
    ("tools", "--break unsafe_eval --rl 3", "--rl"),
    ("tools", "--break unsafe_eval --data {tmp}/gsm8k.jsonl", "--data"),
    ("reasoning", "--break no_cot --data {tmp}/gsm8k.jsonl", "--data"),
    # data
    ("sft", "--load scratch --data {tmp}/good.jsonl", "TIKTOKEN_CACHE_DIR"),
    ("sft dpo reward_model ppo grpo reasoning tools", "--data {tmp}/missing.jsonl", "missing.jsonl"),
    ("sft dpo reward_model ppo grpo reasoning tools", "--data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    ("ppo grpo reasoning tools", "--data {tmp}/good.jsonl --max_tokens 20", "no gold numbers"),
    ("ppo grpo reasoning tools", "--data {tmp}/gsm8k.jsonl --max_tokens 126", "--max_tokens"),
    ("reward_model", "--data {tmp}/gsm8k.jsonl --max_tokens 8", "0 pairs"),  # it is never correct
    ("reward_model", "--data {tmp}/gsm8k.jsonl --policy {tmp}/gpt2_chat", "tokenizer"),
    ("dpo reward_model", "--data {tmp}/columns.jsonl", "columns.jsonl, line 1"),
    ("dpo reward_model", "--data {tmp}/empty.jsonl", "empty.jsonl"),
    ("dpo reward_model", "--data nonsense", "nonsense"),
    ("dpo reward_model", "--data ultrafeedback", "hub"),
    ("dpo tools", "--data {tmp}", "{tmp}"),
    ("dpo reward_model", "--data {tmp}/good.jsonl", "pairs"),  # two pairs are too few
    ("dpo reward_model", "--data {tmp}/same.jsonl --batch 2", "prompt"),  # one prompt: none can be held out
    ("dpo reward_model", "--data {tmp}/long.jsonl --batch 2", "--max_tokens"),
    ("dpo", "--data {tmp}/short.jsonl --batch 2 --max_tokens 5", "--max_tokens"),
    ("dpo", "--data {tmp}/gsm8k.jsonl --batch 2", "pair"),
    ("dpo reward_model", "--data {tmp}/judged.jsonl --batch 2", "--loss kto"),
    ("dpo", "--loss kto --data {tmp}/good_only.jsonl --batch 2", "pair"),
    ("sft", "--data {tmp}/long.jsonl", "context"),
    ("sft", "--data {tmp}/nopair.jsonl", "nopair.jsonl"),
    ("ppo grpo reasoning tools", "--data gsm8k", "gsm8k"),
    ("reasoning", "--data {tmp}/models.jsonl", "models.jsonl, line 2"),
]
WRONG = [(script, flags, word) for scripts, flags, word in WRONG for script in scripts.split()]


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory, base, scorer):
    """A folder with everything that can be wrong about a file."""
    tmp = tmp_path_factory.mktemp("wrong")
    good = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}

    def write(name, rows):
        (tmp / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("good", [good, good | {"prompt": "Ho"}])
    (tmp / "bad.jsonl").write_text(json.dumps(good) + '\n{"prompt": "Hi", "chos\n')
    write("columns", [{"words": "Hi"}])
    judged = {"prompt": "Hi", "completion": "Hello!", "label": True}
    write("judged", [judged | {"prompt": f"{i}", "label": i % 2 == 0} for i in range(9)])
    write("good_only", [judged | {"prompt": f"{i}"} for i in range(9)])
    write("empty", [])
    write("same", [good | {"chosen": f"{i}"} for i in range(9)])
    write("short", [good | {"prompt": f"{i}"} for i in range(9)])
    write("long", [good | {"chosen": "eggs " * (200 + i)} for i in range(9)])
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    write("nopair", [{"chosen": turns, "rejected": "\n\nHuman: e\n\nAssistant: f"}])
    write("gsm8k", [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(9)])
    published, entry = {"question": "?", "ground_truth": "A: 18"}, {"solution": "A: 17", "is_correct": False}
    write("models", [published | {"one": entry}, published | {"other": entry}])

    def damaged(name, of, config=None):
        """A copy of a model, with another config.json."""
        shutil.copytree(of.model, tmp / name)
        path = tmp / name / "config.json"
        if config is not None:
            old = json.loads(path.read_text())
            path.write_text(json.dumps(old | config) if isinstance(config, dict) else config)
        return tmp / name / "model.safetensors"

    damaged("notjson", base, "{")
    damaged("notjson_rm", scorer, "{")
    damaged("list", base, "[]")
    damaged("wrongshape", base, {"n_embd": 64})
    damaged("gpt2_rm", scorer, {"tokenizer": "gpt2"})
    damaged("gpt2_chat", base, {"tokenizer": "gpt2"})
    for path in (damaged("truncated", base), damaged("truncated_rm", scorer)):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # What transformers saves for a classifier with two classes: scores, but two.
    path = damaged("two_labels_rm", scorer)
    weights = load_file(path)
    save_file(weights | {"score.weight": weights["score.weight"].repeat(2, 1)}, path, {"format": "pt"})
    return tmp


def no_network(tmp):
    """No cache, and a proxy that refuses at once, so that no test waits for a time-out."""
    proxy = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9") | {"NO_PROXY": "", "no_proxy": ""}
    return proxy | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{tmp}/hf", "TIKTOKEN_CACHE_DIR": f"{tmp}/tiktoken"}


@pytest.mark.parametrize("script, flags, word", WRONG, ids=[f"{s} {f[:60]}" for s, f, _ in WRONG])
def test_wrong_input(start, tiny, base, chat, scorer, wrong_files, tmp_path, script, flags, word):
    fields = {"base": base.model, "chat": chat.model, "rm": scorer.model, "tmp": wrong_files}
    flags = shlex.split(flags.format(**fields))
    job = start(tmp_path, script, *tiny(script), *flags, env=no_network(tmp_path)).wait()
    refused(job, word.format(**fields))
    assert not list(tmp_path.glob("runs/*/report.json"))


SOME = [s if s in ("gpt", "dpo", "grpo") else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]


@pytest.mark.parametrize("script", SOME)
def test_loss_that_is_not_finite(start, tiny, tmp_path, script):
    """A step size of 1e30 ruins the weights at the first update; the second one's loss shows it."""
    flags = {"ppo": "--epochs 2", "grpo": "--epochs 2", "reasoning": "--eval_every 9"}.get(script, "").split()
    job = start(tmp_path, script, *tiny(script), *flags, "--lr", "1e30").wait()
    refused(job, "--lr")
    assert re.search(r"\w+ is (nan|inf) at step \d+: stopped", job.err)
    assert not list(tmp_path.glob("runs/*/report.json"))


@pytest.mark.parametrize("script", SOME)
def test_weights_that_are_not_finite_when_they_are_sampled(start, tiny, tmp_path, script):
    """What follows the update that ruins the weights is an evaluation."""
    flags = {"gpt": "--steps 1", "ppo": "--epochs 1 --minibatch 4", "grpo": ""}.get(script, "--eval_every 1")
    refused(start(tmp_path, script, *tiny(script), *flags.split(), "--lr", "1e30").wait(), "--lr")


# --- real data ---


@pytest.mark.slow  # files of realistic size: half a minute
@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
@pytest.mark.parametrize(
    "name",
    ["ultrafeedback/eval.jsonl", "hh-rlhf/harmless-base-test.jsonl.gz", "gsm8k/example_model_solutions.jsonl"],
)
def test_real_data(run, tmp_path, name):
    data = ["--data", f"{REAL}/{name}", "--steps", "2", "--batch", "2"]

    def trained(script, *flags):
        cwd = tmp_path / script
        cwd.mkdir()
        job = run(cwd, script, *data, *flags, env={"TIKTOKEN_CACHE_DIR": f"{REAL}/tiktoken"})
        (folder,) = folders(cwd)
        return job, folder, folder.report

    _, chat, report = trained("sft")
    assert 10.5 < report["loss"] < 12  # random weights guess among 50261 tokens: log 50261 = 10.8, or a little more
    load = ["--load", chat.model, "--max_tokens", "96"]
    job, folder, report = trained("dpo", *load, "--problems", "2")
    assert re.search(r"\d+ pairs read,.* \d+ kept", job.out)
    assert report["loss"] == pytest.approx(0.693, abs=0.02)
    assert ("accuracy_sampled" in report) == name.startswith("gsm8k")
    assert "## Step" in folder.samples

    job, folder, report = trained("reward_model", *load)
    check_folder(folder, 2)
    assert re.search(r"\d+ pairs read,.* \d+ kept", job.out) and "calibration on held-out pairs: " in job.out
    assert all(0 <= m["held_out_accuracy"] <= 1 for m in folder.metrics("held_out_accuracy"))
    assert 0 <= report["longer_chosen"] <= 1
    assert "terse_beats_padded" not in report  # there are no gold answers
    assert " score " in folder.samples
    scorer = gpt.load_scorer(str(folder.path))
    assert scorer.std > 0 and (scorer.mean, scorer.std) != (0.0, 1.0)


@pytest.mark.slow  # most of half a minute is sampling from GPT-2's vocabulary
@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
def test_real_problems(run, tmp_path):
    """The first 60 problems of GSM8K through every chapter, with random weights on GPT-2's tokens."""
    with open(f"{REAL}/gsm8k/train.jsonl", encoding="utf-8") as file:
        (tmp_path / "gsm8k.jsonl").write_text("".join(file.readline() for _ in range(60)), encoding="utf-8")

    def trained(script, *flags):
        flags = ["--data", "gsm8k.jsonl", *flags]
        job = run(tmp_path, script, *flags, env={"TIKTOKEN_CACHE_DIR": f"{REAL}/tiktoken"})
        return job, [folder for folder in folders(tmp_path) if folder.name.startswith(script)]

    _, (chat,) = trained("sft", "--steps", "3", "--batch", "4")
    short = ["--problems", "4", "--max_tokens", "20"]
    for script in RL:
        job, (made,) = trained(script, "--load", chat.model, "--max_steps", "2", *short)
        check_folder(made, 2)
        assert "60 problems read, 60 kept" in job.out and made.config["prompts"] == 2 and made.report["accuracy"] == 0
    few = ["--n", "4", "--train_problems", "4", "--samples", "2", "--batch", "2"]
    _, (made,) = trained("reasoning", "--load", chat.model, *few, *short)
    check_folder(made, 2)
    job, made = trained("tools", "--steps", "3", *short)
    assert "All annotations are reproduced in 50 of 50 solutions" in job.out and len(made) == 2
    for folder in made:
        check_folder(folder, 3)
        assert 10.5 < folder.report["loss_own"] < 12  # log 50261 = 10.8, or a little more
