"""Measures of text that a run has forgotten: exact recall of a span, and continuations of a compressed prefix."""

from collections import Counter

import numpy as np

from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.statistics import wilson
from nanometa.config import MarkerConfig
from nanometa.data.layout import batch_of, targets_of
from nanometa.data.loader import Windows
from nanometa.data.markers import Placing
from nanometa.inference.generation import MarkerPlan, generate_batch, lay_out, prepare_weights
from nanometa.inference.scoring import score_batch, score_content
from nanometa.training.checkpoint import Run

BATCH = 8


def recall(run: Run, data: Windows, size: int, n: int) -> dict:
    """Returns the share of texts in which a run repeats a span of `size` tokens exactly, given its first token again.

    A text is ordinary text, the span, more text, and the span once more. The span consists of random tokens of the
    window, so nothing but the span itself tells its tokens. If the scheme has segments, the first occurrence is one and
    no other text is, and it is forgotten as the scheme says."""
    scheme, right, tokens, before = data.scheme, [], [], data.content_per_window // 8
    span = np.array([[before, before + size - 1]])
    device = run.model.wte.weight.device
    for start in range(0, n, BATCH):
        layouts, targets = [], []
        for number in range(start, min(start + BATCH, n)):
            ids = _recall_text(data, number, size)
            layout = scheme.lay_out(ids, segments=span if scheme.cfg.places_markers else None)
            counted = layout.content > len(ids) - size
            layouts.append(layout)
            targets.append(targets_of(layout, run.config.target_rule, counted))
        index = np.zeros((len(layouts), 0), dtype=np.int64)
        if scheme.closing is not None:
            index = np.stack([np.flatnonzero(layout.tokens == scheme.closing) for layout in layouts])
        batch = batch_of(layouts, targets, index, hides=data.hides)
        scores = score_batch(run.model, batch.to(device))
        asked = scores.targets >= 0
        tokens += [row[of].float().mean().item() for row, of in zip(scores.right, asked, strict=True)]
        right += [bool(row[of].all()) for row, of in zip(scores.right, asked, strict=True)]
    exact = int(np.sum(right))
    return {
        "size": size, "n": n, "correct": exact, "exact": exact / n, "interval": wilson(exact, n),
        "token_accuracy": float(np.mean(tokens)),
    }  # fmt: skip


def _recall_text(data: Windows, number: int, size: int) -> np.ndarray:
    """Returns the content ids of a text for recall; stored markers are left out."""
    n_content, draws = data.tokenizer.n_content, Draws(stable_key("recall", number, size))
    window = draws.below(data.n_windows)
    ids = data.stream.read(window * data.step, (window + 1) * data.step)
    content = ids[ids < n_content]
    words = np.array(draws.sample(content.tolist(), size))
    before, between = np.split(content[: len(content) // 8 * 2], 2)
    return np.concatenate([before, words, between, words])


def continuation(run: Run, data: Windows, n: int, new_tokens: int) -> dict:
    """Compares greedy continuations after a prefix that is read by the data's scheme with those of the full context.

    The prefix is the first half of a window. agreement: share of equal ids at equal places; f1_full, rouge_full: token
    F1 and ROUGE-L against the continuation of the full context; f1_text: token F1 against the true text, and
    loss_text: loss of the true text at the places of the continuation, in nats per token; f1_text_of_full and
    loss_text_of_full: the same for the full context."""
    C, numbers = data.content_per_window // 2, data.sample(min(n, data.n_windows))
    weights, found = prepare_weights(run, BATCH), {name: [] for name in ("method", "full", "text")}
    losses = {"method": [], "full": []}
    facts, placing = run.state["data"], Placing(data.scheme.cfg, data.scheme.key, data.scheme.previous)
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH].tolist()
        texts = [data.stream.read(window * data.step, (window + 1) * data.step) for window in part]
        texts = [ids[ids < data.tokenizer.n_content] for ids in texts]
        found["text"] += [ids[C : C + new_tokens].tolist() for ids in texts]
        for name, cfg in (("method", placing.cfg), ("full", MarkerConfig())):
            injection = facts["injection"] if not cfg.places_markers else "none"
            M = facts["chunk_markers"] if injection != "none" else 0
            plans = [MarkerPlan(injection, facts["chunk_content"], M, placing.key + window, cfg) for window in part]
            prompts = [lay_out(run, ids[:C], plan) for ids, plan in zip(texts, plans, strict=True)]
            written = {number: [] for number in range(len(part))}
            for number, token in generate_batch(run, prompts, plans, new_tokens, temperature=0, weights=weights):
                if token < data.tokenizer.n_content:
                    written[number].append(token)
            found[name] += list(written.values())
            for ids, plan in zip(texts, plans, strict=True):
                targets, nats = score_content(run, ids[: C + new_tokens], plan)
                of_content = [one for target, one in zip(targets, nats, strict=True) if target >= 0]
                losses[name].append(np.mean(of_content[C:]))
    pairs = list(zip(found["method"], found["full"], found["text"], strict=True))
    return {
        "n": len(pairs), "new_tokens": new_tokens, "prefix": C,
        "agreement": float(np.mean([np.mean(np.array(ours) == full) for ours, full, _ in pairs])),
        "f1_full": float(np.mean([token_f1(ours, full) for ours, full, _ in pairs])),
        "rouge_full": float(np.mean([rouge_l(ours, full) for ours, full, _ in pairs])),
        "f1_text": float(np.mean([token_f1(ours, text) for ours, _, text in pairs])),
        "f1_text_of_full": float(np.mean([token_f1(full, text) for _, full, text in pairs])),
        "loss_text": float(np.mean(losses["method"])), "loss_text_of_full": float(np.mean(losses["full"])),
    }  # fmt: skip


def token_f1(ours: list[int], theirs: list[int]) -> float:
    """Returns the F1 of two texts as bags of tokens (Rajpurkar et al., SQuAD, arXiv 1606.05250)."""
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0


def rouge_l(ours: list[int], theirs: list[int]) -> float:
    """Returns ROUGE-L, the F1 of the longest common subsequence (Lin, ROUGE, 2004)."""
    lengths = np.zeros(len(theirs) + 1, dtype=int)
    for token in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if token == other else max(lengths[j], lengths[j - 1])
    return 2 * int(lengths[-1]) / (len(ours) + len(theirs)) if ours or theirs else 1.0
