"""Where the versions of adapters came from, as the audit log has it. A session comes in, numbers go
out.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from loraplex.platform.models import AuditEvent


async def pulled_versions(session: AsyncSession, tenant: str, name: str) -> set[int]:
    """Versions of an adapter that were pulled from a source; all others were uploaded. Numbers of
    versions never repeat.
    """
    query = select(AuditEvent.after).where(
        AuditEvent.tenant == tenant,
        AuditEvent.action == "adapter.register",
        AuditEvent.subject == name,
    )
    events = [after or {} for after in await session.scalars(query)]
    return {after["version"] for after in events if "source" in after}
