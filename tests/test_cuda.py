"""The GPU rank's ops on a stand-in in host memory: streams, graphs and missing memory too, but no GPU's arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distinf import LLM, SamplingParams, llm
from distinf.kernels.cuda import CudaKernels
from distinf.kernels.formats import FORMATS, Format, Numbers, quantise
from distinf.kernels.gpu import Gpu
from distinf.kernels.reference import ReferenceKernels
from distinf.kernels.stream import Stored, WeightStore, buffer_bytes, buffer_of, check_limit, resident
from tests import kernel_cases as cases
from tests.families import CASES, RECIPES, prompt_of
from tests.support.host_gpu import HostGpu

PROMPTS = [[5, 6, 7], list(range(100, 170))]
PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)

LoadsOn = Callable[..., LLM]


def kernels_on(gpu: HostGpu, act_dtype: torch.dtype = torch.float32, *how: Any) -> CudaKernels:
    return CudaKernels(cast(Gpu, gpu), act_dtype, 1, *how)


@pytest.fixture
def load_on(monkeypatch: pytest.MonkeyPatch) -> LoadsOn:
    """load_on(kernels, path, dtype="fp32", ...) -> a model on one rank with these kernels."""

    def load(kernels: CudaKernels, path: Path, dtype: str = "fp32", **how: Any) -> LLM:
        with monkeypatch.context() as patch:
            patch.setattr(llm, "rank_kernels", lambda run, rank, placement: kernels)
            return LLM(str(path), dtype=dtype, threads=1, **how)

    return load


def tokens(model: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [c.token_ids for c in model.generate(prompts, PARAMS)]


@pytest.mark.parametrize("name, case", CASES)
def test_tokens_of_every_family_are_the_references(name: str, case: str, tmp_path: Path, load_on: LoadsOn) -> None:
    RECIPES[name][case](tmp_path)
    prompts = [prompt_of(5), prompt_of(70)]
    expected = tokens(LLM(str(tmp_path), dtype="fp32", threads=1), prompts)
    total = 0
    for part in (1, 0.9, 0):
        gpu = HostGpu()
        kernels = kernels_on(gpu, torch.float32, part * total or None, part == 0)
        model = load_on(kernels, tmp_path)
        assert tokens(model, prompts) == expected, part
        total = kernels.store.bytes
        layers = model.config.n_layers + 1  # and the head
        passes = 2 + PARAMS.max_new_tokens - 1  # one for each prefix is eager, the others replay what was captured
        assert len(gpu.copies) in (
            range((passes - 1) * layers * (part == 0), passes * layers + 1) if part < 1 else (0,)
        )
        assert gpu.graphs > (layers if part == 0 else 0)


class OneDevice(TorchDispatchMode):
    """Refuses ops on tensors of the host and the device together: a GPU copies, or says no, where this would work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        assert len({x.device.type for x in tensors}) < 2, func
        return func(*args, **(kwargs or {}))


