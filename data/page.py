"""The page of a run: one HTML file to look at, without a network, without a server.

    runs/NAME/page.html     of a break: what was changed, and which run is broken? When the reader has chosen: the
                            external evaluation, the outputs of both runs side by side, the verdict. Of any other run:
                            its curves, outputs and numbers.
    runs/index.html         all runs

Everything is read from the runs' files (data/runs.py), the catalogue (data/breaks.py) and the script's source. The
curves are SVG made here; the template data/page.html holds the style and the few dozen lines of JavaScript that the
choice, the slider and the copy button need. Without JavaScript nothing is hidden, and the outputs are in samples.md.
Outputs are data, not HTML: they travel as JSON and are shown as text.
"""

import ast
import importlib
import json
import math
import random
import re
import shlex
import textwrap
from html import escape
from pathlib import Path
from types import SimpleNamespace

from data import breaks, runs, task

HERE = Path(__file__).resolve().parent
POINTS = 60  # of a curve: more cannot be told apart at the width of a phone
CHECKPOINTS = 60  # on the slider
LIMIT = 900_000  # bytes of a page
WORDS = (*task.OPENINGS, task.CONFIDENT, "Check:")  # style, not correctness: they multiply when a reward likes them


def write(run, clean=None, entry=None):
    """Write run.folder/page.html, and the list of all runs beside the folder. Returns the page's path.

    clean, entry: of a break, the clean run and the entry of the catalogue.
    """
    both = [clean, run] if entry else [run]
    # The files of a run are read once: these properties read them each time.
    both = [SimpleNamespace(folder=r.folder, label=r.label, report=r.report, metrics=r.metrics, outputs=r.outputs)
            for r in both]  # fmt: skip
    clean, run = both[0], both[-1]
    parts = break_page(clean, run, entry) if entry else run_page(run)
    characters = 200_000
    while True:  # long outputs are cut until the page is small enough to open at once
        data = outputs(both, characters)
        page = render(run.folder.name, parts, data)
        if len(page) <= LIMIT or characters < 10:
            break
        characters //= 2
    runs.write_atomically(run.folder / "page.html", lambda path: path.write_bytes(page))
    listed = render("Runs", [index(run.folder.parent)], None)
    # Several runs may end at once, and all write the index: the temporary file is in the run's own folder.
    runs.write_atomically(run.folder.parent / "index.html", lambda path: path.write_bytes(listed), run.folder)
    return run.folder / "page.html"


def render(title, parts, data):
    """The template, filled. One pass, so that nothing in a run can look like a placeholder."""
    # "<" cannot stand in a script element: "</script>" would end it.
    holes = {"title": escape(title), "body": "\n".join(parts), "data": json.dumps(data).replace("<", "\\u003c")}
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: holes[m[1]], template).encode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------
# 1. What was changed


def mistakes(script):
    """({name of a break: the lines of its mistake, counted from 1}, all lines of the script).

    These are the statements that compare args.break_ with the name. A statement that only refuses impossible flags
    (all of main, and what only raises) is not the mistake.
    """
    source, found = (HERE.parent / f"{script}.py").read_text(encoding="utf-8"), {}

    def visit(node, statement):
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "args.break_":
            body = getattr(statement, "body", [statement])
            names = [c.value for side in node.comparators for c in ast.walk(side) if isinstance(c, ast.Constant)]
            for name in names * (not all(isinstance(inner, ast.Raise) for inner in body)):
                found.setdefault(name, set()).update(range(statement.lineno, body[-1].end_lineno + 1))
        for child in ast.iter_child_nodes(node):
            visit(child, statement)

    visit(ast.parse(source), None)
    return found, source.splitlines()


def excerpt(script, name, around=2):
    """The mistake with two lines of context before and after: for each place in the script a list of (line number,
    text, is it the mistake?). The context ends where the lines of another break begin."""
    found, lines = mistakes(script)
    wrong = found[name]
    others = set().union(*found.values()) - wrong
    near = {
        n for w in wrong for n in range(max(1, w - around), min(len(lines), w + around) + 1)
        if not others.intersection(range(min(n, w), max(n, w) + 1))
    }  # fmt: skip
    places = []
    for n in sorted(near):
        if n - 1 not in near:
            places.append([])
        places[-1].append(n)
    texts = [textwrap.dedent("\n".join(lines[n - 1] for n in place)).split("\n") for place in places]
    return [[(n, line, n in wrong) for n, line in zip(place, text)] for place, text in zip(places, texts)]


