"""Generates the sample texts that train.py prints during a run (--sample_interval)."""

import torch

from nanometa.common.errors import UserError
from nanometa.inference.generation import MarkerPlan, generate, lay_out, prepare_weights
from nanometa.training.checkpoint import Run
from nanometa.training.distributed import autocast

NEW_TOKENS = 64  # content tokens that a sample adds to the prompt


class TrainingSamples:
    """Continues one prompt with the present weights of a model that is being trained.

    The samples of a run use the same random numbers, so they differ only by the weights. Neither the model nor the
    global random generators are changed."""

    def __init__(self, run: Run, prompt: str, dtype: torch.dtype):
        """run: the model in training, with the facts of its data in state["data"]. prompt: text, which may contain
        markers; "" starts a document. dtype: precision of training. Raises UserError if the model cannot continue the
        prompt."""
        self._run, self._plan, self._dtype = run, MarkerPlan.of_run(run), dtype
        try:
            self._prompt = lay_out(run, run.tokenizer.encode_prompt(prompt), self._plan)
            generate(run, self._prompt, self._plan, NEW_TOKENS)  # raises before it generates anything
        except UserError as error:
            raise UserError(f"sample_prompt={prompt!r} cannot be continued: {error}") from error

    def text(self) -> str:
        """Returns the prompt and NEW_TOKENS content tokens, without markers.

        A failure must not end the run, so the text is then a sentence that says why there is no sample."""
        tokenizer = self._run.tokenizer
        try:
            with autocast(self._run.model.wte.weight.device, self._dtype):
                weights = prepare_weights(self._run)
                weights.model.eval()  # a copy of the modules that shares the parameters: training goes on with dropout
                new = list(generate(self._run, self._prompt, self._plan, NEW_TOKENS, weights=weights))
        except Exception as error:  # logits that are not finite, too little memory
            return f"(none: {error})"
        ids = [*self._prompt[self._prompt.index(tokenizer.eot) + 1 :], *new]
        return tokenizer.decode(token for token in ids if token < tokenizer.n_content)
