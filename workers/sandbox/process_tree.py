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

    #: RssAnon + RssShmem of a child, where pages shared with the zygote count as its own, and what the processes that
    #: it forked hold alone: pages that they share with it count once.
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
    figures = _read_kib(pid, "status")
    anon_kib = figures.get("RssAnon", 0) + figures.get("RssShmem", 0)
    return Memory(anon_kib * 1024, figures.get("VmHWM", 0) * 1024)


def measure_tree(pid: int) -> Memory:
    """Return the memory of everything below `pid`, without `pid` itself."""
    children = list_children(pid)
    measured = [measure_process(child) for child in children]
    for descendant in [each for child in children for each in list_descendants(child)]:
        memory = measure_process(descendant)
        # Walks the page tables: tens of milliseconds for a large process.
        own_kib = _read_kib(descendant, "smaps_rollup").get("Private_Dirty")
        own_bytes = memory.anon_bytes if own_kib is None else min(memory.anon_bytes, own_kib * 1024)
        measured.append(Memory(own_bytes, memory.rss_bytes))
    return Memory(
        anon_bytes=sum(memory.anon_bytes for memory in measured),
        rss_bytes=max((memory.rss_bytes for memory in measured), default=0),
    )


def _read_kib(pid: int, name: str) -> dict[str, int]:
    """Return the sizes in a file of `/proc`; none if the process is gone or may not be looked at."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in Path(f"/proc/{pid}/{name}").read_text(errors="replace").splitlines():
            name_of, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name_of] = int(value.split()[0])
    return sizes
