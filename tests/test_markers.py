"""Tests the layouts of all marker schemes: rules, streams, spans, sentences, and the windows of the loader."""

import dataclasses

import numpy as np
import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, MarkerConfig, TrainConfig
from nanometa.data.layout import FOREVER, IGNORE, Layout, targets_of
from nanometa.data.loader import Windows
from nanometa.data.markers import STORED, MarkerScheme, Placing, placing_of
from nanometa.data.sentences import Sentences
from nanometa.data.spans import draw_spans
from nanometa.data.tokenizer import CR, META, SR, Tokenizer
from nanometa.layers.visibility import visible
from tests.conftest import ROOT
from tests.reference.visibility import may_read
from tests.schemes import SCHEMES, VARIANTS

CONTENT, MARKERS = 30, 6  # of a window
SENTENCES = "He came. She said, 'Go!' It is 3.14 now. Yes\nNo? (Perhaps.) And so on.\n\nThe end... of it. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SENTENCES * 50 + (ROOT / "train.py").read_text()], 400)


def text(tokenizer: Tokenizer, cfg: MarkerConfig, draw: int) -> np.ndarray:
    """Returns ids of 75 content tokens, with ends of documents, and with meta-tokens if cfg expects them."""
    rng = np.random.default_rng(draw)
    ids = tokenizer.encode((SENTENCES * 9)[int(rng.integers(60)) :])[:75].astype(np.int64)
    ids[rng.integers(0, 75, 3)] = tokenizer.eot
    if not cfg.places_markers:
        for place in sorted(rng.integers(0, 75, 9), reverse=True):
            ids = np.insert(ids, place, tokenizer.meta)  # some of them are neighbors
    return ids


def scheme(tokenizer: Tokenizer, cfg: MarkerConfig, previous: bool = False, key: int = 7) -> MarkerScheme:
    return MarkerScheme(Placing(cfg, key, previous), tokenizer, CONTENT, 0 if cfg.places_markers else MARKERS)


