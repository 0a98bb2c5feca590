"""Look at the data, as a person should before training on it.

    python -m data                  ten problems of the embedded task, with a right and a wrong solution each
    python -m data pairs            ten of its preference pairs
    python -m data FILE             ten pairs of a preference dataset (or gsm8k, hh-rlhf, ultrafeedback)

Add --seed 1 for ten others.
"""

import argparse
import random

from data import public, task
from data.checker import is_right


def indented(text, width=600):
    """The text, four columns in; very long ones are cut, which is said."""
    cut = text if len(text) <= width else text[:width] + f" [... {len(text) - width} more characters]"
    return "    " + cut.replace("\n", "\n    ")


def main():
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", help="pairs, a file, or a dataset's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.source is None:
        for problem in task.problems(10, args.seed):
            print(f"\n{problem.text}   [answer {problem.answer}]")
            solutions = {}
            while len(solutions) < 2:
                text = task.demonstrate(problem, rng)
                solutions[is_right(text, problem.answer)] = text
            for right in (True, False):
                print(f"  {'right' if right else 'wrong'}:\n{indented(solutions[right])}")
        some = task.demonstrations(5000, args.seed)
        share = sum(is_right(text, problem.answer) for problem, text in some) / len(some)
        print(f"\nOf 5000 demonstrations {share:.1%} are right.")
        return
    if args.source == "pairs":
        pairs = task.preference_pairs(10, args.seed)
    else:
        rows, counts = public.clean_pairs(public.load_or_exit(args.source), str.split, 10**9)
        public.say_counts(args.source, counts)
        pairs = rng.sample(rows, min(10, len(rows)))
    for number, pair in enumerate(pairs, 1):
        print(f"\n==== pair {number}" + (f", answer {pair['answer']}" if pair["answer"] else ""))
        for field in ("prompt", "chosen", "rejected"):
            print(f"  {field}:\n{indented(pair[field])}")


if __name__ == "__main__":
    main()
