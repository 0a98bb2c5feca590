"""The exact checker: which number does a solution end in, and is it the correct one?

This checker compares the final number with the gold answer exactly. An answer that is not exactly one number counts
as wrong. Published models write a number in many ways (`\\boxed{18}`, `**18**`, `Answer: 18 dollars`). What a careful
person would read is read, and nothing ambiguous is (see last_answer). The working is not read: "1+1=29. #### 29" is
correct if the gold answer is 29. The checker is called for every sampled solution, hundreds of thousands of times, on
unchecked model output.

Try it:
    python -c "from data.checker import is_correct; print(is_correct('9 * 2 = 18\\n#### 18.0', '18'))"
"""

import re
from fractions import Fraction

# One number and nothing else: "72", "-3", "$1,000", "-$2.50", "18.", ".5", "25%", "1/2". Every repeat is bounded.
# That keeps matching linear on any input, and it keeps a text of thousands of digits away from int(), which raises
# ValueError above 4300 of them. [0-9] and not \d: \d also matches the digits of other scripts. Commas must group by
# threes. Deleting them all, as many parsers do, turns "1,2" into 12.
NUMBER = re.compile(
    r"(?P<sign>[-+]?\$?|\$[-+])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{0,30})"
    r"(?:\.(?P<decimals>[0-9]{0,30})|/(?P<below>[0-9]{1,30}))?"
    # "25%" is 25 and not 1/4: a question that asks "what percent" has the gold answer 25.
    r"%?\.?"
)


# What a published model writes around its answer: bold, LaTeX, a Unicode minus, the currency, the unit. Replaced in
# this order by what NUMBER reads.
SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"^[* ]+| *\*+(?=\.?$)", ""),  # **18**, and what **Answer:** **18** leaves; but 2**3 is no 23
        (r"^\\\((.*)\\\)(?=\.?$)|^\$([^$]+)\$(?=\.?$)", r"\1\2"),  # \(18\), $18$: a formula
        (r"^\\boxed\{(.*)\}(?=\.?$)", r"\1"),
        # 18\text{ dollars}, \mathbf{18}; but 10\textsuperscript{2} is no 102
        (r"\\(?:mbox|(?:text|math)(?:[a-z]{2}|normal)?)\{([^{}]*)\}", r"\1"),
        # 1{,}000, 1,\!000, and 1 000 with a fixed space; before \frac, or 1\,\frac{100}{2} is 1,100/2
        (r"(?<=[0-9])(?:\{,\}|,\\!|\\,|[\u00a0\u2009\u202f])(?=[0-9]{3})", ","),
        (r"(?<![0-9])\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2"),  # \frac{1}{2}; but 3\frac{1}{2} is no 31/2
        (r"\\([$%])", r"\1"),
        (r"(?<=\w)(?:\\[ ,:;]|~)(?= *[A-Za-z])", " "),  # 18\,cm: LaTeX's spaces; but ~18 is about 18
        (r"[\u2212\u2013]", "-"),  # the minus sign, and the dash that is often typed for it
        (r"[\u20ac\u00a3]", "$"),  # euro, pound
    )
]

