"""Defines the section of each probe: its question, the fields of its lines, its pictures and its table."""

from collections.abc import Callable

from nanometa.reports import ablation, probe_pictures, rate_distortion
from nanometa.reports.lines import CELL, NUMBER
from nanometa.reports.markup import percent, points, span
from nanometa.reports.paper import FIGURE_2
from nanometa.reports.table_sections import WHERE, Column, claim, layers_where, probe

CHECKPOINT = "Verdicts and Holm's p are about this checkpoint, not about its arm."
TEXTS = ("task", "placement", "level", "question", "length")  # tell cells apart
N = Column("n", lambda line: line["n"])


def by_layer(row: dict, show) -> str:
    """Returns the values of a figure in the lines of one row, layer by layer from 0."""
    return " ".join(map(show, sorted(row["lines"], key=lambda line: line["layer"])))


def known(*names: str, **kinds: tuple) -> dict[str, tuple]:
    """Returns the types of a cell's fields; `names` are further fields that hold numbers."""
    return {**CELL, "mark": (str,), **dict.fromkeys(names, NUMBER), **kinds}


def judged(*claims: str) -> dict[str, tuple]:
    """Returns the types of the fields that claims add to a line."""
    of = {"": NUMBER, "_interval": (list,), "_holm": NUMBER, "_verdict": (str,)}
    return {f"{claim}{end}": kinds for claim in claims for end, kinds in of.items()}


def share(name: str) -> Callable[[dict], str]:
    return lambda line: percent(line[name]) if name in line else ""


def few_keys(keys: float) -> str:
    return f"{keys:.1f}{' (few)' if keys < 8 else ''}"


POSITIONS = probe(
    "positions",
    "Meta-tokens without a position, without an embedding",
    "The same weights read the same texts as trained (full), and without the position of meta-tokens, their embedding, "
    "or both. If the answer needs either, fewer answers are right without it. Differences from full are in points, "
    'with Newcombe\'s interval over texts; verdicts are about "more answers are right than in full". The cells of the '
    f"paper's Table 2 have about 18 texts. {CHECKPOINT}",
    {**CELL, "condition": (str,), "exact": NUMBER, "interval": (list,), "chance": NUMBER},
    (*TEXTS, "condition"),
    probe_pictures.draw_positions,
    (
        *WHERE,
        Column("condition", lambda line: line["condition"].replace("_", " "), text=True),
        Column("exact, %", share("exact")),
        Column("95 %", lambda line: span(*line["interval"])),
        *claim("difference", "difference", points, ""),
        Column("chance, %", share("chance")),
        N,
    ),
    panel=("task", "level", "question", "length"),
    optional={"difference": NUMBER, "difference_interval": (list,), "holm": NUMBER, "verdict": (str,)},
)

ATTENTION = probe(
    "attention",
    "Logit boost and entropy drop of every head",
    "The same weights read the same texts as trained and with zeros for the embedding of the mark. Boost is the growth "
    "of a head's largest logit and drop is the fall of its entropy, over the queries after the last mark. The paper's "
    f"Figure 2 has a boost of {FIGURE_2['boost']:.2f} and a drop of {FIGURE_2['drop']:.2f} nats, of heads and queries "
    'that it does not name. Its theorem holds only for a key that is likely without the boost: "applies" is the share '
    'of queries for which the last mark is such a key, and "explained" the drop if only the logit of the mark had '
    'changed. With placement none the word "mark" takes the place of the meta-token. Intervals are over texts. '
    f"{CHECKPOINT}",
    known(attention=(str,), layer=(int, type(None)), head=(int, type(None))) | judged("boost", "drop"),
    (*TEXTS, "attention", "layer", "head"),
    probe_pictures.draw_attention,
    (
        *WHERE,
        Column("attention", lambda line: line["attention"], text=True),
        Column("head", lambda line: "all" if line["layer"] is None else f"{line['layer']}.{line['head']}"),
        *claim("boost", "boost", "{:+.2f}".format),
        *claim("drop, nats", "drop", "{:+.2f}".format),
        Column("explained", lambda line: f"{line['predicted']:+.2f}" if "predicted" in line else ""),
        Column("applies, %", share("applies")),
        Column("on marks, %", share("on_marks")),
        Column("zeroed, %", share("on_marks_zeroed")),
        Column("keys a query", lambda line: few_keys(line["keys"]) if "keys" in line else ""),
        N,
    ),
    panel=("task", "level", "question", "length"),
    choices={"attention": probe_pictures.ATTENTION_MARKERS},
    optional=dict.fromkeys(("predicted", "applies", "on_marks", "on_marks_zeroed", "keys"), NUMBER),
)