class NoHost:
    """A CudaStep in its capturing pass."""

    capturing = True

    def input(self, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.empty_like(source(), device="meta")

    def buffer(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()

    def host_part(self, part: Callable[[], object]) -> None:
        pass

    def reads_group(self, group: int) -> None:
        pass


class ShapesOnly(HostGpu):
    """A device whose numbers nobody can know: ops that wait for one of them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")

    def host_buffer(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.T, out_dtype=torch.float32)


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "bf16") for name in RECIPES), ("llama", "w8a8"), ("llama", "int4"), ("deepseek_v3", "int4")],
)
def test_a_captured_step_needs_nothing_of_the_host(name: str, dtype: str, tmp_path: Path, load_on: LoadsOn) -> None:
    """Decode steps, and prompts but for their known lengths: every op on the device alone."""
    RECIPES[name][next(iter(RECIPES[name]))](tmp_path)
    kernels = kernels_on(ShapesOnly(), torch.bfloat16, None, True)
    model = load_on(kernels, tmp_path, dtype=dtype, group_size=0 if dtype == "int4" else None)
    forward, cache = model.loaded.model.forward, model.engine.new_cache([70, 70])
    kernels._step = cast(Any, NoHost())
    for positions, sequence, last in (([3, 66], [0, 1], None), ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1], None)):
        ids, sequences = torch.tensor(positions, dtype=torch.int32), torch.tensor(sequence, dtype=torch.int32)
        batch = model.loaded.model.batch(ids, sequences, cache.block_table, ids + 1)
        with OneDevice():
            logits = forward(ids, batch, cache, last)
        assert logits.shape == (len(ids), model.config.vocab) and logits.dtype == torch.float32


@pytest.mark.parametrize("form", [FORMATS["bf16"], *cases.QUANTISED, *cases.OWN_GRIDS], ids=str)
def test_every_weight_format_is_multiplied_as_bf16(form: Format) -> None:
    """One-hot rows find the weights that the numbers stand for, rounded once; so do those that come ready."""
    torch.manual_seed(0)
    n, k = 40, 128
    kernels, packer = kernels_on(HostGpu(), torch.bfloat16), None
    if form in cases.OWN_GRIDS:
        groups = k // (form.group or k)
        grid = [torch.rand(n, groups).to(form.scales).float() for _ in range(1 + form.zero_points)]
        numbers = Numbers(torch.randint(1 << form.bits, (n, k), dtype=torch.uint8), *grid)
        expected, packer = numbers.dequantised(form), kernels.packer(n, k, form)
        for place in (slice(32, None), slice(0, 32)):
            packer.add(place.start, Numbers(*(x[place] for x in (numbers.number, *grid))))
        weight = packer.weight()
    else:
        rows = torch.randn(n, k).bfloat16()
        expected = quantise(rows, form) if form.bits < 16 else rows
        weight = kernels.pack(rows, form)
    found = kernels.linear(torch.eye(k).bfloat16(), weight, None, torch.float32).T
    assert torch.equal(found, expected.bfloat16().float())
    assert weight.nbytes == form.nbytes(n, k)


@pytest.mark.parametrize("fails_at", [{3}, {13, 14}, {30}, {5, 20, 31}, set(range(26, 60))], ids=str)
def test_missing_memory_makes_resident_weights_streamed(
    fails_at: set[int], tiny_llama: Path, load_on: LoadsOn, caplog: pytest.LogCaptureFixture
) -> None:
    """13 GEMMs a pass: the prompts', the first step's, those that are captured; a later capture after each lowering."""
    expected = tokens(LLM(str(tiny_llama), dtype="fp32", threads=1))
    gpu = HostGpu()
    model = load_on(kernels_on(gpu), tiny_llama)
    gpu.fails_at = fails_at
    if len(fails_at) > 30:  # more often than there are weights to give up
        with pytest.raises(torch.OutOfMemoryError):
            tokens(model)
        return
    assert tokens(model) == expected
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(fails_at)
    told = (
        r"distinf: a GPU of host memory is out of memory: \S+ GB of weights stay there, \S+ GB are streamed from now on"
    )
    assert all(re.fullmatch(told, line) for line in lines)
    assert tokens(model) == expected and len(caplog.records) == len(fails_at)


def test_a_step_that_was_captured_is_captured_again_when_weights_have_moved(tiny_llama: Path, load_on: LoadsOn) -> None:
    expected = tokens(LLM(str(tiny_llama), dtype="fp32", threads=1))
    gpu = HostGpu()
    kernels = kernels_on(gpu)
    model = load_on(kernels, tiny_llama)
    given: list[int] = []

    def move(sequence: Any) -> None:
        given.append(sequence.generated[-1])
        if len(given) in (5, 7):  # in the midst of replays
            assert kernels.store.lower()

    found = model.engine.generate(PROMPTS, PARAMS, move)
    assert [s.generated for s in found] == expected
    assert gpu.graphs > 2 and gpu.copies


def test_streamed_weights_come_in_any_order() -> None:
    """Odd and even numbers of groups: each group's own numbers, whatever was read before, and the next one's copy."""
    for n in (1, 2, 3, 5):
        gpu = HostGpu()
        store = WeightStore(cast(Gpu, gpu), stream_all=True)
        weights = [Stored([torch.full((i + 1, 3), float(i)), torch.tensor([i], dtype=torch.uint8)]) for i in range(n)]
        store.arrange([[w] for w in weights])
        for i in [*range(n), *range(n), 0, n - 1, n // 2, n // 2, 0]:
            group = store.group_of(weights[i])
            assert group == i
            store.turn_to(i)
            assert weights[i].tensors is not None and torch.equal(
                weights[i].tensors[0], torch.full((i + 1, 3), float(i))
            )
            assert weights[i].tensors[1].tolist() == [i]
            if n > 1:
                assert store._coming is not None and store._coming[0] == (i + 1) % n


def test_groups_that_follow_each_other_have_different_buffers() -> None:
    for n in range(2, 12):
        for smallest in range(n):
            sizes = [10 - (i == smallest) for i in range(n)]
            used = buffer_of(sizes)
            assert all(used[i] != used[i - 1] for i in range(n)), (n, smallest)
            assert n == 2 or buffer_bytes(sizes) == ([10, 10] if n % 2 == 0 else [10, 10, 9])
    assert buffer_of([5]) == [0] and buffer_bytes([0, 5, 0, 4]) == [5, 4] and buffer_bytes([0]) == []


def test_layers_stream_alike_within_the_limit() -> None:
    groups = [[4, 2]] * 6 + [[3]]
    assert len(resident(groups, 39)) == 13 and resident(groups, 38) != resident(groups, 39)
    for limit in range(15, 39):
        kept = resident(groups, limit)
        streamed = [sum(size for i, size in enumerate(group) if (g, i) not in kept) for g, group in enumerate(groups)]
        assert sum(groups[g][i] for g, i in kept) + sum(buffer_bytes(streamed)) <= limit, limit
        of_places = [sum(i == place for _, i in kept) for place in range(2)]
        assert of_places[0] >= min(6, of_places[1]), (limit, kept)  # the first of every layer, then the second
    assert kept and not resident(groups, 14)
    check_limit([6] * 6 + [3], 15)
    with pytest.raises(
        ValueError, match=r"--gpu-memory-gb 1.4e-08: the GPU's share takes .* expected that, or a smaller"
    ):
        check_limit([6] * 6 + [3], 14)
    check_limit([6, 0, 0], 6)


def test_what_does_not_fit_the_device_is_streamed_without_a_flag(tiny_llama: Path, load_on: LoadsOn) -> None:
    gpu = HostGpu(memory_bytes=1_400_000)
    kernels = kernels_on(gpu)
    model = load_on(kernels, tiny_llama)
    assert tokens(model) == tokens(LLM(str(tiny_llama), dtype="fp32", threads=1))
    assert kernels.store._kept and kernels.store._groups
    assert kernels.store._used_bytes() <= 1_400_000


def test_bad_flags_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"--gpu-stream-all is about a GPU; expected --device cuda"):
        LLM(gpu_stream_all=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda:0: torch .* finds 0 CUDA devices on this host"):
            LLM(devices=["cuda"])


def test_a_limit_below_a_layers_share_is_refused_before_loading(tiny_llama: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(llm, "rank_kernels", lambda run, rank, placement: kernels_on(HostGpu()))
    monkeypatch.setattr(llm, "load_weights", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"--gpu-memory-gb 0.0001: the GPU's share takes 0.002 GB, and streaming it"):
        LLM(str(tiny_llama), dtype="fp32", threads=1, devices=["cuda"], gpu_memory_gb=1e-4)


@pytest.mark.parametrize("name, vectors", [("rms_norm", 1), ("layer_norm", 2)])
def test_what_a_norm_adds_is_added_once_however_often_the_norm_is_tried(
    name: str, vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, op, failures = kernels_on(HostGpu()), getattr(ReferenceKernels, name), [1, 2]
    kernels.arrange([[kernels.pack(torch.ones(64, 64), FORMATS["fp32"])] for _ in range(6)])
    x, add, weights = torch.randn(2, 8), torch.randn(2, 8), [torch.randn(8)] * vectors
    expected_x = x.clone()
    expected = op(kernels_on(HostGpu()), expected_x, *weights, 1e-5, add)

    def short_of_memory(*args: Any) -> torch.Tensor:
        if failures:
            raise torch.OutOfMemoryError(f"number {failures.pop()}")
        return cast(torch.Tensor, op(*args))

    monkeypatch.setattr(ReferenceKernels, name, short_of_memory)
    assert torch.equal(getattr(kernels, name)(x, *weights, 1e-5, add), expected)
    assert torch.equal(x, expected_x) and not failures
