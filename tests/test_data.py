import json
import random
import shutil

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.data import tokenizer as tokenizers
from nanometa.data.inject import strip
from nanometa.data.layout import IGNORE, Draw, layout_of, random_positions, targets_of
from nanometa.data.loader import Windows, window_order
from nanometa.data.shards import HEADER, ShardWriter, TokenStream, read_manifest
from nanometa.data.tokenizer import GPT2_PATTERN, META, Tokenizer
from nanometa.data.verify import verify
from tests.conftest import manifest
from tests.fast_cases import diagonal
from tests.reference.targets import stream_targets

# ----------------------------------------------------------------------------- targets


def windows_of(stream, T, meta, rule, lookahead):
    """Returns the targets of a stream that is cut into windows, each with its lookahead, as in the loader."""
    stream, out = np.array(stream), []
    for start in range(0, len(stream) // T * T, T):
        before = int((stream[:start] != meta).sum())
        layout = layout_of(stream[start : start + T + lookahead], meta, first=before)
        out += targets_of(layout, rule)[:T].tolist()
    return out


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), st.sampled_from(["ignore", "skip"]))
def test_targets_equal_the_reference_across_window_borders_and_adjacent_markers(data, C, M, n_chunks, rule):
    meta, stream, token = 0, [], 1
    for _ in range(n_chunks):
        chunk = data.draw(st.permutations([meta] * M + list(range(token, token + C))))
        chunk = [token + chunk[:i].count(meta) * 0 if t else meta for i, t in enumerate(chunk)]
        for i, t in enumerate(chunk):
            if t != meta:
                chunk[i], token = token, token + 1
        stream += chunk
    targets = windows_of(stream, C + M, meta, rule, lookahead=1 + M)
    assert targets == stream_targets(stream, meta, rule)
    # every content token is scored exactly once, except the first of the stream
    assert sorted(t for t in targets if t != IGNORE) == list(range(2, token))


# ----------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 10**6))
def test_every_epoch_sees_every_window_once(n_windows, batch_size, seed):
    steps = -(-3 * n_windows // batch_size)
    order = np.concatenate([window_order(step, batch_size, n_windows, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * n_windows : (epoch + 1) * n_windows].tolist()) == list(range(n_windows))
    # steps of another size read the same samples
    again = np.concatenate([window_order(step, 1, n_windows, seed) for step in range(3 * n_windows)])
    assert (again == order[: 3 * n_windows]).all()


def test_every_epoch_and_seed_has_its_own_order():
    orders = [window_order(step, 100, 100, seed).tolist() for step in (0, 1) for seed in (1, 2)]
    assert len(set(map(tuple, orders))) == 4


# ----------------------------------------------------------------------------- random positions


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.001, 1), st.integers(0, 10**9), st.integers(0, 2**32))
def test_a_draw_has_r_positions_and_depends_only_on_its_window(T, fraction, first, seed):
    R = max(1, round(fraction * T))
    windows = np.array([first, first + 7, first, 10**12])
    drawn = random_positions(windows, T, fraction, seed, "train")
    assert drawn.shape == (4, R) and drawn.min() >= 0 and drawn.max() < T and (np.diff(drawn) > 0).all()
    alone = [random_positions(windows[i : i + 1], T, fraction, seed, "train")[0] for i in range(4)]
    assert (drawn == alone).all() and (drawn[0] == drawn[2]).all()


def test_every_window_split_and_seed_has_its_own_draw():
    draws = [
        tuple(random_positions(np.array([window]), 100, 0.2, seed, split)[0])
        for window in range(20)
        for seed in (1, 2)
        for split in ("train", "val", "generated")
    ]
    assert len(set(draws)) == 120
    assert random_positions(np.array([], dtype=np.int64), 100, 0.2, 1, "val").shape == (0, 20)


@pytest.mark.parametrize(("T", "fraction", "R"), [(28, 0.1, 3), (461, 0.1, 46)])
def test_each_position_is_drawn_equally_often(T, fraction, R):
    """Chi-square with T - 1 degrees of freedom, within 5 standard deviations; see test_injection.py."""
    drawn = random_positions(np.arange(20_000), T, fraction, 1337, "train")
    assert drawn.shape == (20_000, R)
    counts, expected = np.bincount(drawn.flatten(), minlength=T), 20_000 * R / T
    statistic = (((counts - expected) ** 2) / expected).sum() / ((T - R) / (T - 1))
    assert abs(statistic - (T - 1)) < 5 * np.sqrt(2 * (T - 1))
    # Neighboring windows are drawn independently of each other: a position is in both draws in R of T cases.
    both = sum(np.isin(drawn[i], drawn[i + 1]).sum() for i in range(5000)) / (5000 * R)
    assert abs(both - R / T) < 5 * np.sqrt(R / T / (5000 * R))


