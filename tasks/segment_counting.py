"""The segment counting task: the answer is how often an item occurs between two marks.

     fruit: orange peach hammer plum
     tool:<|meta|> hammer wrench hammer pliers
     color: red hammer<|meta|> green
     ? count hammer:3

The text consists of named lists of 6 items. The segment spans whole lists: it starts after the name of its first list
and ends after the last item of its last list. The answer is 1, 2, 3 or 4, each equally often; the paper's floor of 25 %
suggests four values. The level sets the number of lists in the segment. The text is filled with lists up to its length.

The whole text is cut into segments, all drawn alike: each has a random number of lists and holds the item 1 to 4 times,
anywhere in them. One segment is marked. The item is therefore as frequent outside the marks as inside, at every length,
and only the marks tell which segment is meant: without them, no program stays above chance as texts grow. One mark
already tells much, since a list may lack the item, so the largest floors are those of programs that read one mark.
Where the lists do not come out even, an incomplete segment stands at one end; it is never marked, and holds the item as
often per list as the others.
"""

import itertools
from collections import Counter

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = False
CHANCE = 1 / 4
SIZES = {"easy": (1, 1), "medium": (1, 2), "hard": (2, 4), "extra_hard": (4, 8), "long": (8, 16)}
ITEMS = 6  # items in a list
COUNTS = 4  # the answer is 1 .. COUNTS


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
    sizes = _cut(draws, len(lists), *SIZES[level])
    if len(sizes) < 2:  # no complete segment
        return None
    rest = len(lists) - sum(sizes[:-1])  # number of lists of the last segment, which is incomplete or empty
    ahead = draws.below(2) * rest  # these lists stand at the start or at the end
    chosen, start = draws.below(len(sizes) - 1), ahead
    for number, size in enumerate(sizes):
        complete = number < len(sizes) - 1
        first = start if complete else 0 if ahead else len(lists) - rest
        count = draws.between(1, COUNTS)
        for slot in draws.sample(range(size * ITEMS), count):
            if complete or slot < rest * ITEMS:
                lists[first + slot // ITEMS][1][slot % ITEMS] = item
        if number == chosen:
            segment, answer = range(start, start + size), count
        start += size
    out = Draft()
    for i, (name, items) in enumerate(lists):
        before, behind = [POINT] * (i == segment[0]), [POINT] * (i == segment[-1])
        out.body += [f" {name}", ":", *before, *(f" {word}" for word in items), *behind, STOP, "\n"]
    out.questions = [([" ?", " count", f" {item}", ":"], [str(answer), "\n"])]
    out.shortcuts = _shortcuts([items.count(item) for _, items in lists], segment, *SIZES[level])
    return out


def _cut(draws: Draws, n: int, least: int, most: int) -> list[int]:
    """Returns the sizes of the segments that n lists are cut into. The last one is drawn larger than what is left."""
    sizes: list[int] = []
    while sum(sizes) <= n:
        sizes.append(draws.between(least, most))
    return sizes


def _shortcuts(counts: list[int], segment: range, least: int, most: int) -> dict[str, str]:
    """Returns the answers of programs that read at most one of the marks.

    counts: how often the item occurs in each list. least, most: possible sizes of the segment."""
    first, last, middle = segment[0], segment[-1], (least + most) // 2
    sizes = sorted({least, middle, most})

    def runs(lists: int) -> list[int]:
        return [sum(counts[i : i + lists]) for i in range(max(1, len(counts) - lists + 1))]

    answers = {
        "from the count of the whole text": sum(counts),
        f"the mean count of {middle} adjacent lists": round(middle * sum(counts) / len(counts)),
        f"the most frequent count of {middle} adjacent lists": Counter(runs(middle)).most_common(1)[0][0],
        **{f"the largest count of {n} adjacent lists": max(runs(n)) for n in sizes},
        "the count of the segment's first list": counts[first],
        "the count of the segment's last list": counts[last],
        **{f"the count of {n} lists from the first mark": sum(counts[first : first + n]) for n in sizes},
        **{f"the count of {n} lists up to the last mark": sum(counts[max(0, last + 1 - n) : last + 1]) for n in sizes},
        "always the same": 1,
    }
    return {name: str(max(1, min(COUNTS, answer))) for name, answer in answers.items()}


if __name__ == "__main__":
    show("segment_counting")
