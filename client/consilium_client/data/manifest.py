"""site.yaml and cases.csv: what a site has, in two files that a person can read and edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from consilium_client.data.case_list import parse_cases, render_cases
from consilium_client.data.schema import Case, SiteManifest, SplitFractions
from consilium_client.data.site_file import parse_site, render_site
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic

__all__ = [
    "Case",
    "Manifest",
    "SiteManifest",
    "SplitFractions",
    "existing_manifest",
    "load_manifest",
    "save_manifest",
]

SITE_FILE: Final = "site.yaml"
_MAX_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True)
class Manifest:
    """site.yaml and cases.csv together, with the root as a real path."""

    site: SiteManifest
    cases: tuple[Case, ...]
    root: Path


def load_manifest(home: SiteHome) -> Manifest:
    """Read and check both files.

    Raises
    ------
    ConsiliumError
        ``data.no-manifest`` where nothing was imported; ``data.manifest`` for site.yaml and
        ``data.cases`` (or ``data.no-patient``, ``data.duplicate-case``) for cases.csv, each with
        its line.
    """
    path = home.data / SITE_FILE
    site = parse_site(_read(path), where=str(path))
    cases_path = path.parent / site.cases
    cases = parse_cases(
        _read(cases_path), site.inputs, where=str(cases_path), covariates=site.covariates
    )
    return Manifest(site, cases, _root(home, site))


def existing_manifest(home: SiteHome, *, rewriting: bool = False) -> Manifest | None:
    """Return the site's manifest, or None where nothing was imported yet.

    Parameters
    ----------
    rewriting : bool
        The caller writes the case list anew: one that is gone counts as empty, and the names in
        site.yaml stay (default: False, and it is an error).
    """
    site = existing_site(home)
    if rewriting and site is not None and not (home.data / site.cases).exists():
        return Manifest(site, (), _root(home, site))
    return load_manifest(home) if site is not None else None


def save_manifest(home: SiteHome, manifest: Manifest) -> None:
    """Write both files, each atomically; a file whose content stays the same is not touched."""
    site = manifest.site
    old = existing_site(home)
    cases = render_cases(manifest.cases, site.inputs, site.covariates)
    write_atomic(home.data / site.cases, cases.encode())
    if old != site:  # a person's comments live as long as nothing changes
        write_atomic(home.data / SITE_FILE, render_site(site).encode())


def existing_site(home: SiteHome) -> SiteManifest | None:
    """Return site.yaml alone, or None where there is none."""
    path = home.data / SITE_FILE
    return parse_site(_read(path), where=str(path)) if path.exists() else None


def _root(home: SiteHome, site: SiteManifest) -> Path:
    return (home.data / Path(site.root).expanduser()).resolve()


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConsiliumError(
                "data.manifest",
                "The file is larger than 64 MiB.",
                where=str(path),
                hint="Nothing that an import writes is: put its copy back, or import again.",
            )
        return path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except FileNotFoundError as error:
        raise ConsiliumError(
            "data.no-manifest",
            "This site has no imported data.",
            where=str(path),
            hint="Import a folder: consilium site data import FOLDER.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            "data.manifest",
            "The file is not UTF-8 text.",
            where=str(path),
            hint="Save it as UTF-8.",
        ) from error
    except OSError as error:
        raise ConsiliumError(
            "data.manifest",
            f"The file cannot be read: {error.strerror or error}.",
            where=str(path),
            hint="Give this user the right to read it.",
        ) from error
