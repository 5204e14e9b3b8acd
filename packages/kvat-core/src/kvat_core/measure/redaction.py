"""What foreign libraries print, without the names that are nobody else's business."""

from __future__ import annotations

import os
import re
import socket
from pathlib import PurePath

_QUOTED = re.compile(r"(?<=['\"])(?:[A-Za-z]:)?[/\\][^'\"\n]*[/\\]")
_DIRECTORIES = re.compile(r"(?:[A-Za-z]:)?[/\\\\](?:[^\s'\"/\\\\:]+[/\\\\])+")


def anonymous(text: str) -> str:
    """The text with every directory, the host name and the user's home folder name taken out.

    Of a path only its last part stays, as in the plan. A user without a home folder has nothing to hide there.
    """
    text = _DIRECTORIES.sub("…/", _QUOTED.sub("…/", text))
    for name in filter(None, (socket.gethostname(), PurePath(os.path.expanduser("~")).name)):  # noqa: PTH111
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text
