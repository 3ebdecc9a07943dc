"""pacs.yaml: the archives of this hospital by name, so that no secret stands on a command line."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.study.document import parse

PACS_FILE: Final = "pacs.yaml"
_HINT: Final = "Correct it; `consilium site data pull --init` shows a commented example."


def _beside(value: str, info: ValidationInfo) -> str:
    """Resolve a path from the folder that pacs.yaml lies in."""
    folder = info.context["folder"] if info.context else Path()
    return str(folder / Path(value).expanduser())


LocalFile = Annotated[str, Field(min_length=1), AfterValidator(_beside)]
Title = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[!-\[\]-~]+$")]
Host = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9._:-]+$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Part(BaseModel):
    """Frozen and strict; a misspelt key is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Keys(_Part):
    """Whom we believe and who we are; TLS 1.2 or newer."""

    #: Certificates of the authority that the archive's certificate comes from (PEM).
    ca: LocalFile
    #: Our own certificate and key (PEM), where the archive asks for one.
    certificate: LocalFile | None = None
    key: LocalFile | None = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self


class DimseKeys(Keys):
    """TLS of a DICOM connection."""

    #: Name in the archive's certificate, where it is not the host's.
    server_name: Host | None = None


class Receive(_Part):
    """Where we listen while a C-MOVE runs; the archive must know this address under our title."""

    listen: Host = "127.0.0.1"
    port: Port
    #: Addresses that the archive sends from; the host's own by default.
    senders: list[Host] = []


class _Archive(_Part):
    #: Permits a connection that anybody on its way can read. Between this machine's own processes
    #: it needs no permission.
    insecure: bool = False
    connect_timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    #: Seconds that the archive may be silent.
    answer_timeout: Annotated[float, Field(gt=0, le=7200)] = 120.0
    #: Attempts after a failure before giving up; waits double from one second to one minute.
    retries: Annotated[int, Field(ge=0, le=100)] = 8
    #: Largest image accepted, MiB.
    largest_image_mib: Annotated[int, Field(ge=1, le=65536)] = 2048

    @property
    def largest_image(self) -> int:
        """Largest image accepted, bytes."""
        return self.largest_image_mib * 2**20


class DimseConfig(_Archive):
    """An archive reached by C-FIND and C-GET or C-MOVE."""

    kind: Literal["dimse"]
    host: Host
    port: Port
    called_ae: Title
    calling_ae: Title = "CONSILIUM"
    retrieve: Literal["c-get", "c-move"] = "c-get"
    receive: Receive | None = None
    tls: DimseKeys | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tls is None and not self.insecure and not is_loopback(self.host):
            raise ValueError("give tls, or say insecure: true")
        if self.retrieve == "c-move" and self.receive is None:
            raise ValueError("c-move needs receive: the port on which we listen")
        if self.retrieve == "c-move" and self.tls is not None and self.tls.certificate is None:
            raise ValueError("c-move with tls needs a certificate: we are the server then")
        return self


class WebConfig(_Archive):
    """An archive reached by DICOMweb (QIDO-RS and WADO-RS)."""

    kind: Literal["dicomweb"]
    url: Annotated[str, Field(min_length=8, max_length=500, pattern=r"^https?://[^\s?#@]+$")]
    tls: Keys | None = None
    user: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^:]+$")] | None = None
    password_file: LocalFile | None = None
    token_file: LocalFile | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme == "http" and not self.insecure and not is_loopback(parts.hostname or ""):
            raise ValueError("the url must be https, or say insecure: true")
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file belong together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("give a password or a token, not both")
        return self


Config = DimseConfig | WebConfig


class PacsFile(_Part):
    """The content of pacs.yaml."""

    schema_: Annotated[Literal["consilium/pacs/v1"], Field(alias="schema")]
    archives: Annotated[
        dict[str, Annotated[Config, Field(discriminator="kind")]], Field(min_length=1)
    ]


