"""Tests of data/page.py: the excerpt of every mistake, what a page contains, hostile outputs; and the page in a real
browser, with real runs of three breaks at the smallest size."""

import importlib
import json
import re
import shlex
import shutil
from html import escape
from types import SimpleNamespace

import pytest

from data import breaks, page, runs, task
from data.breaks import METRICS

pytest_plugins = ["server"]

ALL = [pytest.param(b, id=f"{b.script}-{b.name}") for b in breaks.BREAKS]

# --- what the names mean ---


def test_the_meanings_are_of_known_metrics():
    """Each belongs to a metric of the catalogue, or to one that is measured at several times, such as end_length."""
    for metric in breaks.MEANINGS:
        assert metric in METRICS or f"end_{metric}" in METRICS or f"test_{metric}" in METRICS, metric
    html = page.meanings(["start_length", "test_length", "end_opening", "policy_pairs"])
    assert html.count("<dt>") == 2 and breaks.MEANINGS["length"] in html and not page.meanings(["policy_pairs"])
    assert page.meanings(["end_length"], explained=["length"]) == ""
    # Each stands alone: the entry above it is another one on every page.
    assert not any(text.startswith("the same") for text in breaks.MEANINGS.values())


def test_names_of_logged_metrics_and_of_results():
    """The KL that training logs is not the KL of the evaluation: with a shared reference it is 0."""
    entry = breaks.entry("grpo", "shared_ref")
    metrics = [{"step": 0, "reward": 1.0, "kl": 0.0}, {"step": 0, "test_kl": 3.0}]
    assert page.on_dashboard(entry)[:2] == ["batch_kl", "first_reward"]
    assert page.key_of(metrics, "batch_kl") == "kl" and page.key_of(metrics, "kl") == "test_kl"


# --- the excerpt of the mistake ---

# A piece of what each mistake is, written down by hand; "also" where a second place belongs to it.
MISTAKES = {
    ("sft", "eos_masked"): ["pad = tok.end"],
    ("sft", "too_many_epochs"): ["args.epochs * 100"],
    ("sft", "contaminated"): ["leaked(problems)"],
    ("sft", "left_pad"): ["[tok.pad] * (longest"],
    ("sft", "template_mismatch"): ["assistant: "],
    ("reward_model", "length_bias"): ['annotator = "length"'],
    ("reward_model", "distribution_shift"): ['policy = gpt.load_model(runs.made_by("grpo"'],
    ("reward_model", "sycophancy"): ["material.train = sycophantic("],
    ("reward_model", "too_many_epochs"): ["// 16] * 16"],
    ("ppo", "reward_hacking"): ["max_steps *= 20"],
    ("ppo", "no_kl"): ['beta = 0.0 if args.break_ == "no_kl"'],
    ("ppo", "sign_flip"): ["-scores"],
    ("grpo", "reward_hacking"): ["max_steps *= 30"],
    ("grpo", "no_kl"): ['beta = 0.0 if args.break_ == "no_kl"'],
    ("grpo", "k1_kl_loss"): ["penalty = logps - reference"],
    ("grpo", "shared_ref"): ["penalized = policy"],
    ("dpo", "flip_labels"): ["[swap(p) for p in pairs]"],
    ("dpo", "likelihood_displacement"): ["slip_once(p", "beta = beta / 10"],
    ("dpo", "label_noise"): ["coin.random() < 0.3"],
    ("dpo", "low_beta"): ["beta = beta / 10"],
    ("dpo", "shared_ref"): ["ref_rows = logps.detach()"],
    ("reasoning", "overoptimize_verifier"): ['results["best_of_n"]', "gpt.load_scorer("],
    ("reasoning", "no_cot"): ['["--answer_only"]'],
    ("reasoning", "self_correct"): ["answers = revised", "gpt.load_scorer("],
    ("tools", "hallucinated_result"): ["tool = None", "learned = exists"],
    ("tools", "unsafe_eval"): ["runs.without_break(args)", "tool = eval_call"],
    ("tools", "faulty_tool"): ["runs.without_break(args)", "functools.partial(faulty_call"],
    ("tools", "tool_overuse"): ["correct + calls"],
}


