"""Every DICOM file of pydicom and of the shared images: read as SimpleITK does, or refused."""

from __future__ import annotations

import conformance_table as table
import pytest
from data_fixtures import real


def _page() -> str:
    return table.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[table.Row]:
    return table.pydicom_rows()


def test_each_file_of_pydicom_is_read_as_simpleitk_does_or_refused(rows: list[table.Row]) -> None:
    fine = {table.EQUAL, f"{table.EQUAL}, but for padding", table.BARS_EQUAL, table.UNREADABLE}
    for row in rows:
        if row.outcome.startswith("read"):
            assert row.compared in fine, row
        else:
            assert "`data." in row.outcome or row.outcome.startswith("no image"), row
    # So that nothing is fine because nothing was looked at.
    assert len(rows) > 80
    assert sum(row.compared.startswith(table.EQUAL) for row in rows) > 45


def test_the_table_in_the_docs_is_current(rows: list[table.Row]) -> None:
    assert table.section("pydicom's test files", rows) in _page(), (
        "run python tests/unit/conformance_table.py"
    )


@pytest.mark.data
def test_the_shared_images_are_read_as_simpleitk_does_or_refused() -> None:
    for name in table.SHARED:
        real(name)
    rows = table.shared_rows()
    read = [row for row in rows if row.outcome.startswith("read")]
    assert len(read) == 4
    assert all(row.compared.startswith(table.EQUAL) for row in read)
    assert table.section("The shared images", rows) in _page()
