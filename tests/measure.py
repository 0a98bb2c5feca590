"""The numbers of the README: one break over several seeds, as mean (lowest to highest).

    python tests/measure.py dpo flip_labels --seeds 101 102 103 104 105
    python tests/measure.py grpo clean --max_steps 1000 --reward checker      a run without a break

A seed stands for a whole chain: its own base model, SFT model, data and evaluation. Flags that are not known
here go to the script. The runs are kept under runs/ in the current folder, so a second call only prints.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def reports_of(script, name, seed, flags):
    """{"clean": report, name: report} of one seed. With --resume the script takes what is on disk."""
    command = [sys.executable, REPO / f"{script}.py", "--seed", str(seed), "--resume", *flags]
    command += [] if name == "clean" else ["--break", name]
    printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    # Every run names its folder when it ends, or when it is found there; the last one is the one asked for.
    folder = re.findall(r"^(runs\S+): (?:already there|done in)", printed, re.MULTILINE)[-1]
    folders = {"clean": folder.replace(f"{script}-{name}", script, 1), name: folder}
    reports = {label: json.loads((Path(f) / "report.json").read_text()) for label, f in folders.items()}
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return reports, [m for m in lines if "n" in m]  # reasoning.py: what came out with n answers


def print_curves(curves):
    """A row for every way to choose, a column for every n: means over the seeds."""
    print("\n| n | " + " | ".join(str(m["n"]) for m in curves[0]) + " |")
    print("|---" * (len(curves[0]) + 1) + "|")
    for key in curves[0][0]:
        if key not in ("n", "step"):
            means = [sum(m[key] for m in column) / len(column) for column in zip(*curves)]
            print(f"| {key} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def spread(values):
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", help="sft, reward_model, ppo, grpo, dpo, reasoning or tools")
    parser.add_argument("break_", metavar="break", help="the break's name, or clean")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    args, flags = parser.parse_known_args()
    found, curves = zip(*(reports_of(args.script, args.break_, seed, flags) for seed in args.seeds))
    print(
        f"\n{args.script}.py {args.break_} {' '.join(flags)}, seeds {args.seeds}: mean (lowest to highest)\n"
    )
    print("| | " + " | ".join(found[0]) + " |\n|---" + "|---" * len(found[0]) + "|")
    for key in found[0]["clean"]:
        rows = [[reports[label].get(key) for reports in found] for label in found[0]]
        if all(isinstance(value, (int, float)) for row in rows for value in row):
            print(f"| {key} | " + " | ".join(map(spread, rows)) + " |")
    if curves[0]:
        print_curves(curves)
    if args.break_ == "clean":
        return
    broken = [reports[args.break_] for reports in found]
    print(f"\nreproduced on {sum(report['reproduced'] for report in broken)} of {len(broken)} seeds")
    for seed, report in zip(args.seeds, broken):
        for sentence, holds in report["claims"].items():
            if not holds:
                print(f"  seed {seed}: not so: {sentence}")


if __name__ == "__main__":
    main()