@pytest.mark.parametrize("entry", ALL)
def test_the_excerpt_is_the_mistake(entry):
    """All of its places and nothing of another break, as the lines stand in the script, with two lines around."""
    source = (page.HERE.parent / f"{entry.script}.py").read_text(encoding="utf-8").splitlines()
    places = page.excerpt(entry.script, entry.name)
    pieces = MISTAKES[entry.script, entry.name]
    assert len(places) == len(pieces)
    for rows, piece in zip(places, pieces):
        numbers = [n for n, _, _ in rows]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert all(text.strip() == source[n - 1].strip() for n, text, _ in rows)
        wrong = [text for _, text, is_wrong in rows if is_wrong]
        assert "args.break_" in "\n".join(wrong) and f'"{entry.name}"' in "\n".join(wrong)
        assert piece in "\n".join(wrong)
        assert len(wrong) <= 8 and len(rows) <= len(wrong) + 4
        assert not any("args.break_" in text for _, text, is_wrong in rows if not is_wrong)


def test_what_only_refuses_flags_is_no_mistake(tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text(
        'def train(args):\n    if args.break_ == "a":\n        raise SystemExit\n    x = 1\n'
        '    if args.break_ in ("a", "b"):\n        x = 2\n\n        x = 3\n'
        '    y = 2 if args.break_ == "b" else 1\n\n\n'
        'def main(args):\n    if args.break_ == "a" and args.beta:\n        print("no")\n'
    )
    monkeypatch.setattr(page, "HERE", tmp_path / "data")
    assert page.mistakes("some")[0] == {"a": {5, 6, 7, 8}, "b": {5, 6, 7, 8, 9}}
    (rows,) = page.excerpt("some", "a")
    assert [n for n, _, wrong in rows if wrong] == [5, 6, 7, 8] and rows[-1][:2] == (8, "    x = 3")


# --- the curves ---


def test_points_are_thinned_out_to_means():
    metrics = [
        {"step": s, "loss": float(s % 2), "n": 1} | ({"test_kl": s} if s % 100 == 0 else {}) for s in range(1000)
    ]
    x, xs, ys = page.points(metrics, "loss", "step")
    assert x == "step" and len(xs) == len(ys) <= page.POINTS and (xs[0], xs[-1]) == (0, 999)
    assert min(ys) > 0.4 and max(ys) < 0.6  # the mean of 17 neighbours, half of them 1
    assert page.points(metrics, "test_kl", "step")[1:] == ([*range(0, 1000, 100)], [*range(0, 1000, 100)])
    assert page.points(metrics, "loss")[0] == "n" and page.points(metrics[:1], "loss") is None
    assert page.key_of(metrics, "kl") == "test_kl" and page.key_of(metrics, "loss") == "loss"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.158, 0.692, (0.1, 0.7)),
        (-3.21, -0.0006, (-3.5, 0)),
        (1.33, 4.03, (1, 4.5)),
        (3, 3, (2.92, 3.08)),
        (0, 0, (-0.6, 0.6)),
    ],
)
def test_rounded(low, high, expected):
    assert page.rounded(low, high) == pytest.approx(expected)


# --- pages, made from made-up runs ---