def test_a_window_has_the_same_draw_in_every_batch(workdir):
    data = Windows(workdir / "data" / "n", "train", 28, "ignore", Draw(0.25, 5, "train"))
    plain = Windows(workdir / "data" / "n", "train", 28, "ignore")
    batch = data.batch(np.array([9, 4, 30]))
    assert batch.meta_index.shape == (3, 7)
    assert batch.meta_index.tolist() == random_positions(np.array([9, 4, 30]), 28, 0.25, 5, "train").tolist()
    for i, window in enumerate((9, 4, 30)):
        assert data.batch(np.array([window])).meta_index[0].tolist() == batch.meta_index[i].tolist()
    # the rest of the batch equals that of an arm without random positions
    for ours, theirs in zip(batch[:3], plain.batch(np.array([9, 4, 30]))[:3], strict=True):
        assert (ours == theirs).all()


# ----------------------------------------------------------------------------- prepared datasets


def test_window_i_of_every_arm_has_the_same_content(workdir):
    arms = {
        name: Windows(workdir / "data" / name, "train", T, "ignore") for name, T in (("u", 32), ("p", 32), ("n", 28))
    }
    assert len({arm.n_windows for arm in arms.values()}) == 1 and arms["u"].n_windows > 100
    assert len({manifest(workdir / "data" / name)["splits"]["train"]["content_sha256"] for name in arms}) == 1
    for window in (0, 1, 57, arms["u"].n_windows - 1):
        content = {}
        for name, arm in arms.items():
            batch = arm.batch(np.array([window]))
            tokens = batch.tokens[0].numpy()
            content[name] = strip(tokens, arm.tokenizer.meta).tolist()
            assert batch.meta_index.shape == (1, 0 if name == "n" else 4)
            assert batch.meta_index[0].tolist() == np.flatnonzero(tokens == arm.tokenizer.meta).tolist()
            assert batch.positions[0].tolist() == list(range(arm.T))
            scored = np.flatnonzero(batch.targets[0] != IGNORE).tolist()
            index = batch.scored_index[0].tolist()
            assert index == scored + [arm.T] * (len(index) - len(scored)) and len(index) == (28 if name == "n" else 29)
        assert content["u"] == content["p"] == content["n"]


