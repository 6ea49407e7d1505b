"""Tests export.py: the folder that it writes, the tokenizer, refusals and the upload."""

import json
import re
import shutil
import socket

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nanometa.common.errors import UserError
from nanometa.config import MarkerConfig, TaskConfig
from nanometa.config.command_line import load_config
from nanometa.data.shards import read_manifest
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals.common import read_split
from nanometa.inference.generation import MarkerPlan
from nanometa.inference.scoring import score
from nanometa.interop import hub, texts, weights
from nanometa.interop.export import ExportConfig, export
from nanometa.interop.tokenizer import save_tokenizer
from nanometa.interop.weights import config_of, is_plain, pad_id, weights_of
from nanometa.tasks.words import ITEMS, NAMES
from nanometa.training.checkpoint import load_run
from tests.conftest import WORDS, cli, tree
from tests.runs import run_on, saved, small_run


@pytest.fixture(scope="module")
def marked_run(workdir):
    """The folder of a saved run with meta-attention, trained on data/u as it seems."""
    return saved(run_on(workdir / "data/u", block_size=64), workdir / "out/marked")


def settings_of(*argv: str) -> ExportConfig:
    return load_config(ExportConfig, list(argv))


# ------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def exported(workdir, marked_run):
    result = cli("export.py", "--run=out/marked", "--output=out/hf", "--eval_texts=20", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    return workdir / "out/hf", result.stdout.decode()


def test_an_export_is_complete_readable_and_describes_itself(workdir, exported, marked_run):
    folder, printed = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "configuration_nanometa.py", "generation_config.json", "lm_eval",
        "model.safetensors", "modeling_nanometa.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not [path for path in (workdir / "out").iterdir() if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1  # safetensors makes 0600
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_nanometa.NanoMetaForCausalLM"
    assert (config["n_positions"], config["window"], config["marker_placement"]) == (56, 64, "implicit")
    ends = json.loads((folder / "generation_config.json").read_text())
    assert (ends["bos_token_id"], ends["eos_token_id"], ends["pad_token_id"]) == (299, 299, 301)
    card = (folder / "README.md").read_text()
    run = load_run(marked_run)
    for text in (
        "meta + learned",
        run.weights_sha256,
        "data/u",
        "place_markers",
        "lm_eval --model hf",
        "28 text tokens",
    ):
        assert text in card, text
    assert str(workdir / "out") not in card  # no path of this machine except that of the dataset
    assert (
        "without the lm-eval task nanometa_passkey" in printed and "nanometa_passkey" not in card.split("lm_eval ")[1]
    )


def test_the_figures_of_the_card_are_those_of_the_validation_pieces(workdir, exported, marked_run):
    folder, printed = exported
    run = load_run(marked_run)
    lines = (folder / "lm_eval/nanometa_bits_per_byte.jsonl").read_text().splitlines()
    pieces = [json.loads(line)["text"] for line in lines]
    assert len(pieces) == 20
    for plan in (MarkerPlan.of_run(run), MarkerPlan("none", 1, 0, 0)):
        nats = [sum(score(run, piece, plan)[1]) for piece in pieces]
        figure = f"{sum(nats) / np.log(2) / sum(len(piece.encode()) for piece in pieces):.4f}"
        assert figure in printed and f"{figure} |" in (folder / "README.md").read_text()


def test_validation_pieces_are_parts_of_the_validation_text_that_fit_into_the_window(workdir):
    tokenizer, manifest = Tokenizer.load(workdir / "data/u"), read_manifest(workdir / "data/u")
    run = run_on(workdir / "data/u")
    stream = read_split(run, workdir / "data/u", None)
    text = tokenizer.decode(stream[stream != tokenizer.meta])
    pieces = [piece["text"] for piece in texts.validation_pieces(tokenizer, stream, 10**6, 40)]
    assert all(piece in text and len(tokenizer.encode(piece)) <= 40 for piece in pieces)
    assert sum(map(len, pieces)) == manifest["splits"]["val"]["bytes"]  # no line of these texts is too long
    few = [piece["text"] for piece in texts.validation_pieces(tokenizer, stream, 5, 40)]
    assert len(few) == 5 and few[0] == pieces[0] and set(few) <= set(pieces)


def test_texts_that_spell_a_marker_are_no_validation_pieces(dataset_tokenizer):
    document = "the cat\n<|meta|> sat\non a mat\n"
    stream = np.concatenate([[dataset_tokenizer.eot], dataset_tokenizer.encode(document)]).astype(np.int64)
    pieces = texts.validation_pieces(dataset_tokenizer, stream, 10, 14)
    assert pieces and "".join(piece["text"] for piece in pieces) == "on a mat\n"


def test_task_and_passkey_texts_are_read_by_other_programs_as_by_us():
    """A context and its answer, encoded together, begin with the ids of the context."""
    tokenizer = Tokenizer.train([" " + " ".join(ITEMS + NAMES) + " zero one mark : ? count # [ ] \n"] * 3, 2600)
    data = {"injection": "none", "chunk_content": 512, "chunk_markers": 0, "dataset": "x"}
    run = small_run(tokenizer, data, second_attention="causal", block_size=512)
    found, missing = texts.harness_texts(run, np.array([tokenizer.eot, *tokenizer.encode("a\n" * 9)]), 10, 511)
    assert len(found) == 6 and not missing
    for name, lines in found.items():
        for line in lines if name != "nanometa_bits_per_byte" else ():
            for answer in line.get("choices", [line["answer"]]):
                context = tokenizer.encode(line["context"])
                whole = tokenizer.encode(line["context"] + answer)
                assert line["context"] == line["context"].rstrip() and len(context) < len(whole) <= 511
                assert whole[: len(context)].tolist() == context.tolist(), name
    keys = found["nanometa_passkey"]
    assert all(keys[i]["choices"][keys[i]["answer"]] in keys[i]["context"] for i in range(10))
    assert len({line["answer"] for line in keys}) > 2


def test_an_export_without_texts_needs_no_dataset(workdir, marked_run):
    run = load_run(marked_run)
    run.state["data"]["dataset"] = "nowhere"
    lost = saved(run, workdir / "out/lost")
    with pytest.raises(UserError, match="there is no dataset in nowhere, .*--eval_texts=0"):
        export(settings_of(f"--run={lost}", f"--output={workdir}/out/lost_hf"))
    assert not (workdir / "out/lost_hf").exists()
    export(settings_of(f"--run={lost}", f"--output={workdir}/out/lost_hf", "--eval_texts=0"))
    assert not (workdir / "out/lost_hf/lm_eval").exists()
    assert "lm_eval" not in (workdir / "out/lost_hf/README.md").read_text()
    assert "bits per byte" not in (workdir / "out/lost_hf/README.md").read_text()


def test_a_longer_window_is_exported_as_it_is_read(workdir):
    run = saved(run_on(workdir / "data/u", position="rope"), workdir / "out/rope")
    folder = export(settings_of(f"--run={run}", "--rope_scaling=yarn", "--rope_factor=4", "--eval_texts=0"))
    config = json.loads((folder / "config.json").read_text())
    assert folder == workdir / "out/rope/hf"
    assert (config["window"], config["rotary_factor"], config["rotary_original_window"]) == (128, 4.0, 32)


# ------------------------------------------------------------------------------------------- the tokenizer


def fast(tokenizer: Tokenizer, folder, pad: int) -> PreTrainedTokenizerFast:
    save_tokenizer(tokenizer, pad, 64, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


TRICKY = [
    "", " ", "  a", "a  ", "\n\n\n", "a \n b", "\t\tx", "a\r\nb", " \u3000\u2003x", "don't DON'T we'LL", "it's ſ'ſ",
    "日本語 テキスト", "é e\u0301", "🙂👩\u200d👩\u200d👧", "1234567", "x=1_000", "<|meta|>", "a<|endoftext|>b<|pad|>",
    "\x00\x7f\x85", "ﬁ Ǆ ١٢٣", "a" * 300, "-" * 40 + "\n\n" + "=" * 40,
]  # fmt: skip


@pytest.mark.parametrize("name", ["own", "gpt2"])
def test_the_tokenizer_gives_the_same_ids_and_texts(name, tmp_path):
    own = Tokenizer.gpt2() if name == "gpt2" else Tokenizer.train([" ".join(WORDS) + "\n", *TRICKY], 400)
    theirs = fast(own, tmp_path, own.meta + 1)
    for text in [*TRICKY, "".join(TRICKY)]:
        assert theirs(text).input_ids == own.encode(text).tolist(), repr(text)
        assert theirs.decode(theirs(text).input_ids) == text

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=30))
    def on_any_text(text):
        assert theirs(text).input_ids == own.encode(text).tolist(), repr(text)

    on_any_text()


