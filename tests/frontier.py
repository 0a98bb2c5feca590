"""Does the KL penalty change how accuracy falls with the distance, or only how fast? GRPO with four values of beta.

    python tests/frontier.py --seeds 101 102 103 --max_steps 250

Draws data/figures/frontier.png. On the left is accuracy against steps, one line per beta, the mean over the seeds. On
the right is accuracy against the distance sqrt(KL) from the SFT model, every evaluation of every seed. Prints two
tables: at equal steps, and at equal distance. Runs are kept under runs/ in the current folder, as in measure.py.
"""

import argparse

import matplotlib

matplotlib.use("Agg")  # draws into a file: works without a screen
import matplotlib.pyplot as plt
from measure import REPO, header, mean, row, spread, trained

EDGES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # of the bins of sqrt(KL)


def evaluations(beta, seed, steps):
    """The evaluations of one run, which is trained if it is missing."""
    # --break no_kl trains with beta 0, and 0.3 is the default, the clean run of that break: measure.py shares them.
    flags = {0: ["--break", "no_kl"], 0.3: []}.get(beta, ["--beta", beta])
    run = trained("grpo", "--max_steps", steps, *flags, "--seed", seed)[-1]
    return [m for m in run.metrics if "test_accuracy" in m]


def draw(runs, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for i, (beta, seeds) in enumerate(runs.items()):
        color = plt.cm.viridis(0.9 * i / max(1, len(runs) - 1))
        steps = [m["step"] for m in seeds[0]]
        accuracy = [mean([m["test_accuracy"] for m in same]) for same in zip(*seeds)]
        left.plot(steps, accuracy, color=color, linewidth=2, label=f"beta {beta:g}")
        for run in seeds:
            xs, ys = zip(*((m["test_sqrt_kl"], m["test_accuracy"]) for m in run))
            right.plot(xs, ys, ".-", color=color, linewidth=0.8, markersize=5)
    left.set(title="at equal steps", xlabel="step", ylabel="accuracy")
    right.set(title="at equal distance", xlabel="square root of the KL to the SFT model (nats)", ylabel="accuracy")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend()
    fig.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--max_steps", type=int, default=250)
    parser.add_argument("--figure", default=REPO / "data" / "figures" / "frontier.png", help="the file to draw")
    args = parser.parse_args()
    runs = {beta: [evaluations(beta, seed, args.max_steps) for seed in args.seeds] for beta in args.betas}
    draw(runs, args.figure)

    print(f"\nGRPO, {args.max_steps} steps, seeds {args.seeds}: mean (lowest to highest)\n")
    header("beta", "KL at the end", "reward at the end", "accuracy at the peak, half B", "accuracy at the end, half B")
    for beta, seeds in runs.items():
        peaks = [max(run, key=lambda m: m["test_accuracy_a"])["test_accuracy_b"] for run in seeds]
        kl, reward, end = ([run[-1][f"test_{key}"] for run in seeds] for key in ("kl", "reward", "accuracy_b"))
        row(f"{beta:g}", *map(spread, (kl, reward, peaks, end)))
    print("\naccuracy by the distance sqrt(KL), mean over all evaluations of all seeds (their number)\n")
    bins = list(zip(EDGES, EDGES[1:]))
    header("beta", *(f"{low} to {high}" for low, high in bins))
    for beta, seeds in runs.items():
        inside = [[m["test_accuracy"] for run in seeds for m in run if low <= m["test_sqrt_kl"] < high]
                  for low, high in bins]  # fmt: skip
        row(f"{beta:g}", *(f"{mean(some):.3f} ({len(some)})" if some else "" for some in inside))


if __name__ == "__main__":
    main()
