"""Tests of data/runs.py: random choices, flags, the record of a run. (test_scripts.py runs the scripts.)"""

import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import exits

import dpo
import gpt
import grpo
import ppo
import sft
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
    module = {"gpt": gpt, "dpo": dpo, "grpo": grpo, "ppo": ppo, "sft": sft}[script]
    return runs.parse(script, module.parser(), ["--device", "cpu", *argv], breaks.of(script))


def test_folders():
    """Every flag that is not at its default is in the name; of a path the last two parts."""
    for argv, name in (
        ([], "grpo"),
        (["--break", "no_kl"], "grpo-no_kl-max_steps=150"),
        (["--break", "no_kl", "--max_steps", "7"], "grpo-no_kl-max_steps=7"),
        (["--max_steps", "10", "--resume"], "grpo"),  # at its default; and a flag that changes no result
        (["--lr", "1e-4", "--load", "a/runs/x.y/model", "--seed", "3"], "grpo-load=x_y-model-lr=0_0001-seed=3"),
    ):
        assert str(runs.Run(parse("grpo", *argv)).folder) == os.path.join("runs", name)
    assert runs.Run(parse("gpt")).folder.name == "base"


LONG = "/数据/" + "很长的文件夹名" * 20 + "/" + "ファイル" * 50


@pytest.mark.parametrize(
    "values",
    [
        [LONG + "一", LONG + "二", LONG.replace("数", "敷"), "一", "二"],
        ["a:b", "a*b", "a_b", "a?b", 'a"b', "a|b", "a<b", "a b", "a b.", "a\\b", "é", "e\u0301", "a\nb", "\udcff"],
        ["m" * 41, "n" + "m" * 40, "a" + "m" * 500, "b" + "m" * 500],
    ],
    ids=["not Latin", "hostile", "long"],
)
def test_folder_names_are_short_and_safe(values, tmp_path, monkeypatch):
    """On every file system: few bytes, no characters that Windows refuses, and other values have other folders."""
    monkeypatch.chdir(tmp_path)
    names = [runs.Run(parse("dpo", *flags.split(), value)).folder.name for value in values for flags in
             ("--load", "--break flip_labels --data x --base y --lr 0.001 --load")]  # fmt: skip
    names += [runs.Run(parse("dpo", "--load", v, "--data", v, "--base", v, "--seed", "3")).folder.name for v in values]
    for name in names:
        assert re.fullmatch("[A-Za-z0-9_=-]+", name) and len(name) <= 150 and name.startswith("dpo-"), name
        Path(name).mkdir()  # fails if it exists
    assert sum(name.startswith("dpo-flip_labels-") for name in names) == len(values)


def test_a_flag_after_the_150th_character_still_counts():
    flags = [word for name in ("load", "data", "base") for word in (f"--{name}", name * 20)]
    flags += "--beta 0.25 --noise 0.2 --nll 0.5 --steps 1000 --batch 16 --max_tokens 256".split()
    names = [runs.Run(parse("dpo", *flags, "--seed", seed)).folder.name for seed in ("1", "2")]
    assert names[0] != names[1] and all(len(name) == 150 for name in names)


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


def saved(run):
    """A run's model, as far as this file looks at it: two files."""
    (run.folder / "model").mkdir(parents=True, exist_ok=True)
    for name in runs.MODEL_FILES:
        (run.folder / "model" / name).write_text("{}")