def test_special_tokens_have_ids_and_their_names_in_a_text_have_none(dataset_tokenizer, tmp_path):
    own = dataset_tokenizer
    theirs = fast(own, tmp_path, own.meta + 1)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (own.eot, own.eot, own.meta + 1)
    assert theirs.convert_tokens_to_ids("<|meta|>") == own.meta and len(theirs) == own.meta + 2
    ids = [own.eot, *own.encode("the cat").tolist(), own.meta]
    assert theirs.decode(ids) == "<|endoftext|>the cat<|meta|>"
    assert theirs.decode(ids, skip_special_tokens=True) == "the cat"
    assert theirs("the cat").input_ids == own.encode("the cat").tolist()  # lm-eval puts <|endoftext|> there itself
    both = theirs(["the cat", "the cat sat on a mat"], padding=True)
    assert both.attention_mask[0][0] == 0 and both.input_ids[0][0] == own.meta + 1


def test_pads_have_an_id_of_their_own_where_one_can_be_masked(dataset_tokenizer, tmp_path):
    data = {"injection": "none", "chunk_content": 32, "chunk_markers": 0, "dataset": "x"}
    plain = small_run(dataset_tokenizer, data, second_attention="none")
    causal = small_run(dataset_tokenizer, data, second_attention="causal")
    meta = small_run(dataset_tokenizer, {**data, "injection": "uniform", "chunk_markers": 4})
    assert [pad_id(run) for run in (plain, causal, meta)] == [299, 300, 301]
    assert [is_plain(run) for run in (plain, causal, meta)] == [True, False, False]
    assert len(fast(dataset_tokenizer, tmp_path, 299)) == 300 and len(fast(dataset_tokenizer, tmp_path, 300)) == 301
    # a GPT-2 of transformers has no masked ids, so it has no rows that would take part in the softmax
    assert weights_of(plain)["transformer.wte.weight"].shape[0] == config_of(plain, "none", 0)["vocab_size"] == 300
    # the vocabulary of an older dataset, without a spare row, gets one
    trained = Tokenizer.train([" " + " ".join(ITEMS + NAMES)] * 3, 319)
    full = Tokenizer(trained.name, trained.pattern, trained.ranks, n_vocab=320)
    assert full.n_vocab == full.meta + 1 == 320
    run = small_run(full, {**data, "injection": "uniform", "chunk_markers": 4})
    assert weights_of(run)["transformer.wte.weight"].shape[0] == config_of(run, "implicit", 0)["vocab_size"] == 321