class MadeUp:
    """A finished run in which every metric exists."""

    outputs = runs.Run.outputs  # read from samples.jsonl, which the tests write

    def __init__(self, folder, label, shift=0.0, steps=100, output="Sure! 1+1=2. I am certain.\n#### 2 (correct)"):
        self.label, self.folder = label, folder
        folder.mkdir(parents=True)
        config = {"script": "dpo", "seed": 0, "data": "<b>&", "break_": None if label == "clean" else label}
        self.report = {name: 0.1 + shift for name in METRICS} | {
            "peak_step": steps // 2,
            "seconds": 3,
            "config": config,
        }
        claims = ["a (broken 0.100) < b (clean 0.600) - 0.1", "c (broken 0.1) < c, SFT model (broken 0.398) - 0.1"]
        self.report |= {"claims": dict.fromkeys(claims, True), "reproduced": True}
        logged = {name for b in breaks.BREAKS for panel in b.panels for name in (*panel.metrics, panel.right) if name}
        self.metrics = [
            {"step": s, "test_sqrt_kl": s / 7} | {name: shift + s / 100 for name in {*logged, *METRICS}}
            for s in range(steps + 1)
        ]
        lines = [{"step": s, "samples": [[f"Leo {i}?", output.replace("2", str(s))] for i in range(8)]}
                 for s in range(0, steps + 1, steps // 10 if steps < 1000 else 1)]  # fmt: skip
        lines += [{"step": f"{steps}, attacked", "samples": [["<i>Ann</i>?", "no mark"]]}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "report.json").write_text(json.dumps(self.report))


def pair(tmp_path, **more):
    runs = tmp_path / "runs"
    return MadeUp(runs / "clean", "clean", **more), MadeUp(runs / "broken", "broken", 0.5, **more)


def written(path):
    """The page's text and its data, after the checks that hold for every page."""
    whole = text = path.read_bytes().decode("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    text = text.replace(data, "")  # what is said below is about the page, not about what a model wrote
    assert path.stat().st_size < 1_000_000
    # Nothing is loaded from anywhere: links go to other pages of runs/, and the icon is empty.
    assert set(re.findall(r"<(?:link|img|script|iframe|source|embed|object)\b[^>]*", text)) <= {
        '<link rel="icon" href="data:,"', '<script type="application/json" id="data"', "<script"
    }  # fmt: skip
    links = re.findall(r"""(?:href|src|action)\s*=\s*["']?([^"' >]*)""", text)
    assert all(
        re.fullmatch(r"data:,|\.\./[^/]+(/page)?\.html|\.\./[^/]+/page\.html|[^/:]+/page\.html", x) for x in links
    )
    assert not re.search(r"url\(|@import|https?://|XMLHttpRequest|fetch\(|innerHTML", text)
    assert "default-src 'none'" in text
    return whole, json.loads(data)


@pytest.mark.parametrize("entry", ALL)
def test_page_of_a_break(entry, tmp_path):
    clean, run = pair(tmp_path)
    path = page.write(run, clean, entry)
    assert path == run.folder / "page.html"
    text, data = written(path)
    titles = re.findall(r"<h2><span>(\d)</span> (.*?)</h2>", text)
    assert titles == [("1", "What was changed"), ("2", "Which one is broken?"), ("3", "External evaluation"),
                      ("4", "Read the outputs"), ("5", "Verdict")]  # fmt: skip
    sections = re.split("<section", text)[1:]
    # Every metric of the dashboard is there, as a curve or as two bars, without the names of the runs.
    keys = {page.key_of(run.metrics, m) for m in page.on_dashboard(entry)}
    assert sections[1].count("<figure") == len(keys)
    before, answer = sections[1].split("<p id=answer")
    assert "clean" not in before and ">A</b>" in before and " is the broken run, " in answer
    # What comes of the change would tell which run it is: it stands behind the choice.
    outcome = page.change_and_outcome(entry)[1]
    assert outcome and escape(outcome) not in "".join(sections[:2]).lower() and escape(outcome) in sections[4]
    assert text.index("<div id=after>") < text.index("<section><h2><span>3") and text.count("<div id=after>") == 1
    # Section 3 shows both runs, and nothing that section 2 has shown, neither at the end nor at another time.
    assert sections[2].count("<figure") >= 1 and ">broken</b>" in sections[2]
    titles = re.findall("<figcaption>(.*?)</figcaption>", sections[2])
    assert len(set(titles)) == len(titles)
    known = {escape(page.label(m)) for m in page.on_dashboard(entry)}
    assert not known.intersection(title.removesuffix(", end") for title in titles)
    figures = re.findall("<figure.*?</figure>", sections[2], re.DOTALL)
    for figure in figures:
        assert ("key clean" in figure and "key broken" in figure) or "the same in both" in figure or "s0" in figure
        assert "key s0" not in figure or not {"clean", "broken"}.intersection(re.findall(r'"key (\w+)"', figure))
    assert data["jumps"] == {"start": 0, "peak": 5, "end": 10, "attacked": 11} and data["stops"][5] == "step 50 (peak)"
    assert data["stops"][-1] == "attacked" and data["at"] == [[i, i] for i in range(12)]
    first = data["runs"][1]["checkpoints"][10]
    assert first["rows"][0] == [0, "Sure! 1+1=100. I am certain.\n#### 100", True, ""]
    assert '<b class="broken">broken 0.100</b>' in sections[4] and "all 2 claims hold" in sections[4]
    assert "c, SFT model (before training <b>0.398</b>)" in sections[4]


# The suggested command for a run with the flags OWN.
OWN = "--data 'my data.jsonl' --problems 70 --seed 3"
CURES = {
    ("dpo", "flip_labels"): "python -m data 'my data.jsonl' --seed 3",
    ("grpo", "reward_hacking"): f"python grpo.py --beta 0.1 --max_steps 50 {OWN}",
    ("sft", "eos_masked"): f"python sft.py {OWN}",
    ("reward_model", "distribution_shift"): f"python reward_model.py --policy runs/grpo-rm=x {OWN}",
    ("tools", "tool_overuse"): f"python tools.py --rl 60 --lr 0.0003 --beta 0 {OWN}",
    ("tools", "faulty_tool"): "",
}


@pytest.mark.parametrize(("script", "name"), CURES)
def test_the_cure_has_the_flags_of_the_run(tmp_path, script, name):
    """Those that are at their default, or that the break itself gives to both runs, are left out."""
    entry, run = breaks.entry(script, name), MadeUp(tmp_path / "broken", "broken")
    run.report["models"] = {"runs/sft/model/x": "", "runs/grpo-rm=x/model/x": ""}

    def cure(*argv):
        parser = importlib.import_module(script).parser()
        run.report["config"] = vars(runs.parse(script, parser, [*argv, "--break", name], breaks.of(script)))
        return page.cure(run, entry)

    command, note = cure(*shlex.split(OWN))
    assert command == CURES[script, name]
    assert name != "reward_hacking" or note == "50 is the step of the peak; or the default beta"
    assert not re.search("seed|problems", cure()[0])
    assert name != "flip_labels" or cure()[0] == "python -m data pairs"


def test_the_dashboard_of_sign_flip_does_not_show_the_true_reward():
    """It is logged as test_reward; the reward of the batches has the wrong sign, and is what one would see."""
    metrics = [{"step": 0, "test_reward": 0.1, "test_kl": 0.0}, {"step": 0, "reward": -0.1, "kl": 0.0}]
    shown = page.on_dashboard(breaks.entry("ppo", "sign_flip"))
    assert {page.key_of(metrics, metric) for metric in shown} >= {"reward", "test_kl"}
    assert "test_reward" not in {page.key_of(metrics, metric) for metric in shown}
    assert page.key_of(metrics, page.on_dashboard(breaks.entry("ppo", "no_kl"))[0]) == "test_reward"


def test_the_order_of_the_two_runs_depends_on_the_name(tmp_path):
    """The page must not give away that the broken run is always B. The data of A and B are those of the runs."""
    entry, sides = breaks.entry("dpo", "flip_labels"), set()
    clean = MadeUp(tmp_path / "clean", "clean")
    for i in range(12):
        run = MadeUp(tmp_path / f"broken{i}", "broken", 0.5)
        text = page.guess(clean, run, entry)
        (side,) = re.findall(r'data-broken="(\w)"', text)
        assert text == page.guess(clean, run, entry)
        sides.add(side)
        assert f'<span class="key {side}">{page.stroke(side)}<b>{side.upper()}</b> 0.600</span>' in text
    assert sides == {"a", "b"}


def test_page_of_one_run_and_the_list_of_runs(tmp_path):
    clean, run = pair(tmp_path)
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "report.json").write_text('{"loss":')
    for hidden in (".locks", "clean.old"):
        (tmp_path / "runs" / hidden).mkdir()
    text, data = written(page.write(clean))
    assert "</span> Which one is broken?" not in text and data["single"] and "<h1>clean</h1>" in text
    assert "&lt;b&gt;&amp;" in text  # the value of a flag is text, too
    page.write(run, clean, breaks.entry("dpo", "flip_labels"))
    text, _ = written(tmp_path / "runs" / "index.html")
    rows = re.findall(r"<tr><th scope=row>(?:<a href=\"(.*?)\">)?(\w+).*?<td>(.*?)</tr>", text)
    assert rows == [("broken/page.html", "broken", "reproduced"), ("clean/page.html", "clean", "reproduced"),
                    ("", "damaged", "unfinished"), ("", "half", "unfinished")]  # fmt: skip
    assert not list((tmp_path / "runs").rglob(".tmp*"))


def test_a_run_without_outputs_and_a_short_clean_run(tmp_path):
    """An old run has no samples.jsonl. A clean run that is shorter shows its last checkpoint."""
    entry = breaks.entry("grpo", "reward_hacking")
    clean, run = MadeUp(tmp_path / "c", "clean", steps=10), MadeUp(tmp_path / "b", "broken", 0.5)
    text, data = written(page.write(run, clean, entry))
    assert "The clean run has 10 steps, the broken run 100." in text and "of each run" in text
    assert data["stops"][10:12] == ["step 10", "step 20"] and data["at"][10:12] == [[10, 1], [10, 2]]
    assert [run["checkpoints"][10]["step"] for run in data["runs"]] == ["step 10", "step 100"]
    assert f"--max_steps {run.report['peak_step']}" in text
    (clean.folder / "samples.jsonl").unlink()
    text, data = written(page.write(run, clean, entry))
    assert data is None and "stored no outputs" in text


HOSTILE = (
    '</script><script>document.title="hacked"</script><img src=x onerror="document.title=1"><!-- {{body}} \udc80\0'
)


def test_hostile_text(tmp_path):
    """In outputs and prompts, and 100,000 characters of it. Nothing of it is HTML; what does not fit is counted."""
    clean, run = pair(tmp_path, output=HOSTILE * 700)
    text, data = written(page.write(run, clean, breaks.entry("dpo", "flip_labels")))
    assert "</script><script>document" not in text and "<img" not in text and "<!-- {{body}}" not in text
    shown = data["runs"][0]["checkpoints"][0]["rows"][0][1]
    kept, more = re.fullmatch(r"(.*) \[\.\.\. (\d+) more characters: see samples\.jsonl\]", shown, re.DOTALL).groups()
    whole = (HOSTILE * 700).replace("2", "0").replace("\udc80", "?")
    assert whole.startswith(kept) and len(kept) + int(more) == len(whole) > 70_000


def test_a_thousand_checkpoints(tmp_path):
    clean, run = pair(tmp_path, steps=1000)
    text, data = written(page.write(run, clean, breaks.entry("dpo", "flip_labels")))
    assert len(data["stops"]) <= page.CHECKPOINTS + 4 and len(data["runs"][0]["checkpoints"]) == len(data["stops"])
    assert data["stops"][0] == "step 0" and data["stops"][-2] == "step 1000" and "step 500 (peak)" in data["stops"]
    assert max(path.count("L") for path in re.findall(r' d="M(.*?)"', text)) < page.POINTS


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("7+5=12.\n#### 12 (correct)", ("7+5=12.\n#### 12", True, "", None)),
        ("5 [cut off] (wrong, 12 is correct)", ("5 [cut off]", False, "", "12")),
        ("#### 12 (wrong, -1.5 is correct) score -1.25, 7 tokens", ("#### 12", False, "score -1.25, 7 tokens", "-1.5")),
        ("#### 12 (correct) score 1.70, 31 tokens", ("#### 12", True, "score 1.70, 31 tokens", None)),
        ("taken: 12 (wrong)", ("taken: 12", False, "", None)),
        ("a (wrong, b) c (wrong, 12 is correct)", ("a (wrong, b) c", False, "", "12")),
        ("I am (correct) or not", ("I am (correct) or not", None, "", None)),
    ],
)
def test_split_mark(output, expected):
    assert page.split_mark(output) == expected


