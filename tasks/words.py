"""The words of the tasks: two lists of everyday words, and the choice of those that are one token in a tokenizer."""

import functools
from collections.abc import Callable

from nanometa.data.tokenizer import Tokenizer

POOL = 200  # number of items, and also of names of lists

ITEMS = """
apple pear plum cherry grape lemon orange banana peach mango melon olive onion carrot potato tomato pepper garlic bean
corn rice bread butter cheese cream sugar salt honey soup cake pie milk tea coffee juice wine beer egg fish beef dog
cat horse cow pig sheep goat lion tiger bear wolf fox deer mouse rat rabbit monkey elephant camel whale shark frog
snake turtle bird duck goose eagle owl crow bee ant spider tree leaf root branch flower rose grass seed forest river
lake sea ocean island mountain hill valley desert beach rock stone sand snow rain wind storm cloud sun moon star fire
smoke iron gold silver copper steel glass wood paper cotton leather hammer nail saw drill screw knife fork spoon plate
cup bowl pot pan bottle box bag basket table chair desk bed lamp clock mirror carpet door window wall roof floor
kitchen garden house tower bridge road street train car truck bus boat ship plane wheel engine motor key lock rope
chain belt shirt coat hat shoe boot glove ring crown sword shield bow gun drum piano violin guitar flute bell book
letter stamp coin card ball doll kite puzzle camera phone radio screen brush pencil needle thread button pocket
blanket pillow towel soap doctor nurse teacher farmer sailor soldier king queen prince father mother brother sister
uncle cousin friend neighbor baby child file path name list type value line code test text data time date day month
year name byte bit word page mail port host node thread lock event signal queue stack heap pool cache block frame
field record row column cell class object method function module package library program process task job user group
owner client server socket message packet header body footer title index token string number digit character letter
symbol sign mark point line edge side corner length width size depth level order rank score count sum total limit
range step stage phase state mode flag option switch filter handler loader parser reader writer builder manager
director worker parent child sibling ancestor tree branch source target origin result answer question request response
reply error warning problem fault reason cause effect action command call task plan policy rule pattern template
example sample case copy version release update change difference match search find view window screen display panel
frame widget menu font color image style theme layout format document report section chapter item entry element member
part piece unit pair group set map dictionary tuple array vector matrix table graph archive folder directory platform
system machine device memory storage driver interface adapter connection network protocol address domain zone locale
language country city place position location offset distance space room area scope context environment variable
constant parameter argument attribute property feature subject content information description comment note summary
detail message alias proxy agent account password certificate security access permission resource service session
transport backend loop iterator generator decorator wrapper container buffer stream channel pipe queue timer clock
delay timeout interval future base prefix suffix integer binary encoding exception chunk tag email operation literal
logger dialog suite shell zip quote selector anchor browser clause master mapping extension tail cookie keyword
statement expression scheme instance control tab cap option
""".split()

NAMES = """
fruit tool animal color city country river planet metal sport game dance song poem story film music art science
history language number letter shape season weather holiday party school office market shop hotel farm castle church
temple museum park zoo circus theater factory hospital prison court army navy police crew team club tribe family class
band choir village town capital border coast harbor canal tunnel railway airport station square corner path trail
hunter baker butcher tailor painter writer singer actor dancer poet judge lawyer banker clerk driver pilot captain
guard guide guest host owner tenant winner loser hero villain ghost witch giant dwarf dragon angel devil spirit dream
fear hope love joy anger pride honor shame truth lie secret promise gift prize debt price cost profit trade money bank
tax law crime war peace battle treaty vote council senate empire kingdom colony spring summer autumn winter morning
evening night noon midnight hour minute second week century north south east west left right front back top bottom
middle center inside outside red blue green yellow brown black white pink purple gray bright dark light heavy hot cold
warm cool dry wet clean dirty fast slow high low deep wide narrow short long round flat sharp smooth rough soft hard
loud quiet sweet sour bitter fresh old new young rich poor strong weak brave clever wise foolish happy sad angry calm
busy lazy kind cruel proud humble early late near far empty full open closed first last next same different simple
common special main local global public private normal regular basic extra final initial current previous original
similar equal single double multiple half whole complete partial valid invalid correct wrong true false real virtual
active passive static dynamic internal external raw native default custom optional required available possible
necessary sure safe secure stable strict weak strong exact fixed free clear plain visible hidden missing present
absent upper lower positive negative relative absolute direct abstract concrete generic specific standard modern
recent ancient future past daily read write open close start stop begin end run walk jump swim fly climb fall rise
turn move push pull lift drop throw catch hold keep give take send receive bring carry build break make fix cut join
split mix fill pour wash cook eat drink sleep wake dream think know learn teach ask answer call speak talk shout sing
play work rest wait watch look see hear listen touch smell taste feel like hate need want use try help save spend buy
sell pay earn lose win find hide seek show tell explain describe compare count measure check test prove create destroy
add remove insert delete update change replace accept reject allow deny grant enable disable include exclude support
provide require return yield raise handle process parse format print display compile execute install register define
declare assign bind convert decode encode compress extract load store cache fetch copy import export connect attach
follow lead search match sort merge reverse reset restore append extend expand reduce collect all any other some each
many most more few used given called made found done got sent held kept built written changed added removed needed
supported allowed created specified provided updated generated shared matching running reading whether should must
might will can may since until where while when which they them you this that these there above below under over
between within without through just also now then always never already finally currently directly existing
corresponding
""".split()

DELIMITER = "mark"  # the ordinary word that takes the place of a meta-token in some placements
# words that the formats of the tasks use
OWN = {DELIMITER, "after", "zero", "one", "two", "three", "four", "copy", "parity", "count"}


@functools.lru_cache(maxsize=4)
def pools(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Returns 200 items and 200 names of lists, with no word in both.

    From each of the lists above it takes the words with the fewest tokens, the earlier ones first."""

    return _pools(lambda word: len(tokenizer.encode(f" {word}")))


def first_pools() -> tuple[list[str], list[str]]:
    """Returns the pools of a tokenizer in which all words have equally many tokens: the first words of the lists."""
    return _pools(lambda word: 1)


def _pools(cost: Callable[[str], int]) -> tuple[list[str], list[str]]:
    def pool(words: list[str], taken: set[str]) -> list[str]:
        free = [word for word in dict.fromkeys(words) if word not in taken]
        return sorted(free, key=cost)[:POOL]  # a stable sort: words of equal cost stay in the order of the list

    items = pool(ITEMS, OWN)
    return items, pool(NAMES, OWN | set(items))


def tokens_per_item(tokenizer: Tokenizer) -> float:
    """Returns the mean number of tokens of the items in the pool; it is 1 if every item is one token."""
    items = pools(tokenizer)[0]
    return sum(len(tokenizer.encode(f" {word}")) for word in items) / len(items)


@functools.lru_cache(maxsize=4)
def tokens_per_word(tokenizer: Tokenizer) -> float:
    """Returns the mean number of tokens of the words in both pools."""
    words = [word for pool in pools(tokenizer) for word in pool]
    return sum(len(tokenizer.encode(f" {word}")) for word in words) / len(words)