def test_two_tokenizers_from_the_same_path_are_not_mixed_up(tmp_path):
    """tiktoken's cache of files is keyed by path."""
    for size in (300, 320):
        own = Tokenizer.train([" ".join(WORDS)], size)
        assert len(fast(own, tmp_path, own.meta + 1)) == own.meta + 2


# ------------------------------------------------------------------------------------------- refusals and the hub


def test_what_cannot_be_exported_is_refused_in_one_sentence(workdir, marked_run):
    run_on(workdir / "data/n")
    plain = saved(run_on(workdir / "data/n", second_attention="none"), workdir / "out/plain")
    rope = saved(run_on(workdir / "data/u", position="rope"), workdir / "out/rope2")
    oracle = run_on(workdir / "data/u")
    object.__setattr__(oracle.config, "task", TaskConfig(tasks=("parity",), visible="marked"))
    oracle = saved(oracle, workdir / "out/oracle")
    forgetful = run_on(workdir / "data/u")
    object.__setattr__(forgetful.config, "markers", MarkerConfig(evict="segment"))
    forgetful = saved(forgetful, workdir / "out/forgetful")
    previous = saved(run_on(workdir / "data/u", meta_position="previous"), workdir / "out/previous")
    before = tree(workdir / "out")
    for argv, sentence in (
        ([f"--run={rope}", "--rope_scaling=yarn", "--rope_dynamic"], "rope_dynamic=True cannot be exported, because"),
        ([f"--run={forgetful}"], "and hides nothing from a position (evict)"),
        ([f"--run={previous}"], "and hides nothing from a position (meta_position=previous)"),
        ([f"--run={oracle}"], "it was trained with visible=marked, which skips positions"),
        (
            [f"--run={plain}", "--markers=implicit"],
            "markers=implicit needs a run that was trained on text with markers",
        ),
        ([f"--run={plain}", "--seed=3"], "--seed has no effect on"),
        ([f"--run={marked_run}", "--seed=3", "--markers=none"], "--seed has no effect on"),
        ([f"--run={marked_run}", f"--output={plain}"], "already exists, and is not overwritten"),
        ([f"--run={marked_run}", "--eval_texts=0", "--dataset=data/u"], "dataset"),
        ([f"--run={marked_run}", "--push_to_hub=name"], "push_to_hub='name' is no repository of the hub"),
        ([f"--run={marked_run}", "--push_to_hub=a/../b"], "is no repository of the hub"),
        ([f"--run={marked_run}", "--eval_texts=-1"], "eval_texts"),
        ([f"--run={marked_run}", "--license=MIT\nx: y"], "license='MIT\\nx: y' is out of range: it must be a name"),
        ([f"--run={marked_run}", "--language=English"], "it must be a code such as en"),
    ):
        with pytest.raises(UserError) as refused:
            export(settings_of(*argv))
        assert sentence in str(refused.value) and "\n" not in str(refused.value), argv
    assert tree(workdir / "out") == before


