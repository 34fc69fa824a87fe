"""Checkpoints that are quantised already: what is packed is the matrix that their own integers and scales stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.kernels import extension, native
from distinf.kernels.formats import FORMATS, Format, Numbers, quantised
from distinf.kernels.reference import ReferenceKernels
from distinf.llm import load_model
from distinf.plan import Plan
from distinf.shard import PhaseShares
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.load import Loader, load_weights
from distinf.weights.safetensors import read_directory
from distinf.weights.strips import Strips
from tests import checkpoint_files as files

FP16, FP32 = torch.float16, torch.float32

# name -> quantization_config and linears, and the format that keeps their numbers.
DIRECTORIES: dict[str, tuple[Any, Format | None]] = {
    "gptq": (files.gptq(True), replace(FORMATS["int4"], group=64, scales=FP16)),
    "gptq-v2": (files.gptq(True, version="gptq_v2"), replace(FORMATS["int4"], group=64, scales=FP16)),
    "gptq-channel": (files.gptq(True, group=-1), replace(FORMATS["int4"], group=0, scales=FP16)),
    "gptq-zeros": (files.gptq(False), replace(FORMATS["int4"], group=64, scales=FP32, zero_points=True)),
    "gptq-act-order": (files.gptq(False, act_order=True), None),
    "gptq-group-16": (files.gptq(True, group=16), None),
    "awq": (files.awq(), replace(FORMATS["int4"], group=64, scales=FP32, zero_points=True)),
    "w8a8": (files.compressed("int-quantized", 0, True), FORMATS["w8a8"]),
    "w8a8-fp32": (files.compressed("int-quantized", 0, True, FP32), replace(FORMATS["w8a8"], scales=FP32)),
    "w8a16-group": (files.compressed("int-quantized", 128, False), replace(FORMATS["int8"], group=128)),
    "w4a16": (files.compressed("pack-quantized", 32, False), FORMATS["int4"]),
    "fp8": (files.fp8((128, 128)), None),
    "fp8-edges": (files.fp8((96, 80), torch.bfloat16), None),
    "fp8-tensor": (files.fp8(None), None),
    "fp8-channel": (files.compressed_fp8("channel", (1, 0)), None),
    "fp8-compressed": (files.compressed_fp8("tensor"), None),
    "fp8-block": (files.compressed_fp8("block", (128, 128)), None),
}
GGUF_KEPT = {
    Kind.Q8_0: replace(FORMATS["int8"], group=32, scales=FP16),
    Kind.Q4_0: replace(FORMATS["int4"], group=32, scales=FP16),
    Kind.Q4_1: replace(FORMATS["int4"], group=32, scales=FP16, zero_points=True),
}
GGUF_KINDS = [Kind.F32, Kind.F16, Kind.BF16, *GGUF_KEPT, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
CASES = [*DIRECTORIES, *(kind.name for kind in GGUF_KINDS)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint, its matrices by name, and the format that keeps their numbers."""
    directory = tmp_path_factory.mktemp("checkpoint")
    if request.param in DIRECTORIES:
        (config, linear), form = DIRECTORIES[request.param]
        matrices = files.write_directory(directory, config, linear)
        return open_checkpoint(directory, "auto", None, None), matrices, form
    kind = Kind[request.param]
    path = directory / "model.gguf"
    matrices = files.write_gguf(path, kind)
    return open_checkpoint(path, "auto", None, None), matrices, GGUF_KEPT.get(kind)


def test_dequantised_is_the_definition_to_the_bit(case: tuple[Checkpoint, dict[str, torch.Tensor], Any]) -> None:
    checkpoint, matrices, _ = case
    for name, matrix in matrices.items():
        assert checkpoint.shape(name) == matrix.shape
        assert torch.equal(checkpoint.read(name, FP32), matrix), name
        rows, columns = range(5, 101), range(37, 203)
        assert torch.equal(checkpoint.read(name, FP32, rows, columns), matrix[5:101, 37:203]), name


def test_kept_numbers_are_the_definition_to_the_bit(case: tuple[Checkpoint, dict[str, torch.Tensor], Any]) -> None:
    checkpoint, matrices, form = case
    for name, matrix in matrices.items():
        assert checkpoint.stored(name) == form
        if form is not None:
            rows, columns = range(32, 96), range(128, 256)
            found = checkpoint.numbers(name, rows, columns).dequantised(form)
            # scale * (number - zero) in one rounding, or in two that cancel to it.
            torch.testing.assert_close(found, matrix[32:96, 128:256], rtol=0, atol=0)


