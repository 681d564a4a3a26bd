"""The inbox: change events, scans, which prompts are complete, and in which order they are claimed. Read-only.

It promises that a prompt is offered only if it is complete, with the images that belong to it, and that no user's files
delay the prompts of others. Complete means unchanged for ``settle_seconds``. A prompt that names its images and comes
by a rename need not settle; its images need not either, if each is at most 64 MiB large and complete by its own
structure. That needs change events. For all else they only make it faster: scans alone find everything.

The modules, in reading order::

    scan            scans one folder or all; what may be claimed next
    tree            all folders of the inbox, and how one is listed
    folder          what is known of one folder and of its prompts
    listing         a folder in pieces, and why a file is no prompt
    stability       since when each prompt is unchanged
    readiness       whether a settled prompt may be claimed, and what it waits for
    prompt_files    the files of a prompt on the disk
    open_files      whether a program has a file open for writing
    candidate       a prompt that may be claimed, and what a scan found
    advice          what to do about a file that waits or is ignored
    order           in which order prompts are claimed
    oldest_prompts  the oldest of very many prompts of one folder
    passed_over     prompts that wait at a cap while others are claimed
    fair_turns      the first-level folders take turns
    schedule        which folder is scanned next, and when
    events          change events of the kernel
    watching        which folders have change events, and which have to be polled
    system_folders  folders that are never scanned: recycle bins, snapshots, metadata
    claimed         how a folder of claimed files is recognized
"""
