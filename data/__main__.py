"""Look at the data before training on it.

    python -m data                  ten problems of the embedded task, with a correct and a wrong solution to each
    python -m data pairs            ten of its preference pairs
    python -m data FILE             ten pairs of a file, or ten of its demonstrations, judged answers or prompts
    python -m data gsm8k            the same of a public dataset (or hh-rlhf, ultrafeedback, ultrafeedback-scores)
    python -m data breaks           the catalogue of failures

Add --seed 1 for ten others. A file is .jsonl, .jsonl.gz, .json or .parquet, in one of the usual layouts: TRL's (text,
messages, prompt, prompt + completion, prompt + chosen + rejected, prompt + completion + label), Alpaca's (instruction +
input + output) or ShareGPT's (conversations). A file with other columns is refused, with a list of those that would do.
"""

import argparse
import os
import random
import sys
from functools import partial

from data import breaks, public, task
from data.checker import is_correct


def indented(text, width=600):
    """The text, indented by four columns. A text longer than `width` is cut, and the cut is marked."""
    cut = text if len(text) <= width else text[:width] + f" [... {len(text) - width} more characters]"
    return "    " + cut.replace("\n", "\n    ")


def slip_statistics(seed, n=8000):
    """Two fractions: of two slips on the same problem, how often they give the same answer; of slips on problems with
    "triple" or "half", how often they give the answer of a misconception. About 14 % and 18 %."""
    rng = random.Random(f"slips {seed}")

    def slipped(problem):
        steps = task.read_events(problem.events)
        while (worked := task.slip(problem.start, steps, rng)) is None:
            pass
        return worked[-1][-1]

    some = task.problems(n, seed)
    same = sum(slipped(p) == slipped(p) for p in some) / n
    misread, hard = 0, 0
    for p in some:
        kinds = {kind for kind, _ in p.events} & set(task.MISCONCEPTION)
        if kinds:
            readings = [{kind} for kind in kinds] + [kinds]
            wrong = {task.work(p.start, task.read_events(p.events, r))[-1][-1] for r in readings}
            hard += 1
            misread += slipped(p) in wrong
    return same, misread / hard


def length_statistics(pairs):
    """A line: do the labels of these pairs follow the length of the answers?"""
    chosen, rejected = ([len(row[side]) for row in pairs] for side in ("chosen", "rejected"))
    longer = sum(c > r for c, r in zip(chosen, rejected)) / len(pairs)
    means = f"chosen {sum(chosen) / len(pairs):.0f} characters on average, rejected {sum(rejected) / len(pairs):.0f}"
    return f"{means}; the chosen answer is the longer one in {longer:.1%}"


def show_task(seed):
    rng = random.Random(seed)
    for problem in task.problems(10, seed):
        print(f"\n{problem.text}   [answer {problem.answer}]")
        solutions = {}
        while len(solutions) < 2:
            text = task.demonstrate(problem, rng)
            solutions[is_correct(text, problem.answer)] = text
        for correct in (True, False):
            print(f"  {'correct' if correct else 'wrong'}:\n{indented(solutions[correct])}")
    some = task.demonstrations(5000, seed)
    fraction = sum(is_correct(text, problem.answer) for problem, text in some) / len(some)
    same, misread = slip_statistics(seed)
    print(f"\nOf 5000 demonstrations {fraction:.1%} are correct.")
    print(f"Two slips on the same problem give the same answer in {same:.1%} of the cases.")
    print(f'A slip on a problem with "triple" or "half" gives the answer of a misconception in {misread:.1%}.')


def prompts_alone(rows, encode, max_tokens):
    """public.clean_pairs for rows without answers."""
    kept = [row for row in rows if row["prompt"].strip()]
    return kept, {"kept": len(kept), "empty": len(rows) - len(kept)}


def main():
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", help="pairs, breaks, a file, or a dataset's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.source is None:
        return show_task(args.seed)
    if args.source == "breaks":
        return breaks.print_catalogue()
    fields, name = ("prompt", "chosen", "rejected"), "pair"
    if args.source == "pairs":
        shown = task.preference_pairs(10, args.seed)
    else:
        rows = public.load_or_exit(args.source)
        clean, unit = public.clean_pairs, "pairs"
        # A problem has perhaps only a number. An answer that is there and empty is another thing: it is dropped below.
        rows = [row | {"chosen": row["answer"]} if row["chosen"] is None else row for row in rows]
        if public.is_judged(rows):
            clean, unit, name = partial(public.clean_demonstrations, judged=True), "answers", "answer"
        elif all(row["rejected"] is None for row in rows):
            if any(row["chosen"] for row in rows):
                clean, unit, fields, name = public.clean_demonstrations, "rows", ("prompt", "chosen"), "row"
            elif any(row["prompt"] for row in rows):
                clean, unit, fields, name = prompts_alone, "prompts", ("prompt",), "prompt"
        rows, counts = clean(rows, str.split, 10**9)
        public.say_counts(args.source, counts, unit=unit)
        shown = random.Random(args.seed).sample(rows, min(10, len(rows)))
        if name == "pair" and rows:
            print(length_statistics(rows))
    for number, row in enumerate(shown, 1):
        about = f", answer {row['answer']}" if row["answer"] else ""
        if name == "answer":
            about = ", judged bad" if row["chosen"] is None else ", judged good"
        print(f"\n==== {name} {number}{about}")
        for field in fields:
            if row[field] is not None:
                print(f"  {field}:\n{indented(row[field])}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a character that the terminal cannot show is printed as "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `python -m data | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