PATCHING = probe(
    "patching",
    "States replaced by another text's",
    "Is the answer read from the meta-token? At one place of a text, the state that enters a layer is replaced by that "
    "of a donor, a text with another answer. If the text's own answer disappears, the state is needed; if the donor's "
    "answer appears, the state carries it. If neither changes at the mark, the answer is not read there. The answer "
    "itself in the text and the token that predicts it show the effect at places that are read. In the rows about keys "
    "and values, other tokens see those of the donor at all marks, in all layers at once. "
    f"{CHECKPOINT}",
    known("kept", "kept_unpatched", "donor", "donor_unpatched", site=(str,), layer=(int, type(None)))
    | {"kept_interval": (list,), "donor_interval": (list,)}
    | judged("needed", "carried"),
    (*TEXTS, "site", "layer"),
    probe_pictures.draw_patching,
    (
        *WHERE,
        Column("replaced at", lambda line: probe_pictures.SITE_NAMES[line["site"]], text=True),
        Column("donors with the mark at the same position, %", share("same_place")),
        Column("own answer, no patch, %", share("kept_unpatched")),
        Column("own answer, %, by layer", lambda line: by_layer(line, share("kept"))),
        Column("needed, in layers", lambda line: layers_where(line["lines"], "needed")),
        Column("donor's, %, by layer", lambda line: by_layer(line, share("donor"))),
        Column("carried, in layers", lambda line: layers_where(line["lines"], "carried")),
        N,
    ),
    row=(*TEXTS, "site"),
    panel=TEXTS,
    choices={"site": probe_pictures.SITE_NAMES},
    optional={"same_place": NUMBER},
)

RESIDUAL = probe(
    "residual",
    "What the states of marks contain about the tokens before them",
    "The state that enters a layer (the last is the final norm) is compared with the token some positions back. "
    '"Nearer" is their cosine, with the layer\'s mean state subtracted, minus that with the token of another text. '
    '"Decoded" is how often a linear classifier, trained on other texts, names that token from the state; its floors '
    'are naming the most frequent token and training on shuffled labels. "More than the word" lists the layers in '
    'which more is named from the mark than from the word "mark" in its place. The paper shows cosines without a '
    f"floor. Decodable information need not be used: patching tests that. {CHECKPOINT}",
    known("cosine_centred", "floor_centred", "decoded", "majority", "shuffled")
    | {"place": (str,), "layer": (int,), "distance": (int,), "cosine_centred_interval": (list,)}
    | {"decoded_interval": (list,)}
    | judged("nearer"),
    (*TEXTS, "place", "layer", "distance"),
    probe_pictures.draw_residual,
    (
        *WHERE,
        Column("state of", lambda line: probe_pictures.PLACE_NAMES[line["place"]], text=True),
        Column("back", lambda line: line["distance"]),
        Column("decoded, %, by layer", lambda line: by_layer(line, share("decoded"))),
        Column("most frequent, %", share("majority")),
        Column("shuffled, %", lambda line: share("shuffled")(max(line["lines"], key=lambda of: of["shuffled"]))),
        Column("more than the word, in layers", lambda line: layers_where(line["lines"], "more")),
        Column("cosine minus floor, by layer", lambda line: by_layer(line, lambda of: f"{of['nearer']:+.2f}")),
        Column("nearer, in layers", lambda line: layers_where(line["lines"], "nearer")),
        N,
    ),
    row=(*TEXTS, "place", "distance"),
    panel=TEXTS,
    choices={"place": probe_pictures.PLACE_NAMES},
    optional=judged("more"),
)

PAPER_BOTTLENECK = probe(
    "paper_bottleneck",
    "The paper's rate-distortion probe, repeated",
    "A linear bottleneck is trained on 50 texts, one at a time, for 5 epochs, as in the paper, on the state of the "
    "last meta-token, on that of the last ordinary token, and on random features of the same size, which contain "
    "nothing. The experiment is repeated with other texts and initial weights; intervals are over repetitions. SD is "
    "that of the difference between two states in a single experiment. Below is the share of experiments in which the "
    "mark has less distortion. A mark that beats the last token no more than random features has shown nothing about "
    "meta-tokens, and a distortion near ln V is guessing. The figures are about this checkpoint.",
    known("beta", "rate", "distortion", "train_rate", "train_distortion", "uniform", state=(str,), repeats=(int,))
    | dict.fromkeys(("rate_interval", "distortion_interval", "train_distortion_interval"), (list,))
    | {"train_texts": (int,)},
    (*TEXTS, "state", "beta"),
    probe_pictures.draw_paper_bottleneck,
    (
        *WHERE,
        Column("state", lambda line: line["state"], text=True),
        Column("beta", lambda line: f"{line['beta']:g}"),
        Column("rate", lambda line: f"{line['rate']:.1f}"),
        Column("distortion", lambda line: f"{line['distortion']:.3f}"),
        Column("on training texts", lambda line: f"{line['train_distortion']:.3f}"),
        Column("ln V", lambda line: f"{line['uniform']:.3f}"),
        Column("mark minus this", lambda line: f"{line['difference']:+.3f}" if "difference" in line else ""),
        Column("95 %", lambda line: " .. ".join(f"{end:+.3f}" for end in line.get("difference_interval", ()))),
        Column("SD of one experiment", lambda line: f"{line['sd']:.3f}" if "sd" in line else ""),
        Column("below, %", share("below")),
        Column("repeats", lambda line: line["repeats"]),
        N,
    ),
    panel=TEXTS,
    choices={"state": probe_pictures.PAPER_STATES},
    optional={**dict.fromkeys(("difference", "sd", "below"), NUMBER), "difference_interval": (list,)},
    verdicts=False,
)

# sections by probe, in the order of the page; probe.py refuses to start if a probe has no section or a section no probe
SECTIONS = {
    section.kind: section
    for section in (
        POSITIONS,
        ATTENTION,
        PATCHING,
        RESIDUAL,
        rate_distortion.SECTION,
        PAPER_BOTTLENECK,
        ablation.SECTION,
    )
}
