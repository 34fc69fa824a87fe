"""Readers: slices equal the whole, and whatever is damaged is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distinf import LLM, SamplingParams
from distinf.comm.single import SingleGroup
from distinf.config import RunConfig
from distinf.kernels.reference import ReferenceKernels
from distinf.llm import load_model
from distinf.plan import Plan
from distinf.shard import PhaseShares
from distinf.weights import Checkpoint, open_checkpoint
from distinf.weights.gguf import GGUFCheckpoint
from distinf.weights.load import Loader, load_weights
from tests.checkpoint_files import split_header
from tests.families import RECIPES

LAB_1B = Path(__file__).resolve().parent.parent / "perf/models/lab-1b.json"


def open_dir(path: Path) -> Checkpoint:
    return open_checkpoint(path, "auto", None, None)


def load(path: Path) -> None:
    load_model(open_dir(path), RunConfig(dtype="fp32"), SingleGroup())


@pytest.fixture(scope="module")
def checkpoints(tiny_llama: Path, smollm2: Path) -> dict[str, tuple[Checkpoint, str]]:
    q = "model.layers.1.self_attn.q_proj.weight"
    return {
        "safetensors": (open_dir(tiny_llama), q),
        "gguf": (open_checkpoint(smollm2, "auto", None, None), q),
        "dummy": (open_checkpoint(Path(), "dummy", LAB_1B, 2), q),
    }


@pytest.mark.parametrize("name", ["safetensors", "gguf", "dummy"])
def test_slices_equal_the_whole(checkpoints: dict[str, tuple[Checkpoint, str]], name: str) -> None:
    checkpoint, tensor = checkpoints[name]
    head_dim = {"safetensors": 20, "gguf": 64, "dummy": 64}[name]
    whole = checkpoint.read(tensor, torch.float32)
    assert whole.shape == checkpoint.shape(tensor) and whole.std() > 0
    rows, columns = range(head_dim, 3 * head_dim), range(7, 51)
    assert torch.equal(checkpoint.read(tensor, torch.float32, rows), whole[rows.start : rows.stop])
    assert torch.equal(checkpoint.read(tensor, torch.float32, None, columns), whole[:, 7:51])
    assert torch.equal(checkpoint.read(tensor, torch.float32, range(0), None), whole[:0])
    assert torch.equal(checkpoint.read(tensor, torch.float32, None, range(0)), whole[:, :0])


def test_rows_in_another_order_are_one_read(smollm2: Path, reads: list[range]) -> None:
    """Of whole heads, whose neighbours in the file are far apart in Hugging Face's order."""
    checkpoint = GGUFCheckpoint(smollm2)
    reads.clear()
    checkpoint.read("model.layers.1.self_attn.q_proj.weight", torch.float32, range(64, 320))
    assert len(reads) == 1


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> AutoModelForCausalLM:
    """transformers' dequantised load of the file."""
    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)


@pytest.mark.slow
def test_gguf_tensors_equal_those_of_transformers(smollm2: Path, oracle: AutoModelForCausalLM) -> None:
    """Every tensor: names, the order of rotated rows, and dequantisation."""
    checkpoint = GGUFCheckpoint(smollm2)
    for name, expected in oracle.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(checkpoint.read(name, torch.float32), expected), name


