"""Reference for layers/rope.py: follows the papers' formulas, one pair of dimensions at a time, in double precision."""

import math


def speed(cfg, d: int, s: float) -> float:
    """Returns the rotation of pair d = 0 .. D/2 - 1 under scale s, in radians per position."""
    D, b, L = cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.block_size / cfg.rope_factor
    theta = b ** (-2 * d / D)
    if cfg.rope_scaling == "pi":
        return theta / s
    if cfg.rope_scaling == "ntk":
        return (b * s ** (D / (D - 2))) ** (-2 * d / D)
    if cfg.rope_scaling == "yarn":
        kept = kept_share(cfg, d, D, b, L)
        return (1 - kept) * theta / s + kept * theta
    return theta


def kept_share(cfg, d: int, D: int, b: float, L: float) -> float:
    """Returns gamma of pair d: equation 18 of the YaRN paper, or the ramp of its code, as cfg.yarn_ramp says."""
    alpha, beta = cfg.yarn_beta_slow, cfg.yarn_beta_fast
    if cfg.yarn_ramp == "paper":
        wavelength = 2 * math.pi * b ** (2 * d / D)
        r = L / wavelength
        return 0.0 if r < alpha else 1.0 if r > beta else (r - alpha) / (beta - alpha)

    def dimension(rotations):
        return D * math.log(L / (rotations * 2 * math.pi)) / (2 * math.log(b))

    low, high = max(math.floor(dimension(beta)), 0), min(math.ceil(dimension(alpha)), D - 1)
    if d <= low:
        return 1.0
    if d >= high:
        return 0.0
    return 1 - (d - low) / (high - low)


def temperature(cfg, s: float) -> float:
    """Returns 1 / t, the factor that multiplies attention scores."""
    if cfg.rope_scaling != "yarn":
        return 1.0
    root = cfg.yarn_attention_factor or (0.1 * math.log(s) + 1 if s > 1 else 1.0)
    return root**2


def scale(cfg, length: int) -> float:
    """Returns the scale s of a query at the end of a text of `length` positions."""
    if cfg.rope_scaling == "none":
        return 1.0
    return max(1.0, length / (cfg.block_size / cfg.rope_factor)) if cfg.rope_dynamic else cfg.rope_factor
