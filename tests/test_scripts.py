"""Tests of the scripts as a reader runs them: end to end, killed and resumed, and with wrong input.

Every run here is a process of its own in a temporary current directory, because what is tested is what
the shell sees: the exit code, the two output streams, the signals, the files under ./runs.
"""

import filecmp
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt
import grpo
import ppo
import sft
import tools
from data import task

REPO = Path(__file__).resolve().parent.parent
REAL = os.environ.get("REAL_DATA_DIR")

# Importing torch takes three seconds and a tiny run takes half of one. So one process imports the
# libraries, and every run is a fork of it: a process of its own all the same, which executes the script
# from its first line, with signals, streams and exit code of its own. Nothing of this repository
# is imported before the fork (the tests edit copies of it), no tensor is touched (a fork loses the
# threads that computed it), and huggingface_hub is not imported either (it reads its environment
# variables when it is).
SERVER = r"""
import gc, json, os, runpy, signal, sys, traceback
import matplotlib.pyplot, safetensors.torch, tiktoken, torch, tqdm
import torch._dynamo, requests  # what torch.optim and tiktoken import late

# A test suite that runs in the background ignores Ctrl-C, and so would all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.freeze()  # what the collector does not visit stays shared between the processes
while line := sys.stdin.readline():
    job = json.loads(line)
    if "wait" in job:
        try:
            pid, status = os.waitpid(job["wait"], 0 if job["block"] else os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        except ChildProcessError:
            print(json.dumps("unknown process"), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    break
else:
    os._exit(0)
# Here only a child arrives. It ends as the interpreter would, but leaves out the third of a second
# that taking torch apart costs.
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
except BaseException as error:
    traceback.print_exc()
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class Server:
    def __init__(self):
        # One thread: faster at this size, and the tests may share the machine. No GPU: sums there may
        # be taken in another order each time, and these tests compare bytes.
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Job:
    """One running script. After wait(): .code, .out, .err"""

    count = 0

    def __init__(self, server, cwd, script, flags, repo, env):
        Job.count += 1
        self.server, self.code = server, None
        self.logs = [Path(cwd) / f".{Job.count}.{name}" for name in ("out", "err")]
        argv = [str(Path(repo) / f"{script}.py"), *map(str, flags)]
        out, err = map(str, self.logs)
        self.pid = server.ask(argv=argv, cwd=str(cwd), env=env, out=out, err=err)

    @property
    def out(self):
        return self.logs[0].read_text() if self.logs[0].exists() else ""

    @property
    def err(self):
        return self.logs[1].read_text() if self.logs[1].exists() else ""

    def alive(self):
        if self.code is None:
            self.code = self.server.ask(wait=self.pid, block=False)
        return self.code is None

    def wait(self, timeout=300):
        end = time.time() + timeout
        while self.alive():
            if time.time() > end:
                os.kill(self.pid, signal.SIGKILL)
                self.server.ask(wait=self.pid, block=True)
                pytest.fail(f"still running after {timeout} s:\n{self.out}{self.err}")
            time.sleep(0.02)
        return self

    def send(self, what):
        if self.alive():
            os.kill(self.pid, what)

    def until(self, condition, timeout=300):
        """Wait for condition(); False where the script ended before."""
        begun = asked = time.time()
        while not condition():
            time.sleep(0.002)
            if time.time() - asked > 0.05:  # more often would cost the script its core
                asked = time.time()
                if not self.alive():
                    return False
                assert asked - begun < timeout, f"waited in vain:\n{self.out}{self.err}"
        return True


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="session")
def start(server):
    def start(cwd, script, *flags, repo=REPO, env=None):
        if "--device" not in flags and "--help" not in flags:
            flags = (*flags, "--device", "cpu")
        return Job(server, cwd, script, flags, repo, env or {})

    return start


@pytest.fixture(scope="session")
def run(start):
    """Run a script to its end; fails where that is not the expected one."""

    def run(cwd, script, *flags, code=0, **more):
        job = start(cwd, script, *flags, **more).wait()
        assert job.code == code, f"exit code {job.code}\n{job.out}\n{job.err}"
        return job

    return run


# The smallest everything. Problems: few, but a fifth of them must be at least one (pass@k).
TINY = {
    "gpt": "--n_layer 1 --n_embd 32 --length 16 --batch 2 --steps 20".split(),
    "sft": "--demos 32 --batch 8 --problems 5 --eval_every 2".split(),
    "dpo": "--steps 4 --batch 4 --problems 5 --eval_every 2".split(),
    "reward_model": "--pairs 16 --steps 4 --batch 4 --problems 5 --eval_every 2".split(),
    "ppo": "--max_steps 3 --prompts 2 --answers 2 --minibatch 2 --max_tokens 8 --problems 5".split(),
    "grpo": "--max_steps 3 --prompts 2 --group 3 --max_tokens 8 --problems 5".split(),
    "reasoning": "--n 4 --problems 5 --train_problems 8 --samples 3 --batch 2 --eval_every 2".split(),
    # --plain: one run, not two. Those with tools are tested below.
    "tools": "--demos 32 --batch 8 --problems 5 --eval_every 2 --max_tokens 30 --plain".split(),
}
SCRIPTS = list(TINY)
# gpt.Run is the same for all: one of each kind of loop every time, the others in the slow suite.
SOME = [s if s in ("gpt", "dpo", "grpo") else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]
CHASES = ["ppo", "grpo"]  # they chase a reward: their steps are counted by --max_steps


@pytest.fixture(scope="session")
def base(run, tmp_path_factory):
    """A folder with a tiny base model, and what the run that made it printed."""
    cwd = tmp_path_factory.mktemp("base")
    job = run(cwd, "gpt", *TINY["gpt"])
    shutil.move(folder_of(cwd) / "model", cwd / "tiny")
    return SimpleNamespace(cwd=cwd, model=cwd / "tiny", job=job, folder=folder_of(cwd))


@pytest.fixture(scope="session")
def chatty(run, base, tmp_path_factory):
    """The same after sft.py."""
    cwd = tmp_path_factory.mktemp("sft")
    job = run(cwd, "sft", "--load", base.model, *TINY["sft"])
    shutil.move(folder_of(cwd) / "model", cwd / "tiny")
    return SimpleNamespace(cwd=cwd, model=cwd / "tiny", job=job, folder=folder_of(cwd))


@pytest.fixture(scope="session")
def judge(run, chatty, tmp_path_factory):
    """A reward model that starts from the chat model."""
    cwd = tmp_path_factory.mktemp("judge")
    job = run(cwd, "reward_model", "--load", chatty.model, *TINY["reward_model"])
    shutil.move(folder_of(cwd) / "model", cwd / "tiny")
    return SimpleNamespace(cwd=cwd, model=cwd / "tiny", job=job, folder=folder_of(cwd))


@pytest.fixture(scope="session")
def brief(chatty, tmp_path_factory):
    """The chat model, but that every third token or so is the end. One that was trained for four steps
    never ends within a test, and from answers that were cut off nothing is learned."""
    model, end = gpt.load_model(str(chatty.model)), gpt.Tokenizer("task").end
    with torch.no_grad():
        row = model.wte.weight[end]
        model.ln_f.bias += 5.5 * row / (row @ row)  # the end token's logit + 5.5: e^5.5 = 245, of 597
    folder = tmp_path_factory.mktemp("brief") / "tiny"
    gpt.save_model(model, folder)
    return SimpleNamespace(model=folder)


@pytest.fixture(scope="session")
def loads(request):
    """script -> the flags that name the tiny models it starts from."""

    def loads(script):
        def model(name):
            return request.getfixturevalue(name).model

        if script in ("gpt", "sft", "tools"):
            return [] if script == "gpt" else ["--load", model("base")]
        if script in CHASES:
            return ["--load", model("brief"), "--rm", model("judge")]
        return ["--load", model("chatty")]

    return loads


def folder_of(cwd):
    """The only folder under runs."""
    (folder,) = (Path(cwd) / "runs").iterdir()
    return folder


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def lines_of(path):
    return path.read_text().splitlines()


def last_shown(text, name):
    """The last number printed behind a name: "loss 6.071  right_sampled 0.000 ..." """
    return re.findall(rf"\b{re.escape(name)} (-?[\d.]+|nan)", text)[-1]


def copy_of_repo(to):
    to.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, to)
    shutil.copytree(REPO / "data", to / "data", ignore=shutil.ignore_patterns("__pycache__"))
    return to


# --- end to end ---


def check_folder(folder, steps):
    """What every finished run leaves behind, and nothing else."""
    names = {path.name for path in folder.iterdir()} - {"model"}
    # reasoning.py has a figure of its own; all others draw one where there are two runs to compare.
    drawn = {"figure.png"} if folder.name.startswith("reasoning") else set()
    assert names == {"config.json", "metrics.jsonl", "samples.md", "report.json"} | drawn
    config = json.loads((folder / "config.json").read_text())
    report = report_of(folder)
    assert report["config"] == config and report["seconds"] >= 0
    metrics = [json.loads(line) for line in lines_of(folder / "metrics.jsonl")]
    assert [m["step"] for m in metrics if "grad_norm" in m] == list(range(steps))
    assert "## Step" in (folder / "samples.md").read_text()
    return report, metrics


def test_base_end_to_end(base):
    report, metrics = check_folder(base.folder, 20)
    # Fewer steps than the mean is over: it must be the mean of those that there are.
    losses = [m["loss"] for m in metrics]
    assert report["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    model = gpt.load_model(str(base.model))
    assert not model.config.chat and model.config.n_layer == 1 and model.config.n_embd == 32
    assert "done in" in base.job.out and str(base.folder.name) in base.job.out


def test_sft_end_to_end(chatty):
    report, metrics = check_folder(chatty.folder, 4)
    assert gpt.load_model(str(chatty.model)).config.chat
    for name in ("loss", "right_sampled", "right_greedy", "ended", "length", "pass@1", "pass@64"):
        assert last_shown(chatty.job.out, name) == f"{report[name]:.3f}", name
    evaluations = [m for m in metrics if "right_sampled" in m]
    assert [m["step"] for m in evaluations] == [2, 4]
    assert evaluations[-1]["right_sampled"] == report["right_sampled"]
    # The reader sees the format before and after.
    assert "before: the base model continues text" in chatty.job.out


def test_dpo_end_to_end(run, chatty, tmp_path):
    job = run(tmp_path, "dpo", "--load", chatty.model, *TINY["dpo"])
    folder = folder_of(tmp_path)
    report, metrics = check_folder(folder, 4)
    assert gpt.load_model(str(folder / "model")).config.chat
    for name in ("held_out_pairs", "right_sampled", "right_greedy", "ended", "length", "kl"):
        assert last_shown(job.out, name) == f"{report[name]:.3f}", name
    evaluations = [m for m in metrics if "held_out_pairs" in m]
    assert [m["step"] for m in evaluations] == [0, 2, 4]
    # Policy and reference start as the same model.
    assert evaluations[0]["kl"] == 0 and metrics[1]["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("loss", ["cdpo", "robust", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_runs(run, chatty, tmp_path, loss):
    run(tmp_path, "dpo", "--load", chatty.model, *TINY["dpo"], "--loss", loss)
    check_folder(folder_of(tmp_path), 4)


def test_reward_model_end_to_end(judge, chatty):
    report, metrics = check_folder(judge.folder, 4)
    for name in (
        "loss",
        "held_out_pairs",
        "corr_length",
        "corr_right",
        "terse_beats_padded",
        "policy_samples",
    ):
        assert last_shown(judge.job.out, name) == f"{report[name]:.3f}", name
    evaluations = [m for m in metrics if "held_out_pairs" in m]
    assert [m["step"] for m in evaluations] == [0, 2, 4]
    assert evaluations[-1]["held_out_pairs"] == report["held_out_pairs"]
    # As sure as it is, so often it is right: printed, for a person to read. And completions with scores.
    assert re.search(r"calibration on held-out pairs: says \d+% of \d+: right \d+%", judge.job.out)
    assert (judge.folder / "samples.md").read_text().count("(score ") == 3 * 5

    # The zero and the unit: the very answers of the SFT model that it was normalised on score 0 on average,
    # with a standard deviation of 1; without them it scores something else.
    scorer, model = gpt.load_scorer(str(judge.model)), gpt.load_model(str(chatty.model))
    tok, problems = gpt.Tokenizer("task"), task.problems(5, 0, "test")
    questions, golds = [p.text for p in problems], [p.answer for p in problems]
    answers = gpt.solve(model, tok, questions, golds, 1.0, gpt.rng(0, "answers"))
    scores = gpt.final_scores(scorer, [tok.prompt(q) for q in questions], [a.ids for a in answers])
    assert abs(scores.mean().item()) < 1e-3 and 0.8 < scores.std().item() < 1.2
    assert scorer.std != 1.0


PROMISED = {  # what the dashboard shows at every step
    "ppo": "reward gold kl entropy clip_fraction approx_kl explained_variance length unfinished".split(),
    "grpo": "reward gold kl entropy clip_fraction loss length ended".split(),
}


@pytest.mark.parametrize("script", CHASES)
def test_chase_end_to_end(run, loads, brief, tmp_path, script):
    job = run(tmp_path, script, *loads(script), *TINY[script])
    folder = folder_of(tmp_path)
    report, metrics = check_folder(folder, 3)
    assert gpt.load_model(str(folder / "model")).config.chat
    weights = [path / "model.safetensors" for path in (folder / "model", brief.model)]
    assert not filecmp.cmp(*weights, shallow=False)
    evaluations = [m for m in metrics if "test_gold" in m]
    assert [m["step"] for m in evaluations] == [0, 3]
    for name in ("gold", "reward", "kl", "length", "ended"):
        assert report[name] == evaluations[-1][f"test_{name}"] == report[f"end_{name}"]
        assert report[f"start_{name}"] == evaluations[0][f"test_{name}"]
        assert last_shown(job.out, f"test_{name}") == f"{report[name]:.3f}"
    steps = [m for m in metrics if "grad_norm" in m]
    assert all(name in m for m in steps for name in PROMISED[script])
    assert all(m["grad_norm"] > 0 for m in steps)  # some answers end: there is something to learn
    # Policy and reference start as the same model.
    assert evaluations[0]["test_kl"] == 0 and steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert report["batch_reward"] == steps[-1]["reward"]
    assert "## Beside each other" in (folder / "samples.md").read_text()


def test_an_upper_clip_of_zero_is_one(run, loads, tmp_path):
    """--clip_high 0 is a value: above 1 every ratio is clipped, not only those above 1 + clip."""
    flags = [*loads("grpo"), *TINY["grpo"], "--epochs", "2", "--lr", "1e-3"]
    clipped = []
    for name, more in (("wide", []), ("none", ["--clip_high", "0"])):
        (tmp_path / name).mkdir()
        run(tmp_path / name, "grpo", *flags, *more)
        metrics = check_folder(folder_of(tmp_path / name), 3)[1]
        clipped.append([m["clip_fraction"] for m in metrics if "grad_norm" in m][0])
    assert clipped[1] > clipped[0]


@pytest.mark.parametrize("script", CHASES)
def test_the_first_update_of_a_batch_is_on_policy(run, loads, tmp_path, script):
    """One update a batch, and a temperature that one of the passes could forget: the ratio is 1 and nothing
    is clipped. (PPO: the loss is minus the mean of whitened advantages, so 0.)"""
    flags = ["--temperature", "0.7", "--lr", "1e-3"]
    flags += ["--epochs", "1", "--minibatch", "4"] if script == "ppo" else []
    run(tmp_path, script, *loads(script), *TINY[script], *flags)
    for m in check_folder(folder_of(tmp_path), 3)[1]:
        if "grad_norm" in m:
            assert m["clip_fraction"] == 0
            off = (m["policy_loss"], m["approx_kl"]) if script == "ppo" else (m["ratio_error"],)
            assert off == pytest.approx([0] * len(off), abs=1e-4)
            assert m["kl"] != 0 or m["step"] == 0


def test_what_was_cut_off_teaches_nothing(run, chatty, judge, tmp_path):
    """GRPO, answers of one token, which hardly ever is the end: they count in the baseline, and there is no
    gradient. PPO: they have a fixed bad score in place of the model's."""
    flags = ["--load", chatty.model, "--rm", judge.model]
    for script in CHASES:
        run(tmp_path, script, *flags, *TINY[script], "--max_tokens", "1")
    ppos, grpos = (
        [m for line in lines_of(next(tmp_path.glob(f"runs/{script}-*/metrics.jsonl")))
         if "grad_norm" in (m := json.loads(line))]
        for script in CHASES
    )  # fmt: skip
    cut_off = [m for m in grpos if m["ended"] == 0]
    assert cut_off and all(m["loss"] == 0 and m["grad_norm"] == 0 for m in cut_off)
    assert all(m["reward"] == grpo.CUT_OFF for m in cut_off)
    cut_off = [m for m in ppos if m["unfinished"] == 1]
    assert cut_off and all(m["reward"] == ppo.CUT_OFF for m in cut_off)