@pytest.mark.parametrize(
    "form", [FORMATS["int8"], FORMATS["int4"], replace(FORMATS["int4"], zero_points=True)], ids=str
)
def test_packing_numbers_equals_quantising_to_them(form: Format) -> None:
    """Byte by byte, where both can express the same."""
    if not extension.available_isas():
        pytest.skip("no native kernels")
    kernels = native.NativeKernels(extension.resolve_isa("auto"), [-1], True)
    torch.manual_seed(0)
    weight = torch.randn(100, 128).bfloat16()
    number, scale, offset = quantised(weight, form)
    numbers = Numbers(number.flatten(1).to(torch.uint8), scale[..., 0], offset[..., 0] if form.zero_points else None)
    packer = kernels.packer(100, 128, form)
    packer.add(0, numbers)
    assert packer.weight().memory() == kernels.pack(weight, form).memory()


@pytest.mark.parametrize("name", ["gptq", "gptq-zeros", "awq", "w8a8", "w4a16"])
def test_a_whole_model_keeps_its_numbers(tmp_path: Path, name: str) -> None:
    """Every stacked linear of the loaded model is its sources, one below the other; the plain head stays bf16."""
    (config, linear), form = DIRECTORIES[name]
    matrices = files.write_directory(tmp_path, config, linear)
    checkpoint = open_checkpoint(tmp_path, "auto", None, None)
    loaded = load_model(checkpoint, RunConfig(dtype="auto", kernels="reference"), SingleGroup())
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    sources = {
        "qkv": [attention + x for x in ("q_proj", "k_proj", "v_proj")], "o": [attention + "o_proj"],
        "gate_up": [mlp + "gate_proj", mlp + "up_proj"], "down": [mlp + "down_proj"],
    }  # fmt: skip
    for param, names in sources.items():
        weight = loaded.weights.linears[f"layers.0.{param}"].weight
        assert weight.form == form
        assert torch.equal(weight.data, torch.cat([matrices[f"{source}.weight"] for source in names]))
    assert loaded.weights.linears["head"].weight.form == FORMATS["bf16"]


