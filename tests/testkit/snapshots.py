"""Makes snapshots of hosts for tests."""

from typing import Any

from engines.types import HostSnapshot, ModelStatus


def host(host_id: str, *models: ModelStatus, free: int = 1500, used: int = 0, **more: Any) -> HostSnapshot:
    return HostSnapshot(
        host_id=host_id, device="cpu", total_bytes=9000, budget_bytes=5000, used_bytes=used, workspace_bytes=0,
        free_bytes=free, residents=(), models=models, **more,
    )  # fmt: skip
