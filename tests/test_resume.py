"""Interrupted, killed and repeated runs: a resumed run ends in the same bytes, and no run is lost or mistaken."""

import json
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from server import RL, SCRIPTS, Job, copy_of_repo, folders, refused

import gpt
import sft
from data import breaks, runs

pytest_plugins = ["server"]

# data/runs.py is the same for all scripts: one of each kind of loop every time, the others in the slow suite.
SOME = [s if s in ("gpt", "dpo", "grpo") else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]
LONG = {  # flags of runs with several checkpoints and evaluations
    "gpt": "--steps 130",
    "sft": "--demos 1040 --eval_every 40",
    "dpo": "--steps 60 --eval_every 20",
    "reward_model": "--steps 130 --eval_every 40",
    "ppo": "--max_steps 60",
    "grpo": "--max_steps 60",
    "reasoning": "--train_problems 240 --eval_every 40",
    "tools": "--demos 1040 --eval_every 40 --plain",
}
CHECKPOINT = dict.fromkeys(SCRIPTS, 50) | dict.fromkeys(("dpo", *RL), 25)  # steps between checkpoints


@pytest.fixture(scope="session")
def long(make, tiny):
    """long(script): (flags, folder of an uninterrupted run)."""
    made = {}

    def long(script):
        if script not in made:
            flags = LONG[script].split()
            made[script] = [*tiny(script), *flags], make(script, *flags).folder
        return made[script]

    return long


def same_bytes(one, two):
    for name in ("config.json", "metrics.jsonl", "samples.md", "samples.jsonl", "model/model.safetensors"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    may_differ = {"seconds": None, "peak_gb": None}
    assert one.report | may_differ == two.report | may_differ
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())


def lines_logged(cwd, run="*"):
    """How many lines metrics.jsonl has; -1 if there is none."""
    try:
        (path,) = cwd.glob(f"runs/{run}/metrics.jsonl")
        return path.read_bytes().count(b"\n")
    except (ValueError, FileNotFoundError):  # not there, or just removed by a new start
        return -1


def interrupt(start, cwd, script, flags, lines, run="*"):
    """Ctrl-C as soon as metrics.jsonl has so many lines."""
    job = start(cwd, script, *flags)
    assert job.until(lambda: lines_logged(cwd, run) >= lines), job.out + job.err
    job.send(signal.SIGINT)
    assert job.wait().code == 130 and "Traceback" not in job.err, job.out + job.err
    return job


def kill_after_checkpoint(start, cwd, script, flags, **more):
    job = start(cwd, script, *flags, **more)
    assert job.until(lambda: list(cwd.glob("runs/*/resume.safetensors")))
    job.send(signal.SIGKILL)
    assert job.wait().code == -signal.SIGKILL
    (folder,) = folders(cwd)
    return folder.path


# --- resumed ---


