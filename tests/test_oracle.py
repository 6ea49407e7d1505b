"""Tests visible=marked: the oracle reads what the marks enclose, and it reads as under a mask that hides the rest."""

import dataclasses
import re
import types

import numpy as np
import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TaskConfig, TrainConfig
from nanometa.config.tasks import PLACEMENTS, TASKS
from nanometa.data.layout import FOREVER
from nanometa.data.markers import Row
from nanometa.data.tokenizer import META
from nanometa.evals.tasks import cell_name
from nanometa.inference.decoder import Decoder, DecodingWeights
from nanometa.model import GPT
from nanometa.probes.marked_texts import MarkedTextsProbe
from nanometa.tasks.example import Maker
from nanometa.tasks.source import TaskWindows, collate
from tests.reference import gpt as reference
from tests.reference.tasks import SIGNS
from tests.test_model import sharpen, wake
from tests.test_rope import ARMS_AND_ALL_PLACES

LENGTH = 96
POINTED = [(task, name) for task in TASKS for name in PLACEMENTS if (task, name) != ("list_recall", "every")]
ARMS = [
    pytest.param(arm, place, marks=() if place == "same" else pytest.mark.slow)
    for arm, place in ARMS_AND_ALL_PLACES
    if arm != "random"  # refused below
]
DYNAMIC = {"position": "rope", "rope_scaling": "yarn", "rope_dynamic": True, "rope_factor": 3.0,
           "yarn_beta_fast": 0.9, "yarn_beta_slow": 0.05}  # fmt: skip
POSITIONS = {"learned": {"position": "learned"}, "rope": {"position": "rope"}, "dynamic": DYNAMIC}


