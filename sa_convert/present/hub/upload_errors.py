"""What goes wrong with a push, in one line each: what happened, and what to do. No message holds a token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sa_convert.errors import OutputError
from sa_convert.read.hub_errors import endpoint

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
AGAIN = "run 'sa-convert push' again: what has arrived is not sent twice"

_REASONS = {
    401: f"the Hub does not accept your token, which may be expired or wrong; {LOGIN}",
    402: "the Hub wants a payment or more storage for that account; see its settings, or use another REPO_ID",
    403: "your token may not write there; use a REPO_ID of your own or of your organisation, and a token with write "
    "access (https://huggingface.co/settings/tokens)",
    404: "there is no such repository, or your token may not see it; use another REPO_ID or token",
    409: f"someone else changes the repository at this moment; {AGAIN}",
    412: f"someone else changes the repository at this moment; {AGAIN}",
    413: "the Hub finds the upload too large; see its limits for repositories",
    429: f"the Hub refuses more requests for now; wait, then {AGAIN}",
}


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into OutputError, and so an interruption from the keyboard.

    Its warnings are not shown: they name addresses that are signed to write to.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except KeyboardInterrupt:
        raise OutputError(f"{repo_id}: interrupted before the upload was complete; {AGAIN}.") from None
    except OfflineModeIsEnabled as error:
        raise OutputError(offline(repo_id)) from error
    except LocalTokenNotFoundError as error:
        raise OutputError(no_token(repo_id)) from error
    except HFValidationError as error:
        raise OutputError(f"{repo_id}: is no name of a repository: {_line(error)}") from error
    except HfHubHTTPError as error:
        raise OutputError(f"{repo_id}: {_explained(error)}.") from error
    except Exception as error:
        # The Hub client wraps what stops one upload of several.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            raise OutputError(f"{repo_id}: {_explained(cause)}.") from error
        if is_lost_connection(cause):
            raise OutputError(
                f"{repo_id}: the connection to {endpoint()} fails ({_line(cause)}); check the network, the proxy or "
                f"HF_ENDPOINT, then {AGAIN}."
            ) from error
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise OutputError(
                f"{repo_id}: the Hub refuses the model card: {_line(error)}; mend it and push again."
            ) from error
        if isinstance(error, ValueError | RuntimeError | OSError):
            raise OutputError(f"{repo_id}: the upload failed: {_line(cause)} ({AGAIN}).") from error
        raise
    finally:
        logging.set_verbosity(verbosity)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether the connection failed, rather than the Hub refusing something."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the second is that of the HTTP library it uses

    return isinstance(error, HTTPError | ConnectionError) and not isinstance(error, HfHubHTTPError)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed if it is made again."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 409, 412, 429) or cause.response.status_code >= 500
    return is_lost_connection(cause)


def offline(repo_id: str) -> str:
    return f"{repo_id}: cannot be pushed to in offline mode; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE)."


def no_token(repo_id: str) -> str:
    return f"{repo_id}: there is no token to push with; {LOGIN}."


def _explained(error: "HfHubHTTPError") -> str:
    status = error.response.status_code
    told = f" (the Hub says: {error.server_message})" if error.server_message else ""
    if status >= 500:
        return f"the Hub has trouble (status {status}); {AGAIN}{told}"
    return _REASONS.get(status, f"the Hub refuses with status {status}") + told


def _line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
