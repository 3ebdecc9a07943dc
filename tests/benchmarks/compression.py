"""Prints what compression saves and what it costs: `python FILE [--millions N] [--no-images]`.

First bytes and seconds of each encoding for an update of 25 million float32 whose change is small
against the model, as training makes it: to encode (site), to check (the site's gate) and to decode
(aggregator), with the memory that checking and decoding take. Then, on the hippocampus at three
sites of 50, 30 and 20 patients, the Dice that each encoding reaches: sessions, encoding, decoding
and aggregation are the product's own, in one process. JSON goes to standard output, progress to
standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from study_samples import study_of

from consilium_client.encoding import LOST, encoded_update
from consilium_common.models.compression import check_encoded, decode, encode
from consilium_common.models.exchange import sent_specs
from consilium_common.models.weights import TensorSpec, pack, unpack
from consilium_common.study import Study
from consilium_common.study.federation import Compression

ENCODINGS: Final[dict[str, dict[str, Any]]] = {
    "float32": {},
    "float32, packed": {"level": 3},
    "bfloat16": {"encoding": "bfloat16"},
    "bfloat16, packed": {"encoding": "bfloat16", "level": 3},
    "int8": {"encoding": "int8"},
    "int8 without feedback": {"encoding": "int8", "error_feedback": False},
    "int8, packed": {"encoding": "int8", "level": 3},
    "top-k 10 %": {"encoding": "top-k", "share": 0.1},
    "top-k 10 % without feedback": {"encoding": "top-k", "share": 0.1, "error_feedback": False},
    "top-k 1 %": {"encoding": "top-k", "share": 0.01},
    "top-k 1 % without feedback": {"encoding": "top-k", "share": 0.01, "error_feedback": False},
    "top-k 1 %, packed": {"encoding": "top-k", "share": 0.01, "level": 3},
}

#: Local steps of a study at each site, whatever the number of its rounds.
STEPS: Final = 240


def compressed(study: Study, said: Mapping[str, Any]) -> Study:
    """Return the study with that compression."""
    federation = study.federation.model_copy(update={"compression": Compression(**said)})
    return study.model_copy(update={"federation": federation})


# --- bytes and seconds -------------------------------------------------------------------------


def measured(millions: float, tensors: int = 25) -> list[dict[str, Any]]:
    """Return bytes, seconds and memory of each encoding."""
    random = np.random.default_rng(0)
    shape = (int(millions * 1e6 / tensors / 1000), 1000)
    model = {
        f"layer{i:03d}.weight": random.normal(0, 0.05, shape).astype(np.float32)
        for i in range(tensors)
    }
    update = {
        name: values + random.normal(0, 1e-3, shape).astype(np.float32)
        for name, values in model.items()
    }
    specs = tuple(TensorSpec(name, values.shape) for name, values in update.items())
    whole = sum(spec.nbytes for spec in specs)
    found = []
    with tempfile.TemporaryDirectory() as name:
        encoded, start, out = (Path(name) / part for part in ("encoded", "model", "out"))
        start.write_bytes(pack(model))
        for what, said in ENCODINGS.items():
            study = compressed(study_of(), said)
            began = time.perf_counter()
            blob, _ = encode(study, update, model, None, random.random)
            seconds = {"encode": time.perf_counter() - began}
            encoded.write_bytes(blob)
            for step in ("check", "decode"):
                began = time.perf_counter()
                if step == "check":
                    check_encoded(study, specs, encoded)
                else:
                    decode(study, encoded, start, out, specs=specs)
                seconds[step] = time.perf_counter() - began
            # Traced apart: tracing slows allocation down.
            tracemalloc.start()
            check_encoded(study, specs, encoded)
            decode(study, encoded, start, out, specs=specs)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            found.append(
                {
                    "encoding": what,
                    "bytes": len(blob),
                    "share": round(len(blob) / whole, 4),
                    "seconds": {step: round(value, 2) for step, value in seconds.items()},
                    "mb_to_check_and_decode": round(peak / 1e6, 1),
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


# --- Dice --------------------------------------------------------------------------------------


def dice(what: str, rounds: int, seed: int) -> dict[str, Any]:
    """Run one study of :data:`STEPS` steps to its end and score it on the held-out patients."""
    import utility

    from consilium_client.training.session import TrainingSession
    from consilium_common.models.registry import initial_weights
    from consilium_server.aggregation import SiteUpdate, aggregate, cohort_weights

    plain = utility.study_of(utility.LEVERS["plain"], None, seed).to_canonical()
    plain["federation"]["rounds"] = rounds
    plain["training"]["steps_per_round"] = STEPS // rounds
    study = compressed(Study.model_validate(plain), ENCODINGS[what])
    split, specs = utility.parts(), sent_specs(study)
    shares = cohort_weights(utility.SITES, study.federation.weighting)
    sessions = {
        site: TrainingSession(study, utility._cohort(train=split[site]), device="cpu")
        for site in utility.SITES
    }
    judge = TrainingSession(study, utility._cohort(test=split["test"]), device="cpu")
    weights, sent = initial_weights(study), 0
    kept: dict[str, dict[str, Any]] = {site: {} for site in sessions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, encoded = folder / "model", folder / "encoded"
        for index in range(study.federation.rounds):
            model.write_bytes(pack(weights))
            updates = []
            for site, session in sessions.items():
                made = session.train(weights, index, utility.SITES[site]).tensors
                blob, lost = encoded_update(
                    study, made, weights, kept[site], site=site, round_index=index
                )
                assert all(one.startswith(LOST) for one in lost)
                kept[site], sent = lost, sent + len(blob)
                encoded.write_bytes(blob)
                check_encoded(study, specs, encoded)
                decode(study, encoded, model, folder / site, specs=specs)
                steps = study.training.steps_per_round
                updates.append(SiteUpdate(site, folder / site, shares[site], steps))
            aggregate(
                study,
                model,
                updates,
                None,
                out=folder / "next",
                out_state=folder / "state",
                round_index=index,
            )
            weights = unpack((folder / "next").read_bytes())
    found = {
        "encoding": what,
        "dice": round(judge.evaluate(weights, "test").mean_dice, 4),
        "rounds": study.federation.rounds,
        "kb_sent_per_site_and_round": round(
            sent / len(sessions) / study.federation.rounds / 1e3, 1
        ),
    }
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=25.0, help="values (default: 25)")
    parser.add_argument("--no-images", action="store_true", help="bytes and seconds alone")
    parser.add_argument("--rounds", type=int, default=12, help=f"that {STEPS} steps are cut into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encodings", nargs="+", choices=list(ENCODINGS), default=list(ENCODINGS))
    chosen = parser.parse_args()
    report: dict[str, Any] = {"values": int(chosen.millions * 1e6)}
    if chosen.millions:
        report["encodings"] = measured(chosen.millions)
    if not chosen.no_images:
        report["question"] = "foreground Dice on 14 test patients, sites of 50, 30 and 20 patients"
        report["dice"] = [dice(what, chosen.rounds, chosen.seed) for what in chosen.encodings]
    report["machine"] = {"processors": os.cpu_count(), "zstandard": version("zstandard")}
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
