"""A run folder's model, loaded again; and its Qwen, exported for plain transformers or peft."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_fused.config import error_prefix
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.qwen.backbone import save_backbone
from qwen_fused.report.run_files import check_run
from qwen_fused.train.checkpoint import read_state
from qwen_fused.train.resume import explain_mismatch, load_run_config, read_newest_state


def load_model(run: Path, weights: str = "last", device: torch.device | str = "cpu") -> QwenPlanner:
    """The model of a run, in train mode, with its configuration in `.config`.

    A damaged checkpoint that is passed over is told on standard output.

    Args:
        run: run folder.
        weights: "last" for the newest checkpoint that is whole, "best" for the best one on the held-out tasks.
        device: where the model goes.

    Raises:
        ValueError: there is no such run, it has no such checkpoint, or its Qwen is no longer where it was.
    """
    check_run(run)
    config = load_run_config(run)
    best = run / "checkpoints" / "best.safetensors"
    if weights == "best" and not best.is_file():
        raise ValueError(f"weights must be last for a run that has not been evaluated, got best: there is no {best}")
    path, state, notes = (best, read_state(best), []) if weights == "best" else read_newest_state(run)
    if path is None or state is None:
        raise ValueError(f"run must be a run folder with a checkpoint, got {run}")
    for note in notes:
        print(note)
    with error_prefix(f"run {run}"):
        model = QwenPlanner(config).to(device)
    with explain_mismatch(path):
        model.load_state_dict(state["model"])
    return model


def export_qwen(run: Path, folder: Path, weights: str = "last") -> str:
    """Write a run's trained Qwen, or its LoRA adapters, and the tokenizer; returns how to load them.

    Args:
        run: run folder.
        folder: a new or empty folder.
        weights: as for `load_model`.

    Raises:
        ValueError: as `load_model`, or something is in the folder already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}, which has something in it")
    model = load_model(run, weights)
    if not save_backbone(model.prompt.backbone, model.prompt.tokenizer, folder, head_of=model.config.qwen):
        print(f"Without a language-model head: {model.config.qwen} has none. What is exported makes hidden states.")
    loader = "peft.AutoPeftModelForFeatureExtraction" if model.config.lora_rank else "transformers.AutoModel"
    return f'{loader}.from_pretrained("{folder}")'
