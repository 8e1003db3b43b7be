"""Of several processes, the first one alone enters their run in the ledger of its data, and all hear of a refusal."""

from pathlib import Path

from hf_dpzo.data_ledger.data_ledger import DataLedger

from support.processes import Here
from support.runs import train


def enter_run(here: Here, folder: Path, other_folder: Path) -> int | None:
    """Train with a ledger whose path is another one in each process, and return what cards would say."""
    place = folder if here.rank == 0 else other_folder
    trainer = train(folder / "run", privacy_ledger=str(place / "data.ledger"))
    return trainer.data_ledger_facts["runs"]


def enter_refused_run(here: Here, folder: Path) -> str:
    try:
        train(folder / "run", privacy_ledger=str(folder / "data.ledger"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_only_the_first_process_writes(pair, tmp_path):
    (tmp_path / "first").mkdir()
    assert pair.each(enter_run, tmp_path / "first", tmp_path / "not there") == [1, 1]
    assert [run.plan.planned_steps for run in DataLedger(tmp_path / "first" / "data.ledger").read().runs] == [4]


def test_a_refusal_reaches_all_processes(pair, tmp_path):
    DataLedger(tmp_path / "data.ledger", create=True).set_budget(epsilon=0.01, delta=1e-4)
    said = pair.each(enter_refused_run, tmp_path)
    assert len(said) == 2
    assert all(text.startswith("BudgetExceededError: privacy_ledger=") for text in said)
    assert DataLedger(tmp_path / "data.ledger").read().runs == ()
