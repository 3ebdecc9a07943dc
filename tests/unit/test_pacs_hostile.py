"""Archives that send what they should not, too much, or nothing more: real sockets, one error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pacs_fixtures import MemoryArchive, series_files
from pynetdicom import AE, StoragePresentationContexts, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from consilium_client.data.pacs.archive import FoundSeries, FoundStudy, Instance, StudyQuery
from consilium_client.data.pacs.config import Config, DimseConfig, Receive, WebConfig
from consilium_client.data.pacs.dimse import DimseArchive
from consilium_client.data.pacs.download import Download
from consilium_client.data.pacs.retry import TransientError
from consilium_client.data.pacs.web import WebArchive
from consilium_common.errors import ConsiliumError
from consilium_common.processes import free_port


@contextmanager
def scp(answer: Callable[[Any], Iterator[Any]]) -> Iterator[int]:
    """Run an archive that answers every C-GET with ``answer``."""
    entity = AE("A")
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    for context in StoragePresentationContexts:
        entity.add_supported_context(str(context.abstract_syntax), scp_role=True, scu_role=False)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_GET, answer)]
    )
    assert server is not None
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def dimse(port: int, **changes: Any) -> DimseConfig:
    return DimseConfig(
        kind="dimse", host="127.0.0.1", port=port, called_ae="A", answer_timeout=5.0, **changes
    )


def series_in(tmp_path: Path, images: int = 4) -> tuple[FoundSeries, list[Instance], list[Path]]:
    files = series_files(tmp_path / "series", images=images)
    archive = MemoryArchive()
    found = archive.add(files)
    return found, archive.instances(found), files


def fetched(
    archive: Any, out: Path, series: FoundSeries, wanted: Sequence[Instance]
) -> tuple[ConsiliumError | None, int, float]:
    """Fetch; return the error, the objects stored, and the seconds it took."""
    begun = time.monotonic()
    error = None
    with closing(archive), Download.opened(out) as download:
        inbox = download.inbox(series, wanted)
        try:
            archive.fetch(series, wanted, whole=True, keep=inbox.keep)
        except ConsiliumError as raised:
            error = raised
    return error, len(list(out.rglob("*.dcm"))), time.monotonic() - begun


def test_a_good_archive_is_believed(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path)

    def answer(event: Any) -> Iterator[Any]:
        yield len(files)
        for path in files:
            yield 0xFF00, pydicom.dcmread(path)

    with scp(answer) as port:
        error, stored, _ = fetched(DimseArchive(dimse(port)), tmp_path / "out", series, wanted)
    assert error is None and stored == 4


def test_another_patients_image_by_c_get_ends_the_transfer_at_once(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path)
    other = series_files(tmp_path / "other", patient="Somebody-else", images=1)

    def answer(event: Any) -> Iterator[Any]:
        yield len(files) + 1
        yield 0xFF00, pydicom.dcmread(files[0])
        for path in (*other, *files):
            yield 0xFF00, pydicom.dcmread(path)

    with scp(answer) as port:
        error, stored, took = fetched(DimseArchive(dimse(port)), tmp_path / "out", series, wanted)
    assert error is not None and error.code == "pacs.unasked"
    assert "Somebody-else" not in str(error) and stored == 1
    assert took < 4  # it does not wait for the time-out


def test_an_object_that_is_too_large_is_cut_off_while_it_comes(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path, images=1)
    large = pydicom.dcmread(files[0])
    large.Rows = large.Columns = 1200
    large.PixelData = bytes(2 * 1200 * 1200)

    def answer(event: Any) -> Iterator[Any]:
        yield 1
        yield 0xFF00, large

    with scp(answer) as port:
        config = dimse(port, largest_image_mib=1)
        error, stored, took = fetched(DimseArchive(config), tmp_path / "out", series, wanted)
    assert error is not None and error.code == "pacs.too-large" and stored == 0 and took < 4


def test_an_archive_that_falls_silent_is_left_after_the_time_out(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path)
    over = threading.Event()

    def answer(event: Any) -> Iterator[Any]:
        yield len(files)
        yield 0xFF00, pydicom.dcmread(files[0])
        over.wait(20)

    with scp(answer) as port:
        config = dimse(port).model_copy(update={"answer_timeout": 0.5})
        error, stored, took = fetched(DimseArchive(config), tmp_path / "out", series, wanted)
        over.set()
    assert isinstance(error, TransientError) and error.code == "pacs.broken"
    assert stored == 1 and took < 5


@pytest.mark.parametrize(
    ("title", "called", "senders"),
    [
        ("STRANGER", "CONSILIUM", []),
        ("A", "SOMEBODY", []),
        ("A", "CONSILIUM", ["127.0.0.2"]),
        ("A", "CONSILIUM", []),
    ],
)
def test_our_port_takes_images_from_the_archive_alone_and_only_when_asked(
    tmp_path: Path, title: str, called: str, senders: list[str]
) -> None:
    """A stranger is refused; so is the archive itself with another patient's image."""
    series, wanted, files = series_in(tmp_path, images=1)
    other = series_files(tmp_path / "other", patient="Somebody-else", images=1)
    ours = free_port()
    statuses: list[Any] = []

    def send(path: Path) -> None:
        entity = AE(title)
        entity.add_requested_context(CTImageStorage)
        association = entity.associate("127.0.0.1", ours, ae_title=called)
        if association.is_established:
            statuses.append(association.send_c_store(path).get("Status"))
            if association.is_established:
                association.release()
        else:
            statuses.append("refused")

    def move(event: Any) -> Iterator[Any]:
        send(other[0])
        yield None, None

    entity = AE("A")
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_MOVE, move)]
    )
    assert server is not None
    try:
        port = server.socket.getsockname()[1]
        config = dimse(port, retrieve="c-move", receive=Receive(port=ours, senders=senders))
        error, stored, took = fetched(DimseArchive(config), tmp_path / "out", series, wanted)
    finally:
        server.shutdown()
    assert stored == 0 and error is not None and len(statuses) == 1 and took < 4
    if (title, called, senders) == ("A", "CONSILIUM", []):
        assert error.code == "pacs.unasked" and statuses[0] != 0
    else:
        assert statuses == ["refused"]
        assert error.code == "pacs.destination"  # our port did not take the archive's own call
    send(files[0])
    assert statuses[-1] == "refused"  # nobody listens any more


