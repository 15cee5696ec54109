"""figures of pictures: what models say of a picture is kept by its pixels, and a verdict says its check's version

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "measured_item",
        sa.Column("measure", sa.String(), nullable=False),
        sa.Column("item", sa.String(), nullable=False),
        sa.Column("figures", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("measure", "item", name=op.f("pk_measured_item")),
    )
    with op.batch_alter_table("verdict") as verdict:
        verdict.add_column(sa.Column("version", sa.String(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("verdict") as verdict:
        verdict.drop_column("version")
    op.drop_table("measured_item")
