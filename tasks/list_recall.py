"""List recall ("list pointer"): named lists, and a question for one item of one of them.

     fruit: orange peach banana plum
     tool:<|meta|> hammer wrench level pliers<|meta|>
     ? tool #3: level

The paper asks for item j of a named list (`index`), and wraps the list that will be asked for. With --question=after
the question gives an item, which all lists hold, and asks for the one that follows it in the named list. Names and
items are drawn from two pools of 200, whatever they mean, so that neither a category nor a word gives the answer away.
Levels: items in a list; the length is filled with lists.
"""

from rng import Draws
from tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = True
CHANCE = 1 / 200  # an item of the pool
SIZES = {"easy": (1, 4), "medium": (3, 6), "hard": (6, 8), "extra_hard": (8, 12), "long": (8, 12)}


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """A text of at most `room` positions, None if these draws come to none."""
    after, n_questions = maker.cfg.question == "after", maker.cfg.questions
    anchors = draws.sample(maker.items, n_questions) if after else []  # items of all lists that can be asked for
    others = [item for item in maker.items if item not in anchors] if after else maker.items
    left = room - n_questions * maker.cost(" ?", " name", " after", " item", ":", " item", "\n") - 2 * maker.cost(POINT)
    least, most = (max(size, n_questions + 1) if after else size for size in SIZES[level])
    line = maker.cost(" name", ":", *[" item"] * least, STOP, "\n")
    names = draws.sample(maker.names, min(len(maker.names), 1 + max(0, left) // line))
    lists: dict[str, list[str]] = {}
    while names:
        items = draws.sample(others, draws.between(least, most) - len(anchors))
        if after:  # an item that has a successor: not at the end
            places = sorted(draws.sample(range(len(items) + len(anchors) - 1), len(anchors)))
            for place, anchor in zip(places, draws.sample(anchors, len(anchors)), strict=True):
                items.insert(place, anchor)
        name = names.pop()
        left -= maker.cost(f" {name}", ":", *(f" {item}" for item in items), STOP, "\n")
        if left < 0:
            break
        lists[name] = items
    if not lists:
        return None
    target = draws.choice(list(lists))
    out = Draft()
    for name, items in lists.items():
        wrap = [POINT] if name == target else []
        out.body += [f" {name}", ":", *wrap, *(f" {item}" for item in items), *wrap, STOP, "\n"]
    for number in range(n_questions):
        # where something points, it points at the list of all questions
        name = target if maker.cfg.placement != "every" or number == 0 else draws.choice(list(lists))
        items = lists[name]
        j = items.index(anchors[number]) + 1 if after else draws.below(len(items))
        asked = [" after", f" {items[j - 1]}"] if after else [" #", str(j + 1)]
        out.questions.append(([" ?", f" {name}", *asked, ":"], [f" {items[j]}", "\n"]))
        if number == 0:
            last, other = list(lists.values())[-1], draws.choice(list(lists.values()))
            out.shortcuts = {
                "the same place in the last list": _there(last, j, items[j - 1] if after else None),
                "the same place in any list": _there(other, j, items[j - 1] if after else None),
                "any item of the list": draws.choice(items),
                "the list's first item": items[0],
            }
    return out


def _there(items: list[str], j: int, anchor: str | None) -> str:
    """What stands in a list at a place, or after an item that all lists hold."""
    return items[min(j, len(items) - 1) if anchor is None else items.index(anchor) + 1]


if __name__ == "__main__":
    show("list_recall")