def test_a_second_attention_that_the_exported_code_lacks_is_refused_by_name(marked_run, monkeypatch):
    monkeypatch.setattr(weights, "COMPUTED", {("all", "nothing")})
    with pytest.raises(UserError, match="second_attention=meta cannot be exported, because interop/hugging_face/"):
        export(settings_of(f"--run={marked_run}", "--output=out/never"))


def test_a_failed_upload_keeps_the_export_and_says_how_to_go_on(workdir, marked_run, monkeypatch):
    monkeypatch.chdir(workdir)
    with socket.socket() as taken:  # a port on which nobody answers
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        argv = (f"--run={marked_run}", "--output=out/pushed", "--eval_texts=0", "--push_to_hub=someone/model")
        with pytest.raises(UserError) as refused:
            export(settings_of(*argv))
    said = str(refused.value)
    assert "out/pushed is complete, but could not be uploaded to someone/model" in said
    assert said.endswith("hf upload someone/model out/pushed")
    assert "# model" in (workdir / "out/pushed/README.md").read_text()


def test_an_upload_makes_a_private_repository_and_sends_the_folder(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, *args, **options):
            calls.append((args, options))

        def upload_folder(self, **options):
            calls.append(((), options))
            return type("Done", (), {"repo_url": "https://hub/someone/model"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("S", (), {"head": lambda *a, **k: None}))
    assert hub.push(tmp_path, "someone/model") == "uploaded to https://hub/someone/model"
    (names, made), (_, sent) = calls
    assert names == ("someone/model",) and made["private"] and made["exist_ok"]
    assert (sent["repo_id"], sent["folder_path"]) == ("someone/model", tmp_path)


def test_an_export_survives_a_copy_without_the_project(exported, tmp_path):
    """Every file that config.json and the tasks name is in the folder."""
    copy = shutil.copytree(exported[0], tmp_path / "copy")
    for path in copy.glob("lm_eval/*.yaml"):
        function = path.read_text().split("!function offline.")[1].split()[0]
        assert path.with_suffix(".jsonl").is_file() and f"def {function}(" in (copy / "lm_eval/offline.py").read_text()


def test_the_code_of_the_model_card_runs(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(exported[0].parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", (exported[0] / "README.md").read_text(), re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(block.replace("max_new_tokens=50", "max_new_tokens=8"), names)
    printed = capsys.readouterr().out
    assert len(blocks) == 2 and printed.startswith("def main")
    told = ["import os", "def main(argv):"]
    run = load_run(exported[0].parent / "marked")
    scored = [score(run, text, MarkerPlan.of_run(run)) for text in told]
    n = sum(target >= 0 for targets, _ in scored for target in targets)
    nats = sum(sum(nats) for _, nats in scored)
    assert float(printed.splitlines()[-1]) == pytest.approx(nats / n, abs=1e-4)
    marked = names["out"][0].tolist()
    assert marked[: names["ids"].size(1)] == names["ids"][0].tolist() and 300 in marked


def test_the_card_of_an_explicit_and_stretched_export_says_so(workdir, tmp_path):
    """Its code places the markers, lm-eval is told to insert them, and figures of training name the trained window."""
    run = run_on(workdir / "data/u", position="rope")
    saved(run, tmp_path / "rope")
    out = export(load_config(ExportConfig, [
        f"--run={tmp_path / 'rope'}", f"--output={tmp_path / 'hf'}", "--markers=explicit", "--eval_texts=0",
        "--rope_scaling=yarn", "--rope_factor=4", "--license=mit", "--language=no",
    ]))  # fmt: skip
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\nlanguage: "no"\n')
    assert "| arm | meta + rope (the second attention connects markers) |" in card
    assert "return model.place_markers([tokenizer.bos_token_id, *tokenizer(text).input_ids])" in card
    assert (
        "128 positions, stretched from the 32 that were trained, which hold 112 text tokens and their markers" in card
    )
    assert 'load the model with\n`marker_placement="implicit"`' in card
