"""The inbox: events, scans, which prompts are complete, and in which order they are claimed."""
