"""Measures the speed and memory of training, decoding and preparing, and compares them with other implementations.

    python bench.py --quick --nanogpt=../nanoGPT           # about five minutes on 2 cores
    python bench.py --nanogpt=../nanoGPT                   # all sections: two hours or more
    python bench.py --only=training --shapes tiny --modes eager --dtypes bf16

Each implementation runs in a process of its own. The processes take turns, after a warm-up. Medians with quartiles are
printed, and the ratios within one run are meaningful even on a busy machine. All results are also written to the folder
--output: results.json, details.png, and bench.png, the comparison with the others.
--nanogpt names a checkout of nanoGPT, which is imported and not changed. Hugging Face's GPT-2 takes part in training if
--hf is given, and in decoding whenever transformers is installed.
"""

import json
from pathlib import Path

from nanometa.benches import decoding, eviction, layer, lengths, preparing, profile, training, weighting
from nanometa.benches.timing import DTYPES, matmul_peak
from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.config.command_line import Parser, path_argument, run_cli
from nanometa.reports import bench_picture
from nanometa.training.distributed import pick_device, why_not_compile
from nanometa.training.run_log import environment

SECTIONS = ("training", "profile", "decoding", "preparing", "layer", "lengths", "eviction", "weighting")
QUICK = {
    "only": ["training", "decoding"],
    "shapes": ["tiny", "small"],
    "modes": ["eager"],
    "batches": [1],
    "contents": [1024],
}


def table(rows: list[dict]) -> str:
    """Returns the rows of a section as a Markdown table."""

    def cell(value) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    shapes = (
        "gpt2: 12 layers of width 768 and 4 windows of 1024 positions; small: 6 layers of width 384 and 8 windows of "
        "256; tiny: 4 layers of width 192 and 8 windows of 512"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="the sections to measure (default: all)"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=training.SHAPES, default=list(training.SHAPES),
        help=f"the models of training, profile and weighting (default: all); {shapes}",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="the number formats (default: all)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("eager", "compiled"),
        default=["eager", "compiled"],
        help="whether training uses torch.compile (default: both)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="texts decoded at once (default: 1 8)")
    parser.add_argument(
        "--contents", nargs="+", type=int, choices=eviction.SIZES, default=list(eviction.SIZES),
        help="for eviction: content tokens in the cache (default: all). The memory of a long prompt is measured with "
        f"{eviction.PROMPT}",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, after two of warm-up (default: 3)")
    parser.add_argument("--nanogpt", type=path_argument, help="the folder of a nanoGPT checkout to compare with")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="changes the defaults: training at the shapes tiny and small without torch.compile, and decoding of 64 "
        "tokens with a batch of 1",
    )
    parser.add_argument(
        "--without", nargs="+", choices=("meta", "nanogpt", training.KEPT), default=[],
        help="implementations that take no part in training, for example because all of them together need more memory "
        "than the machine has",
    )  # fmt: skip
    parser.add_argument("--hf", action="store_true", help="also train Hugging Face's GPT-2")
    parser.add_argument(
        "--output", type=path_argument, default=Path("out/bench"), help="the folder of the results (default: out/bench)"
    )
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name, values in (("repeats", [args.repeats]), ("batches", args.batches)):
        if min(values) < 1:
            raise UserError(f"--{name}={min(values)} leaves nothing to measure: give at least 1.")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output={args.output} is a file: give a folder for results.json and bench.png.")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt={args.nanogpt} has no model.py: give the folder of a nanoGPT checkout.")
    device = pick_device("auto")
    if "compiled" in args.modes and (why := why_not_compile(device)):
        print(f"the compiled mode is left out: {why}")
        args.modes.remove("compiled")
    facts = environment()
    peaks = {name: matmul_peak(DTYPES[name], device) for name in args.dtypes}
    print(", ".join(f"{key} {facts[key]}" for key in ("command", "processor", "threads", "torch", "commit")))
    speeds = ", ".join(f"{name} {peak / 1e12:.2f} TFLOP/s" for name, peak in peaks.items())
    print(f"fastest of five matrix products: {speeds}")
    args.output.mkdir(parents=True, exist_ok=True)

    results: dict[str, list[dict]] = {}
    modules = {
        "training": training, "profile": profile, "decoding": decoding, "preparing": preparing, "layer": layer,
        "lengths": lengths, "eviction": eviction, "weighting": weighting,
    }  # fmt: skip
    for section in SECTIONS:
        if section not in args.only:
            continue
        print(f"\n{section}")
        results[section] = modules[section].bench(args, peaks)
        print(table(results[section]), flush=True)
        for sentence in modules[section].ratios(results[section]):
            print(sentence, flush=True)
        # Save after every section, so that its results remain if the next one is interrupted.
        text = json.dumps({"environment": facts, **results}, indent=1) + "\n"
        write_atomically(args.output / "results.json", text.encode())
        pictures = bench_picture.draw(results, args.output, f"{facts['processor']}, {facts['threads']} threads")
    print(f"\nwrote {', '.join(map(str, [*pictures, args.output / 'results.json']))}")


if __name__ == "__main__":
    run_cli(main)
