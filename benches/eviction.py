"""Measures the cache of decoding that forgets: its bytes, the speed of decoding, and the memory to read a long prompt.

The models have 12 layers of width 768, random weights and rotary positions. A text of random tokens fills the cache as
if it had been read by the scheme; then every implementation decodes the same further tokens, and they take turns.
"plain" is decoding without a scheme, whose cache holds everything. "clcr" compresses spans, "drop" forgets them,
"scattered" forgets random positions, and "window" keeps a sliding window of the same size and four first tokens.
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from nanometa.benches.timing import DTYPES, Contestant, contest, quartiles, say
from nanometa.config import GPTConfig, MarkerConfig
from nanometa.data.markers import MarkerScheme, Placing, Row
from nanometa.inference.decoder import Decoder, DecodingWeights
from nanometa.inference.limited_cache import LimitedStore
from nanometa.model import GPT

SIZES = {1024: (1, 8), 4096: (1, 8), 16384: (1,)}  # batch sizes by content tokens
RATIOS = (0.0, 0.25, 0.5, 0.75)
METHODS = ("clcr", "drop", "scattered", "window")
NEW, TURNS = 24, 64  # tokens that a turn decodes, and the largest number of turns
PROMPT = 16384  # tokens of the prompt whose peak memory is measured
LAYERS = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """What a process decodes."""

    method: str
    ratio: float
    content: int
    batch: int
    dtype: str
    layers: int = LAYERS


def markers_of(case: Case) -> MarkerConfig:
    """Returns the settings of markers of a method."""
    ratio = (case.ratio,)
    return {
        "plain": MarkerConfig(),
        "clcr": MarkerConfig(
            marker_place="span", marks="clcr", closing_reads="segment", evict="segment", compression_ratio=ratio
        ),
        "drop": MarkerConfig(marker_place="span", marks="none", evict="segment", compression_ratio=ratio),
        "scattered": MarkerConfig(evict="scattered", compression_ratio=ratio),
        "window": MarkerConfig(evict="window", eviction_window=round((1 - case.ratio) * case.content), sinks=4),
    }[case.method]


def open_decoder(case: Case, more: int = 0) -> tuple[Decoder, MarkerScheme]:
    """Returns a decoder with an empty cache, and the scheme of its texts. more: tokens that are decoded later."""
    shape = {"n_layer": case.layers, "vocab_size": 50304, "content_vocab_size": 50257, "second_attention": "none"}
    model = GPT(GPTConfig(**shape, position="rope", block_size=2 * case.content, meta_position="previous")).eval()
    markers = markers_of(case)
    ids = {"<|meta|>": 50257, "<|sr|>": 50258, "<|cl|>": 50259, "<|cr|>": 50260}
    tokenizer = SimpleNamespace(meta=50257, eot=50256, n_content=50257, markers=ids, name="bench")
    scheme = MarkerScheme(Placing(markers, 1, previous=True), tokenizer, case.content, 0)
    weights = DecodingWeights(model, DTYPES[case.dtype], case.batch)
    limited = case.method != "plain"
    return Decoder(weights, case.batch, case.content + more, 1, lambda token, place: False, limited), scheme


def fill(decoder: Decoder, scheme: MarkerScheme, ids: np.ndarray) -> None:
    """Fills the cache of every sequence as if it had read the content ids (n,), with random keys and values."""
    layout, store = scheme.lay_out(ids), decoder.causal
    T = len(layout.tokens)
    kept = np.flatnonzero(layout.read_until >= T) if decoder.limited else np.arange(T)
    B = len(decoder.places)
    if isinstance(store, LimitedStore):
        store.reserve(len(kept))
        for row in range(B):
            store.place_of[row], store.until[row] = kept, layout.read_until[kept]
            store.position_of[row], store.next_place[row] = layout.positions[kept], T
    store.used, decoder.places = [len(kept)] * B, [T] * B
    for part in (*store.k, *store.v):
        part[:, : len(kept)].normal_()


def decoding(case: Case) -> Callable:
    """Returns a function that decodes NEW further tokens after a text of the case's length."""
    decoder, scheme = open_decoder(case, TURNS * NEW)
    ids = np.random.default_rng(0).integers(0, 50256, case.content + TURNS * NEW)
    fill(decoder, scheme, ids[: case.content])
    stream = scheme.stream()
    for token in ids[: case.content].tolist():
        stream.extend(token)
    following = iter(ids[case.content :].tolist())

    def decode() -> None:
        for _ in range(NEW):
            rows, forgotten = stream.extend(next(following))
            source = next(i for i, row in enumerate(rows) if row.content >= 0)
            decoder.read([rows] * case.batch, [source] * case.batch, [forgotten] * case.batch)

    return decode


