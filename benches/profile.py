"""Where the time of a training step goes, operator by operator."""

from torch.profiler import ProfilerActivity, profile

from nanometa.benches.training import SHAPES, Step, training_step

SHOWN = 12  # operators, the longest


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Our plain arm, eager, at the largest of the shapes asked for: an operator's own time in two steps."""
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
    return []
