"""stored captions: versions that people or captioners wrote, beside those of the sources

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "stored_caption",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=False),
        sa.Column("prompt", sa.String(), nullable=False),
        sa.Column("prompt_hash", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stored_caption")),
        sa.UniqueConstraint(
            *("sha256", "dataset", "author", "revision", "prompt_hash", "version"), name="uq_stored_caption_version"
        ),
    )
    with op.batch_alter_table("stored_caption", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_stored_caption_sha256"), ["sha256"], unique=False)
        batch_op.create_index(batch_op.f("ix_stored_caption_dataset"), ["dataset"], unique=False)


def downgrade() -> None:
    op.drop_table("stored_caption")
