"""What goes wrong with the Hub, in one line that says what to do."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from sa_convert.console.redaction import redact
from sa_convert.errors import CheckpointError
from sa_convert.read.hub_names import HubName


@contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Raises CheckpointError for every error of huggingface_hub, the network and the cache inside of the block."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    _redact_log()
    try:
        yield
    except HFValidationError:
        raise CheckpointError(
            f"{name}: there is no such folder, and the Hub has no models of such names; check the name."
        ) from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise CheckpointError(f"{name}: {_reason(name, error)}") from error


def endpoint() -> str:
    """The address of the Hub, as messages show it."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", str(constants.ENDPOINT))


def unreachable() -> str:
    """Why nothing is asked of the Hub, or no answer comes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"there is no connection to {endpoint()}"


def not_cached(what: str) -> str:
    """The message for something that only the Hub has, while it cannot be reached."""
    from huggingface_hub import constants

    otherwise = "run once without HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network, or HF_ENDPOINT"
    return f"{what} not in the cache ({constants.HF_HUB_CACHE}), and {unreachable()}: {otherwise}."


def _reason(name: HubName, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    cause = error.__cause__ or error.__context__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        cause, (errors.HfHubHTTPError, errors.FileMetadataError)
    ):
        return _reason(name, cause)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"is gated: accept its terms at {endpoint()}/{name.repo} and log in with 'hf auth login' (or set HF_TOKEN)."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such folder, and no such model on the Hub that you may read: check the name; for a private "
            "model log in with 'hf auth login' (or set HF_TOKEN)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no such revision: give a branch, tag or commit of {endpoint()}/{name.repo}."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the Hub does not have a file that it lists: look at {endpoint()}/{name.repo}."
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error.response.status_code)
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint()} does not answer as the Hub does: check HF_ENDPOINT and the proxy."
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return not_cached("it is")
    if isinstance(error, errors.HTTPError):
        if "Connect" in type(error).__name__:
            return f"there is no connection to {endpoint()}: check the network, the proxy, or HF_ENDPOINT."
        return f"the connection to {endpoint()} broke off: run again; files that are complete are kept."
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be stored in the cache ({constants.HF_HUB_CACHE}): {error.strerror}; make room, or set HF_HOME."
    return "the download was incomplete: run again; files that are complete are kept."


def _redact_log() -> None:
    """The library's warnings name addresses, which may hold a password."""
    from huggingface_hub.utils import logging as hub_logging

    for handler in hub_logging.get_logger().handlers:
        if _redacted not in handler.filters:
            handler.addFilter(_redacted)


def _redacted(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def _status(code: int) -> str:
    """What an answer of the Hub with this HTTP status means."""
    if code == 401:
        return "the Hub does not know your token: log in again with 'hf auth login', or correct HF_TOKEN."
    if code == 403:
        return "your token may not read this model: use one that has the right to."
    if code == 429:
        return "the Hub has had too many requests from here: log in with 'hf auth login', or try again later."
    return f"the Hub answers with an error (HTTP {code}): try again later."
