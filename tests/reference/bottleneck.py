"""Reference for probes/bottleneck.py, which trains many bottlenecks at once: trains a single one, text by text."""

import math

import torch
from torch.nn.functional import gelu


def draw(seed: int, C: int, Q: int, Z: int, H: int, gates: float, log_shares: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the initial weights of a bottleneck with C inputs, Q query ids, Z code dimensions and H hidden units.

    gates: scale of the initial query embeddings. log_shares (K,): logarithms of the shares of the K classes."""
    g, K = torch.Generator().manual_seed(seed), len(log_shares)
    w = {"code": torch.randn(C, 2 * Z, generator=g) / C**0.5, "b_code": torch.tensor([0.0] * Z + [-2.0] * Z)}
    w |= {"out": torch.zeros(Z, K), "b_out": log_shares}
    if H == 0:
        return w | {"question": torch.zeros(Q, K)}
    w |= {"question": torch.randn(Q, 2 * H, generator=g) * gates, "inner": torch.randn(Z, H, generator=g) / Z**0.5}
    return w | {"b_inner": torch.zeros(H), "inner_out": torch.zeros(H, K)}


def text_loss(w, h, query, label, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distortion and the rate, in nats, of one text: h (C,), query (q,), label (n,), noise (Z,)."""
    code = h @ w["code"] + w["b_code"]
    mean, sigma = code[: len(code) // 2], torch.exp(code[len(code) // 2 :] / 2)
    posterior, prior = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
    rate = torch.distributions.kl_divergence(posterior, prior).sum()
    z = mean + sigma * noise
    asked = sum((w["question"][k] for k in query.tolist()), torch.zeros(w["question"].size(1)))
    logits = z @ w["out"] + w["b_out"]
    if "inner" in w:
        gate, shift = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        logits = logits + gelu((z @ w["inner"] + w["b_inner"]) * (1 + gate) + shift) @ w["inner_out"]
    else:
        logits = logits + asked
    shares = torch.softmax(logits, dim=0)
    return -torch.stack([torch.log(shares[k]) for k in label.tolist()]).mean(), rate


def trained(train, val, K: int, Q: int, beta: float, seed: int, kind: str, how) -> tuple[dict, int]:
    """Trains one bottleneck on train and selects the epoch by its loss on val; both are (states, query, labels).

    Returns the weights of the best epoch, and the number of that epoch.
    """
    counts = torch.tensor([1.0 + sum(k == c for c in train[2].flatten().tolist()) / train[2].size(1) for k in range(K)])
    log_shares = torch.log(counts / counts.sum())
    w = draw(seed, train[0].size(1), Q, how.z_dim, how.hidden, how.gates, log_shares)
    w = {name: p.clone().requires_grad_() for name, p in w.items()}
    g = torch.Generator().manual_seed(seed + 1_000_003)
    order, val_order = torch.randperm(len(train[0]), generator=g), torch.randperm(len(val[0]), generator=g)
    if kind == "shuffled":
        train, val = (*train[:2], train[2][order]), (*val[:2], val[2][val_order])
    noise_scale = 1.0 if kind == "bottleneck" else 0.0
    val_noise = torch.randn(len(val[0]), how.z_dim, generator=g)

    def loss(data, texts, noise):
        out = 0.0
        for i, eps in zip(texts, noise, strict=True):
            D, R = text_loss(w, *(x[i] for x in data), eps * noise_scale)
            out = out + (D + beta * R) / len(texts)
        return out

    def val_loss():
        with torch.no_grad():
            return float(loss(val, range(len(val[0])), val_noise))

    decays = ({"params": [p], "weight_decay": 0.0 if name[:2] == "b_" else how.weight_decay} for name, p in w.items())
    optimizer = torch.optim.AdamW(list(decays))
    least, best, at = val_loss(), {name: p.detach().clone() for name, p in w.items()}, 0
    steps = len(train[0]) // how.batch
    for epoch in range(1, how.epochs + 1):
        order = torch.randperm(len(train[0]), generator=g).tolist()
        for step in range(steps):
            share = ((epoch - 1) * steps + step) / (how.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * (1 - share)
            optimizer.zero_grad()
            noise = torch.randn(how.batch, how.z_dim, generator=g)
            loss(train, order[step * how.batch : (step + 1) * how.batch], noise).backward()
            optimizer.step()
        now = val_loss()
        if now < least:
            least, best, at = now, {name: p.detach().clone() for name, p in w.items()}, epoch
        elif epoch - at >= how.patience:
            break
    return best, at


def envelope(points: list[tuple[float, float]], rate: float) -> float:
    """Returns the least distortion at an average rate of at most `rate`, over all mixtures of two of the points."""
    out = math.inf
    for r, d in points:
        out = min(out, d) if r <= rate else out
        for r2, d2 in points:
            if r <= rate < r2:
                out = min(out, d + (d2 - d) * (rate - r) / (r2 - r))
    return out


def paper_head(h, y, beta: float, weights: dict, order: list[int], noises: list, learning_rate: float):
    """Trains the paper's bottleneck on single texts in a given order, with a given noise (Z,) at each step.

    h (N, C), y (N,); weights: initial values, of which a copy is trained. Returns a function of a state (C,), a label
    and a noise, which gives distortion and rate."""
    C, V = weights["code"].size(0), weights["out"].size(1)
    code, out = torch.nn.Linear(C, weights["code"].size(1)), torch.nn.Linear(weights["out"].size(0), V)
    with torch.no_grad():
        for layer, name in ((code, "code"), (out, "out")):
            layer.weight.copy_(weights[name].T)
            layer.bias.copy_(weights[f"{name}_bias"])

    def losses(state, label, noise):
        mean, log_variance = code(state).chunk(2)
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        rate = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
        return -out(mean + noise * posterior.scale).log_softmax(0)[label], rate

    optimizer = torch.optim.Adam([*code.parameters(), *out.parameters()], lr=learning_rate)
    for i, noise in zip(order, noises, strict=True):
        optimizer.zero_grad()
        distortion, rate = losses(h[i], y[i], noise)
        (distortion + beta * rate).backward()
        optimizer.step()
    return losses
