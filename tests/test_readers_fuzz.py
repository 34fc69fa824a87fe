"""Damaged checkpoints: always a ValueError that names the file, never a crash, never a byte from elsewhere."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.llm import load_model
from distinf.plan import Plan
from distinf.weights import open_checkpoint
from distinf.weights.gguf_header import read_header
from distinf.weights.load import check_shapes
from distinf.weights.raw import RawFile
from tests import checkpoint_files as files
from tests import gguf_families

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj"


def read_all(path: Path) -> None:
    """All that loading does with a checkpoint, but the packing."""
    checkpoint = open_checkpoint(path, "auto", None, None)
    params = Plan.of(checkpoint, RunConfig(dtype="auto")).params
    check_shapes(checkpoint, params)
    for param in params:
        for name, shape in param.shapes().items():
            checkpoint.read(name, torch.float32)
            if checkpoint.stored(name):
                checkpoint.numbers(name, range(shape[0]), range(shape[1]))


def refused(path: Path, file: str) -> bool:
    """Whether reading is refused, by a ValueError that names file, tensor or field; anything else is the test's failure."""
    try:
        read_all(path)
    except ValueError as error:
        assert any(word in str(error) for word in (file, "weight'", "config: ")), error
        return True
    return False


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A GPTQ directory: words, halves, bf16 and indices."""
    files.write_directory(tmp_path, *files.gptq(False))
    read_all(tmp_path)
    return tmp_path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    files.write_gguf(tmp_path / "model.gguf", Kind.Q4_1)
    read_all(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def header_size(path: Path) -> int:
    if path.suffix == ".gguf":
        return min(t.offset for t in read_header(RawFile(path))[1].values())
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_safetensors_cut_at_every_header_byte(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(header_size(path)), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors: damaged or truncated"):
            open_checkpoint(directory, "auto", None, None)


def test_gguf_cut_at_every_header_byte(gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    for size in [*range(header_size(gguf_file)), len(whole) // 2, len(whole) - 1]:
        gguf_file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.gguf: (damaged or truncated|the f)"):
            open_checkpoint(gguf_file, "auto", None, None)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_cut_at_every_byte(directory: Path, name: str) -> None:
    tensors = files.split_header((directory / "model.safetensors").read_bytes())[0]
    indexed(dict.fromkeys(tensors, "model.safetensors"))(directory)
    read_all(directory)
    whole = (directory / name).read_bytes()
    for size in range(len(whole)):
        (directory / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{name}: (not a JSON file|damaged or truncated JSON|expected)"):
            open_checkpoint(directory, "auto", None, None)


def spoiled(whole: bytes, size: int, step: int = 1) -> Iterator[bytes]:
    """The file with one byte of its header changed, or eight, all over the header."""
    chance = random.Random(0)
    for at in range(0, size, 5 * step):
        yield whole[:at] + bytes([chance.randrange(256)]) + whole[at + 1 :]
    for at in range(0, size - 8, 13 * step):
        yield whole[:at] + chance.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"]) + whole[at + 8 :]


# Quantised directories, and how coarsely their headers are spoiled: the first stands for what they have in common.
SPOILED = {
    "gptq": (files.gptq(False), 1),
    "awq": (files.awq(), 15),
    "compressed": (files.compressed("pack-quantized", 32, False), 15),
    "fp8": (files.fp8((128, 128)), 15),
}


@pytest.mark.parametrize("name", SPOILED)
def test_safetensors_with_a_spoiled_header(tmp_path: Path, name: str) -> None:
    maker, step = SPOILED[name]
    files.write_directory(tmp_path, *maker)
    read_all(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, size, results = path.read_bytes(), header_size(path), []
    for data in spoiled(whole, size, step):
        path.write_bytes(data)
        results.append(refused(tmp_path, "model.safetensors"))
    assert sum(results) > len(results) / 2


@pytest.mark.parametrize("case, step", [("llama", 1), ("deepseek2", 25), ("phi3 longrope", 15)])
def test_gguf_with_a_spoiled_header(tmp_path: Path, case: str, step: int) -> None:
    path = tmp_path / "model.gguf"
    if case == "llama":
        files.write_gguf(path, Kind.Q4_1)
    else:
        gguf_families.write(case, tmp_path)
    read_all(path)
    whole, size, results = path.read_bytes(), header_size(path), []
    for data in spoiled(whole, size, step):
        path.write_bytes(data)
        results.append(refused(path, "model.gguf"))
    assert sum(results) > len(results) / 2


# Changes of a tensor's entry, which is its name, u32 n, u64 dimensions[n], u32 type, u64 offset: (at, as, value).
BAD_GGUF_ENTRIES: list[tuple[int, str, int, str]] = [
    (0, "<I", 0, "has 0 dimensions"),
    (0, "<I", 9, "has 9 dimensions"),
    (4, "<Q", 31, "has rows of 31, no whole blocks of Q4_1"),
    (4, "<Q", 1 << 62, "ends at byte"),
    (12, "<Q", 1 << 62, "ends at byte"),
    (12, "<Q", 0, "has shape [0, 256] but the config asks for [512, 256]"),
    (12, "<Q", 256, "has shape [256, 256] but the config asks for [512, 256]"),
    (20, "<I", 99, "has the unknown type 99"),
    (20, "<I", Kind.I8, "has the type I8, which cannot be read"),
    (24, "<Q", (1 << 64) - 1, "ends at byte"),
    (24, "<Q", 1 << 40, "ends at byte"),
]


@pytest.mark.parametrize("at, form, value, message", BAD_GGUF_ENTRIES)
def test_a_bad_gguf_entry_is_named(gguf_file: Path, at: int, form: str, value: int, message: str) -> None:
    name = b"blk.0.ffn_up.weight"
    data = bytearray(gguf_file.read_bytes())
    struct.pack_into(form, data, data.index(name) + len(name) + at, value)
    gguf_file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_all(gguf_file)
    assert message in str(error.value)
    assert "ffn_up.weight" in str(error.value) or "mlp.up_proj.weight" in str(error.value)


BAD_ENTRIES: list[tuple[dict[str, Any], str]] = [
    ({"data_offsets": [0, 1 << 63]}, "bytes 0 to 9223372036854775808"),
    ({"data_offsets": [0, 4 << 40], "shape": [1 << 20, 1 << 20]}, "bytes 0 to 4398046511104"),
    ({"data_offsets": [-8, 0]}, "no lists of whole numbers"),
    ({"data_offsets": [8, 0]}, "bytes 8 to 0"),
    ({"data_offsets": [0]}, "no lists of whole numbers"),
    ({"data_offsets": "all"}, "no lists of whole numbers"),
    ({"shape": [1 << 40, 1 << 40]}, "expected 4835703278458516698824704 for I32"),
    ({"shape": [-32, -256]}, "no lists of whole numbers"),
    ({"shape": [32.0, 256]}, "no lists of whole numbers"),
    ({"shape": [True, 8192]}, "no lists of whole numbers"),
    ({"shape": None}, "no lists of whole numbers"),
    ({"shape": [31, 256]}, "expected 31744 for I32"),
    ({"dtype": "F64"}, "expected 65536 for F64"),
    ({"dtype": "F4"}, "dtype 'F4', expected one of F64"),
    ({"dtype": ["I32"]}, "dtype ['I32'], expected one of F64"),
    ({"dtype": "F32"}, "has dtype torch.float32; expected torch.int32"),
    ({"shape": [256, 32]}, "qzeros' has shape"),
    ({"more": 1}, "expected dtype, shape and data_offsets"),
]


@pytest.mark.parametrize("change, message", BAD_ENTRIES, ids=[json.dumps(c) for c, _ in BAD_ENTRIES])
def test_a_bad_entry_is_named(directory: Path, change: dict[str, Any], message: str) -> None:
    path = directory / "model.safetensors"
    header, data = files.split_header(path.read_bytes())
    header[f"{LAYER}.qweight"].update(change)
    path.write_bytes(files.join_header(header, data))
    with pytest.raises(ValueError) as error:
        read_all(directory)
    assert message in str(error.value) and "model.safetensors" in str(error.value) and LAYER in str(error.value)


BAD_HEADERS: list[tuple[bytes, str]] = [
    (b"[]", "the header is no JSON object"),
    (b'{"a": {}, "a": {}}', "'a' is there twice"),
    (b"[" * 200_000, "damaged or truncated"),
    (b'{"a": 1}', "tensor 'a': expected dtype"),
    (b"\xff\xfe", "damaged or truncated"),
    (b"", "damaged or truncated"),
]


@pytest.mark.parametrize("text, message", BAD_HEADERS, ids=[m for _, m in BAD_HEADERS])
def test_a_header_that_is_none(directory: Path, text: bytes, message: str) -> None:
    (directory / "model.safetensors").write_bytes(files.join_header(text, b""))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory, "auto", None, None)


def in_two_files(directory: Path) -> None:
    (directory / "copy.safetensors").write_bytes((directory / "model.safetensors").read_bytes())


def indexed(weight_map: object) -> Callable[[Path], None]:
    return lambda directory: (directory / INDEX).write_text(json.dumps({"weight_map": weight_map})) and None


def index_is_a_loop(directory: Path) -> None:
    indexed({"a": "loop.safetensors"})(directory)
    (directory / "loop.safetensors").symlink_to("loop.safetensors")


def index_names_a_directory(directory: Path) -> None:
    indexed({"a": "model-1.safetensors"})(directory)
    (directory / "model-1.safetensors").mkdir()


BAD_INDEXES: list[tuple[Callable[[Path], object], str]] = [
    (in_two_files, r"tensor '\S+' is also in copy.safetensors"),
    (indexed({"a": INDEX}), rf"{INDEX}: damaged or truncated"),  # the index as one of its own files
    (index_is_a_loop, "loop.safetensors: the file is missing"),
    (index_names_a_directory, "model-1.safetensors: the file is missing"),
    (indexed({"a": "model.safetensors"}), "tensor 'a' is not in model.safetensors"),
    (indexed({f"{LAYER}.qweight": "model.safetensors"}), r"tensor '\S+' is missing from model.safetensors"),
    (indexed({}), "expected a JSON object with 'weight_map'"),
    (indexed(["model.safetensors"]), "expected a JSON object with 'weight_map'"),
    (indexed({"a": 7}), "7 is not the name of a file in this directory"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), "'a' is there twice"),
    (lambda d: (d / INDEX).write_text('{"weight_map": ' * 100_000), "damaged or truncated JSON"),
    (lambda d: (d / INDEX).write_bytes(b"\xff\xff"), "damaged or truncated JSON"),
]


@pytest.mark.parametrize("spoil, message", BAD_INDEXES, ids=[m for _, m in BAD_INDEXES])
def test_a_bad_index(directory: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(directory)
    with pytest.raises(ValueError, match=message):
        read_all(directory)


OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "",
    ".",
    "..",
    "a\0b",
    "./model.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_nowhere_else(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Refused by its name: nothing that it names is opened."""
    (directory.parent / "secret.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    indexed({"a": name})(directory)
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda path, *_: opened.append(path))
    with pytest.raises(ValueError, match=r"is not the name of a file in this directory|the file is missing"):
        open_checkpoint(directory, "auto", None, None)
    assert not opened


