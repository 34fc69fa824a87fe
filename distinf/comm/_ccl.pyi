"""csrc/ccl.cpp: oneCCL's all-reduce on raw addresses. Import it after libccl.so.1 has been loaded (ccl.py)."""

# Addresses of `int f(void* context, T* data, int64_t n)`, T float or bf16: 0, or 1 when oneCCL failed.
ALL_REDUCE_FP32: int
ALL_REDUCE_BF16: int

class Store:
    def __init__(self, address: bytes = ...) -> None: ...
    @property
    def address(self) -> bytes: ...

class Communicator:
    def __init__(self, store: Store, rank: int, world_size: int) -> None: ...
    @property
    def context(self) -> int: ...
