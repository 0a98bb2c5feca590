"""DPO, PPO and GRPO on the same budget of prompts: one table, no winner.

    python tests/budget.py --seeds 101 102 103

2000 prompts each: DPO reads one judged pair a prompt, PPO writes four answers, GRPO eight. Everything
else is each script's default, so the runs of ppo.py and grpo.py are the clean ones of their breaks. Runs
are kept under runs/ in the current folder. Seconds are comparable only if nothing else ran meanwhile.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PROMPTS = 2000
RUNS = {  # script: flags, what it needed
    "dpo": (["--steps", str(PROMPTS // 32)], "judged pairs: 2000"),
    "ppo": (
        ["--max_steps", str(PROMPTS // 8)],
        "a reward model (12000 judged pairs), 8000 answers, a value function",
    ),
    "grpo": (["--max_steps", str(PROMPTS // 8)], "a reward model (12000 judged pairs), 16000 answers"),
}


def report(script, flags, seed):
    folder = Path("runs") / f"{script}-{flags[0].removeprefix('--')}={flags[1]}-seed={seed}"
    if not (folder / "report.json").is_file():
        subprocess.run([sys.executable, REPO / f"{script}.py", *flags, "--seed", str(seed)], check=True)
    return json.loads((folder / "report.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    args = parser.parse_args()
    print("| | right at the start | at the peak, other half | at the end | KL at the end", end=" ")
    print("| seconds | peak GB | needed |")
    print("|---|---|---|---|---|---|---|---|")
    for script, (flags, needed) in RUNS.items():
        found = [report(script, flags, seed) for seed in args.seeds]
        if script == "dpo":
            keys = ("right_sampled_sft", None, "right_sampled", "kl", "seconds", "peak_gb")
        else:
            keys = ("start_gold", "peak_gold_b", "end_gold", "kl", "seconds", "peak_gb")
        cells = []
        for key in keys:
            values = [r[key] for r in found] if key else []
            digits = 0 if key == "seconds" else 2
            low, high = (f"{f(values):.{digits}f}" for f in (min, max)) if values else ("", "")
            cells.append(f"{sum(values) / len(values):.{digits}f} ({low} to {high})" if values else "")
        print(f"| {script} | " + " | ".join(cells) + f" | {needed} |", flush=True)


if __name__ == "__main__":
    main()