@pytest.mark.parametrize(
    "flags",
    [
        "--loss grpo --reward checker",
        "--loss dr_grpo --reward mine --beta 0",
        "--epochs 2 --clip_high 0.28 --dtype bfloat16",
    ],
)
def test_other_ways_of_grpo(run, brief, loads, tmp_path, flags):
    load = ["--load", brief.model] if "--reward" in flags else loads("grpo")
    run(tmp_path, "grpo", *load, *TINY["grpo"], *flags.split())
    # One folder: who does not need a reward model does not make one.
    report, metrics = check_folder(folder_of(tmp_path), 3)
    assert report["reward"] == pytest.approx(metrics[-1]["test_reward"])
    if "checker" in flags:
        assert report["reward"] == report["gold"]
        assert all(m["reward"] == m["gold"] for m in metrics if "grad_norm" in m)


def test_other_ways_of_ppo(run, loads, tmp_path):
    flags = "--beta 0.05 --target_kl 0.5 --epochs 3 --dtype bfloat16".split()
    run(tmp_path, "ppo", *loads("ppo"), *TINY["ppo"], *flags)
    betas = [m["beta"] for m in check_folder(folder_of(tmp_path), 3)[1] if "beta" in m]
    # At the start there is no distance at all: the leash is loosened as fast as it may be, by 20 % in
    # 10000 answers; here by 4 of them.
    assert betas[0] == pytest.approx(0.05 * (1 - 0.2 * 4 / 10000), rel=1e-6)
    assert len(set(betas)) == 3


def test_reward_model_from_a_policys_samples(run, chatty, loads, tmp_path):
    """The tiny policy never is right, so there is no pair of its own: said, and trained on the others."""
    job = run(
        tmp_path, "reward_model", *loads("reward_model"), *TINY["reward_model"], "--policy", chatty.model
    )
    assert re.search(r"\d+ pairs from samples of .*, judged by the exact checker", job.out)
    check_folder(folder_of(tmp_path), 4)


