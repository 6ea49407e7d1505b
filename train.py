"""Trains a GPT with meta-tokens, or one of its controls, on a prepared dataset.

    python train.py config/tiny_meta.py                                        # minutes on 2 CPU cores
    python train.py config/tiny_meta.py --run_name=try2 --learning_rate=2e-3
    python train.py config/tiny_meta.py --init_from=resume                     # continues exactly
    torchrun --standalone --nproc_per_node=8 train.py config/meta_gpt2.py

The initial weights, the order of the data and the positions of the markers depend only on the seed and the step. A run
that was interrupted and resumed therefore ends with bit-identical weights, and the number of processes and the gradient
accumulation change the weights only by floating-point rounding. Dropout masks also depend on the process and the
micro-batch, so a run with dropout repeats exactly only with the same number of processes and the same micro_batch_size.
"""

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import TrainConfig
from nanometa.config.checks import to_dict
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.layout import Batch, to_device
from nanometa.data.loader import step_windows, window_order
from nanometa.data.markers import markers_of
from nanometa.data.verify import verify
from nanometa.inference.training_samples import TrainingSamples
from nanometa.layers.scores import Scorer
from nanometa.model import GPT
from nanometa.reports.own_curves import OwnCurves
from nanometa.training import adapters, agreement, checkpoint, messages, pretrained
from nanometa.training.bad_steps import BadStepGuard, diverged
from nanometa.training.base_run import base_of, with_base
from nanometa.training.checkpoint import Checkpoint, Run
from nanometa.training.clock import Clock, hms
from nanometa.training.dataset import data_facts, open_windows, with_vocabulary
from nanometa.training.distributed import Dist, accumulation, autocast, pick_dtype, processes, why_eager
from nanometa.training.dry_run import describe_estimate
from nanometa.training.ending import Ending
from nanometa.training.estimate import peak_flops, utilization
from nanometa.training.evaluation import evaluate, measured_in
from nanometa.training.failed_start import Start
from nanometa.training.idle import refuse_idle
from nanometa.training.optimizer import Optimizer, norms
from nanometa.training.resume import check_resumable, find_checkpoint, lock_existing
from nanometa.training.run_log import RunLog, earlier_environments, environment, finite, show
from nanometa.training.show_batch import show_batch
from nanometa.training.signals import StopFlag
from nanometa.training.weighted_loss import TokenWeights


