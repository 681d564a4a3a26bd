"""The machine: files, folders, file systems, log, terminal text and errors. Nothing here knows of prompts.

It promises three things. A file that was written is durable before a name shows it. No path below one of our folders
reaches a place outside it, whatever others put there. Nothing that others wrote reaches a terminal or a log unescaped.

The modules, in reading order::

    errors        the exceptions, and what each ends
    exits         the exit codes of all commands
    text          text that is safe to show; numbers and times as people read them
    folders       our folders as open descriptors, and the way to what is below them
    untrusted     opens files that other people wrote
    permissions   mode and group of published files
    disk          durable writes
    disk_moves    moves, also to another file system
    disk_calls    the system calls that change a disk, one for each method
    disk_errors   an OSError about the local disk becomes a SpoolError with the next action
    kernel        rename without replacing, and reserving room: what Python does not have
    locks         one process for each inbox and each state folder
    shared        one call for several threads that want the same
    leftovers     temporary files of a daemon that was killed
    file_systems  which file system a folder is on, what it can do, and whether it is still mounted
    memory        gives free memory back to the system
    masking       removes the API key from everything that is saved or shown
    log           one line for each event
    bundled       the files that come with imagewatch beside its code
"""
