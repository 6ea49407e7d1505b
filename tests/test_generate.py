import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.common.errors import UserError
from nanometa.config import TaskConfig
from nanometa.data.inject import strip
from nanometa.inference.generation import MarkerPlan, generate, knows_meta, lay_out, pick
from nanometa.inference.scoring import hidden_states, score, text_batch
from nanometa.training.checkpoint import Run, load_run
from tests.conftest import TINY, cli, refusal, tree
from tests.reference.generate import next_logits


@pytest.fixture(scope="module")
def run(workdir) -> Run:
    args = ("--dataset=data/u", "--block_size=64", "--run_name=gen", "--max_steps=15")
    result = cli("train.py", *TINY, *args, cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    return load_run(workdir / "out/gen")


def with_rule(run: Run, rule: str) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, target_rule=rule))


def test_markers_are_where_the_plan_puts_them_and_are_never_sampled(run):
    for injection in ("trained", "periodic", "uniform", "none"):
        plan = MarkerPlan.of_run(run, injection, seed=4)
        prompt = lay_out(run, run.tokenizer.encode("the cat sat"), plan)
        ids = prompt + list(generate(run, prompt, plan, 150, temperature=1.5, top_k=None))
        tokens = np.array(ids)
        assert [position in plan for position in range(len(ids))] == (tokens == run.tokenizer.meta).tolist()
        assert len(strip(tokens, run.tokenizer.meta)) == 1 + len(run.tokenizer.encode("the cat sat")) + 150
        assert tokens.max() <= run.tokenizer.meta and (injection != "none" or tokens.max() < run.tokenizer.meta)
        whole = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)  # chunks of 28 content tokens and 4 markers
        assert ((whole == run.tokenizer.meta).sum(1) == (0 if injection == "none" else 4)).all()


def test_markers_in_a_prompt_stay_where_they_are(run):
    plan = MarkerPlan.of_run(run, "none")
    content = run.tokenizer.encode_prompt("the<|meta|> cat")
    assert lay_out(run, content, plan) == [run.tokenizer.eot, *content]
    assert lay_out(run, content, MarkerPlan.of_run(run)) == [run.tokenizer.eot, *content]


