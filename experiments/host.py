"""The attack's process, from outside: started with nothing but where modules lie, asked job by job, and killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from simulator import parcel
from simulator.answer import printable

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "TORCH_HOME", "SYSTEMROOT")
"""Environment variables that the attack's process gets; what else is set may say something, or hold a secret."""

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

LONGEST_LINE, LAST_WORDS = 300, 12


class Died(Exception):
    """The attack's process is no more, or no longer speaks the protocol; the message is the reason."""


class Host:
    """The attack's process, alive until :meth:`close`."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._scratch = tempfile.mkdtemp(prefix="fedpeek-attack-")
        environment = {name: os.environ[name] for name in KEPT if name in os.environ} | THREADS | {"TMPDIR": self._scratch}
        spec = find_spec("simulator.host")
        assert spec is not None
        assert spec.origin is not None
        self._process = subprocess.Popen(
            [sys.executable, "-I", spec.origin], cwd=self._scratch, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._relay = threading.Thread(target=_relay, args=(self._process.stderr, self._last_words), daemon=True)
        self._relay.start()
        with contextlib.suppress(OSError):  # it died at once; the first question tells
            self._requests.write(json.dumps({"path": search_path(), "modules": list(modules)}).encode() + b"\n")
            self._requests.flush()

    def ask(self, job: Mapping[str, Any], hear: Callable[[Mapping[str, Any]], None], limit: int) -> None:
        """Send a job and hear every message about it.

        Raises:
            Died: the process ended, or sent what is no message.
        """
        try:
            parcel.write(self._requests, job)  # type: ignore[arg-type]
            while True:
                message = parcel.read(self._replies, limit)  # type: ignore[arg-type]
                if message["kind"] == "done":
                    return
                hear(message)
        except (EOFError, OSError):
            raise Died(f"the attack's process {self._end()}") from None
        except (parcel.ParcelError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.close()
            raise Died(f"the attack's process sent what is no answer: {error}") from error
        except BaseException:  # interrupted in the middle of a message: the next job would read its rest
            self.close()
            raise

    def close(self) -> None:
        """End the process and whatever it is at."""
        self._process.kill()
        self._process.wait()
        self._relay.join(1.0)
        for stream in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                stream.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @property
    def cpu_seconds(self) -> float | None:
        """CPU time that the process has used; None where the system does not say."""
        try:
            parts = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return None
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime and stime

    def _end(self) -> str:
        """How the process ended, with its last line on standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed the pipe and live on
            self._process.wait(2.0)
        code = self._process.poll()
        self.close()
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            known = {item.value: item.name for item in signal.Signals}
            how = f"was killed by {known.get(-code, -code)}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
        words = next((line for line in self._last_words if "error" in line.lower()), "")
        return how + (f": {words}" if words else "")


def search_path() -> list[str]:
    """Where modules are imported from, without what is relative to the evaluator's directory."""
    return [os.path.abspath(entry) if entry else os.getcwd() for entry in sys.path]


def _relay(stream: IO[bytes], last_words: deque[str]) -> None:
    """Pass on what the attack prints, line by line, and keep the end of it."""
    for line in stream:
        text = printable(line.decode(errors="replace").rstrip("\n"), 10 * LONGEST_LINE)
        last_words.append(printable(text.strip(), LONGEST_LINE))
        print(text, file=sys.stderr)
