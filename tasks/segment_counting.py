"""The segment counting task: the answer is how often an item occurs between two marks.

     fruit: orange peach hammer plum
     tool:<|meta|> hammer wrench hammer pliers
     color: red hammer<|meta|> green
     ? count hammer:3

The text consists of named lists of 6 items. The segment spans whole lists: it starts after the name of its first list
and ends after the last item of its last list. The answer is 1, 2, 3 or 4, each equally often; the paper's floor of 25 %
suggests four values. Outside the segment the item occurs 0 to 12 times, independent of the answer. The level sets the
number of lists in the segment. The text is filled with lists up to its length.
"""

import itertools

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = False
CHANCE = 1 / 4
SIZES = {"easy": (1, 1), "medium": (1, 2), "hard": (2, 4), "extra_hard": (4, 8), "long": (8, 16)}
ITEMS = 6  # items in a list
COUNTS = 4  # the answer is 1 .. COUNTS
OUTSIDE = 12  # the item occurs at most this often outside the segment


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    left = room - maker.cost(" ?", " count", " item", ":", "4", "\n") - 2 * maker.cost(POINT)
    item = draws.choice(maker.items)
    others = [word for word in maker.items if word != item]
    line = maker.cost(" name", ":", *[" item"] * ITEMS, STOP, "\n")
    names = draws.sample(maker.names, min(len(maker.names), 1 + max(0, left) // line))
    lists: list[tuple[str, list[str]]] = []
    for name in itertools.chain(reversed(names), maker.longer_names(draws)):
        items = [draws.choice(others) for _ in range(ITEMS)]
        left -= maker.cost(f" {name}", ":", *(f" {word}" for word in items), STOP, "\n")
        if left < 0:
            break
        lists.append((name, items))
    least, most = SIZES[level]
    if len(lists) < least:
        return None
    size = draws.between(least, min(most, len(lists)))
    first = draws.below(len(lists) - size + 1)
    segment = range(first, first + size)
    slots = [(i, j) for i in range(len(lists)) for j in range(ITEMS)]
    inside, outside = [s for s in slots if s[0] in segment], [s for s in slots if s[0] not in segment]
    count, beside = draws.between(1, COUNTS), draws.between(0, OUTSIDE)
    if beside > len(outside):
        return None  # placing fewer of them instead would let their number reveal the size of the segment
    for i, j in draws.sample(inside, count) + draws.sample(outside, beside):
        lists[i][1][j] = item
    out = Draft()
    for i, (name, items) in enumerate(lists):
        before, behind = [POINT] * (i == segment[0]), [POINT] * (i == segment[-1])
        out.body += [f" {name}", ":", *before, *(f" {word}" for word in items), *behind, STOP, "\n"]
    out.questions = [([" ?", " count", f" {item}", ":"], [str(count), "\n"])]
    total = count + beside
    out.shortcuts = {
        # given the count of the whole text, all answers that this count allows are equally likely
        "from the count of the whole text": str(min(COUNTS, total)),
        "the count of the segment's first list": str(max(1, min(COUNTS, lists[first][1].count(item)))),
        "the count of the segment's last list": str(max(1, min(COUNTS, lists[segment[-1]][1].count(item)))),
        "always the same": "1",
    }
    return out


if __name__ == "__main__":
    show("segment_counting")