def test_a_seed_repeats_its_text_and_another_seed_gives_another(run):
    plan = MarkerPlan.of_run(run)
    prompt = lay_out(run, run.tokenizer.encode("the"), plan)
    texts = [tuple(generate(run, prompt, plan, 40, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_greedy_decoding_takes_the_most_likely_token(run, rule):
    """Every greedy token is the argmax at the position that predicts it in training."""
    run, meta = with_rule(run, rule), run.tokenizer.meta
    plan = MarkerPlan.of_run(run, "uniform", seed=9)
    prompt = lay_out(run, run.tokenizer.encode("the cat"), plan)
    ids = prompt + list(generate(run, prompt, plan, 30, temperature=0))
    assert len(ids) < 64
    logits = run.model.logits(hidden_states(run.model, text_batch(run, ids))[0])
    for i in range(len(prompt), len(ids)):
        if ids[i] == meta:
            continue
        source = i - 1
        while rule == "skip" and ids[source] == meta:
            source -= 1
        assert ids[i] == int(logits[source].argmax())


def test_when_the_window_is_full_the_older_half_is_dropped(run):
    plan = MarkerPlan.of_run(run, "none")
    prompt = lay_out(run, run.tokenizer.encode("the"), plan)
    ids = prompt + list(generate(run, prompt, plan, 200, temperature=0))
    start = 0
    for i in range(len(prompt), len(ids)):
        if i - start > 64:
            start = i - 32
        assert ids[i] == int(next_logits(run, ids[start:i]).argmax())


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.floats(0.05, 1), st.integers(0, 10**6))
def test_pick_stays_inside_top_k_and_top_p(V, k, p, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=g) * 3
    probs, order = logits.softmax(-1).sort(descending=True)
    top = order[:k].tolist()
    mass, nucleus = 0.0, []
    kept = (probs[:k] / probs[:k].sum()).tolist()
    for token, share in zip(top, kept, strict=False):
        nucleus.append(token)
        mass += share
        if mass >= p + 1e-5:
            break
    drawn = {pick(logits, 1.0, k, p, g) for _ in range(50)}
    assert drawn <= set(nucleus)
    assert pick(logits, 0, None, 1.0, g) == int(logits.argmax())


def test_pick_draws_by_probability():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    counts = np.bincount([pick(logits, 1.0, None, 1.0, g) for _ in range(3000)], minlength=3) / 3000
    assert np.abs(counts - [0.7, 0.2, 0.1]).max() < 0.03
    cold = np.bincount([pick(logits, 0.5, None, 1.0, g) for _ in range(3000)], minlength=3) / 3000
    assert np.abs(cold - np.array([0.49, 0.04, 0.01]) / 0.54).max() < 0.03


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_score_equals_the_log_probabilities(run, rule):
    run = with_rule(run, rule)
    plan = MarkerPlan.of_run(run, "uniform")
    ids, nats = score(run, "the cat sat on a mat", plan)
    assert ids == run.tokenizer.encode("the cat sat on a mat").tolist()
    prefix = lay_out(run, np.array([], dtype=int), plan)
    for token, value in zip(ids, nats, strict=True):
        while len(prefix) in plan:
            prefix.append(run.tokenizer.meta)
        assert value == pytest.approx(-next_logits(run, prefix).log_softmax(-1)[token].item(), abs=1e-4)
        prefix.append(token)


def test_prompts_that_cannot_be_continued_are_refused(run):
    plan = MarkerPlan.of_run(run)
    with pytest.raises(UserError, match="the prompt is empty, so there is nothing to continue: give some text"):
        next(generate(run, [], plan, 5))
    with pytest.raises(UserError, match="the prompt has 65 positions .*, but the model's window has 64: shorten it"):
        next(generate(run, [1] * 65, plan, 5))
    assert len(list(generate(run, [1] * 64, MarkerPlan.of_run(run, "none"), 5))) == 5
    with pytest.raises(UserError, match="more than the model's window of 64: score it in parts"):
        score(run, "the cat " * 50, plan)
    with torch.no_grad():
        broken = load_run(run.folder)
        broken.model.wte.weight[3] = float("nan")
    with pytest.raises(UserError, match="the logits of .* are not finite, .*: use another checkpoint"):
        list(generate(broken, [3], plan, 5))


def test_ids_and_markers_that_a_run_does_not_know_are_refused(run, workdir):
    plan, meta = MarkerPlan.of_run(run, "none"), run.tokenizer.meta
    assert len(list(generate(run, [5, meta, np.int64(6)], plan, 2))) == 2
    for token in (-1, meta + 4, run.tokenizer.n_vocab, 10**30, 1.0, "a", None):
        for use in (lambda ids: generate(run, ids, plan, 2), lambda ids: text_batch(run, ids)):
            with pytest.raises(UserError, match=f"{token!r} in the text is not an id of the tokenizer bpe"):
                use([5, token])
    plain = dataclasses.replace(run, state={**run.state, "data": {**run.state["data"], "injection": "none",
                                                                   "chunk_markers": 0}})  # fmt: skip
    for use in (lambda: generate(plain, [5, meta], plan, 2), lambda: score(plain, "the<|meta|> cat", plan)):
        with pytest.raises(UserError, match=r"the text contains <\|meta\|>, and .* was trained without such markers"):
            use()
    with pytest.raises(UserError, match=r"the text contains <\|sr\|>, and .* was trained without such markers"):
        generate(run, [5, meta + 1], plan, 2)
    for placements, known in ((("none",), False), (("none", "target"), True), (("every",), True)):
        task = TaskConfig(tasks=("parity",), placements=placements)
        assert knows_meta(dataclasses.replace(plain, config=dataclasses.replace(run.config, task=task))) is known
    assert knows_meta(run) and not knows_meta(plain)


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1.0}, {"temperature": 1e-9}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.5}, {"max_new_tokens": 0}],
)  # fmt: skip
def test_options_of_generate_are_refused_as_sample_does(run, option):
    with pytest.raises(UserError, match=f"{next(iter(option))}=.* is out of range"):
        generate(run, [5], MarkerPlan.of_run(run), **{"max_new_tokens": 2, **option})


# ----------------------------------------------------------------------------- sample.py


def test_sample_refuses_a_seed_that_the_run_does_not_use(run, workdir):
    """The markers of this run are at random places, so that the seed has an effect also on the most likely tokens."""
    texts = [
        cli("sample.py", "--run=out/gen", "--temperature=0", f"--seed={seed}", "--show_markers=yes", cwd=workdir).stdout
        for seed in (1, 2)
    ]
    assert texts[0] != texts[1] and b"<|meta|>" in texts[0]
    args = ("--run=out/gen", "--top_k=1", "--meta=periodic", "--seed=1")
    assert "--seed has no effect, because top_k=1 always takes the most likely token and injection=periodic" in refusal(
        cli("sample.py", *args, cwd=workdir)
    )


