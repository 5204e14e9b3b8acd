"""What foreign libraries print, without the names that are nobody else's business."""

from __future__ import annotations

import re
import socket
from pathlib import Path

_QUOTED = re.compile(r"(?<=['\"])(?:[A-Za-z]:)?[/\\][^'\"\n]*[/\\]")
_DIRECTORIES = re.compile(r"(?:[A-Za-z]:)?[/\\\\](?:[^\s'\"/\\\\:]+[/\\\\])+")


def anonymous(text: str) -> str:
    """The text with every directory, the host name and the user's home folder name taken out.

    Of a path only its last part stays, as in the plan.
    """
    text = _DIRECTORIES.sub("…/", _QUOTED.sub("…/", text))
    for name in (socket.gethostname(), Path.home().name):
        if name:
            text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text
