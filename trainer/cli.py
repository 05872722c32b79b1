"""The trainer's commands, by name; each imports what it needs when it is called."""

from __future__ import annotations

from skerry.trainer.cli_data import data
from skerry.trainer.cli_pipeline import pipeline
from skerry.trainer.cli_train import train

__all__ = ["data", "pipeline", "train"]
