"""The copying task: the text has spans in brackets, and the answer repeats the span that stands between two marks.

     apple [ tree dog ] river stone<|meta|> [ lamp cup key ]<|meta|> wind
     ? copy: lamp cup key

All words are drawn from the pool of items. One to six words precede each span, and a line ends after every span. The
level sets the number of words in a span. The text is filled with spans up to its length.
"""

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = True
CHANCE = 0.0  # chance of guessing a whole span; for its first word it is 1/200
SIZES = {"easy": (1, 3), "medium": (2, 5), "hard": (4, 8), "extra_hard": (8, 16), "long": (16, 32)}
BETWEEN = 6  # at most this many words precede a span


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    least, most = SIZES[level]
    n = draws.between(least, most)  # number of words to copy; they appear in the text and in the answer
    left = room - maker.cost(" ?", " copy", ":", *[" item"] * n, "\n") - 2 * maker.cost(POINT)
    lines: list[tuple[list[str], list[str]]] = []
    while True:
        size = draws.between(least, most) if lines else n
        words = [f" {draws.choice(maker.items)}" for _ in range(draws.between(1, BETWEEN))]
        span = [f" {draws.choice(maker.items)}" for _ in range(size)]
        left -= maker.cost(*words, " [", *span, " ]", STOP, "\n")
        if left < 0:
            break
        lines.append((words, span))
    if not lines:
        return None
    order = draws.sample(range(len(lines)), len(lines))
    lines, target = [lines[i] for i in order], order.index(0)
    out = Draft()
    for i, (words, span) in enumerate(lines):
        wrap = [POINT] * (i == target)
        out.body += [*words, *wrap, " [", *span, " ]", *wrap, STOP, "\n"]
    span = lines[target][1]
    out.questions = [([" ?", " copy", ":"], [*span, "\n"])]
    out.shortcuts = {
        "the last span": "".join(lines[-1][1]),
        "the first span": "".join(lines[0][1]),
        "any span": "".join(draws.choice(lines)[1]),
        "the words before the marked span": "".join(lines[target][0][-len(span) :]),
    }
    return out


if __name__ == "__main__":
    show("copying")
