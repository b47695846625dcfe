"""What is logged when a training ends by an error."""

import io
import logging

import pytest

from mabn_d2.data.mapper import BadImageError
from mabn_d2.engine.log import share_log

LOGGER = logging.getLogger("detectron2.engine.train_loop")


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("error", [BadImageError("1.jpg can't be used"), ZeroDivisionError("bug")])
def test_traceback_of_a_training(error, wanted, monkeypatch):
    """None for what the user can correct, unless MABN_D2_TRACEBACK asks for it; the message stays."""
    monkeypatch.setenv("MABN_D2_TRACEBACK", str(int(wanted)))
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    LOGGER.addHandler(handler)
    share_log()
    share_log()
    try:
        raise error
    except Exception:
        LOGGER.exception("Exception during training:")
    finally:
        LOGGER.removeHandler(handler)
    text = written.getvalue()
    assert str(error) in text and text.count("Exception during training:") == 1
    assert ("Traceback" in text) == (wanted or isinstance(error, ZeroDivisionError))
