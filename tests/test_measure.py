"""measure.py on tiny runs: what a result holds, when it is used again, and the tables that are written from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import measure
import pytest
from server import REPO, copy_of_repo

pytest_plugins = ["server"]

ALL = ["--all", "--only", "flip_labels", "label_noise", "--seeds", "1", "2"]
ONE = ["dpo", "flip_labels", "--seeds", "1"]
README = f"# By hand\n\nabove\n\n{measure.BEGIN}\n\nold\n\n{measure.END}\n\nbelow\n"


@pytest.fixture(scope="module")
def command(start, tiny):
    """command(*argv): the breaks that measure.py runs for them, with tiny flags, as forks of the test server."""
    started = []

    def execute(script, flags, output):
        started.append(flags[1])
        job = start(Path.cwd(), script, *map(str, flags), "--resume").wait()
        output.write(job.out + job.err)
        return job.code

    def command(*argv):
        started.clear()
        measure.main([*argv, *command.flags])
        return started

    command.flags = [*tiny("dpo"), "--problems", "1", "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "execute", execute)
        patch.setattr(measure, "RESULTS", Path("results"))
        yield command


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A folder with the runs and results of ALL."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("results").mkdir()
        Path("results/README.md").write_text(README, encoding="utf-8")
        assert sorted(command(*ALL)) == ["flip_labels"] * 2 + ["label_noise"] * 2
    return folder


@pytest.fixture
def there(whole, tmp_path, monkeypatch):
    """The current folder is a copy of `whole`."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def results():
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path("results").glob("*.json")}


def result_file():
    """The file of the result of ONE."""
    (path,) = Path("results").glob("dpo-flip_labels*seed=1.json")
    return path


def test_a_result(there, command):
    found = results()
    both = [(name, seed) for name in ("flip_labels", "label_noise") for seed in (1, 2)]
    assert sorted((r["break"], r["seed"]) for r in found.values()) == both
    for name, result in found.items():
        report = json.loads((Path("runs") / name / "report.json").read_text())  # it has the name of its run
        assert result["reports"]["broken"] == {k: v for k, v in report.items() if type(v) in (int, float)}
        assert {c["claim"]: c["holds"] for c in result["claims"]} == report["claims"]
        for claim in result["claims"]:
            more, less = claim["left"] > claim["right"], claim["left"] < claim["right"]
            assert claim["holds"] == (less if " < " in claim["claim"] else more)
        assert result["chain"]["dpo"] == report["config"]["code"] and result["flags"] == command.flags
        assert "sft" in result["chain"] and "gpt" in result["chain"]  # what the model of --load was made with
        assert len(result["commit"]) == 40 and "cores" in result["machine"] and "torch" in result["machine"]
        assert result["seconds"] >= 0 and len(json.dumps(result)) < 10_000


def test_only_what_is_missing_is_measured(there, command, capsys):
    before = results()
    assert command(*ALL) == [] and results() == before
    out = capsys.readouterr().out
    assert "| `dpo.py --break flip_labels" in out and out.count(" of 2 | 1 2 |") == 2
    result_file().unlink()
    assert command(*ALL) == ["flip_labels"] and results().keys() == before.keys()


def test_a_run_without_a_break(there, command, capsys):
    assert len(command("dpo", "clean", "--seeds", "1")) == 1
    (result,) = (result for result in results().values() if result["break"] == "clean")
    assert list(result["reports"]) == ["clean"] and "claims" not in result
    value = result["reports"]["clean"]["kl"]
    assert f"| KL to the reference (nats) | {value:.3f} |" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_a_result_of_other_code_is_measured_again_if_one_says_so(there, command, script):
    """Also if only the code of an earlier chapter has changed."""
    path, result = result_file(), json.loads(result_file().read_text())
    path.write_text(json.dumps(result | {"chain": result["chain"] | {script: "other code"}}))
    assert command(*ONE) == []
    assert command(*ONE, "--renew") == ["flip_labels"]
    assert json.loads(path.read_text())["chain"] == result["chain"]


def test_runs_of_other_code_are_set_aside(there, command):
    """They are not deleted, and those of other seeds stay."""
    runs, name = sorted(Path("runs").glob("dpo*")), result_file().stem
    config = Path("runs") / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"code": "other"}))
    assert command(*ONE) == []  # the result is good, and its run is not needed
    assert (Path("runs/stale-other") / name / "report.json").is_file()
    assert sorted(Path("runs").glob("dpo*")) == [run for run in runs if run.name != name]


@pytest.mark.parametrize(
    "flags, stays", [([], False), (["--load", "runs/mine"], True), (["--rm", "runs/mine/model"], True)]
)
def test_a_run_that_the_flags_name_is_not_set_aside(tmp_path, monkeypatch, flags, stays):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.json").write_text(json.dumps({"seed": 0, "script": "sft", "code": "other"}))
    measure.set_aside(0, flags)
    assert Path("runs/mine").exists() == stays


