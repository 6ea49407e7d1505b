"""Configuration of a GPT-2 with meta-tokens (markers) and a second attention, and the places of its markers."""

from transformers import PretrainedConfig


class NanoMetaConfig(PretrainedConfig):
    """Describes the model, and where its markers stand.

    `marker_placement` may be changed when the model is loaded:
        implicit  Input ids are text alone. `forward` inserts the markers by the rule of `marker_injection`, and returns
                  logits for the text tokens only. Tools that know nothing of markers get the right scores.
        explicit  Input ids contain the markers. `generate` forces them at the places of the rule.
        none      Nothing is inserted or forced. Input ids may contain markers."""

    model_type = "nanometa"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=64,
        content_vocab_size=62,  # ids below this one can be predicted
        marker_id=None,  # None: the model was trained without markers
        n_positions=64,  # text tokens that fit into the window
        window=64,  # positions, markers included
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_inner=128,
        bias=False,
        dropout=0.0,
        position="learned",  # or rope
        meta_position="same",  # the position of a marker: same, none, none_first or none_second
        second_connects="nothing",  # what the second attention connects: markers, random, all or nothing
        second_window=None,  # how many connected positions each one attends to; None: all before it
        second_others="nothing",  # what all other positions get: nothing, mean or read
        random_positions=None,  # the positions that second_connects="random" connects
        rotary_base=10000.0,
        rotary_scaling="none",  # none, pi, ntk or yarn
        rotary_factor=1.0,
        rotary_original_window=64,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_ramp="code",
        yarn_attention_factor=None,
        target_rule="ignore",  # ignore: a marker predicts its successor; skip: the text token before the markers does
        marker_placement="none",
        marker_injection="none",  # uniform or periodic: `marker_count` markers among every `marker_content` text tokens
        marker_content=1,
        marker_count=0,
        marker_key=0,  # key of the random places
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.content_vocab_size = content_vocab_size
        self.marker_id = marker_id
        self.n_positions = n_positions
        self.window = window
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_embd = n_embd
        self.n_inner = n_inner
        self.bias = bias
        self.dropout = dropout
        self.position = position
        self.meta_position = meta_position
        self.second_connects = second_connects
        self.second_window = second_window
        self.second_others = second_others
        self.random_positions = random_positions
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.rotary_factor = rotary_factor
        self.rotary_original_window = rotary_original_window
        self.yarn_beta_fast = yarn_beta_fast
        self.yarn_beta_slow = yarn_beta_slow
        self.yarn_ramp = yarn_ramp
        self.yarn_attention_factor = yarn_attention_factor
        self.target_rule = target_rule
        self.marker_placement = marker_placement
        self.marker_injection = marker_injection
        self.marker_content = marker_content
        self.marker_count = marker_count
        self.marker_key = marker_key
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class MarkerPlan:
    """The places of markers: a text consists of chunks of C text tokens and M markers, placed by a rule."""

    def __init__(self, injection: str, C: int, M: int, key: int):
        self.injection, self.C, self.M, self.key = injection, C, M if injection != "none" else 0, key
        self.flags: list[bool] = []  # whether a position holds a marker, for all chunks that were needed so far

    def chunk(self, number: int) -> list[bool]:
        """Returns which of the C + M positions of a chunk hold markers."""
        n = self.C + self.M
        if self.M == 0:
            return [False] * n
        if self.injection == "periodic":
            places = {(i * n) // self.M - 1 for i in range(1, self.M + 1)}
        else:  # uniform: the M places with the smallest random numbers
            places = set(sorted(range(n), key=lambda place: random_bits(self.key, number * n + place))[: self.M])
        return [place in places for place in range(n)]

    def until(self, n_text: int) -> list[bool]:
        """Returns the flags of at least all positions up to that of text token number n_text, the first being 0."""
        while len(self.flags) < (n_text // self.C + 1) * (self.C + self.M):
            self.flags += self.chunk(len(self.flags) // (self.C + self.M))
        return self.flags


def random_bits(key: int, counter: int) -> int:
    """Returns output number `counter` of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) seeded with `key`."""
    low = 2**64 - 1
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & low
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & low
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
    return z ^ (z >> 31)
