"""The machine itself: who may read our files, disk, memory, open files, and whether a GPU works."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from consilium_common.diagnosis.steps import Found
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import data_size

#: Less room than this, and updates, registers and logs are soon in the way of each other.
ROOM: Final = 2 * 10**9
#: Below this a database may not be written to its end.
_NO_ROOM: Final = 100 * 10**6
_MEMORY: Final = 4 * 10**9
_GPU_MEMORY: Final = 4 * 10**9
_PRODUCT: Final = 512
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_CGROUPS: Final = (  # version 2, version 1: limit, and what is used of it
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def check_secrets(secrets: Iterable[Path]) -> None:
    """Check that files with secrets are ours alone and that we can read them.

    Raises
    ------
    ConsiliumError
        ``identity.key-exposed``, ``identity.no-key``.
    """
    for path in secrets:
        if not path.exists():
            continue
        if path.stat().st_mode & 0o077:
            raise ConsiliumError(
                "identity.key-exposed",
                "A secret can be read by other users of this machine.",
                where=str(path),
                hint=f"Run `chmod 600 {path}`; if others may have read it, ask for a new identity.",
            )
        if not os.access(path, os.R_OK):
            raise ConsiliumError(
                "identity.no-key",
                "A secret cannot be read by this user.",
                where=str(path),
                hint="Run the command as the user who runs the rest, or give the folder to it "
                "(`chown -R`).",
            )


def check_disk(folder: Path, *, needed: int = ROOM) -> Found:
    """Look at the room on the disk of ``folder``; ``needed`` in bytes.

    Raises
    ------
    ConsiliumError
        ``state.disk`` when there is as good as none, or the folder cannot be written.
    """
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        raise ConsiliumError(
            "state.disk",
            "The folder cannot be written by this user.",
            where=str(folder),
            hint="Check who owns it, and whether its disk is mounted read-only.",
        )
    said = f"{data_size(free)} free"
    if free < _NO_ROOM:
        raise ConsiliumError(
            "state.disk",
            f"The disk is full: {said}.",
            where=str(folder),
            hint="Free space, or move the folder to a larger disk.",
        )
    if free < needed:
        return Found.warning(
            f"{said}, {data_size(needed)} are wanted",
            "Free space, or move the folder to a larger disk.",
            free=free,
        )
    return Found(said, facts={"free": free})


def check_memory() -> Found:
    """Look at the memory that is left to this process: the machine's, or its container's."""
    total, left = _memory()
    said = f"{data_size(left)} of {data_size(total)} free"
    facts = {"total": total, "free": left}
    if left < _MEMORY:
        return Found.warning(
            said,
            "Large volumes may not fit: end other programs, or give the machine or container "
            f"more ({data_size(_MEMORY)} free are enough for most studies).",
            **facts,
        )
    return Found(said, facts=facts)


def check_open_files(needed: int) -> Found:
    """Look at how many files and connections a process of ours may have open.

    Long-running ones raise their own limit as far as the system lets an ordinary user.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Found("any number at a time")
    if hard >= needed:
        return Found(f"up to {hard} at a time", facts={"limit": hard})
    return Found.warning(
        f"up to {hard} at a time",
        f"Each connection takes one: allow {needed} (`ulimit -Hn {needed}`, or LimitNOFILE= of the "
        "service).",
        limit=hard,
    )


def check_gpu(device: str = "auto") -> Found:
    """Find the GPU and compute something on it that the CPU can check.

    Parameters
    ----------
    device : str
        As in site.json: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    ConsiliumError
        ``state.device`` when the device that is asked for is not there, ``state.gpu`` when one is
        there and does not compute.
    """
    if device == "cpu":
        return Found("none is wanted: site.json says to compute on the CPU")
    import torch

    if not torch.cuda.is_available():
        return _no_gpu(device, str(torch.version.cuda or ""))
    name = "cuda" if device == "auto" else device
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise _no_device(device, f"there are {torch.cuda.device_count()}, counted from 0")
    try:
        free, total = torch.cuda.mem_get_info(index)
        worst = _product_error(torch, name)
    except RuntimeError as error:
        raise ConsiliumError(
            "state.gpu",
            f"The GPU is there, and a matrix product on it fails: {_first_line(error)}.",
            where=name,
            hint="Other programs hold its memory: `nvidia-smi` names them."
            if isinstance(error, torch.OutOfMemoryError)
            else "Often driver and CUDA do not fit, or this GPU is too old or too new for the "
            f"installed torch: compare `nvidia-smi` with CUDA {torch.version.cuda}, or set "
            '"device": "cpu" in site.json.',
        ) from error
    if not worst < 1e-3:
        raise ConsiliumError(
            "state.gpu",
            f"The GPU computes wrongly: a matrix product is off by {worst:.2g}.",
            where=name,
            hint="Do not train on it: look at its ECC errors with `nvidia-smi -q`.",
        )
    major, minor = torch.cuda.get_device_capability(index)
    facts = {
        "name": torch.cuda.get_device_name(index),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "capability": f"{major}.{minor}",
        "free": free,
        "total": total,
        "relative_error": worst,
    }
    said = (
        f"{facts['name']}, driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}, "
        f"{data_size(free)} of {data_size(total)} free; a matrix product is right"
    )
    if free < _GPU_MEMORY:
        return Found.warning(
            said, "Other programs hold its memory: `nvidia-smi` names them.", **facts
        )
    return Found(said, facts=facts)


def driver_version() -> str:
    """Return the release of NVIDIA's kernel driver; empty where none is loaded."""
    try:
        words = _DRIVER.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _product_error(torch: Any, device: str) -> float:
    """Multiply on the device and, in float64, on the CPU; return the largest relative error."""
    maker = torch.Generator().manual_seed(1)
    left, right = (torch.randn(_PRODUCT, _PRODUCT, generator=maker) for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).double().cpu()
    return float((found - exact).abs().max() / exact.abs().max())


def _no_gpu(device: str, cuda: str) -> Found:
    driver = driver_version()
    if not cuda:
        why = "the installed torch is one without CUDA"
        todo = "Install torch with CUDA"
    elif driver:
        why = f"driver {driver} is loaded, and torch (CUDA {cuda}) cannot use it"
        todo = "Update the driver, or give this user or container access to the GPU"
    else:
        why = "no NVIDIA driver is loaded"
        todo = "Install the driver"
    if device != "auto":
        raise _no_device(device, why)
    return Found.warning(
        f"none: {why}",
        "Training runs on the CPU, many times slower; other sites wait for it. If this machine has "
        f'a GPU: {todo}. If not, set "device": "cpu" in site.json.',
        cuda=cuda,
        driver=driver,
    )


def _no_device(device: str, why: str) -> ConsiliumError:
    return ConsiliumError(
        "state.device",
        f"site.json asks for {device}, which is not usable: {why}.",
        hint='Check the driver with `nvidia-smi`, or set "device" to auto or cpu.',
    )


def _memory() -> tuple[int, int]:
    """Return bytes in total and left, by the kernel, and by the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):  # with what the page cache would give back
                left = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    for limit, used in _CGROUPS:
        try:
            most, now = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        if most < total:
            total, left = most, min(left, max(0, most - now))
    return total, left


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else "unknown"
