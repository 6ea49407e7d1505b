"""Uses exported models as a stranger does. tests/test_export.py runs it where nothing of ours can be imported.

python export_reader.py cases.json results.json; a case is {"folder", "text_ids", "marked_ids", "batch", "steps"}.
"""

import json
import sys


class Blocker:
    """Makes modules of this project, and einops, impossible to import."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("nanometa", "einops"):
            raise ModuleNotFoundError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker)
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def load(folder: str, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **changes).eval()


def padded(rows: list[list[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask of rows of different lengths."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
            for f, row in zip(fill, rows, strict=True)]  # fmt: skip
    return torch.tensor(ids), torch.tensor(mask)


def continued(model, ids: torch.Tensor, mask: torch.Tensor, steps: int, **options) -> list[list[int]]:
    """Returns the new ids of greedy decoding or beam search, <|endoftext|> being an ordinary id."""
    options = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.size(1) :].tolist()


@torch.no_grad()
def use(case: dict) -> dict:
    """Returns what a model computes, as JSON."""
    model, found = load(case["folder"]), {}
    V = case["n_content"]
    ids = torch.tensor([case["text_ids"]])
    ones = torch.ones_like(ids)
    out = model(ids, labels=ids)
    found["class"] = type(model).__name__
    found["logits"], found["loss"] = out.logits[0, :, :V].tolist(), out.loss.item()
    found["others_hidden"] = bool((out.logits[..., V:] == -torch.inf).all())
    found["greedy"] = continued(model, ids, ones, case["steps"])[0]
    found["greedy_uncached"] = continued(model, ids, ones, case["steps"], use_cache=False)[0]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found["beams"] = continued(model, ids, ones, 6, **beams)
    found["beams_uncached"] = continued(model, ids, ones, 6, use_cache=False, **beams)

    # texts of different lengths, padded on either side
    rows, apart = case["batch"], 0.0
    for left in (True, False):
        batch, mask = padded(rows, model.config.pad_token_id, left)
        # transformers' own GPT-2 numbers positions itself only in generate
        numbers = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if model.config.model_type == "gpt2" else {}
        together = model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100), **numbers)
        for logits, real, row in zip(together.logits, mask.bool(), rows, strict=True):
            alone = model(torch.tensor([row])).logits[0]
            apart = max(apart, (logits[real] - alone)[:, :V].abs().max().item())
        found[f"loss_padded_{'left' if left else 'right'}"] = together.loss.item()
    found["apart"] = apart
    batch, mask = padded(rows, model.config.pad_token_id, left=True)
    found["batch"] = continued(model, batch, mask, 6)
    found["single"] = [continued(model, torch.tensor([row]), torch.ones(1, len(row)), 6)[0] for row in rows]

    # as lm-eval reads texts: filled up with zeros on the right, without a mask
    longest = max(map(len, rows))
    zeros = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    scores = model(zeros).logits.log_softmax(-1)
    found["harness_nats"] = [
        -sum(scores[i, t, row[t + 1]].item() for t in range(len(row) - 1)) for i, row in enumerate(rows)
    ]

    saved = case["folder"] + "_saved"
    model.save_pretrained(saved)
    again = load(saved)
    names = {name: torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items()}
    found["saved_equal"] = all(names.values()) and torch.equal(again(ids).logits, out.logits)
    found["tied"] = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    half = load(case["folder"], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.get_input_embeddings().weight.dtype == torch.bfloat16
    error = half(ids).logits[0, :, :V] - out.logits[0, :, :V]
    found["bf16_error"] = (error.std() / out.logits[0, :, :V].std()).item()
    found["bf16_greedy"] = continued(half, ids, ones, 4)[0]
    eager = load(case["folder"], attn_implementation="eager")
    found["eager_error"] = (eager(ids).logits[..., :V] - out.logits[..., :V]).abs().max().item()

    if case["marked_ids"]:
        model = load(case["folder"], marker_placement="explicit")
        ids = torch.tensor([case["marked_ids"]])
        found["placed"] = model.place_markers(case["text_ids"])
        out = model(ids, labels=ids)
        found["marked_logits"], found["marked_loss"] = out.logits[0, :, :V].tolist(), out.loss.item()
        found["marked_greedy"] = continued(model, ids, torch.ones_like(ids), case["marked_steps"])[0]
        found["marked_beams"] = continued(model, ids, torch.ones_like(ids), case["marked_steps"], num_beams=3)[0]
        ids, mask = padded([case["marked_ids"], case["marked_ids"][:3]], model.config.pad_token_id, left=True)
        found["marked_batch"] = continued(model, ids, mask, case["marked_steps"])[0]
    return found


def main(cases: str, results: str) -> None:
    torch.set_num_threads(1)
    cases = json.load(open(cases))
    found = [use(case) for case in cases]
    tokenizer = AutoTokenizer.from_pretrained(cases[0]["folder"], trust_remote_code=True)
    write = pipeline("text-generation", model=load(cases[0]["folder"]), tokenizer=tokenizer, device="cpu")
    found[0]["pipeline"] = write("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    both = write(["the cat", "the cat sat on a"], max_new_tokens=4, do_sample=False, batch_size=2)
    found[0]["pipeline_batch"] = [one[0]["generated_text"] for one in both]
    json.dump(found, open(results, "w"))


if __name__ == "__main__":
    main(*sys.argv[1:])