def described(found: MarkerScheme, ids: np.ndarray, first: int, layout: Layout) -> np.ndarray:
    """Returns the mask (T, T) of a layout by the reference, which gets the segments in the words of its docstring."""
    cfg, T = found.cfg, len(layout.tokens)
    kinds, segment = ["text"] * T, [-1] * T
    places = np.flatnonzero(layout.content >= 0)
    if cfg.places_markers:
        pairs = found.segments(ids, first, None).tolist()
    else:
        ends = np.flatnonzero(layout.content < 0)
        pairs = [(np.sum(places < (ends[i - 1] if i else -1)), np.sum(places < end) - 1) for i, end in enumerate(ends)]
    marks = len(found.marks) if cfg.places_markers else 1
    for number, (start, end) in enumerate(pairs):
        for place in places[start : end + 1]:
            segment[place] = number
        after = (places[end] if cfg.places_markers else np.flatnonzero(layout.content < 0)[number] - 1) + 1
        for place in range(after, after + marks):
            kinds[place] = "closing" if place == after + marks - 1 else "opening"
            segment[place] = number
    dropped = set()
    if cfg.evict == "scattered":
        chunks = [found._scattered(first // CONTENT + number) for number in range(1 + T // found.chunk)]
        dropped = set(np.flatnonzero(np.concatenate(chunks)[:T]).tolist())
    relative = np.where(layout.content < 0, -1, layout.content - first)
    return may_read(cfg, kinds, segment, relative.tolist(), dropped)


def rules_hold(tokenizer: Tokenizer, cfg: MarkerConfig, draw: int) -> None:
    ids, first, found = text(tokenizer, cfg, draw), 17 * draw, scheme(tokenizer, cfg, key=draw)
    layout = found.lay_out(ids, first)
    columns = [torch.from_numpy(column)[None] for column in (layout.reads_from, layout.read_until)]
    seen = visible(*columns, len(layout.tokens))[0, 0].numpy()
    assert np.array_equal(seen, described(found, ids, first, layout))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_visible_is_what_the_rules_say(tokenizer, name):
    for draw in range(4):
        rules_hold(tokenizer, VARIANTS[name], draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_visible_is_what_the_rules_say_in_1000_layouts(tokenizer, name):
    for draw in range(1000):
        rules_hold(tokenizer, VARIANTS[name], draw)


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_stream_lays_out_every_prefix_as_the_whole_text(tokenizer, name, previous):
    cfg = VARIANTS[name]
    found = scheme(tokenizer, cfg, previous)
    for most in (None, 2):
        if most and not cfg.places_markers:
            continue  # their number is that of the dataset
        ids, first, rows = text(tokenizer, cfg, 1), 2 * CONTENT + 7 * previous, []
        stream = found.stream(first, most)
        for n, token in enumerate(ids.tolist(), start=1):
            new, forgotten = stream.extend(token)
            rows += new
            for place, until in forgotten:
                rows[place] = rows[place]._replace(read_until=until)
            layout = found.lay_out(ids[:n], first, most=most)
            assert [list(column) for column in zip(*rows, strict=True)][:5] == [column.tolist() for column in layout]


@pytest.mark.parametrize("name", VARIANTS)
def test_content_positions_and_targets_are_those_of_plain_text(tokenizer, name):
    cfg, first = VARIANTS[name], CONTENT
    ids = text(tokenizer, cfg, 3)
    layout = scheme(tokenizer, cfg, previous=True).lay_out(ids, first, width=200, pad=tokenizer.eot)
    content, is_content = ids[ids != tokenizer.meta], layout.content >= 0
    assert layout.tokens[is_content].tolist() == content.tolist()
    assert layout.content[is_content].tolist() == list(range(first, first + 75))
    assert layout.positions[is_content].tolist() == list(range(75))
    marks = (layout.tokens > tokenizer.eot).nonzero()[0]
    assert layout.positions[marks].tolist() == [max(int(is_content[:place].sum()) - 1, 0) for place in marks]
    targets = targets_of(layout, "skip")
    assert targets[targets != IGNORE].tolist() == content[1:].tolist()
    assert (targets[marks] == IGNORE).all()


# ----------------------------------------------------------------------------- sentences and spans


def pieces(tokenizer: Tokenizer, words: str, **settings) -> list[str]:
    cfg = MarkerConfig(**{"marker_place": "sentence", "sentence_tokens": 1, **settings})
    ids = tokenizer.encode(words).astype(np.int64)
    found = Sentences(tokenizer, cfg).segments(ids)
    return [tokenizer.decode(ids[start : end + 1]) for start, end in found]


def test_sentences_end_where_a_reader_would_say(tokenizer):
    found = pieces(tokenizer, SENTENCES + "x")
    assert [part.strip() for part in found] == [
        "He came.", "She said, 'Go!'", "It is 3.14 now.", "Yes", "No?", "(Perhaps.)", "And so on.", "The end...",
        "of it.",
    ]  # fmt: skip
    assert "".join(found) == SENTENCES.rstrip()  # the last sentence ends once the next token has come
    assert [part.count("\n") > 0 for part in pieces(tokenizer, SENTENCES, marker_place="newline")] == [True, True]


def test_short_sentences_are_joined_unless_their_document_ends(tokenizer):
    eot = tokenizer.eot
    dot, space = (tokenizer.encode(part).tolist() for part in (".", " "))
    a = tokenizer.encode("a").tolist()
    short = [*a, *dot]
    cfg = MarkerConfig(marker_place="sentence", sentence_tokens=4)
    ids = np.array([*short, *space, *short, *space, *short, eot, *a, *a])
    assert Sentences(tokenizer, cfg).segments(ids).tolist() == [[0, 4], [5, 7]]
    two = dataclasses.replace(cfg, sentence_tokens=1, chunk_sentences=2)
    assert Sentences(tokenizer, two).segments(ids).tolist() == [[0, 4], [5, 7]]


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25, 0.5, 0.7, 0.9])
def test_every_window_saves_exactly_the_asked_share(ratio):
    content, longest, lengths, seen = 461, 25, [], set()
    for chunk in range(200):
        spans = draw_spans(content, ratio, longest, 3, chunk)
        sizes = spans[:, 1] - spans[:, 0] + 1
        assert (sizes - 1).sum() == round(ratio * content)
        assert (sizes >= 2).all() and (sizes <= longest).all()
        assert (spans[1:, 0] > spans[:-1, 1]).all() and (not len(spans) or 0 <= spans[0, 0] <= spans[-1, 1] < content)
        lengths += sizes.tolist()
        seen.add(len(spans))
    assert len(seen) == 1  # so that windows of one ratio have one width
    if ratio in (0.25, 0.5):
        assert set(lengths) == set(range(2, longest + 1))


def test_the_largest_ratio_that_fits_is_drawn():
    """Two spans of the largest size fill the chunk, and one token more cannot be saved."""
    assert draw_spans(10, 0.8, 5, key=1, chunk=0).tolist() == [[0, 4], [5, 9]]
    with pytest.raises(UserError, match="because 3 spans would need 12"):
        draw_spans(10, 0.9, 5, key=1, chunk=0)
    assert draw_spans(10, 0.1, 5, key=1, chunk=0).shape == (1, 2)


def test_a_ratio_that_a_window_cannot_hold_is_refused(tokenizer):
    cfg = MarkerConfig(marker_place="span", marks="clcr", compression_ratio=(0.9,), max_span=3)
    with pytest.raises(UserError, match=r"compression_ratio=0.9 cannot be reached in 30 content tokens"):
        scheme(tokenizer, cfg)


def test_mixed_ratios_take_turns_at_random(tokenizer):
    cfg = MarkerConfig(marker_place="span", marks="clcr", compression_ratio=(0.1, 0.4), max_span=6)
    saved = [int(np.ptp(scheme(tokenizer, cfg).drawn(chunk), axis=1).sum()) for chunk in range(100)]
    assert set(saved) == {3, 12} and 25 < saved.count(3) < 75


# ----------------------------------------------------------------------------- windows of a dataset


def settings(cfg: MarkerConfig, **model) -> TrainConfig:
    return TrainConfig(
        model=GPTConfig(second_attention="none", block_size=40, meta_position="previous", **model),
        target_rule="skip", markers=cfg, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, cfg in SCHEMES.items() if cfg.places_markers])
