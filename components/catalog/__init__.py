"""The catalog: samples, verdicts, snapshots, runs, generations, lineage and reviews, in SQLite or PostgreSQL."""
