"""A site in a network namespace of its own, on a line that delays, loses, throttles or is cut.

Both ends are TUN devices, so both sides run the kernel's own TCP; what lies between is this module,
which hands packets over or does not. It needs no kernel module beyond TUN, and permission to make
namespaces.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
#: A full queue drops what comes, as a router's does.
_QUEUE_SECONDS: Final = 1.0
_MTU: Final = 1500


def missing() -> str:
    """Return why this machine cannot have such a line; empty where it can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is not installed"
    if not Path("/dev/net/tun").exists():
        return "this kernel has no TUN device"
    name = f"consilium-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this machine does not permit network namespaces"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


@dataclass
class Weather:
    """What the line does to packets now.

    Attributes
    ----------
    delay : float
        Seconds in each direction; a round trip takes twice that.
    loss : float
        Share of packets that are lost, in each direction.
    upload : float
        Bytes per second from the site.
    cut : bool
        Whether nothing passes at all, and nobody is told.
    """

    delay: float = 0.0
    loss: float = 0.0
    upload: float = float("inf")
    cut: bool = False


@dataclass(order=True)
class _Packet:
    due: float
    number: int
    target: int = field(compare=False)
    content: bytes = field(compare=False)


class Line:
    """The namespace, and the line between it and this machine.

    Attributes
    ----------
    here : str
        This machine's address on the line: what a site in the namespace connects to.
    there : str
        The site's.
    weather : Weather
        May be replaced at any time.
    sent : int
        Bytes of packets that came from the site, lost ones too.
    prefix : tuple of str
        Stands before a command that is to run in the namespace.
    """

    def __init__(self) -> None:
        mark = os.getpid() % 100_000
        self.namespace = f"consilium-{mark}"
        self.prefix = ("ip", "netns", "exec", self.namespace)
        # 198.18.0.0/15 is set aside for tests of networks (RFC 2544).
        self._network = f"198.{18 + mark % 2}.{mark // 2 % 256}"
        self.here, self.there = f"{self._network}.1", f"{self._network}.2"
        self.weather = Weather()
        self.sent = 0
        self._devices = (f"cns{mark}a", f"cns{mark}b")
        self._ends: tuple[int, int] = (-1, -1)
        self._chance = random.Random(20261120)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Line:
        _ip("netns", "add", self.namespace)
        try:
            self._ends = (_tun(self._devices[0]), _tun(self._devices[1]))
            here, there = self._devices
            _ip("link", "set", here, "mtu", str(_MTU), "up")
            _ip("address", "add", f"{self.here}/24", "dev", here)
            _ip("link", "set", there, "netns", self.namespace)
            self._inside("link", "set", "lo", "up")
            self._inside("link", "set", there, "mtu", str(_MTU), "up")
            self._inside("address", "add", f"{self.there}/24", "dev", there)
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        self._remove()

    def move(self, last: int) -> None:
        """Give the site another address of the same network, in place of the one it has."""
        device = self._devices[1]
        self._inside("address", "flush", "dev", device)
        self.there = f"{self._network}.{last}"
        self._inside("address", "add", f"{self.there}/24", "dev", device)

    def _inside(self, *arguments: str) -> None:
        _ip("-n", self.namespace, *arguments)

    def _remove(self) -> None:
        for end in self._ends:
            if end >= 0:
                os.close(end)  # its device goes with it
        subprocess.run(["ip", "netns", "delete", self.namespace], capture_output=True, check=False)

    def _carry(self) -> None:
        here, there = self._ends
        waiting: list[_Packet] = []
        numbers = itertools.count()
        free_at = 0.0
        while not self._ended.is_set():
            now = time.monotonic()
            while waiting and waiting[0].due <= now:
                packet = heapq.heappop(waiting)
                if not self.weather.cut:
                    _write(packet.target, packet.content)
            pause = min(0.2, waiting[0].due - now) if waiting else 0.2
            for end in select.select([here, there], [], [], max(0.0, pause))[0]:
                content = os.read(end, 65536)
                weather, now = self.weather, time.monotonic()
                due = now
                if end == there:
                    self.sent += len(content)
                    due = max(now, free_at) + len(content) / weather.upload
                    if due - now > _QUEUE_SECONDS:
                        continue
                    free_at = due
                if weather.cut or self._chance.random() < weather.loss:
                    continue
                target = here if end == there else there
                heapq.heappush(
                    waiting, _Packet(due + weather.delay, next(numbers), target, content)
                )


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _write(end: int, content: bytes) -> None:
    try:
        os.write(end, content)
    except OSError:
        return  # the device is not up, or its queue is full: lost, as on any line


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)
