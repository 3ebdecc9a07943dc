"""An archive reached by DICOMweb: QIDO-RS to find, WADO-RS to fetch, as the images are stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from requests.auth import HTTPBasicAuth

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
from consilium_client.data.pacs.config import WebConfig, check_private, read_secret
from consilium_client.data.pacs.retry import SeriesError, TransientError
from consilium_common.errors import ConsiliumError

#: Matches asked for at once; an archive may answer with fewer.
_PAGE: Final = 500
#: Answers that pass: too many requests, and gateways in front of a server that restarts.
_PASSING: Final = frozenset({429, 502, 503, 504})
#: Libraries that log what an archive says, or an address that holds identifiers, to stderr where
#: nobody has told them otherwise.
_TALKATIVE: Final = ("retrying", "dicomweb_client", "urllib3")
_AS_STORED: Final = (("application/dicom", "*"),)


class WebArchive:
    """See :class:`~consilium_client.data.pacs.archive.Archive`.

    Parameters
    ----------
    config : WebConfig

    Raises
    ------
    ConsiliumError
        ``pacs.secret`` or ``pacs.tls-files``.
    """

    def __init__(self, config: WebConfig) -> None:
        from dicomweb_client import DICOMwebClient

        for name in _TALKATIVE:
            logging.getLogger(name).addHandler(logging.NullHandler())
        parts = urlsplit(config.url)
        self._where = f"{parts.scheme}://{parts.netloc}"
        self._session = _session(config)
        self._client = DICOMwebClient(
            config.url.rstrip("/"),
            session=self._session,
            timeout=(config.connect_timeout, config.answer_timeout),
            permissive_uid=True,  # checked by us where they come in
        )
        # How long to wait between attempts is decided in one place, for both protocols.
        self._client.set_http_retry_params(retry=False)
        self._reached = False

    def studies(self, query: StudyQuery) -> list[FoundStudy]:
        """See Archive."""
        asked = {
            "StudyDate": query.dates,
            "AccessionNumber": query.accession,
            "PatientID": query.patient,
            "ModalitiesInStudy": query.modality,
        }
        filters = {key: value for key, value in asked.items() if value}
        # All else comes unasked (DICOM PS3.18 table 10.6.3-3); asking for a key that is also
        # matched makes some archives find nothing.
        fields = ["StudyDescription"]
        matches = self._pages(
            lambda **page: self._client.search_for_studies(
                fields=fields, search_filters=filters, **page
            ),
            "StudyInstanceUID",
        )
        return [study_of(match) for match in matches]

    def series(self, study: FoundStudy) -> list[FoundSeries]:
        """See Archive."""
        fields = ["Modality", "SeriesDescription", "NumberOfSeriesRelatedInstances"]
        matches = self._pages(
            lambda **page: self._client.search_for_series(study.uid, fields=fields, **page),
            "SeriesInstanceUID",
        )
        return [series_of(study, match) for match in matches]

    def instances(self, series: FoundSeries) -> list[Instance]:
        """See Archive."""
        matches = self._pages(
            lambda **page: self._client.search_for_instances(
                series.study.uid, series.uid, fields=["SOPClassUID"], **page
            ),
            "SOPInstanceUID",
        )
        return [instance_of(match) for match in matches]

    def fetch(
        self, series: FoundSeries, wanted: Sequence[Instance], *, whole: bool, keep: Keep
    ) -> None:
        """See Archive. One object at a time is in memory."""
        with self._asking():
            for dataset in self._objects(series, wanted, whole):
                content = BytesIO()
                # What was not looked into is written as it was read.
                dataset.save_as(content, enforce_file_format=True)
                self._session.restart()
                keep(content.getvalue())

    def close(self) -> None:
        """See Archive."""
        self._session.close()

    def _objects(
        self, series: FoundSeries, wanted: Sequence[Instance], whole: bool
    ) -> Iterator[Any]:
        self._session.restart()
        study = series.study.uid
        if whole:
            yield from self._client.iter_series(study, series.uid, media_types=_AS_STORED)
            return
        for item in wanted:
            yield self._client.retrieve_instance(
                study, series.uid, item.uid, media_types=_AS_STORED
            )

    def _pages(self, search: Callable[..., Any], key: str) -> list[Any]:
        """Ask page after page until one brings nothing new: some archives ignore the offset."""
        from pydicom.dataset import Dataset

        found: dict[str, Any] = {}
        offset = 0
        while True:
            self._session.restart()
            with self._asking():
                page = [
                    Dataset.from_json(match) for match in search(limit=_PAGE, offset=offset) or []
                ]
                new = {str(match[key].value): match for match in page}
            if new.keys() <= found.keys():
                return list(found.values())
            found.update(new)
            offset += len(page)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn whatever goes wrong with a request into one clear error.

        The library's own words are left out: they quote addresses, which hold identifiers.
        """
        try:
            yield
        except ConsiliumError:
            raise
        except requests.HTTPError as error:
            raise self._refused(error.response) from error
        except requests.exceptions.SSLError as error:
            if self._reached:  # a connection that breaks off may show as an error of TLS
                raise self._broken() from error
            raise ConsiliumError(
                "pacs.tls",
                "No TLS connection: the archive's certificate is not believed, or ours is not.",
                where=self._where,
                hint="Check `tls` in pacs.yaml with the archive's administrator.",
            ) from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise self._broken() from error
        except (requests.ConnectionError, requests.Timeout) as error:
            if self._reached:
                raise self._broken() from error
            raise ConsiliumError(
                "pacs.unreachable",
                "The archive cannot be reached.",
                where=self._where,
                hint="Check the url in pacs.yaml, the network and the firewall.",
            ) from error
        except Exception as error:
            raise SeriesError(
                "pacs.answer",
                f"The archive's answer cannot be read ({type(error).__name__}).",
                where=self._where,
                hint="Check that the url is that of a DICOMweb service.",
            ) from error
        self._reached = True

    def _broken(self) -> TransientError:
        return TransientError(
            "pacs.broken",
            "The connection to the archive ended.",
            where=self._where,
            hint="Give the same command again: what is whole is not fetched twice.",
        )

    def _refused(self, response: requests.Response | None) -> ConsiliumError:
        if response is None:
            return self._broken()
        status = response.status_code
        if status in (401, 403):
            return ConsiliumError(
                "pacs.denied",
                f"The archive does not let us in (HTTP {status}).",
                where=self._where,
                hint="Check user, password_file or token_file in pacs.yaml, and our rights there.",
            )
        if status in _PASSING:
            after = response.headers.get("Retry-After", "")
            return TransientError(
                "pacs.busy",
                f"The archive is busy (HTTP {status}).",
                where=self._where,
                after=float(after) if after.isdecimal() else 0.0,
            )
        kind = SeriesError if self._reached else ConsiliumError
        return kind(
            "pacs.failed",
            f"The archive refused the request (HTTP {status}).",
            where=self._where,
            hint="Check that the url in pacs.yaml ends where QIDO-RS begins, often /dicom-web.",
        )


