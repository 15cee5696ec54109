"""Sending a run's journal while the run goes on: a thread that never holds the run up."""

import logging
import threading
import time

from flows.tracking.sender import Sender
from flows.tracking.server import first_line, import_mlflow

SEND_EVERY_S = 5.0
RETRY_AT_MOST_EVERY_S = 30.0
DEAD_SERVER_GRACE_S = 2.0  # how long closing waits for a server that refused the last request
SILENT_SERVER_GRACE_S = 10.0  # and for one that has taken a request and not answered yet

logger = logging.getLogger(__name__)


class BackgroundSending:
    """A daemon thread that sends every few seconds, slower while the server is away, and once more at the end."""

    def __init__(self, sender: Sender, every_s: float):
        self.sender, self._every_s = sender, every_s
        self.failing = False  # the last attempt did
        self._awake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._ready = False
        self._thread = threading.Thread(target=self._run, name=f"mlflow {sender.run_uid}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._awake.set()

    def finish(self, timeout_s: float) -> bool:
        """Send the rest. True when the server has everything; one that does not answer is given up early.

        Given up means that the thread ends with the attempt it is at: whoever sends the rest later finds no rival.
        """
        began = time.monotonic()
        self._closing.set()
        self._awake.set()
        while self._thread.is_alive() and time.monotonic() - began < timeout_s:
            self._thread.join(0.05)
            grace = DEAD_SERVER_GRACE_S if self.failing else SILENT_SERVER_GRACE_S
            if self._ready and time.monotonic() - max(began, self.sender.answered_at or began) > grace:
                break
        self._given_up.set()
        self._awake.set()
        sent = not self._thread.is_alive() and not self.sender.pending()
        if not sent:
            logger.warning(
                "MLflow at %s does not answer; what is left of run %s is sent when `safelight doctor` finds it back",
                self.sender.url,
                self.sender.run_uid,
            )
        return sent

    def _run(self) -> None:
        delay = self._every_s
        import_mlflow()
        self._ready = True
        while not self._given_up.is_set():
            closing = self._closing.is_set()
            try:
                self.sender.send_pending()
                self.failing, delay = False, self._every_s
                if closing and not self.sender.pending():
                    return
            except Exception as error:
                if not self.failing:
                    logger.warning(
                        "MLflow at %s does not take run %s for now, the journal keeps it: %s",
                        self.sender.url,
                        self.sender.run_uid,
                        first_line(error),
                    )
                self.failing, delay = True, min(2 * delay, RETRY_AT_MOST_EVERY_S)
            self._awake.wait(0.5 if closing else delay)
            self._awake.clear()
