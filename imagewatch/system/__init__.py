"""The machine: disk, folders as open descriptors, strangers' files, file systems, log, terminal text, errors."""
