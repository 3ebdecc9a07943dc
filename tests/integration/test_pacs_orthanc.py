"""Pulling from a real PACS: every protocol over TLS, every end of a connection, every refusal."""

from __future__ import annotations

import datetime as dt
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pydicom
import pytest
from data_fixtures import REAL
from federation import CONSILIUM, Answer, consilium, environment, wait_for
from orthanc import OUR_TITLE, PASSWORD, TITLE, USER, Orthanc, needs_orthanc
from pacs_fixtures import series_files

from consilium_client.data.ingest.dicom_headers import files_below, is_dicom
from consilium_client.data.pacs.archive import Archive
from consilium_client.data.pacs.cli import connect
from consilium_client.data.pacs.config import load_archive
from consilium_client.data.pacs.download import Download
from consilium_client.data.pacs.filters import Filters, Selection, find
from consilium_client.data.pacs.pull import Pulled, pull
from consilium_client.data.pacs.retry import BackOff
from consilium_common.errors import ConsiliumError
from consilium_common.processes import free_port

pytestmark = needs_orthanc

KINDS = ("get", "move", "web")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc that holds three patients' CT, and the real MR and CT where they are here."""
    folder = tmp_path_factory.mktemp("orthanc")
    made = [
        series_files(folder / "A", patient="Doe^Anna", AccessionNumber="ACC-1", images=12),
        series_files(
            folder / "B", patient="B-2", AccessionNumber="ACC-2", StudyDate="20191231"
        ),
        series_files(folder / "C", patient="Zoë", AccessionNumber="ACC-3", Modality="MR",
                     SeriesDescription="T2 Dixon", SpecificCharacterSet="ISO_IR 192"),
    ]  # fmt: skip
    compressed = [
        Path(str(pydicom.data.get_testdata_file(name, download=False)))
        for name in ("JPEG2000.dcm", "MR_small_RLE.dcm", "examples_ybr_color.dcm")
    ]
    # Of the real ones not the forty tiny slices: they cost time and show nothing new.
    real = [
        path
        for name in ("dicom-mr", "dicom-seg")
        for path in files_below(REAL / name)
        if path.stat().st_size > 30_000 and is_dicom(path)
    ]
    archive = Orthanc(folder / "run")
    archive.start()
    try:
        archive.upload([*(path for files in made for path in files), *compressed, *real])
        yield archive
    finally:
        archive.close()


class Site:
    """A site whose pacs.yaml knows the archive by every protocol."""

    def __init__(self, folder: Path, orthanc: Orthanc) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        self.secret = self.home / "password"
        self.secret.write_text(PASSWORD + "\n")
        self.secret.chmod(0o600)
        made = orthanc.certificates.folder
        tls = {
            "ca": str(made / "ca.pem"),
            "certificate": str(made / "ours.pem"),
            "key": str(made / "ours-key.pem"),
        }
        dimse: dict[str, Any] = {
            "kind": "dimse",
            "host": "127.0.0.1",
            "port": orthanc.dicom_port,
            "called_ae": TITLE,
            "calling_ae": OUR_TITLE,
            "tls": tls,
            "answer_timeout": 20,
        }
        receive = {"port": orthanc.move_port}
        self.archives: dict[str, dict[str, Any]] = {
            "get": dimse,
            "move": {**dimse, "retrieve": "c-move", "receive": receive},
            "web": {
                "kind": "dicomweb",
                "url": orthanc.url,
                "tls": {"ca": str(made / "ca.pem")},
                "user": USER,
                "password_file": "password",
                "answer_timeout": 20,
            },
        }
        self.write()

    def change(self, name: str, **values: Any) -> None:
        """Change one archive's entry."""
        self.archives[name] = {**self.archives[name], **values}
        self.write()

    def write(self) -> None:
        """Write pacs.yaml."""
        content = {"schema": "consilium/pacs/v1", "archives": self.archives}
        # JSON is YAML, without the anchors that a dumper writes for what it has seen.
        (self.home / "pacs.yaml").write_text(json.dumps(content))

    def pull(self, name: str, *arguments: object) -> Answer:
        """Pull into ``out-<name>`` by the command."""
        return consilium(
            "site", "data", "pull", name, self.folder / f"out-{name}", "--home", self.home,
            *arguments,
        )  # fmt: skip

    def open(self, name: str) -> closing[Archive]:
        """Open an archive in this process: starting one costs a second for each command."""
        return closing(connect(load_archive(self.home, name)))

    def find(self, name: str, **filters: Any) -> Selection:
        """Find series in this process."""
        with self.open(name) as archive:
            return find(archive, Filters(**filters))


