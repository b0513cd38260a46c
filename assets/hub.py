"""Whether the hub can be asked."""

import os
import socket
from functools import cache
from urllib.parse import urlparse

from huggingface_hub import constants


@cache
def hub_reachable() -> bool:
    """Say whether the hub's address answers; asked once, as the hub's own client tries again for a minute."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # then it is the proxy that knows the address
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
