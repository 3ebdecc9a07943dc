"""The aggregator learns all it needs of a network without loading torch into its own process."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from aggregation_samples import study_of

from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import sent_specs, shared_specs
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_server import networks
from consilium_server.executor import WARM_MODULES
from consilium_server.networks import exchanged, main, write_start

_CHILD = """
import json, sys
from pathlib import Path
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_server import networks
from consilium_server.executor import WARM_MODULES
from consilium_server.networks import exchanged, write_start

study = Study.model_validate(json.load(sys.stdin))
found = exchanged(study)
try:
    write_start(study, Path(sys.argv[1]), Path(sys.argv[1]))
except ConsiliumError as error:
    refused = error.code
print(json.dumps({
    "sent": [(s.name, s.shape) for s in found.sent],
    "shared": [(s.name, s.shape) for s in found.shared],
    "torch": "torch" in sys.modules,
    "refused": refused,
}))
"""


def test_a_child_says_the_same_and_torch_stays_out(tmp_path: Path) -> None:
    study = study_of("scaffold")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "model")],
        input=json.dumps(study.to_canonical()),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert found["sent"] == [[s.name, list(s.shape)] for s in sent_specs(study)]
    assert found["shared"] == [[s.name, list(s.shape)] for s in shared_specs(study)]
    assert len(found["sent"]) == 2 * len(found["shared"])
    assert not found["torch"]
    # An error of the child is an error here, with its code.
    assert found["refused"] == "study.start"
    # Here, where torch is loaded already, no child is needed for the same.
    assert exchanged(study).sent == sent_specs(study)


def test_the_process_that_runs_are_forked_from_holds_no_torch() -> None:
    names = ", ".join(WARM_MODULES)
    subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; assert 'torch' not in sys.modules"],
        check=True,
        timeout=60,
    )


def test_what_was_learned_serves_later_runs_of_the_same_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, file = study_of("scaffold"), tmp_path / "network.json"
    networks.remember(study, file)
    known = exchanged(study)

    def learned() -> bool:
        networks._known.clear()
        networks.recall(study, file)
        assert networks._known in ({}, {study.digest: known})
        return bool(networks._known)

    assert learned()
    whole = file.read_bytes()
    for content in (b"", b"[]", b"{}", whole[:-1]):
        file.write_bytes(content)
        assert not learned()
    file.write_bytes(whole)
    monkeypatch.setattr(networks, "__version__", "another")
    assert not learned()
    file.unlink()
    assert not learned()


def test_the_child_writes_the_weights_that_a_study_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = study_of(), tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["networks", str(out)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(study.to_canonical())))
    main()
    assert len(json.loads(capsys.readouterr().out)["sent"]) == len(sent_specs(study))
    assert out.read_bytes() == pack(initial_weights(study))


def test_a_public_start_must_be_the_one_that_the_study_names(tmp_path: Path) -> None:
    public, out = tmp_path / "public", tmp_path / "model"
    public.write_bytes(pack({n: t + 1 for n, t in initial_weights(study_of()).items()}))
    document = study_of().to_canonical()
    digest = hashlib.sha256(public.read_bytes()).hexdigest()
    document["model"]["start"] = {"sha256": digest, "data": "public images"}
    study = Study.model_validate(document)
    write_start(study, out, public)
    assert out.read_bytes() == public.read_bytes()
    public.write_bytes(pack(initial_weights(study_of())))
    with pytest.raises(ConsiliumError) as caught:
        write_start(study, out, public)
    assert caught.value.code == "study.start"
    public.unlink()
    with pytest.raises(ConsiliumError) as caught:
        write_start(study, out, public)
    assert (caught.value.code, caught.value.where) == ("study.start", str(public))
    assert "--start" in caught.value.hint
