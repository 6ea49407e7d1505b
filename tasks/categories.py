"""The words of list recall with semantic lists: categories, their members, and adjectives that tell lists apart."""

import functools

from nanometa.data.tokenizer import Tokenizer

MEMBERS = 14  # members of a category that a tokenizer's pool has

# No word belongs to two categories, so a member tells its category.
CATEGORIES = {
    "fruit": """apple pear plum cherry grape lemon banana peach mango melon apricot fig lime coconut strawberry
        pineapple""",
    "tool": """hammer saw drill wrench pliers screwdriver chisel shovel axe rake ladder knife clamp file scissors
        tape""",
    "animal": """dog cat horse cow pig sheep goat lion tiger bear wolf fox deer mouse rabbit monkey elephant camel""",
    "bird": """duck goose eagle owl crow robin swan hawk falcon sparrow pigeon turkey parrot raven chicken penguin""",
    "vegetable": """carrot potato tomato pepper garlic onion bean corn cabbage lettuce spinach celery pumpkin pea
        broccoli cucumber""",
    "color": """red blue green yellow black white pink purple gray brown violet silver gold scarlet beige crimson""",
    "metal": """iron steel copper zinc nickel lead tin bronze brass aluminum titanium platinum uranium chromium cobalt
        tungsten""",
    "drink": """water milk tea coffee juice wine beer soda whiskey lemonade cocoa vodka rum gin champagne brandy""",
    "clothing": """shirt coat hat shoe boot glove belt dress skirt jacket sweater scarf sock pants jeans tie vest""",
    "furniture": """table chair desk bed couch sofa shelf bench cabinet stool drawer dresser wardrobe mattress mirror
        lamp""",
    "vehicle": """car truck bus train boat ship plane bicycle motorcycle van taxi tractor ferry helicopter subway
        tank""",
    "instrument": """piano violin guitar flute drum trumpet cello harp organ banjo horn bass saxophone clarinet fiddle
        harmonica""",
    "country": """France Germany Spain Italy China Japan India Brazil Canada Mexico Egypt Russia Poland Greece Turkey
        Sweden""",
    "city": """London Paris Berlin Rome Madrid Moscow Tokyo Boston Chicago Dublin Vienna Sydney Seattle Toronto Delhi
        Amsterdam""",
    "job": """doctor nurse teacher farmer sailor soldier baker lawyer banker judge pilot painter engineer writer
        carpenter plumber""",
    "sport": """football baseball basketball soccer tennis golf hockey rugby cricket boxing wrestling volleyball
        swimming skiing surfing cycling""",
    "body": """hand foot arm leg head eye nose mouth ear knee finger shoulder neck elbow chest stomach""",
    "family": """mother father brother sister son daughter uncle aunt cousin wife husband nephew niece grandfather
        grandmother twin""",
    "weather": """rain snow wind storm cloud fog thunder lightning hail frost sunshine breeze hurricane tornado drought
        mist""",
    "building": """house castle church temple museum school hospital hotel library factory prison theater barn garage
        cottage palace""",
}  # fmt: skip

# Further lists of a category have names of two words, such as "old fruit".
ADJECTIVES = """
old new young big small long short high low good bad early late first last next other second third fourth final main
local public private common special single double whole half open free full empty dark light heavy deep wide narrow
round flat sharp soft hard loud quiet sweet fresh rich poor strong weak brave wise happy sad angry calm busy lazy kind
proud near far hot cold warm cool dry wet clean dirty fast slow simple general royal modern ancient foreign national
""".split()


@functools.lru_cache(maxsize=4)
def pools(tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Returns the categories with 14 members each: those with the fewest tokens, the earlier ones first."""
    return {
        name: sorted(members.split(), key=lambda word: len(tokenizer.encode(f" {word}")))[:MEMBERS]
        for name, members in CATEGORIES.items()
    }