@pytest.mark.slow
def test_gguf_text_is_that_of_transformers(oracle: AutoModelForCausalLM) -> None:
    """64 tokens: each is the likeliest after those before it, so greedy decoding there gives just these."""
    llm = LLM(dtype="fp32", threads=1)  # threads of torch that wait for one another are slow on shared cores
    prompts = [
        llm.tokenize("Write three sentences about the sea and the ships on it.", chat=True),
        llm.tokenize("def fibonacci(n):"),
        llm.tokenize("Once upon a time, in a village between two rivers,"),
    ]
    for prompt, done in zip(prompts, llm.generate(prompts, SamplingParams(max_new_tokens=64)), strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([[*prompt, *done.token_ids[:-1]]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == done.token_ids, done.text
        assert len(done.token_ids) == 64 or done.finish_reason == "stop"


def load_rank(checkpoint: Checkpoint, plan: Plan, rank: int) -> None:
    kernels = ReferenceKernels(torch.bfloat16, 1)
    load_weights(Loader(checkpoint, plan.params_of(rank), plan.cuts(rank), rank, kernels, plan.formats), False)


def test_ranks_together_read_each_matrix_once(tiny_llama: Path, reads: list[range]) -> None:
    """The embedding table is mapped; vectors are read by every rank."""
    checkpoint = open_dir(tiny_llama)
    run = RunConfig(dtype="bf16", shares=PhaseShares.of([1] * 3))
    plan = Plan.of(checkpoint, run)
    sizes = {n: math.prod(s) * 4 for p in plan.params for n, s in p.shapes().items()}  # fp32 in the file
    vectors = sum(size for name, size in sizes.items() if len(checkpoint.shape(name)) == 1)
    matrices = sum(sizes.values()) - vectors - sizes["model.embed_tokens.weight"]
    for rank in range(3):
        load_rank(checkpoint, plan, rank)
    assert matrices < sum(map(len, reads)) <= matrices + 3 * vectors


def test_a_rank_reads_its_own_experts_whole_and_no_byte_of_others(tmp_path: Path, reads: list[range]) -> None:
    """Five experts on shares 3, 0, 1: boundaries at 3.75 and at 3.75."""
    RECIPES["mixtral"]["plain"](tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header, start = split_header(data)[0], 8 + int.from_bytes(data[:8], "little")
    plan = Plan.of(open_dir(tmp_path), RunConfig(shares=PhaseShares.of([3, 0, 1]), expert_parallel=True))
    for rank, experts in enumerate(([0, 1, 2, 3], [], [4])):
        reads.clear()
        load_rank(open_dir(tmp_path), plan, rank)
        for name, entry in header.items():
            if ".experts." in name:
                first, end = (start + offset for offset in entry["data_offsets"])
                read = sum(len(range(max(r.start, first), min(r.stop, end))) for r in reads)
                mine = int(name.split(".experts.")[1].split(".")[0]) in experts
                assert read == (end - first if mine else 0), (rank, name)


def copy_of(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to / "copy"))


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def truncate_to(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def config_is_no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def index_points_nowhere(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')


def index_points_outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def index_is_no_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("[]")


BAD_DIRECTORIES: list[tuple[Callable[[Path], None], str]] = [
    (no_config, r"config.json: No such file"),
    (config_is_no_json, r"config.json: not a JSON file"),
    (no_weights, r"no .safetensors file"),
    (index_points_nowhere, r"model-2.safetensors: the file is missing"),
    (index_points_outside, r"'../model.safetensors' is not the name of a file"),
    (index_is_no_index, r"index.json: expected a JSON object with 'weight_map'"),
    (lambda p: edit_config(p, model_type="rwkv9"), r"model_type 'rwkv9' is unknown; expected one of .*llama, "),
    (lambda p: edit_config(p, model_type="params"), r"model_type 'params' is unknown"),
    (lambda p: edit_config(p, hidden_size=None), r"'hidden_size' is missing"),
    (lambda p: edit_config(p, rope_parameters=None), r"'rope_theta' is missing"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "odd", "rope_theta": 1.0}), r"rope_scaling 'odd'"),
    (lambda p: edit_config(p, hidden_act="tanh"), r"hidden_act 'tanh' is not supported"),
    (lambda p: edit_config(p, num_key_value_heads=4), r"6 heads are not a multiple of 4 KV heads"),
    (lambda p: edit_config(p, num_hidden_layers=4), r"tensor 'model.layers.3.\S+' is missing"),
    (
        lambda p: edit_config(p, vocab_size=200),
        r"'model.embed_tokens.weight' has shape \[199, 120\] but .* \[200, 120\]",
    ),
    (lambda p: truncate_to(p / "model.safetensors", 100), r"model.safetensors: damaged or truncated"),
    (lambda p: truncate_to(p / "model.safetensors", 4), r"model.safetensors: damaged or truncated"),
    (lambda p: truncate_to(p / "model.safetensors", 0), r"model.safetensors: damaged or truncated"),
    (lambda p: truncate_to(p / "model.safetensors", 200_000), r"model.safetensors: damaged or truncated"),
]


@pytest.mark.parametrize("spoil, message", BAD_DIRECTORIES, ids=[m for _, m in BAD_DIRECTORIES])
def test_a_damaged_directory_is_refused(
    tiny_llama: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = copy_of(tiny_llama, tmp_path)
    load(path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("size", [0, 3, 20, 1000, 2_000_000, 50_000_000])
def test_a_truncated_gguf_is_refused(smollm2: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(smollm2.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"short.gguf: damaged or truncated GGUF"):
        load(path)


def test_neither_directory_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("?")
    with pytest.raises(ValueError, match=r"x.bin: pickled weights are not read, they can run code"):
        open_dir(tmp_path / "x.bin")


def test_sharded_safetensors_with_an_index(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, many = open_dir(tiny_llama), open_dir(tmp_path)
    for name in model.state_dict():
        assert torch.equal(one.read(name, torch.float32), many.read(name, torch.float32))


@pytest.mark.parametrize(
    "run, head",
    [
        (RunConfig(dtype="w8a8"), "int8"),
        (RunConfig(dtype="w8a8", head_dtype="w8a8"), "w8a8"),
        (RunConfig(dtype="int4"), "int4"),
        (RunConfig(dtype="int4", head_dtype="bf16"), "bf16"),
    ],
)
def test_format_of_the_head(run: RunConfig, head: str) -> None:
    formats = Plan.of(open_checkpoint(Path(), "dummy", LAB_1B, 1), run).formats
    assert (formats["layers.0.down"].name, formats["head"].name) == (run.dtype, head)
