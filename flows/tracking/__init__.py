"""The one package that talks to MLflow.

A run's `tracker` only appends to the local journal. A background `sender` brings the journal to MLflow in `batches` and
remembers how far it got, so a dead or slow `server` never slows a run: whatever is left is sent by `recovery`, once,
because every point carries the time it was journaled with. `registration` starts the `registrar`, a short child that
imports torch to log and register models; `registry` reads and moves the aliases of what was registered.
"""
