"""The tables of data/results/README.md: one break over several seeds, as mean (lowest to highest).

    python tests/measure.py dpo flip_labels --seeds 101 102 103 104 105
    python tests/measure.py grpo clean --max_steps 1000 --reward checker      a run without a break

A seed stands for a whole chain: base model, SFT model, data and evaluation are made anew for each seed. Flags that
are not known here are passed to the script. Runs are kept under runs/ in the current folder. A run is trained only
if it is missing or the code has changed since, so a second call only prints.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import breaks, runs

REPO = runs.HERE


def trained(script, *flags):
    """The finished runs.Run of `python SCRIPT.py FLAGS`, and for a break those of both runs: [clean, broken]."""
    flags = list(map(str, flags))
    args = runs.parse(script, importlib.import_module(script).parser(), flags, breaks.of(script))
    found = [runs.Run(args)]
    if getattr(args, "break_", None):
        found.insert(0, runs.Run(argparse.Namespace(**{**vars(args), "break_": None})))
    if not all(run.finished() for run in found):
        # In a process of its own: the report contains the peak memory of the process. --resume keeps what is there.
        subprocess.run([sys.executable, REPO / f"{script}.py", *flags, "--resume"], check=True)
    return found


def mean(values):
    return sum(values) / len(values)


def spread(values, digits=3):
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    row(*cells)
    print("|---" * len(cells) + "|")


def print_curves(seeds):
    """What reasoning.py measured for every N: a row per way of selecting, a column per N, means over the seeds."""
    curves = [[m for m in found[-1].metrics if "n" in m] for found in seeds]
    if curves[0]:
        print()
        header("N", *(m["n"] for m in curves[0]))
        for key in curves[0][0]:
            if key not in ("n", "step"):
                row(key, *(f"{mean([m[key] for m in column]):.3f}" for column in zip(*curves)))


def print_claims(seeds, numbers, entry, embedded):
    """On how many seeds all claims hold; and every claim that does not, with its measured values."""
    claims, failed = entry.claims + (entry.task_claims if embedded else ()), {}
    for number, (clean, broken) in zip(numbers, seeds):
        reports = {"clean": clean.report, "broken": broken.report}
        failed[number] = [claim.text(reports) for claim in claims if not claim.holds(reports)]
    print(f"\nreproduced on {sum(not some for some in failed.values())} of {len(failed)} seeds")
    for number, some in failed.items():
        for sentence in some:
            print(f"  seed {number}: does not hold: {sentence}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", help="gpt, sft, reward_model, ppo, grpo, dpo, reasoning or tools")
    parser.add_argument("break_", metavar="break", help="the name of the break, or clean")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    args, flags = parser.parse_known_args()
    chosen = [] if args.break_ == "clean" else ["--break", args.break_]
    seeds = [trained(args.script, *chosen, *flags, "--seed", seed) for seed in args.seeds]
    print(f"\n{args.script}.py {args.break_} {' '.join(flags)}, seeds {args.seeds}: mean (lowest to highest)\n")
    header("", *(run.label for run in seeds[0]))
    columns = [[run.report for run in column] for column in zip(*seeds)]
    for key, value in columns[0][0].items():
        if isinstance(value, (int, float)) and all(key in report for reports in columns for report in reports):
            row(key, *(spread([report[key] for report in reports]) for reports in columns))
    print_curves(seeds)
    if chosen:
        embedded = not seeds[0][0].config.get("data")
        print_claims(seeds, args.seeds, breaks.entry(args.script, args.break_), embedded)


if __name__ == "__main__":
    main()
