"""The calculator: arithmetic that somebody else wrote, worked out without running it.

    >>> calculate("48+27"), calculate("0.1+0.2"), calculate("(7-2)/3")
    ('75', '0.3', '1.666667')

What a model writes is a stranger's text. `eval` would run it, whatever it is: "__import__('os')" is an
expression too (that is CVE-2023-29374, and `python tools.py --break unsafe_eval`). Filtering bad names out
of it is a race that the filter loses. So the other way round: the text is parsed, nothing is run, and a few
kinds of node in the syntax tree are *allowed*. Everything else is an error, which the model is shown.

How many of GSM8K's own annotations it reproduces:  python tools.py --data gsm8k/train.jsonl
"""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

LONGEST = 100  # characters; checked before anything looks at them
LARGEST = 10**15  # of any number on the way to the result

# The first wall, and the cheap one: a text with a letter, a quote or an underscore never reaches the parser.
# [0-9] and not \d, which matches the digits of all scripts. Without a newline: one line, so that a
# column is a position in the text.
CHARACTERS = re.compile(r"[0-9.+\-*/%() ]*")
# Nearly every call is "48+27". The parser takes ten times as long for that as the rest. No leading zeros:
# the parser refuses them, and a fast path must not know another language than the slow one.
SHORT = re.compile(r"(0|[1-9][0-9]{0,9})([-+*])(0|[1-9][0-9]{0,9})")

# The second wall: what a tree may consist of. There is no power: "9**9**9" is seven characters and
# more memory than there is. Without it a number's digits are at most as many as were typed.
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a, b),  # int / int would be a float
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}  # GSM8K's people write "+10=10", too
OF_SIGN = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class CallError(Exception):
    """A call that has no result. Its text is short: the model reads it, a token a letter."""


def calculate(text):
    """The value of an arithmetic expression, as text. Raises CallError, and nothing else:

    ?syntax (not numbers, + - * / // %, parentheses), ?zero (divided by it), ?size (too long, too large).
    """
    short = SHORT.fullmatch(text)
    if short:
        left, sign, right = short.groups()
        return show(bounded(OF_SIGN[sign](int(left), int(right))))
    if len(text) > LONGEST:
        raise CallError("?size")
    if not CHARACTERS.fullmatch(text):
        raise CallError("?syntax")
    text = text.strip(" ")  # leading blanks are an indentation to the parser
    try:
        return show(value(ast.parse(text, mode="eval").body, text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CallError("?syntax") from None


def value(node, text):
    """The exact value of a syntax tree: an int or a Fraction. text: what it was parsed from."""
    kind = type(node)
    # type() and not isinstance(): True is an int to isinstance, and "..." is a Constant as well.
    if kind is ast.Constant and type(node.value) is int:
        return bounded(node.value)
    if kind is ast.Constant and type(node.value) is float:
        # From the text, not from the float: Fraction(0.1) is 3602879701896397/36028797018963968.
        whole, _, decimals = text[node.col_offset : node.end_col_offset].partition(".")
        return bounded(Fraction(int(whole + decimals), 10 ** len(decimals)))
    if kind is ast.UnaryOp and type(node.op) in UNARY:
        return UNARY[type(node.op)](value(node.operand, text))
    if kind is ast.BinOp and type(node.op) in BINARY:
        left, right = value(node.left, text), value(node.right, text)
        if right == 0 and type(node.op) in (ast.Div, ast.FloorDiv, ast.Mod):
            raise CallError("?zero")
        return bounded(BINARY[type(node.op)](left, right))
    raise CallError("?syntax")


def bounded(number):
    if abs(number.numerator) > LARGEST * number.denominator:  # whole numbers compare faster than Fractions
        raise CallError("?size")
    return number


def show(number):
    """One way to print a number: "75", "-0.5", "1.666667": six decimals at most, no zeros at the end."""
    if type(number) is int or number.denominator == 1:
        return str(int(number))
    # In whole numbers: as a float it would depend on the size. A half goes away from zero, as in school.
    millionths = (abs(number.numerator) * 2 * 10**6 + number.denominator) // (2 * number.denominator)
    whole, rest = divmod(millionths, 10**6)
    digits = f"{whole}.{rest:06}".rstrip("0").rstrip(".")
    return "-" + digits if number < 0 and millionths else digits


def annotations(name, solutions):
    """Put every <<expression=result>> of the solutions through the calculator, and print what agrees and what
    kinds the rest are. Returns (solutions in which all agree, the number of annotations of each kind)."""
    kinds, examples = Counter(), {}
    agreeing = without = 0
    for solution in solutions:
        found = set()
        for call in re.findall(r"<<(.*?)>>", solution):
            expression, _, theirs = call.rpartition("=")
            try:
                ours = calculate(expression)
                same = Fraction(ours) == Fraction(theirs)  # ValueError where theirs is no number
                kind = "the same number, written otherwise" if same else "another number"
                if ours == theirs:
                    kind = "identical"
            except CallError as error:
                kind = f"refused: {error}"
            except (ValueError, ZeroDivisionError):
                kind = "the result is no number"
            found.add(kind)
            kinds[kind] += 1
            examples.setdefault(kind, call)
        without += not found
        agreeing += found <= {"identical", "the same number, written otherwise"}
    print(f"{name}: {len(solutions)} solutions, {without} of them without annotations")
    for kind, n in kinds.most_common():
        print(f"  {n:6}  {kind:36} such as <<{examples[kind]}>>")
    print(f"All of the annotations are reproduced in {agreeing} of {len(solutions)} solutions.")
    return agreeing, kinds
