"""A small plan of a study, for the tests of studies."""

from pathlib import Path

PLAN = """
[study]
name = "fake"
question = "Does it work?"
lines = "lines.jsonl"
[prepare]
[settings]
pretrain = ["--steps=5"]
finetune = ["--placements target background"]
[measures.text_ablation]
command = "probe.py ablation"
of = "pretrain"
arguments = ["--lengths 1", "--placements text"]
arms = ["M"]
[measures.tasks]
command = "eval.py tasks"
of = "finetune"
arguments = ["--lengths 128 256 512", "--placements target background"]
[arms.M]
label = "meta"
[arms.P]
label = "pause"
pretrain = ["--second_attention=none"]
[arms.O]
label = "oracle"
weights_of = "M"
finetune = ["--visible=marked"]
[arms.G]
label = "gpt2"
placements = { target = "none", background = "none" }
[stages.tuning]
arms = ["M"]
seeds = [7]
variants = { low = ["--learning_rate=1"], high = ["--learning_rate=2"] }
[stages.deciding]
arms = ["M", "P", "O", "G"]
seeds = [1, 2, 3]
fewer = { O = 2 }
[sizes.small]
stages = ["deciding"]
seeds = 1
pretrain = ["--steps=1"]
measures = { tasks = ["--lengths 128"] }
[analysis]
stage = "deciding"
tasks = ["copying"]
placements = ["target", "background"]
lengths = [128, 256, 512]
length = 256
margin = 0.05
gate = { name = "gate", claim = "O - P", first = "O", second = "P", length = 512, above = 0.1 }
contrasts = [
  { name = "H3", claim = "M - P", first = "M", second = "P" },
  { name = "H4", claim = "P - G", first = "P", second = "G" },
]
[[analysis.figures]]
name = "H5"
claim = "bits"
of = "pretrain"
figure = "bits_per_byte"
unit = "bits per byte"
first = "M"
second = "P"
margin = 0.01
[[analysis.figures]]
name = "H2"
claim = "diagonal"
of = "text_ablation"
where = { placement = "text" }
figure = "exact"
unit = "nats"
first = "M"
margin = 0.005
"""


def write_plan(folder: Path) -> Path:
    """Writes the plan into a folder, and returns its path."""
    path = folder / "plan.toml"
    path.write_text(PLAN)
    return path
