"""What a run leaves behind: the flags that all scripts share, the record, --resume and reuse.

Every run writes one folder:

    runs/SCRIPT[-BREAK][-FLAG=VALUE ...]/
        config.json           all flags, and a checksum of the code
        metrics.jsonl         one line per logged step
        samples.md            sampled outputs, at every evaluation
        samples.jsonl         the same, one line per evaluation, for page.html
        resume.safetensors    weights, optimizer and step, while the run is unfinished
        model/                the result: config.json and model.safetensors
        report.json           the results; it exists if and only if the run has finished
        figure.png            of a break (and of reasoning.py)
        page.html             all of it, to look at; runs/index.html lists the runs

While a process writes a run, it holds the lock runs/.locks/NAME.lock, and a second process is refused.

Every random choice is a function of (seed, purpose, step) and never of earlier steps. So --resume needs no random
state: a resumed run ends in the same numbers, to the bit on a CPU.

This file does not depend on how a model is built (a model saves itself) or on what a break does.
"""

import argparse
import atexit
import errno
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import parts

HERE = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------
# Random choices


def rng(*key):
    """A torch generator seeded by any key: rng(seed, "rollouts", step)."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(62))


def own_rng(*key):
    """As rng(), but each process draws other numbers. The first one draws those of a run in one process."""
    return rng(*key) if parts.PROCESS == 0 else rng(*key, parts.PROCESS)


@functools.lru_cache(maxsize=4)
def shuffled(n, *key):
    return torch.randperm(n, generator=rng(*key)).tolist()


def batch_indices(n, batch, step, seed):
    """Indices of the examples of one step. Every epoch visits each of the n examples once, in a new order."""
    wanted = range(step * batch, (step + 1) * batch)
    return [shuffled(n, seed, "epoch", i // n)[i % n] for i in wanted]


# ---------------------------------------------------------------------------------------------
# Arguments

# Flags that are not spelled in a folder's name. (The name of a break is, at its beginning.)
UNNAMED = ("resume", "device", "break_")


def parse(script, parser, argv, breaks=()):
    """Add the flags that every script has, parse argv, and refuse impossible values in one line.

    breaks: objects with .name, .summary and .flags (data/breaks.py). The flags of a break apply to both of
    its runs; a flag given in argv wins. Returns the arguments with two more: `script`, and `suffix`, which
    spells every flag that is not at its default. A run's folder is named by it, so runs with other settings
    have other folders.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.excepthook = one_line_or_traceback
    atexit.register(flush_output)
    if hasattr(sys.stdout, "reconfigure"):  # a character that the terminal cannot show is printed as "?"
        sys.stdout.reconfigure(errors="replace")
    add = parser.add_argument
    parser.formatter_class = argparse.RawTextHelpFormatter  # keeps the lines of --break
    if breaks:
        lines = "".join(f"\n  {b.name:24}{b.summary}" for b in breaks).replace("%", "%%")
        add("--break", dest="break_", choices=[b.name for b in breaks], metavar="NAME",
            help="train a documented failure beside the clean run; NAME is one of" + lines)  # fmt: skip
    add("--seed", type=int, default=0, help="seed of this run, and of the runs that it needs first")
    add("--device", help="cpu, cuda or mps (default: cuda, else mps, else cpu)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"],
        help="bfloat16 computes in autocast: faster at GPT-2's size if the processor has\n"
        "instructions for it, not at the tiny model's")  # fmt: skip
    add("--resume", action="store_true", help="continue the interrupted run with the same flags")
    args = parser.parse_args(argv)
    if getattr(args, "data", None):
        # Real data has longer texts and larger models. Its own defaults are the script's parser().with_data.
        parser.set_defaults(**getattr(parser, "with_data", {}))
        args = parser.parse_args(argv)
    chosen = [b for b in breaks if b.name == getattr(args, "break_", None)]
    if chosen and chosen[0].flags:
        args = parser.parse_args([*chosen[0].flags, *argv])  # the later flag wins: the user's
    for name, value in vars(args).items():
        least = 0 if name == "top_k" else 1
        if type(value) is int and value < least and name != "seed":
            parser.error(f"--{name} must be at least {least}, not {value}")
        # Logits are divided by the temperature in training; only gpt.py can be greedy.
        positive = ("lr", "top_p") + ("temperature",) * (script != "gpt")
        if name in positive and value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, not {value}")
        if type(value) is float and not 0 <= value < math.inf:  # also false for nan
            parser.error(f"--{name} must be a number from 0 on, not {value}")
        if name == "seed" and not -(2**63) <= value < 2**63:
            parser.error(f"--seed {value} is too large")
        if name in ("gamma", "lam") and value > 1:
            parser.error(f"--{name} must be at most 1, not {value}")
        if name == "noise" and value >= 0.5:
            parser.error(f"--noise must be below 0.5, not {value}")
    if args.device is None:
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        args.device = "cuda" if cuda else "mps" if mps else "cpu"
    parts.join_processes(parser, script, args.device)
    if args.dtype == "bfloat16" and args.device == "cpu":
        say_if_bfloat16_is_slow()
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}")
    args.suffix = ""
    for name, value in vars(args).items():
        if name not in (*UNNAMED, "suffix") and value != parser.get_default(name):
            # Of a path the last two parts.
            short = "-".join(Path(str(value)).parts[-2:]).replace(".", "_")
            args.suffix += f"-{name}={file_name(short, str(value), 40, end=True)}"
    args.script = script
    return args