NAN_SCALES = {
    "gptq": (files.gptq(False), "scales"),
    "awq": (files.awq(), "scales"),
    "w8a8": (files.compressed("int-quantized", 0, True), "weight_scale"),
    "w4a16": (files.compressed("pack-quantized", 32, False), "weight_scale"),
    "fp8": (files.fp8((128, 128)), "weight_scale_inv"),
    "fp8-channel": (files.compressed_fp8("channel", (1, 0)), "weight_scale"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("name", NAN_SCALES)
def test_a_scale_that_is_not_finite(tmp_path: Path, name: str, dtype: str, value: float) -> None:
    (config, linear), scale = NAN_SCALES[name]

    def with_nan(n: int, k: int) -> files.Linear:
        parts, matrix = linear(n, k)
        parts[scale][-1, -1] = value
        return parts, matrix

    files.write_directory(tmp_path, config, with_nan)
    message = rf"model.safetensors: tensor 'model\S+.{scale}' has values that are not finite"
    with pytest.raises(ValueError, match=message):
        load_model(open_checkpoint(tmp_path, "auto", None, None), RunConfig(dtype=dtype), SingleGroup())


FP8 = f"{LAYER}.weight"
BAD_FP8: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda parts: parts.pop("weight_scale_inv"), rf"tensor '{FP8}' has 8-bit floats; expected their scales in '{FP8}_scale_inv'"),
    (lambda parts: parts.update(weight_scale_inv=torch.ones(3, 2)), rf"tensor '{FP8}_scale_inv' has shape \[3, 2\]; expected \[2, 2\]"),
    (lambda parts: parts.update(weight_scale_inv=torch.ones(4)), rf"tensor '{FP8}_scale_inv' has shape \[4\]; expected \[2, 2\]"),
    (lambda parts: parts.update(weight_scale_inv=torch.ones(2, 2).char()), rf"tensor '{FP8}_scale_inv' has dtype torch.int8; expected"),
    (lambda parts: parts["weight"].view(torch.uint8)[3].fill_(0x7F), rf"tensor '{FP8}' has values that are not finite"),
    (lambda parts: parts.update(weight=parts["weight"].view(torch.uint8)), rf"tensor '{FP8}' has dtype torch.uint8; expected float64"),
    (lambda parts: parts.update(weight=parts["weight"].flatten()), rf"'{FP8}' has shape \[65536\]"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, message", BAD_FP8, ids=[m for _, m in BAD_FP8])
def test_bad_8_bit_floats_are_named(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    config, linear = files.fp8((128, 128))

    def spoiled_linear(n: int, k: int) -> files.Linear:
        parts, matrix = linear(n, k)
        spoil(parts)
        return parts, matrix

    files.write_directory(tmp_path, config, spoiled_linear)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K], ids=lambda k: k.name)
def test_a_gguf_scale_that_is_not_finite(tmp_path: Path, kind: Kind, dtype: str) -> None:
    path = tmp_path / "model.gguf"
    files.write_gguf(path, kind)
    tensor = read_header(RawFile(path))[1]["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.offset + (208 if kind == Kind.Q6_K else 0)  # Q6_K has its scale at the end of 210 bytes
    data[at : at + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.gguf: tensor 'blk.0.ffn_up.weight' has \w+ that are not finite"):
        load_model(open_checkpoint(path, "auto", None, None), RunConfig(dtype=dtype), SingleGroup())


def test_gguf_duplicates_and_unknown_types(gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    cases = [
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_up.weighs", r"the field|tensor 'blk.0.ffn_up.weight' is missing"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_q.weight", r"tensor 'blk.0.attn_q.weight' is there twice"),
        (b"llama.block_count", b"llama.context_len", r"'llama.block_count' is missing"),
    ]
    for old, new, message in cases:
        assert whole.count(old) == 1 and len(old) == len(new)
        gguf_file.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_all(gguf_file)


def test_a_file_that_shrinks_while_it_is_open(directory: Path) -> None:
    checkpoint = open_checkpoint(directory, "auto", None, None)
    path = directory / "model.safetensors"
    os.truncate(path, header_size(path) + 10)
    with pytest.raises(ValueError, match=r"model.safetensors: the file ends at \d+ bytes"):
        checkpoint.read("lm_head.weight", torch.float32)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(files.CONFIG))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"no .safetensors file; pickled weights .* can run code"):
        open_checkpoint(tmp_path, "auto", None, None)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: pickled weights are not read, they can run code"):
        open_checkpoint(tmp_path / "pytorch_model.bin", "auto", None, None)
