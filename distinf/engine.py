"""Token ids in, token ids out: prefill, decode, generate. Knows nothing of text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from distinf.comm import Group
from distinf.kernels import Kernels, Step
from distinf.kv_cache import KVCache
from distinf.models import Model
from distinf.sampling import SamplingParams, log_probs, sample

# Rows of a prompt that go through the model together: enough to keep a GEMM compute-bound, few enough that
# the widest activation (2 * ffn bf16) of a large model stays in the tens of megabytes.
PREFILL_ROWS = 1024


@dataclass
class Sequence:
    """One request on its way: prompt, what was generated, and when."""

    index: int
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)  # since generate() began
    finish_reason: str | None = None  # "stop" (end of sequence) or "length"

    @property
    def next_position(self) -> int:
        """Position of the token to be chosen next."""
        return len(self.prompt) + len(self.generated)


class Decoder:
    """Decode steps of one batch size over one cache: the first is captured, later ones replay it.

    Between two replays the caches of the cores hold weights and every Python object is far away, so what
    is done there is little: a few numbers written into fixed buffers.
    """

    def __init__(self, model: Model, kernels: Kernels, cache: KVCache, capture: bool) -> None:
        """Without `capture` every step runs eagerly."""
        self._model = model
        self._kernels = kernels
        self._cache = cache
        self._capture = capture
        self._step: Step | None = None
        self.replay_s: list[float] = []  # of each replay: kernels, barriers and collectives, no Python between

    def __call__(self, running: list[Sequence]) -> torch.Tensor:
        """Run the last token of each sequence; logits [B, vocab_local], overwritten by the next call."""
        if self._step is None:
            return self._first(running)
        self._ids[:] = [s.generated[-1] for s in running]
        self._positions[:] = [s.next_position - 1 for s in running]
        self._sequence[:] = [s.index for s in running]
        np.take(self._all_cos, self._positions, axis=1, out=self._cos)
        np.take(self._all_sin, self._positions, axis=1, out=self._sin)
        start = time.perf_counter()
        logits = self._step.replay()
        self.replay_s.append(time.perf_counter() - start)
        return logits

    def _first(self, running: list[Sequence]) -> torch.Tensor:
        ids = torch.tensor([s.generated[-1] for s in running], dtype=torch.int32)
        positions = torch.tensor([s.next_position - 1 for s in running], dtype=torch.int32)
        sequence = torch.tensor([s.index for s in running], dtype=torch.int32)
        table = self._cache.block_table
        batch = self._model.batch(positions, sequence, table, positions + 1)
        if not self._capture:
            return self._model.forward(ids, batch, self._cache, None)
        self._step = self._kernels.record(lambda: self._model.forward(ids, batch, self._cache, None))
        # numpy's views of the buffers that the step reads, and the rotation of every position it can come to.
        everywhere = torch.arange(self._cache.max_length, dtype=torch.int32)
        rotations = self._model.batch(everywhere, torch.zeros_like(everywhere), table, everywhere + 1)
        self._all_cos, self._all_sin = rotations.cos.numpy(), rotations.sin.numpy()
        self._ids, self._positions, self._sequence = ids.numpy(), positions.numpy(), sequence.numpy()
        self._cos, self._sin = batch.cos.numpy(), batch.sin.numpy()
        return self._step.result


class Engine:
    """One model on one group. Every rank calls generate with the same arguments and gets the same tokens."""

    def __init__(
        self, model: Model, kernels: Kernels, group: Group, kv_dtype: torch.dtype, capture: bool = True
    ) -> None:
        """`kv_dtype`: the kernels' act_dtype or int8. `capture`: record the decode step once per batch size and
        replay it (see Decoder).
        """
        self._model = model
        self._kernels = kernels
        self._group = group
        self._kv_dtype = kv_dtype
        self._capture = capture
        self.replay_s: list[float] = []  # of the last generate: see Decoder

    def check(self, prompts: list[list[int]], params: SamplingParams) -> None:
        """Raises ValueError for a prompt that is empty, past the context, or holds ids outside the vocabulary."""
        config = self._model.config
        for prompt in prompts:
            if not prompt:
                raise ValueError("the prompt is empty; expected at least one token")
            if len(prompt) + params.max_new_tokens > config.max_positions:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and --max-new-tokens {params.max_new_tokens} exceed the "
                    f"model's context of {config.max_positions} tokens"
                )
            outside = [t for t in prompt if not 0 <= t < config.vocab]
            if outside:
                raise ValueError(f"token id {outside[0]} is outside the vocabulary of {config.vocab}")

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        on_token: Callable[[Sequence], None] = lambda sequence: None,
    ) -> list[Sequence]:
        """Complete every prompt, all of them in one batch. The caller has called `check`.

        `on_token` is called after each new token of each sequence.
        """
        start = time.perf_counter()
        sequences = [Sequence(i, prompt) for i, prompt in enumerate(prompts)]
        cache = self.new_cache([len(p) + params.max_new_tokens for p in prompts])
        decoders: dict[int, Decoder] = {}

        def decode(running: list[Sequence]) -> torch.Tensor:
            if len(running) not in decoders:
                decoders[len(running)] = Decoder(self._model, self._kernels, cache, self._capture)
            return decoders[len(running)](running)

        def take(running: list[Sequence], logits: torch.Tensor) -> list[Sequence]:
            for sequence, token in zip(running, self._sample(running, logits, params), strict=True):
                sequence.generated.append(token)
                sequence.token_times_s.append(time.perf_counter() - start)
                sequence.finish_reason = self._finished(sequence, params)
                on_token(sequence)
            return [s for s in running if s.finish_reason is None]

        running = take(sequences, self.prefill(sequences, cache))
        for step in itertools.count(1):
            if not running:
                break
            self._group.begin(f"decode step {step}")
            running = take(running, decode(running))
        self._group.begin("after the last token")
        self.replay_s = [s for decoder in decoders.values() for s in decoder.replay_s]
        return sequences

    def score(self, ids: list[int]) -> torch.Tensor:
        """Natural log of the probability of each token of `ids` after those before it: fp64 [len(ids) - 1].

        The same on every rank. The caller has called `check`; nothing is generated.
        """
        context = [Sequence(0, ids[:-1])]
        logits = self.prefill(context, self.new_cache([len(ids) - 1]), all_rows=True)
        return log_probs(logits, self._model.shard.vocab, ids[1:], self._group)

    def prefill(self, sequences: list[Sequence], cache: KVCache, all_rows: bool = False) -> torch.Tensor:
        """Run the prompts, PREFILL_ROWS tokens of them at a time; logits of each last token, [B, vocab_local].

        With `all_rows` logits of every token, [T, vocab_local]: the caller has room for them.
        """
        self._group.begin("prefill")
        ids = torch.tensor([t for s in sequences for t in s.prompt], dtype=torch.int32)
        sequence = torch.tensor([s.index for s in sequences for _ in s.prompt], dtype=torch.int32)
        positions = torch.tensor([p for s in sequences for p in range(len(s.prompt))], dtype=torch.int32)
        lengths = torch.tensor([len(s.prompt) for s in sequences for _ in s.prompt], dtype=torch.int32)
        ends = torch.tensor([len(s.prompt) for s in sequences]).cumsum(0) - 1
        logits = []
        for start in range(0, len(ids), PREFILL_ROWS):
            rows = slice(start, start + PREFILL_ROWS)
            last = None if all_rows else ends[(ends >= start) & (ends < start + PREFILL_ROWS)] - start
            batch = self._model.batch(positions[rows], sequence[rows], cache.block_table, lengths[rows])
            logits.append(self._model.forward(ids[rows], batch, cache, last))
        return torch.cat(logits)

    def _sample(self, running: list[Sequence], logits: torch.Tensor, params: SamplingParams) -> list[int]:
        places = [s.index for s in running], [s.next_position for s in running]
        return sample(logits, self._model.shard.vocab, params, *places, self._group)

    def new_cache(self, max_lengths: list[int]) -> KVCache:
        """Room for one sequence of each length, this rank's heads."""
        config, shard = self._model.config, self._model.shard
        sizes = config.n_layers, len(shard.kv_heads), config.head_dim
        return KVCache(*sizes, max_lengths, self._kv_dtype, config.mla is not None, self._kernels.empty)

    def _finished(self, sequence: Sequence, params: SamplingParams) -> str | None:
        if sequence.generated[-1] in self._model.config.eos_ids and not params.ignore_eos:
            return "stop"
        return "length" if len(sequence.generated) == params.max_new_tokens else None
