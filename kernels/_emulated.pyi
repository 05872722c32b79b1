from collections.abc import Sequence

def kernels() -> list[str]: ...
def run(
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    together: bool,
    params: bytes,
    seed: int = ...,
) -> None: ...