# "18 dollars", "18 square feet", "18 dollars a day", "18$": up to three words, and none of those in NO_UNIT.
WITH_UNIT = re.compile(r"(.*[0-9%])\.? *(?:([A-Za-z]{2,20}(?: +(?:a|[A-Za-z]{2,20})){0,2})|\$)\.?")
# Units cannot be listed, because anything can be counted ("18 apples"). So this lists the words that are not units. The
# trap: a word that is missing here counts as a unit. Without "eighth", "3 eighths" would be read as 3. A word that can
# be either is listed ("3 quarters"). A plural and an ordinal in -th need no entry: six also refuses "sixths".
NO_UNIT = re.compile(
    r"\b(?:"
    # leaves the number open, goes on, or denies it: "18 or more", "18 and a half", "18 is wrong"
    "or|and|but|to|if|ish|least|most|not|never|is wrong|is incorrect|"
    # changes the sign or calculates: "18 degrees below zero", "18 squared", "18 pi", "0.3 repeating"
    "minus|negative|below|under|plus|squared|cubed|factorial|pi|itself|twice|thrice|halved|doubled|tripled|quadrupled|"
    "repeating|recurring|"
    # scales it: "18 thousand", "2 bn", "18 grand", "2 lakh"
    "dozen|score|gross|hundred|thou|thousand|grand|mille|permille|myriad|lakh|lac|crore|cr|mil|mill|mn|mln|million|"
    "bil|bn|bln|billion|tn|trn|trillion|quadrillion|zillion|"
    # a part or an ordinal: "3 quarters", "18th"
    "half|halve|quarter|st|nd|rd|th|third|fifth|eighth|ninth|twelfth|(?:twen|thir|for|fif|six|seven|eigh|nine)tieth|"
    # a second number: "18 dollars fifty"
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    "(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r")(?:th)?s?\b",
    re.IGNORECASE,
)


def _number(text, unit=False):
    """The Fraction that `text` spells, or None: `"-$1,000.50"` is -2001/2. unit: may a unit follow?"""
    # fullmatch, because "18 or 19" must not count as 18. With a checker that reads only the first number, a policy
    # learns to list several.
    text = text.strip()
    match = NUMBER.fullmatch(text)
    if match is None and len(text) < 200:
        for pattern, plain in SPELLINGS:
            text = pattern.sub(plain, text)
        match = NUMBER.fullmatch(text.strip())
        found = WITH_UNIT.fullmatch(text.strip()) if unit and match is None else None
        if found and not NO_UNIT.search(found[2] or ""):
            match = NUMBER.fullmatch(found[1])
    if match is None:
        return None
    sign, whole, decimals, below = match.group("sign", "whole", "decimals", "below")
    decimals = decimals or ""
    # Every part of the pattern may be empty. Here "", "." and "$" are refused; so are "/2" and "1/0".
    if not whole + decimals or (below and (not whole or int(below) == 0)):
        return None
    # Fraction and not float: 0.1 + 0.2 != 0.3 in floats, and 18.0 must equal 18 without a tolerance.
    value = Fraction(int(whole.replace(",", "") + decimals), int(below or 10 ** len(decimals)))
    return -value if "-" in sign else value


# What announces an answer in a last line. "The answer is correct" announces none, so "is" needs a digit behind it.
LABEL = re.compile(r"^A:|\b(?i:answer(?: is)?)(?:\*\*)?\s{0,9}[:=]|\b(?i:answer is)(?=.{0,200}[0-9])")
BOLD = re.compile(r"\*\*([^*]{1,100})\*\*")
# The number in bold is not the whole answer with one of these beside it: 19, -**18**, **18**k, **18** thousand.
BESIDE_BOLD = re.compile(rf"[0-9]|[-\u2212]\*\*|\*\*(?:[A-Za-z]| *{NO_UNIT.pattern})", re.IGNORECASE)


