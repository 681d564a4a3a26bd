"""Attacks by another user of the machine, with a user id of their own. Skipped where the tests do not run as root."""