def test_the_chain_of_a_run_may_be_a_circle(tmp_path, monkeypatch):
    """As with distribution_shift: the reward model's report names the policy, and the policy's the reward model. Models
    that no run has made are not followed."""
    monkeypatch.chdir(tmp_path)
    reads = {"rm": ["grpo", "sft"], "grpo": ["rm", "sft"], "sft": ["base", "hub"], "base": []}
    for name, models in reads.items():
        models = {f"runs/{model}/model/model.safetensors": "sum" for model in models}
        Path("runs", name).mkdir(parents=True)
        report = {"config": {"script": name, "code": f"code of {name}"}, "models": models}
        Path("runs", name, "report.json").write_text(json.dumps(report))
    report = json.loads(Path("runs/rm/report.json").read_text())
    assert measure.chain(report) == {name: f"code of {name}" for name in reads}


def test_claims_are_those_of_todays_catalogue(there, command, monkeypatch):
    """The catalogue is no part of a run's code. A changed claim is checked on the numbers that are there."""
    entry, before = measure.breaks.entry("dpo", "flip_labels"), json.loads(result_file().read_text())
    monkeypatch.setitem(entry.__dict__, "claims", (measure.breaks.broken("loss") < 1000.0,))
    assert command(*ONE) == []
    after = json.loads(result_file().read_text())
    assert after["claims"][0]["right"] == 1000 and after["reports"] == before["reports"]


def test_a_script_that_fails_does_not_stop_the_others(there, command, monkeypatch, capsys):
    for path in Path("results").glob("*seed=1.json"):
        path.unlink()
    execute = measure.execute

    def full(script, flags, output):
        if "flip_labels" in flags:
            output.write("half a line\nNo space left\n")
            return 1
        return execute(script, flags, output)

    monkeypatch.setattr(measure, "execute", full)
    with pytest.raises(SystemExit, match="1 results are missing"):
        command(*ALL)
    assert len(results()) == 3
    assert "exit code 1, No space left   (all of it: runs/logs/dpo-flip_labels" in capsys.readouterr().out


def test_after_ctrl_c_nothing_more_is_started(there, command, monkeypatch):
    shutil.rmtree("results")
    Path("results").mkdir()
    started, before = [], signal.getsignal(signal.SIGINT)

    def interrupted(script, flags, output):
        started.append(script)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(3)  # the main thread handles it
        return 130

    monkeypatch.setattr(measure, "execute", interrupted)
    with pytest.raises(SystemExit) as error:
        command(*ALL)
    assert error.value.code == 130 and len(started) == 1
    assert signal.getsignal(signal.SIGINT) == before


