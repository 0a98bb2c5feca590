"""The exact checker: which number does a solution end in, and is it the right one?

A reward model can be fooled, this cannot: it reads the last answer a text gives and compares it
with the gold answer as a number. It is the reward of the reasoning chapter, so it is called for
every sampled solution, hundreds of thousands of times, on text that nobody has proofread.

Try it:
    python -c "from data.checker import is_right; print(is_right('9 * 2 = 18\\n#### 18.0', '18'))"
"""

import re
from fractions import Fraction

# One number and nothing else: "72", "-3", "$1,000", "-$2.50", "18.", ".5", "25%", "1/2".
# Every repeat is bounded. That keeps matching linear on any input, and it keeps a model that
# babbles digits from reaching int(), which raises ValueError above 4300 of them.
# [0-9] and not \d: \d also matches the digits of other scripts.
# Commas must group by threes. Deleting them all, as many parsers do, turns "1,2" into 12.
NUMBER = re.compile(
    r"(?P<sign>[-+]?\$?|\$[-+])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{0,30})"
    r"(?:\.(?P<decimals>[0-9]{0,30})|/(?P<below>[0-9]{1,30}))?"
    # "25%" is 25 and not 1/4: a question that asks "what percent" has the gold answer 25.
    r"%?\.?"
)


def _number(text):
    """Return the Fraction that `text` spells, or None: `"-$1,000.50"` is -2001/2."""
    # fullmatch, because "18 or 19" must not count as 18: a policy trained on a checker that reads
    # only the first number learns to list several.
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign, whole, decimals, below = match.group("sign", "whole", "decimals", "below")
    decimals = decimals or ""
    # Every part of the pattern may be empty; this is where "", "." and "$" fall out.
    # "/2" has no digits above the line, "1/0" is no number.
    if not whole + decimals or (below and (not whole or int(below) == 0)):
        return None
    # Fraction and not float: 0.1 + 0.2 != 0.3 in floats, and 18.0 must equal 18 without a margin.
    value = Fraction(int(whole.replace(",", "") + decimals), int(below or 10 ** len(decimals)))
    return -value if "-" in sign else value


def last_answer(text):
    """Read the last answer that a solution gives.

    Args:
        text: a solution. It gives its answer as `#### 72` (GSM8K's mark); a text without any
            `####` may end in the line `A: 72` instead (GSM8K's published model solutions do).

    Returns:
        The answer as a Fraction, or None where there is none or it is not exactly one number.

    Example:
        >>> last_answer("48 / 2 = 24\\n#### 24\\nNo, the sum is asked for.\\n#### 1,072.0")
        Fraction(1072, 1)
        >>> last_answer("#### 72\\n#### I give up") is None
        True
    """
    # The last mark counts, even where what follows it cannot be read. Falling back on an earlier
    # one would let a text place several bets and be paid for whichever of them parses.
    _, mark, after = text.rpartition("####")
    if mark:
        # Only the rest of that line: a model that has not learned to stop goes on below it.
        return _number(after.partition("\n")[0])
    last_line = text.rstrip().rpartition("\n")[2]
    return _number(last_line[2:]) if last_line.startswith("A:") else None


def is_right(text, answer):
    """Does the last answer in `text` equal the gold `answer`, as a number?

    Args:
        text: a solution, as in last_answer.
        answer: the gold answer: an int, a Fraction, or a string that is a number ("1,000").

    Returns:
        True or False. A text that gives no readable answer is wrong.

    Raises:
        ValueError: the gold answer itself is not a number.

    Example:
        >>> is_right("So she makes $18.\\n#### $18.00", "18"), is_right("No idea.", "18")
        (True, False)
    """
    if isinstance(answer, str):
        gold = _number(answer)
    else:
        # A float gold is refused: Fraction(0.1) is 3602879701896397/36028797018963968, not 1/10.
        gold = Fraction(answer) if isinstance(answer, (int, Fraction)) else None
    # Without this check an unreadable text would equal an unreadable gold (None == None), and
    # every bad row of a data set would pay out a reward.
    if gold is None:
        raise ValueError(f"the gold answer {str(answer)[:60]!r} is not a number; fix that row")
    return last_answer(text) == gold


CALCULATION = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")


def miscalculates(text):
    """Is any of the calculations written in `text` wrong, like 9+5=15? (Whole numbers only.)

    This says nothing about the problem: who reads "triple" as "plus three" can calculate without
    fault and be wrong, and this is False.

    Example:
        >>> miscalculates("8*3=24. 24-14=11."), miscalculates("8+3=11. 11-7=4.")
        (True, False)
    """
    for left, op, right, result in CALCULATION.findall(text):
        a, b, c = int(left), int(right), int(result)
        if {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": a == b * c}[op] is False:
            return True
    return False
