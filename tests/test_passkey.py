import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanometa import eval as evaluation
from nanometa.common.errors import UserError
from nanometa.data.inject import strip
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals import common, passkey
from nanometa.evals.common import progress
from nanometa.evals.passkey import PasskeyEval, Prompts, measure_passkey, prompt_text, rank, score
from nanometa.inference import scoring
from nanometa.inference.generation import MarkerPlan, generate
from tests.runs import saved, small_run

MARKED = {"dataset": "data/x", "injection": "uniform", "chunk_content": 27, "chunk_markers": 3}
PLAIN = {**MARKED, "injection": "none", "chunk_markers": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([prompt_text(key, 8, 0.5) for key in range(10_000, 50_000, 97)], 500)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def run(tokenizer):
    return small_run(tokenizer, MARKED, block_size=128, position="rope")


def test_the_passkey_text_has_the_published_format():
    task = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
    )
    key = "The pass key is 12345. Remember it. 12345 is the pass key.\n"
    question = "What is the pass key? The pass key is"
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert prompt_text(12345, 10, 0.5) == f"{task}{filler}\n{key}{filler}\n{question}"
    assert prompt_text(12345, 6, 0.0) == f"{task}{key}{filler} The grass is green.\n{question}"
    assert prompt_text(12345, 5, 1.0) == f"{task}{filler}\n{key}{question}"


@pytest.mark.parametrize("markers", ["trained", "none"])
@pytest.mark.parametrize("length", [192, 333, 1024])
def test_passkey_texts_have_their_length_depth_key_and_markers(tokenizer, gpt2, markers, length):
    for tok in (tokenizer, gpt2):
        run = small_run(tok, {**MARKED, "injection": "periodic"} if length == 333 else MARKED, position="rope")
        for depth in (0.0, 0.3, 1.0):
            prompts, totals = Prompts(run, markers, length, depth), set()
            for index in range(5):
                ids, answers = prompts.prompt(index, 20)
                total = len(ids) + answers.shape[1]
                totals.add(total)
                assert 0.9 * length <= total <= length
                content = strip(ids, tok.meta)
                text = tok.decode(content[1:])
                key = tok.decode(answers[0])
                assert ids[0] == content[0] == tok.eot and re.fullmatch(r" [1-5]\d{4}", key)
                assert text.count(key.strip()) == 2 and text.endswith("The pass key is")
                # no token contains both the end of the prompt and the start of the answer
                assert (tok.encode(text + key) == [*content[1:], *answers[0]]).all()
                assert len({tuple(answer) for answer in answers}) == 20
                assert all(tok.decode(other).strip() not in text for other in answers[1:])
                before, after = text.split(f"The pass key is{key}.")[0], text.split("is the pass key.")[1]
                filler = [part.count(".") for part in (before[len(passkey.TASK) :], after)]
                assert abs(filler[0] - depth * sum(filler)) <= 0.5
                share = np.mean(ids[1:] == tok.meta)
                assert share == (0 if markers == "none" else pytest.approx(0.1, abs=0.5 / (len(ids) - 1)))
                if markers == "trained" and length == 333:  # evenly spaced
                    assert np.ptp(np.diff(np.flatnonzero(ids == tok.meta))) <= 1 and ids[-1] == tok.meta
                again = Prompts(run, markers, length, depth).prompt(index, 20)
                assert (again[0] == ids).all() and (again[1] == answers).all()
            assert len(totals) > 1


def test_answers_are_the_same_with_and_without_markers(run):
    answers = [Prompts(run, markers, 128, 0.5).prompt(7, 30)[1] for markers in ("trained", "none")]
    assert (answers[0] == answers[1]).all()


