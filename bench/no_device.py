"""A driver for Triton that compiles for a GPU and launches nothing: what is left is what the CPU does."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget


class Utilities:
    """What Triton asks of a device before it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        # module, function, registers, spills, threads
        return 1, 2, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class NoDevice:
    """Stands for triton.runtime.driver.active; keeps the arguments of launches while `launches` is a list."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = Utilities()
        self.launches: list[tuple] | None = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one for each architecture
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """A launcher of one kernel."""

        def launch(*arguments: Any) -> None:
            if self.launches is not None:
                self.launches.append((metadata.name, arguments))

        return launch
