"""Keys and passwords: where they may be, and how a text is shown without them.

A key belongs in an environment variable. A configuration is kept in `config.yaml`, compared, logged and shown, so it
may hold no key: `secret_in` finds one. `redacted` hides keys in texts of others, such as the error of a server that
repeats the key.
"""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

HIDDEN = "***"
SHORTEST_HIDDEN, SHORTEST_REFUSED = 8, 16
"""Shorter values of variables are not keys: "EMPTY" or "password" would be found in ordinary words."""

# A slash in a password is a mistake, and hidden with it. What follows a port is a path.
_IN_ADDRESS = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#'\"<>:]*:(?!\d+/)[^\s?#'\"<>]*)@")
_IN_QUERY = re.compile(
    r"([?&;#](?:[\w.-]*(?:key|token|secret|signature|password|passwd|credential)[\w.-]*|sig|pwd|auth)=)[^\s&;#'\"<>]+",
    re.IGNORECASE,
)
_OF_KEYS = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_(?!FILE|PATH|DIR)[A-Z0-9_]*)?$",
    re.IGNORECASE,
)
_named: set[str] = set()
"""Variables that an option names as those of a key."""


def key_of(variable: str) -> str | None:
    """Returns the key that an environment variable holds, without white space around it; None if there is none.

    Raises:
        ValueError: the variable's name looks like a key itself, or no request can carry the key. Shows neither.
    """
    if variable not in os.environ and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(
            "api_key_variable names no environment variable (its text is not shown, because it may be the key itself): "
            "give the variable's name, such as OPENAI_API_KEY"
        )
    _named.add(variable)
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(
            f"the key in {variable} holds a space, a line end or a letter that is not ASCII, and no request can carry "
            "these: set it again"
        )
    return key or None


def redacted(text: str) -> str:
    """Returns a text without secrets: keys in environment variables, and passwords and keys in addresses."""
    for secret in _secrets(SHORTEST_HIDDEN):
        text = text.replace(secret, HIDDEN)
    return _without_keys_of_addresses(text)


def secret_in(text: str) -> bool:
    """Returns whether a text of a configuration holds a secret."""
    return _without_keys_of_addresses(text) != text or any(one in text for one in _secrets(SHORTEST_REFUSED))


def _without_keys_of_addresses(text: str) -> str:
    if "@" in text:
        text = _IN_ADDRESS.sub(f"{HIDDEN}@", text)
    return _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text) if "=" in text else text


def _secrets(shortest: int) -> list[str]:
    """Returns the secrets of this process's environment in all forms in which a text may show them, longest first."""
    found = set()
    for name, value in os.environ.items():
        if name in _named or _OF_KEYS.search(name):
            for line in (value.strip(), *value.split()):
                found |= {line, quote(line, safe=""), json.dumps(line)[1:-1], repr(line)[1:-1]}
    return sorted((one for one in found if len(one) >= shortest), key=len, reverse=True)