def reader(run, shift=0):
    """Returns a stand-in for hidden_states that reads the key in the text and predicts it, or predicts another key.

    The prediction at a position depends only on the text before it, never on the answer.
    """

    def hidden_states(model, batch):
        tok, weight = run.tokenizer, run.model.wte.weight
        hidden = torch.zeros(*batch.tokens.shape, weight.size(1))
        for row, ids in enumerate(batch.tokens.numpy()):
            content = np.flatnonzero(ids != tok.meta)
            text = tok.decode(ids[content])
            key = int(re.search(r"The pass key is (\d+)\. Remember", text)[1])
            said = tok.encode(f" {10_000 + (key - 10_000 + shift) % 40_000}")
            end = len(content) - Prompts(run, "none", 128, 0.5).k  # the end of the prompt, counted in content tokens
            for i, token in enumerate(said[: len(content) - end]):
                at = content[end + i - 1]
                # under "ignore", a marker before the answer predicts it
                hidden[row, at : content[end + i]] = 50 * weight[int(token)]
        return hidden

    return hidden_states


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_a_model_that_knows_the_key_ranks_it_first_and_is_exact(tokenizer, monkeypatch, rule):
    run = small_run(tokenizer, MARKED, rule=rule, block_size=128)
    for markers in ("trained", "none"):
        prompts = Prompts(run, markers, 128, 0.5)
        monkeypatch.setattr(scoring, "hidden_states", reader(run))
        cell = measure_passkey(run, prompts, 6, 12)
        assert cell["exact"] == cell["top1"] == cell["mrr"] == cell["median_rank"] == 1 and cell["outcomes"] == "1" * 6
        monkeypatch.setattr(scoring, "hidden_states", reader(run, shift=11_111))
        cell = measure_passkey(run, prompts, 6, 12)
        assert cell["exact"] == 0 and cell["outcomes"] == "0" * 6 and cell["top1"] < 1


def test_random_weights_perform_at_chance(run):
    cell = measure_passkey(run, Prompts(run, "trained", 128, 0.5), 120, 10)
    low, high = cell["top1_interval"]
    assert low < 0.1 < high and cell["chance"]["top1"] == 0.1 and cell["exact"] == 0
    assert abs(np.mean(cell["ranks"]) - 5.5) < 3 * np.sqrt(99 / 12 / 120)
    assert (
        cell["chance"]["mrr"] == pytest.approx(np.mean(1 / np.arange(1, 11))) and cell["chance"]["median_rank"] == 5.5
    )
    assert all(1 <= place <= 10 for place in cell["ranks"])


@pytest.mark.parametrize("rule", ["ignore", "skip"])
@pytest.mark.parametrize("second", ["meta", "none"])
def test_answers_are_exact_if_greedy_decoding_writes_them(tokenizer, rule, second):
    run = small_run(tokenizer, MARKED, rule=rule, block_size=160, position="rope", second_attention=second)
    silent = MarkerPlan.of_run(run, "none")
    for index in range(4):
        ids, answers = Prompts(run, "trained", 150, 0.5).prompt(index, 4)
        written = np.array(list(generate(run, ids.tolist(), silent, answers.shape[1], temperature=0)))
        other = np.repeat(written[None], len(written), axis=0)
        np.fill_diagonal(other, answers[0])  # each row differs in one id
        other[other.diagonal() == written] = answers[1]
        nats, right = score(run, ids, np.concatenate([written[None], other]), index)
        assert right.tolist() == [True] + [False] * len(written)
        assert nats.shape == right.shape


@pytest.mark.parametrize("second", ["meta", "random"])
def test_a_score_is_the_sum_of_the_log_probabilities(tokenizer, monkeypatch, second):
    """The score does not depend on how the candidates are distributed over forward passes."""
    run = small_run(tokenizer, PLAIN if second == "random" else MARKED, block_size=128, second_attention=second)
    ids, answers = Prompts(run, "none" if second == "random" else "trained", 128, 0.25).prompt(0, 5)
    nats, _ = score(run, ids, answers, 0)
    monkeypatch.setattr(passkey, "POSITIONS", 300)
    torch.testing.assert_close(score(run, ids, answers, 0)[0], nats, rtol=1e-4, atol=1e-4)
    if second == "meta":
        for answer, expected in zip(answers, nats, strict=True):
            whole, total = [*ids.tolist(), *answer.tolist()], 0.0
            where = torch.tensor([[i for i, token in enumerate(whole) if token == run.tokenizer.meta]])
            with torch.no_grad():
                hidden = run.model(torch.tensor([whole]), torch.arange(len(whole))[None], where)[0]
                for i in range(len(ids), len(whole)):
                    total -= run.model.logits(hidden[i - 1]).log_softmax(-1)[whole[i]].item()
            assert expected == pytest.approx(total, rel=1e-4)


