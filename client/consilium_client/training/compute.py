"""Where and how precisely a site computes, chosen at run time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """The device, the precision of the forward pass, and the memory layout."""

    #: ``cpu``, ``cuda`` or ``cuda:N``.
    device: str
    precision: Precision
    #: Channels-last layout: faster for bfloat16 convolutions on CUDA, slower on CPU (measured).
    channels_last: bool

    def autocast(self) -> Any:
        """Return the context in which the forward pass runs."""
        import torch

        return torch.autocast(
            torch.device(self.device).type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bfloat16",
        )

    def place(self, value: Any) -> Any:
        """Move a network, or a batch of images (batch, channels, \\*spatial), to the device."""
        import torch

        if not self.channels_last:
            return value.to(self.device, non_blocking=True)
        if isinstance(value, torch.nn.Module):
            value = value.to(self.device)
            # Two- and three-dimensional kernels have layouts of their own; tensors of other ranks
            # are left as they are.
            for parameter in value.parameters():
                layout = _layout(parameter.dim())
                if layout is not None:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
            return value
        return value.to(self.device, non_blocking=True, memory_format=_layout(value.dim()))


def choose_compute(study: Study, device: str = "auto", precision: str | None = None) -> Compute:
    """Choose device and precision for ``study`` on this machine.

    Parameters
    ----------
    device : str
        ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    precision : str or None
        ``auto``, ``float32`` or ``bfloat16``; None takes the study's. ``auto`` is bfloat16 on a
        CUDA device that has it, and float32 on CPU.

    Raises
    ------
    ConsiliumError
        ``state.device`` when the device is not there, ``state.precision`` when it lacks bfloat16.
    """
    import torch

    name = _device_name(device)
    asked = precision or study.training.precision
    if asked not in ("auto", "float32", "bfloat16"):
        raise ConsiliumError(
            "state.precision",
            f"There is no precision {asked!r}.",
            hint="Use auto, float32 or bfloat16.",
        )
    if name == "cpu":
        return Compute("cpu", "bfloat16" if asked == "bfloat16" else "float32", False)
    with torch.cuda.device(name):
        has_bfloat16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if asked == "bfloat16" and not has_bfloat16:
        raise ConsiliumError(
            "state.precision",
            f"The device {name} cannot compute in bfloat16.",
            hint="Set the precision of this site to float32 or auto.",
        )
    half = has_bfloat16 and asked != "float32"
    return Compute(name, "bfloat16" if half else "float32", half)


def repeat_exactly(exactly: bool) -> None:
    """Have this process compute the same result each time, or as fast as it can.

    An operation that has no deterministic kernel (on CUDA some of trilinear interpolation and of
    three-dimensional pooling) runs all the same; PyTorch names it once in a warning.
    """
    import torch

    if exactly:
        # Read when cuBLAS is first used; without it, it is not deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(exactly, warn_only=True)
    # Only to find mistakes in kernels: no result of ours depends on memory that nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False


def _device_name(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConsiliumError(
            "state.device", f"There is no device {device!r}.", hint="Use auto, cpu, cuda or cuda:0."
        )
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise ConsiliumError(
            "state.device",
            f"This machine has no usable device {device}.",
            hint="Use auto or cpu, or check the driver with `nvidia-smi`.",
        )
    return device


def _layout(dimensions: int) -> Any:
    import torch

    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dimensions)