def test_a_run_that_trains_nothing_is_compared_with_the_end_of_the_other_one(tmp_path):
    """Both ways round: its checkpoint is neither the other run's start nor a step between."""
    clean, run = pair(tmp_path)
    lines = (run.folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "samples.jsonl").write_text(lines[0] + lines[-1])
    data = page.outputs([clean, run], 1000)
    assert data["stops"] == ["end", "attacked"] and data["jumps"] == {"end": 0, "attacked": 1}
    shown = [[r["checkpoints"][i]["step"] for r, i in zip(data["runs"], stop)] for stop in data["at"]]
    assert shown == [["step 100", "step 0 (this run trains nothing)"], ["attacked", "attacked"]]
    (run.folder / "samples.jsonl").write_text(lines[0])
    data = page.outputs([run, clean], 1000)
    shown = [[r["checkpoints"][i]["step"] for r, i in zip(data["runs"], stop)] for stop in data["at"]]
    assert shown[0] == ["step 0 (this run trains nothing)", "step 100"]


# --- in a browser, pages of real runs ---

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no browser: chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def browser(chrome):
    """A browser with .open(path). At the end: no error in the console, and no request has left the machine."""

    def all_by(css):
        return chrome.find_elements("css selector", css)

    chrome.get_log("performance")  # what Chromium's own start page loads from itself
    yield SimpleNamespace(open=lambda path: chrome.get(path.resolve().as_uri()), all=all_by, driver=chrome,
                          one=lambda css: all_by(css)[0])  # fmt: skip
    assert chrome.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert urls and all(url.startswith(("file:", "data:")) for url in urls), urls


