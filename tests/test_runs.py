"""Tests of data/runs.py: random choices, flags, the record of a run. (test_scripts.py runs the scripts.)"""

import json
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch

import dpo
import gpt
import grpo
import ppo
from data import breaks, runs

# --- random choices ---


def test_rng_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=runs.rng(*key)).tolist()

    assert draw(0, "samples", 3) == draw(0, "samples", 3)
    keys = [(0,), (1,), (0, "samples", 3), (0, "samples", 4), (0, "other", 3), ("0",), (0, 3), (3, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    # The global generator is not used, or a resumed run would draw other numbers.
    state = torch.get_rng_state()
    draw(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_visits_each_example_once():
    """For any n and batch, also where a batch spans two epochs or more."""
    source = random.Random(0)
    for _ in range(30):
        n, batch, seed = source.randint(1, 40), source.randint(1, 50), source.randint(0, 5)
        steps = 4 * n // batch + 1
        visited = [i for s in range(steps) for i in runs.batch_indices(n, batch, s, seed)]
        epochs = [visited[i : i + n] for i in range(0, len(visited) - n + 1, n)]
        assert len(visited) == steps * batch and len(epochs) >= 3
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        if n > 10:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in its own order
        step = source.randrange(steps)  # one step alone is what it was in the sequence: --resume needs that
        assert runs.batch_indices(n, batch, step, seed) == visited[step * batch :][:batch]
    assert runs.batch_indices(40, 40, 0, 0) != runs.batch_indices(40, 40, 0, 1)


# --- flags ---


def parse(script, *argv):
    module = {"gpt": gpt, "dpo": dpo, "grpo": grpo, "ppo": ppo}[script]
    return runs.parse(script, module.parser(), ["--device", "cpu", *argv], breaks.of(script))


def test_folders():
    """Every flag that is not at its default is in the name; of a path the last two parts."""
    for argv, name in (
        ([], "grpo"),
        (["--break", "no_kl"], "grpo-no_kl-max_steps=250"),
        (["--break", "no_kl", "--max_steps", "7"], "grpo-no_kl-max_steps=7"),
        (["--max_steps", "10", "--resume"], "grpo"),  # at its default; and a flag that changes no result
        (["--lr", "1e-4", "--load", "a/runs/x.y/model", "--seed", "3"], "grpo-load=x_y-model-lr=0_0001-seed=3"),
    ):
        assert str(runs.Run(parse("grpo", *argv)).folder) == os.path.join("runs", name)
    assert runs.Run(parse("gpt")).folder.name == "base"


@pytest.mark.parametrize(
    "line",
    [
        "grpo --prompts 0", "grpo --max_steps -1", "grpo --lr 0", "grpo --temperature 0", "grpo --beta -0.1",
        "ppo --gamma 1.1", "ppo --lam 2", "dpo --noise 0.5", "grpo --break nothing", "gpt --top_p 0",
        "grpo --device nowhere", "grpo --prompts many",
    ],
)  # fmt: skip
def test_impossible_values_are_refused(line, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*line.split())
    *usage, message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.split()[1] in message


def test_possible_values_are_not():
    assert parse("gpt", "--temperature", "0", "--top_k", "0").temperature == 0  # greedy, which training cannot be
    args = parse("ppo", "--seed", "0", "--beta", "0", "--gamma", "1")
    assert (args.seed, args.beta, args.script, args.break_) == (0, 0.0, "ppo", None)


# --- the record ---


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The record of a run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "READ", {})
    run = runs.Run(parse("grpo"))
    run.folder.mkdir(parents=True)
    run.bar = SimpleNamespace(set_postfix=lambda *a, **k: None)
    run.show = ()
    return run


def test_log_and_mean(run):
    """The mean over the last fifth of the lines that have the first name; evaluations have others."""
    for step in range(20):
        run.log(step, loss=torch.tensor(float(step)), norm=2.0 * step)
        run.log(step, accuracy=0.5)
    assert run.metrics[2:4] == [{"step": 1, "loss": 1.0, "norm": 2.0}, {"step": 1, "accuracy": 0.5}]
    assert run.mean("loss", "norm") == {"loss": 17.5, "norm": 35.0}
    assert run.mean("loss", last=1) == {"loss": 9.5} and run.mean("loss", last=0) == {"loss": 19.0}
    assert run.mean("nothing") == {}
    for value in (math.nan, math.inf):
        with pytest.raises(SystemExit, match=f"loss is {value} at step 20"):
            run.log(20, loss=value)
    assert len(run.metrics) == 40


def test_side_by_side(run, capsys):
    """Each prompt with its outputs at the start, the peak and the end. The outputs contain ####; step 1 is not step 10;
    the peak may be the start."""
    for step in (0, 1, 10, 11):
        run.samples(step, [(p, f"Sure! 7+{step}={7 + step}.\n#### {7 + step} (correct)") for p in ("Leo?", "Mia?")])
    before = (run.folder / "samples.md").read_text()
    run.side_by_side(start=0, peak=1, end=10)
    run.side_by_side(start=0, peak=0, end=1)
    text = (run.folder / "samples.md").read_text()
    assert text.startswith(before)

    def section(**steps):
        blocks = ["\n\n".join(f"{name}, step {s}:\nSure! 7+{s}={7 + s}.\n#### {7 + s} (correct)"
                              for name, s in steps.items())] * 2  # fmt: skip
        return [f"**{p}**\n\n```\n{block}\n```\n\n" for p, block in zip(("Leo?", "Mia?"), blocks)]

    first, second = text.removeprefix(before).split("## Side by side\n\n")[1:]
    assert first == "".join(section(start=0, peak=1, end=10))
    assert second == "".join(section(start=0, peak=0, end=1))


def test_a_run_is_reused_only_if_nothing_has_changed(run, monkeypatch):
    """Same flags, same code, and the models that it read are unchanged."""
    assert not run.finished()
    model = run.folder / "model.safetensors"
    model.write_text("weights")
    run.write_report({"config": run.config, "models": {str(model): runs.checksum(model)}})
    made = []

    def train(args):
        made.append(args)

    assert run.finished() and runs.run_once(train, parse("grpo"), reuse=True).folder == run.folder and not made
    runs.run_once(train, parse("grpo"), reuse=False)
    assert len(made) == 1
    assert not runs.Run(parse("grpo", "--seed", "1")).finished()
    model.write_text("other weights")
    assert not run.finished()
    model.write_text("weights")
    assert run.finished()
    monkeypatch.setattr(runs, "code_checksum", lambda script: "other code")
    assert not runs.Run(parse("grpo")).finished()


def test_checksum_of_the_code(tmp_path, monkeypatch):
    """What a run executes counts: the script, the scripts that it imports, gpt.py and data/. Other scripts do not, and
    nothing that only describes a finished run."""
    (tmp_path / "data").mkdir()
    files = ["gpt.py", "ppo.py", "grpo.py", "sft.py", "data/task.py", "data/task.tiktoken", "data/breaks.py"]
    for name in files:
        (tmp_path / name).write_text("import gpt\nfrom ppo import policy_loss\n" if name == "grpo.py" else "")
    monkeypatch.setattr(runs, "HERE", tmp_path)
    before, counted = runs.code_checksum("grpo"), []
    for name in files:
        old = (tmp_path / name).read_text()
        (tmp_path / name).write_text(old + "# changed")
        counted += [name] * (runs.code_checksum("grpo") != before)
        (tmp_path / name).write_text(old)
    assert counted == ["gpt.py", "ppo.py", "grpo.py", "data/task.py", "data/task.tiktoken"]


def test_write_atomically(tmp_path):
    """If writing fails halfway, the old file is still there, whole."""
    path = tmp_path / "report.json"
    runs.write_atomically(path, lambda p: p.write_text("old"))

    def fails(p):
        p.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        runs.write_atomically(path, fails)
    assert path.read_text() == "old"


def test_made_by_hands_on_seed_and_dtype(run, monkeypatch, capsys):
    """A seed stands for a whole chain of runs. An earlier run that is on disk is used, not made again."""
    made = []
    monkeypatch.setattr(grpo, "main", lambda argv: made.append(argv))
    args = parse("ppo", "--seed", "3", "--dtype", "bfloat16")
    where = runs.made_by("grpo", args, "a minute", ["--beta", "0"])
    (argv,) = made
    assert argv[:6] == ["--beta", "0", "--seed", "3", "--dtype", "bfloat16"]
    folder = runs.Run(parse("grpo", *argv)).folder
    assert where == str(folder / "model")
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"config": runs.Run(parse("grpo", *argv)).config, "models": {}}))
    assert runs.made_by("grpo", args, "a minute", ["--beta", "0"]) == where and len(made) == 1
    # ... unless a model that it was made from has changed.
    (folder / "report.json").write_text(
        json.dumps({"config": runs.Run(parse("grpo", *argv)).config, "models": {"gone": "0"}})
    )
    assert runs.made_by("grpo", args, "a minute", ["--beta", "0"]) == where and len(made) == 2


