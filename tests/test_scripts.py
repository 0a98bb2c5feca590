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

import gpt
import sft

REPO = Path(__file__).resolve().parent.parent
REAL = os.environ.get("REAL_DATA_DIR")

# Importing torch takes three seconds and a tiny run takes half of one. So one process imports the
# libraries, and every run is a fork of it: a process of its own all the same, which executes the script
# from its first line, with signals, streams and exit code of its own. Nothing of this repository
# is imported before the fork (the tests edit copies of it), no tensor is touched (a fork loses the
# threads that computed it), and huggingface_hub is not imported either (it reads its environment
# variables when it is).
SERVER = r"""
import gc, json, os, runpy, sys, traceback
import matplotlib.pyplot, safetensors.torch, tiktoken, torch, tqdm
import torch._dynamo, requests  # what torch.optim and tiktoken import late

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
}


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
    assert names == {"config.json", "metrics.jsonl", "samples.md", "report.json"}
    config = json.loads((folder / "config.json").read_text())
    report = report_of(folder)
    assert report["config"] == config and report["seconds"] >= 0
    metrics = [json.loads(line) for line in lines_of(folder / "metrics.jsonl")]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(steps))
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


@pytest.mark.parametrize("script", ["gpt", "sft", "dpo"])
def test_help(run, tmp_path, script):
    job = run(tmp_path, script, "--help")
    for flag in ("--steps", "--seed", "--device", "--dtype", "--resume", "--load", "--lr"):
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


# --- what is missing is made ---


# By flags of sft.py the base model cannot be made tiny; its defaults can be.
CHAIN = """
import sys
sys.path.insert(0, {repo!r})
import gpt, sft

ours = gpt.parser
def tiny_parser():
    parser = ours()
    parser.set_defaults(steps=20, n_layer=1, n_embd=32, length=16, batch=2)
    return parser

gpt.parser = tiny_parser
sft.main()
"""


def test_missing_base_is_made(run, tmp_path):
    (tmp_path / "chain.py").write_text(CHAIN.format(repo=str(REPO)))
    job = run(tmp_path, "chain", *TINY["sft"], repo=tmp_path)
    (line,) = [line for line in job.out.splitlines() if "is missing" in line]
    assert line.startswith("runs/base is missing. Making it with `python gpt.py`")
    assert gpt.load_model(str(tmp_path / "runs" / "base")).config.n_layer == 1
    report = (tmp_path / "runs" / "base" / "report.json").read_bytes()

    # A second run finds it, one of another seed needs its own.
    job = run(tmp_path, "chain", *TINY["sft"], "--lr", "1e-3", repo=tmp_path)
    assert "is missing" not in job.out
    assert (tmp_path / "runs" / "base" / "report.json").read_bytes() == report
    job = run(tmp_path, "chain", *TINY["sft"], "--seed", "3", repo=tmp_path)
    assert "runs/base-seed=3 is missing. Making it with `python gpt.py --seed 3`" in job.out
    assert (tmp_path / "runs" / "base-seed=3" / "report.json").is_file()


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
}
CHECKPOINT = {"gpt": 50, "sft": 50, "dpo": 25}


@pytest.fixture(scope="session")
def long_run(run, base, chatty, tmp_path_factory):
    """script -> (flags, folder of an uninterrupted run)."""
    made = {}

    def get(script):
        if script not in made:
            loads = {"gpt": [], "sft": ["--load", base.model], "dpo": ["--load", chatty.model]}
            flags = [*loads[script], *LONG[script]]
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


@pytest.mark.parametrize("script", ["gpt", "sft", "dpo"])
@pytest.mark.parametrize("seed", [0, 1])
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


@pytest.mark.parametrize("script", ["gpt", "sft", "dpo"])
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


@pytest.mark.parametrize("script", ["gpt", "sft", "dpo"])
def test_loss_that_is_not_finite(start, base, chatty, tmp_path, script):
    flags = {
        "gpt": LONG["gpt"],
        "sft": ["--load", base.model, *LONG["sft"]],
        "dpo": ["--load", chatty.model, *LONG["dpo"]],
    }[script]
    job = start(tmp_path, script, *flags, "--lr", "1e30").wait()
    refused(job, "step", "--lr")
    (line,) = [line for line in job.err.splitlines() if "stopped" in line]
    assert re.search(r"\w+ is (nan|inf) at step \d+", line)
    assert not list(tmp_path.glob("runs/*/report.json"))


@pytest.mark.parametrize("script", ["gpt", "sft", "dpo"])
def test_weights_that_are_not_finite_when_they_are_sampled(start, base, chatty, tmp_path, script):
    """The first update ruins the weights, and what comes next is no loss but an evaluation."""
    flags = {
        "gpt": [*TINY["gpt"], "--steps", "1"],
        "sft": ["--load", base.model, *TINY["sft"], "--eval_every", "1"],
        "dpo": ["--load", chatty.model, *TINY["dpo"], "--eval_every", "1"],
    }[script]
    refused(start(tmp_path, script, *flags, "--lr", "1e30").wait(), "--lr")


# {base} and {chat} stand for the tiny models, {tmp} for the test's folder.
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
]


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory, base):
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
def test_wrong_input(start, base, chatty, wrong_files, tmp_path, script, flags, word):
    fields = {"base": base.model, "chat": chatty.model, "tmp": wrong_files}
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
