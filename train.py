"""Trains a GPT with meta-tokens, or one of its controls, on a prepared dataset.

    python train.py config/tiny_meta.py                                        # minutes on 2 CPU cores
    python train.py config/tiny_meta.py --run_name=try2 --learning_rate=2e-3
    python train.py config/tiny_meta.py --init_from=resume                     # goes on, exactly
    torchrun --standalone --nproc_per_node=8 train.py config/meta_gpt2.py

Initial weights, the order of the data and the places of markers depend on the seed and the step alone. So a run is the
same after any number of interruptions (to the bit), and for any number of processes and any gradient accumulation (to
floating-point rounding). Dropout is the exception: its masks depend on the process and the micro-batch, too, so with
dropout a run repeats, to the bit, only with the same number of processes and the same micro_batch_size.
"""

import dataclasses
import json
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, to_dict
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.layout import Batch
from nanometa.data.loader import step_windows, window_order
from nanometa.data.verify import verify
from nanometa.layers.loss import Objective
from nanometa.layers.scores import Scorer
from nanometa.model import GPT
from nanometa.tasks.words import tokens_per_item
from nanometa.training import checkpoint, pretrained
from nanometa.training.bad_steps import Guard
from nanometa.training.base_run import base_of, with_base
from nanometa.training.checkpoint import Checkpoint
from nanometa.training.clock import Clock, hms
from nanometa.training.dataset import data_facts, open_windows, with_vocabulary
from nanometa.training.distributed import Dist, accumulation, autocast, pick_dtype, processes, ranks, why_not_compile
from nanometa.training.estimate import flops_per_window, peak_flops, report
from nanometa.training.evaluation import evaluate
from nanometa.training.optimizer import Optimizer, learning_rate, norms
from nanometa.training.resume import check_resumable, find_checkpoint, lock_existing, lock_new
from nanometa.training.run_log import RunLog, environment
from nanometa.training.show_batch import show_batch
from nanometa.training.signals import StopFlag


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------- the run


