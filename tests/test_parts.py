"""A batch in parts: micro-batches one after the other, and several processes side by side (data/parts.py).

Both must give the gradient of the whole batch, and log its metrics."""

import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers import V, close, draw, exits, ragged, random_ids, random_mask, random_model, random_pairs, random_scorer
from server import REPO, check_folder, folders, refused

import dpo
import gpt
import grpo
import ppo
import reward_model
import sft
from data import breaks, parts, runs

pytest_plugins = ["server"]

# --- the parts ---


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 7, 8])
def test_every_row_is_in_one_part(monkeypatch, processes, size):
    rows, found = [3, 1, 4, 1, 5, 9, 2], []
    monkeypatch.setattr(parts, "PROCESSES", processes)
    for process in range(processes):
        monkeypatch.setattr(parts, "PROCESS", process)
        mine = parts.micro_batches(rows, size)
        assert all(0 < len(part) <= (size or 7) for part in mine)
        assert 7 // processes <= sum(map(len, mine)) <= -(-7 // processes)  # equal shares, up to one row
        assert len(mine) == 1 or size
        found += sum(mine, [])
    assert found == rows  # in their order, so that answers to one prompt stay neighbours


def test_a_batch_that_is_too_small_for_the_processes(monkeypatch):
    monkeypatch.setattr(parts, "PROCESSES", 3)
    exits(parts.micro_batches, [1, 2], match="3 processes cannot share a batch of 2")


def test_sums_of_means():
    """Pairs 1, 2, 3 and pair 7: the mean of all is 13/4. The mean of the two means would be 4.5."""
    log = {}
    for part in ([1.0, 2.0, 3.0], [7.0]):
        parts.add(log, len(part) / 4, x=torch.tensor(part, requires_grad=True).mean())
    assert log["x"].item() == 13 / 4 and not log["x"].requires_grad


# --- every loss: parts add up to the whole, and a mean of means does not ---


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sft_parts():
    model, (prompts, answers, _) = random_model().requires_grad_(), random_pairs(9, seed=1)
    rows = list(zip(prompts, answers))

    def part(some):
        ids, labels = sft.collate([rows[i] for i in some], V - 1)
        total, tokens = sft.sft_loss(model, ids, labels)
        return total / tokens, tokens / sum(map(len, answers))

    return model, part


def pairs_parts(loss):
    """Of dpo.py's losses and the reward model's. Their means are over pairs: parts of unequal size matter."""
    model = (random_scorer() if loss == "reward_model" else random_model()).requires_grad_()
    pairs, ref_logps = list(zip(*random_pairs(9, seed=2))), draw(9, 2) - 20
    args = runs.argparse.Namespace(loss=loss, noise=0.1)

    def part(some):
        columns = list(map(list, zip(*(pairs[i] for i in some))))
        if loss == "reward_model":
            found = reward_model.bradley_terry_loss(*reward_model.pair_scores(model, *columns))
        else:
            logps, lengths = dpo.pair_logps(model, *columns)
            ref = ref_logps[some].t().flatten()
            found = dpo.preference_loss(args, 0.3, logps, ref, lengths, torch.tensor(0.2))
        return found, len(some) / 9

    return model, part


def rl_batch():
    mask = random_mask(9, 6)
    old, ref, advantages = draw(9, 6) * 0.1 - 3, draw(9, 6, key="ref") * 0.1 - 3, draw(9, 1, key="advantages")
    answers = [random_ids(int(n), seed=b).tolist() for b, n in enumerate(mask.sum(1))]
    return mask, old, ref, advantages, ragged(9, 8), answers


def grpo_parts(how):
    model, (mask, old, ref, advantages, prompts, answers) = random_model().requires_grad_(), rl_batch()

    def part(some):
        logps, m = gpt.completion_logps(model, [prompts[i] for i in some], [answers[i] for i in some])
        n = m.shape[1]
        losses = ppo.policy_loss(logps, old[some, :n], advantages[some]) + 0.1 * grpo.k3(logps, ref[some, :n])
        whole = {"grpo": len(some) / 9, "dapo": m.sum() / mask.sum(), "dr_grpo": len(some) / 9}[how]
        return grpo.aggregate(losses, m, how, 6), whole

    return model, part


def ppo_parts():
    model, (mask, old, returns, advantages, prompts, answers) = random_model().requires_grad_(), rl_batch()
    value = torch.nn.Linear(32, 1)

    def part(some):
        logps, m, values = gpt.completion_logps(
            model, [prompts[i] for i in some], [answers[i] for i in some], 1.0, value
        )
        n = m.shape[1]
        loss = ppo.masked_mean(ppo.policy_loss(logps, old[some, :n], advantages[some]), m)
        return loss + ppo.value_loss(values, old[some, :n], returns[some, :n], m), m.sum() / mask.sum()

    return model, part


