"""The clean run and the broken run side by side: table, claims, verdict, figure, and the page of a run (data/page.py).

Everything here is read from the runs' files (data/runs.py) and from the catalogue (data/breaks.py). This file does
not depend on the training code.
"""

import textwrap

from data import breaks, page, parts, runs


def one_run(train, args, reuse):
    """runs.run_once(), then the page of the run."""
    run = runs.run_once(train, args, reuse)
    if run.report and parts.PROCESS == 0:
        print(f"Page: {page.write(run)}")
    return run


def train_and_compare(train, args):
    """The main program of every script: one run, or with --break two runs and their comparison.

    train(args) trains and returns its runs.Run. The clean run of a break is trained only if it is not on
    disk. Returns the last run.
    """
    if getattr(args, "break_", None) is None:
        run = one_run(train, args, reuse=args.resume)
        if args.script in FIGURES and run.report:
            draw(run.folder / "figure.png", [run], FIGURES[args.script])
            print(f"Figure: {run.folder / 'figure.png'}")
        return run
    clean = one_run(train, runs.without_break(args), reuse=True)
    broken = runs.run_once(train, args, reuse=args.resume)
    if parts.PROCESS > 0:
        return broken
    entry = breaks.entry(args.script, args.break_)
    compare(clean, broken, entry, embedded=not getattr(args, "data", None))
    print(f"Page: {page.write(broken, clean, entry)}")
    return broken


def compare(clean, broken, entry, embedded):
    """Print table, claims, verdict and cure of one break; draw its figure; add the verdict to the report.

    embedded: the runs used the embedded task. With real data the claims that need its checker are not made.
    """
    reports = {"clean": clean.report, "broken": broken.report}
    print(f"\n{entry.name}: {entry.summary}\n\n{table(reports, entry)}\n")
    claims = {claim.text(reports): claim.holds(reports) for claim in entry.claims_on(reports, embedded)}
    for sentence, holds in claims.items():
        print(f"  [{'x' if holds else ' '}] {sentence}")
    failed = [sentence for sentence, holds in claims.items() if not holds]
    verdict = "reproduced" if not failed else "NOT reproduced. Claims that failed: " + "; ".join(failed)
    print(f"\n{entry.name}: {verdict}.\nThe cure to try:  {entry.cure}")
    draw(broken.folder / "figure.png", [clean, broken], entry.panels)
    print(f"Figure: {broken.folder / 'figure.png'}   outputs: {broken.folder / 'samples.md'}")
    broken.write_report(broken.report | {"reproduced": not failed, "claims": claims})


def table(reports, entry):
    """Clean beside broken: the dashboard's metrics above, those of the external evaluation below."""
    lines = [f"{'':42}{'clean':>12}{entry.name:>26}"]
    for heading, measured in entry.measured(reports):
        lines += [heading, *(f"  {breaks.label(metric):40}{C:>12.3f}{B:>26.3f}" for metric, C, B in measured)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Figures

# The figure of a clean run, where there is one.
FIGURES = {
    "reasoning": (
        breaks.Panel("the same answers, selected in different ways", "accuracy",
                     ("oracle", "weighted_vote", "vote_of_top", "vote", "best_of_n"), "n", log2=True),
        breaks.Panel("the verifier's highest score", "score", ("score",), "n", log2=True),
    )
}  # fmt: skip
COLORS = {"clean": "tab:blue", "broken": "tab:red"}


def running_mean(values):
    """Smooth long curves: the noise of single batches would hide the line."""
    width = len(values) // 30
    if len(values) <= 60:
        return values
    windows = (values[max(0, i - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(path, both, panels):
    """One row of panels into a PNG file. both: the clean run and, of a break, the broken one; or those of several
    seeds, and then without bars."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file: works without a screen
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for ax, panel in zip(axes, panels):
        some = [run for run in both if panel.runs == "both" or run.label != "clean"]
        if panel.bars:
            bars(ax, some, panel)
        else:
            lines(ax, some, panel)
        ax.set_title(panel.title)
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def bars(ax, some, panel):
    """A group of bars for each result, one bar for each run."""
    width = 0.8 / len(some)
    metrics = [metric for metric in panel.metrics if all(metric in run.report for run in some)]
    for i, run in enumerate(some):
        values = [run.report[metric] for metric in metrics]
        places = [j + (i - (len(some) - 1) / 2) * width for j in range(len(values))]
        color = COLORS["clean" if run.label == "clean" else "broken"]
        drawn = ax.bar(places, values, width, color=color, label=run.label)
        ax.bar_label(drawn, fmt="%.2f", fontsize=7)
    names = [textwrap.fill(breaks.label(metric), 20) for metric in metrics]
    ax.margins(y=0.2)  # room for the legend above the bars
    ax.set_xticks(range(len(names)), names, fontsize=7)
    ax.set_ylabel(panel.ylabel)
    ax.legend(fontsize=8)


def lines(ax, some, panel):
    """A line for each run and metric, over the steps (or over another logged number)."""
    several = len(panel.metrics) > 1
    styles = dict(zip(panel.metrics, ("-", "--", ":", "-.", (0, (1, 3)))))
    labels, named = {run.label for run in some}, set()
    for run in some:
        color = COLORS["clean" if run.label == "clean" else "broken"]
        for i, metric in enumerate(panel.metrics):
            logged = [(m[panel.x], m[metric]) for m in run.metrics if metric in m and panel.x in m]
            if not logged:
                continue
            xs, ys = zip(*logged)
            name = breaks.label(metric) if several else run.label
            if several and len(labels) > 1:
                name = f"{run.label}: {name}"
            # One run with several metrics: a color each. Two runs: a color per run, a style per metric.
            style = styles[metric] if several else "-" if run.label == "clean" or len(labels) == 1 else "--"
            color = f"C{i}" if several and len(labels) == 1 else color
            if name in named:
                name = None  # the same run on another seed: one entry in the legend is enough
            named.add(name)
            ax.plot(xs, running_mean(ys), linestyle=style, color=color, linewidth=2 if len(some) < 3 else 1, label=name)
    ax.set_ylabel(panel.ylabel)
    ax.set_xlabel({"test_sqrt_kl": "distance: square root of the KL to the reference (nats)", "n": "N answers"}
                  .get(panel.x, panel.x))  # fmt: skip
    if panel.log2:
        sizes = sorted({m["n"] for run in some for m in run.metrics if "n" in m})
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes[::2], [str(n) for n in sizes[::2]])
    if not panel.right:
        if ax.lines:
            ax.legend(fontsize=8 if not several else 7)
        return
    ax.set_ylabel(f"{panel.ylabel} (solid)", color="tab:red")
    other = ax.twinx()
    other.set_ylabel("reward on held-out problems (dashed)", color="0.3")
    for run in some:
        evaluations = [m for m in run.metrics if panel.right in m]
        star = next(m for m in evaluations if m["step"] == run.report["peak_step"])
        ax.plot(star[panel.x], star[panel.metrics[0]], "*", color="tab:red", markersize=15 if len(some) == 1 else 9)
        xs, ys = zip(*((m[panel.x], m[panel.right]) for m in evaluations))
        other.plot(xs, ys, "--", color="0.3", linewidth=1.5 if len(some) == 1 else 1)
