"""A log as a table, a picture and a summary."""

import pytest

from hf_dpzo import Trajectory
from hf_dpzo.privacy import Guarantee
from hf_dpzo.privacy.rounding import round_up

from support.models import one_layer, with_lora
from support.rows import few_public_rows
from support.runs import train


def run(folder, **changes):
    trainer = train(folder, model=with_lora(one_layer()), probe_rows=few_public_rows(), **changes)
    return trainer, Trajectory.read(folder)


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A private run and its log. To be read alone."""
    return run(tmp_path_factory.mktemp("run"), method="aggzo", num_directions=3)


def test_a_table_holds_what_each_step_released_and_spent(private):
    trainer, log = private
    table = log.to_pandas()
    unit = trainer.method.mechanism.unit
    assert table.index.tolist() == [1, 2, 3, 4] and table.index.name == "step"
    for number, record in enumerate(log.records):
        row = table.iloc[number]
        assert [row[f"coefficient_{index}"] for index in range(3)] == [value * unit for value in record.integers]
        assert (row["learning_rate"], row["smoothing"]) == (record.learning_rates[0], record.smoothing)
    assert table["epsilon"].is_monotonic_increasing and table["epsilon"].nunique() == 4
    assert table["epsilon"].iloc[-1] == trainer.budget.guarantee().epsilon
    assert not table["lost"].any()


def test_without_privacy_there_is_no_epsilon_in_the_table(tmp_path):
    _, log = run(tmp_path, method="mezo", noise_multiplier="absent", target_delta="absent", max_steps=1)
    assert log.to_pandas()["epsilon"].isna().all()
    assert "none: the method adds no noise" in log._repr_html_()


def test_a_log_without_steps_has_all_columns(private):
    log = Trajectory(header=private[1].header, records=private[1].records[:0], header_checksum=b"", torn_bytes=0)
    assert log.to_pandas().empty and "coefficient_2" in log.to_pandas().columns


def test_a_picture_shows_itself_in_a_notebook(private):
    figure = private[1].plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    epsilon = figure.axes[0].lines[0].get_ydata()
    assert list(epsilon) == private[1].to_pandas()["epsilon"].tolist()


def test_budget_guarantee_and_log_show_themselves_as_tables(private):
    trainer, log = private
    epsilon = f"{round_up(trainer.budget.guarantee().epsilon):g}"
    assert f"<th>epsilon of the plan</th><td>{epsilon}</td>" in trainer.budget._repr_html_()
    assert f"<th>epsilon</th><td>{epsilon}</td>" in log._repr_html_()
    assert "<th>steps</th><td>4 of 4</td>" in log._repr_html_()
    guarantee = trainer.budget.guarantee()
    assert f"<th>epsilon</th><td>{round_up(guarantee.epsilon):g}</td>" in guarantee._repr_html_()


def test_bounds_are_shown_rounded_up():
    shown = Guarantee(delta=1e-5, rdp=2.00001, pld=1.82841)._repr_html_()
    assert "<td>1.8285</td>" in shown and "<td>2.0001</td>" in shown and "<td>1e-05</td>" in shown