def is_loopback(host: str) -> bool:
    """Whether the host is this machine under its loopback address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_archive(folder: Path, name: str) -> Config:
    """Return one archive of ``folder``/pacs.yaml; with an empty name the only one.

    Raises
    ------
    ConsiliumError
        ``pacs.no-file``, ``pacs.file`` with the line, or ``pacs.unknown-archive``.
    """
    path = folder / PACS_FILE
    archives = parse_pacs(_read(path), path).archives
    if not name and len(archives) == 1:
        return next(iter(archives.values()))
    if name not in archives:
        listed = ", ".join(sorted(archives))
        raise ConsiliumError(
            "pacs.unknown-archive",
            f"There is no archive called {name}." if name else "There are several archives.",
            where=str(path),
            hint=f"Name one of: {listed}.",
        )
    return archives[name]


def parse_pacs(text: str, path: Path) -> PacsFile:
    """Parse pacs.yaml; every error names its line (``pacs.file``)."""
    try:
        document = parse(text, str(path))
    except ConsiliumError as error:
        # The reader is that of studies, and so are its words: only the two about text fit here.
        fits = error.code in {"study.not-yaml", "study.duplicate-key"}
        plain = "The file must be plain YAML: keys and values, no anchors, no tags."
        raise ConsiliumError(
            "pacs.file", error.message if fits else plain, where=error.where, hint=_HINT
        ) from error
    try:
        return PacsFile.model_validate(document.value, context={"folder": path.parent})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        found = [(document.line(_path(problem["loc"])), _explain(problem)) for problem in problems]
        message = "\n".join(f"line {line}: {text}" for line, text in found)
        raise ConsiliumError(
            "pacs.file", message, where=f"{path}:{found[0][0]}", hint=_HINT
        ) from error


def _path(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    # Pydantic names the chosen kind as a step of the path; the file has no such key.
    return tuple(part for part in loc if part not in ("dimse", "dicomweb"))


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in _path(problem["loc"]))
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"unknown key {name}" if problem["type"] == "extra_forbidden" else f"{name}: {text}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConsiliumError(
            "pacs.no-file",
            "This site names no archive yet.",
            where=str(path),
            hint="Write a commented example with `consilium site data pull --init` and edit it.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "pacs.file", "The file cannot be read as text.", where=str(path), hint=_HINT
        ) from error


def read_secret(path: str) -> str:
    """Return the one line of a password's or token's file.

    Raises
    ------
    ConsiliumError
        ``pacs.secret`` when it is missing, empty, or readable by others.
    """
    check_private(path)
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "pacs.secret", "The secret's file cannot be read as text.", where=path
        ) from error
    if not secret or not secret.isprintable():
        raise ConsiliumError(
            "pacs.secret", "The secret's file must hold exactly one line.", where=path
        )
    return secret


def check_private(path: str) -> None:
    """Refuse a secret that is missing or that others may read (``pacs.secret``)."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise ConsiliumError(
            "pacs.secret",
            "The file with the secret cannot be opened.",
            where=path,
            hint="Correct the path in pacs.yaml, or its permissions.",
        ) from error
    if mode & 0o077:
        raise ConsiliumError(
            "pacs.secret",
            "Other users of this machine may read the secret.",
            where=path,
            hint="Make it yours alone: `chmod 600` on this file; then change the secret.",
        )


def write_example(folder: Path) -> Path:
    """Write a commented pacs.yaml; an existing one is never touched (``pacs.file``)."""
    path = folder / PACS_FILE
    if path.exists():
        raise ConsiliumError(
            "pacs.file", "There is a pacs.yaml already; it stays as it is.", where=str(path)
        )
    write_atomic(path, EXAMPLE.encode())
    return path


EXAMPLE: Final = """\
# The archives (PACS) of this hospital, for `consilium site data pull ARCHIVE FOLDER`.
# Paths start from this file's folder. Keys, passwords and tokens must be readable by you alone.
schema: consilium/pacs/v1

archives:
  # DICOM: C-FIND, and C-GET or C-MOVE.
  pacs:
    kind: dimse
    host: pacs.hospital.example
    port: 2762
    # The archive's title, and ours as the archive's administrator has registered it.
    called_ae: ARCHIVE
    calling_ae: CONSILIUM
    # c-get: images come on our own connection. c-move: the archive connects to us; it must know
    # our title, address and port, and `receive` says where we listen while the pull runs.
    retrieve: c-get
    # receive: {listen: 192.0.2.10, port: 11112, senders: [192.0.2.20]}
    # Without tls everybody on the way can read the images; `insecure: true` accepts that.
    tls:
      ca: identity/pacs-ca.pem
      certificate: identity/pacs.pem
      key: identity/pacs-key.pem
      # server_name: archive.hospital.example

  # DICOMweb: QIDO-RS and WADO-RS.
  web:
    kind: dicomweb
    url: https://archive.hospital.example/dicom-web
    # Without tls the machine's own authorities are believed.
    tls: {ca: identity/pacs-ca.pem}
    # Either user and password_file, or token_file (a bearer token), or a certificate under tls.
    user: consilium
    password_file: identity/pacs-password

    # For every archive, with their defaults: seconds to connect, seconds it may be silent,
    # attempts after a failure, and the largest image accepted.
    # connect_timeout: 10
    # answer_timeout: 120
    # retries: 8
    # largest_image_mib: 2048
"""
