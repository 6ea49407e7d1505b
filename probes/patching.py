"""python probe.py patching: tests whether the model reads what the answer needs from the meta-token.

The run reads a text, and at one position the state that enters a block (probes/residual_stream.py) is replaced by the
state of another text, the donor, at its position of the same kind. The position stays the text's own: only the vector
comes from the donor. The donor is a text with another answer and with its mark at the same position, or, if there is
none, the next such text in the order by number of marks and position of the mark.

    mark      the mark that ends the span of the question: with placement target a meta-token; with none the word
              "mark"; with every the meta-token at the end of the list; with background, where no meta-token points,
              the last meta-token of the text
    marks     all marks at once, if the donor has as many
    after     the token right after the mark
    ordinary  a random token of the body that is not a mark
    answer    the first id of the answer in the text (list recall, copying), which is known to be read
    asked     the token that predicts the answer, where everything the answer needs comes together

Three more sites exchange what other tokens see of the marks, in all layers at once: keys and values at all marks come
from the donor, if it has as many. Unlike a state that is replaced in one layer, the text's own state cannot come back
in the layers above. Keys are rotated by the text's own positions.

    kv_causal  keys and values of the marks in the causal attention
    kv_second  keys and values of the marks in the second attention, if it connects them
    kv_both    both

Replacing the state at the mark, or keys and values at the marks, by themselves must not change a single bit of any
answer. This is checked first.

The most likely first id of the answer is the text's own (`kept`), the donor's (`donor`), or another one. "needed" holds
if `kept` falls, and "carried" holds if `donor` rises, compared with the same texts without a patch. "carried" means
that the state contains the answer. If only "needed" holds, the answer depends on the state, but the state does not
carry it. If neither holds, whatever the model reads there is the same in both texts, for example that the token is a
mark; the state is then not a summary. The verdicts are about this checkpoint; verdicts about its arm need several
seeds."""

import bisect
import itertools
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.statistics import bootstrap_means, wilson
from nanometa.common.terminal import write
from nanometa.evals.common import check_ranges
from nanometa.probes.keys_values import record_keys_values, replace_keys_values
from nanometa.probes.marked_texts import (
    MarkedTextsProbe,
    answer_position,
    answer_query_position,
    at_places,
    batches,
    mark_name,
    marked_texts,
    marks,
    paired_claim,
    random_ordinary_position,
    read_hidden,
    read_states,
    span_end_mark,
)
from nanometa.probes.probe_command import run_probe
from nanometa.probes.residual_stream import replace_state
from nanometa.tasks.example import Example, Maker
from nanometa.training.checkpoint import Run

SITES = ("mark", "marks", "after", "ordinary", "answer", "asked")
EXCHANGES = {"kv_causal": ("attn",), "kv_second": ("second_attn",), "kv_both": ("attn", "second_attn")}
Site = Literal["mark", "marks", "after", "ordinary", "answer", "asked", "kv_causal", "kv_second", "kv_both"]
SHARES = {"kept": "needed", "donor": "carried"}  # share -> the claim that is about it
CLAIMS = {claim: f"{claim}_" for claim in SHARES.values()}  # as in marked_texts.judged


@dataclass(frozen=True)
class PatchingProbe(MarkedTextsProbe):
    """Measures how answers change if a state is replaced by that of another text."""

    sites: tuple[Site, ...] = ()
    """sites at which states, or in all layers keys and values, are replaced; by default all"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, n=(2, 10**6))  # a text needs a donor


def main(cfg: PatchingProbe) -> None:
    run, facts = cfg.open()
    cells = cfg.marked_cells(run, ("target", "none"))
    unseen = [site for site in cfg.sites if not any(exchanged(run, maker, site) for maker, *_ in cells)]
    if unseen:
        raise UserError(
            f"sites={unseen[0]} exchanges keys and values of marks in the second attention, and that of {run.folder} "
            f"connects no marks of these texts: leave it out."
        )
    run_probe(cfg, "patching", run, facts, cells, CLAIMS, measure_patching)


def exchanged(run: Run, maker: Maker, site: str) -> bool:
    """Returns whether all attentions that a site is about connect the marks of a maker's texts."""
    second = run.model.cfg.second
    markers = second.connects == "markers" and maker.markers.has_meta
    return "second_attn" not in EXCHANGES.get(site, ()) or markers or second.connects == "all"


# ----------------------------------------------------------------------------- measuring