@pytest.fixture
def site(tmp_path: Path, orthanc: Orthanc) -> Site:
    return Site(tmp_path, orthanc)


def values(folder: Path) -> dict[str, Any]:
    """Return every pulled object by its UID."""
    found = [pydicom.dcmread(path) for path in folder.rglob("*.dcm")]
    return {str(dataset.SOPInstanceUID): dataset for dataset in found}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_as_it_is_stored_by_every_protocol(
    site: Site, orthanc: Orthanc, kind: str
) -> None:
    modalities = [x for m in ("CT", "MR", "US", "OT", "NM", "SEG") for x in ("--modality", m)]
    pulled = site.pull(kind, *modalities).data
    stored = {}
    for path in (orthanc.folder / "storage").rglob("*"):
        if path.is_file() and is_dicom(path):
            dataset = pydicom.dcmread(path)
            stored[str(dataset.SOPInstanceUID)] = dataset
    came = values(site.folder / f"out-{kind}")
    assert came.keys() == stored.keys() and len(came) == pulled["images"]
    syntaxes = set()
    for uid, dataset in came.items():
        syntaxes.add(str(dataset.file_meta.TransferSyntaxUID))
        assert dataset.file_meta.TransferSyntaxUID == stored[uid].file_meta.TransferSyntaxUID
        assert dataset.PixelData == stored[uid].PixelData
        assert dataset.PatientID == stored[uid].PatientID
    # Compressed as they were: RLE, and one of JPEG 2000.
    assert "1.2.840.10008.1.2.5" in syntaxes
    assert any(syntax.startswith("1.2.840.10008.1.2.4.9") for syntax in syntaxes)


@pytest.mark.parametrize("kind", ["get", "web"])
def test_filters_find_and_lists_say_which_lines_have_no_match(site: Site, kind: str) -> None:
    wanted = {"ACC-2": 1, "ACC-9": 2, "ACC-1": 3}
    found = site.find(kind, accessions=wanted)
    assert [series.images for series in found.series] == [3, 12] and found.unmatched == (2,)
    recent = site.find(kind, accessions=wanted, since=dt.date(2020, 1, 1))
    assert [series.images for series in recent.series] == [12]
    old = site.find(kind, until=dt.date(2019, 12, 31), since=dt.date(2019, 12, 31))
    assert [series.study.accession for series in old.series] == ["ACC-2"]
    assert len(site.find(kind, patients={"B-2": 1}, modalities=("CT",)).series) == 1
    described = site.find(kind, modalities=("MR",), series="t2 d*")
    assert [series.study.patient for series in described.series] == ["Zoë"]
    assert not site.find(kind, patients={"B-2": 1}, min_images=4).series


def test_a_patient_is_found_under_any_alphabet(site: Site) -> None:
    # By C-FIND alone: Orthanc 1.10 does not decode what a web address must encode.
    assert len(site.find("get", patients={"Zoë": 1, "Doe^Anna": 2}).series) == 2


def test_a_list_on_standard_input_is_pulled_and_imported(site: Site) -> None:
    done = subprocess.run(
        [CONSILIUM, "site", "data", "pull", "get", "out", "--accessions", "-", "--home", site.home],
        input="ACC-1\nACC-9\nACC-2\n", capture_output=True, text=True, cwd=site.folder, timeout=60,
        env=environment(), check=True,
    )  # fmt: skip
    assert "Pulled 2 series with 15 images" in done.stdout
    assert "Next: consilium site data import out" in done.stdout
    assert "Nothing fits for line 2" in done.stderr and "ACC-" not in done.stdout + done.stderr
    out = site.folder / "out"
    (out / "labels.csv").write_text("patient_id,label\nDoe^Anna,ill\nB-2,well\n")
    imported = consilium("site", "data", "import", out, "--home", site.home, "--site", "north")
    assert (imported.data["cases"], imported.data["patients"]) == (2, 2)