@pytest.mark.parametrize("rule", ["ignore", "skip"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_arm_scores_the_same_tokens(workdir, rule, chunks):
    """Over the whole validation split, all arms score each content token except the first exactly once."""
    scored = {}
    for name, T in (("u", 32), ("p", 32), ("n", 28)):
        data = Windows(workdir / "data" / name, "val", T * chunks, rule)
        n = data.n_windows
        batch = data.batch(np.arange(n))
        scored[name] = sorted(batch.targets[batch.targets != IGNORE].tolist())
        content = strip(data.stream.read(0, n * data.T), data.tokenizer.meta)
        following = data.stream.read(n * data.T, n * data.T + data.lookahead)
        extra = [t for t in following.tolist() if t != data.tokenizer.meta][:1]
        # the target of the last window's last token may lie in chunks that fill no window
        assert scored[name] in (sorted(content[1:].tolist()), sorted(content[1:].tolist() + extra))
    if chunks == 1:
        assert scored["u"] == scored["p"] == scored["n"]


def test_decoded_validation_text_is_the_source(workdir):
    """Shards decode to the documents, in order. Only the end that fills no chunk is missing."""
    data = Windows(workdir / "data" / "u", "train", 32, "ignore")
    content = strip(data.stream.read(0, len(data.stream)), data.tokenizer.meta)
    documents = data.tokenizer.decode(content).split("<|endoftext|>")
    files = [path.read_text() for path in sorted((workdir / "texts").glob("*.txt"))]
    assert len(documents) > 40
    remaining = iter(files)
    for document in documents[:-1]:
        assert document in remaining  # the documents are a subsequence of the files, in the same order
    for name in "upn":
        assert manifest(workdir / "data" / name)["splits"]["train"]["documents"] >= len(documents) - 1


def test_a_stream_reads_across_shards(tmp_path):
    ids = np.arange(1000) % 300
    writer = ShardWriter(tmp_path, "train", n_vocab=320, shard_tokens=96)
    for part in np.array_split(ids, 7):
        writer.write(part)
    writer.close()
    assert [entry["tokens"] for entry in writer.entries] == [96] * 10 + [40]
    stream = TokenStream(tmp_path, writer.entries, 320)
    assert len(stream) == 1000
    for start, stop in ((0, 1000), (90, 100), (95, 97), (96, 192), (950, 2000), (1000, 1010)):
        assert stream.read(start, stop).tolist() == ids[start:stop].tolist()


@pytest.mark.parametrize("n_vocab, size", [(65_536, 2), (65_537, 4)])
def test_ids_beyond_the_dtype_are_refused_not_wrapped(tmp_path, n_vocab, size):
    writer = ShardWriter(tmp_path, "train", n_vocab, 100)
    with pytest.raises(ValueError, match="do not fit"):
        writer.write(np.array([1, n_vocab]))
    writer.write(np.array([n_vocab - 1]))
    writer.close()
    assert (tmp_path / "train_000000.bin").stat().st_size == HEADER.size + size
    assert TokenStream(tmp_path, writer.entries, n_vocab).read(0, 1).tolist() == [n_vocab - 1]


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir / "data" / "u", tmp_path / "u")


def test_damaged_shards_are_named_with_their_hash(copy):
    shard = copy / "train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=f"train_000000.bin is damaged: its sha256 is {file_sha256(shard)}"):
        verify(copy, manifest(copy), 301)
    for damage in (bytes(raw[:-2]), b"", bytes(raw[:40]), b"x" + bytes(raw[1:])):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match="train_000000.bin is damaged"):
            Windows(copy, "train", 32, "ignore")
    shard.unlink()
    with pytest.raises(UserError, match="train_000000.bin cannot be read"):
        Windows(copy, "train", 32, "ignore")


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk_content", None), ("chunk_content", "28"), ("chunk_content", 27), ("injection", None), ("tokenizer", {}),
     ("val_text_compressed", 3), ("skipped", None)],
)  # fmt: skip
def test_manifests_that_contradict_themselves_are_refused(copy, key, value):
    facts = {**manifest(copy), key: value}
    if value is None:
        del facts[key]
    (copy / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="damaged"):
        Windows(copy, "train", 32, "ignore")


def changed(facts: dict, path: tuple, value) -> dict:
    """Returns the facts with one value replaced. path: its keys; value: a new value, or a function of the old one."""
    key, *rest = path
    copy = list(facts) if isinstance(facts, list) else dict(facts)
    copy[key] = changed(copy[key], rest, value) if rest else value(copy[key]) if callable(value) else value
    return copy


