"""Exports to the Hugging Face Hub: checks before anything is written, figures in the model card, the upload."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from difflm_jax.errors import UserError, one_line

# How the model card names the figures of a run's evaluations.
_FIGURES = {
    "eval_loss": "evaluation loss",
    "masked_nll": "masked NLL (nats per hidden token)",
    "masked_accuracy": "accuracy on hidden tokens",
}


def check_push(repo: str) -> None:
    """Raises `UserError` if an upload to `repo` (owner/name) cannot begin. Does not use the network."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub={repo}: {one_line(error)[:200]}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub={repo}: HF_HUB_OFFLINE is set: unset it to upload")
    if not get_token():
        raise UserError(f"--push_to_hub={repo}: no token: run `hf auth login`, or set HF_TOKEN to one that may write")


def add_figures(directory: Path, dataset: str, record: Mapping[str, Any]) -> None:
    """Adds the figures of an evaluation on `dataset` to the model card in `directory`, in the format of the hub."""
    found = {name: record[name] for name in _FIGURES if isinstance(record.get(name), (int, float))}
    if not found:
        return
    card = ModelCard.load(directory / "README.md")
    card.data.model_name = directory.name
    card.data.eval_results = [
        EvalResult("text-generation", "held-out rows", dataset, name, round(value, 6), metric_name=_FIGURES[name])
        for name, value in found.items()
    ]
    lines = "\n".join(f"| {_FIGURES[name]} | {value:.4f} |" for name, value in found.items())
    at = f"step {record['step']} of {record['phase']}" if {"step", "phase"} <= set(record) else "the end"
    card.text += (
        f"\n## Evaluation\n\nHeld-out rows of `{dataset}`, at {at}.\n\n| figure | value |\n|---|---|\n{lines}\n"
    )
    card.save(directory / "README.md")


def push(directory: Path, repo: str, private: bool) -> str:
    """Uploads a directory as the model `repo`, creating it if needed. Returns its URL. Raises `UserError`."""
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        with contextlib.redirect_stdout(None):
            api.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message="Export of difflm_jax")
    except (HfHubHTTPError, OSError, ValueError) as error:  # connection errors of the client are OSErrors
        raise UserError(
            f"--push_to_hub={repo}: {one_line(error)[:300]} (the export is in {directory}; upload it again with "
            f"hf upload {repo} {directory})"
        ) from error
    return str(made)
