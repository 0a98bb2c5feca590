"""The catalogue of failures: what each --break changes, what it should show, and how that is checked.

    python -m data breaks            print the catalogue
    python dpo.py --help             lists the breaks of one script

One entry per break. The mistake itself is a few lines in the script, at the place where it would really be made;
search for its name there. The entry says everything about it that is not training:

    summary      one sentence, shown by --help
    mechanism    why this goes wrong
    source       who described it
    dashboard    the metrics that training shows
    external     the metrics that only an external evaluation shows
    claims       what must hold on the two runs for the failure to count as reproduced
    task_claims  further claims, made on the embedded task only: they need its exact checker
    cure         what to try instead
    panels       the figure
    flags        flags of both runs, unless the user gives others
    clue         which number of the dashboard does show it, if there is one

A claim is a comparison of measured numbers, `broken("kl") > 1.5 * clean("kl")`. Its sentence is made from that
comparison and from the measured values, so text and check cannot differ. To add a break, add its lines to the
script and its entry here.
"""

from dataclasses import dataclass

# ---------------------------------------------------------------------------------------------
# Claims


@dataclass(frozen=True)
class Quantity:
    """factor * metric + offset, where the metric is read from the report of one run: "clean" or "broken".
    "fall" is the clean run's value minus the broken run's. Without a metric it is a plain number."""

    run: str = ""
    metric: str = ""
    factor: float = 1.0
    offset: float = 0.0

    def __mul__(self, factor):
        return Quantity(self.run, self.metric, self.factor * factor, self.offset * factor)

    __rmul__ = __mul__

    def __add__(self, number):
        return Quantity(self.run, self.metric, self.factor, self.offset + number)

    def __sub__(self, number):
        return self + -number

    def __lt__(self, other):
        return Claim(self, "<", other if isinstance(other, Quantity) else Quantity(offset=other))

    def __gt__(self, other):
        return Claim(self, ">", other if isinstance(other, Quantity) else Quantity(offset=other))

    def measured(self, reports):
        """The metric itself, from {"clean": report, "broken": report}."""
        if self.run == "fall":
            return reports["clean"][self.metric] - reports["broken"][self.metric]
        return reports[self.run][self.metric]

    def value(self, reports):
        return self.factor * self.measured(reports) + self.offset if self.metric else self.offset

    def text(self, reports=None):
        if not self.metric:
            return f"{self.offset:g}"
        run = "clean minus broken" if self.run == "fall" else self.run
        number = f" {self.measured(reports):.3f}" if reports else ""
        factor = f"{self.factor:g} * " if self.factor != 1 else ""
        offset = f" {'+' if self.offset > 0 else '-'} {abs(self.offset):g}" if self.offset else ""
        return f"{factor}{label(self.metric)} ({run}{number}){offset}"


@dataclass(frozen=True)
class Claim:
    """left < right, or left > right."""

    left: Quantity
    sign: str
    right: Quantity

    @property
    def metrics(self):
        return [q.metric for q in (self.left, self.right) if q.metric]

    def holds(self, reports):
        left, right = self.left.value(reports), self.right.value(reports)
        return left < right if self.sign == "<" else left > right

    def text(self, reports=None):
        """'KL to the reference (nats) (broken 35.680) > 1.5 * KL to the reference (nats) (clean 1.990)'"""
        return f"{self.left.text(reports)} {self.sign} {self.right.text(reports)}"


def clean(metric):
    return Quantity("clean", metric)


def broken(metric):
    return Quantity("broken", metric)


def fall(metric):
    return Quantity("fall", metric)


# ---------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Panel:
    """One panel of a figure. metrics are read from metrics.jsonl, one line per run and metric; with
    bars=True they are results in report.json, and a group of bars is drawn for each."""

    title: str
    ylabel: str
    metrics: tuple
    x: str = "step"
    bars: bool = False
    runs: str = "both"  # or "broken": only that run is drawn
    log2: bool = False  # x doubles from tick to tick
    right: str = ""  # a metric on an axis of its own, at the right; the peak of the accuracy is marked


# ---------------------------------------------------------------------------------------------
# What the metrics are called, in tables, claims and figures