class Trainer:
    """All that a run holds; `train_step`, `evaluate` and `save` are what its loop does."""

    def __init__(self, cfg: TrainConfig, dist: Dist):
        """Whatever can be refused is refused before anything is written, and in all processes together. A folder that
        exists is locked before anything in it is read; that of a new run is made and locked last."""
        self.dist, self.run_dir = dist, Path(cfg.out_dir) / cfg.run_name
        self.ahead: list[Batch] = []  # of the next step
        notes: list[str] = []  # for the log, which is opened last
        self.lock = dist.agree("lock", lambda: lock_existing(cfg, self.run_dir, dist.is_main))
        saved = dist.agree("data", lambda: self._open_data(cfg, notes))
        dist.agree("weights", lambda: self._make_model(saved))
        verified = dist.agree("shards", self._verify)
        why_dtype, no_compile = dist.agree("device", lambda: self._place(saved))
        if dist.world > 1:  # here all processes will come: DDP waits for the others
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        dist.agree("folder", self._take_folder)
        self.log = RunLog(self.run_dir, self.cfg, self.facts, self.step if saved else -1, dist.is_main)
        start = f"goes on from {saved.folder}, step {saved.step:,}; " if self._is_own(saved) else ""
        for sentence in (*notes, f"{start}started from {self.origin}", verified):
            self.log.say(sentence)
        self._introduce(why_dtype, no_compile)

    def _open_data(self, cfg: TrainConfig, notes: list[str]) -> Checkpoint | None:
        """Opens the checkpoint to go on from, if there is one, and the data; settles the settings."""
        self.accumulation = accumulation(cfg, self.dist.world)
        saved = find_checkpoint(cfg, self.run_dir, notes.append)
        base = base_of(cfg, saved)
        cfg = with_base(cfg, base)
        self.train_data, self.val_data = (open_windows(cfg, split, base) for split in ("train", "val"))
        tokenizer = self.train_data.tokenizer
        self.cfg = with_vocabulary(cfg, tokenizer.n_vocab, tokenizer.n_content)
        self.facts = data_facts(self.train_data, self.cfg, base)
        if saved:
            notes += check_resumable(saved, self.cfg, self.facts)
        return saved

    def _is_own(self, saved: Checkpoint | None) -> bool:
        """Is this a checkpoint of this run, not of one that it branches from?"""
        return saved is not None and saved.folder.parent.resolve() == self.run_dir.resolve()

    def _make_model(self, saved: Checkpoint | None) -> None:
        """The model with the weights that the run starts from, and what is known of them."""
        cfg = self.cfg
        self.model = GPT(cfg.model, cfg.seed)
        self.step, self.best, self.evaluated, self.guard = 0, None, None, Guard(cfg)
        self.origin, self.content_before = "scratch", 0  # content tokens seen before step 0; None = unknown
        if saved:
            saved.load_into(self.model)
            self.step, self.best = saved.step, saved.state["best"]
            self.evaluated, self.guard = saved.state.get("evaluated", saved.step), Guard(cfg, saved.state.get("guard"))
            self.origin = saved.state.get("origin", "unknown")
            self.content_before = checkpoint.content_before(saved.state)
            if not self._is_own(saved):
                self.origin = f"branch of {saved.folder} ({self.origin})"
        elif cfg.init_from not in pretrained.KEYWORDS:
            tokenizer = self.train_data.tokenizer
            self.origin, self.content_before = pretrained.load_into(self.model, cfg.init_from, tokenizer)

    def _verify(self) -> str:
        """Verifies the bodies of the shards, in one process of each machine -> a sentence on what was done."""
        cfg, data = self.cfg, self.train_data
        if cfg.task.tasks:
            return "the texts of the tasks are made as they are needed"
        if cfg.verify == "full" and self.dist.local_rank == 0:
            say = partial(print, flush=True) if self.dist.is_main else lambda line: None
            return verify(Path(cfg.dataset), data.manifest, data.tokenizer.meta + 1, say)
        return "the bodies of the shards are not verified, as asked (--verify=header), only headers and sizes"

    def _place(self, saved: Checkpoint | None) -> tuple[str, str | None]:
        """Moves the model to its device, makes the optimizer, and compiles -> why this dtype, why no compilation."""
        cfg, dist = self.cfg, self.dist
        self.dtype, why_dtype = pick_dtype(cfg.dtype, dist.device)
        name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type
        self.peak = peak_flops(name) if self.dtype == torch.bfloat16 else None  # FLOP/s, for MFU
        self.model.to(dist.device)
        self.model.recompute = cfg.activation_checkpointing
        self.optimizer = Optimizer(self.model, cfg)
        if saved:
            saved.restore(self.optimizer)
        no_compile = why_not_compile(dist.device) if cfg.compile else "as asked"
        self.objective, self.scorer = Objective(self.model), None  # None: the model as it is
        if not no_compile:
            self.objective = torch.compile(self.objective, dynamic=False)
            self.scorer = torch.compile(Scorer(self.model), dynamic=False)
        return why_dtype, no_compile

    def _take_folder(self) -> None:
        """Makes the folder of a new run and locks it, or tidies that of a run that goes on."""
        if self.dist.is_main:
            self.lock = self.lock or lock_new(self.run_dir)
            checkpoint.sweep(self.run_dir, self.step, self.cfg.keep)

    def _introduce(self, why_dtype: str, no_compile: str | None) -> None:
        cfg, data, say = self.cfg, self.train_data, self.log.say
        say(
            f"{cfg.run_name}: " + " ".join(f"{name}={value}" for name, value in flat(cfg).items() if name != "run_name")
        )
        decayed, rest = (sum(p.numel() for p in group["params"]) for group in self.model.param_groups(0.0))
        say(
            f"{self.model.num_params() / 1e6:.2f}M parameters ({self.model.num_params(False) / 1e6:.2f}M without the "
            f"position table): {decayed:,} with weight decay, {rest:,} without"
        )
        split = f"in {self.accumulation} micro-batches of {cfg.micro_batch_size} on each of {self.dist.world} processes"
        if cfg.task.tasks:
            say(
                f"texts of {', '.join(cfg.task.tasks)} of at most {data.T} positions, all of them new; validation on "
                f"{self.val_data.n_windows:,}; {tokens_per_item(data.tokenizer):.3f} tokens an item"
            )
            say(
                f"a step: {cfg.batch_size} texts, {split}; {cfg.max_steps:,} steps = {cfg.max_steps * cfg.batch_size:,}"
            )
        else:
            content, positions = cfg.batch_size * data.content_per_window, cfg.batch_size * data.T
            say(
                f"{data.n_windows:,} train windows and {self.val_data.n_windows:,} validation windows of {data.T} "
                f"positions, {data.content_per_window} of them content"
            )
            say(
                f"a step: {cfg.batch_size} windows = {content:,} content tokens = {positions:,} positions, "
                f"{split}; {cfg.max_steps:,} steps = {cfg.max_steps * content:,} content tokens = "
                f"{cfg.max_steps * cfg.batch_size / data.n_windows:.2f} epochs"
            )
        say(
            f"device {self.dist.device}, {str(self.dtype).removeprefix('torch.')} ({why_dtype}), "
            f"compile {'off (' + no_compile + ')' if no_compile else 'on (the first step takes a while)'}"
        )

    def read(self, step: int) -> list[Batch]:
        """The micro-batches of this process in a step."""
        mine = step_windows(step, self.cfg, self.train_data.n_windows, self.dist.rank, self.dist.world)
        return [self.train_data.batch(windows) for windows in mine]

    def train_step(self, stop: bool) -> tuple[float, float, bool]:
        """One update, unless the guard skips it -> (mean nats of the global batch, gradient norm, stop?).

        The sum of nats is divided by the scored targets of the whole global batch: their number differs between
        micro-batches and processes, so a mean of means would be another loss."""
        cfg, dist = self.cfg, self.dist
        batches = self.ahead or self.read(self.step)
        scored = sum(int((batch.targets >= 0).sum()) for batch in batches)
        # float64 holds any count exactly; MPS has none
        exact = torch.float32 if dist.device.type == "mps" else torch.float64
        scored, stops = dist.sum(torch.tensor([scored, stop], dtype=exact, device=dist.device))

        total = torch.zeros((), device=dist.device)
        for micro, batch in enumerate(batches):
            batch = batch.to(dist.device)
            if cfg.model.dropout:
                torch.manual_seed(stable_key(cfg.seed, "dropout", self.step, dist.rank, micro) >> 1)
            last = micro == len(batches) - 1
            # gradients are exchanged once a step; the flag must be set before the forward
            hold = dist.world > 1 and not last
            with self.objective.no_sync() if hold else nullcontext():
                with autocast(dist.device, self.dtype):
                    nats = self.objective(*batch)
                (nats * (dist.world / scored).float()).backward()  # DDP takes the mean over processes
            total += nats.detach()
        self.norms = norms(self.model) if self.logs(self.step + 1) else {}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip or math.inf)
        # while a GPU is still at work; what follows waits for it, and is the one device sync of a step
        self.ahead = self.read(self.step + 1) if self.step + 1 < cfg.max_steps else []
        loss, norm, stops = torch.stack((dist.sum(total / scored), norm.to(scored.dtype), stops)).tolist()
        take, wrong = self.guard.judge(loss, norm)
        if take:
            self.optimizer.step(learning_rate(self.step, cfg))
        else:
            self.optimizer.forget_gradients()
        self.step += 1
        if wrong:
            self._log_bad_step("spike" if take else "skipped", wrong)
        return loss, norm, stops > 0

    def _log_bad_step(self, what: str, why: str) -> None:
        step, cfg = self.step - 1, self.cfg
        windows = window_order(step, cfg.batch_size, self.train_data.n_windows, cfg.seed).tolist()
        self.log.record("guard", self.step, what=what, why=why, windows=windows)
        self.log.say(
            f"step {self.step:>7,}  {what}: {why}; windows {' '.join(map(str, windows[:16]))}"
            f"{' ..' if len(windows) > 16 else ''} (all of it: --show_batch={step})"
        )

    def logs(self, step: int) -> bool:
        return step % self.cfg.log_interval == 0 or step == self.cfg.max_steps

    def evaluate(self, n_windows: int | None, stop: StopFlag, kind: str = "val") -> bool:
        """Records the figures, and saves the weights if they are the best -> False if a signal ended it before."""
        started = time.perf_counter()
        figures = evaluate(self.model, self.val_data, self.cfg, self.dist, n_windows, stop, self.scorer)
        if figures is None:
            return False
        took = time.perf_counter() - started
        if not math.isfinite(figures["loss"]):
            self._diverged(f"the validation loss is {figures['loss']}")
        counted = self.train_data.counted(self.step * self.cfg.batch_size)
        self.log.record(kind, self.step, **figures, **counted, eval_s=took)
        better = kind == "val" and self.step > 0 and (self.best is None or figures["loss"] < self.best["loss"])
        if better:
            self.best = {"step": self.step, "loss": figures["loss"], "bits_per_byte": figures["bits_per_byte"]}
        end = "" if figures["endoftext_loss"] is None else f", {figures['endoftext_loss']:.2f} an <|endoftext|>"
        if self.cfg.task.tasks:
            exact = (f"{task} {figures[f'exact_{task}']:.1%}" for task in self.cfg.task.tasks)
            what = f"exact answers: {', '.join(exact)}; {figures['loss']:.4f} nats an answer's token"
        else:
            packed = self.train_data.manifest["val_text_compressed"]
            what = (
                f"{figures['bits_per_byte']:.4f} bits per byte (gzip -9 {packed['gzip_9_bits_per_byte']:.3f}, "
                f"xz {packed['xz_bits_per_byte']:.3f}), {figures['loss']:.4f} nats a token"
            )
        self.log.say(
            f"step {self.step:>7,}  {'whole ' if n_windows is None else ''}validation: {what}{end}, on "
            f"{figures['tokens']:,} tokens in {took:.1f} s{'  best' if better else ''}"
        )
        self.evaluated = self.step
        if better:
            self.save("best")
        return True

    def save(self, kind: str) -> None:
        """kind: step = everything that a resume needs; best = the weights. Rank 0 writes, the others wait."""
        if self.dist.is_main:
            state = {
                "step": self.step,
                "samples": self.step * self.cfg.batch_size,
                "best": self.best,
                "evaluated": self.evaluated,
                "guard": self.guard.state(),
                "origin": self.origin,
                "content_before": self.content_before,
                "config": to_dict(self.cfg),
                "data": self.facts,
                "environment": environment(),
            }
            files = {
                checkpoint.WEIGHTS: self.model.state_dict(),
                checkpoint.STATE: (json.dumps(state, indent=2) + "\n").encode(),
                **self.train_data.tokenizer.files(),
            }
            if kind == "step":
                files[checkpoint.OPTIMIZER] = self.optimizer.tensors()
                self.log.sync()
            checkpoint.save(self.run_dir, kind, self.step, files, keep=self.cfg.keep if kind == "step" else 1)
        self.dist.barrier()

    def evaluates(self) -> bool:
        """Is an evaluation due after this step?"""
        return self.step % self.cfg.eval_interval == 0 or self.step == self.cfg.max_steps

    def run(self) -> None:
        cfg, log, stop, clock = self.cfg, self.log, StopFlag(), Clock()
        saved_at, stopping = self.step, False
        if self.evaluates() and self.evaluated != self.step:  # the start, or what a signal had ended
            stopping = not self.evaluate(cfg.eval_windows, stop)
        clock.look()
        while self.step < cfg.max_steps and not stopping:
            rate = learning_rate(self.step, cfg)
            loss, norm, stopping = self.train_step(stop.raised)
            clock.step()
            if self.logs(self.step):
                self._log_step(loss, norm, rate, clock.look(), clock)
            self.guard.check(self.step, f"the last checkpoint in {self.run_dir} ({checkpoint.latest(self.run_dir)})")
            paused = time.perf_counter()
            if self.evaluates() and not stopping:
                stopping = not self.evaluate(cfg.eval_windows, stop)
            if self.step % cfg.save_interval == 0 or self.step == cfg.max_steps or stopping:
                self.save("step")
                saved_at = self.step
            clock.pause(time.perf_counter() - paused)
        if saved_at != self.step:
            self.save("step")
        if not stopping:
            stopping = not self.evaluate(None, stop, kind="final")
        if stopping:
            log.say(f"stopped by a signal after step {self.step:,}; it is saved: go on with --init_from=resume")
        else:
            log.say(f"done in {hms(time.perf_counter() - clock.started)}: {self.run_dir}")
        log.close()

    def _diverged(self, what: str) -> None:
        raise UserError(
            f"{what} at step {self.step:,}: training has diverged; lower --learning_rate and start again, or resume "
            f"with it from the last checkpoint in {self.run_dir}, which is from before."
        )

    def _log_step(self, loss: float, norm: float, rate: float, seconds: float, clock: Clock) -> None:
        cfg, data = self.cfg, self.train_data
        counted, before = (data.counted(step * cfg.batch_size) for step in (self.step, self.step - 1))
        rates = {name: (count - before[name]) / seconds for name, count in counted.items()}
        mfu = {}
        if self.peak:
            T = (counted["positions"] - before["positions"]) // cfg.batch_size
            window = dataclasses.replace(cfg.model, block_size=T)
            markers = 0 if cfg.task.tasks else T - data.content_per_window  # of texts they differ, and are few
            flops = cfg.batch_size * flops_per_window(window, markers)
            mfu = {"mfu": flops / seconds / (self.dist.world * self.peak)}
        self.log.record(
            "train",
            self.step,
            loss=finite(loss),
            learning_rate=rate,
            grad_norm=finite(norm),
            **dict(zip(self.norms, map(finite, torch.stack([*self.norms.values()]).tolist()), strict=True)),
            **counted,
            **{f"{name}_per_s": rate for name, rate in rates.items()},
            **mfu,
            elapsed_s=time.perf_counter() - clock.started,
        )
        self.log.say(
            f"step {self.step:>7,}/{cfg.max_steps:,}  loss {loss:.4f}  lr {rate:.2e}  norm {norm:.2f}  "
            f"{'  '.join(f'{rate:,.0f} {name}/s' for name, rate in rates.items()).replace('_', ' ')}  "
            f"{'MFU {mfu:.1%}  '.format(**mfu) if mfu else ''}"
            f"ETA {hms(seconds * (cfg.max_steps - self.step))}"
        )


def main(argv: list[str]) -> None:
    cfg = load_config(TrainConfig, argv, config_file=True)
    if cfg.dry_run:
        if cfg.task.tasks:
            raise UserError(
                "dry_run estimates training on text: leave --tasks out, or let a few steps be the estimate."
            )
        print(report(cfg, accumulation(cfg, cfg.n_accelerators)))
        return
    if cfg.show_batch is not None:
        rank, _, world = ranks()
        accumulation(cfg, world)  # refuses what cannot be split
        return show_batch(cfg, world) if rank == 0 else None
    if not cfg.run_name:
        raise UserError("the run has no name: give a config file (config/tiny_meta.py) or --run_name=NAME.")
    with processes(cfg.device) as dist:
        Trainer(cfg, dist).run()


if __name__ == "__main__":
    run_cli(main)
