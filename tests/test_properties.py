"""Tests laws that hold for any input: data order over processes, shards, checkpoints, settings and batches.

Other properties are tested elsewhere: epochs and targets in test_data.py, injection in test_injection.py.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.common.errors import UserError
from nanometa.config import (
    GPTConfig,
    Rescale,
    SampleConfig,
    TaskConfig,
    TrainConfig,
    WeightConfig,
    train_config_from_dict,
)
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.checks import field_names, flat, to_dict
from nanometa.config.command_line import load_config
from nanometa.config.settings import why_idle
from nanometa.data.loader import step_windows, window_order
from nanometa.data.shards import ShardWriter, TokenStream
from nanometa.data.verify import verify
from nanometa.training import checkpoint
from nanometa.training.checkpoint import open_checkpoint
from nanometa.training.distributed import accumulation
from tests.schemes import VARIANTS
from tests.test_checkpoint import write

# ----------------------------------------------------------------------------- the order of the data


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 90), st.integers(0, 10**6), st.data())
def test_the_windows_of_a_step_do_not_depend_on_how_it_is_split(world, accum, micro, n_windows, seed, data):
    """However a step is split, and wherever a run was stopped, it has the same windows, each in one process."""
    batch = world * accum * micro
    cfg = TrainConfig(batch_size=batch, micro_batch_size=micro, seed=seed)
    assert accumulation(cfg, world) == accum
    steps = -(-n_windows // batch) + 1
    seen = []
    for step in range(steps):
        shares = [step_windows(step, cfg, n_windows, rank, world) for rank in range(world)]
        assert all(share.shape == (accum, micro) for share in shares)
        seen.append(np.concatenate([share.flatten() for share in shares]))
        assert (seen[-1] == window_order(step, batch, n_windows, seed)).all()
    whole = np.concatenate(seen)
    assert sorted(whole[:n_windows]) == list(range(n_windows))  # no window is in two processes within an epoch
    # a run that starts in the middle, on one process with micro-batches of one window, sees the rest
    start = data.draw(st.integers(0, steps - 1))
    alone = dataclasses.replace(cfg, micro_batch_size=1)
    rest = [step_windows(step, alone, n_windows, 0, 1).flatten() for step in range(start, steps)]
    assert (np.concatenate(rest) == whole[start * batch :]).all()


# ----------------------------------------------------------------------------- shards


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=12), st.integers(1, 50), st.sampled_from([300, 2**16, 2**16 + 1, 2**31]),
    st.integers(0, 10**6), st.data(),
)  # fmt: skip
def test_shards_of_any_size_read_back_unchanged(pieces, shard_tokens, n_vocab, seed, data):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, n_vocab, size) for size in pieces]
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "train", n_vocab, shard_tokens)
        for part in ids:
            writer.write(part)
        writer.close()
        whole = np.concatenate([np.empty(0, np.int64), *ids])
        stream = TokenStream(Path(folder), writer.entries, n_vocab)
        assert len(stream) == len(whole) and len(writer.entries) == -(-len(whole) // shard_tokens)
        assert stream.read(0, len(whole)).tolist() == whole.tolist()
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole) + 5))
        assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
        verify(Path(folder), {"splits": {"train": {"shards": writer.entries}}}, n_vocab)


# ----------------------------------------------------------------------------- checkpoints

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NAMES = st.text("abch.0_/", min_size=1, max_size=12)


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    return tensor.T if tensor.dim() == 2 and draw(st.booleans()) else tensor  # not contiguous


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=5), st.binary(max_size=300), st.integers(0, 10**8 - 1))
def test_a_saved_checkpoint_reads_back_unchanged(saved, raw, step):
    with tempfile.TemporaryDirectory() as folder:
        other = write(Path(folder), 1)
        needed = {path.name: path.read_bytes() for path in other.iterdir() if path.name != "manifest.json"}
        files = {**needed, "notes.bin": raw, checkpoint.OPTIMIZER: saved}
        made = checkpoint.save(Path(folder) / "", "step", step, files, keep=2)
        found = open_checkpoint(made)
        assert (made / "notes.bin").read_bytes() == raw
        back = found.optimizer()
        assert back.keys() == saved.keys()
        for name, tensor in saved.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("run"), 7)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused_and_the_file_is_named(whole, data):
    path = data.draw(st.sampled_from(sorted(whole.iterdir())))
    raw = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    try:
        with pytest.raises(UserError) as caught:
            open_checkpoint(whole)
    finally:
        path.write_bytes(raw)
    # a flipped bit in the manifest may show as damage to another file
    assert path.name in str(caught.value) or path.name == "manifest.json"
    assert str(whole) in str(caught.value)
    open_checkpoint(whole)


# ----------------------------------------------------------------------------- settings

NUMBERS = {  # for settings whose type alone allows too many values
    "n_inner": st.none() | st.integers(1, 2**18), "n_layer": st.integers(1, 10**4), "block_size": st.integers(1, 2**24),
    "vocab_size": st.none() | st.integers(1, 10**6), "dropout": st.floats(0, 1, exclude_max=True),
    "random_fraction": st.floats(0, 1, exclude_min=True), "rope_theta": st.floats(1.5, 1e300),
    "batch_size": st.integers(1, 10**6), "micro_batch_size": st.integers(1, 10**6), "keep": st.integers(2, 10**9),
    "beta1": st.floats(0, 1, exclude_max=True), "beta2": st.floats(0, 1, exclude_max=True),
    "decay_fraction": st.floats(0, 1, exclude_min=True), "mfu": st.floats(0, 1, exclude_min=True),
    "n_accelerators": st.integers(1, 10**6), "learning_rate": st.floats(1, 1e300), "min_lr": st.floats(0, 1),
    "run_name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", fullmatch=True), "top_p": st.just(1.0),
    "train_length": st.integers(32, 2**20), "meta_share": st.floats(1e-6, 0.89), "questions": st.integers(1, 16),
    "temperature": st.floats(1e-3, 1e300), "prompt": st.none(), "rope_factor": st.floats(1, 2**16),
    "yarn_beta_slow": st.floats(1e-3, 1), "yarn_beta_fast": st.floats(2, 1e300),
    "yarn_attention_factor": st.none() | st.floats(1e-3, 1e300), "spike_deviations": st.floats(1e-3, 1e300),
    "stop_at": st.none() | st.floats(0, 1, exclude_min=True), "lora_alpha": st.floats(1e-3, 1e300),
    "compression_ratio": st.none() | st.floats(0, 1, exclude_max=True),
}  # fmt: skip
# On a command line, a text "None" looks like no text. No setting may be both. In a path, ~ stands for a home folder.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~"), max_size=30)


def values(hint, name: str):
    if name in NUMBERS:
        return NUMBERS[name]
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0], ""), min_size=1, unique=True).map(tuple)
    options = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if options:
        return st.one_of(*(values(option, "") for option in options))
    return {
        int: st.integers(1, 10**12), float: st.floats(0, 1e300), bool: st.booleans(), str: TEXT, type(None): st.none(),
    }[hint]  # fmt: skip


WEIGHTS = (
    WeightConfig(), WeightConfig(weighting="dense", weight_lambda=0.5, short_length=7, short_stride=3),
    WeightConfig(weighting="ppmi", weight_kappa=0.1, weight_shift=2.0, weight_after=9),
    WeightConfig(weighting="longce", weight_gamma=2.0, weight_norm="batch"),
)  # fmt: skip


@st.composite
def configs(draw, cls):
    hints = {
        name: hint
        for name, hint in typing.get_type_hints(cls).items()
        if name not in ("model", "task", "markers", "weights", "rescale", "n_head", "n_embd", "typed")
    }
    chosen = {name: draw(values(hint, name)) for name, hint in hints.items() if draw(st.booleans())}
    if cls is TrainConfig:
        chosen |= {"model": draw(configs(GPTConfig)), "task": draw(configs(TaskConfig))}
        if chosen.get("init_from", "scratch") != "scratch":
            chosen.pop("branch_from", None)
        if chosen.get("dry_run"):
            chosen.pop("show_batch", None)
        if chosen.get("tracker"):
            chosen.pop("wandb", None)
        chosen["weights"] = draw(st.sampled_from(WEIGHTS))
        if chosen["task"].tasks == () and draw(st.booleans()):
            chosen |= draw(marked(chosen["model"], chosen["task"]))
        chosen["learning_rate"] = max(chosen.get("learning_rate", 1.0), chosen.get("min_lr", 0.0))
    if cls is SampleConfig:
        given = st.builds(Rescale, st.sampled_from(("none", "yarn")), st.floats(1.5, 2**16), st.booleans())
        chosen["rescale"] = draw(st.just(Rescale()) | given)
    if cls is TaskConfig:  # refused together
        if chosen.get("loss_on") == "all":
            chosen.pop("visible", None)
        if chosen.get("question") == "after":
            chosen.pop("semantic_lists", None)
    if cls is GPTConfig:
        chosen.pop("summary", None)  # refused without the markers that it belongs to
        head, size = draw(st.integers(1, 12)), 2 * draw(st.integers(1, 64))
        chosen |= {"n_head": head, "n_embd": head * size}
        if SECOND_ATTENTIONS[chosen.get("second_attention", "meta")].markers == "refused":
            chosen.pop("meta_position", None)
        if chosen.get("rope_scaling") == "ntk" and size == 2:
            del chosen["rope_scaling"]
        if chosen.get("rope_scaling", "none") == "none":
            chosen.pop("rope_dynamic", None)
    return cls(**{name: value for name, value in chosen.items() if not (name in ("init_from", "scorer") and not value)})


def marked(model: GPTConfig, task: TaskConfig):
    """A strategy for settings of markers that fit a model and a task, with the target rule that they need."""
    found = []
    for markers in VARIANTS.values():
        given = {"markers": markers, "target_rule": "skip"}
        with contextlib.suppress(UserError):
            TrainConfig(model=model, task=task, **given)
            found.append(given)
    return st.sampled_from(found or [{}])


@settings(max_examples=5, deadline=None)
@given(configs(TrainConfig))
def test_training_settings_survive_saving_and_the_command_line(cfg):
    assert train_config_from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    argv, default = [], flat(TrainConfig())
    from_base = field_names(GPTConfig) if cfg.takes_over else ()
    idle = [name for name in default if name not in from_base and why_idle(cfg, name)]
    for name, value in flat(cfg).items():
        if value != () and name not in idle and not (name == "wandb" and cfg.tracker):
            argv += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    loaded = flat(load_config(TrainConfig, argv))
    assert loaded == {**flat(cfg), **{name: default[name] for name in idle}}
    for name in idle[:1]:  # a setting without an effect is refused
        value = flat(cfg)[name]
        more = [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
        with pytest.raises(UserError, match=f"--{name} has no effect: it is only used "):
            load_config(TrainConfig, [*argv, *more])


@settings(max_examples=60, deadline=None)
@given(configs(SampleConfig))
def test_sampling_settings_survive_the_command_line(cfg):
    settings_ = to_dict(cfg)
    settings_ |= settings_.pop("rescale")
    idle = [name for name in settings_ if why_idle(cfg, name)]
    argv = [f"--{name}={value}" for name, value in settings_.items() if name not in idle]
    assert load_config(SampleConfig, argv) == dataclasses.replace(
        cfg, **{name: getattr(SampleConfig(), name) for name in idle}
    )


# ----------------------------------------------------------------------------- batches


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 64))
def test_a_step_has_batch_size_windows_and_offered_batch_sizes_work(batch, micro, world):
    cfg = TrainConfig(batch_size=batch, micro_batch_size=micro)
    try:
        assert accumulation(cfg, world) * micro * world == batch
    except UserError as error:
        offers = re.findall(r"(\w+_size)=(\d+)(?: or (\d+))?", str(error).split(": set ")[1])
        assert offers and batch % (micro * world)
        for name, *sizes in offers:
            for size in filter(None, sizes):
                accumulation(dataclasses.replace(cfg, **{name: int(size)}), world)
