"""Measures a trained run.

python eval.py tasks --run=out/recall --lengths 128 256 512          # exact answers to the synthetic tasks
python eval.py perplexity --run=out/recall --lengths 512 1024        # loss, bits per byte, with and without markers
python eval.py perplexity --run=out/recall --lengths 512 4096 --documents   # by depth in long ones; plot.py draws it
python eval.py passkey --run=out/recall --lengths 512 1024           # a number hidden in filler: exact, and its rank
"""

from cli import load_config, run_cli
from config import UserError, nearest_name
from evals import passkey, perplexity, tasks

EVALS = {
    "tasks": (tasks.TasksEval, tasks.main),
    "perplexity": (perplexity.PerplexityEval, perplexity.main),
    "passkey": (passkey.PasskeyEval, passkey.main),
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip() + f"\n\neach of {', '.join(EVALS)} has its own --help")
        return
    name, *rest = argv
    if name not in EVALS:
        raise UserError(f"there is no evaluation {name!r}: {nearest_name(name, list(EVALS))}")
    settings, evaluate = EVALS[name]
    evaluate(load_config(settings, rest))


if __name__ == "__main__":
    run_cli(main)
