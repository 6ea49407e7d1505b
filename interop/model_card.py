"""Writes the model card of an export: what the model is, how well it does, and how to use it."""

from typing import NamedTuple

import nanometa
from nanometa.config.arms import SecondAttention
from nanometa.reports.training import METRICS, read_run
from nanometa.training.checkpoint import Run


class Card(NamedTuple):
    """What a model card tells."""

    run: Run
    facts: dict  # of the run before its window was rescaled, as evals.common.facts_of returns them
    config: dict  # the content of config.json
    folder: str  # the name of the export, as it stands in commands
    repository: str  # USER/NAME on the hub, or ""
    figures: dict[str, float]  # bits per byte on the texts of lm-eval, by marker_placement
    n_texts: dict[str, int]  # number of texts of each lm-eval task
    missing: list[str]  # lm-eval tasks whose texts do not fit into the window
    terms: dict[str, str]  # license and language, as the hub names them; those that are not known are left out


def model_card(card: Card) -> str:
    """Returns the content of README.md."""
    parts = [_head(card), _model(card), _figures(card), _use(card), _markers(card), _harness(card), _limits(card)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _name(card: Card) -> str:
    return card.repository or card.folder


def _plain(card: Card) -> bool:
    return card.config["model_type"] == "gpt2"


def _head(card: Card) -> str:
    tags = ["nanometa", *(["custom_code"] if not _plain(card) else [])]
    return "\n".join(
        ["---", *(f'{name}: "{value}"' for name, value in card.terms.items())]
        + ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
        + [f"- {tag}" for tag in tags]
        + ["---", "", f"# {_name(card).rpartition('/')[2]}"]
    )


def _model(card: Card) -> str:
    run, facts, m = card.run, card.facts, card.run.config.model
    data, text_tokens = run.state["data"], facts["origin"]["content_tokens"]
    kind = "A GPT-2" if _plain(card) else "A GPT-2 with meta-tokens or a control for them"
    rows = {
        "arm": facts["arm"] if _plain(card) else f"{facts['arm']} ({_second(m.second)})",
        "parameters": f"{facts['parameters']:,}",
        "shape": f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide",
        "window": _window(card),
        "trained on": ", ".join(run.config.task.tasks) or data["dataset"],
        "text tokens read": "unknown" if text_tokens is None else f"{text_tokens:,}",
        "step": f"{facts['step']:,}",
        "seed": facts["seed"],
        "target rule": run.config.target_rule,
        "tokenizer": f"{run.tokenizer.name}, {run.tokenizer.n_content:,} ids",
        "sha256 of the run's weights": facts["weights_sha256"],
        "exported by": f"nanometa {nanometa.__version__}, commit {facts['commit'] or 'unknown'}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"{kind}, trained and exported with nanoMeta.", "", "| | |", "|---|---|", *lines])


def _second(second: SecondAttention) -> str:
    """Returns in words what the second attention of a block does, and how far."""
    if not second.has_layer:
        return "no second attention"
    among = {"markers": "markers", "random": "random positions", "all": "all positions"}[second.connects]
    reach = {None: "", 1: ", each with itself alone"}.get(second.window, f", each with the last {second.window} alone")
    others = {
        "nothing": "",
        "mean": "; the others get the mean of what is before them",
        "read": "; the others read them, too",
    }[second.others]
    return f"the second attention connects {among}{reach}{others}"


def _stretched(card: Card) -> bool:
    """Returns whether the export has a longer window than the run was trained with."""
    trained_on_text = not card.run.config.task.tasks
    return trained_on_text and card.run.config.model.block_size != card.facts["train_length"]


def _window(card: Card) -> str:
    """Returns the size of the window in words."""
    data, T = card.run.state["data"], card.run.config.model.block_size
    said = f"{T} positions"
    if _stretched(card):
        said += f", stretched from the {card.facts['train_length']} that were trained"
    if data["chunk_markers"]:
        text = T // (data["chunk_content"] + data["chunk_markers"]) * data["chunk_content"]
        said += f", which hold {text} text tokens and their markers"
    return said


def _figures(card: Card) -> str:
    lines, best = ["## Figures", "", "| measured | bits per byte |", "|---|---|"], card.run.state.get("best")
    if best:
        where = f"| in training, at step {best['step']:,}: validation text, in windows of the stream |"
        lines.append(f"{where} {best['bits_per_byte']:.4f} |")
    if final := _final(card.run):
        where = f"| at the end of training: all {final['bytes']:,} bytes of validation text, in windows of the stream |"
        lines.append(f"{where} {final['bits_per_byte']:.4f} |")
    for placement, figure in card.figures.items():
        what = {"implicit": "with markers", "none": "without markers"}[placement]
        what = f", {what}" if card.run.state["data"]["chunk_markers"] else ""
        n = card.n_texts["nanometa_bits_per_byte"]
        lines.append(f"| by nanoMeta: {n} pieces of validation text, each read by itself{what} | {figure:.4f} |")
    if len(lines) == 4:
        return ""
    about = "Figures of pieces and of windows are not comparable: a piece that is read by itself has less context."
    if _stretched(card) and (best or final):
        about += " Those of training are of the window that was trained."
    return "\n".join([*lines, "", about])


def _final(run: Run) -> dict | None:
    """Returns the figures of a run's final validation, if they are those of the exported weights."""
    folder = run.folder.parent
    found = read_run(folder).final if (folder / METRICS).is_file() else []
    return next((line for line in reversed(found) if line["step"] == run.state["step"] and "bytes" in line), None)


def _use(card: Card) -> str:
    code = "" if _plain(card) else ", trust_remote_code=True"
    where = (
        "" if card.repository else f"\nRun this in the folder that contains `{card.folder}`, or give the full path.\n"
    )
    ids = "[tokenizer.bos_token_id, *tokenizer(text).input_ids]"  # <|endoftext|>: a document starts here
    if card.config.get("marker_placement") == "explicit":
        ids = f"model.place_markers({ids})"
    return f"""
## Use
{where}
This needs `pip install "transformers>=5"`; it was tested with transformers 5.24.0.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{_name(card)}"
tokenizer = AutoTokenizer.from_pretrained(name{code})
model = AutoModelForCausalLM.from_pretrained(name{code})


def ids_of(text):  # <|endoftext|> comes first, because a document starts here
    return {ids}

# generate
ids = torch.tensor([ids_of("def main")])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=True, top_k=200)
print(tokenizer.decode(out[0], skip_special_tokens=True))

# score: nats per text token, for several texts at once
texts = ["import os", "def main(argv):"]
batch = tokenizer.pad({{"input_ids": [ids_of(text) for text in texts]}}, return_tensors="pt")
labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
with torch.no_grad():
    print(model(**batch, labels=labels).loss.item())
```

The tokenizer puts no `<|endoftext|>` before a text, and text that spells a special token stays text, unless the call
has `split_special_tokens=False`. Always pass `attention_mask`; batches may be padded on either side.
`dtype=torch.bfloat16`, beam search and training with `labels` work as usual. {_pipeline(card)}"""


def _pipeline(card: Card) -> str:
    """Returns how a pipeline begins a document, or why none can."""
    if card.config.get("marker_placement") == "explicit":
        return (
            'A `pipeline` passes text without its markers: load the model with\n`marker_placement="implicit"` for it.'
        )
    return (
        "A `pipeline` starts a\ndocument if its texts begin with `tokenizer.bos_token`, and it is called with "
        '`tokenizer_encode_kwargs={"split_special_tokens": False}`.'
    )


def _markers(card: Card) -> str:
    c = card.config
    if _plain(card):
        return ""
    if c["marker_id"] is None:
        return "## Markers\n\nThe model was trained without markers, and its texts have none."
    if not c["marker_count"]:
        return f"""
## Markers

The model was trained on texts in which `<|meta|>` (id {c["marker_id"]}) stands at places that its tasks chose. Put the
id into `input_ids` yourself. Markers are never predicted, and their labels are ignored."""
    share = (
        f"{c['marker_count']} markers `<|meta|>` (id {c['marker_id']}) among every {c['marker_content']} text tokens"
    )
    how = {"uniform": "at random places that depend on `marker_key`", "periodic": "at equal distances"}
    return f"""
## Markers

The model was trained with {share}, {how[c["marker_injection"]]}.
They have no text, and are never predicted. This export has `marker_placement="{c["marker_placement"]}"`; another value
can be given to `from_pretrained`:

| `marker_placement` | what you pass | what happens |
|---|---|---|
| `implicit` | text tokens alone | the model inserts the markers, and returns logits for the text tokens only |
| `explicit` | `model.place_markers(ids)` | `generate` forces the markers, which count as new tokens |
| `none` | text tokens alone, or markers at places of your own | nothing is inserted |

Programs that know nothing of markers, such as lm-eval, get the right scores with `implicit`. With `explicit`:

```python
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, marker_placement="explicit")
ids = torch.tensor([model.place_markers([tokenizer.bos_token_id, *tokenizer("def main").input_ids])])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50)
```"""


def _harness(card: Card) -> str:
    if not card.n_texts:
        return ""
    code = "" if _plain(card) else ",trust_remote_code=True"
    if card.config.get("marker_placement") == "explicit":
        code += ",marker_placement=implicit"
    text = f"""
## lm-eval

The tasks in `lm_eval/` need no network. lm-eval 0.4.13 (`pip install "lm_eval[hf]"`) prints the figures above for
`nanometa_bits_per_byte`:

```bash
lm_eval --model hf --model_args pretrained={_name(card)}{code} --include_path {card.folder}/lm_eval \\
    --tasks {",".join(sorted(card.n_texts))} --device cpu --batch_size 4
```
"""
    if len(card.figures) > 1:
        text += "\nWith `marker_placement=none` in `--model_args` the markers are left out.\n"
    if card.missing:
        text += f"\nTexts of {', '.join(f'`{name}`' for name in card.missing)} do not fit into the window.\n"
    if card.repository:
        text += f"\nDownload the tasks first: `hf download {card.repository} --local-dir {card.folder}`.\n"
    return text


def _limits(card: Card) -> str:
    c, lines = card.config, []
    if c.get("position", "learned") == "learned":
        lines.append("Texts longer than the window are refused or fail, because positions are learned.")
    elif not _plain(card):
        lines.append("Beyond the window, positions simply go on; the model was not trained there.")
    if c.get("second_connects") == "random":
        lines.append(
            "The random positions of the second attention are those of generated text, and the same in every text."
        )
    if _plain(card):
        lines.append(
            "`forward` needs `position_ids` for texts padded on the left, as every GPT-2 of transformers does."
        )
    else:
        lines.append("The cache must be the default one, and cannot be cropped while markers are inserted.")
        lines.append("Attention weights (`output_attentions`) are not returned.")
        lines.append("`AutoModel` does not load it: use `AutoModelForCausalLM`, with `output_hidden_states=True`.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])