LOSSES = {"sft": sft_parts, "ppo": ppo_parts}
LOSSES |= {name: lambda name=name: pairs_parts(name) for name in ("reward_model", *dpo.BETA)}
LOSSES |= {f"grpo {how}": lambda how=how: grpo_parts(how) for how in ("grpo", "dapo", "dr_grpo")}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up_and_a_mean_of_means_does_not(name):
    """The weights that the scripts use, on the script's own loss functions, with answers of different lengths."""
    model, part = LOSSES[name]()

    def summed(size, weight):
        model.zero_grad()
        parts = torch.arange(9).split(size)
        for some in parts:
            loss, share = part(some.tolist())
            (loss * (share if weight == "share" else 1 / len(parts))).backward()
        return gradient(model)

    full = summed(9, "share")
    scale = full.abs().max()
    for size in (1, 2, 3, 4):
        close(summed(size, "share"), full, 1e-5 * scale)
    # With parts of 4, 4 and 1 the mean of means is wrong, whatever the mean is over.
    assert (summed(4, "mean of means") - full).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_aggregate_of_a_part(how):
    """With the whole batch's mask, the parts' results add up; extra columns of the whole do not matter."""
    losses, mask = draw(9, 6), random_mask(9, 6)
    whole = grpo.aggregate(losses, mask, how, 6)
    for size in (1, 2, 4):
        parts = [grpo.aggregate(losses[i : i + size], mask[i : i + size], how, 6, mask) for i in range(0, 9, size)]
        close(sum(parts), whole, 1e-6)


# --- every script: the gradient of its first update, from its own loop ---


class Stop(Exception):
    pass


