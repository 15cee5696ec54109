"""What a command shows while it works, on a terminal."""

from io import StringIO

from rich.console import Console

from flows.console import Reporter, scan_event


def test_a_scan_is_shown_as_it_goes_and_nothing_of_it_stays():
    with Reporter(as_json=False) as reporter:
        shown = StringIO()
        reporter.console = Console(file=shown, force_terminal=True, width=100, markup=False)
        reporter.event(scan_event("listing", 1_000_000, None))
        reporter.event(scan_event("scanning", 120_000, 1_000_000))
        assert reporter._progress is not None
        reporter._progress.refresh()
        assert "listing" in shown.getvalue() and "120,000 of 1,000,000" in shown.getvalue()
        assert [task.description for task in reporter._progress.tasks] == ["scanning"]
        stage = {"event": "stage", "stage": "curate", "outcome": "produced", "seconds": 1.0, "items": 1}
        reporter.event(stage)
        assert reporter._progress.tasks == []
