"""The daemon: decides what is done when. Everything else is done by what it imports.

It promises that no request is sent while there is a reason to wait, that what was paid for is delivered also during a
hold, and that a stop sends nothing more and loses nothing that was sent. What it keeps in memory it can lose at any
moment: at the next start the journal and the folders show how every job continues.

The modules, in the order in which they are read::

    loop            Daemon: the main loop, one thread; start, scans, messages, end
    parts           what a daemon is made of, and what another configuration changes
    mailbox         messages of other threads and of signals to the loop
    signals         signals as messages
    jobs            the jobs of this process in one table: what may be sent, delivered, claimed
    dispatch        what workers are given next: combines holds, caps, free slots and closed folders
    results         what follows from the result of a job
    recovery        what an earlier process left behind
    admission       holds: when they begin and end, and whether the first byte of a request may leave
    held            which holds there are, for those who ask and for the log
    account         holds of a shared account, as this daemon applies them
    team            one inbox that several daemons process: leads or not, offers and takes
    stores          local disk and shared database: which failed, and how each is tested
    announcements   which holds are to be notified
    burst           whether too many prompts came at the same time
    arrivals        when prompts came, for that
    caps            which prompts wait at a cap, and why
    instructions    what commands ask for: hold, release, retry, another ledger
    intake          what of the inbox may be claimed next; change events
    scanner         which folder of the inbox is scanned now
    report          what the daemon reports while it runs
    status          the content of ``status.json``; also for the commands that read it
    folder_status   writes the status files for the users of the folders
    notice_content  what is in them
    notice_record   where they were written: old ones are removed
    by_folder       what the status shows of each first-level folder: what waits, what of its budget is spent
    ignored         which ignored files the log names
    systemd         the notification protocol of the service manager
    descriptors     how many requests the limit of open files allows
"""
