"""Measure breaks over several seeds, and write the tables of data/results/README.md.

    python tests/measure.py --all --seeds 201 202 203 204 205     every break of data/breaks.py
    python tests/measure.py --all --only grpo flip_labels         only these scripts or breaks
    python tests/measure.py dpo flip_labels --seeds 101 102       one break, with all of its numbers
    python tests/measure.py grpo clean --max_steps 1000           a run without a break
    python tests/measure.py --tables                              only write the tables, from data/results/*.json

A seed stands for a chain: SFT model, data and evaluation are made anew for each seed, from the base model that comes
with the repository. Flags that are not known here are passed to the scripts. Runs are kept under runs/ in the current
folder, and the numbers of each result in data/results/NAME.json, where NAME is the name of the run. Runs are used again
only while the code that made them is unchanged. A result is kept, with the commit that made it: a call that was
interrupted continues where it stopped, and one that is complete only prints. --renew measures again what other code has
made. --jobs 2 measures two seeds at a time, each on one core.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import breaks, report, runs

REPO = runs.HERE
RESULTS = REPO / "data" / "results"
BEGIN = "<!-- Written by `python tests/measure.py --tables`, from the .json files beside this one. Do not edit. -->"
END = "<!-- The end of what measure.py writes. -->"
# The same marks around the first table of README.md.
FIRST_BEGIN = "<!-- Written by `python tests/measure.py --tables`, from data/results/. Do not edit. -->"
FIRST_END = END
# What tells whether a clean run is healthy: what the chapter teaches, before (if it is measured) and after.
HEALTH = {
    "sft": ("accuracy_sampled",), "reward_model": ("held_out_accuracy",), "ppo": ("start_accuracy", "end_accuracy"),
    "grpo": ("start_accuracy", "end_accuracy"), "dpo": ("accuracy_sampled_sft", "accuracy_sampled"),
    "reasoning": ("one", "chosen"), "tools": ("accuracy_greedy", "accuracy_priced"),
}  # fmt: skip
FIGURES = (("dpo", "flip_labels"), ("grpo", "reward_hacking"), ("ppo", "reward_hacking"))

# ---------------------------------------------------------------------------------------------
# Running


def both(script, flags):
    """The runs.Run of `python SCRIPT.py FLAGS`; for a break those of both runs: [clean, broken]."""
    args = runs.parse(script, importlib.import_module(script).parser(), list(map(str, flags)), breaks.of(script))
    return [runs.Run(runs.without_break(args)), runs.Run(args)] if getattr(args, "break_", None) else [runs.Run(args)]


def execute(script, flags, output=None):
    """The exit code of `python SCRIPT.py FLAGS`. In a process of its own: the report contains the process's peak
    memory. --resume keeps what is there."""
    command = [sys.executable, REPO / f"{script}.py", *map(str, flags), "--resume"]
    return subprocess.run(command, stdout=output, stderr=output).returncode


def trained(script, *flags):
    """The finished runs of `python SCRIPT.py FLAGS`, as in both()."""
    found = both(script, flags)
    if not all(run.finished() for run in found) and execute(script, flags):
        sys.exit(f"{script}.py {' '.join(map(str, flags))} failed")
    return found


def set_aside(seed, flags=()):
    """Move the runs of this seed that other code has made to runs/stale-CODE/. A script would use an earlier chapter's
    model although its code has changed (see runs.made_by); the tables shall not. A run that the flags name stays."""
    named = {Path(flag) for flag in map(str, flags)}
    for path in Path("runs").glob("*/config.json"):
        if named & {path.parent, path.parent / "model"}:
            continue  # --load FOLDER means this model, whatever code has made it; the result says which (see chain)
        config = runs.read_json(path)
        if config.get("seed") == seed and config["code"] != runs.code_checksum(config["script"]):
            target = Path("runs") / f"stale-{config['code']}" / path.parent.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            path.parent.rename(target)


def chain(*reports):
    """{script: checksum of its code} of these runs and of all runs whose models they were made from."""
    found, todo, seen = {}, list(reports), set()
    while todo:
        report = todo.pop()
        found[report["config"]["script"]] = report["config"]["code"]
        # A circle is possible: distribution_shift reads the policy that was trained against its reward model.
        for path in set(report["models"]) - seen:
            seen.add(path)
            earlier = runs.read_json(Path(path).parent.parent / "report.json")
            todo += [earlier] if earlier else []
    return found


# ---------------------------------------------------------------------------------------------
# Results


def commit():
    """The commit that is checked out, and whether a file of it has been edited (the results do not count)."""
    try:
        git = ["git", "-C", str(REPO)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        edited = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)data/results"]
        return {"commit": head, "dirty": bool(subprocess.run(edited, capture_output=True, check=True).stdout)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}


def write_result(path, result):
    text = json.dumps(result, indent=1) + "\n"
    runs.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def made_by(result):
    """The commit of a result, as the tables name it."""
    return f"`{result['commit'][:7]}`" + (" with edits" if result["dirty"] else "")


def machine(device):
    cores = f"{os.cpu_count()} cores ({platform.machine()}), {os.environ.get('OMP_NUM_THREADS', 'all')} used per run"
    return f"{cores}, torch {torch.__version__} on {torch.cuda.get_device_name() if 'cuda' in device else device}"


def thinned(rows, most=50):
    """Means of neighbouring rows, so that at most so many are left. All rows have the same names."""
    width = -(-len(rows) // most)
    blocks = (rows[i : i + width] for i in range(0, len(rows), width))
    return [{name: round(mean([row[name] for row in block]), 4) for name in block[0]} for block in blocks]


def drawn(entry, run):
    """What the figure of a break draws of one run: rows like those of metrics.jsonl, thinned."""
    names = {name for panel in entry.panels if not panel.bars for name in (panel.x, panel.right, *panel.metrics)}
    kinds = {}  # updates and evaluations log different names
    for m in run.metrics:
        row = {name: m[name] for name in m if name in names}
        kinds.setdefault(tuple(row), []).append(row)
    return [row for names, rows in kinds.items() if len(names) > 1 for row in thinned(rows)]


def judged(result):
    """The result with the claims of today's catalogue: their sentences, values, and whether they hold."""
    if result["break"] != "clean":
        entry, reports = breaks.entry(result["script"], result["break"]), result["reports"]
        result["claims"] = [
            {"claim": claim.text(reports), "left": claim.left.value(reports), "right": claim.right.value(reports),
             "holds": claim.holds(reports)}
            for claim in entry.claims_on(reports, embedded=not result["config"].get("data"))
        ]  # fmt: skip
    return result


