"""Sealed work on private rows prints, logs and raises no secret, and draws nothing from global generators."""

import logging
import random
import sys
import warnings

import numpy as np
import pytest
import torch

from hf_dpzo.data.sealed import GlobalRandomnessError, WithheldError, run_sealed


DRAWS = {
    "uniform": lambda: np.random.rand(),
    "normal": lambda: np.random.randn(),
    "two normals": lambda: np.random.randn(2),
    "integers": lambda: np.random.randint(7, dtype=np.uint8),
    "a whole state": lambda: np.random.bytes(4 * 624),
    "bytes": lambda: np.random.bytes(1),
    "shuffle": lambda: np.random.shuffle([1, 2, 3]),
    "choice": lambda: np.random.choice(5),
    "seed": lambda: np.random.seed(1),
    "torch": lambda: torch.rand(()),
    "python": lambda: random.random(),
    "python's normal": lambda: random.gauss(0, 1),
}


def numpy_state() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tobytes(), *rest)


@pytest.fixture(autouse=True)
def _as_before():
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_from_a_global_generator_is_detected_and_undone(name, waiting):
    """This holds even where the draw is the second of a pair of normal numbers, which NumPy returns without a trace."""
    np.random.seed(0)
    if waiting:
        np.random.randn()
    run_sealed("nothing", int)
    before = numpy_state(), torch.get_rng_state().tolist(), random.getstate()
    with pytest.raises(GlobalRandomnessError):
        run_sealed("a loss", DRAWS[name])
    assert (numpy_state(), torch.get_rng_state().tolist(), random.getstate()) == before


def test_draws_between_two_seals_are_allowed():
    for draw in DRAWS.values():
        draw()
        assert run_sealed("nothing", lambda: 5) == 5


def test_draws_from_another_kind_of_bit_generator_are_detected():
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        run_sealed("nothing", int)
        for _ in range(2):
            with pytest.raises(GlobalRandomnessError):
                run_sealed("a loss", np.random.rand)
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING, logging.CRITICAL, 99])
def test_log_messages_are_dropped_at_any_level(level):
    logger, seen = logging.getLogger("of_a_collator"), []
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    logger.setLevel(1)
    try:
        run_sealed("a collator", lambda: logger.log(level, "row %s", 7, extra={"row": 7}))
        with pytest.raises(WithheldError):
            run_sealed("a collator", lambda: logger.log(level, "row %s", 7) or 1 / 0)
        assert seen == []
        logger.log(level, "a public word")
        assert [record.getMessage() for record in seen] == ["a public word"]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_loggers_without_handlers_stay_silent(capsys):
    logger = logging.Logger("of_a_loss")  # It has no parent either, so Python's last resort would print.
    run_sealed("a loss", lambda: logger.error("row 7"))
    assert capsys.readouterr() == ("", "")


def test_output_and_warnings_are_dropped(capsys):
    def work() -> None:
        sys.stdout.write("row 7")
        sys.stderr.buffer.write(b"row 7")
        warnings.warn("row 7", stacklevel=1)

    run_sealed("a loss", work)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, BaseException])
def test_an_error_that_would_end_the_program_is_withheld(error):
    def work() -> None:
        raise error("a secret")

    with pytest.raises(WithheldError) as withheld:
        run_sealed("data_collator", work)
    assert str(withheld.value).startswith(f"data_collator: {error.__name__} was raised; ")
    assert withheld.value.__context__ is None


def test_a_keyboard_interrupt_is_raised():
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sealed("data_collator", work)


def test_a_seal_keeps_the_caches_of_loggers():
    """`logging.disable` empties the cache of each logger of the process, of which there are hundreds."""
    logger = logging.getLogger("of_nobody")
    logger.isEnabledFor(logging.ERROR)
    cached = dict(logger._cache)
    run_sealed("nothing", int)
    assert cached and logger._cache == cached
