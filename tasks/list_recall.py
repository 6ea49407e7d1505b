"""The list recall task ("list pointer"): the text has named lists, and the answer is one item of one of them.

     fruit: orange peach banana plum
     tool:<|meta|> hammer wrench level pliers<|meta|>
     ? tool #3: level

There are three forms of the question:

index     The question asks for item j of a named list, as in the paper. The text points at the same list.
after     The question names a list and an item that all lists contain, and asks for the item after it in that list.
misnamed  The question asks for an item of the list that the text points at, but names another list. This is a control:
          a model that follows the name answers wrongly.

Names and items are drawn from two pools of 200 words regardless of their meaning, so that neither a category nor a word
reveals the answer. If 200 lists do not fill the length, further lists have names of two words. The level sets the
number of items in a list. The text is filled with lists up to its length.

With semantic lists, as in the paper's example, a list is named after a category, and its items are drawn from the 14
members of this category (tasks/categories.py). After one list of each of the 20 categories, further lists have an
adjective in front of the category (" old fruit"), so lists of one category can share items but no name. There are 1,680
names; longer texts are refused.
"""

import itertools

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = True
ANSWER_IN_TEXT = True
CHANCE = 1 / 200  # chance of guessing one item of the pool
SIZES = {"easy": (1, 4), "medium": (3, 6), "hard": (6, 8), "extra_hard": (8, 12), "long": (8, 12)}


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    after, n_questions = maker.cfg.question == "after", maker.cfg.questions
    least, most = SIZES[level]
    if after:  # an anchor is an item that occurs in every list, each time with another item after it
        least, most = max(2, least), max(2, most)
        anchors = draws.sample(maker.items, draws.between(1, least // 2))
        others = [item for item in maker.items if item not in anchors]
    if maker.has_pointer:  # the text points at one list, and all questions ask about that list
        n_questions = min(n_questions, len(anchors) if after else least)
    left = room - n_questions * maker.cost(" ?", " name", " after", " item", ":", " item", "\n") - 2 * maker.cost(POINT)
    line = maker.cost(" name", ":", *[" item"] * least, STOP, "\n")
    single = list(maker.categories) if maker.semantic else maker.names
    names = draws.sample(single, min(len(single), 1 + max(0, left) // line))
    lists: dict[str, list[str]] = {}
    for name in itertools.chain(names, maker.longer_names(draws)):
        size = draws.between(least, most)
        if after:
            items = draws.sample(others, size - len(anchors))
            for anchor in draws.sample(anchors, len(anchors)):
                items.insert(draws.below(len(items)), anchor)  # never at the end: an anchor needs an item after it
        else:
            items = draws.sample(members(maker, name) if maker.semantic else maker.items, size)
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
    for name, j in draws.sample(places, min(n_questions, len(places))):  # no question occurs twice
        items = lists[name]
        asks_for = [" after", f" {items[j - 1]}"] if after else [" #", str(j + 1)]
        out.questions.append(([" ?", f" {other or name}", *asks_for, ":"], [f" {items[j]}", "\n"]))
        if not out.shortcuts:
            last, any_list = list(lists.values())[-1], draws.choice(list(lists.values()))
            anchor = items[j - 1] if after else None
            out.shortcuts = {
                "the same place in the last list": _item_at(last, j, anchor),
                "the same place in any list": _item_at(any_list, j, anchor),
                "any item of the list": draws.choice(items),
                "the list's first item": items[0],
            }
            if maker.semantic:
                out.shortcuts["any item of the category"] = draws.choice(members(maker, name))
            if misnamed:
                out.shortcuts["the same place in the list that is named"] = _item_at(lists[other], j, anchor)
    return out


def members(maker: Maker, name: str) -> list[str]:
    """Returns the members of the category of a semantic list; the category is the last word of its name."""
    return maker.categories[name.split()[-1]]


def _item_at(items: list[str], j: int, anchor: str | None) -> str:
    """Returns the item after the anchor if there is one, else item j, or the last item of a shorter list."""
    return items[min(j, len(items) - 1) if anchor is None else items.index(anchor) + 1]


if __name__ == "__main__":
    show("list_recall")