def test_a_loop_of_a_second_shows_no_bar(capsys):
    assert list(runs.progress(range(0, 9, 4), "answers")) == [0, 4, 8]
    assert list(runs.progress("ab", "scores")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


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
    saved(run)
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


@pytest.mark.parametrize("capabilities, lines", [({"avx512_f": True, "avx512_bf16": False}, 1), ({"bf16": True}, 0)])
def test_bfloat16_without_instructions_is_said_once(monkeypatch, capsys, capabilities, lines):
    runs.say_if_bfloat16_is_slow.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    parse("dpo")
    assert not capsys.readouterr().out
    for script in ("sft", "dpo"):
        parse(script, "--dtype", "bfloat16")
    assert capsys.readouterr().out.count("no faster than float32") == lines
    runs.say_if_bfloat16_is_slow.cache_clear()


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
    saved(runs.Run(parse("grpo", *argv)))
    (folder / "report.json").write_text(json.dumps({"config": runs.Run(parse("grpo", *argv)).config, "models": {}}))
    assert runs.made_by("grpo", args, "a minute", ["--beta", "0"]) == where and len(made) == 1
    # ... unless a model that it was made from has changed.
    (folder / "report.json").write_text(
        json.dumps({"config": runs.Run(parse("grpo", *argv)).config, "models": {"gone": "0"}})
    )
    assert runs.made_by("grpo", args, "a minute", ["--beta", "0"]) == where and len(made) == 2


@pytest.mark.parametrize("name", runs.MODEL_FILES)
def test_made_by_makes_a_run_again_that_has_lost_its_model(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, made = runs.Run(parse("grpo")), []
    monkeypatch.setattr(grpo, "main", made.append)
    saved(run)
    run.write_report({"config": run.config, "models": {}})
    runs.made_by("grpo", parse("ppo"), "a minute")
    assert run.finished() and not made
    (run.folder / "model" / name).unlink()
    runs.made_by("grpo", parse("ppo"), "a minute")
    # main() with --resume would take a finished run from disk.
    assert len(made) == 1 and "runs/grpo is missing or incomplete" in capsys.readouterr().out and not run.finished()


def test_a_run_is_not_reused_after_its_data_has_changed(tmp_path, monkeypatch):
    """Only the content counts: the same bytes under the same path are the same data."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text("one")
    first = runs.Run(parse("dpo", "--data", str(data)))
    saved(first)
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


def test_errors_of_the_machine_are_one_line():
    def train(args):
        raise OSError(28, "No space left on device", "runs/x")

    exits(runs.run_once, train, parse("dpo"), False, match="runs/x: No space")


@pytest.mark.parametrize("script, flags", [("dpo", "--micro_batch, --batch, --max_tokens"),
                                           ("sft", "--micro_batch, --batch"),
                                           ("ppo", "--micro_batch, --minibatch, --max_tokens, --prompts")])  # fmt: skip
def test_out_of_memory_names_the_flags(script, flags):
    """Of torch, where more is asked for than any machine has, and of Python, without a text."""
    for take in (lambda args: torch.empty(2**46), lambda args: bytearray(2**61)):
        exits(runs.run_once, take, parse(script), False, match=f"^Out of memory: .*smaller values of {flags}")
    with pytest.raises(RuntimeError, match="shapes"):  # another error is not taken for one
        runs.run_once(lambda args: torch.ones(2, 3) @ torch.ones(2, 3), parse(script), False)


# --- the file system ---


class Little(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        for name in runs.MODEL_FILES:
            runs.write_atomically(folder / name, lambda path: path.write_text("{}"))


@pytest.fixture
def little(tmp_path, monkeypatch):
    """little(*flags, at): a run of six updates with a checkpoint before each, in an empty folder. `at` maps a step to
    what happens there. Returns the run, or the message with which it exits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "READ", {})
    alive = []  # the garbage collector would release the lock of a run that is not used any more

    def train(args, at):
        model, run = Little(), runs.Run(args)
        alive.append(run)
        optimizer = torch.optim.AdamW(model.parameters())
        for step in run.steps(6, model, optimizer, save_every=1):
            at.get(step, lambda: None)()
            if step == 6:
                break
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            run.samples(step, [("prompt", "output")], show=0)
            run.log(step, loss=0.0)
        return run.finish(model)

    def little(*flags, at=None):
        try:
            return runs.run_once(lambda args: train(args, at or {}), parse("dpo", *flags), reuse="--resume" in flags)
        except SystemExit as error:
            return str(error.code)

    return little


def stop():
    raise SystemExit("stopped")


RUN = Path("runs/dpo")


def is_whole():
    assert [m["step"] for m in runs.Run(parse("dpo")).metrics] == list(range(6))
    assert json.loads((RUN / "config.json").read_text()) == json.loads((RUN / "report.json").read_text())["config"]
    names = "config.json metrics.jsonl samples.md samples.jsonl model report.json"
    assert {path.name for path in RUN.iterdir()} == {*names.split()}
    assert [path.name for path in Path("runs").iterdir() if path.name[0] != "."] == ["dpo"]


FULL = Path("/dev/full")  # writing into it fails as on a full disk
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def fill(name):
    """The disk is full when this file is written."""
    path = RUN / name
    path.unlink(missing_ok=True)
    path.symlink_to(FULL)


@needs_dev_full
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md", "samples.jsonl"])
def test_full_disk_while_logging(little, name):
    assert little(at={4: stop}) == "stopped"
    kept = {n: (RUN / n).read_bytes() for n in ("metrics.jsonl", "samples.md", "samples.jsonl")}
    message = little("--resume", at={4: lambda: fill(name)})
    assert message.startswith(f"runs/dpo/{name}: No space left on device") and "--resume" in message
    (RUN / name).unlink()
    (RUN / name).write_bytes(kept[name] + b"half a li")
    little("--resume")
    is_whole()


@needs_dev_full
@pytest.mark.parametrize("step, name", [(0, "resume.safetensors"), (6, "model/config.json"), (6, "report.json")])
def test_full_disk_while_saving(little, monkeypatch, step, name):
    """The earlier finished run is still there, and half a file does not stay."""
    little()
    before = (RUN / "report.json").read_text()

    def no_space(path):
        if path == RUN / name:
            FULL.write_text("x")

    write = runs.write_atomically
    monkeypatch.setattr(runs, "write_atomically", lambda path, w: write(path, lambda p: (w(p), no_space(path))))
    message = little()
    assert message.startswith(f"runs/dpo/{name}: No space left on device") and "--resume" in message
    assert Path("runs/dpo.old/report.json").read_text() == before and not list(RUN.rglob("*.tmp"))
    monkeypatch.setattr(runs, "write_atomically", write)
    little("--resume")
    is_whole()


def test_safetensors_on_a_full_disk(tmp_path):
    """Its errors are not OSErrors, and do not name the file."""

    def fails(path):
        path.write_text("half")
        raise runs.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as error:
        runs.write_atomically(tmp_path / "model.safetensors", fails)
    assert error.value.errno == 28 and error.value.filename == str(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_read_only_runs(little, monkeypatch, error):
    little()
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}

    def refuse(path, *args, **kwargs):
        raise type(error)(error.errno, error.strerror, str(path))

    for name in ("mkdir", "rename", "touch"):
        monkeypatch.setattr(Path, name, refuse)
    message = little()
    assert message.startswith("runs/") and error.strerror in message and "another folder" in message
    assert before == {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}


def test_runs_is_a_file(little):
    Path("runs").write_text("mine")
    message = little()
    assert message.startswith("runs") and "Move away" in message and Path("runs").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md", "samples.jsonl"])
@pytest.mark.parametrize("damage, words", [(Path.unlink, "is missing"), (lambda p: os.truncate(p, 9), "its end")])
def test_resume_without_the_log(little, name, damage, words):
    little(at={4: stop})
    damage(RUN / name)
    message = little("--resume")
    assert message.startswith(f"runs/dpo/{name} ") and words in message and "elete the folder runs/dpo" in message
    assert (RUN / "resume.safetensors").is_file()


@pytest.mark.parametrize("damage, words", [(Path.unlink, "is missing"), (lambda p: os.truncate(p, 9), "is damaged")])
def test_a_finished_run_without_its_log(little, damage, words):
    damage(little().folder / "metrics.jsonl")
    with pytest.raises(SystemExit, match=f"runs/dpo/metrics.jsonl {words}.*elete the folder"):
        runs.Run(parse("dpo")).metrics  # noqa: B018


def test_half_a_config(little):
    """Of an interrupted and of a finished run it is not needed. Otherwise, nobody knows whose run it is."""
    little(at={4: stop})
    (RUN / "config.json").write_text('{"load": nu')
    little("--resume")
    is_whole()
    (RUN / "config.json").write_text('{"load": nu')
    little()
    is_whole()
    (RUN / "report.json").unlink()
    (RUN / "config.json").write_text('{"load": nu')
    message = little()
    assert message.startswith("runs/dpo/config.json is damaged") and "delete the folder runs/dpo" in message


def test_a_checkpoint_of_something_else(little):
    little(at={4: stop})
    runs.save_file({"w": torch.zeros(1)}, RUN / "resume.safetensors")
    message = little("--resume")
    assert message.startswith("runs/dpo/resume.safetensors is damaged") and "Delete the folder" in message


# --- one process per run ---


def test_the_lock_is_held_until_the_results_are_written(little, monkeypatch):
    """And not longer: the process may go on with other runs."""
    second = []
    assert little(at={s: lambda: second.append(little("--resume")) for s in (0, 3, 6)}).report
    write_report = runs.Run.write_report
    monkeypatch.setattr(runs.Run, "write_report", lambda *a: (second.append(little()), write_report(*a)))
    little()
    assert len(second) == 4
    for message in second:
        assert message.startswith("runs/dpo is in use") and "\n" not in message
    is_whole()
    assert little(at={3: stop}) == "stopped" and little("--resume").report


def test_a_file_system_without_locks(little, monkeypatch):
    import filelock

    def acquire(*args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert little().report
