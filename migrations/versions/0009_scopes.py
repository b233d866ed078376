"""Keys have scopes in place of a flag, say when they were last used, and what replaces them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("scopes", sa.String(64), server_default="read write", nullable=False))
    op.add_column("api_keys", sa.Column("last_used_at", Instant(), nullable=True))
    op.add_column("api_keys", sa.Column("replaced_by", sa.String(32), nullable=True))
    op.execute("UPDATE api_keys SET scopes = 'read write operate' WHERE is_operator")
    op.drop_column("api_keys", "is_operator")


def downgrade() -> None:
    op.add_column("api_keys", sa.Column("is_operator", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.execute("UPDATE api_keys SET is_operator = TRUE WHERE scopes LIKE '%operate%'")
    for name in ("replaced_by", "last_used_at", "scopes"):
        op.drop_column("api_keys", name)
