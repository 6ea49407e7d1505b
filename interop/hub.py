"""Uploads an export to the Hugging Face hub."""

import re
from pathlib import Path

from nanometa.common.errors import UserError


def check_repository(name: str) -> None:
    """Raises UserError unless `name` can be the name of a repository, USER/NAME."""
    part = r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", name):
        raise UserError(
            f"push_to_hub={name!r} is no repository of the hub: give USER/NAME, in letters, digits, '-', '_' and '.'."
        )


def push(folder: Path, name: str) -> str:
    """Uploads a folder to the model repository `name`, which is made private if it is new. Returns what to print.

    Raises UserError if the hub cannot be reached or refuses. The folder stays as it is."""
    import huggingface_hub as hub

    try:
        # without a network, the client would retry for a while, so it is tried once before
        hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        api = hub.HfApi()
        api.create_repo(name, repo_type="model", private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of nanoMeta")
    except Exception as error:  # its class depends on the HTTP library of this version of huggingface_hub
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{folder} is complete, but could not be uploaded to {name} ({type(error).__name__}: {reason}): check the "
            f"network and the login (hf auth login), then upload it with: hf upload {name} {folder}"
        ) from error
    return f"uploaded to {done.repo_url}"