def test_a_run_is_not_reused_after_its_data_has_changed(tmp_path, monkeypatch):
    """Only the content counts: the same bytes under the same path are the same data."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text("one")
    first = runs.Run(parse("dpo", "--data", str(data)))
    first.folder.mkdir(parents=True)
    first.write_report({"config": first.config, "models": {}})
    assert first.finished()
    data.write_text("two")
    assert not runs.Run(parse("dpo", "--data", str(data))).finished()
    data.write_text("one")
    assert runs.Run(parse("dpo", "--data", str(data))).finished()


@pytest.mark.parametrize("flags", [["--lr", "nan"], ["--lr", "inf"], ["--seed", "1" * 20], ["--nll", "-1"]])
def test_numbers_that_are_none_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse("dpo", *flags)
    assert flags[0] in capsys.readouterr().err


def test_a_damaged_file_of_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.Run(parse("dpo"))
    run.folder.mkdir(parents=True)
    (run.folder / "report.json").write_text('{"config": {')
    with pytest.raises(SystemExit, match="report.json is damaged"):
        run.finished()


@pytest.mark.parametrize("error, words", [(OSError(28, "No space left on device", "runs/x"), "runs/x: No space"),
                                          (RuntimeError("can't allocate memory: you tried"), "--batch")])  # fmt: skip
def test_errors_of_the_machine_are_one_line(error, words, capsys):
    def train(args):
        raise error

    with pytest.raises(SystemExit, match=words):
        runs.run_once(train, parse("dpo"), reuse=False)