def test_other_flags_other_folder(run, chatty, tmp_path):
    for flags in ([], ["--beta", "0.5"], ["--seed", "1"], ["--loss", "ipo"]):
        run(tmp_path, "dpo", "--load", chatty.model, *TINY["dpo"], *flags)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 4
    assert any("seed=1" in name for name in names) and any("beta=0_5" in name for name in names)
    for folder in (tmp_path / "runs").iterdir():
        check_folder(folder, 4)  # none was written into by a later run


def test_same_flags_same_bytes(run, base, tmp_path):
    run(tmp_path, "gpt", *TINY["gpt"])
    for name in ("metrics.jsonl", "samples.md"):
        assert (folder_of(tmp_path) / name).read_bytes() == (base.folder / name).read_bytes()
    ours = folder_of(tmp_path) / "model" / "model.safetensors"
    assert filecmp.cmp(ours, base.model / "model.safetensors", shallow=False)


def test_talk_to_a_checkpoint(run, base, chatty, tmp_path):
    prompt = "Leo has 7 eggs."
    job = run(tmp_path, "gpt", "--load", base.model, "--prompt", prompt, "--tokens", 8)
    assert job.out.startswith(prompt) and len(job.out) > len(prompt) + 1
    again = run(tmp_path, "gpt", "--load", base.model, "--prompt", prompt, "--tokens", 8)
    assert again.out == job.out
    job = run(tmp_path, "gpt", "--load", chatty.model, "--prompt", prompt, "--temperature", 0)
    assert job.out.strip() and not job.out.startswith(prompt)  # an answer, not a continuation
    assert not (tmp_path / "runs").exists()


def test_talk_to_a_run_folder(run, base, tmp_path):
    """The form in gpt.py's first lines: --load runs/base, the folder of the run."""
    shutil.copytree(base.folder, tmp_path / "runs" / "base")
    shutil.copytree(base.model, tmp_path / "runs" / "base" / "model")
    job = run(tmp_path, "gpt", "--load", "runs/base", "--prompt", "Leo has 7 eggs. ")
    assert job.out.startswith("Leo has 7 eggs. ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(run, tmp_path, script):
    job = run(tmp_path, script, "--help")
    steps = "--max_steps" if script in CHASES else "--steps"
    if script == "reasoning":
        steps = "--train_problems"  # each is seen once
    for flag in (steps, "--seed", "--device", "--dtype", "--resume", "--load", "--lr"):
        assert flag in job.out
    if script != "gpt":
        breaks = __import__(script).BREAKS
        for name, what in breaks.items():
            lines = [line for line in job.out.splitlines() if line.split()[:1] == [name]]
            # A break and what it shows, in one line ("%%" is argparse's way to write "%").
            assert len(lines) == 1 and what.replace("%%", "%") in lines[0], name


def test_bfloat16_runs(run, chatty, tmp_path):
    run(tmp_path, "dpo", "--load", chatty.model, *TINY["dpo"], "--dtype", "bfloat16")
    check_folder(folder_of(tmp_path), 4)


def test_sft_micro_batches_are_the_same_objective(run, base, tmp_path):
    for flags in ([], ["--micro_batch", "3"]):
        run(tmp_path, "sft", "--load", base.model, *TINY["sft"], *flags)
    whole, parts = (
        [json.loads(line)["loss"] for line in lines_of(folder / "metrics.jsonl") if "loss" in line]
        for folder in sorted((tmp_path / "runs").iterdir())
    )
    assert parts == pytest.approx(whole, abs=1e-4)


# --- breaks ---


def test_break_flip_labels(run, chatty, tmp_path):
    repo = copy_of_repo(tmp_path / "repo")
    flags = ["--break", "flip_labels", "--load", chatty.model, *TINY["dpo"]]
    job = run(tmp_path, "dpo", *flags, repo=repo)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    broken, clean = sorted(folders, key=lambda path: "flip_labels" not in path.name)
    assert "flip_labels" in broken.name and "flip_labels" not in clean.name
    check_folder(clean, 4)
    C, B = report_of(clean), report_of(broken)

    # The table: every row shows both reports.
    rows = [re.findall(r"(-?\d+\.\d{3})\b", line) for line in job.out.splitlines()]
    rows = [tuple(row) for row in rows if len(row) == 2]
    for name in ("loss", "margin", "accuracy", "held_out_pairs", "right_sampled", "kl"):
        assert (f"{C[name]:.3f}", f"{B[name]:.3f}") in rows, name
    assert re.search(r"^ +clean +flip_labels$", job.out, re.M)

    # A verdict whichever way it goes: a model this small reproduces nothing.
    assert "The documented signature of flip_labels: " in job.out
    assert ("NOT reproduced" in job.out) == (not B["reproduced"])
    assert B["claims"] and B["reproduced"] == all(B["claims"].values())
    assert "The cure to try:" in job.out
    png = (broken / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000

    # Once more: the clean run is taken from the disk, with the same numbers in the table.
    before = (clean / "report.json").stat().st_mtime_ns
    again = run(tmp_path, "dpo", *flags, repo=repo)
    assert "already there" in again.out
    assert (clean / "report.json").stat().st_mtime_ns == before

    # After an edit of the script the clean run on disk is one of another script.
    with open(repo / "dpo.py", "a") as file:
        file.write("# an edit\n")
    edited = run(tmp_path, "dpo", *flags, repo=repo)
    assert "already there" not in edited.out
    assert (clean / "report.json").stat().st_mtime_ns != before


@pytest.mark.parametrize("name", ["likelihood_displacement", "label_noise", "low_beta"])
def test_other_dpo_breaks(run, chatty, tmp_path, name):
    job = run(tmp_path, "dpo", "--break", name, "--load", chatty.model, *TINY["dpo"])
    assert f"The documented signature of {name}: " in job.out


@pytest.mark.parametrize("name", list(sft.BREAKS))
def test_sft_breaks(run, base, tmp_path, name):
    # too_many_epochs takes a fiftieth of the demonstrations: so 100 at least
    flags = [*TINY["sft"], "--demos", "100", "--steps", "3"]
    job = run(tmp_path, "sft", "--break", name, "--load", base.model, *flags)
    assert f"The documented signature of {name}: " in job.out


@pytest.mark.parametrize("name", ["length_bias", "sycophancy"])
def test_reward_model_breaks(run, loads, tmp_path, name):
    flags = [*loads("reward_model"), *TINY["reward_model"]]
    job = run(tmp_path, "reward_model", "--break", name, *flags)
    assert f"The documented signature of {name}: " in job.out
    C, B = (report_of(path) for path in sorted((tmp_path / "runs").iterdir(), key=lambda p: name in p.name))
    assert "reproduced" in B and "reproduced" not in C
    # What the annotators like shows in their own verdicts: how often the longer side was chosen.
    if name == "length_bias":
        assert B["longer_chosen"] > C["longer_chosen"]


@pytest.fixture(scope="session")
def hacked(run, loads, tmp_path_factory):
    """script -> (flags, current directory, job) of a finished `--break reward_hacking` from 1 step to 100."""
    made = {}

    def get(script):
        if script not in made:
            cwd = tmp_path_factory.mktemp(f"hacked-{script}")
            flags = ["--break", "reward_hacking", *loads(script), *TINY[script], "--max_steps", "1"]
            made[script] = flags, cwd, run(cwd, script, *flags)
        return made[script]

    return get


def clean_and_broken(cwd):
    """The two folders under runs, of which one is a break's."""
    one, two = (cwd / "runs").iterdir()
    return (two, one) if (one / "figure.png").exists() else (one, two)


@pytest.mark.parametrize("script", CHASES)
def test_break_reward_hacking(hacked, script):
    """The short run carried on: a hundred times as many steps, and not a byte of the first ones differs."""
    _, cwd, job = hacked(script)
    clean, broken = clean_and_broken(cwd)
    check_folder(clean, 1)
    B = report_of(broken)
    metrics = [json.loads(line) for line in lines_of(broken / "metrics.jsonl")]
    assert [m["step"] for m in metrics if "grad_norm" in m] == list(range(100))
    evaluations = [m["step"] for m in metrics if "test_gold" in m]
    assert evaluations[0] == 0 and evaluations[-1] == 100 and B["peak_step"] in evaluations
    # All but the short run's last line, its evaluation at the end, where the long one has none.
    assert lines_of(broken / "metrics.jsonl")[:2] == lines_of(clean / "metrics.jsonl")[:-1]
    assert "The documented signature of reward_hacking: " in job.out
    assert B["claims"] and B["reproduced"] == all(B["claims"].values())
    png = (broken / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000


SLOW_TO_SHOW = {"reward_hacking"}  # tested above


# Found, and reported; whoever repairs it moves the case up. (strict: a case that passes is an error)
@pytest.mark.parametrize(
    "script, name",
    [
        (script, name)
        for script, module in (("ppo", ppo), ("grpo", grpo))
        for name in module.BREAKS
        if name not in SLOW_TO_SHOW
    ],
)
def test_breaks_of_a_chase(run, loads, tmp_path, script, name):
    job = run(tmp_path, script, "--break", name, *loads(script), *TINY[script])
    assert f"The documented signature of {name}: " in job.out
    clean, broken = clean_and_broken(tmp_path)
    C, B = ([json.loads(line) for line in lines_of(f / "metrics.jsonl")] for f in (clean, broken))
    first = [next(m for m in metrics if "grad_norm" in m) for metrics in (C, B)]
    if name in ("no_kl", "k1_kl_loss"):  # nothing differs until there is a distance
        assert first[0]["reward"] == first[1]["reward"] and first[0]["kl"] == first[1]["kl"]
    if name == "sign_flip":
        # What has ended changes its sign; what was cut off costs what it cost.
        cut_off = 2 * ppo.CUT_OFF * first[0]["unfinished"]
        assert first[0]["reward"] + first[1]["reward"] == pytest.approx(cut_off, abs=1e-5)
    if name == "temperature_mismatch":
        assert first[0]["ratio_error"] < 1e-4 < 1e-2 < first[1]["ratio_error"]


@pytest.mark.parametrize("name", ["reward_hacking", "no_kl"])
def test_breaks_with_a_true_reward(run, chatty, tmp_path, name):
    """The negative control, asked for in the most natural way."""
    flags = ["--load", chatty.model, *TINY["grpo"], "--reward", "checker", "--max_steps", "1"]
    job = run(tmp_path, "grpo", "--break", name, *flags)
    assert f"The documented signature of {name}: " in job.out


# --- reasoning.py ---


def test_reasoning_end_to_end(run, brief, tmp_path):
    job = run(tmp_path, "reasoning", "--load", brief.model, *TINY["reasoning"])
    folder = folder_of(tmp_path)
    report, metrics = check_folder(folder, 4)
    evaluations = [m for m in metrics if "held_out" in m]
    assert [m["step"] for m in evaluations] == [0, 2, 4]
    assert evaluations[-1]["held_out"] == report["held_out"]
    curves = [m for m in metrics if "n" in m]
    assert [m["n"] for m in curves] == [1, 2, 4]
    # With one answer there is nothing to choose; the oracle is never below anybody, and rises.
    ways = ("vote", "vote_of_top", "weighted_vote", "best_of_n")
    assert len({round(curves[0][name], 9) for name in (*ways, "oracle")}) == 1
    assert all(m["oracle"] >= m[name] for m in curves[-1:] for name in ways)
    assert all(a["oracle"] <= b["oracle"] and a["score"] <= b["score"] for a, b in zip(curves, curves[1:]))
    assert all(a["tokens"] * 2 == pytest.approx(b["tokens"]) for a, b in zip(curves, curves[1:]))
    for name in ways:
        assert report[name] == curves[-1][name]
        assert f"{report[name]:.3f}" in job.out
    assert report["chosen"] == report["vote_of_top"]
    assert report["repaired"] + report["spoiled"] <= report["rewritten"] <= 1
    assert (folder / "figure.png").stat().st_size > 5000
    samples = (folder / "samples.md").read_text()
    assert samples.count("(verifier: ") == 3 * 2 and samples.count("highest score (") == 5
    # The verifier is a reward model like any other.
    assert gpt.load_scorer(str(folder)).score.weight.abs().sum() > 0


def test_the_verifier_learns_from_the_states_it_should(run, brief, tmp_path):
    """The same verifier and the same solutions at step 0, and the loss is that of other states."""
    first = {}
    for level in ("token", "solution"):
        (tmp_path / level).mkdir()
        run(tmp_path / level, "reasoning", "--load", brief.model, *TINY["reasoning"], "--level", level)
        first[level] = check_folder(folder_of(tmp_path / level), 4)[1][:2]
    (before, token), (same, solution) = first["token"], first["solution"]
    assert before == same and token["loss"] != solution["loss"]


@pytest.mark.parametrize("name", ["overoptimize_verifier", "self_correct"])
def test_reasoning_breaks(run, brief, tmp_path, name):
    """The verifier and the answers are the clean run's: only what is made of the scores is another thing."""
    job = run(tmp_path, "reasoning", "--break", name, "--load", brief.model, *TINY["reasoning"])
    assert f"The documented signature of {name}: " in job.out
    clean, broken = clean_and_broken(tmp_path)
    assert filecmp.cmp(*(f / "model" / "model.safetensors" for f in (clean, broken)), shallow=False)
    C, B = report_of(clean), report_of(broken)
    same = ("held_out", "vote", "vote_of_top", "weighted_vote", "best_of_n", "oracle", "score", "peak_n")
    assert all(C[key] == pytest.approx(B[key]) for key in same)
    if name == "overoptimize_verifier":
        assert C["chosen"] == C["vote_of_top"] and B["chosen"] == B["best_of_n"]
        assert all(C[key] == B[key] for key in ("revised", "repaired", "spoiled", "rewritten"))
    assert (broken / "figure.png").stat().st_size > 5000


def test_no_cot_makes_its_own_model(run, tmp_path):
    """From nothing at all: the base model, two fine-tuned ones, and the answers of one have no working."""
    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO), script="reasoning"))
    job = run(tmp_path, "chain", "--break", "no_cot", repo=tmp_path)
    assert "The documented signature of no_cot: " in job.out
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"base", "sft", "sft-answer_only=True", "reasoning", "reasoning-no_cot"}
    for name in ("reasoning", "reasoning-no_cot"):
        made = "sft-answer_only=True" if "no_cot" in name else "sft"
        losses = [m["loss"] for m in map(json.loads, (tmp_path / "runs" / made / "metrics.jsonl").open())
                  if "loss" in m]  # fmt: skip
        assert report_of(tmp_path / "runs" / name)["sft_loss"] == pytest.approx(losses[-1])


