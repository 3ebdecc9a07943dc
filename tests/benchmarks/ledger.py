"""How many charges a second a ledger makes durable, and how long ε of many patients takes.

Run ``python tests/benchmarks/ledger.py``; it prints one JSON object. The same run measures a plain
SQLite insert loop (write-ahead log, ``synchronous = FULL``) of the same bytes in the same folder,
which is what the disk allows; the ratio says what hashing, signing and checking cost on top. Use
``--folder`` to measure another disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consilium_common.ledger.store import Ledger
from consilium_common.privacy.events import PrivacyEvent

TARGET_CHARGES_PER_SECOND = 200
TARGET_EPSILON_SECONDS = 5.0
STUDY = "a" * 64
EVENT = PrivacyEvent(0.1, 2.0, 20)
DELTA = 1e-5


def patients(number: int) -> list[str]:
    """Return keyed hashes as a site makes them."""
    return [hashlib.sha256(b"patient %d" % index).hexdigest()[:32] for index in range(number)]


def charges(folder: Path, rounds: int, cohort: int) -> tuple[dict[str, Any], list[int]]:
    """Charge rounds one by one, each durable when it returns; and say how long each line was."""
    members = patients(cohort)
    seconds = []
    with Ledger.open(folder / "ledger.db", Ed25519PrivateKey.generate(), site="north") as ledger:
        for index in range(rounds + 1):
            start = time.perf_counter()
            ledger.charge(
                study=STUDY,
                round_index=index,
                event=EVENT,
                clip_norm=1.0,
                delta=DELTA,
                patients=members,
            )
            seconds.append(time.perf_counter() - start)
        sizes = [len(entry.line()) for entry in ledger.entries() if entry.kind == "charge"]
    start = time.perf_counter()
    with Ledger.open(folder / "ledger.db") as ledger:
        assert ledger.head.sequence == rounds + 2
    opened = time.perf_counter() - start
    # The first charge records its cohort as well, which a study does once.
    return {**_rates(seconds[1:]), "reopened_and_checked_seconds": round(opened, 3)}, sizes[1:]


def plain_inserts(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Insert rows of the same sizes with nothing but SQLite."""
    db = sqlite3.connect(folder / "plain.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE entry (sequence INTEGER PRIMARY KEY, line BLOB NOT NULL)")
    seconds = []
    for index, size in enumerate(sizes):
        line = os.urandom(size)
        start = time.perf_counter()
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO entry VALUES (?, ?)", (index, line))
        db.execute("COMMIT")
        seconds.append(time.perf_counter() - start)
    db.close()
    return _rates(seconds)


def epsilon(folder: Path, number: int, histories: int) -> dict[str, Any]:
    """Time ε of many patients: distribution, histogram, studies and years, nothing cached."""
    members = patients(number)
    share = number // histories
    with Ledger.open(folder / "many.db", Ed25519PrivateKey.generate(), site="north") as ledger:
        for index in range(histories):
            # Every cohort holds all patients from its place on, so no two groups spend alike.
            for round_index in range(3):
                ledger.charge(
                    study=hashlib.sha256(b"study %d" % index).hexdigest(),
                    round_index=round_index,
                    event=PrivacyEvent(0.05, 4.0, 20),
                    clip_norm=1.0,
                    delta=DELTA,
                    patients=members[index * share :],
                )
        start = time.perf_counter()
        found = ledger.spent(DELTA)
        seconds = time.perf_counter() - start
    assert (found.patients, found.histories) == (number, histories)
    return {
        "patients": found.patients,
        "distinct_histories": found.histories,
        "studies": len(found.studies),
        "seconds": round(seconds, 3),
        "target_seconds": TARGET_EPSILON_SECONDS,
        "epsilon_least": round(found.least, 3),
        "epsilon_most": round(found.most, 3),
    }


def _rates(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "per_second": round(len(seconds) / sum(seconds), 1),
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 3),
        "count": len(seconds),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: temporary files)")
    parser.add_argument("--charges", type=int, default=1000, help="charges (default 1000)")
    parser.add_argument("--cohort", type=int, default=200, help="patients a charge (default 200)")
    parser.add_argument("--patients", type=int, default=10_000, help="for ε (default 10000)")
    parser.add_argument("--histories", type=int, default=20, help="distinct (default 20)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        load = os.getloadavg()
        charged, sizes = charges(folder, options.charges, options.cohort)
        plain = plain_inserts(folder, sizes)
        spent = epsilon(folder, options.patients, options.histories)
        print(
            json.dumps(
                {
                    "benchmark": "ledger",
                    "charges": {**charged, "target_per_second": TARGET_CHARGES_PER_SECOND},
                    "plain_sqlite": plain,
                    "times_plain": round(plain["per_second"] / charged["per_second"], 2),
                    "epsilon": spent,
                    "load_average_before": [round(value, 2) for value in load],
                    "load_average_after": [round(value, 2) for value in os.getloadavg()],
                    "machine": {
                        "cpus": os.cpu_count(),
                        "platform": platform.platform(),
                        "python": platform.python_version(),
                        "sqlite": sqlite3.sqlite_version,
                        "dp-accounting": version("dp-accounting"),
                    },
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
