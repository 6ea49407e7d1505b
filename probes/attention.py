"""python probe.py attention: measures whether a meta-token boosts logits and sharpens attention, and in which heads.

The paper (theorem 4.1, figure 2) says that meta-tokens boost the logits of a head and lower its entropy: by 1.26 in the
largest logit and by 1.40 nats, "meta against token-embedding-zeroed". It does not name layers, heads or queries. Here
the same weights read the same texts twice: as trained, and with zeros in place of the embedding of <|meta|>. (This does
not remove the token: a key of zeros has the logit 0 and is still seen.) Every head is measured over the queries after
the last meta-token of a text:

    boost         largest logit as trained, minus the largest logit with zeros
    boost_mark    the same for the logit of the last meta-token
    boost_answer  the same for the logit of the answer's position in the text, for the query that predicts the answer
                  (list recall, copying)
    drop          entropy with zeros, minus entropy as trained, in nats
    entropy       entropy as trained, in nats
    normalised    entropy as trained, divided by the log of the number of keys
    sink          weight on the first token as trained
    on_marks      weight on all meta-tokens as trained
    .._zeroed     the previous four figures with zeros
    applies       share of queries that fulfill the theorem's condition: with zeros, the last meta-token has a weight p
                  with ln p > -H. Boosting a less likely key makes entropy rise at first
    predicted     the drop that would result if only the logit of the last meta-token had changed, by boost_mark

The second attention of arm meta connects meta-tokens only. Its queries are the meta-tokens from the second one on, its
keys are few (`keys`), its sink is the first meta-token, and it lacks boost_mark, boost_answer, on_marks and applies.
The same holds for meta+mean, whose other positions have no weights to measure. In read meta all tokens are queries, but
only meta-tokens are keys, so on_marks is 1, sink is 0, and boost_answer is missing.

With placement none, the word "mark" takes the place of the meta-token, and the embedding of this word is zeroed. That
shows the effect of an ordinary word. Queries are averaged within a text, and the text is the unit of every interval and
test. The verdicts are about this checkpoint; verdicts about its arm need several seeds."""

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from nanometa.common.statistics import bootstrap_means, mean_p
from nanometa.common.terminal import write
from nanometa.probes.heads import FIRST, SECOND, HeadInputs, observe_heads
from nanometa.probes.marked_texts import (
    MarkedTextsProbe,
    answer_position,
    answer_query_position,
    batches,
    mark_id,
    mark_name,
    marked_texts,
    marks,
    read_hidden,
)
from nanometa.probes.positions import under
from nanometa.probes.probe_command import run_probe
from nanometa.probes.theorem import boosted_entropy
from nanometa.tasks.example import Example, Maker
from nanometa.training.checkpoint import Run

CLAIMS = {"boost": "boost_", "drop": "drop_"}  # as in marked_texts.judged
FEW_KEYS = "In the table, (few) marks a softmax over few keys, which has little entropy to lose.\n"
SCORES = 2**23  # at most this many logits of one attention in a batch: 32 MB in fp32, plus a few copies


@dataclass(frozen=True)
class AttentionProbe(MarkedTextsProbe):
    """Measures the logit boost and entropy drop of every head: meta-tokens as trained compared with zeroed ones."""

    margin: float = 0.1
    """the verdict on a boost or drop is "does not hold" if its whole interval lies within +- this value, in logits
    or nats"""

    BELOW = 100.0


def main(cfg: AttentionProbe) -> None:
    run, facts = cfg.open()
    with observe_heads(run.model, lambda *_: None):  # refuses a model whose heads cannot be read
        cells = cfg.marked_cells(run)
    run_probe(cfg, "attention", run, facts, cells, CLAIMS, measure_attention, preface=FEW_KEYS)


# ----------------------------------------------------------------------------- measuring


