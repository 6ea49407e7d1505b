"""Profiles a training step and lists the operators that take the most time."""

from torch.profiler import ProfilerActivity, profile

from nanometa.benches.training import SHAPES, Step, training_step

SHOWN = 12  # how many operators are listed


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures each operator's own time in two eager steps of the arm "none", for the widest of the shapes."""
    shape, rows = max(args.shapes, key=lambda name: SHAPES[name][2]), []
    for dtype in args.dtypes:
        step = training_step(Step("none", dtype, False, SHAPES[shape]))
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
            step()
        found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in found)
        for event in found[:SHOWN]:
            row = {"shape": shape, "dtype": dtype, "operator": event.key, "calls": event.count // 2}
            rows.append(
                row | {"ms a step": event.self_cpu_time_total / 2e3, "share": event.self_cpu_time_total / total}
            )
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns an empty list, because the table already shows everything that this section measures."""
    return []
