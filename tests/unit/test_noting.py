"""A refused act stands in the audit log with what it was about."""

from __future__ import annotations

from pathlib import Path

import pytest
from aggregator_samples import Aggregator, consilium

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.study.examples import example_files
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_server.tables import ActRow

STUDY = next(path for path in example_files() if path.stem == "hippocampus")


def test_the_log_names_what_a_refused_act_was_about(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    with aggregator.open():
        _refuse_and_look(aggregator)


def _refuse_and_look(aggregator: Aggregator) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    study = consilium("study", "propose", STUDY, "--connect", ada.folder)["digest"]
    row = aggregator.registry.study(study)
    other = row.canonical | {"name": "another"}
    for method, request, act, subject, digest in (
        (methods.OPERATOR_RUN, {"digest": study}, "run", row.name, study),
        (methods.OPERATOR_STOP, {"digest": study[:12]}, "stop", row.name, study),
        (methods.OPERATOR_STOP, {"digest": "f" * 64}, "stop", "an unknown study", "f" * 64),
        (methods.OPERATOR_RUN, {"digest": 7}, "run", "an unknown study", ""),
        (
            methods.OPERATOR_PROPOSE,
            {"canonical": other, "signature": "00"},
            "propose",
            "another",
            study_from_canonical(other).digest,
        ),
        (methods.OPERATOR_PROPOSE, {}, "propose", "a study that cannot be read", ""),
        (
            methods.OPERATOR_PROPOSE,
            {"start": {"sha256": "ab"}},
            "propose",
            "starting weights",
            "ab",
        ),
        (methods.OPERATOR_REVOKE, {"name": "nobody"}, "revoke", "nobody", ""),
    ):
        with ada.caller() as caller, pytest.raises(ConsiliumError):
            caller.call(method, request)
        with aggregator.registry.transaction() as session:
            newest = session.query(ActRow).order_by(ActRow.sequence.desc()).first()
            assert newest is not None
            noted = newest.record
        assert (noted["act"], noted["subject"], noted["digest"]) == (act, subject, digest)
        assert noted["outcome"].startswith("refused: "), request
