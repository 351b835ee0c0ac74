"""Progress: bars where a person watches, plain lines elsewhere, always on the real stderr."""

import contextlib
import importlib
import io

from compressor.screen import Screen

RichScreen = importlib.import_module("compressor.cli.screen").RichScreen


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def work(screen: Screen):
    with screen.progress("outer", 2) as outer:
        for _ in range(2):
            with screen.progress("inner [1/2]", 1) as inner:
                inner(1)
            outer(1)
    screen.say("done [bold]here[/bold]")


def test_no_terminal_means_one_line_per_task(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    work(RichScreen())
    lines = ["  outer", "  inner [1/2]", "  inner [1/2]", "done [bold]here[/bold]"]
    assert stream.getvalue().splitlines() == lines


def test_a_terminal_gets_bars_with_percent_and_times(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    work(RichScreen())
    shown = stream.getvalue()
    assert "outer" in shown and "50%" in shown and "left" in shown
    assert "done [bold]here[/bold]" in shown


def test_no_color_draws_bars_without_colour(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    work(RichScreen())
    assert "\x1b[3" not in stream.getvalue()


def test_the_screen_keeps_its_stream_while_others_are_redirected(monkeypatch):
    stream, log = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    screen = RichScreen()
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        work(screen)
        print("chatter")
    assert log.getvalue() == "chatter\n"
    assert "chatter" not in stream.getvalue()