def test_sft_on_answers_alone(run, base, tmp_path):
    """The first loss of --answer_only is that of the untrained model on "#### 29" and the end token."""
    run(tmp_path, "sft", "--load", base.model, *TINY["sft"], "--answer_only")
    _, metrics = check_folder(folder_of(tmp_path), 4)
    model, tok = gpt.load_model(str(base.model)), gpt.Tokenizer("task")
    texts = task.demonstrations(32, 0)
    chosen = [texts[i] for i in gpt.batch_indices(32, 8, 0, 0)]
    examples = [(tok.prompt(p.text), tok.answer("####" + text.split("####")[1])) for p, text in chosen]
    assert all(len(answer) <= 4 for _, answer in examples)
    ids, labels = sft.collate(examples, tok.pad)
    total, count = sft.sft_loss(model(ids), labels)
    assert metrics[0]["loss"] == pytest.approx((total / count).item(), rel=1e-4)


def test_published_solutions(run, tmp_path):
    row = {"question": "?", "ground_truth": "A: 18"}
    row |= {"small": {"solution": "A: 17", "is_correct": False}}
    row |= {"large": {"solution": "A: 18", "is_correct": True}}
    (tmp_path / "solutions.jsonl").write_text(json.dumps(row) + "\n")
    out = run(tmp_path, "reasoning", "--data", "solutions.jsonl").out
    assert "1 problems, 2 models" in out and "agrees with 2 of 2" in out
    assert not (tmp_path / "runs").exists()


# --- tools.py: several runs in one command ---

TOOLS = [flag for flag in TINY["tools"] if flag != "--plain"]
RL = [*TOOLS, "--rl", "3", "--prompts", "2", "--group", "2"]


def test_tools_end_to_end(run, base, tmp_path):
    """The run with the tool, then the control; a second time the control is taken from the disk."""
    job = run(tmp_path, "tools", "--load", base.model, *TOOLS)
    clean, plain = sorted((tmp_path / "runs").iterdir(), key=lambda folder: "plain" in folder.name)
    for folder in (clean, plain):
        report, metrics = check_folder(folder, 4)
        evaluations = [m for m in metrics if "right_sampled" in m]
        assert [m["step"] for m in evaluations] == [2, 4]
        assert evaluations[-1]["right_sampled"] == report["right_sampled"]
    report = report_of(clean)
    assert report["canary"] == 0 and report["wrong_results"] == 0 and "canary" not in report_of(plain)
    assert gpt.load_model(str(clean / "model")).config.chat
    assert "with the tool" in job.out and "runtime switched off" in job.out
    before = (plain / "report.json").stat().st_mtime_ns
    job = run(tmp_path, "tools", "--load", base.model, *TOOLS)
    assert "already there" in job.out and (plain / "report.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", list(tools.BREAKS))
def test_tools_breaks(run, base, tmp_path, name):
    flags = RL if name == "tool_overuse" else TOOLS
    job = run(tmp_path, "tools", "--break", name, "--load", base.model, *flags)
    assert f"The documented signature of {name}: " in job.out
    clean, broken = clean_and_broken(tmp_path)
    assert (broken / "figure.png").stat().st_size > 5000
    if name in ("unsafe_eval", "faulty_tool"):  # the tool is another one, the model is the same
        assert filecmp.cmp(*(f / "model" / "model.safetensors" for f in (clean, broken)), shallow=False)
        return
    C, B = ([json.loads(line) for line in lines_of(f / "metrics.jsonl")] for f in (clean, broken))
    first = [next(m for m in metrics if "grad_norm" in m) for metrics in (C, B)]
    if name != "tool_overuse":  # both masks are measured on the same tokens
        assert first[0]["loss"] == first[0]["loss_own"] == pytest.approx(first[1]["loss_own"], rel=1e-6)
        assert first[1]["loss"] != first[1]["loss_own"]


def test_tools_break_that_has_no_rl(start, base, tmp_path):
    flags = ["--break", "unsafe_eval", "--load", base.model, *RL]
    refused(start(tmp_path, "tools", *flags).wait(), "unsafe_eval", "--rl")
    flags = ["--load", base.model, *RL, "--group", "1"]
    refused(start(tmp_path, "tools", *flags).wait(), "--group")


