"""Some mutated checkpoints; `python -m tests.quant.mutate` runs any number."""

from pathlib import Path

import pytest

from tests.quant.mutate.mutations import MODEL, mutated
from tests.quant.mutate.run import FAULTS, report, run
from tests.quant.mutate.strict import Bad, read


@pytest.mark.slow
def test_mutated_checkpoints_are_loaded_or_refused_as_the_rules_say() -> None:
    tally = run(0, 1500)
    assert not tally.faults, report(tally)
    total = sum(tally.outcomes.values())
    refused = sum(n for (_, kind), n in tally.outcomes.items() if kind == "refused")
    assert total == 1500
    assert 0 < refused < total  # both kinds are among them


def test_the_same_seed_makes_the_same_files() -> None:
    assert mutated(7) == mutated(7)
    assert mutated(7) != mutated(8)


def test_the_rules_know_right_from_wrong_by_themselves() -> None:
    right = {MODEL: b"\x02\0\0\0\0\0\0\0{}"}
    assert read(right, "file") == {}
    with pytest.raises(Bad, match="no hole, no overlap"):
        read({MODEL: right[MODEL] + b"\0"}, "file")


def test_a_worker_that_dies_or_hangs_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.quant.mutate import run as module

    bad = tmp_path / "worker.py"
    bad.write_text(
        "import os, sys, time\nfirst = int(sys.argv[1])\n"
        'print(\'{"seed": %d, "begin": "bytes"}\' % first, flush=True)\n'
        "os.abort() if first == 0 else time.sleep(600)\n"
    )
    monkeypatch.setattr(module, "WORKER", bad)
    monkeypatch.setattr(module, "HANG", 1)
    tally = run(0, 2)
    assert [fault for fault, _, _ in tally.faults] == ["crash", "hang"]
    assert set(FAULTS) > {"crash", "hang"}