def measure(script, name, flags, seed, renew):
    """The result of one break on one seed: from its file, or from runs, which are trained if they are missing.
    renew: not from a file that other code has made. Exits with one line if the script fails."""
    words = [*([] if name == "clean" else ["--break", name]), *flags, "--seed", str(seed)]
    found = both(script, words)
    path = RESULTS / f"{found[-1].folder.name}.json"
    result = runs.read_json(path)
    kept = result and result["config"] | {"code": ""} == found[-1].config | {"code": ""}
    if kept and renew:
        kept = all(runs.code_checksum(name) == code for name, code in result["chain"].items())
    if not kept:
        made_with, log = commit(), Path("runs") / "logs" / f"{path.stem}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            code = execute(script, words, file)
        if code or not all(run.finished() for run in found):  # code 0, not finished: the script was edited meanwhile
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            sys.exit(f"{script}.py {' '.join(words)}: exit code {code}, {last[-1]}   (all of it: {log})")
        reports = {label: run.report for label, run in zip(("clean", "broken"), found)}
        result = {
            "script": script, "break": name, "flags": flags, "seed": seed, **made_with,
            "machine": machine(found[0].device),
            "seconds": round(sum(report["seconds"] for report in reports.values()), 1),
            "reports": {label: {key: value for key, value in report.items() if type(value) in (int, float)}
                        for label, report in reports.items()},
            "curves": [m for m in found[-1].metrics if "n" in m],  # what reasoning.py measured for every N
            "drawn": {label: drawn(breaks.entry(script, name), run) for label, run in zip(reports, found)
                      if name != "clean"},
            "config": found[-1].config, "chain": chain(*(run.report for run in found)),
        }  # fmt: skip
    write_result(path, judged(result))
    return result