# --- DICOMweb ---


@contextmanager
def http(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            handle(self)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def web(url: str, **changes: Any) -> WebArchive:
    config: Config = WebConfig(kind="dicomweb", url=url, answer_timeout=5.0, **changes)
    assert isinstance(config, WebConfig)
    return WebArchive(config)


def plain(status: int, body: bytes = b"", **headers: str) -> Callable[[Any], None]:
    def handle(request: Any) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return handle


@pytest.mark.parametrize(
    ("handle", "code", "transient"),
    [
        (plain(401), "pacs.denied", False),
        (plain(403), "pacs.denied", False),
        (plain(404), "pacs.failed", False),
        (plain(503, Retry_After="7"), "pacs.busy", True),
        (plain(429), "pacs.busy", True),
        (plain(302, Location="http://elsewhere.invalid/"), "pacs.redirected", False),
        (plain(200, b"<html>welcome</html>"), "pacs.answer", False),
        (plain(200, b'[{"0020000D": {"vr": "UI", "Value": ["../../etc"]}}]'), "pacs.answer", False),
        (plain(200, b'[{"0020000D": {"vr": "UI"}}]'), "pacs.answer", False),
        (plain(200, b'["' + b"x" * 2**21 + b'"]'), "pacs.too-large", False),
    ],
)
def test_what_a_web_archive_may_answer_is_one_clear_error(
    handle: Callable[[Any], None], code: str, transient: bool
) -> None:
    with (
        http(handle) as url,
        closing(web(url, largest_image_mib=1)) as archive,
        pytest.raises(ConsiliumError) as caught,
    ):
        archive.studies(StudyQuery(patient="Doe-17"))
    assert caught.value.code == code and isinstance(caught.value, TransientError) is transient
    assert "Doe-17" not in str(caught.value) and "welcome" not in str(caught.value)
    if isinstance(caught.value, TransientError) and code == "pacs.busy":
        assert caught.value.after in (0.0, 7.0)


def test_an_archive_that_ignores_the_offset_is_asked_twice_and_not_for_ever() -> None:
    asked: list[str] = []

    def handle(request: Any) -> None:
        asked.append(request.path)
        plain(200, b'[{"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}]')(request)

    with http(handle) as url, closing(web(url)) as archive:
        assert archive.studies(StudyQuery(modality="CT")) == [FoundStudy("1.2.3")]
    assert len(asked) == 2 and "offset=1" in asked[1]


def multipart(bodies: Sequence[bytes]) -> bytes:
    parts = b"".join(
        b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n" for body in bodies
    )
    return parts + b"--edge--\r\n"


RELATED = 'multipart/related; type="application/dicom"; boundary=edge'


def test_by_wado_too_only_what_was_asked_for_is_kept(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path)
    other = series_files(tmp_path / "other", patient="Somebody-else", images=1)
    bodies = [path.read_bytes() for path in (files[0], *other, *files[1:])]
    handle = plain(200, multipart(bodies), Content_Type=RELATED)
    with http(handle) as url:
        error, stored, _ = fetched(web(url), tmp_path / "out", series, wanted)
    assert error is not None and error.code == "pacs.unasked" and stored == 1


def test_a_body_that_breaks_off_keeps_what_was_whole(tmp_path: Path) -> None:
    series, wanted, files = series_in(tmp_path)
    body = multipart([path.read_bytes() for path in files])

    def handle(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Type", RELATED)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2])
        request.close_connection = True

    with http(handle) as url:
        archive = web(url)
        archive._reached = True  # as after the search that found the series
        error, stored, _ = fetched(archive, tmp_path / "out", series, wanted)
    assert isinstance(error, TransientError) and error.code == "pacs.broken"
    assert 0 <= stored < 4
    for path in (tmp_path / "out").rglob("*.dcm"):
        assert len(pydicom.dcmread(path).PixelData) == 6 * 5 * 2


def test_the_password_is_sent_as_utf_8_and_the_token_as_bearer(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("größer")
    secret.chmod(0o600)
    seen: list[str] = []

    def handle(request: Any) -> None:
        seen.append(request.headers["Authorization"])
        plain(200, b"[]")(request)

    with http(handle) as url:
        with closing(web(url, user="me", password_file=str(secret))) as archive:
            archive.studies(StudyQuery())
        secret.write_text("t0ken")
        with closing(web(url, token_file=str(secret))) as archive:
            archive.studies(StudyQuery())
    assert seen == ["Basic bWU6Z3LDtsOfZXI=", "Bearer t0ken"]
