"""Runs the scripts for test_scripts.py and test_resume.py.

Every run is a process of its own in a temporary current directory, because what is tested is what the shell sees: the
exit code, the two output streams, signals, and the files under ./runs.

PYTEST_DONT_REWRITE: the tests import this module before pytest loads its fixtures.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpt

REPO = Path(gpt.__file__).resolve().parent
SCRIPTS = ["gpt", "sft", "dpo", "reward_model", "ppo", "grpo", "reasoning", "tools"]
RL = ["ppo", "grpo"]

# Importing torch takes three seconds, and a tiny run takes half of one. So one process imports the libraries, and every
# run is a fork of it. A fork is a process like any other: it executes the script from its first line and has its own
# signals, streams and exit code. Before the fork, nothing of this repository is imported (the tests edit copies of it),
# no tensor is touched (a fork loses the threads that computed it), and huggingface_hub is not imported (it reads its
# environment variables when it is).
SERVER = r"""
import gc, json, os, runpy, signal, sys
import matplotlib.pyplot, safetensors.torch, tiktoken, torch, tqdm
import torch._dynamo, requests  # what torch.optim and tiktoken import late

# A test suite that runs in the background ignores Ctrl-C, and its children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.freeze()  # memory that the garbage collector does not visit stays shared between the processes
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
# Only a child gets here. It ends as the interpreter would, but skips the third of a second in which torch is unloaded.
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
except BaseException as error:
    sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class Server:
    def __init__(self):
        # One thread is faster at this size, and other work may share the machine. No GPU, because its sums may be taken
        # in another order each time, and these tests compare bytes.
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-u", "-c", SERVER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Job:
    """One running script. It has .out and .err, and after wait() .code."""

    count = 0

    def __init__(self, server, cwd, argv, env):
        Job.count += 1
        self.server, self.code = server, None
        self.logs = [Path(cwd) / f".{Job.count}.{name}" for name in ("out", "err")]
        out, err = map(str, self.logs)
        self.pid = server.ask(argv=list(map(str, argv)), cwd=str(cwd), env=env, out=out, err=err)

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
        """Wait for condition(). False if the script ended before."""
        begun = asked = time.time()
        while not condition():
            time.sleep(0.002)
            if time.time() - asked > 0.05:  # asking more often would slow the script down
                asked = time.time()
                if not self.alive():
                    return False
                assert asked - begun < timeout, f"waited in vain:\n{self.out}{self.err}"
        return True