@pytest.mark.parametrize("kind", ["get", "web"])
def test_a_killed_pull_goes_on_where_it_ended(site: Site, orthanc: Orthanc, kind: str) -> None:
    modalities = ("--modality", "CT", "--modality", "MR", "--modality", "SEG")
    out = site.folder / f"out-{kind}"
    running = subprocess.Popen(
        [CONSILIUM, "site", "data", "pull", kind, str(out), "--home", str(site.home), *modalities],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    try:
        wait_for(
            lambda: list(out.glob(".pull/*.json")),
            "the first whole series",
            pause=0.002,
            timeout=20,
        )
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    whole = len(list(out.glob(".pull/*.json")))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.dcm")}
    answer = site.pull(kind, *modalities).data
    assert answer["already"] == whole and answer["series"] >= 1
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert len(values(out)) == len(times) + answer["images"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_dies_and_comes_back_is_waited_for(
    site: Site, orthanc: Orthanc, kind: str
) -> None:
    out = site.folder / f"out-{kind}"

    said: list[str] = []

    def pull_patiently() -> tuple[int, Pulled]:
        with site.open(kind) as archive, Download.opened(out) as download:
            wanted = find(archive, Filters(modalities=("CT", "MR", "NM"))).series
            back_off = BackOff(retries=8, first=0.5)
            return len(wanted), pull(archive, wanted, download, back_off, say=said.append)

    # Orthanc is started by the main thread: it dies with the thread that has started it.
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(pull_patiently)
        wait_for(lambda: list(out.rglob("*.dcm")), "the first image", pause=0.002, timeout=20)
        orthanc.kill()
        time.sleep(0.3)
        orthanc.start()
        wanted, pulled = pulling.result(timeout=60)
    assert not pulled.failures and pulled.series == wanted >= 4
    assert any("Trying again in" in line for line in said)
    assert len(values(out)) == pulled.images


def test_what_is_wrong_with_the_connection_is_one_clear_error(site: Site, orthanc: Orthanc) -> None:
    def code(name: str) -> str:
        with pytest.raises(ConsiliumError) as caught, site.open(name) as archive:
            series = find(archive, Filters(modalities=("CT",))).series[0]
            with Download.opened(site.folder / "out") as download:
                pull(archive, [series], download, BackOff(retries=0))
        assert caught.value.hint and caught.value.exit_status == 11
        assert PASSWORD not in str(caught.value)
        return caught.value.code

    fresh = {name: dict(entry) for name, entry in site.archives.items()}
    other = str(orthanc.certificates.other)
    closed = free_port()
    dimse_tls, web_tls = fresh["get"]["tls"], fresh["web"]["tls"]
    elsewhere = orthanc.url.replace(str(orthanc.https_port), str(closed))
    for name, change, expected in (
        ("get", {"called_ae": "NOBODY"}, "pacs.called-ae"),
        ("get", {"calling_ae": "STRANGER"}, "pacs.calling-ae"),
        ("get", {"tls": {**dimse_tls, "ca": other}}, "pacs.tls"),
        ("get", {"tls": {"ca": dimse_tls["ca"]}}, "pacs.refused"),
        ("get", {"tls": None}, "pacs.refused"),
        ("get", {"port": closed}, "pacs.unreachable"),
        ("get", {"host": "no-such-host.invalid", "insecure": True}, "pacs.unreachable"),
        ("move", {"receive": {"port": orthanc.dicom_port}}, "pacs.listen"),
        ("web", {"url": elsewhere}, "pacs.unreachable"),
        ("web", {"tls": {**web_tls, "ca": other}}, "pacs.tls"),
        ("web", {"user": "somebody"}, "pacs.denied"),
        ("web", {"url": orthanc.url + "/nowhere"}, "pacs.failed"),
    ):
        site.archives = {**fresh}
        site.change(name, **change)
        assert code(name) == expected, (name, change)
    site.archives = fresh
    site.write()
    site.secret.chmod(0o644)
    assert code("web") == "pacs.secret"


def test_an_error_at_the_command_names_no_secret_and_has_its_status(site: Site) -> None:
    site.change("web", user="somebody")
    answer = site.pull("web", "--modality", "CT")
    assert (answer.code, answer.status) == ("pacs.denied", 11)
    assert PASSWORD not in str(answer) and answer.error["where"].startswith("https://127.0.0.1")