def first_gradient(monkeypatch, tmp_path, tiny, script, *flags):
    """Run the script's train() until it clips its first gradient, which is returned."""

    def stop(parameters, bound):
        raise Stop(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    module = importlib.import_module(script)
    argv = [*tiny(script), "--device", "cpu", *flags]
    with pytest.raises(Stop) as stopped:
        train = module.train
        if "--rl" in argv:  # a random model's rewards are all 0, and so are their advantages
            train, drawn = module.train_rl, torch.Generator().manual_seed(0)
            monkeypatch.setattr(module, "group_advantages", lambda rewards: torch.randn(rewards.shape, generator=drawn))
        train(runs.parse(script, module.parser(), argv, breaks.of(script)))
    return stopped.value.args[0]


VARIANTS = {
    "sft": [],
    "dpo": ["--nll", "0.7"],
    "dpo ipo": ["--loss", "ipo"],
    "dpo kto": ["--loss", "kto", "--nll", "0.7"],
    "reward_model": [],
    "grpo grpo": ["--loss", "grpo"],
    "grpo dapo": ["--loss", "dapo"],
    "grpo dr_grpo": ["--loss", "dr_grpo"],
    "ppo": ["--prompts", "3", "--minibatch", "6"],
    "reasoning": [],
    "reasoning solution": ["--level", "solution"],
    "tools": [],
    "tools all": ["--break", "hallucinated_result"],
    "tools rl": ["--rl", "1"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_a_script_does_not_depend_on_micro_batch(monkeypatch, tmp_path, tiny, variant):
    script, flags = variant.split()[0], VARIANTS[variant]
    full = first_gradient(monkeypatch, tmp_path, tiny, script, *flags)
    assert full.abs().max() > 0
    for size in (1, 2, 3):
        found = first_gradient(monkeypatch, tmp_path, tiny, script, *flags, "--micro_batch", str(size))
        close(found, full, 2e-6 * full.abs().max())


@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model", "grpo", "ppo", "reasoning", "tools"])
def test_the_log_is_that_of_the_whole_batch(make, script):
    """Also after several updates, and with parts of unequal size."""
    flags = ["--prompts", "3", "--minibatch", "5", "--epochs", "2"] if script == "ppo" else []
    flags += ["--prompts", "2", "--group", "4", "--epochs", "2"] if script == "grpo" else []
    whole, parts = (make(script, *flags, *more).folder.updates for more in ([], ["--micro_batch", "3"]))
    assert len(whole) == len(parts) > 0
    for one, other in zip(whole, parts):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


# --- several processes ---


def close_updates(one, two):
    """The same updates and the same metrics, up to rounding."""
    assert len(one.updates) == len(two.updates) > 0
    for a, b in zip(one.updates, two.updates):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


@pytest.fixture
def together(start):
    """together(cwd, script, *flags): the Jobs of two processes that find each other as torchrun's do."""

    def together(cwd, script, *flags, processes=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        known = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        known["WORLD_SIZE"] = str(processes)
        return [start(cwd, script, *flags, env=known | {"RANK": str(n)}) for n in range(processes)]

    return together


SHARED_FLAGS = {"sft": [], "dpo": ["--nll", "0.5", "--micro_batch", "1"], "dpo kto": ["--loss", "kto"],
                "reward_model": ["--batch", "5"]}  # fmt: skip


@pytest.mark.parametrize("variant", SHARED_FLAGS)
def test_two_processes_equal_one(together, make, tiny, tmp_path, variant):
    script = variant.split()[0]
    one = make(script, *SHARED_FLAGS[variant]).folder
    first, second = (job.wait() for job in together(tmp_path, script, *tiny(script), *SHARED_FLAGS[variant]))
    assert first.code == second.code == 0, first.err + second.err
    assert "done in" in first.out and not second.out
    (two,) = folders(tmp_path)  # the first one writes; the second leaves nothing
    check_folder(two, len(one.updates))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {".locks", "index.html", two.name}
    close_updates(one, two)
    assert [sorted(m) for m in two.metrics("step")] == [sorted(m) for m in one.metrics("step")]


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_rollouts_are_shared(together, tiny, tmp_path, monkeypatch, script):
    """Each of two processes answers half of the prompts, with random numbers of its own. The run is that of one process
    that answers the two halves one after the other."""
    first, second = (job.wait() for job in together(tmp_path, script, *tiny(script)))
    assert first.code == second.code == 0, first.err + second.err
    (two,) = folders(tmp_path)
    check_folder(two, 3)

    solve, steps = gpt.solve, itertools.count()

    def in_halves(model, tok, problems, temperature, generator, longest, batch=None):
        if batch is None:  # of the evaluation
            return solve(model, tok, problems, temperature, generator, longest)
        halves, other = (problems[: batch // 2], problems[batch // 2 :]), runs.rng(0, "rollouts", next(steps), 1)
        return sum((solve(model, tok, p, temperature, g, longest) for p, g in zip(halves, (generator, other))), [])

    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setattr(gpt, "solve", in_halves)
    module = importlib.import_module(script)
    module.train(runs.parse(script, module.parser(), [*tiny(script), "--device", "cpu"], breaks.of(script)))
    (one,) = folders(tmp_path / "runs")
    close_updates(one, two)
    assert all(m["grad_norm"] > 0 for m in one.updates)


def test_two_processes_are_interrupted_and_resumed_together(together, make, tiny, tmp_path):
    """Only one of them gets the signal; both must stop after the same step, or the other one would wait forever."""
    flags = [*tiny("sft"), "--steps", "200", "--eval_every", "200"]
    whole = make("sft", "--steps", "200", "--eval_every", "200").folder
    jobs = together(tmp_path, "sft", *flags)
    log = tmp_path / "runs" / whole.name / "metrics.jsonl"
    assert jobs[0].until(lambda: log.is_file() and log.read_text().count("\n") >= 20)
    jobs[1].send(signal.SIGINT)
    assert [job.wait(60).code for job in jobs] == [130, 130], jobs[0].err + jobs[1].err
    assert "Saved at step" in jobs[0].out
    for job in together(tmp_path, "sft", *flags, "--resume"):
        assert job.wait().code == 0, job.err
    close_updates(whole, folders(tmp_path)[-1])


def test_a_break_in_two_processes(together, tiny, tmp_path):
    """Two runs in one command, compared by the first process."""
    first, second = (job.wait() for job in together(tmp_path, "dpo", *tiny("dpo"), "--break", "flip_labels"))
    assert first.code == second.code == 0, first.err + second.err
    clean, broken = folders(tmp_path)
    check_folder(clean, 4)
    check_folder(broken, 4)
    assert "flip_labels:" in first.out and "reproduced" in broken.report


def test_what_several_processes_cannot_do(together, tiny, tmp_path):
    for script, flags, words in (("tools", [], "runs in one process"), ("dpo", ["--batch", "1"], "batch of 1")):
        for job in together(tmp_path, script, *tiny(script), *flags):
            refused(job.wait(), words)


@pytest.mark.slow
def test_torchrun(make, tiny, tmp_path):
    """The command of README."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(REPO / "sft.py"), *tiny("sft"), "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("done in") == 1
    close_updates(make("sft").folder, folders(tmp_path)[-1])