REAL = {
    ("dpo", "flip_labels"): "",
    ("grpo", "reward_hacking"): "--max_steps 1",
    ("reasoning", "overoptimize_verifier"): "",
}


@pytest.fixture(scope="module")
def made(make):
    """made(script, name): the two runs of a break at the smallest size; made once."""
    found = {}

    def made(script, name):
        if (script, name) not in found:
            found[script, name] = make(script, "--break", name, *REAL[script, name].split())
        return found[script, name]

    return made


@pytest.mark.parametrize(("script", "name"), REAL)
def test_every_run_has_a_page(made, script, name):
    """The script prints its path at the end."""
    made = made(script, name)
    assert made.job.out.splitlines()[-1] == f"Page: runs/{made.folder.name}/page.html"
    for folder in made.folders:
        written(folder.path / "page.html")
    text, _ = written(made.cwd / "runs" / "index.html")
    assert all(f'href="{folder.name}/page.html"' in text for folder in made.folders)


@pytest.mark.parametrize(("script", "name"), REAL)
def test_choose_by_a_click(made, browser, script, name):
    folder = made(script, name).folder
    broken = re.search(r'data-broken="(\w)"', (folder.path / "page.html").read_text())[1]
    looks, style = {}, "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    dashes = "return [...document.querySelectorAll('#guess .curve')].map(c => getComputedStyle(c).strokeDasharray)"
    for choice, answer in ((broken, "✓ Right. "), ("ba"["ab".index(broken)], "✗ No. "), ("", "")):
        browser.open(folder.path / "page.html")
        assert not browser.one("#answer").is_displayed() and not browser.one("#after").is_displayed()
        assert "broken" not in browser.one("main").text.split("Which one is broken?")[1].replace(" is broken", "")
        drawn = browser.driver.execute_script(dashes)
        names = [b.text for b in browser.all("#guess .key b")]
        assert set(names) == {"A", "B"} and not browser.all("#guess.told")
        browser.one(f'[data-choice="{choice}"]').click()
        said = browser.one("#answer")
        assert said.is_displayed() and said.text.startswith(f"{answer}{broken.upper()} is the broken run, ")
        assert browser.one("#after").is_displayed()
        names = {f"{letter.upper()}, {'broken' if letter == broken else 'clean'}" for letter in "ab"}
        assert {b.text for b in browser.all("#guess .key b")} == names
        # A curve keeps its line style, also in section 3; the boxes of the answers differ in more than their color.
        assert browser.driver.execute_script(dashes) == drawn
        for letter, name in ((broken, "broken"), ("ba"["ab".index(broken)], "clean")):
            pieces = (f"#guess .curve.{letter}", f"#after .curve.{name}")
            found = [browser.driver.execute_script(style, p, "strokeDasharray") for p in pieces if browser.all(p)]
            assert len(set(found)) == 1
        looks[answer] = browser.driver.execute_script(style, "#answer", "borderTopStyle")
        looks[answer] += browser.driver.execute_script(style, "#answer", "borderTopWidth")
    assert len(set(looks.values())) == 3
    # The numbers under the name "broken" are those of the broken run.
    metric = {"dpo": "loss", "grpo": "reward", "reasoning": "score"}[script]
    texts = [f.text for f in browser.all("#guess figure") if breaks.label(metric) in f.text]
    assert any(f"broken {folder.report[metric]:.3f}" in text for text in texts), texts


