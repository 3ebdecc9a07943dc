"""Our side of C-STORE: only the archive, only while a series is fetched, only what fits."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from consilium_client.data.pacs.archive import Keep
from consilium_client.data.pacs.config import DimseConfig
from consilium_client.data.pacs.retry import SeriesError
from consilium_client.data.pacs.tls import server_context
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from pynetdicom.association import Association

_OK: Final = 0x0000
_NOT_AUTHORISED: Final = 0x0124
_NO_RESOURCES: Final = 0xA700


class Receiver:
    """Hands each object to ``keep``; the first refusal ends the transfer.

    Parameters
    ----------
    keep : callable
        See :data:`~consilium_client.data.pacs.archive.Keep`.
    largest : int
        Most bytes of one object.
    """

    def __init__(self, keep: Keep, *, largest: int) -> None:
        self._keep = keep
        self._largest = largest
        self._lock = threading.Lock()
        self._arrived: dict[Any, int] = defaultdict(int)
        self._request: Association | None = None
        self._error: ConsiliumError | None = None

    def handlers(self) -> list[Any]:
        """Return the handlers of an association on which objects come."""
        from pynetdicom import evt

        return [(evt.EVT_C_STORE, self.store), (evt.EVT_PDU_RECV, self.count)]

    def take_from(self, request: Association) -> None:
        """Name the association of our request: it is ended together with the transfer."""
        self._request = request

    def check(self) -> None:
        """Raise what ended the transfer, if anything did."""
        if self._error is not None:
            raise self._error

    def count(self, event: Any) -> None:
        """Add up what arrives of one object, so that none fills the memory."""
        from pynetdicom.pdu import P_DATA_TF

        if not isinstance(event.pdu, P_DATA_TF):
            return
        self._arrived[event.assoc] += event.pdu.pdu_length
        if self._arrived[event.assoc] > self._largest:
            self._refuse(
                event,
                SeriesError(
                    "pacs.too-large",
                    f"The archive sent an object of more than {self._largest // 2**20} MiB.",
                    hint="Raise largest_image_mib in pacs.yaml if the series is meant.",
                ),
            )

    def store(self, event: Any) -> int:
        """Store one object; the answer is a status of DICOM PS3.4 B.2.3."""
        with self._lock:
            self._arrived.pop(event.assoc, None)
            if self._error is not None:
                return _NO_RESOURCES
            try:
                self._keep(event.encoded_dataset())
            except ConsiliumError as error:
                self._refuse(event, error)
            except Exception as error:
                self._refuse(
                    event,
                    SeriesError(
                        "pacs.damaged",
                        f"The archive sent an object that cannot be read ({type(error).__name__}).",
                        hint="Ask the archive's administrator to check the series.",
                    ),
                )
            return _NO_RESOURCES if self._error is not None else _OK

    def _refuse(self, event: Any, error: ConsiliumError) -> None:
        if self._error is None:
            self._error = error
        if event.assoc is not self._request:
            event.assoc.abort(block=False)
        if self._request is not None:
            # What the library says when no answer came in time: whoever waits for the next answer
            # ends the association. Ended from here, it would go on waiting until the time-out.
            self._request.dimse.msg_queue.put((None, None))


class Server:
    """Where a C-MOVE's images come in; open while the pull runs, and deaf between series.

    Raises
    ------
    ConsiliumError
        ``pacs.listen`` when the port cannot be used, ``pacs.tls-files`` or ``pacs.secret``.
    """

    def __init__(self, config: DimseConfig) -> None:
        from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
        from pynetdicom.ae import ApplicationEntity

        assert config.receive is not None  # the configuration has checked it
        self._largest = config.largest_image
        self._receiver: Receiver | None = None
        self._senders = _addresses(config.receive.senders or [config.host])
        entity = ApplicationEntity(config.calling_ae)
        entity.require_called_aet = True
        entity.require_calling_aet = [config.called_ae]
        entity.network_timeout = config.answer_timeout
        entity.acse_timeout = config.connect_timeout
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        try:
            self._server = entity.start_server(
                (config.receive.listen, config.receive.port),
                block=False,
                ssl_context=server_context(config.tls) if config.tls else None,
                evt_handlers=[
                    (evt.EVT_REQUESTED, self._requested),
                    (evt.EVT_C_STORE, self._store),
                    (evt.EVT_PDU_RECV, self._count),
                ],
            )
        except OSError as error:
            raise ConsiliumError(
                "pacs.listen",
                f"Cannot listen for the archive: {error.strerror or 'the address is not ours'}.",
                where=f"{config.receive.listen}:{config.receive.port}",
                hint="Choose another port under `receive` in pacs.yaml, or end what uses it.",
            ) from error

    @contextmanager
    def taking(self, receiver: Receiver) -> Iterator[None]:
        """Take objects for ``receiver``, and before and after for nobody."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()

    def _requested(self, event: Any) -> None:
        if event.assoc.requestor.address not in self._senders or self._receiver is None:
            event.assoc.abort(block=False)

    def _store(self, event: Any) -> int:
        receiver = self._receiver
        if receiver is None or event.assoc.requestor.address not in self._senders:
            return _NOT_AUTHORISED
        return receiver.store(event)

    def _count(self, event: Any) -> None:
        if (receiver := self._receiver) is not None:
            receiver.count(event)


def _addresses(hosts: list[str]) -> frozenset[str]:
    found: set[str] = set()
    for host in hosts:
        try:
            found |= {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except OSError as error:
            raise ConsiliumError(
                "pacs.unreachable", "The archive's name is not known here.", where=host
            ) from error
    return frozenset(found)
