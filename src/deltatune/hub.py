"""The Hugging Face hub: files by name, from the local cache when there is no network, and folders sent there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from deltatune.errors import DeltaTuneError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_name(text: str) -> bool:
    """Whether a text can name a repository: `user/name`."""
    return NAME.fullmatch(text) is not None


def fetch(name: str, files: Sequence[str], without: Sequence[str], what: str, known: str = "") -> Path:
    """Return the folder with the files of a repository, by patterns; `what` it is, and what is known here, are for errors."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
    except ImportError as error:
        raise _missing(name) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(without)))
    except HFValidationError:
        raise DeltaTuneError(f"there is no {what} {name!r}.{known}") from None
    except (HTTPError, OSError) as error:
        raise DeltaTuneError(
            f"there is no {what} {name!r} here, and the Hugging Face hub did not give one: {_first(error)}.{known} "
            f"Without a network, a hub name works only once its files are in the local cache (HF_HOME)."
        ) from error


def send(folder: Path, name: str, private: bool, message: str) -> str:
    """Send a folder to a repository, which is made if it is not there, and return its address."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    except ImportError as error:
        raise _missing(name) from error
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (HTTPError, OSError) as error:
        raise DeltaTuneError(
            f"the Hugging Face hub did not take {name!r}: {_first(error)}. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write there."
        ) from error
    return str(address)


def _first(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _missing(name: str) -> DeltaTuneError:
    return DeltaTuneError(f"{name!r} is a name of the Hugging Face hub; for it: pip install 'deltatune[hub]'.")