def test_windows_of_every_scheme_have_the_content_and_targets_of_the_plain_arm(workdir, name):
    cfg = dataclasses.replace(SCHEMES[name], sentence_tokens=8, max_span=12)
    data = Windows(workdir / "data/n", "train", 40, "skip", placing=placing_of(settings(cfg), "train"))
    plain = Windows(workdir / "data/n", "train", 28, "skip")
    assert data.n_windows == plain.n_windows and data.content_per_window == 28
    for windows in ([0, 5], [data.n_windows - 1, 7]):
        batch, expected = data.batch(np.array(windows)), plain.batch(np.array(windows))
        again = data.batch(np.array(windows[:1]))
        for i in range(2):
            content = batch.tokens[i][batch.tokens[i] < data.tokenizer.eot]
            assert content.tolist() == [t for t in expected.tokens[i].tolist() if t != data.tokenizer.eot]
            scored = batch.targets[i][batch.targets[i] != IGNORE].tolist()
            assert scored == expected.targets[i][expected.targets[i] != IGNORE].tolist()
            at = batch.scored_index[i][batch.scored_index[i] < 40]
            assert batch.positions[i][at].tolist() == expected.scored_index[i][expected.scored_index[i] < 28].tolist()
        assert again.tokens[0].tolist() == batch.tokens[0].tolist()
        closing = batch.meta_index[0][batch.meta_index[0] < 40]
        assert (batch.tokens[0][closing] == (data.scheme.closing if data.scheme.marks else 0)).all()
        assert (batch.reads_from is None) == (not cfg.hides.before)
        assert (batch.read_until is None) == (not cfg.hides.after)


def test_windows_with_the_markers_of_the_dataset_are_unchanged(workdir):
    """A rule for stored markers adds a column, and changes nothing else."""
    cfg = MarkerConfig(evict="segment")
    plain = Windows(workdir / "data/u", "val", 32, "ignore")
    data = Windows(workdir / "data/u", "val", 32, "ignore", placing=Placing(cfg))
    ours, theirs = (windows.batch(np.array([3, 8])) for windows in (data, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], theirs[:5], strict=True))
    assert theirs[5:] == (None, None) and ours.reads_from is None
    markers = ours.tokens == data.tokenizer.meta
    assert (ours.read_until[markers] == FOREVER).all() and (ours.read_until[~markers] < FOREVER).any()
    assert STORED.cfg == MarkerConfig() and placing_of(TrainConfig(), "val").cfg == STORED.cfg


def test_a_window_has_at_most_as_many_markers_as_it_has_room_for(workdir):
    cfg = MarkerConfig(marker_place="sentence", sentence_tokens=1)
    data = Windows(workdir / "data/n", "train", 29, "skip", placing=placing_of(settings(cfg), "train"))
    wide = Windows(workdir / "data/n", "train", 40, "skip", placing=placing_of(settings(cfg), "train"))
    one, all_of_them = ((of.batch(np.arange(60)).tokens == of.tokenizer.markers[SR]).sum(1) for of in (data, wide))
    assert all_of_them.max() > 1 and one.tolist() == all_of_them.clamp(max=1).tolist()


@pytest.mark.parametrize(
    ("size", "cfg", "sentence"),
    [
        (29, {"marker_place": "random", "random_marks": 3}, "has no room for the markers of 3 segments beside 28"),
        (27, {"marker_place": "newline"}, "block_size=27 is not a whole number of the 28-position chunks"),
        (40, {"marker_place": "random", "random_marks": 28}, "random_marks=28 does not fit a window with 28"),
        (36, {"marker_place": "span", "marks": "clcr", "compression_ratio": (0.4,), "max_span": 4},
         "use --block_size="),
    ],
)  # fmt: skip
def test_a_window_without_room_is_refused(workdir, size, cfg, sentence):
    with pytest.raises(UserError, match=sentence):
        Windows(workdir / "data/n", "train", size, "skip", placing=Placing(MarkerConfig(**cfg)))


def test_markers_are_ids_behind_endoftext(tokenizer):
    assert list(tokenizer.markers) == [META, SR, "<|cl|>", CR]
    assert list(tokenizer.markers.values()) == list(range(tokenizer.eot + 1, tokenizer.eot + 5))
    old = Tokenizer("old", tokenizer.pattern, dict(list(tokenizer.ranks.items())[:382]), n_vocab=384)
    assert list(old.markers) == [META]
    with pytest.raises(UserError, match=r"has no room for <\|sr\|>"):
        scheme(old, MarkerConfig(marker_place="newline"))
