"""NVIDIA GPUs as their management library (NVML) reads them: memory, use, power, energy, clocks, what holds them back.

Names and units of the readings follow NVML's reference, https://docs.nvidia.com/deploy/nvml-api/. Nothing here needs
torch or a CUDA context, so a reading costs the GPU nothing.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, TypedDict

# nvmlClocksEventReason*: bit, what it is called. Bit 0 is missing on purpose: an idle GPU lowers its clocks by itself.
THROTTLE_REASONS = (
    (0x002, "application clocks setting"),
    (0x004, "software power cap"),
    (0x008, "hardware slowdown"),
    (0x010, "sync boost"),
    (0x020, "software thermal slowdown"),
    (0x040, "hardware thermal slowdown"),
    (0x080, "hardware power brake"),
    (0x100, "display clock setting"),
)
_IDLE_BIT = 0x001
_RETRY_S = 5.0


class GpuReading(TypedDict):
    """One GPU at one moment; a reading that the device or its driver does not offer is None.

    Attributes:
        index: of NVML, which counts every GPU whatever CUDA_VISIBLE_DEVICES says; uuid: "GPU-…"; name.
        own: the engine's model is on it.
        error: why nothing could be read this time, None if it could.
        memory_total_bytes, memory_used_bytes: of the device; used by every process, without what the driver reserves.
        utilization_percent: share of the last sample period (up to a second) in which a kernel ran.
        memory_utilization_percent: share of it in which device memory was read or written.
        temperature_c: of the GPU's die, degrees Celsius.
        power_w, power_limit_w: of the whole board, watts; a mean over the last second on Ampere and newer.
        energy_mj: of the whole board since the driver was loaded, millijoules (Volta and newer).
        sm_clock_mhz, memory_clock_mhz: now.
        clocks_event_reasons: NVML's bit mask; throttle_reasons: labels of its bits, without "idle".
    """

    index: int
    uuid: str | None
    name: str | None
    own: bool
    error: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    utilization_percent: float | None
    memory_utilization_percent: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    energy_mj: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    clocks_event_reasons: int | None
    throttle_reasons: list[str] | None


class GpuReader:
    """Reads every GPU of the machine. Not thread-safe.

    Attributes:
        reason: why the last reading had no GPU, None if it had one.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._nvml: Any = None
        self._lost_s: float | None = None
        self._known: dict[int, GpuReading] = {}
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed."
            return
        self._start()

    def read(self) -> list[GpuReading] | None:
        """One reading of each GPU, in NVML's order; None if there is none, see :attr:`reason`. Never raises."""
        if self._nvml is None:
            return None
        if self._lost_s is not None:
            if time.monotonic() - self._lost_s < _RETRY_S:
                return None
            self._restart()
            if self._lost_s is not None:
                return None
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:  # a driver that was unloaded or replaced
            self._lose(f"the GPUs cannot be read: {error}.")
            return None
        readings = [self._read_device(index) for index in range(count)]
        broken = [reading["error"] for reading in readings if reading["error"] is not None]
        if readings and len(broken) == len(readings):
            self._lose(f"the GPUs cannot be read: {broken[0]}.")
            return None
        self.reason = None if readings else "there is no NVIDIA GPU."
        return readings or None

    def close(self) -> None:
        """Release the library; later readings have no GPU."""
        if self._nvml is not None:
            nvml, self._nvml, self.reason = self._nvml, None, "the telemetry was closed."
            _ignoring(nvml, nvml.nvmlShutdown)

    def _start(self) -> None:
        try:
            self._nvml.nvmlInit()
        except (
            self._nvml.NVMLError_LibraryNotFound
        ):  # comes with the driver: it will not appear under a running process
            self._nvml, self.reason = None, "there is no NVIDIA driver on this machine."
        except self._nvml.NVMLError as error:
            self._lose(f"NVIDIA's driver cannot be asked: {error}.")
        else:
            self._lost_s = None

    def _lose(self, reason: str) -> None:
        self.reason, self._lost_s = reason, time.monotonic()

    def _restart(self) -> None:
        """Begin again, for a driver that was reloaded: what the old one has given is void."""
        _ignoring(self._nvml, self._nvml.nvmlShutdown)
        self._known.clear()
        self._start()

    def _read_device(self, index: int) -> GpuReading:
        nvml = self._nvml
        reading = _nothing_read(index)
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            reading["name"] = self._ask(nvml.nvmlDeviceGetName, handle)
            reading["uuid"] = self._ask(nvml.nvmlDeviceGetUUID, handle)
            self._read_load(reading, handle)
            self._read_power(reading, handle)
            self._read_clocks(reading, handle)
        except nvml.NVMLError as error:  # a GPU that fell off the bus does not even tell its name any more
            known = self._known.get(index, reading)
            return {**_nothing_read(index), "uuid": known["uuid"], "name": known["name"], "error": str(error)}
        self._known[index] = reading
        return reading

    def _read_load(self, reading: GpuReading, handle: Any) -> None:
        nvml = self._nvml
        # the first version counts what the driver reserves as used; drivers before 510 have no other
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        memory = memory or self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        if memory is not None:
            reading["memory_total_bytes"], reading["memory_used_bytes"] = memory.total, memory.used
        if rates is not None:
            reading["utilization_percent"], reading["memory_utilization_percent"] = rates.gpu, rates.memory
        reading["temperature_c"] = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)

    def _read_power(self, reading: GpuReading, handle: Any) -> None:
        nvml = self._nvml
        reading["power_w"] = _thousandth(self._ask(nvml.nvmlDeviceGetPowerUsage, handle))
        reading["power_limit_w"] = _thousandth(self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle))
        reading["energy_mj"] = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)

    def _read_clocks(self, reading: GpuReading, handle: Any) -> None:
        nvml = self._nvml
        reading["sm_clock_mhz"] = self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
        reading["memory_clock_mhz"] = self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)
        mask = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if mask is None:  # its name before driver 535
            mask = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        reading["clocks_event_reasons"] = mask
        reading["throttle_reasons"] = None if mask is None else throttle_labels(mask)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """An answer, or None where the device or its driver has none: virtual GPUs and MIG slices leave out some.

        Raises:
            NVMLError: if the device itself cannot be reached any more.
        """
        nvml = self._nvml
        try:
            return question(*arguments)
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
            raise
        except nvml.NVMLError_ResetRequired:
            raise
        except nvml.NVMLError:
            return None