@pytest.mark.parametrize("name", ["gptq-zeros", "awq"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_matrices_that_lie_across_the_file_are_read_once(
    tmp_path: Path, reads: list[range], monkeypatch: pytest.MonkeyPatch, name: str, world_size: int
) -> None:
    """However few output features are packed at once: a tensor is one read, or one of each line where it is cut."""
    (config, linear), _ = DIRECTORIES[name]
    matrices = files.write_directory(tmp_path, config, linear)
    monkeypatch.setattr("distinf.weights.load._CHUNK_BYTES", 32 * 2 * files.HIDDEN)  # the least: a panel
    checkpoint = open_checkpoint(tmp_path, "auto", None, None)
    plan = Plan.of(checkpoint, RunConfig(dtype="auto", shares=PhaseShares.of([1] * world_size)))
    reads.clear()
    for rank in range(world_size):
        kernels = ReferenceKernels(torch.bfloat16, 1)
        weights = load_weights(Loader(checkpoint, plan.params, plan.cuts(rank), rank, kernels, plan.formats), False)
    path = tmp_path / "model.safetensors"
    assert (
        sum(map(len, reads)) + checkpoint.table("model.embed_tokens.weight", torch.bfloat16).nbytes
        <= path.stat().st_size
    )
    lines = files.HIDDEN // 8 if name == "gptq-zeros" else files.HIDDEN  # of the five that are cut by output features
    groups = files.HIDDEN // 64
    cut, whole = 5 * (lines + 2 * groups), 2 * 3
    most = 3 * 7 if world_size == 1 else world_size * (cut + whole)
    assert len(reads) <= most + world_size * (3 + 4), "more than tensors, norms and the head have"
    if world_size == 1:
        gate_up = [matrices[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        assert torch.equal(weights.linears["layers.0.gate_up"].weight.data, torch.cat(gate_up))


def test_a_strip_is_kept_until_its_last_piece(tmp_path: Path, reads: list[range]) -> None:
    """Pieces in any order, words that pieces share, rows that nobody has announced."""
    save_file({"a.weight": torch.arange(6 * 16).view(6, 16)}, tmp_path / "model.safetensors")
    tensor = read_directory(tmp_path)[0]["a.weight"]
    whole, strips = tensor.read(), Strips()
    strips.announce("a", range(16, 96))
    pieces = [range(40, 96), range(16, 28), range(28, 40)]
    for _ in range(2):  # the second time all over again
        reads.clear()
        for rows in pieces:
            columns = slice(rows.start // 8, -(-rows.stop // 8))
            assert torch.equal(strips.read("a", tensor, range(1, 4), rows, per=8), whole[1:4, columns])
        assert sum(map(len, reads)) == 3 * 10 * 8
    reads.clear()
    assert torch.equal(strips.read("a", tensor, range(6), range(8, 24), per=8), whole[:, 1:3])
    assert sum(map(len, reads)) == 6 * 2 * 8


BAD_SETTINGS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("gptq", lambda c: c.update(bits=8), "GPTQ of 8 bits"),
    ("gptq", lambda c: c.update(checkpoint_format="marlin"), "'marlin', is not supported"),
    ("gptq", lambda c: c.update(group_size="big"), "group_size 'big'"),
    ("gptq", lambda c: c.update(group_size=96), r"q_proj.qweight' is of 256 x 256 weights; expected .* group size 96"),
    ("gptq", lambda c: c.update(group_size=32), r"qzeros' has shape \[4, \d+\]; expected \[8, \d+\]"),
    ("gptq-zeros", lambda c: c.update(sym=True), r"qzeros' has zero points other than 8"),
    ("awq", lambda c: c.update(version="gemv"), "AWQ of .4, 'gemv', True. is not supported"),
    ("awq", lambda c: c.update(quant_method="hqq"), "quant_method 'hqq' is not supported; expected one of gptq, awq"),
    ("w8a8", lambda c: c.update(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
    (
        "w8a8",
        lambda c: c.update(format="float-quantized"),
        r"float-quantized of \(8, 'int', True\) by 'channel' is not",
    ),
    (
        "fp8-block",
        lambda c: c["config_groups"]["group_0"].clear(),
        r"float-quantized of \(None, None, None\) by None is not supported",
    ),
    *(
        (name, spoil, message)
        for name in ("w8a8", "fp8-block")
        for spoil, message in (
            (lambda c: c["config_groups"].clear(), "config_groups is not supported; expected one group"),
            (lambda c: c.update(config_groups={"a": "abc"}), "compressed-tensors a is 'abc'; expected an object"),
            (lambda c: c["config_groups"]["group_0"].update(weights=[1]), r"weights is \[1\]; expected an object"),
            (lambda c: c.update(transform_config={"config_groups": {"R4": {}}}), "transform_config is not supported"),
            (lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported"),
        )
    ),
    ("w8a8", lambda c: c.update(format=["int-quantized"]), r"format \['int-quantized'\] is not supported"),
    ("fp8", lambda c: c.update(quant_method=["fp8"]), r"quant_method \['fp8'\] is not supported"),
    (
        "fp8-block",
        lambda c: c["config_groups"]["group_0"]["weights"].pop("block_structure"),
        "block_structure None; exp",
    ),
    ("fp8", lambda c: c.update(fmt="e5m2"), "fp8 fmt 'e5m2' is not supported; expected 'e4m3'"),
    ("fp8", lambda c: c.update(weight_block_size=[128]), r"weight_block_size \[128\]; expected two positive numbers"),
    ("fp8", lambda c: c.update(weight_block_size=[128, 0]), r"weight_block_size \[128, 0\]; expected two positive"),
    (
        "fp8",
        lambda c: c.update(weight_block_size=[64, 128]),
        r"weight_scale_inv' has shape \[2, 2\]; expected \[4, 2\]",
    ),
    ("w8a8", lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "8, 'int', symmetric"),
    ("w8a8", lambda c: c["config_groups"]["group_0"]["input_activations"].update(dynamic=False), "dynamic"),
    ("w4a16", lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), "strategy 'block'"),
]


@pytest.mark.parametrize("name, spoil, message", BAD_SETTINGS, ids=[f"{n}-{m}" for n, _, m in BAD_SETTINGS])
def test_settings_that_are_not_supported(
    tmp_path: Path, name: str, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    (config, linear), _ = DIRECTORIES[name]
    config = copy.deepcopy(config)
    spoil(config)
    files.write_directory(tmp_path, config, linear)
    with pytest.raises(ValueError, match=message):
        load_model(open_checkpoint(tmp_path, "auto", None, None), RunConfig(dtype="auto"), SingleGroup())


def test_groups_are_not_cut_by_ranks(tmp_path: Path) -> None:
    """Four heads of 64 features on three ranks, with groups of 128 input features in the output projection."""
    files.write_directory(tmp_path, *files.gptq(True, group=128))
    run = RunConfig(dtype="auto", shares=PhaseShares.of([1] * 4))
    with pytest.raises(
        ValueError, match=r"--group-size 128 does not divide the input features 0 .. 64 of 'model.*o_proj"
    ):
        Plan.of(open_checkpoint(tmp_path, "auto", None, None), run)


def test_gguf_has_llama_3s_rotation_as_divisors(tmp_path: Path) -> None:
    """As published: wavelengths above 8192 positions are divided by 8, those below 2048 by one, a ramp between."""
    path, dim = tmp_path / "model.gguf", files.HIDDEN // files.HEADS
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, dim, 2) / dim)
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    divisors = np.where(wavelengths < 2048, 1, np.where(wavelengths > 8192, 8, between))
    assert len(set(divisors)) > 3
    files.write_gguf(path, Kind.Q8_0, divisors)
    scaling = open_checkpoint(path, "auto", None, None).config["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 8 and scaling["low_freq_factor"] == 1
    files.write_gguf(path, Kind.Q8_0, divisors**2)
    with pytest.raises(ValueError, match=r"tensor 'rope_freqs.weight' is not Llama 3's scaling"):
        open_checkpoint(path, "auto", None, None)