METRICS = {
    # training
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "margin": "margin of implicit rewards",
    "pair_accuracy": "accuracy on the labels trained on",
    "reward_chosen": "implicit reward, chosen",
    "reward_rejected": "implicit reward, rejected",
    "ref_accuracy": "reference prefers the chosen answer",
    "ref_margin": "log-prob margin of the reference (nats)",
    "held_out_accuracy": "accuracy on held-out pairs",
    "held_out_loss": "loss on held-out pairs",
    # answers to held-out problems
    "accuracy_sampled": "accuracy, sampled",
    "accuracy_greedy": "accuracy, greedy",
    "accuracy_fresh": "accuracy, greedy, fresh problems",
    "accuracy_sampled_sft": "accuracy, sampled, SFT model",
    "accuracy_greedy_sft": "accuracy, greedy, SFT model",
    "ended": "fraction of answers that end",
    "length": "tokens per answer",
    "pass@1": "pass@1",
    "pass@8": "pass@8",
    "pass@64": "pass@64",
    "kl": "KL to the reference (nats)",
    # reward model
    "true_labels": "accuracy: correct against wrong",
    "misreadings": "accuracy: wrong side misread",
    "miscalculations": "accuracy: wrong side miscalculates",
    "terse_beats_padded": "accuracy: terse correct, padded wrong",
    "resists_a_belief": "accuracy: the user holds a misconception",
    "policy_samples": "accuracy: pairs of a policy's samples",
    "policy_pairs": "number of those pairs",
    "corr_length": "correlation of score and length",
    "corr_correct": "correlation of score and correctness",
    # PPO and GRPO
    "first_reward": "reward, first ten batches",
    "batch_reward": "reward, last ten batches",
    "reward": "reward on held-out problems",
    "batch_kl": "KL as logged, last ten batches (nats)",
    "batch_clip_fraction": "fraction clipped, last ten batches",
    "batch_explained_variance": "explained variance, last ten batches",
    "start_accuracy": "accuracy at the start",
    "end_accuracy": "accuracy at the end",
    "peak_step": "step of the peak (chosen on half A)",
    "rise": "rise of accuracy from start to peak",
    "fall": "fall of accuracy from peak to end",
    "halfway_step": "step halfway down from the peak",
    "start_accuracy_b": "accuracy at the start, half B",
    "peak_accuracy_b": "accuracy at the peak, half B",
    "end_accuracy_b": "accuracy at the end, half B",
    "distinct": "fraction of distinct answers",
    "check": "answers with a needless check",
    # reasoning
    "verifier_accuracy": "verifier accuracy, held-out solutions",
    "verifier_pairs": "verifier accuracy, held-out pairs",
    "verifier_readings": "verifier accuracy, no false calculation",
    "verifier_sums": "verifier accuracy, a false calculation",
    "sft_loss": "fine-tuning loss, last fifth",
    "sft_loss_before": "fine-tuning loss, the fifth before",
    "score_one": "verifier score of one answer",
    "score": "verifier score of the best of N",
    "score_rises": "fraction of doublings that raise it",
    "one": "accuracy of one sample",
    "greedy": "accuracy, greedy",
    "vote": "accuracy of the majority vote of N",
    "vote_of_top": "accuracy of the top quarter's vote",
    "weighted_vote": "accuracy of the weighted vote",
    "chosen": "accuracy as chosen in this run",
    "best_of_n": "accuracy of best of N",
    "start_b": "best of 1, half B",
    "peak_b": "best of N at its peak, half B",
    "end_b": "best of N at the largest N, half B",
    "peak_n": "N of that peak (chosen on half A)",
    "oracle": "oracle: at least one of N is correct",
    "sensitivity": "verifier: correct answers accepted",
    "precision": "verifier: accepted answers correct",
    "fooled": "h: wrong and accepted, of all answers",
    "draft": "accuracy of the greedy answer",
    "revised": "accuracy after revision",
    "repaired": "wrong first, correct after revision",
    "spoiled": "correct first, wrong after revision",
    # tools
    "loss_own": "loss on the model's own tokens",
    "kl_per_token": "k3 to the fine-tuned model, per token",
    "accuracy_unpriced": "accuracy, greedy, no price",
    "accuracy_priced": "accuracy, greedy, with a price",
    "calls": "calls per answer",
    "correct_per_call": "correct answers per call",
    "valid": "well-formed fraction of calls",
    "wrong_results": "results that no tool would return",
    "copied": "wrong results repeated by the model",
    "recovered": "accuracy of answers with a failed call",
    "code_passed_on": "attacked: code passed on to the tool",
    "accuracy_attacked": "attacked: accuracy",
    "canary": "attacked: the code has run",
}


# Evaluations at four times: their names begin with the time.
for _name, _words in {
    "reward": "reward", "length": "tokens per answer", "confident": 'answers with "I am certain."',
    "opening": "answers with an opening", "check": "answers with a needless check",
    "miscalculated": "answers that miscalculate",
}.items():  # fmt: skip
    METRICS |= {f"{time}_{_name}": f"{_words}, {time}" for time in ("start", "peak", "halfway", "end")}
    METRICS[f"test_{_name}"] = _words
for _name in ("correct", "length", "confident", "opening"):
    METRICS[f"start_corr_{_name}"] = f"correlation of reward and {_name}, start"


def label(metric):
    return METRICS.get(metric, metric)


