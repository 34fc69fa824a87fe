"""Prints, on rank 0, a digest of every logit of every rank over a prompt and 24 decode steps: python FILE MODEL COMM."""

from __future__ import annotations

import hashlib
import sys

from distinf import LLM, comm
from distinf.engine import Decoder, Sequence

path, name = sys.argv[1:]
llm = LLM(path, group=comm.init(name))
digest = hashlib.sha256()
sequence = Sequence(0, [(37 * i + 11) % 199 for i in range(150)])
cache = llm.engine.new_cache([180])
logits = llm.engine.prefill([sequence], cache)
decoder = Decoder(llm.loaded.model, llm.loaded.kernels, cache, capture=True)
for step in range(24):
    for part in llm.group.all_gather_object(logits.numpy().tobytes()):
        digest.update(part)
    sequence.generated.append((7 * step + 3) % 199)
    logits = decoder([sequence])
if llm.group.rank == 0:
    print(llm.group.name, digest.hexdigest())