def test_equal_scores_share_the_middle_rank():
    assert rank(np.array([1.0, 2, 3])) == 1 and rank(np.array([2.5, 2, 3])) == 2 and rank(np.array([9.0, 2, 3])) == 3
    # a model that gives all candidates the same score does not rank the true one first
    assert rank(np.array([1.0, 1, 1])) == 2


def test_the_command_writes_a_line_per_length_and_depth(run, tmp_path, capsys):
    folder = saved(run, tmp_path / "small")
    command = ["passkey", f"--run={folder}", "--candidates=4"]
    evaluation.main([*command, "--lengths", "16", "128", "--depths", "0", "1", "--n=3"])
    evaluation.main([*command, "--lengths=128", "--depths=0.5", "--markers=none", "--n=2"])
    lines = [json.loads(line) for line in (folder / "passkey.jsonl").read_text().splitlines()]
    assert [(line["length"], line["depth"], line["markers"], line["n"]) for line in lines] == [
        (16, 0.0, "trained", 0), (16, 1.0, "trained", 0), (128, 0.0, "trained", 3), (128, 1.0, "trained", 3),
        (128, 0.5, "none", 2),
    ]  # fmt: skip
    assert all(line["run"] == "small" and line["arm"] == "meta + rope" for line in lines)
    assert "no number of filler sentences gives this length" in lines[0]["impossible"] and len(lines[2]["ranks"]) == 3
    assert "chance 25.0%" in capsys.readouterr().out


def test_texts_beyond_the_learned_positions_are_reported_as_impossible(tokenizer):
    run = small_run(tokenizer, MARKED, block_size=64)
    assert (
        "128 positions do not fit into the learned position table, which has 64"
        in measure_passkey(run, Prompts(run, "trained", 128, 0.5), 3, 4)["impossible"]
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lengths": ()}, "lengths=() is out of range"),
        ({"depths": (1.5,)}, "depths=(1.5,) is out of range"),
        ({"depths": ()}, "depths=() is out of range"),
        ({"n": 0}, "n=0 is out of range"),
        ({"candidates": 1}, "candidates=1 is out of range"),
        ({"markers": ("trained",)}, "markers=trained needs a run that was trained on text with markers, and"),
        ({"run": "nowhere"}, "there is no checkpoint in 'nowhere'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tokenizer, tmp_path, settings, sentence):
    folder = saved(small_run(tokenizer, PLAIN, second_attention="none"), tmp_path / "plain")
    with pytest.raises(UserError) as error:
        passkey.main(PasskeyEval(**{"run": str(folder), **settings}))
    assert sentence in str(error.value) and not Path(folder / "passkey.jsonl").exists()


def test_weights_that_are_not_finite_are_refused(tokenizer):
    """Otherwise all ranks would be 1."""
    run = small_run(tokenizer, MARKED, block_size=128)
    with torch.no_grad():
        run.model.ln_f.weight[3] = float("nan")
    with pytest.raises(UserError, match="the loss of .* is not finite, .*: use another checkpoint"):
        measure_passkey(run, Prompts(run, "trained", 128, 0.5), 3, 4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "shown"), [(Terminal, 0, True), (Terminal, 9, False), (io.StringIO, 0, False)]
)
def test_progress_is_shown_only_on_a_terminal_and_then_erased(monkeypatch, stream, patience, shown):
    out = stream()
    monkeypatch.setattr(common, "PATIENCE", patience)
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(UserError), progress("256 positions [x]", 2) as advance:
        advance(1)
        raise UserError("the bar ends with its cell")
    assert ("256 positions [x]" in out.getvalue()) == shown
    assert (out.getvalue() == "") != shown
    assert not shown or out.getvalue().endswith("\x1b[2K")  # the line is erased
