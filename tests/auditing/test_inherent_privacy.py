"""The demonstration makes its point: directions alone hide nothing, and noise does."""

import math

import pytest

from hf_dpzo.auditing.inherent_privacy import attack_inherent_privacy
from hf_dpzo.cli.main import main
from hf_dpzo.privacy.noise import DiscreteGaussian


TRIALS = 150
# Five standard deviations of a share of 2 * TRIALS guesses: the noise cannot be seeded.
CHANCE = 5 * 0.5 / math.sqrt(2 * TRIALS)


@pytest.fixture(scope="module")
def findings():
    return {(finding.directions, finding.epsilon): finding for finding in attack_inherent_privacy(num_trials=TRIALS)}


@pytest.mark.parametrize(("kind", "least"), [("sphere", 1.0), ("rademacher", 1.0), ("gaussian", 0.85)])
def test_without_noise_one_step_tells_neighbours_apart(findings, kind, least):
    finding = findings[kind, None]
    assert finding.accuracy >= least
    assert not finding.knows_direction
    assert finding.allowed is None


@pytest.mark.parametrize("kind", ["sphere", "rademacher", "gaussian"])
def test_with_noise_the_best_attack_stays_within_what_is_allowed(findings, kind):
    finding = findings[kind, 1.0]
    assert finding.knows_direction
    assert finding.accuracy <= finding.allowed + CHANCE


def test_the_attack_catches_missing_noise(monkeypatch):
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, values: values)
    for finding in attack_inherent_privacy(num_trials=20):
        assert finding.accuracy > 0.8


def test_the_command_prints_a_table(capsys):
    assert main(["audit", "--demo", "inherent-privacy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:9]] == 2 * ["rademacher", "gaussian", "sphere"]
    assert all(line.endswith("no bound") for line in lines[3:6])
