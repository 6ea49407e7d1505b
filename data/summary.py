"""Prints a summary of a prepared dataset, and its first windows."""

from pathlib import Path

import numpy as np
from rich.console import Console

from nanometa.common.errors import printable
from nanometa.common.terminal import shortened
from nanometa.data.shards import SPLITS, read_manifest
from nanometa.data.tokenizer import ENDOFTEXT, write_tokens

SHARE_TOLERANCE = (
    0.2  # the share of the validation split is explained if it differs by more than this from val_fraction
)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Prints one line. Unprintable characters, for example of a file name, are escaped."""
    console.print(printable(line), style=style)


def print_summary(folder: Path, manifest: dict, console: Console) -> None:
    """Prints the sizes of a dataset, how it was made, and what was left out."""
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    console.print()
    say(console, f"{folder}: {shortened(manifest['source'])}")
    say(console, f"command: {shortened(manifest['command'])}")
    say(
        console,
        f"each chunk has {C} content tokens and {M} markers (injection {manifest['injection']}, share of markers k = "
        f"{M / (C + M):.4f}); seed {manifest['seed']}; tokenizer {manifest['tokenizer']['name']}",
    )
    for name, split in manifest["splits"].items():
        say(
            console,
            f"  {name:5} {split['content_tokens']:>14,} content tokens and {split['markers']:,} markers, from "
            f"{plural(split['documents'], 'document')} with {split['bytes']:,} bytes "
            f"({split['bytes'] / split['content_tokens']:.2f} bytes per content token), in "
            f"{plural(len(split['shards']), 'shard')}; SHA-256 of the content {split['content_sha256'][:12]}",
        )
    say(console, validation_share(manifest))
    packed = manifest["val_text_compressed"]
    say(
        console,
        f"  for comparison, gzip -9 compresses the validation text to {packed['gzip_9_bits_per_byte']:.3f} bits per "
        f"byte and xz to {packed['xz_bits_per_byte']:.3f} (measured on {packed['bytes']:,} bytes)",
    )
    if least := manifest["min_document_tokens"]:
        short = manifest["too_short"]
        say(
            console,
            f"  left out as too short: {short['documents']:,} of {short['of_documents']:,} documents, with "
            f"{short['tokens']:,} of {short['of_tokens']:,} content tokens, because each of them had fewer than "
            f"{least:,} tokens (min_document_tokens)",
        )
    if count := manifest["endoftext_in_text"]:
        say(
            console,
            f"  {ENDOFTEXT} occurs {count:,} times in the text and is ordinary text there: if it separates the "
            f"documents of text files, prepare them with --separator='{ENDOFTEXT}'",
            style="yellow",
        )
    print_skipped(manifest, console)


def validation_share(manifest: dict) -> str:
    """Returns a line about the share of the text in the validation split, and why it differs from the asked one."""
    sizes = {name: split["bytes"] for name, split in manifest["splits"].items()}
    share, asked = sizes["val"] / max(1, sum(sizes.values())), manifest.get("val_fraction")
    line = f"  the validation split has {100 * share:.3g} % of the text"
    if "val_fraction" in manifest and asked is None:
        return f"{line}, that of the validation files"
    if type(asked) is not float or abs(share - asked) <= SHARE_TOLERANCE * asked:
        return line
    return (
        f"{line}, not val_fraction = {100 * asked:.3g} %: a hash assigns each text of up to 64 KB to a split as a "
        f"whole, so the share varies by chance, most with few or large texts"
    )


def print_skipped(manifest: dict, console: Console) -> None:
    """Prints how many documents were skipped, for each kind of reason, and names the first of them."""
    skipped = manifest["documents_skipped"]
    if not skipped:
        return
    read = sum(split["documents"] for split in manifest["splits"].values())
    read += manifest["too_short"]["documents"] if manifest["min_document_tokens"] else 0
    most = "most of the source could not be read; " if skipped > read else ""
    verb = "was" if skipped == 1 else "were"
    say(console, f"  {most}{plural(skipped, 'document')} {verb} skipped:", style="bold red" if most else "yellow")
    for kind, count in sorted(manifest["skipped_by_kind"].items(), key=lambda item: -item[1])[:10]:
        say(console, f"    {count:,} x {shortened(kind)}", style="yellow")
    for path, reason in manifest["skipped"][:10]:
        say(console, f"    {shortened(path)}: {shortened(reason)}", style="yellow")


def plural(n: int, noun: str) -> str:
    """Returns a number and its noun: "1 shard", "2,000 shards"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def inspect(folder: Path, console: Console, windows: int = 2) -> None:
    """Prints a summary of a dataset and its first windows, with visible markers."""
    from nanometa.data.loader import Windows  # imported here, because torch takes seconds and 200 MB to import

    manifest = read_manifest(folder)
    print_summary(folder, manifest, console)
    chunk = manifest["chunk_content"] + manifest["chunk_markers"]
    for split in SPLITS:
        data = Windows(folder, split, chunk, "ignore")
        for window in range(min(windows, data.n_windows)):
            tokens = data.batch(np.array([window])).tokens[0].tolist()
            console.rule(f"{split}, window {window} of {data.n_windows:,}", style="dim")
            write_tokens(tokens, data.tokenizer)
            console.print()
