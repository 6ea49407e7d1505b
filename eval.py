"""Measures a trained run.

python eval.py tasks --run=out/recall --lengths 128 256 512          # exact answers to the synthetic tasks
python eval.py perplexity --run=out/recall --lengths 512 1024        # loss, bits per byte, with and without markers
python eval.py perplexity --run=out/recall --lengths 512 4096 --documents   # by depth; report.py curves draws it
python eval.py passkey --run=out/recall --lengths 512 1024           # a number hidden in filler: exact, and its rank
"""

from nanometa.config.command_line import run_cli, run_named
from nanometa.evals import passkey, perplexity, tasks

EVALS = {
    "tasks": (tasks.TasksEval, tasks.main),
    "perplexity": (perplexity.PerplexityEval, perplexity.main),
    "passkey": (passkey.PasskeyEval, passkey.main),
}


def main(argv: list[str]) -> None:
    run_named(argv, EVALS, "evaluation", __doc__)


if __name__ == "__main__":
    run_cli(main)