def measure_patching(cfg: PatchingProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns one line for each site and layer of a cell. Prints each site as soon as it is measured."""
    examples = marked_texts(maker, level, length, cfg.n)
    firsts = np.array([example.ids[example.answers][0] for example in examples])  # first ids of the answers
    counts = np.array([len(marks(maker, example)) for example in examples])
    sites = sites_of(run, maker, examples)
    mark = sites["mark"][:, 0]
    donors, lines = donors_of(firsts, mark, counts), []
    check_own(run, examples[:64], sites["mark"][:64])
    base, entering = read(run, examples, sites)
    for site in SITES:
        where = counts == counts[donors] if site == "marks" else np.full(len(examples), True)
        if site not in sites or site not in (cfg.sites or SITES) or not where.any():
            continue
        for layer in range(run.model.cfg.n_layer):
            started = time.perf_counter()
            own = entering[site][layer]  # (N, k, C)
            values = torch.where(torch.from_numpy(where).to(own.device)[:, None, None], own[donors], own)
            logits = patched(run, examples, layer, sites[site], values, sites["asked"])
            lines.append({
                "mark": mark_name(maker), "site": site, "layer": layer,
                **compare(base[where], logits[where], firsts[where], firsts[donors][where]),
                "same_place": float((mark == mark[donors])[where].mean()), "chance": maker.task.CHANCE,
                "seconds": time.perf_counter() - started,
            })  # fmt: skip
        shares = "  ".join(f"{line['kept']:.1%} / {line['donor']:.1%}" for line in lines if line["site"] == site)
        write(f"  {site:<9} kept / donor by layer: {shares}\n")
    return lines + measure_exchanges(cfg, run, maker, examples, sites, base, donors, firsts, counts)


def measure_exchanges(
    cfg: PatchingProbe, run: Run, maker: Maker, examples: list[Example], sites: dict[str, np.ndarray],
    base: torch.Tensor, donors: np.ndarray, firsts: np.ndarray, counts: np.ndarray,
) -> list[dict]:  # fmt: skip
    """Returns one line for each exchange of keys and values at all marks, in all layers at once. Its layer is None."""
    where, mark, lines = counts == counts[donors], sites["mark"][:, 0], []
    for site, names in EXCHANGES.items():
        if site not in (cfg.sites or EXCHANGES) or not exchanged(run, maker, site) or not where.any():
            continue
        started = time.perf_counter()
        own = keys_values(run, examples, names, sites["marks"])
        same = with_keys_values(run, examples, names, sites["marks"], own, sites["asked"])
        assert torch.equal(same, base), f"{site}: a text's own keys and values changed the answer"
        there = torch.from_numpy(where)[:, None, None]
        values = [torch.where(there.to(of.device), of[donors], of) for of in own]
        logits = with_keys_values(run, examples, names, sites["marks"], values, sites["asked"])
        lines.append({
            "mark": mark_name(maker), "site": site, "layer": None,
            **compare(base[where], logits[where], firsts[where], firsts[donors][where]),
            "same_place": float((mark == mark[donors])[where].mean()), "chance": maker.task.CHANCE,
            "seconds": time.perf_counter() - started,
        })  # fmt: skip
        write(f"  {site:<9} kept / donor in all layers at once: {lines[-1]['kept']:.1%} / {lines[-1]['donor']:.1%}\n")
    return lines


def keys_values(run: Run, examples: list[Example], names: tuple[str, ...], places: np.ndarray) -> list[torch.Tensor]:
    """Returns the keys and values (N, k, 2C) at the places (N, k), in the order of keys_values.projections."""
    found = []
    for rows, batch in batches(run, examples):
        at = torch.from_numpy(places[rows]).to(batch.tokens.device)
        with record_keys_values(run.model, names, at, batch) as recorded:
            read_hidden(run, batch)
        found.append(recorded)
    return [torch.cat(of) for of in zip(*found, strict=True)]


def with_keys_values(run: Run, examples: list[Example], names, places, values, query_positions) -> torch.Tensor:
    """Returns the logits (N, content) at query_positions (N, 1) when keys and values at the places (N, k) are
    `values`, as `keys_values` returns them."""
    out = []
    for rows, batch in batches(run, examples):
        at = torch.from_numpy(places[rows]).to(batch.tokens.device)
        with replace_keys_values(run.model, names, at, batch, [of[rows] for of in values]):
            out.append(answer_logits(run, read_hidden(run, batch), query_positions[rows, 0]))
    return torch.cat(out)


def sites_of(run: Run, maker: Maker, examples: list[Example]) -> dict[str, np.ndarray]:
    """Returns the positions (N, k) of each site. For the site `marks`, texts with fewer marks than others repeat their
    last mark."""
    found = [marks(maker, example).tolist() for example in examples]
    most = max(map(len, found))
    mark = [span_end_mark(maker, example) for example in examples]
    one = {
        "mark": mark,
        "after": [at + 1 for at in mark],
        "ordinary": [random_ordinary_position(maker, example, i) for i, example in enumerate(examples)],
        "asked": [answer_query_position(run, example) for example in examples],
    }
    answers = [answer_position(maker, example) for example in examples]
    if None not in answers:
        one["answer"] = answers
    sites = {name: np.array(at)[:, None] for name, at in one.items()}
    return {**sites, "marks": np.array([at + at[-1:] * (most - len(at)) for at in found])}


def donors_of(firsts: np.ndarray, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the number (N,) of a donor for each text. The donor's answer begins with another id. It is the next text
    with as many marks and the mark at the same position, or, if there is none, the next text in the order by number of
    marks and position of the mark.

    Raises UserError if all texts have the same answer."""
    if (firsts == firsts[0]).all():
        raise UserError(f"all {len(firsts)} texts have the same answer, so none can be a donor: take a larger --n.")
    keys = list(zip(counts.tolist(), places.tolist(), strict=True))
    order, donors = sorted(range(len(keys)), key=keys.__getitem__), np.empty(len(keys), dtype=int)
    ranked = [keys[i] for i in order]
    for at, i in enumerate(order):
        start, end = bisect.bisect_left(ranked, keys[i]), bisect.bisect_right(ranked, keys[i])  # with this key
        candidates = itertools.chain(order[at + 1 : end], order[start:at], order[end:], order[:start])
        donors[i] = next(j for j in candidates if firsts[j] != firsts[i])
    return donors


def read(run: Run, examples: list[Example], sites: dict[str, np.ndarray]):
    """Reads the texts without a patch. Returns the logits that predict the answer (N, content), and the states
    (n_layer, N, k, C) that enter the blocks at each site."""
    logits, found = [], {site: [] for site in sites}
    for rows, _, hidden, states in read_states(run, examples):
        logits.append(answer_logits(run, hidden, sites["asked"][rows, 0]))
        for site, places in sites.items():
            found[site].append(at_places(states[:-1], places[rows]))
    return torch.cat(logits), {site: torch.cat(of, dim=1) for site, of in found.items()}


def patched(run: Run, examples: list[Example], layer: int, places, values, query_positions) -> torch.Tensor:
    """Returns the logits (N, content) at query_positions (N, 1) when `values` (N, k, C) enter block `layer` at `places`
    (N, k)."""
    out = []
    for rows, batch in batches(run, examples):
        with replace_state(run.model, layer, torch.from_numpy(places[rows]), values[rows]):
            out.append(answer_logits(run, read_hidden(run, batch), query_positions[rows, 0]))
    return torch.cat(out)


@torch.no_grad()
def answer_logits(run: Run, hidden: torch.Tensor, query_positions: np.ndarray) -> torch.Tensor:
    """Returns the logits (B, content), on the CPU, of hidden (B, T, C) at query_positions (B,)."""
    (rows,) = at_places([hidden], query_positions[:, None])
    return run.model.logits(rows[:, 0])[:, : run.tokenizer.n_content].cpu()


def check_own(run: Run, examples: list[Example], places: np.ndarray) -> None:
    """Asserts that replacing a text's state by itself changes no bit in any layer."""
    query_positions = np.array([[answer_query_position(run, example)] for example in examples])
    base, entering = read(run, examples, {"mark": places, "asked": query_positions})
    for layer in range(run.model.cfg.n_layer):
        same = patched(run, examples, layer, places, entering["mark"][layer], query_positions)
        assert torch.equal(same, base), f"layer {layer}: a text's own state in its own place changed the answer"


def compare(base: torch.Tensor, logits: torch.Tensor, own: np.ndarray, donor: np.ndarray) -> dict:
    """Returns figures that compare the answers without a patch (`base`) and with it, from logits (N, content) and from
    the first ids (N,) of the texts' own answers and of the donors' answers."""
    before, after = (x.argmax(1).numpy() for x in (base, logits))
    n, figures = len(own), {"n": len(own)}
    for name, first in (("kept", own), ("donor", donor)):
        hits, without = after == first, before == first
        figures |= {
            name: float(hits.mean()), f"{name}_interval": wilson(int(hits.sum()), n),
            f"{name}_unpatched": float(without.mean()),
        }  # fmt: skip
        pair, claim = (without, hits) if name == "kept" else (hits, without), SHARES[name]
        figures |= paired_claim(claim, CLAIMS[claim], *pair)
    figures["other"] = 1 - figures["kept"] - figures["donor"]
    rows = torch.arange(n)
    for name, x in (("", logits), ("_unpatched", base)):
        difference = (x[rows, own] - x[rows, donor]).double().numpy()
        low, high = bootstrap_means(difference[:, None])
        figures |= {
            f"logit_difference{name}": float(difference.mean()),
            f"logit_difference{name}_interval": (float(low[0]), float(high[0])),
        }  # fmt: skip
    figures["outcomes"] = "".join(
        "k" if a == o else "d" if a == d else "-" for a, o, d in zip(after, own, donor, strict=True)
    )
    return figures