@pytest.mark.parametrize("rl", [False, True])
def test_tools_interrupted_and_resumed(start, run, base, tmp_path, rl):
    """Ctrl-C in the second of two runs, and in RL: what was printed goes on, and ends in the same bytes."""
    flags = ["--load", base.model, *(RL if rl else TOOLS)]
    flags += ["--rl", "30"] if rl else ["--demos", "640", "--eval_every", "60"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    run(tmp_path / "whole", "tools", *flags)
    job = start(tmp_path / "parts", "tools", *flags)
    where = "*rl=30*" if rl else "*plain*"

    def lines():
        files = list((tmp_path / "parts" / "runs").glob(where + "/metrics.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else -1

    assert job.until(lambda: lines() >= 25)
    job.send(signal.SIGINT)
    assert job.wait().code == 130, job.out + job.err
    assert "Traceback" not in job.err and "Saved at step" in job.out
    run(tmp_path / "parts", "tools", *flags, "--resume")
    for folder in (tmp_path / "whole" / "runs").iterdir():
        same_bytes(folder, tmp_path / "parts" / "runs" / folder.name)


def test_tools_data(run, tmp_path):
    rows = [
        {"question": "How many?", "answer": f"He has <<{call}>>.\n#### 5"}
        for call in ("2+3=5", "2*3=5", "x=5")
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(tmp_path, "tools", "--data", "mine.jsonl").out
    for words in ("3 solutions", "identical", "another number", "refused: ?syntax", "in 1 of 3 solutions"):
        assert words in out
    assert not (tmp_path / "runs").exists()


# --- what is missing is made ---


# By flags of sft.py the base model cannot be made tiny; its defaults can be.
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
if {script!r} != "sft":
    shrink(sft, demos=32, batch=8, problems=5, eval_every=2)
    shrink(reward_model, pairs=16, steps=4, batch=4, problems=5)
    shrink(grpo, prompts=2, group=2, max_tokens=4, problems=5)
    shrink(reasoning, n=4, problems=5, train_problems=8, samples=3, batch=2)
    shrink(tools, demos=32, batch=8, problems=5, eval_every=2, max_tokens=30, prompts=2, group=2)
{script}.main()
"""


def test_missing_reward_model_is_made(run, tmp_path):
    """grpo.py from nothing at all: base, SFT model, reward model. Then reward_model.py's distribution_shift,
    which takes all that is there, and makes the policy that is trained against the reward model."""
    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO), script="grpo"))
    job = run(tmp_path, "chain", "--max_steps", "2", repo=tmp_path)
    missing = [line.split(" is missing")[0] for line in job.out.splitlines() if " is missing" in line]
    assert missing == ["runs/sft", "runs/base", "runs/reward_model"]
    assert isinstance(gpt.load_scorer(str(tmp_path / "runs" / "reward_model")), gpt.Scorer)
    job = run(tmp_path, "chain", "--max_steps", "2", "--lr", "1e-3", repo=tmp_path)
    assert "is missing" not in job.out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/report.json")}

    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO), script="reward_model"))
    job = run(tmp_path, "chain", "--break", "distribution_shift", repo=tmp_path)
    assert "The documented signature of distribution_shift: " in job.out
    (line,) = [line for line in job.out.splitlines() if " is missing" in line]
    assert "grpo.py" in line and "distribution_shift" in line  # against *this* reward model
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    C, B = (report_of(tmp_path / "runs" / f"reward_model{end}") for end in ("", "-distribution_shift"))
    # Nothing about the reward model is different; somebody used it.
    for name in ("loss", "held_out_pairs", "terse_beats_padded", "corr_length"):
        assert B[name] == C[name]
    weights = [tmp_path / "runs" / f"reward_model{end}" / "model" / "model.safetensors"
               for end in ("", "-distribution_shift")]  # fmt: skip
    assert filecmp.cmp(*weights, shallow=False)


def test_missing_base_is_made(run, tmp_path):
    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO), script="sft"))
    job = run(tmp_path, "chain", *TINY["sft"], repo=tmp_path)
    (line,) = [line for line in job.out.splitlines() if "is missing" in line]
    assert line.startswith("runs/base is missing. Making it with `python gpt.py`")
    assert gpt.load_model(str(tmp_path / "runs" / "base")).config.n_layer == 1
    report = (tmp_path / "runs" / "base" / "report.json").read_bytes()

    # A second run finds it, one of another seed needs its own.
    job = run(tmp_path, "chain", *TINY["sft"], "--lr", "1e-3", repo=tmp_path)
    assert "is missing" not in job.out
    assert (tmp_path / "runs" / "base" / "report.json").read_bytes() == report
    assert "before the code changed" not in job.out
    # One that other code has made is used, and the reader is told.
    old = report.replace(json.loads(report)["config"]["code"].encode(), b"another")
    (tmp_path / "runs" / "base" / "report.json").write_bytes(old)
    job = run(tmp_path, "chain", *TINY["sft"], "--lr", "2e-3", repo=tmp_path)
    assert "runs/base is from before the code changed" in job.out
    job = run(tmp_path, "chain", *TINY["sft"], "--seed", "3", repo=tmp_path)
    assert "runs/base-seed=3 is missing. Making it with `python gpt.py --seed 3`" in job.out
    assert (tmp_path / "runs" / "base-seed=3" / "report.json").is_file()


def test_missing_tool_model_is_made(run, tmp_path):
    """tools.py --rl from nothing at all: the base model, the tool model, and no control."""
    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO), script="tools"))
    job = run(tmp_path, "chain", "--rl", "2", repo=tmp_path)
    assert "runs/base is missing" in job.out and "without its control" in job.out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"base", "tools", "tools-rl=2"}
    job = run(tmp_path, "chain", "--break", "tool_overuse", "--rl", "2", repo=tmp_path)
    assert "is missing" not in job.out and "The documented signature of tool_overuse: " in job.out


def test_half_made_base_is_not_taken(tmp_path, monkeypatch, capsys):
    """A base run that was interrupted has no report: it is made, and with --resume continued."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "base"
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    commands = []
    monkeypatch.setattr(gpt, "main", lambda argv: commands.append(argv))
    args = gpt.parse("sft", sft.parser(), ["--resume", "--device", "cpu"], sft.BREAKS)
    assert gpt.made_by("gpt", args, "a minute") == "runs/base/model"
    assert "runs/base is missing" in capsys.readouterr().out
    assert commands == [["--device", "cpu", "--resume"]]


# --- kill and resume ---

LONG = {  # several checkpoints and evaluations
    "gpt": [*TINY["gpt"], "--steps", "130"],
    "sft": [*TINY["sft"], "--demos", "1040", "--eval_every", "40"],
    "dpo": [*TINY["dpo"], "--steps", "60", "--eval_every", "20"],
    "reward_model": [*TINY["reward_model"], "--steps", "130", "--eval_every", "40"],
    "ppo": [*TINY["ppo"], "--max_steps", "60"],
    "grpo": [*TINY["grpo"], "--max_steps", "60"],
    "reasoning": [*TINY["reasoning"], "--train_problems", "240", "--eval_every", "40"],
    "tools": [*TINY["tools"], "--demos", "1040", "--eval_every", "40"],
}
CHECKPOINT = {
    "gpt": 50,
    "sft": 50,
    "dpo": 25,
    "reward_model": 50,
    "ppo": 25,
    "grpo": 25,
    "reasoning": 50,
    "tools": 50,
}


@pytest.fixture(scope="session")
def long_run(run, loads, tmp_path_factory):
    """script -> (flags, folder of an uninterrupted run)."""
    made = {}

    def get(script):
        if script not in made:
            flags = [*loads(script), *LONG[script]]
            cwd = tmp_path_factory.mktemp(f"long-{script}")
            run(cwd, script, *flags)
            made[script] = flags, folder_of(cwd)
        return made[script]

    return get


def same_bytes(one, two):
    for name in ("config.json", "metrics.jsonl", "samples.md", "model/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    strip = {"seconds": None, "peak_gb": None}  # all that may differ
    assert report_of(one) | strip == report_of(two) | strip
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def lines_logged(cwd):
    files = list((cwd / "runs").glob("*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else -1


@pytest.mark.parametrize("script", CHASES)
def test_a_short_run_is_the_beginning_of_a_long_one(run, loads, long_run, tmp_path, script):
    """The step size is constant and no random number depends on how long the run will be: what "carried on"
    means in `--break reward_hacking`. Only the evaluation at the short run's end is its own."""
    _, long = long_run(script)
    run(tmp_path, script, *loads(script), *TINY[script])
    short, whole = (lines_of(folder / "metrics.jsonl") for folder in (folder_of(tmp_path), long))
    assert short[:-1] == whole[: len(short) - 1] and len(short) == 5
    assert "test_gold" in short[-1]


@pytest.mark.parametrize("script", SOME)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_resumed(start, long_run, tmp_path, script, seed):
    flags, whole = long_run(script)
    every, rng = CHECKPOINT[script], random.Random(f"{script} {seed}")
    # Once before the first checkpoint; then around where checkpoints are written; then anywhere.
    moments = [rng.randint(0, every - 5), every - 1, rng.randint(every + 1, 2 * every)]
    moments += [2 * every - 1, 2 * every + rng.randint(2, 9)]
    killed = 0
    for moment in moments:
        job = start(tmp_path, script, *flags, *(["--resume"] if killed else []))
        if killed:  # what an earlier process logged does not count
            since = r"nothing to resume|going on at step \d+"
            assert job.until(lambda job=job, since=since: re.search(since, job.out))
        job.until(lambda moment=moment: lines_logged(tmp_path) >= moment)
        time.sleep(rng.random() * 0.02)
        job.send(signal.SIGKILL)
        killed += job.wait().code == -signal.SIGKILL
        if job.code == 0:
            break
    assert killed >= 3
    if job.code != 0:
        job = start(tmp_path, script, *flags, "--resume").wait()
        assert job.code == 0, job.err
        assert "going on at step" in job.out
    same_bytes(whole, folder_of(tmp_path))


@pytest.mark.parametrize("script", SOME)
def test_interrupted_and_resumed(start, server, long_run, tmp_path, script):
    flags, whole = long_run(script)
    for moment in (7, CHECKPOINT[script] + 5):
        job = start(tmp_path, script, *flags, *(["--resume"] if moment > 7 else []))
        assert job.until(lambda moment=moment: lines_logged(tmp_path) >= moment)
        job.send(signal.SIGINT)
        assert job.wait().code == 130, job.out + job.err
        assert "Traceback" not in job.err
        assert not (folder_of(tmp_path) / "report.json").exists()
    (line,) = [line for line in job.out.splitlines() if line.startswith("Saved at step")]
    command = shlex.split(line.split("Go on with:")[1])
    assert command[0] == "python" and command.count("--resume") == 1
    # Exactly the printed command finishes the run.
    job = Job(server, tmp_path, script, command[2:], Path(command[1]).parent, {}).wait()
    assert job.code == 0, job.err
    same_bytes(whole, folder_of(tmp_path))


def test_second_interrupt_stops_at_once(start, chatty, tmp_path):
    # Step 0 is an evaluation on many problems, which lasts longer than anybody waits.
    job = start(tmp_path, "dpo", "--load", chatty.model, *TINY["dpo"], "--problems", "4000")
    assert job.until(lambda: (tmp_path / "runs").exists())
    time.sleep(0.3)
    job.send(signal.SIGINT)
    assert job.until(lambda: "once more: stop at once" in job.out)
    job.send(signal.SIGINT)
    job.wait()
    assert job.code not in (0, None) and "Saved at step" not in job.out
    assert lines_logged(tmp_path) == 0  # the evaluation was not waited for, and nothing was saved
    assert not list(tmp_path.glob("runs/*/resume.safetensors"))


def test_interrupt_while_preparing(start, base, tmp_path):
    """Before the loop there is nothing to save: the script ends, in one line."""
    job = start(tmp_path, "sft", "--load", base.model, "--demos", "300000")
    time.sleep(2)  # imports take a tenth of a second here, the demonstrations half a minute
    job.send(signal.SIGINT)
    job.wait()
    assert job.code not in (0, None) and "Traceback" not in job.err


def interrupted_run(start, cwd, script, flags, repo=REPO):
    """A run killed after its first checkpoint."""
    job = start(cwd, script, *flags, repo=repo)
    assert job.until(lambda: list(cwd.glob("runs/*/resume.safetensors")))
    job.send(signal.SIGKILL)
    assert job.wait().code == -signal.SIGKILL
    return folder_of(cwd)


def test_killed_while_writing_a_checkpoint(start, run, long_run, tmp_path):
    flags, whole = long_run("dpo")
    folder = interrupted_run(start, tmp_path, "dpo", flags)
    checkpoint = (folder / "resume.safetensors").read_bytes()
    (folder / "resume.safetensors.tmp").write_bytes(checkpoint[: len(checkpoint) // 2])
    # The log's last line may be half a line as well.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 59, "lo')
    job = run(tmp_path, "dpo", *flags, "--resume")
    assert "going on at step" in job.out
    same_bytes(whole, folder)


def test_damaged_checkpoint(start, run, long_run, tmp_path):
    flags, _ = long_run("dpo")
    folder = interrupted_run(start, tmp_path, "dpo", flags)
    checkpoint = (folder / "resume.safetensors").read_bytes()
    (folder / "resume.safetensors").write_bytes(checkpoint[: len(checkpoint) // 2])
    job = start(tmp_path, "dpo", *flags, "--resume").wait()
    refused(job, "resume")


def test_resume_of_a_changed_script(start, run, long_run, tmp_path):
    flags, _ = long_run("dpo")
    repo = copy_of_repo(tmp_path / "repo")
    (tmp_path / "work").mkdir()
    interrupted_run(start, tmp_path / "work", "dpo", flags, repo)
    with open(repo / "dpo.py", "a") as file:
        file.write("# an edit\n")
    job = start(tmp_path / "work", "dpo", *flags, "--resume", repo=repo).wait()
    refused(job, "the script has changed")


def test_a_clean_run_is_made_anew_when_what_it_came_from_has_changed(run, brief, judge, tmp_path):
    """Same flags, same code, another reward model in the same folder: the comparison must not be with a run
    that chased the old one."""
    shutil.copytree(judge.model, tmp_path / "rm")
    flags = ["--break", "no_kl", "--load", brief.model, "--rm", "rm", *TINY["grpo"]]
    run(tmp_path, "grpo", *flags)
    assert "already there" in run(tmp_path, "grpo", *flags).out
    scorer = gpt.load_scorer(str(tmp_path / "rm"))
    with torch.no_grad():
        scorer.score.weight.neg_()
    gpt.save_model(scorer, tmp_path / "rm")
    assert "already there" not in run(tmp_path, "grpo", *flags).out
    assert "already there" in run(tmp_path, "grpo", *flags).out


def test_resume_from_another_model(start, chatty, long_run, tmp_path):
    """Two paths that end alike share a folder's name: the checkpoint must know the difference."""
    shutil.copytree(chatty.model, tmp_path / "a" / "model")
    shutil.copytree(chatty.model, tmp_path / "b" / "a" / "model")
    interrupted_run(start, tmp_path, "dpo", ["--load", "a/model", *LONG["dpo"]])
    job = start(tmp_path, "dpo", "--load", "b/a/model", *LONG["dpo"], "--resume").wait()
    if job.code == 0:  # a folder of its own is as good
        assert len(list((tmp_path / "runs").iterdir())) == 2
    else:
        refused(job, "--load differs")


def test_resume_of_nothing_and_of_a_finished_run(run, base, tmp_path):
    job = run(tmp_path, "gpt", *TINY["gpt"], "--resume")
    assert "nothing to resume" in job.out
    report = (folder_of(tmp_path) / "report.json").read_bytes()
    job = run(tmp_path, "gpt", *TINY["gpt"], "--resume")
    # A finished run is not thrown away by a --resume too many.
    assert (folder_of(tmp_path) / "report.json").read_bytes() == report


def test_resume_of_a_finished_break(run, hacked, tmp_path):
    """A thousand steps are not thrown away by a --resume too many."""
    flags, cwd, _ = hacked("grpo")
    shutil.copytree(cwd / "runs", tmp_path / "runs")
    _, broken = clean_and_broken(tmp_path)
    before = (broken / "model" / "model.safetensors").stat().st_mtime_ns
    job = run(tmp_path, "grpo", *flags, "--resume")
    assert job.out.count("already there") == 2
    assert (broken / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_two_reward_models_whose_paths_end_alike(start, run, chatty, judge, tmp_path):
    """Their runs share a folder's name: the second must not replace the first."""
    for folder in ("a", "b/a"):
        shutil.copytree(judge.model, tmp_path / folder / "model")
    flags = ["--load", chatty.model, *TINY["grpo"]]
    run(tmp_path, "grpo", *flags, "--rm", "a/model")
    before = report_of(folder_of(tmp_path))
    job = start(tmp_path, "grpo", *flags, "--rm", "b/a/model").wait()
    reports = [report_of(folder) for folder in (tmp_path / "runs").iterdir()]
    assert before in reports  # in a folder of its own, or refused
    assert (job.code == 0) == (len(reports) == 2)


def test_interrupted_break_is_resumed(start, run, chatty, tmp_path):
    """Ctrl-C in the clean half, then in the broken half: the same command with --resume finishes."""
    flags = ["--break", "flip_labels", "--load", chatty.model, *LONG["dpo"]]
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, "dpo", *flags)
    parts = tmp_path / "parts"
    parts.mkdir()
    for half in ("dpo-load*", "dpo-flip_labels*"):
        job = start(parts, "dpo", *flags, *(["--resume"] if "flip" in half else []))
        assert job.until(
            lambda half=half: any(
                path.read_bytes().count(b"\n") > 30 for path in parts.glob(f"runs/{half}/metrics.jsonl")
            )
        )
        if "flip" not in half:
            assert not list(parts.glob("runs/dpo-flip_labels*"))
        job.send(signal.SIGINT)
        assert job.wait().code == 130, job.err
    run(parts, "dpo", *flags, "--resume")
    for folder in (whole / "runs").iterdir():
        same_bytes(folder, parts / "runs" / folder.name)


# --- what cannot go on says why ---


def refused(job, *words):
    """The script ended with an error that a reader can act on: one cause, no traceback."""
    everything = job.out + job.err
    assert job.code not in (0, None), everything
    assert job.code > 0, f"died of signal {-job.code}"
    assert "Traceback" not in job.err, job.err[-1500:]
    for word in words:
        assert word in everything, f"{word!r} is not in:\n{everything}"


@pytest.mark.parametrize("script", SOME)
def test_loss_that_is_not_finite(start, loads, tmp_path, script):
    flags = [*loads(script), *LONG[script]]
    if script in CHASES:
        flags += ["--epochs", "2"]  # a second update on the same answers: nothing is sampled in between
    job = start(tmp_path, script, *flags, "--lr", "1e30").wait()
    refused(job, "step", "--lr")
    (line,) = [line for line in job.err.splitlines() if "stopped" in line]
    assert re.search(r"\w+ is (nan|inf) at step \d+", line)
    assert not list(tmp_path.glob("runs/*/report.json"))


@pytest.mark.parametrize("script", SOME)
def test_weights_that_are_not_finite_when_they_are_sampled(start, loads, tmp_path, script):
    """The first update ruins the weights, and what comes next is no loss but an evaluation."""
    once = {"gpt": ["--steps", "1"], "ppo": ["--epochs", "1", "--minibatch", "4"], "grpo": []}
    flags = once.get(script, ["--eval_every", "1"])
    job = start(tmp_path, script, *loads(script), *TINY[script], *flags, "--lr", "1e30").wait()
    refused(job, "--lr")


# {base}, {chat} and {rm} stand for the tiny models, {tmp} for the test's folder.
GOOD_PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
WRONG = [
    ("gpt", "--load {tmp}/nothing", "nothing"),
    ("sft", "--load {tmp}/nothing", "nothing"),
    ("dpo", "--load {tmp}/nothing", "nothing"),
    ("gpt", "--load {tmp}/notjson", "notjson"),
    ("gpt", "--load {tmp}/list", "list"),
    ("gpt", "--load {tmp}/truncated", "truncated"),
    ("sft", "--load {tmp}/wrongshape", "wrongshape"),
    ("gpt", "--steps 0", "--steps"),
    ("sft", "--steps 0", "--steps"),
    ("dpo", "--steps 0", "--steps"),
    ("gpt", "--steps many", "--steps"),
    ("gpt", "--batch -1", "--batch"),
    ("sft", "--batch -1", "--batch"),
    ("dpo", "--batch -1", "--batch"),
    ("sft", "--load {base} --problems 0", "--problems"),
    ("dpo", "--load {chat} --problems 0", "--problems"),
    ("dpo", "--load {chat} --problems -3", "--problems"),
    ("sft", "--load {base} --demos 0", "--demos"),
    ("sft", "--load {base} --epochs 0", "--epochs"),
    ("sft", "--load {base} --micro_batch 0", "--micro_batch"),
    ("sft", "--load {base} --eval_every 0", "--eval_every"),
    ("dpo", "--load {chat} --eval_every 0", "--eval_every"),
    ("dpo", "--load {chat} --loss robust --noise 0.5", "--noise"),
    ("dpo", "--load {chat} --beta 0", "--beta"),
    ("dpo", "--load {chat} --lr 0", "--lr"),
    ("dpo", "--load {chat} --lr -1", "--lr"),
    ("dpo", "--loss ppo", "--loss"),
    ("sft", "--break nonsense", "nonsense"),
    ("dpo", "--break nonsense", "nonsense"),
    ("gpt", "--device nonsense", "nonsense"),
    ("dpo", "--device nonsense", "nonsense"),
    ("sft", "--device cuda", "cuda"),
    ("gpt", "--dtype float16", "--dtype"),
    ("gpt", "--n_embd 33", "--n_embd"),
    ("gpt", "--n_layer 0", "--n_layer"),
    ("gpt", "--length 200", "--length"),
    ("gpt", "--load {base} --prompt ''", "--prompt"),
    ("gpt", "--load {chat} --prompt ''", "--prompt"),
    ("gpt", "--load {base} --prompt '" + "eggs " * 200 + "'", "context"),
    ("gpt", "--load {chat} --prompt '" + "eggs " * 200 + "'", "context"),
    ("gpt", "--load {base} --tokens 0", "--tokens"),
    ("gpt", "--load {base} --temperature -1", "--temperature"),
    ("gpt", "--load {base} --top_p 0", "--top_p"),
    ("gpt", "--load {base} --top_k -2", "--top_k"),
    ("gpt", "--load gpt2", "gpt2"),
    ("sft", "--load gpt2", "gpt2"),
    ("dpo", "--load gpt2", "gpt2"),
    ("sft", "--data {tmp}/good.jsonl", "TIKTOKEN_CACHE_DIR"),
    ("dpo", "--load {chat} --data {tmp}/missing.jsonl", "missing.jsonl"),
    ("sft", "--load {base} --data {tmp}/missing.jsonl", "missing.jsonl"),
    ("dpo", "--load {chat} --data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    ("sft", "--load {base} --data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    ("dpo", "--load {chat} --data {tmp}/columns.jsonl", "columns.jsonl, line 1"),
    ("dpo", "--load {chat} --data {tmp}/empty.jsonl", "empty.jsonl"),
    ("dpo", "--load {chat} --data nonsense", "nonsense"),
    ("dpo", "--load {chat} --data {tmp}", "{tmp}"),
    ("dpo", "--load {chat} --data ultrafeedback", "hub"),
    ("dpo", "--load {chat} --data {tmp}/good.jsonl", "pairs"),  # two pairs are too few
    ("dpo", "--load {chat} --data {tmp}/same.jsonl --batch 2", "prompt"),  # nothing to hold out
    ("dpo", "--load {chat} --data {tmp}/long.jsonl --batch 2", "--max_tokens"),
    ("dpo", "--load {chat} --data {tmp}/short.jsonl --batch 2 --max_tokens 5", "--max_tokens"),
    ("sft", "--load {base} --data {tmp}/long.jsonl", "context"),
    ("sft", "--load {base} --data {tmp}/nopair.jsonl", "nopair.jsonl"),
    ("dpo", "--load {chat} --data {tmp}/gsm8k.jsonl --batch 2", "pair"),
    # --- reward_model.py
    ("reward_model", "--load {tmp}/nothing", "nothing"),
    ("reward_model", "--load {tmp}/truncated", "truncated"),
    ("reward_model", "--load gpt2", "gpt2"),
    ("reward_model", "--load {chat} --policy {tmp}/nothing", "nothing"),
    ("reward_model", "--steps 0", "--steps"),
    ("reward_model", "--pairs 0", "--pairs"),
    ("reward_model", "--problems -1", "--problems"),
    ("reward_model", "--lr -1", "--lr"),
    ("reward_model", "--annotator nonsense", "--annotator"),
    ("reward_model", "--break nonsense", "nonsense"),
    ("reward_model", "--load {chat} --pairs 3", "--batch 4"),
    ("reward_model", "--load {chat} --break length_bias --data {tmp}/good.jsonl", "--data"),
    ("reward_model", "--load {chat} --data {tmp}/missing.jsonl", "missing.jsonl"),
    ("reward_model", "--load {chat} --data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    ("reward_model", "--load {chat} --data {tmp}/columns.jsonl", "columns.jsonl, line 1"),
    ("reward_model", "--load {chat} --data {tmp}/empty.jsonl", "empty.jsonl"),
    ("reward_model", "--load {chat} --data nonsense", "nonsense"),
    ("reward_model", "--load {chat} --data ultrafeedback", "hub"),
    ("reward_model", "--load {chat} --data {tmp}/good.jsonl", "pairs"),  # two pairs are too few
    ("reward_model", "--load {chat} --data {tmp}/same.jsonl --batch 2", "prompt"),  # nothing to hold out
    ("reward_model", "--load {chat} --data {tmp}/long.jsonl --batch 2", "--max_tokens"),
    ("reward_model", "--load {chat} --data {tmp}/gsm8k.jsonl --batch 2", "pair"),
    # --- ppo.py and grpo.py
    ("ppo", "--load {tmp}/nothing", "nothing"),
    ("grpo", "--load {tmp}/nothing", "nothing"),
    ("grpo", "--load gpt2", "gpt2"),
    ("ppo", "--load {chat} --rm {tmp}/nothing", "nothing"),
    ("grpo", "--load {chat} --rm {tmp}/nothing", "nothing"),
    ("ppo", "--load {chat} --rm {chat}", "reward_model.py"),  # a language model
    ("grpo", "--load {chat} --rm {chat}", "reward_model.py"),
    ("ppo", "--load {chat} --rm gpt2", "gpt2"),
    ("ppo", "--load {chat} --rm {tmp}/truncated_rm", "truncated_rm"),
    ("grpo", "--load {chat} --rm {tmp}/notjson_rm", "notjson_rm"),
    ("ppo", "--load {chat} --rm {rm} --beta -0.1", "--beta"),
    ("grpo", "--load {chat} --rm {rm} --beta -0.1", "--beta"),
    ("ppo", "--max_steps 0", "--max_steps"),
    ("grpo", "--max_steps 0", "--max_steps"),
    ("ppo", "--prompts 0", "--prompts"),
    ("ppo", "--minibatch 0", "--minibatch"),
    ("ppo", "--epochs 0", "--epochs"),
    ("grpo", "--group 0", "--group"),
    ("grpo", "--max_tokens 0", "--max_tokens"),
    ("grpo", "--problems 0", "--problems"),
    ("ppo", "--lr 0", "--lr"),
    ("grpo", "--temperature -1", "--temperature"),
    ("grpo", "--loss sum", "--loss"),
    ("grpo", "--reward nonsense", "--reward"),
    ("ppo", "--break nonsense", "nonsense"),
    ("grpo", "--break nonsense", "nonsense"),
    ("grpo", "--load {chat} --rm {rm} --group 1", "--group"),  # a standard deviation of one number is NaN
    ("grpo", "--load {chat} --rm {rm} --temperature 0", "--temperature"),  # scores are divided by it
    ("ppo", "--load {chat} --rm {rm} --temperature 0", "--temperature"),
    ("grpo", "--load {chat} --rm {rm} --max_tokens 200", "context"),
    ("ppo", "--load {chat} --rm {rm} --max_tokens 200", "context"),
    ("ppo", "--load {chat} --rm {rm} --clip -1", "--clip"),
    ("ppo", "--load {chat} --rm {rm} --lam 2", "--lam"),
    ("ppo", "--load {chat} --rm {rm} --target_kl -1", "--target_kl"),
    ("ppo", "--load {chat} --rm {tmp}/two_labels_rm", "two_labels_rm"),
    ("ppo", "--load {chat} --rm {tmp}/gpt2_rm", "tokenizer"),  # ids of another vocabulary are other words
    ("grpo", "--load {chat} --rm {tmp}/gpt2_rm", "tokenizer"),
    ("grpo", "--load {rm} --rm {rm}", "cannot write"),
    ("ppo", "--load {chat} --rm {rm} --problems 1", "--problems"),
    ("grpo", "--load {chat} --rm {rm} --problems 1", "--problems"),
    ("ppo", "--load {chat} --rm {rm} --beta 0 --target_kl 6", "--target_kl"),
    ("ppo", "--load {chat} --rm {rm} --beta 0 --break no_kl", "no_kl"),
    ("grpo", "--load {chat} --rm {rm} --beta 0 --break no_kl", "no_kl"),
    ("grpo", "--load {chat} --loss grpo --break length_norm", "length_norm"),
    # --- reasoning.py
    ("reasoning", "--load {tmp}/nothing", "nothing"),
    ("reasoning", "--n 0", "--n"),
    ("reasoning", "--load {chat} --train_problems 1", "--train_problems"),
    ("reasoning", "--load {chat} --max_tokens 100", "context"),
    ("reasoning", "--load {chat} --level word", "--level"),
    ("reasoning", "--break no_cot --load {chat}", "no_cot"),
    ("reasoning", "--load {chat} --n 12", "--n"),
    ("reasoning", "--load {rm}", "cannot write"),
    ("reasoning", "--data gsm8k", "gsm8k"),
    ("reasoning", "--data {tmp}/models.jsonl", "models.jsonl, line 2"),
    ("reasoning", "--data {tmp}/missing.jsonl", "missing.jsonl"),
    ("reasoning", "--data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    # --- tools.py
    ("tools", "--load {tmp}/nothing", "nothing"),
    ("tools", "--load {tmp}/truncated", "truncated"),
    ("tools", "--load gpt2", "gpt2"),
    ("tools", "--steps 0", "--steps"),
    ("tools", "--demos 0", "--demos"),
    ("tools", "--problems -1", "--problems"),
    ("tools", "--lr 0", "--lr"),
    ("tools", "--rl 0", "--rl"),
    ("tools", "--load {base} --max_tokens 100", "context"),
    ("tools", "--break nonsense", "nonsense"),
    ("tools", "--load {base} --break faulty_tool", "--plain"),  # TINY has it
    ("tools", "--load {base} --rl 3", "--plain"),
    ("tools", "--data {tmp}/missing.jsonl", "missing.jsonl"),
    ("tools", "--data {tmp}/bad.jsonl", "bad.jsonl, line 2"),
    ("tools", "--data {tmp}", "{tmp}"),
]


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory, base, judge):
    """A folder with everything that can be wrong about a file."""
    tmp = tmp_path_factory.mktemp("wrong")

    def write(name, rows):
        (tmp / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("good.jsonl", [GOOD_PAIR, GOOD_PAIR | {"prompt": "Ho"}])
    (tmp / "bad.jsonl").write_text(json.dumps(GOOD_PAIR) + '\n{"prompt": "Hi", "chos\n')
    write("columns.jsonl", [{"text": "Hi"}])
    (tmp / "empty.jsonl").write_text("")
    write("same.jsonl", [GOOD_PAIR | {"chosen": f"{i}"} for i in range(9)])
    write("short.jsonl", [GOOD_PAIR | {"prompt": f"{i}"} for i in range(9)])
    write("long.jsonl", [GOOD_PAIR | {"chosen": "eggs " * (200 + i)} for i in range(9)])
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    write("nopair.jsonl", [{"chosen": turns, "rejected": "\n\nHuman: e\n\nAssistant: f"}])
    write("gsm8k.jsonl", [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(9)])

    for name in ("notjson", "list", "truncated", "wrongshape"):
        shutil.copytree(base.model, tmp / name)
    (tmp / "notjson" / "config.json").write_text("{")
    (tmp / "list" / "config.json").write_text("[]")
    weights = (tmp / "truncated" / "model.safetensors").read_bytes()
    (tmp / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((tmp / "wrongshape" / "config.json").read_text())
    (tmp / "wrongshape" / "config.json").write_text(json.dumps(config | {"n_embd": 64}))

    published = {"question": "?", "ground_truth": "A: 18"}
    entry = {"solution": "A: 17", "is_correct": False}
    write("models.jsonl", [published | {"one": entry}, published | {"other": entry}])

    for name in ("notjson_rm", "truncated_rm", "two_labels_rm", "gpt2_rm"):
        shutil.copytree(judge.model, tmp / name)
    config = json.loads((tmp / "gpt2_rm" / "config.json").read_text())
    (tmp / "gpt2_rm" / "config.json").write_text(json.dumps(config | {"tokenizer": "gpt2"}))
    (tmp / "notjson_rm" / "config.json").write_text("{")
    weights = (tmp / "truncated_rm" / "model.safetensors").read_bytes()
    (tmp / "truncated_rm" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    # A classifier of transformers that has two classes: scores, but not one.
    weights = load_file(tmp / "two_labels_rm" / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, tmp / "two_labels_rm" / "model.safetensors", {"format": "pt"})
    return tmp


def no_network(tmp):
    """No cache to read, and a proxy that refuses at once: waiting for a time-out is not the test."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp / "hf"),
        "TIKTOKEN_CACHE_DIR": str(tmp / "tiktoken"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "",
        "no_proxy": "",
    }


@pytest.mark.parametrize("script, flags, word", WRONG, ids=[f"{s} {f[:60]}" for s, f, _ in WRONG])
def test_wrong_input(start, base, chatty, judge, wrong_files, tmp_path, script, flags, word):
    fields = {"base": base.model, "chat": chatty.model, "rm": judge.model, "tmp": wrong_files}
    flags = shlex.split(flags.format(**fields))
    tiny = [*TINY[script]]
    for flag in flags:  # what the test sets counts, so it comes last; but help the slow ones end
        if flag.startswith("--") and flag in tiny:
            at = tiny.index(flag)
            del tiny[at : at + 2]
    job = start(tmp_path, script, *tiny, *flags, env=no_network(tmp_path)).wait()
    refused(job, word.format(**fields))
    # The cause stands at the end, where a reader looks, and is not a page.
    last = job.err.strip().splitlines()[-1]
    assert word.format(**fields) in last, last
    assert not list(tmp_path.glob("runs/*/report.json"))


# --- real data ---


@pytest.mark.slow  # the checks above on files of realistic size: half a minute
@pytest.mark.skipif(not REAL, reason="REAL_DATA_DIR names no folder with the public files")
@pytest.mark.parametrize(
    "name",
    [
        "ultrafeedback/eval.jsonl",
        "hh-rlhf/harmless-base-test.jsonl.gz",
        "gsm8k/example_model_solutions.jsonl",
    ],
)
def test_real_data(run, tmp_path, name):
    env = {"TIKTOKEN_CACHE_DIR": f"{REAL}/tiktoken"}
    data = ["--data", f"{REAL}/{name}"]
    job = run(tmp_path, "sft", *data, "--steps", "2", "--batch", "2", env=env)
    folder = folder_of(tmp_path)
    assert report_of(folder)["loss"] == pytest.approx(10.8, abs=0.3)  # log 50261
    shutil.move(folder / "model", tmp_path / "tiny")
    shutil.rmtree(tmp_path / "runs")
    flags = ["--steps", "2", "--batch", "2", "--max_tokens", "96", "--problems", "2"]
    job = run(tmp_path, "dpo", "--load", "tiny", *data, *flags, env=env)
    assert re.search(r"\d+ pairs read,.* \d+ kept", job.out)
    report = report_of(folder_of(tmp_path))
    assert report["loss"] == pytest.approx(0.693, abs=0.02)
    assert ("right_sampled" in report) == name.startswith("gsm8k")
    assert "## Step" in (folder_of(tmp_path) / "samples.md").read_text()

    shutil.rmtree(tmp_path / "runs")
    flags = ["--steps", "2", "--batch", "2", "--max_tokens", "96"]
    job = run(tmp_path, "reward_model", "--load", "tiny", *data, *flags, env=env)
    assert re.search(r"\d+ pairs read,.* \d+ kept", job.out)
    assert "calibration on held-out pairs: " in job.out
    report, metrics = check_folder(folder_of(tmp_path), 2)
    assert all(0 <= m["held_out_pairs"] <= 1 for m in metrics if "held_out_pairs" in m)
    assert 0 <= report["longer_chosen"] <= 1  # of a handful of pairs
    assert "terse_beats_padded" not in report  # nobody knows the right answers here
    assert "(score " in (folder_of(tmp_path) / "samples.md").read_text()
    scorer = gpt.load_scorer(str(folder_of(tmp_path)))
    assert scorer.std > 0 and (scorer.mean, scorer.std) != (0.0, 1.0)