WRONG_FIELDS = {
    "command": 3, "source": None, "injection": "often", "tokenizer name": 3, "tokenizer fingerprint": None,
    "tokenizer n_vocab": -1, "seed": -1, "seed ": True, "documents_skipped": 1.5, "min_document_tokens": -1,
    "chunk_content": 0, "chunk_content ": 2**20 + 1, "chunk_markers": 2**20 + 1, "chunk_markers ": 0,
    "skipped": [["a", "b", "c"]], "skipped ": [["a", 3]], "skipped  ": [["a"]],
    "val_text_compressed bytes": -1, "val_text_compressed gzip_9_bits_per_byte": "2",
    "val_text_compressed xz_bits_per_byte": None, "splits": lambda splits: {**splits, "test": splits["val"]},
    "splits train content_sha256": 3, "splits val text_sha256": 3, "splits val chunks": 0,
    "splits train chunks": lambda n: n + 1, "splits train content_tokens": lambda n: n + 1,
    "splits val markers": lambda n: n - 1, "splits val documents": -1, "splits train bytes": None,
    "splits train shards 0 tokens": lambda n: n + 32,
    "splits train shards 0 file": "train_000001.bin", "splits val shards 0 file": "train_000000.bin",
    "splits val shards 0 sha256": 3, "splits val shards": [],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_each_field_of_a_manifest_is_checked(copy, field):
    path = [int(key) if key.isdigit() else key for key in field.split()]
    facts = changed(manifest(copy), path, WRONG_FIELDS[field])
    (copy / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        read_manifest(copy)


@pytest.mark.parametrize(("content", "markers"), [(1, 4), (2**20, 4), (28, 2**20)])
def test_the_largest_and_the_smallest_chunks_are_accepted(copy, content, markers):
    """In a manifest whose counts agree with the size of a chunk."""
    facts = {**manifest(copy), "chunk_content": content, "chunk_markers": markers}
    for split in facts["splits"].values():
        chunks = split["chunks"]
        split |= {"content_tokens": chunks * content, "markers": chunks * markers}
        split["shards"] = [{**split["shards"][0], "tokens": chunks * (content + markers)}]
    (copy / "manifest.json").write_text(json.dumps(facts))
    assert read_manifest(copy)["chunk_content"] == content


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": 3}'])
def test_damaged_manifests_are_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        Windows(copy, "train", 32, "ignore")


@pytest.mark.parametrize("older", [True, False])
def test_a_manifest_with_this_format_or_without_a_format_is_read(copy, older):
    facts = manifest(copy)
    assert facts["format"] == 1
    if older:
        del facts["format"]
        (copy / "manifest.json").write_text(json.dumps(facts))
    assert read_manifest(copy) == facts


def test_a_manifest_of_the_first_versions_left_out_no_documents(copy):
    facts = {name: value for name, value in manifest(copy).items() if name not in ("min_document_tokens", "too_short")}
    (copy / "manifest.json").write_text(json.dumps(facts))
    assert read_manifest(copy) == {**facts, "min_document_tokens": 0}


def test_a_manifest_of_a_newer_format_is_not_called_damaged(copy):
    (copy / "manifest.json").write_text(json.dumps({"format": 2, "all else": "may have changed"}))
    with pytest.raises(UserError) as refused:
        Windows(copy, "train", 32, "ignore")
    wanted = f"{copy / 'manifest.json'} has format 2, and this version of nanoMeta reads up to 1: update nanoMeta."
    assert str(refused.value) == wanted
    for nonsense in (0, "2", None, 1.5):
        (copy / "manifest.json").write_text(json.dumps({**manifest(copy), "format": nonsense}))
        with pytest.raises(UserError, match="damaged .*format is "):
            Windows(copy, "train", 32, "ignore")


def test_a_replaced_tokenizer_in_a_dataset_is_refused(copy):
    for name, content in Tokenizer.train(["some other text " * 50], 270).files().items():
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match="not the one of its manifest"):
        Windows(copy, "train", 32, "ignore")


def test_a_damaged_tokenizer_is_refused(copy):
    ranks = copy / "tokenizer.ranks"
    ranks.write_bytes(ranks.read_bytes()[:-3])
    with pytest.raises(UserError, match="tokenizer in .* is damaged"):
        Windows(copy, "train", 32, "ignore")


def test_a_window_that_is_no_whole_number_of_chunks_is_refused(workdir):
    with pytest.raises(UserError, match=r"block_size=40 .*--block_size=32 or 64"):
        Windows(workdir / "data" / "u", "train", 40, "ignore")
    with pytest.raises(UserError, match="fewer than one window"):
        Windows(workdir / "data" / "u", "val", 32 * 10_000, "ignore")


# ----------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def bpe(workdir):
    return Tokenizer.load(workdir / "data" / "u")


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


def test_gpt2_tokenizer_gives_the_ids_of_openais_encoder(gpt2):
    assert (gpt2.eot, gpt2.meta, gpt2.n_content, gpt2.n_vocab) == (50256, 50257, 50257, 50304)
    # outputs of OpenAI's encoder
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("It's  two  spaces\n\n").tolist() == [1026, 338, 220, 734, 220, 9029, 628]
    assert gpt2.token_bytes[15496] == 5 and gpt2.token_bytes[50256:].sum() == 0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_encoding_is_lossless_and_counts_bytes(bpe, gpt2, text):
    for tokenizer in (bpe, gpt2):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert b"".join(tokenizer.decode_bytes(i) for i in ids) == text.encode()


BLANKS = ("  ", "    ", " ", "\n", "\r\n", "\t", "x", "'s", "!", "1", "\u00a0", "é", "\x1c", "\u3000")


def test_cutting_a_text_at_long_blanks_changes_no_id(bpe, gpt2, monkeypatch):
    """Compares with tiktoken. Here, three blanks in a row already count as long."""
    monkeypatch.setattr(tokenizers, "LONG_BLANKS", 3)
    draw = random.Random(1)
    texts = ["".join(draw.choices(BLANKS, k=draw.randrange(1, 14))) for _ in range(5000)]
    for tokenizer in (bpe, gpt2):
        cutting = Tokenizer(tokenizer.name, tokenizer.pattern, tokenizer.ranks)
        plain = tiktoken.Encoding("x", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={})
        for text in texts:
            assert cutting.encode(text).tolist() == plain.encode_ordinary(text)


@pytest.mark.parametrize(
    ("blank", "end"), diagonal([" ", "\n", "\t", " \n", "\u00a0", "\r\n", "\u3000"], ["", "x", "\nx"])
)
def test_a_million_blanks_are_encoded(bpe, gpt2, blank, end):
    """The regex engine of tiktoken gives up: "Max stack size exceeded for backtracking"."""
    text = "a!" + blank * 1_100_000 + end
    for tokenizer in (bpe, gpt2):
        ids = tokenizer.encode_prompt(text)
        assert tokenizer.text_bytes(ids) == text.encode()


@pytest.mark.parametrize(
    "pattern",
    [r"(\p{L}+)+x", r"\p{L}+", "", r"(?s:.)", GPT2_PATTERN + "|", GPT2_PATTERN[:-3], r"(a+)+b|(?s:.)", None, ["x"]],
)
def test_only_known_patterns_are_loaded(gpt2, tmp_path, monkeypatch, pattern):
    """Another pattern may take forever or lose text."""
    monkeypatch.setattr(tokenizers, "PATTERNS", {**tokenizers.PATTERNS, str(pattern): (r"(?s:.)", "x")})
    files = Tokenizer(gpt2.name, str(pattern), gpt2.ranks).files()
    monkeypatch.undo()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "pattern": pattern}))
    with pytest.raises(UserError, match="the tokenizer in .* is damaged"):
        Tokenizer.load(tmp_path)


