"""The exact checker: which number does a solution end in, and is it the correct one?

This checker compares the final number with the gold answer exactly. An answer that is not exactly one number counts
as wrong. It does not read the working: "1+1=29. #### 29" is correct if the gold answer is 29. It is called for
every sampled solution, hundreds of thousands of times, on unchecked model output.

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


def _number(text):
    """The Fraction that `text` spells, or None: `"-$1,000.50"` is -2001/2."""
    # fullmatch, because "18 or 19" must not count as 18. With a checker that reads only the first number, a policy
    # learns to list several.
    match = NUMBER.fullmatch(text.strip())
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


def last_answer(text):
    """The last answer that a solution gives.

    Args:
        text: a solution. It gives its answer as `#### 72` (GSM8K's mark). A text without any `####` may
            end in the line `A: 72` instead (as in GSM8K's published model solutions).

    Returns:
        The answer as a Fraction, or None if there is none or it is not exactly one number.

    Example:
        >>> last_answer("48 / 2 = 24\\n#### 24\\nNo, the sum is asked for.\\n#### 1,072.0")
        Fraction(1072, 1)
        >>> last_answer("#### 72\\n#### I give up") is None
        True
    """
    # The last mark counts, even if what follows it cannot be read. If an earlier one were used instead, a text
    # could give several answers and be rewarded for any that can be read.
    _, mark, after = text.rpartition("####")
    if mark:
        # Only the rest of that line: a model that has not learned to stop continues below it.
        return _number(after.partition("\n")[0])
    last_line = text.rstrip().rpartition("\n")[2]
    return _number(last_line[2:]) if last_line.startswith("A:") else None


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