@pytest.mark.parametrize("script", SOME)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_resumed(start, long, tmp_path, script, seed):
    flags, whole = long(script)
    every, rng = CHECKPOINT[script], random.Random(f"{script} {seed}")
    # Once before the first checkpoint, then around the times when checkpoints are written.
    moments = [rng.randint(0, every - 5), every - 1, rng.randint(every + 1, 2 * every)]
    moments += [2 * every - 1, 2 * every + rng.randint(2, 9)]
    killed = 0
    for moment in moments:
        job = start(tmp_path, script, *flags, *(["--resume"] if killed else []))
        if killed:  # what an earlier process has logged does not count
            job.until(lambda job=job: re.search(r"nothing to resume|resuming at step \d+", job.out))
        job.until(lambda moment=moment: lines_logged(tmp_path) >= moment)
        time.sleep(rng.random() * 0.02)
        job.send(signal.SIGKILL)
        killed += job.wait().code == -signal.SIGKILL
        if job.code == 0:
            break
    assert killed >= 3
    if job.code != 0:
        job = start(tmp_path, script, *flags, "--resume").wait()
        assert job.code == 0 and "resuming at step" in job.out, job.err
    (folder,) = folders(tmp_path)
    same_bytes(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("script, points", [("gpt", 7), ("dpo", 7), ("grpo", 6)])
def test_killed_at_random_points(start, long, tmp_path, script, points):
    """20 kills in all, at any step, also while a checkpoint is written and while the checkpoint is loaded."""
    flags, whole = long(script)
    rng, last = random.Random(f"points {script}"), len((whole.path / "metrics.jsonl").read_bytes().splitlines())
    moments = sorted(rng.randrange(last - 2) for _ in range(points))
    for number, moment in enumerate(moments):
        job = start(tmp_path, script, *flags, *(["--resume"] if number else []))
        if number:  # what an earlier process has logged does not count
            job.until(lambda job=job: re.search(r"nothing to resume|resuming at step \d+", job.out))
        job.until(lambda moment=moment: lines_logged(tmp_path) >= moment)
        time.sleep(rng.random() * 0.01)
        job.send(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL, f"{script} ended before it was killed at line {moment}"
    job = start(tmp_path, script, *flags, "--resume").wait()
    assert job.code == 0, job.err
    same_bytes(whole, *folders(tmp_path))


@pytest.mark.parametrize("script", SOME)
def test_interrupted_and_resumed(start, server, long, tmp_path, script):
    flags, whole = long(script)
    interrupt(start, tmp_path, script, flags, 7)
    job = interrupt(start, tmp_path, script, [*flags, "--resume"], CHECKPOINT[script] + 5)
    assert not list(tmp_path.glob("runs/*/report.json"))
    # Exactly the printed command finishes the run.
    (line,) = [line for line in job.out.splitlines() if line.startswith("Saved at step")]
    python, *argv = shlex.split(line.split("Continue with:")[1])
    assert python == "python" and argv.count("--resume") == 1
    job = Job(server, tmp_path, argv, {}).wait()
    assert job.code == 0, job.err
    (folder,) = folders(tmp_path)
    same_bytes(whole, folder)


@pytest.mark.parametrize(
    "script, flags, second",
    [
        ("dpo", f"--break flip_labels {LONG['dpo']}", "dpo-flip_labels*"),
        ("tools", "--demos 640 --eval_every 60", "*plain*"),
    ],
)
def test_two_runs_in_one_command(start, run, tiny, tmp_path, script, flags, second):
    """Ctrl-C in the first run, then in the second: the same command with --resume finishes both."""
    flags = [*tiny(script), *flags.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    run(whole, script, *flags)
    interrupt(start, parts, script, flags, 25)
    assert len(folders(parts)) == 1
    interrupt(start, parts, script, [*flags, "--resume"], 25, second)
    job = run(parts, script, *flags, "--resume")
    assert "already there" in job.out
    for one, two in zip(folders(whole), folders(parts), strict=True):
        same_bytes(one, two)
    # Once more: finished runs are not made anew.
    before = [folder.stamp() for folder in folders(parts)]
    assert run(parts, script, *flags, "--resume").out.count("already there") == 2
    assert [folder.stamp() for folder in folders(parts)] == before


def test_rl_with_tools_interrupted_and_resumed(start, run, make, tiny, tmp_path):
    flags = "--rl 30 --prompts 2 --group 2".split()
    interrupt(start, tmp_path, "tools", [*tiny("tools"), *flags], 25)
    run(tmp_path, "tools", *tiny("tools"), *flags, "--resume")
    (folder,) = folders(tmp_path)
    same_bytes(make("tools", *flags).folder, folder)


@pytest.mark.parametrize("script", RL)
def test_a_short_run_is_the_beginning_of_a_long_one(make, long, script):
    """The step size is constant, and no random number depends on how long the run will be."""
    short, whole = ((f.path / "metrics.jsonl").read_text().splitlines() for f in (make(script).folder, long(script)[1]))
    # Only the evaluation at the short run's end is not in the long one.
    assert len(short) == 5 and short[:-1] == whole[:4] and "test_accuracy" in short[-1]


def test_killed_while_writing(start, run, long, tmp_path):
    """Half a checkpoint beside a whole one, and half a line in the log."""
    flags, whole = long("dpo")
    folder = kill_after_checkpoint(start, tmp_path, "dpo", flags)
    checkpoint = (folder / "resume.safetensors").read_bytes()
    (folder / "resume.safetensors.tmp").write_bytes(checkpoint[: len(checkpoint) // 2])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 59, "lo')
    assert "resuming at step" in run(tmp_path, "dpo", *flags, "--resume").out
    same_bytes(whole, *folders(tmp_path))


# --- stopped without a checkpoint ---


def test_second_interrupt_stops_at_once(start, tiny, tmp_path):
    # Step 0 is an evaluation on many problems, which takes longer than the test waits.
    job = start(tmp_path, "dpo", *tiny("dpo"), "--problems", "4000")
    assert job.until(lambda: (tmp_path / "runs").exists())
    time.sleep(0.3)
    job.send(signal.SIGINT)
    assert job.until(lambda: "press again to stop at once" in job.out)
    job.send(signal.SIGINT)
    job.wait()
    refused(job, "--resume")
    assert "Saved at step" not in job.out and lines_logged(tmp_path) == 0
    assert not list(tmp_path.glob("runs/*/resume.safetensors"))


def test_interrupt_while_preparing(start, tiny, tmp_path):
    """Before the loop there is nothing to save."""
    job = start(tmp_path, "sft", *tiny("sft"), "--demos", "300000")
    time.sleep(2)  # imports take a tenth of a second here, the demonstrations half a minute
    job.send(signal.SIGINT)
    refused(job.wait())


# --- what cannot be resumed ---


def test_damaged_checkpoint(start, long, tmp_path):
    flags, _ = long("dpo")
    path = kill_after_checkpoint(start, tmp_path, "dpo", flags) / "resume.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(start(tmp_path, "dpo", *flags, "--resume").wait(), "damaged", "Delete the folder")


def test_changed_script(start, long, tmp_path):
    flags, _ = long("dpo")
    repo, cwd = copy_of_repo(tmp_path / "repo"), tmp_path / "work"
    cwd.mkdir()
    kill_after_checkpoint(start, cwd, "dpo", flags, repo=repo)
    with open(repo / "dpo.py", "a") as file:
        file.write("# an edit\n")
    refused(start(cwd, "dpo", *flags, "--resume", repo=repo).wait(), "the code has changed", "Delete the folder")


def two_paths_that_end_alike(model, cwd):
    """The folders of their runs have the same name."""
    for path in ("a/model", "b/a/model"):
        shutil.copytree(model, cwd / path)
    return "a/model", "b/a/model"


def test_another_model(start, chat, long, tmp_path):
    one, other = two_paths_that_end_alike(chat.model, tmp_path)
    kill_after_checkpoint(start, tmp_path, "dpo", [*long("dpo")[0], "--load", one])
    job = start(tmp_path, "dpo", *long("dpo")[0], "--load", other, "--resume").wait()
    refused(job, "--load differs", "Delete the folder")


# --- two processes, one run ---


@pytest.mark.parametrize("lines", [5, 30], ids=["before the first checkpoint", "after it"])
def test_the_second_process_is_refused(start, long, tmp_path, lines):
    """It touches nothing, with --resume or without. After the first one was killed, the run is free again."""
    flags, whole = long("dpo")
    first = start(tmp_path, "dpo", *flags)
    assert first.until(lambda: lines_logged(tmp_path) >= lines)
    first.send(signal.SIGSTOP)
    try:
        for more in ([], ["--resume"]):
            refused(start(tmp_path, "dpo", *flags, *more).wait(), "runs/dpo-", "is in use: another process")
    finally:
        first.send(signal.SIGKILL if lines == 5 else signal.SIGCONT)
    first.wait()
    if lines == 5:
        assert first.code == -signal.SIGKILL
        first = start(tmp_path, "dpo", *flags).wait()
    assert first.code == 0, first.err
    same_bytes(whole, *folders(tmp_path))


# --- what is not lost ---


def test_an_interrupted_run_is_not_deleted_unasked(start, long, tmp_path):
    flags, _ = long("dpo")
    path = kill_after_checkpoint(start, tmp_path, "dpo", flags) / "resume.safetensors"
    refused(start(tmp_path, "dpo", *flags).wait(), "interrupted", "--resume")
    assert path.is_file()


def test_a_finished_run_is_kept_until_the_new_one_is_complete(start, run, long, tmp_path):
    flags, _ = long("dpo")
    run(tmp_path, "dpo", *flags)
    (folder,) = folders(tmp_path)
    weights = (folder.path / "model" / "model.safetensors").read_bytes()
    job = start(tmp_path, "dpo", *flags)
    assert job.until(lambda: (folder.path / "resume.safetensors").is_file())
    job.send(signal.SIGKILL)
    job.wait()
    old = folder.path.with_name(folder.path.name + ".old")
    assert (old / "report.json").is_file() and (old / "model" / "model.safetensors").read_bytes() == weights
    run(tmp_path, "dpo", *flags, "--resume")
    assert not old.exists() and (folder.path / "model" / "model.safetensors").read_bytes() == weights


# --- which runs are reused, and which are made anew ---


def test_a_run_does_not_replace_one_of_another_model(start, run, tiny, scorer, tmp_path):
    one, other = two_paths_that_end_alike(scorer.model, tmp_path)
    run(tmp_path, "grpo", *tiny("grpo"), "--rm", one)
    (folder,) = folders(tmp_path)
    before = folder.stamp()
    refused(start(tmp_path, "grpo", *tiny("grpo"), "--rm", other).wait(), "--rm a/model", "move it away")
    assert folder.stamp() == before


def test_resume_of_nothing_and_of_a_finished_run(run, tiny, tmp_path):
    assert "nothing to resume" in run(tmp_path, "gpt", *tiny("gpt"), "--resume").out
    (folder,) = folders(tmp_path)
    before = folder.stamp()
    assert "already there" in run(tmp_path, "gpt", *tiny("gpt"), "--resume").out and folder.stamp() == before
    run(tmp_path, "gpt", *tiny("gpt"))  # without --resume it is made anew
    assert folder.stamp() != before


def test_a_clean_run_is_reused_until_the_code_changes(run, tiny, tmp_path):
    """The catalogue and the report describe finished runs, so editing them does not count."""
    repo, flags = copy_of_repo(tmp_path / "repo"), [*tiny("dpo"), "--break", "flip_labels"]
    for edited, reused in (
        (None, False),
        ("data/breaks.py", True),
        ("data/report.py", True),
        ("data/page.py", True),
        ("dpo.py", False),
    ):
        if edited:
            with open(repo / edited, "a") as file:
                file.write("# an edit\n")
        assert ("already there" in run(tmp_path, "dpo", *flags, repo=repo).out) == reused, edited


def test_a_clean_run_is_reused_until_its_reward_model_changes(run, tiny, scorer, tmp_path):
    """Same flags, same code, another reward model in the same folder."""
    shutil.copytree(scorer.model, tmp_path / "rm")
    flags = [*tiny("grpo"), "--break", "no_kl", "--rm", "rm"]
    run(tmp_path, "grpo", *flags)
    assert "already there" in run(tmp_path, "grpo", *flags).out
    other = gpt.load_scorer(str(tmp_path / "rm"))
    with torch.no_grad():
        other.score.weight.neg_()
    other.save(tmp_path / "rm")
    assert "already there" not in run(tmp_path, "grpo", *flags).out
    assert "already there" in run(tmp_path, "grpo", *flags).out


def test_a_base_model_that_is_half_made_is_continued(tmp_path, monkeypatch, capsys):
    """A base run that was interrupted has no report. With --resume it is resumed."""
    monkeypatch.chdir(tmp_path)
    Path("runs/base/model").mkdir(parents=True)
    Path("runs/base/metrics.jsonl").write_text(json.dumps({"step": 0}))
    commands = []
    monkeypatch.setattr(gpt, "main", commands.append)
    args = runs.parse("sft", sft.parser(), ["--resume", "--device", "cpu"], breaks.of("sft"))
    assert runs.made_by("gpt", args, "a minute") == "runs/base/model"
    assert "runs/base is missing" in capsys.readouterr().out
    assert commands == [["--device", "cpu", "--resume"]]