def test_without_javascript_everything_is_shown(made, browser):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(made("dpo", "flip_labels").folder.path / "page.html")
        assert browser.one("#answer").is_displayed() and browser.one("#after").is_displayed()
        assert not browser.one(".vote").is_displayed() and not browser.one("#reader").is_displayed()
        assert "samples.md" in browser.one("noscript").text and "A claim compares" in browser.one("#after").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def outputs_shown(browser):
    return [[pre.text for pre in row.find_elements("css selector", "pre")] for row in browser.all("#rows .pair")]


def visible(output):
    """An output as a browser shows it: spaces at the ends of the text are not part of .text."""
    return " ".join(page.split_mark(output)[0].replace("\0", "").split())


@pytest.mark.parametrize(("script", "name"), REAL)
def test_the_slider_changes_the_outputs(made, browser, script, name):
    made = made(script, name)
    browser.open(made.folder.path / "page.html")
    browser.one('[data-choice=""]').click()
    keys = pytest.importorskip("selenium.webdriver").Keys
    slider = browser.one("#stop")
    slider.send_keys(keys.HOME)
    # The broken run of overoptimize_verifier trains nothing: it is compared with the end of the clean run only.
    trains = name != "overoptimize_verifier"
    assert browser.one("#now").text.removesuffix(" (peak)") == ("step 0" if trains else "end")
    steps = [report["step"] for report in map(json.loads, open(made.folders[0].path / "samples.jsonl"))]
    last = max(step for step in steps if isinstance(step, int))
    assert trains or browser.one("#summary h3").text == f"clean, step {last}"
    seen = set()
    samples = [[json.loads(line) for line in open(f.path / "samples.jsonl")] for f in made.folders]
    stops = int(slider.get_attribute("max")) + 1
    for _ in range(stops):
        shown = outputs_shown(browser)
        assert slider.get_attribute("aria-valuetext") == browser.one("#now").text
        for side, lines in enumerate(samples):
            said = browser.all("#summary h3")[side].text.split(", ", 1)[1].removeprefix("step ").split(" (this")[0]
            (line,) = [line for line in lines if page.name_of(str(line["step"])) == said]
            assert [" ".join(row[side].split()) for row in shown] == [visible(text) for _, text in line["samples"]]
        seen.add(browser.one("#rows").text)
        slider.send_keys(keys.ARROW_RIGHT)
    assert len(seen) >= 2
    jumps = [b.text for b in browser.all("#jumps button")]
    peak = ["peak"] * (name == "reward_hacking")
    named = ["training pairs"] * (script == "dpo")
    assert jumps == (["start", *peak, "end", *named] if trains else ["end", "selected among 4"])
    if name == "reward_hacking":  # its outputs have a reward and a length
        assert re.search(r"(correct|wrong) score -?\d+\.\d\d, \d+ tokens", browser.one("#rows .badge").text)
    for jump in jumps:
        browser.one(f'#jumps [data-to="{jump}"]').send_keys(keys.ENTER)
        assert browser.one(f'#jumps [data-to="{jump}"]').get_attribute("aria-pressed") == "true"
        if jump.startswith("selected"):
            assert browser.one("#now").text == jump
        if jump == "peak":
            assert browser.one("#now").text == f"step {made.folder.report['peak_step']} (peak)"


