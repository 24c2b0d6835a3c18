"""The Hugging Face hub: pretrained weights from it, with a bound on the wait where there is no network, and models to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from tracknet.errors import ConfigError, UserError, shown
from tracknet.models.folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME

FILES = [CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors"]

# The client's questions have no time limit of their own and wait for ever behind a firewall that drops packets. It may ask twice.
TIMEOUT_SECONDS = 2.0

NO_NAME = "it is neither a folder nor an identifier on the hub, which looks like owner/name"

# Errors of the HTTP library that this version of the client uses (httpx2, httpx): the first base of its own error.
NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])

# Of a large file that fails on the way, the client makes a RuntimeError.
UPLOAD_ERRORS: tuple[type[BaseException], ...] = (*NETWORK_ERRORS, RuntimeError)


def download(name: str, local_files_only: bool) -> Path:
    """The folder in the hub's cache with `config.json` and the safetensors weights of a model; downloaded if need be.

    Args:
        name: identifier on the hub, such as `facebook/dinov2-small`.
        local_files_only: look in the cache and nowhere else.

    Raises:
        ConfigError: no such model, no access to it, or neither a network nor a cached copy.
    """
    cached = find_on_hub(name, local_files_only)
    if cached is not None:
        return cached
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except NETWORK_ERRORS as error:
        raise ConfigError(f"the download failed ({_first_line(error)})") from error


def find_on_hub(name: str, local_files_only: bool) -> Path | None:
    """Where `download` will find a model: in the cache's folder, if the hub is not to be asked or cannot be, else (None) on the hub.

    Args:
        name: as for `download`.
        local_files_only: as for `download`.

    Raises:
        ConfigError: no such model, no access to it, or neither a network nor a cached copy.
    """
    reason = "model.backbone.local_files_only is true" if local_files_only else _why_unreachable(name)
    if not reason:
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(NO_NAME) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(f"it is not a folder and not in the hub's cache, and {reason}") from error


def _why_unreachable(name: str) -> str:
    """Why the hub cannot be asked, or nothing if it can.

    Raises:
        ConfigError: the hub answers, but has no such model, or does not show it.
    """
    try:
        HfApi().model_info(name, timeout=TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise ConfigError(NO_NAME) from error
    except RepositoryNotFoundError as error:  # the gated ones included
        raise ConfigError("the hub has no such model, or shows it only to users with access (hf auth login)") from error
    except NETWORK_ERRORS as error:
        return f"the hub cannot be reached ({_first_line(error)})"
    return ""


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Within, what keeps a model from the hub is told in one line.

    Raises:
        ConfigError: `repo_id` cannot be the name of a repository.
        UserError: the hub refuses it or cannot be reached, or a file cannot be read or written.
    """
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub: {shown(repo_id)} is no name of a repository on the hub, which looks like owner/name") from error
    except UPLOAD_ERRORS as error:
        cause = error if isinstance(error, NETWORK_ERRORS) else error.__cause__  # the client wraps what happens to a large file
        if not isinstance(cause, NETWORK_ERRORS):
            raise
        raise UserError(f"push_to_hub: {shown(repo_id)} was not uploaded: {_reason(cause)}") from error


def _reason(error: BaseException) -> str:
    """The cause in a few words, with what to do where the hub has refused."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return f"the hub refuses access ({status}); log in with `hf auth login`, with a token that may write to it"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