def measure_seed(seed, wanted, flags, stop, renew=False):
    """The results of all wanted (script, break) on one seed, in their order. After one that fails, the next follows."""
    results = []
    for script, name in wanted:
        if stop.is_set():
            break
        set_aside(seed, flags)
        try:
            results.append(measure(script, name, flags, seed, renew))
        except SystemExit as error:
            print(f"seed {seed}: {error}", flush=True)
        else:
            held = "" if name == "clean" else ", " + ("reproduced" if reproduced(results[-1]) else "NOT reproduced")
            print(f"seed {seed}: {script} {name}{held}, {results[-1]['seconds']:.0f} s", flush=True)
    return results


def keep_table(name, title, columns, rows, notes="", **more):
    """Write the table of another command (a benchmark, say) to data/results/NAME.json: --tables prints it. more: what a
    figure of it needs."""
    command = " ".join(["python", f"tests/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    cores = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} used"
    kept = {"title": title, "command": command, **commit(), "machine": f"{cores}, torch {torch.__version__}",
            "columns": columns, "rows": rows, "notes": notes, **more}  # fmt: skip
    write_result(RESULTS / f"{name}.json", kept)


# ---------------------------------------------------------------------------------------------
# Tables


def mean(values):
    return sum(values) / len(values)


def spread(values, digits=3):
    """'0.405 (0.360 to 0.450)': mean, lowest and highest; of one value that value."""
    lowest_to_highest = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return f"{mean(values):.{digits}f}" + lowest_to_highest * (len(values) > 1)


def line(*cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def row(*cells):
    print(line(*cells), flush=True)


def header(*cells):
    row(*cells)
    print("|---" * len(cells) + "|")


def reproduced(result):
    return all(claim["holds"] for claim in result["claims"])


def groups(results):
    """{(script, break, flags): results of all seeds}, in the order of the catalogue; runs without a break come last."""
    order, found = {(entry.script, entry.name): place for place, entry in enumerate(breaks.BREAKS)}, {}
    for result in sorted(results, key=lambda r: (order.get((r["script"], r["break"]), 99), r["seed"])):
        found.setdefault((result["script"], result["break"], tuple(result["flags"])), []).append(result)
    return found


def overview(found):
    """Lines: one row per break, on how many seeds all of its claims hold, and the claims that do not."""
    lines = [line("break", "reproduced", "seeds", "claims that failed"), "|---" * 4 + "|"]
    for (script, name, flags), results in found.items():
        if name != "clean":
            failed = [f"{r['seed']}: {c['claim']}" for r in results for c in r["claims"] if not c["holds"]]
            seeds, held = " ".join(str(r["seed"]) for r in results), sum(map(reproduced, results))
            words = " ".join([f"{script}.py --break {name}", *flags])
            lines.append(line(f"`{words}`", f"{held} of {len(results)}", seeds, "<br>".join(failed)))
    return lines


def clean_runs(found):
    """Lines: how the clean runs of all seeds came out, those beside breaks too, and the worst seed of each."""
    seeds = {}  # {(script, flags): {seed: report}}
    for (script, name, flags), results in found.items():
        documented = breaks.entry(script, name).flags if name != "clean" else ()
        for result in results:
            seeds.setdefault((script, (*documented, *flags)), {})[result["seed"]] = result["reports"]["clean"]
    lines = [line("clean run", "", "mean (lowest to highest)", "lowest on", "seeds"), "|---" * 5 + "|"]
    for (script, flags), reports in sorted(seeds.items(), key=lambda pair: list(HEALTH).index(pair[0][0])):
        command = f"`{' '.join([f'{script}.py', *flags])}`"
        for key in HEALTH[script] if len(reports) > 1 else ():
            values = {seed: report[key] for seed, report in sorted(reports.items())}
            worst, all_seeds = min(values, key=values.get), " ".join(map(str, values))
            lines.append(line(command, breaks.label(key), spread([*values.values()]), worst, all_seeds))
    return lines


def compared(claim, results):
    """Both sides of a claim, as means over these results, and how they really compare: '0.035 < 0.500'."""
    left, right = (mean([side.value(r["reports"]) for r in results]) for side in (claim.left, claim.right))
    return f"{left:.3f} {'<' if left < right else '>' if left > right else '='} {right:.3f}"


def beside_published(found):
    """Lines: a published model (--load, on the built-in task) beside the repository's own base model. One row per claim
    of a break, and one per number that tells whether a run without a break is healthy."""
    lines = [line("run", "claim", "own base model", "published model"), "|---" * 4 + "|"]
    for (script, name, flags), results in found.items():
        if "--load" in flags and "--data" not in flags:
            both = (found.get((script, name, ()), []), results)
            if name == "clean":
                rows = {breaks.label(key): [spread([r["reports"]["clean"][key] for r in some]) if some else ""
                                            for some in both] for key in HEALTH[script]}  # fmt: skip
            else:
                claims = breaks.entry(script, name).claims_on(results[0]["reports"], embedded=True)
                rows = {claim.text(): [compared(claim, some) if some else "" for some in both] for claim in claims}
            at = flags.index("--load")  # the other flags tell apart several clean runs of a script
            words = [*flags[:at], *flags[at + 2 :]] if name == "clean" else ["--break", name]
            command = f"`{' '.join([f'{script}.py', *words])}`"
            lines += [line(command, text, *cells) for text, cells in rows.items()]
    return lines


def details(results, metrics=None):
    """Lines: a row per metric and a column per run, over the seeds; then the curves of reasoning.py, if there are."""
    labels = list(results[0]["reports"])
    rows = metrics or [key for key in results[0]["reports"]["clean"] if key in breaks.METRICS]
    lines = [line("", *(results[0]["break"] if label == "broken" else label for label in labels))]
    lines.append("|---" * (1 + len(labels)) + "|")
    for key in dict.fromkeys(rows):
        if all(key in r["reports"][label] for r in results for label in labels):
            cells = (spread([r["reports"][label][key] for r in results]) for label in labels)
            lines.append(line(breaks.label(key), *cells))
    if curves := [r["curves"] for r in results if r["curves"]]:
        lines += ["", line("N", *(m["n"] for m in curves[0])), "|---" * (1 + len(curves[0])) + "|"]
        for key in (key for key in curves[0][0] if key not in ("n", "step")):
            lines.append(line(breaks.label(key), *(f"{mean([m[key] for m in same]):.3f}" for same in zip(*curves))))
    return lines


def between(path, begin, end, text):
    """Replace what stands between two marks of a file. Exits if it lacks them."""
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"{path} lacks the marks between which the tables belong:\n{begin}\n{end}")
    text = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    runs.write_atomically(path, lambda new: new.write_text(text, encoding="utf-8", newline="\n"))


def write_figures(found, folder):
    """The figures of README.md: every seed of these breaks, without flags of their own."""
    for script, name in FIGURES:
        results = [r for r in found.get((script, name, ()), []) if "drawn" in r]
        rows = [SimpleNamespace(label="clean" if label == "clean" else name, metrics=r["drawn"][label],
                                report=r["reports"][label]) for r in results for label in r["drawn"]]  # fmt: skip
        if rows:
            panels = [panel for panel in breaks.entry(script, name).panels if not panel.bars]
            report.draw(folder / f"{script}-{name}.png", rows, panels)


def draw_frontier(points, path):
    """The figure of frontier.py. points: {reward: {beta: for each seed, a list of [square root of KL, accuracy]}}"""
    fig = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    titles = {"learned": "reward: a learned model", "checker": "reward: the exact checker"}
    for ax, (reward, betas) in zip(axes, points.items()):
        for i, (beta, seeds) in enumerate(betas.items()):
            color = colormaps["viridis"](0.9 * i / max(1, len(betas) - 1))
            for j, run in enumerate(seeds):
                label = f"beta {beta}" if j == 0 else None
                ax.plot(*zip(*run), ".-", color=color, linewidth=0.8, markersize=5, label=label)
        ax.set(title=titles[reward], xlabel="square root of the KL to the SFT model (nats)")
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("accuracy")
    fig.savefig(path, dpi=110)


def write_first_table(found, readme):
    """The table of README.md: what `python dpo.py --break flip_labels` prints, which is seed 0."""
    for result in found.get(("dpo", "flip_labels", ()), []):
        if result["seed"] == 0:
            entry = breaks.entry("dpo", "flip_labels")
            verdict = "reproduced" if reproduced(result) else "NOT reproduced"
            table = report.table(result["reports"], entry)
            between(readme, FIRST_BEGIN, FIRST_END, f"```\n{table}\n\n{entry.name}: {verdict}.\n```")


def write_tables():
    """Replace what stands between the marks of data/results/README.md and of README.md, and draw the latter's figures.
    The rest of both files is written by hand and kept."""
    readme = RESULTS / "README.md"
    kept = [runs.read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    found = groups(result for result in kept if "break" in result)
    plain, other = ({key: some for key, some in found.items() if bool(key[2]) == flags} for flags in (False, True))
    lines = [*overview(plain), "", "The clean runs, alone or beside a break:", "", *clean_runs(found)]
    lines += ["", "With other data, models or settings:", "", *overview(other)] if other else []
    if len(published := beside_published(found)) > 2:  # more than the header
        lines += ["", "The same with a published model (`--load`), means over the seeds:", "", *published]
    for (script, name, flags), results in found.items():
        metrics = None
        if name != "clean":
            entry = breaks.entry(script, name)
            metrics = (*entry.dashboard, *entry.external)
        lines += ["", f"### `{script}.py`, `{name}`" + (f", `{' '.join(flags)}`" if flags else ""), ""]
        lines += [entry.summary[0].upper() + entry.summary[1:] + ".", ""] if metrics else []
        seeds = " ".join(str(r["seed"]) for r in results)
        lines += [f"`python tests/measure.py {' '.join([script, name, *flags])} --seeds {seeds}`", ""]
        lines += details(results, metrics)
        commits = set(map(made_by, results))
        of = f"Mean (lowest to highest) of {len(results)} seeds" if len(results) > 1 else "One seed"
        lines += ["", f"{of}. Commit {', '.join(sorted(commits))}; "
                  f"{'; '.join(sorted({r['machine'] for r in results}))}; "
                  f"{spread([r['seconds'] for r in results], 0)} seconds per seed, "
                  f"{max(report['peak_gb'] for r in results for report in r['reports'].values()):.1f} GB."]  # fmt: skip
    for table in (table for table in kept if "rows" in table):
        lines += ["", f"### {table['title']}", "", f"`{table['command']}`", ""]
        lines += [line(*table["columns"]), "|---" * len(table["columns"]) + "|", *(line(*r) for r in table["rows"])]
        lines += ["", f"{table['notes']} Commit {made_by(table)}; {table['machine']}.".strip()]
    between(readme, BEGIN, END, "\n".join(lines))
    write_figures(found, REPO / "data" / "figures")
    for table in (table for table in kept if "points" in table):
        draw_frontier(table["points"], REPO / "data" / "figures" / "frontier.png")
    write_first_table(found, REPO / "README.md")
    print(f"{readme}: written from {len(kept)} results")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    # SCRIPT BREAK come first, if at all. Flags of the scripts may follow, so argparse cannot tell them from values.
    one = tuple(argv[:2]) if argv and not argv[0].startswith("-") else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                                     usage="measure.py (SCRIPT BREAK | --all | --tables) [options]",
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--all", action="store_true", help="measure every break")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="with --all: these scripts or breaks")
    parser.add_argument("--tables", action="store_true", help="write the tables of data/results/README.md")
    parser.add_argument("--renew", action="store_true", help="measure again what other code has made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; with 2 or more, each on one core")
    args, flags = parser.parse_known_args(argv[2:] if one else argv)
    wanted = [one] if one else [(entry.script, entry.name) for entry in breaks.BREAKS] if args.all else []
    for name in args.only:
        if not any(name in pair for pair in wanted):
            parser.error(f"--only {name}: no such script or break")
    wanted = [pair for pair in wanted if not args.only or set(pair) & set(args.only)]
    if not wanted and not args.tables:
        parser.error("nothing to measure")
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
    for script, _ in wanted:  # here, not in two threads at the same time
        importlib.import_module(script)
    # Ctrl-C reaches the scripts too: they save and end. Then nothing more is started, and the same command continues.
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(measure_seed, seed, wanted, flags, stop, args.renew) for seed in args.seeds if wanted]
        results = [result for job in jobs for result in job.result()]
    signal.signal(signal.SIGINT, before)
    if stop.is_set():
        sys.exit(130)
    if results:
        found = groups(results)
        print("\n" + "\n".join(overview(found)))
        if one:
            print("\nmean (lowest to highest)\n\n" + "\n".join(details(results)))
    if args.tables:
        write_tables()
    if len(results) < len(wanted) * len(args.seeds):
        sys.exit(f"{len(wanted) * len(args.seeds) - len(results)} results are missing: see above, then run it again.")


if __name__ == "__main__":
    main()
