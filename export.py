"""Exports a trained run to Hugging Face transformers.

python export.py --run=out/quickstart --output=out/hf                # markers are inserted by the exported model
python export.py --run=out/quickstart --markers=explicit             # prompts contain the markers
python export.py --run=out/tiny_meta --rope_scaling=yarn --rope_factor=4          # a longer window
python export.py --run=out/quickstart --push_to_hub=USER/NAME        # uploads it, too
python export.py --run=out/tuned --adapter                            # what --train_only=lora trained, for peft

The folder also contains tasks for lm-eval, which run offline, and a model card that says how to use it.
"""

from nanometa.config.command_line import load_config, run_cli
from nanometa.interop.export import ExportConfig, export


def main(argv: list[str]) -> None:
    export(load_config(ExportConfig, argv))


if __name__ == "__main__":
    run_cli(main)
