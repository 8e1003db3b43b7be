"""The audit passes sound mechanisms and catches bugs known from other code, planted here one by one."""

import itertools
import json
import math
import random
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pytest
import torch

from hf_dpzo.auditing.audit import Roc, audit
from hf_dpzo.auditing.claims import GaussianClaim, LaplaceClaim
from hf_dpzo.auditing.roc import draw_roc
from hf_dpzo.methods import DPZO, ZOSO, AggZO, DPZero, PrivateMethod, Projected
from hf_dpzo.privacy.clipping import SENSITIVITY, clip_to_lattice
from hf_dpzo.privacy.mechanism import GaussianSum, LaplaceSum, Mechanism, SeparateGaussianSum
from hf_dpzo.privacy.noise import DiscreteGaussian
from hf_dpzo.privacy.queries import GaussianQuery
from hf_dpzo.zo.directions import Gaussian, Rademacher


SEED = 17
SYSTEM = random.SystemRandom()
CLIP_NORM, BATCH = 2.0, 8
SETTINGS = {"clip_norm": CLIP_NORM, "noise_multiplier": 0.5, "expected_batch_size": BATCH}
ATTACKS = {"a row alone", "a row beside 3 others"}
# With 1000 releases, an attack misses a factor of two less than once in a million; other checks need fewer.
ENOUGH, FEW = 1000, 300


@dataclass(frozen=True, kw_only=True)
class Attacked(PrivateMethod):
    """A method whose mechanism is given."""

    planted: Mechanism
    num_directions: int = 1

    @cached_property
    def mechanism(self) -> Mechanism:
        return self.planted


def failures(planted: Mechanism, directions: int = 1, releases: int = FEW) -> set[str]:
    """Return the names of the checks that failed."""
    method = Attacked(planted=planted, num_directions=directions, noise_multiplier=0.5, expected_batch_size=BATCH)
    result = audit(method, seed=SEED, releases=releases)
    assert result.passed == all(check.passed for check in result.checks)
    return {check.name for check in result.checks if not check.passed}


# ---- Sound mechanisms ----

SOUND = {
    "joint": DPZero(**SETTINGS),
    "joint, four directions": AggZO(num_directions=4, **SETTINGS),
    "separate": ZOSO(num_directions=3, **SETTINGS),
    "laplace": DPZO(noise="laplace", **SETTINGS),
    "twice the noise": DPZero(paper_noise=True, **SETTINGS),
    "little noise": DPZero(**{**SETTINGS, "noise_multiplier": 0.1, "clip_norm": 1e-6}),
    "much noise, one row": DPZero(**{**SETTINGS, "noise_multiplier": 5000.0, "expected_batch_size": 1}),
}


@pytest.fixture(scope="module", params=SOUND)
def sound(request):
    return request.param, audit(SOUND[request.param], seed=SEED, releases=ENOUGH)


def test_sound_mechanisms_pass(sound):
    _, result = sound
    assert result.passed, [check for check in result.checks if not check.passed]


def test_bound_on_mu_lies_below_the_claim_and_is_informative(sound):
    name, result = sound
    assert result.releases == ENOUGH
    if name == "laplace":
        assert result.mu_claimed is None
        return
    assert result.mu_claimed == pytest.approx(1 / SOUND[name].mechanism.query(1.0).noise_multiplier)
    assert result.mu_lower <= result.mu_claimed
    if result.mu_claimed == pytest.approx(2):
        assert result.mu_lower > 1


def test_roc_runs_from_no_alarm_to_all(sound):
    _, result = sound
    for curve in (result.roc.false_alarms, result.roc.detections):
        assert list(curve) == sorted(curve)
        assert (curve[0], curve[-1]) == (0.0, 1.0)
    assert len(result.roc.false_alarms) == len(result.roc.detections) == len(result.roc.allowed) <= 200
    reached, allowed = (np.trapezoid(y, result.roc.false_alarms) for y in (result.roc.detections, result.roc.allowed))
    assert reached < allowed + 0.06  # Six standard errors of the area under a curve of 1000 releases.


def test_an_audit_can_be_written_as_json(sound):
    _, result = sound
    loaded = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert loaded["passed"] is True
    assert loaded["checks"][0].keys() == {"name", "measured", "allowed", "passed"}
    assert "roc" not in loaded  # Its hundreds of numbers are for the picture alone.


