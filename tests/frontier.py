"""What is a KL penalty for? GRPO on a learned and on a true reward, each with several values of beta.

    python tests/frontier.py --seeds 201 202 203

Draws data/figures/frontier.png: accuracy against the distance sqrt(KL) from the SFT model, every evaluation of every
seed, on the left for the reward model and on the right for the exact checker. Prints a table and keeps it in
data/results/ with the points of the figure, so that measure.py --tables can draw it again. Runs are kept under runs/ in
the current folder, as in measure.py.
"""

import argparse

from measure import REPO, draw_frontier, header, keep_table, row, spread, trained


def evaluations(reward, beta, seed, steps):
    """The evaluations of one run, which is trained if it is missing."""
    run = trained("grpo", "--max_steps", steps, "--reward", reward, "--beta", beta, "--seed", seed)[-1]
    return [m for m in run.metrics if "test_accuracy" in m]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[201, 202, 203])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--figure", default=REPO / "data" / "figures" / "frontier.png", help="the file to draw")
    args = parser.parse_args()
    runs = {
        reward: {beta: [evaluations(reward, beta, seed, args.max_steps) for seed in args.seeds] for beta in args.betas}
        for reward in ("learned", "checker")
    }
    columns = ["reward", "beta", "KL at the end", "reward at the end", "accuracy at the start, half B", "at the peak",
               "at the end"]  # fmt: skip
    rows = []
    for reward, betas in runs.items():
        for beta, seeds in betas.items():
            peaks = [max(run, key=lambda m: m["test_accuracy_a"])["test_accuracy_b"] for run in seeds]
            kl, gained, end = ([run[-1][f"test_{key}"] for run in seeds] for key in ("kl", "reward", "accuracy_b"))
            start = [run[0]["test_accuracy_b"] for run in seeds]
            rows.append([reward, f"{beta:g}", *map(spread, (kl, gained, start, peaks, end))])
    header(*columns)
    for cells in rows:
        row(*cells)
    points = {
        reward: {f"{beta:g}": [[[round(m["test_sqrt_kl"], 4), m["test_accuracy"]] for m in run] for run in seeds]
                 for beta, seeds in betas.items()}
        for reward, betas in runs.items()
    }  # fmt: skip
    draw_frontier(points, args.figure)
    keep_table("frontier", "What a KL penalty is for: a learned and a true reward", columns, rows,
               f"GRPO, {args.max_steps} steps. Mean (lowest to highest) of {len(args.seeds)} seeds.",
               points=points)  # fmt: skip


if __name__ == "__main__":
    main()