def test_hostile_text_is_shown_as_text(browser, tmp_path):
    clean, run = pair(tmp_path, output=HOSTILE)
    browser.open(page.write(run, clean, breaks.entry("dpo", "flip_labels")))
    browser.one('[data-choice="a"]').click()
    assert browser.driver.title == "broken" and not browser.all("img")
    browser.one('#jumps [data-to="end"]').click()
    assert HOSTILE[:100].replace("2", "100") in browser.one("#rows pre").text
    browser.driver.execute_script("show(arguments[0])", 11)
    assert browser.one("#rows h3").text == "<i>Ann</i>?"


def test_words_are_marked_and_counted(browser, tmp_path):
    browser.open(page.write(MadeUp(tmp_path / "one", "clean")))
    browser.one('#jumps [data-to="end"]').click()
    assert [m.text for m in browser.all("#rows .output:first-child mark")][:2] == ["Sure!", task.CONFIDENT]
    assert "Sure! 8 · Great question! 0 · I am certain. 8 · Check: 0" in browser.one("#summary").text


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_width_and_theme(browser, tmp_path, width, theme):
    """Nothing sticks out at a phone's width, and text has a contrast of at least 4.5 to 1."""
    clean, run = pair(tmp_path)
    device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.open(page.write(run, clean, breaks.entry("grpo", "reward_hacking")))
        for choice in ("", "a", "b"):  # before the choice, and after each
            if choice:
                browser.one(f'[data-choice="{choice}"]').click()
            assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
            worst = browser.driver.execute_script(CONTRAST)
            assert worst[0] >= 4.5, worst
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
let worst = [99, ""];
for (const e of document.querySelectorAll("main *")) {
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  let under = e;
  while (under && /, 0\\)|transparent/.test(getComputedStyle(under).backgroundColor)) under = under.parentElement;
  const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(under).backgroundColor)].sort();
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 200)];
}
return worst;
"""
