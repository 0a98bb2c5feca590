"""DPO, PPO and GRPO on the same number of prompts, in one table.

    python tests/budget.py --seeds 101 102 103

2000 prompts each: per prompt, DPO reads one labelled pair, PPO samples four answers, and GRPO eight. Everything else
is at each script's default. Runs are kept under runs/ in the current folder, as in measure.py. Compare the seconds only
if nothing else was running.
"""

import argparse

from measure import header, row, spread, trained


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--prompts", type=int, default=2000)
    args = parser.parse_args()
    prompts = args.prompts
    needed = {
        "dpo": (["--steps", prompts // 32], f"{prompts} labelled pairs"),
        "ppo": (["--max_steps", prompts // 8],
                f"a reward model (20000 labelled pairs), a value function; {4 * prompts} answers"),
        "grpo": (["--max_steps", prompts // 8], f"a reward model (20000 labelled pairs); {8 * prompts} answers"),
    }  # fmt: skip
    header("", "accuracy at the start", "at the peak (chosen on half A, reported on half B)", "at the end",
           "KL at the end", "seconds", "peak memory, GB", "needed")  # fmt: skip
    for script, (flags, what) in needed.items():
        reports = [trained(script, *flags, "--seed", seed)[-1].report for seed in args.seeds]
        start, peak, end = "start_accuracy", "peak_accuracy_b", "end_accuracy"
        if script == "dpo":
            start, peak, end = "accuracy_sampled_sft", None, "accuracy_sampled"
        cells = [spread([r[key] for r in reports], 2) if key else "" for key in (start, peak, end, "kl")]
        cells += [spread([r["seconds"] for r in reports], 0), spread([r["peak_gb"] for r in reports], 2)]
        row(f"`{script}.py`", *cells, what)


if __name__ == "__main__":
    main()