def test_an_audit_of_many_directions_makes_fewer_releases():
    assert audit(AggZO(**SETTINGS), seed=SEED, releases=500).releases == 200


def test_global_generators_are_left_unchanged():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    audit(SOUND["joint"], seed=SEED, releases=200)
    assert states() == before


def test_an_audit_without_noise_is_refused():
    with pytest.raises(ValueError, match="noise_multiplier=0: no noise, no claim to attack"):
        audit(Projected(radius=1.0, **{**SETTINGS, "noise_multiplier": 0.0}), seed=SEED)


# ---- Noise of the wrong scale or shape ----


class Sound(GaussianSum):
    """A sound mechanism to plant bugs into. Its noise is from the operating system too, and ten times as fast."""

    def _add_noise(self, sums):
        return [total + round(SYSTEM.gauss(0, self._noise.scale)) for total in sums]


class HalfTheNoise(GaussianSum):
    def _add_noise(self, sums):
        return [total + round(SYSTEM.gauss(0, self._noise.scale / 2)) for total in sums]


class HalfTheSeparateNoise(SeparateGaussianSum):
    _add_noise = HalfTheNoise._add_noise


class AQuarterOfTheLaplaceNoise(LaplaceSum):
    def _add_noise(self, sums):
        return [total + noise // 4 for total, noise in zip(sums, self._noise.add([0] * len(sums)), strict=True)]


class NoNoise(GaussianSum):
    def _add_noise(self, sums):
        return sums


class BoundedNoise(GaussianSum):
    """Adds noise of the right standard deviation within a bound, beyond which nothing is hidden."""

    def _add_noise(self, sums):
        width = math.sqrt(3) * self._noise.scale
        return [total + round(SYSTEM.uniform(-width, width)) for total in sums]


class ShiftedNoise(GaussianSum):
    def _add_noise(self, sums):
        return self._noise.add([total + self._noise.scale for total in sums])


class LessNoiseForSmallBatches(Sound):
    """Divides the noise by the number of rows that came, instead of by a constant."""

    def release(self, differences):
        released = super().release(differences)
        return replace(released, unit=released.unit / max(1, len(differences)))


def test_the_mechanism_that_bugs_are_planted_into_is_sound():
    assert failures(Sound(**SETTINGS), 2, releases=ENOUGH) == set()


def test_halved_noise_is_caught():
    assert failures(HalfTheNoise(**SETTINGS), releases=ENOUGH) >= {"noise scale", "sensitivity", *ATTACKS}


def test_too_little_laplace_noise_is_caught():
    assert failures(AQuarterOfTheLaplaceNoise(**SETTINGS), releases=ENOUGH) >= {
        "noise scale",
        "sensitivity",
        "pure epsilon",
        *ATTACKS,
    }


def test_halved_noise_is_caught_where_no_attack_could_see_it():
    failed = failures(HalfTheNoise(**{**SETTINGS, "noise_multiplier": 100.0}))
    assert failed == {"noise scale", "sensitivity"}


def test_halved_noise_is_caught_among_separate_coefficients():
    assert "sensitivity" in failures(HalfTheSeparateNoise(num_directions=4, **SETTINGS), 4)


def test_no_noise_is_caught():
    assert failures(NoNoise(**SETTINGS)) >= {"noise scale", "noise shape", "repeated noise", "noise of two copies"}


def test_noise_of_another_shape_is_caught():
    assert failures(BoundedNoise(**SETTINGS), releases=ENOUGH) >= {"noise shape"}


def test_noise_that_does_not_centre_on_zero_is_caught():
    assert "noise mean" in failures(ShiftedNoise(**SETTINGS))


# ---- Sums that one row moves by too much ----


class PaddedBatches(Sound):
    """Counts missing rows as rows at the other end, as if only replacing a row moved the sum by a clip norm."""

    def _clip(self, differences):
        missing = max(0, self.expected_batch_size - len(differences))
        filler = torch.full((missing, differences.shape[1]), -1e9, dtype=torch.float64)
        return super()._clip(torch.cat([differences.double(), filler]))


class TwiceTheRow(Sound):
    """Takes the diameter of the set of clipped rows for their greatest length."""

    def _clip(self, differences):
        return 2 * super()._clip(differences)


class MeanOfThoseWhoCame(Sound):
    def _clip(self, differences):
        return super()._clip(differences) * self.expected_batch_size // max(1, len(differences))


class ClippedMean(Sound):
    def _clip(self, differences):
        rows = torch.nan_to_num(differences.double(), nan=0.0).clamp(-1e30, 1e30)
        mean = rows.sum(dim=0, keepdim=True) / max(1, len(rows))
        return self.expected_batch_size * super()._clip(mean)


class ClippedSum(Sound):
    """Clips the sum and none of its rows."""

    def _clip(self, differences):
        rows = torch.nan_to_num(differences.double(), nan=0.0).clamp(-1e30, 1e30)
        return super()._clip(rows.sum(dim=0, keepdim=True))


class OneReleaseForAll(Sound):
    """Clips each coefficient by itself, and accounts all of them as one."""

    def _clip(self, differences):
        return np.concatenate([super(OneReleaseForAll, self)._clip(one) for one in differences.split(1, 1)], axis=1)


class OneNoiseForAll(SeparateGaussianSum):
    """Has the same bug, seen from the noise: it lacks the factor root of K."""

    @cached_property
    def _noise(self):
        return DiscreteGaussian(scale=math.ceil(self.noise_multiplier * SENSITIVITY))

    def query(self, sampling_rate):
        return GaussianQuery(noise_multiplier=self.noise_multiplier, sampling_rate=sampling_rate)


class LaplaceOfL2(LaplaceSum):
    def _clip(self, differences):
        return clip_to_lattice(differences, self.clip_norm)


class InfiniteRowsEscape(Sound):
    """Multiplies by C over the norm, which leaves infinite rows with what replaces them afterwards."""

    def _clip(self, differences):
        return super()._clip(differences) + torch.isinf(differences).numpy() * 5 * SENSITIVITY


class RowsALittleTooLong(Sound):
    def _clip(self, differences):
        return np.round(super()._clip(differences) * (1 + 1e-7)).astype(np.int64)


@pytest.mark.parametrize(
    "planted", [PaddedBatches, TwiceTheRow, MeanOfThoseWhoCame], ids=lambda planted: planted.__name__
)
def test_a_replaced_row_accounted_as_an_added_one_and_division_by_the_actual_batch_are_caught(planted):
    assert failures(planted(**SETTINGS), releases=ENOUGH) >= {"sensitivity", "a row alone"}


def test_clipping_of_the_mean_is_caught():
    assert failures(ClippedMean(**SETTINGS), releases=ENOUGH) >= {"sensitivity", *ATTACKS}


def test_clipping_of_the_mean_is_caught_where_one_row_is_expected():
    """An empty batch then hides it; rows on the other side show it."""
    failed = failures(ClippedMean(**{**SETTINGS, "expected_batch_size": 1}), releases=ENOUGH)
    assert failed == {"sensitivity", "a row beside 3 others"}


def test_clipping_of_the_sum_is_caught():
    assert failures(ClippedSum(**SETTINGS), releases=ENOUGH) >= {"sensitivity", "a row beside 3 others"}


def test_division_of_a_release_by_the_actual_batch_size_is_caught():
    assert "units, over batches of all sizes" in failures(LessNoiseForSmallBatches(**SETTINGS))


def test_directions_accounted_as_one_are_caught():
    assert failures(OneReleaseForAll(**SETTINGS), 4, releases=ENOUGH) >= {"sensitivity", *ATTACKS}
    assert "sensitivity" in failures(OneNoiseForAll(num_directions=4, **SETTINGS), 4)


def test_laplace_noise_for_rows_clipped_in_another_norm_is_caught():
    """One coefficient alone shows nothing; the search finds the rows that do."""
    assert failures(LaplaceOfL2(**SETTINGS), 4) == {"sensitivity"}


def test_rows_that_escape_the_clip_are_caught():
    assert failures(InfiniteRowsEscape(**SETTINGS)) == {"sensitivity"}


def test_an_excess_that_no_statistic_could_show_is_caught():
    assert failures(RowsALittleTooLong(**SETTINGS)) == {"sensitivity"}


# ---- Noise that can be predicted ----


@dataclass(frozen=True, kw_only=True)
class PublicNoise(GaussianSum):
    """Adds noise of the right distribution, which `draw` computes from the step and the number of coefficients."""

    draw: object
    steps: itertools.count = field(init=False, default_factory=itertools.count)

    def _add_noise(self, sums):
        noise = self.draw(next(self.steps), len(sums))
        return [total + round(float(one) * self._noise.scale) for total, one in zip(sums, noise, strict=True)]


def of_the_direction(step, count):
    directions = Gaussian(seed=SEED, sizes=[1])
    return [directions.values(index=0, step=step, direction=k).item() for k in range(count)]


def of_a_later_step(step, count):
    return of_the_direction(step + 100, count)


def of_the_signs(step, count):
    length = abs(SYSTEM.gauss(0, 1))
    signs = Rademacher(seed=SEED, sizes=[1])
    return [length * signs.values(index=0, step=step, direction=k).item() for k in range(count)]


def of_torch(step, count):
    return torch.randn(count, generator=torch.Generator().manual_seed(SEED + step)).tolist()


def of_numpy(step, count):
    return np.random.default_rng(SEED + step).standard_normal(count)


def of_a_secret_formula(step, count):
    return np.random.default_rng([3, SEED, step, 5]).standard_normal(count)


def global_torch(step, count):
    return torch.randn(count).tolist()


def global_numpy(step, count):
    return np.random.normal(size=count)


def global_python(step, count):
    return [random.gauss(0, 1) for _ in range(count)]


def reseeded_torch(step, count):
    torch.manual_seed(SEED + step)
    return torch.randn(count).tolist()


def one_for_all(step, count):
    return [SYSTEM.gauss(0, 1)] * count


def each_twice(step, count):
    return np.random.default_rng([SEED, step // 2]).standard_normal(count)


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        (of_the_direction, {"noise and public streams", "noise of two copies"}),
        (of_a_later_step, {"noise and public streams", "noise of two copies"}),
        (of_the_signs, {"noise and public streams"}),
        (of_torch, {"noise and public streams", "noise of two copies"}),
        (of_numpy, {"noise and public streams", "noise of two copies"}),
        (of_a_secret_formula, {"noise of two copies"}),
        (global_torch, {"global generators"}),
        (global_numpy, {"global generators"}),
        (global_python, {"global generators"}),
        (reseeded_torch, {"noise of two copies", "global generators"}),
        (each_twice, {"noise of two copies", "repeated noise", "noise and other noise"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_noise_that_an_attacker_can_draw_is_caught(source, caught):
    assert failures(PublicNoise(draw=source, **SETTINGS)) >= caught


def test_noise_that_directions_share_is_caught():
    planted = PublicNoise(draw=one_for_all, **SETTINGS)
    assert failures(planted, 3) >= {"repeated noise", "noise and other noise"}


# ---- Curves and pictures ----


@pytest.mark.parametrize(("claim", "noise"), [(GaussianClaim, "normal"), (LaplaceClaim, "laplace")])
@pytest.mark.parametrize("multiplier", [0.4, 1.0, 3.0])
def test_curves_match_the_best_tests(claim, noise, multiplier):
    """Count: a threshold on the noise reaches the detections that the curve allows, and the curve's strength."""
    draws = getattr(np.random.default_rng(0), noise)(scale=multiplier, size=400_000)
    for threshold in (-1.0, -0.2, 0.3, 0.9, 1.5):
        alarms, detections = np.mean(draws > threshold), np.mean(draws + 1 > threshold)
        assert claim(multiplier).detections(alarms) == pytest.approx(detections, abs=0.005)
        exact = claim(multiplier).detections(alarms)
        assert claim.strength(np.array(alarms), exact) == pytest.approx(1 / multiplier)


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    result = audit(SOUND["joint"], seed=SEED, releases=200)
    draw_roc(result, tmp_path / "roc.png")
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = replace(
        audit(SOUND["joint"], seed=SEED, releases=200), roc=Roc(false_alarms=(), detections=(), allowed=())
    )
    with pytest.raises(ValueError, match="pip install matplotlib"):
        draw_roc(result, tmp_path / "roc.png")
