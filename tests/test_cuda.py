"""The GPU rank's ops, run on the CPU: everything but graphs, streams and pinned memory, which need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distinf import LLM, SamplingParams, llm
from distinf.kernels.cuda import CudaKernels
from distinf.kernels.formats import FORMATS
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.stream import Streamer

PROMPTS = [[5, 6, 7], list(range(100, 170))]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize("memory_bytes", [float("inf"), 200_000, 0], ids=["resident", "some", "streamed"])
def test_tokens_are_those_of_the_reference(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: float
) -> None:
    expected = [c.token_ids for c in LLM(str(tiny_llama), dtype="fp32", threads=1).generate(PROMPTS, PARAMS)]
    kernels = CudaKernels(CPU, torch.float32, memory_bytes)
    monkeypatch.setattr(llm, "load_kernels", lambda run, rank, placement: kernels)
    model = LLM(str(tiny_llama), dtype="fp32", threads=1)
    for _ in range(2):
        assert [c.token_ids for c in model.generate(PROMPTS, PARAMS)] == expected
    streamed = len(kernels._streamer.order)
    assert streamed == {float("inf"): 0, 0: 4 * 3 + 1}.get(memory_bytes, streamed)
    assert memory_bytes != 200_000 or 0 < streamed < 4 * 3 + 1


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("memory_bytes", [float("inf"), 0])
def test_linear_of_every_weight_format(dtype: str, memory_bytes: float) -> None:
    """Against the reference: activations and dequantised weights are rounded to bf16, 2^-9 each, and sums add up."""
    weight, x, bias = torch.randn(48, 96), torch.randn(5, 96).bfloat16(), torch.randn(48)
    reference, kernels = ReferenceKernels(torch.bfloat16, 1), CudaKernels(CPU, torch.bfloat16, memory_bytes)
    expected = reference.linear(x, reference.pack(weight, FORMATS[dtype]), bias, torch.float32)
    found = kernels.linear(x, kernels.pack(weight, FORMATS[dtype]), bias, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 2**-8 * float(expected.abs().max()))


def test_streamed_tensors_come_back_in_any_order() -> None:
    streamer = Streamer(CPU)
    data = [torch.full((i + 1, 3), float(i)) for i in range(4)]
    kept = [streamer.keep(x) for x in data]
    for i in [0, 1, 2, 3, 0, 1, 3, 2, 2, 0]:
        assert torch.equal(streamer.use(kept[i]), data[i])
        assert streamer._coming is kept[(i + 1) % len(kept)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"--device cuda:0: torch .* finds 0 CUDA devices on this host"):
        LLM(devices=["cuda"])
    with pytest.raises(ValueError, match=r"--gpu-stream-all is about a GPU"):
        LLM(gpu_stream_all=True)