def test_sample_uses_the_newest_run_and_repeats_its_output(run, workdir):
    result = cli("sample.py", "--prompt=the cat", "--max_new_tokens=20", "--count=2", cwd=workdir)
    out = result.stdout.decode()
    assert result.returncode == 0 and out.count("the cat") >= 2 and "sample 2 of 2" in out
    assert "<|meta|>" not in out and "\x1b" not in out  # the output is not a terminal
    again = cli("sample.py", "--prompt=the cat", "--max_new_tokens=20", "--count=2", cwd=workdir)
    assert again.stdout == result.stdout
    shown = cli("sample.py", "--prompt=the cat", "--max_new_tokens=40", "--show_markers=yes", cwd=workdir)
    assert "<|meta|>" in shown.stdout.decode()


def test_text_is_written_exactly(run, workdir):
    """Tabs, carriage returns, colons and brackets are neither expanded nor dropped, nor read as markup."""
    prompt = b"a\tb\r\nz\x0cq :smile: [red]x"
    result = cli("sample.py", "--run=out/gen", "--prompt_file=-", "--max_new_tokens=1", cwd=workdir, stdin=prompt)
    assert result.stdout.startswith(prompt), result.stderr.decode()


def test_prompts_come_from_files_and_standard_input(run, workdir, tmp_path):
    (tmp_path / "p.txt").write_text("the cat")
    outs = [
        cli("sample.py", "--run=out/gen", "--max_new_tokens=9", *args, cwd=workdir, stdin=stdin).stdout
        for args, stdin in (
            (["--prompt=the cat"], b""),
            ([f"--prompt_file={tmp_path}/p.txt"], b""),
            (["--prompt_file=-"], b"the cat"),
        )
    ]
    assert outs[0] == outs[1] == outs[2] and outs[0].startswith(b"the cat")


@pytest.mark.parametrize(
    ("args", "stdin", "sentence"),
    [
        (["--prompt="], b"", "the prompt is empty"),
        (["--prompt=<|meta|>"], b"", "the prompt contains only markers"),
        (["--prompt_file=-"], b"", "the prompt is empty"),
        (["--prompt_file=-"], b"caf\xe9 ", "standard input is not UTF-8 at byte 3"),
        (["--prompt_file=nowhere.txt"], b"", "nowhere.txt cannot be read"),
        (["--prompt=caf\udce9"], b"", "the prompt in --prompt is not UTF-8 at byte 3"),
        (["--prompt=" + "the cat " * 60], b"", "window has 64: shorten it"),
        (["--run=out/nothing"], b"", "no checkpoint in 'out/nothing'"),
        (["--temprature=1"], b"", "did you mean 'temperature'"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(run, workdir, args, stdin, sentence):
    before = tree(workdir)
    result = cli("sample.py", *([] if "--run" in args[0] else ["--run=out/gen"]), *args, cwd=workdir, stdin=stdin)
    error = result.stderr.decode()
    assert result.returncode == 2 and sentence in error and "Traceback" not in error
    assert error.startswith("error: ") and error.count("\n") == 1 and result.stdout == b""
    assert tree(workdir) == before


def test_a_marker_inside_a_token_is_refused(run, workdir):
    token = next(token for token in map(run.tokenizer.decode_bytes, run.tokenizer.encode("the cat")) if len(token) > 1)
    text = token.decode()
    result = cli("sample.py", "--run=out/gen", f"--prompt={text[:1]}<|meta|>{text[1:]}", cwd=workdir)
    assert result.returncode == 2 and f"splits the token {text!r}" in result.stderr.decode()


def test_generating_with_markers_needs_a_run_trained_with_markers(workdir):
    args = ("--dataset=data/n", "--block_size=28", "--run_name=plain", "--max_steps=1", "--second_attention=none")
    assert cli("train.py", *TINY, *args, cwd=workdir).returncode == 0
    assert (
        "meta=uniform needs a run that was trained with markers, and out/plain/best_00000001 was not: use --meta=none."
        in cli("sample.py", "--run=out/plain", "--meta=uniform", cwd=workdir).stderr.decode()
    )
    assert cli("sample.py", "--run=out/plain", "--max_new_tokens=5", cwd=workdir).returncode == 0
    assert "the text contains <|meta|>, and out/plain/best_00000001 was trained without such markers" in refusal(
        cli("sample.py", "--run=out/plain", "--prompt=the<|meta|> cat", cwd=workdir)
    )
