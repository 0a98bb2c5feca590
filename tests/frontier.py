"""Does the KL penalty move the frontier, or only slow the walk? GRPO with four strengths of it.

    python tests/frontier.py --seeds 101 102 103 --max_steps 250

Draws data/figures/frontier.png: right answers against steps, and against the distance sqrt(KL) from the SFT
model, one line a beta (mean over the seeds on the left, every evaluation of every seed on the right).
Prints the table of the README: at equal steps, and at equal distance. The runs are kept under runs/ in
the current folder, so a second call only prints.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPO = Path(__file__).resolve().parent.parent
EDGES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # of the bins of sqrt(KL)


def evaluations(beta, seed, steps):
    """The evaluations of one run; trains it where it is not on disk."""
    # No leash is --break no_kl, to the bit, and the default is its clean run: no need to train them twice.
    name = "grpo-no_kl" if beta == "0.0" else "grpo"
    flags = {"0.0": ["--break", "no_kl"], "0.3": []}.get(beta, ["--beta", beta])
    shown = f"-beta={beta}".replace(".", "_") if "--beta" in flags else ""
    folder = Path("runs") / f"{name}-max_steps={steps}{shown}-seed={seed}"
    if not (folder / "report.json").is_file():
        command = [sys.executable, REPO / "grpo.py", "--max_steps", str(steps), *flags]
        subprocess.run([*command, "--seed", str(seed)], check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "test_gold" in m]


def mean(values):
    return sum(values) / len(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--betas", nargs="+", default=["0.0", "0.1", "0.3", "1.0"])
    parser.add_argument("--max_steps", type=int, default=250)
    args = parser.parse_args()
    runs = {beta: [evaluations(beta, seed, args.max_steps) for seed in args.seeds] for beta in args.betas}

    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    colors = plt.cm.viridis([0.0, 0.3, 0.6, 0.9])
    for color, (beta, seeds) in zip(colors, runs.items()):
        steps = [m["step"] for m in seeds[0]]
        gold = [mean([run[i]["test_gold"] for run in seeds]) for i in range(len(steps))]
        left.plot(steps, gold, color=color, linewidth=2, label=f"beta {beta}")
        for run in seeds:
            xs, ys = zip(*((m["test_sqrt_kl"], m["test_gold"]) for m in run))
            right.plot(xs, ys, ".-", color=color, linewidth=0.8, markersize=5)
    left.set(title="at equal steps", xlabel="step", ylabel="right answers")
    right.set(title="at equal distance", xlabel="sqrt of KL to the SFT model", ylabel="right answers")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend()
    fig.savefig(REPO / "data" / "figures" / "frontier.png", dpi=110)

    print(f"\nGRPO, {args.max_steps} steps, seeds {args.seeds}: mean (lowest to highest)\n")
    print("| beta | KL at the end | reward at the end | right at the peak | right at the end |")
    print("|---|---|---|---|---|")
    for beta, seeds in runs.items():
        peaks = [max(run, key=lambda m: m["gold_a"])["gold_b"] for run in seeds]
        columns = [[run[-1][key] for run in seeds] for key in ("test_kl", "test_reward")]
        columns += [peaks, [run[-1]["gold_b"] for run in seeds]]
        print(
            f"| {beta} | "
            + " | ".join(f"{mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns)
            + " |"
        )
    print("\nright answers by distance sqrt(KL), mean over all evaluations of all seeds (how many)\n")
    bins = list(zip(EDGES, EDGES[1:]))
    print("| beta | " + " | ".join(f"{low} to {high}" for low, high in bins) + " |")
    print("|---" * (len(bins) + 1) + "|")
    for beta, seeds in runs.items():
        cells = []
        for low, high in bins:
            inside = [m["test_gold"] for run in seeds for m in run if low <= m["test_sqrt_kl"] < high]
            cells.append(f"{mean(inside):.3f} ({len(inside)})" if inside else "")
        print(f"| {beta} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
