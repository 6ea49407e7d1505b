"""Translates a run's tokenizer into a PreTrainedTokenizerFast of transformers."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from nanometa.data.tokenizer import BPE_PATTERN, ENDOFTEXT, GPT2_PATTERN, META, Tokenizer

PAD = "<|pad|>"
# Hugging Face's regex engine reads `$` as the end of a line, which tiktoken's reads as the end of the text. The last
# three alternatives mean the same without it.
PATTERNS = {
    GPT2_PATTERN: r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    BPE_PATTERN: BPE_PATTERN,
}


class RanksConverter(TikTokenConverter):
    """Converts ranks in memory. tiktoken would read them from a file, and caches the content of a path in a temporary
    folder, where it would find that of an earlier file of the same path."""

    @staticmethod
    def load_tiktoken_bpe(ranks: dict[bytes, int]) -> dict[bytes, int]:
        """Returns the ranks, which transformers takes for the name of their file."""
        return ranks


def special_tokens(tokenizer: Tokenizer, pad: int) -> list[str]:
    """Returns the special tokens in the order of their ids, which follow those of the BPE. pad: the id of <|pad|>."""
    return [ENDOFTEXT, *{tokenizer.eot: (), tokenizer.meta: (PAD,)}.get(pad, (META, PAD))]


def save_tokenizer(tokenizer: Tokenizer, pad: int, n_positions: int, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Text that spells a special token stays text, as in this project, and no <|endoftext|> is put before a text, because
    lm-eval and others put one there themselves."""
    names = special_tokens(tokenizer, pad)
    fast = RanksConverter(tokenizer.ranks, PATTERNS[tokenizer.pattern], extra_special_tokens=names).converted()
    assert [fast.token_to_id(name) for name in names] == list(range(tokenizer.eot, tokenizer.eot + len(names)))
    saved = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=ENDOFTEXT,
        eos_token=ENDOFTEXT,
        pad_token=names[-1],
        extra_special_tokens=[META] if META in names else [],
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=n_positions,
        padding_side="left",
    )
    saved.save_pretrained(folder)
    # the name that transformers 4 and 5 both know
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
