"""The numbers of the README: one break over several seeds, as mean (lowest to highest).

    python tests/measure.py dpo flip_labels --seeds 101 102 103 104 105
    python tests/measure.py sft eos_masked --seeds 101 102 103

A seed stands for a whole chain: its own base model, SFT model, data and evaluation. The runs are kept under
runs/ in the current folder, so a second call only prints.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", help="sft or dpo")
    parser.add_argument("break_", metavar="break", help="the break's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("flags", nargs="*", help="more flags for the script, after --")
    args = parser.parse_args()
    reports = {"clean": [], args.break_: []}
    for seed in args.seeds:
        command = [sys.executable, REPO / f"{args.script}.py", "--break", args.break_, "--seed", str(seed)]
        folders = {
            "clean": f"{args.script}-seed={seed}",
            args.break_: f"{args.script}-{args.break_}-seed={seed}",
        }
        paths = {name: Path("runs") / folder / "report.json" for name, folder in folders.items()}
        if args.flags or not (
            paths[args.break_].is_file() and "reproduced" in paths[args.break_].read_text()
        ):
            subprocess.run([*command, *args.flags], check=True)
        for name, path in paths.items():
            reports[name].append(json.loads(path.read_text()))
    print(f"\n{args.script}.py --break {args.break_}, seeds {args.seeds}: mean (lowest to highest)\n")
    print(f"| | clean | {args.break_} |\n|---|---|---|")
    for key in reports["clean"][0]:
        cells = []
        for name in reports:
            values = [report[key] for report in reports[name]]
            if isinstance(values[0], (int, float)):
                cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        if cells:
            print(f"| {key} | " + " | ".join(cells) + " |")
    good = [report["reproduced"] for report in reports[args.break_]]
    print(f"\nreproduced on {sum(good)} of {len(good)} seeds")
    for seed, report in zip(args.seeds, reports[args.break_]):
        for sentence, holds in report["claims"].items():
            if not holds:
                print(f"  seed {seed}: not so: {sentence}")


if __name__ == "__main__":
    main()
