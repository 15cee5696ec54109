"""What Safelight does, in plain Python and torch: no orchestrator, tracker or dashboard is imported below this line."""
