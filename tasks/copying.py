"""The copying task: the text has spans in brackets, and the answer repeats the span that stands between two marks.

     apple [ tree dog ] river stone<|meta|> [ lamp cup key ]<|meta|> wind
     ? copy: lamp cup key

One to six words precede each span, and a line ends after every span. The level sets the number of words in a span. The
text is filled with spans up to its length.

The words are drawn so that copying is equally ambiguous at every length, and so that nothing but the marks tells the
target from the other spans:

    - No two adjacent words occur in this order in another place of the text, and no word occurs twice in a span.
    - No two spans start with the same word. (If the text has more spans than words, all words start equally many.)
    - The vocabulary of a text has half as many words as the text has places for words, so each word occurs twice. The
      pools have 400 words: in texts with more than 800 places, some 1,100 positions, words occur more often. Where a
      span needs more words than half of the places, they occur less often.

Whoever knows the first word of the answer, and continues with what followed the last two tokens before (2-gram
induction, starting from the bracket and the first word), is right in every text. Whoever continues with what followed
the last word alone (1-gram induction) has to guess between two places at every word. What is left to learn is where the
marks are, and the distance from there.
"""

import itertools

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show
from nanometa.tasks.words import tokens_per_word

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = True
CHANCE = 0.0  # chance of guessing a whole span; for its first word it is 1 / number of words in the text
SIZES = {"easy": (1, 3), "medium": (2, 5), "hard": (4, 8), "extra_hard": (8, 16), "long": (16, 32)}
BETWEEN = 6  # at most this many words precede a span
OCCURRENCES = 2  # how often each word of a text's vocabulary occurs


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    least, most = SIZES[level]
    per_word, brackets = tokens_per_word(maker.tokenizer), maker.cost(" [", " ]", STOP, "\n")
    n = draws.between(least, most)  # number of words to copy; they appear in the text and in the answer
    room -= maker.cost(" ?", " copy", ":", "\n") + 2 * maker.cost(POINT)
    left = room - n * per_word
    shapes: list[tuple[int, int]] = []  # numbers of words before each span and in it
    while True:
        size = draws.between(least, most) if shapes else n
        before = draws.between(1, BETWEEN)
        left -= (before + size) * per_word + brackets
        if left < 0:
            break
        shapes.append((before, size))
    if not shapes:
        return None
    order = draws.sample(range(len(shapes)), len(shapes))
    shapes, target = [shapes[i] for i in order], order.index(0)
    lines = _deal(draws, [*maker.items, *maker.names], shapes)
    if lines is None:
        return None
    out = Draft()
    for i, (words, span) in enumerate(lines):
        wrap = [POINT] * (i == target)
        out.body += [*words, *wrap, " [", *span, " ]", *wrap, STOP, "\n"]
    span = lines[target][1]
    if maker.cost(*out.body, *span) > room + 2 * maker.cost(POINT):  # only if words differ in their number of tokens
        return None
    out.questions = [([" ?", " copy", ":"], [*span, "\n"])]
    out.shortcuts = {
        "the last span": "".join(lines[-1][1]),
        "the first span": "".join(lines[0][1]),
        "any span": "".join(draws.choice(lines)[1]),
        "the longest span": "".join(max((span for _, span in lines), key=len)),
        "the words before the marked span": "".join(lines[target][0][-len(span) :]),
    }
    pieces = [piece for words, span in lines for piece in (*words, " [", *span, " ]", "\n")]
    after = dict(itertools.pairwise(pieces))  # of several occurrences, the last one counts
    after_two = dict(zip(itertools.pairwise(pieces), pieces[2:], strict=False))
    one, two = [span[0]], [" [", span[0]]
    for _ in span[1:]:
        one.append(after.get(one[-1], ""))
        two.append(after_two.get((two[-2], two[-1]), ""))
    out.aided = {
        "1-gram induction, given the first word": "".join(one),
        "2-gram induction, given the first word": "".join(two[1:]),
    }
    return out


def _deal(draws: Draws, pool: list[str], shapes: list[tuple[int, int]]) -> list[tuple[list[str], list[str]]] | None:
    """Deals words to the lines of a text, as the docstring of this module demands.

    shapes: for each line the numbers of words before the span and in it. Returns both lists of words for each line, or
    None if the last words of the deck do not fit anywhere."""
    n, longest = sum(map(sum, shapes)), max(size for _, size in shapes)
    known = draws.sample(pool, min(len(pool), max(longest, -(-n // OCCURRENCES))))
    each, more = divmod(n, len(known))
    deck = draws.sample([f" {word}" for word in [*known * each, *known[:more]]], n)
    pairs: set[tuple[str, str]] = set()  # adjacent words
    starts: dict[str, int] = {}
    most_starts = -(-len(shapes) // len(known))
    lines, dealt = [], 0
    for shape in shapes:
        line: tuple[list[str], list[str]] = ([], [])
        for words, size, is_span in zip(line, shape, (False, True), strict=True):
            while len(words) < size:
                before = words[-1] if words else None
                for i in range(dealt, n):
                    word = deck[i]
                    if is_span and (word in words or (not words and starts.get(word, 0) == most_starts)):
                        continue
                    if before is None or (before != word and (before, word) not in pairs):
                        break
                else:
                    return None
                deck[dealt], deck[i] = word, deck[dealt]
                dealt += 1
                pairs.add((before or "", word))
                words.append(word)
            if is_span:
                starts[words[0]] = starts.get(words[0], 0) + 1
        lines.append(line)
    return lines


if __name__ == "__main__":
    show("copying")
