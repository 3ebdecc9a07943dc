"""An archive reached by DICOM's own protocol: C-FIND, and C-GET or C-MOVE, with TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from consilium_client.data.pacs.archive import (
    FoundSeries,
    FoundStudy,
    Instance,
    Keep,
    StudyQuery,
    instance_of,
    series_of,
    study_of,
)
from consilium_client.data.pacs.config import DimseConfig
from consilium_client.data.pacs.receive import Receiver, Server
from consilium_client.data.pacs.retry import IncompleteError, SeriesError, TransientError
from consilium_client.data.pacs.tls import client_context
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from pynetdicom.ae import ApplicationEntity
    from pynetdicom.association import Association
    from pynetdicom.presentation import PresentationContext

#: Most presentation contexts of one association (DICOM PS3.8 9.3.2.2: odd numbers up to 255).
_CONTEXTS: Final = 128
#: Bytes of one PDU that we take; the usual 16 KiB make large images slow.
_PDU: Final = 2**18
#: Objects named in one request; a UID list must fit into one message of every archive.
_NAMED: Final = 100
_PENDING: Final = (0xFF00, 0xFF01)
#: Ended, with some objects that could not be sent (DICOM PS3.4 C.4.3.1.4): counted by the caller.
_PARTLY: Final = 0xB000
_REFUSED_AE: Final = {
    # (result source, diagnostic) of DICOM PS3.8 table 9-21.
    (1, 3): (
        "pacs.calling-ae",
        "The archive does not know our title (calling AE).",
        "Have the archive's administrator register calling_ae of pacs.yaml, or correct it there.",
    ),
    (1, 7): (
        "pacs.called-ae",
        "The archive does not go by this title (called AE).",
        "Correct called_ae in pacs.yaml.",
    ),
}


class DimseArchive:
    """See :class:`~consilium_client.data.pacs.archive.Archive`.

    Parameters
    ----------
    config : DimseConfig

    Raises
    ------
    ConsiliumError
        ``pacs.tls-files`` or ``pacs.secret``.
    """

    def __init__(self, config: DimseConfig) -> None:
        self._config = config
        self._where = f"{config.host}:{config.port}"
        self._tls = client_context(config.tls) if config.tls else None
        self._query: Association | None = None
        self._server: Server | None = None
        #: The first contact fails at once: waiting seldom mends a wrong address or title.
        self._reached = False

    def studies(self, query: StudyQuery) -> list[FoundStudy]:
        """See Archive."""
        keys = {
            "StudyInstanceUID": "",
            "StudyDate": query.dates,
            "StudyDescription": "",
            "AccessionNumber": query.accession,
            "PatientID": query.patient,
            "ModalitiesInStudy": query.modality,
        }
        return [study_of(match) for match in self._find("STUDY", keys)]

    def series(self, study: FoundStudy) -> list[FoundSeries]:
        """See Archive."""
        keys = {
            "StudyInstanceUID": study.uid,
            "SeriesInstanceUID": "",
            "Modality": "",
            "SeriesDescription": "",
            "NumberOfSeriesRelatedInstances": None,
        }
        return [series_of(study, match) for match in self._find("SERIES", keys)]

    def instances(self, series: FoundSeries) -> list[Instance]:
        """See Archive."""
        keys = {
            "StudyInstanceUID": series.study.uid,
            "SeriesInstanceUID": series.uid,
            "SOPInstanceUID": "",
            "SOPClassUID": "",
        }
        return [instance_of(match) for match in self._find("IMAGE", keys)]

    def fetch(
        self, series: FoundSeries, wanted: Sequence[Instance], *, whole: bool, keep: Keep
    ) -> None:
        """See Archive."""
        uids = {"StudyInstanceUID": series.study.uid, "SeriesInstanceUID": series.uid}
        requests: list[tuple[str, dict[str, Any]]] = [("SERIES", uids)]
        if not whole:
            requests = [
                (
                    "IMAGE",
                    {**uids, "SOPInstanceUID": [i.uid for i in wanted[start : start + _NAMED]]},
                )
                for start in range(0, len(wanted), _NAMED)
            ]
        receiver = Receiver(keep, largest=self._config.largest_image)
        classes = sorted({item.sop_class for item in wanted})
        move = self._config.retrieve == "c-move"
        for level, keys in requests:
            if move:
                self._move(level, keys, receiver)
            else:
                self._get(level, keys, receiver, classes)

    def close(self) -> None:
        """See Archive."""
        if self._query is not None and self._query.is_established:
            self._query.release()
        self._query = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _find(self, level: str, keys: dict[str, Any]) -> Iterator[Any]:
        from pynetdicom.sop_class import (  # type: ignore[attr-defined]
            StudyRootQueryRetrieveInformationModelFind as Find,
        )

        if self._query is None or not self._query.is_established:
            self._query = self._associate([_context(Find)], {})
        identifier = _identifier(level, keys)
        for status, match in self._query.send_c_find(identifier, Find):
            code = self._status(status, "C-FIND")
            if code in _PENDING:
                if match is None:
                    raise ConsiliumError(
                        "pacs.answer", "The archive's answer cannot be read.", where=self._where
                    )
                yield match
            elif code:
                raise self._failed("C-FIND", code)

    def _get(
        self, level: str, keys: dict[str, Any], receiver: Receiver, classes: Sequence[str]
    ) -> None:
        from pynetdicom.sop_class import (  # type: ignore[attr-defined]
            StudyRootQueryRetrieveInformationModelGet as Get,
        )

        contexts, roles = _storage(classes)
        association = self._associate([_context(Get), *contexts], roles, receiver.handlers())
        if not any(c.abstract_syntax == Get for c in association.accepted_contexts):
            association.release()
            raise ConsiliumError(
                "pacs.no-c-get",
                "The archive does not offer C-GET to us.",
                where=self._where,
                hint="Say `retrieve: c-move` in pacs.yaml, or have C-GET permitted.",
            )
        receiver.take_from(association)
        try:
            self._outcome(association.send_c_get(_identifier(level, keys), Get), receiver, "C-GET")
        finally:
            _end(association)

    def _move(self, level: str, keys: dict[str, Any], receiver: Receiver) -> None:
        from pynetdicom.sop_class import (  # type: ignore[attr-defined]
            StudyRootQueryRetrieveInformationModelMove as Move,
        )

        if self._server is None:
            self._server = Server(self._config)
        association = self._associate([_context(Move)], {})
        receiver.take_from(association)
        try:
            with self._server.taking(receiver):
                answers = association.send_c_move(
                    _identifier(level, keys), self._config.calling_ae, Move
                )
                self._outcome(answers, receiver, "C-MOVE")
        finally:
            _end(association)

    def _outcome(
        self, answers: Iterator[tuple[Any, Any]], receiver: Receiver, request: str
    ) -> None:
        code = 0
        try:
            for status, _ in answers:
                receiver.check()
                code = self._status(status, request)
        finally:
            receiver.check()
        if code == 0xA801:
            raise ConsiliumError(
                "pacs.destination",
                "The archive does not know where to send (move destination).",
                where=self._where,
                hint="Have the archive's administrator register calling_ae with our address and "
                "the port under `receive`.",
            )
        if code not in (0, _PARTLY, *_PENDING):
            raise self._failed(request, code)

    def _status(self, status: Any, request: str) -> int:
        """Return the status code; an empty status means that the connection is gone."""
        if "Status" not in status:
            raise TransientError(
                "pacs.broken",
                f"The connection to the archive ended during {request}.",
                where=self._where,
                hint="Give the same command again: what is whole is not fetched twice.",
            )
        return int(status.Status)

    def _failed(self, request: str, code: int) -> ConsiliumError:
        # 0xA7xx: out of resources, or sub-operations that could not be done: DICOM PS3.4 C.4.
        kind = IncompleteError if code >> 8 == 0xA7 else SeriesError
        return kind(
            "pacs.busy" if kind is IncompleteError else "pacs.failed",
            f"The archive refused {request} with status 0x{code:04X}.",
            where=self._where,
            hint="The archive's log says why; its administrator can look for the status.",
        )

    def _entity(self) -> ApplicationEntity:
        from pynetdicom.ae import ApplicationEntity

        entity = ApplicationEntity(self._config.calling_ae)
        entity.connection_timeout = self._config.connect_timeout
        entity.maximum_pdu_size = _PDU
        entity.acse_timeout = self._config.connect_timeout
        entity.dimse_timeout = self._config.answer_timeout
        entity.network_timeout = self._config.answer_timeout
        return entity

    def _associate(
        self,
        contexts: list[PresentationContext],
        roles: dict[str, Any],
        handlers: list[Any] | None = None,
    ) -> Association:
        config = self._config
        name = (config.tls.server_name if config.tls else None) or config.host
        address = self._address()
        association = self._entity().associate(
            address,
            config.port,
            contexts,
            ae_title=config.called_ae,
            ext_neg=list(roles.values()),
            tls_args=(self._tls, name) if self._tls else None,
            evt_handlers=handlers or [],
        )
        if association.is_established:
            self._reached = True
            return association
        raise self._unassociated(association, address, name)

    def _address(self) -> str:
        try:
            return str(socket.getaddrinfo(self._config.host, self._config.port)[0][4][0])
        except OSError as error:
            raise self._unreachable("its name is not known here") from error

    def _unassociated(self, association: Association, address: str, name: str) -> ConsiliumError:
        if association.is_rejected:
            answer: Any = association.acceptor.primitive
            known = _REFUSED_AE.get((answer.result_source, answer.diagnostic))
            if known and answer.result == 1:
                code, message, hint = known
                return ConsiliumError(code, message, where=self._where, hint=hint)
            kind = TransientError if answer.result == 2 else ConsiliumError
            return kind(
                "pacs.busy" if kind is TransientError else "pacs.refused",
                "The archive refused the connection "
                f"(source {answer.result_source}, reason {answer.diagnostic}).",
                where=self._where,
                hint="Have its administrator permit our title, and look into its log.",
            )
        return self._reason(address, name)

    def _reason(self, address: str, name: str) -> ConsiliumError:
        """Find out why there was no association: the library only says that there was none."""
        try:
            plain = socket.create_connection(
                (address, self._config.port), self._config.connect_timeout
            )
            with plain:
                if self._tls is not None:
                    self._tls.wrap_socket(plain, server_hostname=name).close()
        except ssl.SSLCertVerificationError as error:
            return ConsiliumError(
                "pacs.tls",
                f"The archive's certificate is not believed: {error.verify_message}.",
                where=self._where,
                hint="Check `ca` and `server_name` in pacs.yaml with the archive's administrator.",
            )
        except ssl.SSLError as error:
            return ConsiliumError(
                "pacs.tls",
                f"No TLS connection: {error.reason or 'the handshake failed'}.",
                where=self._where,
                hint="Check that the port speaks DICOM over TLS 1.2 or newer.",
            )
        except OSError as error:
            return self._unreachable(error.strerror or "no answer in time")
        if self._reached:
            return TransientError(
                "pacs.broken", "The archive ended the connection.", where=self._where
            )
        return ConsiliumError(
            "pacs.refused",
            "The archive is there, and ended the connection before any DICOM answer.",
            where=self._where,
            hint="Check whether it wants TLS (`tls` in pacs.yaml), or another certificate of ours.",
        )

    def _unreachable(self, why: str) -> ConsiliumError:
        kind = TransientError if self._reached else ConsiliumError
        return kind(
            "pacs.unreachable",
            f"The archive cannot be reached: {why}.",
            where=self._where,
            hint="Check host and port in pacs.yaml, the network and the firewall.",
        )


def _identifier(level: str, keys: dict[str, Any]) -> Any:
    from pydicom.dataset import Dataset

    dataset = Dataset()
    dataset.QueryRetrieveLevel = level
    if any(isinstance(value, str) and not value.isascii() for value in keys.values()):
        dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        setattr(dataset, keyword, value)
    return dataset


def _context(sop_class: str) -> PresentationContext:
    from pynetdicom.presentation import build_context

    return build_context(sop_class)


def _storage(classes: Sequence[str]) -> tuple[list[PresentationContext], dict[str, Any]]:
    """Offer each class in each transfer syntax by itself, so that images come as they are stored.

    In one context with many syntaxes the archive would choose one of them for all.
    """
    from pynetdicom import ALL_TRANSFER_SYNTAXES
    from pynetdicom.presentation import build_context, build_role

    # The uncompressed ones first; one context is the request's own.
    each = max(1, (_CONTEXTS - 1) // max(1, len(classes)))
    contexts = [
        build_context(sop_class, syntax)
        for sop_class in classes
        for syntax in ALL_TRANSFER_SYNTAXES[:each]
    ]
    roles = {name: build_role(name, scp_role=True) for name in classes}
    return contexts[: _CONTEXTS - 1], roles


def _end(association: Association) -> None:
    if association.is_established:
        association.release()
