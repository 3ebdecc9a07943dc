"""A joined site with imported patients, as its own commands make it."""

from __future__ import annotations

from pathlib import Path

from data_fixtures import write_pairs
from site_samples import NAME, JoinedSite, joined_site
from typer.testing import CliRunner

from consilium_client.cli import app


def hospital_with(folder: Path, patients: int) -> JoinedSite:
    """Return a joined site with so many patients: CT and liver, in pairs of NIfTI files."""
    joined = joined_site(folder / "site")
    pairs = write_pairs(folder / "data", patients)
    labels = ["--label", "background=0", "--label", "liver=1", "--input", "ct", "--site", NAME]
    home = ["--home", str(joined.home.path)]
    answer = CliRunner().invoke(app, ["data", "import", str(pairs), *labels, *home])
    assert answer.exit_code == 0, answer.output
    return joined
