"""The front door's rooms: the environment, the lessons, running them, and the page that shows what they found."""

import os
import sys

# Without this, jsonschema, which checks notebooks, spends two seconds on a grammar of web addresses in every process.
sys.modules.setdefault("rfc3987_syntax", None)


class CourseError(Exception):
    """Something that the caller can put right: one message that says what and how, and the exit status."""

    def __init__(self, message, status=1):
        """Keep the message for the reader and the status for the shell: 2 for a wrong call, 1 for a failure."""
        super().__init__(message)
        self.status = status


def cores():
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
