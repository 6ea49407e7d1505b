"""List recall ("list pointer"): named lists, and a question for one item of one of them.

     fruit: orange peach banana plum
     tool:<|meta|> hammer wrench level pliers<|meta|>
     ? tool #3: level

The paper asks for item j of a named list (`index`), and wraps the list that will be asked for. With --question=after
the question gives an item, which all lists hold, and asks for what follows it in the named list. --question=misnamed
gives the name of another list than the one that is pointed at, whose item it wants: a control, in which a model that
goes by the name is wrong. Names and items are drawn from two pools of 200, whatever they mean, so that neither a
category nor a word gives the answer away; where 200 lists do not fill the length, further names are of two words.
Levels: items in a list; the length is filled with lists.
"""

import itertools

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = True
ANSWER_IN_TEXT = True
CHANCE = 1 / 200  # an item of the pool
SIZES = {"easy": (1, 4), "medium": (3, 6), "hard": (6, 8), "extra_hard": (8, 12), "long": (8, 12)}


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """A text of at most `room` positions, None if these draws come to none."""
    after, n_questions = maker.cfg.question == "after", maker.cfg.questions
    least, most = SIZES[level]
    if after:  # an anchor is an item of all lists, with another item behind it in each
        least, most = max(2, least), max(2, most)
        anchors = draws.sample(maker.items, draws.between(1, least // 2))
        others = [item for item in maker.items if item not in anchors]
    if maker.has_pointer:  # something points at one list, and all questions ask for that
        n_questions = min(n_questions, len(anchors) if after else least)
    left = room - n_questions * maker.cost(" ?", " name", " after", " item", ":", " item", "\n") - 2 * maker.cost(POINT)
    line = maker.cost(" name", ":", *[" item"] * least, STOP, "\n")
    names = draws.sample(maker.names, min(len(maker.names), 1 + max(0, left) // line))
    lists: dict[str, list[str]] = {}
    for name in itertools.chain(names, maker.longer_names(draws)):
        size = draws.between(least, most)
        if after:
            items = draws.sample(others, size - len(anchors))
            for anchor in draws.sample(anchors, len(anchors)):
                items.insert(draws.below(len(items)), anchor)  # never at the end
        else:
            items = draws.sample(maker.items, size)
        left -= maker.cost(f" {name}", ":", *(f" {item}" for item in items), STOP, "\n")
        if left < 0:
            break
        lists[name] = items
    misnamed = maker.cfg.question == "misnamed"
    if len(lists) < 1 + misnamed:
        return None
    target, out = draws.choice(list(lists)), Draft()
    other = draws.choice([name for name in lists if name != target]) if misnamed else None
    for name, items in lists.items():
        wrap = [POINT] if name == target else []
        out.body += [f" {name}", ":", *wrap, *(f" {item}" for item in items), *wrap, STOP, "\n"]

    asked = [target] if maker.has_pointer else list(lists)
    places = [(name, lists[name].index(a) + 1) for name in asked for a in anchors] if after else [
        (name, j) for name in asked for j in range(len(lists[name]))
    ]  # fmt: skip
    for name, j in draws.sample(places, min(n_questions, len(places))):  # none twice
        items = lists[name]
        how = [" after", f" {items[j - 1]}"] if after else [" #", str(j + 1)]
        out.questions.append(([" ?", f" {other or name}", *how, ":"], [f" {items[j]}", "\n"]))
        if not out.shortcuts:
            last, any_list = list(lists.values())[-1], draws.choice(list(lists.values()))
            anchor = items[j - 1] if after else None
            out.shortcuts = {
                "the same place in the last list": _there(last, j, anchor),
                "the same place in any list": _there(any_list, j, anchor),
                "any item of the list": draws.choice(items),
                "the list's first item": items[0],
            }
            if misnamed:
                out.shortcuts["the same place in the list that is named"] = _there(lists[other], j, anchor)
    return out


def _there(items: list[str], j: int, anchor: str | None) -> str:
    """What stands in a list at a place, or after an item that all lists hold."""
    return items[min(j, len(items) - 1) if anchor is None else items.index(anchor) + 1]


if __name__ == "__main__":
    show("list_recall")
