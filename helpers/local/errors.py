"""How the local cloud says no: Google's status codes and, where Google has words for a refusal, those words."""

import errno
import sqlite3

from grpc import StatusCode

from helpers.local import PROJECT

# What Google's REST answers carry for each status of its RPCs.
HTTP_STATUS = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.ABORTED: 409,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,
    StatusCode.INTERNAL: 500,
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}

NO_CREDENTIALS = (
    "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
    "authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project. The local "
    "cloud takes only tokens signed by its own service account: call helpers.environment.connect() in this process."
)


class Refused(Exception):  # noqa: N818 - it is an answer, not an accident
    """A request that is answered with a status and a message instead of a result."""

    def __init__(self, code: StatusCode, message: str):
        """Refuse with a gRPC status code and words for the client."""
        super().__init__(message)
        self.code = code
        self.message = message


def not_found(name: str) -> Refused:
    """Refuse a resource that is not there."""
    return Refused(StatusCode.NOT_FOUND, f"The resource {name} is not found.")


def invalid(message: str) -> Refused:
    """Refuse a request whose content is wrong whatever the state of the cloud."""
    return Refused(StatusCode.INVALID_ARGUMENT, message)


def precondition(message: str) -> Refused:
    """Refuse a request that the present state of a resource does not allow."""
    return Refused(StatusCode.FAILED_PRECONDITION, message)


def unimplemented(what: str, instead: str = "") -> Refused:
    """Refuse what only Google Cloud can do, with what to use instead."""
    advice = instead or "it needs a project on Google Cloud: environment.connect(project=...)"
    return Refused(StatusCode.UNIMPLEMENTED, f"{what} is not part of the local cloud; {advice}.")


def other_project(project: str) -> Refused:
    """Refuse a project that is not the local cloud's."""
    return Refused(
        StatusCode.PERMISSION_DENIED,
        f"Permission denied on resource project {project}. The local cloud has one project, {PROJECT!r}: "
        f"leave the project away, or use environment.connect(project={project!r}) for Google Cloud.",
    )


def of_system(error: Exception) -> Refused | None:
    """Return the refusal for an error of the operating system that a user can mend, or None for any other error."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or (isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error)):
        return Refused(
            StatusCode.RESOURCE_EXHAUSTED,
            "The disk of the local cloud's folder is full: free some space and try again. Nothing was changed.",
        )
    return None