def test_text_of_a_corpus_never_becomes_a_marker(bpe, gpt2):
    text = "a <|meta|> b <|endoftext|>"
    for tokenizer in (bpe, gpt2):
        assert max(tokenizer.encode(text)) < tokenizer.eot
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_place_markers_at_token_borders(bpe, gpt2):
    for tokenizer in (bpe, gpt2):
        text = f"the{META} cat{META}{META} sat{META}"
        ids = tokenizer.encode_prompt(text)
        assert strip(ids, tokenizer.meta).tolist() == tokenizer.encode("the cat sat").tolist()
        assert tokenizer.decode(ids) == text and (ids == tokenizer.meta).sum() == 4
        assert tokenizer.encode_prompt(META + "the").tolist() == [tokenizer.meta, *tokenizer.encode("the")]
        assert tokenizer.encode_prompt("the cat").tolist() == tokenizer.encode("the cat").tolist()
    with pytest.raises(UserError, match="splits the token ' cat'"):
        gpt2.encode_prompt(f"the {META}cat")


def test_a_saved_tokenizer_loads_unchanged(bpe, gpt2, tmp_path):
    for tokenizer in (bpe, gpt2):
        for name, content in tokenizer.files().items():
            (tmp_path / name).write_bytes(content)
        again = Tokenizer.load(tmp_path)
        assert again.fingerprint == tokenizer.fingerprint and again.ranks == tokenizer.ranks
        assert json.loads((tmp_path / "tokenizer.json").read_text())["n_vocab"] == tokenizer.n_vocab
    assert bpe.fingerprint != gpt2.fingerprint


@pytest.mark.parametrize(("tokens", "rows"), [(256, 320), (315, 320), (316, 384), (379, 384), (380, 448)])
def test_the_vocabulary_is_rounded_up_to_a_multiple_of_64(gpt2, tokens, rows):
    """<|endoftext|> and four markers follow the tokens, so 315 tokens fill 320 rows."""
    ranks = {bytes([i]): i for i in range(256)} | {bytes([97, i]): 256 + i for i in range(tokens - 256)}
    tokenizer = Tokenizer("t", gpt2.pattern, ranks)
    assert (tokenizer.eot, tokenizer.meta, tokenizer.n_content, tokenizer.n_vocab) == (
        tokens, tokens + 1, tokens + 1, rows
    )  # fmt: skip
    assert len(tokenizer.token_bytes) == rows and (tokenizer.token_bytes[tokens:] == 0).all()