class Trainer:
    """The state of a training run; `run` is its loop."""

    def __init__(self, cfg: TrainConfig, dist: Dist):
        """Prepares a run. Raises UserError, in all processes, before anything is written if the run cannot start.

        The folder of an existing run is locked before anything in it is read. The folder of a new run is created and
        locked last, so that a refused start leaves nothing behind."""
        self.dist, self.run_dir = dist, Path(cfg.out_dir) / cfg.run_name
        self.ahead: tuple[list[tuple[Batch, dict]], int] | None = None  # what `read` returned for the next step
        self.measured: dict = {}  # the last evaluation: its step, windows, figures and seconds (eval_s)
        self.inherited = self.measured  # the same of the checkpoint that the run continues
        self.start = Start()  # ends with the first step; removes the folder of a new run if it fails
        notes: list[str] = []  # kept for the log, which is opened last
        self.lock = dist.agree("lock", lambda: lock_existing(cfg, self.run_dir, dist.is_main))
        saved = dist.agree("data", lambda: self._open_data(cfg, notes))
        dist.agree("weights", lambda: self._make_model(saved))
        facts = dist.agree("facts", lambda: agreement.data_and_start(self.facts, saved, self.origin, notes))
        dist.compare("facts of all", facts | {"dtype": pick_dtype(cfg.dtype, dist.device)[0]})
        verified = dist.agree("shards", self._verify)
        why_dtype = dist.agree("device", lambda: self._place(saved))
        no_compile = why_eager(self.cfg, dist)
        if not no_compile:
            self.objective = torch.compile(self.objective, dynamic=False)
            self.scorer = torch.compile(Scorer(self.model), dynamic=False)
        if dist.has_group:  # DDP waits for the other processes, and after `agree` all of them arrive here
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        with self.start:
            dist.agree("folder", self._take_folder)
            resumed_at = self.step if saved else -1
            self.log = dist.agree(
                "log", lambda: RunLog(self.run_dir, self.cfg, self.facts, resumed_at, dist.is_main, self.earlier)
            )
            start = f"started from {self.origin}"
            self.saved_at = self.step if self._is_own(saved) else None  # step of the last checkpoint of this run
            if self._is_own(saved):
                start = f"resumed from {saved.folder} at step {saved.step:,}; the run originally {start}"
            self._introduce([*notes, start, verified], why_dtype, no_compile)

    def _open_data(self, cfg: TrainConfig, notes: list[str]) -> Checkpoint | None:
        """Opens the data and the checkpoint that the run continues, and completes the settings.

        Returns that checkpoint, or None if the run starts at step 0."""
        self.accumulation = accumulation(cfg, self.dist.world)
        saved = find_checkpoint(cfg, self.run_dir, notes.append)
        base = base_of(cfg, saved)
        cfg = with_base(cfg, base)
        self.train_data, self.val_data = (open_windows(cfg, split, base) for split in ("train", "val"))
        tokenizer = self.train_data.tokenizer
        self.cfg = with_vocabulary(cfg, tokenizer.n_vocab, tokenizer.n_content)
        self.weights = TokenWeights(self.cfg, self.train_data)
        self.facts = data_facts(self.train_data, self.cfg, base) | self.weights.facts
        self.tokenizer_from = base.folder if base else cfg.dataset
        if saved:
            notes += check_resumable(saved, self.cfg, self.facts)
        else:
            has_weights = cfg.init_from not in pretrained.KEYWORDS
            adapters.check_start(self.cfg, self.facts["chunk_markers"], has_weights)
        if not base:
            refuse_idle(self.cfg, self.facts["chunk_markers"])
        notes += messages.warnings(self.cfg, self.train_data.n_windows)
        return saved

    def _is_own(self, saved: Checkpoint | None) -> bool:
        """Returns whether the checkpoint belongs to this run, and not to the one that it branches from."""
        return saved is not None and saved.folder.parent.resolve() == self.run_dir.resolve()

    def _make_model(self, saved: Checkpoint | None) -> None:
        """Builds the model, and loads the weights that the run starts from and the record of how they were trained."""
        cfg = self.cfg
        self.model = GPT(cfg.model, cfg.seed)
        self.step, self.best, self.evaluated, self.guard, self.ending = 0, None, None, BadStepGuard(cfg), Ending(cfg)
        self.earlier = earlier_environments(saved.state) if self._is_own(saved) else []
        self.origin = "scratch"
        self.content_before = 0  # content tokens that the weights were trained on before step 0; None = unknown
        if not saved and cfg.init_from not in pretrained.KEYWORDS:
            markers, positions = markers_of(cfg, self.facts["chunk_markers"]), None
            if cfg.model.meta_position == "previous" and not cfg.task.tasks:
                positions = self.train_data.content_per_window  # markers have no positions of their own
            tokenizer = self.train_data.tokenizer
            self.origin, self.content_before = pretrained.load_into(
                self.model, cfg.init_from, tokenizer, markers, positions, cfg.seed
            )
            adapters.check_second(self.model, cfg)
        adapters.attach(self.model, cfg, self.facts["chunk_markers"])
        if saved:
            saved.load_into(self.model)
            self.step, self.best = saved.step, saved.state["best"]
            self.evaluated = saved.state.get("evaluated", saved.step)
            self.guard = BadStepGuard(cfg, saved.state.get("guard"))
            self.ending = Ending(cfg, saved.state.get("stop_at"), saved.step)
            self.measured = self.inherited = measured_in(saved, cfg, self.facts)
            self.origin = saved.state.get("origin", "unknown")
            self.content_before = checkpoint.content_before(saved.state)
            if not self._is_own(saved):
                self.origin = f"branch of {saved.folder} ({self.origin})"

    def _verify(self) -> str:
        """Verifies the contents of the shards in one process per machine. Returns a sentence saying what was done."""
        cfg, data = self.cfg, self.train_data
        if cfg.task.tasks:
            return "the texts of the tasks are generated during training, so there are no shards to verify"
        if cfg.verify == "full" and self.dist.local_rank == 0:
            say = show if self.dist.is_main else lambda line: None
            return verify(Path(cfg.dataset), data.manifest, data.tokenizer.meta + 1, say)
        return "only the headers and sizes of the shards were verified, not their contents (--verify=header)"

    def _place(self, saved: Checkpoint | None) -> str:
        """Moves the model to its device and makes the optimizer. Returns the reason for the dtype."""
        cfg, dist = self.cfg, self.dist
        self.dtype, why_dtype = pick_dtype(cfg.dtype, dist.device)
        name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type
        self.peak = peak_flops(name) if self.dtype == torch.bfloat16 else None  # in FLOP/s, for the MFU
        self.model.to(dist.device)
        self.model.recompute = cfg.activation_checkpointing
        self.optimizer = Optimizer(self.model, cfg)
        if saved:
            saved.restore(self.optimizer)
        self.objective = self.weights.objective(self.model, dist.device)
        self.scorer = None  # evaluate the eager model
        self.samples = None  # in the main process, what generates samples, which the others do not wait for
        if cfg.sample_interval and dist.is_main:
            run = Run(self.model, self.train_data.tokenizer, cfg, {"data": self.facts}, self.run_dir)
            self.samples = TrainingSamples(run, cfg.sample_prompt, self.dtype)
        return why_dtype

    def _take_folder(self) -> None:
        """Creates and locks the folder of a new run, or tidies the folder of a resumed run."""
        if self.dist.is_main:
            self.lock = self.lock or self.start.new_folder(self.run_dir)
            checkpoint.sweep(self.run_dir, self.step, self.cfg.keep)

    def _introduce(self, notes: list[str], why_dtype: str, no_compile: str | None) -> None:
        """Prints what is trained, on which data, from which weights and on which device."""
        cfg, arm = self.cfg, self.cfg.arm_name(self.facts["chunk_markers"])
        on = f"texts of {', '.join(cfg.task.tasks)}" if cfg.task.tasks else cfg.dataset
        for line in (
            f"{cfg.run_name}: training the {arm} arm on {on}; all files go to {self.run_dir}",
            messages.settings_line(cfg),
            *notes,
            messages.model_line(self.model),
            *self.weights.describe(),
            *messages.data_lines(
                cfg, self.train_data, self.val_data, self.dist.world, self.accumulation, self.tokenizer_from
            ),
            f"device: {self.dist.device}, {str(self.dtype).removeprefix('torch.')} ({why_dtype}), torch.compile "
            f"{'off (' + no_compile + ')' if no_compile else 'on (the first step takes a while)'}",
        ):
            self.log.say(line)

    def read(self, step: int) -> tuple[list[tuple[Batch, dict]], int]:
        """Returns the micro-batches of this process for a step, each with what the objective needs besides, on its
        device, and the number of their scored targets. The copy to a GPU is asynchronous."""
        mine = step_windows(step, self.cfg, self.train_data.n_windows, self.dist.rank, self.dist.world)
        batches = [self.train_data.batch(windows) for windows in mine]
        scored = sum(int((batch.targets >= 0).sum()) for batch in batches)
        beside = [self.weights.beside(*both, step, self.dist.device) for both in zip(batches, mine, strict=True)]
        return [(batch.to(self.dist.device), more) for batch, more in zip(batches, beside, strict=True)], scored

    def train_step(self, stop: bool) -> tuple[float, float, bool]:
        """Makes one update, unless the guard skips it.

        Returns the mean loss of the global batch in nats, the gradient norm, and whether any process passed stop=True.
        The summed loss is divided by the number of scored targets in the global batch. That number differs between
        micro-batches and processes, so averaging their means would give another loss."""
        cfg, dist = self.cfg, self.dist
        batches, scored = self.ahead or self.read(self.step)
        # float64 holds every count exactly, but MPS does not support it
        exact = torch.float32 if dist.device.type == "mps" else torch.float64
        scored, stops = dist.sum(to_device(torch.tensor([scored, stop], dtype=exact), dist.device))

        total = torch.zeros((), device=dist.device)
        for micro, (batch, beside) in enumerate(batches):
            if cfg.model.dropout:
                torch.manual_seed(stable_key(cfg.seed, "dropout", self.step, dist.rank, micro) >> 1)
            last = micro == len(batches) - 1
            # Exchange gradients once per step. DDP reads the no_sync flag in the forward pass, so the forward pass must
            # be inside the with block.
            postpone = dist.has_group and not last
            with self.objective.no_sync() if postpone else nullcontext():
                with autocast(dist.device, self.dtype):
                    weighted, nats = self.weights.add(self.objective(*batch, **beside))
                (weighted * (dist.world / scored).float()).backward()  # undoes the mean that DDP takes over processes
            total += nats
        self.weights.finish(dist, self.model, scored)
        self.norms = norms(self.model) if self.ending.due(self.step + 1, cfg.log_interval) else {}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip or math.inf)
        # Read the next batch, and start to copy it, while the GPU is still computing.
        self.ahead = self.read(self.step + 1) if self.step + 1 < self.ending.last else None
        # This is the only synchronization with the device in a step.
        loss, norm, stops = torch.stack((dist.sum(total / scored), norm.to(scored.dtype), stops)).tolist()
        take, wrong = self.guard.judge(loss, norm)
        if take:
            self.optimizer.step(self.ending.rate(self.step))
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
        self.log.say(messages.bad_step_line(self.step, what, why, windows))

    def evaluate(self, n_windows: int | None, stop: StopFlag, kind: str = "val") -> bool:
        """Evaluates, records the figures, and saves the weights if they are the best so far.

        n_windows: validation windows, None = all. kind: "val", or "final" for the end of the run, which takes the
        result of an evaluation of the same windows after the same step if there was one.
        Returns False, with nothing recorded, if a signal interrupted the evaluation."""
        total = self.val_data.n_windows
        n = min(n_windows or total, total)
        at = {"step": self.step, "windows": n}
        known = kind == "final" and at.items() <= self.measured.items()
        if not known:
            started = time.perf_counter()

            def progress(done: int) -> None:
                self.log.say(messages.progress_line(self.step, done, n, hms(time.perf_counter() - started)))

            shown = progress if n == total else None
            figures = evaluate(self.model, self.val_data, self.cfg, self.dist, n, stop, shown, self.scorer)
            if figures is None:
                return False
            self.measured = {**at, "figures": figures, "eval_s": time.perf_counter() - started}
        figures, took = self.measured["figures"], self.measured["eval_s"]
        if not math.isfinite(figures["loss"]):
            raise diverged(f"the validation loss is {figures['loss']}", self.step, self.run_dir)
        counted = self.train_data.counted(self.step * self.cfg.batch_size)
        self.log.record(kind, self.step, **figures, **counted, eval_s=took)
        better = kind == "val" and self.step > 0 and (self.best is None or figures["loss"] < self.best["loss"])
        if better:
            self.best = {"step": self.step, "loss": figures["loss"], "bits_per_byte": figures["bits_per_byte"]}
        if not known or self.measured is self.inherited:  # else this start has shown the figures already
            unit, tasks = "text" if self.cfg.task.tasks else "window", self.cfg.task.tasks
            packed = None if tasks else self.train_data.manifest["val_text_compressed"]
            scope = f"all {messages.count(n, unit)}" if n == total else f"{n:,} of {messages.count(total, unit)}"
            self.log.say(messages.evaluation_line(self.step, figures, tasks, packed, scope, took, better))
        self.evaluated = self.step
        if kind == "val" and self.ending.judge(self.step, figures):
            reached, share = self.ending.reached, self.cfg.stop_at
            end = reached["end"] or self.cfg.max_steps
            self.log.record("stop_at", self.step, stop_at=share, exact=reached["exact"], end=end)
            self.log.say(messages.stop_at_line(stop_at=share, last=self.ending.last, **reached))
        if better:
            self.save("best")
        return True

    def save(self, kind: str) -> None:
        """Writes a checkpoint. kind: "step" (everything that a resume needs) or "best" (without the optimizer).

        Rank 0 writes while the other processes wait."""
        if self.dist.is_main:
            state = {
                "step": self.step,
                "samples": self.step * self.cfg.batch_size,
                "best": self.best,
                "evaluated": self.evaluated,
                "evaluation": self.measured if self.measured.get("step") == self.step else None,
                "guard": self.guard.state(),
                "stop_at": self.ending.reached,
                "origin": self.origin,
                "content_before": self.content_before,
                "config": to_dict(self.cfg),
                "data": self.facts,
                "environment": environment(),
                "earlier_environments": self.earlier,
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
        if kind == "step":
            self.saved_at = self.step
        self.dist.barrier()

    def run(self) -> None:
        """Trains to the last step, or until a signal arrives, with evaluations and checkpoints on the way."""
        with self.start, self.log:
            self._train(StopFlag())

    def _train(self, stop: StopFlag) -> None:
        cfg, log, due, clock = self.cfg, self.log, self.ending.due, Clock()
        curves = OwnCurves(self.run_dir, log.say, on=cfg.draw_curves and self.dist.is_main)
        stopping = False
        # at the start of a run, or if a signal interrupted the evaluation after this step
        if due(self.step, cfg.eval_interval) and self.evaluated != self.step:
            stopping = not self.evaluate(cfg.eval_windows, stop)
            if self.step == self.ending.last and not stopping:
                self.saved_at = None  # save again, or the next start would not know of this evaluation
        clock.look()
        while self.step < self.ending.last and not stopping:
            rate = self.ending.rate(self.step)
            loss, norm, stopping = self.train_step(stop.raised)
            self.start.succeeded()
            clock.step()
            if due(self.step, cfg.log_interval):
                self._log_step(loss, norm, rate, clock.look(), clock)
            self.guard.check(self.step, f"the last checkpoint in {self.run_dir} ({checkpoint.latest(self.run_dir)})")
            paused = time.perf_counter()
            if due(self.step, cfg.eval_interval) and not stopping:
                stopping = not self.evaluate(cfg.eval_windows, stop)
            if self.samples and due(self.step, cfg.sample_interval) and not stopping:
                log.say(messages.sample_line(self.step, self.samples.text()))
            if due(self.step, cfg.save_interval) or stopping:
                self.save("step")
                curves.draw(last=False)
            clock.pause(time.perf_counter() - paused)
        if self.step == 0:
            raise UserError("stopped by a signal before the first step, so nothing is saved: give the command again.")
        if self.saved_at != self.step:
            self.save("step")
        if not stopping:
            stopping = not self.evaluate(None, stop, kind="final")
        curves.draw(last=True)
        if stopping:
            log.say(f"stopped by a signal after step {self.step:,}, which is saved; continue with --init_from=resume")
        else:
            log.say(f"done in {hms(time.perf_counter() - clock.started)}; the results are in {self.run_dir}")

    def _log_step(self, loss: float, norm: float, rate: float, seconds: float, clock: Clock) -> None:
        cfg, data = self.cfg, self.train_data
        counted, before = (data.counted(step * cfg.batch_size) for step in (self.step, self.step - 1))
        rates = {name: (count - before[name]) / seconds for name, count in counted.items()}
        mfu = {}
        if self.peak:
            T = (counted["positions"] - before["positions"]) // cfg.batch_size
            # The texts of tasks differ in their markers, which are too few to matter here.
            markers = 0 if cfg.task.tasks else T - data.content_per_window
            mfu = {"mfu": utilization(cfg, T, markers, seconds, self.dist.world * self.peak)}
        self.log.record(
            "train",
            self.step,
            loss=finite(loss),
            learning_rate=rate,
            grad_norm=finite(norm),
            **self.weights.figures(),
            **dict(zip(self.norms, map(finite, torch.stack([*self.norms.values()]).tolist()), strict=True)),
            **counted,
            **{f"{name}_per_s": rate for name, rate in rates.items()},
            **mfu,
            elapsed_s=time.perf_counter() - clock.started,
        )
        last = self.ending.last
        eta = hms(seconds * (last - self.step))
        self.log.say(messages.step_line(self.step, last, loss, rate, norm, rates, mfu, eta))


def main(argv: list[str]) -> None:
    with processes() as dist:
        cfg = dist.agree("settings", lambda: load_config(TrainConfig, argv, config_file=True))
        dist.compare("settings of all", agreement.program_and_settings(cfg))
        if cfg.dry_run:
            if dist.is_main:
                print(describe_estimate(cfg, accumulation(cfg, cfg.n_accelerators)))
            return
        if cfg.show_batch is not None:
            accumulation(cfg, dist.world)  # raises UserError if the batch cannot be split
            return show_batch(cfg, dist.world) if dist.is_main else None
        if not cfg.run_name:
            raise UserError("the run has no name: give a config file, such as config/tiny_meta.py, or --run_name=NAME.")
        Trainer(cfg, dist.on(cfg.device)).run()


if __name__ == "__main__":
    run_cli(main)
