"""Checks that the state in a checkpoint has the form that train.py writes."""

from nanometa.common.files import is_count


def check_state(state: dict) -> None:
    """Raises KeyError, TypeError, AttributeError or ValueError if train.py could not have written this state. Its
    settings are checked when Checkpoint.config reads them."""
    best, data, config = state["best"], state["data"], state["config"]
    texts = [data["dataset"], data["tokenizer"], state.get("origin", "")]
    for table in (data["shards"], data["content_sha256"]):
        texts += [text for item in table.items() for text in item]
    counts = [state["step"], data["chunk_content"], data["chunk_markers"], *([] if best is None else [best["step"]])]
    losses = [] if best is None else [best["loss"], best["bits_per_byte"]]
    if "guard" in state:
        counts += [state["guard"]["in_a_row"], state["guard"]["skipped"]]
        losses += state["guard"]["norms"]
    counts += [state[name] for name in ("evaluated", "content_before") if state.get(name) is not None]
    if (evaluation := state.get("evaluation")) is not None:
        counts += [evaluation["step"], evaluation["windows"]]
        losses += [evaluation["eval_s"], evaluation["figures"]["loss"], evaluation["figures"]["bits_per_byte"]]
    if (reached := state.get("stop_at")) is not None:
        counts += [reached["step"], *([] if reached["end"] is None else [reached["end"]])]
        losses.append(reached["exact"])
    if not (all(type(text) is str for text in texts) and all(map(is_count, counts)) and type(config) is dict):
        raise TypeError("a value has the wrong type")
    if not all(type(loss) is float and 0 <= loss < 1e100 for loss in losses):  # false for NaN
        raise TypeError("a loss, a norm or a share is negative, not finite or too large")
    if not 1 <= data["chunk_content"] <= 2**20 or data["chunk_markers"] > 2**20:
        raise ValueError("the size of a chunk is out of range")
    if data["injection"] not in ("uniform", "periodic", "none") or (data["injection"] == "none") != (
        data["chunk_markers"] == 0
    ):
        raise ValueError(f"injection {data['injection']} does not go with {data['chunk_markers']} markers")