def throttle_labels(mask: int) -> list[str]:
    """Labels of what holds the clocks back; an idle GPU's lower clocks are not among it.

    Args:
        mask: of ``nvmlDeviceGetCurrentClocksEventReasons``.

    >>> throttle_labels(0x1), throttle_labels(0x24), throttle_labels(0x8000)
    ([], ['software power cap', 'software thermal slowdown'], ['reason 0x8000'])
    """
    labels = [label for bit, label in THROTTLE_REASONS if mask & bit]
    unknown = mask & ~(_IDLE_BIT | sum(bit for bit, _ in THROTTLE_REASONS))
    return [*labels, f"reason {unknown:#x}"] if unknown else labels


def own_gpu(readings: list[GpuReading] | None) -> GpuReading | None:
    """The reading of the GPU that the engine's model is on."""
    return next((reading for reading in readings or () if reading["own"]), None)


def gpu_uuid(device: Any) -> str | None:
    """Which GPU a torch device is, as NVML names it: CUDA_VISIBLE_DEVICES makes the two count differently.

    Args:
        device: a ``torch.device``, or None.

    Returns:
        "GPU-…"; "" for a GPU that does not tell; None for no GPU at all.
    """
    if getattr(device, "type", None) != "cuda":
        return None
    from engine.device import gpu_properties  # torch should load only where there is a model

    uuid = getattr(gpu_properties(device), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


def mark_own(readings: list[GpuReading], uuid: str | None) -> None:
    """Mark the engine's GPU. The only GPU of a machine is it even if the names differ (a MIG slice has its own).

    Args:
        uuid: from :func:`gpu_uuid`; None marks none.
    """
    for reading in readings:
        reading["own"] = uuid is not None and (reading["uuid"] == uuid or len(readings) == 1)


def _nothing_read(index: int) -> GpuReading:
    names = dict.fromkeys(GpuReading.__annotations__)
    reading: Any = {**names, "index": index, "own": False}
    return reading  # type: ignore[no-any-return]


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3


def _ignoring(nvml: Any, action: Callable[[], Any]) -> None:
    try:
        action()
    except nvml.NVMLError:
        return
