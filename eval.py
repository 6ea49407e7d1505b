"""Evaluates a trained run.

python eval.py tasks --run=out/recall --lengths 128 256 512          # accuracy on the synthetic tasks
python eval.py perplexity --run=out/recall --lengths 512 1024        # loss and bits per byte, with and without markers
python eval.py perplexity --run=out/recall --lengths 512 4096 --documents   # loss by depth, for report.py curves
python eval.py passkey --run=out/recall --lengths 512 1024           # recall of a number that is hidden in filler text
python eval.py compression --run=out/tiny_clcr --ratios 0.25 0.5     # loss when a part of the context is forgotten
python eval.py nats --run=out/tiny_gpt2 --dataset=data/stdlib_uniform   # stores a scorer's nats, for weighted losses
python eval.py weights --run=out/tiny_meta --weighting=dense         # the weights of a loss, as colours of a text
python eval.py longppl --run=out/tiny_sr --evaluator=out/tiny_gpt2   # perplexity where a long context matters
"""

from nanometa.config.command_line import run_cli, run_named
from nanometa.evals import compression, longppl, nats, passkey, perplexity, tasks, weights

EVALS = {
    "tasks": (tasks.TasksEval, tasks.main),
    "perplexity": (perplexity.PerplexityEval, perplexity.main),
    "passkey": (passkey.PasskeyEval, passkey.main),
    "compression": (compression.CompressionEval, compression.main),
    "longppl": (longppl.LongpplEval, longppl.main),
    "nats": (nats.NatsEval, nats.main),
    "weights": (weights.WeightsEval, weights.main),
}


def main(argv: list[str]) -> None:
    """Runs the evaluation that the first argument names."""
    run_named(argv, EVALS, "evaluation", __doc__)


if __name__ == "__main__":
    run_cli(main)