@functools.cache  # once, also if earlier chapters run first
def say_if_bfloat16_is_slow():
    """A processor without instructions for bfloat16 computes in float32 and rounds: correct, but no faster."""
    instructions = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # the first two of x86-64, the others of ARM
    if not any(torch.cpu.get_capabilities().get(name) for name in instructions):
        print("This processor has no instructions for bfloat16: --dtype bfloat16 is no faster than float32 here.")


def file_name(text, full, limit, end=False):
    """`text` as a name that every file system accepts: at most `limit` characters of A-Z a-z 0-9 _ = -.

    Other characters become "_", and the beginning is kept (or the end, with end=True). If anything was replaced or
    cut, a checksum of `full` is added, so that different values have different names.
    """
    safe = re.sub(r"[^A-Za-z0-9_=-]", "_", text)
    if safe == text and len(safe) <= limit:
        return safe
    digits = hashlib.sha256(full.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return (safe[-(limit - 9) :] if end else safe[: limit - 9]) + "-" + digits


# ---------------------------------------------------------------------------------------------
# Files


MODEL_FILES = ("config.json", "model.safetensors")  # what a model's save() writes
READ = {}  # {path: checksum} of the model files that this process has read: see Run.finished


def checksum(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def write_atomically(path, write, folder=None):
    """Call write(temporary path), then rename. A reader of `path` finds the old file or the new one,
    never half of one, even if the process is killed. folder: of the temporary file (default: that of `path`), if
    several processes may write `path` at once."""
    if parts.PROCESS > 0:
        return
    temporary = (folder or path.parent) / (path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # for example a full disk: half a file would keep it full
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the first error says more
        raise named(error, path) from error


def named(error, path):
    """The error as an OSError that has the file's name. Errors of writing have none, and safetensors has its own."""
    number = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    return OSError(number, os.strerror(number) if number else str(error), str(path))


def append(path, text):
    if parts.PROCESS > 0:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise named(error, path) from error


def read_json(path):
    """The content of a JSON file; None if there is no such file. Exits if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is damaged ({error}): delete the folder {path.parent} and run again.")


def peak_memory(device):
    """The most memory that this process has held so far, in GB: of the GPU with cuda, else of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def code_checksum(script):
    """Checksum of the code that a run of this script executes: the script, the scripts that it imports, gpt.py
    and data/. The catalogue, the report and the page are left out, since they only describe a finished run."""
    files = {HERE / f"{script}.py", HERE / "gpt.py"}
    files |= {file for file in HERE.glob("data/*") if file.suffix in (".py", ".tiktoken")}
    names = re.findall(r"^(?:import|from) (\w+)", (HERE / f"{script}.py").read_text(encoding="utf-8"), re.MULTILINE)
    files |= {HERE / f"{name}.py" for name in names if (HERE / f"{name}.py").is_file()}
    files -= {HERE / "data" / name for name in ("breaks.py", "report.py", "page.py", "__main__.py")}
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def progress(items, what):
    """The items (a range or a list), with a progress bar if they take more than five seconds: with a published model an
    evaluation takes minutes on a CPU."""
    few = len(items) < 2
    return tqdm(items, desc=what, leave=False, delay=5, dynamic_ncols=True, disable=few or parts.PROCESS > 0)


# ---------------------------------------------------------------------------------------------
# The record


class Run:
    """The record of one run. See the top of this file for what its folder holds."""

    def __init__(self, args):
        self.label = getattr(args, "break_", None) or "clean"
        name = "base" if args.script == "gpt" else args.script
        name += ("" if self.label == "clean" else f"-{self.label}") + args.suffix
        self.folder = Path("runs") / file_name(name, name, 150)
        self.resume, self.device = args.resume, args.device
        left_out = ("resume", "device", "suffix")
        self.config = {k: v for k, v in vars(args).items() if k not in left_out}
        # Code and data are part of the settings: a clean run is reused only if both are unchanged.
        self.config["code"] = code_checksum(args.script)
        data = getattr(args, "data", None)
        if data and os.path.isfile(os.path.expanduser(data)):  # False for a path that cannot exist
            self.config["data_checksum"] = checksum(Path(data).expanduser())
        self.bar = self.lock = None

    @property
    def report(self):
        return read_json(self.folder / "report.json")

    @property
    def unfinished(self):
        """True if the folder holds an interrupted run that can be continued."""
        return self.report is None and (self.folder / "resume.safetensors").is_file()

    @property
    def old(self):
        return self.folder.with_name(self.folder.name + ".old")

    @property
    def metrics(self):
        """All logged lines, as a list of dicts."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        except (FileNotFoundError, ValueError) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            sys.exit(f"{path} {what}: delete the folder {self.folder} and run again.")

    @property
    def outputs(self):
        """{step: [(prompt, output), ...]}, in the order of the run. A step is a number or a text, "100, attacked"."""
        path = self.folder / "samples.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {line["step"]: line["samples"] for line in map(json.loads, lines)}

    def mean(self, *names, last=0.2):
        """{name: mean over the last fifth of the updates}. A single batch is noisy."""
        logged = [m for m in self.metrics if names[0] in m]
        logged = logged[-max(1, int(last * len(logged))) :]
        return {name: sum(m[name] for m in logged) / len(logged) for name in names if logged}

    def start_peak_end(self):
        """The evaluations at the start, at the peak, halfway down from it and at the end, as flat results.

        The peak is the evaluation with the highest accuracy on half A of the problems. Read the size of the peak
        off half B: on the half that chose it, a maximum over noisy values is too high. Halfway down is the first
        evaluation since then whose accuracy on half A is at most the mean of those at the peak and at the end.

        rise and fall use all problems: for each half the peak is chosen on the other one.
        """
        evaluations = [m for m in self.metrics if "test_accuracy" in m]
        peak = max(evaluations, key=lambda m: m["test_accuracy_a"])
        middle = (peak["test_accuracy_a"] + evaluations[-1]["test_accuracy_a"]) / 2
        down = evaluations[evaluations.index(peak) :]
        halfway = next(m for m in down if m["test_accuracy_a"] <= middle)
        results = {"peak_step": peak["step"], "halfway_step": halfway["step"]}
        other = max(evaluations, key=lambda m: m["test_accuracy_b"])  # chosen on half B, read off half A
        height = (peak["test_accuracy_b"] + other["test_accuracy_a"]) / 2
        results["rise"] = height - evaluations[0]["test_accuracy"]
        results["fall"] = height - evaluations[-1]["test_accuracy"]
        for prefix, m in (
            ("start_", evaluations[0]),
            ("peak_", peak),
            ("halfway_", halfway),
            ("end_", evaluations[-1]),
            ("", evaluations[-1]),
        ):
            results |= {prefix + name.removeprefix("test_"): value for name, value in m.items() if name != "step"}
        # What was logged in training. One batch is noise: means of the first ten and of the last ten.
        batches = [m for m in self.metrics if "reward" in m]
        results["first_reward"] = sum(m["reward"] for m in batches[:10]) / len(batches[:10])
        for name in ("reward", "kl", "clip_fraction", "explained_variance"):  # the last one is PPO's
            if name in batches[-1]:
                results[f"batch_{name}"] = sum(m[name] for m in batches[-10:]) / len(batches[-10:])
        return results

    def finished(self, code=True):
        """True if this very run is on disk and its model is there: same flags and data, the models that it read are
        unchanged, and (unless code=False) the code is the same. So a policy is not reused after its reward model was
        trained again."""
        if self.report is None or not all((self.folder / "model" / name).is_file() for name in MODEL_FILES):
            return False
        old, models = self.report["config"], self.report["models"].items()
        names = {*old, *self.config} - (set() if code else {"code"})
        return all(old.get(name) == self.config.get(name) for name in names) and all(
            Path(path).is_file() and checksum(path) == known for path, known in models
        )

    def steps(self, total, model, optimizer, save_every=50, show=("loss",)):
        """Yield 0, 1, ..., total, and do everything around a training loop that is not training.

        At step s the model has been updated s times. The caller evaluates, leaves the loop at s == total,
        updates, and logs. This generator shows the progress bar with the metrics named in `show`, writes a
        checkpoint every save_every steps, saves and exits on Ctrl-C, and starts from the checkpoint with
        --resume.
        """
        self.show, self.started = show, time.time()
        start, self.seconds = 0, 0.0
        state = self.folder / "resume.safetensors"
        self._lock()
        if self.resume and state.is_file():
            start = self._load(state, model, optimizer)
        elif parts.PROCESS == 0:
            if self.resume:
                print(f"{self.folder}: nothing to resume, starting at step 0")
            self._make_room()
            self.folder.mkdir(parents=True)
            for file in self._files():
                file.touch()
        parts.any_process(False, self.device)  # the folder is ready
        text = json.dumps(self.config, indent=2)  # of a resumed run the same text: it may be damaged
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.interrupted = interrupted = []

        def on_interrupt(signum, frame):
            if interrupted:  # the second Ctrl-C does not wait for the end of the step
                raise KeyboardInterrupt
            interrupted.append(True)
            tqdm.write("Ctrl-C: saving after this step (press again to stop at once)")

        before = signal.signal(signal.SIGINT, on_interrupt)
        self.bar = tqdm(total=total, initial=start, desc=f"{self.config['script']} {self.label}",
                        dynamic_ncols=True, mininterval=0.5, disable=parts.PROCESS > 0)  # fmt: skip
        try:
            for step in range(start, total + 1):
                stop = parts.any_process(interrupted, self.device)
                if stop or (step > start and step % save_every == 0):
                    self._save(state, model, optimizer, step)
                if stop:
                    command = shlex.join([a for a in sys.argv if a != "--resume"] + ["--resume"])
                    self.bar.close()
                    start_with = f"torchrun --nproc_per_node {parts.PROCESSES}" if parts.PROCESSES > 1 else "python"
                    print(f"Saved at step {step} of {total}. Continue with:  {start_with} {command}")
                    sys.exit(130)
                yield step
                self.bar.update(step < total)
        finally:
            self.bar.close()
            signal.signal(signal.SIGINT, before)
            if step < total:  # a complete run keeps its lock until finish() has written the results
                self.lock.release()
            else:
                parts.any_process(False, self.device)  # the log is complete

    def log(self, step, **metrics):
        """Append one line to metrics.jsonl. Stops the run if a number is not finite."""
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                sys.exit(
                    f"{name} is {value} at step {step}: stopped. Try a smaller --lr"
                    + (" or --dtype float32" if self.config["dtype"] != "float32" else "")
                    + f". What was logged until then is in {self.folder}."
                )
        # No wall-clock time in here: a resumed run must write the same bytes.
        append(self.folder / "metrics.jsonl", json.dumps({"step": step, **metrics}) + "\n")
        self.bar.set_postfix({k: f"{metrics[k]:.3f}" for k in self.show if k in metrics}, refresh=False)

    def say(self, step, **metrics):
        """log() for an evaluation: it is printed as well."""
        self.log(step, **metrics)
        tqdm.write(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))

    def samples(self, step, pairs, show=1):
        """Append (prompt, output) pairs to samples.md and samples.jsonl, and print the first `show` of them."""
        blocks = [f"**{prompt}**\n\n```\n{output}\n```\n\n" for prompt, output in pairs]
        append(self.folder / "samples.md", f"## Step {step}\n\n" + "".join(blocks))
        append(self.folder / "samples.jsonl", json.dumps({"step": step, "samples": pairs}) + "\n")
        for prompt, output in pairs[:show]:
            tqdm.write(f"    {prompt}\n    -> " + output.replace("\n", "\n       "))

    def side_by_side(self, **steps):
        """Append to samples.md the outputs of several evaluations, prompt by prompt: side_by_side(start=0)."""
        samples, found = self.outputs, {}
        for name, step in steps.items():
            for prompt, output in samples[step]:
                found.setdefault(prompt, []).append(f"{name}, step {step}:\n{output}")
        blocks = [f"**{prompt}**\n\n```\n" + "\n\n".join(outputs) + "\n```\n\n" for prompt, outputs in found.items()]
        append(self.folder / "samples.md", "## Side by side\n\n" + "".join(blocks))

    def finish(self, model, **results):
        """Save the model, then the report: its existence says that the run is complete."""
        try:
            if parts.PROCESS == 0:
                self._finish(model, results)
            parts.any_process(False, self.device)  # the results are on disk
        finally:
            self.lock.release()
        if parts.PROCESS > 0:
            return self
        print(f"{self.folder}: done in {results['seconds']:.0f} s, peak memory {results['peak_gb']:.1f} GB")
        if self.interrupted:  # Ctrl-C during the last evaluation: this run is complete, but stop here
            sys.exit(130)
        return self

    def _finish(self, model, results):
        model.save(self.folder / "model")
        results["seconds"] = round(self.seconds + time.time() - self.started, 1)
        results["peak_gb"] = peak_memory(self.device)
        self.write_report({"config": self.config, "models": READ, **results})
        shutil.rmtree(self.old, ignore_errors=True)
        # Remove the training state, and what a kill in the middle of writing it has left behind.
        for rest in (*self.folder.glob("resume.safetensors*"), *self.folder.glob(".tmp*")):
            rest.unlink()

    def write_report(self, report):
        text = json.dumps(report, indent=2)
        write_atomically(self.folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))

    def _lock(self):
        """Exit if another process writes this run. The system releases the lock when the process ends."""
        from filelock import FileLock, Timeout

        locks = self.folder.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(locks / f"{self.folder.name}{f'.{parts.PROCESS}' * (parts.PROCESS > 0)}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            sys.exit(f"{self.folder} is in use: another process is writing this run. Wait until it ends, or stop it.")
        except NotImplementedError:  # a file system without locks
            pass

    def _make_room(self):
        """A finished run is kept as NAME.old until the new one is complete. An interrupted one, or one of other
        models or data (two long paths can end alike), is not replaced."""
        if self.unfinished:
            sys.exit(
                f"{self.folder} holds an interrupted run. Continue it with --resume, or delete the folder to start "
                "again."
            )
        old = self.report["config"] if self.report else read_json(self.folder / "config.json") or {}
        for name in ("load", "data", "base", "rm", "policy"):
            if old.get(name) != self.config.get(name) and old:
                sys.exit(f"{self.folder} holds a run with --{name} {old.get(name)}: move it away first.")
        if self.report is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            shutil.rmtree(self.old, ignore_errors=True)
            self.folder.rename(self.old)

    def _files(self):
        return [self.folder / name for name in ("metrics.jsonl", "samples.md", "samples.jsonl")]

    def _save(self, path, model, optimizer, step):
        """Write the whole training state into one file, so that one rename makes it valid."""
        tensors = {f"model.{name}": w for name, w in model.state_dict().items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": w for name, w in moments.items()}
        state = {
            "step": step,
            "config": self.config,
            "seconds": self.seconds + time.time() - self.started,
            "sizes": [file.stat().st_size for file in self._files()],
        }
        write_atomically(path, lambda p: save_file(tensors, p, {"state": json.dumps(state)}))

    def _load(self, path, model, optimizer):
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"{path} is damaged ({error}): it cannot be resumed. Delete the folder to start again.")
        for name in self.config:
            if state["config"].get(name) != self.config[name]:
                what = {"code": "the code has changed", "data_checksum": "the file of --data has changed"}
                what = what.get(name, f"--{name} differs")
                sys.exit(f"{self.folder} cannot be resumed: {what} since. Delete the folder to start again.")
        for file, size in zip(self._files(), state["sizes"]):
            if not file.is_file() or file.stat().st_size < size:
                what = "is missing" if not file.is_file() else "has lost its end"
                sys.exit(f"{file} {what}: the run cannot be resumed. Delete the folder {self.folder} to start again.")
        model.load_state_dict({n.removeprefix("model."): w for n, w in tensors.items() if n.startswith("model.")})
        moments = {}
        for name, w in tensors.items():
            if name.startswith("optimizer."):
                _, i, what = name.split(".")
                moments.setdefault(int(i), {})[what] = w
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # What was logged after the checkpoint will be logged again: cut it off.
        for file, size in zip(self._files(), state["sizes"]) if parts.PROCESS == 0 else ():
            os.truncate(file, size)
        self.seconds = state["seconds"]
        print(f"{self.folder}: resuming at step {state['step']}")
        return state["step"]


# ---------------------------------------------------------------------------------------------
# Running, reusing


def without_break(args):
    """The arguments of the clean run of a break."""
    return argparse.Namespace(**{**vars(args), "break_": None})


def run_once(train, args, reuse):
    """train(args). With reuse, the finished run of the same flags and the same code is taken from disk."""
    run = Run(args)
    if reuse and run.finished():
        print(f"{run.folder}: already there, finished with the same flags and code")
        return run
    try:
        return train(args)
    except KeyboardInterrupt:  # outside of the loop, or the second one within a step
        sys.exit("\nStopped at once. If there is a checkpoint, --resume continues from it.")
    except BrokenPipeError:
        flush_output()
        sys.exit("The output was closed (by `| head`?): stopped. If there is a checkpoint, --resume continues from it.")
    except OSError as error:
        sys.exit(one_line(error, run.folder))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        names = ("micro_batch", "batch", "minibatch", "max_tokens", "prompts")  # the first one changes no results
        smaller = [f"--{name}" for name in names if hasattr(args, name)]
        cause = (str(error).splitlines() or ["no more can be allocated"])[0][:150]
        sys.exit(f"Out of memory: {cause}. Try smaller values of {', '.join(smaller)}.")


FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def one_line(error, where="runs"):
    """An error of the file system: the file, the cause, and the way out."""
    if error.errno in FULL:
        advice = " Make room, then run again with --resume: what was complete is still there."
    elif error.errno in REFUSED:
        advice = " Make it writable, or run in another folder: results go to ./runs."
    elif error.errno in IN_THE_WAY:
        advice = " Move away what stands where a folder is needed, then run again."
    else:
        advice = ""
    return f"{error.filename or where}: {error.strerror or error}." + advice


def one_line_or_traceback(kind, error, traceback):
    """sys.excepthook of every script, for what run_once does not see: tables, figures, --help."""
    if isinstance(error, BrokenPipeError):
        flush_output()
    elif isinstance(error, OSError):
        print(one_line(error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def flush_output():
    """At the end, write what is buffered. If nobody reads it (`python SCRIPT.py | head`), drop it: the interpreter
    would print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:  # ValueError: already closed
            if isinstance(error, OSError) and error.errno in FULL:
                sys.stderr.write("The output could not be written: no space left on device.\n")
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                pass


def inherited(args):
    """The flags that a run shares with the runs that it needs first: a seed stands for a whole chain."""
    shared = {"seed": 0, "dtype": "float32"}
    return [word for name, default in shared.items() if (value := getattr(args, name)) != default
            for word in (f"--{name}", str(value))]  # fmt: skip


def made_by(script, args, minutes, flags=()):
    """The model folder of an earlier chapter's run. If it is missing, say so and make it.

    The earlier run has the same --seed and --dtype, so a seed stands for a whole chain: base, SFT, DPO. With
    real data (--data) it is the run on the same data, from the model named by --base (or, a reward model, by --load).
    """
    module = importlib.import_module(script)
    argv, data, base = list(flags), getattr(args, "data", None), getattr(args, "base", None)
    if script == "sft" and base:
        argv += ["--load", base]
    if script == "reward_model":
        # Policy and reward model need the same tokenizer.
        argv += ["--load", args.load] if data and args.load else ["--base", base] if base else []
    if data and script in ("sft", "reward_model"):
        argv += ["--data", data]
        minutes = "minutes to hours"
    if data and script == "sft" and not base:  # from random weights, a few steps are enough for a demonstration
        argv += ["--batch", "8", "--steps", "40"]
        minutes = "a few minutes"
    argv += inherited(args)
    run = Run(parse(script, module.parser(), argv))
    if not run.finished(code=False):
        print(
            f"{run.folder} is missing or incomplete, or was made from other models or data. Making it with "
            f"`{' '.join(['python', script + '.py', *argv])}`, about {minutes}; it is kept for the next run.",
            flush=True,
        )
        resume = args.resume or run.unfinished
        module.main(argv + ["--device", args.device] + (["--resume"] if resume else []))
    elif run.report["config"].get("code") != run.config["code"]:
        # Training it again would take minutes, perhaps for a changed comment: say it and go on.
        print(f"{run.folder} was made by older code. Move it away to train it again.")
    return str(run.folder / "model")
