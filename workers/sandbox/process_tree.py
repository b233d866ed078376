"""A tree of processes as `/proc` shows it: who is in it, how much memory it holds, and how it is ended.

Owns the parsing of `/proc` and the killing of trees; a signal never reaches a pid that may have been given
to another process. Called by `supervisor`, `zygote` and `child`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory of one process or of a tree."""

    #: RssAnon + RssShmem, summed over the tree; pages shared with the zygote count as the child's own.
    anon_bytes: int
    #: VmHWM, the largest of any process in the tree; counts mapped files.
    rss_bytes: int


def list_children(pid: int) -> list[int]:
    """Return the direct children of `pid`, whichever of its threads forked them; none if it is gone."""
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += [int(word) for word in (thread / "children").read_text().split()]
    return children


def list_descendants(pid: int) -> list[int]:
    """Return every process below `pid`, parents before their children."""
    found: list[int] = []
    waiting = list_children(pid)
    while waiting:
        current = waiting.pop()
        found.append(current)
        waiting += list_children(current)
    return found


def kill_children() -> None:
    """Kill and reap everything below the calling process, generation by generation.

    The caller must adopt orphans (`kernel.adopt_orphans`) and be the only one to reap: then each direct child's
    pid stays its own until this function has reaped it, and killing a parent makes its children direct ones.
    """
    while children := list_children(os.getpid()):
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(children[0], 0)


def measure_process(pid: int) -> Memory:
    """Return the memory of one process; zero if it is gone or a zombie."""
    figures = {"RssAnon": 0, "RssShmem": 0, "VmHWM": 0}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in figures:
                figures[name] = int(value.split()[0]) * 1024
    return Memory(figures["RssAnon"] + figures["RssShmem"], figures["VmHWM"])


def measure_tree(pid: int) -> Memory:
    """Return the memory of everything below `pid`, without `pid` itself."""
    measured = [measure_process(descendant) for descendant in list_descendants(pid)]
    return Memory(
        anon_bytes=sum(memory.anon_bytes for memory in measured),
        rss_bytes=max((memory.rss_bytes for memory in measured), default=0),
    )
