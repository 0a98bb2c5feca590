"""The calculator: evaluates arithmetic that a model wrote, without running it.

    >>> calculate("48+27"), calculate("0.1+0.2"), calculate("(7-2)/3")
    ('75', '0.3', '1.666667')

What a model writes is untrusted text. `eval` would run it, whatever it is: "__import__('os')" is an expression too
(that is CVE-2023-29374, `python tools.py --break unsafe_eval`). A filter for forbidden names can be incomplete. So
this file works the other way round: the text is parsed, nothing is run, and a few kinds of node in the syntax tree
are *allowed*. Everything else is an error, which the model sees.

How many of GSM8K's own annotations it reproduces:  python tools.py --data gsm8k/train.jsonl
"""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

LONGEST = 100  # characters; checked before parsing
LARGEST = 10**15  # of any number on the way to the result

# The first check of the characters: a text with a letter, a quote or an underscore never reaches the parser. [0-9]
# and not \d, which matches the digits of all scripts. No newline, so that a column of the parser is a position in
# the text.
CHARACTERS = re.compile(r"[0-9.+\-*/%() ]*")
# The fast path: nearly every call is like "48+27", and without the parser it takes a fifth of the time or less. No
# leading zeros: the parser refuses 01, and the fast path must accept nothing that the slow one refuses.
SHORT = re.compile(r"(0|[1-9][0-9]{0,9})([-+*])(0|[1-9][0-9]{0,9})")

# The second check: what a syntax tree may consist of. There is no power: "9**9**9" has seven characters and 370
# million digits. Without powers, a result has at most about as many digits as were typed.
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a, b),  # int / int would be a float
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}  # GSM8K has annotations such as "+10=10"
OF_SIGN = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class CallError(Exception):
    """A call that has no result. Its text is short, because it takes one token per letter."""


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
    text = text.strip(" ")  # to the parser, leading blanks are an indentation
    try:
        return show(value(ast.parse(text, mode="eval").body, text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CallError("?syntax") from None


def value(node, text):
    """The exact value of a syntax tree, an int or a Fraction. text: what the tree was parsed from."""
    kind = type(node)
    # type() and not isinstance(): to isinstance, True is an int. ("..." is a Constant too.)
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
    """A number as text: "75", "-0.5", "1.666667". At most six decimals, no zeros at their end."""
    if type(number) is int or number.denominator == 1:
        return str(int(number))
    # In whole numbers: rounding a float would depend on its size. A half is rounded away from zero, as in school.
    millionths = (abs(number.numerator) * 2 * 10**6 + number.denominator) // (2 * number.denominator)
    whole, rest = divmod(millionths, 10**6)
    digits = f"{whole}.{rest:06}".rstrip("0").rstrip(".")
    return "-" + digits if number < 0 and millionths else digits


ANNOTATION = re.compile(r"<<(.*?)>>")
AGREE = ("identical", "the same number, written otherwise")


def agreement(annotation):
    """How the result in an annotation such as "48/2=24" compares with ours, in words."""
    expression, _, theirs = annotation.rpartition("=")
    try:
        ours = calculate(expression)
        same = Fraction(ours) == Fraction(theirs)  # ValueError where theirs is no number
        return AGREE[ours != theirs] if same else "another number"
    except CallError as error:
        return f"refused: {error}"
    except (ValueError, ZeroDivisionError):
        return "the result is no number"


def annotations(name, solutions):
    """Evaluate every <<expression=result>> of the solutions. Print how many results agree, and count the others by
    kind. Returns (number of solutions in which all agree, number of annotations of each kind)."""
    kinds, examples = Counter(), {}
    agreeing = without = 0
    for solution in solutions:
        found = set()
        for call in ANNOTATION.findall(solution):
            kind = agreement(call)
            found.add(kind)
            kinds[kind] += 1
            examples.setdefault(kind, call)
        without += not found
        agreeing += found <= {*AGREE}
    print(f"{name}: {len(solutions)} solutions, {without} of them without annotations")
    for kind, n in kinds.most_common():
        print(f"  {n:6}  {kind:36} such as <<{examples[kind]}>>")
    counted = f"{agreeing} of {len(solutions)} solutions (those without annotations included)"
    print(f"All annotations are reproduced in {counted}.")
    return agreeing, kinds
