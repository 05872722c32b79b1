"""hf_from_gguf.py GGUF FOLDER: a GGUF as plain float32 Hugging Face files, for a model builder that reads those."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main(source: Path, out: Path) -> None:
    transformers.logging.set_verbosity_error()
    folder, name = str(source.parent), source.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # What is in memory is float32 by now; only these marks keep it from being saved.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["is_quantized"] = False
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