class _Session(requests.Session):
    """Follows nobody elsewhere, believes no environment, and stops an answer that does not end.

    Parameters
    ----------
    largest : int
        Most bytes of one answer, or of one object in it.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        # Neither proxies nor ~/.netrc nor another CA from the environment.
        self.trust_env = False
        self._largest = largest
        self._received = 0

    def restart(self) -> None:
        """Begin to count the next object."""
        self._received = 0

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send without following a redirection, which could carry identifiers elsewhere."""
        response = super().send(request, **{**options, "allow_redirects": False, "stream": True})
        if response.is_redirect:
            response.close()
            raise ConsiliumError(
                "pacs.redirected",
                "The archive sends us to another address; we do not follow.",
                hint="If the other address is right, put it into pacs.yaml.",
            )
        chunks = response.iter_content

        def counted(*args: Any, **named: Any) -> Iterator[Any]:
            for chunk in chunks(*args, **named):
                self._received += len(chunk)
                if self._received > self._largest:
                    response.close()
                    raise SeriesError(
                        "pacs.too-large",
                        f"The archive sent more than {self._largest // 2**20} MiB for one object.",
                        hint="Raise largest_image_mib in pacs.yaml if the series is meant.",
                    )
                yield chunk

        response.iter_content = counted  # type: ignore[method-assign]
        return response


def _session(config: WebConfig) -> _Session:
    session = _Session(config.largest_image)
    if config.tls is not None:
        session.verify = config.tls.ca
        if config.tls.certificate and config.tls.key:
            check_private(config.tls.key)
            session.cert = (config.tls.certificate, config.tls.key)
    if config.user is not None and config.password_file is not None:
        # Bytes: the library would write text as Latin-1.
        secret = read_secret(config.password_file).encode()
        session.auth = HTTPBasicAuth(config.user.encode(), secret)
    if config.token_file is not None:
        session.headers["Authorization"] = f"Bearer {read_secret(config.token_file)}"
    return session