def measure_attention(cfg: AttentionProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns the lines of a cell. Each attention has one line about all its heads, in which layer and head are None,
    and then one line for each head. Prints the lines about all heads as soon as they are measured."""
    started = time.perf_counter()
    examples = marked_texts(maker, level, length, cfg.n)
    found = by_text(run, maker, examples)
    heads = {key: of for key, of in found.items() if not np.isnan(of["drop"]).all()}
    lines = []
    for which in (FIRST, SECOND):
        of = {layer: values for (layer, name), values in heads.items() if name == which}
        if not of:
            continue
        pooled = {name: np.mean([values[name] for values in of.values()], axis=(0, 2)) for name in of[min(of)]}
        lines.append({"attention": which, "layer": None, "head": None, "values": pooled})
        for (layer, values), head in itertools.product(of.items(), range(run.model.cfg.n_head)):
            mine = {name: value[:, head] for name, value in values.items()}
            lines.append({"attention": which, "layer": layer, "head": head, "values": mine})
    summarise(lines)
    seconds = time.perf_counter() - started
    for line in lines:
        if line["layer"] is None:
            write(f"  {line['attention']}: boost {line['boost']:+.2f} drop {line['drop']:+.2f}  {seconds:.1f} s\n")
    return [{"mark": mark_name(maker), **line, "seconds": seconds} for line in lines]


def summarise(lines: list[dict]) -> None:
    """Replaces the per-text values in each line by their mean and its interval over texts. For claims it adds the
    p-value of "the mean is 0"."""
    columns = np.stack([value for line in lines for value in line["values"].values()], axis=1)  # (texts, K)
    there = ~np.isnan(columns).all(axis=0)
    low, high = np.full((2, columns.shape[1]), np.nan)
    low[there], high[there] = bootstrap_means(columns[:, there])
    i = 0
    for line in lines:
        values = line.pop("values")
        line["n"] = int((~np.isnan(values["drop"])).sum())
        for name, value in values.items():
            if there[i]:
                line[name], line[f"{name}_interval"] = float(np.nanmean(value)), (float(low[i]), float(high[i]))
            i += 1
        for claim in CLAIMS:
            line[f"{claim}_p"] = mean_p(values[claim][~np.isnan(values[claim])])


def by_text(run: Run, maker: Maker, examples: list[Example]) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Returns the values (texts, H) of each figure of each (layer, attention). They are NaN where a text has no query
    for the figure."""
    m, parts = run.model.cfg, []
    longest = max(len(example.ids) for example in examples)
    for rows, batch in batches(run, examples, SCORES // (m.n_head * longest**2)):
        places = QueryPositions(run, maker, examples[rows], batch.tokens.size(1), batch.tokens.device)
        looks: dict[str, dict[tuple[int, str], dict[str, torch.Tensor]]] = {}
        for condition in ("full", "no_embedding"):
            look = looks[condition] = {}

            def see(layer: int, which: str, of: HeadInputs, look=look, places=places):
                # skip the random attention, which connects tokens that are not marks, and a second attention that has
                # no tokens to connect, which is possible with placement none
                connects = of.at.size(1) if of.keys is None else bool(of.keys.any())
                if which == FIRST or (m.second.connects != "random" and connects):
                    gathered = which == SECOND and m.second.gathers
                    look[layer, which] = (among_marks if gathered else after_marks)(of, places)

            with under(run.model, mark_id(maker), condition), observe_heads(run.model, see):
                read_hidden(run, batch)
        parts.append({key: paired(full, looks["no_embedding"][key]) for key, full in looks["full"].items()})
    return {
        key: {name: np.concatenate([part[key][name] for part in parts]) for name in of} for key, of in parts[0].items()
    }


class QueryPositions:
    """The positions of queries in a batch of texts (B, T), and of the marks and answers that the queries look at."""

    def __init__(self, run: Run, maker: Maker, examples: list[Example], T: int, device: torch.device):
        last = [int(marks(maker, example)[-1]) for example in examples]
        answers = [answer_position(maker, example) for example in examples]
        self.last, self.answer_query = (
            torch.tensor(of, device=device)
            for of in (last, [answer_query_position(run, example) for example in examples])
        )
        self.answer = torch.tensor([-1 if at is None else at for at in answers], device=device)
        self.is_mark = torch.zeros(len(examples), T, dtype=torch.bool, device=device)
        for row, example in enumerate(examples):
            self.is_mark[row, marks(maker, example).tolist()] = True
        ends = torch.tensor([len(example.ids) - 1 for example in examples], device=device)
        at = torch.arange(T, device=device)
        # queries come after the last mark; the end of the text is not a query, because it predicts nothing
        self.queries = (at > self.last[:, None]) & (at < ends[:, None])


def after_marks(rows: HeadInputs, places: QueryPositions) -> dict[str, torch.Tensor]:
    """Returns the figures (B, H, T) of an attention over all positions under one condition. They are NaN where there is
    no query."""
    logits = rows.logits()
    B, H, T, _ = logits.shape
    out, p = sharpness(logits, rows, places.queries)
    is_query, queries = places.queries[:, None], torch.arange(T, device=logits.device)
    column = places.last[:, None, None, None].expand(B, H, T, 1)
    # queries before the mark do not see it, so their logit is -inf and has no difference
    out["logit_mark"] = logits.gather(3, column)[..., 0].masked_fill(~is_query, math.nan)
    out["p_mark"] = p.gather(3, column)[..., 0].masked_fill(~is_query, math.nan)
    out["on_marks"] = (p @ places.is_mark[:, None, :, None].to(p)).squeeze(-1).masked_fill(~is_query, math.nan)
    column = places.answer.clamp(min=0)[:, None, None, None].expand(B, H, T, 1)
    predicts = (queries == places.answer_query[:, None]) & (places.answer >= 0)[:, None]
    out["logit_answer"] = logits.gather(3, column)[..., 0].masked_fill(~predicts[:, None], math.nan)
    return out


def among_marks(rows: HeadInputs, places: QueryPositions) -> dict[str, torch.Tensor]:
    """Returns the same figures (B, H, M) of an attention that connects only marks. Its queries are the marks that see
    another mark."""
    T, order = places.is_mark.size(1), torch.arange(rows.at.size(1), device=rows.at.device)
    return sharpness(rows.logits(), rows, (rows.at < T) & (order > 0))[0]


def sharpness(
    logits: torch.Tensor, rows: HeadInputs, is_query: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns figures (B, H, N) of each query and all weights (B, H, N, N), for logits (B, H, N, N) and is_query (B,
    N). The figures are the largest logit, the entropy, the entropy over the log of the number of keys, the weight on
    the first key and the number of keys. They are NaN where a position is not a query."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    H = -(p * logp.masked_fill_(logp == -math.inf, 0)).sum(-1)
    keys = (logits[:, :1] > -math.inf).sum(-1).expand_as(H)
    out = {
        "max": logits.amax(-1), "entropy": H, "normalised": H / keys.clamp(min=2).log(), "sink": p[..., 0],
        "keys": keys.to(H),
    }  # fmt: skip
    return {name: value.masked_fill(~is_query[:, None], math.nan) for name, value in out.items()}, p


def paired(full: dict[str, torch.Tensor], zeroed: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns the values to compare (B, H), averaged over the queries of each text, from the figures (B, H, N) under
    both conditions."""
    full, zeroed = ({name: value.cpu() for name, value in of.items()} for of in (full, zeroed))
    out = {"boost": full["max"] - zeroed["max"], "drop": zeroed["entropy"] - full["entropy"], "keys": full["keys"]}
    for name in ("entropy", "normalised", "sink", "on_marks"):
        if name in full:
            out |= {name: full[name], f"{name}_zeroed": zeroed[name]}
    if "logit_mark" in full:
        boost, p, H = full["logit_mark"] - zeroed["logit_mark"], zeroed["p_mark"], zeroed["entropy"]
        out["boost_mark"], out["boost_answer"] = boost, full["logit_answer"] - zeroed["logit_answer"]
        out["applies"] = (p.log() > -H).to(H).masked_fill(H.isnan(), math.nan)
        p = p.double().clamp(1e-30, 1 - 1e-9)  # the weight may be 0 or 1 in fp32
        out["predicted"] = H.double() - torch.from_numpy(boosted_entropy(p, H, boost))
    return {name: value.double().nanmean(-1).numpy() for name, value in out.items()}