def test_tables_are_written_from_the_results_alone(there):
    shutil.rmtree("runs")
    for path in Path("results").glob("dpo-flip_labels*.json"):
        result = json.loads(path.read_text())
        result["reports"]["broken"]["kl"] = float(result["seed"])
        result["claims"][0]["holds"], result["commit"] = False, "abcdef0" * 5
        path.write_text(json.dumps(result))
    measure.keep_table("speed", "How fast", ["", "here"], [["grpo", "1.66"], ["sft", "11.5"]], "A note.")
    measure.main(["--tables"])
    text = Path("results/README.md").read_text(encoding="utf-8")
    assert text.startswith("# By hand\n\nabove\n") and text.endswith("\n\nbelow\n") and "old" not in text
    flip, noise = text.split("### `dpo.py`, `")[1:]
    assert flip.startswith("flip_labels`") and noise.startswith("label_noise`")  # as in the catalogue
    (line,) = [line for line in flip.splitlines() if line.startswith("| KL")]
    assert line.endswith("| 1.500 (1.000 to 2.000) |")
    assert "`abcdef0`" in flip and "cores" in flip and "--seeds 1 2`" in flip and "of 2 seeds" in flip
    assert "| 0 of 2 | 1 2 | 1: training loss" in text
    speed = text.split("### How fast\n")[1].split("###")[0]
    assert "|  | here |\n|---|---|\n| grpo | 1.66 |\n| sft | 11.5 |\n" in speed and "A note. Commit `" in speed
    measure.main(["--tables"])  # once more: the same
    assert Path("results/README.md").read_text(encoding="utf-8") == text
    Path("results/README.md").write_text("without the marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        measure.main(["--tables"])
    assert Path("results/README.md").read_text() == "without the marks"


def test_the_worst_clean_run_is_named(there):
    """The clean run beside two breaks is one run, and its flags are those of the command."""
    for path in Path("results").glob("*.json"):
        result = json.loads(path.read_text())
        result["reports"]["clean"]["accuracy_sampled"] = {1: 0.75, 2: 0.25}[result["seed"]]
        path.write_text(json.dumps(result))
    found = measure.groups(results().values())
    (row,) = [line for line in measure.clean_runs(found) if "| accuracy, sampled |" in line]
    assert row.startswith("| `dpo.py --") and row.endswith("| 0.500 (0.250 to 0.750) | 2 | 1 2 |")


def test_a_published_model_beside_the_own_one(there):
    """Each claim with the numbers of both, and the sign is that of the numbers, whether the claim holds or not."""
    own = [r for r in results().values() if r["break"] == "flip_labels"]
    (claim,) = [c for c in measure.breaks.entry("dpo", "flip_labels").claims if c.text().endswith("(broken) < 0.5")]
    for result, value in zip(own, (0.125, 0.25)):
        result["reports"]["broken"]["held_out_accuracy"] = value
    other = json.loads(json.dumps(own[0])) | {"flags": ["--load", "smollm2"]}
    other["reports"]["broken"]["held_out_accuracy"] = 0.75
    real = other | {"flags": ["--load", "smollm2", "--data", "pairs.jsonl"]}
    for result in own:
        result["flags"] = []
    lines = measure.beside_published(measure.groups([*own, other, real]))
    (row,) = [line for line in lines if claim.text() in line]
    assert row.startswith("| `dpo.py --break flip_labels` |") and row.endswith("| 0.188 < 0.500 | 0.750 > 0.500 |")
    clean = other | {"break": "clean"}
    (row,) = [line for line in measure.beside_published(measure.groups([clean])) if "accuracy, sampled |" in line]
    assert row.startswith("| `dpo.py` | accuracy, sampled |  | ")


def test_the_readmes_have_the_marks():
    text = (REPO / "data" / "results" / "README.md").read_text(encoding="utf-8")
    assert text.count(measure.BEGIN) == text.count(measure.END) == 1
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert text.count(measure.FIRST_BEGIN) == text.count(measure.FIRST_END) == 1


def test_thinned():
    """By hand: five rows in blocks of two."""
    rows = [{"step": i, "loss": i / 10} for i in range(5)]
    blocks = [{"step": 0.5, "loss": 0.05}, {"step": 2.5, "loss": 0.25}, {"step": 4, "loss": 0.4}]
    assert measure.thinned(rows, 3) == blocks
    assert measure.thinned(rows, 5) == rows


def test_the_readmes_table_and_figures_come_from_the_results(there):
    """From seed 0 and from all seeds of the runs without flags of their own, and from nothing else."""
    found = measure.groups(results().values())
    readme = Path("README.md")
    readme.write_text(f"above\n{measure.FIRST_BEGIN}\nold\n{measure.FIRST_END}\nbelow\n", encoding="utf-8")
    before = readme.read_text()
    measure.write_first_table(found, readme)  # the runs of this test have flags
    measure.write_figures(found, Path("."))
    assert readme.read_text() == before and not list(Path(".").glob("*.png"))
    shutil.rmtree("runs")
    (flipped,) = (some for (_, name, _), some in found.items() if name == "flip_labels")
    plain = {("dpo", "flip_labels", ()): [r | {"seed": r["seed"] - 1} for r in flipped]}
    measure.write_first_table(plain, readme)
    measure.write_figures(plain, Path("."))
    text = readme.read_text(encoding="utf-8")
    first = plain["dpo", "flip_labels", ()][0]["reports"]
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert f"{first['clean']['loss']:12.3f}{first['broken']['loss']:26.3f}\n" in text
    assert Path("dpo-flip_labels.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "line, words", [("--all --only dpo flip_label", "flip_label: no such"), ("--seeds 1", "nothing to measure")]
)
def test_wrong_names(line, words, capsys):
    with pytest.raises(SystemExit):
        measure.main(line.split())
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_seeds_at_a_time(command, tmp_path):
    """The real command: processes of their own, two at a time, in a repository without git."""
    repo = copy_of_repo(tmp_path / "repo")
    (repo / "tests").mkdir()
    shutil.copy(REPO / "tests" / "measure.py", repo / "tests")
    (repo / "data" / "results").mkdir()
    line = [sys.executable, repo / "tests" / "measure.py", *ONE, "2", "--jobs", "2", *command.flags, "--device", "cpu"]
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    made = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    found = [json.loads(path.read_text()) for path in (repo / "data" / "results").glob("*.json")]
    assert sorted(r["seed"] for r in found) == [1, 2] and all(r["commit"] == "unknown" for r in found)
    assert all("1 used per run" in r["machine"] for r in found) and " of 2 | 1 2 |" in made.stdout
