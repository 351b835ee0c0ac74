"""What libraries log goes to the file, whatever kind of handler they have."""

import io
import logging
import sys

from compressor.run.logs import logged


def test_handlers_follow_the_log_and_go_back(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    chatty = logging.getLogger("a library")
    chatty.propagate = False
    kept = logging.StreamHandler()  # has the stderr of now
    asking = logging.lastResort  # asks for it each time, and lets nobody set it
    assert asking is not None
    chatty.handlers = [kept, asking]
    try:
        with logged(tmp_path / "log.txt"):
            chatty.warning("within")
        chatty.warning("after")
    finally:
        chatty.handlers = []
    assert (tmp_path / "log.txt").read_text().count("within") == 2
    assert terminal.getvalue().count("after") == 2 and "within" not in terminal.getvalue()