def cache_bytes(case: Case) -> int:
    """Returns the bytes of the cache after the text of the case, free slots included."""
    decoder, scheme = open_decoder(dataclasses.replace(case, layers=1))
    fill(decoder, scheme, np.random.default_rng(0).integers(0, 50256, case.content))
    return decoder.causal.nbytes * case.layers


def reading(case: Case) -> Callable:
    """Returns a function that reads a prompt of the case's length; only its peak memory matters."""
    decoder, scheme = open_decoder(case)
    layout = scheme.lay_out(np.random.default_rng(0).integers(0, 50256, case.content))
    rows = [Row(*map(int, values)) for values in zip(*layout, strict=True)]
    last = max(i for i, row in enumerate(rows) if row.content >= 0)

    def read() -> None:
        for row in range(case.batch):
            decoder.forget(row)
        decoder.read([rows] * case.batch, [last] * case.batch)

    return read


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures tokens per second and cache bytes by length, batch, method and ratio, and the memory of long prompts."""
    rows = []
    for dtype in args.dtypes:
        for content in args.contents:
            for batch in SIZES[content]:
                if batch in args.batches:
                    rows += compare(content, batch, dtype, args.repeats)
        if PROMPT in args.contents:
            rows += prompts(PROMPT, dtype)
    return rows


def compare(content: int, batch: int, dtype: str, repeats: int, layers: int = LAYERS) -> list[dict]:
    """Returns a row for each method and ratio at one length and batch size. All methods of a ratio take turns."""
    rows, budget = [], None
    for ratio in RATIOS:
        methods = ("plain", "clcr") if ratio == 0 else ("plain", *METHODS)
        cases = {method: Case(method, ratio, content, batch, dtype, layers) for method in methods}
        times, peaks_of = contest({method: Contestant(decoding, case) for method, case in cases.items()}, repeats)
        for method, case in cases.items():
            low, middle, high = (batch * NEW / seconds for seconds in quartiles(times[method])[::-1])
            size = cache_bytes(case)
            budget = budget or size * 8 / batch  # what plain decoding of 8 texts takes
            row = {
                "content": content, "batch": batch, "dtype": dtype, "ratio": ratio, "who": method,
                "tokens/s": middle, "quartiles": f"{low:.1f} .. {high:.1f}", "cache MB": size / 1e6,
                "peak GB": peaks_of[method] / 1e9, "texts in the budget of 8": int(budget // (size / batch)),
            }  # fmt: skip
            rows.append(row)
            say(row)
    return rows


def prompts(content: int, dtype: str, layers: int = LAYERS) -> list[dict]:
    """Returns the peak memory of reading a long prompt, whole and in pieces between which spans are forgotten."""
    rows = []
    for method, ratio in (("plain", 0.0), ("clcr", 0.5), ("window", 0.75)):
        case = Case(method, ratio, content, 1, dtype, layers)
        _, peaks_of = contest({method: Contestant(reading, case)}, repeats=0)
        row = {"content": content, "batch": 1, "dtype": dtype, "ratio": ratio, "who": f"{method}, prompt"}
        rows.append(row | {"peak GB": peaks_of[method] / 1e9})
        say(rows[-1])
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare every method with plain decoding in the same turns."""
    found, plain = [], {}
    for row in rows:
        key = (row["content"], row["batch"], row["dtype"], row["ratio"])
        if row["who"] == "plain":
            plain[key] = row
        elif key in plain and "tokens/s" in row:
            of = plain[key]
            found.append(
                f"{row['content']} tokens, batch {row['batch']}, {row['dtype']}, ratio {row['ratio']:g}: {row['who']} "
                f"decodes {row['tokens/s'] / of['tokens/s']:.2f} times as fast as plain, with "
                f"{row['cache MB'] / of['cache MB']:.2f} of the cache"
            )
    return found