class Folder:
    """The folder of one run."""

    def __init__(self, path):
        self.path, self.name, self.model = path, path.name, path / "model"
        self.weights = path / "model" / "model.safetensors"
        self.config = json.loads((path / "config.json").read_text())

    @property
    def report(self):
        return json.loads((self.path / "report.json").read_text())

    @property
    def samples(self):
        return (self.path / "samples.md").read_text()

    def metrics(self, name):
        """The logged lines that have this metric. All updates have grad_norm; evaluations have other names."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [m for m in lines if name in m]

    @property
    def updates(self):
        return self.metrics("grad_norm")

    def stamp(self):
        """Changes if the run is made anew."""
        return self.weights.stat().st_mtime_ns


def folders(cwd):
    """All runs under ./runs; the one of a break comes last. (runs/.locks and runs/index.html are no runs.)"""
    paths = [path for path in (Path(cwd) / "runs").iterdir() if not path.name.startswith(".") and path.is_dir()]
    found = [Folder(path) for path in paths]
    return sorted(found, key=lambda folder: (folder.config.get("break_") or "", folder.name))


def check_folder(folder, steps):
    """What every finished run leaves behind, and nothing else."""
    names = {"config.json", "metrics.jsonl", "samples.md", "samples.jsonl", "report.json", "page.html", "model"}
    if folder.name.startswith("reasoning") or folder.config.get("break_"):
        names.add("figure.png")
    found = {path.name for path in folder.path.iterdir()}
    assert found == names, found ^ names
    assert folder.report["config"] == folder.config and folder.report["seconds"] >= 0
    assert [m["step"] for m in folder.updates] == list(range(steps)), folder.updates
    assert "## Step" in folder.samples


def refused(job, *words):
    """The script ended with an error that a reader can act on: the cause in the last line, and no traceback."""
    assert job.code not in (0, None) and job.code > 0, f"exit code {job.code}\n{job.out}{job.err}"
    assert "Traceback" not in job.err, job.err[-1500:]
    last = job.err.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="session")
def start(server):
    """start(cwd, script, *flags): a Job."""

    def start(cwd, script, *flags, repo=REPO, env=None):
        if not {"--device", "--help"} & set(flags):
            flags = (*flags, "--device", "cpu")
        return Job(server, cwd, [Path(repo) / f"{script}.py", *flags], env or {})

    return start


@pytest.fixture(scope="session")
def run(start):
    """The same, and wait for its end. Fails if the exit code is not 0."""

    def run(cwd, script, *flags, **more):
        job = start(cwd, script, *flags, **more).wait()
        assert job.code == 0, f"exit code {job.code}\n{job.out}\n{job.err}"
        return job

    return run


# The smallest flags for everything. Few problems, but at least five: pass@k takes a fifth of them.
TINY = {
    "gpt": "--n_layer 1 --n_embd 32 --length 16 --batch 2 --steps 20",
    "sft": "--demos 32 --batch 8 --problems 5 --eval_every 2",
    "dpo": "--steps 4 --batch 4 --problems 5 --eval_every 2",
    "reward_model": "--pairs 16 --steps 4 --batch 4 --problems 5 --eval_every 2",
    "ppo": "--max_steps 3 --prompts 2 --answers 2 --minibatch 2 --max_tokens 8 --problems 5",
    "grpo": "--max_steps 3 --prompts 2 --group 3 --max_tokens 8 --problems 5",
    "reasoning": "--n 4 --problems 5 --train_problems 8 --samples 3 --batch 2 --eval_every 2",
    "tools": "--demos 32 --batch 8 --problems 5 --eval_every 2 --max_tokens 30",
}
STARTS_FROM = dict.fromkeys(RL, {"--load": "brief", "--rm": "scorer"})
STARTS_FROM |= {"gpt": {}, "sft": {"--load": "base"}, "tools": {"--load": "base"}, "reasoning": {"--load": "brief"}}


@pytest.fixture(scope="session")
def tiny(request):
    """tiny(script): the flags of the smallest run, from the tiny models that it needs. Later flags win."""

    def tiny(script):
        flags = TINY[script].split()
        for flag, model in STARTS_FROM.get(script, {"--load": "chat"}).items():
            flags += [flag, str(request.getfixturevalue(model).model)]
        return flags

    return tiny


@pytest.fixture(scope="session")
def make(run, tiny, tmp_path_factory):
    """make(script, *flags): the runs of one tiny command in a new directory. Has .job, .cwd, .folders; and .folder, the
    last of them."""

    def make(script, *flags, **more):
        cwd = tmp_path_factory.mktemp(script)
        job = run(cwd, script, *tiny(script), *flags, **more)
        found = folders(cwd)
        return SimpleNamespace(job=job, cwd=cwd, folders=found, folder=found[-1], model=found[-1].model)

    return make


@pytest.fixture(scope="session")
def base(make):
    """A base model."""
    return make("gpt")


@pytest.fixture(scope="session")
def chat(make):
    """The base model after sft.py."""
    return make("sft")


@pytest.fixture(scope="session")
def scorer(make):
    """A reward model, made from the chat model."""
    return make("reward_model")


@pytest.fixture(scope="session")
def brief(chat, tmp_path_factory):
    """The chat model, changed so that about every third token is the end token. After four steps of training it would
    never end an answer, all answers would get the same learned reward, and there would be nothing to learn."""
    model, end = gpt.load_model(str(chat.model)), gpt.Tokenizer("task").end
    with torch.no_grad():
        row = model.wte.weight[end]
        model.ln_f.bias += 5.5 * row / (row @ row)  # adds 5.5 to the end token's logit: e^5.5 = 245, of 597 tokens
    folder = tmp_path_factory.mktemp("brief") / "model"
    model.save(folder)
    return SimpleNamespace(model=folder)


def copy_of_repo(to):
    to.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, to)
    shutil.copytree(REPO / "data", to / "data", ignore=shutil.ignore_patterns("__pycache__", "results"))
    return to