def last_answer(text):
    """The last answer that a solution gives.

    Args:
        text: a solution. It gives its answer as `#### 72` (GSM8K's mark). A text without any `####` may
            hold `\\boxed{72}`, or end in a line with `A: 72` (as in GSM8K's published model solutions), `Answer: 72`,
            `the answer is 72`, or one number in bold and no other number. There, a unit may follow.

    Returns:
        The answer as a Fraction, or None if there is none or it is not exactly one number.

    Example:
        >>> last_answer("48 / 2 = 24\\n#### 24\\nNo, the sum is asked for.\\n#### 1,072.0")
        Fraction(1072, 1)
        >>> last_answer("#### 72\\n#### I give up") is None
        True
        >>> [last_answer(text) for text in ("So \\\\boxed{18}.", "She makes **$18** a day.", "**Answer:** 18 or 19")]
        [Fraction(18, 1), Fraction(18, 1), None]
    """
    # The last mark counts, even if what follows it cannot be read. If an earlier one were used instead, a text
    # could give several answers and be rewarded for any that can be read.
    _, mark, after = text.rpartition("####")
    after, _, below = after.partition("\n")
    # With a box below it, the mark is a heading ("#### Step 3").
    if mark and "\\boxed{" not in below:
        # Only the rest of that line: a model that has not learned to stop continues below it. And only a number:
        # whoever uses the mark was asked for one, or has been trained on nothing else.
        return _number(after)
    text = text.rstrip()
    line = text.rpartition("\n")[2]
    if len(line) > 5000:  # searched for every announcement, so it must be bounded
        line = " " + line[-5000:]
    start = len(text) - len(line)
    marks = [(start + match.end(), line[match.end() :]) for match in LABEL.finditer(line)]
    before, box, inside = text.rpartition("\\boxed{")
    if box:
        marks.append((len(before + box), _closed(inside[:200])))
    bold = list(BOLD.finditer(line))
    # "He fills **3** boxes with 18 eggs": which of the two is the answer? Not for us to say.
    if len(bold) == 1 and re.search("[0-9]", bold[0][1]) and not BESIDE_BOLD.search(BOLD.sub("**", line)):
        marks.append((start + bold[0].start(1), bold[0][1]))
    return _number(max(marks)[1], unit=True) if marks else None


def _closed(text):
    """`text` up to the brace that closes one opened before it, or "": `"\\frac{1}{2}} and"` -> `"\\frac{1}{2}"`."""
    depth = 1
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:at]
    return ""


def is_correct(text, answer):
    """Does the last answer in `text` equal the gold `answer`, as a number?

    Args:
        text: a solution, as in last_answer.
        answer: the gold answer: an int, a Fraction, or a string that is a number ("1,000").

    Returns:
        True or False. A text that gives no readable answer is wrong.

    Raises:
        ValueError: the gold answer itself is not a number.

    Example:
        >>> is_correct("So she makes $18.\\n#### $18.00", "18"), is_correct("No idea.", "18")
        (True, False)
    """
    if isinstance(answer, str):
        gold = _number(answer)
    else:
        # A float is refused as a gold answer: Fraction(0.1) is 3602879701896397/36028797018963968, not 1/10.
        gold = Fraction(answer) if isinstance(answer, (int, Fraction)) else None
    # Without this check an unreadable text would equal an unreadable gold answer (None == None), and every bad row
    # of a dataset would give a reward.
    if gold is None:
        raise ValueError(f"the gold answer {str(answer)[:60]!r} is not a number; fix that row")
    return last_answer(text) == gold


# "24-14=11": one operation on two numbers. The left number must not follow an operator or a decimal point, or it
# would be the tail of a longer expression (2+3*4=14). The result is only looked at, not consumed, so in a chain
# (8*3=24-14=11) it is the next left number.
NUMERAL = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
CALCULATION = re.compile(rf"(?<![0-9.+\-*/])({NUMERAL})([-+*/])({NUMERAL})=(?=({NUMERAL})(?!\.?[0-9]))")


def miscalculates(text):
    """Is any of the calculations written in `text` wrong, like 9+5=15?

    This says nothing about the problem: a solution that reads "triple" as "plus three" can calculate without a
    mistake. Only operations on two numbers are checked, written as in the task: no spaces, no commas.

    Example:
        >>> miscalculates("8*3=24. 24-14=11."), miscalculates("8+3=11. 11-7=4."), miscalculates("8*3=24-14=11")
        (True, False, True)
    """
    for left, op, right, result in CALCULATION.findall(text):
        a, b, c = Fraction(left), Fraction(right), Fraction(result)
        if {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": a == b * c}[op] is False:
            return True
    return False