def change_and_outcome(entry):
    """The two halves of "chosen and rejected swapped: answers are wrong". The second one would tell which run is
    broken, so the page keeps it for the verdict."""
    change, _, outcome = entry.summary.partition(": ")
    return change, outcome


def changed(entry):
    lead = sentence(change_and_outcome(entry)[0])
    html = ["<section><h2><span>1</span> What was changed</h2>", f"<p class=lead>{lead}</p>"]
    for rows in excerpt(entry.script, entry.name):
        code = "".join(
            f'<span class="{"wrong" if wrong else "line"}"><i>{n}</i>{escape(line) or " "}</span>'
            for n, line, wrong in rows
        )
        html.append(f'<pre class=code tabindex=0 role=region aria-label="source of {entry.script}.py">{code}</pre>')
    html.append(f"<p class=note>From <code>{entry.script}.py</code>. The marked lines are the mistake. "
                "Everything else is the same in both runs.</p></section>")  # fmt: skip
    return "\n".join(html)


def sentence(text):
    return escape(text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."))


# ---------------------------------------------------------------------------------------------
# Curves and bars


def result_of(key):
    """The name in the report of what a figure's panel names as it was logged. PPO and GRPO log an evaluation's results
    as test_NAME. What they log of each batch, `reward` and `kl`, are not the `reward` and the `kl` of their report."""
    return f"batch_{key}" if key in ("reward", "kl") else key.removeprefix("test_")


def key_of(metrics, metric):
    """The other way round: the name under which a result of the report was logged."""
    if metric in ("first_reward", "batch_reward", "batch_kl"):
        return metric.split("_")[1]
    return f"test_{metric}" if any(f"test_{metric}" in m for m in metrics) else metric


def points(metrics, key, x=None):
    """(x's name, xs, ys) of one logged metric, thinned out; None if it was logged less than twice."""
    rows = [m for m in metrics if key in m]
    if x is None:
        x = "n" if rows and "n" in rows[0] else "step"
    rows = [(m[x], m[key]) for m in rows if x in m]
    if len(rows) < 2:
        return None
    # Means of k neighbours: fewer points, and less of the noise of single batches.
    k = math.ceil(len(rows) / POINTS)
    some = [rows[i : i + k] for i in range(0, len(rows), k)]
    xs, ys = ([sum(row[i] for row in part) / len(part) for part in some] for i in (0, 1))
    xs[0], xs[-1] = rows[0][0], rows[-1][0]
    return x, xs, ys


X_NAMES = {"test_sqrt_kl": "distance: square root of the KL (nats)", "n": "N answers"}
FRACTION = re.compile(
    r"accuracy|fraction|vote|oracle|pass@|best_of_n|chosen|recovered|distinct|check|ended|opening|confident|miscalc|groups"
)


def label(metric):
    name = breaks.METRICS.get(metric) or breaks.label(f"test_{metric}").removeprefix("test_")
    return name.replace("_", " ") + " (before training)" * metric.endswith("_sft")


def number(value):
    return f"{value:g}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3f}"


def rounded(low, high):
    """The range of a vertical axis: a little more than the values, from one round number to another. It is not less
    than a twentieth of the values: a change that small would look large."""
    least = 0.05 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    unit = 10 ** math.floor(math.log10(high - low))
    unit *= next(f for f in (0.2, 0.5, 1, 2) if (high - low) / (unit * f) <= 8)
    return math.floor(low / unit) * unit, math.ceil(high / unit) * unit


def chart(title, lines, x="step", shares=False, marked=None, fraction=False):
    """One chart. lines: [(style, name, xs, ys, value to print), ...]; a style is a class of the template.

    shares: the horizontal axis is the share of each run, because the runs differ in length. marked: (x, name) of a
    vertical line.
    """
    scale = (lambda v: math.log2(v)) if x == "n" else float
    low_y, high_y = min(min(line[3]) for line in lines), max(max(line[3]) for line in lines)
    low_y, high_y = (0.0, 1.0) if fraction and low_y >= 0 and high_y <= 1 else rounded(low_y, high_y)
    low_x, high_x = min(min(line[2]) for line in lines), max(max(line[2]) for line in lines)

    def place(value, low, high):
        return 100 * (value - low) / ((high - low) or 1)

    paths, dots = ['<path class=grid d="M0 50H100"/>'], []
    for style, _, xs, ys, _ in lines:
        ends = (scale(xs[0]), scale(xs[-1])) if shares else (scale(low_x), scale(high_x))
        spots = [f"{place(scale(a), *ends):.1f} {98 - 0.96 * place(b, low_y, high_y):.1f}" for a, b in zip(xs, ys)]
        paths.append(f'<path class="curve {style}" d="M{"L".join(spots)}"/>')
        if scale(xs[-1]) < ends[1]:  # of a shorter run: its curve may be too short to be seen
            dots.append(f'<path class="dot {style}" d="M{spots[-1]}h0"/>')
    if marked:
        at = place(scale(marked[0]), scale(low_x), scale(high_x))
        paths.append(f'<path class=mark d="M{at:.1f} 0V100"/>')
    keys = " ".join(f'<span class="key {style}">{stroke(style)}<b>{escape(name)}</b> {number(value)}</span>'
                   for style, name, _, _, value in lines)  # fmt: skip
    spoken = f"{title}. " + "; ".join(f"{n}: from {number(y[0])} to {number(y[-1])}" for _, n, _, y, _ in lines)
    first, last = ("start", "end") if shares else (f"{low_x:.4g}", f"{high_x:.4g}")
    name = "of each run" if shares else X_NAMES.get(x, x) + (f" · dotted: {marked[1]}" if marked else "")
    return (
        f"<figure class=chart><figcaption>{escape(title)}</figcaption><div>{keys}</div>"
        f'<div class=plot><svg viewBox="0 0 100 100" preserveAspectRatio=none role=img aria-label="{escape(spoken)}">'
        f"{''.join(paths + dots)}</svg><span>{high_y:.4g}</span><span>{low_y:.4g}</span></div>"
        f"<div class=axis><span>{first}</span><span>{escape(name)}</span><span>{last}</span></div></figure>"
    )


def stroke(style):
    """A piece of a curve, so that a name and its curve can be told by more than their color."""
    return f'<svg viewBox="0 0 30 10" aria-hidden=true><path class="curve {style}" d="M0 5H30"/></svg>'


def bars(title, values):
    """Horizontal bars. values: [(style, name, value), ...], from 0 on, or from the smallest if it is negative: then a
    line marks 0."""
    low, high = min(0.0, *(v for *_, v in values)), max(0.0, *(v for *_, v in values))
    if FRACTION.search(title) and low >= 0 and high <= 1:
        high = 1.0
    zero = f'<i style="left:{100 * -low / (high - low):.1f}%"></i>' if low < 0 < high else ""
    rows = []
    for style, name, value in values:
        left, width = (100 * v / ((high - low) or 1) for v in (min(value, 0) - low, abs(value)))
        rows.append(
            f'<div class="key {style}"><b>{escape(name)}</b> {number(value)}</div><div class=bar>'
            f'<div class="{style}" style="margin-left:{left:.1f}%;width:{max(width, 0.5):.1f}%"></div>{zero}</div>'
        )
    return f"<figure class=chart><figcaption>{escape(title)}</figcaption>{''.join(rows)}</figure>"


def compared(metric, both, styles, names, shares=False, title=None, marked=None):
    """One metric of both runs: a chart if both logged it, else bars from the reports. "" if a run has neither."""
    found = [points(run.metrics, key_of(run.metrics, metric)) for run in both]
    if metric in OF_BATCHES and all(found):
        metric, title = OF_BATCHES[metric]
    title = title or label(metric)
    last = [run.report.get(metric) for run in both]
    if all(found):
        x = found[0][0]
        last = [line[2][-1] if value is None else value for line, value in zip(found, last)]
        lines = [(s, n, *line[1:], value) for s, n, line, value in zip(styles, names, found, last)]
        return chart(title, lines, x, shares and x == "step", marked, bool(FRACTION.search(metric)))
    return "" if None in last else bars(title, list(zip(styles, names, last)))


# What training logs of every batch: (where its last value is, the title of its curve). One curve shows the reward of
# the first batches and of the last ones.
OF_BATCHES = {
    "first_reward": ("batch_reward", "reward of the training batches"),
    "batch_reward": ("batch_reward", "reward of the training batches"),
    "batch_kl": ("batch_kl", "KL of the training batches (nats)"),
}


def base(metric):
    """The name that the catalogue explains: of "end_length" and of "test_length" it is "length"."""
    return metric if metric in breaks.MEANINGS else metric.split("_", 1)[-1]


def meanings(metrics, explained=()):
    """What the names of these metrics mean, in their order, as far as the catalogue explains them. explained: metrics
    that an earlier section has explained."""
    names = dict.fromkeys(map(base, metrics))
    known = [name for name in names if name in breaks.MEANINGS and name not in map(base, explained)]
    rows = "".join(f"<dt>{escape(label(m))}<dd>{escape(breaks.MEANINGS[m])}" for m in known)
    return f"<details><summary>What the names mean</summary><dl>{rows}</dl></details>" if rows else ""


def joined(charts, large=False):
    charts = list(dict.fromkeys(chart for chart in charts if chart))
    return f'<div class="charts{" large" if large else ""}">' + "\n".join(charts) + "</div>" if charts else ""


# ---------------------------------------------------------------------------------------------
# 2. Which one is broken?   3. External evaluation


def on_dashboard(entry):
    """The metrics that training shows: those of the entry, and those of its panels that say so."""
    panels = [result_of(m) for panel in entry.panels if panel.title.startswith("dashboard") for m in panel.metrics]
    return list(dict.fromkeys([*panels, *entry.dashboard]))


def guess(clean, run, entry):
    both, order = [clean, run], ["clean", "broken"]
    # By chance, but the same each time that the page is made.
    if random.Random(run.folder.name).random() < 0.5:
        both, order = both[::-1], order[::-1]
    longest = [max((m["step"] for m in r.metrics), default=0) for r in both]
    shares = longest[0] != longest[1] and 0 not in longest
    charts, shown = [], set()
    for metric in on_dashboard(entry):
        key = key_of(run.metrics, metric)
        if key not in shown and (html := compared(metric, both, "ab", "AB", shares)):
            shown.add(key)
            charts.append(html)
    buttons = "".join(
        f'<button type=button data-choice="{letter}">{stroke(letter)}{letter.upper()} is broken</button>'
        for letter in "ab"
    )
    same = all(clean.report.get(metric) == run.report.get(metric) for metric in on_dashboard(entry))
    lengths = {name: length for name, length in zip(order, longest)}
    side = order.index("broken")
    answer = f"{'AB'[side]} is the broken run, {'BA'[side]} the clean one."
    answer += f" The clean run has {lengths['clean']} steps, the broken run {lengths['broken']}." if shares else ""
    answer += " All numbers are the same: nobody can tell them apart here." * same
    answer += f" {entry.clue}" * bool(entry.clue) + " Section 3 shows what training does not measure."
    last = "ten" if entry.script in ("ppo", "grpo") else "fifth of the"
    return f"""<section id=guess data-broken="{"ab"[side]}">
<h2><span>2</span> Which one is broken?</h2>
<p>This is what you see while both runs train. One of them has the mistake above. Look, then choose below: the rest of
the page depends on it. The number beside A or B is the result of that run: a mean over the last {last} steps for what
is logged at every step, and the last evaluation for what is evaluated now and then.</p>
{joined(charts)}{meanings(on_dashboard(entry))}
<div class=vote role=group aria-label="Which run is broken?" hidden>{buttons}<button type=button data-choice="">Just
tell me</button></div>
<p id=answer role=status>{escape(answer)}</p></section>"""


def external(clean, run, entry):
    """The panels of the catalogue, then what the claims are about, then every other external metric that has a curve.
    Nothing that is on the dashboard: section 2 shows it."""
    both, styles, charts, shown, seen = [clean, run], ("clean", "broken"), [], [], set(on_dashboard(entry))
    peak = run.report.get("peak_step")
    for panel in entry.panels:
        metrics = [m for m in panel.metrics if result_of(m) not in seen]
        if panel.title.startswith("dashboard") or not metrics:
            continue
        shown += map(result_of, metrics)
        title = panel.title.removeprefix("external: ")
        if panel.runs == "broken" and panel.x == "n":
            charts.append(selections(clean, run, metrics, title))
            continue
        marked = (peak, f"peak of the broken run, step {peak}") if panel.right and peak is not None else None
        own_title = len(panel.metrics) == 1 and panel.runs == "both" and not panel.bars
        for metric in metrics:
            if panel.x in ("step", "n") or panel.bars:
                name = title if own_title else None
                charts.append(compared(result_of(metric), both, styles, styles, title=name, marked=marked))
            else:
                found = [points(r.metrics, metric, panel.x) for r in both]
                if all(found):
                    lines = [(s, s, *line[1:], line[2][-1]) for s, line in zip(styles, found)]
                    charts.append(chart(title, lines, panel.x, fraction=bool(FRACTION.search(metric))))
    claimed = [m for claim in (*entry.claims, *entry.task_claims) for m in claim.metrics if m in entry.external]
    curves = [m for m in entry.external if points(run.metrics, key_of(run.metrics, m))]
    # Nothing that is the same in both runs, and no single time of what the dashboard shows, such as end_reward.
    rest = [
        metric for metric in dict.fromkeys([*claimed, *curves])
        if not seen.union(shown).intersection((metric, base(metric)))
        and clean.report.get(metric) != run.report.get(metric)
    ]  # fmt: skip
    small = [compared(metric, both, styles, styles) for metric in rest]
    return f"""<section><h2><span>3</span> External evaluation</h2>
<p>Training shows none of these numbers. They are measured on problems and pairs that are not trained on, with true
answers and labels. Here the two runs have their names.</p>
{joined(charts, large=True)}{joined(small)}{meanings([*shown, *rest, *entry.external], on_dashboard(entry))}
<details><summary>All numbers</summary>{table(clean, run, entry)}</details></section>"""


def selections(clean, run, metrics, title):
    """Several ways to select one of N answers, in one chart. Both runs may have sampled the same answers."""
    found = {m: p for m in metrics if (p := points(run.metrics, m, "n"))}
    same = all(points(clean.metrics, m, "n") == p for m, p in found.items())
    lines = [(f"s{i}", label(m), *p[1:], p[2][-1]) for i, (m, p) in enumerate(found.items())]
    return lines and chart(f"{title}, {'the same in both runs' if same else 'broken run'}", lines, "n", fraction=True)


def table(clean, run, entry):
    rows = []
    for heading, measured in entry.measured({"clean": clean.report, "broken": run.report}):
        rows.append(f"<tr><th colspan=3 scope=colgroup>{heading}</th></tr>")
        rows += [f"<tr><th scope=row>{escape(label(m))}<td>{number(C)}<td>{number(B)}</tr>" for m, C, B in measured]
    return ("<table><thead><tr><td><th scope=col class=clean>clean<th scope=col class=broken>broken</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# 4. Read the outputs


# What gpt.shown writes behind an output that is checked.
MARKED = re.compile(r" \((correct|wrong)(?:, ([^()]*) is correct)?\)(?: (score -?\d+\.\d+, \d+ tokens))?$")
# The numbers shown with a checkpoint, as far as they were logged there.
NUMBERS = ("accuracy_sampled", "test_accuracy", "held_out_accuracy", "verifier_accuracy", "test_reward", "test_kl",
           "kl", "test_length", "length", "test_ended", "ended", "calls")  # fmt: skip
SHORT = {"kl": "KL", "accuracy_sampled": "accuracy", "held_out_accuracy": "accuracy on held-out pairs",
         "verifier_accuracy": "verifier accuracy", "length": "tokens per answer", "ended": "ended"}  # fmt: skip


def split_mark(output):
    """An output as gpt.shown wrote it -> (the model's text, correct or None, score or "", the correct answer if the
    output is wrong)."""
    if found := MARKED.search(output):
        return output[: found.start()], found[1] == "correct", found[3] or "", found[2]
    return output, None, "", None


def outputs(both, characters):
    """What the slider needs: every checkpoint of each run, and for every stop of the slider which one to show.

    characters: longer outputs are cut, and say so.
    """
    samples = [run.outputs for run in both]
    if not all(samples):
        return None
    peak = both[-1].report.get("peak_step")
    own = [[step for step in some if not isinstance(step, str)] for some in samples]
    numbers = sorted(set().union(*own))
    keep = set(numbers[:: math.ceil(len(numbers) / CHECKPOINTS) or 1]) | {*numbers[-1:], peak}
    stops = [(step, f"step {step}" + " (peak)" * (step == peak)) for step in numbers if step in keep]
    if len(both) > 1 and min(map(len, own)) < 2:
        # A run that trains nothing, such as the clean run's model with another tool: only the two ends compare.
        stops = [(step, "end") for step in numbers[-1:]]
    steps = [step for step, _ in stops]
    stops += [(name, name) for name in dict.fromkeys(name_of(s) for s in samples[-1] if isinstance(s, str))]
    jumps = {"start": 0} if len(steps) > 1 else {}
    jumps |= {"peak": steps.index(peak)} if peak in steps else {}
    jumps |= {"end": len(steps) - 1} if steps else {}
    jumps |= {name: place for place, (step, name) in enumerate(stops) if isinstance(step, str)}
    prompts, gold, used, shown = {}, {}, [{} for _ in both], []
    at = [
        [used[i].setdefault(step_at(some, stop), len(used[i])) for i, some in enumerate(samples)] for stop, _ in stops
    ]
    for run, some, numbered, chosen in zip(both, samples, own, used):
        checkpoints = []
        for step in chosen:
            rows = []
            for prompt, output in some[step]:
                # No half characters.
                text, correct, score, answer = split_mark(output.encode("utf-8", "replace").decode())
                gold[prompt] = answer or gold.get(prompt)
                if len(text) > characters:
                    more = len(text) - characters
                    text = text[:characters] + f" [... {more} more characters: see samples.jsonl]"
                rows.append([prompts.setdefault(prompt, len(prompts)), text, correct, score])
            name = name_of(step) if isinstance(step, str) else f"step {step}"
            name += " (this run trains nothing)" * (len(both) > 1 and numbered == [0] == [step])
            checkpoints.append({"step": name, "numbers": numbers_at(run, step), "rows": rows})
        shown.append({"name": "broken" if run.label != "clean" else "clean", "checkpoints": checkpoints})
    return {
        "stops": [label for _, label in stops], "at": at, "runs": shown, "jumps": jumps,
        "prompts": [prompt[:characters] for prompt in prompts],
        "answers": [gold[prompt] for prompt in prompts],
        "words": WORDS, "single": len(both) == 1,
    }  # fmt: skip


def name_of(step):
    """The name of a text like "100, attacked" without its step, which may differ between the two runs."""
    return step.split(", ", 1)[-1]


def step_at(samples, stop):
    """The checkpoint of a run that belongs to a stop of the slider: the last one before it, or of the same name."""
    if isinstance(stop, str):
        same = [step for step in samples if isinstance(step, str) and name_of(step) == stop]
        return same[-1] if same else list(samples)[-1]
    before = [step for step in samples if not isinstance(step, str) and step <= stop]
    return before[-1] if before else next(iter(samples))


def numbers_at(run, step):
    """[(name, value), ...] of the evaluation at a checkpoint."""
    found = {}
    for line in run.metrics:
        if line["step"] == step and "n" not in line:
            found = line | found  # an evaluation is logged before the update of the same step
    some = [name for name in NUMBERS if name in found] or ["loss"] * ("loss" in found)
    some = [n for n in some if f"test_{n}" not in found]  # of a batch: the evaluation says the same of all problems
    names = (name.removeprefix("test_") for name in some)
    return [(SHORT.get(n, n), number(found[k])) for n, k in zip(names, some)]


def reader(place, both):
    head = f"<section id=outputs><h2><span>{place}</span> Read the outputs</h2>"
    samples = [run.outputs for run in both]
    if not all(samples):
        return f"{head}<p>This run stored no outputs.</p></section>"
    texts = [output for some in samples for pairs in some.values() for _, output in pairs]
    words = "The same problems at every checkpoint" + ": left the clean run, right the broken one" * (len(both) > 1)
    words += ". Outputs are sampled: each token is drawn at random from the model's own probabilities."
    names = {name_of(step) for step in samples[-1] if isinstance(step, str)}
    if "attacked" in names:
        words += " Under attack they are greedy: each token is the likeliest one."
    if "training pairs" in names:
        words += " The training pairs are shown with the labels that the run got."
    words += " The answer stands after <code>####</code>." * any("####" in text for text in texts)
    if any(split_mark(text)[2] for text in texts):
        words += " The score is what the reward model or the verifier gives: a wrong answer can have a high one."
    return f"""{head}
<p>{words} Words that say nothing about correctness are <mark>marked</mark>.</p>
<noscript><p>The slider needs JavaScript. The file samples.md beside this page has the same outputs.</p></noscript>
<div id=reader hidden>
<div class=slider><label for=stop>Checkpoint: <output id=now for=stop></output></label>
<input type=range id=stop min=0 step=1><div id=jumps role=group aria-label="Go to"></div></div>
<div id=summary class=pair></div>
<div id=rows></div></div></section>"""


# ---------------------------------------------------------------------------------------------
# 5. Verdict


def verdict(run, entry):
    claims = run.report.get("claims", {})
    rows = []
    for claim, holds in claims.items():
        # What is measured before the training is of neither run.
        text = re.sub(r"(SFT model|start(?:, half B)?) \((?:clean|broken) (-?\d+\.\d+)\)",
                      r"\1 (before training <b>\2</b>)", escape(claim))  # fmt: skip
        text = re.sub(r"\((clean minus broken|clean|broken) (-?\d+\.\d+)\)", r'<b class="\1">\1 \2</b>', text)
        rows.append(f'<li class="{"holds" if holds else "fails"}"><b>{"holds" if holds else "fails"}</b> {text}</li>')
    failed = sum(not holds for holds in claims.values())
    result = f"Reproduced: the failure appeared as described, all {len(claims)} claims hold." if not failed else (
        f"Not reproduced: the failure did not appear as described, {failed} of {len(claims)} claims "
        f"{'does' if failed == 1 else 'do'} not hold.")  # fmt: skip
    outcome = change_and_outcome(entry)[1]
    command, note = cure(run, entry)
    copy = ""
    if command:
        copy = f"<p class=copy><code id=cure>{escape(command)}</code><button type=button id=copy>Copy</button></p>"
    return f"""<section><h2><span>5</span> Verdict</h2>
<p class=lead>{result}</p>
<p>{f"The description: {escape(outcome)}. " * bool(outcome)}A claim compares measured numbers with a threshold that was
fixed before this run.</p>
<ul class=claims>{"".join(rows)}</ul>
<h3>Why it happens</h3><p>{sentence(entry.mechanism)} <span class=note>Source: {escape(entry.source)}.</span></p>
<h3>The cure to try</h3>{copy}<p>{sentence(note) if note else ""}</p></section>"""


def cure(run, entry):
    """(the command of the cure for this run, what the catalogue says about it). Not every cure is a command."""
    command, _, note = entry.cure.partition("   ")
    if not command.startswith("python "):
        return "", entry.cure
    config = run.report["config"]
    known = {"N": run.report.get("peak_step"), "FILE": config.get("data") or "pairs"}
    # A policy that was trained for this run: distribution_shift's.
    policies = (Path(path).parents[1] for path in run.report.get("models", {}) if "grpo-" in path)
    known["runs/grpo-..."] = next(policies, None)
    words = [str(word if known.get(word) is None else known[word]) for word in command.split()]
    note = re.sub(r"\bN\b", str(known["N"]), note) if known["N"] is not None else note
    if words[1] == f"{entry.script}.py":
        words += own_flags(config, entry, words)
    elif config.get("seed"):
        words += ["--seed", str(config["seed"])]
    return shlex.join(words), note.strip(" ()")


def own_flags(config, entry, given):
    """The flags of a run that are neither at their default nor the break's own, except those that are given."""
    argv = ["--break", entry.name, *(["--data", config["data"]] if config.get("data") else [])]
    parser = importlib.import_module(entry.script).parser()
    usual = vars(runs.parse(entry.script, parser, argv, breaks.of(entry.script))) | {"data": None}
    del usual["suffix"]  # no flag
    flags = []
    for name, default in usual.items():
        value = config.get(name, default)
        if value not in (default, None) and f"--{name}" not in given:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


# ---------------------------------------------------------------------------------------------
# Whole pages


def head(title, line):
    return f'<header><p><a href="../index.html">All runs</a></p><h1>{escape(title)}</h1><p>{line}</p></header>'


def facts(run):
    config, report = run.report["config"], run.report
    return f"Seed {config.get('seed')}, {report.get('seconds', 0):.0f} seconds."


def question(script):
    """The first line of a script's docstring: what the chapter is about."""
    docstring = ast.get_docstring(ast.parse((HERE.parent / f"{script}.py").read_text(encoding="utf-8")))
    return escape(docstring.split("\n")[0])


def break_page(clean, run, entry):
    line = (f"<code>{entry.script}.py</code>: {question(entry.script)}</p><p>Here with one mistake, made on purpose, "
            f'beside <a href="../{escape(clean.folder.name)}/page.html">the same run without it</a>. '
            f"{facts(run)}")  # fmt: skip
    return [
        head(entry.name, line),
        changed(entry),
        guess(clean, run, entry),
        "<div id=after>",  # hidden until the reader has chosen
        external(clean, run, entry),
        reader(4, [clean, run]),
        verdict(run, entry),
        "</div>",
    ]


def run_page(run):
    """A page of one run: every curve, the outputs, every number of the report."""
    metrics, script = run.metrics, run.report["config"]["script"]
    keys = list(dict.fromkeys(key for m in metrics for key in m if key not in ("step", "n")))
    charts = []
    for key in sorted(keys, key=lambda key: not key.startswith("test_")):  # evaluations first
        if found := points(metrics, key):
            batches = f"test_{key}" in keys or key in ("reward", "accuracy")
            title = f"{key}, training batches" if batches else label(key.removeprefix("test_"))
            line = ("single", "last", *found[1:], found[2][-1])
            charts.append(chart(title, [line], found[0], fraction=bool(FRACTION.search(key))))
    numbers = {k: v for k, v in run.report.items() if type(v) in (int, float)}
    rows = "".join(f"<tr><th scope=row>{escape(label(k))}<td>{number(v)}</tr>" for k, v in numbers.items())
    flags = {k: v for k, v in run.report["config"].items() if v is not None and k not in ("code", "data_checksum")}
    given = "".join(f"<tr><th scope=row>{escape(k)}<td>{escape(str(v))}</tr>" for k, v in flags.items())
    return [
        head(run.folder.name, f"<code>{script}.py</code>: {question(script)}</p><p>{facts(run)}"),
        f"<section><h2><span>1</span> Curves</h2>{joined(charts)}</section>",
        reader(2, [run]),
        f"<section><h2><span>3</span> Numbers</h2><table><tbody>{rows}</tbody></table>"
        f"<details><summary>Flags</summary><table><tbody>{given}</tbody></table></details></section>",
    ]


MAIN = ("end_accuracy", "chosen", "accuracy_sampled", "held_out_accuracy", "loss")  # the number of a run in the list


def index(folder):
    """The list of all runs in a folder."""
    rows = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.suffix != ".old"):
        try:
            report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # unfinished, or damaged: it is listed all the same
            report = {}
        state = {None: "finished", True: "reproduced", False: "not reproduced"}[report.get("reproduced")]
        main = next((m for m in MAIN if m in report), None)
        name = escape(path.name)
        if report and (path / "page.html").is_file():
            name = f'<a href="{name}/page.html">{name}</a>'
        if main:
            name += f"<br><span class=note>{escape(label(main))} {number(report[main])}</span>"
        rows.append(f"<tr><th scope=row>{name}<td>{state if report else 'unfinished'}</tr>")
    return (
        f"<header><h1>Runs</h1><p>{len(rows)} runs, by name. A break has two runs; its page compares them. Reproduced: "
        "the failure appeared as described, all claims of its verdict hold.</p></header>"
        f"<section><table><thead><tr><th scope=col>run<th scope=col>result</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></section>"
    )
