"""The HTTPS endpoint of the link on loopback: few connections at a time, and none that lingers.

A connection whose handshake fails leaves asyncio's TLS objects behind in a circle of references,
with a buffer of 256 KiB. The garbage collector goes by the number of objects and not by their size:
without help two thousand broken connections cost 600 MB until it looks at them.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final

from consilium_common.identity.loopback import Loopback

if TYPE_CHECKING:
    import uvicorn

#: Taken in at once; a SuperNode has about ten, and more wait in the kernel.
_ACCEPTED: Final = 64
#: After so many connections what is left of ended ones is collected: at most 16 MiB.
_COLLECTED: Final = 64


def endpoint(application: Any, loopback: Loopback, port: int) -> uvicorn.Server:
    """Return a server of ``application`` (ASGI) on ``127.0.0.1:port``, not yet serving."""
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    connections = 0

    def connected(*arguments: Any, **further: Any) -> Any:
        nonlocal connections
        connections += 1
        if connections % _COLLECTED == 0:
            gc.collect()
        return AutoHTTPProtocol(*arguments, **further)

    # What is here by now stays for good, and need not be looked through each time.
    gc.collect()
    gc.freeze()
    return uvicorn.Server(
        uvicorn.Config(
            application,
            host="127.0.0.1",
            port=port,
            ssl_certfile=str(loopback.certificate),
            ssl_keyfile=str(loopback.key),
            http=connected,  # it is called as the class would be
            backlog=_ACCEPTED,
            log_config=None,
            access_log=False,
            lifespan="off",
            interface="asgi3",
        )
    )
