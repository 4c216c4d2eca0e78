"""An export pushed to the Hugging Face hub, where a token is at hand; else what would be pushed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from finetune_dataflow.errors import UserError


def token() -> str | None:
    """The token of this machine's user: HF_TOKEN, or what `hf auth login` has kept."""
    from huggingface_hub import get_token

    return get_token()


def check_base(kind: str, base_name: str, known_as: str) -> None:
    """Raise UserError where an adapter would be pushed that names a path of this machine as its base model.

    base_name: as it is given for the export. known_as: what the adapter would name without it.
    """
    if kind == "peft" and not base_name and Path(known_as).is_absolute():
        raise UserError(
            f"The adapter would name {known_as!r} as its base model, which nobody else has. "
            "Name its repository: --base-name owner/name."
        )


def push(directory: Path, hub_id: str, private: bool, dry_run: bool) -> list[str]:
    """Push every file of the export as one commit; without a token, or in a dry run, nothing. What was done, in lines.

    Raises UserError where the hub refuses, or does not answer.
    """
    files = sorted(each for each in directory.rglob("*") if each.is_file())
    listed = [f"  {each.relative_to(directory)}  {each.stat().st_size:,} bytes" for each in files]
    found = token()
    if dry_run or found is None:
        why = "a dry run" if dry_run else "no token (HF_TOKEN, or hf auth login)"
        return [f"Not pushed: {why}. To {hub_id}{' (private)' if private else ''} would go:", *listed]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # What the hub's client raises where nobody answers is its HTTP library's error, which its own derives from.
    network = cast(type[Exception], HfHubHTTPError.__mro__[1])

    api = HfApi(token=found)
    try:
        api.create_repo(hub_id, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(repo_id=hub_id, folder_path=directory, commit_message="Fine-tuned model with its card")
    except (HfHubHTTPError, network, OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(f"{hub_id} could not be pushed: {said}. The export is in {directory}.") from error
    return [f"Pushed to {commit.repo_url}:", *listed]
