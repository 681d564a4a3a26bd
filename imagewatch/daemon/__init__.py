"""The daemon: main loop, intake, admission, status."""