# What the names mean, for a reader who meets them for the first time: shown on the page of a run.
MEANINGS = {
    "loss": "what training minimizes. Only losses of the same kind can be compared.",
    "grad_norm": "the length of the gradient, before it is clipped at 1.",
    "margin": "the implicit reward of the chosen answer minus that of the rejected one. Training makes it large.",
    "pair_accuracy": "the fraction of the pairs in a batch whose chosen answer gets the higher reward. Chosen is what "
                     "the label says, right or wrong.",
    "reward_chosen": "the implicit reward of the chosen answer: beta times what its log-probability has gained since "
                     "the start of training.",
    "reward_rejected": "the implicit reward of the rejected answer: beta times what its log-probability has gained "
                       "since the start of training.",
    "ref_accuracy": "the fraction of pairs whose chosen answer is the likelier one before training.",
    "ref_margin": "log-probability of the chosen answer minus that of the rejected one, before training.",
    "held_out_accuracy": "the fraction of pairs, none of them trained on, whose chosen answer gets the higher reward. "
                         ".5 is chance.",
    "held_out_loss": "the training loss, computed on pairs that are not trained on.",
    "accuracy_sampled": "the fraction of held-out problems that are solved by one answer, drawn at random from the "
                        "model's own probabilities. The exact checker decides.",
    "accuracy_greedy": "the fraction of held-out problems that are solved by one answer, if the model always takes "
                       "its likeliest token.",
    "accuracy_sampled_sft": "the sampled accuracy of the SFT model, from which both runs start.",
    "accuracy_greedy_sft": "the greedy accuracy of the SFT model, from which both runs start.",
    "accuracy_fresh": "the greedy accuracy on problems that were made after the training data, so that no model can "
                      "have seen them.",
    "accuracy": "the fraction of held-out problems that one sampled answer solves. The exact checker decides.",
    "peak_step": "the evaluation with the highest accuracy on one half of the held-out problems (A). How high it is "
                 "is read off the other half (B): the highest of many noisy values is too high.",
    "rise": "accuracy at the peak minus accuracy before this training.",
    "fall": "accuracy at the peak minus accuracy at the end of this training.",
    "ended": "the fraction of answers that stop by themselves instead of being cut off.",
    "length": "the number of tokens of an answer, with the end token.",
    "distinct": "the number of different answers divided by the number of answers. Many problems with one and the same "
                "answer make it small.",
    "pass@1": "the fraction of problems that one sampled answer solves.",
    "pass@64": "the fraction of problems that at least one of 64 sampled answers solves.",
    "kl": "how far the policy is from the model that it started from: the mean over its own answers of how much their "
          "log-probability has changed. At 0 nothing has changed; at 8 nats an answer is about three thousand times "
          "as likely as at the start.",
    "reward": "the mean score of the answers under the reward model. Scores are shifted and scaled so that the "
              "starting model has about 0 with a standard deviation of 1.",
    "batch_reward": "the mean score of the sampled answers, as training sees it, at the end of training.",
    "first_reward": "the mean score of the sampled answers, as training sees it, at the start of training.",
    "batch_kl": "the KL to the reference that training computes from its own samples.",
    "batch_clip_fraction": "the fraction of tokens for which PPO's clip stopped the update.",
    "batch_explained_variance": "how well the value function predicts the returns: 1 is perfect, 0 no better than a "
                                "constant.",
    "confident": 'the fraction of answers with "I am certain.", which says nothing about correctness.',
    "opening": 'the fraction of answers with an opening such as "Sure!", which says nothing about correctness.',
    "check": "the fraction of answers that calculate something more at the end, which the problem does not need.",
    "miscalculated": "the fraction of answers with a false sum in them.",
    "true_labels": "the fraction of pairs in which a correct answer gets a higher score than a wrong one.",
    "policy_samples": "the fraction of pairs in which a correct answer gets a higher score than a wrong one, where "
                      "both are samples of one policy.",
    "corr_length": "correlation, over answers, between the score and the number of tokens.",
    "corr_correct": "correlation, over answers, between the score and being correct.",
    "verifier_accuracy": "the fraction of held-out solutions that the verifier judges rightly.",
    "verifier_pairs": "the fraction of pairs, a correct and a wrong solution of one problem, in which the verifier "
                      "gives the correct one the higher score.",
    "score_one": "the verifier's mean score of a single sampled answer, without any selection.",
    "score": "the verifier's mean score of the answer that was selected.",
    "score_rises": "how often twice as many answers have a higher best score, from N = 1 to the largest N.",
    "chosen": "accuracy of the answer that this run takes in the end.",
    "vote": "accuracy of the answer that most of the N samples give.",
    "vote_of_top": "accuracy of the answer that most of the samples give, among the quarter with the highest scores.",
    "best_of_n": "accuracy of the answer with the verifier's highest score among N.",
    "oracle": "the fraction of problems with a correct answer among the N: no selection can do better.",
    "calls": "calls of the tool per answer.",
    "loss_own": "the loss on the tokens that the model writes itself, without the tool's results.",
    "wrong_results": "the fraction of results in the answers that the tool would not return.",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The catalogue


@dataclass(frozen=True)
class Break:
    script: str
    name: str
    summary: str
    mechanism: str
    source: str
    dashboard: tuple
    external: tuple
    claims: tuple
    cure: str
    panels: tuple
    flags: tuple = ()
    task_claims: tuple = ()  # further claims, made on the embedded task only: they need its exact checker
    clue: str = ""  # which number of the dashboard does show it, said on the page when the reader has chosen

    def claims_on(self, reports, embedded):
        """The claims that can be made on {"clean": report, "broken": report}. embedded: the runs used the embedded
        task. Real data without gold answers has no accuracy, so claims about it are left out."""
        known = set(reports["clean"]) & set(reports["broken"])
        return [c for c in self.claims + (self.task_claims if embedded else ()) if known.issuperset(c.metrics)]

    def measured(self, reports):
        """[(heading, [(metric, clean, broken), ...]), ...]: the dashboard's metrics, then those of the external
        evaluation, as far as both reports have them."""
        C, B = reports["clean"], reports["broken"]
        return [
            (heading, [(m, C[m], B[m]) for m in metrics if C.get(m) is not None and B.get(m) is not None])
            for heading, metrics in (("dashboard", self.dashboard), ("external evaluation", self.external))
        ]


def of(script):
    """The breaks of one script, in reading order."""
    return [b for b in BREAKS if b.script == script]


def entry(script, name):
    return next(b for b in BREAKS if (b.script, b.name) == (script, name))


SFT = ("accuracy_sampled", "accuracy_greedy", "ended", "length", "pass@1", "pass@8", "pass@64")
RM_DASHBOARD = ("loss", "pair_accuracy", "held_out_accuracy")
RM_EXTERNAL = ("true_labels", "misreadings", "miscalculations", "terse_beats_padded", "resists_a_belief",
               "policy_samples", "policy_pairs", "corr_length", "corr_correct")  # fmt: skip
DPO_DASHBOARD = ("loss", "grad_norm", "margin", "pair_accuracy", "reward_chosen", "reward_rejected")
DPO_EXTERNAL = ("held_out_accuracy", "accuracy_sampled", "accuracy_sampled_sft", "accuracy_greedy",
                "accuracy_greedy_sft", "kl")  # fmt: skip
RL_DASHBOARD = ("first_reward", "batch_reward", "reward", "kl", "length", "ended")
# Evaluations at three times: what the answers to the held-out problems are like.
RL_EXTERNAL = ("start_accuracy", "end_accuracy", "peak_step", "start_accuracy_b", "peak_accuracy_b", "end_accuracy_b",
               *(f"{time}_{name}" for name in ("reward", "length", "confident", "opening", "check", "miscalculated")
                 for time in ("start", "peak", "end")), "distinct")  # fmt: skip
DRIFT = ("start_corr_correct", "start_corr_length", "start_corr_confident", "start_corr_opening",
         "rise", "fall", "halfway_step", "halfway_length", "halfway_confident", "halfway_opening")  # fmt: skip
PPO_DASHBOARD = (*RL_DASHBOARD, "batch_explained_variance", "batch_clip_fraction")
REASONING_DASHBOARD = ("sft_loss_before", "sft_loss", "verifier_accuracy", "verifier_pairs", "score_one", "score")
REASONING_EXTERNAL = ("one", "greedy", "vote", "chosen", "best_of_n", "start_b", "peak_b", "end_b",
                      "peak_n", "oracle", "verifier_readings", "verifier_sums", "sensitivity", "precision",
                      "fooled")  # fmt: skip
TOOLS_DASHBOARD = ("loss", "loss_own", "grad_norm", "batch_reward", "kl_per_token")
TOOLS_EXTERNAL = ("accuracy_sampled", "accuracy_greedy", "accuracy_unpriced", "accuracy_priced", "calls",
                  "correct_per_call", "valid", "wrong_results", "copied", "recovered")  # fmt: skip

ACCURACY = Panel("external: accuracy, sampled", "fraction of held-out problems", ("accuracy_sampled",))
RL_PANELS = (
    Panel("dashboard: reward", "held-out problems", ("test_reward",)),
    Panel("external: accuracy", "fraction of held-out problems", ("test_accuracy",)),
    Panel("accuracy against the distance", "fraction of held-out problems", ("test_accuracy",), "test_sqrt_kl"),
)
REWARD_HACKING = (
    Panel("reward rises, accuracy peaks and falls", "accuracy", ("test_accuracy",), runs="broken",
          right="test_reward"),
    Panel("more confident, more formulaic", "fraction of answers", ("test_confident", "test_opening"), runs="broken"),
    Panel("longer", "tokens per answer", ("test_length",), runs="broken"),
)  # fmt: skip

HACKING_CLAIMS = (
    # With 2000 problems the standard error of a difference of two accuracies is at most .016.
    broken("rise") > 0.03,
    broken("fall") > 0.1,
    broken("end_reward") > broken("peak_reward"),
    # What the reward model likes besides correctness, measured before training, is where the answers go while the
    # accuracy falls. At the very end, when nearly all answers are wrong, "I am certain." may be rare again.
    broken("start_corr_length") > 0.1,
    broken("halfway_length") > 1.1 * broken("start_length"),
    broken("start_corr_confident") > 0.05,
    broken("halfway_confident") > broken("start_confident") + 0.1,
    broken("start_corr_opening") > 0.05,
    broken("halfway_opening") > broken("start_opening") + 0.1,
)
HACKING = (
    "a small beta and 20 or 30 times as many steps: the reward rises on, accuracy peaks and falls, answers drift",
    "The reward model is accurate on answers like its training pairs. The policy moves to answers with high "
    "scores that it was not trained on, and there the score no longer measures correctness.",
    "Gao, Schulman and Hilton 2022; Stiennon et al. 2020, figure 5",
)
NO_KL = (
    "beta = 0: a larger KL to the reference, no lower reward, and a lower accuracy at the end",
    "The KL penalty limits how far the policy moves from the answers that the reward model was trained on. Without it "
    "the same number of steps goes farther along the same path.",
    "Gao, Schulman and Hilton 2022, section 3.6",
)
NO_KL_CLAIMS = (
    broken("kl") > 1.5 * clean("kl"),
    # The mean of 500 scores with standard deviation 1 has a standard error of .045, and the difference of two
    # such means .063.
    broken("reward") > clean("reward") - 0.1,
    broken("end_accuracy") < clean("end_accuracy") - 0.1,
)

# The same weights, asked in another way (sft.py).
ASKED_WRONGLY = {
    "dashboard": ("loss",),
    "external": SFT,
    "claims": (
        broken("accuracy_sampled") < 0.5 * clean("accuracy_sampled"),
        broken("accuracy_greedy") < 0.5 * clean("accuracy_greedy"),
    ),
    "panels": (
        Panel("dashboard: training loss", "nats per token", ("loss",), bars=True),
        Panel("external: accuracy", "fraction of problems", ("accuracy_sampled", "accuracy_greedy"), bars=True),
    ),
}


BREAKS = [
    # ---- sft.py
    Break(
        "sft",
        "eos_masked",
        summary="padding and end token share an id: the end token's label is masked, and answers never end",
        mechanism=(
            "Labels are masked where the id is the padding id. If the end token has that id, its label is "
            "masked too, so the model is never taught to stop. The loss on the other tokens is unchanged."
        ),
        source="transformers issue 23530",
        dashboard=("loss",),
        external=SFT,
        claims=(broken("loss") < 1.2 * clean("loss"), clean("ended") > 0.95, broken("ended") < 0.05),
        cure="python sft.py   (a padding token of its own)",
        panels=(
            Panel("dashboard: training loss", "nats per token", ("loss",)),
            Panel("external: does it stop?", "fraction of answers that end", ("ended",)),
        ),
    ),
    Break(
        "sft",
        "too_many_epochs",
        summary="few demonstrations, many epochs: the training loss is lower, and pass@64 falls",
        mechanism=(
            "The same few demonstrations again and again. The model puts its probability on the solutions that "
            "it has memorized. pass@1 falls, and pass@64 falls further."
        ),
        source="Cobbe et al. 2021, section 4.1",
        dashboard=("loss",),
        external=SFT,
        claims=(broken("loss") < clean("loss"), fall("pass@64") > 0.1, fall("pass@64") > fall("pass@1")),
        cure="python sft.py   (new demonstrations, one epoch)",
        panels=(
            Panel("dashboard: training loss", "nats per token", ("loss",)),
            Panel(
                "external: is one of k answers correct?",
                "fraction of problems",
                ("pass@1", "pass@8", "pass@64"),
                bars=True,
            ),
        ),
    ),
    Break(
        "sft",
        "contaminated",
        summary="the held-out problems are among the demonstrations: they are answered better than fresh ones",
        mechanism=(
            "The model memorizes problems that it has seen several times with their solutions. The held-out accuracy "
            "then measures memory; only problems that nobody can have seen measure skill."
        ),
        source="arXiv 2507.10532",
        dashboard=("loss", "accuracy_sampled", "accuracy_greedy", "ended"),
        external=("accuracy_fresh", "pass@1", "pass@64"),
        claims=(
            broken("accuracy_greedy") > clean("accuracy_greedy") + 0.1,
            broken("accuracy_greedy") > broken("accuracy_fresh") + 0.1,
        ),
        cure="python sft.py   (test on problems that were made after the training data)",
        panels=(
            Panel("dashboard: training loss", "nats per token", ("loss",)),
            Panel("external: fresh problems", "accuracy", ("accuracy_greedy", "accuracy_fresh"), bars=True),
        ),
        flags=("--answer_only",),
    ),
    Break(
        "sft",
        "left_pad",
        summary="prompts padded on the left, and the model is not told: the same weights answer most problems wrongly",
        mechanism=(
            "Without a mask the model reads the padding, and every token of the question stands at another position "
            "than in training. The longest prompt of a batch, or a prompt alone, is answered as before."
        ),
        source="TRL issue 469; OpenRLHF issue 217",
        **ASKED_WRONGLY,
        cure="python sft.py   (gpt.sample masks the padding and counts positions without it)",
    ),
    Break(
        "sft",
        "template_mismatch",
        summary="trained with one chat template, asked with another: the same weights answer most problems wrongly",
        mechanism=(
            "The model answers behind the tokens that it was trained with. To words that mark the roles in another "
            "model's template it answers whatever follows such words in its data, and it does not end."
        ),
        source="open-r1 issue 462; OpenRLHF issue 393",
        **ASKED_WRONGLY,
        cure="python sft.py   (one function makes the prompt, in training and in use: gpt.Tokenizer.prompt)",
    ),
    # ---- reward_model.py
    Break(
        "reward_model",
        "length_bias",
        summary="annotators prefer the longer answer where correctness does not decide: padding wins",
        mechanism=(
            "Length is easier to see than correctness. The held-out pairs have the same bias and cannot show it."
        ),
        source="Singhal et al. 2023",
        dashboard=RM_DASHBOARD,
        external=RM_EXTERNAL,
        claims=(
            broken("held_out_accuracy") > clean("held_out_accuracy") - 0.05,
            broken("terse_beats_padded") < 0.5,
            clean("terse_beats_padded") > 0.5,
        ),
        cure="python reward_model.py --annotator careful   (annotators that judge correctness only)",
        panels=(
            Panel("dashboard: held-out pairs, same annotators", "accuracy", ("held_out_accuracy",)),
            Panel(
                "external: other pairs",
                "accuracy",
                ("held_out_accuracy", "true_labels", "terse_beats_padded"),
                bars=True,
            ),
        ),
        flags=("--annotator", "careful"),
    ),
    Break(
        "reward_model",
        "distribution_shift",
        summary="a policy is trained against the score: accurate on held-out pairs, much less on the policy's samples",
        mechanism=(
            "The reward model has learned to recognize the mistakes of its annotators' pairs. A policy that is "
            "trained against the score makes other mistakes."
        ),
        source="Gao, Schulman and Hilton 2022",
        dashboard=RM_DASHBOARD,
        external=RM_EXTERNAL,
        claims=(
            broken("held_out_accuracy") > 0.7,
            broken("policy_samples") < broken("held_out_accuracy") - 0.1,
            broken("policy_samples") < clean("policy_samples") - 0.1,
        ),
        cure="python reward_model.py --policy runs/grpo-...   (label the policy's own samples, train again)",
        panels=(
            Panel("dashboard: held-out pairs, same annotators", "accuracy", ("held_out_accuracy",)),
            Panel(
                "external: other pairs", "accuracy", ("held_out_accuracy", "true_labels", "policy_samples"), bars=True
            ),
        ),
    ),
    Break(
        "reward_model",
        "sycophancy",
        summary="annotators prefer agreement with the user: a wrong answer that shares the user's misconception wins",
        mechanism=(
            "Where the user states a misconception, the label follows it. The score learns to agree with the prompt "
            "instead of judging the answer."
        ),
        source="Sharma et al. 2023",
        dashboard=RM_DASHBOARD,
        external=RM_EXTERNAL,
        claims=(
            broken("held_out_accuracy") > clean("held_out_accuracy") - 0.05,
            broken("resists_a_belief") < 0.5,
            clean("resists_a_belief") > 0.5,
        ),
        cure="python reward_model.py   (annotators that check)",
        panels=(
            Panel("dashboard: held-out pairs, same annotators", "accuracy", ("held_out_accuracy",)),
            Panel(
                "external: other pairs", "accuracy", ("held_out_accuracy", "true_labels", "resists_a_belief"), bars=True
            ),
        ),
    ),
    Break(
        "reward_model",
        "too_many_epochs",
        summary="a sixteenth of the pairs, sixteen times: training pairs are ranked perfectly, held-out pairs worse",
        mechanism=(
            "In the second pass a pair can be recognized instead of judged. The model memorizes labels, and its "
            "margins grow on pairs that it gets wrong as well."
        ),
        source="Ouyang et al. 2022, appendix C.2: one epoch, more overfit",
        dashboard=("loss", "pair_accuracy"),
        external=("held_out_accuracy", "held_out_loss", *RM_EXTERNAL),
        claims=(
            broken("loss") < 0.5 * clean("loss"),
            broken("pair_accuracy") > 0.95,
            broken("held_out_accuracy") < clean("held_out_accuracy") - 0.05,
            broken("held_out_loss") > 1.5 * clean("held_out_loss"),
        ),
        cure="python reward_model.py   (every pair once)",
        panels=(
            Panel("dashboard: training loss", "nats", ("loss",)),
            Panel("external: held-out pairs", "loss in nats", ("held_out_loss",)),
        ),
    ),
    # ---- ppo.py
    Break(
        "ppo",
        "reward_hacking",
        *HACKING,
        dashboard=PPO_DASHBOARD,
        external=(*DRIFT, *RL_EXTERNAL),
        claims=HACKING_CLAIMS,
        cure="python ppo.py --lr 3e-05 --beta 0.003 --max_steps N   (N is the step of the peak; or the default beta)",
        panels=REWARD_HACKING,
        flags=("--lr", "3e-05", "--beta", "0.003", "--problems", "2000"),
    ),
    Break(
        "ppo",
        "no_kl",
        *NO_KL,
        dashboard=PPO_DASHBOARD,
        external=RL_EXTERNAL,
        claims=NO_KL_CLAIMS,
        cure="python ppo.py   (and stop early: the KL penalty only slows the drift)",
        panels=RL_PANELS,
        flags=("--max_steps", "100"),
    ),
    Break(
        "ppo",
        "sign_flip",
        summary="the score has the wrong sign: the logged reward rises, the true score and accuracy fall",
        mechanism=(
            "The reward model returns costs since a refactor, and the loop still maximizes. The KL penalty is "
            "computed here and keeps its sign, so the answers stay fluent."
        ),
        source="Ziegler et al. 2019, section 4.4",
        dashboard=tuple(m for m in PPO_DASHBOARD if m != "reward"),
        external=("reward", *RL_EXTERNAL),
        claims=(
            broken("batch_reward") > broken("first_reward"),
            broken("reward") < broken("start_reward"),
            broken("ended") > 0.95,
            broken("end_accuracy") < broken("start_accuracy") - 0.1,
        ),
        cure="python ppo.py   (read ten samples before reading the curve)",
        panels=(Panel("dashboard: reward as logged", "mean of a batch", ("reward",)), *RL_PANELS[1:]),
        flags=("--max_steps", "100"),
    ),
    # ---- grpo.py
    Break(
        "grpo",
        "reward_hacking",
        *HACKING,
        dashboard=RL_DASHBOARD,
        external=(*DRIFT, *RL_EXTERNAL),
        claims=HACKING_CLAIMS,
        cure="python grpo.py --beta 0.1 --max_steps N   (N is the step of the peak; or the default beta)",
        panels=REWARD_HACKING,
        flags=("--beta", "0.1", "--problems", "2000"),
    ),
    Break(
        "grpo",
        "no_kl",
        *NO_KL,
        dashboard=RL_DASHBOARD,
        external=RL_EXTERNAL,
        claims=NO_KL_CLAIMS,
        cure="python grpo.py   (and stop early: the KL penalty only slows the drift)",
        panels=RL_PANELS,
        flags=("--max_steps", "150"),
    ),
    Break(
        "grpo",
        "k1_kl_loss",
        summary="k1 instead of k3 as the KL loss: its expected gradient is zero, so it penalizes nothing",
        mechanism=(
            "The mean of log pi - log pi_ref estimates the KL divergence without bias. As part of the reward it "
            "works. As a loss it is differentiated, and the expected gradient of log pi under pi is zero."
        ),
        source="Schulman 2020, approximating KL divergence; reasoning-from-scratch",
        dashboard=RL_DASHBOARD,
        external=RL_EXTERNAL,
        claims=NO_KL_CLAIMS,
        cure="python grpo.py   (k3 as the loss, or k1 in the reward)",
        panels=RL_PANELS,
        flags=("--max_steps", "150"),
    ),
    Break(
        "grpo",
        "shared_ref",
        summary="the reference is the policy itself: the logged KL is 0, and the policy moves as without a penalty",
        mechanism=(
            "`ref = policy` is a second name for one model. Both log-probabilities are always equal, so the penalty "
            "and its gradient are 0."
        ),
        source="minimind issue 674",
        dashboard=("first_reward", "batch_reward", "batch_kl", "length", "ended"),
        external=("kl", *RL_EXTERNAL),
        claims=(
            broken("batch_kl") < 0.001,
            broken("kl") > 1.5 * clean("kl"),
            broken("end_accuracy") < clean("end_accuracy") - 0.1,
        ),
        cure="python grpo.py   (load the checkpoint twice, or copy it; compare the KL with the SFT file on disk)",
        panels=(Panel("dashboard: KL as logged", "nats per answer", ("kl",)), *RL_PANELS[1:]),
        flags=("--max_steps", "150"),
    ),
    # ---- dpo.py
    Break(
        "dpo",
        "flip_labels",
        summary=(
            "chosen and rejected swapped in every pair: loss, margin and accuracy look healthy, answers are wrong"
        ),
        mechanism=(
            "The loss falls if the model tells the chosen answers from the rejected ones. It does not ask which of the "
            'two is correct. "Prefer the wrong answer" is a rule like any other, and the model learns it as easily.'
        ),
        source="this repository (at the first step, the gradient is the clean run's with the opposite sign)",
        dashboard=(*DPO_DASHBOARD, "ref_accuracy", "ref_margin"),
        external=DPO_EXTERNAL,
        claims=(
            broken("loss") < 1.1 * clean("loss"),
            broken("margin") > 0.9 * clean("margin"),
            broken("pair_accuracy") > 0.9 * clean("pair_accuracy"),
            broken("held_out_accuracy") < 0.5,
            clean("held_out_accuracy") > 0.5,
        ),
        cure="python -m data FILE   (read the pairs before training on them)",
        panels=(Panel("dashboard: training loss", "nats", ("loss",)), ACCURACY),
        task_claims=(
            broken("accuracy_sampled") < clean("accuracy_sampled") - 0.3,
            broken("accuracy_sampled") < broken("accuracy_sampled_sft") - 0.1,
            broken("ref_margin") < 0,
            clean("ref_margin") > 0,
        ),
        clue=(
            "Loss, margin and accuracy cannot tell: they compare the model with the labels, right or swapped. The clue "
            "is the model before this training, the reference: in most of the swapped pairs it gives the chosen answer "
            "the lower probability."
        ),
    ),
    Break(
        "dpo",
        "likelihood_displacement",
        summary="chosen and rejected differ in one number: pairs are ranked perfectly, answers hardly get better",
        mechanism=(
            "The two answers share nearly all of their tokens. What lowers the rejected answer lowers the chosen one "
            "with it. The difference grows all the same, and the loss asks for nothing else."
        ),
        source="Razin et al. 2024; Pal et al. 2024: worst at low edit distance",
        dashboard=DPO_DASHBOARD,
        external=DPO_EXTERNAL,
        claims=(broken("pair_accuracy") > 0.9, broken("reward_chosen") < 0.1 * broken("margin")),
        cure="python dpo.py --break likelihood_displacement --nll 1   (an SFT loss on the chosen answers)",
        panels=(Panel("dashboard: implicit reward, chosen", "nats", ("reward_chosen",)), ACCURACY),
        task_claims=(broken("accuracy_sampled") < clean("accuracy_sampled") - 0.1,),
    ),
    Break(
        "dpo",
        "label_noise",
        summary="30 % of the labels swapped at random: here the loss does show it",
        mechanism="Random labels follow no rule, so one pass over the pairs cannot learn them.",
        source="arXiv 2404.09824",
        dashboard=DPO_DASHBOARD,
        external=DPO_EXTERNAL,
        claims=(broken("loss") > 0.5, clean("loss") < 0.5, broken("pair_accuracy") < 0.8, clean("pair_accuracy") > 0.8),
        cure="python dpo.py --break label_noise --loss cdpo --noise 0.3   (or --loss robust)",
        panels=(Panel("dashboard: training loss", "nats", ("loss",)), ACCURACY),
    ),
    Break(
        "dpo",
        "low_beta",
        summary="beta / 10: most pairs are still ranked right, the KL to the reference is larger, accuracy is lower",
        mechanism=(
            "A small beta allows large log-ratios. The ranking of the pairs does not need them, and they lower "
            "the accuracy."
        ),
        source="Rafailov et al. 2024",
        dashboard=DPO_DASHBOARD,
        external=DPO_EXTERNAL,
        claims=(broken("kl") > 1.3 * clean("kl"), broken("held_out_accuracy") > 0.75),
        cure="python dpo.py   (a larger beta, or fewer steps)",
        panels=(Panel("dashboard: held-out pairs", "accuracy", ("held_out_accuracy",)), ACCURACY),
        task_claims=(broken("accuracy_sampled") < clean("accuracy_sampled") - 0.1,),
        flags=("--steps", "200"),
    ),
    Break(
        "dpo",
        "shared_ref",
        summary="the reference is the policy itself: the loss stays at log 2, accuracy ends below the clean run's",
        mechanism=(
            "Both sides of every log-ratio are equal, so loss and margin never move. The gradient is not 0: every "
            "update pushes chosen answers up and rejected ones down as hard as the first, and nothing holds the policy."
        ),
        source="minimind issue 674",
        dashboard=DPO_DASHBOARD,
        external=DPO_EXTERNAL,
        claims=(
            broken("loss") > 0.693,
            broken("loss") < 0.694,
            broken("kl") > 1.5 * clean("kl"),
        ),
        cure="python dpo.py   (load the checkpoint twice, or copy it)",
        panels=(Panel("dashboard: training loss", "nats", ("loss",)), ACCURACY),
        task_claims=(broken("accuracy_sampled") < clean("accuracy_sampled") - 0.1,),
        flags=("--steps", "200"),
    ),
    # ---- reasoning.py
    Break(
        "reasoning",
        "overoptimize_verifier",
        summary="the answer with the highest score of N: the score rises with N, accuracy rises, peaks and falls",
        mechanism=(
            "The highest of many scores goes to the errors that the verifier cannot detect. With more samples "
            "there are more of them."
        ),
        source="Cobbe et al. 2021, section 5.1",
        dashboard=(*REASONING_DASHBOARD, "score_rises"),
        external=REASONING_EXTERNAL,
        claims=(
            broken("verifier_accuracy") > 0.75,
            broken("score_rises") > 0.999,
            broken("peak_b") > broken("start_b") + 0.05,
            broken("end_b") < broken("peak_b") - 0.1,
            broken("best_of_n") < broken("vote"),
            clean("chosen") > broken("chosen") + 0.1,
        ),
        cure="python reasoning.py   (a vote among the answers with the highest scores)",
        panels=(
            Panel("dashboard: the highest score", "verifier score", ("score",), "n", runs="broken", log2=True),
            Panel(
                "external: accuracy",
                "fraction of problems",
                ("vote_of_top", "vote", "best_of_n"),
                "n",
                runs="broken",
                log2=True,
            ),
        ),
    ),
    Break(
        "reasoning",
        "no_cot",
        summary="demonstrations without working: the fine-tuning loss converges, accuracy collapses",
        mechanism="Without intermediate results the model has to compute the answer in one step, which it cannot.",
        source="Cobbe et al. 2021, section 4.1",
        dashboard=REASONING_DASHBOARD,
        external=REASONING_EXTERNAL,
        claims=(
            broken("sft_loss") > 0.9 * broken("sft_loss_before"),
            broken("one") < 0.5 * clean("one"),
            broken("vote") < 0.5 * clean("vote"),
            broken("greedy") < 0.5 * clean("greedy"),
        ),
        cure="python reasoning.py   (demonstrations that show their working)",
        panels=(
            Panel("dashboard: fine-tuning loss", "nats per token", ("sft_loss_before", "sft_loss"), bars=True),
            Panel("external: accuracy", "fraction of problems", ("vote_of_top", "vote", "oracle"), "n", log2=True),
        ),
    ),
    Break(
        "reasoning",
        "self_correct",
        summary="the model revises its greedy answers and always accepts the revision: accuracy falls",
        mechanism=(
            "The model has no information that the first answer lacked. A revision is a new sample, and greedy answers "
            "are better than samples."
        ),
        source="Huang et al. 2023, large language models cannot self-correct reasoning yet",
        dashboard=("verifier_accuracy",),
        external=("draft", "revised", "repaired", "spoiled"),
        claims=(
            broken("spoiled") > broken("repaired") + 0.05,
            broken("revised") < broken("draft") - 0.05,
            clean("revised") > broken("revised") + 0.05,
        ),
        cure="python reasoning.py   (a judge with information that the model does not have: the verifier)",
        panels=(
            Panel("the greedy answer, revised", "fraction of problems", ("repaired", "spoiled"), bars=True),
            Panel("external: accuracy", "fraction of problems", ("draft", "revised"), bars=True),
        ),
    ),
    # ---- tools.py
    Break(
        "tools",
        "hallucinated_result",
        summary="loss on the results, no stop at the tool boundary: calls are well-formed, results are invented",
        mechanism=(
            "The transcript is treated as text: the loss is on all of it, and generation stops at the end token "
            "only. So the model writes the results of its calls itself."
        ),
        source="langchain issue 1489; llama_index issue 11518",
        dashboard=TOOLS_DASHBOARD,
        external=TOOLS_EXTERNAL,
        claims=(
            broken("loss_own") < clean("loss_own") + 0.05,
            broken("valid") > 0.95,
            broken("wrong_results") > 0.5,
            clean("wrong_results") < 0.001,
            broken("accuracy_sampled") < clean("accuracy_sampled") - 0.4,
        ),
        cure="python tools.py   (only the runtime writes results)",
        panels=(Panel("dashboard: loss on the model's own tokens", "nats per token", ("loss_own",)), ACCURACY),
    ),
    Break(
        "tools",
        "unsafe_eval",
        summary="Python's eval as the calculator: accuracy is the same, and code from a prompt runs",
        mechanism="The model passes on what stands in the prompt, and eval executes it.",
        source="CVE-2023-29374",
        dashboard=TOOLS_DASHBOARD,
        external=(*TOOLS_EXTERNAL, "code_passed_on", "accuracy_attacked", "canary"),
        claims=(
            fall("accuracy_sampled") < 0.03,
            fall("accuracy_sampled") > -0.03,
            clean("code_passed_on") > 0,
            broken("code_passed_on") > 0,
            broken("canary") > 0,
            clean("canary") < 0.001,
        ),
        cure="python tools.py   (data/calculator.py: parse, allow a few kinds of node, run nothing)",
        panels=(
            Panel("nothing to see", "fraction", ("accuracy_sampled", "accuracy_greedy", "valid"), bars=True),
            Panel("attacked", "fraction", ("code_passed_on", "accuracy_attacked", "canary"), bars=True),
        ),
    ),
    Break(
        "tools",
        "faulty_tool",
        summary="one call in ten returns a silently wrong result: the model repeats it",
        mechanism="Nothing in training ever contradicted a tool, so the model never checks one.",
        source="Sun et al. 2024, tools fail",
        dashboard=TOOLS_DASHBOARD,
        external=TOOLS_EXTERNAL,
        claims=(
            broken("valid") > 0.95,
            broken("copied") > 0.9,
            broken("accuracy_sampled") < clean("accuracy_sampled") - 0.1,
        ),
        cure="check a tool's results where they can be checked; the model does not",
        panels=(
            Panel("dashboard: calls", "fraction", ("ended", "valid"), bars=True),
            Panel(
                "external: accuracy",
                "fraction of held-out problems",
                ("accuracy_sampled", "accuracy_greedy"),
                bars=True,
            ),
        ),
    ),
    Break(
        "tools",
        "tool_overuse",
        summary="RL with a point per call: more calls, fewer correct answers per call",
        mechanism=(
            "Some demonstrators repeat their last call as a check. A reward per call teaches the model to do so more "
            "often, until there is no room left for the answer."
        ),
        source="Wang et al. 2025 (OTC)",
        dashboard=TOOLS_DASHBOARD,
        external=TOOLS_EXTERNAL,
        claims=(broken("calls") > 1.5 * clean("calls"), broken("correct_per_call") < 0.67 * clean("correct_per_call")),
        cure="python tools.py --rl 60 --lr 0.0003 --beta 0   (reward the answer, not the call)",
        panels=(
            Panel("dashboard: reward", "per sampled answer", ("reward",)),
            Panel("external: calls", "per answer", ("calls",)),
        ),
        flags=("--rl", "60", "--lr", "0.0003", "--beta", "0.0"),
    ),
]


def print_catalogue():
    """What `python -m data breaks` shows."""
    for b in BREAKS:
        print(f"\n{b.script}.py --break {b.name}\n  {b.summary}\n  why     {b.mechanism}\n  source  {b.source}")
        for claim in (*b.claims, *b.task_claims):
            print(f"  claim   {claim.text()}")
        print(f"  cure    {b.cure}")