def build(tokenizer, second, place, kind, block_size=LENGTH) -> GPT:
    """Returns a model in double precision in which every part matters."""
    if kind == "learned" and place not in ("same", "none"):
        pytest.skip("only rotary positions can be left out in one of the attentions")
    sizes = {"vocab_size": tokenizer.n_vocab, "content_vocab_size": tokenizer.n_content, "block_size": block_size}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "meta_position": place}
    model = sharpen(wake(GPT(GPTConfig(second_attention=second, **shape, **sizes, **POSITIONS[kind])))).eval()
    for name, p in model.named_parameters():
        if name.endswith(("bias", "wpe.weight", "wte.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return model.double()


def both(tokenizer, task, placement, index=0, questions=1):
    """Returns a whole text and the part of it that the oracle reads."""
    settings = {"visible": "marked", "questions": questions, "meta_share": 0.2}
    makers = [Maker(task, placement, TaskConfig(**{**settings, "visible": of}), tokenizer) for of in ("all", "marked")]
    return [maker.example("train/1", index, LENGTH - 8, LENGTH, ("medium",)) for maker in makers]


@pytest.mark.parametrize(("task", "placement"), POINTED)
def test_the_oracle_reads_what_the_marks_enclose_at_its_positions(tokenizer, task, placement):
    for index in range(12):
        whole, part = both(tokenizer, task, placement, index, questions=2)
        assert (whole.ids[part.positions] == part.ids).all() and (np.diff(part.positions) > 0).all()
        assert (whole.answers[part.positions] == part.answers).all() and part.answers.sum() == whole.answers.sum()
        text = tokenizer.decode(whole.ids).removeprefix("<|endoftext|>")
        signs = [found.span() for found in re.finditer(SIGNS[placement], text)]
        if placement == "target":
            assert len(signs) == (1 if task == "parity" else 2)
        start, end, question = 0 if task == "parity" else signs[0][0], signs[-1][1], text.index(" ?")
        assert tokenizer.decode(part.ids) == "<|endoftext|>" + text[start:end] + text[question:]
        assert len(part.ids) < len(whole.ids)


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize(("second", "place"), ARMS)
def test_reading_a_part_equals_masking_the_rest(tokenizer, second, place, kind):
    """The reference reads the whole text, and hides the tokens that are left out from all others."""
    model, differ = build(tokenizer, second, place, kind).requires_grad_(False), []
    cfg = TrainConfig(model=model.cfg)
    for task, placement in POINTED[:: 1 if second == "meta" and place == "same" else 3]:
        whole, part = both(tokenizer, task, placement)
        batch = collate([part], np.array([0]), len(part.ids) + 5, cfg, tokenizer, "tasks test")
        ours = model(batch.tokens, batch.positions, batch.meta_index)[0, : len(part.ids)]
        visible = np.isin(np.arange(len(whole.ids)), part.positions)
        members = (whole.ids == tokenizer.meta) & visible
        ids, places, seen = (torch.from_numpy(of)[None] for of in (whole.ids, np.arange(len(whole.ids)), visible))
        expected = reference.hidden_states(model, ids, places, torch.from_numpy(members)[None], seen)[0]
        torch.testing.assert_close(ours, expected[part.positions].to(ours), rtol=0, atol=1e-4)
        without = reference.hidden_states(model, ids, places, torch.from_numpy(whole.ids == tokenizer.meta)[None])[0]
        differ.append(float((without[part.positions] - expected[part.positions]).abs().max()) > 1e-2)
    assert any(differ), "hiding the rest changes nothing, so this test shows nothing"


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize(("second", "place"), ARMS)
def test_answers_decoded_with_the_cache_equal_recomputed_ones(tokenizer, second, place, kind):
    model = build(tokenizer, second, place, kind).float()
    for task, placement in (("copying", "background"), ("list_recall", "target"), ("parity", "none")):
        _, part = both(tokenizer, task, placement)
        start, n = int(np.flatnonzero(part.answers)[0]), len(part.ids)
        decoder = Decoder(DecodingWeights(model, torch.float32, 1), 1, n, n, lambda token, _: token == tokenizer.meta)
        known = 0
        for end in range(start, n):
            pairs = zip(part.ids[known:end].tolist(), part.positions[known:end].tolist(), strict=True)
            rows = [Row(token, -1, position, 0, FOREVER) for token, position in pairs]
            cached = decoder.read([rows], [len(rows) - 1])[0]
            with torch.no_grad():
                metas = torch.from_numpy(np.flatnonzero(part.ids[:end] == tokenizer.meta))[None]
                whole = [torch.from_numpy(of[:end])[None] for of in (part.ids, part.positions)]
                anew = model.logits(model(*whole, metas)[0, -1])[: tokenizer.n_content]
            torch.testing.assert_close(cached, anew, rtol=0, atol=1e-4)
            assert int(cached.argmax()) == int(anew.argmax())
            known = end


def test_batches_keep_the_positions_and_the_widths(tokenizer):
    task = TaskConfig(tasks=TASKS, placements=("background",), train_length=LENGTH, level="easy")
    widths, found = [], []
    for visible in ("all", "marked"):
        cfg = TrainConfig(task=dataclasses.replace(task, visible=visible), batch_size=8, micro_batch_size=8)
        windows = TaskWindows(cfg, "train", tokenizer)
        batch = windows.batch(np.arange(8))
        widths.append(batch.tokens.shape)
        found.append([batch.tokens[row][batch.targets[row] >= 0].tolist() for row in range(8)])
        for row in range(8) if visible == "marked" else ():
            part = windows.example(row)
            n = len(part.ids)
            assert batch.positions[row, :n].tolist() == part.positions.tolist()
            assert batch.positions[row].max() < LENGTH
    assert widths[0] == widths[1] and found[0] == found[1]  # the same tokens predict the same answers


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_on": "all"}, "visible='marked' is out of range: it must be all with loss_on=all"),
        (
            {"placements": ("every",)},
            "visible=marked reads what the marks enclose, and nothing points in texts of list",
        ),
        ({"model": {"second_attention": "random"}}, "visible=marked has no meaning with second_attention=random"),
    ],
)
def test_what_the_oracle_cannot_read_is_refused(tokenizer, settings, said):
    model = GPTConfig(**settings.pop("model", {}))
    with pytest.raises(UserError, match=re.escape(said)):
        task = TaskConfig(tasks=("list_recall",), train_length=LENGTH, level="easy", visible="marked", **settings)
        TaskWindows(TrainConfig(model=model, task=task), "train", tokenizer)


def test_probes_of_places_refuse_a_run_that_reads_parts():
    run = types.SimpleNamespace(folder="out/o", config=TrainConfig(task=TaskConfig(visible="marked")))
    with pytest.raises(UserError, match="out/o was trained with visible=marked and reads only a part of each text"):
        MarkedTextsProbe().cells(run)


def test_a_printed_line_names_what_is_read():
    line = {"task": "parity", "placement": "none", "level": "easy", "length": 64, "question": "index"}
    assert cell_name(line) == cell_name({**line, "visible": "all", "semantic_lists": False})
    assert cell_name({**line, "visible": "marked"}) == cell_name(line) + " only what is marked"
    assert META not in cell_name(line)
